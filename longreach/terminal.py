"""A conversation in the terminal: `longreach chat runs/quickstart`.

The turns are laid out by `longreach.chat.renderer`; with `--thinking` each answer begins with reasoning, which later turns
no longer see. Where the tokenizer has no marks for turns, and with `--plain`, there are no turns but one document: each
line you type is appended to it, and the model writes on.

Every turn sends the whole history again, each answer in the very tokens it was made of. The prefix cache knows them, so
that the model reads little more than the new line. Answers go to stdout, everything else to stderr; reasoning is dim, and
on stdout if that is a terminal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import tyro
from rich.cells import cell_len

from longreach.chat import messages as chat
from longreach.chat.messages import Effort, Message
from longreach.chat.modes import EffortTexts
from longreach.chat.parser import AnswerParser, ContentText, ParserEvent, ReasoningText
from longreach.chat.renderer import Prompt, render
from longreach.engine.llm import LLM, completion
from longreach.engine.request import Request
from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.errors import RequestError
from longreach.generate import SAMPLING_NAMES, RunOptions, SamplingOptions, Stopwatch, counted_seed
from longreach.rundir import find_model, recorded
from longreach.runtime import log, setup_logging, write_atomic
from longreach.tokenizer.bpe import Tokenizer
from longreach.tokenizer.special import ASSISTANT, EOS, THINK_END, THINK_START, USER

HELP = """\
/set NAME VALUE   change a sampling parameter, as in /set stop "\\n\\n"; /set alone shows them
/undo             take back the last exchange
/reset            begin anew
/save FILE        write the conversation; --load FILE goes on with it
/help             this list
/quit             leave, as Ctrl-D does
Ctrl-C stops an answer; what there is of it stays. A line that begins with a space is never a command."""

REDRAW_S = 0.1
"""Seconds between two drawings of the live rate."""


@dataclass(frozen=True)
class ChatOptions(RunOptions, SamplingOptions):
    """Talk with a model in the terminal.

    Answers go to stdout as they are made, everything else to stderr. /help lists what can be typed besides text.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Run directory, or checkpoint directory of either published layout."""
    system: str = ""
    """Text before the first turn."""
    load: Path | None = None
    """Go on with a conversation that /save wrote."""
    plain: bool = False
    """No turns: what you type is appended to one text, and the model writes on; an empty line lets it go on."""
    thinking: bool = False
    """Let the model think before it answers."""
    effort: Effort | None = None
    """Think, and this thoroughly. Needs --effort-texts, because it is told by a text."""
    effort_texts: EffortTexts | None = None
    """Weights that learned texts for the effort: preview (April 2026) or 0731 (and later). Default: what a run trained here
    recorded, none for other weights."""

    def mode(self) -> Mode:
        """How the model is to think.

        Raises:
            RequestError: options that contradict each other.
        """
        thinks = self.thinking or self.effort is not None
        if thinks and self.plain:
            raise RequestError("--thinking and --effort need turns, and --plain has none; leave one out")
        texts: EffortTexts = self.effort_texts or recorded(self.model, "effort_texts") or "none"
        if self.effort is not None and texts == "none":
            raise RequestError(
                f"--effort {self.effort} is told to a model by a text, and --effort-texts none has none; give "
                "--effort-texts preview or 0731 for released weights, or --thinking alone"
            )
        return Mode(thinks, self.effort or "high", texts)


@dataclass(frozen=True)
class Mode:
    """How a model is to think, as `longreach.chat.renderer.render` takes it."""

    thinking: bool = False
    effort: Effort = "high"
    texts: EffortTexts = "none"


# ---- the history ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """A line and its answer.

    Attributes:
        opening: tokens of the line, marks included, and of what stands before the first line; answer_ids: of the answer,
            end mark not included.
        reasoning: what was thought before the answer; it is not part of the history.
    """

    user: str
    answer: str
    opening: list[int]
    answer_ids: list[int]
    reasoning: str = ""


class Conversation:
    """The history, and its tokens. The tokens of a shorter history begin those of a longer one, so the cache finds them.

    Args:
        is_plain: one document without marks.
    """

    def __init__(
        self, tokenizer: Tokenizer, system: str = "", is_plain: bool = False, mode: Mode | None = None
    ) -> None:
        self.tokenizer, self.system, self.is_plain, self.mode = tokenizer, system, is_plain, mode or Mode()
        self.exchanges: list[Exchange] = []

    @staticmethod
    def has_marks(tokenizer: Tokenizer) -> bool:
        """Whether turns can be marked with this tokenizer."""
        return all(mark in tokenizer.special_ids for mark in (USER, ASSISTANT, THINK_START, THINK_END))

    def prompt(self, user: str) -> list[int]:
        """All tokens up to the place where the answer to `user` begins."""
        ids: list[int] = []
        for exchange in self.exchanges:
            ids += exchange.opening
            if self.mode.thinking:
                ids[-1] = self.tokenizer.special_id(THINK_END)  # earlier reasoning is dropped
            ids += exchange.answer_ids
            if not self.is_plain:
                ids.append(self.tokenizer.eos_id)
        return ids + self._opening(user)

    def add(self, user: str, answer: str, answer_ids: list[int], reasoning: str = "") -> None:
        """Append an exchange.

        Args:
            answer_ids: as they were generated, reasoning included if there was any. A mark that ended them is dropped;
                where they still are not exactly `answer` (a stop string was cut off), the text is encoded anew.
        """
        tokenizer = self.tokenizer
        if self.mode.thinking and (end := tokenizer.special_id(THINK_END)) in answer_ids:
            answer_ids = answer_ids[answer_ids.index(end) + 1 :]
        for ids in (answer_ids, answer_ids[:-1]):
            if tokenizer.decode(ids) == answer:
                break
        else:
            ids = tokenizer.encode(answer)
        self.exchanges.append(Exchange(user, answer, self._opening(user), ids, reasoning))

    def _opening(self, user: str) -> list[int]:
        if self.is_plain:
            text = self.system + "".join(exchange.user + exchange.answer for exchange in self.exchanges)
            is_inside_line = bool(user) and bool(text) and not text.endswith("\n")
            head = [] if self.exchanges else [self.tokenizer.bos_id, *self.tokenizer.encode(self.system)]
            return head + self.tokenizer.encode("\n" + user if is_inside_line else user)
        said = [Message("system", self.system)]
        for exchange in self.exchanges:
            said += [Message("user", exchange.user), Message("assistant", exchange.answer)]
        conversation = chat.Conversation(
            (*said, Message("user", user)), thinking=self.mode.thinking, effort=self.mode.effort
        )
        pieces = render(conversation, texts=self.mode.texts).pieces
        ends = [place for place, piece in enumerate(pieces) if piece.is_special and piece.text == EOS]
        return Prompt(pieces[ends[-1] + 1 if ends else 0 :]).encode(self.tokenizer)

    # ---- on disk ----------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the conversation as JSON: messages as chat APIs have them, and the tokens of each answer.

        Raises:
            RequestError: the file cannot be written.
        """
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in self.exchanges:
            messages.append({"role": "user", "content": exchange.user})
            answer = {"role": "assistant", "content": exchange.answer, "token_ids": exchange.answer_ids}
            messages.append(answer | ({"reasoning_content": exchange.reasoning} if exchange.reasoning else {}))
        content = json.dumps({"plain": self.is_plain, "messages": messages}, ensure_ascii=False, indent=1)
        try:
            write_atomic(path, content + "\n")
        except OSError as error:
            raise RequestError(f"{path} cannot be written: {error.strerror or error}") from None

    @staticmethod
    def load(path: Path, tokenizer: Tokenizer, is_plain: bool = False, mode: Mode | None = None) -> Conversation:
        """Read what `save` wrote. Answers keep their tokens if this tokenizer means the same text by them.

        Args:
            is_plain: read it as one document even if it has turns. A saved document stays one.

        Raises:
            RequestError: there is no such file, or it is not a conversation.
        """
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
        except ValueError:
            raise RequestError(f"{path} is not JSON; give a file that /save wrote") from None
        messages = saved.get("messages") if isinstance(saved, dict) else None
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str)
            for m in messages
        ):
            raise RequestError(f"{path} holds no list of messages with role and content; give a file that /save wrote")
        system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else ""
        if [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2):
            raise RequestError(f"{path}: after a system message, user and assistant must take turns, and both end")
        conversation = Conversation(tokenizer, system, is_plain or saved.get("plain") is True, mode)
        for user, answer in zip(messages[::2], messages[1::2], strict=True):
            ids, reasoning = _text_ids(answer.get("token_ids"), tokenizer), answer.get("reasoning_content")
            conversation.add(user["content"], answer["content"], ids, reasoning if isinstance(reasoning, str) else "")
        return conversation


def _text_ids(ids: Any, tokenizer: Tokenizer) -> list[int]:
    """Ids out of a file where they are tokens of text, else none: no file may put marks into a conversation."""
    special = set(tokenizer.special_ids.values())
    known = range(tokenizer.vocab_size)
    is_text = isinstance(ids, list) and all(type(i) is int and i in known and i not in special for i in ids)
    return ids if is_text else []


# ---- the chat -------------------------------------------------------------------------------------------------------


class AnswerStream:
    """Reads an answer while it is generated, in place of the engine's `TextStream`: its text is the content alone.

    Attributes:
        reasoning: what the model has thought so far.
        finish_reason, stop_reason: as the engine asks for them.
    """

    def __init__(self, tokenizer: Tokenizer, thinking: bool, stop: tuple[str, ...]) -> None:
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._parser = AnswerParser(tokenizer, thinking=thinking, stop=stop)
        self._thoughts: list[str] = []
        self._num_taken = 0

    @property
    def reasoning(self) -> str:
        return "".join(self._thoughts)

    def push(self, token_id: int) -> str:
        text = self._content(self._parser.push(token_id))
        if self._parser.finish_reason is not None:
            self.finish_reason, self.stop_reason = FinishReason.STOP, self._parser.stop_reason
        return text

    def finish(self, reason: FinishReason | None = None) -> str:
        return self._content(self._parser.finish())

    def take_reasoning(self) -> str:
        """What was thought since the last call."""
        new, self._num_taken = self._thoughts[self._num_taken :], len(self._thoughts)
        return "".join(new)

    def _content(self, events: list[ParserEvent]) -> str:
        self._thoughts += [event.text for event in events if isinstance(event, ReasoningText)]
        return "".join(event.text for event in events if isinstance(event, ContentText))


class Chat:
    """A conversation with a model.

    Attributes:
        params: for the answers to come; the seed is counted up with every exchange.
        context: tokens that history and answer may have together.
    """

    def __init__(self, llm: LLM, conversation: Conversation, params: SamplingParams) -> None:
        self.engine, self.conversation, self.params = llm.engine, conversation, params
        self.context = min(llm.engine.model.config.max_position_embeddings, llm.engine.memory.capacity)

    def take(self, line: str) -> bool:
        """Do what a line says; False where it says to leave.

        Raises:
            RequestError: it cannot be done. The conversation is as before.
        """
        # "// a comment" and "/usr/bin/env" are text.
        command = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", line.rstrip())
        if command is None:
            if line.strip() or self.conversation.is_plain:
                self.answer(line)
            return True
        name, rest = command[1], command[2] or ""
        if name in ("quit", "exit"):
            return False
        commands: dict[str, Callable[[str], None]] = {
            "set": self.set, "undo": self.undo, "reset": self.reset, "save": self.save, "help": lambda _: log.info(HELP),
        }  # fmt: skip
        if name not in commands:
            raise RequestError(
                f"unknown command /{name}; commands are /{', /'.join(commands)}, /quit; a space before it makes it text"
            )
        commands[name](rest)
        return True

    def set(self, rest: str) -> None:
        """`NAME VALUE` changes a sampling parameter; nothing shows them all."""
        name, _, value = rest.partition(" ")
        if not name:
            log.info("%s", ", ".join(f"{name} {_shown(getattr(self.params, name))}" for name in SAMPLING_NAMES))
            return
        if name not in SAMPLING_NAMES:
            raise RequestError(f"no sampling parameter {name!r}; there are {', '.join(SAMPLING_NAMES)}")
        params = dataclasses.replace(self.params, **{name: _read_value(name, value.strip())})
        params.check(self.engine.vocab_size)
        self.params = params
        log.info("%s is %s now", name, _shown(getattr(params, name)))

    def undo(self, rest: str = "") -> None:
        """Take back the last exchange."""
        if not self.conversation.exchanges:
            raise RequestError("there is no exchange to take back")
        gone = self.conversation.exchanges.pop()
        log.info("taken back: %s", _shortened(gone.user))

    def reset(self, rest: str = "") -> None:
        """Forget all exchanges; the system text stays."""
        self.conversation.exchanges.clear()
        log.info("begun anew")

    def save(self, rest: str) -> None:
        """Write the conversation to the file `rest`."""
        if not rest:
            raise RequestError("/save needs a file name: /save FILE")
        path = Path(rest).expanduser()
        self.conversation.save(path)
        log.info("saved %d exchanges: %s", len(self.conversation.exchanges), path)

    def answer(self, user: str) -> None:
        """Let the model answer; what it wrote, also if it was stopped, becomes part of the history.

        Raises:
            RequestError: the context has no room for this line, or the model failed before its first token.
        """
        conversation, params = self.conversation, self.params
        prompt = conversation.prompt(user)
        if len(prompt) >= self.context:
            raise RequestError(
                f"with this line the conversation is {len(prompt)} tokens long, and {self.context} is the most, one of "
                "them for an answer; shorten the line, take exchanges back with /undo, or begin anew with /reset"
            )
        seed = None if params.seed is None else counted_seed(params.seed, len(conversation.exchanges))
        stream = None
        if not conversation.is_plain:
            stream = AnswerStream(conversation.tokenizer, conversation.mode.thinking, params.stop)
        after = conversation.tokenizer.special_id(THINK_END) if conversation.mode.thinking else None
        params = dataclasses.replace(params, seed=seed, after=after)
        drafted, accepted = self.engine.stats.drafted, self.engine.stats.accepted
        watch = Stopwatch()
        request = self.engine.submit(prompt, params, stream=stream)
        text = self._run(request, watch, stream)
        print(flush=True)
        done = completion(request, text)
        if done.token_ids:
            conversation.add(user, text, done.token_ids, stream.reasoning if stream is not None else "")
        if done.error is not None:
            raise RequestError(f"the answer is unfinished: {done.error}")
        if not done.token_ids:
            log.info("stopped before the first token; the line is not part of the conversation")
            return
        parts = [f"{len(done.token_ids)} tokens", str(watch)]
        parts.append(f"{done.cached_tokens} of {done.prompt_tokens} prompt tokens cached")
        if (tried := self.engine.stats.drafted - drafted) > 0:
            parts.append(f"{self.engine.stats.accepted - accepted} of {tried} guessed tokens right")
        used = len(request.tokens)
        parts.append(f"context {used} of {self.context}")
        if done.finish_reason is FinishReason.CANCELLED:
            parts.append("stopped")
        elif done.finish_reason is FinishReason.LENGTH and used < self.context:
            parts.append("cut at max_tokens")
        log.info("%s", _dim(", ".join(parts)))
        if used >= self.context:
            log.info("the context is full; /undo takes the last exchange back, /reset begins anew")

    def _run(self, request: Request, watch: Stopwatch, stream: AnswerStream | None) -> str:
        """Step until the answer is over, showing it as it comes. Returns its text."""
        texts: list[str] = []
        with _interrupt() as interrupt, LiveText() as live:
            while not request.is_finished:
                if interrupt.came:
                    self.engine.cancel(request.id)
                for output in self.engine.step():
                    watch.push(len(output.tokens))
                    texts.append(output.text)
                    if stream is not None:
                        live.write_dim(stream.take_reasoning())
                    live.write(output.text)
                if watch.first_s is None:
                    live.note(f"reading: {request.computed} of {request.num_prompt} tokens")
                elif watch.tokens_per_s is not None:
                    live.note(f"{watch.tokens} tokens, {watch.tokens_per_s:.1f} tokens/s")
        return "".join(texts)


def _read_value(name: str, value: str) -> Any:
    """What was typed behind /set NAME: JSON, or for `stop` also a bare text."""
    try:
        read = json.loads(value)
    except ValueError:
        return value
    return value if name == "stop" and not isinstance(read, str | list) else read


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"


# ---- the terminal ---------------------------------------------------------------------------------------------------


class _Interrupt:
    came = False


@contextlib.contextmanager
def _interrupt() -> Iterator[_Interrupt]:
    """While inside, the first Ctrl-C is only noted: it must not leave a step of the engine half done. A second one leaves."""
    interrupt = _Interrupt()

    def note(number: int, frame: object) -> None:
        if interrupt.came:
            raise KeyboardInterrupt
        interrupt.came = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


class LiveText:
    """Text on stdout as it comes, and where stderr is a terminal, a dim note that follows it and goes away at the end.

    With both on a terminal the note stands on the line below the text: the cursor goes down, writes and comes back, and the
    text is never drawn again. With stdout elsewhere the note has the line to itself.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._is_live = _draws(self._err)
        self._is_below = self._is_live and self._out.isatty()
        self._column = 0
        self._is_dim = False  # the text before was dim
        self._note, self._drawn_at, self._is_drawn = "", 0.0, False

    def write(self, text: str) -> None:
        """Write a piece of text, on a line of its own if dim text stands before it."""
        if not text:
            return
        if self._is_dim:
            self._is_dim = False
            if self._out.isatty():
                text = "\n" + text
            else:
                self._say("\n")
        self._write(text)

    def write_dim(self, text: str) -> None:
        """Write what is no part of the text proper: dim on stdout if that is a terminal, else on stderr without a note."""
        if not text:
            return
        if self._out.isatty():
            self._write(text, "\x1b[2m", "\x1b[0m")
        else:
            self._erase()
            self._say(_dim(text))
        self._is_dim = True

    def _write(self, text: str, before: str = "", behind: str = "") -> None:
        redraw = False
        if self._is_below:
            column, reaches_margin = self._after(text)
            # Text that reaches the margin, or another line, would run into the note. In the last column some terminals
            # keep the cursor on the character just written, where erasing would take that character too.
            if self._is_drawn and ("\n" in text or reaches_margin):
                self._erase()
                redraw = True
            self._column = column
        self._out.write(before + text + behind)
        self._out.flush()
        if redraw:
            self._draw()

    def note(self, text: str) -> None:
        """Show this note from now on; it is drawn often enough to be live, not more."""
        self._note = text
        if self._is_dim and not self._is_below:
            return  # the note would overwrite it
        if self._is_live and time.monotonic() - self._drawn_at >= REDRAW_S:
            self._draw()

    def _draw(self) -> None:
        width = self._width()
        if self._is_below and self._column >= width:
            return
        note = f"\r{_dim(self._note[: width - 1])}\x1b[K"
        # Down one line, in the same column, scrolling where there is none; remember the place; write; back; up.
        self._say(f"\x1bD\x1b7{note}\x1b8\x1b[A" if self._is_below else note)
        self._is_drawn, self._drawn_at = True, time.monotonic()

    def _erase(self) -> None:
        if self._is_drawn:
            self._say("\x1b[J" if self._is_below else "\r\x1b[K")
            self._is_drawn = False

    def _say(self, codes: str) -> None:
        self._err.write(codes)
        self._err.flush()

    def _width(self) -> int:
        try:
            return max(2, os.get_terminal_size(self._err.fileno()).columns)
        except OSError:
            return 80

    def _after(self, text: str) -> tuple[int, bool]:
        """Columns of the line in use when `text` is written (all of them: the next character begins a new line), and
        whether its last line comes to use all of them on the way."""
        column, width, reaches_margin = 0 if "\n" in text else self._column, self._width(), False
        for character in text.rpartition("\n")[2]:
            if character == "\t":
                column = min(column // 8 * 8 + 8, width - 1)
            elif (cells := cell_len(character)) > 0:
                column = (0 if column + cells > width else column) + cells
            reaches_margin |= column >= width
        return column, reaches_margin

    def __enter__(self) -> LiveText:
        return self

    def __exit__(self, *exc: object) -> None:
        self._erase()


def _draws(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if _draws(sys.stderr) else text


def _lines() -> Iterator[str]:
    """What is typed, or piped in, line by line, without the line ends. Ctrl-C drops the line; Ctrl-D ends them."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() a line editor and a history
    while True:
        try:
            line = _typed_line() if is_terminal else sys.stdin.buffer.readline().decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input is not UTF-8: byte at offset {error.start} of a line") from None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            log.info("\nCtrl-D or /quit leaves")
            continue
        if not line:
            if is_terminal:
                log.info("")
            return
        yield line.rstrip("\r\n")


def _typed_line() -> str:
    """A line from the terminal with its end; empty at the end of input."""
    if sys.stdout.isatty():
        try:
            return input("> ") + "\n"
        except EOFError:
            return ""
    # input() would write its "> " to stdout, which goes elsewhere and is for answers alone.
    print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


# ---- the command ----------------------------------------------------------------------------------------------------


def main(options: ChatOptions) -> int:
    """Run the command."""
    setup_logging()
    mode = options.mode()
    if options.load is not None and options.system:
        raise RequestError("--system cannot be given with --load: a saved conversation has its own; leave one out")
    tokenizer = Tokenizer.load(find_model(options.model))
    params = options.params(tokenizer)
    has_marks = Conversation.has_marks(tokenizer)
    is_plain = options.plain or not has_marks
    if is_plain and mode.thinking:
        raise RequestError("this tokenizer has no marks for turns, so a model cannot be asked to think; leave it out")
    if options.load is not None:
        conversation = Conversation.load(options.load, tokenizer, is_plain, mode)
        if conversation.is_plain and mode.thinking:
            raise RequestError(f"{options.load} is a plain text without turns; leave --thinking and --effort out")
    else:
        conversation = Conversation(tokenizer, options.system, is_plain, mode)
    with options.open(options.model, tokenizer) as llm:
        if not has_marks:
            log.info("this tokenizer has no marks for turns: what you type is appended to one text")
        elif conversation.is_plain:
            log.info("plain: what you type is appended to one text")
        else:
            log.info("turns are marked as in DeepSeek-V4; a model that never saw such marks does better with --plain")
        if conversation.exchanges:
            log.info("going on after %d exchanges", len(conversation.exchanges))
        log.info("/help lists the commands, Ctrl-D leaves")
        chat = Chat(llm, conversation, params)
        for line in _lines():
            try:
                if not chat.take(line):
                    break
            except RequestError as error:
                log.info("%s", error)
    return 0
