"""One decoded token per sequence through the compiled functions of `native`, between stores of any format.

    step = NativeStep.of(model)                 None where the model or the machine is not suited
    if step and step.suits(part, spans): features = step.advance(part, spans)

For what `model.native_pass` leaves aside: caches in fewer bits than float32, and models that round as the released code
does. `model.attention`, `model.feedforward` and `model.hyper_connection` say what is computed; here only is arranged who
calls whom. What a layer remembers goes through the same stores, and blocks that become full are compressed by the same
`Compressor`. Float32 weights on a CPU, `arithmetic="fast"`.
"""

from __future__ import annotations

import weakref
from ctypes import addressof
from typing import Any, cast

import torch
from torch import Tensor, nn

from longreach.model.attention import Attention, report_selection, round_entries
from longreach.model.bind import are_current, bind_collapse, bind_layer, is_suited, weights
from longreach.model.block import Block
from longreach.model.features import Features, Part
from longreach.model.passing import Pass, Span, frequencies
from longreach.model.stores import LayerStore
from longreach.native.library import MAX_ROWS, library
from longreach.ops.rope import rope_table

_bound: weakref.WeakKeyDictionary[nn.Module, tuple[int, NativeStep | None]] = weakref.WeakKeyDictionary()
"""Beside the models, not in them: addresses must not travel with a copied or pickled model."""


class NativeStep:
    """A model's weights bound for the compiled functions. Holds no state of any sequence."""

    def __init__(self, model: nn.Module, native: Any) -> None:
        self.native = native
        c = self.config = cast(Any, model).config
        self.embed: nn.Embedding = cast(Any, model).embed
        self.watched = weights(model)
        self.layers = [NativeLayer(block) for block in cast(Any, model).layers]
        self.collapse = bind_collapse(cast(Any, model).collapse, cast(Any, model).norm, c)
        self.frequencies = {compressed: frequencies(c, compressed) for compressed in (False, True)}

    @classmethod
    def of(cls, model: nn.Module) -> NativeStep | None:
        """The step for this model, made once and again whenever a weight has moved; None where it does not apply."""
        address, step = _bound.get(model, (0, None))
        if step is not None and step.is_current():
            return step
        now = cast(Any, model).embed.weight.data_ptr()
        if step is None and address == now:
            return None  # looked at before, and not suited
        native = library()
        step = cls(model, native) if native is not None and _suited(model) else None
        _bound[model] = now, step
        return step

    def is_current(self) -> bool:
        """Whether every bound weight is where it was."""
        return are_current(self.watched)

    def suits(self, part: Part, spans: list[Span]) -> bool:
        """Whether this pass is one token for each of a few rows, with nothing asked that only the full pass gives."""
        B, T = part.tokens.shape
        return (
            T == 1
            and B <= MAX_ROWS
            and sum(span.rows.stop - span.rows.start for span in spans) == B
            and part.routing is None
            and part.selection is None
            and set(part.keep) <= {"routing", "selection"}
        )

    def advance(self, part: Part, spans: list[Span]) -> Features:
        """As `Transformer._pass`, advancing the spans' stores."""
        c, native = self.config, self.native
        native.lr_set_threads(torch.get_num_threads())
        pass_ = Pass(
            c, part.tokens, spans, dense=part.dense, wants_routing="routing" in part.keep,
            wants_selection="selection" in part.keep, _frequencies=self.frequencies,
        )  # fmt: skip
        tokens = part.tokens.flatten().contiguous()
        M = len(tokens)
        positions = torch.empty(M, dtype=torch.int64)
        for span in spans:
            positions[span.rows] = span.first
        tables = {key: torch.view_as_real(rope_table(positions, f)).contiguous() for key, f in self.frequencies.items()}
        streams = self.embed.weight[tokens].unsqueeze(1).expand(-1, c.hc_mult, -1).contiguous()
        step = Step(native, pass_, tokens, positions, tables, streams)
        for layer in self.layers:
            layer.advance(step)
        hidden = streams.new_empty(M, c.hidden_size)
        native.lr_collapse(self.collapse.pointer, M, streams.data_ptr(), step.z.data_ptr(), hidden.data_ptr())
        return Features(hidden.unsqueeze(1), pass_.routing, selection=pass_.selection)


class Step:
    """The buffers one pass hands from layer to layer."""

    def __init__(
        self, native: Any, pass_: Pass, tokens: Tensor, positions: Tensor, tables: dict[bool, Tensor], streams: Tensor
    ) -> None:
        self.native, self.pass_, self.tables = native, pass_, tables
        self.tokens, self.positions, self.streams = tokens, positions, streams
        M, n, D = streams.shape
        self.M = M
        self.x, self.y = streams.new_empty(2, M, D).unbind()
        self.post, self.comb, self.z = (streams.new_empty(M, size) for size in (n, n * n, (2 + n) * n))


class NativeLayer:
    """One layer's weights, and the order of its calls."""

    def __init__(self, block: Block) -> None:
        self.attention = cast(Attention, block.attn)
        c = self.config = self.attention.config
        self.kind, self.layer = self.attention.kind, block.layer
        self.weights = bind_layer(block)
        self.attn, self.ffn = self.weights.attn, self.weights.ffn
        self.attn_hc, self.ffn_hc, self.attn_at, self.ffn_at = map(
            addressof, (self.weights.attn_hc, self.weights.ffn_hc, self.attn, self.ffn)
        )
        self.ratio = self.attention.ratio
        self.rounded = c.numerics == "official"

    def advance(self, step: Step) -> None:
        native, M = step.native, step.M
        streams, x, y = step.streams.data_ptr(), step.x.data_ptr(), step.y.data_ptr()
        post, comb = step.post.data_ptr(), step.comb.data_ptr()
        z = step.z.data_ptr()
        native.lr_hyper_enter(self.attn_hc, M, streams, z, x, post, comb)
        self._attend(step)
        native.lr_hyper_leave(self.attn_hc, M, streams, y, post, comb)
        native.lr_hyper_enter(self.ffn_hc, M, streams, z, x, post, comb)
        chosen = step.tokens.new_empty(M, 1, self.ffn.K)
        native.lr_mixture(self.ffn_at, M, x, step.tokens.data_ptr(), chosen.data_ptr(), y)
        if self.ffn.E:
            step.pass_.keep_routing(self.layer, chosen, step.x)
        native.lr_hyper_leave(self.ffn_hc, M, streams, y, post, comb)

    def _attend(self, step: Step) -> None:
        """step.x to step.y, through the stores."""
        a, M, native, new = self.attn, step.M, step.native, step.x.new_empty
        table = step.tables[self.ratio > 1].data_ptr()
        q, kv, out = new(M, a.N, a.H), new(M, 1, a.H), new(M, a.N, a.H)
        raw = new(M, 1, 2 * a.compressor.channels)
        index_q, index_weight = new(M, a.index_heads, a.index_dim), new(M, a.index_heads)
        index_raw = new(M, 1, 2 * a.index_compressor.channels)
        scratch = new(M * max(a.rank, a.groups * a.o_rank))
        native.lr_attention_in(
            self.attn_at, M, step.x.data_ptr(), step.positions.data_ptr(), table, scratch.data_ptr(), q.data_ptr(),
            kv.data_ptr(), raw.data_ptr(), index_q.data_ptr(), index_weight.data_ptr(), index_raw.data_ptr(),
        )  # fmt: skip
        if self.rounded:
            kv = round_entries(self.config, kv)
        for span in step.pass_.spans:
            rows, store, pass_ = span.rows, span.stores[self.layer], step.pass_
            local, visible = self._remember(kv[rows], raw[rows], index_raw[rows], span, store, pass_)
            chosen = None
            if self.kind == "csa" and not pass_.dense:
                if visible > self.config.index_topk:
                    chosen = self._select(index_q[rows], index_weight[rows], visible, store, native)
                if pass_.wants_selection:
                    report_selection(self.layer, chosen, self.ratio, self.config.index_topk, span, pass_)
            extra = None
            if visible:
                entries = cast(Any, store.entries)
                extra = entries.read(visible) if chosen is None else entries.gather(chosen).squeeze(1)
            self._mix(q[rows], local, extra, out[rows], native)
        native.lr_attention_out(self.attn_at, M, out.data_ptr(), table, scratch.data_ptr(), step.y.data_ptr())

    def _remember(
        self, kv: Tensor, raw: Tensor, index_raw: Tensor, span: Span, store: LayerStore, pass_: Pass
    ) -> tuple[Tensor | None, int]:
        """Put the token into the layer's stores. Returns its window `[b, L, H]` and how many entries it sees."""
        entries, recent = cast(Any, store.entries), cast(Any, store.window)
        if self.kind == "dense":
            entries.append(kv)
            return None, span.stop
        recent.push(kv)
        local = recent.read(max(0, span.stop - self.config.sliding_window), span.stop)
        if self.kind == "sliding":
            return local, 0
        if span.stop % self.ratio:  # most tokens complete no block
            cast(Any, store.raw).push(raw)
            if self.kind == "csa":
                cast(Any, store.index_raw).push(index_raw)
        else:
            turn = pass_.frequencies(compressed=True)
            made, _ = self.attention.compressor.complete(raw, span, cast(Any, store.raw), turn, False)
            entries.append(round_entries(self.config, made))
            if self.kind == "csa":
                self.attention.indexer.extend(index_raw, span, store, pass_)
        return local, span.stop // self.ratio

    def _select(self, q: Tensor, weight: Tensor, visible: int, store: LayerStore, native: Any) -> Tensor:
        """The indexer's choice for each row, int64 `[b, 1, k]` ascending."""
        if self.rounded:
            q = self.attention.indexer.rotate(q).contiguous()
        b, heads, width = q.shape
        k = self.config.index_topk
        scores, scratch = q.new_empty(b, visible), q.new_empty(visible)
        chosen = torch.empty(b, 1, k, dtype=torch.int64)
        start = 0
        for block in cast(Any, store.index_entries).blocks(visible):
            keys, count = _rows(block), block.shape[1]
            for row in range(b):
                native.lr_index_scores(
                    q[row].data_ptr(), weight[row].data_ptr(), keys.data_ptr() + 4 * row * keys.stride(0), heads, width,
                    count, scores[row].data_ptr() + 4 * start,
                )  # fmt: skip
            start += count
        for row in range(b):
            native.lr_select_top(scores[row].data_ptr(), visible, k, scratch.data_ptr(), chosen[row].data_ptr())
        return chosen

    def _mix(self, q: Tensor, local: Tensor | None, extra: Tensor | None, out: Tensor, native: Any) -> None:
        """Attention of each row over its window and its entries, into `out`."""
        near = _rows(local) if local is not None else None
        far = _rows(extra) if extra is not None else None
        L, E = near.shape[1] if near is not None else 0, far.shape[1] if far is not None else 0
        for row in range(q.shape[0]):
            native.lr_attend(
                self.attn_at, q[row].data_ptr(),
                near.data_ptr() + 4 * row * near.stride(0) if near is not None else None, L,
                far.data_ptr() + 4 * row * far.stride(0) if far is not None else None, E,
                out[row].data_ptr(),
            )  # fmt: skip


def _rows(values: Tensor) -> Tensor:
    """`[b, s, w]` float32 with each row's vectors one after another (the rows themselves may lie apart)."""
    packed = values.stride(2) == 1 and values.stride(1) == values.shape[2]
    return values.float() if packed else values.float().contiguous()


def _suited(model: nn.Module) -> bool:
    return is_suited(model) and cast(Any, model).config.arithmetic == "fast"
