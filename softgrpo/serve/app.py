"""The routes of the server."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softgrpo.serve.admission import check_caller, check_model
from softgrpo.serve.errors import ApiError
from softgrpo.serve.generation import LEFT, Generation, Generator
from softgrpo.serve.metrics import Metrics
from softgrpo.serve.page import chat_page
from softgrpo.serve.settings import ServeSettings
from softgrpo_engine import LLM


def make_app(llm: LLM, settings: ServeSettings) -> ASGIApp:
    """The application of one model."""
    generator = Generator(llm, settings)
    html = chat_page(llm, settings)

    async def page(http: HttpRequest) -> Response:
        return HTMLResponse(html)

    model_card = {
        "id": settings.name,
        "object": "model",
        "created": generator.created,
        "owned_by": "softgrpo",
        "max_model_len": llm.max_model_len,
    }

    async def health(http: HttpRequest) -> Response:
        if generator.engine.failure is None:
            return JSONResponse({"status": "ok"})
        # What broke is in the log.
        reason = "the engine failed for good: start the server again"
        return JSONResponse({"status": "unhealthy", "reason": reason}, 503)

    async def models(http: HttpRequest) -> Response:
        check_caller(http, settings)
        return JSONResponse({"object": "list", "data": [model_card]})

    async def model(http: HttpRequest) -> Response:
        check_caller(http, settings)
        check_model(http.path_params["name"], settings)
        return JSONResponse(model_card)

    async def metrics(http: HttpRequest) -> Response:
        text = generator.metrics.text(await generator.engine.metrics())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    routes = [
        Route("/", page),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/chat/completions", Generation(generator, is_chat=True), methods=["POST"]),
        Route("/v1/completions", Generation(generator, is_chat=False), methods=["POST"]),
    ]
    handlers = {ApiError: _refusal, HTTPException: _http_error, Exception: _mistake}
    app = Starlette(routes=routes, exception_handlers=handlers)
    paths = {route.path for route in routes} | {f"/v1/models/{settings.name}"}
    return Counted(app, generator.metrics, paths)


async def _refusal(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = ApiError(error.status_code, f"{http.method} {http.url.path:.80}: {error.detail}")
    return JSONResponse(said.body(), error.status_code, error.headers)


async def _mistake(http: HttpRequest, error: Exception) -> Response:
    """Of this program; the traceback goes to the log."""
    said = ApiError(500, "the server failed on this request; its log says why")
    return JSONResponse(said.body(), 500)


class Counted:
    """Counts requests by route and status.

    paths: the routes there are: no client can invent a label.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests[path, 499 if scope.get(LEFT) else status] += 1
