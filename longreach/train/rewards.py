"""From verdicts to advantages: a penalty for length, and how each attempt compares with the others at its problem.

    reward    = verdict − min(cap, k(mode) · tokens written / window)
    advantage = reward − mean over the group            a group: all attempts at one problem in one mode

A group whose rewards are all equal says nothing about what was better in it: its advantages are 0, and it is counted as
useless. Dividing by the spread ("std") gives every other group the same weight, also one that differs by a few tokens of
length alone; not dividing ("none") is the default.
Source: DeepSeek-V3.2 report, section 3.1 (centred rewards); V4.1 report (penalty); "Understanding R1-Zero-Like Training"
(2025) on what the division favours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Normalise = Literal["none", "std"]

SMALLEST_SPREAD = 1e-4
"""Added to a group's standard deviation."""


def length_penalties(
    written: Sequence[int], windows: Sequence[int], slopes: Sequence[float], cap: float
) -> list[float]:
    """What is taken off each attempt's reward.

    Args:
        written: tokens the model wrote.
        windows: tokens it might have used.
        slopes: k of each attempt's mode: the penalty of one that fills its window. Less for modes that are to think long.
        cap: at most this much.
    """
    return [min(cap, k * n / L) for n, L, k in zip(written, windows, slopes, strict=True)]


def group_advantages(rewards_PG: Tensor, normalise: Normalise = "none") -> tuple[Tensor, int]:
    """How much better than its group each attempt was.

    Args:
        rewards_PG: one row for each group.

    Returns:
        (advantages `(P, G)` in the dtype of the rewards, number of useless groups). A useless group's are exactly 0.
    """
    useless_P = (rewards_PG == rewards_PG[:, :1]).all(dim=1)
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if normalise == "std" and rewards_PG.shape[1] > 1:
        centred_PG = centred_PG / (rewards_PG.std(dim=1, keepdim=True) + SMALLEST_SPREAD)
    return torch.where(useless_P[:, None], 0.0, centred_PG), int(useless_P.sum())
