"""The command `longreach serve`: models behind DeepSeek's API, for clients that exist already.

    longreach serve runs/small                                       one model, under all official names
    longreach serve flash=runs/small pro=runs/large                  two, and `auto` between them
    longreach serve small=runs/small pro=http://10.0.0.5:8000/v1     the large one on another engine

It listens on this machine alone unless told otherwise, and for others only with keys (`longreach keys add`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import tyro
import uvicorn

from longreach import __version__
from longreach.chat.modes import EffortTexts
from longreach.errors import ConfigError, RequestError
from longreach.model.stores import Precision
from longreach.rundir import recorded
from longreach.runtime import choose_device, log, set_threads, setup_logging
from longreach.server.app import AppOptions, make_app
from longreach.server.call import Rules
from longreach.server.database import DEFAULT_DIRECTORY, open_database
from longreach.server.keys import KeyStore
from longreach.server.ledger import Ledger
from longreach.server.local import open_local
from longreach.server.models import ChatSetup, LocalModel, Model
from longreach.server.prices import PriceTable, find_table
from longreach.server.routing import Router, Table
from longreach.server.service import AUTO, Catalogue, Service, ServiceOptions
from longreach.server.upstream import UpstreamModel

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_M_ARENA_MAX = -8
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}")


@dataclass(frozen=True)
class ServeOptions:
    """Serve models over HTTP: the OpenAI, Anthropic and Responses APIs as DeepSeek has them, and a page at /."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """RUN, NAME=RUN, or NAME=http://HOST:PORT/v1[#MODEL] for a model on another engine; small before large."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but this machine's own needs keys."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    server: Path = Path(DEFAULT_DIRECTORY)
    """Directory of keys and ledger."""
    database: str | None = None
    """URL of a PostgreSQL database for them instead."""
    alias: tuple[str, ...] = ()
    """NAME=MODEL: another name for a model. Official names without one go to the first model (Flash) and the last (Pro)."""
    retired_names: bool = False
    """Answer deepseek-chat and deepseek-reasoner too, as they did until July 2026."""
    effort_texts: EffortTexts | None = None
    """Whose words for the thinking effort the weights know: preview (April 2026), 0731 (since), or none. Default: those that a
    run trained here recorded, 0731 for other weights."""
    chat_trained: bool = False
    """The models have learned to chat, as those of sft, grpo and distill have; otherwise the page says that they only
    continue text."""
    hosted_rules: bool = False
    """Refuse and override exactly as DeepSeek's own service does."""
    require_reasoning: bool = False
    """Refuse a tool-calling turn that comes back without its reasoning, while thinking."""
    prices: str = "hosted"
    """Price table: hosted (DeepSeek's, by date), one of its periods, the path of your own, or none."""
    auto_value: float = 0.01
    """What a solved request is worth in the table's currency: `auto` pays that much times the better chance."""
    auto_table: Path | None = None
    """Chances of the two models by kind of request; None takes the announced scores of Flash and Pro."""
    max_running: int = 16
    """Requests that run at once, for each model; others wait."""
    max_waiting: int = 256
    """Requests that may wait for a model; more are refused with 429."""
    memory_gib: float = 1.0
    """For each model's cache in memory; up to half as much more for the states at the ends of texts, and as much again for
    requests that are set aside when it is full."""
    disk_cache: Path | None = None
    """Directory where the caches outlive the server; None keeps them in memory alone."""
    disk_gib: float = 10.0
    """Size of the disk cache at most, for each model."""
    precision: Precision | None = None
    """How the caches keep entries: float32, bfloat16 or released; None takes each model's own data type."""
    arithmetic: Literal["fast", "invariant"] = "fast"
    """fast, or invariant: answers independent, to the bit, of what runs beside them and of the cache."""
    speculation: Literal["off", "lookup", "mtp"] = "off"
    """Guess tokens and check several in one pass."""
    draft_tokens: int = 3
    """Tokens guessed at a time."""
    threads: int | None = None
    """CPU threads for the models; None takes one per core that other processes leave free."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    cors: tuple[str, ...] = ()
    """Origins whose pages may call, such as http://localhost:3000; * allows all."""
    max_body_mib: float = 16.0
    """Size of a request at most."""
    drain_s: float = 30.0
    """Seconds that running requests have to finish when the server is stopped; the rest is ended, and stays in the cache."""
    log_prompts: bool = False
    """Write the text of requests into the log."""
    upstream_key: tuple[str, ...] = ()
    """NAME=VARIABLE: environment variable with the API key of an upstream model."""

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            ConfigError: one line.
        """
        if not self.models:
            raise ConfigError("no model to serve; give a run directory, as in longreach serve runs/quickstart")
        for name, is_given, needs, has in (
            ("--auto-table", self.auto_table is not None, "two models", len(self.models) > 1),
            ("--auto-value", self.auto_value != 0.01, "two models", len(self.models) > 1),
            ("--draft-tokens", self.draft_tokens != 3, "--speculation", self.speculation != "off"),
            ("--disk-gib", self.disk_gib != 10.0, "--disk-cache", self.disk_cache is not None),
        ):
            if is_given and not has:
                raise ConfigError(f"{name} has no effect without {needs}; leave it out, or give {needs}")
        for name, value, least, most in (
            ("--port", self.port, 0, 65535), ("--max-running", self.max_running, 1, 4096),
            ("--max-waiting", self.max_waiting, 0, 10**6), ("--max-body-mib", self.max_body_mib, 0.001, 4096),
            ("--drain-s", self.drain_s, 0, 86400), ("--auto-value", self.auto_value, 0, 10**6),
        ):  # fmt: skip
            if not least <= value <= most:
                raise ConfigError(f"{name} {value} must be from {least} to {most}")


def main(options: ServeOptions) -> int:
    """Serve until stopped."""
    setup_logging()
    options.check()
    _share_one_heap()
    table = None if options.prices == "none" else find_table(options.prices)
    database = open_database(options.server, options.database, currency=table.currency if table is not None else None)
    with database:
        keys = KeyStore(database)
        if options.host not in LOOPBACK and not len(keys):
            raise ConfigError(
                f"--host {options.host} is open to other machines and there are no keys; make one with "
                "`longreach keys add NAME`, or leave --host out"
            )
        listening = _bind(options.host, options.port)
        with listening:
            models = _models(options)
            catalogue = Catalogue(models, _pairs("--alias", options.alias), auto=True)
            _check_aliases(catalogue)
            _check_prices(table, catalogue)
            currency = table.currency if table is not None else database.currency
            chances = Table.load(options.auto_table)
            router = Router(chances, options.auto_value, currency) if catalogue.has_auto else None
            keys.watch()
            with Ledger(database) as ledger:
                ledger.recover()
                rules = Rules(options.hosted_rules, options.require_reasoning or options.hosted_rules)
                service = Service(
                    catalogue, ledger, keys, table, router,
                    ServiceOptions(rules, options.max_waiting, options.retired_names, options.log_prompts),
                )  # fmt: skip
                _run(service, listening, options)
            keys.close()
    return 0


def _share_one_heap() -> None:
    """glibc gives each thread a heap of its own, and long requests, which are read in changing threads, leave holes in all.

    Measured over 3,500 requests of up to 2 MB: 690 MiB, and still growing, with many heaps, 490 MiB and steady with one.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _run(service: Service, listening: socket.socket, options: ServeOptions) -> None:
    is_loopback = options.host in LOOPBACK
    app = make_app(service, AppOptions(options.cors, is_loopback, int(options.max_body_mib * (1 << 20))))
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, loop="auto", http="auto", lifespan="on",
        timeout_graceful_shutdown=5, timeout_keep_alive=75, ws="none",
        proxy_headers=False,
    )  # fmt: skip
    server = _Server(config, service, listening, options)
    assert is_loopback or service.needs_keys  # asked before it listens, so that it holds whatever becomes of the keys
    # uvicorn raises the signal that stopped it once more when it is done; the ledger must still be closed then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    server.run(sockets=[listening])


class _Server(uvicorn.Server):
    """uvicorn, which says where it is once it listens, and refuses new work from the moment it is told to stop."""

    def __init__(
        self, config: uvicorn.Config, service: Service, listening: socket.socket, options: ServeOptions
    ) -> None:
        super().__init__(config)
        self.service, self.listening, self.options = service, listening, options

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            port = self.listening.getsockname()[1]
            print(greeting(self.options.host, port, self.service), file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Still listening: whoever comes now is told to try again, and /ready says so.
        log.info("stopping; running requests have up to %g s", self.options.drain_s)
        await self.service.finish(self.options.drain_s, lambda: self.force_exit)
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves this out then; without it the caches would not be written to disk
            await self.lifespan.shutdown()


def greeting(host: str, port: int, service: Service) -> str:
    """Where to point which client, in lines to copy."""
    shown = "127.0.0.1" if host in ("127.0.0.1", "localhost") else f"[{host}]" if ":" in host else host
    base = f"http://{shown}:{port}"
    key = "YOUR_KEY" if service.needs_keys else "none"
    names = service.catalogue.names()
    model = names[0]
    lines = [
        f"longreach {__version__} serves {', '.join(m.name for m in service.catalogue.models)} at {base}",
        f"page            {base}/",
        f"OpenAI SDK      OpenAI(base_url=\"{base}/v1\", api_key=\"{key}\")          model=\"{model}\"",
        f"Anthropic SDK   Anthropic(base_url=\"{base}/anthropic\", api_key=\"{key}\")",
        f"Claude Code     ANTHROPIC_BASE_URL={base}/anthropic ANTHROPIC_AUTH_TOKEN={key} claude --model {model}",
        f"Codex           codex -c model={model} -c model_provider=longreach "
        f"-c 'model_providers.longreach={{name=\"longreach\",base_url=\"{base}/v1\",wire_api=\"responses\"}}'",
        f"Open WebUI      OPENAI_API_BASE_URL={base}/v1 OPENAI_API_KEY={key} open-webui serve",
        f"curl            curl {base}/v1/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' "
        f"-d '{{\"model\":\"{model}\",\"messages\":[{{\"role\":\"user\",\"content\":\"Hello\"}}],\"max_tokens\":64}}'",
        f"names           {', '.join(names)}",
        "stop            Ctrl-C; then: longreach usage",
    ]  # fmt: skip
    return "\n".join(lines)


# ---- what is served -------------------------------------------------------------------------------------------------


def _models(options: ServeOptions) -> list[Model]:
    named: dict[str, str] = {}
    for given in options.models:
        name, target = _named(given)
        if name in named or name == AUTO:
            raise ConfigError(f"two models are named {name!r}, or it is the router's name; give NAME={target}")
        named[name] = target
    device, threads = choose_device(options.device), set_threads(options.threads)
    log.info("device: %s, threads: %s", device, threads)
    keys = _pairs("--upstream-key", options.upstream_key)
    for name in keys:
        if name not in named:
            raise ConfigError(f"--upstream-key names {name!r}, which is no model here; there are {', '.join(named)}")
    return [
        _upstream(name, target, keys) if target.startswith(("http://", "https://"))
        else _local(name, target, str(device.value), options)
        for name, target in named.items()
    ]  # fmt: skip


def _named(given: str) -> tuple[str, str]:
    name, equals, target = given.partition("=")
    if not equals or "/" in name:
        target, name = given, Path(given.partition("#")[0].rstrip("/")).name
    if not _NAME.fullmatch(name) or not target:
        raise ConfigError(f"{given!r} is no model; give RUN, NAME=RUN or NAME=http://HOST:PORT/v1")
    return name, target


def _local(name: str, target: str, device: str, options: ServeOptions) -> LocalModel:
    learned = recorded(target, "effort_texts")
    setup = ChatSetup(
        options.effort_texts or learned or "0731", "hosted" if options.hosted_rules else "encoder",
        options.chat_trained or learned is not None,
    )  # fmt: skip
    disk = options.disk_cache / name if options.disk_cache is not None else None
    return open_local(
        name, Path(target), setup, device=device, hosted=options.hosted_rules, arithmetic=options.arithmetic,
        max_running=options.max_running, memory_gib=options.memory_gib, precision=options.precision, disk_cache=disk,
        disk_gib=options.disk_gib, speculation=options.speculation, draft_tokens=options.draft_tokens,
    )  # fmt: skip


def _upstream(name: str, target: str, keys: dict[str, str]) -> UpstreamModel:
    url, _, remote = target.partition("#")
    key = None
    if name in keys:
        key = os.environ.get(keys[name])
        if not key:
            raise ConfigError(f"--upstream-key {name}={keys[name]}: the environment variable {keys[name]} is not set")
    return UpstreamModel(name, url, remote=remote or name, key=key)


def _pairs(option: str, given: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals or not name or not value:
            raise ConfigError(f"{option} {each!r} must be NAME=VALUE")
        pairs[name] = value
    return pairs


def _check_prices(table: PriceTable | None, catalogue: Catalogue) -> None:
    """A table for other models would make everything free without a word."""
    if table is None:
        return
    now = datetime.now(UTC)
    free = [
        model.name
        for model in catalogue.models
        if not any(table.price_of(name, now) for name in (model.name, *catalogue.aliases_of(model)))
    ]
    if len(free) == len(catalogue.models):
        raise ConfigError(
            f"--prices {table.name} has no price for {', '.join(free)}; it has {', '.join(table.models)}. Name one of your "
            "models so with --alias, or give --prices none"
        )
    for name in free:
        log.warning("--prices %s has no price for %s: its tokens cost nothing", table.name, name)


def _check_aliases(catalogue: Catalogue) -> None:
    for alias, name in catalogue.aliases.items():
        if name not in catalogue.by_name:
            known = ", ".join(catalogue.by_name)
            raise ConfigError(f"--alias {alias}={name}: there is no model {name!r}; there are {known}")
        if alias in catalogue.by_name or alias == AUTO:
            raise ConfigError(f"--alias {alias}={name}: {alias!r} is the name of a model already")


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket, before any model is read: a port in use is known at once."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, proto)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        why = error.strerror or str(error)
        raise RequestError(f"{host}:{port} cannot be listened on: {why}; choose another --port") from None
    return listening
