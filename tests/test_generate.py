"""The `generate` command on a small untrained model: what it prints, every option, and what it refuses."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from longreach.checkpoint.save import save_model
from longreach.engine.engine import Engine
from longreach.generate import Stopwatch, counted_seed
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.tokenizer.bpe import Tokenizer

CONTEXT = 48
PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["def add(a, b):\n    return a + b\n" * 20], vocab_size=400)


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig.preset("tiny").replace(vocab_size=400, max_position_embeddings=CONTEXT, arithmetic="invariant")
    return Transformer(config, seed=1).eval()


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    save_model(model, run / "model", tokenizer=tokenizer)
    return run


@pytest.fixture
def record(longreach_command, saved):
    """Run `longreach generate RUN ARGS… --json` and read its object."""

    def run(*arguments: object) -> dict:
        options = ("--json", "--arithmetic", "invariant", "--threads", 1, "--memory-gib", 0.05)
        result = longreach_command("generate", saved, *arguments, *options)
        assert result.code == 0, result.err
        return json.loads(result.out.splitlines()[-1])

    return run


# ---- the text -------------------------------------------------------------------------------------------------------


def test_stdout_is_the_continuation_and_json_tells_the_same(longreach_command, saved):
    plain = longreach_command("generate", saved, "def add", "--max-tokens", 10, "--seed", 4)
    assert plain.code == 0
    assert "def add" in plain.err
    assert "tokens/s" in plain.err
    result = longreach_command("generate", saved / "model", "def add", "--max-tokens", 10, "--seed", 4, "--json")
    record = json.loads(result.out.splitlines()[-1])
    assert record["text"] + "\n" == plain.out
    assert record["tokens"] <= 10
    assert record["finish_reason"] in ("stop", "length")
    assert record["seed"] == 4
    assert record["others"] == []


def test_the_banner_says_what_was_decided(longreach_command, saved, tmp_path):
    from longreach.native import status

    options = ["--disk-cache", tmp_path, "--speculation", "lookup", "--draft-tokens", 2, "--device", "cpu"]
    said = longreach_command("generate", saved, "def", "--max-tokens", 1, *options).err.splitlines()
    disk, first, second = said[:3]
    assert disk.startswith(f"disk cache {tmp_path}: own records: 0")
    assert first.startswith(f"{saved}: float32 on cpu (asked for), threads: ")
    assert second == (
        f"fast arithmetic; compiled decoding: {status()}; cache: float32 in memory and {tmp_path}; "
        "speculation: lookup, 2 tokens at a time"
    )


def test_every_token_is_the_likeliest_of_a_full_pass_at_temperature_zero(record, model, tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    found = record(PROMPT, "--max-tokens", 8, "--temperature", 0, "--logprobs", 2)
    assert found["prompt_tokens"] == len(ids)
    assert len(found["logprobs"]) == found["tokens"] == 8
    for token in found["logprobs"]:
        with torch.no_grad():
            logprobs_V = model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].log_softmax(-1)
        best = logprobs_V.topk(2)
        assert token["token_id"] == int(best.indices[0])
        assert token["logprob"] == pytest.approx(float(best.values[0]), abs=1e-4)
        assert [other["token_id"] for other in token["top"]] == best.indices.tolist()
        assert token["token"] == tokenizer.decode([token["token_id"]])
        ids.append(token["token_id"])
    assert found["text"] == tokenizer.decode(ids[-8:])


def test_log_probabilities_are_listed_below_the_text(longreach_command, saved):
    result = longreach_command("generate", saved, PROMPT, "--max-tokens", 4, "--logprobs", 1, "--temperature", 0)
    lines = re.findall(r"^\S.* +(-\d+\.\d{3})   likeliest: \S.* (-\d+\.\d{3})$", result.err, flags=re.MULTILINE)
    assert len(lines) == 4
    assert all(own == best for own, best in lines)


def test_the_seed_decides_the_text(record):
    def text(seed: int) -> str:
        return record("def", "--max-tokens", 16, "--temperature", 1.5, "--top-p", 1, "--seed", seed)["text"]

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_generation_stops_where_the_context_is_full(record):
    found = record(PROMPT, "--max-tokens", 1000, "--temperature", 0)
    assert found["finish_reason"] == "length"
    assert found["prompt_tokens"] + found["tokens"] == CONTEXT


def test_a_special_token_spelled_in_the_prompt_is_text(record, tokenizer):
    assert record("a<think>", "--max-tokens", 1)["prompt_tokens"] == 1 + len(tokenizer.encode("a<think>"))


@pytest.mark.parametrize("name", ["top-k", "top-p", "min-p"])
def test_leaving_out_all_but_the_likeliest_token_is_greedy(record, name):
    greedy = record(PROMPT, "--max-tokens", 8, "--temperature", 0)["text"]
    value = {"top-k": 1, "top-p": 1e-9, "min-p": 1}[name]
    assert record(PROMPT, "--max-tokens", 8, "--temperature", 2, f"--{name}", value)["text"] == greedy
    assert record(PROMPT, "--max-tokens", 8, "--temperature", 2)["text"] != greedy


@pytest.mark.parametrize("name", ["repetition-penalty", "frequency-penalty", "presence-penalty"])
def test_penalties_change_a_text_that_repeats_itself(record, name):
    options = ("a a a a a a a a", "--max-tokens", 20, "--temperature", 0, "--logprobs", 0)
    without = [token["token_id"] for token in record(*options)["logprobs"]]
    assert len(set(without)) < 20
    assert [token["token_id"] for token in record(*options, f"--{name}", 2)["logprobs"]] != without


def test_the_text_ends_before_the_first_stop_string(record):
    whole = record(PROMPT, "--max-tokens", 12)["text"]
    first, second = whole[6:8], whole[3:5]
    found = record(PROMPT, "--max-tokens", 12, "--stop", first, "--stop", second)
    ends = {stop: whole.index(stop) for stop in (first, second)}
    stop = min(ends, key=lambda text: ends[text] + len(text))
    assert (found["text"], found["finish_reason"], found["stop_reason"]) == (whole[: ends[stop]], "stop", stop)


def test_a_dash_reads_the_prompt_from_standard_input(longreach_command, saved, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def add")))
    piped = longreach_command("generate", saved, "-", "--max-tokens", 5)
    assert piped.out == longreach_command("generate", saved, "def add", "--max-tokens", 5).out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert "standard input is not UTF-8: byte at offset 3" in longreach_command("generate", saved, "-").err


# ---- a form ---------------------------------------------------------------------------------------------------------


def test_a_regex_a_choice_and_a_schema_bind_the_text(record, tmp_path):
    pytest.importorskip("llguidance")
    assert re.fullmatch(r"[ab]{3}-\d\d", record("x", "--regex", r"[ab]{3}-\d\d")["text"])
    assert record("x", "--choice", "return", "--choice", "def")["text"] in ("return", "def")
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    schema["x-guidance"] = {"whitespace_flexible": False}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    assert json.loads(record("x", "--json-schema", tmp_path / "schema.json")["text"]) in ({"n": 1}, {"n": 2})


def test_a_form_that_cannot_be_used_is_refused(longreach_command, saved, tmp_path):
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_bytes(b"\xff")
    for arguments, expected in (
        (["--regex", "a", "--choice", "b"], "exactly one of"),
        (["--regex", "("], "regex cannot be used"),
        (["--json-schema", tmp_path / "absent.json"], "absent.json cannot be read: No such file"),
        (["--json-schema", tmp_path / "schema.json"], "schema.json is not UTF-8: byte at offset 0"),
    ):
        result = longreach_command("generate", saved, "x", *arguments)
        assert (result.code, result.out) == (2, "")
        assert expected in result.err.splitlines()[-1]


# ---- several at once, guessing, caches ------------------------------------------------------------------------------


def test_continuations_at_once_are_those_of_the_counted_seeds(record):
    together = record(PROMPT, "--max-tokens", 8, "--seed", 5, "--n", 3)
    alone = [record(PROMPT, "--max-tokens", 8, "--seed", seed) for seed in (5, 6, 7)]
    assert [r["text"] for r in (together, *together["others"])] == [r["text"] for r in alone]
    assert [r["seed"] for r in (together, *together["others"])] == [5, 6, 7]


def test_only_the_first_continuation_reads_the_prompt(record):
    found = record(PROMPT, "--max-tokens", 4, "--n", 3)
    assert found["cached_tokens"] == 0
    assert [other["cached_tokens"] for other in found["others"]] == [found["prompt_tokens"] - 1] * 2


def test_continuations_follow_each_other_on_stdout(longreach_command, saved, record):
    options = (PROMPT, "--n", 18, "--max-tokens", 6)
    result = longreach_command("generate", saved, *options, "--arithmetic", "invariant", "--threads", 1)
    found = record(*options)
    assert result.out == "".join(answer["text"] + "\n" for answer in (found, *found["others"]))
    assert "18 of 18:" in result.err


@pytest.mark.parametrize("way", ["lookup", "mtp"])
def test_speculation_changes_no_text_and_reports_what_was_right(record, way):
    # Rewarded for tokens it has used, the model repeats itself, so there is something to guess.
    options = (PROMPT, "--max-tokens", 16, "--temperature", 0, "--frequency-penalty", -2, "--presence-penalty", -2)
    plain = record(*options)
    assert plain["acceptance"] is None
    guessed = record(*options, "--speculation", way, "--draft-tokens", 2)
    assert guessed["text"] == plain["text"]
    # An untrained draft block may never be right.
    assert (0 if way == "mtp" else 0.1) <= guessed["acceptance"] <= 1


def test_a_disk_cache_outlives_the_command(record, tmp_path):
    first = record(PROMPT, "--max-tokens", 8, "--disk-cache", tmp_path)
    again = record(PROMPT, "--max-tokens", 8, "--disk-cache", tmp_path)
    assert first["cached_tokens"] == 0
    assert again["cached_tokens"] == again["prompt_tokens"] - 1
    assert again["text"] == first["text"]


# ---- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["RUN", "a + b " * 40], "context of this model is 48"),
        (["absent", "def"], "absent does not exist"),
        (["RUN", "def", "--temperature", "-1"], "temperature -1.0 must be 0 or more"),
        (["RUN", "def", "--temperature", "nan"], "temperature nan must be 0 or more"),
        (["RUN", "def", "--top-p", "2"], "top_p 2.0 must be above 0"),
        (["RUN", "def", "--max-tokens", "0"], "max_tokens 0 must be 1 or more"),
        (["RUN", "def", "--logprobs", "21"], "logprobs 21 must be from 0 to 20"),
        (["RUN", "def", "--stop", ""], "empty string"),
        (["RUN", "def", "--n", "0"], "--n 0 must be 1 or more"),
        (["RUN", "def", "--device", "tpu"], "unknown device 'tpu'"),
        (["RUN", "def", "--threads", "0"], "--threads 0"),
        (["RUN", "def", "--draft-tokens", "0"], "draft_tokens 0"),
        (["RUN", "def", "--memory-gib", "0"], "memory_gib 0"),
        (["RUN", "def", "--speculation", "luck"], "--speculation"),
        (["RUN", "def", "--beams", "5"], "--beams"),
        (["RUN"], "Missing"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(longreach_command, saved, arguments, expected):
    result = longreach_command("generate", *[str(saved) if a == "RUN" else a for a in arguments])
    assert (result.code, result.out) == (2, "")
    last = result.err.splitlines()[-1]
    assert expected in last
    assert "Traceback" not in result.err


def test_a_text_that_the_engine_could_not_finish_is_an_error_after_what_there_is(longreach_command, saved, monkeypatch):
    accept, calls = Engine._accept, []

    def fail_third(self, request, answers, *rest):
        calls.append(0)
        return accept(self, request, answers, *rest) if len(calls) < 3 else self._fail(request, "no more luck")

    monkeypatch.setattr(Engine, "_accept", fail_third)
    result = longreach_command("generate", saved, PROMPT, "--seed", 3)
    assert result.code == 2
    assert result.out.strip("\n") != ""
    assert result.err.splitlines()[-1] == "longreach: the text with seed 3 is unfinished: no more luck"


def test_a_directory_without_a_model_or_a_tokenizer_says_what_is_missing(longreach_command, saved, tmp_path):
    assert "holds no model" in longreach_command("generate", tmp_path, "def").err
    for file in (saved / "model").iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    result = longreach_command("generate", tmp_path, "def")
    assert result.code == 2
    assert "no tokenizer at" in result.err


# ---- the clock and the seeds ----------------------------------------------------------------------------------------


def test_the_speed_is_that_of_the_tokens_after_the_first(monkeypatch):
    clock = iter([10.0, 12.0, 12.5, 13.0])
    monkeypatch.setattr("longreach.generate.time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    assert (watch.first_s, watch.tokens_per_s) == (None, None)
    watch.push(1)
    assert (watch.first_s, watch.tokens_per_s) == (2.0, None)
    watch.push(0)
    watch.push(3)
    watch.push(2)
    assert (watch.tokens, watch.seconds, watch.tokens_per_s) == (6, 3.0, 5.0)
    assert str(watch) == "5.0 tokens/s, first after 2.00 s"


def test_seeds_count_up_and_begin_again_at_the_lowest():
    assert [counted_seed(7, place) for place in range(3)] == [7, 8, 9]
    assert counted_seed(2**63 - 1, 1) == -(2**63)
