"""Sampling: parameters are checked, processing is what Hugging Face does, draws are exact and depend on nothing else."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from transformers.generation import logits_process as hf

from longreach.engine.sampler import (
    Sampled,
    Sampler,
    SampleRow,
    TokenCounts,
    gumbel,
    token_logprobs,
    top_ids,
)
from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.errors import RequestError

EOS = 1
V = 96
SAMPLER = Sampler([EOS])


def normal(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def draw(logits_V: torch.Tensor, params: SamplingParams, seed: int = 0, position: int = 0, **more) -> Sampled:
    [sampled] = SAMPLER.sample(logits_V[None], [SampleRow(params, seed, position, **more)])
    return sampled


def distribution(logits_V: torch.Tensor, params: SamplingParams, position: int = 0, **more) -> torch.Tensor:
    return SAMPLER.distribution(logits_V[None], [SampleRow(params, 0, position, **more)])[0]


def many(logits_V: torch.Tensor, params: SamplingParams, seed: int, count: int) -> torch.Tensor:
    """The tokens drawn at positions 0, 1, 2 and so on, from the same logits."""
    tokens = []
    for start in range(0, count, 500):
        rows = [SampleRow(params, seed, position) for position in range(start, start + 500)]
        tokens += [sampled.token_id for sampled in SAMPLER.sample(logits_V.expand(500, -1), rows)]
    return torch.tensor(tokens)


def assert_chi_square(observed: torch.Tensor, expected: torch.Tensor) -> None:
    """Counts fit their expectation, five standard deviations wide. Cells expected less than five times are one cell."""
    assert observed[expected == 0].sum() == 0
    small = expected < 5
    observed = torch.cat([observed[~small], observed[small].sum(dim=0, keepdim=True)]).double()
    expected = torch.cat([expected[~small], expected[small].sum(dim=0, keepdim=True)]).double()
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert freedom > 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)


# ---- parameters ------------------------------------------------------------------------------------------------------

WRONG = {
    "max_tokens": [0, -1, 1.5, "8", True, None],
    "temperature": [-0.1, math.nan, math.inf, 10**400, "hot", None, True],
    "top_k": [-2, 0.5, math.nan],
    "top_p": [0, -0.1, 1.01, math.nan, "0.9"],
    "min_p": [-0.1, 1.1, math.nan],
    "repetition_penalty": [0, -1, math.nan, math.inf],
    "frequency_penalty": [-2.1, 2.1, math.nan],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "seed": [2**63, -(2**63) - 1, 0.5],
    "logprobs": [-1, 21, 1.0, True],
    "stop": ["", ["a", ""], [3], 3, None],
    "stop_token_ids": [[V], [-1], ["a"], 3, [True]],
    "include_stop": [1, None],
    "ignore_eos": ["yes"],
    "min_tokens": [-1, 257, 0.5],
    "logit_bias": [{V: 1.0}, {-1: 1.0}, {"3": 1.0}, {3: 101}, {3: -101}, {3: math.nan}, [3], None],
    "grammar": ["[0-9]+", 3],
    "after": [V, -1, "a", True],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_in_one_line_that_names_it(name, value):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value}).check(V)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_field_is_checked():
    assert set(WRONG) == set(SamplingParams.__dataclass_fields__)


def test_a_refusal_says_value_and_range_and_remedy():
    with pytest.raises(RequestError, match=r"^top_p 1\.5 must be above 0 and at most 1; 1 leaves no token out$"):
        SamplingParams(top_p=1.5).check(V)
    with pytest.raises(RequestError, match="stop_token_ids names token 96, which is outside the vocabulary of 96"):
        SamplingParams(stop_token_ids=[96]).check(V)
    with pytest.raises(RequestError, match="min_tokens 9 is above max_tokens 8"):
        SamplingParams(max_tokens=8, min_tokens=9).check(V)


def test_values_at_the_edges_are_accepted():
    SamplingParams().check(V)
    SamplingParams(
        max_tokens=1, temperature=0, top_k=-1, top_p=1, min_p=1, repetition_penalty=0.01, frequency_penalty=-2,
        presence_penalty=2, seed=-(2**63), logprobs=20, stop="a", stop_token_ids=[0, V - 1], min_tokens=1,
        logit_bias={0: -100, V - 1: 100.0},
    ).check(V)  # fmt: skip
    SamplingParams(temperature=1e-320, top_k=10**9).check(V)


def test_a_string_or_a_list_is_stored_as_a_tuple():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[2]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[2, 3]).stop_token_ids == (2, 3)


def test_finish_reasons_are_the_words_of_the_response():
    assert [str(reason) for reason in FinishReason] == ["stop", "length", "cancelled", "deadline", "error"]


def test_parameters_and_reasons_do_not_load_torch():
    program = "import sys, longreach.engine.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


# ---- noise -----------------------------------------------------------------------------------------------------------


def splitmix64(state: int):
    """The published generator, in plain integers."""
    mask = 2**64 - 1
    while True:
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        yield z ^ (z >> 31)


def test_the_reference_generator_gives_its_published_numbers():
    assert list(itertools.islice(splitmix64(1234567), 3)) == [
        6457827717110365317, 3203168211198807973, 9817491932198370423
    ]  # fmt: skip


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (7, 3), (-1, 12), (2**63 - 1, 100_000)])
def test_noise_is_the_gumbel_transform_of_splitmix64(seed, position):
    mask = 2**64 - 1

    def finaliser(value: int) -> int:
        return next(splitmix64(value - 0x9E3779B97F4A7C15))

    start = finaliser((finaliser(seed) + position * 0x9E3779B97F4A7C15) & mask)
    expected = []
    for bits in itertools.islice(splitmix64(start), 50):
        uniform = ((bits >> 12) + 0.5) / 2**52
        expected.append(-math.log(-math.log(uniform)))
    torch.testing.assert_close(
        gumbel(seed, position, 50), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14
    )


def test_noise_of_some_ids_is_the_same_bits_as_among_all():
    whole = gumbel(5, 9, 5000)
    ids = torch.tensor([4999, 0, 17, 17, 256])
    assert torch.equal(gumbel(5, 9, ids), whole[ids])
    assert torch.equal(gumbel(5, 9, 4096), whole[:4096])
    assert torch.equal(gumbel(5 + 2**64, 9, 5000), whole)
    assert not torch.equal(gumbel(5, 10, 5000), whole)
    assert not torch.equal(gumbel(6, 9, 5000), whole)


def test_noise_has_the_moments_of_a_gumbel_distribution():
    noise = torch.cat([gumbel(3, position, 10_000) for position in range(20)])
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772156649) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.03


# ---- processing ------------------------------------------------------------------------------------------------------

HISTORY = ([5, 6, 7, 7, 90], [7, 8, 8, 8, 20, 33])
"""A prompt and an output that share a token."""


def counts() -> TokenCounts:
    history = TokenCounts(HISTORY[0])
    for token_id in HISTORY[1]:
        history.append(token_id)
    return history


def hugging_face(logits_V: torch.Tensor, params: SamplingParams, mask: torch.Tensor | None) -> torch.Tensor:
    """The distribution that the processors of transformers make, called one after the other."""
    ids = torch.tensor([[*HISTORY[0], *HISTORY[1]]])
    processors: list[hf.LogitsProcessor] = []
    if params.logit_bias:
        processors.append(hf.SequenceBiasLogitsProcessor([[[k], float(v)] for k, v in params.logit_bias.items()]))
    if mask is not None:
        processors.append(hf.SuppressTokensLogitsProcessor((~mask).nonzero()[:, 0].tolist()))
    if params.min_tokens:
        enders = [EOS, *params.stop_token_ids]
        processors.append(hf.MinNewTokensLengthLogitsProcessor(len(HISTORY[0]), params.min_tokens, enders))
    if params.repetition_penalty != 1:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(hf.TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k > 0:
        processors.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        processors.append(hf.MinPLogitsWarper(params.min_p))
    scores = logits_V[None]
    for processor in processors:
        scores = processor(ids, scores)
    return scores[0].softmax(dim=-1)


OPTIONS = [
    dict(temperature=0.7),
    dict(temperature=1.8),
    dict(top_k=1),
    dict(top_k=7),
    dict(top_k=200),
    dict(top_p=0.9),
    dict(top_p=0.3),
    dict(top_p=1e-9),
    dict(min_p=0.05),
    dict(min_p=1.0),
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=0.8),
    dict(logit_bias={3: 5.5, 40: -20, 90: 12}),  # no more: float32 loses probabilities below e^-103
    dict(min_tokens=7, stop_token_ids=(2, 3)),
    dict(min_tokens=6, stop_token_ids=(2, 3)),
    dict(temperature=0.8, top_p=0.9),
    dict(temperature=1.5, top_k=20, top_p=0.8),
    dict(temperature=1.2, top_k=30, top_p=0.95, min_p=0.02),
    dict(temperature=0.9, top_k=12, top_p=0.7, min_p=0.1, repetition_penalty=1.2, logit_bias={7: 2.0}, min_tokens=9),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_option_gives_the_distribution_of_transformers(options, masked):
    params = SamplingParams(**options)
    params.check(V)
    for seed in range(20):
        logits = normal(V, seed=seed)
        mask = torch.rand(V, generator=torch.Generator().manual_seed(seed)) < 0.5 if masked else None
        expected = hugging_face(logits, params, mask)
        got = distribution(logits, params, position=len(HISTORY[1]), history=counts(), mask=mask)
        assert torch.equal(got > 0, expected > 0)
        torch.testing.assert_close(got.float(), expected, rtol=2e-5, atol=1e-7)


def test_frequency_and_presence_penalties_count_the_output_only():
    logits = torch.zeros(V)
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=1.0)
    got = distribution(logits, params, history=counts()).log()
    got -= got[0].clone()
    expected = torch.zeros(V, dtype=torch.float64)
    expected[8] = -(3 * 0.5 + 1.0)
    expected[[7, 20, 33]] = -(0.5 + 1.0)  # 7 is in the prompt twice more, 5, 6 and 90 in the prompt alone
    torch.testing.assert_close(got, expected)


def test_the_repetition_penalty_comes_before_the_others():
    logits = torch.zeros(V)
    logits[8] = 4.0
    params = SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=1.0)
    got = distribution(logits, params, history=counts()).log()
    assert float(got[8] - got[0]) == pytest.approx(4.0 / 2 - (3 * 0.5 + 1.0))


def test_a_bias_is_added_before_the_repetition_penalty_divides():
    logits = torch.zeros(V)
    params = SamplingParams(repetition_penalty=2.0, logit_bias={5: 3.0, 9: 3.0})
    got = distribution(logits, params, history=counts()).log()
    assert float(got[5] - got[0]) == pytest.approx(1.5)
    assert float(got[9] - got[0]) == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (dict(temperature=0), [2]),
        (dict(top_k=2), [2, 4]),
        (dict(top_k=4), [0, 2, 4, 6]),
        (dict(top_p=0.2), [2]),
        (dict(top_p=0.5), [2, 4]),
        (dict(top_p=0.51), [2, 4, 6]),
        (dict(min_p=1.0), [2, 4, 6, 7]),
        (dict(top_k=3, top_p=0.5), [2, 4]),
    ],
)
def test_among_equals_the_lower_id_survives(options, kept):
    # Ids 2, 4, 6 and 7 share all probability, to within e^-60; 0 is the first of the rest.
    logits = torch.tensor([0.0, -1.0, 60.0, -1.0, 60.0, -1.0, 60.0, 60.0])
    if options.get("top_k") == 4:
        logits[7] = 0.0
    got = distribution(logits, SamplingParams(**options))
    assert got.nonzero()[:, 0].tolist() == kept
    params = SamplingParams(**options)
    assert {draw(logits, params, seed).token_id for seed in range(60)} == {i for i in kept if got[i] > 1e-9}


@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_p=1e-300), dict(min_p=1.0), dict(temperature=1e-320)])
def test_the_likeliest_token_survives_whatever_is_asked(options):
    logits = normal(50, 4096, scale=0.1)
    rows = [SampleRow(SamplingParams(**options), 3, position) for position in range(50)]
    assert [s.token_id for s in SAMPLER.sample(logits, rows)] == logits.argmax(dim=-1).tolist()


def test_before_min_tokens_no_end_mark_and_no_stop_token_is_drawn():
    logits = torch.zeros(V)
    logits[[EOS, 4]] = 50.0
    params = SamplingParams(temperature=0, min_tokens=3, stop_token_ids=(4,))
    assert [draw(logits, params, position=p).token_id for p in range(5)] == [0, 0, 0, EOS, EOS]
    assert draw(logits, SamplingParams(temperature=0, min_tokens=3, ignore_eos=True)).token_id == EOS


def test_a_grammar_that_can_only_end_overrules_min_tokens():
    mask = torch.zeros(V, dtype=torch.bool)
    mask[EOS] = True
    assert draw(normal(V), SamplingParams(min_tokens=9), mask=mask).token_id == EOS


def test_top_ids_orders_equals_by_id():
    values = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    assert top_ids(values, 4).tolist() == [1, 3, 2, 4]
    assert top_ids(values, 99).tolist() == [1, 3, 2, 4, 5, 0]


# ---- history ---------------------------------------------------------------------------------------------------------


def test_counts_survive_a_random_walk_of_appending_popping_and_copying():
    generator = torch.Generator().manual_seed(0)

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    prompt = [number(50) for _ in range(20)]
    histories: list[tuple[TokenCounts, list[int]]] = [(TokenCounts(prompt), [])]
    for _ in range(600):
        history, output = histories[number(len(histories))]
        step = number(10)
        if step == 0 and len(histories) < 4:
            histories.append((history.copy(), list(output)))
        elif step < 4 and output:
            count = number(len(output) + 1)
            history.pop(count)
            del output[len(output) - count :]
        else:
            output.append(number(1000))
            history.append(output[-1])
        for history, output in histories:
            ids, times = history.seen(torch.device("cpu"))
            assert len(history) == len(output)
            found = dict(zip(ids.tolist(), times.tolist(), strict=True))
            assert found == {token_id: output.count(token_id) for token_id in {*prompt, *output}}


# ---- draws -----------------------------------------------------------------------------------------------------------

DRAWS = [
    dict(),
    dict(temperature=0.7),
    dict(temperature=1.3, top_k=10),
    dict(top_p=0.8),
    dict(top_p=0.2),
    dict(top_p=0.999),
    dict(min_p=0.2),
    dict(temperature=1.5, top_k=25, top_p=0.6, min_p=0.05),
]


@pytest.mark.parametrize("options", DRAWS, ids=str)
def test_draws_follow_the_exact_distribution(options):
    logits, params = normal(V, seed=11, scale=0.8), SamplingParams(**options)
    tokens = many(logits, params, seed=42, count=20_000)
    exact = distribution(logits, params)
    assert_chi_square(torch.bincount(tokens, minlength=V), exact * len(tokens))


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("options", [*DRAWS, dict(top_p=0.02), dict(top_k=3, top_p=0.5)], ids=str)
def test_a_draw_is_the_argmax_of_log_probability_and_noise(options, scale):
    # Without sorting, and by explicit processing, the same token: also with ties (whole logits) and a wide nucleus.
    params = SamplingParams(**options)
    for whole in (False, True):
        logits = normal(60, 700, seed=3, scale=scale)
        logits = logits.round() if whole else logits
        rows = [SampleRow(params, 8, position) for position in range(60)]
        noise = torch.stack([gumbel(8, position, 700) for position in range(60)])
        expected = (SAMPLER.distribution(logits, rows).log() + noise).argmax(dim=-1)
        assert [s.token_id for s in SAMPLER.sample(logits, rows)] == expected.tolist()


def test_draws_at_neighbouring_positions_and_seeds_are_independent():
    logits, params = normal(6, seed=2, scale=1.0), SamplingParams()
    exact = distribution(logits, params)
    pairs = torch.outer(exact, exact).flatten()
    tokens, others = many(logits, params, seed=7, count=20_000), many(logits, params, seed=8, count=20_000)
    for first, second in [
        (tokens[:-1], tokens[1:]),
        (tokens[:-2], tokens[2:]),
        (tokens, others),
        (tokens[1:], others[:-1]),
    ]:
        assert_chi_square(torch.bincount(first * 6 + second, minlength=36), pairs * len(first))


def test_a_coupled_draft_agrees_as_often_as_the_distributions_overlap_allows():
    # With shared noise two equal distributions always agree, and close ones nearly always: at least
    # (1 - d) / (1 + d) of the time for a total variation distance d.
    target = normal(V, seed=1, scale=1.5)
    draft = target + normal(V, seed=2, scale=0.3)
    params = SamplingParams()
    distance = 0.5 * float((distribution(target, params) - distribution(draft, params)).abs().sum())
    agreement = float((many(target, params, 5, 5000) == many(draft, params, 5, 5000)).float().mean())
    assert agreement > (1 - distance) / (1 + distance) - 0.02
    assert agreement < 1
    assert torch.equal(many(target, params, 5, 500), many(target.clone(), params, 5, 500))


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 5.0, 5.0], [-1.0, -3.0, -0.5]])
    rows = [SampleRow(SamplingParams(temperature=0), 0, 0)] * 3
    assert [s.token_id for s in SAMPLER.sample(logits, rows)] == [1, 0, 2]


def test_a_temperature_near_zero_is_greedy():
    logits = normal(30, V)
    rows = [SampleRow(SamplingParams(temperature=t), 1, p) for p, t in enumerate([1e-6, 1e-9, 1e-320] * 10)]
    assert [s.token_id for s in SAMPLER.sample(logits, rows)] == logits.argmax(dim=-1).tolist()


# ---- rows and batches ------------------------------------------------------------------------------------------------


def mixed_rows(vocabulary: int) -> tuple[torch.Tensor, list[SampleRow]]:
    """Sixteen requests that differ in every option."""
    options = [dict(), dict(temperature=0), *DRAWS[1:], dict(top_k=40, top_p=0.9), dict(temperature=0, top_k=3)]
    options += [dict(repetition_penalty=1.3), dict(temperature=0, presence_penalty=1.5), dict(min_tokens=50)]
    options += [dict(logit_bias={3: 9.0, 5: -100}), dict(top_p=0.05)]
    assert len(options) == 16
    logits = normal(16, vocabulary, seed=9, scale=2.0)
    mask = torch.rand(vocabulary, generator=torch.Generator().manual_seed(1)) < 0.3
    rows = [
        SampleRow(SamplingParams(**option, logprobs=r % 4), 100 + r, 5 + r, counts(), mask if r % 5 == 0 else None)
        for r, option in enumerate(options)
    ]
    return logits, rows


@pytest.mark.parametrize("vocabulary", [97, 4096, 5001])
def test_a_row_gives_the_same_bits_alone_in_a_batch_and_at_another_place(vocabulary):
    logits, rows = mixed_rows(vocabulary)
    before = logits.clone()
    together = SAMPLER.sample(logits, rows)
    assert torch.equal(logits, before)
    assert [SAMPLER.sample(logits[r : r + 1], rows[r : r + 1])[0] for r in range(16)] == together
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    assert SAMPLER.sample(logits[order], [rows[r] for r in order]) == [together[r] for r in order]
    # and at an address that is aligned differently
    odd = torch.empty(16 * vocabulary + 1)[1:].view(16, vocabulary).copy_(logits)
    assert SAMPLER.sample(odd, rows) == together


def test_no_rows_give_no_tokens():
    assert SAMPLER.sample(torch.empty(0, V), []) == []


@pytest.mark.parametrize("options", [dict(temperature=0), dict(), dict(top_p=0.5), dict(top_k=5), dict(logprobs=2)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_with_nan_fails_alone_and_says_so(options, bad):
    logits = normal(3, V)
    rows = [SampleRow(SamplingParams(**options), 1, p) for p in range(3)]
    healthy = SAMPLER.sample(logits, rows)
    logits[1, 70] = bad
    got = SAMPLER.sample(logits, rows)
    assert got[0] == healthy[0]
    assert got[2] == healthy[2]
    assert got[1].token_id == -1
    assert "NaN or infinity for 1 of 96 logits" in (got[1].error or "")


@pytest.mark.parametrize("options", [dict(temperature=0), dict(), dict(top_p=0.5), dict(top_k=5)])
def test_a_row_without_any_allowed_token_fails_and_says_why(options):
    params = SamplingParams(**options)
    nothing = torch.zeros(V, dtype=torch.bool)
    assert "grammar allows none" in (draw(normal(V), params, mask=nothing).error or "")
    assert "minus infinity for all" in (draw(torch.full((V,), -math.inf), params).error or "")


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_model_before_any_processing():
    logits = normal(V)
    params = SamplingParams(temperature=0.3, top_k=2, logit_bias={30: 100.0}, logprobs=3)
    sampled = draw(logits, params)
    exact = logits.double().log_softmax(dim=-1)
    assert sampled.token_id == 30
    assert sampled.logprob == pytest.approx(float(exact[30]), abs=1e-5)
    assert [i for i, _ in sampled.top or []] == exact.argsort(descending=True)[:3].tolist()
    assert [p for _, p in sampled.top or []] == pytest.approx(exact.sort(descending=True).values[:3].tolist(), abs=1e-5)


def test_zero_alternatives_report_the_token_alone_and_none_report_nothing():
    logits = normal(V)
    own = draw(logits, SamplingParams(temperature=0, logprobs=0))
    assert own.top == []
    assert own.logprob == float(token_logprobs(logits, torch.tensor(own.token_id)))
    assert draw(logits, SamplingParams(temperature=0)) == Sampled(own.token_id)


@pytest.mark.parametrize("vocabulary", [5, 97, 4096, 4099])
def test_token_log_probabilities_have_the_same_bits_in_any_batch(vocabulary):
    logits, ids = normal(33, vocabulary), torch.arange(33) % vocabulary
    together = token_logprobs(logits, ids)
    assert torch.equal(torch.cat([token_logprobs(logits[r : r + 1], ids[r : r + 1]) for r in range(33)]), together)
    assert torch.equal(torch.stack([token_logprobs(logits[r], ids[r]) for r in range(33)]), together)
    assert torch.equal(token_logprobs(logits.view(3, 11, -1), ids.view(3, 11)).flatten(), together)
    rows = [SampleRow(SamplingParams(logit_bias={int(i): 100.0}, temperature=0, logprobs=0), 0, 0) for i in ids]
    assert [s.logprob for s in SAMPLER.sample(logits, rows)] == together.tolist()


def test_token_log_probabilities_carry_the_gradient_of_log_softmax():
    logits, ids = normal(4, 9).requires_grad_(), torch.tensor([0, 3, 8, 3])
    token_logprobs(logits, ids).sum().backward()
    one_hot = torch.nn.functional.one_hot(ids, 9)
    torch.testing.assert_close(logits.grad, one_hot - logits.detach().softmax(dim=-1))
