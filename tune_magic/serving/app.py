"""The server's addresses: OpenAI's, a health check, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import hmac
import json
import sys
import time
import traceback
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tune_magic.serving.answers import ChatForm, Form, TextForm, classified
from tune_magic.serving.protocol import Body, ChatRequest, ClassifyRequest, CompletionRequest, Refused, understood
from tune_magic.serving.scheduler import Piece
from tune_magic.serving.service import Asking, Service
from tune_magic.serving.writing import Likely

_BODY_S = 30.0  # in which a request's body must have come
_OPEN = ("/health",)  # asked without a token


class Gate:
    """Lets in who knows the token and means this server; whatever fails inside becomes an error without details.

    A page in a browser can ask a server on its own machine under another name (DNS rebinding), so a server that listens
    on this machine alone is asked by its own names alone. A body must say that it is JSON, which a page of another
    origin cannot do without being allowed to first; nobody is.

    Args:
        app: What is behind it.
        service: Counts what was answered.
        token: Demanded; None demands none.
        hosts: Names it may be asked by; None for any.
    """

    def __init__(self, app: ASGIApp, service: Service, token: str | None, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._service = service
        self._token = None if token is None else token.encode()
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return
        began = False

        async def counted(message: Message) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began = True
                if scope["path"] not in _OPEN:  # probes ask that every second
                    self._service.statuses[message["status"]] += 1
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, counted)
        except ClientDisconnect:
            return
        except Refused as refused:
            await _error(refused)(scope, receive, counted)
        except Exception as error:  # noqa: BLE001 - whoever asked learns that it failed, and nothing of the inside
            note(error)
            if not began:
                await _error(Refused(500, "The server failed."))(scope, receive, counted)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._hosts is not None and _name_of(headers.get("host", "")) not in self._hosts:
            raise Refused(403, "This server is not known by this name.", code="unknown_host")
        if scope["path"] in _OPEN:
            return
        if self._token is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            is_known = hmac.compare_digest(given.strip().encode(), self._token)
            if not is_known or scheme.lower() != "bearer":
                raise Refused(
                    401, "A token is needed: `Authorization: Bearer TOKEN`.", code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise Refused(415, "The body must be JSON: `Content-Type: application/json`.")


def make_app(service: Service, token: str | None, hosts: frozenset[str] | None) -> FastAPI:
    """Return the application.

    Args:
        service: The models.
        token: Demanded of all but the health check; None demands none.
        hosts: Names it may be asked by; None for any.
    """
    app = FastAPI(title="tune_magic", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, service=service, token=token, hosts=hosts)
    started = int(time.time())

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _error(error)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return _error(Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}."))

    @app.get("/health")
    async def health() -> Response:
        is_ready = service.is_ready
        return JSONResponse({"status": "ok" if is_ready else "loading"}, 200 if is_ready else 503)

    @app.get("/v1/models")
    async def models() -> Response:
        names = (await service.served()).models
        return JSONResponse({"object": "list", "data": [_model(name, started) for name in names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(_model((await service.served()).find(name).name, started))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = await _understood(ChatRequest, request, service)
        asking, num_tokens = await service.chat(asked, request)
        return await _answered(asking, ChatForm(asked.model, num_tokens), asked)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        asked = await _understood(CompletionRequest, request, service)
        asking, num_tokens = await service.complete(asked, request)
        return await _answered(asking, TextForm(asked.model, num_tokens), asked)

    @app.post("/v1/classify")
    async def classify(request: Request) -> Response:
        asked = await _understood(ClassifyRequest, request, service)
        found, are_classes = await service.classify(asked, request)
        return JSONResponse(classified(asked.model, found.rows, found.num_tokens, are_classes=are_classes))

    return app


def note(error: BaseException) -> None:
    """Tell the log where something failed: no message, which may hold what somebody asked."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    print(f"{frames}{type(error).__name__}", file=sys.stderr, flush=True)  # noqa: T201 - this is the worker's log


async def _understood(kind: type[Body], request: Request, service: Service) -> Body:
    """Read and understand a body.

    Raises:
        Refused: It is too large, comes too slowly, or is not what it must be.
    """
    most, pieces, size = service.limits.max_body_bytes, [], 0

    async def read() -> None:
        nonlocal size
        async for piece in request.stream():
            size += len(piece)
            if size > most:
                raise Refused(413, f"The body may have {most} bytes.", headers={"Connection": "close"})
            pieces.append(piece)

    try:
        await asyncio.wait_for(read(), _BODY_S)
    except TimeoutError:
        raise Refused(408, f"The body did not come within {_BODY_S:.0f} seconds.") from None
    return understood(kind, b"".join(pieces))


async def _answered(asking: Asking, form: Form, asked: ChatRequest | CompletionRequest) -> Response:
    """Wait for the whole answer, or for its first piece where it is sent as it comes."""
    come = asking.all()
    tells_likely = asked.num_likely is not None
    try:
        if not asked.stream:
            return JSONResponse(await _whole(come, form, tells_likely=tells_likely))
        first = await anext(come)
    except BaseException:
        asking.end()
        raise
    finally:
        if not asked.stream:
            asking.end()
    lines = _streamed(asking, first, come, form, tells_usage=asked.tells_usage, tells_likely=tells_likely)
    return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _whole(come: AsyncIterator[Any], form: Form, *, tells_likely: bool) -> dict[str, Any]:
    texts: dict[int, str] = {}
    likely: dict[int, list[Likely]] = {}
    ends: dict[int, Piece] = {}
    async for piece in come:
        texts[piece.index] = texts.get(piece.index, "") + piece.text
        likely.setdefault(piece.index, []).extend(piece.likely)
        if piece.reason is not None:
            ends[piece.index] = piece
    choices = [
        form.choice(index, texts[index], end.reason, likely[index] if tells_likely else None)
        for index, end in sorted(ends.items())
    ]
    return form.answer(choices, sum(end.num_tokens for end in ends.values()))


async def _streamed(
    asking: Asking, first: Any, come: AsyncIterator[Any], form: Form, *, tells_usage: bool, tells_likely: bool
) -> AsyncIterator[str]:
    """Yield an answer as server-sent events."""
    begun: set[int] = set()
    num_tokens = 0
    further = {"usage": None} if tells_usage else {}

    def said(piece: Piece) -> str:
        choices = []
        if piece.index not in begun:
            begun.add(piece.index)
            opening = form.begun(piece.index)
            choices += [opening] if opening is not None else []
        choices.append(form.more(piece, piece.likely if tells_likely else None))
        return "".join(_event(form.part([choice], **further)) for choice in choices)

    try:
        num_tokens += first.num_tokens
        yield said(first)
        async for piece in come:
            num_tokens += piece.num_tokens
            yield said(piece)
        if tells_usage:
            yield _event(form.last(num_tokens))
        yield "data: [DONE]\n\n"
    except Refused as refused:
        yield _event(refused.body())
    finally:
        asking.end()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


def _error(refused: Refused) -> JSONResponse:
    return JSONResponse(refused.body(), refused.status, headers=refused.headers)


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "tune_magic"}


def _name_of(host: str) -> str:
    """Return a Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0].removeprefix("[").lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
