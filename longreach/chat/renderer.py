"""The one place where a conversation becomes a prompt: for training, serving and evaluation alike.

    prompt = render(Conversation((Message("user", "What is 2 + 3?"),)))
    prompt.text                          <｜begin▁of▁sentence｜><｜User｜>What is 2 + 3?<｜Assistant｜><think>
    prompt.encode(tokenizer)             its token ids; no text from outside ever becomes a special token
    render(conversation, for_training=True).encode_with_loss(tokenizer)      ids, and which of them the model has to produce

The layout is V4's: begin mark, effort paragraph, system text without a mark, then turns with nothing between them.

    <｜User｜>question<｜Assistant｜><think>reasoning</think>answer<｜end▁of▁sentence｜><｜User｜>…

There are two readings of it. `encoder` does as the encoder that was published with the weights, `hosted` as the package
deepseek-recipe, which the vendor serves with. docs/chat.md lists where they differ.
Source: DeepSeek-V4's published chat encoder; deepseek-recipe 0.2.0, observed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

from longreach.chat.dsml import BLOCK_OPENING, by_special, call_parts, format_text, schema_text, tool_parts
from longreach.chat.messages import Conversation, Message, Role, Tool
from longreach.chat.modes import EffortTexts, effort_text
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
    TASKS,
    THINK_END,
    THINK_START,
    USER,
)

Layout = Literal["encoder", "hosted"]
"""Whose reading of V4's layout."""

_USERS = ("user", "tool", "developer")
"""Roles whose turns begin with the user's mark."""


# ---- a prompt -------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A part of a prompt.

    Attributes:
        is_special: it is one special token, and no text.
        is_learned: the model has to produce it: reasoning, answer, tool calls and end mark of an assistant.
    """

    text: str
    is_special: bool = False
    is_learned: bool = False


@dataclass(frozen=True)
class Prompt:
    """What a model reads.

    Attributes:
        begins_thinking: the answer goes on inside reasoning that the prompt has opened.
        begins_call: the answer goes on inside a block of tool calls that the prompt has opened.
    """

    pieces: tuple[Piece, ...]
    begins_thinking: bool = False
    begins_call: bool = False

    @cached_property
    def text(self) -> str:
        """All of it, special tokens spelled out."""
        return "".join(piece.text for piece in self.pieces)

    @cached_property
    def key(self) -> str:
        """Its text, in which a special token differs from the same letters as text: no text has a lone surrogate."""
        return "".join("\ud800" + piece.text if piece.is_special else piece.text for piece in self.pieces)

    def encode(self, tokenizer: Tokenizer, known: Callable[[str], Sequence[int] | None] | None = None) -> list[int]:
        """Its token ids. Text between two special tokens is encoded as a whole, and never becomes a special token.

        Args:
            known: tokens of a part of an earlier answer, by its `key`, where they are not those that encoding would give:
                the ones the model wrote.

        Raises:
            RequestError: the tokenizer lacks a special token of the prompt, or a text is not valid Unicode.
        """
        if known is None:
            return [token for ids, _ in self._runs(tokenizer) for token in ids]
        ids: list[int] = []
        rest: list[Piece] = []
        for part, is_answer in _parts(self.pieces):
            found = known(Prompt(tuple(part)).key) if is_answer else None
            if found is None:
                rest += part
            else:
                ids += Prompt(tuple(rest)).encode(tokenizer)
                ids += found
                rest = []
        return ids + Prompt(tuple(rest)).encode(tokenizer)

    def encode_with_loss(self, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        """Its token ids, and for each whether the model has to produce it. A token on the border belongs to its first byte.

        Raises:
            RequestError: as `encode`.
        """
        ids: list[int] = []
        mask: list[bool] = []
        for run_ids, run in self._runs(tokenizer):
            if len({piece.is_learned for piece in run}) == 1:
                mask += [run[0].is_learned] * len(run_ids)
            else:
                is_learned = [piece.is_learned for piece in run for _ in piece.text.encode("utf-8")]
                place = 0
                for token in run_ids:
                    mask.append(is_learned[place])
                    place += len(tokenizer.token_bytes[token])
            ids += run_ids
        return ids, mask

    def _runs(self, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[Piece]]]:
        """Ids of each special token, and of each text between two of them, with the pieces they came from."""
        runs: list[list[Piece]] = []
        for piece in self.pieces:
            if runs and not piece.is_special and not runs[-1][0].is_special:
                runs[-1].append(piece)
            else:
                runs.append([piece])
        plain = ["".join(piece.text for piece in run) for run in runs if not run[0].is_special]
        texts = iter(tokenizer.encode_batch(plain))
        for run in runs:
            yield ([tokenizer.special_id(run[0].text)] if run[0].is_special else next(texts)), run


LIMITS = frozenset({BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END, LATEST_REMINDER, *TASKS.values()})
"""Special tokens between the parts of a conversation; the mark inside the tags of tool calls is none of them."""


def _parts(pieces: Iterable[Piece]) -> Iterator[tuple[list[Piece], bool]]:
    """Pieces from one limit to the next, each limit alone, and whether they are a finished part of an answer."""
    part: list[Piece] = []
    before = ""
    for piece in pieces:
        if piece.is_special and piece.text in LIMITS:
            if part:
                yield part, before in (THINK_START, THINK_END) and piece.text in (THINK_END, EOS)
            yield [piece], False
            part, before = [], piece.text
        else:
            part.append(piece)
    if part:
        yield part, False


def answer_parts(message: Message) -> list[Prompt]:
    """The parts of an assistant's message as `render` writes them: reasoning where there is any, content and calls."""
    parts = [] if message.reasoning is None else [(Piece(message.reasoning),)]
    rest = [Piece(message.content)] if message.content else []
    if message.tool_calls:
        rest += [Piece(text, is_special) for text, is_special in call_parts(message.tool_calls)]
    return [Prompt(part) for part in (*parts, tuple(rest))]


class _Writer:
    """Pieces as they come."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def mark(self, spelling: str, is_learned: bool = False) -> None:
        self.pieces.append(Piece(spelling, True, is_learned))

    def text(self, text: str, is_learned: bool = False) -> None:
        if text:
            self.pieces.append(Piece(text, False, is_learned))

    def parts(self, parts: Iterable[tuple[str, bool]], is_learned: bool = False) -> None:
        self.pieces += [Piece(text, is_special, is_learned) for text, is_special in parts]


def fim(prompt: str, suffix: str | None = None) -> Prompt:
    """A prompt for the text between `prompt` and `suffix`; without a suffix, for what follows `prompt`."""
    write = _Writer()
    write.mark(BOS)
    if suffix is None:
        write.text(prompt)
    else:
        write.mark(FIM_BEGIN)
        write.text(prompt)
        write.mark(FIM_HOLE)
        write.text(suffix)
        write.mark(FIM_END)
    return Prompt(tuple(write.pieces))


# ---- a conversation -------------------------------------------------------------------------------------------------


def render(
    conversation: Conversation, *, texts: EffortTexts = "0731", layout: Layout = "encoder", for_training: bool = False
) -> Prompt:
    """Lay a conversation out.

    The prompt ends where an answer begins: after `<think>`, or `</think>`, or a quick instruction's token, or an open
    message, or (if a call is demanded) an opened block of tool calls.

    Args:
        texts: revision of the weights whose effort paragraphs are used.
        for_training: a finished last turn is the end, and its reasoning is kept. What the model has to produce is marked
            as learned, except turns whose recorded reasoning the layout drops: they would teach to answer without it.

    Raises:
        RequestError: messages that do not fit together, an unknown role, effort or task, or a tool that is no JSON.
    """
    if layout not in get_args(Layout):
        raise RequestError(f"layout {layout!r} is unknown; there are {', '.join(get_args(Layout))}")
    _check(conversation, layout)
    turns = _hosted_turns(conversation) if layout == "hosted" else _encoder_turns(conversation)
    return _Rendering(conversation, turns, layout, for_training).run(effort_text(conversation.effort, texts))


@dataclass
class _Turn:
    """A message, or several that make one turn.

    Attributes:
        message: the last of them.
        texts: joined by blank lines.
        ends_in_result: the last text is a tool's result.
    """

    message: Message
    texts: list[str]
    tools: tuple[Tool, ...] = ()
    forms: tuple[str, ...] = ()
    ends_in_result: bool = False

    @property
    def role(self) -> Role:
        return self.message.role


class _Rendering:
    """One pass over the turns.

    Attributes:
        is_opened: the assistant's mark and think token stand there, waiting for an answer.
        begins_thinking: of the prompt as written so far.
    """

    def __init__(self, conversation: Conversation, turns: list[_Turn], layout: Layout, for_training: bool) -> None:
        self.conversation, self.turns, self.for_training = conversation, turns, for_training
        self.is_hosted = layout == "hosted"
        self.last_user = max((i for i, turn in enumerate(turns) if turn.role in _USERS), default=-1)
        self.has_tools = conversation.has_tools
        self.write = _Writer()
        self.is_opened = self.begins_thinking = False

    def run(self, effort: str) -> Prompt:
        thinking, last = self.conversation.thinking, self.turns[-1].message
        self.write.mark(BOS)
        if thinking:
            self.write.text(effort)
        for index in range(len(self.turns)):
            self._turn(index)
        is_complete = self.for_training and last.role == "assistant"
        if not last.is_open and last.task is None and not is_complete:
            if not self.is_opened or last.role == "latest_reminder":
                self._open(thinking)
            self.begins_thinking = thinking
        begins_call = self.conversation.must_call and self.has_tools and not is_complete and last.task is None
        if not self.is_hosted and self.begins_thinking:
            begins_call = False  # it has to think first
        if begins_call:
            self.write.parts(by_special(BLOCK_OPENING))
        return Prompt(tuple(self.write.pieces), self.begins_thinking and not begins_call, begins_call)

    def _turn(self, index: int) -> None:
        turn, write = self.turns[index], self.write
        match turn.role:
            case "system":
                self._instructions(turn)
            case "latest_reminder":
                write.mark(LATEST_REMINDER)
                write.text(turn.message.content)
            case "assistant":
                self._answer(index)
            case _:
                write.mark(USER)
                self._instructions(turn)
                self.is_opened = False
        following = self.turns[index + 1].role if index + 1 < len(self.turns) else None
        if self.is_hosted or following not in (None, "assistant", "latest_reminder"):
            return
        task = turn.message.task
        if task == "action":
            self._open(self.conversation.thinking)
        if task is not None:
            write.mark(TASKS[task])
        elif turn.role in _USERS:
            self._open(self._keeps_reasoning(index, self.last_user))

    def _instructions(self, turn: _Turn) -> None:
        self.write.text("\n\n".join(turn.texts))
        if turn.tools:
            self.write.text("\n\n")
            self.write.parts(tool_parts(turn.tools))
        for form in turn.forms:
            self.write.text("\n\n" + form)

    def _open(self, thinks: bool) -> None:
        self.write.mark(ASSISTANT)
        self.write.mark(THINK_START if thinks else THINK_END)
        self.is_opened = True

    def _keeps_reasoning(self, index: int, first: int) -> bool:
        """Whether the encoder keeps reasoning here: all of it where there are tools, else from the turn `first` on."""
        return self.conversation.thinking and (self.has_tools or index >= first)

    def _reasoning(self, index: int) -> str | None:
        """What is shown of an answer's reasoning, None where it has no place for any."""
        message = self.turns[index].message
        if message.is_open and self.conversation.thinking and not message.content:
            return message.reasoning or ""
        if not self.is_hosted:
            return (message.reasoning or "") if self._keeps_reasoning(index, self.last_user + 1) else None
        is_last_round = self.for_training and index > self.last_user
        return message.reasoning if self.has_tools or message.is_open or is_last_round else None

    def _answer(self, index: int) -> None:
        write, message = self.write, self.turns[index].message
        reasoning = self._reasoning(index)
        is_learned = not (self.conversation.thinking and message.reasoning and reasoning is None)
        answers_task = index > 0 and self.turns[index - 1].message.task is not None
        if not answers_task:
            if not self.is_opened:
                self._open(reasoning is not None)
            if reasoning is not None:
                write.text(reasoning, is_learned)
                self.begins_thinking = message.is_open and self.conversation.thinking and not message.content
                if not self.begins_thinking:
                    write.mark(THINK_END, is_learned)
        write.text(message.content, is_learned)
        if message.tool_calls:
            write.parts(call_parts(message.tool_calls), is_learned)
        if not message.is_open:
            write.mark(EOS, is_learned)
        self.is_opened = False


# ---- from messages to turns -----------------------------------------------------------------------------------------


def _encoder_turns(conversation: Conversation) -> list[_Turn]:
    """Every message in its place; users and tools between two others are one turn."""
    turns: list[_Turn] = []
    forms = _forms(format_text(conversation.answer_format))
    if conversation.messages[0].role != "system" and (conversation.tools or forms):
        turns.append(_Turn(Message("system"), [], conversation.tools, forms))
    for message in _in_call_order(conversation.messages):
        if message.role in ("user", "tool"):
            if turns and turns[-1].role in ("user", "tool") and turns[-1].message.task is None:
                turns[-1].texts.append(_said(message))
                turns[-1].message = message
            else:
                turns.append(_Turn(message, [_said(message)]))
        else:
            turns.append(_Turn(message, [message.content], message.tools, _forms(_schema(message))))
    first = turns[0]
    if conversation.messages[0].role == "system":
        first.tools, first.forms = conversation.tools + first.tools, forms + first.forms
    if conversation.thinking and not conversation.has_tools:
        users = [i for i, turn in enumerate(turns) if turn.role in _USERS]
        turns = [turn for i, turn in enumerate(turns) if turn.role != "developer" or i == users[-1]]
    return turns


def _hosted_turns(conversation: Conversation) -> list[_Turn]:
    """All system texts at the front; then users that follow each other are one turn, but a tool's result begins another."""
    systems = [message for message in conversation.messages if message.role == "system"]
    turns = [
        _Turn(
            Message("system"),
            [message.content for message in systems if message.content],
            sum((message.tools for message in systems), conversation.tools),
            _forms(format_text(conversation.answer_format), *map(_schema, systems)),
        )
    ]
    for message in _in_call_order([message for message in conversation.messages if message.role != "system"]):
        last, is_result = turns[-1], message.role == "tool"
        if is_result and last.ends_in_result:
            last.texts.append(_said(message))
        elif message.role == "user" and last.role in ("user", "tool"):
            if not last.ends_in_result and not last.texts[-1]:
                last.texts[-1] = message.content
            elif message.content or last.ends_in_result:
                last.texts.append(message.content)
        else:
            turns.append(_Turn(message, [_said(message)]))
            last = turns[-1]
        last.message, last.ends_in_result = message, is_result
    return turns


def _said(message: Message) -> str:
    return f"<tool_result>{message.content}</tool_result>" if message.role == "tool" else message.content


def _schema(message: Message) -> str:
    return "" if message.schema is None else schema_text(message.schema)


def _forms(*texts: str) -> tuple[str, ...]:
    return tuple(filter(None, texts))


def _in_call_order(messages: Sequence[Message]) -> list[Message]:
    """The messages with the results of each round of calls in the order of the calls. Results without an id stay in front."""
    ordered = list(messages)
    order: dict[str, int] = {}
    places: list[int] = []

    def sort() -> None:
        results = sorted((ordered[place] for place in places), key=lambda m: order.get(m.tool_call_id, -1))
        for place, result in zip(places, results, strict=True):
            ordered[place] = result

    for place, message in enumerate(messages):
        if message.role == "tool":
            places.append(place)
        elif message.role == "assistant":
            sort()
            places, order = [], {call.id: i for i, call in enumerate(message.tool_calls) if call.id}
    sort()
    return ordered


def _check(conversation: Conversation, layout: Layout) -> None:
    """Raise a RequestError that says what does not fit together."""
    messages = conversation.messages
    if not messages:
        raise RequestError("the conversation has no messages; give at least one")
    calls: set[str] | None = None
    for index, message in enumerate(messages):
        what, role = f"message {index}", message.role
        if role not in get_args(Role):
            raise RequestError(f"{what} has the unknown role {role!r}; roles are {', '.join(get_args(Role))}")
        if role == "assistant":
            calls = {call.id for call in message.tool_calls} if message.tool_calls else None
        elif message.tool_calls or message.reasoning is not None or message.is_open:
            raise RequestError(f"{what} has tool calls, reasoning or an open end; only an assistant's message can")
        if role == "tool":
            if calls is None:
                raise RequestError(f"{what} is a tool's result, but no tool call precedes it")
            if message.tool_call_id and message.tool_call_id not in calls:
                raise RequestError(
                    f"{what} answers the tool call {message.tool_call_id!r}, which the assistant before it has not made"
                )
        if (message.tools or message.schema is not None) and role not in ("system", "developer"):
            raise RequestError(f"{what} announces tools or a schema; only system and developer messages can")
        if message.task is not None:
            if message.task not in TASKS:
                raise RequestError(f"{what} asks for the unknown task {message.task!r}; tasks are {', '.join(TASKS)}")
            if role not in ("user", "developer", "assistant"):
                raise RequestError(f"{what} asks for a task; only user, developer and assistant messages can")
        if message.is_open and (index < len(messages) - 1 or message.tool_calls):
            raise RequestError(f"{what} is open: it must be the last message and have no tool calls")
        if layout == "hosted" and (role == "developer" or message.task is not None):
            raise RequestError(f"{what}: the hosted layout has no developer role and no tasks; use the layout encoder")
