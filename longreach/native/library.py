"""The compiled functions as Python sees them: structures of pointers and sizes that mirror those of rows.h.

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

MAX_ROWS = 32
"""Rows up to which these products beat PyTorch's on matrices that come from memory: 1.1 to 1.7 times at 16 rows."""


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
    _fields_ = [(name, c_void_p) for name in ("wkv", "wgate", "ape", "norm")] \
        + [(name, c_int64) for name in ("channels", "ratio", "overlap")] + [("eps", c_float)]  # fmt: skip


class AttentionWeights(Bound):
    _fields_ = [(name, c_void_p) for name in ("wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_a", "wo_b", "sink",
                                              "index_wq_b", "index_weights", "frequencies")] \
        + [("compressor", CompressorWeights), ("index_compressor", CompressorWeights)] \
        + [(name, c_int64) for name in ("D", "rank", "N", "H", "rope", "groups", "o_rank", "index_heads", "index_dim",
                                        "window", "ratio", "topk")] \
        + [(name, c_float) for name in ("eps", "scale", "index_scale")]  # fmt: skip


class MixtureWeights(Bound):
    _fields_ = [(name, c_void_p) for name in ("gate", "bias", "w1", "w3", "w2", "shared_w1", "shared_w3", "shared_w2",
                                              "table")] \
        + [(name, c_int64) for name in ("D", "E", "K", "f", "scoring", "shared_f")] \
        + [("limit", c_float), ("scale", c_float)]  # fmt: skip


class LayerWeights(Bound):
    _fields_ = [("attn_hc", Hyper), ("ffn_hc", Hyper), ("attn", AttentionWeights), ("ffn", MixtureWeights)]


SEGMENT_FIELDS = (
    "row", "count", "first", "held", "window", "raw", "index_raw", "window_lo", "raw_lo",
    "base", "step", "at", "start", "size", "index_base", "index_step", "index_at", "index_start", "index_size",
)  # fmt: skip
"""The columns of an int64 table whose rows are C's `Segment`s; addresses are numbers there."""


class Rows(Bound):
    _fields_ = [(name, c_int64) for name in ("M", "num_segments", "dense")] \
        + [(name, c_void_p) for name in ("token", "position", "table", "streams", "segments", "routing_in",
                                         "selection_in")] \
        + [("selection_width", c_int64)] \
        + [(name, c_void_p) for name in ("routing", "selection", "scores")]  # fmt: skip


class Network(Bound):
    _fields_ = [("layers", c_void_p)] \
        + [(name, c_void_p) for name in ("embed", "frequencies", "compressed_frequencies", "enorm", "hnorm", "e_proj",
                                         "h_proj")] \
        + [(name, c_int64) for name in ("num_layers", "vocab", "pairs")] \
        + [(name, c_float) for name in ("enorm_eps", "hnorm_eps")] \
        + [("collapse", Hyper), ("mtp_collapse", Hyper)]  # fmt: skip


HOME_FIELDS = (*SEGMENT_FIELDS, "window_step", "raw_step", "index_raw_step", "keep")
"""The columns of an int64 table whose rows are C's `Home`s."""

STANDING_FIELDS = ("count", "first", "held", "slot", "window_lo", "pages")
"""The columns of an int64 table whose rows are C's `Standing`s."""


class SequencePass(Bound):
    """C's `Pass`."""

    _fields_ = [(name, c_int64) for name in ("M", "num_sequences", "num_keeps", "last_only")] \
        + [(name, c_void_p) for name in ("token", "standing", "raw_lo", "homes", "before", "streams", "hidden")]  # fmt: skip


P, N = c_void_p, c_int64
_ARGUMENTS = {
    "lr_linear": (P, P, P, N, N, N),
    "lr_norm": (P, P, P, N, N, c_float),
    "lr_rope_table": (P, N, P, N, P),
    "lr_hyper_enter": (P, N, P, P, P, P, P),
    "lr_hyper_leave": (P, N, P, P, P, P),
    "lr_collapse": (P, N, P, P, P),
    "lr_attention_in": (P, N, P, P, P, P, P, P, P, P, P, P),
    "lr_attend": (P, P, P, N, P, N, P),
    "lr_attention_out": (P, N, P, P, P, P),
    "lr_index_scores": (P, P, P, N, N, N, P),
    "lr_select_top": (P, N, N, P, P),
    "lr_mixture": (P, N, P, P, P, P),
    "lr_layer": (P, P),
    "lr_advance": (P, P),
    "lr_draft": (P, P),
    "lr_tell": (P, N, P, P, P),
}
_CAN_FAIL = {"lr_attend", "lr_index_scores", "lr_mixture", "lr_layer", "lr_advance", "lr_draft", "lr_tell"}
"""They ask for memory, and return 1 if there was none; 2 for a token the model does not have."""


def _checked(failed: int, function: Any, arguments: Any) -> None:
    if failed == 2:
        raise IndexError("a token id is outside the model's vocabulary; give ids from 0 to vocab_size - 1")
    if failed:
        raise MemoryError("no memory for one pass of the compiled functions; give fewer tokens at a time")


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
        if name in _CAN_FAIL:
            function.restype, function.errcheck = c_int, _checked
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
