"""The loss mask, token by token, on every kind of message: what an assistant has to produce is learned, nothing else is.

In the expectations, written by hand, ⟦…⟧ stands around what is learned.
"""

from __future__ import annotations

import json
import re

import pytest

from longreach.chat.messages import AnswerFormat, Conversation, Message, Tool, ToolCall
from longreach.chat.modes import ABSOLUTE
from longreach.chat.renderer import Prompt, render
from longreach.data.conversations import learned_where, prompts_of
from longreach.tokenizer.bpe import Tokenizer

B, E, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
CALL = (
    "\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">2</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="unit" string="true">cm</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)
ADD = Tool({"name": "add", "description": "", "parameters": {}})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = ["What is 2+3? The sum of two numbers is 5. Be brief.\n\n", '{"a": 2, "unit": "cm"}', ABSOLUTE]
    return Tokenizer.train([text * 20 for text in texts], vocab_size=700)


def assert_learned(prompt: Prompt, tokenizer: Tokenizer, expected: str) -> None:
    """Every token's flag is that of its first byte in `expected`."""
    ids, learned = prompt.encode_with_loss(tokenizer)
    text = re.sub("[⟦⟧]", "", expected)
    assert tokenizer.decode(ids) == text
    is_inside: list[bool] = []
    inside = False
    for letter in expected:
        if letter in "⟦⟧":
            inside = letter == "⟦"
        else:
            is_inside += [inside] * len(letter.encode())
    at, wanted = 0, []
    for token in ids:
        wanted.append(is_inside[at])
        at += len(tokenizer.token_bytes[token])
    assert at == len(is_inside) and len(ids) == len(learned)
    wrong = [(place, tokenizer.decode([token])) for place, token in enumerate(ids) if learned[place] != wanted[place]]
    assert not wrong
    assert ids == prompt.encode(tokenizer), "what is learned from is what is served"


def user(text: str = "2+3?") -> Message:
    return Message("user", text)


def said(text: str, reasoning: str | None = None, *calls: ToolCall, **more) -> Message:
    return Message("assistant", text, reasoning, calls, **more)


ADDING = ToolCall("add", '{"a": 2, "unit": "cm"}', "c1")

CASES = {
    "without thinking": (
        Conversation((user(), said("5")), thinking=False),
        f"{B}{U}2+3?{A}</think>⟦5{E}⟧",
    ),
    "with thinking, its end mark and the answer's": (
        Conversation((user(), said("5", "2+3 is 5"))),
        f"{B}{U}2+3?{A}<think>⟦2+3 is 5</think>5{E}⟧",
    ),
    "with the effort paragraph, which is only read": (
        Conversation((user(), said("5", "2+3 is 5")), effort="max"),
        f"{B}{ABSOLUTE}{U}2+3?{A}<think>⟦2+3 is 5</think>5{E}⟧",
    ),
    "with a system text": (
        Conversation((Message("system", "Be brief."), user(), said("5")), thinking=False),
        f"{B}Be brief.{U}2+3?{A}</think>⟦5{E}⟧",
    ),
    "in several turns": (
        Conversation((user("1+1?"), said("2"), user(), said("5")), thinking=False),
        f"{B}{U}1+1?{A}</think>⟦2{E}⟧{U}2+3?{A}</think>⟦5{E}⟧",
    ),
    "in several turns of thinking: a turn whose reasoning is dropped is not learned": (
        Conversation((user("1+1?"), said("2", "one and one"), user(), said("5", "two and three"))),
        f"{B}{U}1+1?{A}</think>2{E}{U}2+3?{A}<think>⟦two and three</think>5{E}⟧",
    ),
    "in several turns of thinking: an earlier turn that had none is": (
        Conversation((user("1+1?"), said("2"), user(), said("5", "two and three"))),
        f"{B}{U}1+1?{A}</think>⟦2{E}⟧{U}2+3?{A}<think>⟦two and three</think>5{E}⟧",
    ),
    "with empty reasoning": (
        Conversation((user(), said("5", ""))),
        f"{B}{U}2+3?{A}<think>⟦</think>5{E}⟧",
    ),
    "before a developer's message": (
        Conversation((user("1+1?"), said("2"), Message("developer", "Be brief."), said("5")), thinking=False),
        f"{B}{U}1+1?{A}</think>⟦2{E}⟧{U}Be brief.{A}</think>⟦5{E}⟧",
    ),
    "before a reminder": (
        Conversation((user(), Message("latest_reminder", "It is late."), said("5")), thinking=False),
        f"{B}{U}2+3?{A}</think><｜latest_reminder｜>It is late.⟦5{E}⟧",
    ),
    "after a quick instruction": (
        Conversation((Message("user", "2+3?", task="domain"), said("sums")), thinking=False),
        f"{B}{U}2+3?<｜domain｜>⟦sums{E}⟧",
    ),
    "after a question for an action": (
        Conversation((Message("user", "2+3?", task="action"), said("Search")), thinking=False),
        f"{B}{U}2+3?{A}</think><｜action｜>⟦Search{E}⟧",
    ),
    "before and after a question for a title": (
        Conversation((user(), said("5", task="title"), said("A sum")), thinking=False),
        f"{B}{U}2+3?{A}</think>⟦5{E}⟧<｜title｜>⟦A sum{E}⟧",
    ),
    "that is open: no end mark is learned": (
        Conversation((user(), said("The sum", is_open=True)), thinking=False),
        f"{B}{U}2+3?{A}</think>⟦The sum⟧",
    ),
    "that is open inside its reasoning": (
        Conversation((user(), said("", "Two and", is_open=True))),
        f"{B}{U}2+3?{A}<think>⟦Two and⟧",
    ),
    "beyond ASCII, where a token may be part of a letter": (
        Conversation((user("¿2+3? 日本"), said("“fünf” 🙂 数", "二加三…")), thinking=True),
        f"{B}{U}¿2+3? 日本{A}<think>⟦二加三…</think>“fünf” 🙂 数{E}⟧",
    ),
    "that spells a special token: it is text": (
        Conversation((user("</think>"), said("<think>x")), thinking=False),
        f"{B}{U}</think>{A}</think>⟦<think>x{E}⟧",
    ),
    "that nobody gave: nothing is learned": (
        Conversation((user(),), thinking=False),
        f"{B}{U}2+3?{A}</think>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_learned(name, tokenizer):
    conversation, expected = CASES[name]
    assert_learned(render(conversation, texts="preview", for_training=True), tokenizer, expected)


@pytest.mark.parametrize("thinking", [False, True])
def test_calls_are_learned_and_their_results_and_announcements_are_not(thinking, tokenizer):
    thought = ("need a sum", "done") if thinking else (None, None)
    conversation = Conversation(
        (user(), said("Adding.", thought[0], ADDING), Message("tool", "5", tool_call_id="c1"), said("5 cm", thought[1])),
        (ADD,), thinking=thinking,
    )  # fmt: skip
    prompt = render(conversation, texts="preview", for_training=True)
    text = prompt.text
    announced = text[len(B) : text.index(U)]
    assert "add" in announced and "## Tools" in announced
    first, second = ("<think>⟦need a sum</think>", "<think>⟦done</think>") if thinking else ("</think>⟦", "</think>⟦")
    assert_learned(
        prompt, tokenizer,
        f"{B}{announced}{U}2+3?{A}{first}Adding.{CALL}{E}⟧{U}<tool_result>5</tool_result>{A}{second}5 cm{E}⟧",
    )  # fmt: skip


def test_with_tools_all_reasoning_is_kept_and_learned(tokenizer):
    conversation = Conversation((user("1+1?"), said("2", "one and one"), user(), said("5", "two and three")), (ADD,))
    prompt = render(conversation, texts="preview", for_training=True)
    head = prompt.text[: prompt.text.index(U)]
    assert_learned(
        prompt, tokenizer,
        f"{head}{U}1+1?{A}<think>⟦one and one</think>2{E}⟧{U}2+3?{A}<think>⟦two and three</think>5{E}⟧",
    )  # fmt: skip


def test_an_announced_answer_format_is_only_read(tokenizer):
    conversation = Conversation((user(), said('{"sum": 5}')), answer_format=AnswerFormat("json_object"), thinking=False)
    prompt = render(conversation, texts="preview", for_training=True)
    head = prompt.text[: prompt.text.index(U)]
    assert "JSON" in head
    assert_learned(prompt, tokenizer, f'{head}{U}2+3?{A}</think>⟦{{"sum": 5}}{E}⟧')


# ---- from a line of a file ------------------------------------------------------------------------------------------


def prompts(**record) -> tuple[Prompt, ...]:
    return prompts_of(json.loads(json.dumps(record)))


def role(name: str, content: str, **more) -> dict:
    return {"role": name, "content": content, **more}


def test_a_message_of_weight_0_is_read_and_not_learned(tokenizer):
    (prompt,) = prompts(messages=[role("user", "1+1?"), role("assistant", "3", weight=0), role("user", "2+3?"),
                                  role("assistant", "5", weight=1)])  # fmt: skip
    assert_learned(prompt, tokenizer, f"{B}{U}1+1?{A}</think>3{E}{U}2+3?{A}</think>⟦5{E}⟧")


def test_weights_count_calls_and_their_answers_apart(tokenizer):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "unit": "cm"}'}}
    (prompt,) = prompts(messages=[role("user", "2+3?"), {"role": "assistant", "tool_calls": [call], "weight": 0},
                                  role("tool", "5", tool_call_id="c1"), role("assistant", "5 cm")])  # fmt: skip
    assert_learned(
        prompt, tokenizer, f"{B}{U}2+3?{A}</think>{CALL}{E}{U}<tool_result>5</tool_result>{A}</think>⟦5 cm{E}⟧"
    )


def test_each_thought_about_answer_of_a_long_conversation_is_learned_once(tokenizer):
    messages = [
        role("user", "1+1?"), role("assistant", "2", reasoning_content="one and one"),
        role("user", "1+2?"), role("assistant", "3"),
        role("user", "2+3?"), role("assistant", "5", reasoning_content="two and three"),
    ]  # fmt: skip
    first, whole = prompts(messages=messages)
    assert_learned(first, tokenizer, f"{B}{U}1+1?{A}<think>⟦one and one</think>2{E}⟧")
    assert_learned(
        whole, tokenizer,
        f"{B}{U}1+1?{A}</think>2{E}{U}1+2?{A}</think>⟦3{E}⟧{U}2+3?{A}<think>⟦two and three</think>5{E}⟧",
    )  # fmt: skip
    messages[1]["weight"] = 0
    assert len(prompts(messages=messages)) == 1, "what is not to be learned needs no example"


def test_answers_inside_a_prompt_are_not_learned(tokenizer):
    (prompt,) = prompts(prompt=[role("user", "1+1?"), role("assistant", "2"), role("user", "2+3?")],
                        completion=[role("assistant", "5")])  # fmt: skip
    assert_learned(prompt, tokenizer, f"{B}{U}1+1?{A}</think>2{E}{U}2+3?{A}</think>⟦5{E}⟧")


def test_answers_are_counted_by_their_end_marks_even_with_tasks_and_open_ends():
    conversation = Conversation(
        (user(), said("5", task="title"), said("A sum"), user(), said("Well", is_open=True)), thinking=False
    )
    prompt = learned_where(render(conversation, for_training=True), lambda answer: answer == 1)
    assert "".join(piece.text for piece in prompt.pieces if piece.is_learned) == f"A sum{E}"
    prompt = learned_where(render(conversation, for_training=True), lambda answer: answer == 2)
    assert "".join(piece.text for piece in prompt.pieces if piece.is_learned) == "Well"
