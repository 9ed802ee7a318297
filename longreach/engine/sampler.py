"""Drawing tokens. A token is a function of its logits, its request, its seed and its place, and of nothing else:

    token = argmax over allowed ids of  logit_id / temperature + g(seed, position, id)

where g is standard Gumbel noise out of a counter-based hash (the Gumbel-max way of drawing from the softmax). No state of
a random generator is carried along, so neither the batch, nor how a prompt was cut, nor pre-emption, nor speculation can
change a text: a draft is right exactly when it is the token drawn here, and a draft model that adds the same noise to its
own logits is right as often as the two distributions allow.

A row of logits is processed in this order; each step sees what the one before left:

    1. logit bias                     added
    2. grammar mask                   tokens outside are gone
    3. min_tokens                     end mark and stop tokens are gone while fewer tokens are made, unless the mask
                                      leaves nothing else
    4. repetition penalty             over prompt and output: positive logits divided, others multiplied
    5. frequency, presence penalty    over the output: count times the one, once the other, subtracted
    6. temperature                    divides; 0 takes the argmax here, the lowest id among equals, and ends
    7. top_k                          the k largest
    8. top_p                          the likeliest that together reach top_p of what step 7 left
    9. min_p                          those with min_p of the likeliest one's probability

With `SamplingParams.after`, steps 4 and 5 wait for that token and count only the output behind it, and the mask of step 2 is
that of `longreach.engine.guide`.
Where a step must choose among equals, the lower id comes first. The likeliest token survives steps 7 to 9.
Log-probabilities are those of the model: log-softmax of the float32 logits before step 1, as OpenAI and vLLM report them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longreach.engine.sampling import SamplingParams

CHECKS = 3
"""Winners tested against top_p before the tokens it keeps are listed. A test fails with probability 1 - top_p at most."""

NUCLEUS = 256
"""Tokens top_p is expected to keep at most, where it bites hard; a row where it keeps more is sorted as a whole."""

UNIT = 2.0**45
"""Probabilities are counted in units of 1 / UNIT, as whole numbers in float64: their sums are exact in any order."""

BLOCK = 2**16
"""Logits worked on at a time, so that the float64 intermediates stay in a core's cache."""

SMALLEST_TEMPERATURE = 1e-100
"""Below this only the largest logit can win anyway; dividing by less could overflow."""


class SampleRow(NamedTuple):
    """One token to draw."""

    params: SamplingParams
    seed: int
    """The request's seed, chosen by the engine where `params.seed` is None. Modulo 2^64."""
    position: int
    """How many tokens the request has generated before this one."""
    history: TokenCounts | None = None
    """Required where `params.needs_history`."""
    mask: Tensor | None = None
    """bool `(V,)`, on any device: the tokens the grammar allows. None allows all."""


class Sampled(NamedTuple):
    """One drawn token."""

    token_id: int
    """-1 if there is an error."""
    logprob: float | None = None
    """Of this token, in nats; None unless `params.logprobs` asks."""
    top: list[tuple[int, float]] | None = None
    """The likeliest tokens with their log-probabilities, likeliest first, as many as `params.logprobs` asks."""
    error: str | None = None
    """Why no token could be drawn: the logits are not finite, or nothing is allowed. It concerns this row alone."""


class TokenCounts:
    """How often each token is in a request's prompt and output, for the penalties.

    Grows with the number of different tokens; adding one, or taking back the last n (rejected drafts), costs O(1) each.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        ids = np.unique(np.fromiter(prompt, dtype=np.int64))
        self._output: list[int] = []
        self._slot_of = {int(token_id): slot for slot, token_id in enumerate(ids)}
        self._ids = ids
        self._in_prompt = np.ones(len(ids), dtype=bool)
        self._count = np.zeros(len(ids), dtype=np.int64)

    def __len__(self) -> int:
        """Tokens of the output."""
        return len(self._output)

    def append(self, token_id: int) -> None:
        """Count one more token of the output."""
        slot = self._slot_of.setdefault(token_id, len(self._slot_of))
        if slot == len(self._ids):
            spare = max(16, slot)
            self._ids = np.concatenate([self._ids, np.zeros(spare, dtype=np.int64)])
            self._in_prompt = np.concatenate([self._in_prompt, np.zeros(spare, dtype=bool)])
            self._count = np.concatenate([self._count, np.zeros(spare, dtype=np.int64)])
        self._ids[slot] = token_id
        self._count[slot] += 1
        self._output.append(token_id)

    def pop(self, count: int = 1) -> None:
        """Take back the last `count` tokens of the output."""
        assert 0 <= count <= len(self._output), f"{count} of {len(self._output)} tokens"
        for _ in range(count):
            self._count[self._slot_of[self._output.pop()]] -= 1

    def copy(self) -> TokenCounts:
        twin = TokenCounts()
        twin._output, twin._slot_of = list(self._output), dict(self._slot_of)
        twin._ids, twin._in_prompt, twin._count = self._ids.copy(), self._in_prompt.copy(), self._count.copy()
        return twin

    def seen(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens of prompt or output, each once, int64 `(U,)`, and how often each is in the output, int64 `(U,)`."""
        used = len(self._slot_of)
        present = np.flatnonzero(self._in_prompt[:used] | (self._count[:used] > 0))
        return (
            torch.from_numpy(self._ids[present]).to(device),
            torch.from_numpy(self._count[present]).to(device),
        )


# ---- noise -----------------------------------------------------------------------------------------------------------


def gumbel(seed: int, position: int, ids: Tensor | int, device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel noise of tokens: the same wherever and whenever it is asked for.

    Args:
        seed: modulo 2^64.
        position: 0 or above.
        ids: int64 `(n,)`; or a number n, for the ids 0 to n - 1 on `device`.

    Returns:
        float64 `(n,)`, from -3.61 to 36.74.
    """
    ids_N = _all_ids(ids, torch.device(device)) if isinstance(ids, int) else ids
    return -_exponential([_key(seed, position)], ids_N)[0].log()


MASK_64 = 2**64 - 1
STEP, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""The constants of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    value &= MASK_64
    return value - 2**64 if value >= 2**63 else value


def _mix(value: int) -> int:
    """splitmix64's finaliser of one number: every bit of the input changes each bit of the output half of the time."""
    value &= MASK_64
    value = ((value ^ (value >> 30)) * MIX_1) & MASK_64
    value = ((value ^ (value >> 27)) * MIX_2) & MASK_64
    return value ^ (value >> 31)


def _key(seed: int, position: int) -> int:
    """Where the stream of one place begins."""
    return _mix(_mix(seed) + position * STEP)


def _shifted(x: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """x >> bits with zeros moving in: torch has no unsigned shift, so the copies of the sign are cleared."""
    return torch.bitwise_right_shift(x, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)


def _random_bits(keys: Sequence[int], ids: Tensor) -> Tensor:
    """Element (r, n) is output number ids[n] (or ids[r, n]) of the splitmix64 stream that starts at keys[r]. int64."""
    starts = torch.tensor([_signed(key + STEP) for key in keys], dtype=torch.int64, device=ids.device)
    x = ids * _signed(STEP) + starts[:, None]
    shifted = _shifted(x, 30)
    x.bitwise_xor_(shifted).mul_(_signed(MIX_1))
    x.bitwise_xor_(_shifted(x, 27, out=shifted)).mul_(_signed(MIX_2))
    return x.bitwise_xor_(_shifted(x, 31, out=shifted))


def _exponential(keys: Sequence[int], ids: Tensor) -> Tensor:
    """exp(-g) of every key and id: standard exponential noise, float64 `(len(keys), n)`.

    -log of a uniform number with 53 bits in (0, 1), both ends excluded: the 52 upper bits of the hash and a half.
    """
    bits = _random_bits(keys, ids)
    uniform = _shifted(bits, 12, out=bits).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_()


@lru_cache(maxsize=8)
def _all_ids(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


# ---- drawing ---------------------------------------------------------------------------------------------------------


class Sampler:
    """Draws tokens for a batch of requests. Holds nothing that changes; safe to share between threads.

    Args:
        eos_ids: tokens that end a text; `min_tokens` forbids them.
    """

    def __init__(self, eos_ids: Sequence[int]) -> None:
        self.eos_ids = tuple(eos_ids)

    def sample(self, logits_BV: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        """One token per row; a row's result has the same bits in whatever batch it is.

        Args:
            logits_BV: float32, left as they are. V is the vocabulary of the tokenizer; the caller cuts off a model's
                padding beyond it.
            rows: B of them.
        """
        assert logits_BV.shape[0] == len(rows) and logits_BV.dtype == torch.float32, (logits_BV.shape, len(rows))
        if not rows:
            return []
        greedy = [r for r, row in enumerate(rows) if row.params.temperature == 0]
        drawn = [r for r, row in enumerate(rows) if row.params.temperature != 0]
        processed_BV = self._edited(logits_BV, rows)
        tokens = [0] * len(rows)
        if greedy:
            here = processed_BV if not drawn else processed_BV[greedy]
            for r, token in zip(greedy, _greedy(here), strict=True):
                tokens[r] = token
        for block in _blocks(drawn, max(1, BLOCK // logits_BV.shape[1])):
            here = processed_BV if len(block) == len(rows) else processed_BV[block]
            for r, token in zip(block, _draw(here, [rows[r] for r in block]), strict=True):
                tokens[r] = token
        reports = _reports(logits_BV, rows, tokens)
        for r, token in enumerate(tokens):
            if token < 0:
                reports[r] = Sampled(-1, error=_why_not(logits_BV[r], rows[r].mask is not None))
        return [reports.get(r) or Sampled(token) for r, token in enumerate(tokens)]

    def distribution(self, logits_BV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        """The probabilities `sample` draws with, float64 `(B, V)`: all nine steps, then the softmax. Sorts; for checks.

        Rows that cannot be drawn from are NaN.
        """
        processed_BV = self._edited(logits_BV, rows)
        out = torch.zeros(logits_BV.shape, dtype=torch.float64, device=logits_BV.device)
        for r, row in enumerate(rows):
            params, logits = row.params, processed_BV[r]
            if not torch.isfinite(logits.amax()):
                out[r] = torch.nan
            elif params.temperature == 0:
                out[r, logits.argmax()] = 1.0
            else:
                ids = _all_ids(out.shape[1], out.device)
                if params.top_k > 0:
                    ids = top_ids(logits, params.top_k).sort().values
                tempered = logits[ids].double() / max(params.temperature, SMALLEST_TEMPERATURE)
                probabilities = tempered.softmax(dim=-1)
                kept = (probabilities >= params.min_p * probabilities.amax()).nonzero()[:, 0]
                if params.top_p < 1:
                    units = _units(probabilities.clone())
                    nucleus = _nucleus(logits[ids], units, params.top_p * units.sum())
                    kept = kept[torch.isin(kept, nucleus)]
                out[r, ids[kept]] = tempered[kept].softmax(dim=-1)
        return out

    def _edited(self, logits_BV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        """Steps 1 to 5. A copy where anything changes, else the logits themselves."""
        changing = [r for r, row in enumerate(rows) if self._edits(row)]
        if not changing:
            return logits_BV
        edited_BV = logits_BV.clone()
        for r in changing:
            self._edit(edited_BV[r], rows[r])
        return edited_BV

    def _edits(self, row: SampleRow) -> bool:
        params = row.params
        return bool(
            params.logit_bias or row.mask is not None or row.position < params.min_tokens or params.needs_history
        )

    def _edit(self, logits_V: Tensor, row: SampleRow) -> None:
        params, device = row.params, logits_V.device
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias.keys()), device=device)
            logits_V[ids] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        if row.mask is not None:
            assert row.mask.shape == logits_V.shape, f"mask {tuple(row.mask.shape)}, logits {tuple(logits_V.shape)}"
            logits_V.masked_fill_(~row.mask.to(device), -torch.inf)
        if row.position < params.min_tokens:
            enders = {*params.stop_token_ids, *(() if params.ignore_eos else self.eos_ids)}
            ids = torch.tensor(sorted(enders), dtype=torch.int64, device=device)
            held = logits_V[ids]
            logits_V[ids] = -torch.inf
            if row.mask is not None and bool(logits_V.amax() == -torch.inf):
                logits_V[ids] = held  # the grammar is complete: ending early is all that is left
        if params.needs_history:
            assert row.history is not None, "penalties need the history of the request"
            ids, counts = row.history.seen(device)
            logits = logits_V[ids]
            penalty = params.repetition_penalty
            logits = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
            logits_V[ids] = logits


def _blocks(items: list[int], size: int) -> Iterable[list[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _greedy(logits_BV: Tensor) -> list[int]:
    """Argmax, the lowest id among equals; -1 where it is not finite, which also finds a NaN anywhere in the row."""
    best = logits_BV.max(dim=-1)
    return torch.where(best.values.isfinite(), best.indices, -1).tolist()


def _draw(logits_BV: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Steps 6 to 9 and the draw, for rows with a temperature."""
    V = logits_BV.shape[1]
    cut = [r for r, row in enumerate(rows) if 0 < row.params.top_k < V]
    tokens = [-1] * len(rows)
    if cut:
        here = logits_BV if len(cut) == len(rows) else logits_BV[cut]
        logits_BK, ids_BK = _largest(here, [rows[r].params.top_k for r in cut])
        for r, token in zip(cut, _race(logits_BK, ids_BK, [rows[r] for r in cut]), strict=True):
            tokens[r] = token
    if len(cut) < len(rows):
        whole = [r for r in range(len(rows)) if r not in cut]
        here = logits_BV[whole] if cut else logits_BV
        drawn = _race(here, _all_ids(V, here.device).expand_as(here), [rows[r] for r in whole])
        for r, token in zip(whole, drawn, strict=True):
            tokens[r] = token
    return tokens


def _largest(logits_BV: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Step 7: the logits `(B, K)` and ids `(B, K)` of each row's `counts` largest, ids ascending, K the largest count.

    A row that keeps fewer has minus infinity in the other places.
    """
    values_BK, ids_BK = logits_BV.topk(max(counts), dim=-1)
    counts_B1 = torch.tensor(counts, device=logits_BV.device)[:, None]
    threshold_B1 = values_BK.gather(1, counts_B1 - 1)
    tied_B = (logits_BV >= threshold_B1).sum(dim=-1) > counts_B1[:, 0]
    for r in tied_B.nonzero()[:, 0].tolist():  # topk takes any of equals; the order of ids decides here
        ids_BK[r, : counts[r]] = top_ids(logits_BV[r], counts[r])
    places = torch.arange(values_BK.shape[1], device=logits_BV.device)
    values_BK.masked_fill_(places >= counts_B1, -torch.inf)
    ids_BK, order_BK = ids_BK.sort(dim=-1)
    return values_BK.gather(1, order_BK), ids_BK


def _race(logits_BN: Tensor, ids_BN: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Draw one of its ids (ascending) for each row, from the tempered distribution cut by top_p and min_p.

    The largest logit / T + g is the smallest exp(-g) / probability: the same order for one logarithm less per token. And
    no row is sorted: the best of all tokens is nearly always one that top_p keeps, so it is drawn first and tested then;
    if it is outside, the next best is tested. The first that passes is the best of those inside.
    """
    device = logits_BN.device
    params = [row.params for row in rows]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

    temperature_B1 = column([max(p.temperature, SMALLEST_TEMPERATURE) for p in params])
    probabilities_BN = logits_BN.double().div_(temperature_B1).softmax(dim=-1)
    times_BN = _exponential([_key(row.seed, row.position) for row in rows], ids_BN).div_(probabilities_BN)
    if any(p.min_p > 0 for p in params):
        smallest_B1 = column([p.min_p for p in params]) * probabilities_BN.amax(dim=-1, keepdim=True)
        times_BN.masked_fill_(probabilities_BN < smallest_B1, torch.inf)
    shortest_B1, best_B1 = times_BN.min(dim=-1, keepdim=True)
    # Only a NaN, an infinite logit or a row without any allowed token leaves no finite time.
    drawable_B1 = shortest_B1.isfinite()
    limited = [r for r, p in enumerate(params) if p.top_p < 1]
    if limited:
        top_p_B1 = column([params[r].top_p for r in limited])
        if len(limited) < len(rows):
            best_B1[limited] = _best_in_nucleus(
                logits_BN[limited], probabilities_BN[limited], times_BN[limited], best_B1[limited], top_p_B1
            )
        else:
            best_B1 = _best_in_nucleus(logits_BN, probabilities_BN, times_BN, best_B1, top_p_B1)
    return torch.where(drawable_B1, ids_BN.gather(1, best_B1), -1)[:, 0].tolist()


def _best_in_nucleus(
    logits_BN: Tensor, probabilities_BN: Tensor, times_BN: Tensor, best_B1: Tensor, top_p_B1: Tensor
) -> Tensor:
    """The index `(B, 1)` of the smallest time among the tokens that top_p keeps. `best_B1` are those among all.

    Overwrites `probabilities_BN`.
    """
    units_BN = _units(probabilities_BN)
    limit_B1 = units_BN.sum(dim=-1, keepdim=True) * top_p_B1
    # All equals counted as before it: a quick test that is sometimes too strict. Most rows pass and are done.
    not_after_BN = logits_BN >= logits_BN.gather(1, best_B1)
    before_B1 = torch.where(not_after_BN, units_BN, 0.0).sum(dim=-1, keepdim=True) - units_BN.gather(1, best_B1)
    rest = (before_B1 >= limit_B1)[:, 0].nonzero()[:, 0]
    result_B1, best_B1, limit_B1 = best_B1.clone(), best_B1[rest], limit_B1[rest]
    logits_BN, units_BN, times_BN = logits_BN[rest], units_BN[rest], times_BN[rest]
    for _ in range(CHECKS):
        before_B1 = torch.where(_ahead_of(logits_BN, best_B1), units_BN, 0.0).sum(dim=-1, keepdim=True)
        outside = (before_B1 >= limit_B1)[:, 0].nonzero()[:, 0]
        if len(outside) == 0:
            return result_B1
        logits_BN, units_BN, times_BN = logits_BN[outside], units_BN[outside], times_BN[outside]
        rest, best_B1, limit_B1 = rest[outside], best_B1[outside], limit_B1[outside]
        best_B1 = times_BN.scatter_(1, best_B1, torch.inf).min(dim=-1, keepdim=True).indices
        result_B1[rest] = best_B1
    for r, place in enumerate(rest.tolist()):
        kept = _nucleus(logits_BN[r], units_BN[r], limit_B1[r])
        result_B1[place] = kept[times_BN[r, kept].argmin()]
    return result_B1


def _nucleus(logits_N: Tensor, units_N: Tensor, limit: Tensor) -> Tensor:
    """Step 8: the indices of the likeliest tokens that together reach the limit, ascending. int64."""
    for count in (NUCLEUS, len(logits_N)):
        ranked = top_ids(logits_N, count)
        units = units_N[ranked]
        if units.sum() >= limit:
            break
    before = units.cumsum(dim=-1) - units
    return ranked[before < limit].sort().values


def _units(probabilities: Tensor) -> Tensor:
    """Whole numbers in proportion to probabilities, in place of them: their sums do not depend on an order."""
    return probabilities.mul_(UNIT).round_()


def _ahead_of(logits_BN: Tensor, index_B1: Tensor) -> Tensor:
    """Which tokens come before this one in order of probability, the lower id first among equals. bool `(B, N)`."""
    value_B1 = logits_BN.gather(1, index_B1)
    earlier_BN = _all_ids(logits_BN.shape[1], logits_BN.device) < index_B1
    return earlier_BN.logical_and_(logits_BN == value_B1).logical_or_(logits_BN > value_B1)


def top_ids(values_V: Tensor, count: int) -> Tensor:
    """The ids of the `count` largest values (all, if there are fewer), largest first, the lower id first among equals."""
    threshold = values_V.topk(min(count, len(values_V))).values[-1]
    ids = (values_V >= threshold).nonzero()[:, 0]
    return ids[values_V[ids].sort(descending=True, stable=True).indices[:count]]


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """The model's log-probability of given tokens, in nats: log-softmax of the logits as they are, in float32.

    A row's value has the same bits whatever rows are beside it, so that what the engine reports while it generates and
    what training computes from equal logits are equal. Differentiable; a whole `(…, V)` float32 tensor is its cost.

    Args:
        logits: `(…, V)`, any float dtype.
        ids: int64 `(…)`.

    Returns:
        float32 `(…)`.
    """
    assert logits.shape[:-1] == ids.shape, f"logits {tuple(logits.shape)}, ids {tuple(ids.shape)}"
    return logits.float().log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]


def _reports(logits_BV: Tensor, rows: Sequence[SampleRow], tokens: Sequence[int]) -> dict[int, Sampled]:
    """The results of the rows that ask for log-probabilities, by row."""
    asking = [r for r, row in enumerate(rows) if row.params.logprobs is not None and tokens[r] >= 0]
    if not asking:
        return {}
    logprobs_RV = logits_BV[asking].log_softmax(dim=-1)
    drawn = torch.tensor([tokens[r] for r in asking], device=logits_BV.device)
    own = logprobs_RV.gather(1, drawn[:, None])[:, 0].tolist()
    out = {}
    for place, r in enumerate(asking):
        top: list[tuple[int, float]] = []
        if count := rows[r].params.logprobs:
            ids = top_ids(logits_BV[r], count)
            top = list(zip(ids.tolist(), logprobs_RV[place, ids].tolist(), strict=True))
        out[r] = Sampled(tokens[r], own[place], top)
    return out


def _why_not(logits_V: Tensor, has_mask: bool) -> str:
    """What to tell the one whose token could not be drawn."""
    count = len(logits_V)
    bad = int((logits_V.isnan() | (logits_V == torch.inf)).sum())
    if bad:
        return (
            f"the model gave NaN or infinity for {bad} of {count} logits; check its weights, or run it in a wider dtype"
        )
    if has_mask:
        return f"the grammar allows none of the {count} tokens here; loosen the grammar"
    return f"the model gave minus infinity for all {count} logits; check its weights, or run it in a wider dtype"
