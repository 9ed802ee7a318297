"""The page, as a person meets it: a real Chromium opens it, types, drops files, reads what stands there.

The server behind it is `web_stub.py`, whose answers are scripted; the page cannot tell it from one with a model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect
from visitor import Visitor
from web_stub import MARKDOWN, WEB, StubServer, model

OWN_BYTES = 60_200


@pytest.fixture
def stub() -> Iterator[StubServer]:
    with StubServer() as stub:
        yield stub


@pytest.fixture
def visitor(browser, stub) -> Iterator[Visitor]:
    visitor = Visitor(browser, stub)
    yield visitor
    visitor.leave()


@pytest.fixture
def opened(browser, stub) -> Iterator:
    """Opens windows with other sizes or themes, or onto a stub that was changed before."""
    visitors: list[Visitor] = []

    def open_page(**shape) -> Visitor:
        visitors.append(Visitor(browser, stub, **shape))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.leave()


# ---- chat ------------------------------------------------------------------------------------------------------------


def test_without_thinking_the_answer_comes_alone(visitor, stub):
    visitor.think("Non-think")
    expect(visitor.ask("Hello there").locator(".prose")).to_have_text("You said: Hello there")
    expect(visitor.answer.locator(".reasoning")).to_have_count(0)
    assert stub.bodies[0]["thinking"] == {"type": "disabled"}
    assert "reasoning_effort" not in stub.bodies[0]


@pytest.mark.parametrize("effort", ["low", "high", "max"])
def test_each_effort_is_asked_for_and_its_reasoning_can_be_read(visitor, stub, effort):
    visitor.think(f"Think {effort}")
    visitor.ask("Hello there")
    assert stub.bodies[0]["thinking"] == {"type": "enabled"}
    assert stub.bodies[0]["reasoning_effort"] == effort
    expect(visitor.answer.locator(".thought")).to_contain_text(f"Thinking with effort {effort}.")
    expect(visitor.answer.locator(".thought")).to_be_visible()
    expect(visitor.answer.locator("summary")).to_have_text(re.compile(r"^Thought for \d+\.\d s · 14 tokens$"))
    visitor.answer.locator("summary").click()
    expect(visitor.answer.locator(".thought")).to_be_hidden()
    expect(visitor.answer.locator(".prose")).to_have_text("You said: Hello there")


def test_time_and_tokens_of_the_reasoning_are_shown_while_it_goes_on(visitor, stub):
    stub.chunk_s = 0.3
    visitor.say("Hello there")
    expect(visitor.answer.locator("summary")).to_have_text(re.compile(r"^Thinking · \d\.\d s · about [2-9] tokens$"))
    visitor.page.keyboard.press("Escape")


def test_the_next_question_carries_the_conversation_without_its_reasoning(visitor, stub):
    visitor.ask("First")
    visitor.ask("Second")
    assert stub.bodies[1]["messages"] == [
        {"role": "user", "content": "First"},
        {"role": "assistant", "content": "You said: First"},
        {"role": "user", "content": "Second"},
    ]


def test_settings_go_with_the_next_message(visitor, stub):
    visitor.button("Settings").click()
    visitor.page.get_by_label("System prompt").fill("Answer briefly.")
    visitor.page.get_by_label("Temperature").fill("0.3")
    visitor.page.get_by_label("Longest answer, in tokens").fill("500")
    visitor.button("Close the settings").click()
    visitor.ask("Hello")
    body = stub.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Answer briefly."}
    assert (body["temperature"], body["max_tokens"]) == (0.3, 500)


def test_a_temperature_out_of_range_is_not_taken(visitor, stub):
    visitor.button("Settings").click()
    visitor.page.get_by_label("Temperature").fill("7")
    visitor.page.get_by_label("Temperature").blur()
    visitor.page.keyboard.press("Escape")
    visitor.ask("Hello")
    assert "temperature" not in stub.bodies[0]


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_a_stopped_answer_keeps_what_has_come(visitor, stub, how):
    visitor.think("Non-think")
    visitor.say("slow please")
    expect(visitor.answer.locator(".prose")).to_contain_text("word10")
    if how == "button":
        visitor.button("Stop the answer").click()
    else:
        visitor.page.keyboard.press("Escape")
    expect(visitor.answer.locator(".facts")).to_contain_text("stopped by you")
    kept = visitor.answer.locator(".prose").inner_text()
    assert kept.startswith("word0 word1 word2")
    visitor.page.wait_for_timeout(400)
    assert visitor.answer.locator(".prose").inner_text() == kept
    expect(visitor.gauges).to_contain_text("1 answer ended early and is not in these figures.")
    assert stub.running == 0  # the server heard of it


def test_an_answer_is_made_again_in_place_of_the_old_one(visitor, stub):
    visitor.ask("Hello")
    visitor.think("Think max")
    visitor.button("Regenerate").click()
    expect(visitor.answer.locator(".thought")).to_contain_text("effort max")
    expect(visitor.button("Regenerate")).to_be_visible()
    assert [len(body["messages"]) for body in stub.bodies] == [1, 1]
    expect(visitor.page.locator(".turn")).to_have_count(2)


def test_the_last_question_can_be_changed(visitor, stub):
    visitor.ask("First")
    visitor.ask("Secnod")
    visitor.button("Edit").click()
    field = visitor.page.get_by_label("Your message, to be changed")
    expect(field).to_be_focused()
    field.fill("Second")
    field.press("Enter")
    expect(visitor.answer.locator(".prose")).to_have_text("You said: Second")
    expect(visitor.page.locator(".turn")).to_have_count(4)
    assert [message["content"] for message in stub.bodies[2]["messages"]] == ["First", "You said: First", "Second"]


def test_an_answer_and_its_code_can_be_copied(visitor):
    visitor.ask("markdown please")
    visitor.answer.locator(".tools").get_by_role("button", name="Copy").click()
    assert visitor.page.evaluate("() => navigator.clipboard.readText()") == MARKDOWN
    visitor.page.get_by_role("button", name="Copy this code").click()
    expect(visitor.page.get_by_role("button", name="Copy this code")).to_have_text("Copied")
    assert visitor.page.evaluate("() => navigator.clipboard.readText()").startswith(
        "def entries(tokens: int, ratio: int)"
    )


def test_shift_enter_makes_a_line_and_enter_sends(visitor, stub):
    visitor.page.get_by_label("Message", exact=True).focus()
    visitor.page.keyboard.type("one")
    visitor.page.keyboard.press("Shift+Enter")
    visitor.page.keyboard.type("two")
    visitor.page.keyboard.press("Enter")
    expect(visitor.question.locator(".text")).to_have_text("one\ntwo")
    expect(visitor.answer.locator(".prose")).to_contain_text("You said: one")
    assert stub.bodies[0]["messages"][0]["content"] == "one\ntwo"


def test_a_waiting_request_says_that_it_waits(visitor):
    visitor.say("queue me")
    expect(visitor.answer.locator(".state")).to_have_text(
        re.compile("^Waiting in line or reading the prompt · 1\\.[0-9] s$")
    )
    expect(visitor.answer.locator(".prose")).to_have_text("You said: queue me")
    expect(visitor.answer.locator(".state")).to_be_hidden()


def test_a_screen_reader_hears_the_finished_answer_once(visitor):
    visitor.ask("Hello there")
    live = visitor.page.locator("[aria-live=polite]")
    expect(live).to_have_text("Answer: You said: Hello there")
    expect(visitor.page.locator("#turns [aria-live]")).to_have_count(0)


def test_two_conversations_are_answered_side_by_side(visitor):
    visitor.think("Non-think")
    visitor.say("slow please")
    expect(visitor.answer.locator(".prose")).to_contain_text("word3")
    visitor.button("New chat").click()
    expect(visitor.ask("Hello").locator(".prose")).to_have_text("You said: Hello")
    visitor.button("slow please").click()
    expect(visitor.answer.locator(".prose")).to_contain_text("word20")
    visitor.button("Stop the answer").click()
    expect(visitor.answer.locator(".facts")).to_contain_text("stopped by you")


# ---- Markdown and what hides in it -----------------------------------------------------------------------------------


def test_markdown_is_shown_as_such(visitor):
    answer = visitor.ask("markdown please")
    expect(answer.get_by_role("heading", name="Growth of a cache")).to_be_visible()
    expect(answer.locator("td").nth(2)).to_have_css("text-align", "right")
    expect(answer.locator("ol > li")).to_have_count(3)
    expect(answer.locator("li ul > li")).to_have_count(2)
    expect(answer.locator(".code-bar span")).to_have_text("python")
    expect(answer.get_by_text(r"\(c_j = \sum_i w_i k_i\)")).to_be_visible()
    link = answer.get_by_role("link", name="the report")
    expect(link).to_have_attribute("href", "https://example.org/report")
    expect(link).to_have_attribute("rel", re.compile("noopener"))
    expect(link).to_have_attribute("target", "_blank")


def test_nothing_in_an_answer_runs_loads_or_imitates_the_page(visitor):
    answer = visitor.ask("traps please")
    # What was HTML is there to be read, and nothing of it is an element.
    expect(answer.locator(".prose")).to_contain_text("""<img src=x onerror="document.title='owned'">""")
    forbidden = "img, script, svg, iframe, form, input, [onclick], [onerror], [style], [id], .problem"
    expect(answer.locator(".prose").locator(forbidden)).to_have_count(0)
    addresses = answer.locator("a[href]").evaluate_all("links => links.map((link) => link.getAttribute('href'))")
    assert addresses == ["https://example.invalid/leak?secret=1", "https://example.org/page"]
    answer.get_by_text("marked link").click()
    expect(visitor.page).to_have_title("longreach")


def test_the_sanitiser_stops_what_markdown_lets_through(opened):
    visitor = opened()
    bare = visitor.page.evaluate(
        """async () => {
            const { clean } = await import("/web/markdown.js");
            const box = document.createElement("div");
            box.append(clean(`<p id="a" class="problem" data-x="1">x<b onclick="1">y</b></p><a href="/user/balance">z</a>
                <a href="jav&#x09;ascript:alert(1)">q</a><math><mi>m</mi></math><code class="language-c x">c</code>
                <button>b</button><a href="https://example.org" target="_self">w</a>`));
            return box.innerHTML.replace(/\\s+/g, " ");
        }"""
    )
    assert bare == (
        '<p>x<b>y</b></p><a>z</a> <a>q</a><code>c</code> b<a href="https://example.org" target="_blank" '
        'rel="noopener noreferrer nofollow">w</a>'
    )


@pytest.mark.parametrize("links", ["with links by name", "without"])
def test_markdown_in_pieces_ends_as_markdown_in_one(visitor, links):
    """Wherever the stream is cut and however often it is drawn on the way."""
    text = MARKDOWN if links == "with links by name" else MARKDOWN[: MARKDOWN.index("See [")]
    sample = text + "\n1. one\n\n2. two\n\n   more\n- a\n\nTitle\n=====\n\n* x\n\n  y\n\n<details>\n\n```\nopen"
    wrong = visitor.page.evaluate(
        """async (sample) => {
            const { MarkdownStream } = await import("/web/markdown.js");
            const html = (pieces, draw) => {
                const box = document.createElement("div");
                const stream = new MarkdownStream(box);
                // A finished stream draws at once, so that no test has to wait for the clock.
                for (const piece of pieces) { stream.append(piece); if (draw) stream.finish(); }
                stream.finish();
                return box.innerHTML;
            };
            const whole = html([sample], false);
            if (!whole.includes("<table>")) return ["no table"];
            let seed = 7;
            const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
            const wrong = [];
            for (let round = 0; round < 20; round++) {
                const pieces = [];
                for (let at = 0; at < sample.length;) {
                    const size = 1 + random(round < 5 ? 2 : 40);
                    pieces.push(sample.slice(at, at + size));
                    at += size;
                }
                if (html(pieces, true) !== whole) wrong.push(round);
            }
            return wrong;
        }""",
        sample,
    )
    assert wrong == []


def test_a_long_answer_is_drawn_ten_times_a_second_and_its_beginning_once(visitor):
    drawn, same, characters = visitor.page.evaluate(
        """async () => {
            const { MarkdownStream } = await import("/web/markdown.js");
            const box = document.getElementById("turns");
            const stream = new MarkdownStream(box);
            let drawn = 0;
            new MutationObserver(() => { drawn += 1; }).observe(box, { childList: true });
            const until = performance.now() + 2000;
            let first = null;
            for (let i = 0; performance.now() < until; i++) {
                stream.append(`Paragraph ${i} with *some* words.\\n\\n`);
                await new Promise((resolve) => setTimeout(resolve, 4));
                if (i > 60) first ??= box.firstChild;
            }
            stream.finish();
            return [drawn, first === box.firstChild, box.textContent.length];
        }"""
    )
    assert 3 <= drawn <= 21
    assert same
    assert characters > 3000


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_dropped_file_becomes_context_in_front_of_the_message(visitor, stub):
    visitor.drop("notes.txt", "alpha beta gamma " * 1000)
    chip = visitor.page.get_by_role("listitem").filter(has_text="notes.txt")
    expect(chip).to_have_text(re.compile("notes.txt16.6\u00a0KiB · 3,000 tokens"))
    visitor.ask("Summarise this.")
    expected = (
        "[file name]: notes.txt\n[file content begin]\n"
        + "alpha beta gamma " * 1000
        + "\n[file content end]\nSummarise this."
    )
    assert stub.bodies[0]["messages"][0]["content"] == expected
    expect(visitor.question).to_contain_text("notes.txt")
    expect(visitor.question.locator(".text")).to_have_text("Summarise this.")
    visitor.ask("And now?")
    assert stub.bodies[1]["messages"][0]["content"] == expected  # the same bytes, so that the cache knows them


def test_a_file_can_be_chosen_and_taken_away_again(visitor, stub, tmp_path):
    (tmp_path / "a.md").write_text("some words")
    with visitor.page.expect_file_chooser() as chooser:
        visitor.button("Add a text file as context").click()
    chooser.value.set_files(tmp_path / "a.md")
    expect(visitor.page.locator(".chip")).to_contain_text("a.md")
    visitor.button("Remove a.md").click()
    expect(visitor.page.locator(".chip")).to_have_count(0)
    visitor.ask("Hello")
    assert stub.bodies[0]["messages"][0]["content"] == "Hello"


def test_a_file_that_is_not_text_is_refused_in_words(visitor):
    visitor.drop("picture.png", "\x89PNG\0\0", "image/png")
    expect(visitor.page.get_by_role("alert")).to_contain_text(
        "picture.png is a binary file. Convert it to plain text first."
    )
    expect(visitor.page.locator(".chip")).to_have_count(0)


def test_a_file_larger_than_the_context_is_announced_before_it_is_sent(visitor):
    visitor.page.get_by_label("Model").select_option("base")
    visitor.drop("book.txt", "word " * 5000)
    expect(visitor.page.get_by_role("alert")).to_contain_text("book.txt has 5,000 tokens; base holds 4,096.")


def test_a_conversation_goes_on_only_with_the_large_file_it_began_with(visitor, stub):
    book = "word " * 60_000
    visitor.drop("book.txt", book)
    visitor.ask("First")
    visitor.page.reload()
    visitor.button("First").click()
    expect(visitor.page.get_by_role("alert")).to_contain_text("book.txt (293\u00a0KiB) was too large to be kept.")
    visitor.say("Second")
    visitor.page.wait_for_timeout(200)
    assert len(stub.bodies) == 1
    visitor.drop("book.txt", book)
    expect(visitor.page.get_by_role("alert")).to_be_hidden()
    visitor.ask("Second")
    assert stub.bodies[1]["messages"][0] == stub.bodies[0]["messages"][0]


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_busy_server_says_when_and_a_click_tries_again(visitor, stub):
    stub.busy = 1
    visitor.say("busy now")
    problem = visitor.answer.get_by_role("alert")
    expect(problem).to_contain_text("The server is at its limit for now. Too many concurrent requests.")
    expect(problem).to_contain_text(re.compile("Free again in about [12] s."))
    visitor.button("Retry").click()
    expect(visitor.answer.locator(".prose")).to_have_text("You said: busy now")
    expect(visitor.page.get_by_role("alert")).to_have_count(0)
    expect(visitor.page.locator(".turn")).to_have_count(2)


@pytest.mark.parametrize(
    ("message", "line", "kept"),
    [
        ("poor me", "The budget of this key is used up. Insufficient Balance", ""),
        ("down now", "The server cannot answer at the moment. The model is being loaded.", ""),
        ("broken one", "The engine stopped.", "Half an"),
        ("cut off", "The connection closed before the answer was complete.", "Half an"),
    ],
)
def test_what_goes_wrong_is_one_line_and_what_had_come_stays(visitor, message, line, kept):
    visitor.say(message)
    expect(visitor.answer.get_by_role("alert").locator(".what")).to_have_text(line)
    expect(visitor.answer.locator(".prose")).to_have_text(kept)
    expect(visitor.button("Retry")).to_be_visible()


def test_a_key_is_asked_for_and_forgotten_with_the_page(opened, stub):
    stub.key = "sk-right"
    visitor = opened()
    dialog = visitor.page.get_by_role("dialog", name="API key")
    expect(dialog).to_contain_text("This server asks for an API key.")
    dialog.get_by_label("Key", exact=True).fill("sk-wrong")
    dialog.get_by_label("Key", exact=True).press("Enter")
    expect(dialog).to_contain_text("The server does not accept this key.")
    dialog.get_by_label("Key", exact=True).fill("sk-right")
    visitor.button("Use this key").click()
    expect(visitor.page.get_by_label("Model")).to_have_value("deepseek-v4-flash")
    visitor.ask("Hello")
    assert "sk-right" not in str(visitor.page.evaluate("() => ({ ...localStorage, ...sessionStorage })"))
    visitor.page.reload()
    expect(dialog).to_be_visible()


def test_a_key_outlives_a_reload_only_where_that_was_chosen(opened, stub):
    stub.key = "sk-right"
    visitor = opened()
    visitor.page.get_by_label("Key", exact=True).fill("sk-right")
    visitor.page.get_by_label("Keep it until this tab is closed").check()
    visitor.button("Use this key").click()
    expect(visitor.page.get_by_label("Model")).to_have_value("deepseek-v4-flash")
    visitor.page.reload()
    visitor.ask("Hello")
    assert "sk-right" not in str(visitor.page.evaluate("() => ({ ...localStorage })"))
    visitor.button("Settings").click()
    visitor.button("Forget the key").click()
    assert visitor.page.evaluate("() => sessionStorage.length") == 0


def test_a_message_refused_for_its_key_is_sent_again_with_a_new_one(visitor, stub):
    visitor.ask("First")
    stub.key = "sk-new"
    visitor.say("Second")
    visitor.page.get_by_label("Key", exact=True).fill("sk-new")
    visitor.button("Use this key").click()
    expect(visitor.answer.locator(".prose")).to_have_text("You said: Second")
    expect(visitor.page.locator(".turn")).to_have_count(4)


def test_without_a_key_the_page_says_so_and_offers_to_try_again(visitor, stub):
    visitor.ask("First")
    stub.key = "sk-new"
    visitor.say("Second")
    visitor.button("Not now").click()
    expect(visitor.answer.get_by_role("alert")).to_contain_text("This server asks for an API key.")
    stub.key = None
    visitor.button("Retry").click()
    expect(visitor.answer.locator(".prose")).to_have_text("You said: Second")


# ---- models ----------------------------------------------------------------------------------------------------------


def test_a_model_without_chat_training_is_named_as_such_and_does_not_think(visitor, stub):
    visitor.page.get_by_label("Model").select_option("base")
    expect(visitor.page.get_by_text("This model has no chat training; answers continue text.")).to_be_visible()
    expect(visitor.page.get_by_role("radio", name="Think high")).to_be_disabled()
    visitor.ask("Once upon")
    assert stub.bodies[0]["model"] == "base"
    assert stub.bodies[0]["thinking"] == {"type": "disabled"}


def test_the_router_is_offered_and_its_choice_is_shown(visitor, stub):
    visitor.page.get_by_label("Model").select_option("auto")
    expect(visitor.ask("Hello").locator(".facts")).to_contain_text("deepseek-v4-flash · think high")
    assert stub.bodies[0]["model"] == "auto"


def test_a_server_without_models_says_how_to_start_one(opened, stub):
    stub.models = []
    visitor = opened()
    expect(visitor.page.get_by_role("heading", name="No model yet")).to_be_visible()
    expect(visitor.page.get_by_text("longreach serve RUN")).to_be_visible()
    visitor.page.get_by_label("Message", exact=True).fill("Hello")
    expect(visitor.button("Send")).to_be_disabled()


def test_the_chosen_model_and_mode_are_there_after_a_reload(visitor, stub):
    stub.models.append(model("mine"))
    visitor.page.reload()
    visitor.page.get_by_label("Model").select_option("mine")
    visitor.think("Think max")
    visitor.page.reload()
    expect(visitor.page.get_by_label("Model")).to_have_value("mine")
    expect(visitor.page.get_by_role("radio", name="Think max")).to_be_checked()


# ---- gauges ----------------------------------------------------------------------------------------------------------


def test_the_gauges_show_what_the_server_says(visitor):
    gauges = visitor.gauges
    expect(gauges.locator("#speed")).to_have_text(re.compile(r"\d\d\.0"))
    expect(gauges.locator("#spark canvas")).to_be_visible()
    expect(gauges.locator("#kv-here")).to_have_text("48 MiB")
    expect(gauges.locator("#kv-old")).to_have_text("480 MiB")
    expect(gauges.locator("#kv-note")).to_have_text("10.0 times less than V3.2. Room for 2 GiB.")
    widths = [gauges.locator(f"#kv-{name}-bar").evaluate("bar => bar.style.width") for name in ("here", "old")]
    assert widths == ["10%", "100%"]
    expect(gauges.locator("#running")).to_have_text("0 of 32")
    expect(gauges.locator("#waiting")).to_have_text("2")
    expect(gauges.locator("#hit-rate")).to_have_text("60 %")
    expect(gauges.locator("#memory")).to_have_text("900 MiB")


def test_hits_and_cost_of_a_conversation_add_up(visitor):
    visitor.think("Non-think")
    visitor.ask("one two three")
    visitor.ask("four")
    # Read: 3 missed; then 3 + 5 ("You said: one two three") cached and 1 missed. Written, four letters a token:
    # 23 letters are 6 tokens, 14 ("You said: four") are 4.
    expect(visitor.gauges.locator("#hits")).to_have_text("67 %")
    expect(visitor.gauges.locator("#hits-note")).to_have_text(
        "8 of 12 prompt tokens came from the cache; 10 tokens written."
    )
    # (8 * 0.003 + 4 * 0.15 + 10 * 0.60) / 1e6 and (12 * 0.15 + 10 * 0.60) / 1e6
    expect(visitor.gauges.locator("#cost")).to_have_text("$0.00000662")
    expect(visitor.gauges.locator("#cost-uncached")).to_have_text("$0.0000078")
    visitor.button("New chat").click()
    expect(visitor.gauges.locator("#cost")).to_have_text("–")


def test_a_model_without_a_price_costs_an_unknown_amount_not_nothing(visitor):
    visitor.page.get_by_label("Model").select_option("base")
    visitor.ask("one two three")
    expect(visitor.gauges.locator("#cost-note")).to_have_text("No price is set for the model of 1 answer.")
    expect(visitor.gauges.locator("#cost")).to_have_text("–")


def test_the_gauges_are_asked_once_a_second_and_not_at_all_in_a_hidden_tab(visitor, stub):
    visitor.page.wait_for_timeout(3000)
    assert 2 <= stub.paths.count("/status") <= 6  # two more at the start: for the page and for its model
    visitor.page.evaluate(
        """() => {
            Object.defineProperty(document, "hidden", { value: true });
            document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    visitor.page.wait_for_timeout(300)
    asked = stub.paths.count("/status")
    visitor.page.wait_for_timeout(2200)
    assert stub.paths.count("/status") == asked


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_conversations_are_there_after_a_reload(visitor):
    visitor.ask("Remember this")
    visitor.page.reload()
    visitor.button("Remember this").click()
    expect(visitor.answer.locator(".prose")).to_have_text("You said: Remember this")
    visitor.answer.locator("summary").click()
    expect(visitor.answer.locator(".thought")).to_contain_text("An answer comes to mind.")
    expect(visitor.gauges.locator("#hits-note")).to_contain_text("2 prompt tokens")


def test_who_does_not_want_conversations_kept_leaves_nothing_behind(visitor):
    visitor.ask("First")
    visitor.button("Settings").click()
    visitor.page.get_by_label("Keep them in this browser").uncheck()
    visitor.button("Close the settings").click()
    visitor.ask("Second")
    assert visitor.page.evaluate("() => Object.keys(localStorage)") == ["longreach.settings"]
    expect(visitor.button("First")).to_be_visible()  # still here, but only in this page
    visitor.page.reload()
    expect(visitor.button("First")).to_have_count(0)


def test_one_or_all_conversations_can_be_deleted(visitor):
    for name in ("First", "Second"):
        visitor.button("New chat").click()
        visitor.ask(name)
    visitor.button("Delete “First”").click(force=True)
    visitor.button("Cancel").click()
    expect(visitor.button("First")).to_be_visible()
    visitor.button("Delete “First”").click(force=True)
    visitor.button("Delete").click()
    expect(visitor.button("First")).to_have_count(0)
    visitor.button("Settings").click()
    visitor.button("Delete all conversations").click()
    visitor.button("Delete all").click()
    expect(visitor.button("Second")).to_have_count(0)
    assert (
        visitor.page.evaluate("() => Object.keys(localStorage).filter((name) => name.includes('conversation'))") == []
    )


# ---- looks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_system_and_then_its_reader(opened, scheme):
    visitor = opened(scheme=scheme)
    other = {"light": "dark", "dark": "light"}[scheme]
    paper = {"light": "rgb(253, 252, 250)", "dark": "rgb(21, 24, 27)"}
    expect(visitor.page.locator("body")).to_have_css("background-color", paper[scheme])
    visitor.button(f"{other.title()} appearance").click()
    expect(visitor.page.locator("body")).to_have_css("background-color", paper[other])
    visitor.page.reload()
    expect(visitor.page.locator("body")).to_have_css("background-color", paper[other])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_on_every_ground(opened, scheme):
    visitor = opened(scheme=scheme)
    pairs = [(text, ground) for text in ("ink", "soft", "accent") for ground in ("paper", "ground", "tint", "raised")]
    pairs += [("wrong", "wrong-ground"), ("on-accent", "accent"), ("ink", "picked")]
    colours = visitor.page.evaluate(
        """(names) => {
            const probe = document.body.appendChild(document.createElement("p"));
            return Object.fromEntries(names.map((name) => {
                probe.style.color = `var(--${name})`;
                return [name, getComputedStyle(probe).color.match(/\\d+/g).map(Number)];
            }));
        }""",
        sorted({name for pair in pairs for name in pair}),
    )
    assert {
        pair: contrast(*(colours[name] for name in pair))
        for pair in pairs
        if contrast(*(colours[n] for n in pair)) < 4.5
    } == {}


def contrast(one: list[int], other: list[int]) -> float:
    """WCAG 2 contrast of two sRGB colours, 1 to 21."""

    def luminance(colour: list[int]) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(("width", "height"), [(375, 720), (768, 1024), (1280, 800)])
def test_the_page_fits_its_window(opened, width, height):
    visitor = opened(width=width, height=height)
    visitor.drop("a-file-with-a-rather-long-name-that-must-not-widen-the-page.txt", "words " * 2000)
    visitor.ask("markdown please " + "unbroken" * 30)
    assert visitor.page.evaluate("() => document.documentElement.scrollWidth") == width
    assert visitor.page.evaluate(
        "() => document.getElementById('log').scrollWidth <= document.getElementById('log').clientWidth"
    )
    for control in (
        visitor.button("Send"),
        visitor.page.get_by_role("radio", name="Think max"),
        visitor.page.get_by_label("Model"),
    ):
        box = control.bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= height


def test_on_a_phone_the_panels_open_over_the_conversation_and_escape_closes_them(opened):
    visitor = opened(width=375, height=720)
    expect(visitor.gauges).to_be_hidden()
    visitor.button("Show gauges").click()
    expect(visitor.gauges.locator("#kv-here")).to_have_text("48 MiB")
    expect(visitor.button("Close the gauges")).to_be_focused()
    visitor.page.keyboard.press("Escape")
    expect(visitor.gauges).to_be_hidden()
    expect(visitor.button("Show gauges")).to_be_focused()
    visitor.button("Show conversations").click()
    expect(visitor.button("New chat")).to_be_visible()
    visitor.button("New chat").click()
    expect(visitor.button("New chat")).to_be_hidden()


def test_everything_can_be_reached_with_the_keyboard_and_shows_where_it_is(visitor):
    visitor.ask("markdown please")
    reached = set()
    for _ in range(60):
        visitor.page.keyboard.press("Tab")
        name, outline = visitor.page.evaluate(
            """() => {
                const at = document.activeElement;
                const mark = at.type === "radio" ? at.nextElementSibling : at;
                const name = at.getAttribute("aria-label") || at.labels?.[0]?.textContent.trim() || at.textContent.trim();
                return [name, getComputedStyle(mark).outlineStyle];
            }"""
        )
        reached.add(name)
        # The message field is marked by the frame around it, and the end of the page has no element.
        assert (
            outline != "none"
            or name == "Message"
            or visitor.page.evaluate("() => document.activeElement === document.body")
        )
    wanted = "New chat, Settings, Dark appearance, Model, Message, Think high, Regenerate, Edit, Copy this code"
    assert [name for name in wanted.split(", ") if not any(found.startswith(name) for found in reached)] == []


# ---- the files of the page -------------------------------------------------------------------------------------------


def test_the_libraries_are_the_published_files():
    listed = re.findall(r"^([0-9a-f]{64})  (\S+)$", (WEB / "vendor" / "README.md").read_text(), re.MULTILINE)
    code = {path.name for path in (WEB / "vendor").iterdir() if path.suffix in (".js", ".css")}
    assert {name for _, name in listed} == code
    for digest, name in listed:
        assert hashlib.sha256((WEB / "vendor" / name).read_bytes()).hexdigest() == digest
        assert (WEB / "vendor" / f"{name.partition('.')[0]}.LICENSE").is_file()


def test_the_own_code_stays_small_and_names_no_other_host():
    own = [path for path in WEB.iterdir() if path.suffix in (".js", ".css", ".html")]
    assert sum(path.stat().st_size for path in own if path.suffix == ".js") < OWN_BYTES
    for path in own:
        assert not re.search(r"(?:https?:)?//[a-z][\w-]*\.", path.read_text()), f"{path.name} names an address"
    page = (WEB / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\ssrc=)", page)  # the policy would not run it
    assert not re.search(r"\s(?:on\w+|style)=", page)


def test_every_file_of_the_page_is_used():
    text = "".join(path.read_text() for path in [*WEB.glob("*.js"), WEB / "index.html"])
    unused = [path.name for path in [*WEB.glob("*.*"), *(WEB / "vendor").glob("*.[jc]s*")] if path.name not in text]
    assert unused == ["index.html"]
