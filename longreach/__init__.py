"""Longreach: DeepSeek-V4 in one readable codebase.

    import longreach
    model = longreach.load_model("runs/quickstart")
    logits = model(tokens)
    answers = longreach.LLM("runs/quickstart").generate(["def main"], longreach.SamplingParams(max_tokens=64))

Public names are loaded on first use, so `import longreach` and `longreach --help` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longreach.checkpoint.load import load_model
    from longreach.engine.llm import LLM
    from longreach.engine.sampling import SamplingParams
    from longreach.errors import LongreachError
    from longreach.model.cache import load_cache
    from longreach.model.config import ModelConfig
    from longreach.model.hyper_connection import HyperConnection, HyperWrapped
    from longreach.model.transformer import Transformer
    from longreach.optim.muon import Muon

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "HyperConnection",
    "HyperWrapped",
    "LongreachError",
    "ModelConfig",
    "Muon",
    "SamplingParams",
    "Transformer",
    "__version__",
    "load_cache",
    "load_model",
]

_HOME = {
    "LLM": "longreach.engine.llm",
    "SamplingParams": "longreach.engine.sampling",
    "ModelConfig": "longreach.model.config",
    "Transformer": "longreach.model.transformer",
    "HyperConnection": "longreach.model.hyper_connection",
    "HyperWrapped": "longreach.model.hyper_connection",
    "load_model": "longreach.checkpoint.load",
    "load_cache": "longreach.model.cache",
    "Muon": "longreach.optim.muon",
    "LongreachError": "longreach.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'longreach' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
