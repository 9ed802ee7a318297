"""Reading answers back: what was rendered, what a vendor's parser reads, what is malformed, and any tokens at all."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterable

import deepseek_recipe as recipe
import pytest
from conversations import TOOLS, WORDS, random_calls, random_text

from longreach.chat.messages import Conversation, Message, Tool, ToolCall
from longreach.chat.parser import (
    AnswerParser,
    CallArguments,
    CallBegin,
    CallEnd,
    ContentText,
    ParserEvent,
    ReasoningText,
    parse,
)
from longreach.chat.renderer import render
from longreach.tokenizer.bpe import Tokenizer
from longreach.tokenizer.special import ASSISTANT, DSML, EOS, SPECIAL_TOKENS, THINK_END, THINK_START, USER

D = DSML


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [
        "def add(a, b):\n    return a + b\n" * 20,
        "The weather in Paris is sunny. 你好，世界。 Hello! é 👩‍🚀\n" * 20,
    ]
    return Tokenizer.train(texts, vocab_size=800)


@pytest.fixture(scope="module")
def unmarked(tokenizer) -> Tokenizer:
    """The same tokenizer without the token ｜DSML｜."""
    description = json.loads(tokenizer._json)
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] != DSML]
    return Tokenizer(json.dumps(description))


def parameter(name: str, value: str, string: str | None = "true") -> str:
    attribute = "" if string is None else f' string="{string}"'
    return f'<{D}parameter name="{name}"{attribute}>{value}</{D}parameter>\n'


def invoke(name: str, *parameters: str) -> str:
    return f'<{D}invoke name="{name}">\n{"".join(parameters)}</{D}invoke>\n'


def block(*calls: str) -> str:
    return f"\n\n<{D}tool_calls>\n{''.join(calls)}</{D}tool_calls>"


def feed(parser: AnswerParser, ids: Iterable[int]) -> list[ParserEvent]:
    events = []
    for token in ids:
        events += parser.push(token)
        if parser.finish_reason is not None:
            break
    return events + parser.finish()


def joined(events: Iterable[ParserEvent], kind: type = ContentText) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


# ---- what was rendered ----------------------------------------------------------------------------------------------


def answer_ids(tokenizer: Tokenizer, conversation: Conversation, answer: Message) -> list[int]:
    """The tokens that `answer` adds to the prompt of `conversation`."""
    before = render(conversation).encode(tokenizer)
    full = Conversation((*conversation.messages, answer), conversation.tools, thinking=conversation.thinking)
    ids = render(full, for_training=True).encode(tokenizer)
    assert ids[: len(before)] == before
    return ids[len(before) :]


@pytest.mark.parametrize("through_tokens", [True, False])
def test_reading_what_was_rendered_gives_the_message_back(tokenizer, through_tokens):
    for seed in range(1000):
        rng = random.Random(seed)
        thinking, tools = rng.random() < 0.6, TOOLS if rng.random() < 0.7 else ()
        calls = tuple(ToolCall(c.name, c.arguments) for c in random_calls(rng, keep_json=True)) if tools else ()
        answer = Message("assistant", random_text(rng), random_text(rng) if thinking else None, calls)
        conversation = Conversation((Message("user", "Q"),), tools, thinking=thinking)
        ids = answer_ids(tokenizer, conversation, answer)
        if through_tokens:
            problems: list[str] = []
            read = parse(ids, thinking=thinking, tools=tools, tokenizer=tokenizer, problems=problems)
            assert problems == [], seed
        elif any(mark in answer.content + (answer.reasoning or "") + str(calls) for mark in SPECIAL_TOKENS):
            continue  # as text alone, a spelling cannot be told from the token
        else:
            read = parse(tokenizer.decode(ids), thinking=thinking, tools=tools)
        assert read == answer, seed


def test_events_come_with_the_tokens_and_arguments_as_json_in_fragments(tokenizer):
    text = f"so{THINK_END}Well." + block(invoke("search", parameter("city", 'Pa"ris'), parameter("n", "2", "false")))
    parser = AnswerParser(tokenizer, thinking=True, tools=TOOLS)
    parts, arguments, events = [], [], []
    for token in [*tokenizer.encode(text, allow_special=True), tokenizer.eos_id]:
        new = parser.push(token)
        events += new
        arguments += [event.text for event in new if isinstance(event, CallArguments)]
        if parser.part not in parts[-1:]:
            parts.append(parser.part)
    assert parts == ["reasoning", "content", "tool_calls", "done"]
    assert (joined(events, ReasoningText), joined(events)) == ("so", "Well.")
    assert "".join(arguments) == '{"city": "Pa\\"ris", "n": 2}' and len(arguments) > 4
    assert [e for e in events if isinstance(e, CallBegin | CallEnd)] == [CallBegin(0, "search"), CallEnd(0)]
    assert (parser.finish_reason, parser.stop_reason, parser.problems) == ("stop", tokenizer.eos_id, [])
    assert parser.finish() == []


def test_reasoning_is_counted_in_tokens_without_its_end(tokenizer):
    parser = AnswerParser(tokenizer, thinking=True)
    reasoning, content = tokenizer.encode("Hello sunny Paris"), tokenizer.encode(" return")
    feed(parser, [*reasoning, tokenizer.special_id(THINK_END), *content, tokenizer.eos_id])
    assert parser.num_reasoning_tokens == len(reasoning)
    assert parser.num_tokens == len(reasoning) + len(content) + 2


def test_special_tokens_spelled_with_ordinary_tokens_are_text(tokenizer):
    text = f"{THINK_END}{EOS}" + block(invoke("search"))
    parser = AnswerParser(tokenizer, thinking=True, tools=TOOLS)
    assert joined(feed(parser, tokenizer.encode(text)), ReasoningText) == text
    parser = AnswerParser(tokenizer, thinking=False, tools=TOOLS)
    assert joined(feed(parser, tokenizer.encode(text))) == text and parser.problems == []


def test_dsml_is_known_by_its_spelling_where_the_tokenizer_has_no_token_for_it(unmarked):
    text = "Well." + block(invoke("search", parameter("a", "x｜DSM"), parameter("b", "[1]", "false"))) + "｜"
    for with_tools in (True, False):
        parser = AnswerParser(unmarked, thinking=False, tools=TOOLS if with_tools else ())
        events = feed(parser, unmarked.encode(text))
        assert joined(events, CallArguments) == ('{"a": "x｜DSM", "b": [1]}' if with_tools else "")
        assert joined(events) == ("Well.｜" if with_tools else text)


def test_without_tools_a_block_is_content(tokenizer):
    text = "Well." + block(invoke("search"))
    parser = AnswerParser(tokenizer, thinking=False)
    assert joined(feed(parser, tokenizer.encode(text, allow_special=True))) == text


def test_a_demanded_call_is_read_from_inside_its_block(tokenizer):
    text = invoke("search", parameter("a", "1", "false")) + f"</{D}tool_calls>"
    message = parse(
        tokenizer.encode(text, allow_special=True), thinking=False, tools=TOOLS, must_call=True, tokenizer=tokenizer
    )
    assert message == Message("assistant", tool_calls=(ToolCall("search", '{"a": 1}'),))


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    ids = [i for token in tokenizer.encode("ж🜁") for i in spelled(tokenizer, token)]
    parser = AnswerParser(tokenizer, thinking=False, tools=TOOLS)
    assert [joined(parser.push(token)) for token in ids] == ["", "ж", "", "", "", "🜁"]
    parser = AnswerParser(tokenizer, thinking=False)
    assert joined(feed(parser, ids[:-1])) == "ж\ufffd"


# ---- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_the_content_ends_before_its_first_stop_string_however_it_is_cut_into_tokens(tokenizer, seed):
    rng = random.Random(seed)
    alphabet = "ab\n<" if seed % 2 else "ab "
    text = "".join(rng.choice(alphabet) for _ in range(60))
    stop = tuple("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 5))) for _ in range(3))
    ends = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    for tools in ((), TOOLS):
        parser = AnswerParser(tokenizer, thinking=False, tools=tools, stop=stop)
        ids = [tokenizer.encode(letter)[0] for letter in text] if seed % 3 else tokenizer.encode(text)
        content = joined(feed(parser, ids))
        if ends:
            end, length, first = min(ends)
            assert content == text[: end + length]
            assert (parser.finish_reason, parser.stop_reason, parser.part) == ("stop", first, "done")
        else:
            assert (content, parser.finish_reason) == (text, None)


def test_stop_strings_are_looked_for_in_the_content_alone(tokenizer):
    text = f"END{THINK_END}Well" + block(invoke("search", parameter("a", "END\n\n")))
    parser = AnswerParser(tokenizer, thinking=True, tools=TOOLS, stop=("END", "\n\n", "<"))
    events = feed(parser, [*tokenizer.encode(text, allow_special=True), tokenizer.eos_id])
    assert joined(events, CallArguments) == '{"a": "END\\n\\n"}'
    assert parser.stop_reason == tokenizer.eos_id


def test_text_that_may_begin_a_stop_string_is_let_go_as_soon_as_it_does_not(tokenizer):
    parser = AnswerParser(tokenizer, thinking=False, stop=("ab",))
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    assert [joined(parser.push(token)) for token in (c, a, a, c, a, b)] == ["c", "", "a", "ac", "", ""]
    assert parser.stop_reason == "ab"


@pytest.mark.parametrize("mark", [USER, ASSISTANT])
def test_the_mark_of_another_turn_ends_the_answer(tokenizer, mark):
    parser = AnswerParser(tokenizer, thinking=False)
    token = tokenizer.special_id(mark)
    assert joined(feed(parser, [*tokenizer.encode("Hello"), token, *tokenizer.encode("more")])) == "Hello"
    assert (parser.stop_reason, parser.problems) == (token, [f"{mark} ended the answer"])


# ---- against the vendor's parser ------------------------------------------------------------------------------------


def recipe_answer(text: str, thinking: bool, must_call: bool, step: int) -> tuple[str, str, list[list[str]]]:
    conversation = recipe.Conversation([recipe.UserMessage("Q")], thinking_mode=thinking)
    request = recipe.ConversationRequest(conversation, recipe.ModelVersion.DeepseekV4Pro)
    stage = recipe.ThinkingInitialStage.ReasoningStart if thinking else None
    processor = recipe.StreamProcessor(
        recipe.ChatCompletionRequest.chunk_generator(request, "id", "model"),
        recipe.ParsingOptions(starts_in_tool_calls=must_call, thinking_initial_stage=stage),
    )
    chunks = processor.push(recipe.InferenceChunk.ready())
    for place in range(0, len(text), step):
        chunks += processor.push(recipe.InferenceChunk.text(text[place : place + step], 1))
    chunks += processor.push(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop)) + processor.finish()
    reasoning, content, calls = "", "", []
    for chunk in chunks:
        for choice in json.loads(chunk.to_json())["choices"]:
            delta = choice["delta"]
            reasoning += delta.get("reasoning_content") or ""
            content += delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                if call["index"] == len(calls):
                    calls.append(["", ""])
                calls[call["index"]][0] += call["function"].get("name") or ""
                calls[call["index"]][1] += call["function"].get("arguments") or ""
    return reasoning, content, calls


def test_well_formed_answers_are_read_as_the_vendors_parser_reads_them(tokenizer):
    # That parser drops line ends around a part, loses its place where text looks like the beginning of a tag, and cuts a
    # parameter's name at a space.
    words = [word for word in WORDS if not any(letter in word for letter in "\n<｜")]
    for seed in range(500):
        rng = random.Random(seed)
        thinking, must_call = rng.random() < 0.5, rng.random() < 0.2
        must_call = must_call and not thinking

        def some_text(rng=rng) -> str:
            return "".join(rng.choice(words) for _ in range(rng.randint(0, 6)))

        calls = random_calls(rng, keep_json=True) if must_call or rng.random() < 0.7 else ()
        calls = tuple(
            ToolCall(c.name, c.arguments) for c in calls if D not in c.arguments and '"a b": ' not in c.arguments
        ) or (ToolCall("search", "{}"),)
        answer = Message("assistant", "" if must_call else some_text(), some_text() if thinking else None, calls)
        conversation = Conversation((Message("user", "Q"),), TOOLS, thinking=thinking, must_call=must_call)
        prompt = render(conversation)
        full = Conversation((*conversation.messages, answer), TOOLS, thinking=thinking)
        ids = render(full, for_training=True).encode(tokenizer)[len(prompt.encode(tokenizer)) : -1]
        text = tokenizer.decode(ids)
        expected = recipe_answer(text, thinking, must_call, rng.choice([1, 3, 50]))
        read = parse(ids, thinking=thinking, tools=TOOLS, must_call=must_call, tokenizer=tokenizer)
        found = (read.reasoning or "", read.content, [[call.name, call.arguments] for call in read.tool_calls])
        assert found == expected, seed


# ---- what is malformed ----------------------------------------------------------------------------------------------

ONE = '{"a": "x"}'
X = parameter("a", "x")


@pytest.mark.parametrize(
    ("text", "content", "calls", "problem"),
    [
        ("Well.\n" + block(invoke("search", X))[2:], "Well.", [("search", ONE)], "no blank line"),
        ("Well." + invoke("search", X), "Well.", [("search", ONE)], "a call has no block around it"),
        ("Well." + block(invoke("search", X)) + "Bye.", "Well.Bye.", [("search", ONE)], "text after the tool calls"),
        (block(invoke("search", X)) + " \n", "", [("search", ONE)], None),
        (block(invoke("search", X)).replace("\n", ""), "", [("search", ONE)], "no blank line"),
        (block(invoke("cook", X)), "", [("cook", ONE)], "there is no tool 'cook'"),
        (block(invoke("search", X, X)), "", [("search", '{"a": "x", "a": "x"}')], "comes twice"),
        (block(invoke("search", "so ", X, "what?")), "sowhat?", [("search", ONE)], "text between the tags"),
        (block("so  what? ", invoke("search", X)), "so  what?", [("search", ONE)], "text between the tags"),
        (block(), "", [], "is empty"),
        (block(invoke("search")) + block(invoke("search")), "", [("search", "{}")] * 2, "more than one block"),
        (block(invoke("search", parameter("a", "Paris", "false"))), "", [("search", '{"a": "Paris"}')], "not JSON"),
        (block(invoke("search", parameter("a", "NaN", "false"))), "", [("search", '{"a": "NaN"}')], "not JSON"),
        (block(invoke("search", parameter("a", "2", None))), "", [("search", '{"a": 2}')], "does not say"),
        (block(invoke("search", parameter("a", "x", None))), "", [("search", ONE)], "does not say"),
        (block(invoke("get_weather", parameter("city", "2", None))), "", [("get_weather", '{"city": "2"}')], "not say"),
        (block(invoke("search", X[:-1] + X.replace('"a"', '"b"'))), "", [("search", '{"a": "x", "b": "x"}')], None),
        (block(invoke("search", X.replace(f"</{D}parameter>", ""))), "", [("search", '{"a": "x\\n"}')], "not closed"),
        (block(invoke("search", X).replace(f"</{D}invoke>", "")), "", [("search", ONE)], "a call was not closed"),
        (
            block(invoke("search", X).replace(f"</{D}invoke>", ""), invoke("search")),
            "", [("search", ONE), ("search", "{}")], "a call was not closed",
        ),
        (block(invoke("search", X)).removesuffix(f"</{D}tool_calls>"), "", [("search", ONE)], "block of tool calls was not"),
        (block(invoke("search", X)).replace(f"{D}", f"{D} ").replace("tool_calls", "calls"), "", [("search", ONE)], None),
        (block(X, invoke("search", X)), f'<{D}parameter name="a" string="true">x</{D}parameter>', [("search", ONE)], "text"),
        (block(invoke("search", f"</{D}parameter>", X)), f"</{D}parameter>", [("search", ONE)], "text between"),
        (f"a <{D}b", f"a <{D}b", [], "a tag is cut off"),
        (f"a <{D}b ", f"a <{D}b ", [], "stands in the content"),
        (f"a {D}{D}tool_calls>", f"a {D}{D}tool_calls>", [], "stands in the content"),
        (f"</{D}tool_calls>", f"</{D}tool_calls>", [], "stands in the content"),
        (f"\n\n<{D}tool_call", f"\n\n<{D}tool_call", [], "a tag is cut off"),
        (f"a{THINK_END}b{THINK_START}", f"a{THINK_END}b{THINK_START}", [], "stands in the content"),
        (block(invoke("search", parameter("a", f"<{D}b></{D}c><"))), "", [("search", f'{{"a": "<{D}b></{D}c><"}}')], None),
        (block(invoke("search", parameter('a"b', "x"))), "", [("search", '{"a\\"b": "x"}')], None),
        (block('<invoke name="search">', invoke("search")), '<invoke name="search">', [("search", "{}")], "between"),
        (block(f'<{D}invoke id="search">', invoke("search")), f'<{D}invoke id="search">', [("search", "{}")], "between"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("by_letter", [False, True])
def test_what_is_malformed_is_understood_as_far_as_it_can_be_and_given_back_otherwise(
    tokenizer, text, content, calls, problem, by_letter
):
    ids = tokenizer.encode(text, allow_special=True)
    if by_letter:
        ids = [i for token in ids for i in spelled(tokenizer, token)]
    problems: list[str] = []
    message = parse([*ids, tokenizer.eos_id], thinking=False, tools=TOOLS, tokenizer=tokenizer, problems=problems)
    assert (message.content, [(call.name, call.arguments) for call in message.tool_calls]) == (content, calls)
    assert any(problem in line for line in problems) if problem else problems == []


def spelled(tokenizer: Tokenizer, token: int) -> list[int]:
    """A token of text as one token for each of its bytes; a special token as it is."""
    if token in tokenizer.special_ids.values():
        return [token]
    table = tokenizer.token_bytes
    return [table.index(bytes([byte])) for byte in table[token]]


@pytest.mark.parametrize(
    ("text", "arguments", "content"),
    [
        (f'<{D}invoke name="search">\n<{D}parameter name="a" string="true">Par', '{"a": "Par', ""),
        (f'<{D}invoke name="search">\n<{D}parameter name="a" string="true">Par</{D}para', f'{{"a": "Par</{D}para', ""),
        (f'<{D}invoke name="search">\n<{D}parameter name="a" string="false">[1, 2', '{"a": [1, 2', ""),
        (f'<{D}invoke name="search">\n{X}', '{"a": "x"', ""),
        (f'<{D}invoke name="search">\n{X}<{D}param', '{"a": "x"', f"<{D}param"),
        (f'<{D}invoke name="sea', "", f'<{D}invoke name="sea'),
    ],
)
def test_an_answer_that_is_cut_off_leaves_what_there_is_of_its_call(tokenizer, text, arguments, content):
    parser = AnswerParser(tokenizer, thinking=False, tools=TOOLS)
    events = feed(parser, tokenizer.encode(block()[: -len(f"</{D}tool_calls>")] + text, allow_special=True))
    assert (joined(events, CallArguments), joined(events)) == (arguments, content)
    assert not any(isinstance(event, CallEnd) for event in events) and parser.finish_reason is None


def test_reasoning_that_never_ends_is_reasoning_and_a_problem(tokenizer):
    problems: list[str] = []
    assert parse("so" + block(), thinking=True, tools=TOOLS, problems=problems).reasoning == "so" + block()
    assert "the reasoning was not ended" in problems


# ---- any tokens at all ----------------------------------------------------------------------------------------------

FRAGMENTS = [
    f"<{D}tool_calls>", f"</{D}tool_calls>", f'<{D}invoke name="f">', f"</{D}invoke>", f"</{D}parameter>", f"<{D}", D, "<",
    "</", ">", f'<{D}parameter name="a" string="true">', f'<{D}parameter name="a" string="false">', "\n", "\n\n", '"', " ",
    f'<{D}parameter name="a">', "invoke", "parameter", 'name="', "tool_calls>",
]  # fmt: skip
MARKERS = "αβγδεζηθικλμνξο"
"""Letters that no tag holds: every one that goes in must come out."""


@pytest.mark.parametrize("seed", range(40))
def test_no_letter_is_lost_whatever_tags_surround_it(tokenizer, unmarked, seed):
    rng = random.Random(seed)
    for _ in range(50):
        thinking, must_call = rng.random() < 0.3, rng.random() < 0.2
        text = "".join(rng.choice([rng.choice(FRAGMENTS), rng.choice(MARKERS)]) for _ in range(rng.randint(1, 40)))
        tokens = rng.choice([tokenizer, unmarked])
        parser = AnswerParser(tokens, thinking=thinking and not must_call, tools=TOOLS, must_call=must_call)
        events = feed(parser, tokens.encode(text, allow_special=True))
        out = "".join(event.name if isinstance(event, CallBegin) else getattr(event, "text", "") for event in events)
        letters = Counter(letter for letter in text if letter in MARKERS)
        assert Counter(letter for letter in out if letter in MARKERS) == letters, text
        check_calls(events)


def check_calls(events: list[ParserEvent]) -> None:
    """Calls begin in order, one at a time, and those that end have a JSON object as arguments."""
    current, ended, arguments = -1, True, ""
    for event in events:
        if isinstance(event, CallBegin):
            assert event.index == current + 1 and ended
            current, ended, arguments = event.index, False, ""
        elif isinstance(event, CallArguments):
            assert event.index == current and not ended
            arguments += event.text
        elif isinstance(event, CallEnd):
            assert event.index == current and not ended
            assert isinstance(json.loads(arguments), dict)
            ended = True


def test_random_tokens_never_raise_and_all_their_text_is_accounted_for(tokenizer):
    ends = {tokenizer.special_id(mark) for mark in (EOS, USER, ASSISTANT)}
    for seed in range(200):
        rng = random.Random(seed)
        ids = [rng.randrange(20 if rng.random() < 0.3 else tokenizer.vocab_size) for _ in range(200)]
        parser = AnswerParser(tokenizer, thinking=seed % 2 == 0, tools=TOOLS, stop=("\n\n\n",) if seed % 3 == 0 else ())
        events = feed(parser, ids)
        check_calls(events)
        read = ids[: parser.num_tokens]
        if not any(isinstance(event, CallBegin) for event in events) and not isinstance(parser.stop_reason, str):
            think_end = tokenizer.special_id(THINK_END)
            if seed % 2 == 0 and think_end in read:
                read.remove(think_end)
            if read[-1] in ends or parser.finish_reason:
                read = read[:-1]
            out = joined(events, ReasoningText) + joined(events)
            assert out == decoded(tokenizer, read)


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Text of tokens, where a special token ends an unfinished character before it."""
    special = set(tokenizer.special_ids.values())
    texts, run = [], []
    for token in ids:
        if token in special:
            texts += [tokenizer.decode(run), tokenizer.decode([token])]
            run = []
        else:
            run.append(token)
    return "".join(texts) + tokenizer.decode(run)


def test_a_token_of_plain_content_costs_little(tokenizer):
    ids = tokenizer.encode("The weather in Paris is sunny. Hello! return a + b " * 100)
    times = []
    for _ in range(5):
        parser = AnswerParser(tokenizer, thinking=False, tools=TOOLS)
        began = time.process_time()
        for token in ids:
            parser.push(token)
        times.append((time.process_time() - began) / len(ids))
    assert min(times) < 40e-6  # measured 2.5 µs; the bound allows for a slow and busy machine


def test_a_tool_is_looked_up_by_its_name_even_if_it_has_no_schema(tokenizer):
    tools = (
        Tool({"name": "f"}),
        Tool({"name": "g", "parameters": {"properties": {"a": {"type": ["string", "null"]}}}}),
    )
    text = block(invoke("f", parameter("a", "1", None)), invoke("g", parameter("a", "null", None)))
    message = parse(tokenizer.encode(text, allow_special=True), thinking=False, tools=tools, tokenizer=tokenizer)
    assert [call.arguments for call in message.tool_calls] == ['{"a": 1}', '{"a": null}']
