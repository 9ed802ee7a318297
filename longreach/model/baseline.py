"""V3.2's attention, the baseline of the announced ratios: multi-head latent attention over selected tokens (MLA, DSA).

    qr = norm(x wq_a);  [qn_h | qr_h] = head h of qr wq_b;  [c | kr] = x wkv_a;  c = round(norm(c))
    ℓ_h(t, s) = scale · ( (qn_h Wk_h) · c_s + rope(qr_h) · rope(kr_s) )        wkv_b = [Wk_h; Wv_h] for every head h
    o_h(t) = Wv_h Σ_s softmax_s(ℓ_h) c_s,     y = wo [o_1 … o_N]               s over the `index_topk` chosen tokens

Written in this absorbed form one vector per token, [c | rope(kr)], is the key of all heads and its first channels their
value: V4's `sparse_attention` with an entry per token, neither window nor sink. No head's keys are ever expanded.

The indexer scores tokens as V4's does, Σ_h w_h relu(q_h · k_s), but its keys are one LayerNorm'ed projection of each
token. Its rotary channels come first and pair up across halves, (k, k + r/2), where the attention's come last and are
interleaved, (2k, 2k + 1).

Rounding (`numerics="official"`): latents, index queries and keys go through E4M3 with one power-of-two scale per 128
channels, index queries and keys after the Hadamard rotation. YaRN scales neither cos nor sin: the official code never
does, and the factor others derive, m(mscale) / m(mscale_all_dim), is 1 as the two are equal in V3.2 and one field here.
It does scale the softmax, by m(mscale_all_dim)².
Source: DeepSeek-V3.2 report and official inference code; parameter names are those of the latter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from longreach.model.attention import entry_source, report_selection, span_by_span
from longreach.model.config import ModelConfig
from longreach.model.indexer import select_entries
from longreach.model.layers import Linear, RMSNorm
from longreach.model.passing import Pass, Span
from longreach.model.stores import LATENT_BLOCK
from longreach.ops.attention import Layout, sparse_attention
from longreach.ops.quant import fp8_roundtrip, hadamard
from longreach.ops.rope import apply_rope

INNER_NORM_EPS = 1e-6
"""Of the norms inside the attention; the released code fixes it apart from the config's `rms_norm_eps`."""

NOTHING = -1e30
"""Logit of a sink that leaves every other weight as it is, and takes all of it where a query may attend to nothing."""


class LatentAttention(nn.Module):
    """The attention of one layer of V3.2."""

    def __init__(self, config: ModelConfig, layer: int, **factory) -> None:
        super().__init__()
        c = self.config = config
        self.layer = layer
        width = c.qk_nope_head_dim + c.qk_rope_head_dim
        rounds = c.numerics == "official" and c.weight_format != "plain"
        self.wq_a = Linear(c.hidden_size, c.q_lora_rank, rounds_input=rounds, **factory)
        self.q_norm = RMSNorm(c.q_lora_rank, INNER_NORM_EPS, **factory)
        self.wq_b = Linear(c.q_lora_rank, c.num_attention_heads * width, rounds_input=rounds, **factory)
        self.wkv_a = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, rounds_input=rounds, **factory)
        self.kv_norm = RMSNorm(c.kv_lora_rank, INNER_NORM_EPS, **factory)
        # Never applied to a vector as it stands: its halves move to the query and the output. (What the released code
        # rounds before applying it are latents, which are rounded already.)
        self.wkv_b = Linear(c.kv_lora_rank, c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), **factory)
        self.wo = Linear(c.num_attention_heads * c.v_head_dim, c.hidden_size, rounds_input=rounds, **factory)
        self.indexer = LatentIndexer(c, **factory)
        self.scale = width**-0.5 * yarn_softmax_factor(c)

    def forward(self, x_BTD: Tensor, pass_: Pass) -> Tensor:
        c = self.config
        B, T = x_BTD.shape[:2]
        table = pass_.table(compressed=False)
        qr = self.q_norm(self.wq_a(x_BTD))
        q = apply_rope(self.wq_b(qr).unflatten(-1, (c.num_attention_heads, -1)), table.unsqueeze(2))
        key_half, value_half = self.wkv_b.weight.unflatten(0, (c.num_attention_heads, -1)).split(
            [c.qk_nope_head_dim, c.v_head_dim], dim=1
        )
        nope, rotary = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        parts = {"q": torch.cat([_per_head(nope, key_half), rotary], dim=-1), "kv": self.entries(x_BTD, table)}
        parts |= self.indexer.project(x_BTD, qr, table)
        latents = span_by_span(parts, pass_, self.attend)
        return self.wo(_per_head(latents, value_half.transpose(1, 2)).reshape(B, T, -1))

    def entries(self, x_BTD: Tensor, table: Tensor) -> Tensor:
        """What a token leaves behind: latent and rotated key, `[B, T, kv_lora_rank + qk_rope_head_dim]`."""
        c = self.config
        latent, rotary = apply_rope(self.wkv_a(x_BTD), table).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        latent = self.kv_norm(latent)
        if c.numerics == "official":
            latent = fp8_roundtrip(latent, LATENT_BLOCK)
        return torch.cat([latent, rotary], dim=-1)

    def attend(self, parts: dict[str, Tensor], span: Span, pass_: Pass) -> Tensor:
        """Weighted latents of one span's queries, `[b, t, N, kv_lora_rank]`; advances the span's stores."""
        c, store = self.config, span.stores[self.layer]
        assert store.entries is not None
        assert store.index_entries is not None
        store.entries.append(parts["kv"][:, span.real])
        store.index_entries.append(parts["index_k"][:, span.real])
        chosen, sink = None, None
        if not pass_.dense:
            chosen = pass_.selection_for(self.layer, span)
            if chosen is not None:
                # A selection from outside may leave a query without a single token.
                sink = parts["q"].new_full((c.num_attention_heads,), NOTHING)
            else:
                chosen = select_entries(parts["index_q"], parts["index_weight"], span, store, 1, c.index_topk)
            if pass_.wants_selection:
                report_selection(self.layer, chosen, 1, c.index_topk, span, pass_)
        layout = Layout(
            first_query=span.first,
            first_key=span.first,
            window=0,
            ratio=1,
            chosen_limit=c.index_topk if sink is None else 0,
            scale=self.scale,
            value_dim=c.kv_lora_rank,
        )
        return sparse_attention(parts["q"], parts["kv"][:, :0], entry_source(store, span.stop), chosen, sink, layout)


class LatentIndexer(nn.Module):
    """Index queries and keys of V3.2: a key per token. Selection carries no gradient, so nothing here does."""

    def __init__(self, config: ModelConfig, **factory) -> None:
        super().__init__()
        c = self.config = config
        rounds = c.numerics == "official" and c.weight_format != "plain"
        self.wq_b = Linear(c.q_lora_rank, c.index_n_heads * c.index_head_dim, rounds_input=rounds, **factory)
        self.wk = Linear(c.hidden_size, c.index_head_dim, rounds_input=rounds, **factory)
        self.k_norm = nn.LayerNorm(c.index_head_dim, eps=INNER_NORM_EPS, **factory)
        self.weights_proj = Linear(c.hidden_size, c.index_n_heads, **factory)

    @torch.no_grad()
    def project(self, x_BTD: Tensor, qr_BTR: Tensor, table: Tensor) -> dict[str, Tensor]:
        """Index queries `[B, T, heads, width]`, head weights `[B, T, heads]`, keys `[B, T, width]` of every token."""
        c = self.config
        q = self.wq_b(qr_BTR).unflatten(-1, (c.index_n_heads, c.index_head_dim))
        weight = self.weights_proj(x_BTD)
        weight = weight if weight.dtype == torch.float64 else weight.float()
        return {
            "index_q": self.round(rotate_halves(q, table.unsqueeze(2))),
            "index_weight": weight * (c.index_n_heads * c.index_head_dim) ** -0.5,
            "index_k": self.round(rotate_halves(self.k_norm(self.wk(x_BTD)), table)),
        }

    def round(self, x: Tensor) -> Tensor:
        """Hadamard rotation and 8-bit rounding, where the released code makes them."""
        return fp8_roundtrip(hadamard(x), LATENT_BLOCK) if self.config.numerics == "official" else x


def yarn_softmax_factor(config: ModelConfig) -> float:
    """What YaRN multiplies the softmax scale by: (0.1 · rope_mscale_all_dim · ln(rope_factor) + 1)²; 1 without it."""
    return (0.1 * config.rope_mscale_all_dim * math.log(config.rope_factor) + 1) ** 2


def rotate_halves(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the leading channels of `x`, channel k together with channel k + rope_dim / 2.

    Args:
        x: `[..., dim]`, any float dtype; the rotation is float32 and rounded once.
        table: complex `[..., rope_dim / 2]`, broadcastable to x's leading dimensions.
    """
    half = table.shape[-1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    first, second = x[..., :half].to(wide), x[..., half : 2 * half].to(wide)
    cos, sin = table.real, table.imag
    turned = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return torch.cat([turned.to(x.dtype), x[..., 2 * half :]], dim=-1)


def _per_head(x_BTNH: Tensor, weight_NHK: Tensor) -> Tensor:
    """Each head's vectors times that head's matrix: `[B, T, N, K]`."""
    B, T = x_BTNH.shape[:2]
    return torch.bmm(x_BTNH.flatten(0, 1).transpose(0, 1), weight_NHK).transpose(0, 1).unflatten(0, (B, T))
