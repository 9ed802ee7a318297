"""C beside PyTorch: the arithmetic of whole layers, compiled on the machine that runs it.

`library()` gives the loaded functions, or None where there is no C compiler; everything then runs on PyTorch alone.
"""

from longreach.native.library import library, status

__all__ = ["library", "status"]
