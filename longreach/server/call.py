"""What every API dialect becomes: one `Call`, answered by a stream of events. No HTTP, no model, no dialect in here.

    request body ── dialect.read ──> Call ── server.answer ──> events ── dialect.whole or dialect.stream ──> response body

A dialect (`openai.py`, `anthropic.py`, `responses.py`) reads a body into a `Call`, refusing what it must with an `ApiError`,
and writes the events back in its own words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from longreach.chat.messages import Conversation, Message, ToolCall


class ApiError(Exception):
    """A refusal, on its way to the client.

    Attributes:
        status: HTTP status.
        message: one line for the user; never a path, a prompt or anything of another tenant.
        type, code, param: as the OpenAI-like error body has them; the Anthropic dialect maps the status to its own type.
        retry_after_s: seconds to wait, for 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = "invalid_request_error",
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type, self.code, self.param = status, message, type, code, param
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Rules:
    """How strictly requests are read.

    Attributes:
        hosted: refuse and override exactly as DeepSeek's own service does; otherwise be lenient where clients need it.
        require_reasoning: refuse a tool-calling assistant turn that comes back without its reasoning, while thinking.
    """

    hosted: bool = False
    require_reasoning: bool = False


@dataclass(frozen=True)
class FillIn:
    """A text to be continued, or a gap to be filled where there is a suffix: the `/completions` endpoint.

    Attributes:
        prompt: text before the gap. suffix: text behind it; None: go on at the end.
        echo: whether the answer repeats the prompt.
    """

    prompt: str
    suffix: str | None = None
    echo: bool = False


@dataclass(frozen=True)
class Call:
    """A request, whatever the dialect.

    Attributes:
        model: the name as the client gave it (a `[1m]` suffix removed).
        input: a conversation, or a text for `/completions`.
        max_tokens: None: the default of the mode, cut to the context left.
        stop: strings that end the answer; they are looked for in the content alone, never in reasoning or tool calls.
        logprobs: alternatives per token (0 to 20); None: no log-probabilities.
        logit_bias: by token id.
        tool_choice: `none` takes the tools out of the prompt before this is built; `required` and a name force a call.
        tool_name: the one function that must be called, under `tool_choice` "named".
        n: answers wanted.
        user_id: isolates caches and shares capacity fairly between the users of one key.
        wants_usage: of a stream: usage was asked for.
        effort_given: the word the client used for the effort, for dialects that repeat it.
        echo: what else the dialect repeats in its reply, in its own words.
        ignored: names of fields that were given and had no effect; fit for an HTTP header.
    """

    model: str
    input: Conversation | FillIn
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    tool_choice: Literal["none", "auto", "required", "named"] = "auto"
    tool_name: str | None = None
    parallel_tool_calls: bool = True
    n: int = 1
    user_id: str = ""
    stream: bool = False
    wants_usage: bool = False
    effort_given: str | None = None
    echo: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def thinking(self) -> bool:
        """Whether the answer begins with reasoning."""
        return isinstance(self.input, Conversation) and self.input.thinking


# ---- the answer, as it is made --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of the answer and how likely it was, in nats; `top` holds alternatives, likeliest first, as such entries."""

    bytes: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the reasoning. `text` may be empty where only log-probabilities came."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer's text."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ToolBegin:
    """A tool call begins; its arguments follow as `ToolArguments` of the same index."""

    index: int
    id: str
    name: str
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """More of the arguments' JSON text."""

    index: int
    text: str
    choice: int = 0


@dataclass(frozen=True, slots=True)
class ToolEnd:
    """The call's arguments are complete."""

    index: int
    choice: int = 0


FinishReason = Literal["stop", "length", "tool_calls", "insufficient_system_resource"]


@dataclass(frozen=True, slots=True)
class Finish:
    """An answer is complete.

    Attributes:
        stop: the stop string that ended it.
        completion_tokens, reasoning_tokens: tokens of this answer, and how many of them were reasoning.
    """

    reason: FinishReason
    stop: str | None = None
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    choice: int = 0


Event = Reasoning | Content | ToolBegin | ToolArguments | ToolEnd | Finish


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request. `prompt_tokens` counts hits and misses; with several answers the prompt counts once."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def missed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Head:
    """What is known of a reply before its first token.

    Attributes:
        id: of the request, without a dialect's prefix: 32 hexadecimal digits.
        created: seconds since 1970.
        model: name that answers: with `auto` the chosen one.
        fingerprint: of weights and software: a change may change the answers of equal seeds.
        routed: why an `auto` request went where it went, or None.
    """

    id: str
    created: int
    model: str
    prompt_tokens: int
    cached_tokens: int
    fingerprint: str
    routed: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer, collected from its events."""

    message: Message
    finish: Finish
    reasoning_logprobs: tuple[TokenLogprob, ...] = ()
    content_logprobs: tuple[TokenLogprob, ...] = ()


def collect(events: Iterable[Event], n: int = 1) -> list[Answer]:
    """The answers that a finished stream of events makes, in the order of their choices.

    `message.reasoning` is None where no reasoning event came.
    """
    answers = []
    events = list(events)
    for choice in range(n):
        reasoning: list[str] = []
        content: list[str] = []
        logprobs: tuple[list[TokenLogprob], list[TokenLogprob]] = ([], [])
        calls: dict[int, tuple[ToolBegin, list[str]]] = {}
        finish = Finish("stop", choice=choice)
        for event in events:
            if event.choice != choice:
                continue
            match event:
                case Reasoning():
                    reasoning.append(event.text)
                    logprobs[0].extend(event.logprobs)
                case Content():
                    content.append(event.text)
                    logprobs[1].extend(event.logprobs)
                case ToolBegin():
                    calls[event.index] = (event, [])
                case ToolArguments():
                    calls[event.index][1].append(event.text)
                case Finish():
                    finish = event
                case ToolEnd():
                    pass
        message = Message(
            "assistant", "".join(content), "".join(reasoning) if reasoning else None,
            tuple(ToolCall(begin.name, "".join(parts), begin.id) for begin, parts in calls.values()),
        )  # fmt: skip
        answers.append(Answer(message, finish, tuple(logprobs[0]), tuple(logprobs[1])))
    return answers


# ---- what a dialect is ----------------------------------------------------------------------------------------------


class StreamWriter(Protocol):
    """Writes one reply as server-sent events. Every method returns the bytes of whole frames, or nothing."""

    def begin(self) -> bytes:
        """Before the first event."""
        ...

    def event(self, event: Event) -> bytes: ...

    def end(self, usage: Usage) -> bytes:
        """After the last `Finish`."""
        ...

    def error(self, error: ApiError) -> bytes:
        """Something failed after the status had been sent; nothing follows."""
        ...


class Dialect(Protocol):
    """A published API's way to put things.

    Attributes:
        keep_alive: bytes of a stream while its request waits.
    """

    keep_alive: bytes

    def read(self, body: Mapping[str, Any], rules: Rules) -> Call:
        """A parsed JSON body as a call.

        Raises:
            ApiError: the body breaks a rule of the dialect.
        """
        ...

    def whole(self, call: Call, head: Head, answers: list[Answer], usage: Usage) -> dict[str, Any]:
        """The body of a reply that is not streamed."""
        ...

    def stream(self, call: Call, head: Head) -> StreamWriter: ...

    def error(self, error: ApiError) -> dict[str, Any]:
        """The body of a refusal."""
        ...
