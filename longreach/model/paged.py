"""An engine's memory as tensors: a state block per sequence, and pages of compressed entries that sequences share.

A *page* is what `page_tokens` source tokens (128) leave behind for good: per CSA layer 32 entries and 32 index keys, per
HCA layer one entry. It never changes once its last token has been read. A *state block* is what the latest tokens leave
behind for a while: per layer the window and the compressors' raw tails, a fixed size however long the sequence.

    arena = Arena(config, num_slots=16, num_pages=1024)
    sequence = PagedSequence(arena, slot=0); sequence.pages = [7, 3]     which slot, which pages: the caller's integers
    features = model.extend([Segment(sequence, token_ids)])              reads and writes both, advances `length`

Nothing here decides who owns what: `engine.pages` counts, this file only holds. Layers see a `LayerStore` as ever.
Source: DeepSeek-V4 report, section 3.5 (state cache and classical cache).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.errors import CacheError
from longreach.model.config import ModelConfig
from longreach.model.stores import (
    INDEX_BLOCK,
    REWIND,
    Codec,
    FloatCodec,
    LayerNeeds,
    LayerStore,
    Precision,
    Recent,
    check_precision,
    index_codec,
    kv_codec,
    layer_needs,
)

PAGE_TOKENS = 128
"""Least source tokens per page: one HCA entry of the released shapes."""


def page_tokens(config: ModelConfig) -> int:
    """Source tokens per page: the smallest multiple of every layer's ratio that is at least PAGE_TOKENS."""
    ratios = [layer_needs(config, layer).ratio or 1 for layer in range(config.num_hidden_layers)]
    common = math.lcm(*ratios)
    return common * -(-PAGE_TOKENS // common)


def replay_start(config: ModelConfig, held: int) -> int:
    """Where to begin so that window and tails at `held` tokens come out as in a cold run: the start of a page.

    The entries come from the pages, whatever the window said meanwhile. Layer l's inputs are right `sliding_window - 1`
    tokens later than those of the layer below; the last layer then needs a window of right ones, and a CSA layer the whole
    block before. Source: DeepSeek-V4 report, section 3.5, the zero-SWA policy.
    """
    kinds = [config.layer_kind(layer) for layer in range(config.num_hidden_layers)]
    if not set(kinds) & {"sliding", "csa", "hca"}:
        return held  # no window, no tail: entries are all there is
    blocks = [layer_needs(config, layer).ratio for layer, kind in enumerate(kinds) if kind == "csa"]
    back = config.sliding_window - 1
    reach = (config.num_hidden_layers - 1) * back + max(back, *blocks, 0)
    size = page_tokens(config)
    return max(0, held - reach) // size * size


@dataclass
class ArenaLayer:
    """One layer's share of the arena; None where the layer's kind has no use for it.

    Attributes:
        window, raw, index_raw: `[slots, rows, width]`; a slot's rows are a `Recent` buffer.
        entries, index_entries: `[pages, entries per page, width]`.
    """

    needs: LayerNeeds
    window: Tensor | None = None
    raw: Tensor | None = None
    index_raw: Tensor | None = None
    entries: Tensor | None = None
    index_entries: Tensor | None = None
    window_codec: Codec | None = None
    raw_codec: Codec | None = None
    index_raw_codec: Codec | None = None
    entry_codec: Codec | None = None
    index_codec: Codec | None = None

    def state_parts(self) -> list[Tensor]:
        return [part for part in (self.window, self.raw, self.index_raw) if part is not None]

    def page_parts(self) -> list[Tensor]:
        return [part for part in (self.entries, self.index_entries) if part is not None]


class Arena:
    """All state blocks and pages of one engine, allocated once.

    Args:
        num_slots, num_pages: how many of each.
        precision, device, dtype: as in `ContiguousCache`.

    Attributes:
        layers: one per main layer.
        mtp: the window of the MTP block, if the model has one.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_slots: int,
        num_pages: int,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_precision(config, precision)
        self.config = config
        self.precision: Precision = precision
        self.device, self.dtype = torch.device(device), dtype
        self.num_slots, self.num_pages = num_slots, num_pages
        self.page_tokens = page_tokens(config)
        count = config.num_hidden_layers
        self.layers = [self._layer(layer_needs(config, layer)) for layer in range(count)]
        self.mtp = self._layer(layer_needs(config, count)) if config.num_nextn_predict_layers else None
        self.raw_keeps = sorted({layer.needs.raw_keep for layer in self.layers if layer.needs.raw_keep})

    def _layer(self, needs: LayerNeeds) -> ArenaLayer:
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        layer = ArenaLayer(needs)

        def state(keep: int, codec: Codec) -> Tensor:
            return torch.zeros(self.num_slots, keep + REWIND, codec.width, dtype=codec.dtype, device=self.device)

        def pool(codec: Codec) -> Tensor:
            # Not zeroed: gigabytes of it may never be used, and nothing is read before it is written.
            per_page = self.page_tokens // needs.ratio
            return torch.empty(self.num_pages, per_page, codec.width, dtype=codec.dtype, device=self.device)

        if needs.window_width:
            layer.window_codec = kv_codec(self.config, self.precision, needs.window_width)
            layer.window = state(needs.window_keep, layer.window_codec)
        if needs.raw_width:
            layer.raw_codec = FloatCodec(needs.raw_width, wide)
            layer.raw = state(needs.raw_keep, layer.raw_codec)
        if needs.index_raw_width:
            layer.index_raw_codec = FloatCodec(needs.index_raw_width, wide)
            layer.index_raw = state(needs.raw_keep, layer.index_raw_codec)
        if needs.entry_width:
            layer.entry_codec = kv_codec(self.config, self.precision, needs.entry_width)
            layer.entries = pool(layer.entry_codec)
        if needs.index_width:
            layer.index_codec = index_codec(self.config, self.precision)
            layer.index_entries = pool(layer.index_codec)
        return layer

    # sizes

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one state block."""
        return slot_nbytes(self.config, self.precision, self.dtype)

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page."""
        return page_nbytes(self.config, self.precision)

    @property
    def nbytes(self) -> int:
        return self.num_slots * self.slot_nbytes + self.num_pages * self.page_nbytes

    def page_tensors(self, page: int, tokens: int | None = None) -> list[Tensor]:
        """Views of one page, layer by layer: all of it, or the entries its first `tokens` tokens have completed."""
        tokens = self.page_tokens if tokens is None else tokens
        return [part[page, : tokens // layer.needs.ratio] for layer in self.layers for part in layer.page_parts()]


def slot_nbytes(config: ModelConfig, precision: Precision, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of one state block of an arena of this kind."""
    return _empty(config, precision, dtype, slots=1).num_bytes


def page_nbytes(config: ModelConfig, precision: Precision) -> int:
    """Bytes of one page of an arena of this kind."""
    return _empty(config, precision, torch.float32, pages=1).num_bytes


@dataclass(frozen=True)
class _Sizes:
    num_bytes: int


def _empty(config: ModelConfig, precision: Precision, dtype: torch.dtype, slots: int = 0, pages: int = 0) -> _Sizes:
    arena = Arena(config, num_slots=slots, num_pages=pages, precision=precision, device="meta", dtype=dtype)
    layers = [*arena.layers, *([arena.mtp] if arena.mtp is not None else [])]
    parts = [part for layer in layers for part in (*layer.state_parts(), *layer.page_parts())]
    return _Sizes(sum(part.numel() * part.element_size() for part in parts))


# ---- a sequence ------------------------------------------------------------------------------------------------------


@dataclass
class Extent:
    """Where the sliding buffers of a state block stand, in integers.

    The rows of a buffer are positions `[lo, length)`, the first at row 0; the rule by which they slide is `Recent.push`,
    so all buffers with the same `keep` share a `lo`.

    Attributes:
        window_lo: of the windows.
        raw_lo: of the raw tails, by their `keep`.
        floor: the shortest length the sequence may be truncated to besides what the buffers allow.
        mtp_lo, mtp_hi: of the MTP block's window. It is never saved: a draft model without its past guesses worse for a while.
    """

    window_lo: int = 0
    raw_lo: dict[int, int] = field(default_factory=dict)
    floor: int = 0
    mtp_lo: int = 0
    mtp_hi: int = 0

    def copy(self) -> Extent:
        return replace(self, raw_lo=dict(self.raw_lo))


class PagedSequence:
    """One sequence in an arena.

    Attributes:
        slot: its state block.
        pages: its page table; page b holds the entries of tokens `[b, b + 1) · page_tokens`. Must reach as far as the
            tokens to be read before they are.
        length: tokens read.
        held: tokens up to which the pages hold entries already, a multiple of `page_tokens` beyond `length` while the
            window is rebuilt over cached entries (`replay`). Entries below it are read and not written.
        extent: where its sliding buffers stand.
    """

    def __init__(self, arena: Arena, slot: int) -> None:
        self.arena, self.slot = arena, slot
        self.pages: list[int] = []
        self.length = self.held = 0
        self.extent = Extent(raw_lo=dict.fromkeys(arena.raw_keeps, 0))

    # what layers read and write

    def stores(self) -> list[LayerStore]:
        """Stores over the arena's tensors, for one pass; `advance` takes over where they end."""
        table = torch.tensor(self.pages, dtype=torch.int64, device=self.arena.device)
        stores = []
        for layer in self.arena.layers:
            needs, store = layer.needs, LayerStore()
            if layer.window is not None and layer.window_codec is not None:
                store.window = self._recent(
                    layer.window, needs.window_keep, layer.window_codec, self.extent.window_lo, self.arena.dtype
                )
            if layer.raw is not None and layer.raw_codec is not None:
                lo = self.extent.raw_lo[needs.raw_keep]
                store.raw = self._recent(layer.raw, needs.raw_keep, layer.raw_codec, lo, layer.raw_codec.dtype)
            if layer.index_raw is not None and layer.index_raw_codec is not None:
                lo = self.extent.raw_lo[needs.raw_keep]
                codec = layer.index_raw_codec
                store.index_raw = self._recent(layer.index_raw, needs.raw_keep, codec, lo, codec.dtype)
            if layer.entries is not None and layer.entry_codec is not None:
                store.entries = self._pool(layer.entries, layer.entry_codec, needs.ratio, table)
            if layer.index_entries is not None and layer.index_codec is not None:
                store.index_entries = self._pool(layer.index_entries, layer.index_codec, needs.ratio, table)
            stores.append(store)
        return stores

    def _recent(self, part: Tensor, keep: int, codec: Codec, lo: int, dtype: torch.dtype) -> Recent:
        return Recent.over(part[self.slot : self.slot + 1], keep, codec, dtype, lo, self.length)

    def _pool(self, part: Tensor, codec: Codec, ratio: int, table: Tensor) -> PagedPool:
        return PagedPool(part, codec, table, self.length // ratio, self.held // ratio, self.arena.dtype)

    def advance(self, count: int, stores: Sequence[LayerStore] | None = None) -> None:
        """Record that `count` tokens went through `stores`, or through code that slides the buffers by the same rule."""
        if stores is None:
            self.extent.window_lo = slid(self.extent.window_lo, self.length, count, self._window_keep)
            for keep, lo in self.extent.raw_lo.items():
                self.extent.raw_lo[keep] = slid(lo, self.length, count, keep)
        else:
            for layer, store in zip(self.arena.layers, stores, strict=True):
                if isinstance(store.window, Recent):
                    self.extent.window_lo = store.window.lo
                if isinstance(store.raw, Recent):
                    self.extent.raw_lo[layer.needs.raw_keep] = store.raw.lo
        self.length += count

    @property
    def _window_keep(self) -> int:
        return self.arena.layers[0].needs.window_keep or self.arena.config.sliding_window - 1 + REWIND

    # going back

    @property
    def rewind_limit(self) -> int:
        """The shortest length `truncate` can go back to."""
        return rewind_limit(self.arena, self.length, self.extent)

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on. Pages beyond it stay in the table; the caller releases them.

        Raises:
            CacheError: further back than the state block reaches.
        """
        if length > self.length or length < self.rewind_limit:
            raise CacheError(
                f"cannot truncate from {self.length} to {length} tokens; possible are {self.rewind_limit} to {self.length}"
            )
        self.length = length
        self.held = min(self.held, length)
        self.truncate_mtp(length)
        self.extent.window_lo = min(self.extent.window_lo, length)
        for keep, lo in self.extent.raw_lo.items():
            self.extent.raw_lo[keep] = min(lo, length)

    def truncate_mtp(self, length: int) -> None:
        """Let the MTP block forget its tokens from position `length` on."""
        self.extent.mtp_hi = min(self.extent.mtp_hi, length)
        self.extent.mtp_lo = min(self.extent.mtp_lo, self.extent.mtp_hi)

    def mtp_stores(self) -> list[LayerStore]:
        """Stores for a pass of the MTP block alone, at its layer's place."""
        layer, e = self.arena.mtp, self.extent
        assert layer is not None and layer.window is not None and layer.window_codec is not None
        rows = layer.window[self.slot : self.slot + 1]
        recent = Recent.over(rows, layer.needs.window_keep, layer.window_codec, self.arena.dtype, e.mtp_lo, e.mtp_hi)
        return [*(LayerStore() for _ in self.arena.layers), LayerStore(window=recent)]

    def advance_mtp(self, count: int, stores: Sequence[LayerStore]) -> None:
        """Record that `count` tokens went through `mtp_stores`."""
        recent = stores[-1].window
        assert isinstance(recent, Recent)
        self.extent.mtp_lo, self.extent.mtp_hi = recent.lo, self.extent.mtp_hi + count

    def rewind_to_start(self) -> None:
        """As new: nothing read, nothing held."""
        self.length = self.held = 0
        self.extent = Extent(raw_lo=dict.fromkeys(self.arena.raw_keeps, 0))

    def replay(self, held: int, start: int) -> None:
        """Stand at `start`, from where the window over `held` cached tokens is rebuilt (see `replay_start`)."""
        size = self.arena.page_tokens
        assert held % size == 0 and start % size == 0 and start <= held <= len(self.pages) * size
        self.rewind_to_start()
        self.length, self.held = start, held
        if start < held:
            self.extent.floor = held
        if start:
            self.extent.window_lo = start - self._window_keep
            for keep in self.extent.raw_lo:
                self.extent.raw_lo[keep] = start - keep
            for layer in self.arena.layers:
                for part in layer.state_parts():
                    part[self.slot].zero_()  # rows before the start are read, by positions that do not count

    # leaving the arena and coming back

    def save(self, slack: int = REWIND) -> SavedState:
        """A copy of the state block and of the page that is not full yet: with the full pages, all there is.

        Args:
            slack: tokens it can be cut back by when loaded again, up to REWIND and to what the buffers hold now.
        """
        less = REWIND - slack
        kept = self.extent.copy()
        kept.window_lo = max(kept.window_lo, self.length - self._window_keep + less)
        kept.raw_lo = {keep: max(lo, self.length - keep + less) for keep, lo in kept.raw_lo.items()}
        kept.mtp_lo = kept.mtp_hi = 0
        return SavedState(self.length, kept, [view.clone() for view in self._views(kept)], self.arena)

    def load(self, saved: SavedState, held: int = 0) -> None:
        """Stand where `saved` was saved, over pages that hold the entries of `held` tokens already.

        The page table has the full pages; where `held` ends before `saved.length`, also a page of its own for the rest.
        """
        self.length, self.held, self.extent = saved.length, held, saved.extent.copy()
        views = self._state_views(self.extent)
        if held < saved.length:
            views += self._started_page()
        for view, tensor in zip(views, saved.tensors, strict=held < saved.length):
            view.copy_(tensor)

    def _views(self, kept: Extent) -> list[Tensor]:
        return self._state_views(kept) + self._started_page()

    def _state_views(self, kept: Extent) -> list[Tensor]:
        """The rows from `kept` on of every sliding buffer."""
        views: list[Tensor] = []
        now = self.extent
        for layer in self.arena.layers:
            if layer.window is not None:
                views.append(layer.window[self.slot, kept.window_lo - now.window_lo : self.length - now.window_lo])
            keep = layer.needs.raw_keep
            for part in (layer.raw, layer.index_raw):
                if part is not None:
                    lo = now.raw_lo[keep]
                    views.append(part[self.slot, kept.raw_lo[keep] - lo : self.length - lo])
        return views

    def _started_page(self) -> list[Tensor]:
        """The entries of the page that is not full yet."""
        if started := self.length % self.arena.page_tokens:
            return self.arena.page_tensors(self.pages[self.length // self.arena.page_tokens], started)
        return []


@dataclass
class SavedState:
    """What `PagedSequence.save` copied: the state of one sequence at `length`, without its full pages.

    Attributes:
        extent: where the buffers stand once loaded.
        tensors: in the order of the layers; sizes follow from the arena's shape, `length` and `extent`.
    """

    length: int
    extent: Extent
    tensors: list[Tensor]
    arena: Arena

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def rewind_limit(self) -> int:
        """The shortest length a sequence that has loaded this can be truncated to."""
        return rewind_limit(self.arena, self.length, self.extent)

    def numbers(self) -> dict[str, Any]:
        """All but the tensors, for JSON."""
        e = self.extent
        raw = {str(keep): lo for keep, lo in e.raw_lo.items()}
        return dict(length=self.length, window_lo=e.window_lo, raw_lo=raw, floor=e.floor)

    @staticmethod
    def from_bytes(arena: Arena, numbers: dict[str, Any], payload: bytes) -> SavedState:
        """The inverse of `numbers` and of the tensors' bytes one after the other.

        Raises:
            CacheError: the bytes are not as many as an arena of this shape makes.
        """
        raw = {int(keep): lo for keep, lo in numbers["raw_lo"].items()}
        extent = Extent(numbers["window_lo"], raw, numbers["floor"])
        shape = PagedSequence(arena, 0)
        shape.length, shape.extent = numbers["length"], extent
        shape.pages = [0] * (shape.length // arena.page_tokens + 1)
        tensors = from_bytes(shape._views(extent), payload)
        return SavedState(shape.length, extent, tensors, arena)


def to_bytes(tensors: Sequence[Tensor]) -> list[memoryview]:
    """The bytes of each tensor, in order."""
    return [t.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy().data for t in tensors if t.numel()]


def from_bytes(like: Sequence[Tensor], payload: bytes) -> list[Tensor]:
    """Tensors of the shapes, dtypes and devices of `like`, filled from bytes one after the other."""
    expected = sum(t.numel() * t.element_size() for t in like)
    if expected != len(payload):
        raise CacheError(f"a cache record has {len(payload)} bytes where this model needs {expected}")
    flat = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
    tensors, at = [], 0
    for t in like:
        size = t.numel() * t.element_size()
        # clone: a slice may start at an address the dtype does not accept
        tensors.append(flat[at : at + size].clone().view(t.dtype).view(t.shape).to(t.device))
        at += size
    return tensors


def rewind_limit(arena: Arena, length: int, extent: Extent) -> int:
    """The shortest length a sequence at `length` with buffers at `extent` can go back to."""
    config, limit = arena.config, extent.floor
    if extent.window_lo > 0:
        limit = max(limit, extent.window_lo + config.sliding_window - 1)
    for index, layer in enumerate(arena.layers):
        needs = layer.needs
        if needs.raw_keep and (lo := extent.raw_lo[needs.raw_keep]) > 0:
            # The block being filled (and for CSA the one before it) must still be there in full.
            back = needs.ratio if config.layer_kind(index) == "csa" else 0
            limit = max(limit, -(-(lo + back) // needs.ratio) * needs.ratio)
    return min(limit, length)


def slid(lo: int, hi: int, count: int, keep: int) -> int:
    """`lo` of a sliding buffer after `count` more rows: the integer half of `Recent.push`."""
    if count > keep:
        return hi + count - keep
    if hi - lo + count > keep + REWIND:
        return hi - (keep - count)
    return lo


@dataclass
class Segment:
    """Consecutive new tokens of one sequence, for `Transformer.extend`."""

    sequence: PagedSequence
    tokens: Sequence[int]


class PagedPool:
    """A sequence's compressed entries of one layer, behind its page table: what `Pool` is in a contiguous cache."""

    def __init__(self, pages: Tensor, codec: Codec, table: Tensor, count: int, held: int, dtype: torch.dtype) -> None:
        self.pages, self.codec, self.table, self.out_dtype = pages, codec, table, dtype
        self.per_page = pages.shape[1]
        self._count, self.held = count, held

    @property
    def count(self) -> int:
        return self._count

    @property
    def available(self) -> int:
        """Entries that can be read."""
        return max(self.count, self.held)

    def append(self, values: Tensor) -> None:
        """Add entries `[1, e, dim]` after the last; those the pages hold already stay as they are."""
        e = values.shape[1]
        known = min(max(self.held - self.count, 0), e)
        if known < e:
            at = torch.arange(self.count + known, self.count + e, device=self.pages.device)
            self.pages.view(-1, self.codec.width)[self._places(at)] = self.codec.encode(values[0, known:])
        self._count += e

    def _places(self, index: Tensor) -> Tensor:
        return self.table[index // self.per_page] * self.per_page + index % self.per_page

    def _stored(self, start: int, stop: int) -> Tensor:
        """Entries [start, stop) as stored, `[1, stop - start, width]`."""
        if start >= stop:
            return self.pages.new_empty(1, 0, self.codec.width)
        first = start // self.per_page
        pages = self.pages.index_select(0, self.table[first : -(-stop // self.per_page)])
        return pages.view(1, -1, self.codec.width)[:, start - first * self.per_page : stop - first * self.per_page]

    def read(self, count: int) -> Tensor:
        """The first `count` entries `[1, count, dim]`; zeros beyond those available."""
        held = self.codec.decode(self._stored(0, min(count, self.available)), self.out_dtype)
        return F.pad(held, (0, 0, 0, count - held.shape[1])) if held.shape[1] < count else held

    def blocks(self, count: int, size: int = INDEX_BLOCK) -> Iterator[Tensor]:
        """The first `count` entries in runs of at most `size`; zeros beyond those available."""
        for start in range(0, count, size):
            stop = min(start + size, count)
            held = self.codec.decode(self._stored(start, min(stop, self.available)), self.out_dtype)
            missing = stop - start - held.shape[1]
            yield F.pad(held, (0, 0, 0, missing)) if missing else held

    def gather(self, index_BTK: Tensor) -> Tensor:
        """Entries by index `[1, T, K, dim]`. Indices beyond those available give some entry; callers hide it."""
        if self.available == 0:
            width = self.codec.decode(self._stored(0, 0), self.out_dtype).shape[-1]
            return torch.zeros(*index_BTK.shape, width, dtype=self.out_dtype, device=self.pages.device)
        places = self._places(index_BTK.reshape(-1).clamp(0, self.available - 1))
        stored = self.pages.view(-1, self.codec.width).index_select(0, places)
        return self.codec.decode(stored, self.out_dtype).view(*index_BTK.shape, -1)
