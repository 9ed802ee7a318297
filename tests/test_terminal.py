"""The `chat` command, driven by piped lines: layout of the turns, history, commands, interruption, and the live rate."""

from __future__ import annotations

import io
import itertools
import json
import random
import re
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from longreach.chat.modes import ABSOLUTE
from longreach.checkpoint.save import save_model
from longreach.engine.engine import Engine
from longreach.engine.sampler import Sampled, Sampler
from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.terminal import Conversation, LiveText, Mode
from longreach.tokenizer.bpe import Tokenizer
from longreach.tokenizer.special import ASSISTANT, BOS, EOS, THINK_END, THINK_START, USER

CONTEXT = 160


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["def add(a, b):\n    return a + b\n" * 20], vocab_size=400)


@pytest.fixture(scope="module")
def unmarked(saved) -> Tokenizer:
    """The same tokens, of which only the begin and end marks are special."""
    description = json.loads((saved / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] in (BOS, EOS)]
    return Tokenizer(json.dumps(description))


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> Path:
    config = ModelConfig.preset("tiny").replace(vocab_size=400, max_position_embeddings=CONTEXT)
    run = tmp_path_factory.mktemp("run")
    save_model(Transformer(config, seed=1), run / "model", tokenizer=tokenizer)
    return run


@pytest.fixture
def prompts(monkeypatch) -> list[list[int]]:
    """Tokens of every prompt that reaches an engine."""
    seen: list[list[int]] = []
    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda self, p, *a, **k: (seen.append(list(p)), submit(self, p, *a, **k))[1])
    return seen


@pytest.fixture
def chat(longreach_command, saved, monkeypatch):
    """Run `longreach chat RUN ARGS…` on these lines."""

    def run(lines: list[str], *arguments: object, max_tokens: int = 8):
        text = "".join(line + "\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        options = ("--max-tokens", max_tokens, "--threads", 1, "--memory-gib", 0.02)
        return longreach_command("chat", saved, *options, *arguments)

    return run


def draw(monkeypatch, token_ids: Iterable[int]) -> None:
    """Let the engine draw these tokens one after the other."""
    left = iter(token_ids)
    monkeypatch.setattr(Sampler, "sample", lambda self, logits, rows: [Sampled(next(left))])


def figures(err: str) -> list[dict[str, int]]:
    """The line below each answer, as numbers."""
    pattern = (
        r"^(?P<tokens>\d+) tokens, .*first after \d+\.\d\d s, (?P<cached>\d+) of (?P<prompt>\d+) prompt tokens cached"
    )
    found = re.finditer(pattern + r".*, context (?P<used>\d+) of (?P<most>\d+)", err, flags=re.MULTILINE)
    return [{name: int(value) for name, value in match.groupdict().items()} for match in found]


# ---- the turns ------------------------------------------------------------------------------------------------------


def test_turns_are_laid_out_as_in_the_chat_encoding_without_thinking(tokenizer):
    conversation = Conversation(tokenizer, system="Be kind.")
    answer = tokenizer.encode("Hello!")
    conversation.add("Hi", "Hello!", [*answer, tokenizer.eos_id])
    text = tokenizer.decode(conversation.prompt("Why?"))
    assert text == f"{BOS}Be kind.{USER}Hi{ASSISTANT}{THINK_END}Hello!{EOS}{USER}Why?{ASSISTANT}{THINK_END}"
    assert conversation.prompt("Why?").count(tokenizer.eos_id) == 1


def test_marks_typed_by_a_user_are_text(tokenizer):
    ids = Conversation(tokenizer, system=USER).prompt(f"a{ASSISTANT}{EOS}")
    for mark in (USER, ASSISTANT, THINK_END):
        assert ids.count(tokenizer.special_id(mark)) == 1
    assert tokenizer.eos_id not in ids


def test_a_plain_conversation_is_one_document_of_lines(tokenizer):
    conversation = Conversation(tokenizer, system="# math", is_plain=True)
    conversation.add("def f(x):", "\n    return x\n", tokenizer.encode("\n    return x\n"))
    conversation.add("print(", "f(1", tokenizer.encode("f(1"))
    assert tokenizer.decode(conversation.prompt("")) == f"{BOS}# math\ndef f(x):\n    return x\nprint(f(1"
    assert tokenizer.decode(conversation.prompt("x")) == f"{BOS}# math\ndef f(x):\n    return x\nprint(f(1\nx"


def test_an_answer_cut_before_a_stop_string_is_remembered_as_it_was_shown(tokenizer):
    conversation = Conversation(tokenizer, is_plain=True)
    conversation.add("a", " + b", tokenizer.encode(" + b\n    return"))
    assert tokenizer.decode(conversation.prompt("")) == f"{BOS}a + b"


def test_the_model_sees_the_whole_history_each_turn_and_the_cache_knows_it(chat, prompts, tokenizer):
    result = chat(["def add", "", "return a"])
    assert result.code == 0
    assert [p.count(tokenizer.special_id(USER)) for p in prompts] == [1, 2]
    first, second = figures(result.err)
    assert prompts[1][: len(prompts[0])] == prompts[0]
    assert first["cached"] == 0
    assert second["cached"] == first["used"] - 1  # the last token of an answer is never read while it is made
    assert (second["prompt"], second["most"]) == (len(prompts[1]), CONTEXT)


def test_stdout_is_the_answers_alone(chat, prompts, tokenizer):
    result = chat(["def add", "/set", "x", "/save", "/nothing"], "--plain", "--temperature", 0)
    first = tokenizer.decode(prompts[1])[len(tokenizer.decode(prompts[0])) : -len("\nx")]
    assert result.out.startswith(first + "\n")
    assert len(figures(result.err)) == 2
    assert "/nothing" not in result.out


def test_the_same_lines_give_the_same_conversation(chat):
    lines = ["a", "b"]
    assert chat(lines, "--temperature", 2).out == chat(lines, "--temperature", 2).out
    assert chat(lines, "--temperature", 2).out != chat(lines, "--temperature", 2, "--seed", 9).out


def test_every_turn_draws_with_a_seed_of_its_own(chat, monkeypatch):
    seeds, submit = [], Engine.submit
    monkeypatch.setattr(
        Engine,
        "submit",
        lambda self, p, params, **more: (seeds.append(params.seed), submit(self, p, params, **more))[1],
    )
    chat(["a", "b", "/undo", "c", "/set seed null", "d"], "--seed", 7)
    assert seeds == [7, 8, 8, None]


def test_a_tokenizer_without_marks_chats_plainly(saved, unmarked, prompts, tmp_path, longreach_command, monkeypatch):
    for file in (saved / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    unmarked.save(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def\n")))
    result = longreach_command("chat", tmp_path, "--max-tokens", 2, "--threads", 1, "--memory-gib", 0.02)
    assert result.code == 0
    assert "this tokenizer has no marks for turns" in result.err
    assert prompts == [[unmarked.bos_id, *unmarked.encode("def")]]


# ---- thinking -------------------------------------------------------------------------------------------------------


def answer_tokens(tokenizer: Tokenizer, *parts: str) -> list[int]:
    """Token ids of texts and of special tokens spelled out, one part after the other."""
    return [
        i for part in parts for i in ([tokenizer.special_ids.get(part)] if part in MARKS else tokenizer.encode(part))
    ]


MARKS = (THINK_END, EOS, USER)


def test_reasoning_goes_to_stderr_and_the_answer_alone_to_stdout(chat, prompts, tokenizer, monkeypatch):
    answer = ["return", THINK_END, " a + b", EOS]
    draw(monkeypatch, answer_tokens(tokenizer, *answer, *answer))
    result = chat(["def add", "more"], "--thinking", max_tokens=20)
    assert (result.code, result.out) == (0, " a + b\n a + b\n")
    assert result.err.count("return") == 2
    text = [tokenizer.decode(prompt) for prompt in prompts]
    assert text[0] == f"{BOS}{USER}def add{ASSISTANT}{THINK_START}"
    assert text[1] == f"{BOS}{USER}def add{ASSISTANT}{THINK_END} a + b{EOS}{USER}more{ASSISTANT}{THINK_START}"
    # All but the think token of the turn before is known to the cache.
    assert prompts[1][: len(prompts[0]) - 1] == prompts[0][:-1]


def test_an_answer_after_reasoning_keeps_its_very_tokens(tokenizer):
    conversation = Conversation(tokenizer, mode=Mode(thinking=True))
    letters = [tokenizer.encode(letter)[0] for letter in "return"]
    assert letters != tokenizer.encode("return")
    conversation.add("a", "return", [*tokenizer.encode("b"), tokenizer.special_id(THINK_END), *letters, 1], "b")
    assert conversation.exchanges[0].answer_ids == letters
    conversation.add("a", "", tokenizer.encode("b"), "b")  # stopped while it was thinking
    assert conversation.exchanges[1].answer_ids == []


def test_a_saved_conversation_keeps_its_reasoning(tokenizer, tmp_path):
    conversation = Conversation(tokenizer, mode=Mode(thinking=True))
    conversation.add("a", "c", answer_tokens(tokenizer, "b", THINK_END, "c"), "b")
    conversation.save(tmp_path / "chat.json")
    again = Conversation.load(tmp_path / "chat.json", tokenizer, mode=Mode(thinking=True))
    assert again.exchanges == conversation.exchanges


def test_the_effort_is_told_by_the_text_of_the_weights_revision(chat, prompts, tokenizer):
    result = chat(["a"], "--effort", "max", "--effort-texts", "preview")
    assert prompts == [] and "shorten the line" in result.err  # that text alone is longer than this model's context
    conversation = Conversation(tokenizer, "S", mode=Mode(True, "max", "preview"))
    assert tokenizer.decode(conversation.prompt("a")) == f"{BOS}{ABSOLUTE}S{USER}a{ASSISTANT}{THINK_START}"


def test_a_stop_string_is_looked_for_in_the_answer_alone(chat, tokenizer, monkeypatch):
    draw(monkeypatch, answer_tokens(tokenizer, "END", THINK_END, "a", "END", "b"))
    result = chat(["x"], "--thinking", "--stop", "END", max_tokens=20)
    assert result.out == "a\n"


def test_another_turns_mark_ends_an_answer(chat, tokenizer, monkeypatch):
    draw(monkeypatch, answer_tokens(tokenizer, "a", USER, "b"))
    assert chat(["x"], max_tokens=20).out == "a\n"


@pytest.mark.usefixtures("_redraw_always")
def test_reasoning_stands_dim_above_the_answer_on_a_terminal():
    terminal = Terminal(width=12, height=8)
    with LiveText(terminal, terminal) as live:
        live.write_dim("I think\nso")
        live.note("3 tokens")
        live.write_dim("mehow")
        live.write("Yes.")
        assert terminal.lines()[:5] == ["I think", "somehow", "Yes.", "3 tokens", ""]
    assert terminal.lines()[:5] == ["I think", "somehow", "Yes.", "", ""]


@pytest.mark.usefixtures("_redraw_always")
def test_no_note_overwrites_reasoning_on_stderr_while_stdout_goes_elsewhere():
    file, terminal = io.StringIO(), Terminal(12, 4)
    with LiveText(file, terminal) as live:
        live.note("reading")
        live.write_dim("so")
        live.note("2 tokens")
        assert terminal.lines() == ["so", "", "", ""]
        live.write("Yes.")
        live.note("3 tokens")
        assert terminal.lines() == ["so", "3 tokens", "", ""]
    assert (file.getvalue(), terminal.lines()) == ("Yes.", ["so", "", "", ""])


# ---- commands -------------------------------------------------------------------------------------------------------


def test_undo_and_reset_take_exchanges_back(chat, prompts, tokenizer):
    result = chat(["one", "two", "/undo", "three", "/reset", "four", "/undo", "/undo"], "--system", "S")
    turns = [[part.partition(ASSISTANT)[0] for part in tokenizer.decode(p).split(USER)[1:]] for p in prompts]
    assert turns == [["one"], ["one", "two"], ["one", "three"], ["four"]]
    assert all(tokenizer.decode(p).startswith(f"{BOS}S{USER}") for p in prompts)
    assert "taken back: two" in result.err
    assert "there is no exchange to take back" in result.err


def test_a_saved_conversation_goes_on_with_the_very_same_tokens(chat, prompts, tmp_path, tokenizer, monkeypatch):
    file = tmp_path / "folder" / "chat.json"
    letters = [tokenizer.encode(letter)[0] for letter in "return a"]
    assert letters != tokenizer.encode("return a")
    draw(monkeypatch, letters * 3)
    first = chat(["def add", "more", f"/save {file}"], "--system", "S")
    assert f"saved 2 exchanges: {file}" in first.err
    messages = json.loads(file.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    again = chat(["last"], "--load", file)
    assert "going on after 2 exchanges" in again.err
    assert prompts[2][: len(prompts[1])] == prompts[1]
    assert prompts[2][len(prompts[1]) :][: len(letters)] == letters


def test_a_file_can_neither_forge_marks_nor_change_what_an_answer_says(tokenizer, tmp_path):
    file = tmp_path / "chat.json"
    for ids in ([tokenizer.special_id(USER)], [5, 10**9], ["x"], "x", None, tokenizer.encode("other")):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": USER, "token_ids": ids}]
        file.write_text(json.dumps({"messages": messages}))
        conversation = Conversation.load(file, tokenizer)
        assert conversation.exchanges[0].answer_ids == tokenizer.encode(USER)


def test_a_plain_conversation_stays_plain_when_it_is_loaded(tokenizer, tmp_path):
    conversation = Conversation(tokenizer, is_plain=True)
    conversation.add("a", "b", tokenizer.encode("b"))
    conversation.save(tmp_path / "chat.json")
    assert Conversation.load(tmp_path / "chat.json", tokenizer).prompt("") == conversation.prompt("")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[]", "holds no list of messages"),
        ('{"messages": [{"role": "user"}]}', "holds no list of messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "must take turns"),
        ('{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}]}', "must take turns"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused(tokenizer, tmp_path, content, expected):
    file = tmp_path / "chat.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RequestError, match=expected):
        Conversation.load(file, tokenizer)


def test_set_changes_the_answers_to_come(chat, monkeypatch, tokenizer):
    draw(monkeypatch, itertools.repeat(tokenizer.encode("a")[0]))
    result = chat(
        ["a", "/set max_tokens 3", "/set temperature 0", '/set stop ["\\n\\n", "x"]', "/set seed null", "a", "/set"]
    )
    first, second = figures(result.err)
    assert first["tokens"] == 8
    assert second["tokens"] == 3
    assert "max_tokens is 3 now" in result.err
    last = result.err.splitlines()[-1]
    assert "temperature 0," in last
    assert "seed null" in last
    assert last.endswith('stop ["\\n\\n", "x"]')


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/set warmth 3", "no sampling parameter 'warmth'; there are temperature, "),
        ("/set temperature hot", "temperature must be a number, 0 or more, not 'hot'"),
        ("/set temperature", "temperature must be a number, 0 or more, not ''"),
        ("/set top_p 2", "top_p 2 must be above 0 and at most 1"),
        ("/set max_tokens 2.5", "max_tokens must be a whole number"),
        ("/set stop", "stop has an empty string"),
        ("/save", "/save needs a file name"),
        ("/save /dev/null/chat.json", "cannot be written"),
        ("/frob", "unknown command /frob; commands are /set, /undo"),
    ],
)
def test_a_command_that_makes_no_sense_is_one_line_and_the_chat_goes_on(chat, prompts, line, expected):
    result = chat([line, "a"])
    assert result.code == 0
    assert len([said for said in result.err.splitlines() if expected in said]) == 1
    assert len(prompts) == 1


def test_only_a_slash_and_a_word_are_a_command(chat, prompts, tokenizer):
    lines = ["// note", "/usr/bin/env", " /reset", "/quit", "never read"]
    chat(lines, max_tokens=2)
    said = [tokenizer.decode(p).rpartition(USER)[2].partition(ASSISTANT)[0] for p in prompts]
    assert said == lines[:3]


def test_help_names_every_command(chat):
    shown = chat(["/help"]).err
    assert all(f"\n/{name} " in shown for name in ("set", "undo", "reset", "save", "help", "quit"))


# ---- ends -----------------------------------------------------------------------------------------------------------


def interrupt_at_step(monkeypatch, *numbers: int) -> None:
    """Ctrl-C during these steps of the engine, counted from 1."""
    step, count = Engine.step, [0]

    def counted(self):
        count[0] += 1
        if count[0] in numbers:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Engine, "step", counted)


def test_an_interrupt_stops_the_answer_and_keeps_what_there_is(chat, prompts, monkeypatch, tokenizer):
    handler = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background of a shell
    draw(monkeypatch, itertools.repeat(tokenizer.encode("a")[0]))
    interrupt_at_step(monkeypatch, 5)
    result = chat(["a", "b"], max_tokens=40)
    assert result.code == 0
    first, second = figures(result.err)
    assert first["tokens"] == 5
    assert "stopped" in result.err
    assert second["tokens"] == 40
    assert tokenizer.decode(prompts[1]).count("aaaaa" + EOS) == 1
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_interrupt_leaves(chat, monkeypatch, tokenizer):
    draw(monkeypatch, itertools.repeat(tokenizer.encode("a")[0]))
    interrupt_at_step(monkeypatch, 3, 4)  # the second before the step that would end the answer
    result = chat(["a", "b"], max_tokens=40)
    assert result.code == 130
    assert result.err.splitlines()[-1] == "longreach: interrupted"


def test_an_answer_stopped_before_its_first_token_leaves_no_trace(chat, prompts, monkeypatch):
    before = Engine.submit

    def submit(self, prompt, params, **more):
        request = before(self, prompt, params, **more)
        if len(prompts) == 1:
            self.cancel(request.id)
        return request

    monkeypatch.setattr(Engine, "submit", submit)
    result = chat(["a", "a"])
    assert "stopped before the first token" in result.err
    assert prompts[0] == prompts[1]


def test_a_full_context_is_said_and_reset_makes_room(chat, monkeypatch, tokenizer):
    draw(monkeypatch, itertools.repeat(tokenizer.encode("a")[0]))
    result = chat(["a", "b", "word " * CONTEXT, "/reset", "c"], max_tokens=1000)
    assert result.code == 0
    first, last = figures(result.err)
    assert first["used"] == CONTEXT
    assert "the context is full; /undo takes the last exchange back, /reset begins anew" in result.err
    refused = [line for line in result.err.splitlines() if line.startswith("with this line the conversation is")]
    assert len(refused) == 2
    assert f"{CONTEXT} is the most" in refused[0]
    assert last["used"] == CONTEXT


def test_a_model_that_begins_a_turn_of_its_own_is_stopped(chat, monkeypatch, tokenizer):
    draw(monkeypatch, [*tokenizer.encode("yes"), tokenizer.special_id(USER)])
    assert chat(["a"]).out == "yes\n"


def test_a_failed_answer_is_said_and_the_chat_goes_on(chat, monkeypatch):
    accept, calls = Engine._accept, []

    def fail_first(self, request, *more):
        calls.append(0)
        return accept(self, request, *more) if len(calls) > 1 else self._fail(request, "no luck")

    monkeypatch.setattr(Engine, "_accept", fail_first)
    result = chat(["a", "b"])
    assert result.code == 0
    assert "the answer is unfinished: no luck" in result.err
    assert len(figures(result.err)) == 1


def test_a_disk_cache_knows_a_conversation_of_another_day(chat, tmp_path):
    options = ("--disk-cache", tmp_path / "cache", "--speculation", "lookup")
    first = chat(["def add", f"/save {tmp_path}/chat.json"], *options)
    second = chat(["more"], *options, "--load", tmp_path / "chat.json")
    assert figures(second.err)[0]["cached"] >= figures(first.err)[0]["prompt"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--load", "absent.json"], "absent.json cannot be read"),
        (["--load", "absent.json", "--system", "x"], "--system cannot be given with --load"),
        (["--thinking", "--plain"], "--thinking and --effort need turns"),
        (["--effort", "low"], "--effort low is told to a model by a text"),
        (["--top-p", "0"], "top_p 0.0 must be above 0"),
        (["--device", "tpu"], "unknown device"),
        (["--json"], "--json"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(chat, arguments, expected):
    result = chat(["a"], *arguments)
    assert (result.code, result.out) == (2, "")
    assert expected in result.err.splitlines()[-1]


def test_input_that_is_not_utf_8_ends_the_chat_with_exit_code_2(longreach_command, saved, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n")))
    result = longreach_command("chat", saved, "--threads", 1, "--memory-gib", 0.02)
    assert result.code == 2
    assert "standard input is not UTF-8: byte at offset 3" in result.err


# ---- the live rate --------------------------------------------------------------------------------------------------


class Terminal:
    """As much of a terminal as the live rate asks of one: a grid, a cursor that waits in the last column, seven codes."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.rows = [[" "] * width for _ in range(height)]
        self.x = self.y = 0
        self.kept = (0, 0)
        self.is_wrapping = False
        self.codes: dict[str, Callable[[], None]] = {
            "D": self.down, "7": self.keep, "8": self.restore, "[A": self.up, "[K": self.erase_line, "[J": self.erase,
            "[2m": lambda: None, "[0m": lambda: None,
        }  # fmt: skip

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def write(self, text: str) -> None:
        for part in re.findall(r"\x1b(?:\[\d*\w|\w)|[^\x1b]", text, flags=re.DOTALL):
            if part[0] == "\x1b":
                self.codes[part[1:]]()
            elif part == "\n":  # the line discipline of a terminal adds the carriage return
                self.x, self.is_wrapping = 0, False
                self.down()
            elif part == "\r":
                self.x, self.is_wrapping = 0, False
            else:
                if self.is_wrapping:
                    self.x, self.is_wrapping = 0, False
                    self.down()
                self.rows[self.y][self.x] = part
                self.is_wrapping = self.x == self.width - 1
                self.x += not self.is_wrapping

    def down(self) -> None:
        self.y += 1
        if self.y == self.height:
            self.rows = [*self.rows[1:], [" "] * self.width]
            self.y -= 1

    def up(self) -> None:
        self.y = max(0, self.y - 1)

    def keep(self) -> None:
        self.kept = (self.x, self.y)

    def restore(self) -> None:
        (self.x, self.y), self.is_wrapping = self.kept, False

    def erase_line(self) -> None:
        self.rows[self.y][self.x :] = " " * (self.width - self.x)

    def erase(self) -> None:
        self.erase_line()
        self.rows[self.y + 1 :] = [[" "] * self.width for _ in self.rows[self.y + 1 :]]

    def lines(self) -> list[str]:
        return ["".join(row).rstrip() for row in self.rows]


@pytest.fixture
def _redraw_always(monkeypatch):
    monkeypatch.setattr("longreach.terminal.REDRAW_S", 0)
    monkeypatch.setattr(LiveText, "_width", lambda self: 12)
    monkeypatch.setattr(sys, "stderr", Terminal(12, 8))  # dim only where stderr is a terminal
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.usefixtures("_redraw_always")
def test_the_rate_stands_below_the_text_and_leaves_no_trace():
    terminal = Terminal(width=12, height=8)
    with LiveText(terminal, terminal) as live:
        live.write("def f(x):\n  ret")
        live.note("9 tokens, 40.0 tokens/s")
        assert terminal.lines()[:3] == ["def f(x):", "  ret", "9 tokens, 4"]
        live.write("urn")
        assert terminal.lines()[:3] == ["def f(x):", "  return", "9 tokens, 4"]
        live.write(" x + 1")
        assert terminal.lines()[:4] == ["def f(x):", "  return x +", " 1", "9 tokens, 4"]
    assert terminal.lines() == ["def f(x):", "  return x +", " 1", *[""] * 5]


@pytest.mark.usefixtures("_redraw_always")
@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_written_the_screen_ends_as_if_there_had_been_no_rate(seed):
    rng = random.Random(seed)
    watched, plain = Terminal(12, 8), Terminal(12, 8)
    with LiveText(watched, watched) as live:
        for _ in range(200):
            text = "".join(rng.choice("abc \n") for _ in range(rng.choice([0, 1, 1, 2, 3, 11, 12, 13, 30])))
            live.write(text)
            plain.write(text)
            if rng.random() < 0.7:
                live.note(f"{rng.random()}")
            assert (watched.x, watched.is_wrapping) == (plain.x, plain.is_wrapping)
            assert watched.lines()[watched.y] == plain.lines()[plain.y]
    # Where the screen was full, the note has scrolled it by the line that it needed.
    assert watched.lines() in (plain.lines(), [*plain.lines()[1:], ""])


@pytest.mark.usefixtures("_redraw_always")
def test_with_stdout_in_a_file_the_rate_has_the_line_to_itself():
    file, terminal = io.StringIO(), Terminal(12, 3)
    with LiveText(file, terminal) as live:
        live.write("a\nb")
        live.note("5 tokens")
        assert terminal.lines() == ["5 tokens", "", ""]
    assert file.getvalue() == "a\nb"
    assert terminal.lines() == ["", "", ""]


def test_where_stderr_is_no_terminal_nothing_is_drawn():
    out, err = io.StringIO(), io.StringIO()
    with LiveText(out, err) as live:
        live.write("a")
        live.note("5 tokens")
    assert (out.getvalue(), err.getvalue()) == ("a", "")
