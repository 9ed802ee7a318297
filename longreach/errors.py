"""What can go wrong because of a user or a file. Each message gives the value, what is allowed, and what to do.

Every class also refines the standard type it resembles, so `except ValueError` keeps working. A bug of ours is an
`assert`, never one of these. `longreach.cli` turns any `LongreachError` into one line on stderr and exit code 2.
"""


class LongreachError(Exception):
    """Root of everything a user or a file can cause."""


class ConfigError(LongreachError, ValueError):
    """An impossible or unknown configuration value."""


class ShapeError(LongreachError, ValueError):
    """Tensors that do not fit together."""


class CheckpointError(LongreachError, RuntimeError):
    """A checkpoint that cannot be read or written: truncated, missing or mis-shaped tensors, unknown layout."""


class CacheError(LongreachError, RuntimeError):
    """A cache asked for something it no longer holds, or used with a model it was not made for."""


class RequestError(LongreachError, ValueError):
    """A request that cannot be served: a prompt beyond the context, an unknown token, an unreadable file."""
