"""A conversation as data: who said what, which tools there are, how the answer shall be given. No layout, no tokens.

    Conversation((Message("user", "What is 2 + 3?"),), thinking=True, effort="high")

The API dialects, the training data and the terminal all build these; `longreach.chat.renderer` alone turns them into the
text a model reads, and `longreach.chat.parser` turns what a model wrote back into a `Message`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "developer", "user", "assistant", "tool", "latest_reminder"]
"""`developer` gives instructions in the place of a user; `latest_reminder` is text placed before the newest turn."""

Effort = Literal["low", "high", "max"]
"""How thoroughly to think, where thinking is on."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Attributes:
        function: the object as it was given, with `name` and mostly `description` and `parameters` (a JSON Schema). It is
            shown to the model key by key in this order, so nothing is added to it or taken from it.
        strict: arguments must satisfy the schema; the answer is constrained to it.
    """

    function: Mapping[str, Any]
    strict: bool = False

    @property
    def name(self) -> str:
        return self.function["name"]

    @property
    def parameters(self) -> Mapping[str, Any] | None:
        """Its JSON Schema; None where none was given."""
        return self.function.get("parameters")


@dataclass(frozen=True)
class ToolCall:
    """A call that the model made.

    Attributes:
        arguments: JSON text, as the APIs carry it. History may hold text that is not JSON.
        id: names the call to whoever answers it; not shown to the model.
    """

    name: str
    arguments: str
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One entry of a conversation.

    Attributes:
        reasoning: what an assistant thought before it answered; None: not recorded, "": recorded and empty.
        tool_calls: of an assistant, after its content.
        tool_call_id: of a tool's answer: the call it answers; "": the next one in order.
        tools: tools announced at this system or developer message, besides those of the conversation.
        schema: JSON Schema announced at this message, besides the conversation's `answer_format`.
        task: of a user message: a quick instruction (`query`, `action`, …) asked in place of an answer; of an assistant's
            (`title`): asked behind it. The message after it is the reply.
        is_open: of a last assistant message: it is the beginning of the answer and the model goes on from its end.
    """

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    tools: tuple[Tool, ...] = ()
    schema: Mapping[str, Any] | None = None
    task: str | None = None
    is_open: bool = False


@dataclass(frozen=True)
class AnswerFormat:
    """What form the answer shall have.

    Attributes:
        kind: any JSON object, JSON of a schema, or text that matches a regular expression.
        schema: of `json_schema`. regex: of `regex`.
        is_shown: whether the prompt says so. The grammar holds either way.
    """

    kind: Literal["json_object", "json_schema", "regex"]
    schema: Mapping[str, Any] | None = None
    regex: str | None = None
    is_shown: bool = True


@dataclass(frozen=True)
class Conversation:
    """All that a prompt is made of.

    Attributes:
        tools: announced at the first system message (an empty one if there is none).
        thinking: whether the answer begins with reasoning.
        must_call: the answer has to be tool calls: without thinking, the prompt ends with their block already opened
            (in the hosted layout also with thinking, as the vendor renders what its API refuses).
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    answer_format: AnswerFormat | None = None
    thinking: bool = True
    effort: Effort = "high"
    must_call: bool = False

    @property
    def has_tools(self) -> bool:
        """Whether any message or the conversation itself announces tools: then all earlier reasoning is kept."""
        return bool(self.tools) or any(message.tools for message in self.messages)
