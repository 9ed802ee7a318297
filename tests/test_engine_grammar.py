"""Grammars: whatever the logits, the text has the form that was asked for, and ends only where it may."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from dataclasses import replace

import jsonschema
import pytest
import torch

from longreach.bench.walk import micro
from longreach.engine.llm import LLM
from longreach.engine.sampler import Sampler, SampleRow
from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.errors import RequestError
from longreach.model.transformer import Transformer
from longreach.tokenizer.bpe import SMALLEST_VOCABULARY, Tokenizer
from longreach.tokenizer.special import THINK_END

pytest.importorskip("llguidance", reason="grammars need the extra `grammar`: pip install 'longreach[grammar]'")

from longreach.engine.grammar import MOST_BYTES, Grammar, GrammarState, compile_grammar
from longreach.engine.guide import Guide

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


# ---- an end in time --------------------------------------------------------------------------------------------------

PATTERNS = ["^[a-z]{2,5}$", "^[A-Z]{3}-[0-9]{4}$", "^(foo|barbar)+$", "[0-9]", "^[^ ]{3} end$"]
FORMATS = ["date", "uuid", "ipv4", "email", "date-time"]
ANY = ["red", "green", 'a "quoted"', "é€", 1, 2.5, None, True, ["x", 1], {"k": "v"}]


def random_schema(rng: random.Random, depth: int = 0) -> dict:
    """A schema of what is supported, bounded in depth."""
    leaves = ["string", "pattern", "format", "integer", "number", "boolean", "null", "enum", "const"]
    kind = rng.choice(leaves + ["object", "array", "anyOf"] * (3 if depth < 3 else 0))
    least = rng.randint(-100, 100)
    if kind == "string":
        return {"type": "string", "minLength": (count := rng.randint(0, 5)), "maxLength": count + rng.randint(0, 10)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind == "format":
        return {"type": "string", "format": rng.choice(FORMATS)}
    if kind == "integer":
        ranges = {"minimum": least, "maximum": least + rng.randint(0, 500)}
        return {"type": "integer"} | rng.choice([{}, ranges, {"multipleOf": rng.randint(1, 12)}])
    if kind == "number":
        ranges = {"minimum": least / 4, "maximum": least / 4 + rng.randint(1, 500) / 8}
        return {"type": "number"} | rng.choice([{}, ranges, {"exclusiveMinimum": least / 4}])
    if kind == "enum":
        return {"enum": rng.sample(ANY, rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice(ANY)}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    if kind == "array":
        most = {"maxItems": 3 + rng.randint(0, 4)} if rng.random() < 0.6 else {}
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": rng.randint(0, 3)} | most
    if kind == "object":
        names = rng.sample(["a", "name", "long name", "x_1", "ü", 'with "q"'], rng.randint(0, 4))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth + 1) for name in names},
            "required": [name for name in names if rng.random() < 0.6],
            "additionalProperties": rng.choice([False, True, {"type": "integer"}]),
        }
    return {"type": kind}


def guided(tokenizer: Tokenizer, params: SamplingParams, seed: int, scale: float = 3.0) -> list[int]:
    """The tokens of random logits, drawn as the engine draws them."""
    guide, sampler = Guide(params, [tokenizer.eos_id], tokenizer.vocab_size), Sampler([tokenizer.eos_id])
    generator, ids = torch.Generator().manual_seed(seed), []
    for position in range(params.max_tokens):
        logits = torch.randn(1, tokenizer.vocab_size, generator=generator) * scale
        row = SampleRow(params, seed, position, mask=guide.mask())
        [drawn] = sampler.sample(logits, [row])
        while not guide.take(drawn.token_id, params.max_tokens - position - 1):
            row = row._replace(mask=guide.narrow(row.mask))
            [drawn] = sampler.sample(logits, [row])
        assert drawn.error is None
        ids.append(drawn.token_id)
        if drawn.token_id == tokenizer.eos_id or guide.is_finished:
            return ids
    pytest.fail(f"no end within {params.max_tokens} tokens: {tokenizer.decode(ids)!r}")


def said(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(index for index in ids if index != tokenizer.eos_id)


def test_five_hundred_random_schemas_are_met_within_whatever_tokens_there_are(tokenizer):
    rng = random.Random(5)
    for number in range(500):
        schema = random_schema(rng)
        grammar = compile_grammar(tokenizer, json_schema=schema)
        room = len(grammar.shortest) + rng.choice([0, 0, 1, 2, 5, 20, 60])
        thinks = rng.random() < 0.3
        think_end = tokenizer.special_id(THINK_END)
        params = SamplingParams(max_tokens=room + thinks, grammar=grammar, after=think_end if thinks else None)
        ids = guided(tokenizer, params, number, scale=rng.choice([0.5, 3.0, 8.0]))
        if thinks:
            ids = ids[ids.index(think_end) + 1 :]
        jsonschema.validate(json.loads(said(tokenizer, ids)), schema)


HARD_TO_END = [
    dict(regex="[a-z]{40,}x"),
    dict(regex="(?s:.*)END"),
    dict(regex="(a|b)*c{3}"),
    dict(regex=".*(ab|cd){3}"),
    dict(lark='start: "(" start ")" | "x"'),
    dict(choice=["yes", "yes and no", "a long one, " * 9]),
    dict(json_schema={"type": "object"}),
    dict(json_schema={}),
    dict(json_schema={"type": "array", "items": {"type": "integer"}, "minItems": 300}),
    dict(json_schema={"type": "string", "minLength": 100}),
    dict(json_schema={"type": "integer", "minimum": 1000, "multipleOf": 97}),
    dict(json_schema={"enum": ["short", "x" * 500]}),
    dict(json_schema={"type": "array", "items": {"enum": [1, "x" * 500]}}),
    dict(
        json_schema={
            "$ref": "#/$defs/tree",
            "$defs": {
                "tree": {
                    "type": "object",
                    "properties": {"value": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
                    "required": ["value", "kids"],
                    "additionalProperties": False,
                }
            },
        }
    ),
]  # fmt: skip


@pytest.mark.parametrize("spare", [0, 1, 7, 40])
@pytest.mark.parametrize("form", HARD_TO_END, ids=lambda form: str(form)[:40])
def test_a_text_ends_in_time_however_much_a_token_opens(tokenizer, form, spare):
    grammar = compile_grammar(tokenizer, **form)
    for seed in range(3):
        params = SamplingParams(max_tokens=len(grammar.shortest) + spare, grammar=grammar)
        ids = guided(tokenizer, params, seed)
        state = grammar.start()
        assert all(state.advance(token) for token in ids)
        assert state.is_finished


@pytest.mark.parametrize("form", HARD_TO_END, ids=lambda form: str(form)[:40])
def test_a_closing_completes_the_text_from_anywhere(tokenizer, form):
    state = compile_grammar(tokenizer, **form).start()
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        choices = sorted(allowed(state, tokenizer.vocab_size) - {tokenizer.eos_id})
        if not choices:
            break
        assert state.advance(choices[int(torch.randint(len(choices), (), generator=generator))])
        closing = state.closing(2000)
        assert closing is not None
        end = state.copy()
        assert all(end.advance(token) for token in closing)
        assert end.is_finished


def test_white_space_in_json_has_an_end_unless_it_is_asked_for(tokenizer):
    schema = {"type": "array", "items": {"type": "integer"}}
    for text, fits in (("[1, 2]", True), ("[1,2]", True), ("[1,  2]", False), ("[ 1]", False), ("[1\n]", False)):
        for free in (False, True):
            form = schema | {"x-guidance": {"whitespace_flexible": True}} if free else schema
            state = compile_grammar(tokenizer, json_schema=form).start()
            taken = all(state.advance(tokenizer.token_bytes.index(bytes([byte]))) for byte in text.encode())
            assert taken == (fits or free), (text, free)


def deep(count: int) -> str:
    return '{"type":"array","items":' * count + "{}" + "}" * count


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (dict(json_schema=json.dumps({"enum": ["x" * 9] * 90_000})), "bytes is too large, at most"),
        (dict(json_schema={"properties": {f"p{i}": {"type": "string"} for i in range(30_000)}}), "is too large|more than"),
        (dict(json_schema=deep(10_000)), "nested more than 64 deep"),
        (dict(json_schema=deep(70)), "nested more than 64 deep"),
        (dict(json_schema={"type": "integer", "multipleOf": 1_000_003}), "multipleOf of 1000003 in all, at most 20000"),
        (dict(json_schema={"type": "array", "items": {"type": "integer"}, "minItems": 10**9}), "no text that ends within"),
        (dict(json_schema={"type": "string", "minLength": 10**9}), "no text that ends within|cannot be used"),
        (dict(json_schema={"$ref": "#"}), "allows no text"),
        (dict(json_schema={"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}), "no text"),
        (dict(json_schema={"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}), "no text that ends"),
        (dict(regex="(" * 5000 + "a" + ")" * 5000), "5000 brackets inside each other, at most 64"),
        (dict(regex="a?" * 200_000), f"regex of 400000 bytes is too large, at most {MOST_BYTES}"),
        (dict(choice=["x" * 300_000]), "choice of 300000 bytes is too large"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_hostile_grammar_is_refused_soon_and_in_one_line(tokenizer, form, message):
    began = time.perf_counter()
    with pytest.raises(RequestError, match=message) as caught:
        compile_grammar(tokenizer, **form)
    assert time.perf_counter() - began < 20, "seconds; about one on an idle core"
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "pattern", ["(a{1,1000}){1,1000}", "(a|aa|b)*[ab]{200}(a+)+", "[ab]*a[ab]{20}c", r"(\w|\d)*a(\w|\s){300}c"]
)
def test_a_pattern_that_looks_catastrophic_is_followed_or_ends_its_own_request(tokenizer, pattern):
    began = time.perf_counter()
    grammar = compile_grammar(tokenizer, regex=pattern)
    params, end = SamplingParams(max_tokens=len(grammar.shortest) + 5, grammar=grammar), ""
    try:
        assert guided(tokenizer, params, 0)
    except RequestError as error:
        end = str(error)
    assert end == "" or end.startswith("the grammar cannot be followed any further: ")
    assert time.perf_counter() - began < 20, "seconds; well under one on an idle core"


def test_the_same_grammar_is_compiled_once(tokenizer):
    first = compile_grammar(tokenizer, json_schema=SCHEMA)
    assert compile_grammar(tokenizer, json_schema=json.loads(json.dumps(SCHEMA))) is first
    assert compile_grammar(tokenizer, regex="a") is not first


def test_many_choices_are_no_more_than_a_few(tokenizer):
    names = [f"value{number * 7919 % 100_003}" for number in range(5000)]
    assert generate(tokenizer, compile_grammar(tokenizer, choice=names), 3) in names


# ---- in the engine ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tokenizer) -> Transformer:
    return Transformer(replace(micro("invariant"), vocab_size=tokenizer.vocab_size), seed=3).eval()


def test_the_engine_meets_schemas_within_the_tokens_left_with_and_without_guessing(tokenizer, model):
    rng, params, schemas = random.Random(2), [], []
    think_end = tokenizer.special_id(THINK_END)
    for number in range(24):
        schema = random_schema(rng, depth=1)
        grammar = compile_grammar(tokenizer, json_schema=schema)
        thinks = number % 3 == 0
        room = len(grammar.shortest) + thinks + rng.choice([0, 2, 9, 30])
        params.append(
            SamplingParams(
                max_tokens=room, grammar=grammar, after=think_end if thinks else None, seed=number, logprobs=2,
                temperature=rng.choice([0.0, 1.0, 3.0]), frequency_penalty=rng.choice([0.0, 0.7]),
                repetition_penalty=rng.choice([1.0, 1.3]),
            )
        )  # fmt: skip
        schemas.append(schema)
    prompts = ['{"name": "red", "count": 12} '] * len(params)
    answers = {}
    for speculation in ("off", "lookup", "mtp"):
        with LLM(model, tokenizer=tokenizer, memory_gib=0.05, max_running=8, speculation=speculation) as served:
            answers[speculation] = served.generate(prompts, params)
    for answer, param, schema in zip(answers["off"], params, schemas, strict=True):
        assert answer.finish_reason is FinishReason.STOP
        ids = answer.token_ids
        if param.after is not None:
            ids = ids[ids.index(think_end) + 1 :]
        jsonschema.validate(json.loads(said(tokenizer, ids)), schema)
    for speculation in ("lookup", "mtp"):
        for answer, plain in zip(answers[speculation], answers["off"], strict=True):
            assert answer.token_ids == plain.token_ids
            assert answer.logprobs == plain.logprobs


def test_a_grammar_that_cannot_be_completed_in_the_tokens_left_is_refused_with_their_number(tokenizer, model):
    grammar = compile_grammar(tokenizer, regex="[0-9]{12}")
    mark = tokenizer.special_id(THINK_END)
    with LLM(model, tokenizer=tokenizer, memory_gib=0.05) as served:
        for after, needed in ((None, 12), (mark, 13)):
            with pytest.raises(
                RequestError, match=f"takes {needed} tokens.* leave {needed - 1}; allow at least {needed}"
            ):
                served.generate("a", SamplingParams(max_tokens=needed - 1, grammar=grammar, after=after))
            [answer] = served.generate("a", SamplingParams(max_tokens=needed, grammar=grammar, after=after))
            assert answer.finish_reason is FinishReason.STOP
        full = [5] * (model.config.max_position_embeddings - 11)
        with pytest.raises(RequestError, match="leave 11"):
            served.generate(full, SamplingParams(max_tokens=500, grammar=grammar))


def test_thinking_is_free_of_the_grammar_but_not_of_its_end(tokenizer, model):
    grammar = compile_grammar(tokenizer, regex="(yes|no)")
    mark = tokenizer.special_id(THINK_END)
    with LLM(model, tokenizer=tokenizer, memory_gib=0.05) as served:
        bias = {tokenizer.eos_id: 100.0}
        params = SamplingParams(max_tokens=40, grammar=grammar, after=mark, seed=1, logit_bias=bias | {mark: -100.0})
        [answer] = served.generate("a", params)
        at = answer.token_ids.index(mark)
        assert at >= 30, "with the mark all but forbidden, thinking lasts as long as it may"
        assert tokenizer.eos_id not in answer.token_ids[:at]
        assert said(tokenizer, answer.token_ids[at + 1 :]) in ("yes", "no")
        [answer] = served.generate("a", replace(params, logit_bias={mark: 100.0}))
        assert answer.token_ids[0] == mark
        assert said(tokenizer, answer.token_ids[1:]) in ("yes", "no")


@pytest.mark.parametrize("speculation", ["off", "lookup"])
def test_penalties_wait_for_the_mark_and_count_only_what_follows(tokenizer, model, speculation):
    mark = tokenizer.special_id(THINK_END)
    free = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    with LLM(model, tokenizer=tokenizer, memory_gib=0.05, speculation=speculation) as served:
        [plain] = served.generate("red red ", free)
        loop = plain.token_ids
        never = replace(free, after=mark, frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=2.0)
        assert mark not in loop, "this seed of the model never ends its thinking"
        assert served.generate("red red ", never)[0].token_ids == loop
        # As soon as the mark has come, the answer is that of a prompt which ends with the mark.
        prompt = [tokenizer.bos_id, *tokenizer.encode("red red "), mark]
        penalised = replace(free, max_tokens=20, frequency_penalty=2.0, presence_penalty=2.0)
        [behind] = served.generate(prompt, penalised)
        forced = replace(penalised, max_tokens=21, after=mark, logit_bias={mark: 100.0})
        [both] = served.generate(prompt[:-1], replace(forced, max_tokens=1))
        assert both.token_ids == [mark]
        free_behind = served.generate(prompt, replace(free, max_tokens=20))[0].token_ids
        assert behind.token_ids != free_behind, "penalties change this text"


def test_a_mark_that_is_a_stop_token_is_refused(tokenizer):
    with pytest.raises(RequestError, match="after names token 7, which is a stop token"):
        SamplingParams(after=7, stop_token_ids=(7,)).check(tokenizer.vocab_size)
