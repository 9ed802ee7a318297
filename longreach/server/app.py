"""The HTTP side: every route, and which dialect it speaks. What a request does is in `service.py`.

    app = make_app(service, AppOptions())          an ASGI app; `longreach serve` gives it to uvicorn

The OpenAI-like paths exist with and without `/v1` and `/beta`, the Anthropic ones with and without `/anthropic`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

from longreach import __version__
from longreach.runtime import log
from longreach.server import documentation
from longreach.server.anthropic import ANTHROPIC, count_body, hosted_model
from longreach.server.call import ApiError, Call, Dialect
from longreach.server.guard import Guard, dialect_of
from longreach.server.keys import Key
from longreach.server.metrics import ProcessLoad
from longreach.server.models import LocalModel, Model
from longreach.server.openai import OPENAI_CHAT, OPENAI_COMPLETIONS, model_body
from longreach.server.replies import JsonReply, StreamReply, WholeReply, error_reply
from longreach.server.responses import RESPONSES
from longreach.server.service import AUTO, RETIRED, Service

OPENAI_PREFIXES = ("", "/v1", "/beta", "/beta/v1")
ANTHROPIC_PREFIXES = ("", "/v1", "/anthropic", "/anthropic/v1")

LONG_BODY_BYTES = 1 << 17

PAGE_POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
"""The page loads nothing from anywhere else and runs no script but its own files; only the sanitiser may make HTML of text."""


_T = TypeVar("_T")


@dataclass(frozen=True)
class AppOptions:
    """How the server meets the network.

    Attributes:
        origins: browsers' origins that may call besides the server's own page.
        is_loopback: it listens on the loopback interface alone.
        max_body_bytes: a longer body is refused.
        body_pause_s, body_s: seconds that a body may pause, and take in all; then it is refused.
    """

    origins: tuple[str, ...] = ()
    is_loopback: bool = True
    max_body_bytes: int = 16 << 20
    body_pause_s: float = 30.0
    body_s: float = 600.0


def make_app(service: Service, options: AppOptions | None = None) -> Guard:
    """The whole app. Starting it starts the engines, stopping it finishes them."""
    options = options or AppOptions()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        for model in service.catalogue.models:
            if isinstance(model, LocalModel):
                model.loop.start(loop)
        yield
        service.is_draining = True
        await service.drain()
        for model in service.catalogue.models:
            await model.close()

    app = FastAPI(
        title="Longreach", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json",
        lifespan=lifespan, description="DeepSeek-V4's API on your own model.",
    )  # fmt: skip
    routes = Routes(service, options)
    routes.add_to(app)
    app.add_exception_handler(ApiError, routes.refuse)
    app.add_exception_handler(HTTPException, routes.refuse_path)
    app.add_exception_handler(Exception, routes.fail)
    return Guard(app, origins=options.origins, is_loopback=options.is_loopback, max_body_bytes=options.max_body_bytes)


class Routes:
    """The handlers."""

    def __init__(self, service: Service, options: AppOptions) -> None:
        self.service, self.options = service, options
        self.load = ProcessLoad(self._engines)

    def _engines(self) -> dict[int | None, float]:
        loops = [model.loop for model in self.service.catalogue.models if isinstance(model, LocalModel)]
        return {loop.thread.ident: loop.outside_s for loop in loops}

    def add_to(self, app: FastAPI) -> None:
        """Register every path. The first prefix of each is in /openapi.json, the others are the same thing."""
        openai: list[tuple[str, str, Callable[..., Awaitable[Response]], dict[str, Any]]] = [
            ("POST", "/chat/completions", self._answering(OPENAI_CHAT, "chat"), documentation.CHAT),
            ("POST", "/completions", self._answering(OPENAI_COMPLETIONS, "completions"), documentation.COMPLETIONS),
            ("POST", "/responses", self._answering(RESPONSES, "responses"), documentation.RESPONSES),
            ("GET", "/models", self.models, documentation.MODELS),
            ("GET", "/models/{name:path}", self.model, documentation.MODEL),
            ("GET", "/user/balance", self.balance, documentation.BALANCE),
            ("GET", "/prices", self.prices, documentation.PRICES),
        ]
        anthropic = [
            ("POST", "/messages", self._answering(ANTHROPIC, "anthropic"), documentation.MESSAGES),
            ("POST", "/messages/count_tokens", self.count_tokens, documentation.COUNT_TOKENS),
        ]
        plain = [
            ("POST", "/tokenize", self.tokenize, documentation.TOKENIZE),
            ("POST", "/detokenize", self.detokenize, documentation.DETOKENIZE),
            ("POST", "/apply-template", self.apply_template, documentation.APPLY_TEMPLATE),
            ("GET", "/health", self.health, documentation.HEALTH),
            ("GET", "/ready", self.ready, documentation.READY),
            ("GET", "/metrics", self.metrics, documentation.METRICS),
            ("GET", "/version", self.version, documentation.VERSION),
            ("GET", "/status", self.status, documentation.STATUS),
        ]
        for prefixes, group in ((OPENAI_PREFIXES, openai), (ANTHROPIC_PREFIXES, anthropic), (("",), plain)):
            # The documented spelling is the one that clients are told to use.
            documented = "/v1" if "/v1" in prefixes else ""
            for prefix in prefixes:
                for method, path, handler, about in group:
                    app.add_api_route(
                        prefix + path, handler, methods=[method], include_in_schema=prefix == documented,
                        response_model=None, openapi_extra=about, operation_id=f"{method} {prefix}{path}",
                    )  # fmt: skip
        page = Path(str(files("longreach.server").joinpath("web")))
        app.add_api_route("/", _Page(page / "index.html"), methods=["GET"], include_in_schema=False)
        app.mount("/web", StaticFiles(directory=page), name="web")

    # ---- answers ----------------------------------------------------------------------------------------------------

    def _answering(self, dialect: Dialect, name: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            service = self.service
            try:
                key = service.authenticate(request.headers)
                call = await self._call(dialect, request)
                exchange = await service.open(key, call, dialect, name)
            except ApiError as error:
                return error_reply(error, dialect)
            return StreamReply(exchange) if call.stream else WholeReply(exchange)

        return answer

    async def _call(self, dialect: Dialect, request: Request) -> Call:
        """What a request asks for.

        Raises:
            ApiError: its body breaks a rule.
        """
        content = await self._content(request)
        call = await _in_time(len(content), lambda: dialect.read(self._request(content), self.service.options.rules))
        return self._named(call) if dialect is ANTHROPIC else call

    def _named(self, call: Call) -> Call:
        """A Claude name that is none of ours stands for one of DeepSeek's, as on the hosted service."""
        return call if self.service.catalogue.find(call.model) else replace(call, model=hosted_model(call.model))

    async def _body(self, request: Request) -> Any:
        """The JSON body.

        Raises:
            ApiError: too long, too slow, or not JSON.
        """
        content = await self._content(request)
        return await _in_time(len(content), lambda: self._parse(content))

    def _request(self, content: bytearray) -> Any:
        """The body of a call. A retired name says whether to think: a plain alias would switch it on for deepseek-chat."""
        body = self._parse(content)
        name = body.get("model")
        if self.service.options.retired_names and isinstance(name, str) and name in RETIRED:
            switch = {"thinking": {"type": "enabled" if RETIRED[name] else "disabled"}}
            off = {} if RETIRED[name] else {"reasoning": {"effort": "none"}}
            return body | (off if "input" in body else switch)
        return body

    def _parse(self, content: bytearray) -> Any:
        status = 422 if self.service.options.rules.hosted else 400
        prefix = "Failed to deserialize the JSON body into the target type: " if status == 422 else ""
        try:
            body = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            what = f"{error.msg}: line {error.lineno} column {error.colno}"
            raise ApiError(status, f"{prefix}the body is not JSON ({what})") from None
        if not isinstance(body, dict):
            raise ApiError(status, f"{prefix}the body must be a JSON object") from None
        return body

    async def _content(self, request: Request) -> bytearray:
        content, options, clock = bytearray(), self.options, asyncio.get_running_loop().time
        began = clock()
        try:
            async with asyncio.timeout(options.body_pause_s) as limit:
                async for part in request.stream():
                    content += part
                    if len(content) > options.max_body_bytes:
                        most = options.max_body_bytes
                        raise ApiError(413, f"The body is longer than {most} bytes, the most that is accepted.")
                    limit.reschedule(min(clock() + options.body_pause_s, began + options.body_s))
        except TimeoutError:
            raise ApiError(408, "The body did not arrive in time.") from None
        except ClientDisconnect:
            raise ApiError(400, "The connection ended before the body did.") from None
        return content

    async def count_tokens(self, request: Request) -> Response:
        """Anthropic's count of a prompt's tokens."""
        try:
            key = self.service.authenticate(request.headers)
            call = await self._call(ANTHROPIC, request)
            return JsonReply(count_body(await self.service.find(call.model, key).count_tokens(call)))
        except ApiError as error:
            return error_reply(error, ANTHROPIC)

    # ---- models, money ----------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        key = self.service.authenticate(request.headers)
        data = [self._model_entry(name, key) for name in self.service.names_for(key)]
        return JsonReply({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        key, name = self.service.authenticate(request.headers), request.path_params["name"]
        if name not in self.service.names_for(key):
            raise ApiError(404, f"The model {_short(name)} does not exist.", code="model_not_found", param="model")
        return JsonReply(self._model_entry(name, key))

    def _model_entry(self, name: str, key: Key) -> dict[str, Any]:
        catalogue = self.service.catalogue
        entry = model_body(name, int(time.time() - (time.monotonic() - self.service.started)))
        model = catalogue.find(name)
        if name == AUTO and model is None:
            choices = [m.name for m in (catalogue.small, catalogue.large) if key.allows(m.name)]
            return entry | {"longreach": {"kind": "router", "models": choices, "context": catalogue.large.context}}
        assert model is not None
        about = model.describe()
        aliases = [alias for alias in catalogue.aliases_of(model) if key.allows(alias)] if name == model.name else []
        about |= {"name": model.name if key.allows(model.name) else name, "aliases": aliases}
        return entry | {"longreach": about}

    async def balance(self, request: Request) -> Response:
        key = self.service.authenticate(request.headers)
        balance = await asyncio.to_thread(self.service.ledger.balance, key)
        return JsonReply(balance.body())

    async def prices(self, request: Request) -> Response:
        """What a million tokens cost at this moment, by name."""
        key = self.service.authenticate(request.headers)
        service, listed = self.service, {}
        for name in service.names_for(key):
            model = service.catalogue.find(name)
            if model is not None and (price := service.price_of(model)) is not None:
                listed[name] = {"hit": str(price.hit), "miss": str(price.miss), "output": str(price.output)}
        currency = service.prices.currency if service.prices is not None else service.ledger.database.currency
        return JsonReply({"currency": currency, "models": listed})

    # ---- text and tokens --------------------------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Response:
        """Token ids of `content` (text, never special tokens), or of a chat's prompt with `messages`."""
        key, body = self.service.authenticate(request.headers), await self._body(request)
        model = self._local(body, key)
        if "messages" in body:
            call = await asyncio.to_thread(OPENAI_CHAT.read, body, self.service.options.rules)
            ids = await model.encode(call)
        else:
            text = body.get("content", body.get("prompt"))
            if not isinstance(text, str):
                raise ApiError(400, "content must be a text; or give messages.", param="content")
            ids = await asyncio.to_thread(_encode, model, text)
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": model.context}
        if not body.get("count_only"):  # a million ids that nobody reads take a second to write
            answer["tokens"] = ids
        if body.get("with_pieces"):
            answer["pieces"] = [model.tokenizer.token_bytes[i].decode("utf-8", "replace") for i in ids]
        return JsonReply(answer)

    async def detokenize(self, request: Request) -> Response:
        """The text of `tokens`, special tokens spelled out."""
        key, body = self.service.authenticate(request.headers), await self._body(request)
        model, tokens = self._local(body, key), body.get("tokens")
        size = model.tokenizer.vocab_size
        # In a thread: a list may have millions.
        text = await asyncio.to_thread(_decode, model, tokens)
        if text is None:
            raise ApiError(400, f"tokens must be a list of token ids from 0 to {size - 1}.", param="tokens")
        return JsonReply({"content": text, "prompt": text})

    async def apply_template(self, request: Request) -> Response:
        """The prompt of a chat request, as text and as token ids."""
        key, body = self.service.authenticate(request.headers), await self._body(request)
        call = await asyncio.to_thread(OPENAI_CHAT.read, body, self.service.options.rules)
        model = self._local(body, key)
        prompt = await asyncio.to_thread(model.render, call)
        return JsonReply({"prompt": prompt.text, "tokens": await model.encode(call)})

    def _local(self, body: Mapping[str, Any], key: Key) -> LocalModel:
        """The model of a body; without a name the first one."""
        name = body.get("model", self.service.catalogue.small.name)
        if not isinstance(name, str):
            raise ApiError(400, "model must be a text.", param="model")
        model: Model = self.service.find(name, key)
        if not isinstance(model, LocalModel):
            raise ApiError(400, f"{_short(name)} is served upstream; its tokens are not known here.", param="model")
        return model

    # ---- about the server -------------------------------------------------------------------------------------------

    async def health(self) -> Response:
        """200 while the process works."""
        failed = [s["id"] for s in self.service.model_status() if s.get("failed")]
        return JsonReply(
            {"status": "ok"} if not failed else {"status": "failed", "models": failed}, 500 if failed else 200
        )

    async def ready(self) -> Response:
        """200 while new requests are taken."""
        is_ready = not self.service.is_draining and not any(s.get("failed") for s in self.service.model_status())
        return JsonReply({"status": "ready" if is_ready else "stopping"}, 200 if is_ready else 503)

    async def version(self) -> Response:
        return JsonReply({"version": __version__})

    async def metrics(self, request: Request) -> Response:
        self.service.authenticate(request.headers)
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status(self, request: Request) -> Response:
        """What the page shows, once a second."""
        key, service = self.service.authenticate(request.headers), self.service
        visible = {model.name for name in service.names_for(key) if (model := service.catalogue.find(name)) is not None}
        return JsonReply({
            "version": __version__, "uptime_s": round(time.monotonic() - service.started, 1),
            "models": [status for status in service.model_status() if status["id"] in visible],
            "process": self.load.measure(),
        })  # fmt: skip

    # ---- refusals ---------------------------------------------------------------------------------------------------

    async def refuse(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_reply(error, dialect_of(request.url.path))

    async def refuse_path(self, request: Request, error: Exception) -> Response:
        """An unknown path or a wrong method."""
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            message = f"There is nothing at {request.method} {_short(request.url.path)}."
        elif error.status_code == 405:
            message = f"{request.method} is not allowed at {_short(request.url.path)}."
        else:
            message = str(error.detail)
        return error_reply(
            ApiError(
                error.status_code, message, code="not_found" if error.status_code == 404 else "invalid_request_error"
            ),
            dialect_of(request.url.path),
            error.headers,
        )

    async def fail(self, request: Request, error: Exception) -> Response:
        """A bug of ours: the log has it, the client learns nothing of it."""
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        hidden = ApiError(500, "The server failed to answer this request.", type="server_error", code="server_error")
        return error_reply(hidden, dialect_of(request.url.path))


class _Page:
    """The page itself, never cached, with its policy."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def __call__(self) -> Response:
        return FileResponse(self.path, headers={"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache"})


async def _in_time(size: int, read: Callable[[], _T]) -> _T:
    """Read a body of so many bytes: a long one in a thread, for it may take a second, in which nobody else would be served."""
    return await asyncio.to_thread(read) if size > LONG_BODY_BYTES else read()


def _decode(model: LocalModel, tokens: Any) -> str | None:
    """The text of a list of token ids; None where it is no such list."""
    size = model.tokenizer.vocab_size
    if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < size for t in tokens):
        return None
    return model.tokenizer.decode(tokens)


def _encode(model: LocalModel, text: str) -> list[int]:
    from longreach.errors import RequestError

    try:
        return model.tokenizer.encode(text)
    except RequestError as error:
        raise ApiError(400, str(error)) from None


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."
