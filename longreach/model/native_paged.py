"""An engine's sequences through the compiled functions: a whole pass of all of them in one call.

    hidden, streams = advance(bound, tokens, segments)             the main layers; the sequences advance
    hidden, streams = draft(bound, tokens, segments, streams)      the MTP block; its windows advance

Python says where each sequence stands and, once per arena, where each layer's tensors lie; `native/pass.c` does the rest.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from longreach.model.bind import BoundModel
from longreach.model.native_runs import rounds
from longreach.model.paged import Arena, ArenaLayer, Segment, slid
from longreach.native.library import HOME_FIELDS, STANDING_FIELDS, SequencePass

_COLUMN = {name: i for i, name in enumerate(HOME_FIELDS)}

_homes: weakref.WeakKeyDictionary[Arena, _Homes] = weakref.WeakKeyDictionary()
"""Beside the arenas: addresses must not travel with a copied or pickled one."""


def suits(segments: Sequence[Segment]) -> bool:
    """Whether the segments are of one arena that holds plain float32."""
    arena = segments[0].sequence.arena
    is_plain = arena.precision == "float32" and arena.dtype == torch.float32 and arena.device.type == "cpu"
    return is_plain and all(segment.sequence.arena is arena for segment in segments)


def advance(bound: BoundModel, tokens: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    """Continue sequences by their new tokens.

    Args:
        tokens: int64 `[total]`, segment after segment.
        segments: of different sequences; page tables reach as far as their tokens do.

    Returns:
        float32 hidden states `[total, D]` and residual streams `[total, n, D]`. The sequences have advanced.

    Raises:
        IndexError: a token outside the vocabulary. Nothing has advanced.
    """
    homes = _homes_of(segments[0].sequence.arena)
    standing, raw_lo, pages = array("q"), array("q"), array("q")
    for segment in segments:
        pages.extend(segment.sequence.pages)
    at = pages.buffer_info()[0]
    for segment in segments:
        sequence, extent = segment.sequence, segment.sequence.extent
        standing.extend((len(segment.tokens), sequence.length, sequence.held, sequence.slot, extent.window_lo, at))
        raw_lo.extend([extent.raw_lo[keep] for keep in homes.keeps])
        at += 8 * len(sequence.pages)
    made = _call(bound, bound.native.lr_advance, tokens, standing, homes, raw_lo=raw_lo)
    for segment in segments:
        for _, some in rounds(len(segment.tokens)):  # the buffers slid as often as C slid them
            segment.sequence.advance(some)
    return made


def draft(
    bound: BoundModel, tokens: Tensor, segments: Sequence[Segment], streams: Tensor, *, last_only: bool = False
) -> tuple[Tensor, Tensor]:
    """What the MTP block makes of the next positions of its windows.

    Args:
        tokens: int64 `[total]`, the tokens that follow those positions, segment after segment.
        streams: `[total, n, D]` of the main model at those positions, or this block's own.
        last_only: of each segment only what comes of its last token. The others then cost next to nothing.

    Returns:
        float32 hidden states for the head and the streams after the block, `[total, D]` and `[total, n, D]`, or of
        as many rows as there are segments. The windows have advanced.

    Raises:
        IndexError: a token outside the vocabulary. Nothing has advanced.
    """
    homes, standing = _homes_of(segments[0].sequence.arena), array("q")
    for segment in segments:
        sequence, extent = segment.sequence, segment.sequence.extent
        standing.extend((len(segment.tokens), extent.mtp_hi, 0, sequence.slot, extent.mtp_lo, 0))
    made = _call(bound, bound.native.lr_draft, tokens, standing, homes, before=streams, last_only=last_only)
    for segment in segments:
        extent, count = segment.sequence.extent, len(segment.tokens)
        pushes = [some for _, some in rounds(count)] if not last_only else [*(some for _, some in rounds(count - 1)), 1]
        for some in pushes:
            extent.mtp_lo = slid(extent.mtp_lo, extent.mtp_hi, some, homes.mtp_keep)
            extent.mtp_hi += some
    return made


def _call(
    bound: BoundModel,
    function: Callable[[int, int], None],
    tokens: Tensor,
    standing: array[int],
    homes: _Homes,
    *,
    raw_lo: array[int] | None = None,
    before: Tensor | None = None,
    last_only: bool = False,
) -> tuple[Tensor, Tensor]:
    c, count = bound.config, len(standing) // len(STANDING_FIELDS)
    rows = count if last_only else len(tokens)
    hidden, streams = torch.empty(rows, c.hidden_size), torch.empty(rows, c.hc_mult, c.hidden_size)
    if before is not None:
        assert before.shape == (len(tokens), *streams.shape[1:]), (before.shape, len(tokens))
        before = before.contiguous()
    call = SequencePass(
        M=len(tokens), num_sequences=count, num_keeps=len(homes.keeps) if raw_lo is not None else 0,
        last_only=int(last_only), token=tokens.contiguous(), standing=standing.buffer_info()[0],
        raw_lo=raw_lo.buffer_info()[0] if raw_lo is not None else None, homes=homes.table.ctypes.data, before=before,
        streams=streams, hidden=hidden,
    )  # fmt: skip
    bound.native.lr_set_threads(torch.get_num_threads())
    function(bound.network.pointer, call.pointer)
    return hidden, streams


# ---- where an arena's tensors lie --------------------------------------------------------------------------------------


def _homes_of(arena: Arena) -> _Homes:
    if (homes := _homes.get(arena)) is None:
        homes = _homes[arena] = _Homes(arena)
    return homes


class _Homes:
    """Addresses and steps, in bytes.

    Attributes:
        table: int64 `[layers, fields]`, C's `Home` of each main layer and of the MTP block.
        keeps: the lengths of the raw tails, in the order in which a sequence's `raw_lo` are given.
        mtp_keep: how many rows the MTP block's window keeps.
    """

    def __init__(self, arena: Arena) -> None:
        self.keeps = arena.raw_keeps
        layers = [*arena.layers, *([arena.mtp] if arena.mtp is not None else [])]
        self.table = np.zeros((len(layers), len(HOME_FIELDS)), dtype=np.int64)
        self.mtp_keep = arena.mtp.needs.window_keep if arena.mtp is not None else 0
        for line, layer in zip(self.table, layers, strict=True):
            self._fill(line, layer)

    def _fill(self, line: np.ndarray, layer: ArenaLayer) -> None:
        for name, part in (("window", layer.window), ("raw", layer.raw), ("index_raw", layer.index_raw)):
            if part is not None:
                line[_COLUMN[name]], line[_COLUMN[name + "_step"]] = part.data_ptr(), 4 * part.stride(0)
        for name, part in (("", layer.entries), ("index_", layer.index_entries)):
            if part is not None:
                line[_COLUMN[name + "base"]], line[_COLUMN[name + "step"]] = part.data_ptr(), 4 * part.stride(0)
                line[_COLUMN[name + "size"]] = part.shape[1]
        if layer.needs.raw_keep:
            line[_COLUMN["keep"]] = self.keeps.index(layer.needs.raw_keep)
