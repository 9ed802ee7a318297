"""How a request wants its tokens chosen, and why it ended. No torch: a server checks a request before any model is near.

    SamplingParams(temperature=0.7, top_p=0.9, stop="\\n\\n").check(vocab_size=4096)

Names and ranges are those of the OpenAI API and of vLLM, so that what a client already sends means here what it means
there. What each option does to the logits, and in which order, is written in `longreach.engine.sampler`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from longreach.errors import RequestError

if TYPE_CHECKING:
    from longreach.engine.grammar import Grammar

MOST_LOGPROBS = 20
"""Alternatives per token that may be asked for, as in the OpenAI API."""


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    """The model ended the text, or a stop string or stop token came."""
    LENGTH = "length"
    """`max_tokens`, or the context, was used up."""
    CANCELLED = "cancelled"
    """Whoever asked no longer wants it."""
    DEADLINE = "deadline"
    """Its time was over."""
    ERROR = "error"
    """It could not be served; the request's error says why."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of one request. Nothing is checked before `check`."""

    max_tokens: int = 256
    """Generate at most this many tokens."""
    temperature: float = 1.0
    """0 always takes the likeliest token; 1 draws as the model believes; higher is wilder."""
    top_k: int = 0
    """Draw among this many likeliest tokens; 0 or -1 leaves none out."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability; 1 leaves none out."""
    min_p: float = 0.0
    """Leave out tokens with less than this fraction of the likeliest one's probability; 0 leaves none out."""
    repetition_penalty: float = 1.0
    """Divide positive logits, and multiply negative ones, of all tokens of prompt and output; 1 changes nothing."""
    frequency_penalty: float = 0.0
    """Subtract this from a token's logit for each time it is in the output."""
    presence_penalty: float = 0.0
    """Subtract this once from the logit of every token in the output."""
    seed: int | None = None
    """The same seed gives the same text; None lets the engine choose one."""
    logprobs: int | None = None
    """Report log-probabilities: of each token (0), and of this many likeliest alternatives. None reports nothing."""
    stop: tuple[str, ...] = ()
    """End the text before any of these strings. A single string or a list is accepted too."""
    stop_token_ids: tuple[int, ...] = ()
    """End the text at any of these tokens. A list is accepted too."""
    include_stop: bool = False
    """Keep the stop string in the text. The text of a stop token is never kept."""
    ignore_eos: bool = False
    """Go on after the model's end mark, as if it were an ordinary token."""
    min_tokens: int = 0
    """Generate at least this many tokens before the end mark, a stop token or a stop string may end the text."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Add to the logit of a token: -100 all but forbids it, 100 all but forces it."""
    grammar: Grammar | None = None
    """Only texts this grammar allows; made by `longreach.engine.grammar.compile_grammar`. The text is always complete within
    `max_tokens` and the context; a request that leaves too few tokens for the shortest one is refused."""
    after: int | None = None
    """A token, such as the end of thinking, before which neither the grammar nor a penalty acts. With a grammar this token
    comes in time for the text behind it, and the end mark not before it. Penalties count no output before it, nor itself."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))

    def check(self, vocab_size: int) -> None:
        """Refuse the first value that makes no sense, before anything is computed for it.

        Args:
            vocab_size: ids below this are tokens of the model.

        Raises:
            RequestError: one line with the value, what is allowed and what to do.
        """
        _whole("max_tokens", self.max_tokens, 1, fix="ask for at least one token")
        _number("temperature", self.temperature, 0, fix="0 always takes the likeliest token")
        _whole("top_k", self.top_k, -1, fix="0 leaves no token out")
        _number("top_p", self.top_p, 0, 1, above_lo=True, fix="1 leaves no token out")
        _number("min_p", self.min_p, 0, 1, fix="0 leaves no token out")
        _number("repetition_penalty", self.repetition_penalty, 0, above_lo=True, fix="1 changes nothing")
        _number("frequency_penalty", self.frequency_penalty, -2, 2, fix="0 changes nothing")
        _number("presence_penalty", self.presence_penalty, -2, 2, fix="0 changes nothing")
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**63 - 1, fix="leave it out to have one chosen")
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MOST_LOGPROBS, fix="leave it out to have none reported")
        _strings("stop", self.stop)
        if not isinstance(self.stop_token_ids, tuple):
            raise RequestError(f"stop_token_ids must be a list of token ids, not {self.stop_token_ids!r}")
        for token_id in self.stop_token_ids:
            _token("stop_token_ids", token_id, vocab_size)
        _flag("include_stop", self.include_stop)
        _flag("ignore_eos", self.ignore_eos)
        _whole("min_tokens", self.min_tokens, 0, fix="0 lets the text end at once")
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}; lower one or raise the other"
            )
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias must map token ids to numbers, not {self.logit_bias!r}")
        for token_id, bias in self.logit_bias.items():
            _token("logit_bias", token_id, vocab_size)
            _number(f"logit_bias of token {token_id}", bias, -100, 100, fix="0 changes nothing")
        if self.after is not None:
            _token("after", self.after, vocab_size)
            if self.after in self.stop_token_ids:
                raise RequestError(
                    f"after names token {self.after}, which is a stop token; take it from stop_token_ids"
                )
        if self.grammar is not None:
            if not hasattr(self.grammar, "start"):
                raise RequestError(
                    f"grammar must be made by compile_grammar, not {self.grammar!r}; give it the regex or schema"
                )
            if self.grammar.vocab_size != vocab_size:
                raise RequestError(
                    f"the grammar was compiled for {self.grammar.vocab_size} tokens, this model has {vocab_size}; "
                    "compile it with the tokenizer of this model"
                )

    @property
    def needs_history(self) -> bool:
        """Whether drawing a token looks at those before it, so that the engine must keep a `TokenCounts`."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0


def without_penalties(params: SamplingParams) -> SamplingParams:
    """The same, drawn from without a look at the tokens before."""
    return replace(params, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0)


# ---- checks: the value, what is allowed, what to do ------------------------------------------------------------------


def _allowed(lo: float, hi: float, above_lo: bool) -> str:
    lower = f"above {lo:g}" if above_lo else f"{lo:g} or more"
    if hi == math.inf:
        return lower
    return f"above {lo:g} and at most {hi:g}" if above_lo else f"from {lo:g} to {hi:g}"


def _number(name: str, value: object, lo: float, hi: float = math.inf, *, above_lo: bool = False, fix: str) -> None:
    """A finite number of [lo, hi], or of (lo, hi] with `above_lo`."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestError(f"{name} must be a number, {_allowed(lo, hi, above_lo)}, not {value!r}; {fix}")
    # NaN is in no range; the largest float shuts out infinity, and integers that no float can hold.
    if not lo <= value <= min(hi, sys.float_info.max) or (above_lo and value == lo):
        raise RequestError(f"{name} {value} must be {_allowed(lo, hi, above_lo)}; {fix}")


def _whole(name: str, value: object, lo: int, hi: int | None = None, *, fix: str) -> None:
    """An integer of [lo, hi]."""
    allowed = f"{lo} or more" if hi is None else f"from {lo} to {hi}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} must be a whole number, {allowed}, not {value!r}; {fix}")
    if value < lo or (hi is not None and value > hi):
        raise RequestError(f"{name} {value} must be {allowed}; {fix}")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, not {value!r}")


def _strings(name: str, value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
        raise RequestError(f"{name} must be a string or a list of strings, not {value!r}")
    if "" in value:
        raise RequestError(f"{name} has an empty string, which every text begins with; leave it out")


def _token(name: str, value: object, vocab_size: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} must name tokens by their whole-number ids, not {value!r}")
    if not 0 <= value < vocab_size:
        raise RequestError(
            f"{name} names token {value}, which is outside the vocabulary of {vocab_size}; use ids from 0 to "
            f"{vocab_size - 1}"
        )
