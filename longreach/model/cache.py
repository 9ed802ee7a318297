"""What a layer needs from a cache, and the contiguous, rewindable cache that supplies it.

Per layer: the last `sliding_window` KV entries, the raw tail of the compressors, the compressed entries and the index
keys. Nothing else: memory grows by entries, not by tokens.

    cache = model.new_cache(batch_size=1)            precision "float32", "bfloat16" or "released"
    model(tokens, cache); cache.length; cache.nbytes
    cache.truncate(n)                                back over at least the last REWIND tokens
    branch = cache.fork()                            shares the entries, copies only window and tail
    cache.save(path); load_cache(path, model)        one safetensors file

Rows of a batch may have different lengths; rows that stand at the same position are kept together as a *group*.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longreach.errors import CacheError
from longreach.model.config import ModelConfig
from longreach.model.stores import (
    Codec,
    LayerStore,
    Pool,
    Precision,
    Recent,
    buffer_stores,
    check_precision,
    index_codec,
    kv_codec,
    layer_needs,
    shallow,
)

# ---- the cache -------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Rows that stand at the same position."""

    batch: int
    length: int
    stores: list[LayerStore]

    def map(self, change, batch: int | None = None) -> Group:
        return Group(batch or self.batch, self.length, [store.map(change) for store in self.stores])


class ContiguousCache:
    """The state of a batch of sequences between calls of a model.

    Invariant: every group's stores have seen exactly `length` tokens; entries of a pool are those of complete blocks.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        *,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_precision(config, precision)
        if batch_size < 1:
            raise CacheError(f"a cache of {batch_size} rows is empty; give at least 1")
        self.config = config
        self.precision: Precision = precision
        self.device, self.dtype = torch.device(device), dtype
        self.num_layers = config.num_hidden_layers
        self.groups = [self._new_group(batch_size)]

    def _new_group(self, batch: int) -> Group:
        stores = buffer_stores(self.config, self.num_layers, batch, self.precision, self.device, self.dtype)
        return Group(batch, 0, stores)

    # sizes

    @property
    def batch_size(self) -> int:
        return sum(group.batch for group in self.groups)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens seen by each row."""
        return tuple(group.length for group in self.groups for _ in range(group.batch))

    @property
    def length(self) -> int:
        """Tokens seen; the longest row's where rows differ."""
        return max(group.length for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of storage this cache refers to, shared or not."""
        return sum(part.nbytes for group in self.groups for store in group.stores for part in store.parts().values())

    def nbytes_by_part(self) -> dict[str, int]:
        """Bytes of window, raw tails, entries, index tails and index keys, over all layers."""
        total: dict[str, int] = {}
        for group in self.groups:
            for store in group.stores:
                for name, part in store.parts().items():
                    total[name] = total.get(name, 0) + part.nbytes
        return total

    @property
    def shared_nbytes(self) -> int:
        """Bytes held in pieces that forks may share."""
        return sum(
            part.shared_nbytes
            for group in self.groups
            for store in group.stores
            for part in store.parts().values()
            if isinstance(part, Pool)
        )

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens at once, so that growing up to there copies nothing."""
        for group in self.groups:
            for layer, store in enumerate(group.stores):
                ratio = layer_needs(self.config, layer).ratio
                for pool in (store.entries, store.index_entries):
                    if isinstance(pool, Pool):
                        pool.reserve(length // ratio)

    # rewinding and sharing

    @property
    def rewind_limit(self) -> int:
        """The shortest length `truncate` can still go back to (of the row that allows least)."""
        return max(self._rewind_limit(group) for group in self.groups)

    def _rewind_limit(self, group: Group) -> int:
        limit = 0
        for layer, store in enumerate(group.stores):
            needs = layer_needs(self.config, layer)
            if isinstance(store.window, Recent) and store.window.lo > 0:
                limit = max(limit, store.window.lo + self.config.sliding_window - 1)
            if isinstance(store.raw, Recent) and store.raw.lo > 0:
                back = needs.ratio if self.config.layer_kind(layer) == "csa" else 0
                # The block being filled (and for CSA the one before it) must still be there in full.
                first_block = -(-(store.raw.lo + back) // needs.ratio)
                limit = max(limit, first_block * needs.ratio)
        return min(limit, group.length)

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on; rows already shorter are left alone.

        Raises:
            CacheError: `length` is negative, or further back than the kept window and tails reach (`rewind_limit`).
        """
        if length < 0:
            raise CacheError(f"cannot truncate to {length} tokens; give 0 or more")
        for group in self.groups:
            if 0 < length < self._rewind_limit(group):
                raise CacheError(
                    f"cannot truncate from {group.length} to {length} tokens: this cache can go back to "
                    f"{self._rewind_limit(group)} at the earliest (or to 0); fork() before going further"
                )
        for i, group in enumerate(self.groups):
            if length >= group.length:
                continue
            if length == 0:
                self.groups[i] = self._new_group(group.batch)
                continue
            for layer, store in enumerate(group.stores):
                ratio = layer_needs(self.config, layer).ratio
                for part in store.parts().values():
                    part.truncate(length // ratio if isinstance(part, Pool) else length)
            group.length = length

    def fork(self) -> ContiguousCache:
        """A second cache at the same point. Entries are shared, window and tails copied; neither sees the other's future."""
        twin = shallow(self)
        twin.groups = [group.map(lambda part: part.fork()) for group in self.groups]
        return twin

    # rows

    def select(self, rows: Sequence[int]) -> ContiguousCache:
        """A cache of these rows, in this order (repeats allowed); the original stays as it is."""
        wanted = list(rows)
        if not wanted or any(not 0 <= row < self.batch_size for row in wanted):
            raise CacheError(f"rows {wanted} are not all between 0 and {self.batch_size - 1}")
        home = [(g, r) for g, group in enumerate(self.groups) for r in range(group.batch)]
        twin = shallow(self)
        twin.groups = []
        at = 0
        while at < len(wanted):
            g = home[wanted[at]][0]
            end = at
            while end < len(wanted) and home[wanted[end]][0] == g:
                end += 1
            index = torch.tensor([home[row][1] for row in wanted[at:end]], device=self.device)
            twin.groups.append(self.groups[g].map(lambda part, index=index: part.select(index), batch=end - at))
            at = end
        return twin

    def reorder(self, rows: Sequence[int]) -> None:
        """Make row i what row `rows[i]` was (beam search)."""
        self.groups = self.select(rows).groups

    @staticmethod
    def stack(caches: Sequence[ContiguousCache]) -> ContiguousCache:
        """One cache whose rows are those of `caches`, which may differ in length. Takes the caches over."""
        first = caches[0]
        for other in caches[1:]:
            if (other.config, other.precision) != (first.config, first.precision):
                raise CacheError("caches of different models or precisions cannot be stacked")
        twin = shallow(first)
        twin.groups = [group for cache in caches for group in cache.groups]
        return twin

    def split_rows(self) -> None:
        """Give every row a group of its own, as rows of different lengths need."""
        if all(group.batch == 1 for group in self.groups):
            return
        self.groups = [
            group.map(lambda part, r=r: part.select(torch.tensor([r], device=self.device)), batch=1)
            for group in self.groups
            for r in range(group.batch)
        ]

    # serialisation

    def save(self, path: str | os.PathLike) -> None:
        """Write the whole state to one safetensors file; a half-written file never takes the name `path`."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        groups = []
        for g, group in enumerate(self.groups):
            numbers: dict[str, dict[str, int]] = {}
            for layer, store in enumerate(group.stores):
                for name, part in store.parts().items():
                    held, numbers[f"{layer}.{name}"] = part.state()
                    tensors |= {f"{g}.{layer}.{name}.{key}": t.clone() for key, t in held.items()}
            groups.append({"batch": group.batch, "length": group.length, "stores": numbers})
        meta = {
            "format": "longreach-cache-1",
            "config": config_digest(self.config),
            "precision": self.precision,
            "groups": groups,
        }
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            save_file(tensors, temporary, metadata={"longreach": json.dumps(meta)})
            os.replace(temporary, target)
        except OSError as error:
            raise CacheError(f"cannot write the cache to {target}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)


def load_cache(path: str | os.PathLike, model) -> ContiguousCache:
    """Read a cache written by `ContiguousCache.save` for this model (or one of the same configuration).

    Raises:
        CacheError: unreadable, not a cache, or made by a model of another shape.
    """
    from safetensors import SafetensorError, safe_open

    config: ModelConfig = model.config
    try:
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            meta = json.loads((file.metadata() or {}).get("longreach", "{}"))
            if meta.get("format") != "longreach-cache-1":
                raise CacheError(f"{path} is not a saved cache; make one with cache.save(path)")
            if meta["config"] != config_digest(config):
                raise CacheError(f"{path} was saved by a model of another configuration; load it with that model")
            cache = model.new_cache(1, precision=meta["precision"])
            cache.groups = []
            for g, saved in enumerate(meta["groups"]):
                group = cache._new_group(saved["batch"])
                group.length = saved["length"]
                for layer, store in enumerate(group.stores):
                    for name, part in store.parts().items():
                        keys = ("entries",) if isinstance(part, Pool) else ("values",)
                        held = {key: file.get_tensor(f"{g}.{layer}.{name}.{key}") for key in keys}
                        part.restore(held, saved["stores"][f"{layer}.{name}"])
                cache.groups.append(group)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CacheError(f"cannot read a cache from {path}: {error}") from error
    return cache


def config_digest(config: ModelConfig) -> str:
    """A short fingerprint of everything that shapes a cache's content."""
    return hashlib.blake2b(json.dumps(config.to_dict(), sort_keys=True).encode(), digest_size=16).hexdigest()


def expected_nbytes(config: ModelConfig, length: int, precision: Precision = "float32", batch: int = 1) -> int:
    """The arithmetic of a cache: windows in full and one entry per complete block, without tails or slack."""
    total = 0
    for layer in range(config.num_hidden_layers):
        needs = layer_needs(config, layer)
        stored: list[tuple[int, Codec]] = []
        if needs.window_width:
            stored.append((config.sliding_window, kv_codec(config, precision, needs.window_width)))
        if needs.entry_width:
            stored.append((length // needs.ratio, kv_codec(config, precision, needs.entry_width)))
        if needs.index_width:
            stored.append((length // needs.ratio, index_codec(config, precision)))
        total += sum(rows * codec.width * codec.dtype.itemsize for rows, codec in stored)
    return total * batch
