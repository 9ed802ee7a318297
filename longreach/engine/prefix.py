"""Which pages and checkpoints belong to which beginning of which text: a tree of blocks per tenant, compared token by token.

    index = PrefixIndex(pool, block=128, checkpoint_limit_bytes=1 << 30)
    match = index.match("tenant", tokens)             deepest known blocks, and the best checkpoint on the way
    node = index.add_page(node, tokens_of_block, page)
    index.add_checkpoint(node, rest, checkpoint)      the state after a node's blocks and `rest` more tokens

A node is one block of tokens after its parent's; it holds one page. Nothing is ever found by a hash alone in memory: a
child is looked up by its tokens. On disk the key is `Node.digest`, a chain of 256-bit digests that begins with the tenant.
A checkpoint is an opaque object with a size; without one, pages still help (`PagedSequence.replay`).

Least recently used goes first: checkpoints when they exceed their bytes, pages when somebody needs one. A page in use by a
request, or with known blocks behind it, stays.
"""

from __future__ import annotations

import hashlib
import weakref
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from longreach.engine.pages import PagePool


class Checkpoint(Protocol):
    """The state of a sequence at one length, as the index sees it."""

    @property
    def length(self) -> int: ...

    @property
    def rewind_limit(self) -> int:
        """The shortest length it can be cut back to."""
        ...

    @property
    def nbytes(self) -> int: ...


def root_digest(tenant: str) -> bytes:
    """The start of a tenant's chain of digests."""
    return hashlib.blake2b(b"longreach prefix 1\0" + tenant.encode(), digest_size=32).digest()


def chain_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of `parent`'s text continued by `tokens`: 32 bytes."""
    return hashlib.blake2b(array("q", tokens).tobytes(), key=parent, digest_size=32).digest()


@dataclass(eq=False)
class Node:
    """One block of tokens after its parent's, and the page that holds its entries (a root has neither)."""

    parent: Node | None
    tokens: tuple[int, ...]
    page: int
    depth: int
    digest: bytes
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    checkpoints: dict[tuple[int, ...], Held] = field(default_factory=dict)

    def path(self) -> list[Node]:
        """The nodes from the first block to this one."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


@dataclass(eq=False)
class Held:
    """A checkpoint where it hangs: after `node`'s blocks and `rest`, fewer tokens than a block."""

    node: Node
    rest: tuple[int, ...]
    checkpoint: Any


@dataclass
class Match:
    """What is known about the beginning of a text.

    Attributes:
        node: the deepest node whose blocks are all there; a root if none is.
        held: the checkpoint that reaches furthest, or None.
        usable: tokens `held` gives, at most all but one of the text (its last token must be read for its logits).
    """

    node: Node
    held: Held | None = None
    usable: int = 0


class PrefixIndex:
    """The tree. Holds one reference to each of its nodes' pages."""

    def __init__(
        self, pool: PagePool, *, block: int, checkpoint_limit_bytes: int, on_evict: Callable[[Node], None] | None = None
    ) -> None:
        self.pool, self.block, self.limit = pool, block, checkpoint_limit_bytes
        self.on_evict = on_evict
        # A root lives as long as a block, a checkpoint or a request hangs on it: tenants that come once leave nothing behind.
        self.roots: weakref.WeakValueDictionary[str, Node] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[Node, None] = OrderedDict()  # a parent is always more recent than its children
        self._held: OrderedDict[Held, None] = OrderedDict()
        self.checkpoint_bytes = 0
        self.evicted_pages = self.evicted_checkpoints = 0

    @property
    def num_pages(self) -> int:
        return len(self._recent)

    @property
    def num_checkpoints(self) -> int:
        return len(self._held)

    def root(self, tenant: str) -> Node:
        """The node before a tenant's first block. Hold it, or something below it, for as long as it shall be the same one."""
        root = self.roots.get(tenant)
        if root is None:
            root = self.roots[tenant] = Node(None, (), -1, 0, root_digest(tenant))
        return root

    def match(self, tenant: str, tokens: Sequence[int]) -> Match:
        """The deepest node and the furthest checkpoint for this text; counts as use of both."""
        node, size = self.root(tenant), self.block
        best = Match(node)
        while True:
            start = node.depth * size
            following = tuple(tokens[start : start + size])
            for held in node.checkpoints.values():
                shared = _common(held.rest, following)
                usable = min(start + shared, len(tokens) - 1)
                # A state further on than the text agrees with it is cut back, as far as its buffers reach.
                if usable > best.usable and usable >= held.checkpoint.rewind_limit:
                    best.held, best.usable = held, usable
            child = node.children.get(following)
            if child is None:
                break
            node = child
        best.node = node
        self.touch(node)
        if best.held is not None:
            self._held.move_to_end(best.held)
        return best

    def known(self, tenant: str, tokens: Sequence[int]) -> int:
        """Tokens of a text's known blocks. Only looks, one dictionary entry at a time, so any thread may call it."""
        node, size = self.roots.get(tenant), self.block
        while node is not None:
            start = node.depth * size
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                return start
            node = child
        return 0

    def touch(self, node: Node) -> None:
        """Count as a use of the node and all before it."""
        for each in reversed(node.path()):
            self._recent.move_to_end(each)

    def add_page(self, parent: Node, tokens: Sequence[int], page: int) -> Node:
        """The node for a complete block after `parent`. A block already known keeps its page; else this one is retained."""
        key = tuple(tokens)
        assert len(key) == self.block, f"a block has {self.block} tokens, not {len(key)}"
        node = parent.children.get(key)
        if node is None:
            self.pool.retain(page)
            node = Node(parent, key, page, parent.depth + 1, chain_digest(parent.digest, key))
            parent.children[key] = node
            self._recent[node] = None
        self.touch(node)
        return node

    def add_checkpoint(self, node: Node, rest: Sequence[int], checkpoint: Checkpoint) -> bool:
        """Keep a state after `node`'s blocks and `rest`. False if it alone is more than the limit."""
        if checkpoint.nbytes > self.limit:
            return False
        key = tuple(rest)
        if (old := node.checkpoints.get(key)) is not None:
            self._drop(old)
        held = Held(node, key, checkpoint)
        node.checkpoints[key] = held
        self._held[held] = None
        self.checkpoint_bytes += checkpoint.nbytes
        while self.checkpoint_bytes > self.limit:
            self._drop(next(iter(self._held)))
            self.evicted_checkpoints += 1
        return True

    def _drop(self, held: Held) -> None:
        del held.node.checkpoints[held.rest], self._held[held]
        self.checkpoint_bytes -= held.checkpoint.nbytes

    @property
    def evictable(self) -> int:
        """Pages that `evict_page` could free, one after the other. Requests hold whole paths, so no more than counting."""
        return sum(1 for node in self._recent if self.pool.holders(node.page) == 1)

    def evict_page(self) -> bool:
        """Free the least recently used page that nothing hangs on. False if there is none."""
        for node in self._recent:  # oldest first; children before their parents
            if node.children or self.pool.holders(node.page) > 1:
                continue
            for held in list(node.checkpoints.values()):
                self._drop(held)
            assert node.parent is not None
            del node.parent.children[node.tokens], self._recent[node]
            if self.on_evict is not None:
                self.on_evict(node)
            self.pool.release(node.page)
            self.evicted_pages += 1
            return True
        return False

    def clear(self) -> None:
        """Forget everything (the weights have changed). Pages still read by requests stay theirs."""
        for node in self._recent:
            self.pool.release(node.page)
        self._recent.clear()
        self._held.clear()
        self.roots.clear()
        self.checkpoint_bytes = 0


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
