"""Grammars: whatever the logits, the text has the form that was asked for, and ends only where it may."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

from longreach.engine.sampler import Sampler, SampleRow
from longreach.engine.sampling import SamplingParams
from longreach.errors import RequestError
from longreach.tokenizer.bpe import SMALLEST_VOCABULARY, Tokenizer

pytest.importorskip("llguidance", reason="grammars need the extra `grammar`: pip install 'longreach[grammar]'")

from longreach.engine.grammar import Grammar, GrammarState, compile_grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "colour": {"enum": ["red", "grün", "青"]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "count", "colour"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = '{"name": "colour", "count": 12, "flags": [true, false], "grün": "青"} 2024-11-24 yes no maybe é€😀 red '
    return Tokenizer.train([words * 20], SMALLEST_VOCABULARY + 120)


def generate(tokenizer: Tokenizer, grammar: Grammar, seed: int, **options) -> str:
    """A text of random logits under the grammar; the end mark must come by itself."""
    params, sampler, state = SamplingParams(grammar=grammar, **options), Sampler([tokenizer.eos_id]), grammar.start()
    params.check(tokenizer.vocab_size)
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for position in range(400):
        logits = torch.randn(1, tokenizer.vocab_size, generator=generator) * 3
        [sampled] = sampler.sample(logits, [SampleRow(params, seed, position, mask=state.mask())])
        assert sampled.error is None
        assert state.advance(sampled.token_id)
        if sampled.token_id == tokenizer.eos_id:
            return tokenizer.decode(ids)
        ids.append(sampled.token_id)
    pytest.fail(f"no end after {tokenizer.decode(ids)!r}")


def allowed(state: GrammarState, vocab_size: int) -> set[int]:
    mask = state.mask()
    return set(range(vocab_size)) if mask is None else set(mask.nonzero()[:, 0].tolist())


def push(tokenizer: Tokenizer, state: GrammarState, text: str) -> None:
    """Advance one byte per token."""
    for byte in text.encode():
        assert state.advance(tokenizer.token_bytes.index(bytes([byte]))), text


OPTIONS = [dict(temperature=0), dict(), dict(temperature=2.0, top_p=0.9), dict(top_k=3)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "pattern",
    [r"[0-9]{4}-[0-9]{2}-[0-9]{2}", r"(yes|no|maybe)( and (yes|no)){0,3}", r"é?[€a-c]{1,5}/[^\n]", r"", r"x\ny"],
)
def test_every_text_matches_the_regular_expression(tokenizer, pattern, options):
    grammar = compile_grammar(tokenizer, regex=pattern)
    for seed in range(8):
        text = generate(tokenizer, grammar, seed, **options)
        assert re.fullmatch(pattern, text, flags=re.ASCII), text


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)], ids=["mapping", "text"])
def test_every_text_is_json_that_the_schema_accepts(tokenizer, schema, options):
    grammar = compile_grammar(tokenizer, json_schema=schema)
    for seed in range(8):
        value = json.loads(generate(tokenizer, grammar, seed, **options))
        assert set(value) - {"flags"} == {"name", "count", "colour"}
        assert isinstance(value["name"], str)
        assert len(value["name"]) <= 6
        assert type(value["count"]) is int
        assert 0 <= value["count"] <= 99
        assert value["colour"] in ("red", "grün", "青")
        flags = value.get("flags", [])
        assert len(flags) <= 3
        assert all(type(flag) is bool for flag in flags)


def test_every_choice_can_be_drawn_and_nothing_else(tokenizer):
    choices = ["yes", "no", 'a "quoted" \\ one', "two\nlines", "é€😀", "yes and no"]
    grammar = compile_grammar(tokenizer, choice=choices)
    drawn = {generate(tokenizer, grammar, seed, temperature=3.0) for seed in range(120)}
    assert drawn == set(choices)


def test_rules_may_call_themselves(tokenizer):
    grammar = compile_grammar(tokenizer, lark='start: "(" start ")" | "x"')
    for seed in range(10):
        assert re.fullmatch(r"(\(*)x(\)*)", text := generate(tokenizer, grammar, seed))
        assert text.count("(") == text.count(")")


@pytest.mark.parametrize("text", ["", "1", "12", "123", "1234"])
def test_the_end_mark_is_allowed_exactly_where_the_text_may_end(tokenizer, text):
    state = compile_grammar(tokenizer, regex="([0-9]{2,4})?").start()
    push(tokenizer, state, text)
    may_end = len(text) in (0, 2, 3, 4)
    assert (tokenizer.eos_id in allowed(state, tokenizer.vocab_size)) == may_end
    assert state.is_finished == (len(text) == 4)
    assert state.copy().advance(tokenizer.eos_id) == may_end


def test_special_tokens_are_never_part_of_a_text(tokenizer):
    state = compile_grammar(tokenizer, regex=r"(.|\n)*").start()
    got = allowed(state, tokenizer.vocab_size)
    special = set(tokenizer.special_ids.values())
    assert got & special == {tokenizer.eos_id}
    assert {index for index, spelling in enumerate(tokenizer.token_bytes) if spelling.isascii()} - special <= got


def test_a_mask_is_what_advance_accepts(tokenizer):
    state = compile_grammar(tokenizer, json_schema=SCHEMA).start()
    push(tokenizer, state, '{"name":"a')
    accepted = {index for index in range(tokenizer.vocab_size) if state.copy().advance(index)}
    assert allowed(state, tokenizer.vocab_size) == accepted
    assert len(accepted) > 20


def test_a_refused_token_changes_nothing(tokenizer):
    state = compile_grammar(tokenizer, regex="[0-9]{3}").start()
    push(tokenizer, state, "1")
    before = allowed(state, tokenizer.vocab_size)
    for token_id in (tokenizer.token_bytes.index(b"a"), tokenizer.eos_id, tokenizer.bos_id, -1, tokenizer.vocab_size):
        assert not state.advance(token_id)
    assert allowed(state, tokenizer.vocab_size) == before
    push(tokenizer, state, "23")
    assert state.is_finished


def test_rolling_back_a_random_walk_gives_the_earlier_masks(tokenizer):
    grammar = compile_grammar(tokenizer, json_schema=SCHEMA)
    state, masks, ids = grammar.start(), [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        mask = allowed(state, tokenizer.vocab_size)
        assert len(masks) == len(ids)
        if ids and (ids[-1] == tokenizer.eos_id or torch.rand((), generator=generator) < 0.4):
            count = int(torch.randint(1, len(ids) + 1, (), generator=generator))
            state.rollback(count)
            expected = masks[len(ids) - count]
            del ids[len(ids) - count :], masks[len(masks) - count :]
            assert allowed(state, tokenizer.vocab_size) == expected
            continue
        choices = sorted(mask)
        token_id = choices[int(torch.randint(len(choices), (), generator=generator))]
        masks.append(mask)
        ids.append(token_id)
        assert state.advance(token_id)


def test_rolling_back_over_the_end_mark_opens_the_text_again(tokenizer):
    state = compile_grammar(tokenizer, regex="[0-9]{2,3}").start()
    push(tokenizer, state, "12")
    before = allowed(state, tokenizer.vocab_size)
    assert state.advance(tokenizer.eos_id)
    assert state.is_finished
    assert allowed(state, tokenizer.vocab_size) == {tokenizer.eos_id}
    assert not state.advance(tokenizer.eos_id)
    state.rollback(1)
    assert not state.is_finished
    assert allowed(state, tokenizer.vocab_size) == before
    assert state.advance(tokenizer.eos_id)
    state.rollback(3)
    assert allowed(state, tokenizer.vocab_size) == allowed(
        compile_grammar(tokenizer, regex="[0-9]{2,3}").start(), tokenizer.vocab_size
    )


def test_copies_and_requests_go_their_own_ways(tokenizer):
    grammar = compile_grammar(tokenizer, regex="a{1,2}|b{3}")
    first, second = grammar.start(), grammar.start()
    push(tokenizer, first, "a")
    push(tokenizer, second, "b")
    twin = first.copy()
    push(tokenizer, twin, "a")
    assert twin.is_finished
    assert not first.is_finished
    push(tokenizer, second, "bb")
    assert second.is_finished


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (dict(), "exactly one of regex, json_schema, choice, lark, not none"),
        (dict(regex="a", choice=["b"]), "not regex and choice"),
        (dict(regex="("), "regex cannot be used: .*unclosed group"),
        (dict(regex="(?=a)b"), "regex cannot be used: .*look-around"),
        (dict(regex=r"[^\x00-\U0010ffff]"), "regex allows no text at all"),
        (dict(regex=3), "regex must be a string"),
        (dict(json_schema={"type": "nope"}), "json_schema cannot be used: Invalid type: nope"),
        (dict(json_schema={"allOf": [{"type": "string"}, {"type": "integer"}]}), "Unsatisfiable schema"),
        (dict(json_schema='{"type":'), "json_schema is not JSON"),
        (dict(json_schema={"a": {1}}), "json_schema is not JSON"),
        (dict(json_schema="[1]"), "must be a JSON object"),
        (dict(json_schema=3), "json_schema must be an object or its JSON text"),
        (dict(choice=[]), "choice must be a list of one string or more"),
        (dict(choice="yes"), "choice must be a list of one string or more"),
        (dict(choice=["yes", 1]), "choice must be a list of one string or more"),
        (dict(lark="start: unknown"), "lark cannot be used: .*unknown name"),
        (dict(lark='begin: "a"'), "lark cannot be used: no start rule found"),
    ],
)
def test_an_impossible_grammar_is_refused_in_one_line(tokenizer, form, message):
    with pytest.raises(RequestError, match=message) as caught:
        compile_grammar(tokenizer, **form)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_grammar_of_another_vocabulary_is_refused(tokenizer):
    grammar = compile_grammar(tokenizer, regex="a")
    with pytest.raises(RequestError, match=f"compiled for {tokenizer.vocab_size} tokens, this model has 4096"):
        SamplingParams(grammar=grammar).check(4096)


def test_without_the_library_the_error_names_the_extra():
    program = """
import sys
sys.modules["llguidance"] = None
from longreach.engine.grammar import compile_grammar
from longreach.errors import RequestError
from longreach.tokenizer.bpe import SMALLEST_VOCABULARY, Tokenizer
try:
    compile_grammar(Tokenizer.train(["ab"], SMALLEST_VOCABULARY), regex="a")
except RequestError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == ("regex needs the library llguidance: pip install 'longreach[grammar]', or leave regex out\n")
