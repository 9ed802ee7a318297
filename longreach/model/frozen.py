"""Weights that stay in FP8 or FP4 while others learn: codes are decoded where a product needs them, and let go again.

    y = x decode(codes)ᵀ              forward
    d_x = d_y decode(codes)           backward: decoded once more, nothing of the weight's size is ever saved

Values are those of the decoded weight, bit for bit, so a model with frozen codes computes what `load_model` of the same
checkpoint computes. The codes may be memory-mapped: a matrix that no token needs (an expert nobody chose) is never read.
Used by `train.lora`. Source of the formats: `ops.quant`; DeepSeek-V4 report, section 5.2.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longreach.model.feedforward import MixtureOfExperts
from longreach.model.layers import FP8_ACTIVATION_BLOCK
from longreach.model.passing import Pass
from longreach.ops.linear import linear
from longreach.ops.moe import clamped_swiglu_reference, mixture_reference, parts_by_expert, swiglu_backward
from longreach.ops.quant import WEIGHT_TILE, fp4_weight_decode, fp8_roundtrip, fp8_weight_decode

PART = 1 << 21
"""Values that are decoded at a time (8 MiB in float32): memory of that size is reused, where a whole matrix would be asked of
the system and cleared anew each time. Measured for 12 rows and an FP4 expert of 2048 x 4096: 31 ms instead of 76."""


class Codes(NamedTuple):
    """A stored matrix `[out, in]`.

    Attributes:
        codes: float8_e4m3fn `[out, in]`; int8 or uint8 `[out, in / 2]` with two E2M1 values a byte; or plain floats.
        scales: of FP8 `[ceil(out/128), ceil(in/128)]`, of FP4 `[out, ceil(in/32)]`; None for plain floats.
    """

    codes: Tensor
    scales: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.codes.shape
        is_packed = self.scales is not None and self.codes.dtype != torch.float8_e4m3fn
        return rows, 2 * columns if is_packed else columns

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The values; exact in bfloat16 and wider."""
        if self.scales is None:
            return self.codes.to(dtype)
        if self.codes.dtype == torch.float8_e4m3fn:
            return fp8_weight_decode(self.codes, self.scales, dtype)
        return fp4_weight_decode(self.codes, self.scales, dtype)

    @property
    def tile(self) -> int:
        """Rows that share scales: a part may begin at a multiple of them."""
        return WEIGHT_TILE if self.scales is not None and self.codes.dtype == torch.float8_e4m3fn else 1

    def part(self, start: int, stop: int) -> Codes:
        """Some rows; `start` is a multiple of `tile`."""
        assert start % self.tile == 0, (start, self.tile)
        scales = self.scales[start // self.tile : -(-stop // self.tile)] if self.scales is not None else None
        return Codes(self.codes[start:stop], scales)

    def parts(self) -> Iterator[tuple[slice, Codes]]:
        """All of it, in parts of about `PART` values."""
        rows, columns = self.shape
        step = max(1, PART // columns // self.tile) * self.tile
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield slice(start, stop), self.part(start, stop)


class FrozenLinear(nn.Module):
    """A `layers.Linear` whose weight stays in codes and does not learn."""

    stands_in = True

    def __init__(self, codes: Codes, dtype: torch.dtype, *, rounds_input: bool = False) -> None:
        super().__init__()
        self.codes, self.dtype, self.rounds_input = codes, dtype, rounds_input

    @property
    def weight(self) -> Tensor:
        """Decoded, for whoever needs the matrix itself."""
        return self.codes.decode(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.rounds_input:
            x = fp8_roundtrip(x, FP8_ACTIVATION_BLOCK)
        return frozen_product(x, self.codes, self.dtype)

    def grouped(self, x_GMI: Tensor) -> Tensor:
        """As of `Linear`."""
        return _FrozenGroups.apply(x_GMI, self.codes, self.dtype)  # pyright: ignore[reportReturnType]

    def extra_repr(self) -> str:
        out_features, in_features = self.codes.shape
        return f"{in_features} -> {out_features}, {str(self.codes.codes.dtype).removeprefix('torch.')} codes"


class FrozenEmbedding(nn.Module):
    """An embedding whose table does not learn, in the dtype it is stored in; its rows come out in `dtype`."""

    stands_in = True

    def __init__(self, weight_VD: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_VD, requires_grad=False)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight).to(self.dtype)


def frozen_product(x: Tensor, codes: Codes, dtype: torch.dtype) -> Tensor:
    """`x [..., in]` times the decoded matrix transposed; the gradient reaches `x` alone."""
    return _FrozenProduct.apply(x, codes, dtype)  # pyright: ignore[reportReturnType]


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, codes: Codes, dtype: torch.dtype) -> Tensor:
        ctx.codes, ctx.dtype = codes, dtype
        return times_transposed(x, codes, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return times(grad, ctx.codes, ctx.dtype), None, None


def times_transposed(x: Tensor, codes: Codes, dtype: torch.dtype) -> Tensor:
    """`x [..., in]` times the decoded matrix transposed, `[..., out]`."""
    outputs = [linear(x, part.decode(dtype)) for _, part in codes.parts()]
    return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]


def times(grad: Tensor, codes: Codes, dtype: torch.dtype) -> Tensor:
    """`grad [..., out]` times the decoded matrix, `[..., in]`."""
    total, wide = None, torch.promote_types(dtype, torch.float32)
    for rows, part in codes.parts():
        product = grad[..., rows] @ part.decode(dtype)
        total = product.to(wide) if total is None else total.add_(product)
    assert total is not None
    return total.to(dtype)


class _FrozenGroups(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_GMI: Tensor, codes: Codes, dtype: torch.dtype) -> Tensor:
        ctx.codes, ctx.dtype = codes, dtype
        return torch.stack(
            [F.linear(x, weight) for x, weight in zip(x_GMI, _groups(codes, len(x_GMI), dtype), strict=True)]
        )

    @staticmethod
    def backward(ctx, grad_GMO: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weights = _groups(ctx.codes, len(grad_GMO), ctx.dtype)
        return torch.stack([grad @ weight for grad, weight in zip(grad_GMO, weights, strict=True)]), None, None


def _groups(codes: Codes, groups: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Each group's rows, decoded when their turn comes; all at once where groups and scales do not fit each other."""
    rows = codes.shape[0] // groups
    if rows % codes.tile:
        yield from codes.decode(dtype).view(groups, rows, -1)
        return
    for group in range(groups):
        yield codes.part(group * rows, (group + 1) * rows).decode(dtype)


class Stack:
    """Matrices of all experts, each decoded when it is asked for; stands in for a tensor `[E, out, in]`."""

    def __init__(self, experts: Sequence[Codes], dtype: torch.dtype) -> None:
        self.experts, self.dtype = list(experts), dtype
        self.shape = (len(self.experts), *self.experts[0].shape)

    def __getitem__(self, expert: int) -> Tensor:
        return self.experts[expert].decode(self.dtype)


class FrozenExperts(nn.Module):
    """An `Experts` whose matrices stay in codes."""

    stands_in = True

    def __init__(self, w1: Stack, w3: Stack, w2: Stack) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = w1, w3, w2


class FrozenMixture(MixtureOfExperts):
    """A `MixtureOfExperts` over frozen experts, with the router and the shared expert of `mixture`.

    In the invariant arithmetic every token goes through every chosen expert, as in the ordinary one; a gradient asked for
    there keeps the decoded matrices.
    """

    stands_in = True

    def __init__(self, mixture: MixtureOfExperts, experts: FrozenExperts) -> None:
        nn.Module.__init__(self)
        self.gate, self.shared_experts, self.experts = mixture.gate, mixture.shared_experts, experts
        self.limit, self.fp8_block = mixture.limit, mixture.fp8_block

    def mix(self, x_MD: Tensor, chosen_MK: Tensor, weight_MK: Tensor, pass_: Pass) -> Tensor:
        experts = cast(FrozenExperts, self.experts)
        if pass_.invariant:
            w1, w3, w2 = cast(Any, experts.w1), cast(Any, experts.w3), cast(Any, experts.w2)
            return mixture_reference(
                x_MD, chosen_MK, weight_MK, w1, w3, w2, self.limit, self.fp8_block, pass_.real_rows
            )
        return _FrozenMixture.apply(x_MD, weight_MK, experts, chosen_MK, self.limit, self.fp8_block)  # pyright: ignore[reportReturnType]


class _FrozenMixture(torch.autograd.Function):
    """Σ_k weight_k · expert_k(x), one expert's matrices in memory at a time; keeps gate and up of every row.

    Rounding of inputs passes gradients straight through, as everywhere.
    """

    @staticmethod
    def forward(ctx, x_MD, weight_MK, experts: FrozenExperts, chosen_MK, limit: float, fp8_block: int) -> Tensor:
        (M, K), w1, w3, w2 = chosen_MK.shape, experts.w1, experts.w3, experts.w2
        wide = torch.float64 if x_MD.dtype == torch.float64 else torch.float32
        order = chosen_MK.reshape(-1).argsort(stable=True)
        counts = torch.bincount(chosen_MK.reshape(-1), minlength=experts.w1.shape[0]).tolist()
        read = fp8_roundtrip(x_MD, fp8_block) if fp8_block else x_MD
        gate, up = (x_MD.new_empty(M * K, experts.w1.shape[1]) for _ in range(2))
        out = x_MD.new_empty(M * K, x_MD.shape[1])
        for e, part in parts_by_expert(counts):
            rows = read.index_select(0, order[part] // K)
            gate[part] = times_transposed(rows, w1.experts[e], w1.dtype)
            up[part] = times_transposed(rows, w3.experts[e], w3.dtype)
            weight = weight_MK.reshape(-1, 1).index_select(0, order[part])
            hidden = (clamped_swiglu_reference(gate[part], up[part], limit) * weight).to(x_MD.dtype)
            hidden = fp8_roundtrip(hidden, fp8_block) if fp8_block else hidden
            out[part] = times_transposed(hidden, w2.experts[e], w2.dtype)
        ctx.save_for_backward(weight_MK, order, gate, up)
        ctx.experts, ctx.counts, ctx.limit = experts, counts, limit
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        return out.index_select(0, back).view(M, K, -1).sum(dim=1, dtype=wide)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        weight_MK, order, gate, up = ctx.saved_tensors
        experts: FrozenExperts = ctx.experts
        w1, w3, w2 = experts.w1, experts.w3, experts.w2
        K, grad = weight_MK.shape[1], grad.to(gate.dtype)
        d_x = torch.zeros(grad.shape, dtype=weight_MK.dtype, device=grad.device)
        d_weight = torch.zeros_like(weight_MK)
        for e, part in parts_by_expert(ctx.counts):
            slots = order[part]
            tokens = slots // K
            weight = weight_MK.reshape(-1, 1).index_select(0, slots)
            active = clamped_swiglu_reference(gate[part], up[part], ctx.limit)
            d_hidden = times(grad.index_select(0, tokens), w2.experts[e], w2.dtype).to(active.dtype)
            d_weight.view(-1).index_copy_(0, slots, active.mul_(d_hidden).sum(-1).to(d_weight.dtype))
            d_gate, d_up = swiglu_backward(d_hidden.mul_(weight), gate[part], up[part], ctx.limit)
            d_rows = times(d_gate.to(gate.dtype), w1.experts[e], w1.dtype)
            d_rows += times(d_up.to(gate.dtype), w3.experts[e], w3.dtype)
            d_x.index_add_(0, tokens, d_rows.to(d_x.dtype))
        return d_x.to(gate.dtype), d_weight, None, None, None, None
