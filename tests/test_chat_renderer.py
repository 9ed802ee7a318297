"""Rendering conversations: published vectors byte for byte, deepseek-recipe as an oracle, what is learned and refused."""

from __future__ import annotations

import hashlib
import json
import random
import time
from pathlib import Path

import deepseek_recipe as recipe
import pytest
from conversations import (
    TOOLS,
    conversation_of,
    needs_fixtures,
    random_conversation,
    read_case,
    read_text,
)

from longreach.chat.messages import AnswerFormat, Conversation, Message, Tool, ToolCall
from longreach.chat.modes import ABSOLUTE, BEYOND
from longreach.chat.renderer import Prompt, fim, render
from longreach.errors import RequestError
from longreach.tokenizer.bpe import Tokenizer
from longreach.tokenizer.special import (
    ASSISTANT,
    BOS,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    LATEST_REMINDER,
    SPECIAL_TOKENS,
    TASKS,
    THINK_END,
    THINK_START,
    USER,
)

RANDOM_CONVERSATIONS = 5000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [
        "def add(a, b):\n    return a + b\n" * 20,
        "The weather in Paris is sunny. 你好，世界。 Hello! é 👩‍🚀\n" * 20,
    ]
    return Tokenizer.train(texts, vocab_size=800)


@pytest.fixture(scope="module")
def oracle(tokenizer, tmp_path_factory) -> recipe.DeepseekV4Encoding:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(file)
    return recipe.DeepseekV4Encoding().with_tokenizer(recipe.Tokenizer.from_file(str(file)))


def user(*messages: Message, **settings) -> Conversation:
    return Conversation((Message("user", "Q"), *messages), **settings)


# ---- published vectors ----------------------------------------------------------------------------------------------


@needs_fixtures
@pytest.mark.parametrize(
    ("number", "thinking", "sha256"),
    [(1, True, "9b366d9d"), (2, True, "ca66b01a"), (3, True, "b3b1cd87"), (4, False, "60e16438")],
)
def test_the_official_v4_cases_are_rendered_byte_for_byte(number, thinking, sha256):
    # Case 5 is left out: it is about images, which these models do not see.
    conversation = conversation_of(read_case(f"dsv4_official/test_input_{number}.json"), thinking=thinking)
    text = render(conversation, texts="none", for_training=True).text
    assert text == read_text(f"dsv4_official/test_output_{number}.txt")
    assert hashlib.sha256(text.encode()).hexdigest().startswith(sha256)


@needs_fixtures
@pytest.mark.parametrize("name", ["1", "2", "developer_tools"])
def test_the_v4_cases_of_vllm_are_rendered_byte_for_byte(name):
    conversation = conversation_of(read_case(f"vllm_renderer/v4/test_input_{name}.json"))
    assert render(conversation, texts="none", for_training=True).text == read_text(
        f"vllm_renderer/v4/test_output_{name}.txt"
    )


@needs_fixtures
@pytest.mark.parametrize("number", [1, 2])
def test_low_effort_and_the_april_default_mean_no_effort_text(number):
    case, text = (
        read_case(f"dsv4_official/test_input_{number}.json"),
        read_text(f"dsv4_official/test_output_{number}.txt"),
    )
    for texts, effort in [("0731", "low"), ("preview", "low"), ("preview", "high")]:
        assert render(conversation_of(case, effort=effort), texts=texts, for_training=True).text == text


@needs_fixtures
def test_all_v4_renderings_of_the_vendors_package_are_reproduced():
    cases, rows = read_case("deepseek_recipe_cases.json"), read_case("deepseek_recipe_rendered.json")
    rows = [row for row in rows if row["encoding"] == "v4"]  # the others are V4.1's layout, which is another one
    assert len(rows) == 80
    for row in rows:
        case = dict(cases[row["case"]])
        answer_format = None
        if "response_format" in case:
            answer_format = AnswerFormat(case["response_format"]["type"])
        elif "response_schema" in case:
            answer_format = AnswerFormat("json_schema", case["response_schema"])
        if case.get("tool_choice") == "none":
            del case["tools"]
        conversation = conversation_of(
            case, thinking=row["thinking"], effort=row["reasoning_effort"] or "high", answer_format=answer_format,
            must_call=case.get("tool_choice") == "required",
        )  # fmt: skip
        assert render(conversation, layout="hosted").text == row["prompt"], (row["case"], row["thinking"])


# ---- against the vendor's package -----------------------------------------------------------------------------------


def recipe_conversation(conversation: Conversation) -> recipe.Conversation:
    messages = []
    for m in conversation.messages:
        match m.role:
            case "system":
                messages.append(recipe.SystemMessage(m.content))
            case "user":
                messages.append(recipe.UserMessage(m.content))
            case "latest_reminder":
                messages.append(recipe.LatestReminderMessage(m.content))
            case "tool":
                messages.append(recipe.ToolMessage(m.content, m.tool_call_id))
            case _:
                calls = [recipe.ToolCall(call.id, call.name, call.arguments) for call in m.tool_calls]
                messages.append(recipe.AssistantMessage(m.content, m.reasoning, calls or None, m.is_open))
    form = conversation.answer_format
    kind = form.kind if form else ""
    return recipe.Conversation(
        messages,
        thinking_mode=conversation.thinking,
        tools=[recipe.ToolDefinition(t.name, t.function["description"], t.parameters) for t in conversation.tools],
        tool_choice="required" if conversation.must_call else "auto",
        reasoning_effort=conversation.effort,
        response_format="json_object" if kind == "json_object" else "text",
        response_schema=form.schema if form and kind == "json_schema" else None,
        response_regex=form.regex if form and kind == "regex" else None,
    )


def special_ranges(prompt: Prompt) -> list[tuple[int, int]]:
    ranges, place = [], 0
    for piece in prompt.pieces:
        if piece.is_special:
            ranges.append((place, place + len(piece.text)))
        place += len(piece.text)
    return ranges


def test_random_conversations_are_laid_out_as_the_vendors_package_does_special_tokens_included(oracle):
    for seed in range(RANDOM_CONVERSATIONS):
        conversation = random_conversation(random.Random(seed))
        expected = oracle.render_conversation(recipe_conversation(conversation))
        prompt = render(conversation, layout="hosted")
        assert prompt.text == expected.prompt, seed
        assert special_ranges(prompt) == expected.special_ranges, seed


def test_token_ids_are_those_of_the_vendors_package_for_the_same_tokenizer(tokenizer, oracle):
    for seed in range(500):
        conversation = random_conversation(random.Random(seed))
        expected = oracle.encode(recipe_conversation(conversation))
        assert render(conversation, layout="hosted").encode(tokenizer) == expected, seed


def test_both_layouts_agree_where_only_the_newest_turn_is_asked_for(tokenizer):
    for tools in ((), TOOLS):
        conversation = Conversation((Message("system", "S"), Message("user", "Q")), tools)
        assert render(conversation).text == render(conversation, layout="hosted").text


# ---- the layout by hand ---------------------------------------------------------------------------------------------


def test_a_question_without_thinking_is_five_pieces():
    assert render(user(thinking=False)).text == f"{BOS}{USER}Q{ASSISTANT}{THINK_END}"


@pytest.mark.parametrize(
    ("texts", "effort", "paragraph"),
    [
        ("preview", "low", ""), ("preview", "high", ""), ("preview", "max", ABSOLUTE),
        ("0731", "low", ""), ("0731", "high", ABSOLUTE), ("0731", "max", BEYOND),
        ("none", "low", ""), ("none", "high", ""), ("none", "max", ""),
    ],
)  # fmt: skip
def test_the_effort_paragraph_depends_on_the_revision_of_the_weights(texts, effort, paragraph):
    assert render(user(effort=effort), texts=texts).text == f"{BOS}{paragraph}{USER}Q{ASSISTANT}{THINK_START}"
    assert ABSOLUTE not in render(user(effort=effort, thinking=False), texts=texts).text


def test_reasoning_before_the_last_user_is_dropped_and_with_tools_it_is_kept():
    messages = (Message("assistant", "A", "R"), Message("user", "Q2"), Message("assistant", "A2", "R2"))
    text = render(user(*messages), texts="none", for_training=True).text
    assert text == f"{BOS}{USER}Q{ASSISTANT}{THINK_END}A{EOS}{USER}Q2{ASSISTANT}{THINK_START}R2{THINK_END}A2{EOS}"
    text = render(user(*messages, tools=TOOLS), texts="none", for_training=True).text
    assert f"{THINK_START}R{THINK_END}A{EOS}" in text and f"{THINK_START}R2{THINK_END}A2{EOS}" in text


@pytest.mark.parametrize("layout", ["encoder", "hosted"])
def test_a_finished_last_turn_gets_a_fresh_one_for_serving_and_ends_for_training(layout):
    for thinking, mark in ((True, THINK_START), (False, THINK_END)):
        conversation = user(Message("assistant", "A"), thinking=thinking)
        served = render(conversation, texts="none", layout=layout)
        learned = render(conversation, texts="none", layout=layout, for_training=True)
        assert served.text == f"{learned.text}{ASSISTANT}{mark}" and learned.text.endswith(f"A{EOS}")
        assert served.begins_thinking is thinking


@pytest.mark.parametrize("layout", ["encoder", "hosted"])
def test_a_prompt_for_serving_always_ends_ready_for_an_answer(layout):
    for seed in range(1000):
        conversation = random_conversation(random.Random(seed))
        prompt = render(conversation, layout=layout)
        last = conversation.messages[-1]
        if prompt.begins_call:
            assert prompt.text.endswith("tool_calls>\n")
        elif last.is_open:
            assert prompt.text.endswith(last.content)
        else:
            assert prompt.text.endswith(f"{ASSISTANT}{THINK_START if conversation.thinking else THINK_END}")
            assert prompt.begins_thinking == conversation.thinking


def test_a_late_system_text_stays_in_place_or_moves_to_the_front():
    messages = (Message("assistant", "A"), Message("system", "S"), Message("user", "Q2"))
    conversation = user(*messages, thinking=False)
    assert f"A{EOS}S{USER}Q2" in render(conversation).text
    assert render(conversation, layout="hosted").text.startswith(f"{BOS}S{USER}Q{ASSISTANT}")


def test_tool_results_are_put_into_the_order_of_their_calls():
    calls = tuple(ToolCall("f-1", "{}", id) for id in ("1", "2", "3"))
    results = tuple(Message("tool", id, tool_call_id=id) for id in ("3", "1", "2"))
    conversation = user(Message("assistant", tool_calls=calls), *results, Message("user", "and?"), tools=TOOLS)
    expected = "\n\n".join(f"<tool_result>{id}</tool_result>" for id in "123") + "\n\nand?"
    for layout in ("encoder", "hosted"):
        assert f"{USER}{expected}{ASSISTANT}{THINK_START}" in render(conversation, layout=layout).text


def test_tools_stand_at_the_first_system_message_or_at_an_empty_one():
    with_system = render(Conversation((Message("system", "S"), Message("user", "Q")), TOOLS), texts="none").text
    assert with_system.startswith(f"{BOS}S\n\n## Tools\n\n")
    assert render(user(tools=TOOLS), texts="none").text.startswith(f"{BOS}\n\n## Tools\n\n")


def test_a_tool_is_shown_key_by_key_as_it_was_given():
    tool = Tool({"z": 1, "name": "f", "a": {"é": [1.5, None]}})
    assert '\n{"z": 1, "name": "f", "a": {"é": [1.5, null]}}\n' in render(user(tools=(tool,))).text


def test_developers_before_the_last_question_are_dropped_with_the_reasoning():
    messages = (Message("developer", "D1"), Message("assistant", "A", "R"), Message("user", "Q"))
    assert "D1" not in render(Conversation(messages)).text
    assert "D1" in render(Conversation(messages, thinking=False)).text
    with_tools = (Message("developer", "D1", tools=TOOLS[:1]), *messages[1:])
    assert f"{USER}D1\n\n## Tools" in render(Conversation(with_tools)).text


def test_quick_instructions_are_asked_in_place_of_an_answer():
    conversation = Conversation((Message("user", "Q", task="query"),), thinking=False)
    assert render(conversation).text == f"{BOS}{USER}Q{TASKS['query']}"
    conversation = Conversation((Message("user", "Q", task="action"),), thinking=False)
    assert render(conversation).text == f"{BOS}{USER}Q{ASSISTANT}{THINK_END}{TASKS['action']}"
    messages = (Message("user", "Q"), Message("assistant", "A", task="title"), Message("assistant", "T"))
    text = render(Conversation(messages), texts="none", for_training=True).text
    assert text == f"{BOS}{USER}Q{ASSISTANT}{THINK_START}{THINK_END}A{EOS}{TASKS['title']}T{EOS}"


def test_an_open_message_is_gone_on_with_from_its_end():
    for reasoning, content, thinking, tail in [
        (None, "Roses", False, f"{THINK_END}Roses"),
        (None, "Roses", True, f"{THINK_START}{THINK_END}Roses"),
        ("so", "Roses", True, f"{THINK_START}so{THINK_END}Roses"),
        ("so", "", True, f"{THINK_START}so"),
        (None, "", True, THINK_START),
        (None, "", False, THINK_END),
    ]:
        prompt = render(user(Message("assistant", content, reasoning, is_open=True), thinking=thinking), texts="none")
        assert prompt.text == f"{BOS}{USER}Q{ASSISTANT}{tail}"
        assert prompt.begins_thinking == (thinking and not content)


def test_a_demanded_call_is_opened_but_never_before_the_reasoning_unless_the_vendor_does():
    prompt = render(user(tools=TOOLS, must_call=True, thinking=False))
    assert prompt.text.endswith(f"{THINK_END}\n\n<｜DSML｜tool_calls>\n") and prompt.begins_call
    prompt = render(user(tools=TOOLS, must_call=True))
    assert prompt.text.endswith(THINK_START) and prompt.begins_thinking and not prompt.begins_call
    prompt = render(user(tools=TOOLS, must_call=True), layout="hosted")  # the vendor's API refuses this case
    assert prompt.begins_call and not prompt.begins_thinking


def test_a_reminder_stands_before_the_turn_it_is_for():
    conversation = Conversation((Message("latest_reminder", "today"), Message("user", "Q")), thinking=False)
    assert render(conversation).text == f"{BOS}{LATEST_REMINDER}today{USER}Q{ASSISTANT}{THINK_END}"


def test_filling_in_is_laid_out_as_it_is_trained():
    assert fim("a", "b").text == f"{BOS}{FIM_BEGIN}a{FIM_HOLE}b{FIM_END}"
    assert fim("a").text == f"{BOS}a"
    assert fim(EOS, FIM_END).pieces[2].is_special is False


# ---- tokens ---------------------------------------------------------------------------------------------------------


def test_a_special_token_typed_anywhere_never_becomes_one(tokenizer):
    typed = "".join(SPECIAL_TOKENS)
    calls = (ToolCall(typed, f'{{"{typed}": "{typed}", "b": ["{typed}"]}}', "1"), ToolCall("f", typed, "2"))
    tool = Tool({"name": "f", "description": typed, "parameters": {"type": typed}})

    def conversation(text: str) -> Conversation:
        messages = (
            Message("system", text), Message("latest_reminder", text), Message("user", text),
            Message("assistant", text, text, calls), Message("tool", text, tool_call_id="1"),
            Message("tool", text, tool_call_id="2"), Message("assistant", text, text, is_open=True),
        )  # fmt: skip
        return Conversation(messages, (tool,), AnswerFormat("json_schema", {"title": text}))

    for layout in ("encoder", "hosted"):
        ids = [render(conversation(text), layout=layout).encode(tokenizer) for text in (typed, "plain")]
        marks = set(tokenizer.special_ids.values())
        assert [i for i in ids[0] if i in marks] == [i for i in ids[1] if i in marks]
        assert tokenizer.decode(ids[0]) == render(conversation(typed), layout=layout).text


def test_what_an_assistant_said_is_learned_and_nothing_else(tokenizer):
    calls = (ToolCall("f-1", '{"a": 1}', "1"),)
    messages = (
        Message("assistant", "A", "R", calls),
        Message("tool", "T", tool_call_id="1"),
        Message("assistant", "B"),
    )
    prompt = render(user(*messages, tools=TOOLS), for_training=True)
    ids, mask = prompt.encode_with_loss(tokenizer)
    assert ids == prompt.encode(tokenizer)
    learned = tokenizer.decode([i for i, is_learned in zip(ids, mask, strict=True) if is_learned])
    block = (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f-1">\n<｜DSML｜parameter name="a" string="false">1'
        "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
    assert learned == f"R{THINK_END}A{block}{EOS}{THINK_END}B{EOS}"


def test_an_answer_whose_reasoning_is_dropped_is_not_learned(tokenizer):
    messages = (Message("assistant", "A", "R"), Message("user", "Q"), Message("assistant", "B", "S"))
    prompt = render(user(*messages), for_training=True)
    assert "".join(piece.text for piece in prompt.pieces if piece.is_learned) == f"S{THINK_END}B{EOS}"
    # Without thinking the same answers are those of another mode, and whole.
    prompt = render(user(*messages, thinking=False), for_training=True)
    assert "".join(piece.text for piece in prompt.pieces if piece.is_learned) == f"A{EOS}B{EOS}"


def test_a_token_on_the_border_of_what_is_learned_belongs_to_its_first_byte(tokenizer):
    # Only the reminder behind a question lets text that is learned touch text that is not.
    conversation = user(Message("latest_reminder", "retu"), Message("assistant", "rn a + b"), thinking=False)
    prompt = render(conversation, for_training=True)
    ids, mask = prompt.encode_with_loss(tokenizer)
    assert ids == prompt.encode(tokenizer)
    border = next(i for i in range(len(ids)) if mask[i])
    assert tokenizer.decode(ids[:border]).endswith("return")
    assert tokenizer.decode(ids[border:]) == f" a + b{EOS}"


def test_a_tokenizer_without_a_mark_is_refused_by_the_marks_name(tokenizer):
    description = json.loads(tokenizer._json)
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] != USER]
    with pytest.raises(RequestError, match="no special token '<｜User｜>'"):
        render(user()).encode(Tokenizer(json.dumps(description)))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        (Conversation(()), "no messages"),
        (user(Message("robot", "x")), "message 1 has the unknown role 'robot'"),
        (user(Message("tool", "x")), "message 1 is a tool's result, but no tool call precedes it"),
        (user(Message("assistant", "x"), Message("tool", "y")), "message 2 is a tool's result"),
        (
            user(Message("assistant", tool_calls=(ToolCall("f", "{}", "1"),)), Message("tool", "y", tool_call_id="2")),
            "message 2 answers the tool call '2'",
        ),
        (user(Message("assistant", "x", is_open=True), Message("user", "y")), "message 1 is open"),
        (user(Message("assistant", "x", None, (ToolCall("f", "{}"),), is_open=True)), "message 1 is open"),
        (user(Message("user", "x", is_open=True)), "message 1 has tool calls, reasoning or an open end"),
        (user(Message("user", "x", tools=TOOLS)), "message 1 announces tools"),
        (user(Message("user", "x", task="cook")), "unknown task 'cook'; tasks are action, query"),
        (user(Message("system", "x", task="query")), "message 1 asks for a task"),
        (user(effort="huge"), "effort 'huge' is unknown; there are low, high, max"),
        (user(tools=(Tool({"name": "f", "parameters": {1, 2}}),)), "tool 'f' cannot be written as JSON"),
    ],
)
def test_messages_that_do_not_fit_together_are_refused_in_one_clear_line(conversation, expected):
    with pytest.raises(RequestError) as refusal:
        render(conversation)
    assert expected in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("message", [Message("developer", "D"), Message("user", "Q", task="title")])
def test_the_hosted_layout_refuses_what_it_cannot_express(message):
    with pytest.raises(RequestError, match="the hosted layout has no developer role and no tasks"):
        render(Conversation((message,)), layout="hosted")


# ---- speed ----------------------------------------------------------------------------------------------------------


def long_conversation(num_turns: int) -> Conversation:
    calls = (ToolCall("get_weather", '{"city": "Paris", "days": 3}', "1"),)
    turn = (
        Message("user", "What is the weather in Paris? " * 3), Message("assistant", "", "I call the tool. " * 5, calls),
        Message("tool", '{"sunny": true} ' * 5, tool_call_id="1"), Message("assistant", "It is sunny. " * 10, "Done."),
    )  # fmt: skip
    return Conversation((Message("system", "S"), *turn * num_turns, Message("user", "?")), TOOLS)


def test_the_cost_of_a_long_history_grows_with_its_length(tokenizer):
    def seconds(num_turns: int) -> float:
        conversation, times = long_conversation(num_turns), []
        for _ in range(5):
            began = time.process_time()
            render(conversation).encode(tokenizer)
            times.append(time.process_time() - began)
        return min(times)

    assert seconds(240) < 8 * seconds(60)


def test_a_saved_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    file = Path(tmp_path) / "tokenizer.json"
    tokenizer.save(file)
    prompt = render(long_conversation(2))
    assert prompt.encode(Tokenizer.load(file)) == prompt.encode(tokenizer)
