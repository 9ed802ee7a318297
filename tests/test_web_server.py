"""The page on the real server, from the key to the cost: a real Chromium, a real engine, answers that the test wrote."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect
from serving import LiveServer, ScriptedModel, live_server, make_engine, make_tokenizer
from visitor import Visitor

from longreach.server.models import ChatSetup

REASONED = "First I add them.</think>The **answer** is `42`."


@pytest.fixture(scope="module")
def model() -> ScriptedModel:
    tokenizer = make_tokenizer()
    model = ScriptedModel("small", make_engine(tokenizer), ChatSetup(texts="none", is_trained=True))
    model.script.update({
        "plainly": "Just 42.", "ponder": REASONED,
        "attack": "</think><img src=x onerror=\"document.title='broken'\"> [x](javascript:alert(2))"
        '<a href="javascript:alert(1)">go</a>',
        "slowly": "</think>" + "word " * 300,
    })  # fmt: skip
    return model


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with live_server(folder, model, keys=({"name": "laptop"},)) as server:
        yield server


@pytest.fixture
def visitor(browser, server: LiveServer):
    visitor = Visitor(browser, server)
    page = visitor.page
    page.get_by_label("Key", exact=True).fill(server.secrets[0])
    visitor.button("Use this key").click()
    expect(page.get_by_label("Model")).to_have_value("small")
    yield visitor
    visitor.leave()


def test_without_thinking_the_answer_comes_at_once(visitor):
    visitor.think("Non-think")
    answer = visitor.ask("Tell me plainly")
    expect(answer).to_contain_text("Just 42.")
    expect(answer.locator(".reasoning")).to_have_count(0)


@pytest.mark.parametrize("mode", ["Think high", "Think max"])
def test_while_thinking_the_reasoning_is_shown_above_the_answer(visitor, mode):
    visitor.think(mode)
    answer = visitor.ask("Please ponder")
    expect(answer.locator("strong")).to_have_text("answer")
    expect(answer.locator("code")).to_have_text("42")
    expect(answer.locator(".thought")).to_be_visible()
    expect(answer.locator(".thought")).to_contain_text("First I add them.")


def test_an_answer_cannot_reach_the_page(visitor):
    visitor.ask("An attack please")
    assert visitor.page.title() != "broken"
    assert visitor.page.locator(".answer img, .answer [onerror], .answer a[href^='javascript']").count() == 0


def test_stopping_ends_the_request_in_the_engine(visitor, model, server):
    model.delay_s = 0.05
    try:
        visitor.say("Go slowly")
        expect(visitor.answer).to_contain_text("word")
        visitor.button("Stop the answer").click()
        expect(visitor.button("Stop the answer")).to_be_hidden()
        visitor.page.wait_for_timeout(500)
        assert not model.engine.requests
    finally:
        model.delay_s = 0.0


def test_the_gauges_and_the_cost_are_the_server_s_own(visitor, model):
    visitor.think("Non-think")
    for _ in range(2):
        visitor.ask("Tell me plainly")
    gauges = visitor.gauges
    expect(gauges).to_contain_text("V3.2")
    expect(gauges).to_contain_text("hit")
    expect(gauges).to_contain_text("$")


def test_a_dropped_file_is_read_by_the_model(visitor, model):
    visitor.drop("notes.txt", "The code word is heron.\n" * 40)
    expect(visitor.page.get_by_text("notes.txt")).to_be_visible()
    visitor.ask("Tell me plainly")
    assert "The code word is heron." in model.prompts[-1]


@pytest.mark.parametrize(("width", "height"), [(375, 740), (1280, 800)])
def test_nothing_is_wider_than_the_window(browser, server, width, height):
    visitor = Visitor(browser, server, width=width, height=height)
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
    visitor.leave()
