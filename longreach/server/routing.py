"""`auto`: which of two models a request goes to, by what the better one is expected to gain and to cost.

    gain  = value · (p_large − p_small)          what a solved request is worth, times the better chance of solving it
    extra = cost_large − cost_small                  at the price table in force, prompt hits of each model counted as hits
    large if gain > extra, else small

`p` comes from a table by kind of request and reasoning mode. The kind is told from the request alone, by rules that can be
read below: tools, code, mathematics, facts, long context, or anything else. The first table is the announced scores of Flash
and Pro; `--auto-table FILE` replaces it by your own. Tokens of the answer are
expected to be as many as the model's last answers of that mode had.

A conversation stays where it is unless the gain says otherwise: the other model would have to read all of it again, and
that stands in its cost.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from longreach.chat.messages import Conversation
from longreach.errors import ConfigError
from longreach.server.call import Call

Kind = Literal["tools", "code", "mathematics", "facts", "long", "other"]
KINDS: tuple[Kind, ...] = ("tools", "code", "mathematics", "facts", "long", "other")
MODES = ("non", "high", "max")

LONG_TOKENS = 100_000
"""Prompt tokens from which a request counts as long."""

_CODE = re.compile(
    r"```|\bdef \w+\(|\bclass \w+[:({]|#include\b|\bfunction\b|\btraceback\b|\bstack trace\b|\brefactor\b|\bcompile|"
    r"\bunit tests?\b|\b(?:python|javascript|typescript|rust|golang|java|c\+\+|sql|bash|regex)\b",
    re.IGNORECASE,
)
_MATHEMATICS = re.compile(
    r"\\(?:frac|sum|int|boxed|sqrt|begin)\b|\b(?:prove|theorem|lemma|integral|derivative|equation|polynomial|modulo|"
    r"probability|triangle|integers?)\b|\d\s*[-+*/^=]\s*\d",
    re.IGNORECASE,
)
_FACTS = re.compile(
    r"^\s*(?:who|when|where|which|what (?:is|was|are|were) the (?:name|date|capital|year))\b", re.IGNORECASE
)


def kind_of(call: Call, prompt_tokens: int) -> Kind:
    """What sort of request this is; the first rule that fits, in the order of `KINDS`, long context first."""
    if prompt_tokens >= LONG_TOKENS:
        return "long"
    if not isinstance(call.input, Conversation):
        return "code"
    if call.input.has_tools and call.tool_choice != "none":
        return "tools"
    asked = next((m.content for m in reversed(call.input.messages) if m.role == "user"), "")[-8000:]
    if _CODE.search(asked):
        return "code"
    if _MATHEMATICS.search(asked):
        return "mathematics"
    return "facts" if _FACTS.search(asked) else "other"


def mode_of(call: Call) -> str:
    """non, high or max: the columns of the table. `low` counts as high."""
    if not call.thinking:
        return "non"
    assert isinstance(call.input, Conversation)
    return "max" if call.input.effort == "max" else "high"


@dataclass(frozen=True)
class Table:
    """Chance of solving a request: `chances[kind][mode] = (small, large)`, each from 0 to 1."""

    chances: Mapping[str, Mapping[str, tuple[float, float]]]
    source: str

    @staticmethod
    def load(path: Path | None = None) -> Table:
        """Read a table: the announced scores, or a file of the same form.

        Raises:
            ConfigError: the file cannot be read or is not such a table.
        """
        where = "the announced scores" if path is None else str(path)
        try:
            text = (
                files("longreach.server").joinpath("routing.json").read_text("utf-8")
                if path is None
                else path.read_text(encoding="utf-8")
            )
            read = json.loads(text)
        except OSError as error:
            raise ConfigError(f"{where} cannot be read: {error.strerror or error}") from None
        except ValueError:
            raise ConfigError(f"{where} is not JSON; see longreach/server/routing.json for the form") from None
        return Table(_checked(read, where), str(read.get("source", where)))


def _checked(read: Any, where: str) -> dict[str, dict[str, tuple[float, float]]]:
    table: dict[str, dict[str, tuple[float, float]]] = {}
    chances = read.get("chances") if isinstance(read, dict) else None
    for kind in KINDS:
        for mode in MODES:
            row = chances.get(kind) if isinstance(chances, dict) else None
            pair = row.get(mode) if isinstance(row, dict) else None
            if not (
                isinstance(pair, list)
                and len(pair) == 2
                and all(isinstance(p, int | float) and not isinstance(p, bool) and 0 <= p <= 1 for p in pair)
            ):
                raise ConfigError(
                    f"{where}: chances.{kind}.{mode} must be two numbers from 0 to 1, of the small and the large model, "
                    f"not {pair!r}"
                )
            table.setdefault(kind, {})[mode] = (float(pair[0]), float(pair[1]))
    return table


@dataclass
class Expected:
    """Output tokens to expect of a model in a mode: a running mean that forgets with every answer an eighth."""

    means: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(lambda: 512.0))

    def learn(self, model: str, mode: str, tokens: float) -> None:
        self.means[model, mode] += (tokens - self.means[model, mode]) / 8


@dataclass(frozen=True)
class Choice:
    """Where a request goes, and why, in numbers."""

    is_large: bool
    kind: Kind
    gain: float
    extra: float
    currency: str = "USD"
    only_fit: bool = False
    """Only this model can hold the prompt and the answer asked for; nothing was weighed."""

    def __str__(self) -> str:
        if self.only_fit:
            return f"{self.kind}: only this one can hold it"
        sign = ">" if self.is_large else "<="
        return f"{self.kind}: gain {self.gain:.6f} {sign} extra cost {self.extra:.6f} {self.currency}"


def only_fit(call: Call, prompt_tokens: int, is_large: bool) -> Choice:
    """The choice where there is none."""
    return Choice(is_large, kind_of(call, prompt_tokens), 0.0, 0.0, only_fit=True)


class Router:
    """The policy.

    Args:
        value: what a solved request is worth to whoever asks, in the currency of the prices.
    """

    def __init__(self, table: Table, value: float = 0.01, currency: str = "USD") -> None:
        self.table, self.value, self.currency, self.expected = table, value, currency, Expected()

    def choose(
        self,
        call: Call,
        prompt_tokens: int,
        hits: tuple[int, int],
        prices: tuple[tuple[Decimal, Decimal, Decimal], tuple[Decimal, Decimal, Decimal]],
        names: tuple[str, str],
    ) -> Choice:
        """Decide for one request.

        Args:
            hits: prompt tokens that the small and the large model would find in their caches.
            prices: per million tokens of hit, miss and output, of the small and the large model.
            names: of the two, for the expected length of the answer.
        """
        kind, mode = kind_of(call, prompt_tokens), mode_of(call)
        small, large = self.table.chances[kind][mode]
        costs = [
            self._cost(prompt_tokens, hit, price, min(self.expected.means[name, mode], call.max_tokens or float("inf")))
            for hit, price, name in zip(hits, prices, names, strict=True)
        ]
        gain, extra = self.value * (large - small), costs[1] - costs[0]
        return Choice(gain > extra, kind, gain, extra, self.currency)

    def learn(self, name: str, call: Call, tokens: float) -> None:
        """Take note of how long an answer became."""
        self.expected.learn(name, mode_of(call), tokens)

    @staticmethod
    def _cost(prompt: int, hit: int, price: tuple[Decimal, Decimal, Decimal], output: float) -> float:
        return (hit * float(price[0]) + (prompt - hit) * float(price[1]) + output * float(price[2])) / 1e6
