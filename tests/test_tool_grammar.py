"""Tool calls under a grammar: V4's layout, arguments the schema accepts, and no way to forge a tag."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from longreach.chat.messages import AnswerFormat, Tool
from longreach.engine.grammar import Grammar
from longreach.engine.guide import Guide
from longreach.engine.sampler import Sampler, SampleRow
from longreach.engine.sampling import SamplingParams
from longreach.errors import RequestError
from longreach.server.tool_grammar import answer_grammar, strict_schema
from longreach.tokenizer.bpe import SMALLEST_VOCABULARY, Tokenizer
from longreach.tokenizer.special import DSML

VECTORS = Path(__file__).parent.parent.parent / "shared" / "fixtures" / "chat_encoding" / "tool_grammar"
OPEN, CLOSE = f"\n\n<{DSML}tool_calls>\n", f"</{DSML}tool_calls>"


def tool(name: str, properties: dict[str, Any], strict: bool = True, **more) -> Tool:
    schema = {"type": "object", "properties": properties, "required": list(properties), **more}
    return Tool({"name": name, "parameters": schema}, strict=strict)


WEATHER = tool("get_weather", {"location": {"type": "string"}})
ADD = tool(
    "add", {"y": {"type": "number"}, "x": {"type": "number"}, "items": {"type": "array", "items": {"type": "string"}}}
)
ANSWER = AnswerFormat(
    "json_schema",
    schema={"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]},
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = 'The weather in Paris is {"name": "red", "n": [1, 2]}. I will call the tools now.\n\n <parameter name="x"> '
    return Tokenizer.train([words * 20], SMALLEST_VOCABULARY + 100)


def accepts(tokenizer: Tokenizer, grammar: Grammar, text: str) -> bool:
    """Whether this is a whole text of the grammar, special tokens spelled out."""
    state = grammar.start()
    return all(state.advance(token) for token in tokenizer.encode(text, allow_special=True)) and state.advance(
        tokenizer.eos_id
    )


def drawn(tokenizer: Tokenizer, grammar: Grammar, seed: int, spare: int, bias: float = 0.0) -> list[int]:
    """The tokens of random logits; `bias` is added to ｜DSML｜."""
    params = SamplingParams(max_tokens=len(grammar.shortest) + spare, grammar=grammar)
    guide, sampler = Guide(params, [tokenizer.eos_id], tokenizer.vocab_size), Sampler([tokenizer.eos_id])
    generator, ids = torch.Generator().manual_seed(seed), []
    while not guide.is_finished:
        logits = torch.randn(1, tokenizer.vocab_size, generator=generator) * 3
        logits[0, tokenizer.special_id(DSML)] += bias
        row = SampleRow(params, seed, len(ids), mask=guide.mask())
        [sampled] = sampler.sample(logits, [row])
        while not guide.take(sampled.token_id, params.max_tokens - len(ids) - 1):
            row = row._replace(mask=guide.narrow(row.mask))
            [sampled] = sampler.sample(logits, [row])
        assert sampled.error is None
        ids.append(sampled.token_id)
    assert len(ids) <= params.max_tokens
    return [token for token in ids if token != tokenizer.eos_id]


def calls_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """An independent reading of a block: names and arguments."""
    assert text.startswith(OPEN)
    assert text.endswith(CLOSE)
    calls, block = [], text[len(OPEN) : -len(CLOSE)]
    while block:
        call = re.match(rf'<{DSML}invoke name="([^"]*)">\n(.*?)</{DSML}invoke>\n', block, re.DOTALL)
        assert call, block
        block, body, arguments = block[call.end() :], call[2], {}
        while body:
            line = re.match(
                rf'<{DSML}parameter name="([^"]*)" string="(true|false)">(.*?)</{DSML}parameter>\n', body, re.DOTALL
            )
            assert line, body
            body = body[line.end() :]
            arguments[line[1]] = line[3] if line[2] == "true" else json.loads(line[3])
        calls.append((call[1], arguments))
    return calls


# ---- the layout ------------------------------------------------------------------------------------------------------


def vector_cases() -> list[tuple[str, str]]:
    if not VECTORS.is_dir():
        return []
    grammars = json.loads((VECTORS / "DeepSeek-V4-Flash.json").read_text(encoding="utf-8"))["grammars"]
    return [
        (name, g["completion"].split("</think>")[1]) for item in grammars for name, g in item["generations"].items()
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "auto": dict(answer=None, choice="auto"),
    "required": dict(answer=None, choice="required"),
    "named": dict(answer=None, choice="named", name="get_weather"),
    "none_schema": dict(answer=ANSWER, choice="none"),
    "auto_schema_content": dict(answer=ANSWER, choice="auto"),
    "auto_schema_calls": dict(answer=ANSWER, choice="auto"),
}


@pytest.mark.skipif(not VECTORS.is_dir(), reason="the shared chat fixtures are not beside this checkout")
def test_the_published_completions_are_accepted_and_none_of_their_mutations(tokenizer):
    cases = vector_cases()
    assert {name for name, _ in cases} == set(OPTIONS)
    for name, text in cases:
        grammar = answer_grammar(tokenizer, tools=[WEATHER, ADD], **OPTIONS[name])
        assert grammar is not None
        assert accepts(tokenizer, grammar, text), name
        if DSML in text:
            for old, new in (
                (f"</{DSML}invoke>\n", ""),
                ('name="location"', 'name="place"'),
                ('string="true"', 'string="false"'),
                (CLOSE, CLOSE + "\n"),
                (f'invoke name="get_weather">\n<{DSML}', f'invoke name="get_weather"><{DSML}'),
                ('invoke name="get_weather"', 'invoke name="get"'),
                (f"<{DSML}parameter", f"<{DSML}param"),
                (f"{DSML}tool_calls>\n", f"{DSML}tool_calls>"),
            ):
                assert old in text
                assert not accepts(tokenizer, grammar, text.replace(old, new, 1)), (name, old)
        else:
            assert not accepts(tokenizer, grammar, text[:-1])
        if name == "auto":
            assert not accepts(tokenizer, grammar, text.replace('"false">2<', '"false">two<'))
            assert accepts(tokenizer, grammar, "Only text.")
        if name in ("required", "named"):
            assert not accepts(tokenizer, grammar, "Only text.")
        if name == "named":
            again = text.replace(CLOSE, text[len(OPEN) :])
            assert not accepts(tokenizer, grammar, again), "one call is what a named tool gets"


def test_a_block_that_the_prompt_has_opened_goes_on_with_a_call(tokenizer):
    grammar = answer_grammar(tokenizer, None, [WEATHER], choice="required", is_open=True)
    value = f'<{DSML}parameter name="location" string="true">Paris</{DSML}parameter>\n'
    call = f'<{DSML}invoke name="get_weather">\n{value}</{DSML}invoke>\n'
    assert grammar is not None
    assert accepts(tokenizer, grammar, call + call + CLOSE)
    assert not accepts(tokenizer, grammar, OPEN + call + CLOSE)
    single = answer_grammar(tokenizer, None, [WEATHER], choice="required", is_open=True, parallel=False)
    assert single is not None
    assert accepts(tokenizer, single, call + CLOSE)
    assert not accepts(tokenizer, single, call + call + CLOSE)


def test_there_is_no_grammar_where_any_text_is_right(tokenizer):
    loose = tool("f", {"a": {"type": "integer"}}, strict=False)
    assert answer_grammar(tokenizer, None, [loose], choice="auto") is None
    assert answer_grammar(tokenizer, None, [], choice="auto") is None
    assert answer_grammar(tokenizer, None, [WEATHER], choice="none") is None


def test_an_unknown_name_is_refused_in_the_words_of_the_hosted_service(tokenizer):
    with pytest.raises(
        RequestError, match="Invalid value for 'tool_call': no function named 'zzz' was specified in the 'tools'"
    ):
        answer_grammar(tokenizer, None, [WEATHER], choice="named", name="zzz")


def test_the_spelling_of_the_special_token_is_kept_out_of_texts_and_arguments(tokenizer):
    grammar = answer_grammar(tokenizer, None, [WEATHER], choice="auto")
    assert grammar is not None
    assert accepts(tokenizer, grammar, "｜ DSML and </parameter> are only text")
    head = f'{OPEN}<{DSML}invoke name="get_weather">\n<{DSML}parameter name="location" string="true">'
    for beginning in ("A text: ", head + "Paris"):
        state = grammar.start()
        assert all(state.advance(token) for token in tokenizer.encode(beginning, allow_special=True))
        plain = [state.advance(token) for token in tokenizer.encode(DSML)]
        assert not all(plain)
        assert tokenizer.special_id(DSML) not in tokenizer.encode(DSML)
    state = grammar.start()
    mask = state.mask()
    assert mask is not None
    special = {token for token in tokenizer.special_ids.values() if mask[token]}
    assert special == {tokenizer.eos_id}


# ---- arguments -------------------------------------------------------------------------------------------------------

VALUES: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "short": {"type": "string", "minLength": 2, "maxLength": 4},
    "code": {"type": "string", "pattern": "^[a-z]{2}\\d+$", "maxLength": 6},
    "part": {"type": "string", "pattern": "foo"},
    "choice": {"enum": ["red", "a green one", 3, None]},
    "named": {"type": "string", "enum": ["red", "blue"], "description": "a colour"},
    "fixed": {"const": "this </one>"},
    "maybe": {"type": ["string", "null"]},
    "either": {"anyOf": [{"type": "string", "format": "uuid"}, {"type": "integer"}]},
    "count": {"type": "integer", "minimum": 3, "maximum": 40},
    "day": {"type": "string", "format": "date"},
    "host": {"type": "string", "format": "hostname"},
    "mail": {"type": "string", "format": "email"},
    "four": {"type": "string", "format": "ipv4"},
    "six": {"type": "string", "format": "ipv6"},
    "when": {"type": "string", "format": "date-time"},
    "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    "tree": {"$ref": "#/$defs/tree"},
    "word": {"$ref": "#/$defs/word"},
    "again": {"$ref": "#/properties/count"},
    "nested": {"type": "object", "properties": {"p": {"$ref": "#/$defs/word"}}, "required": ["p"]},
    "anything": {},
}
DEFS = {
    "tree": {
        "type": "object",
        "properties": {"kid": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
        "required": ["kid"],
    },
    "word": {"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"},
}


@pytest.mark.parametrize("key", VALUES)
def test_every_argument_of_a_strict_tool_meets_its_schema(tokenizer, key):
    properties = {key: VALUES[key]} | ({"count": VALUES["count"]} if key == "again" else {})
    strict = tool("f", properties, **{"$defs": DEFS})
    grammar = answer_grammar(tokenizer, None, [strict], choice="named", name="f")
    assert grammar is not None
    checker = jsonschema.Draft202012Validator(
        strict_schema(strict.parameters), format_checker=jsonschema.FormatChecker()
    )
    for seed in range(6):
        [(name, arguments)] = calls_of(tokenizer.decode(drawn(tokenizer, grammar, seed, spare=(0, 1, 5, 40)[seed % 4])))
        assert name == "f"
        checker.validate(arguments)


def test_random_sets_of_strict_tools_are_called_rightly_within_any_number_of_tokens(tokenizer):
    rng = random.Random(4)
    for seed in range(60):
        tools = []
        for number in range(rng.randint(1, 3)):
            keys = rng.sample(sorted(set(VALUES) - {"again"}), rng.randint(0, 3))
            tools.append(tool(f"tool{number}", {key: VALUES[key] for key in keys}, **{"$defs": DEFS}))
        grammar = answer_grammar(tokenizer, None, tools, choice="required")
        assert grammar is not None
        calls = calls_of(tokenizer.decode(drawn(tokenizer, grammar, seed, spare=rng.choice([0, 1, 4, 20, 80]))))
        assert calls
        schemas = {each.name: strict_schema(each.parameters) for each in tools}
        for name, arguments in calls:
            jsonschema.validate(arguments, schemas[name])
            assert list(arguments) == list(schemas[name]["properties"])


def test_under_auto_a_text_may_turn_into_calls(tokenizer):
    grammar = answer_grammar(tokenizer, None, [WEATHER, ADD], choice="auto")
    assert grammar is not None
    state = grammar.start()
    text = "I will call the tools.\n\n<"
    assert all(state.advance(token) for token in tokenizer.encode(text))
    mask = state.mask()
    assert mask is not None
    assert mask[tokenizer.special_id(DSML)]
    assert state.advance(tokenizer.special_id(DSML))
    closing = state.closing(200)
    assert closing is not None
    [(name, arguments)] = calls_of("\n\n<" + tokenizer.decode([tokenizer.special_id(DSML), *closing]))
    assert name in ("get_weather", "add")
    assert arguments


def test_a_tool_that_is_not_strict_gets_well_formed_arguments_of_any_name(tokenizer):
    loose = tool("loose", {"a": {"type": "integer"}}, strict=False)
    grammar = answer_grammar(tokenizer, None, [loose, WEATHER], choice="required")
    assert grammar is not None
    names = set()
    for seed in range(12):
        calls = calls_of(tokenizer.decode(drawn(tokenizer, grammar, seed, spare=60, bias=4.0)))
        names |= {name for name, _ in calls}
    assert names <= {"loose", "get_weather"}
    call = f'<{DSML}invoke name="loose">\n<{DSML}parameter name="b" string="false">[1]</{DSML}parameter>\n</{DSML}invoke>\n'
    assert accepts(tokenizer, grammar, OPEN + call + CLOSE)
    assert not accepts(tokenizer, grammar, OPEN + call.replace("[1]", "[1") + CLOSE)


def test_an_answer_may_have_a_form_of_its_own(tokenizer):
    for answer, right, wrong in (
        (AnswerFormat("json_object"), '{"a": [1]}', "[1]"),
        (AnswerFormat("regex", regex="(yes|no)/[0-9]"), "yes/3", "yes"),
        (ANSWER, '{"answer": "x"}', '{"answer": 1}'),
    ):
        for tools in ([], [WEATHER]):
            grammar = answer_grammar(tokenizer, answer, tools, choice="auto")
            assert grammar is not None
            assert accepts(tokenizer, grammar, right)
            assert not accepts(tokenizer, grammar, wrong)


# ---- strict schemas --------------------------------------------------------------------------------------------------

ONE_OF = "Invalid tool parameters schema : one of `type`, `anyOf`, `$ref` field is required"


@pytest.mark.parametrize(
    ("properties", "more", "hosted", "message"),
    [
        ({"a": {"type": "string"}}, {"required": []}, False, "Required properties must match all properties in the object"),
        ({"a": {"type": "string"}}, {"required": ["a", "b"]}, True, "Required properties must match all properties"),
        ({"a": {"type": "object", "properties": {"b": {"type": "null"}}}}, {}, True, "Required properties must match"),
        ({"a": {"oneOf": [{"type": "string"}]}}, {}, True, re.escape(ONE_OF)),
        ({"a": {}}, {}, True, re.escape(ONE_OF)),
        ({"a": {"type": "array", "items": {"enum": [1]}}}, {}, True, re.escape(ONE_OF)),
        (
            {"a": {"type": "string", "format": "date"}}, {}, True,
            "unknown variant `date`, expected one of `email`, `hostname`, `ipv4`, `ipv6`, `uuid`",
        ),
        ({"a": {"type": "string"}}, {"required": "a"}, False, "required must be a list of property names"),
        ({"a": {"anyOf": 3}}, {}, False, "anyOf must be a list of schemas, not 3"),
    ],
)  # fmt: skip
def test_a_schema_against_the_rules_is_refused_in_the_words_of_the_hosted_service(properties, more, hosted, message):
    with pytest.raises(RequestError, match=message):
        strict_schema({"type": "object", "properties": properties, "required": list(properties), **more}, hosted=hosted)


def test_objects_of_a_strict_schema_are_closed_and_lengths_count_unless_hosted():
    given = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "minLength": 2, "pattern": "x"},
            "b": {"type": "array", "items": {"type": "object"}, "maxItems": 3},
        },
        "required": ["b", "a"],
        "additionalProperties": True,
    }
    ours, hosted = strict_schema(given), strict_schema(given, hosted=True)
    assert ours["additionalProperties"] is False
    assert ours["properties"]["b"]["items"]["additionalProperties"] is False
    assert ours["properties"]["a"] == {"type": "string", "minLength": 2, "pattern": "x"}
    assert hosted["properties"]["a"] == {"type": "string", "pattern": "x"}
    assert "maxItems" not in hosted["properties"]["b"]
    assert given["properties"]["a"]["minLength"] == 2, "what was given is left as it is"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"type": "string", "format": "uri"}, "format 'uri' cannot be enforced in a strict tool; use one of email"),
        ({"type": "string", "unheard": 1}, "string has 'unheard', which cannot be enforced"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "pattern": "^a|b$"}, "may stand only at its ends"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "[" * 5000}, "a pattern of 5000 characters is too long"),
        ({"$ref": "#/$defs/nothing"}, "points to nothing in the schema"),
        ({"$ref": "http://elsewhere/x"}, "must point into the same schema"),
        ({"type": "string", "minLength": -1}, "minLength and maxLength must be whole numbers"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(tokenizer, value, message):
    with pytest.raises(RequestError, match=message) as caught:
        answer_grammar(tokenizer, None, [tool("f", {"a": value})], choice="required")
    assert "\n" not in str(caught.value)
