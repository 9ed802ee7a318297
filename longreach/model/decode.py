"""One decoded token per sequence through the compiled functions of `native`: the same layers, without operators' overhead.

    step = NativeStep.of(model)                 None where the model or the machine is not suited
    if step and step.suits(part, spans): features = step.advance(part, spans)

`model.attention`, `model.feedforward` and `model.hyper_connection` say what is computed; here only is arranged who calls
whom. What a layer remembers goes through the same stores, and blocks that become full are compressed by the same
`Compressor`. Float32 on a CPU, `arithmetic="fast"`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from longreach.model.attention import Attention, report_selection, round_entries
from longreach.model.block import Block
from longreach.model.compressor import Compressor
from longreach.model.features import Features, Part
from longreach.model.feedforward import FeedForward, MixtureOfExperts
from longreach.model.hyper_connection import HyperConnection, StreamCollapse
from longreach.model.passing import Pass, Span, frequencies
from longreach.model.stores import LayerStore
from longreach.native.library import MAX_ROWS, AttentionWeights, CompressorWeights, Hyper, MixtureWeights, library
from longreach.ops.rope import rope_table

SCORING = {"sqrtsoftplus": 0, "sigmoid": 1, "softmax": 2}


_bound: weakref.WeakKeyDictionary[nn.Module, tuple[int, NativeStep | None]] = weakref.WeakKeyDictionary()
"""Beside the models, not in them: addresses must not travel with a copied or pickled model."""


class NativeStep:
    """A model's weights bound for the compiled functions. Holds no state of any sequence."""

    def __init__(self, model: nn.Module, native: Any) -> None:
        self.native = native
        c = self.config = cast(Any, model).config
        self.embed: nn.Embedding = cast(Any, model).embed
        self.watched = list(_parameters(model))
        self.layers = [NativeLayer(block) for block in cast(Any, model).layers]
        collapse = cast(StreamCollapse, model.collapse)
        self.collapse = Hyper(
            fn=collapse.fn, base=collapse.base, scale=collapse.scale, norm=cast(Any, model.norm).weight,
            n=c.hc_mult, D=c.hidden_size, eps=c.hc_eps, norm_eps=c.rms_norm_eps, input_eps=c.rms_norm_eps,
        )  # fmt: skip
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
        return all(held[name] is p and p.data_ptr() == address for held, name, p, address in self.watched)

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
        native.lr_collapse(self.collapse.pointer, M, streams.data_ptr(), hidden.data_ptr())
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
        self.post, self.comb = streams.new_empty(M, n), streams.new_empty(M, n, n)


class NativeLayer:
    """One layer's weights, and the order of its calls."""

    def __init__(self, block: Block) -> None:
        self.attention = cast(Attention, block.attn)
        c = self.config = self.attention.config
        self.kind, self.layer = self.attention.kind, block.layer
        self.attn_hc = _hyper(cast(HyperConnection, block.attn_hc), block.attn_norm.weight, c)
        self.ffn_hc = _hyper(cast(HyperConnection, block.ffn_hc), block.ffn_norm.weight, c)
        self.attn = _attention(self.attention)
        self.ffn = _mixture(block.ffn, c)
        self.ratio = self.attention.ratio
        self.rounded = c.numerics == "official"

    def advance(self, step: Step) -> None:
        native, M = step.native, step.M
        streams, x, y = step.streams.data_ptr(), step.x.data_ptr(), step.y.data_ptr()
        post, comb = step.post.data_ptr(), step.comb.data_ptr()
        native.lr_hyper_enter(self.attn_hc.pointer, M, streams, x, post, comb)
        self._attend(step)
        native.lr_hyper_leave(self.attn_hc.pointer, M, streams, y, post, comb)
        native.lr_hyper_enter(self.ffn_hc.pointer, M, streams, x, post, comb)
        e = self.ffn
        scratch = step.x.new_empty(2 * max(e.f, e.shared_f) + e.D + 2 * e.E)
        chosen = step.tokens.new_empty(M, 1, e.K)
        native.lr_mixture(e.pointer, M, x, step.tokens.data_ptr(), scratch.data_ptr(), chosen.data_ptr(), y)
        if e.E:
            step.pass_.keep_routing(self.layer, chosen, scratch)
        native.lr_hyper_leave(self.ffn_hc.pointer, M, streams, y, post, comb)

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
            a.pointer, M, step.x.data_ptr(), step.positions.data_ptr(), table, scratch.data_ptr(), q.data_ptr(),
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
        native.lr_attention_out(a.pointer, M, out.data_ptr(), table, scratch.data_ptr(), step.y.data_ptr())

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
        scratch = q.new_empty(q.shape[1] * (L + E))
        for row in range(q.shape[0]):
            native.lr_attend(
                self.attn.pointer, q[row].data_ptr(),
                near.data_ptr() + 4 * row * near.stride(0) if near is not None else None, L,
                far.data_ptr() + 4 * row * far.stride(0) if far is not None else None, E,
                scratch.data_ptr(), out[row].data_ptr(),
            )  # fmt: skip


# ---- binding -----------------------------------------------------------------------------------------------------------


def _rows(values: Tensor) -> Tensor:
    """`[b, s, w]` float32 with each row's vectors one after another (the rows themselves may lie apart)."""
    packed = values.stride(2) == 1 and values.stride(1) == values.shape[2]
    return values.float() if packed else values.float().contiguous()


def _hyper(connection: HyperConnection, norm: Tensor, c: Any) -> Hyper:
    return Hyper(
        fn=connection.fn, base=connection.base, scale=connection.scale, norm=norm, n=connection.streams, D=c.hidden_size,
        iters=connection.iters, constrained=int(connection.constrained), eps=connection.eps,
        norm_eps=connection.norm_eps, input_eps=c.rms_norm_eps,
    )  # fmt: skip


def _compressor(module: Compressor | None) -> CompressorWeights:
    if module is None:
        return CompressorWeights()
    return CompressorWeights(
        wkv=module.wkv.weight, wgate=module.wgate.weight, ape=module.ape, channels=module.ape.shape[1], ratio=module.ratio
    )  # fmt: skip


def _attention(a: Attention) -> AttentionWeights:
    c = a.config
    indexer = a.indexer if a.kind == "csa" else None
    return AttentionWeights(
        wq_a=a.wq_a.weight, q_norm=a.q_norm.weight, wq_b=a.wq_b.weight, wkv=a.wkv.weight, kv_norm=a.kv_norm.weight,
        wo_a=a.wo_a.weight, wo_b=a.wo_b.weight, sink=a.attn_sink,
        index_wq_b=indexer.wq_b.weight if indexer else None,
        index_weights=indexer.weights_proj.weight if indexer else None,
        compressor=_compressor(a.compressor if a.kind in ("csa", "hca") else None),
        index_compressor=_compressor(indexer.compressor if indexer else None),
        D=c.hidden_size, rank=c.q_lora_rank, N=c.num_attention_heads, H=c.head_dim, rope=c.qk_rope_head_dim,
        groups=c.o_groups, o_rank=c.o_lora_rank, index_heads=c.index_n_heads if indexer else 0,
        index_dim=c.index_head_dim if indexer else 0, eps=c.rms_norm_eps, scale=c.head_dim**-0.5,
        index_scale=indexer.scale if indexer else 0.0,
    )  # fmt: skip


def _mixture(ffn: nn.Module, c: Any) -> MixtureWeights:
    if isinstance(ffn, FeedForward):  # a dense layer is a shared expert alone
        return MixtureWeights(
            shared_w1=ffn.w1.weight, shared_w3=ffn.w3.weight, shared_w2=ffn.w2.weight, D=c.hidden_size,
            shared_f=ffn.w1.weight.shape[0], limit=ffn.limit,
        )  # fmt: skip
    ffn = cast(MixtureOfExperts, ffn)
    shared, experts, gate = ffn.shared_experts, ffn.experts, ffn.gate
    return MixtureWeights(
        gate=gate.weight, bias=gate.bias, table=gate.tid2eid, w1=experts.w1, w3=experts.w3, w2=experts.w2,
        shared_w1=shared.w1.weight, shared_w3=shared.w3.weight, shared_w2=shared.w2.weight, D=c.hidden_size,
        E=c.n_routed_experts, K=c.num_experts_per_tok, f=c.moe_intermediate_size, scoring=SCORING[c.scoring_func],
        shared_f=shared.w1.weight.shape[0], limit=ffn.limit, scale=c.routed_scaling_factor,
    )  # fmt: skip


def _parameters(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor, int]]:
    """Where each weight and buffer of the main model hangs, and its address."""
    m = cast(Any, model)
    for part in (m.embed, *m.layers, m.collapse, m.norm):
        for module in part.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        yield held, name, tensor, tensor.data_ptr()


def _suited(model: nn.Module) -> bool:
    """Whether every layer is one the compiled functions know, with float32 weights on the CPU."""
    c = cast(Any, model).config
    rounds_inputs = c.numerics == "official" and c.weight_format != "plain"
    if c.attention == "mla" or c.residual == "plain" or c.arithmetic != "fast" or rounds_inputs or c.n_group > 1:
        return False
    if c.scoring_func not in SCORING:
        return False
    for _, _, tensor, _ in _parameters(model):
        floats = tensor.dtype == torch.float32 or not tensor.is_floating_point()
        if tensor.device.type != "cpu" or not floats or not tensor.is_contiguous():
            return False
    return True
