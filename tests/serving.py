"""A real server on a free port of this machine, on a small untrained model whose answers a test may write itself."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import uvicorn

from longreach.chat.dsml import call_parts
from longreach.chat.messages import ToolCall
from longreach.checkpoint.save import save_model
from longreach.engine.engine import Engine, EngineOptions
from longreach.engine.sampler import Sampled
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.server.app import AppOptions, make_app
from longreach.server.call import Call
from longreach.server.database import REQUESTS, open_database
from longreach.server.keys import KeyStore
from longreach.server.ledger import Ledger
from longreach.server.models import ChatSetup, LocalModel, Model, Prepared
from longreach.server.prices import PriceTable, find_table
from longreach.server.routing import Router, Table
from longreach.server.service import Catalogue, Service, ServiceOptions
from longreach.tokenizer.bpe import Tokenizer

VOCABULARY = 512
CONTEXT = 4096


def make_tokenizer() -> Tokenizer:
    """All of V4's special tokens and a few hundred pieces of Python and JSON."""
    texts = ["def add(a, b):\n    return a + b\n", '{"city": "Paris", "days": 3}\n', "Hello, the answer is 42.\n"]
    return Tokenizer.train([text * 20 for text in texts], vocab_size=VOCABULARY)


def make_engine(tokenizer: Tokenizer, seed: int = 1, context: int = CONTEXT, **options: Any) -> Engine:
    config = ModelConfig.preset("tiny").replace(vocab_size=tokenizer.vocab_size, max_position_embeddings=context)
    return Engine(
        Transformer(config, seed=seed), tokenizer, EngineOptions(**({"memory_gib": 0.1, "max_running": 4} | options))
    )


def calls_text(*calls: tuple[str, dict[str, Any]]) -> str:
    """Tool calls as the model writes them, for a script."""
    made = [ToolCall(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    return "".join(text for text, _ in call_parts(made))


def wait_until(condition: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """The first true value of `condition`."""
    until = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)
    return value


class ScriptedModel(LocalModel):
    """A local model that says what it was told to, where a prompt contains a key of `script`; else it draws as usual.

    Attributes:
        script: answers by a text that their prompts contain, as text (special tokens in it are special) or as token ids;
            an end mark is added.
        delay_s: seconds each step of a scripted answer takes.
        prompts: text of every prompt.
    """

    def __init__(self, name: str, engine: Engine, setup: ChatSetup | None = None, **options: Any) -> None:
        super().__init__(name, engine, setup or ChatSetup(texts="none"), **options)
        self.script: dict[str, str | list[int]] = {}
        self.prompts: list[str] = []
        self.delay_s = 0.0
        self._ids: dict[int, tuple[Any, list[int]]] = {}
        draw = engine.sampler.sample

        def sample(logits, rows):
            drawn = list(draw(logits, rows))
            for place, row in enumerate(rows):
                _, ids = self._ids.get(id(row.params), (None, None))
                if ids is None:
                    continue
                time.sleep(self.delay_s)
                token = ids[row.position] if row.position < len(ids) else self.tokenizer.eos_id
                drawn[place] = Sampled(token, drawn[place].logprob, drawn[place].top)
            return drawn

        engine.sampler.sample = sample

    async def prepare(self, call: Call, tenant: str = "") -> Prepared:
        prepared = await super().prepare(call, tenant)
        text = self.tokenizer.decode(prepared.prompt)
        self.prompts.append(text)
        # The longest key that fits: a later turn's key may stand beside an earlier one's.
        for key in sorted(self.script, key=text.rfind, reverse=True):
            if key in text:
                told = self.script[key]
                ids = self.tokenizer.encode(told, allow_special=True) if isinstance(told, str) else told
                self._ids[id(prepared.params)] = (prepared.params, ids)  # held, so that the address stays its own
                break
        return prepared


def break_answers(model: ScriptedModel, monkeypatch: pytest.MonkeyPatch, after: int, message: str) -> None:
    """Make every answer of a model raise an error with this message at its token number `after`."""
    make = model._reader

    def breaking(*arguments: Any) -> Any:
        reader = make(*arguments)
        read, count = reader._read, 0

        def fail(token: int) -> None:
            nonlocal count
            count += 1
            if count == after:
                raise RuntimeError(message)
            read(token)

        reader._read = fail
        return reader

    monkeypatch.setattr(model, "_reader", breaking)


class LiveServer:
    """A server that answers at `url`.

    Attributes:
        service: what it runs; model: its first model; secrets: of its keys.
    """

    secrets: list[str]

    def __init__(self, service: Service, options: AppOptions) -> None:
        self.service = service
        self.model: Any = service.catalogue.models[0]
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            make_app(service, options), log_level="warning", lifespan="on", timeout_graceful_shutdown=3
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def start(self) -> None:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)

    def rows(self) -> list[Any]:
        """The ledger, oldest first."""
        with self.service.ledger.database.read() as connection:
            return list(connection.execute(sa.select(REQUESTS).order_by(REQUESTS.c.started_ms)))

    def row(self, reply_id: str) -> Any:
        """The ledger's row of a reply, by the id that its client saw."""
        found = [row for row in self.rows() if row.id in reply_id]
        assert len(found) == 1, f"{len(found)} rows for {reply_id}"
        return found[0]

    @property
    def running(self) -> int:
        """Requests that any of its local engines still has."""
        return sum(len(m.engine.requests) for m in self.service.catalogue.models if isinstance(m, LocalModel))

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=30)
        assert not self._thread.is_alive(), "the server did not stop"
        self._socket.close()


@contextlib.contextmanager
def live_server(
    folder: Path,
    *models: Model,
    options: ServiceOptions | None = None,
    app: AppOptions | None = None,
    prices: PriceTable | None = None,
    aliases: dict[str, str] | None = None,
    keys: tuple[dict[str, Any], ...] = (),
) -> Iterator[LiveServer]:
    """Serve models; `keys` are arguments of `KeyStore.add`, and the secrets stand in `server.secrets`."""
    with open_database(folder) as database:
        store = KeyStore(database)
        secrets = [store.add(**key)[1] for key in keys]
        catalogue = Catalogue(models, aliases or {}, auto=True)
        router = Router(Table.load()) if catalogue.has_auto else None
        with Ledger(database) as ledger:
            service = Service(catalogue, ledger, store, prices or find_table("hosted"), router, options)
            server = LiveServer(service, app or AppOptions())
            server.secrets = secrets
            server.start()
            try:
                yield server
            finally:
                server.stop()


def save_run(folder: Path, seed: int = 1, context: int = CONTEXT) -> Path:
    """A directory that `longreach serve` can be given: the untrained model of `make_engine`."""
    tokenizer = make_tokenizer()
    config = ModelConfig.preset("tiny").replace(vocab_size=tokenizer.vocab_size, max_position_embeddings=context)
    return save_model(Transformer(config, seed=seed), folder / "model", tokenizer=tokenizer)


class ServerProcess:
    """`longreach serve` as its users run it, in a process of its own, with `arguments` after the command's name.

    Attributes:
        lines: what it has written to stderr so far.
    """

    def __init__(self, *arguments: object, wait: bool = True) -> None:
        command = [sys.executable, "-m", "longreach", "serve", *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""
        if wait:
            wait_until(self._find_url, 60)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def _find_url(self) -> bool:
        assert self.process.poll() is None, "the server ended: " + "\n".join(self.lines)
        found = re.search(r"^longreach .* at (http://\S+)$", self.text, re.MULTILINE)
        self.url = found[1] if found else ""
        return bool(found) and any(line.startswith("stop ") for line in self.lines)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def rss_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 30.0) -> int:
        """Its exit status, once it has ended by itself."""
        code = self.process.wait(timeout_s)
        self._reader.join(10)
        return code

    def stop(self) -> int:
        self.signal()
        return self.wait()

    def kill(self) -> None:
        """As a power failure would end it."""
        self.process.kill()
        self.wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
