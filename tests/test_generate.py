"""Sampling, streaming, and the `generate` command on a small untrained model."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from longreach.checkpoint.save import save_model
from longreach.errors import RequestError
from longreach.generate import PREFILL_CHUNK, sample, stream
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.tokenizer.bpe import Tokenizer

CONTEXT = 48


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["def add(a, b):\n    return a + b\n" * 20], vocab_size=400)


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig.preset("tiny").replace(vocab_size=400, max_position_embeddings=CONTEXT)
    return Transformer(config, seed=1).eval()


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run")
    save_model(model, run / "model", tokenizer=tokenizer)
    return run


# ---- sample ---------------------------------------------------------------------------------------------------------


def test_temperature_zero_takes_the_likeliest_and_the_lowest_of_equals():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 1.0]])
    assert sample(logits, temperature=0, top_p=1).tolist() == [1, 0]


def frequencies(logits: list[float], temperature: float, top_p: float, draws: int = 20_000) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([logits]).expand(draws, -1)
    counts = torch.bincount(sample(rows, temperature, top_p, generator), minlength=len(logits))
    return (counts / draws).tolist()


def test_temperature_one_samples_the_models_own_distribution():
    logits = [math.log(0.5), math.log(0.3), math.log(0.2)]
    assert frequencies(logits, 1.0, 1.0) == pytest.approx([0.5, 0.3, 0.2], abs=0.02)


def test_temperature_divides_the_logits():
    # At temperature 1/2 probabilities are squared and normalised: 0.25, 0.09, 0.04 over 0.38.
    logits = [math.log(0.5), math.log(0.3), math.log(0.2)]
    assert frequencies(logits, 0.5, 1.0) == pytest.approx([0.658, 0.237, 0.105], abs=0.02)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.45, [1, 0, 0]),
        (0.55, [0.625, 0.375, 0]),
        (0.79, [0.625, 0.375, 0]),
        (0.85, [0.5, 0.3, 0.2]),
        (1e-9, [1, 0, 0]),
    ],
)
def test_top_p_keeps_the_smallest_set_of_likeliest_tokens_that_reaches_it(top_p, expected):
    logits = [math.log(0.5), math.log(0.3), math.log(0.2)]
    found = frequencies(logits, 1.0, top_p)
    assert found == pytest.approx(expected, abs=0.02)
    assert [f > 0 for f in found] == [e > 0 for e in expected]


def test_rows_are_drawn_independently_of_their_neighbours_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.0, 50.0], [50.0, 0.0]])
    assert sample(logits, 1.0, 0.9, generator).tolist() == [1, 0]


# ---- stream ---------------------------------------------------------------------------------------------------------


def test_greedy_streaming_equals_a_full_pass_for_every_token(model, tokenizer):
    prompt = "def add(a, b):"
    pieces = list(stream(model, tokenizer, prompt, max_tokens=12, temperature=0))
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    for piece in pieces:
        with torch.no_grad():
            assert piece.token_id == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids.append(piece.token_id)
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids[len(ids) - len(pieces) :])


def test_a_prompt_of_several_prefill_chunks_gives_the_same_text(model, tokenizer, monkeypatch):
    whole = list(stream(model, tokenizer, "return a + b\n" * 2, max_tokens=8, seed=3))
    assert PREFILL_CHUNK > CONTEXT
    monkeypatch.setattr("longreach.generate.PREFILL_CHUNK", 5)
    assert list(stream(model, tokenizer, "return a + b\n" * 2, max_tokens=8, seed=3)) == whole


def test_the_seed_decides_the_text(model, tokenizer):
    def text(seed: int) -> str:
        return "".join(
            p.text for p in stream(model, tokenizer, "def", max_tokens=16, temperature=1.5, top_p=1, seed=seed)
        )

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(5)}) > 1


def test_the_text_ends_with_a_reason(model, tokenizer, monkeypatch):
    pieces = list(stream(model, tokenizer, "def", max_tokens=3))
    assert [piece.finish_reason for piece in pieces] == [None, None, "length"]
    monkeypatch.setattr("longreach.generate.sample", lambda logits, *_: torch.tensor([tokenizer.eos_id]))
    (piece,) = stream(model, tokenizer, "def", max_tokens=3)
    assert piece == (tokenizer.eos_id, "", "stop")


def test_generation_stops_where_the_context_is_full(model, tokenizer):
    prompt = "def add(a, b):"
    prompt_tokens = 1 + len(tokenizer.encode(prompt))
    pieces = list(stream(model, tokenizer, prompt, max_tokens=1000, temperature=0))
    assert prompt_tokens + len(pieces) <= CONTEXT
    if pieces[-1].finish_reason == "length":
        assert prompt_tokens + len(pieces) == CONTEXT


def test_a_special_token_spelled_in_the_prompt_is_text(model, tokenizer, monkeypatch):
    seen = []
    forward = Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, t, **k: seen.append(t) or forward(self, t, **k))
    next(stream(model, tokenizer, "a<think>"))
    assert tokenizer.special_id("<think>") not in seen[0].flatten().tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"temperature": -1.0}, "temperature -1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_an_option_out_of_range_is_refused(model, tokenizer, options, message):
    with pytest.raises(RequestError, match=message):
        next(stream(model, tokenizer, "def", **options))


# ---- the command ----------------------------------------------------------------------------------------------------


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


def test_a_dash_reads_the_prompt_from_standard_input(longreach_command, saved, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def add")))
    piped = longreach_command("generate", saved, "-", "--max-tokens", 5)
    assert piped.out == longreach_command("generate", saved, "def add", "--max-tokens", 5).out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    assert "standard input is not UTF-8: byte at offset 3" in longreach_command("generate", saved, "-").err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["RUN", "a + b " * 40], "context of this model is 48"),
        (["absent", "def"], "absent does not exist"),
        (["RUN", "def", "--temperature", "-1"], "temperature -1 must be 0 or above"),
        (["RUN", "def", "--top-p", "2"], "top_p 2 must be above 0"),
        (["RUN", "def", "--device", "tpu"], "unknown device 'tpu'"),
        (["RUN", "def", "--threads", "0"], "--threads 0"),
        (["RUN", "def", "--top-k", "5"], "--top-k"),
        (["RUN"], "Missing"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(longreach_command, saved, arguments, expected):
    result = longreach_command("generate", *[str(saved) if a == "RUN" else a for a in arguments])
    assert (result.code, result.out) == (2, "")
    last = result.err.splitlines()[-1]
    assert expected in last
    assert "Traceback" not in result.err


def test_a_directory_without_a_model_or_a_tokenizer_says_what_is_missing(longreach_command, saved, tmp_path):
    assert "holds no model" in longreach_command("generate", tmp_path, "def").err
    for file in (saved / "model").iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    result = longreach_command("generate", tmp_path, "def")
    assert result.code == 2
    assert "no tokenizer at" in result.err
