"""`longreach keys`: who may use a server.

    longreach keys add laptop --concurrency 4 --budget-month 20     prints the secret, once
    longreach keys list
    longreach keys topup laptop 5.00
    longreach keys revoke laptop

A running server notices within about a second. Amounts are in the ledger's currency, USD unless the first command that
made it said otherwise.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from longreach.runtime import json_line
from longreach.server.database import Database, open_database
from longreach.server.keys import Key, KeyStore
from longreach.server.ledger import balance_of
from longreach.server.prices import exact_text, from_pico, parse_amount

_PIPE_WIDTH = 10_000


@dataclass(frozen=True)
class _Where:
    server: Path | None = None
    """The server's directory; ~/.longreach/server if not given."""
    database: str | None = None
    """URL of the ledger, if it is not in that directory: postgresql://user@host/name."""

    def open(self, create: bool = False, currency: str | None = None) -> Database:
        return open_database(self.server, self.database, create=create, currency=currency)


@dataclass(frozen=True, kw_only=True)
class AddOptions(_Where):
    """Make a key and print its secret, which is kept nowhere."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """What to call it, in lists and reports."""
    concurrency: int | None = None
    """Requests that may run at a time; no limit if not given."""
    tokens_per_minute: int | None = None
    """Tokens of prompts and answers; no limit if not given."""
    budget_day: str | None = None
    """What may be spent in a day (UTC)."""
    budget_month: str | None = None
    """What may be spent in a calendar month (UTC)."""
    balance: str | None = None
    """What may be spent in all, until `longreach keys topup`; no limit if not given."""
    models: tuple[str, ...] = ()
    """Names that may be asked for; all if not given."""
    currency: str | None = None
    """Of the ledger's amounts, if this command is the first to use it: USD, CNY."""


@dataclass(frozen=True)
class ListOptions(_Where):
    """Show the keys, without their secrets."""

    all: bool = False
    """Revoked ones too."""
    json: bool = False
    """Print one JSON object instead of the table."""


@dataclass(frozen=True, kw_only=True)
class RevokeOptions(_Where):
    """End a key for good."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """Of the key."""


@dataclass(frozen=True, kw_only=True)
class TopUpOptions(_Where):
    """Add to the balance of a key."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """Of the key."""
    amount: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="AMOUNT")]
    """How much, like 5.00."""
    granted: bool = False
    """As a gift, which is used up before what was paid in."""


def add(options: AddOptions) -> None:
    """`longreach keys add`: the secret goes to stdout, alone on its line."""
    amounts = {
        name: None if text is None else parse_amount(text, f"--{name.replace('_', '-')}")
        for name, text in (
            ("budget_day", options.budget_day), ("budget_month", options.budget_month), ("balance", options.balance),
        )
    }  # fmt: skip
    with options.open(create=True, currency=options.currency) as database:
        _, secret = KeyStore(database).add(
            options.name, concurrency=options.concurrency, tokens_per_minute=options.tokens_per_minute,
            models=options.models, **amounts,
        )  # fmt: skip
    print(secret)
    print(f"this is the secret of {options.name!r}, shown once: keep it, it is stored nowhere", file=sys.stderr)


def list_keys(options: ListOptions) -> None:
    """`longreach keys list`."""
    with options.open() as database:
        keys = [key for key in KeyStore(database).all() if options.all or key.revoked is None]
        entries = [_entry(database, key) for key in keys]
    if options.json:
        print(json_line({"currency": database.currency, "keys": entries}))
    elif not entries:
        print(f"no keys in {database.where}; longreach keys add NAME makes one")
    else:
        _print_table(entries, database.currency)


def revoke(options: RevokeOptions) -> None:
    """`longreach keys revoke`."""
    with options.open() as database:
        KeyStore(database).revoke(options.name)
    print(f"{options.name!r} is revoked; running servers refuse it within about a second")


def top_up(options: TopUpOptions) -> None:
    """`longreach keys topup`."""
    amount = parse_amount(options.amount, "AMOUNT")
    with options.open() as database:
        key = KeyStore(database).top_up(options.name, amount, options.granted)
        left = exact_text(from_pico(balance_of(database, key).left))
    print(f"{options.name!r} has {left} {database.currency} now")


def _entry(database: Database, key: Key) -> dict[str, Any]:
    balance = balance_of(database, key)
    return {
        "name": key.name,
        "secret": f"{key.prefix}…",
        "created": _text(key.created),
        "last_used": _text(key.last_used),
        "revoked": _text(key.revoked),
        "concurrency": key.concurrency,
        "tokens_per_minute": key.tokens_per_minute,
        "budget_day": _amount(key.budget_day),
        "budget_month": _amount(key.budget_month),
        "balance": _amount(balance.left) if key.is_prepaid else None,
        "spent": _amount(balance.spent),
        "models": list(key.models),
    }


def _print_table(entries: list[dict[str, Any]], currency: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(header_style="bold", caption=f"amounts in {currency}, times in UTC")
    # A column in which every key has nothing is left out.
    names = [name for name in entries[0] if any(entry[name] for entry in entries)]
    for name in names:
        table.add_column(name.replace("_", " "), justify="right" if isinstance(entries[0][name], int) else "left")
    for entry in entries:
        values = [entry[name] for name in names]
        shown = [
            ", ".join(value) if isinstance(value, list) else "" if value is None else str(value) for value in values
        ]
        table.add_row(*shown)
    # In a pipe nothing wraps: a line of the table stays a line of the text.
    console = Console()
    (console if console.is_terminal else Console(width=_PIPE_WIDTH)).print(table)


def _text(when: datetime | None) -> str | None:
    return None if when is None else f"{when:%Y-%m-%d %H:%M}"


def _amount(pico: int | None) -> str | None:
    return None if pico is None else exact_text(from_pico(pico))
