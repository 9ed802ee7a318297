"""What tokens cost: dated price tables as data, and exact arithmetic on them. No float anywhere.

    cost = hit tokens * hit price + miss tokens * miss price + output tokens * output price

    table = find_table("hosted")                     or the path of a table of your own, TOML or JSON
    price = table.price_of("deepseek-v4-pro", when)  per million tokens, at that moment
    cost(usage, price)                               Decimal, exact

A price has at most six decimals per million tokens, so one token costs a whole number of pico-units (1e-12) of the
currency. The ledger counts in those integers; people see decimals.

A table of your own:

    currency = "USD"
    source = "electricity, measured in October"
    [prices.small]
    hit = "0.0005"
    miss = "0.01"
    output = "0.04"

With `[[periods]]`, each with `from`, `until` and `prices`, it is dated; `prices.json` beside this module is the example.
"""

from __future__ import annotations

import json
import re
import tomllib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Decimal, InvalidOperation
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from longreach.errors import RequestError
from longreach.server.call import Usage

PICO_DIGITS = 12
"""Amounts are integers of 1e-12 of the currency."""

_PRICE_DIGITS = 6
# With these two the cost of a request and all top-ups of a key fit 64-bit integers.
_MAX_PRICE = Decimal(100_000)
_MAX_AMOUNT = Decimal(1_000_000)
_WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_FIRST, _LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


# ---- amounts --------------------------------------------------------------------------------------------------------


def to_pico(amount: Decimal) -> int:
    """An amount of money as the ledger counts it.

    Raises:
        RequestError: more than 12 decimals.
    """
    pico = amount.scaleb(PICO_DIGITS)
    if pico != pico.to_integral_value():
        raise RequestError(f"amount {amount} has more than {PICO_DIGITS} decimals; round it")
    return int(pico)


def from_pico(pico: int) -> Decimal:
    """What an integer of the ledger is worth, exactly."""
    return Decimal(pico).scaleb(-PICO_DIGITS)


def parse_amount(text: str, what: str) -> int:
    """An amount a person typed, in pico-units.

    Raises:
        RequestError: not a number, negative, above one million, or with more than 12 decimals.
    """
    amount = _decimal(text)
    if amount is None or not 0 <= amount <= _MAX_AMOUNT:
        raise RequestError(f"{what} {text!r} is no amount of money; give a number from 0 to {_MAX_AMOUNT:,}, like 5.00")
    return to_pico(amount)


def exact_text(amount: Decimal) -> str:
    """The shortest decimal text of exactly this value, with at least two decimals: `0.003625`, `5.00`."""
    text = f"{amount:f}"
    whole, _, decimals = text.partition(".")
    return f"{whole}.{decimals.rstrip('0').ljust(2, '0')}"


# ---- prices ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Price:
    """Of a million tokens.

    Attributes:
        hit, miss: prompt tokens that the cache held, and those that it did not.
        output: tokens of the answer, reasoning included.
        currency: three letters.
        per_token: the same three in pico-units per token, integers.

    Raises:
        RequestError: a value is negative, not a number, above 100,000 or has more than six decimals.
    """

    hit: Decimal
    miss: Decimal
    output: Decimal
    currency: str = "USD"
    per_token: tuple[int, int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("hit", "miss", "output"):
            value: Decimal = getattr(self, name)
            if not value.is_finite() or not 0 <= value <= _MAX_PRICE or value != round(value, _PRICE_DIGITS):
                raise RequestError(
                    f"{name} price {value} is not allowed; prices per million tokens lie between 0 and {_MAX_PRICE:,} "
                    f"and have at most {_PRICE_DIGITS} decimals"
                )
        # Micro-units per million tokens are pico-units per token.
        values = (int(value.scaleb(_PRICE_DIGITS)) for value in (self.hit, self.miss, self.output))
        object.__setattr__(self, "per_token", tuple(values))


def cost_pico(usage: Usage, price: Price) -> int:
    """What a request costs, in pico-units. Reasoning tokens are among the completion tokens and not counted again."""
    hit, miss, output = price.per_token
    return usage.cached_tokens * hit + usage.missed_tokens * miss + usage.completion_tokens * output


def cost(usage: Usage, price: Price) -> Decimal:
    """What a request costs, in the currency of the price."""
    return from_pico(cost_pico(usage, price))


# ---- tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """When the peak prices of a period hold.

    Attributes:
        weekdays: Monday is 0.
        hours_utc: half open: (1, 4) is from 01:00 until before 04:00 UTC.
        holidays: days without peak hours, by their UTC date.
    """

    prices: Mapping[str, Price]
    hours_utc: tuple[tuple[int, int], ...]
    weekdays: frozenset[int]
    holidays: frozenset[date] = frozenset()

    def covers(self, when: datetime) -> bool:
        """Whether `when`, in UTC, is peak time."""
        if when.weekday() not in self.weekdays or when.date() in self.holidays:
            return False
        return any(first <= when.hour < last for first, last in self.hours_utc)


@dataclass(frozen=True)
class Period:
    """Prices from one moment until before another, by model."""

    name: str
    prices: Mapping[str, Price]
    source: str = ""
    start: datetime = _FIRST
    end: datetime = _LAST
    peak: Peak | None = None


@dataclass(frozen=True)
class PriceTable:
    """Prices over time.

    Attributes:
        periods: in order, without overlap; between them and outside there is no price.
        aliases: other names of models.
    """

    name: str
    currency: str
    periods: tuple[Period, ...]
    title: str = ""
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """Names that have a price at some time, aliases not among them."""
        return sorted({model for period in self.periods for model in period.prices})

    @property
    def step_minutes(self) -> int:
        """Prices change only at whole multiples of so many minutes of an hour: 60, 15 or 1."""
        changes = [when.minute for period in self.periods for when in (period.start, period.end) if when != _LAST]
        return next(step for step in (60, 15, 1) if all(minute % step == 0 for minute in changes))

    def price_of(self, model: str, when: datetime) -> Price | None:
        """The price of a model at a moment; None where the table has none.

        Args:
            when: with its time zone.
        """
        assert when.tzinfo is not None, "a moment without its time zone has no price"
        when = when.astimezone(UTC)
        at = bisect_right(self.periods, when, key=lambda period: period.start) - 1
        if at < 0 or when >= self.periods[at].end:
            return None
        period = self.periods[at]
        model = self.aliases.get(model, model)
        if period.peak is not None and model in period.peak.prices and period.peak.covers(when):
            return period.peak.prices[model]
        return period.prices.get(model)

    def always(self, period: Period) -> PriceTable:
        """A table in which one period of this one holds at all times; its peak hours stay."""
        endless = Period(period.name, period.prices, period.source, peak=period.peak)
        return PriceTable(period.name, self.currency, (endless,), period.source, self.aliases)


@cache
def builtin_tables() -> dict[str, PriceTable]:
    """The tables that come with this package: the dated ones, and each of their periods as if it held at all times."""
    path = Path(__file__).with_name("prices.json")
    tables: dict[str, PriceTable] = {}
    for name, content in json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal).items():
        tables[name] = dated = _read_table(name, content, path.name)
        tables |= {period.name: dated.always(period) for period in dated.periods}
    return tables


def find_table(name: str) -> PriceTable:
    """A table by its name, or one of your own by the path of its file (`.toml` or `.json`).

    Raises:
        RequestError: neither, or the file breaks a rule of the format.
    """
    if name in builtin_tables():
        return builtin_tables()[name]
    path = Path(name)
    if path.suffix not in (".toml", ".json"):
        known = ", ".join(builtin_tables())
        raise RequestError(f"no price table {name!r}; give one of {known}, or the path of a .toml or .json file")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            content = tomllib.loads(text, parse_float=Decimal)
        else:
            content = json.loads(text, parse_float=Decimal)
    except OSError as error:
        raise RequestError(f"price table {name} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # malformed TOML, JSON or UTF-8 are all ValueErrors
        raise RequestError(f"price table {name} is not valid {path.suffix[1:].upper()}: {error}") from None
    return _read_table(path.stem, content, name)


# ---- reading a file -------------------------------------------------------------------------------------------------

_TABLE_KEYS = {"title", "source", "currency", "aliases", "periods", "prices", "peak"}
_PERIOD_KEYS = {"name", "from", "until", "source", "prices", "peak"}
_PEAK_KEYS = {"weekdays", "hours_utc", "holidays", "prices"}


class _Bad(Exception):
    """What is wrong with a table, without the name of its file."""


def _read_table(name: str, content: Any, where: str) -> PriceTable:
    try:
        content = _object(content, "the table", _TABLE_KEYS)
        currency = content.get("currency", "USD")
        if not isinstance(currency, str) or not re.fullmatch("[A-Z]{3}", currency):
            raise _Bad(f"currency {currency!r} is not three capital letters, like USD")
        aliases = _object(content.get("aliases", {}), "aliases")
        if not all(isinstance(model, str) for model in aliases.values()):
            raise _Bad("aliases map names to names")
        if "periods" in content:
            for key in ("prices", "peak"):
                if key in content:
                    raise _Bad(f"{key} stands beside periods; move it into a period")
            entries = content["periods"]
            if not isinstance(entries, list) or not entries:
                raise _Bad("periods is not a list of at least one period")
            periods = [_read_period(entry, currency, f"{name}-{number}") for number, entry in enumerate(entries, 1)]
        else:
            whole = {key: content[key] for key in ("prices", "peak", "source") if key in content}
            periods = [_read_period(whole, currency, name)]
        periods.sort(key=lambda period: period.start)
        for before, after in pairwise(periods):
            if before.end > after.start:
                raise _Bad(f"periods {before.name!r} and {after.name!r} overlap; end one where the next begins")
        title = str(content.get("title") or content.get("source") or "")
        return PriceTable(name, currency, tuple(periods), title, aliases)
    except (_Bad, RequestError) as error:
        raise RequestError(f"price table {where}: {error}") from None


def _read_period(content: Any, currency: str, name: str) -> Period:
    content = _object(content, "a period", _PERIOD_KEYS)
    name = str(content.get("name", name))
    start = _moment(content["from"], f"from of {name!r}") if "from" in content else _FIRST
    end = _moment(content["until"], f"until of {name!r}") if "until" in content else _LAST
    if start >= end:
        raise _Bad(f"period {name!r} ends before it begins")
    if "prices" not in content:
        raise _Bad(f"period {name!r} has no prices; give hit, miss and output of each model")
    prices = _read_prices(content["prices"], currency, name)
    peak = None
    if "peak" in content:
        entry = _object(content["peak"], f"peak of {name!r}", _PEAK_KEYS)
        missing = {"prices", "hours_utc"} - set(entry)
        if missing:
            raise _Bad(f"peak of {name!r} lacks {' and '.join(sorted(missing))}")
        peak = Peak(
            _read_prices(entry["prices"], currency, f"{name}, peak"),
            _hours(entry["hours_utc"], name),
            _weekdays(entry.get("weekdays", list(_WEEKDAYS)), name),
            frozenset(_moment(day, f"a holiday of {name!r}").date() for day in _list(entry.get("holidays", []), name)),
        )
        unknown = set(peak.prices) - set(prices)
        if unknown:
            raise _Bad(f"peak of {name!r} prices {sorted(unknown)[0]!r}, which has no price outside the peak")
    return Period(name, prices, str(content.get("source", "")), start, end, peak)


def _read_prices(content: Any, currency: str, where: str) -> dict[str, Price]:
    content = _object(content, f"prices of {where!r}")
    if not content:
        raise _Bad(f"prices of {where!r} is empty; give hit, miss and output of at least one model")
    prices = {}
    for model, entry in content.items():
        entry = _object(entry, f"the price of {model!r}", {"hit", "miss", "output"})
        values = {}
        for name in ("hit", "miss", "output"):
            if name not in entry:
                raise _Bad(f"{name} price of {model!r} is missing")
            value = _decimal(entry[name])
            if value is None:
                raise _Bad(f'{name} price of {model!r} is {entry[name]!r}; give a decimal number, like "0.15"')
            values[name] = value
        try:
            prices[model] = Price(**values, currency=currency)
        except RequestError as error:
            raise _Bad(f"{model!r}: {error}") from None
    return prices


def _object(content: Any, what: str, allowed: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise _Bad(f"{what} is {type(content).__name__}, not a table of names and values")
    unknown = set(content) - allowed if allowed is not None else set()
    if unknown:
        raise _Bad(
            f"{what} has an unknown entry {sorted(unknown)[0]!r}; allowed are {', '.join(sorted(allowed or ()))}"
        )
    return content


def _list(content: Any, where: str) -> list[Any]:
    if not isinstance(content, list):
        raise _Bad(f"{where!r}: {content!r} is not a list")
    return content


def _hours(content: Any, where: str) -> tuple[tuple[int, int], ...]:
    spans = []
    for span in _list(content, where):
        if not isinstance(span, list) or len(span) != 2 or not all(type(hour) is int for hour in span):
            raise _Bad(f"hours_utc of {where!r} has {span!r}; give pairs of whole hours, like [1, 4]")
        if not 0 <= span[0] < span[1] <= 24:
            raise _Bad(f"hours_utc of {where!r} has {span!r}; hours run from 0 to 24 and a span ends after it begins")
        spans.append((span[0], span[1]))
    return tuple(spans)


def _weekdays(content: Any, where: str) -> frozenset[int]:
    for day in _list(content, where):
        if day not in _WEEKDAYS:
            raise _Bad(f"weekdays of {where!r} has {day!r}; allowed are {', '.join(_WEEKDAYS)}")
    return frozenset(map(_WEEKDAYS.index, content))


def _moment(value: Any, what: str) -> datetime:
    """A date or a moment as TOML or JSON give it, in UTC. Reports group by minute, so a moment is on a whole one."""
    if isinstance(value, str):
        try:
            when = parse_moment(value)
        except RequestError as error:
            raise _Bad(f"{what}: {error}") from None
    elif isinstance(value, datetime):
        if value.tzinfo is None:
            raise _Bad(f"{what} {value.isoformat()} has no time zone; add Z for UTC")
        when = value.astimezone(UTC)
    elif isinstance(value, date):
        when = datetime.combine(value, time(), UTC)
    else:
        raise _Bad(f"{what} is {value!r}; give a date like 2026-08-16 or a moment like 2026-08-16T16:00Z")
    if when.second or when.microsecond:
        raise _Bad(f"{what} {value} is not on a whole minute")
    return when


def parse_moment(text: str) -> datetime:
    """A date (its midnight, UTC) or a moment with its time zone, as UTC.

    Raises:
        RequestError: neither.
    """
    try:
        when = datetime.fromisoformat(text)
        if when.tzinfo is None and len(text) > len("2026-08-16"):
            raise RequestError(f"{text!r} has no time zone; add Z for UTC")
        # astimezone can leave the years 1 to 9999
        return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"{text!r} is no date; give one like 2026-08-16, or a moment like 2026-08-16T16:00Z"
        ) from None


def _decimal(value: Any) -> Decimal | None:
    """A finite number, read from text or as the file gave it; None for anything else. Floats never get here."""
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        return None
    try:
        number = Decimal(value)
    except (InvalidOperation, ValueError):
        return None
    return number if number.is_finite() else None
