"""Files of conversations: the formats that are read, what is refused and how, and which lines are held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longreach.chat.messages import AnswerFormat, Message, ToolCall
from longreach.data.chats import ChatFile, Chats
from longreach.data.conversations import conversation_of, read_chats
from longreach.data.examples import Fitting
from longreach.errors import RequestError
from longreach.tokenizer.bpe import Tokenizer

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
ADD = {"type": "function", "function": {"name": "add", "description": "a sum", "parameters": {"type": "object"}}}
USER, ANSWER = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}


def write(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def messages_of(record: Any) -> tuple[Message, ...]:
    return conversation_of(record)[0].messages


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_openai_s_messages_are_read_with_reasoning_tools_and_weights():
    record = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "2+3?"}, {"type": "text", "text": "In cm."}], "name": "Ada"},
            {"role": "assistant", "content": None, "reasoning_content": "a sum", "tool_calls": [CALL], "weight": 0},
            {"role": "tool", "content": "5", "tool_call_id": "c1"},
            {"role": "assistant", "content": "5 cm", "reasoning": "done", "refusal": None},
        ],
        "tools": [ADD], "parallel_tool_calls": False, "metadata": {"source": "me"},
    }  # fmt: skip
    conversation, learned = conversation_of(record)
    assert conversation.messages == (
        Message("system", "Be brief."),
        Message("user", "2+3?\n\nIn cm."),
        Message("assistant", "", "a sum", (ToolCall("add", '{"a": 2}', "c1"),)),
        Message("tool", "5", tool_call_id="c1"),
        Message("assistant", "5 cm", "done"),
    )
    assert learned == [False, True]
    assert [dict(tool.function) for tool in conversation.tools] == [ADD["function"]]
    assert conversation.thinking and conversation.effort == "high"


def test_arguments_may_be_an_object_and_tools_may_have_little():
    call = {"function": {"name": "add", "arguments": {"a": 2, "b": "ü"}}}
    conversation, _ = conversation_of({"messages": [USER, {"role": "assistant", "tool_calls": [call]}],
                                       "tools": [{"type": "function", "function": {"name": "add"}}]})  # fmt: skip
    assert conversation.messages[1].tool_calls == (ToolCall("add", '{"a": 2, "b": "ü"}'),)
    assert dict(conversation.tools[0].function) == {"name": "add", "description": "", "parameters": {}}, (
        "as it is served"
    )


def test_the_older_function_fields_are_read_as_tools():
    messages = [USER, {"role": "assistant", "content": None, "function_call": CALL["function"]},
                {"role": "function", "name": "add", "content": "5"}, ANSWER]  # fmt: skip
    conversation, _ = conversation_of({"messages": messages, "functions": [ADD["function"]]})
    assert conversation.messages[1:3] == (
        Message("assistant", tool_calls=(ToolCall("add", '{"a": 2}'),)), Message("tool", "5"),
    )  # fmt: skip
    assert conversation.tools[0].name == "add"


def test_sharegpt_and_pairs_are_read():
    assert messages_of({"conversations": [
        {"from": "system", "value": "Be brief."}, {"from": "human", "value": "2+3?"}, {"from": "gpt", "value": "5"},
    ]}) == (Message("system", "Be brief."), Message("user", "2+3?"), Message("assistant", "5"))  # fmt: skip
    tools = {"conversations": [
        {"from": "human", "value": "2+3?"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "5"}, {"from": "gpt", "value": "5 cm"},
    ], "system": "Add.", "tools": json.dumps([ADD["function"]])}  # fmt: skip
    conversation, _ = conversation_of(tools)
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert conversation.messages[2].tool_calls == (ToolCall("add", '{"a": 2}'),) and conversation.tools[0].name == "add"
    assert messages_of({"prompt": "2+3?", "completion": "5"}) == (Message("user", "2+3?"), Message("assistant", "5"))
    assert messages_of({"prompt": [USER], "completion": [ANSWER]}) == (
        Message("user", "2+3?"),
        Message("assistant", "5"),
    )


def test_thinking_written_into_the_content_becomes_reasoning():
    text = "<think>\ntwo and three\n</think>\n\n5"
    expected = Message("assistant", "5", "two and three")
    assert messages_of({"messages": [USER, {"role": "assistant", "content": text}]})[1] == expected
    conversation, _ = conversation_of(
        {"conversations": [{"from": "human", "value": "2+3?"}, {"from": "gpt", "value": text}]}
    )
    assert conversation.messages[1] == expected and conversation.thinking


def test_a_developer_s_message_is_a_system_text_and_an_empty_one_is_left_out_as_the_server_does():
    read = messages_of(
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "system", "content": ""}, USER, ANSWER]}
    )
    assert [message.role for message in read] == ["system", "user", "assistant"]


THOUGHT = {"role": "assistant", "content": "5", "reasoning_content": "a sum"}


@pytest.mark.parametrize(
    ("answer", "fields", "expected"),
    [
        (ANSWER, {}, (False, "high")),
        (THOUGHT, {}, (True, "high")),
        (ANSWER | {"reasoning_content": ""}, {}, (False, "high")),
        (THOUGHT, {"mode": "non-think"}, (False, "high")),
        (ANSWER, {"mode": "think-high"}, (True, "high")),
        (THOUGHT, {"mode": "think-max"}, (True, "max")),
        (THOUGHT, {"thinking": False}, (False, "high")),
        (THOUGHT, {"thinking": {"type": "disabled"}}, (False, "high")),
        (THOUGHT, {"thinking": {"type": "enabled"}, "effort": "max"}, (True, "max")),
        (ANSWER, {"reasoning_effort": "low"}, (True, "low")),
    ],
)  # fmt: skip
def test_the_mode_is_what_the_record_says_else_how_the_last_answer_was_given(answer, fields, expected):
    conversation, _ = conversation_of({"messages": [USER, answer], **fields})
    assert (conversation.thinking, conversation.effort) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, AnswerFormat("json_object")),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
         AnswerFormat("json_schema", schema={"type": "object"})),
    ],
)  # fmt: skip
def test_response_formats_are_read(given, expected):
    assert conversation_of({"messages": [USER, ANSWER], "response_format": given})[0].answer_format == expected


def test_blank_lines_a_byte_order_mark_and_strange_line_ends_inside_strings_are_fine(tmp_path):
    path = tmp_path / "chats.jsonl"
    text = json.dumps({"prompt": "a\u2028b\x85c", "completion": "5"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\n   \n" + text.encode())
    chats = list(read_chats(path))
    assert len(chats) == 2 and "a\u2028b\x85c" in chats[0].prompts[0].text


# ---- what is refused ------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{'messages': []}", r"is not JSON \(Expecting property name"),
    "a list over many lines": ("[", "write one object per line"),
    "no object": (["a"], "is a list, not an object"),
    "other fields": ({"question": "2+3?", "answer": "5"}, "has the fields question, answer; give {\"messages\""),
    "preference data": ({"prompt": "x", "chosen": "a", "rejected": "b"}, "which is preference data"),
    "bare text": ({"text": "once upon a time"}, "bare text is for longreach pretrain"),
    "messages no list": ({"messages": "hi"}, "messages is a string, not a list"),
    "a message no object": ({"messages": [USER, 5]}, r"messages\[1\] is a number, not an object"),
    "no messages": ({"messages": []}, "has no messages"),
    "an unknown role": ({"messages": [{"role": "bot", "content": "x"}]}, r"messages\[0\].role is \"bot\"; roles are system"),
    "a missing role": ({"messages": [{"content": "x"}]}, r"messages\[0\].role is null"),
    "content that is no text": ({"messages": [{"role": "user", "content": 5}, ANSWER]}, r"messages\[0\].content is a number"),
    "content missing": ({"messages": [{"role": "user"}, ANSWER]}, r"messages\[0\].content is null"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
                 r"content\[0\] is \"image_url\"; only text parts"),
    "nothing to learn": ({"messages": [USER]}, "has no message of an assistant to learn from"),
    "weights that leave nothing": ({"messages": [USER, ANSWER | {"weight": 0}]}, "has no message of an assistant to learn"),
    "an odd weight": ({"messages": [USER, ANSWER | {"weight": 0.5}]}, r"messages\[1\].weight is 0.5; it may be 0 or 1"),
    "a weighed question": ({"messages": [USER | {"weight": 0}, ANSWER]}, r"messages\[0\].weight is 0"),
    "an empty answer": ({"messages": [USER, {"role": "assistant", "content": ""}]}, r"messages\[1\] says nothing"),
    "an open answer": ({"messages": [USER, ANSWER | {"prefix": True}]}, r"messages\[1\] has a prefix"),
    "a user who calls": ({"messages": [USER | {"tool_calls": [CALL]}, ANSWER]}, r"messages\[0\] has tool_calls"),
    "calls that are none": ({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "add"}]}]},
                            r"messages\[1\].tool_calls\[0\] must be"),
    "calls no list": ({"messages": [USER, {"role": "assistant", "tool_calls": CALL}]}, "tool_calls is an object, not a list"),
    "arguments no JSON": ({"messages": [USER, {"role": "assistant", "tool_calls": [
        {"function": {"name": "add", "arguments": "{a: 2}"}}]}]}, r"function.arguments is not JSON: \"{a: 2}\""),
    "arguments no object": ({"messages": [USER, {"role": "assistant", "tool_calls": [
        {"function": {"name": "add", "arguments": "[2]"}}]}]}, "function.arguments is a list, not an object"),
    "a result of no call": ({"messages": [USER, {"role": "tool", "content": "5"}, ANSWER]}, "no tool call precedes it"),
    "a result of another call": ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]},
                                               {"role": "tool", "content": "5", "tool_call_id": "c9"}, ANSWER]}, "'c9'"),
    "a call without a result": ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, USER, ANSWER]},
                                "message 1 calls 1 tools and 0 results follow"),
    "an unknown mode": ({"messages": [USER, ANSWER], "mode": "fast"}, "unknown mode \"fast\"; modes are non-think"),
    "two modes": ({"messages": [USER, ANSWER], "mode": "think-max", "effort": "max"}, "give mode alone"),
    "an odd thinking": ({"messages": [USER, ANSWER], "thinking": {"type": "auto"}}, "has a thinking that is neither"),
    "an unknown effort": ({"messages": [USER, ANSWER], "effort": "medium"}, "unknown effort \"medium\""),
    "effort without thinking": ({"messages": [USER, ANSWER], "thinking": False, "effort": "max"}, "thinking is off"),
    "thinking twice": ({"messages": [USER, {"role": "assistant", "content": "<think>a</think>b", "reasoning": "c"}]},
                       "has reasoning twice"),
    "thinking unclosed": ({"messages": [USER, {"role": "assistant", "content": "<think>a"}]}, "never closes it"),
    "tools no list": ({"messages": [USER, ANSWER], "tools": {"name": "add"}}, "tools is an object, not a list"),
    "a tool without a name": ({"messages": [USER, ANSWER], "tools": [{"type": "function", "function": {}}]},
                              r"tools\[0\] must be"),
    "an odd format": ({"messages": [USER, ANSWER], "response_format": {"type": "xml"}}, "types are text, json_object"),
    "half a surrogate": ('{"prompt": "\\ud800", "completion": "5"}', "half a surrogate pair"),
    "sharegpt's stranger": ({"conversations": [{"from": "alien", "value": "x"}]}, r"is from \"alien\"; allowed are system"),
    "sharegpt without a value": ({"conversations": [{"from": "human", "text": "x"}]}, 'it needs "from" and "value"'),
    "sharegpt's number": ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": 5}]},
                          r"conversations\[1\].content is a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_line_that_cannot_be_used_is_refused_with_file_line_and_reason(name, tmp_path):
    record, expected = BAD[name]
    good = {"messages": [USER, ANSWER]}
    path = write(tmp_path / "chats.jsonl", good, record, good)
    with pytest.raises(RequestError, match=f"chats.jsonl: 1 of 3 lines cannot be used; line 2: .*{expected}"):
        ChatFile.read(path, 0.02)


def test_all_problems_are_counted_and_three_are_named(tmp_path):
    path = write(tmp_path / "chats.jsonl", *[{"messages": [USER, ANSWER]}, {"text": "x"}] * 5)
    with pytest.raises(RequestError) as caught:
        ChatFile.read(path, 0.02)
    text = str(caught.value)
    assert "5 of 10 lines cannot be used" in text and text.endswith("and 2 more")
    assert [f"line {n}:" in text for n in (2, 4, 6, 8, 10)] == [True, True, True, False, False]


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"is a folder; give \.jsonl files"):
        ChatFile.read(tmp_path, 0.02)
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        ChatFile.read(tmp_path / "none.jsonl", 0.02)
    with pytest.raises(RequestError, match="holds no conversation"):
        ChatFile.read(write(tmp_path / "empty.jsonl"), 0.02)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b'{"prompt": "\xff", "completion": "5"}\n')
    with pytest.raises(RequestError, match="line 1: is not UTF-8 at byte 12"):
        ChatFile.read(binary, 0.02)


# ---- what is held out -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["What is 2+3? The sum is 5."] * 20, vocab_size=400)


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{n}+{n}?", "completion": str(2 * n)} for n in range(count)]


def told(examples: Any, tokenizer: Tokenizer) -> set[str]:
    return {tokenizer.decode(example.tokens.tolist()) for example in examples}


def test_held_out_conversations_are_never_learned_wherever_and_however_often_they_stand(tmp_path, tokenizer):
    fitting = Fitting(100, cuts=False)
    file = ChatFile.read(write(tmp_path / "a.jsonl", *pairs(500), *pairs(500)), 0.1)
    held, learned = list(file.held_out(tokenizer, fitting)), Chats(file, tokenizer, fitting, seed=0).examples
    assert 30 <= len(held) <= 70 and len(held) == len(told(held, tokenizer)), "each once"
    assert len(learned) == 2 * (500 - len(held))
    assert not told(held, tokenizer) & told(learned, tokenizer)
    part = ChatFile.read(write(tmp_path / "b.jsonl", *pairs(250)), 0.1)
    assert told(part.held_out(tokenizer, fitting), tokenizer) <= told(held, tokenizer), "the same ones in every file"


def test_a_small_file_gives_one_conversation_and_a_file_of_one_gives_none(tmp_path, tokenizer):
    fitting = Fitting(100, cuts=False)
    two = ChatFile.read(write(tmp_path / "two.jsonl", *pairs(2)), 0.02)
    assert len(list(two.held_out(tokenizer, fitting))) == 1 and Chats(two, tokenizer, fitting, 0).size == 1
    one = ChatFile.read(write(tmp_path / "one.jsonl", *pairs(1)), 0.02)
    assert not list(one.held_out(tokenizer, fitting)) and Chats(one, tokenizer, fitting, 0).size == 1
    all_of_it = ChatFile.read(write(tmp_path / "all.jsonl", *pairs(20)), 0.0)
    assert not list(all_of_it.held_out(tokenizer, fitting)) and Chats(all_of_it, tokenizer, fitting, 0).size == 20


def test_long_conversations_are_left_out_or_cut_and_counted(tmp_path, tokenizer):
    long = {"prompt": "2+3?", "completion": "5" * 200}
    question = {"prompt": "2" * 200, "completion": "5"}
    file = ChatFile.read(write(tmp_path / "a.jsonl", *pairs(10), long, question), 0.0)
    dropped = Chats(file, tokenizer, Fitting(50, cuts=False), 0)
    assert (dropped.size, dropped.too_long, dropped.cut) == (10, 2, 0)
    cut = Chats(file, tokenizer, Fitting(50, cuts=True), 0)
    assert (cut.size, cut.too_long, cut.cut) == (11, 1, 1), "nothing to learn is left of the long question"
    assert max(len(example.tokens) for example in cut.examples) == 50
    only = ChatFile.read(write(tmp_path / "b.jsonl", long), 0.0)
    with pytest.raises(
        RequestError, match=r"all of its 1 .* longer than 50 tokens; raise --longest, or say --too-long cut"
    ):
        Chats(only, tokenizer, Fitting(50, cuts=False), 0)


def test_every_pass_has_each_conversation_once_in_an_order_of_its_own(tmp_path, tokenizer):
    chats = Chats(
        ChatFile.read(write(tmp_path / "a.jsonl", *pairs(30)), 0.0), tokenizer, Fitting(100, cuts=False), seed=1
    )
    passes = [[chats.example(turn * 30 + place).tokens.tolist() for place in range(30)] for turn in range(3)]
    assert passes[0] != passes[1] != passes[2]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(passes[2]) and len(set(map(str, passes[0]))) == 30
