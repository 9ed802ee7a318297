"""The compiled functions as Python sees them: structures of pointers and sizes that mirror those of step.c.

A structure keeps the tensors it points into alive. `LONGREACH_NATIVE=0` turns the library off.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longreach.native.build import build

MAX_ROWS = 8
"""Rows up to which a product row by row beats a blocked matrix product, which reuses what it has loaded."""


class Bound(ctypes.Structure):
    """A C structure filled from tensors and numbers by field name; a missing tensor is a null pointer."""

    def __init__(self, **values: Any) -> None:
        self.kept = [v for v in values.values() if isinstance(v, (Tensor, Bound))]
        plain = {k: (v.data_ptr() if isinstance(v, Tensor) else v) for k, v in values.items() if v is not None}
        super().__init__(**plain)
        self.pointer = ctypes.addressof(self)


class Hyper(Bound):
    _fields_ = [(name, c_void_p) for name in ("fn", "base", "scale", "norm")] \
        + [(name, c_int64) for name in ("n", "D", "iters", "constrained")] \
        + [(name, c_float) for name in ("eps", "norm_eps", "input_eps")]  # fmt: skip


class CompressorWeights(Bound):
    _fields_ = [(name, c_void_p) for name in ("wkv", "wgate", "ape")] + [("channels", c_int64), ("ratio", c_int64)]


class AttentionWeights(Bound):
    _fields_ = [(name, c_void_p) for name in ("wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_a", "wo_b", "sink",
                                              "index_wq_b", "index_weights")] \
        + [("compressor", CompressorWeights), ("index_compressor", CompressorWeights)] \
        + [(name, c_int64) for name in ("D", "rank", "N", "H", "rope", "groups", "o_rank", "index_heads", "index_dim")] \
        + [(name, c_float) for name in ("eps", "scale", "index_scale")]  # fmt: skip


class MixtureWeights(Bound):
    _fields_ = [(name, c_void_p) for name in ("gate", "bias", "w1", "w3", "w2", "shared_w1", "shared_w3", "shared_w2",
                                              "table")] \
        + [(name, c_int64) for name in ("D", "E", "K", "f", "scoring", "shared_f")] \
        + [("limit", c_float), ("scale", c_float)]  # fmt: skip


P, N = c_void_p, c_int64
_ARGUMENTS = {
    "lr_linear": (P, P, P, N, N, N),
    "lr_hyper_enter": (P, N, P, P, P, P),
    "lr_hyper_leave": (P, N, P, P, P, P),
    "lr_collapse": (P, N, P, P),
    "lr_attention_in": (P, N, P, P, P, P, P, P, P, P, P, P),
    "lr_attend": (P, P, P, N, P, N, P, P),
    "lr_attention_out": (P, N, P, P, P, P),
    "lr_index_scores": (P, P, P, N, N, N, P),
    "lr_select_top": (P, N, N, P, P),
    "lr_mixture": (P, N, P, P, P, P, P),
}


@cache
def _load() -> tuple[Any, str]:
    if os.environ.get("LONGREACH_NATIVE", "1") == "0":
        return None, "turned off by LONGREACH_NATIVE=0"
    path, how = build()
    if path is None:
        return None, how
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path} cannot be loaded ({error})"
    loaded.lr_set_threads.argtypes, loaded.lr_set_threads.restype = (c_int,), None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded, how


def library() -> Any:
    """The loaded library, compiled on first use, set to torch's number of threads; None if there is none."""
    loaded, _ = _load()
    if loaded is not None:
        loaded.lr_set_threads(torch.get_num_threads())
    return loaded


def status() -> str:
    """How the library came about, or why there is none: one phrase for a command to print."""
    return _load()[1]
