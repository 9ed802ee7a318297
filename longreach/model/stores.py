"""What a layer keeps between calls: the two kinds of store, the formats they are kept in, and the sizes each layer needs.

`Recent` holds the values of the latest positions (window, raw tails), `Pool` all compressed entries of a layer. Their
`Graph…` twins hold the tensors themselves, so that a pass without a cache is differentiable. A layer sees only a
`LayerStore`; another engine may supply its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.errors import CacheError
from longreach.model.config import ModelConfig
from longreach.ops.attention import gather_entries
from longreach.ops.quant import (
    E4M3_MAX,
    FP8_AMAX_FLOOR,
    e8m0_to_float,
    fp8_quantize,
    hadamard,
    index_key_nbytes,
    kv_entry_nbytes,
    pack_index_key,
    pack_kv_entry,
    unpack_index_key,
    unpack_kv_entry,
)

REWIND = 64
"""Tokens a cache can always be truncated by. Costs REWIND more rows of window and tail, nothing that grows."""

INDEX_BLOCK = 8192
"""Index keys scored at a time: bounds the score matrix at long context."""

LATENT_BLOCK = 128
"""Channels that share one scale in V3.2's FP8 latents and index keys."""

Precision = Literal["float32", "bfloat16", "released"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "released")


# ---- storage formats -------------------------------------------------------------------------------------------------


class Codec(Protocol):
    """How one kind of vector is stored."""

    @property
    def width(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, values: Tensor) -> Tensor: ...

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class FloatCodec:
    """A float dtype, as is."""

    width: int
    dtype: torch.dtype

    def encode(self, values: Tensor) -> Tensor:
        return values.to(self.dtype)

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        return stored.to(dtype)


@dataclass(frozen=True)
class ReleasedKV:
    """FP8 E4M3 without position, BF16 rotary part, one power-of-two scale per 64 channels: 584 bytes at 448 + 64."""

    nope_dim: int
    rope_dim: int
    dtype: torch.dtype = torch.uint8

    @property
    def width(self) -> int:
        return kv_entry_nbytes(self.nope_dim, self.rope_dim)

    def encode(self, values: Tensor) -> Tensor:
        return pack_kv_entry(values, self.rope_dim)

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        return unpack_kv_entry(stored, self.nope_dim, self.rope_dim, dtype)


@dataclass(frozen=True)
class ReleasedIndexKey:
    """Four-bit index key after the Hadamard rotation: 68 bytes at 128 channels.

    With `rotate` the codec rotates on the way in and back on the way out, for a model whose numerics do not.
    """

    dim: int
    rotate: bool
    dtype: torch.dtype = torch.uint8

    @property
    def width(self) -> int:
        return index_key_nbytes(self.dim)

    def encode(self, values: Tensor) -> Tensor:
        return pack_index_key(hadamard(values) if self.rotate else values)

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        values = unpack_index_key(stored, self.dim, dtype)
        return hadamard(values) if self.rotate else values


@dataclass(frozen=True)
class ReleasedLatent:
    """V3.2's entry: E4M3 latent, one float32 scale per 128 channels, BF16 rotary key: 656 bytes at 512 + 64.

    A scale is the block's largest magnitude / 448, as serving engines store it; with `power_of_two` the next power of
    two, which keeps to the bit what `numerics="official"` has already rounded.
    """

    latent_dim: int
    rope_dim: int
    power_of_two: bool
    dtype: torch.dtype = torch.uint8

    @property
    def width(self) -> int:
        return _fp8_nbytes(self.latent_dim) + 2 * self.rope_dim

    def encode(self, values: Tensor) -> Tensor:
        latent, rotary = values.detach().split([self.latent_dim, self.rope_dim], dim=-1)
        rotary = rotary.to(torch.bfloat16).contiguous().view(torch.uint8)
        return torch.cat([_fp8_bytes(latent, self.power_of_two), rotary], dim=-1)

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        latent, rotary = stored.split([self.width - 2 * self.rope_dim, 2 * self.rope_dim], dim=-1)
        # clone, not contiguous: a view of a single row may start at an address that no BF16 view accepts
        rotary = rotary.clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
        return torch.cat([_fp8_values(latent, self.latent_dim, dtype), rotary.to(dtype)], dim=-1)


@dataclass(frozen=True)
class ReleasedLatentIndexKey:
    """V3.2's index key after the Hadamard rotation: E4M3 with one float32 scale per 128 channels, 132 bytes at 128.

    `rotate` as in `ReleasedIndexKey`, `power_of_two` as in `ReleasedLatent`.
    """

    dim: int
    rotate: bool
    power_of_two: bool
    dtype: torch.dtype = torch.uint8

    @property
    def width(self) -> int:
        return _fp8_nbytes(self.dim)

    def encode(self, values: Tensor) -> Tensor:
        return _fp8_bytes(hadamard(values.detach()) if self.rotate else values.detach(), self.power_of_two)

    def decode(self, stored: Tensor, dtype: torch.dtype) -> Tensor:
        values = _fp8_values(stored, self.dim, dtype)
        return hadamard(values) if self.rotate else values


def _fp8_nbytes(dim: int) -> int:
    return dim + 4 * -(-dim // LATENT_BLOCK)


def _fp8_bytes(values: Tensor, power_of_two: bool) -> Tensor:
    """E4M3 codes of `[..., n]`, then one float32 scale per LATENT_BLOCK channels: uint8 `[..., _fp8_nbytes(n)]`."""
    if power_of_two:
        codes, exponents = fp8_quantize(values, LATENT_BLOCK)
        scales = e8m0_to_float(exponents)
    else:
        n = values.shape[-1]
        count = -(-n // LATENT_BLOCK)
        blocks = F.pad(values.float(), (0, count * LATENT_BLOCK - n)).unflatten(-1, (count, LATENT_BLOCK))
        scales = blocks.abs().amax(dim=-1).clamp(min=FP8_AMAX_FLOOR) / E4M3_MAX
        codes = (blocks / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).flatten(-2)[..., :n].to(torch.float8_e4m3fn)
    return torch.cat([codes.view(torch.uint8), scales.contiguous().view(torch.uint8)], dim=-1)


def _fp8_values(stored: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The values in `_fp8_bytes`'s bytes, `[..., dim]`."""
    codes, scales = stored.split([dim, stored.shape[-1] - dim], dim=-1)
    scales = scales.clone(memory_format=torch.contiguous_format).view(torch.float32)
    scales = scales.repeat_interleave(LATENT_BLOCK, dim=-1)[..., :dim]
    return (codes.contiguous().view(torch.float8_e4m3fn).float() * scales).to(dtype)


# ---- the two kinds of store ------------------------------------------------------------------------------------------


class Recent:
    """The values of the latest positions `[lo, hi)`, at least the last `keep` of them.

    Kept in one buffer that slides: rows move to its front when the end is reached, so every read is a plain view.
    """

    def __init__(self, batch: int, keep: int, codec: Codec, device: torch.device, dtype: torch.dtype) -> None:
        self.codec, self.keep, self.out_dtype = codec, keep, dtype
        self.buffer = torch.zeros(batch, keep + REWIND, codec.width, dtype=codec.dtype, device=device)
        self.lo = self.hi = 0

    @classmethod
    def over(cls, buffer: Tensor, keep: int, codec: Codec, dtype: torch.dtype, lo: int, hi: int) -> Recent:
        """A store over somebody's rows `[B, keep + REWIND, width]`, which hold positions [lo, hi) from row 0 on."""
        store = object.__new__(cls)
        store.codec, store.keep, store.out_dtype = codec, keep, dtype
        store.buffer, store.lo, store.hi = buffer, lo, hi
        return store

    def push(self, values: Tensor) -> None:
        """Append values `[B, t, width]` of the next t positions."""
        t = values.shape[1]
        if t > self.keep:
            self.lo = self.hi + t - self.keep
            self.hi += t
            self.buffer[:, : self.keep] = self.codec.encode(values[:, -self.keep :])
            return
        held = self.hi - self.lo
        if held + t > self.buffer.shape[1]:
            stay = self.keep - t
            self.buffer[:, :stay] = self.buffer[:, held - stay : held].clone()
            self.lo, held = self.hi - stay, stay
        self.buffer[:, held : held + t] = self.codec.encode(values)
        self.hi += t

    def read(self, lo: int, hi: int) -> Tensor:
        """Values of positions [lo, hi); zeros where a position is not held."""
        a, b = max(lo, self.lo), min(hi, self.hi)
        if a >= b:
            return torch.zeros(
                self.buffer.shape[0], hi - lo, self._dim, dtype=self.out_dtype, device=self.buffer.device
            )
        held = self.codec.decode(self.buffer[:, a - self.lo : b - self.lo], self.out_dtype)
        return _padded(held, a - lo, hi - b)

    def stored(self, values: Tensor) -> Tensor:
        """`values` as they will be read back: what a lossy format makes of them."""
        if self.codec.dtype == values.dtype:
            return values
        return self.codec.decode(self.codec.encode(values), self.out_dtype)

    def truncate(self, length: int) -> None:
        self.hi = min(self.hi, length)
        self.lo = min(self.lo, self.hi)

    @property
    def _dim(self) -> int:
        return self.codec.decode(self.buffer[:, :0], self.out_dtype).shape[-1]

    def fork(self) -> Recent:
        twin = shallow(self)
        twin.buffer = self.buffer.clone()
        return twin

    def select(self, rows: Tensor) -> Recent:
        twin = shallow(self)
        twin.buffer = self.buffer.index_select(0, rows)
        return twin

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        held = self.buffer[:, : self.hi - self.lo].contiguous()
        return {"values": held}, {"lo": self.lo, "hi": self.hi}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, int]) -> None:
        held = tensors["values"]
        self.lo, self.hi = numbers["lo"], numbers["hi"]
        self.buffer[:, : held.shape[1]] = held


class Pool:
    """All compressed entries of a layer, in order of index. Entries never change once written.

    `frozen` pieces may be shared with other caches and are never written; `tail` is this cache's own and grows by a
    sixteenth at a time, so at most that much of it is spare.
    """

    def __init__(self, batch: int, codec: Codec, device: torch.device, dtype: torch.dtype) -> None:
        self.codec, self.out_dtype = codec, dtype
        self.frozen: list[Tensor] = []
        self.tail = torch.empty(batch, 0, codec.width, dtype=codec.dtype, device=device)
        self.tail_count = 0

    @property
    def count(self) -> int:
        return sum(piece.shape[1] for piece in self.frozen) + self.tail_count

    def reserve(self, count: int) -> None:
        """Make room for `count` entries in all, so that appending up to there copies nothing."""
        self._grow(count - (self.count - self.tail_count), exact=True)

    def append(self, values: Tensor) -> None:
        """Add entries `[B, e, dim]` after the last."""
        e = values.shape[1]
        self._grow(self.tail_count + e)
        self.tail[:, self.tail_count : self.tail_count + e] = self.codec.encode(values)
        self.tail_count += e

    def _grow(self, needed: int, exact: bool = False) -> None:
        if needed <= self.tail.shape[1]:
            return
        capacity = needed if exact else max(needed + needed // 16, needed + 16)
        larger = self.tail.new_empty(self.tail.shape[0], capacity, self.codec.width)
        larger[:, : self.tail_count] = self.tail[:, : self.tail_count]
        self.tail = larger

    def read(self, count: int) -> Tensor:
        """The first `count` entries `[B, count, dim]`; zeros beyond those held."""
        pieces = [self.codec.decode(p, self.out_dtype) for p in self._pieces(0, min(count, self.count))]
        held = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return _padded(held, 0, count - held.shape[1])

    def blocks(self, count: int, size: int = INDEX_BLOCK) -> Iterator[Tensor]:
        """The first `count` entries in runs of at most `size`; zeros beyond those held."""
        for start in range(0, count, size):
            stop = min(start + size, count)
            pieces = [self.codec.decode(p, self.out_dtype) for p in self._pieces(start, min(stop, self.count))]
            held = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
            yield _padded(held, 0, stop - start - held.shape[1])

    def gather(self, index_BTK: Tensor) -> Tensor:
        """Entries by index `[B, T, K, dim]`. Indices beyond those held give some entry; callers hide it."""
        if self.count == 0:
            shape = *index_BTK.shape, self.codec.decode(self.tail[:, :0], self.out_dtype).shape[-1]
            return torch.zeros(shape, dtype=self.out_dtype, device=self.tail.device)
        index_BTK = index_BTK.clamp(0, self.count - 1)
        if not self.frozen:
            return self.codec.decode(gather_entries(self.tail, index_BTK), self.out_dtype)
        out, start = None, 0
        for piece in self._pieces(0, self.count, whole=True):
            size = piece.shape[1]
            if size:
                here = gather_entries(piece, (index_BTK - start).clamp(0, size - 1))
                out = here if out is None else torch.where((index_BTK >= start)[..., None], here, out)
            start += size
        assert out is not None
        return self.codec.decode(out, self.out_dtype)

    def _pieces(self, start: int, stop: int, whole: bool = False) -> list[Tensor]:
        """Stored views that cover entries [start, stop); at least one, possibly empty."""
        if not self.frozen and not whole:
            return [self.tail[:, start : max(start, stop)]]
        found, at = [], 0
        for piece in [*self.frozen, self.tail[:, : self.tail_count]]:
            a, b = max(start - at, 0), min(stop - at, piece.shape[1])
            if a < b:
                found.append(piece[:, a:b])
            at += piece.shape[1]
        return found or [self.tail[:, :0]]

    def truncate(self, count: int) -> None:
        if count >= self.count:
            return
        keep, at = [], 0
        for piece in self.frozen:
            if at < count:
                keep.append(piece[:, : count - at])
            at += piece.shape[1]
        self.frozen = keep
        self.tail_count = max(0, min(self.tail_count, count - at))

    def fork(self) -> Pool:
        """Two pools over the same entries: what is held becomes frozen in both."""
        if self.tail_count:
            self.frozen.append(self.tail[:, : self.tail_count])
            self.tail, self.tail_count = self.tail.new_empty(self.tail.shape[0], 0, self.codec.width), 0
        if len(self.frozen) > 4:  # many small forks: join all but the oldest, usually by far the longest
            self.frozen[1:] = [torch.cat(self.frozen[1:], dim=1)]
        twin = shallow(self)
        twin.frozen = list(self.frozen)
        twin.tail = self.tail.clone()
        return twin

    def select(self, rows: Tensor) -> Pool:
        twin = shallow(self)
        twin.frozen = []
        twin.tail = torch.cat(self._pieces(0, self.count), dim=1).index_select(0, rows)
        twin.tail_count = self.count
        return twin

    @property
    def nbytes(self) -> int:
        return self.tail.nbytes + sum(piece.numel() * piece.element_size() for piece in self.frozen)

    @property
    def shared_nbytes(self) -> int:
        return sum(piece.numel() * piece.element_size() for piece in self.frozen)

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        pieces = self._pieces(0, self.count)
        return {"entries": torch.cat(pieces, dim=1).contiguous()}, {"count": self.count}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, int]) -> None:
        self.frozen, self.tail, self.tail_count = [], tensors["entries"], numbers["count"]


class GraphRecent:
    """`Recent` for passes without a cache: holds the tensors themselves, so gradients flow through."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.values: Tensor | None = None
        self.lo = self.hi = 0

    def push(self, values: Tensor) -> None:
        if self.values is None:
            self.values, self.lo = values, self.hi
        else:
            stay = self.values[:, max(0, self.values.shape[1] - self.keep) :]
            self.values = torch.cat([stay, values], dim=1)
            self.lo = self.hi - stay.shape[1]
        self.hi += values.shape[1]

    def read(self, lo: int, hi: int) -> Tensor:
        assert self.values is not None and lo < hi
        a, b = max(lo, self.lo), min(hi, self.hi)
        if a >= b:
            return self.values.new_zeros(self.values.shape[0], hi - lo, self.values.shape[2])
        return _padded(self.values[:, a - self.lo : b - self.lo], a - lo, hi - b)

    def stored(self, values: Tensor) -> Tensor:
        return values


class GraphPool:
    """`Pool` for passes without a cache: differentiable."""

    def __init__(self) -> None:
        self.entries: Tensor | None = None

    @property
    def count(self) -> int:
        return 0 if self.entries is None else self.entries.shape[1]

    def append(self, values: Tensor) -> None:
        self.entries = values if self.entries is None else torch.cat([self.entries, values], dim=1)

    def read(self, count: int) -> Tensor:
        assert self.entries is not None
        return _padded(self.entries[:, :count], 0, count - min(count, self.count))

    def blocks(self, count: int, size: int = INDEX_BLOCK) -> Iterator[Tensor]:
        for start in range(0, count, size):
            stop = min(start + size, count)
            assert self.entries is not None
            held = self.entries[:, start:stop]
            yield _padded(held, 0, stop - start - held.shape[1])

    def gather(self, index_BTK: Tensor) -> Tensor:
        assert self.entries is not None
        return gather_entries(self.entries, index_BTK.clamp(0, self.count - 1))


class Entries(Protocol):
    """What a layer needs of its compressed entries: `Pool`, `GraphPool`, or the pages of an engine."""

    @property
    def count(self) -> int: ...

    def append(self, values: Tensor) -> None: ...

    def read(self, count: int) -> Tensor: ...

    def blocks(self, count: int, size: int = INDEX_BLOCK) -> Iterator[Tensor]: ...

    def gather(self, index_BTK: Tensor) -> Tensor: ...


def _padded(held: Tensor, before: int, after: int) -> Tensor:
    if not before and not after:
        return held
    return F.pad(held, (0, 0, before, after))


def shallow(store):
    twin = object.__new__(type(store))
    twin.__dict__.update(store.__dict__)
    return twin


@dataclass
class LayerStore:
    """What one layer keeps. Fields are None where the layer's kind has no use for them."""

    window: Recent | GraphRecent | None = None
    raw: Recent | GraphRecent | None = None
    entries: Entries | None = None
    index_raw: Recent | GraphRecent | None = None
    index_entries: Entries | None = None

    def parts(self) -> dict[str, Any]:
        return {f.name: part for f in dataclasses.fields(self) if (part := getattr(self, f.name)) is not None}

    def map(self, change) -> LayerStore:
        return LayerStore(**{name: change(part) for name, part in self.parts().items()})


@dataclass(frozen=True)
class LayerNeeds:
    """Sizes of one layer's stores: `keep` counts positions, widths are channels."""

    window_keep: int = 0
    window_width: int = 0
    raw_keep: int = 0
    raw_width: int = 0
    index_raw_width: int = 0
    entry_width: int = 0
    index_width: int = 0
    ratio: int = 0
    """Tokens per entry."""


def layer_needs(config: ModelConfig, layer: int) -> LayerNeeds:
    """What layer `layer` of this shape keeps between calls."""
    kind = config.layer_kind(layer)
    H, Hi = config.head_dim, config.index_head_dim
    window = dict(window_keep=config.sliding_window - 1 + REWIND, window_width=H)
    if kind == "sliding":
        return LayerNeeds(**window)
    if kind == "dense":
        return LayerNeeds(entry_width=H, ratio=1)
    if kind == "mla":
        return LayerNeeds(entry_width=config.kv_lora_rank + config.qk_rope_head_dim, index_width=Hi, ratio=1)
    m = config.compress_ratios[layer]
    if kind == "hca":
        return LayerNeeds(**window, raw_keep=m - 1 + REWIND, raw_width=2 * H, entry_width=H, ratio=m)
    return LayerNeeds(
        **window, raw_keep=2 * m - 1 + REWIND, raw_width=4 * H, index_raw_width=4 * Hi, entry_width=H, index_width=Hi,
        ratio=m,
    )  # fmt: skip


def graph_stores(config: ModelConfig, num_layers: int) -> list[LayerStore]:
    """Differentiable stores for a pass without a cache."""
    stores = []
    for layer in range(num_layers):
        needs = layer_needs(config, layer)
        stores.append(
            LayerStore(
                window=GraphRecent(needs.window_keep) if needs.window_width else None,
                raw=GraphRecent(needs.raw_keep) if needs.raw_width else None,
                entries=GraphPool() if needs.entry_width else None,
                index_raw=GraphRecent(needs.raw_keep) if needs.index_raw_width else None,
                index_entries=GraphPool() if needs.index_width else None,
            )
        )
    return stores


def check_precision(config: ModelConfig, precision: str) -> None:
    """Refuse a storage precision that is unknown, or that this shape's index keys do not fit.

    Raises:
        CacheError: which, and what to use instead.
    """
    if precision not in PRECISIONS:
        raise CacheError(f"cache precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision == "released" and config.index_head_dim & (config.index_head_dim - 1):
        raise CacheError(
            f"precision 'released' rotates index keys, so index_head_dim={config.index_head_dim} must be a power "
            "of two; use 'float32' or 'bfloat16'"
        )


def kv_codec(config: ModelConfig, precision: Precision, width: int) -> Codec:
    """Storage of KV entries (window and compressed, or V3.2's latents)."""
    if precision == "released":
        if config.attention == "mla":
            return ReleasedLatent(config.kv_lora_rank, config.qk_rope_head_dim, config.numerics == "official")
        return ReleasedKV(width - config.qk_rope_head_dim, config.qk_rope_head_dim)
    return FloatCodec(width, torch.float32 if precision == "float32" else torch.bfloat16)


def index_codec(config: ModelConfig, precision: Precision) -> Codec:
    """Storage of index keys."""
    if precision == "released":
        is_rounded = config.numerics == "official"
        if config.attention == "mla":
            return ReleasedLatentIndexKey(config.index_head_dim, rotate=not is_rounded, power_of_two=is_rounded)
        return ReleasedIndexKey(config.index_head_dim, rotate=not is_rounded)
    return FloatCodec(config.index_head_dim, torch.float32 if precision == "float32" else torch.bfloat16)


def buffer_stores(
    config: ModelConfig, num_layers: int, batch: int, precision: Precision, device: torch.device, dtype: torch.dtype
) -> list[LayerStore]:
    """Stores in place, for inference. Compressor tails are float32 in every precision, as in the released engine."""

    def recent(keep: int, codec: Codec, out: torch.dtype) -> Recent:
        return Recent(batch, keep, codec, device, out)

    def raw(keep: int, width: int) -> Recent | None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return recent(keep, FloatCodec(width, wide), wide) if width else None

    stores = []
    for layer in range(num_layers):
        needs = layer_needs(config, layer)
        store = LayerStore(
            raw=raw(needs.raw_keep, needs.raw_width), index_raw=raw(needs.raw_keep, needs.index_raw_width)
        )
        if needs.window_width:
            store.window = recent(needs.window_keep, kv_codec(config, precision, needs.window_width), dtype)
        if needs.entry_width:
            store.entries = Pool(batch, kv_codec(config, precision, needs.entry_width), device, dtype)
        if needs.index_width:
            store.index_entries = Pool(batch, index_codec(config, precision), device, dtype)
        stores.append(store)
    return stores
