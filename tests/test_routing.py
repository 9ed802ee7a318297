"""The `auto` model: what kind a request is, and when the better model is worth its price."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from longreach.chat.messages import Conversation, Message, Tool
from longreach.errors import ConfigError
from longreach.server.call import Call, FillIn
from longreach.server.routing import KINDS, LONG_TOKENS, MODES, Router, Table, kind_of

FLASH = (Decimal("0.003"), Decimal("0.15"), Decimal("0.60"))
PRO = (Decimal("0.022"), Decimal("0.66"), Decimal("1.98"))
NAMES = ("small", "large")


def ask(text: str, **options) -> Call:
    tools = tuple(Tool({"name": name}) for name in options.pop("tools", ()))
    choice = options.pop("tool_choice", "auto")
    conversation = Conversation((Message("user", text),), tools, **options)
    return Call("auto", conversation, tool_choice=choice)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (ask("Why does this fail?\n```python\nx = 1\n```"), "code"),
        (ask("Write a SQL query for the three best customers"), "code"),
        (ask("Prove that there are infinitely many primes."), "mathematics"),
        (ask("What is 17 * 23?"), "mathematics"),
        (ask("Who wrote Middlemarch?"), "facts"),
        (ask("Tell me a story about a fox."), "other"),
        (ask("What is the weather?", tools=["weather"]), "tools"),
        (ask("Who wrote Middlemarch?", tools=["weather"], tool_choice="none"), "facts"),
        (Call("auto", FillIn("def f(", "return x")), "code"),
    ],
)
def test_the_kind_of_a_request_is_told_from_the_request_alone(call, kind):
    assert kind_of(call, 100) == kind


def test_a_long_prompt_is_long_whatever_it_asks():
    assert kind_of(ask("Who wrote this?"), LONG_TOKENS) == "long"


def table(small: float, large: float) -> Table:
    return Table({kind: dict.fromkeys(MODES, (small, large)) for kind in KINDS}, "by hand")


def test_the_large_model_is_chosen_exactly_where_its_gain_exceeds_its_extra_cost():
    # By hand: 1,000 prompt tokens and 512 of answer cost (150 + 307.2) and (660 + 1013.76) millionths of a dollar.
    extra = (660 + 1013.76 - 150 - 307.2) / 1e6
    call = ask("Tell me a story.")
    for gain, is_large in ((extra * 1.001, True), (extra * 0.999, False)):
        router = Router(table(0.5, 0.6), value=gain / 0.1)
        choice = router.choose(call, 1000, (0, 0), (FLASH, PRO), NAMES)
        assert choice.is_large is is_large
        assert choice.extra == pytest.approx(extra)
        assert choice.gain == pytest.approx(gain)


def test_a_worse_large_model_is_never_paid_for():
    assert not Router(table(0.6, 0.5), value=1e6).choose(ask("Hi"), 10, (0, 0), (FLASH, PRO), NAMES).is_large


def test_a_conversation_stays_where_its_text_is_cached():
    call, prompt = ask("And then?"), 60_000
    router = Router(table(0.80, 0.85), value=0.10)
    assert router.choose(call, prompt, (0, 0), (FLASH, PRO), NAMES).extra > 0.005  # both must read it: too dear
    assert not router.choose(call, prompt, (prompt, 0), (FLASH, PRO), NAMES).is_large
    assert router.choose(call, prompt, (0, prompt), (FLASH, PRO), NAMES).is_large


def test_longer_answers_of_a_model_make_it_dearer():
    router, call = Router(table(0.5, 0.6), value=0.02), ask("Tell me a story.")
    assert router.choose(call, 100, (0, 0), (FLASH, PRO), NAMES).is_large
    for _ in range(40):
        router.learn("large", call, 4000)
    assert not router.choose(call, 100, (0, 0), (FLASH, PRO), NAMES).is_large


def test_the_announced_scores_are_the_first_table():
    read = Table.load()
    assert read.chances["facts"]["max"] == (0.341, 0.579)
    assert read.chances["mathematics"]["non"][0] > read.chances["mathematics"]["non"][1]  # Flash is ahead there
    assert "report" in read.source


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "chances.tools.non must be two numbers from 0 to 1"),
        (json.dumps({"chances": {k: {m: [0, 2] for m in MODES} for k in KINDS}}), r"not \[0, 2\]"),
        (json.dumps({"chances": {k: {m: [True, 1] for m in MODES} for k in KINDS}}), r"not \[True, 1\]"),
    ],
)
def test_a_table_that_is_none_is_refused_by_name(tmp_path, content, said):
    path = tmp_path / "table.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        Table.load(path)


def test_a_table_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Table.load(tmp_path / "none.json")
