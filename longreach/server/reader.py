"""What the engine's tokens mean to a client: reasoning, content and tool calls, as events.

A `Reader` takes the place of the engine's `TextStream`: it is pushed one token at a time in the engine's thread, may end
the answer (end mark, stop string), and collects events for the event loop.
"""

from __future__ import annotations

import secrets
import string
import time

from longreach.chat.messages import Message, ToolCall
from longreach.chat.parser import AnswerParser, CallArguments, CallBegin, CallEnd, ContentText, ReasoningText
from longreach.engine.sampling import FinishReason, SamplingParams
from longreach.engine.stopping import TextStream
from longreach.runtime import log
from longreach.server.call import Content, Event, Finish, Reasoning, ToolArguments, ToolBegin, ToolEnd
from longreach.tokenizer.bpe import Tokenizer

_LETTERS = string.ascii_letters + string.digits


class Reader:
    """The common part: collected events, and what they cost.

    Attributes:
        finish_reason, stop_reason: as the engine asks for them (`engine.stopping.TokenReader`).
        is_broken: reading raised, which only a bug of ours can cause. The answer ends there; those that are computed in
            the same pass go on.
    """

    def __init__(self, choice: int) -> None:
        self.choice = choice
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.is_broken = False
        self._events: list[Event] = []
        self._parts: list[str] = []
        self._cpu_s = 0.0

    def push(self, token_id: int) -> str:
        began = time.perf_counter()
        try:
            self._read(token_id)
        except Exception:
            self._break()
        self._cpu_s += time.perf_counter() - began
        return ""

    def finish(self, reason: FinishReason | None = None) -> str:
        try:
            self._close()
        except Exception:
            self._break()
        return ""

    def _break(self) -> None:
        log.exception("an answer could not be read")
        self.is_broken, self.finish_reason = True, FinishReason.STOP

    def take(self) -> list[Event]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def take_parts(self) -> list[str]:
        """For each token since the last call, what it belongs to: reasoning, content, tool_calls, or a mark."""
        parts, self._parts = self._parts, []
        return parts

    def take_cpu_s(self) -> float:
        """Seconds spent in `push` since the last call."""
        spent, self._cpu_s = self._cpu_s, 0.0
        return spent

    def finish_event(self, reason: FinishReason, num_tokens: int) -> Finish:
        """The last event, once the engine says why the answer ended."""
        raise NotImplementedError

    def _read(self, token_id: int) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError


class ChatReader(Reader):
    """Reads a chat answer."""

    def __init__(self, parser: AnswerParser, choice: int) -> None:
        super().__init__(choice)
        self.parser = parser
        self._texts: dict[type, list[str]] = {ReasoningText: [], ContentText: []}
        self._calls: list[tuple[ToolBegin, list[str]]] = []
        self._is_closed = False

    def _read(self, token_id: int) -> None:
        parser = self.parser
        before = parser.part
        events = parser.push(token_id)
        # The mark that ends the reasoning belongs to neither side; the end mark and a stop string's last token say "done".
        self._parts.append("mark" if before == "reasoning" and parser.part == "content" else parser.part)
        if events:
            self._add(events)
        if parser.finish_reason is not None:
            self.finish_reason, self.stop_reason = FinishReason.STOP, parser.stop_reason

    def _close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._add(self.parser.finish())

    def _add(self, events: list) -> None:
        choice = self.choice
        for event in events:
            match event:
                case ContentText(text):
                    self._texts[ContentText].append(text)
                    self._events.append(Content(text, (), choice))
                case ReasoningText(text):
                    self._texts[ReasoningText].append(text)
                    self._events.append(Reasoning(text, (), choice))
                case CallBegin(index, name):
                    begin = ToolBegin(index, new_call_id(index), name, choice)
                    self._calls.append((begin, []))
                    self._events.append(begin)
                case CallArguments(index, text):
                    self._calls[index][1].append(text)
                    self._events.append(ToolArguments(index, text, choice))
                case CallEnd(index):
                    self._events.append(ToolEnd(index, choice))

    @property
    def stop(self) -> str | None:
        """The stop string that ended the answer."""
        return self.stop_reason if isinstance(self.stop_reason, str) else None

    def message(self) -> Message:
        """The answer so far."""
        calls = tuple(ToolCall(begin.name, "".join(parts), begin.id) for begin, parts in self._calls)
        reasoning = "".join(self._texts[ReasoningText]) if self.parser.num_reasoning_tokens else None
        return Message("assistant", "".join(self._texts[ContentText]), reasoning, calls)

    def finish_event(self, reason: FinishReason, num_tokens: int) -> Finish:
        stop = self.stop
        named = "tool_calls" if reason is FinishReason.STOP and self._calls else _named(reason)
        return Finish(named, stop, num_tokens, self.parser.num_reasoning_tokens, self.choice)


class TextReader(Reader):
    """Reads a continuation: all of it is content."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, choice: int) -> None:
        super().__init__(choice)
        self._stream = TextStream(tokenizer, params)

    def _read(self, token_id: int) -> None:
        text = self._stream.push(token_id)
        self._parts.append("content" if self._stream.stop_reason is None else "done")
        if text:
            self._events.append(Content(text, (), self.choice))
        self.finish_reason, self.stop_reason = self._stream.finish_reason, self._stream.stop_reason

    def _close(self) -> None:
        if text := self._stream.finish():
            self._events.append(Content(text, (), self.choice))

    def finish_event(self, reason: FinishReason, num_tokens: int) -> Finish:
        stop = self.stop_reason if isinstance(self.stop_reason, str) else None
        return Finish(_named(reason), stop, num_tokens, 0, self.choice)


def _named(reason: FinishReason):
    if reason is FinishReason.STOP:
        return "stop"
    return "length" if reason is FinishReason.LENGTH else "insufficient_system_resource"


def new_call_id(index: int) -> str:
    """An id for a tool call, in the hosted service's form."""
    return f"call_{index:02d}_" + "".join(secrets.choice(_LETTERS) for _ in range(24))
