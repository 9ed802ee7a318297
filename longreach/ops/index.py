"""The lightning indexer's score and its selection, without ever holding queries × entries.

    I[t, s] = Σ_h w[t, h] · relu(q[t, h] · k[s])

Selection takes the `topk` best-scored visible entries of each query. Ties go to the lowest index, everywhere: with few
index heads relu makes scores of exactly zero common, and `torch.topk` then picks by chance of the array's length.
Source: DeepSeek-V4 report, equations 13 to 17.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def index_scores(q_BTNH: Tensor, weight_BTN: Tensor, keys_BSH: Tensor) -> Tensor:
    """Scores of every query against every key, `[B, T, S]` float32. For a tile of queries and a block of keys."""
    B, T, N, H = q_BTNH.shape
    products = torch.bmm(q_BTNH.reshape(B, T * N, H), keys_BSH.transpose(1, 2))
    if not products.requires_grad:
        products = products.relu_()
    else:
        products = products.relu()
    products = products.view(B * T, N, -1).to(weight_BTN.dtype)
    return torch.bmm(weight_BTN.reshape(B * T, 1, N), products).view(B, T, -1)


def index_scores_reference(q_BTNH: Tensor, weight_BTN: Tensor, keys_BSH: Tensor) -> Tensor:
    """The equation as one einsum."""
    return torch.einsum("btns,btn->bts", torch.einsum("btnh,bsh->btns", q_BTNH, keys_BSH).relu(), weight_BTN)


def select_top(scores: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest scores of each row, ascending; equal scores go to the lowest index.

    Args:
        scores: `[..., S]` float; -inf marks what may not be chosen.
        k: at most S.

    Returns:
        int64 `[..., k]`, ascending. Rows with fewer than k scores above -inf fill up with indices whose score is -inf.
    """
    size = scores.shape[-1]
    if k >= size:
        return torch.arange(size, device=scores.device).expand(*scores.shape[:-1], size)
    values, indices = scores.topk(k + 1, dim=-1)
    indices = indices[..., :k]
    # Only an equal pair exactly at the cut makes the chosen set ambiguous.
    tied = (values[..., k - 1] == values[..., k]) & (values[..., k] > float("-inf"))
    if bool(tied.any()):
        indices = indices.clone()
        indices[tied] = select_top_reference(scores[tied], k)
    return indices.sort(dim=-1).values


def select_top_reference(scores: Tensor, k: int) -> Tensor:
    """The same by counting: everything above the k-th value, then the first of its equals. `[R, S]` to `[R, k]`."""
    cut = scores.topk(k, dim=-1).values[..., -1:]
    above = scores > cut
    equal = scores == cut
    room = k - above.sum(dim=-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=-1) <= room))
    return chosen.nonzero()[:, -1].view(*scores.shape[:-1], k)


def select_over_blocks(
    q_BTNH: Tensor, weight_BTN: Tensor, key_blocks: Iterable[Tensor], visible_T: Tensor, k: int
) -> Tensor:
    """Top-k over keys that arrive block by block; memory is one block of scores.

    Args:
        q_BTNH, weight_BTN: index queries and head weights of a tile of queries.
        key_blocks: `[B, s, H]` tensors in order of entry index.
        visible_T: int64 `[T]`, how many leading entries each query may choose from.
        k: entries to choose.

    Returns:
        int64 `[B, T, min(k, S)]`, ascending entry indices; those `>= visible_T` are invalid and stand at the end.
    """
    best: Tensor | None = None  # scores of the kept candidates
    kept: Tensor | None = None  # their entry indices, ascending
    start = 0
    for keys in key_blocks:
        scores = index_scores(q_BTNH, weight_BTN, keys)
        entries = torch.arange(start, start + keys.shape[1], device=scores.device)
        scores = scores.masked_fill_(entries >= visible_T[:, None], float("-inf"))
        start += keys.shape[1]
        if best is None:
            chosen = select_top(scores, min(k, scores.shape[-1]))
            best, kept = scores.gather(-1, chosen), chosen
            continue
        assert kept is not None
        # Candidates stay in index order, so "lowest position" in the joined row still means "lowest entry".
        joined = torch.cat([best, scores], dim=-1)
        chosen = select_top(joined, min(k, joined.shape[-1]))
        best = joined.gather(-1, chosen)
        kept = torch.cat([kept, entries.expand(*scores.shape)], dim=-1).gather(-1, chosen)
    assert kept is not None
    return kept
