"""The next turn's prompt has the tokens that the model wrote, so that the cache knows all of them."""

from __future__ import annotations

import json

import httpx
import pytest
from serving import ScriptedModel, live_server, make_engine, make_tokenizer

from longreach.chat.messages import Conversation, Message, Tool, ToolCall
from longreach.chat.renderer import render
from longreach.server.replay import Replay
from longreach.tokenizer.special import DSML, EOS, THINK_END

TOKENIZER = make_tokenizer()
ANSWER = "Hello, the answer is 42."


def spelled(text: str) -> list[int]:
    """The text in tokens of one byte each, as no encoder would write it."""
    one = {piece: index for index, piece in enumerate(TOKENIZER.token_bytes) if len(piece) == 1}
    return [one[bytes([byte])] for byte in text.encode()]


def marked(*parts: str | list[int]) -> list[int]:
    """Ids of parts: texts with special tokens, or ids as they are."""
    return [i for p in parts for i in (TOKENIZER.encode(p, allow_special=True) if isinstance(p, str) else p)]


def history(*messages: Message, tools: tuple[Tool, ...] = (), thinking: bool = False) -> Conversation:
    return Conversation((Message("user", "Hi"), *messages, Message("user", "And?")), tools, thinking=thinking)


def test_an_answer_comes_back_in_the_tokens_it_was_written_in():
    replay = Replay(TOKENIZER)
    assert spelled(ANSWER) != TOKENIZER.encode(ANSWER)
    replay.learn("a", Message("assistant", ANSWER), [*spelled(ANSWER), TOKENIZER.eos_id], thinks=False)
    prompt = render(history(Message("assistant", ANSWER)), texts="none")
    ids = prompt.encode(TOKENIZER, replay.of("a"))
    assert TOKENIZER.decode(ids) == prompt.text
    begin = ids.index(TOKENIZER.special_id(THINK_END)) + 1
    assert ids[begin:][: len(spelled(ANSWER))] == spelled(ANSWER)
    assert prompt.encode(TOKENIZER, replay.of("b")) == prompt.encode(TOKENIZER), "another tenant's answer"


def test_a_user_who_repeats_an_answer_is_encoded_as_ever():
    replay = Replay(TOKENIZER)
    replay.learn("a", Message("assistant", ANSWER), spelled(ANSWER), thinks=False)
    prompt = render(Conversation((Message("user", ANSWER),), thinking=False), texts="none")
    assert prompt.encode(TOKENIZER, replay.of("a")) == prompt.encode(TOKENIZER)


def test_arguments_in_a_client_s_words_become_the_model_s_again():
    tool = Tool({"name": "add", "parameters": {"type": "object"}})
    block = (
        f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="add">\n<{DSML}parameter name="x" string="false">{{"a":1}}'
        f"</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>"
    )
    written = marked("Hm.", THINK_END, block, EOS)
    replay = Replay(TOKENIZER)
    replay.learn("a", Message("assistant", "", "Hm.", (ToolCall("add", '{"x": {"a": 1}}', "c"),)), written, thinks=True)
    back = Message("assistant", "", "Hm.", (ToolCall("add", json.dumps({"x": {"a": 1}}), "c"),))
    prompt = render(
        Conversation((Message("user", "Hi"), back, Message("tool", "2", tool_call_id="c")), (tool,)), texts="none"
    )
    text = TOKENIZER.decode(prompt.encode(TOKENIZER, replay.of("a")))
    assert '{"a":1}' in text and '{"a":1}' not in prompt.text
    assert TOKENIZER.decode(written) in text


def test_text_that_only_looks_like_a_special_token_is_another_part():
    replay = Replay(TOKENIZER)
    block = f"\n\n<{DSML}tool_calls>\n</{DSML}tool_calls>"
    replay.learn("a", Message("assistant", block), spelled(block), thinks=False)
    prompt = render(history(Message("assistant", "", tool_calls=())), texts="none")
    assert prompt.encode(TOKENIZER, replay.of("a")) == prompt.encode(TOKENIZER)


def test_an_answer_that_did_not_think_after_all_is_cut_behind_its_mark():
    """The first token ends the reasoning; what follows is the answer, and nothing else comes back for it."""
    replay = Replay(TOKENIZER)
    replay.learn("a", Message("assistant", ANSWER), marked(THINK_END, spelled(ANSWER), EOS), thinks=True)
    for thinking in (False, True):
        prompt = render(history(Message("assistant", ANSWER), thinking=thinking), texts="none")
        ids = prompt.encode(TOKENIZER, replay.of("a"))
        assert TOKENIZER.decode(ids) == prompt.text
        assert ids != prompt.encode(TOKENIZER)


def test_an_answer_that_went_on_from_the_client_s_own_beginning_replaces_nothing(tmp_path):
    model = ScriptedModel("small", make_engine(TOKENIZER))
    model.script["Hi"] = spelled(" 42.")
    with live_server(tmp_path, model) as server:
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is", "prefix": True}]
        body = {"model": "small", "messages": messages, "thinking": {"type": "disabled"}, "max_tokens": 20}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"].endswith(" 42.")
        assert model.replay.of("0/")(" 42.") is None


def test_the_oldest_goes_when_there_is_too_much():
    replay = Replay(TOKENIZER, limit_bytes=1200)
    for number in range(4):
        text = f"{ANSWER} {number}"
        replay.learn("a", Message("assistant", text), spelled(text), thinks=False)
    known = [replay.of("a")(f"{ANSWER} {number}") is not None for number in range(4)]
    assert known == [False, False, True, True]


@pytest.mark.parametrize("thinking", [False, True])
def test_the_second_turn_finds_all_of_the_first_in_the_cache(tmp_path, thinking):
    model = ScriptedModel("small", make_engine(TOKENIZER))
    thought = marked("I see.", THINK_END) if thinking else []
    model.script["Hi"] = [*thought, *spelled(ANSWER)]
    with live_server(tmp_path, model) as server:
        ask = {"model": "small", "thinking": {"type": "enabled" if thinking else "disabled"}, "max_tokens": 60}
        messages = [{"role": "user", "content": "Hi"}]
        # Tools keep the reasoning of earlier turns in the prompt.
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
        url = f"{server.url}/v1/chat/completions"
        first = httpx.post(url, json=ask | {"messages": messages, "tools": tools}).json()
        messages += [first["choices"][0]["message"], {"role": "user", "content": "And?"}]
        model.script.clear()
        second = httpx.post(url, json=ask | {"messages": messages, "tools": tools, "max_tokens": 4}).json()
    whole = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
    assert second["usage"]["prompt_cache_hit_tokens"] >= whole - 1
