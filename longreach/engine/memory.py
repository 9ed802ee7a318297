"""Where requests live: state blocks, pages, and what is remembered of earlier texts, in memory and on disk.

    memory = Memory(model, num_slots=16, num_pages=4096)
    memory.admit(request)        a state block, and the furthest anybody's text agrees with this one
    memory.reserve(request, n)   pages up to n tokens, its own where it will write
    memory.publish(request)      its complete pages become findable
    memory.checkpoint(request)   so does its state at this length
    memory.release(request)      block and pages back

A text that begins like an earlier one goes on from its pages (shared, never written again) and from a *checkpoint*: a
copy of the window and tails at one length. Without a checkpoint near enough the window is rebuilt over the cached entries
(`PagedSequence.replay`), which the report calls zero-SWA caching. So there is never an entry without its window and tail.

Policies (`checkpoints`): "ends" keeps a state at the end of every prompt and output, as DeepSeek's service does; "periodic"
also one every `period` tokens; "full" one per page, which is all window entries once; "zero" none.
Source: DeepSeek-V4 report, section 3.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from longreach.engine.disk import DiskStore
from longreach.engine.disk_writer import BackgroundWriter
from longreach.engine.pages import OutOfPages, PagePool
from longreach.engine.prefix import Node, PrefixIndex, chain_digest
from longreach.engine.request import Request
from longreach.errors import CacheError
from longreach.model.paged import Arena, PagedSequence, SavedState, from_bytes, replay_start, to_bytes
from longreach.model.stores import REWIND, Precision
from longreach.model.transformer import Transformer

Policy = Literal["ends", "periodic", "full", "zero"]
PENDING_BYTES = 1 << 28
"""Records waiting to be written to disk; beyond it new ones are not written."""
POLICIES: tuple[Policy, ...] = ("ends", "periodic", "full", "zero")


@dataclass
class SetAside:
    """Everything of a pre-empted request, copied out of the arena."""

    state: SavedState
    pages: list[list[Tensor]]
    nbytes: int


@dataclass
class Place:
    """A running request's share of memory.

    Attributes:
        node: the deepest node of the prefix tree that the request's own pages have reached.
        kept: length at the last periodic checkpoint, or where the request came in.
    """

    sequence: PagedSequence
    node: Node
    kept: int = 0


@dataclass
class MemoryStats:
    """Counts since the start. Tokens, except where the name says otherwise.

    Attributes:
        prompt, cached: of admitted prompts, and of those, never run because of a hit.
        replayed: run a second time to rebuild a window (part of neither hit nor new text's cost elsewhere).
        disk_pages, disk_states: records that came from disk.
    """

    prompt: int = 0
    cached: int = 0
    replayed: int = 0
    disk_pages: int = 0
    disk_states: int = 0
    swapped_bytes: int = 0
    recomputed_after_preemption: int = 0


@dataclass
class _Found:
    """The best way into a text: from `state` cut back to `start`, or by replaying from `start`."""

    start: int
    state: SavedState | None
    path: list[Node] = field(default_factory=list)


class Memory:
    """Owner of the arena. Its methods are what the scheduler asks for (`scheduler.Hooks`).

    Invariant: a page is held by every request that reads it and once by the prefix tree if it is findable there; nobody
    writes a page that anyone else holds.

    Args:
        num_slots, num_pages: state blocks (requests at once) and pages.
        checkpoints, period: see the module.
        checkpoint_limit_bytes: for checkpoints in memory.
        swap_limit_bytes: for requests set aside. Beyond it they are computed again from the prefix cache.
        disk: a second tier, or None.
        prefix_cache: False shares and remembers nothing.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        num_slots: int,
        num_pages: int,
        precision: Precision = "float32",
        checkpoints: Policy = "ends",
        period: int = 4096,
        checkpoint_limit_bytes: int = 1 << 30,
        swap_limit_bytes: int = 1 << 30,
        disk: DiskStore | None = None,
        prefix_cache: bool = True,
    ) -> None:
        self.arena = Arena(
            model.config, num_slots=num_slots, num_pages=num_pages, precision=precision, device=model.device,
            dtype=model.dtype,
        )  # fmt: skip
        self.block = self.arena.page_tokens
        self.pages, self.slots = PagePool(num_pages), PagePool(num_slots)
        self.index = PrefixIndex(self.pages, block=self.block, checkpoint_limit_bytes=checkpoint_limit_bytes)
        self.at_ends = checkpoints in ("ends", "periodic")
        self.every = {"periodic": period, "full": self.block}.get(checkpoints, 0)
        self.swap_limit, self.swapped_now = swap_limit_bytes, 0
        self.prefix_cache = prefix_cache
        self._use_disk(disk)
        self.stats = MemoryStats()

    # ---- sizes ------------------------------------------------------------------------------------------------------

    def blocks_for(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.block)

    @property
    def capacity(self) -> int:
        """Tokens the longest possible request may have."""
        return self.pages.count * self.block

    def stop_at(self, request: Request, position: int) -> int:
        """Where a prompt's pass from `position` must end so that a checkpoint can be taken there."""
        return (position // self.every + 1) * self.every if self.every and self.prefix_cache else len(request.tokens)

    # ---- the scheduler's hooks -----------------------------------------------------------------------------------------

    def admit(self, request: Request) -> bool:
        """Give the request a state block and its beginning; False, and nothing changed, where there is no room."""
        if not self.slots.free_count:
            return False
        aside: SetAside | None = request.work.aside
        known = self.index.match(request.tenant, request.tokens).node.path() if self.prefix_cache and not aside else []
        pinned = sum(1 for node in known if self.pages.holders(node.page) == 1)
        wanted = self.blocks_for(len(request.tokens) + 1) - len(known)
        if wanted > self.pages.free_count + self.index.evictable - pinned:
            return False
        sequence = PagedSequence(self.arena, self.slots.take())
        request.work.place = Place(sequence, self.index.root(request.tenant))
        if aside is not None:
            self._bring_back(request, aside)
            return True
        found = self._find(request) if self.prefix_cache else _Found(0, None)
        self._enter(request, found)
        if not request.preemptions:
            request.cached = min(request.computed, request.num_prompt)
            self.stats.prompt += request.num_prompt
            self.stats.cached += request.cached
        else:
            request.cached = min(request.cached, request.computed)
            self.stats.recomputed_after_preemption += len(request.tokens) - request.computed
        return True

    def would_admit(self, request: Request, without: Sequence[Request]) -> bool:
        """Whether there would be room for a request if those running ones were set aside."""
        given = {page for other in without for page in other.work.place.sequence.pages}
        held = sum(self.pages.holders(page) == 1 for page in given)
        return self.blocks_for(len(request.tokens) + 1) <= self.pages.free_count + self.index.evictable + held

    def reserve(self, request: Request, length: int) -> bool:
        """Pages up to `length` tokens."""
        sequence = request.work.place.sequence
        at = sequence.length // self.block
        # A page becomes findable when its last token is read, and whoever goes on inside a page known to others has `held`
        # beyond it: so the page that is written next is never anybody else's.
        writes = at < len(sequence.pages) and sequence.held <= sequence.length
        assert not writes or self.pages.holders(sequence.pages[at]) == 1
        try:
            while len(sequence.pages) < self.blocks_for(length):
                sequence.pages.append(self._take_page())
        except OutOfPages:
            return False
        return True

    def release(self, request: Request) -> None:
        """Set a running request aside: copy it out so that it goes on exactly where it stands, then free its memory."""
        sequence = request.work.place.sequence
        pages = sequence.pages[: self.blocks_for(sequence.length)]
        size = len(pages) * self.arena.page_nbytes + self.arena.slot_nbytes
        if sequence.length and sequence.held <= sequence.length and self.swapped_now + size <= self.swap_limit:
            copies = [[view.clone() for view in self.arena.page_tensors(page)] for page in pages]
            request.work.aside = SetAside(sequence.save(), copies, size)
            self.swapped_now += size
            self.stats.swapped_bytes += size
        else:
            request.computed = 0
        self.free(request)

    def free(self, request: Request) -> None:
        """Give block, pages and any copy of them back."""
        if (place := request.work.place) is not None:
            for page in place.sequence.pages:
                self.pages.release(page)
            self.slots.release(place.sequence.slot)
            request.work.place = None
        elif request.work.aside is not None:
            self.swapped_now -= request.work.aside.nbytes
            request.work.aside = None

    def _bring_back(self, request: Request, aside: SetAside) -> None:
        sequence = request.work.place.sequence
        for copies in aside.pages:
            page = self._take_page()
            sequence.pages.append(page)
            for view, copy in zip(self.arena.page_tensors(page), copies, strict=True):
                view.copy_(copy)
        sequence.load(aside.state)
        self.swapped_now -= aside.nbytes
        request.work.aside = None

    def _take_page(self) -> int:
        if not self.pages.free_count and not self.index.evict_page():
            raise OutOfPages(f"all {self.pages.count} pages are in use by requests")
        return self.pages.take()

    def known(self, tenant: str, tokens: Sequence[int]) -> int:
        """Tokens at the beginning of a text whose pages are in memory. Any thread may ask; nothing counts as used."""
        return self.index.known(tenant, tokens)

    # ---- finding a beginning ----------------------------------------------------------------------------------------

    def _find(self, request: Request) -> _Found:
        """The cheapest way in: fewest tokens to run. Pages on disk are brought into memory on the way."""
        tokens = request.tokens
        match = self.index.match(request.tenant, tokens)
        node = match.node
        for page in (each.page for each in node.path()):
            self.pages.retain(page)  # nothing of the path may be evicted while more of it is read
        node, path = self._pages_from_disk(request, node)
        state = match.held.checkpoint if match.held is not None else None
        start = match.usable
        replay = replay_start(self.arena.config, node.depth * self.block)
        replay = min(replay, (len(tokens) - 1) // self.block * self.block)
        if self.disk is not None and (found := self._state_from_disk(request, path, max(start, replay))) is not None:
            state, start = found, min(found.length, len(tokens) - 1)
        if replay > start:
            state, start = None, replay
        return _Found(start, state, path)

    def _pages_from_disk(self, request: Request, node: Node) -> tuple[Node, list[Node]]:
        """Follow the text on disk from where memory ends. Returns the deepest node and its path, all retained."""
        path = node.path()
        if self.disk is None:
            return node, path
        tokens, size = request.tokens, self.block
        digests, digest = [], node.digest
        for start in range(node.depth * size, len(tokens) // size * size, size):
            digest = chain_digest(digest, tokens[start : start + size])
            digests.append(digest)
        there = self.disk.contains(request.tenant, digests, "page") if digests else []
        for digest, is_there in zip(digests, there, strict=True):
            record = self.disk.get(request.tenant, digest, "page") if is_there else None
            if record is None:
                break
            try:
                page = self._take_page()
            except OutOfPages:
                break
            views = self.arena.page_tensors(page)
            for view, tensor in zip(views, from_bytes(views, record.payload), strict=True):
                view.copy_(tensor)
            start = node.depth * size
            node = self.index.add_page(
                node, tokens[start : start + size], page
            )  # holds it too: held twice, as the others
            path.append(node)
            self.stats.disk_pages += 1
        return node, path

    def _state_from_disk(self, request: Request, path: Sequence[Node], beyond: int) -> SavedState | None:
        """The furthest state on disk that saves more than `beyond` tokens, looked for from the end of the known path."""
        assert self.disk is not None
        tokens, size = request.tokens, self.block
        for depth in range(len(path), beyond // size - 1, -1):
            parent = path[depth - 1] if depth else self.index.root(request.tenant)
            rest = tokens[depth * size : (depth + 1) * size - 1]
            keys = [chain_digest(parent.digest, rest[:count]) for count in range(len(rest) + 1)]
            there = self.disk.contains(request.tenant, keys, "state")
            for count in range(len(rest), -1, -1):
                length = depth * size + count
                if not there[count] or min(length, len(tokens) - 1) <= beyond:
                    continue
                record = self.disk.get(request.tenant, keys[count], "state")
                if record is None:
                    continue
                try:
                    state = SavedState.from_bytes(self.arena, record.meta, record.payload)
                except (CacheError, KeyError, TypeError, ValueError):
                    continue
                if state.length == length and state.rewind_limit <= min(length, len(tokens) - 1):
                    self.stats.disk_states += 1
                    self.index.add_checkpoint(parent, rest[:count], state)
                    return state
        return None

    def _enter(self, request: Request, found: _Found) -> None:
        """Stand at the start that was found; the path's pages are retained already."""
        place: Place = request.work.place
        sequence = place.sequence
        sequence.pages = [node.page for node in found.path]
        place.node = found.path[-1] if found.path else place.node
        known = len(found.path) * self.block
        if found.state is not None:
            held = known if known > found.state.length else 0
            while len(sequence.pages) < self.blocks_for(found.state.length):
                sequence.pages.append(self._take_page())
            sequence.load(found.state, held)
            if found.start < found.state.length:
                sequence.truncate(found.start)
            sequence.held = known if known > found.start else 0
        elif known:
            sequence.replay(known, found.start)
            self.stats.replayed += known - sequence.length
        request.computed = place.kept = sequence.length

    # ---- remembering ------------------------------------------------------------------------------------------------

    def publish(self, request: Request) -> None:
        """Make the request's complete pages findable; where somebody was first, take his page and give ours back."""
        if not self.prefix_cache:
            return
        place: Place = request.work.place
        sequence, size = place.sequence, self.block
        while (place.node.depth + 1) * size <= sequence.length:
            depth = place.node.depth
            own = sequence.pages[depth]
            node = self.index.add_page(place.node, request.tokens[depth * size : (depth + 1) * size], own)
            if node.page != own:
                self.pages.retain(node.page)
                self.pages.release(own)
                sequence.pages[depth] = node.page
            elif self.writer is not None:
                buffers = to_bytes([view.clone() for view in self.arena.page_tensors(own)])
                self.writer.submit(request.tenant, node.digest, "page", buffers, {})
            place.node = node

    def checkpoint(self, request: Request, slack: int = REWIND) -> None:
        """Make the request's state at its present length findable."""
        if not self.prefix_cache:
            return
        self.publish(request)
        place: Place = request.work.place
        sequence = place.sequence
        if sequence.held > sequence.length or sequence.length <= place.node.depth * self.block - 1:
            return
        place.kept = sequence.length
        rest = request.tokens[place.node.depth * self.block : sequence.length]
        state = sequence.save(slack)
        self.index.add_checkpoint(place.node, rest, state)
        if self.writer is not None:
            key = chain_digest(place.node.digest, rest)
            self.writer.submit(request.tenant, key, "state", to_bytes(state.tensors), state.numbers())

    def after(self, request: Request, *, is_end: bool) -> None:
        """Remember what the policy asks for after a pass. `is_end`: of the prompt or of the output."""
        place: Place = request.work.place
        if not self.prefix_cache or place.sequence.held > place.sequence.length:
            return
        if is_end and self.at_ends:
            self.checkpoint(request)
        elif self.every and place.sequence.length // self.every > place.kept // self.every:
            self.checkpoint(request, slack=0)  # at the very multiple, unless accepted drafts jumped over it
        else:
            self.publish(request)

    def _use_disk(self, disk: DiskStore | None) -> None:
        self.disk = disk
        self.writer = BackgroundWriter(disk, max_pending_bytes=PENDING_BYTES) if disk is not None else None

    def forget(self, disk: DiskStore | None = None) -> None:
        """Drop everything remembered in memory (the weights have changed), and go on with another store on disk."""
        self.index.clear()
        self.close()
        self._use_disk(disk)

    def close(self) -> None:
        """Write what is pending to disk."""
        if self.writer is not None:
            self.writer.close()
        if self.disk is not None:
            self.disk.close()


def fingerprint_text(model: Transformer, precision: Precision, compiled: str) -> str:
    """Everything that decides the bits of a cache: shape, weights, numerics, arithmetic, formats, and this machine's arithmetic.

    Weights are hashed whole up to 4 GiB, beyond that by samples of every tensor.
    """
    import hashlib
    import json

    weights = hashlib.blake2b(digest_size=16)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if total > 4 << 30 and flat.numel() > 3 << 16:
            middle = flat.numel() // 2
            flat = torch.cat([flat[: 1 << 16], flat[middle : middle + (1 << 16)], flat[-(1 << 16) :]])
        weights.update(flat.cpu().numpy().data)
    config = model.config
    lines = {
        "format": "longreach prefix cache 1",
        "config": json.dumps(config.to_dict(), sort_keys=True),
        "weights": weights.hexdigest(),
        "dtype": str(model.dtype),
        "arithmetic": config.arithmetic,
        "precision": precision,
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        "compiled": compiled,
        # The fast products of some thread counts sum in another order; the invariant ones never do.
        "threads": "any" if config.arithmetic == "invariant" and compiled else str(torch.get_num_threads()),
    }
    return "\n".join(f"{key}: {value}" for key, value in lines.items())
