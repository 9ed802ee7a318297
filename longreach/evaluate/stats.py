"""Intervals of 95 % around shares, their differences and means: what a score says about problems that were not asked.

    low, high = wilson(right=45, count=60)
    d = paired_difference([True, False, …], [True, True, …])       second minus first, on the same problems
    mean, half = mean_interval([0.61, 0.66, 0.63])                 over seeds, by Student's t

Sources: E. B. Wilson, JASA 22 (1927); R. G. Newcombe, Statistics in Medicine 17 (1998) 2635, method 10;
Abramowitz and Stegun 26.7.3 and 26.7.4 for the distribution of t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from longreach.errors import RequestError

Z = 1.959963984540054
"""Of the normal distribution, 95 % lies within so many standard deviations."""


def wilson(right: int, count: int) -> tuple[float, float]:
    """Where the true share lies, seen `right` of `count`. Nothing seen says nothing: 0 to 1."""
    assert 0 <= right <= count, f"{right} of {count}"
    if count == 0:
        return 0.0, 1.0
    share, z2 = right / count, Z * Z
    centre = share + z2 / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    scale = 1 + z2 / count
    # The ends are exact where nothing, or everything, was right; rounding would leave a trace of the other side.
    low = 0.0 if right == 0 else (centre - half) / scale
    high = 1.0 if right == count else (centre + half) / scale
    return low, high


class Difference(NamedTuple):
    """How much better the second is than the first on the same problems.

    Attributes:
        difference: of the shares that are right, second minus first; low, high: its interval.
        only_first, only_second: problems that one of them has right and the other not.
    """

    count: int
    difference: float
    low: float
    high: float
    only_first: int
    only_second: int

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves out that they are equal."""
        return self.low > 0 or self.high < 0


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Difference:
    """Compare two sets of answers to the same problems, in the same order.

    Raises:
        RequestError: they are not equally many, or none.
    """
    if len(first) != len(second) or not first:
        raise RequestError(f"{len(first)} and {len(second)} answers cannot be compared in pairs; ask the same problems")
    n = len(first)
    both = sum(a and b for a, b in zip(first, second, strict=True))
    only_first, only_second = sum(first) - both, sum(second) - both
    none = n - both - only_first - only_second
    p1, p2 = sum(first) / n, sum(second) / n
    (l1, u1), (l2, u2) = wilson(sum(first), n), wilson(sum(second), n)
    phi = _phi(both, only_first, only_second, none)
    down, up, down1, up1 = p2 - l2, u2 - p2, p1 - l1, u1 - p1
    low = (p2 - p1) - math.sqrt(max(0.0, down * down - 2 * phi * down * up1 + up1 * up1))
    high = (p2 - p1) + math.sqrt(max(0.0, up * up - 2 * phi * up * down1 + down1 * down1))
    return Difference(n, p2 - p1, max(-1.0, low), min(1.0, high), only_first, only_second)


def _phi(both: int, only_first: int, only_second: int, none: int) -> float:
    """Correlation of being right, with the correction for continuity that method 10 asks for."""
    n = both + only_first + only_second + none
    product = both * none - only_first * only_second
    margins = (both + only_first) * (only_second + none) * (both + only_second) * (only_first + none)
    if margins == 0:
        return 0.0
    if product > 0:
        product = max(product - n / 2, 0.0)
    return product / math.sqrt(margins)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and how far the true one may be from it on either side; infinity where a single value says nothing of that.

    Raises:
        RequestError: no values.
    """
    if not values:
        raise RequestError("there is no mean of no values; give at least one")
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.inf
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, t_quantile(n - 1) * deviation / math.sqrt(n)


def t_quantile(freedom: int, inside: float = 0.95) -> float:
    """Student's t of so many degrees of freedom lies within plus or minus this with probability `inside`."""
    assert freedom >= 1 and 0 < inside < 1
    low, high = 0.0, 1.0
    while _t_inside(high, freedom) < inside:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _t_inside(middle, freedom) < inside else (low, middle)
    return high


def _t_inside(t: float, freedom: int) -> float:
    """Probability of lying within plus or minus t."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    is_odd = freedom % 2
    term, total = (cosine, cosine) if is_odd else (1.0, 1.0)
    for k in range(2 + is_odd, freedom, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if not is_odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))
