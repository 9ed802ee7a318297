"""Episodes: what is asked of the model, what is kept, how they end, and that an interruption changes nothing."""

from __future__ import annotations

import dataclasses
import random
import re
import time

import pytest
from episodes import Boxes, MemoryJournal, ScriptedSource, Sums, SumsApart
from serving import calls_text, make_tokenizer

from longreach.chat.messages import Conversation, Message
from longreach.chat.modes import in_mode
from longreach.chat.renderer import answer_parts, render
from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.errors import RequestError
from longreach.evaluate.engine_source import EngineSource
from longreach.evaluate.episode import Job
from longreach.evaluate.judging import Judging
from longreach.evaluate.play import play, reply_text, turn_seed
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.tasks.base import Problem, problem_at
from longreach.tasks.registry import open_task
from longreach.tokenizer.special import ASSISTANT, BOS, EOS, LATEST_REMINDER, USER

SUMS, BOXES = Sums({}), Boxes({})


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def judging():
    with Judging() as judging:
        yield judging


def jobs_of(task, count, mode="non-think", window=1000, **more):
    return [
        Job(f"{task.name}/{index}", task, problem_at(task, "train", 0, index), mode, window, seed=index, **more)
        for index in range(count)
    ]


def add_up(prompt: str) -> str:
    """Answers `Sums` rightly, with a thought where there is room for one."""
    a, b = re.search(r"(\d+)\+(\d+)<", prompt).groups()
    answer = str(int(a) + int(b))
    return f"{a} and {b}</think>{answer}" if prompt.endswith("<think>") else answer


def put_boxes(prompt: str) -> str:
    """Answers `Boxes` rightly: one turn with both calls, then the last result."""
    thought = "so</think>" if prompt.endswith("<think>") else ""
    results = re.findall(r"<tool_result>(.*?)</tool_result>", prompt)
    if results:
        return f"{thought}{results[-1]}"
    first, second = re.search(r"put (\d+) and (\d+)<", prompt).groups()
    return thought + calls_text(("put", {"by": int(first)}), ("put", {"by": int(second)}))


# ---- one turn -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["non-think", "think-high", "think-max"])
def test_samples_come_in_the_order_of_the_jobs_with_the_prompt_of_the_mode(tokenizer, judging, mode):
    jobs = jobs_of(SUMS, 20, mode)
    samples = play(ScriptedSource(tokenizer, add_up), iter(jobs), tokenizer, judging=judging)
    assert [sample.job.key for sample in samples] == [job.key for job in jobs]
    for job, sample in zip(jobs, samples, strict=True):
        assert sample.verdict == (1.0, True, "") and sample.finish is FinishReason.STOP
        assert sample.prompt == asked(job).encode(tokenizer)
        assert tokenizer.decode(sample.tokens) == add_up(asked(job).text) + EOS
        assert sample.num_written == len(sample.tokens) == len(sample.logprobs)
        assert sample.logprobs == [-(place + 1) / 100 for place in range(len(sample.tokens))]
        [message] = sample.reply
        assert (message.reasoning is None) == (mode == "non-think")


def test_all_episodes_decode_beside_each_other_and_no_more_than_asked_for(tokenizer, judging):
    source = ScriptedSource(tokenizer, add_up)
    play(source, jobs_of(SUMS, 30), tokenizer, judging=judging)
    assert source.widest == 30
    source = ScriptedSource(tokenizer, add_up)
    play(source, jobs_of(SUMS, 30), tokenizer, judging=judging, at_once=7)
    assert source.widest == 7


def test_jobs_are_drawn_only_as_places_come_free(tokenizer, judging):
    drawn, over = [], []

    def jobs():
        for job in jobs_of(SUMS, 12):
            drawn.append(job)
            assert len(drawn) - len(over) <= 4
            yield job

    play(ScriptedSource(tokenizer, add_up), jobs(), tokenizer, judging=judging, at_once=4, on_sample=over.append)
    assert len(over) == 12


def test_a_full_window_gives_no_reward_and_the_judge_is_not_asked(tokenizer, judging):
    class Generous(Sums):
        def verify(self, problem, reply):
            raise AssertionError("it was asked")

    [job] = jobs_of(Generous({}), 1, "think-high")
    prompt = render(in_mode(job.problem.conversation, "think-high"), texts="preview").encode(tokenizer)
    [job] = jobs_of(Generous({}), 1, "think-high", window=len(prompt) + 2)
    [sample] = play(ScriptedSource(tokenizer, add_up), [job], tokenizer, judging=judging)
    assert sample.finish is FinishReason.LENGTH and len(sample.prompt + sample.tokens) == job.window
    assert sample.verdict.reward == 0 and not sample.verdict.is_right and "window" in sample.verdict.why
    assert sample.reply[-1].reasoning and not sample.reply[-1].content


def test_a_prompt_beyond_its_window_is_a_sample_without_tokens(tokenizer, judging):
    source = ScriptedSource(tokenizer, add_up)
    samples = play(source, jobs_of(SUMS, 3, window=4), tokenizer, judging=judging)
    assert source.steps == 0
    for sample in samples:
        assert (sample.tokens, sample.written, sample.logprobs, sample.reply) == ([], [], [], ())
        assert sample.finish is FinishReason.LENGTH and "no room in the window of 4" in sample.verdict.why


def test_an_answer_without_an_end_of_its_reasoning_goes_to_the_judge_as_it_is(tokenizer, judging):
    [sample] = play(
        ScriptedSource(tokenizer, lambda _: "7"), jobs_of(SUMS, 1, "think-high"), tokenizer, judging=judging
    )
    assert sample.reply == (Message("assistant", "", "7"),)
    assert not sample.verdict.is_right and sample.verdict.why.startswith(" is not")


def test_the_mark_of_another_turn_ends_the_answer(tokenizer, judging):
    source = ScriptedSource(tokenizer, lambda prompt: add_up(prompt) + "<｜User｜>1+1")
    [sample] = play(source, jobs_of(SUMS, 1), tokenizer, judging=judging)
    assert sample.verdict.is_right and tokenizer.decode(sample.tokens).endswith("<｜User｜>")


def test_a_source_without_log_probabilities_gives_samples_without_them(tokenizer, judging):
    source = ScriptedSource(tokenizer, add_up, tells=False)
    samples = play(source, jobs_of(SUMS, 3), tokenizer, judging=judging, journal=MemoryJournal())
    assert [sample.logprobs for sample in samples] == [None] * 3


def test_each_turn_is_asked_for_with_its_own_seed_all_the_room_there_is_and_log_probabilities(tokenizer, judging):
    source, params = ScriptedSource(tokenizer, put_boxes), []
    submit = source.submit
    source.submit = lambda turn: params.append((len(turn.prompt), turn.params)) or submit(turn)
    play(source, jobs_of(BOXES, 1, params=SamplingParams(temperature=0.7)), tokenizer, judging=judging)
    assert [p.seed for _, p in params] == [turn_seed(0, 0), turn_seed(0, 1)]
    assert [size + p.max_tokens for size, p in params] == [1000, 1000]
    assert {(p.temperature, p.logprobs) for _, p in params} == {(0.7, 0)}


def test_seeds_of_turns_never_meet():
    seeds = {turn_seed(seed, number) for seed in range(50) for number in range(8)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)
    assert turn_seed(3, 1) == turn_seed(3, 1)


# ---- tools ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["non-think", "think-high"])
def test_tool_calls_are_answered_and_the_tokens_are_those_of_the_rendered_conversation(tokenizer, judging, mode):
    samples = play(ScriptedSource(tokenizer, put_boxes), jobs_of(BOXES, 5, mode), tokenizer, judging=judging)
    for sample in samples:
        assert sample.verdict.is_right
        assert [message.role for message in sample.reply] == ["assistant", "tool", "tool", "assistant"]
        conversation = in_mode(sample.job.problem.conversation, mode)
        whole = Conversation(
            (*conversation.messages, *sample.reply), conversation.tools, thinking=conversation.thinking
        )
        ids, learned = render(whole, texts="preview", for_training=True).encode_with_loss(tokenizer)
        assert sample.prompt + sample.tokens == ids
        assert [False] * len(sample.prompt) + sample.written == learned
        assert all(p == 0.0 for p, w in zip(sample.logprobs, sample.written, strict=True) if not w)


@pytest.mark.parametrize("mode", ["non-think", "think-high", "think-max"])
def test_playing_the_worked_solutions_of_the_agentic_task_gives_their_rendering(tokenizer, judging, mode):
    task = open_task("agent")
    jobs = jobs_of(task, 12, mode, window=100_000, most_turns=50)
    shown = {
        tokenizer.decode(asked(job).encode(tokenizer)): task.demonstrate(job.problem, mode, random.Random(0))
        for job in jobs
    }

    def say(prompt: str) -> str:
        begin, reply = next((begin, reply) for begin, reply in shown.items() if prompt.startswith(begin))
        answers = [message for message in reply if message.role == "assistant"]
        return "</think>".join(part.text for part in answer_parts(answers[prompt[len(begin) :].count(EOS)]))

    for sample in play(ScriptedSource(tokenizer, say), jobs, tokenizer, judging=judging):
        assert sample.verdict.is_right
        problem = sample.job.problem
        reply = shown[tokenizer.decode(sample.prompt)]
        assert [m.content for m in sample.reply if m.role == "tool"] == [m.content for m in reply if m.role == "tool"]
        whole = dataclasses.replace(problem.conversation, messages=(*problem.conversation.messages, *reply))
        ids = render(in_mode(whole, mode), texts="preview", for_training=True).encode(tokenizer)
        assert sample.prompt + sample.tokens == ids


def asked(job):
    return render(in_mode(job.problem.conversation, job.mode), texts="preview")


def test_tokens_are_kept_as_drawn_where_their_text_would_be_encoded_otherwise(tokenizer, judging):
    class Letterwise(ScriptedSource):
        def submit(self, turn):
            handle = super().submit(turn)
            ids, at, most = self._turns[handle]
            pieces = [[i] if i < 24 else tokenizer.encode(c) for i in ids for c in tokenizer.decode([i]) or "?"]
            letters = [token for piece in pieces for token in piece]
            seen: list[int] = []
            for token in letters:  # a special token was repeated once for each letter of its spelling
                if token >= 24 or not seen or seen[-1] != token:
                    seen.append(token)
            self._turns[handle] = (seen, at, most)
            return handle

    assert max(tokenizer.special_ids[s] for s in tokenizer.special_ids if "place" not in s) < 24
    [sample] = play(Letterwise(tokenizer, put_boxes), jobs_of(BOXES, 1), tokenizer, judging=judging)
    [plain] = play(ScriptedSource(tokenizer, put_boxes), jobs_of(BOXES, 1), tokenizer, judging=judging)
    assert sample.verdict.is_right and sample.reply == plain.reply
    assert sample.num_written > plain.num_written
    between = [t for t, w in zip(sample.tokens, sample.written, strict=True) if not w]
    assert between == [t for t, w in zip(plain.tokens, plain.written, strict=True) if not w]


def test_an_episode_ends_with_its_last_turn_even_if_it_still_calls(tokenizer, judging):
    source = ScriptedSource(tokenizer, lambda _: calls_text(("put", {"by": 1})))
    [sample] = play(source, jobs_of(BOXES, 1, most_turns=3), tokenizer, judging=judging)
    assert [message.role for message in sample.reply] == ["assistant", "tool"] * 2 + ["assistant"]
    assert sample.finish is FinishReason.STOP and "nothing is not" in sample.verdict.why


def test_calls_that_another_mark_than_the_end_mark_follows_are_not_answered(tokenizer, judging):
    source = ScriptedSource(tokenizer, lambda _: calls_text(("put", {"by": 1})) + USER)
    [sample] = play(source, jobs_of(BOXES, 1), tokenizer, judging=judging)
    assert [message.role for message in sample.reply] == ["assistant"] and sample.reply[0].tool_calls
    assert all(sample.written) and not sample.verdict.is_right


def test_results_that_leave_no_room_end_the_episode_and_are_not_inserted(tokenizer, judging):
    [whole] = play(ScriptedSource(tokenizer, put_boxes), jobs_of(BOXES, 1), tokenizer, judging=judging)
    begin = whole.written.index(False)
    end = begin + whole.written[begin:].index(True)
    for window, is_inserted in ((len(whole.prompt) + end, False), (len(whole.prompt) + end + 1, True)):
        source = ScriptedSource(tokenizer, put_boxes)
        [sample] = play(source, jobs_of(BOXES, 1, window=window), tokenizer, judging=judging)
        assert sample.finish is FinishReason.LENGTH and sample.verdict.reward == 0
        assert (False in sample.written) == is_inserted
        assert [message.role for message in sample.reply][1:3] == (["tool", "tool"] if is_inserted else [])
        assert len(sample.prompt + sample.tokens) <= window


def test_lone_surrogates_out_of_a_models_arguments_do_no_harm(tokenizer, judging):
    first = calls_text(("put", {"by": 0})).replace(">0<", '>"\\ud800"<')

    def say(prompt: str) -> str:
        return "done" if "error" in prompt else first

    [sample] = play(ScriptedSource(tokenizer, say), jobs_of(BOXES, 1), tokenizer, judging=judging)
    assert "error" in sample.reply[1].content and sample.reply[-1].content == "done"


def test_a_reply_reads_as_text(tokenizer, judging):
    [sample] = play(ScriptedSource(tokenizer, put_boxes), jobs_of(BOXES, 1, "think-high"), tokenizer, judging=judging)
    lines = reply_text(sample.reply).split("\n")
    assert lines[0] == "<think>so</think>" and lines[1].startswith('put({"by"') and lines[3].startswith("=> ")
    assert lines[-1] == str(sample.job.problem.answer)


def test_answers_are_judged_while_others_still_decode(tokenizer, judging):
    class Patient(ScriptedSource):
        def step(self):
            time.sleep(0.002)
            return super().step()

    *short, long = jobs_of(SumsApart({}), 5, "think-high", window=3000)
    a, b = long.problem.conversation.messages[0].content.split("+")
    source = Patient(tokenizer, lambda p: ("and " * 400 if f">{a}+{b}<" in p else "") + add_up(p), pace=1)
    over = {}
    play(source, [*short, long], tokenizer, judging=judging, on_sample=lambda s: over.update({s.job.key: source.steps}))
    assert max(over[job.key] for job in short) < over[long.key] == source.steps


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_source_that_fails_says_which_episode_and_why(tokenizer, judging):
    source = ScriptedSource(tokenizer, add_up, pace=1)
    source.fail_at = 2
    with pytest.raises(RequestError, match="episode sums/0 cannot go on: the pass failed: no memory"):
        play(source, jobs_of(SUMS, 2, "think-high"), tokenizer, judging=judging)
    assert judging.pending == 0


def test_two_jobs_with_one_key_are_refused(tokenizer, judging):
    with pytest.raises(RequestError, match="two jobs have the key 'sums/0'"):
        play(ScriptedSource(tokenizer, add_up), jobs_of(SUMS, 1) * 2, tokenizer, judging=judging)


@pytest.mark.parametrize("params", [SamplingParams(stop="x"), SamplingParams(ignore_eos=True)])
def test_parameters_that_end_a_turn_otherwise_are_refused(tokenizer, judging, params):
    with pytest.raises(RequestError, match="ends at the end mark alone"):
        play(ScriptedSource(tokenizer, add_up), jobs_of(SUMS, 1, params=params), tokenizer, judging=judging)


def test_a_verifier_that_fails_for_every_answer_is_reported(tokenizer, judging, caplog):
    class Broken(Sums):
        def verify(self, problem, reply):
            raise KeyError("answer")

    samples = play(ScriptedSource(tokenizer, add_up), jobs_of(Broken({}), 4), tokenizer, judging=judging)
    assert all(sample.verdict.why == "the verifier failed: KeyError: 'answer'" for sample in samples)
    assert judging.failures == {"sums": 4} and judging.judged == {"sums": 4}
    assert "task sums: not one of 4 answers could be judged; the verifier failed: KeyError" in caplog.text


# ---- interruptions --------------------------------------------------------------------------------------------------


def without_jobs(samples):
    return [(s.job.key, s.prompt, s.tokens, s.written, s.logprobs, s.reply, s.finish, s.verdict) for s in samples]


@pytest.mark.parametrize("mode", ["non-think", "think-high"])
def test_episodes_with_tools_go_on_from_every_point_of_an_interruption(tokenizer, judging, mode):
    [short] = jobs_of(Sums({"level": "2"}), 1, mode)
    short = dataclasses.replace(short, window=len(asked(short).encode(tokenizer)) + 2)
    jobs = jobs_of(BOXES, 2, mode) + jobs_of(SUMS, 1, mode) + [short]
    whole = MemoryJournal()
    samples = play(ScriptedSource(tokenizer, put_or_add, pace=2), jobs, tokenizer, judging=judging, journal=whole)
    assert samples[-1].finish is FinishReason.LENGTH and samples[-1].tokens
    for count in range(len(whole.records) + 1):
        journal = whole.cut(count)
        again = play(ScriptedSource(tokenizer, put_or_add, pace=2), jobs, tokenizer, judging=judging, journal=journal)
        assert without_jobs(again) == without_jobs(samples)
        assert sorted(r[1] for r in journal.records if r[0] == "ended") == sorted(job.key for job in jobs)
        for job in jobs:
            assert journal.partial(job) == whole.partial(job)


def put_or_add(prompt: str) -> str:
    return put_boxes(prompt) if "put" in prompt else add_up(prompt)


def test_an_environment_that_answers_otherwise_than_before_is_refused(tokenizer, judging):
    journal = MemoryJournal()
    play(ScriptedSource(tokenizer, put_boxes), jobs_of(BOXES, 1), tokenizer, judging=judging, journal=journal)
    at = next(place for place, record in enumerate(journal.records) if record[0] == "inserted")
    kind, key, tokens, logprobs = journal.records[at]
    journal = MemoryJournal([*journal.records[:at], (kind, key, (*tokens[:-1], 99), logprobs)])
    with pytest.raises(RequestError, match="the environment of task boxes answered otherwise"):
        play(ScriptedSource(tokenizer, put_boxes), jobs_of(BOXES, 1), tokenizer, judging=judging, journal=journal)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = ModelConfig.preset("micro").replace(vocab_size=tokenizer.vocab_size, arithmetic="invariant")
    return Transformer(config, seed=3)


def test_the_engine_goes_on_bit_for_bit_wherever_it_was_interrupted(model, tokenizer, judging):
    params = SamplingParams(temperature=1.2, top_p=0.95, logit_bias={tokenizer.eos_id: 3.0})
    endless = SamplingParams(temperature=1.2, logit_bias={tokenizer.eos_id: -100})
    jobs = jobs_of(SUMS, 4, "think-high", window=70, params=params)
    jobs += jobs_of(Sums({"level": "2"}), 4, "think-high", window=70, params=endless)
    jobs += jobs_of(BOXES, 2, "non-think", window=600, params=params)
    whole = MemoryJournal()
    with EngineSource(model, tokenizer, max_running=4, memory_gib=0.05) as source:
        samples = play(source, jobs, tokenizer, judging=judging, journal=whole)
    assert all(sample.tokens for sample in samples)
    assert {sample.finish for sample in samples} == {FinishReason.STOP, FinishReason.LENGTH}
    rng = random.Random(5)
    for count in rng.sample(range(1, len(whole.records)), 6):
        with EngineSource(model, tokenizer, max_running=3, memory_gib=0.05) as source:
            again = play(source, jobs, tokenizer, judging=judging, journal=whole.cut(count))
        assert without_jobs(again) == without_jobs(samples)


def test_an_episode_cut_at_the_models_context_is_taken_up_as_cut_off(tokenizer, judging):
    config = ModelConfig.preset("micro").replace(vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    short = Transformer(config, seed=3)
    endless = {tokenizer.special_id(mark): -100 for mark in (BOS, EOS, USER, ASSISTANT, LATEST_REMINDER)}
    jobs = jobs_of(SUMS, 1, window=1000, params=SamplingParams(logit_bias=endless))
    whole = MemoryJournal()
    with EngineSource(short, tokenizer, max_running=2, memory_gib=0.05) as source:
        assert source.most_tokens == 64
        [sample] = play(source, jobs, tokenizer, judging=judging, journal=whole)
        assert sample.finish is FinishReason.LENGTH and len(sample.prompt + sample.tokens) == 64
        [again] = play(source, jobs, tokenizer, judging=judging, journal=whole.cut(len(whole.records) - 1))
    assert without_jobs([again]) == without_jobs([sample])


def test_a_prompt_beyond_the_models_context_is_refused(tokenizer, judging):
    config = ModelConfig.preset("micro").replace(vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    problem = Problem("sums", Conversation((Message("user", "1+1 " * 100),)), 2)
    with (
        EngineSource(Transformer(config, seed=3), tokenizer, max_running=2, memory_gib=0.05) as source,
        pytest.raises(RequestError, match="the context of this model is 64"),
    ):
        play(source, [Job("a", SUMS, problem, "non-think", 1000, 0)], tokenizer, judging=judging)


def test_after_a_change_of_the_weights_nothing_read_before_is_used(tokenizer, judging):
    import torch

    config = ModelConfig.preset("micro").replace(vocab_size=tokenizer.vocab_size, arithmetic="invariant")
    changing = Transformer(config, seed=3)
    jobs = jobs_of(SUMS, 4, window=40)
    with EngineSource(changing, tokenizer, max_running=4, memory_gib=0.05) as source:
        play(source, jobs, tokenizer, judging=judging)
        with torch.no_grad():
            for weight in changing.parameters():
                weight.mul_(1.01)
        source.weights_changed()
        after = play(source, jobs, tokenizer, judging=judging, weights=1)
    with EngineSource(changing, tokenizer, max_running=4, memory_gib=0.05) as fresh:
        assert without_jobs(after) == without_jobs(play(fresh, jobs, tokenizer, judging=judging))
    assert {sample.weights for sample in after} == {1}
