"""The server under load: many streaming clients at once, what it spends beside the model, and whether anything is lost.

    longreach bench serve                         200 clients, a model with random weights of the `bench` shape
    longreach bench serve --run runs/small        another model

A server is started as a user would start it, in a process of its own. The clients are bare sockets in this process, so that
they take little CPU from it. Afterwards the ledger is read: every answer that a client saw must be in it, once.

`server_cpu_share` is the CPU time outside the engine's steps (event loop, HTTP, parsing of answers, ledger) over all CPU
time of the server's process while it is under load.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from longreach.bench.measure import Record
from longreach.checkpoint.save import save_model
from longreach.errors import RequestError
from longreach.model.config import ModelConfig
from longreach.model.transformer import Transformer
from longreach.rundir import find_model
from longreach.runtime import busy_and_own_seconds, json_line
from longreach.tokenizer.bpe import Tokenizer

START_S = 120.0
_TEXT = "def class return import self value number list print open file read write for in if else with as yield"
_WORDS = _TEXT.split()


@dataclass(frozen=True)
class ServeBenchOptions:
    """Put many streaming clients on a server and account for every request."""

    run: Path | None = None
    """Model to serve; default: random weights of the shape `--preset`."""
    preset: str = "bench"
    """Shape of the random weights."""
    clients: int = 200
    """Clients at once."""
    requests: int = 2
    """Requests of each client, one after the other."""
    max_tokens: int = 48
    """Tokens of each answer."""
    words: int = 60
    """Words of each prompt."""
    max_running: int = 16
    """Requests the engine runs at once."""
    max_waiting: int = 256
    """Requests that may wait; more are refused."""
    threads: int | None = None
    """CPU threads of the server's model; default: its own."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object as the last line."""


@dataclass
class Seen:
    """What the clients saw.

    Attributes:
        first_byte_s: of each streamed reply, from sending the request. first_token_s: to its first frame with data.
        completed: ids of answers that ended as they should.
    """

    first_byte_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    completed: list[str] = field(default_factory=list)
    tokens: int = 0
    refused: int = 0
    broken: list[str] = field(default_factory=list)


def main(options: ServeBenchOptions) -> int:
    """Run the bench."""
    for name in ("clients", "requests", "max_tokens", "words", "max_running"):
        if getattr(options, name) < 1:
            raise RequestError(f"--{name.replace('_', '-')} {getattr(options, name)} must be 1 or more")
    record = Record(torch.device("cpu"), 1)
    folder = Path(tempfile.mkdtemp(prefix="longreach-bench-"))
    try:
        model = find_model(options.run) if options.run is not None else _random_model(folder / "model", options.preset)
        _run(record, options, model, folder / "server")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.json:
        print(json_line({"preset": options.preset, "run": options.run, "figures": record.figures}))
    return 0


def _random_model(folder: Path, preset: str) -> Path:
    config = ModelConfig.preset(preset)
    texts = [Path(statistics.__file__).read_text(encoding="utf-8"), Path(tempfile.__file__).read_text(encoding="utf-8")]
    tokenizer = Tokenizer.train(texts, vocab_size=min(config.vocab_size, 4096))
    save_model(Transformer(config.replace(vocab_size=tokenizer.vocab_size), seed=0), folder, tokenizer=tokenizer)
    return folder


def _run(record: Record, o: ServeBenchOptions, model: Path, folder: Path) -> None:
    command = [
        sys.executable, "-m", "longreach", "serve", f"model={model}", "--port", "0", "--server", str(folder),
        "--max-running", str(o.max_running), "--max-waiting", str(o.max_waiting), "--effort-texts", "none",
    ]  # fmt: skip
    if o.threads is not None:
        command += ["--threads", str(o.threads)]
    errors = open(folder.parent / "server.log", "w+", encoding="utf-8")  # noqa: SIM115  # closed below, read before
    server = subprocess.Popen(command, stderr=errors, stdout=subprocess.DEVNULL)
    try:
        port = _wait_for_port(server, Path(errors.name))
        asyncio.run(_warm(port, o))
        before, busy, began = _status(port), busy_and_own_seconds(), time.perf_counter()
        seen = asyncio.run(_load(port, o))
        elapsed, after, busy_after = time.perf_counter() - began, _status(port), busy_and_own_seconds()
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)
    finally:
        server.kill()
        server.wait()
        errors.close()
    spent = {name: after["process"][name] - before["process"][name] for name in ("total_cpu_s", "server_cpu_s")}
    others = float("nan")
    if busy is not None and busy_after is not None:
        # Neither the clients of this process nor the server are somebody else.
        others = max(0.0, (busy_after[0] - busy[0] - (busy_after[1] - busy[1]) - spent["total_cpu_s"]) / elapsed)
    _report(record, o, seen, elapsed, spent, others, after)
    _account(record, seen, folder)


def _report(
    record: Record, o: ServeBenchOptions, seen: Seen, elapsed: float, spent: dict[str, float], others: float, after: Any
) -> None:
    asked = o.clients * o.requests
    record.say(
        f"{o.clients} clients, {asked} requests of {o.max_tokens} tokens, {elapsed:.1f} s; other load {others:.2f} CPUs"
    )
    for name, value, text in (
        ("requests", asked, "{:.0f} requests"),
        ("completed", len(seen.completed), "{:.0f} answered"),
        ("refused", seen.refused, "{:.0f} refused with 429"),
        ("broken", len(seen.broken), "{:.0f} neither"),
        ("tokens_per_s", seen.tokens / elapsed, "{:.0f} tokens/s to the clients"),
        ("first_byte_max_s", max(seen.first_byte_s, default=0.0), "{:.2f} s to the first byte at most"),
        ("first_byte_median_s", statistics.median(seen.first_byte_s or [0.0]), "{:.2f} s to the first byte in the median"),
        ("first_token_median_s", statistics.median(seen.first_token_s or [0.0]), "{:.2f} s to the first token in the median"),
        ("server_cpu_s", spent["server_cpu_s"], "{:.2f} CPU seconds of the server outside the engine's steps"),
        ("total_cpu_s", spent["total_cpu_s"], "{:.2f} CPU seconds of the server's process"),
        ("server_cpu_share", spent["server_cpu_s"] / spent["total_cpu_s"], "{:.1%} of its CPU time outside the engine's steps"),
        ("cpu_us_per_token", 1e6 * spent["server_cpu_s"] / max(1, seen.tokens), "{:.0f} microseconds of that per token"),
        ("rss_mib", after["process"]["rss_bytes"] / 2**20, "{:.0f} MiB resident"),
        ("other_load", others, "{:.2f} CPUs busy with other processes"),
    ):  # fmt: skip
        record.figures[name] = value
        record.say("  " + text.format(value))
    for line in seen.broken[:5]:
        record.say(f"  broken: {line}")


def _account(record: Record, seen: Seen, folder: Path) -> None:
    """Compare the ledger with what the clients saw."""
    with sqlite3.connect(folder / "ledger.sqlite") as ledger:
        rows = ledger.execute("SELECT id, status FROM longreach_requests").fetchall()
    completed = [row[0] for row in rows if row[1] == "completed"]
    record.figures["ledger_lost"] = len(set(seen.completed) - set(completed))
    record.figures["ledger_twice"] = (
        len(completed) - len(set(completed)) + len(seen.completed) - len(set(seen.completed))
    )
    record.say(
        f"  ledger: {len(rows)} rows, {record.figures['ledger_lost']:.0f} answers missing, "
        f"{record.figures['ledger_twice']:.0f} twice"
    )


# ---- the server -----------------------------------------------------------------------------------------------------


def _wait_for_port(server: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        text = log.read_text(encoding="utf-8")
        for word in text.split():
            if word.startswith("http://127.0.0.1:") and word.endswith("/"):
                return int(word.rstrip("/").rpartition(":")[2])
        if server.poll() is not None:
            raise RequestError(
                f"the server did not start: {text.strip().splitlines()[-1] if text.strip() else 'no word'}"
            )
        time.sleep(0.05)
    raise RequestError(f"the server did not start within {START_S:g} s")


def _status(port: int) -> Any:
    return json.loads(asyncio.run(_get(port, "/status")))


async def _get(port: int, path: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
    content = await reader.read()
    writer.close()
    return content.partition(b"\r\n\r\n")[2]


# ---- the clients ----------------------------------------------------------------------------------------------------


async def _warm(port: int, o: ServeBenchOptions) -> None:
    seen = Seen()
    await _one(port, _body(o, "warm"), seen)
    if seen.broken or not seen.completed:
        raise RequestError(f"the server does not answer: {seen.broken[0] if seen.broken else 'refused'}")


async def _load(port: int, o: ServeBenchOptions) -> Seen:
    seen = Seen()

    async def client(number: int) -> None:
        for turn in range(o.requests):
            try:
                await _one(port, _body(o, f"{number}.{turn}"), seen)
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                seen.broken.append(f"client {number}: {type(error).__name__} {error}")

    await asyncio.gather(*(client(number) for number in range(o.clients)))
    return seen


def _body(o: ServeBenchOptions, name: str) -> bytes:
    words = " ".join(_WORDS[zlib.crc32(f"{name} {i}".encode()) % len(_WORDS)] for i in range(o.words))
    return json.dumps({
        "model": "model", "messages": [{"role": "user", "content": f"{name} {words}"}], "max_tokens": o.max_tokens,
        "thinking": {"type": "disabled"}, "stream": True, "temperature": 1.0,
    }).encode()  # fmt: skip


async def _one(port: int, body: bytes, seen: Seen) -> None:
    """Send a request, read its stream to the end."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        status = await reader.readline()
        first_byte = time.perf_counter() - began
        while (await reader.readline()).strip():
            pass
        if b" 429 " in status:
            seen.refused += 1
            return
        if b" 200 " not in status:
            seen.broken.append(status.decode("latin-1").strip())
            return
        seen.first_byte_s.append(first_byte)
        await _read_stream(reader, began, seen)
    finally:
        writer.close()


async def _read_stream(reader: asyncio.StreamReader, began: float, seen: Seen) -> None:
    """The chunks of a chunked body. A chunk holds whole frames."""
    name, usage, finished, has_token = "", b"", False, False
    while size := int((await reader.readline()).strip() or b"0", 16):
        chunk = await reader.readexactly(size + 2)
        for line in _data(chunk):
            if not has_token:
                has_token = True
                seen.first_token_s.append(time.perf_counter() - began)
                name = json.loads(line[6:])["id"].rpartition("-")[2]
            if b'"usage":{' in line:
                usage = line[6:]
            finished = finished or line == b"data: [DONE]"
    if not finished or not usage:
        seen.broken.append(f"{name}: no end")
        return
    seen.completed.append(name)
    seen.tokens += json.loads(usage)["usage"]["completion_tokens"]


def _data(chunk: bytes) -> Iterable[bytes]:
    return (line for line in chunk.split(b"\n") if line.startswith(b"data: "))
