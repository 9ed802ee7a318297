"""From what a model writes back to reasoning, content and tool calls, token by token as it comes.

    parser = AnswerParser(tokenizer, thinking=prompt.begins_thinking, tools=tools, must_call=prompt.begins_call, stop=stop)
    events = parser.push(token_id)            again and again, until parser.finish_reason is set or nothing more comes
    events = parser.finish()                  what was still held back

    reasoning …</think>content…\\n\\n<｜DSML｜tool_calls>…</｜DSML｜tool_calls><｜end▁of▁sentence｜>

Special tokens are known by their ids: `</think>` spelled with ordinary tokens is text. Only where a tokenizer has no token
`｜DSML｜` is its spelling taken for it.

Nothing that a model writes is refused, and no text is lost. The rules for what is malformed:

- White space between the tags of a block is layout and vanishes; so do the two line ends before it.
- What is no tag inside a block is given back as content: at once between two calls, after the call's end inside one.
- A value ends at `</｜DSML｜parameter>`; without one, at the closing tag of its call or of the block.
- A value of `string="false"` that is not JSON becomes a JSON string; where `string` is missing, the tool's schema decides,
  and if it does not know the parameter, whether the value is JSON.
- A parameter that comes twice stands twice in the arguments. The name of an unknown tool is still a call.
- A call without a block around it is a call. Text after the block is content, and so is a tag cut off in the middle.
- An answer that is cut off leaves the arguments as far as they have come, without an end of the call.
- The mark of another turn ends the answer.

`problems` says which of them were needed, so that a grader can see it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from longreach.chat.messages import Message, Tool, ToolCall
from longreach.tokenizer.bpe import Tokenizer
from longreach.tokenizer.special import (
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    LATEST_REMINDER,
    SPECIAL_TOKENS,
    THINK_END,
    USER,
)
from longreach.tokenizer.stream import StreamDecoder

Part = Literal["reasoning", "content", "tool_calls", "done"]
"""What of an answer is being written."""


# ---- what comes out -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentText:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool call begins. `index` counts the calls of the answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments' JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call's arguments are complete JSON."""

    index: int


ParserEvent = ReasoningText | ContentText | CallBegin | CallArguments | CallEnd


# ---- tags -----------------------------------------------------------------------------------------------------------

# While tags are looked for, the special token is one lone surrogate: a character that no decoded text can hold.
_D = "\ud800"
_BLOCK = "tool_calls|calls|function_calls"
_TAG = re.compile(
    rf"<{_D} *(?:(?P<opens_block>{_BLOCK})"
    rf'|(?P<opens>invoke|parameter) +name="(?P<name>[^\n{_D}]*?)"(?: +string="(?P<string>true|false)")?) *>'
    rf"|</{_D} *(?:(?P<closes_block>{_BLOCK})|(?P<closes>invoke|parameter)) *>"
)
_TAG_BEGINNING = re.compile(
    rf"</?(?:{_D} *(?:[a-z_]{{0,14}}|(?:{_BLOCK}|invoke|parameter) *"
    rf'|(?:invoke|parameter) +(?:n|na|nam|name|name=|name="[^\n{_D}]{{0,1000}}))?)?'
)
_BEFORE_BLOCK = re.compile(r"\n{0,2}<?\Z")
_BEGINS_TAG = re.compile(rf"[\n<{_D}]")
_WHITE = " \t\r\n"

_ENDS = {EOS, BOS, USER, ASSISTANT, LATEST_REMINDER}


def _spelled(text: str) -> str:
    return text.replace(_D, DSML)


class _StopString:
    """How many characters of a stop string the text ends with, each looked at once (Knuth, Morris and Pratt)."""

    def __init__(self, stop: str) -> None:
        self.text, self.matched = stop, 0
        self._shorter = [0] * (len(stop) + 1)
        for length in range(2, len(stop) + 1):
            self._shorter[length] = self._extended(self._shorter[length - 1], stop[length - 1])

    def advance(self, character: str) -> bool:
        """Read one character; whether it completes the string."""
        self.matched = self._extended(self.matched, character)
        return self.matched == len(self.text)

    def _extended(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self._shorter[matched]
        return matched + (self.text[matched] == character)


# ---- the machine ----------------------------------------------------------------------------------------------------


class AnswerReader:
    """Reads an answer given as text and special tokens; `AnswerParser` feeds it token ids.

    Args:
        thinking: it begins inside reasoning.
        tools: of the prompt. Without any (and without `must_call`) there are no calls, and their tags are content.
        must_call: it begins inside a block of calls.
        stop: strings that end the answer, looked for in its content alone; they are not part of it.

    Attributes:
        part: what is being written.
        finish_reason: "stop" once an end mark or a stop string has ended the answer, else None.
        stop_reason: that stop string, or the id of that mark.
        problems: what was malformed, one line each.
    """

    def __init__(
        self, *, thinking: bool, tools: Sequence[Tool] = (), must_call: bool = False, stop: Iterable[str] = ()
    ) -> None:
        self.part: Part = "tool_calls" if must_call else "reasoning" if thinking else "content"
        self.finish_reason: Literal["stop"] | None = None
        self.stop_reason: str | int | None = None
        self.problems: list[str] = []
        self._tools = {tool.name: tool for tool in tools}
        self._reads_calls = bool(tools) or must_call
        self._stops = [_StopString(text) for text in stop if text]
        self._is_closed = False
        self._out: list[ParserEvent] = []
        self._held = ""  # may turn out to be a tag
        self._held_content = ""  # may turn out to be the beginning of a stop string
        self._block = self._new_block(0) if must_call else None
        self._num_calls = 0  # of the blocks that are closed
        self._blank_after_block: list[str] | None = None  # None: there was no block, or there is text behind it

    def text(self, text: str) -> None:
        """Ordinary text."""
        if self.part == "reasoning":
            self._out.append(ReasoningText(text))
        elif not self._reads_calls or not (self._held or self._block or _BEGINS_TAG.search(text)):
            self._say(text)
        else:
            self._held += text
            self._advance()

    def mark(self, spelling: str) -> None:
        """A special token that does not end the answer."""
        if spelling == THINK_END and self.part == "reasoning":
            self.part = "content"
        elif spelling == DSML and self._reads_calls and self.part != "reasoning":
            self.text(_D)
        else:
            self.problems.append(f"{spelling} stands in the {self.part}")
            self.text(spelling)

    def take(self) -> list[ParserEvent]:
        """The events since the last call."""
        events = self._out.copy()
        self._out.clear()
        return events

    def end(self) -> None:
        """Nothing more will come: let go of what was held back. Nothing happens when called again."""
        if self._is_closed:
            return
        if self.part == "reasoning":
            self.problems.append("the reasoning was not ended")
        if self._block is not None:
            self._block.end(self._held, has_ended=self.finish_reason is not None)
        else:
            if _D in self._held:
                self.problems.append("a tag is cut off")
            self._say(_spelled(self._held))
        if self._held_content:
            self._out.append(ContentText(self._held_content))
        self._close()

    def _close(self) -> None:
        self._is_closed, self._held, self._held_content, self.part = True, "", "", "done"

    # ---- content ----------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        """Content, as far as no stop string can begin in it."""
        if self._blank_after_block is not None:
            # White space alone after a block is layout; with text behind it, it is content.
            self._blank_after_block.append(text)
            if not text.strip(_WHITE):
                return
            text = "".join(self._blank_after_block)
            self.problems.append("there is text after the tool calls")
            self._blank_after_block, self.part = None, "content"
        for place, character in enumerate(text) if self._stops else ():
            complete = [stop.text for stop in self._stops if stop.advance(character)]
            if complete:
                # Two that are complete at one character: the longer one began first.
                stop = max(complete, key=len)
                text = (self._held_content + text[: place + 1])[: -len(stop)]
                self.finish_reason, self.stop_reason = "stop", stop
                self._close()
                break
        else:
            if self._stops:
                text = self._held_content + text
                certain = len(text) - max(stop.matched for stop in self._stops)
                text, self._held_content = text[:certain], text[certain:]
        if text:
            self._out.append(ContentText(text))

    def _advance(self) -> None:
        """Read of what is held all that is certain."""
        is_certain = True
        while self._held and is_certain and not self._is_closed:
            if self._block is None:
                is_certain = self._find_block()
                continue
            self._held = self._block.read(self._held)
            is_certain = self._block.is_closed
            if is_certain:
                self._num_calls += self._block.num_calls
                self._block, self._blank_after_block = None, []

    def _find_block(self) -> bool:
        """Say what surely is content. Whether what is held then can be read on without more text."""
        held = self._held
        place = held.find(_D)
        if place < 0:
            place = _BEFORE_BLOCK.search(held).start()  # pyright: ignore[reportOptionalMemberAccess]  # it may be empty
            self._held = held[place:]
            self._say(held[:place])
            return False
        start = place - 1
        if held[start:place] == "<":
            num_line_ends = min(2, start - len(held[:start].rstrip("\n")))
            content = held[: start - num_line_ends]
            tag = _TAG.match(held, start)
            if tag is not None and (tag["opens_block"] or tag["opens"] == "invoke"):
                self._say(content)
                if not self._is_closed:
                    self._open_block(tag, num_line_ends)
                    self._held = held[tag.end() if tag["opens_block"] else start :]
                return True
            if tag is None and _TAG_BEGINNING.fullmatch(held, start):
                self._held = held[len(content) :]
                self._say(content)
                return False
        self.problems.append(f"{DSML} stands in the content")
        self._held = held[place + 1 :]
        self._say(_spelled(held[: place + 1]))
        return True

    def _open_block(self, tag: re.Match[str], num_line_ends: int) -> None:
        if self._blank_after_block is not None or self._num_calls:
            self.problems.append("there is more than one block of tool calls")
        if not tag["opens_block"]:
            self.problems.append("a call has no block around it")
        elif num_line_ends != 2:
            self.problems.append("no blank line stands before the tool calls")
        if self._held_content:
            self._out.append(ContentText(self._held_content))
            self._held_content = ""
        for stop in self._stops:
            stop.matched = 0
        self._block, self._blank_after_block = self._new_block(self._num_calls), None
        self.part = "tool_calls"

    def _new_block(self, first: int) -> _Block:
        return _Block(self._tools, first, self._out, self.problems)


class _Block:
    """A block of tool calls that is being read.

    Args:
        first: index of its first call.
        out, problems: lists that it adds to.

    Attributes:
        is_closed: its closing tag has come.
    """

    def __init__(self, tools: Mapping[str, Tool], first: int, out: list[ParserEvent], problems: list[str]) -> None:
        self.num_calls = 0
        self.is_closed = False
        self._tools, self._first, self._out, self._problems = tools, first, out, problems
        self._index: int | None = None  # of the call that is open
        self._tool: Tool | None = None
        self._names: set[str] = set()
        self._name: str | None = None  # of the parameter that is open
        self._is_string: bool | None = None  # None: the tag did not say
        self._value: list[str] = []  # of a parameter that is not known to be a string
        self._stray: list[str] = []  # not understood, to be given back after the call
        self._blank: list[str] = []  # white space that may be part of it
        self._is_astray = False

    def read(self, held: str) -> str:
        """Read all that is certain; what is left may turn out to be a tag, or follows the block."""
        place = 0
        while place < len(held) and not self.is_closed:
            if self._name is not None:
                start = held.find(f"</{_D}", place)
                if start < 0:
                    start = len(held) - (2 if held.endswith("</") else 1 if held.endswith("<") else 0)
                    self._add_value(held[place : max(start, place)])
                    return held[max(start, place) :]
                self._add_value(held[place:start])
            else:
                start = held.find("<", place)
                if start < 0:
                    self._lose(held[place:])
                    return ""
                self._lose(held[place:start])
            tag = _TAG.match(held, start)
            if tag is not None:
                place = tag.end()
                if not self._take(tag):
                    self._give_back(tag[0])
            elif _TAG_BEGINNING.fullmatch(held, start):
                return held[start:]
            else:
                place = start + 1
                self._give_back("<")
        return held[place:]

    def end(self, held: str, has_ended: bool) -> None:
        """Nothing more will come.

        Args:
            has_ended: the model has ended the answer itself; it was not cut off.
        """
        if self._name is not None:
            self._problem("a parameter is cut off")
            self._add_value(held)
            if self._value:
                self._argue("".join(self._value))
        else:
            self._lose(held)
            if has_ended:
                self._problem("the block of tool calls was not closed")
                self._end_call()
        self._flush()

    def _take(self, tag: re.Match[str]) -> bool:
        """Do what a tag says; whether it has a meaning at this place."""
        opens, closes, closes_block = tag["opens"], tag["closes"], tag["closes_block"]
        if self._name is not None:
            if closes != "parameter":
                self._problem("a parameter was not closed")
            self._end_value()
            if closes == "parameter":
                return True
        if closes_block:
            if self._index is not None:
                self._problem("a call was not closed")
            if not self.num_calls:
                self._problem("the block of tool calls is empty")
            self._end_call()
            self.is_closed = True
        elif closes == "invoke" and self._index is not None:
            self._end_call()
        elif opens == "invoke":
            if self._index is not None:
                self._problem("a call was not closed")
            self._end_call()
            self._begin_call(tag["name"])
        elif opens == "parameter" and self._index is not None:
            self._begin_value(tag["name"], tag["string"])
        else:
            return False
        self._is_astray, self._blank = False, []
        return True

    # ---- calls and values -------------------------------------------------------------------------------------------

    def _begin_call(self, name: str) -> None:
        self._index = self._first + self.num_calls
        self.num_calls += 1
        self._tool, self._names = self._tools.get(name), set()
        if self._tool is None:
            self._problem(f"there is no tool {name!r}")
        self._out.append(CallBegin(self._index, name))

    def _end_call(self) -> None:
        if self._index is not None:
            self._argue("}" if self._names else "{}")
            self._out.append(CallEnd(self._index))
            self._index = None
        self._flush()

    def _begin_value(self, name: str, string: str | None) -> None:
        if name in self._names:
            self._problem(f"the parameter {name!r} comes twice")
        self._argue((", " if self._names else "{") + json.dumps(name, ensure_ascii=False) + ": ")
        self._names.add(name)
        self._name, self._is_string = name, None if string is None else string == "true"
        if string is None:
            self._problem(f"the parameter {name!r} does not say whether it is a string")
            self._is_string = self._known_string(name)
        if self._is_string:
            self._argue('"')

    def _known_string(self, name: str) -> bool | None:
        """Whether the tool's schema says that this parameter is a string; None where it does not say."""
        schema: Any = self._tool.parameters if self._tool is not None else None
        for key in ("properties", name, "type"):
            schema = schema.get(key) if isinstance(schema, Mapping) else None
        return schema == "string" if isinstance(schema, str) else None

    def _add_value(self, text: str) -> None:
        text = _spelled(text)
        if self._is_string and text:
            self._argue(json.dumps(text, ensure_ascii=False)[1:-1])
        elif text:
            # JSON is let go as a whole, so that the arguments are JSON whatever the model wrote.
            self._value.append(text)

    def _end_value(self) -> None:
        if self._is_string:
            self._argue('"')
        else:
            value = "".join(self._value)
            if _is_json(value):
                self._argue(value)
            else:
                if self._is_string is False:
                    self._problem(f"the parameter {self._name!r} is not JSON")
                self._argue(json.dumps(value, ensure_ascii=False))
            self._value = []
        self._name = None

    def _argue(self, text: str) -> None:
        assert self._index is not None
        if self._out and isinstance(
            last := self._out[-1], CallArguments
        ):  # of this call: another's end would stand here
            self._out[-1] = CallArguments(self._index, last.text + text)
        else:
            self._out.append(CallArguments(self._index, text))

    # ---- what is not understood -------------------------------------------------------------------------------------

    def _give_back(self, text: str) -> None:
        if self._name is not None:
            self._add_value(text)
        else:
            self._lose(text)

    def _lose(self, text: str) -> None:
        """Text between tags: white space is layout, other text is given back with the white space inside it."""
        text = _spelled(text)
        if not self._is_astray:
            text = text.lstrip(_WHITE)
        kept = text.rstrip(_WHITE)
        if not kept:
            self._blank.append(text)
            return
        if not self._is_astray:
            self._problem("there is text between the tags")
        self._is_astray = True
        self._stray += [*self._blank, kept]
        self._blank = [text[len(kept) :]]
        if self._index is None:
            self._flush()

    def _flush(self) -> None:
        if self._stray:
            self._out.append(ContentText("".join(self._stray)))
            self._stray = []

    def _problem(self, problem: str) -> None:
        self._problems.append(problem)


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


# ---- from tokens ----------------------------------------------------------------------------------------------------


class AnswerParser(AnswerReader):
    """Reads an answer token by token.

    Args: those of `AnswerReader`, and
        tokenizer: the one the ids belong to.

    Attributes: those of `AnswerReader`, and
        num_tokens: tokens pushed, the one that ended the answer included.
        num_reasoning_tokens: how many of them were reasoning; `</think>` is none of it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        thinking: bool,
        tools: Sequence[Tool] = (),
        must_call: bool = False,
        stop: Iterable[str] = (),
    ) -> None:
        super().__init__(thinking=thinking, tools=tools, must_call=must_call, stop=stop)
        self.num_tokens = self.num_reasoning_tokens = 0
        self._decoder = StreamDecoder(tokenizer)
        self._marks = {token: spelling for spelling, token in tokenizer.special_ids.items()}
        self._held_spelling = "" if self._reads_calls and DSML not in tokenizer.special_ids else None

    def push(self, token_id: int) -> list[ParserEvent]:
        """What this token makes certain. No more may be pushed once `finish_reason` is set.

        Raises:
            RequestError: the id is outside the vocabulary.
        """
        assert self.finish_reason is None, f"the answer has ended ({self.stop_reason!r})"
        self.num_tokens += 1
        spelling = self._marks.get(token_id)
        if spelling is None:
            if self.part == "reasoning":
                self.num_reasoning_tokens += 1
            text = self._decoder.push(token_id)
            if text:
                self._read(text)
        elif spelling in _ENDS:
            if spelling != EOS:
                self.problems.append(f"{spelling} ended the answer")
            self._let_go()
            if self.finish_reason is None:
                self.finish_reason, self.stop_reason = "stop", token_id
                self.end()
        else:
            if self.part == "reasoning" and spelling != THINK_END:
                self.num_reasoning_tokens += 1
            self._let_go()
            if self.finish_reason is None:
                self.mark(spelling)
        return self.take()

    def finish(self) -> list[ParserEvent]:
        """What was still held back, where the answer was cut off. Empty after its end, and when called again."""
        if not self._is_closed:
            self._let_go()
            self.end()
        return self.take()

    def _read(self, text: str) -> None:
        if self._held_spelling is None or self.part == "reasoning":
            self.text(text)
            return
        # This tokenizer spells ｜DSML｜ with ordinary tokens.
        text = (self._held_spelling + text).replace(DSML, _D)
        length = next((n for n in range(min(len(text), len(DSML) - 1), 0, -1) if text.endswith(DSML[:n])), 0)
        self._held_spelling = text[len(text) - length :]
        if length < len(text):
            self.text(text[: len(text) - length])

    def _let_go(self) -> None:
        """An unfinished character, or an unfinished spelling, is complete as it is."""
        if text := self._decoder.finish():
            self._read(text)
        if self._held_spelling:
            held, self._held_spelling = self._held_spelling, ""
            self.text(held)


_MARKS = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")


def parse(
    answer: str | Iterable[int],
    *,
    thinking: bool,
    tools: Sequence[Tool] = (),
    must_call: bool = False,
    tokenizer: Tokenizer | None = None,
    problems: list[str] | None = None,
) -> Message:
    """A whole answer as a message.

    Args:
        answer: token ids, with their `tokenizer`; or text, in which every spelling of a special token is taken for one.
        thinking, tools, must_call: as for `AnswerReader`.
        problems: a list to which is added what was malformed.
    """
    if isinstance(answer, str):
        reader = AnswerReader(thinking=thinking, tools=tools, must_call=must_call)
        for place, part in enumerate(_MARKS.split(answer)):
            if part in _ENDS:
                reader.finish_reason = "stop"
                break
            if part:
                (reader.mark if place % 2 else reader.text)(part)
        reader.end()
        events = reader.take()
    else:
        assert tokenizer is not None, "token ids can only be read with their tokenizer"
        reader = AnswerParser(tokenizer, thinking=thinking, tools=tools, must_call=must_call)
        events = []
        for token in answer:
            events += reader.push(token)
            if reader.finish_reason is not None:
                break
        events += reader.finish()
    if problems is not None:
        problems += reader.problems
    return _message(events, thinking)


def _message(events: Iterable[ParserEvent], thinking: bool) -> Message:
    reasoning: list[str] = []
    content: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case ReasoningText(text):
                reasoning.append(text)
            case ContentText(text):
                content.append(text)
            case CallBegin(_, name):
                names.append(name)
                arguments.append([])
            case CallArguments(index, text):
                arguments[index].append(text)
    calls = tuple(ToolCall(name, "".join(parts)) for name, parts in zip(names, arguments, strict=True))
    return Message("assistant", "".join(content), "".join(reasoning) if thinking else None, calls)
