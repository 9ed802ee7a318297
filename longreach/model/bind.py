"""A model's weights bound for the compiled functions: structures of addresses, and whether they still hold.

`is_suited` says which models the functions know: V4 attention and experts, residual streams, float32 on the CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from longreach.model.attention import Attention
from longreach.model.block import Block
from longreach.model.compressor import Compressor
from longreach.model.feedforward import FeedForward, MixtureOfExperts
from longreach.model.hyper_connection import HyperConnection, StreamCollapse
from longreach.model.passing import frequencies
from longreach.native.library import AttentionWeights, CompressorWeights, Hyper, LayerWeights, MixtureWeights, Network

SCORING = {"sqrtsoftplus": 0, "sigmoid": 1, "softmax": 2}

Weights = list[tuple[dict[str, Any], str, Tensor, int]]
"""Where each weight and buffer hangs, and its address when it was bound."""


def is_suited(model: nn.Module) -> bool:
    """Whether every layer is one the compiled functions know, with float32 weights on the CPU."""
    c = cast(Any, model).config
    rounds_inputs = c.numerics == "official" and c.weight_format != "plain"
    if c.attention == "mla" or c.residual == "plain" or rounds_inputs or c.n_group > 1 or c.scoring_func not in SCORING:
        return False
    if any(getattr(module, "stands_in", False) for module in model.modules()):  # frozen codes, adapters
        return False
    for _, _, tensor, _ in weights(model):
        floats = tensor.dtype == torch.float32 or not tensor.is_floating_point()
        if tensor.device.type != "cpu" or not floats or not tensor.is_contiguous():
            return False
    return True


def weights(model: nn.Module) -> Weights:
    """All of them but the head's, which is no part of a layer."""
    return list(_weights(cast(Any, model)))


def _weights(model: Any) -> Iterator[tuple[dict[str, Any], str, Tensor, int]]:
    for part in (model.embed, *model.layers, model.collapse, model.norm, *model.mtp):
        for module in part.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        yield held, name, tensor, tensor.data_ptr()


def are_current(bound: Weights) -> bool:
    """Whether every bound weight is where it was."""
    return all(held.get(name) is tensor and tensor.data_ptr() == address for held, name, tensor, address in bound)


class BoundModel:
    """A model of which all is bound.

    Attributes:
        native: the loaded library.
        model: a weak reference to it.
        layers: the main layers, then the MTP blocks'; `kinds`: what attention they have.
        collapse, mtp_collapse: of the streams, for the head; the latter None without an MTP block.
        network: C's view of all this.
    """

    def __init__(self, model: nn.Module, native: Any) -> None:
        m = cast(Any, model)
        c = self.config = m.config
        self.native, self.model = native, weakref.ref(m)
        self.watched = weights(model)
        self.layers = [bind_layer(block) for block in (*m.layers, *m.mtp)]
        self.num_main = len(m.layers)
        self.kinds = [c.layer_kind(i) for i in range(len(self.layers))]
        self.frequencies = {compressed: frequencies(c, compressed) for compressed in (False, True)}
        self.collapse = bind_collapse(m.collapse, m.norm, c)
        self.mtp_collapse, told = None, {}
        if m.mtp:
            block = m.mtp[0]
            self.mtp_collapse = bind_collapse(block.collapse, block.norm, c)
            told = dict(
                enorm=block.enorm.weight, hnorm=block.hnorm.weight, e_proj=block.e_proj.weight, h_proj=block.h_proj.weight,
                enorm_eps=block.enorm.eps, hnorm_eps=block.hnorm.eps, mtp_collapse=self.mtp_collapse,
            )  # fmt: skip
        self.network = Network(
            layers=torch.tensor([layer.pointer for layer in self.layers], dtype=torch.int64), embed=m.embed.weight,
            frequencies=self.frequencies[False], compressed_frequencies=self.frequencies[True], num_layers=self.num_main,
            vocab=m.embed.weight.shape[0], pairs=len(self.frequencies[False]), collapse=self.collapse, **told,
        )  # fmt: skip

    def is_current(self) -> bool:
        """Whether every bound weight is where it was. Looks at each: a tenth of a millisecond, three where they are cold."""
        return are_current(self.watched)


def bind_layer(block: Block) -> LayerWeights:
    """One layer's weights."""
    attention = cast(Attention, block.attn)
    c = attention.config
    return LayerWeights(
        attn_hc=_hyper(cast(HyperConnection, block.attn_hc), block.attn_norm.weight, c),
        ffn_hc=_hyper(cast(HyperConnection, block.ffn_hc), block.ffn_norm.weight, c),
        attn=_attention(attention), ffn=_mixture(block.ffn, c),
    )  # fmt: skip


def bind_collapse(collapse: StreamCollapse, norm: nn.Module, c: Any) -> Hyper:
    """The collapse of the streams and the norm after it."""
    return Hyper(
        fn=collapse.fn, base=collapse.base, scale=collapse.scale, norm=cast(Any, norm).weight, n=c.hc_mult,
        D=c.hidden_size, eps=c.hc_eps, norm_eps=c.rms_norm_eps, input_eps=c.rms_norm_eps,
    )  # fmt: skip


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
        wkv=module.wkv.weight, wgate=module.wgate.weight, ape=module.ape, norm=module.norm.weight,
        channels=module.ape.shape[1], ratio=module.ratio, overlap=int(module.overlap), eps=module.norm.eps,
    )  # fmt: skip


def _attention(a: Attention) -> AttentionWeights:
    c = a.config
    indexer = a.indexer if a.kind == "csa" else None
    return AttentionWeights(
        wq_a=a.wq_a.weight, q_norm=a.q_norm.weight, wq_b=a.wq_b.weight, wkv=a.wkv.weight, kv_norm=a.kv_norm.weight,
        wo_a=a.wo_a.weight, wo_b=a.wo_b.weight, sink=a.attn_sink,
        index_wq_b=indexer.wq_b.weight if indexer else None,
        index_weights=indexer.weights_proj.weight if indexer else None,
        frequencies=frequencies(c, compressed=a.ratio > 1),
        compressor=_compressor(a.compressor if a.kind in ("csa", "hca") else None),
        index_compressor=_compressor(indexer.compressor if indexer else None),
        D=c.hidden_size, rank=c.q_lora_rank, N=c.num_attention_heads, H=c.head_dim, rope=c.qk_rope_head_dim,
        groups=c.o_groups, o_rank=c.o_lora_rank, index_heads=c.index_n_heads if indexer else 0,
        index_dim=c.index_head_dim if indexer else 0, window=0 if a.kind == "dense" else c.sliding_window, ratio=a.ratio,
        topk=c.index_topk if indexer else 0, eps=c.rms_norm_eps, scale=c.head_dim**-0.5,
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
