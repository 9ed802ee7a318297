"""The nearest orthogonal matrix, by the hybrid Newton-Schulz iteration of Muon: matrix products only.

    X ← G / ‖G‖_F;   ten times  X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X        G = U S Vᵀ  →  about U Vᵀ

Eight steps with coefficients of a steep rise at 0 bring every singular value near 1, two gentle ones settle it there. In
exact arithmetic a singular value of at least 3e-5 ‖G‖_F ends in [1, 1.0021]; below that it ends between 0 and 1, an exact
0 at 0. Source: DeepSeek-V4 report, section 2.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longreach.errors import ShapeError

COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
"""(a, b, c) of each step."""

ALIGNMENT = 64
"""Bytes at which every matrix of a stack starts. A BLAS may sum in another order where its operands start elsewhere; so
a matrix gets the same bits whatever it is batched with."""


def default_dtype(G: Tensor) -> torch.dtype:
    """What `orthogonalise` computes in: bfloat16 on a GPU (the iteration is self-correcting), else float32 or wider."""
    if G.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if G.device.type == "cuda" else torch.float32


@torch.no_grad()
def orthogonalise(G_BNM: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """U Vᵀ of every matrix of a stack, with singular values near 1 rather than exactly 1.

    Singular values of at least 5e-5 ‖G‖_F come out in [0.999, 1.003] in float32, and the result is within 5e-4 √min(N, M)
    of U Vᵀ in Frobenius norm. In bfloat16 they come out in [0.99, 1.01], but rounding turns the directions of those
    below about 1e-2 ‖G‖_F: the distance is 0.02 √min(N, M) with a smallest one of 1e-2, 0.2 √min(N, M) with 5e-4.
    A matrix of zeros stays zero. On a CPU a matrix's result does not depend on the rest of its stack.

    Args:
        G_BNM: any float dtype, any scale; wide, square or tall.
        dtype: of the products; None for `default_dtype`.

    Returns:
        `[B, N, M]` in the dtype of `G_BNM`.

    Raises:
        ShapeError: not a stack of matrices, or an empty one.
    """
    if G_BNM.dim() != 3 or G_BNM.numel() == 0 or not G_BNM.is_floating_point():
        raise ShapeError(f"expected float matrices [B, N, M], got {tuple(G_BNM.shape)} of {G_BNM.dtype}")
    B, N, M = G_BNM.shape
    dtype = dtype or default_dtype(G_BNM)
    tall = N > M  # then (XᵀX) on the right does the same with the smaller Gram matrix
    side = min(N, M)

    wide = G_BNM.to(torch.promote_types(G_BNM.dtype, torch.float32))
    # By the largest entry first: squares of gradients of 1e-25 are zero in float32. After it every norm is at least 1.
    largest = torch.linalg.vector_norm(wide, float("inf"), dim=(1, 2), keepdim=True)
    wide = wide / torch.where(largest == 0, 1.0, largest)
    wide /= torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True).clamp_min(1.0)

    X, spare = (_stack(B, N, M, dtype, G_BNM.device) for _ in range(2))
    gram, polynomial = (_stack(B, side, side, dtype, G_BNM.device) for _ in range(2))
    X.copy_(wide)
    del wide
    for a, b, c in COEFFICIENTS:
        torch.bmm(X.mT, X, out=gram) if tall else torch.bmm(X, X.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        left, right = (X, polynomial) if tall else (polynomial, X)
        torch.baddbmm(X, left, right, beta=a, out=spare)
        X, spare = spare, X
    return X.to(G_BNM.dtype)


def orthogonalise_reference(G_BNM: Tensor) -> Tensor:
    """U Vᵀ from the singular value decomposition, float64; singular values that are zero to rounding stay zero."""
    U, S, Vh = torch.linalg.svd(G_BNM.double(), full_matrices=False)
    rounding = S.amax(-1, keepdim=True) * max(G_BNM.shape[-2:]) * torch.finfo(G_BNM.dtype).eps
    return (U * S.gt(rounding).unsqueeze(-2)) @ Vh


def newton_schulz_flops(n: int, m: int, steps: int = len(COEFFICIENTS)) -> int:
    """Floating-point operations for one n × m matrix, a multiply-add counted as two."""
    n, m = min(n, m), max(n, m)
    return steps * (4 * n * n * m + 2 * n**3)


def _stack(B: int, N: int, M: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised `[B, N, M]` whose every matrix starts at a multiple of `ALIGNMENT` bytes."""
    per_line = ALIGNMENT // dtype.itemsize
    flat = torch.empty(B, -(-N * M // per_line) * per_line, dtype=dtype, device=device)
    return flat[:, : N * M].view(B, N, M)
