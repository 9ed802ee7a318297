"""The engine's promises, each against the bare model: exact hits, exact batches, exact speculation, and clear endings."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import longreach
from longreach.bench.walk import micro, walk
from longreach.engine.engine import Engine, EngineOptions
from longreach.engine.llm import LLM, Completion
from longreach.engine.sampler import Sampler, SampleRow, token_logprobs
from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.model.paged import page_nbytes, slot_nbytes
from longreach.model.transformer import Transformer
from longreach.tokenizer.bpe import Tokenizer

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, logprobs=0)


def made(arithmetic: str = "invariant", seed: int = 1) -> Transformer:
    return Transformer(micro(arithmetic), seed=seed).eval()


@pytest.fixture(scope="module")
def exact() -> Transformer:
    return made("invariant")


@pytest.fixture(scope="module")
def fast() -> Transformer:
    return made("fast")


def text(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def gib(slots: int, pages: int) -> float:
    """Memory for exactly so much of the micro shape."""
    return (
        slots * slot_nbytes(micro("fast"), "float32") + (pages + 0.5) * page_nbytes(micro("fast"), "float32")
    ) / 2**30


def llm(model: Transformer, **options) -> LLM:
    return LLM(model, **({"memory_gib": 0.05, "max_running": 8} | options))


def alone(model: Transformer, prompt: list[int], params: SamplingParams = GREEDY) -> Completion:
    return llm(model, prefix_cache=False).generate(prompt, params)[0]


def logprobs(answer: Completion) -> list[float]:
    assert answer.logprobs is not None
    return [float(s.logprob) for s in answer.logprobs if s.logprob is not None]


# ---- the cache cannot lie ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ["invariant", "fast"])
def test_a_random_walk_finds_no_wrong_hit_no_wrong_report_and_no_shared_tenant(arithmetic):
    result, lies = walk(1000, seed=11, arithmetic=arithmetic)
    assert not lies, lies[:3]
    assert result.hits > 20 and result.restarts and result.disk_pages and result.preemptions


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_ten_thousand_operations_find_no_wrong_hit(seed):
    result, lies = walk(2500, seed=seed)
    assert not lies, lies[:3]
    assert result.hits > 50


@pytest.mark.parametrize("policy", ["ends", "periodic", "full", "zero"])
@pytest.mark.parametrize("further", [0, 1, 90])
def test_after_a_hit_every_log_probability_has_the_bits_of_a_cold_run(exact, policy, further):
    with llm(exact, checkpoints=policy, period=96) as warm:
        prompt = text(500)
        warm.generate(prompt, GREEDY)
        longer = prompt + text(further, 5)
        (hit,) = warm.generate(longer, GREEDY)
        cold = alone(exact, longer)
        assert hit.token_ids == cold.token_ids and logprobs(hit) == logprobs(cold)
        assert 0 < hit.cached_tokens < len(longer)
        if policy == "ends":
            assert hit.cached_tokens == 500 - (further == 0), "the state at the prompt's end serves all of it"


def test_a_conversation_reads_only_what_is_new(exact):
    with llm(exact) as chat:
        history = text(200)
        for turn in range(4):
            (answer,) = chat.generate(history, GREEDY)
            assert answer.cached_tokens == (0 if turn == 0 else len(history) - 31)
            assert logprobs(answer) == logprobs(alone(exact, history))
            history = history + answer.token_ids + text(30, turn)  # the last token made has not been read yet


def test_tenants_share_nothing(exact):
    with llm(exact) as served:
        for tenant in ("a", "b"):
            assert served.generate(text(300), GREEDY, tenant=tenant)[0].cached_tokens == 0
        assert served.generate(text(300), GREEDY, tenant="a")[0].cached_tokens == 299


def test_after_a_restart_the_disk_tier_gives_the_same_bits(exact, tmp_path):
    prompt = text(700)
    with llm(exact, disk_cache=tmp_path) as first:
        first.generate(prompt, GREEDY)
    cold = alone(exact, prompt)
    with llm(exact, disk_cache=tmp_path) as second:
        (hit,) = second.generate(prompt, GREEDY)
        assert hit.cached_tokens == 699 and logprobs(hit) == logprobs(cold)
        assert second.generate(prompt, GREEDY, tenant="other")[0].cached_tokens == 0
    with llm(made(seed=2), disk_cache=tmp_path) as other:
        assert other.generate(prompt, GREEDY)[0].cached_tokens == 0, "another model's entries are invisible"


def test_the_bits_flipped_in_stored_files_cost_a_hit_and_nothing_else(exact, tmp_path, caplog):
    prompt = text(700)
    with llm(exact, disk_cache=tmp_path) as first:
        first.generate(prompt, GREEDY)
    cold = alone(exact, prompt)
    records = sorted(tmp_path.rglob("*.rec"))
    for path in records:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    with llm(exact, disk_cache=tmp_path) as second:
        (answer,) = second.generate(prompt, GREEDY)
        assert answer.cached_tokens == 0 and logprobs(answer) == logprobs(cold)
        warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == len(set(warnings)) > 0, "each damage is reported once"


WRITER = """
import sys, torch, itertools
from longreach.bench.walk import micro
from longreach.engine.llm import LLM
from longreach.engine.sampling import SamplingParams
from longreach.model.transformer import Transformer
torch.set_num_threads(1)
llm = LLM(Transformer(micro("invariant"), seed=1), memory_gib=0.05, max_running=8, disk_cache=sys.argv[1], checkpoints="full")
print("ready", flush=True)
for seed in itertools.count():
    generator = torch.Generator().manual_seed(seed % 20)
    llm.generate(torch.randint(0, 61, (600,), generator=generator).tolist(), SamplingParams(max_tokens=4, temperature=0.0))
"""


@pytest.mark.slow
def test_an_engine_killed_at_random_instants_leaves_a_cache_that_never_lies(exact, tmp_path):
    generator, hits = random.Random(0), 0
    cold = {seed: logprobs(alone(exact, text(600, seed))) for seed in range(20)}
    for kill in range(10):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(generator.uniform(0.0, 1.0))
        process.kill()
        process.wait()
        with llm(exact, disk_cache=tmp_path) as served:
            for seed in range(20) if kill == 9 else generator.sample(range(20), 4):
                (answer,) = served.generate(text(600, seed), GREEDY)
                hits += answer.cached_tokens > 0
                assert logprobs(answer) == cold[seed]
    assert hits > 20


def test_a_full_disk_is_reported_and_the_engine_lives_on(exact, tmp_path, monkeypatch, caplog):
    import errno

    from longreach.engine import disk

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "write_new", full)
    with llm(exact, disk_cache=tmp_path) as served:
        answers = [served.generate(text(300, seed), GREEDY)[0] for seed in range(3)]
        assert served.engine.memory.writer is not None and served.engine.memory.writer.flush(10)
        assert [logprobs(a) for a in answers] == [logprobs(alone(exact, text(300, seed))) for seed in range(3)]
    assert sum("No space left" in r.message for r in caplog.records) == 1


def test_changed_weights_are_never_answered_from_the_old_ones(tmp_path):
    model = made()
    with llm(model, disk_cache=tmp_path) as served:
        prompt = text(400)
        served.generate(prompt, GREEDY)
        request = served.engine.submit(prompt, replace(GREEDY, max_tokens=30))
        served.engine.step()
        model.load_state_dict(made(seed=9).state_dict())
        served.engine.weights_changed()
        (answer,) = served.generate(prompt, GREEDY)
        assert logprobs(answer) == logprobs(alone(made(seed=9), prompt))
        while not request.is_finished:
            served.engine.step()
        tokens = torch.tensor([request.tokens])
        expected = token_logprobs(
            model(tokens[:, :-1])[0, request.num_prompt + 1 :], tokens[0, request.num_prompt + 2 :]
        )
        found = [s.logprob for s in request.work.logprobs[2:]]
        assert found == expected.tolist(), "the request under way goes on with the new weights"


# ---- what runs beside a request changes nothing -----------------------------------------------------------------------


def test_a_request_says_the_same_in_any_company_however_its_prompt_is_cut(exact):
    prompts = [text(n, n) for n in (3, 40, 128, 129, 300, 411)]
    params = [replace(GREEDY, max_tokens=20, temperature=t, seed=7) for t in (0.0, 0.7, 1.0, 0.0, 1.3, 0.5)]
    by_itself = [alone(exact, p, s) for p, s in zip(prompts, params, strict=True)]
    for options in ({}, {"step_tokens": 17}, {"max_running": 2, "step_tokens": 100}, {"speculation": "lookup"}):
        together = llm(exact, **options).generate(prompts, params)
        for one, other in zip(by_itself, together, strict=True):
            assert one.token_ids == other.token_ids and logprobs(one) == logprobs(other)


def test_rollout_and_training_log_probabilities_are_the_same_number(exact):
    prompt = text(150)
    (rollout,) = llm(exact).generate(prompt, replace(GREEDY, temperature=1.0, seed=3, max_tokens=60))
    tokens = torch.tensor([prompt + rollout.token_ids])
    hidden = exact.features(tokens[:, :-1]).hidden  # with gradients, as a trainer would
    assert hidden.requires_grad
    trained = token_logprobs(exact.head(hidden)[0, len(prompt) - 1 :], tokens[0, len(prompt) :])
    assert float((trained.detach() - torch.tensor(logprobs(rollout))).abs().max()) == 0.0


def test_in_fast_arithmetic_the_difference_is_rounding(fast):
    prompt = text(500)
    with llm(fast) as warm:
        warm.generate(prompt, GREEDY)
        longer = prompt + text(33, 4)
        (hit,) = warm.generate(longer, GREEDY)
    cold = alone(fast, longer)
    assert hit.cached_tokens == 500 and hit.token_ids == cold.token_ids
    torch.testing.assert_close(torch.tensor(logprobs(hit)), torch.tensor(logprobs(cold)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("swap", [0.0, 1.0])
@pytest.mark.parametrize("arithmetic", ["fast", "invariant"])
def test_a_request_set_aside_for_lack_of_memory_goes_on_exactly(arithmetic, swap):
    model = made(arithmetic)
    prompts = [text(200, seed) for seed in range(6)]
    params = replace(GREEDY, max_tokens=150, temperature=1.0, seed=5)
    tight = llm(model, memory_gib=gib(6, 10), max_running=6, prefix_cache=False, swap_gib=swap)
    answers = tight.generate(prompts, params)
    assert tight.engine.scheduler.preempted > 0
    wide = llm(model, prefix_cache=False).generate(prompts, params)
    for one, other in zip(answers, wide, strict=True):
        if arithmetic == "invariant":
            assert one.token_ids == other.token_ids and logprobs(one) == logprobs(other)
        elif swap:  # its state is the same to the bit, but in fast arithmetic the company it keeps still rounds
            assert one.token_ids == other.token_ids
            torch.testing.assert_close(torch.tensor(logprobs(one)), torch.tensor(logprobs(other)), atol=1e-5, rtol=0)
    assert tight.engine.memory.pages.free_count == tight.engine.memory.pages.count
    assert tight.engine.memory.slots.free_count == 6


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "released"])
@torch.no_grad()
def test_every_storage_precision_says_what_a_contiguous_cache_of_it_says(fast, precision):
    prompt = text(150)
    served = llm(fast, precision=precision)
    (answer,) = served.generate(prompt, GREEDY)
    (again,) = served.generate(prompt, GREEDY)
    cache = fast.new_cache(1, precision=precision)
    tokens = torch.tensor([prompt])
    expected = []
    for _ in range(len(answer.token_ids)):
        row = fast(tokens, cache, logits_to_keep=1)[0].log_softmax(-1)
        tokens = row.argmax(-1, keepdim=True)
        expected.append(float(row[0, tokens.item()]))
    assert again.cached_tokens == 149
    for found in (answer, again):
        torch.testing.assert_close(torch.tensor(logprobs(found)), torch.tensor(expected), atol=1e-4, rtol=0)


def test_a_model_in_bfloat16_is_served_as_it_is(exact):
    model = made("fast").to(torch.bfloat16)
    served = llm(model, speculation="mtp")
    assert served.engine.precision == "bfloat16"
    answers = served.generate([text(30), text(140, 2)], GREEDY)
    assert [len(a.token_ids) for a in answers] == [24, 24]
    again = served.generate(text(140, 2), GREEDY)[0]
    assert again.cached_tokens == 139 and again.token_ids[0] == answers[1].token_ids[0]


# ---- speculation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculation", ["lookup", "mtp"])
@pytest.mark.parametrize("arithmetic", ["fast", "invariant"])
def test_guessing_changes_no_token_greedy_or_sampled(arithmetic, speculation):
    model = made(arithmetic)
    prompts = [text(5 + seed % 50, seed) for seed in range(40)]
    params = [replace(GREEDY, max_tokens=30, temperature=[0.0, 1.0][seed % 2], seed=seed) for seed in range(40)]
    plain = llm(model, prefix_cache=False).generate(prompts, params)
    served = llm(model, prefix_cache=False, speculation=speculation)
    guessed = served.generate(prompts, params)
    assert [a.token_ids for a in plain] == [a.token_ids for a in guessed]
    assert served.engine.stats.drafted > served.engine.stats.accepted > 0


@pytest.mark.slow
@pytest.mark.parametrize("speculation", ["lookup", "mtp"])
def test_greedy_output_with_guessing_is_identical_on_a_thousand_prompts(fast, speculation):
    prompts = [text(3 + seed % 40, seed) for seed in range(1000)]
    params = replace(GREEDY, max_tokens=16, logprobs=None)
    plain = llm(fast, prefix_cache=False).generate(prompts, params)
    guessed = llm(fast, prefix_cache=False, speculation=speculation).generate(prompts, params)
    assert [a.token_ids for a in plain] == [a.token_ids for a in guessed]


def test_sampled_output_with_guessing_has_the_models_distribution(exact):
    """Chi-square of the second token, given the first, against the model's own probabilities."""
    prompt = text(40, 3)
    served = llm(exact, speculation="mtp", max_running=16)
    params = [SamplingParams(max_tokens=4, temperature=1.0, top_k=6, seed=seed) for seed in range(1500)]
    answers = served.generate([prompt] * len(params), params)
    assert served.engine.stats.drafted > len(params) // 2
    first = max({a.token_ids[0] for a in answers}, key=lambda t: sum(a.token_ids[0] == t for a in answers))
    seconds = [a.token_ids[1] for a in answers if a.token_ids[0] == first]
    with torch.no_grad():
        logits = exact(torch.tensor([[*prompt, first]]), logits_to_keep=1)[0]
    expected = Sampler(()).distribution(logits, [SampleRow(params[0], 0, 1)])[0]
    kept = (expected > 0).nonzero().flatten().tolist()
    assert set(seconds) <= set(kept) and len(seconds) > 200
    counts = torch.tensor([seconds.count(t) for t in kept], dtype=torch.float64)
    statistic = float(((counts - len(seconds) * expected[kept]) ** 2 / (len(seconds) * expected[kept])).sum())
    assert statistic < 20.5, "the 99.9 % point for five degrees of freedom"


def test_a_draft_block_costs_one_window_per_sequence_however_long_it_is(fast):
    engine = llm(fast, speculation="mtp").engine
    block = engine.memory.arena.mtp
    assert block is not None and block.window is not None and block.entries is None and block.raw is None
    assert block.window.shape[1] == fast.config.sliding_window - 1 + 2 * 64


# ---- requests come and go --------------------------------------------------------------------------------------------


def test_streaming_yields_what_generate_returns_and_leaving_early_cancels(exact):
    served = llm(exact)
    whole = alone(exact, text(50))
    pieces = list(served.stream(text(50), GREEDY))
    assert [s.token_id for piece in pieces for s in piece.tokens] == whole.token_ids
    assert pieces[-1].finish_reason is FinishReason.LENGTH
    for _ in served.stream(text(50), GREEDY):
        break
    assert not served.engine.has_work and served.engine.memory.slots.free_count == 8


def test_a_cancelled_or_late_request_ends_with_what_it_has_and_frees_its_memory(exact):
    now = [0.0]
    engine = Engine(exact, None, EngineOptions(memory_gib=0.05, prefix_cache=False), clock=lambda: now[0])
    first = engine.submit(text(40), replace(GREEDY, max_tokens=1000))
    second = engine.submit(text(41), replace(GREEDY, max_tokens=1000), deadline_s=5)
    for _ in range(4):
        engine.step()
    engine.cancel(first.id)
    engine.cancel("nobody")
    reasons = {o.request.id: o.finish_reason for o in engine.step() if o.finish_reason}
    assert reasons == {first.id: FinishReason.CANCELLED} and first.num_generated == 4
    now[0] = 5.0
    (late,) = [o for o in engine.step() if o.finish_reason]
    assert (late.request.id, late.finish_reason) == (second.id, FinishReason.DEADLINE)
    assert not engine.has_work and engine.memory.pages.free_count == engine.memory.pages.count


def test_bad_input_is_one_clear_line_and_the_engine_lives_on(exact):
    served = llm(exact, memory_gib=gib(8, 10))
    cases: list[tuple[object, SamplingParams, str]] = [
        ([], GREEDY, "the prompt is empty"),
        ([61], GREEDY, "token id 61 is outside the vocabulary of 61"),
        (text(2048), GREEDY, r"2048 tokens long, the context of this model is 2048"),
        (text(2000), GREEDY, r"2000 tokens long, the engine's memory holds \d+ .* raise memory_gib"),
        ("text", GREEDY, "needs a tokenizer"),
        (text(3), replace(GREEDY, temperature=-1.0), "temperature -1"),
        (text(3), replace(GREEDY, stop=("x",)), "stop strings need a tokenizer"),
    ]
    for prompt, params, message in cases:
        with pytest.raises(RequestError, match=message) as error:
            served.generate([text(4), prompt], [GREEDY, params])
        assert "\n" not in str(error.value)
    served.engine.submit(text(3), GREEDY, request_id="x")
    with pytest.raises(RequestError, match="'x' is in use"):
        served.engine.submit(text(3), GREEDY, request_id="x")
    with pytest.raises(RequestError, match="2 parameters for 1 prompts"):
        served.generate(text(3), [GREEDY, GREEDY])
    assert served.generate(text(30), GREEDY)[0].token_ids == alone(exact, text(30)).token_ids
    for options, message in (
        ({"memory_gib": 1e-4}, "is too little for 8 state blocks"),
        ({"max_running": 0}, "max_running 0 must be 1 or more"),
        ({"draft_tokens": 64}, "at most 32"),
        ({"precision": "float8"}, "not one of float32, bfloat16, released"),
        ({"speculation": "ngram"}, "not one of off, lookup, mtp"),
        ({"checkpoints": "end"}, "not one of ends, periodic, full, zero"),
        ({"prefix_cache": "no"}, "prefix_cache must be True or False"),
        ({"max_running": 2.5}, "max_running must be a whole number"),
        ({"memory_gib": "1"}, "memory_gib must be a number"),
    ):
        with pytest.raises(RequestError, match=message):
            llm(exact, **options)
    plain = Transformer(replace(micro("fast"), num_nextn_predict_layers=0, compress_ratios=(0, 4, 32, 4)))
    with pytest.raises(RequestError, match="needs a model with an MTP block"):
        llm(plain, speculation="mtp")


def test_a_request_whose_logits_are_not_numbers_fails_alone(exact):
    broken = made()
    with torch.no_grad():
        broken.embed.weight[60] = float("nan")
    served = llm(broken, prefix_cache=False)
    answers = served.generate([[1, 2, 3], [1, 60, 3]], GREEDY)
    assert answers[0].finish_reason is FinishReason.LENGTH
    assert answers[1].finish_reason is FinishReason.ERROR and "NaN" in str(answers[1].error)
    assert served.engine.memory.pages.free_count == served.engine.memory.pages.count


def test_a_grammar_that_cannot_be_followed_ends_its_request_alone(exact):
    class Lost:
        vocab_size = 61
        is_finished = False
        shortest = (3,)

        def start(self):
            return self

        def mask(self):
            raise RequestError("the grammar is too complex; simplify it")

    served = llm(exact, prefix_cache=False)
    params = [GREEDY, SamplingParams(max_tokens=9, grammar=Lost())]
    answers = served.generate([text(9), text(8)], params)
    assert answers[0].token_ids == alone(exact, text(9)).token_ids
    assert (
        answers[1].finish_reason is FinishReason.ERROR and answers[1].error == "the grammar is too complex; simplify it"
    )


def test_a_pass_that_fails_ends_its_requests_and_the_next_ones_are_served(exact):
    served = llm(exact, prefix_cache=False)
    extend = served.engine.runner.extend

    def fails(*args, **kwargs):
        served.engine.runner.extend = extend
        raise RuntimeError("out of memory")

    served.engine.runner.extend = fails
    (answer,) = served.generate(text(9), GREEDY)
    assert answer.finish_reason is FinishReason.ERROR and "out of memory" in str(answer.error)
    assert served.generate(text(9), GREEDY)[0].token_ids == alone(exact, text(9)).token_ids


def test_a_pass_that_fails_takes_nobody_else_with_it(exact, monkeypatch):
    served = llm(exact, prefix_cache=False, step_tokens=16)
    first = served.engine.submit(text(9), GREEDY)
    served.engine.step()
    second = served.engine.submit(text(100), GREEDY)
    sample, calls = Sampler.sample, []

    def fails(self, logits, rows):
        calls.append(len(rows))
        if len(calls) == 1:
            raise MemoryError("no room")
        return sample(self, logits, rows)

    monkeypatch.setattr(Sampler, "sample", fails)
    while served.engine.has_work:
        served.engine.step()
    assert first.finish_reason is FinishReason.ERROR and "MemoryError: no room" in str(first.error)
    assert second.finish_reason is FinishReason.LENGTH
    assert served.engine.memory.pages.free_count == served.engine.memory.pages.count


@pytest.mark.parametrize("where", [1, 3])
def test_an_interrupt_at_any_moment_leaves_nothing_half_done(exact, where):
    served = llm(exact)
    extend, calls = served.engine.runner.extend, []

    def interrupted(*args, **kwargs):
        out = extend(*args, **kwargs)
        calls.append(1)
        if len(calls) == where:
            raise KeyboardInterrupt
        return out

    served.engine.runner.extend = interrupted
    with pytest.raises(KeyboardInterrupt):
        served.generate([text(200), text(300, 1)], GREEDY)
    assert not served.engine.has_work and served.engine.memory.slots.free_count == 8
    for seed, count in ((0, 200), (1, 300)):
        (answer,) = served.generate(text(count, seed), GREEDY)
        assert logprobs(answer) == logprobs(alone(exact, text(count, seed)))


def test_two_streams_read_in_turns_both_get_all_their_tokens(exact):
    served = llm(exact)
    streams = {seed: served.stream(text(20, seed), GREEDY) for seed in range(2)}
    got: dict[int, list[int]] = {0: [], 1: []}
    while streams:
        for seed, stream in list(streams.items()):
            output = next(stream, None)
            if output is None:
                del streams[seed]
            else:
                got[seed] += [s.token_id for s in output.tokens]
                assert served.generate(text(5), replace(GREEDY, max_tokens=2))[0].finish_reason is FinishReason.LENGTH
    assert got == {seed: alone(exact, text(20, seed)).token_ids for seed in range(2)}


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 1},
        {"sliding_window": 3},
        {"compress_ratios": (4, 4, 4, 4, 0)},
        {"compress_ratios": (0, 32, 32, 0, 0)},
    ],
)
@pytest.mark.parametrize("policy", ["ends", "zero"])
def test_unusual_shapes_hit_exactly_too(changes, policy):
    model = Transformer(replace(micro("invariant"), **changes), seed=1).eval()
    served = llm(model, checkpoints=policy)
    for prompt in (text(384), text(384), text(384) + text(70, 2), text(256), text(200)):
        assert logprobs(served.generate(prompt, GREEDY)[0]) == logprobs(alone(model, prompt))


def test_periodic_checkpoints_are_kept_where_drafts_jump_over_them():
    model = made("invariant")
    prompt = [3, 4, 5] * 60
    for speculation in ("off", "lookup"):
        served = llm(model, checkpoints="periodic", period=16, speculation=speculation)
        served.engine.memory.at_ends = False
        bias = dict.fromkeys((3, 4, 5), 100.0)
        served.generate(prompt, SamplingParams(max_tokens=100, temperature=0.0, logit_bias=bias))
        assert served.engine.memory.index.num_checkpoints >= 180 // 16 + 100 // 16 - 1


def test_ids_belong_to_their_requests(exact):
    engine = llm(exact).engine
    engine.submit(text(3), GREEDY, request_id="request-0")
    assert engine.submit(text(3), GREEDY).id == "request-1"
    while engine.has_work:
        engine.step()
    engine.cancel("request-0")
    again = engine.submit(text(3), GREEDY, request_id="request-0")
    while engine.has_work:
        engine.step()
    assert again.finish_reason is FinishReason.LENGTH, (
        "cancelling a request that is over cancels no later one of its name"
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"tenant": None}, "tenant must be a text"),
        ({"tenant": "\ud800"}, "not valid Unicode"),
        ({"user": [1]}, "user must be a text"),
        ({"priority": "high"}, "priority must be a number"),
        ({"deadline_s": "5"}, "deadline_s must be a number"),
        ({"deadline_s": -1}, "deadline_s -1 must be above 0"),
        ({"params": {"max_tokens": 3}}, "params must be a SamplingParams, not dict"),
    ],
)
def test_what_submit_refuses_stops_nobody_else(exact, how, message):
    engine = llm(exact).engine
    with pytest.raises(RequestError, match=message):
        engine.submit(text(5), **({"params": GREEDY} | how))
    request = engine.submit(text(5), GREEDY)
    while engine.has_work:
        engine.step()
    assert request.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("prompts", [5, None, [["a"]], [[1.5]], [[1, 2], 5.0]])
def test_prompts_of_a_wrong_kind_are_one_clear_line(exact, prompts):
    served = llm(exact)
    with pytest.raises(RequestError, match="must be"):
        served.generate(prompts, GREEDY)
    assert not served.engine.has_work
    assert served.generate(torch.tensor([1, 2, 3]), GREEDY)[0].prompt_tokens == 3
    served.close()
    with pytest.raises(RequestError, match="this engine is closed"):
        served.generate(text(3), GREEDY)


# ---- with a tokenizer -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    from longreach.checkpoint.save import save_model

    directory = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n" * 40], 320)
    shape = replace(ModelConfig.preset("tiny"), vocab_size=tokenizer.vocab_size)
    save_model(Transformer(shape, seed=4), directory / "model", layout="transformers")
    tokenizer.save(directory / "model")
    return directory / "model"


def test_texts_in_texts_out_with_stop_strings(run):
    llm = longreach.LLM(run, memory_gib=0.1)
    free = llm.generate("def f", longreach.SamplingParams(max_tokens=60, temperature=1.0, seed=3, ignore_eos=True))[0]
    assert free.finish_reason is FinishReason.LENGTH and len(free.token_ids) == 60
    stop = free.text[20:23]
    (answer,) = llm.generate(
        "def f", longreach.SamplingParams(max_tokens=60, temperature=1.0, seed=3, ignore_eos=True, stop=stop)
    )
    assert answer.text == free.text[: free.text.find(stop)] and answer.stop_reason == stop
    assert answer.finish_reason is FinishReason.STOP and answer.prompt_tokens == answer.cached_tokens + 1
    pieces = list(
        llm.stream("def f", longreach.SamplingParams(max_tokens=60, temperature=1.0, seed=3, ignore_eos=True))
    )
    assert "".join(piece.text for piece in pieces) == free.text


@pytest.mark.parametrize("speculation", ["off", "lookup", "mtp"])
def test_a_grammar_holds_with_and_without_guessing(run, speculation):
    pytest.importorskip("llguidance", reason="grammars need the extra 'grammar'")
    from longreach.engine.grammar import compile_grammar

    tokenizer = Tokenizer.load(run)
    grammar = compile_grammar(tokenizer, regex=r"def [a-z]{2,5}\(x\):\n    return (x[+*]){3}[0-9]+")
    params = [SamplingParams(max_tokens=60, temperature=1.0, seed=seed, grammar=grammar) for seed in range(6)]
    llm = longreach.LLM(run, memory_gib=0.1, speculation=speculation)
    answers = llm.generate(["# "] * 6, params)
    for answer in answers:
        whole = re.fullmatch(r"def [a-z]{2,5}\(x\):\n    return (x[+*]){3}[0-9]+", answer.text)
        assert whole or answer.finish_reason is FinishReason.LENGTH
    plain = longreach.LLM(run, memory_gib=0.1).generate(["# "] * 6, params)
    assert [a.token_ids for a in answers] == [a.token_ids for a in plain]


@pytest.mark.parametrize("speculation", ["lookup", "mtp"])
def test_penalties_see_the_tokens_before_a_guess(run, speculation):
    params = [
        SamplingParams(
            max_tokens=40, temperature=0.5, seed=seed, repetition_penalty=1.2, frequency_penalty=0.5, presence_penalty=0.2
        )
        for seed in range(4)
    ]  # fmt: skip
    prompts = ["def f(x):\n    return x\ndef f(x):\n"] * 4
    plain = longreach.LLM(run, memory_gib=0.1).generate(prompts, params)
    guessed = longreach.LLM(run, memory_gib=0.1, speculation=speculation).generate(prompts, params)
    assert [a.token_ids for a in plain] == [a.token_ids for a in guessed]
