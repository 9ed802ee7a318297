"""`longreach usage`: what was used and what it cost, and what the same traffic would have cost elsewhere.

    longreach usage                                          the ledger of ~/.longreach/server, by day and model
    longreach usage --by key --since 2026-11-01 --json       for a program
    longreach usage --what-if hosted launch                  every request at a table's price of its own time
    longreach usage --what-if hosted --at 2026-05-20         all of them at the prices of one day
    longreach usage --what-if hosted --priced-as small=deepseek-v4-flash

Days are UTC. Tokens of every request count, also of those that were not billed; what-if prices are put on the billed ones,
so that they compare with what was billed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from longreach.errors import RequestError
from longreach.runtime import json_line
from longreach.server.call import Usage
from longreach.server.database import KEYS, REQUESTS, Database, open_database
from longreach.server.ledger import BILLED
from longreach.server.prices import PriceTable, cost_pico, exact_text, find_table, from_pico, parse_moment

GROUPS = ("day", "key", "model", "user")

_MINUTE_MS = 60_000
_PIPE_WIDTH = 10_000


@dataclass(frozen=True)
class UsageOptions:
    """Say what was used and what it cost, by key, model, day or user."""

    server: Path | None = None
    """The server's directory; ~/.longreach/server if not given."""
    database: str | None = None
    """URL of the ledger, if it is not in that directory: postgresql://user@host/name."""
    by: str = "day,model"
    """How to group, comma-separated: day, key, model (the one that answered), user."""
    since: str | None = None
    """First day, or moment: 2026-11-01, 2026-11-01T08:00Z."""
    until: str | None = None
    """Day or moment to stop before."""
    what_if: tuple[str, ...] = ()
    """Price tables to put on the same requests: hosted, hosted-cny, launch, april-cut, discount, current, current-cny, or
    files of your own."""
    at: str | None = None
    """The moment whose what-if prices hold for every request; otherwise the request's own time."""
    priced_as: tuple[str, ...] = ()
    """Which model of the tables one of yours stands for: small=deepseek-v4-flash."""
    json: bool = False
    """Print one JSON object; amounts are decimal texts, exact."""


def main(options: UsageOptions) -> None:
    """Print the report."""
    groups = [name.strip() for name in options.by.split(",") if name.strip()]
    tables = [find_table(name) for name in options.what_if]
    priced_as = _mapping(options.priced_as)
    since, until, at = (
        None if text is None else parse_moment(text) for text in (options.since, options.until, options.at)
    )
    if at is not None and not tables:
        raise RequestError("--at says when what-if prices hold; give --what-if TABLE too")
    with open_database(options.server, options.database, create=False) as database:
        found = report(database, groups, since=since, until=until, what_if=tables, at=at, priced_as=priced_as)
    if options.json:
        print(json_line(found.to_json()))
    elif not found.lines:
        print(f"no requests{_span(since, until)} in {database.where}")
    else:
        _print_table(found)


# ---- counting -------------------------------------------------------------------------------------------------------


@dataclass
class WhatIf:
    """A table's prices on the requests of a line, in pico-units.

    Attributes:
        cost: of the priced requests. saved: what their cached tokens would have cost more as misses.
        unpriced: billed requests for which the table has no price.
    """

    table: str
    currency: str
    cost: int = 0
    saved: int = 0
    unpriced: int = 0


@dataclass
class Line:
    """The sum over some requests.

    Attributes:
        group: value of each grouping, in their order. statuses: requests by status.
        amount: what was billed. saved: what cached tokens would have cost more as misses. Both in pico-units.
    """

    group: tuple[str, ...]
    statuses: dict[str, int] = field(default_factory=dict)
    hit_tokens: int = 0
    miss_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    amount: int = 0
    saved: int = 0
    what_if: list[WhatIf] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return sum(self.statuses.values())

    @property
    def prompt_tokens(self) -> int:
        return self.hit_tokens + self.miss_tokens


@dataclass
class Report:
    """What `report` found: a line per group, and their total."""

    groups: tuple[str, ...]
    currency: str
    lines: list[Line]
    total: Line

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        lines = [_line_json(line, self.groups) for line in self.lines]
        return {"currency": self.currency, "by": list(self.groups), "lines": lines, "total": _line_json(self.total, ())}


def report(
    database: Database,
    groups: Sequence[str] = ("day", "model"),
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    what_if: Sequence[PriceTable] = (),
    at: datetime | None = None,
    priced_as: Mapping[str, str] | None = None,
) -> Report:
    """Sum the ledger.

    Args:
        groups: of `GROUPS`, in the order of the columns.
        since, until: of the requests' starts, half open.
        at: the moment whose prices what-if takes; None: each request's own.
        priced_as: the tables' model for a model of ours.

    Raises:
        RequestError: an unknown group. LedgerError: the database refuses.
    """
    for name in groups:
        if name not in GROUPS:
            raise RequestError(f"--by {name!r} is unknown; allowed are {', '.join(GROUPS)}")
    if not groups or len(set(groups)) < len(groups):
        raise RequestError(f"--by needs different names out of {', '.join(GROUPS)}, comma-separated")

    r = REQUESTS.c
    columns = {"day": r.day, "key": r.key_id, "model": r.answered_by, "user": r.user_id}
    labels = [columns[name] for name in groups]
    # Requests between two moments at which a price can change are priced together.
    step_ms = min((table.step_minutes for table in what_if), default=60) * _MINUTE_MS
    moment = r.started_ms - r.started_ms % step_ms if what_if and at is None else sa.literal_column("0")
    by = [*labels, r.status, r.answered_by, moment.label("moment"), r.price_hit, r.price_miss, r.model.label("asked")]
    tokens = (r.hit_tokens, r.miss_tokens, r.completion_tokens, r.reasoning_tokens)
    query = sa.select(*by, sa.func.count(), *map(sa.func.sum, (*tokens, r.amount))).where(r.status != "running")
    if since is not None:
        query = query.where(r.started_ms >= _ms(since))
    if until is not None:
        query = query.where(r.started_ms < _ms(until))

    stands_for: dict[str, str] = dict(priced_as or {})
    grouping = [*labels, r.status, r.answered_by, "moment", r.price_hit, r.price_miss, r.model]
    lines: dict[tuple[str, ...], Line] = {}
    total = _new_line((), what_if)
    with database.read() as connection:
        names = _key_names(connection)
        for row in connection.execute(query.group_by(*grouping)):
            values = list(row)
            group = tuple(
                names.get(value, "(no key)") if name == "key" else str(value)
                for name, value in zip(groups, values, strict=False)
            )
            status, model, moment_ms, price_hit, price_miss, asked, count = values[len(groups) : len(groups) + 7]
            hit, miss, completion, reasoning, amount = map(int, values[len(groups) + 7 :])
            usage = Usage(hit + miss, hit, completion, reasoning)
            is_billed = status in BILLED
            if group not in lines:
                lines[group] = _new_line(group, what_if)
            for line in (lines[group], total):
                line.statuses[status] = line.statuses.get(status, 0) + count
                line.hit_tokens += hit
                line.miss_tokens += miss
                line.completion_tokens += completion
                line.reasoning_tokens += reasoning
                line.amount += amount
                if is_billed:
                    line.saved += hit * (price_miss - price_hit)
                    when = at or datetime.fromtimestamp(moment_ms / 1000, UTC)
                    for table, found in zip(what_if, line.what_if, strict=True):
                        _add_priced(
                            found, table, (stands_for.get(str(model), str(model)), str(asked)), when, usage, count
                        )
    return Report(tuple(groups), database.currency, [lines[group] for group in sorted(lines)], total)


def _add_priced(
    found: WhatIf, table: PriceTable, names: Sequence[str], when: datetime, usage: Usage, count: int
) -> None:
    """Add what some requests cost under the first of these names that the table has."""
    price = next((price for name in names if (price := table.price_of(name, when)) is not None), None)
    if price is None:
        found.unpriced += count
        return
    hit, miss, _ = price.per_token
    found.cost += cost_pico(usage, price)
    found.saved += usage.cached_tokens * (miss - hit)


def _new_line(group: tuple[str, ...], tables: Sequence[PriceTable]) -> Line:
    return Line(group, what_if=[WhatIf(table.name, table.currency) for table in tables])


def _key_names(connection: sa.Connection) -> dict[int, str]:
    """A name for every key; where one was given twice, with its number."""
    rows = connection.execute(sa.select(KEYS.c.id, KEYS.c.name)).all()
    names = [row.name for row in rows]
    return {row.id: row.name if names.count(row.name) == 1 else f"{row.name} #{row.id}" for row in rows}


def _ms(when: datetime) -> int:
    return int(when.timestamp() * 1000)


def _mapping(pairs: Sequence[str]) -> dict[str, str]:
    mapping = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise RequestError(f"--priced-as {pair!r} is not OURS=THEIRS, like small=deepseek-v4-flash")
        mapping[ours] = theirs
    return mapping


# ---- showing --------------------------------------------------------------------------------------------------------


def _line_json(line: Line, groups: Sequence[str]) -> dict[str, Any]:
    return {
        **dict(zip(groups, line.group, strict=True)),
        "requests": line.requests,
        "statuses": line.statuses,
        "prompt_tokens": line.prompt_tokens,
        "prompt_cache_hit_tokens": line.hit_tokens,
        "prompt_cache_miss_tokens": line.miss_tokens,
        "completion_tokens": line.completion_tokens,
        "reasoning_tokens": line.reasoning_tokens,
        "amount": exact_text(from_pico(line.amount)),
        "saved_by_cache": exact_text(from_pico(line.saved)),
        "what_if": [
            {
                "table": found.table,
                "currency": found.currency,
                "cost": exact_text(from_pico(found.cost)),
                "saved_by_cache": exact_text(from_pico(found.saved)),
                "requests_without_price": found.unpriced,
            }
            for found in line.what_if
        ],
    }


def _print_table(found: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_footer=len(found.lines) > 1, header_style="bold")
    total = found.total
    shown = [_cells(line) for line in found.lines]
    footer = _cells(total)
    for number, name in enumerate(found.groups):
        table.add_column(name, footer="all" if number == 0 else "")
    heads = ["requests", "prompt", "hit", "output", "reasoning", found.currency, "cache saved"]
    for what_if in total.what_if:
        heads += [f"{what_if.table} ({what_if.currency})", "cache saved"]
    for head, foot in zip(heads, footer, strict=True):
        table.add_column(head, footer=foot, justify="right")
    for line, cells in zip(found.lines, shown, strict=True):
        # Text: a user's own label is shown as it is and never read as markup.
        table.add_row(*map(Text, line.group), *cells)
    # In a pipe nothing wraps: a line of the table stays a line of the text.
    console = Console()
    (console if console.is_terminal else Console(width=_PIPE_WIDTH)).print(table)
    others = {status: count for status, count in total.statuses.items() if status != "completed"}
    if others:
        print("of these requests " + ", ".join(f"{count:,} {status}" for status, count in sorted(others.items())))
    for what_if in total.what_if:
        if what_if.unpriced:
            print(
                f"{what_if.table} has no price for {what_if.unpriced:,} of them and leaves them out; "
                "--priced-as OURS=THEIRS names the model a request stands for"
            )


def _cells(line: Line) -> list[str]:
    hit_share = f"{line.hit_tokens / line.prompt_tokens:.1%}" if line.prompt_tokens else "-"
    cells = [
        f"{line.requests:,}", f"{line.prompt_tokens:,}", hit_share, f"{line.completion_tokens:,}",
        f"{line.reasoning_tokens:,}", _money(line.amount), _money(line.saved),
    ]  # fmt: skip
    for what_if in line.what_if:
        cells += [_money(what_if.cost), _money(what_if.saved)]
    return cells


def _money(pico: int) -> str:
    """To six decimals, rounded; --json is exact."""
    return f"{from_pico(pico):,.6f}"


def _span(since: datetime | None, until: datetime | None) -> str:
    parts = [
        f" {word} {when:%Y-%m-%d %H:%M} UTC" for word, when in (("since", since), ("before", until)) if when is not None
    ]
    return "".join(parts)
