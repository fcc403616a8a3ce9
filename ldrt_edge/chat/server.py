"""`ldrt-edge serve`, `chat --web`: one model on the loopback interface, with a page for people and an API for programs.

Nothing leaves this machine and nothing is written to disk, unless an audit log or a history is asked for, but for
what leads the browser to the page, which goes again. Every request but those for the page's own files and for
`/openapi.json` needs the token of this start; the Host and Origin headers must be ours, so that no web page elsewhere
reaches it through the browser. Nothing in a request becomes a path: the page's files are read at the start, and a
conversation's file is found by the name that the server gave it.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, nullcontext, suppress
from importlib import resources
from pathlib import Path

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldrt_edge.chat import completions, page
from ldrt_edge.chat.audit import AuditLog
from ldrt_edge.chat.browser import in_browser
from ldrt_edge.chat.desk import Desk, Model
from ldrt_edge.chat.history import History
from ldrt_edge.chat.replies import error_reply
from ldrt_edge.chat.turns import Busy
from ldrt_edge.confidence import read_confidence
from ldrt_edge.errors import ConfigError, DataError, LdrtError, NotNow, NotThere
from ldrt_edge.front import Front
from ldrt_edge.image import MAX_BYTES
from ldrt_edge.runtimes.base import Sampling, load

HOST = "127.0.0.1"
PORT = 8420
RETRY_AFTER_S = 5
CACHE_BYTES = 1 << 30
"""Three conversations with a LLaVA-1.5-7B about a picture, some hundred with the starter."""
_MOST_BODY_BYTES = 4 << 20  # of a request that brings no picture file
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def serve(
    folder: Path,
    port: int = PORT,
    sampling: Sampling | None = None,
    threads: int | None = None,
    audit: Path | None = None,
    browser: bool = False,
    as_json: bool = False,
    history: Path | None = None,
    passphrase: str = "",
    report: Path | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> None:
    """Serve a model artefact on 127.0.0.1 until Ctrl-C; prints one line with the address and the token.

    Args:
        folder: the model.
        port: 0 takes any that is free.
        sampling: how answers are drawn where a request does not say.
        threads: of the model.
        audit: write an audit log there.
        browser: open the page.
        as_json: print page, base_url and api_key as one JSON object instead.
        history: keep conversations there, encrypted with `passphrase`.
        report: bench's about the model: says under answers how sure they are.
        cache_bytes: at most so much is kept of what the model read for conversations that wait.

    Raises:
        LdrtError: the model does not load, the port is taken, or the audit log or the history cannot be used.
    """
    model, confidence = Model.of(folder), read_confidence(folder, report)
    with ExitStack() as opened:
        past = History(history, passphrase) if history else None
        listener = opened.enter_context(listen(port))
        port = listener.getsockname()[1]
        runtime = load(folder, threads=threads)
        opened.callback(runtime.close)
        runtime.remember(cache_bytes)
        log = opened.enter_context(closing(AuditLog(audit))) if audit else None
        desk = Desk(runtime, Front.load(folder), model, sampling or Sampling(), log, past, confidence)
        opened.callback(desk.turns.close)
        token = secrets.token_urlsafe(32)
        api = {"base_url": f"http://{HOST}:{port}/v1", "api_key": token}
        run(
            application(desk, token, port), listener, token, browser, as_json, api, lambda config: _Server(config, desk)
        )


def run(
    app: ASGIApp, listener: socket.socket, token: str, browser: bool, as_json: bool = False,
    api: Mapping[str, str] | None = None, server: Callable[[uvicorn.Config], uvicorn.Server] = uvicorn.Server,
) -> None:
    """Serve until Ctrl-C; prints one line with the address and the token, and opens a browser if wanted.

    as_json: print the page's address and `api`, what a program connects with, as one JSON object instead.
    """
    config = uvicorn.Config(
        app, access_log=False, log_level="warning", server_header=False, ws="none", lifespan="off",
        timeout_graceful_shutdown=1,
    )
    address = f"http://{HOST}:{listener.getsockname()[1]}/#token={token}"
    print(json.dumps({"page": address, **(api or {})}) if as_json else address, flush=True)
    with in_browser(address) if browser else nullcontext(), suppress(KeyboardInterrupt):  # the way to end it
        server(config).run(sockets=[listener])


def application(desk: Desk, token: str, port: int) -> ASGIApp:
    """The ASGI application; `port` is the one that browsers name in Host and Origin."""
    inner = Starlette(
        routes=[*own_files("ldrt_edge.chat"), _description(), *page.routes(desk), *completions.routes(desk)],
        max_body_size=_MOST_BODY_BYTES,
        exception_handlers={LdrtError: _refused, Busy: _busy, 404: _no_such, 405: _no_such_method, 413: _too_large},
    )
    return Guard(inner, token, port)


class Guard:
    """Lets in who names our host, comes from our page or from no page at all, and has the token."""

    def __init__(self, inner: Starlette, token: str, port: int) -> None:
        self._inner, self._token = inner, token.encode()
        self._hosts = {f"{name}:{port}".encode() for name in (HOST, "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        fault = self._fault(scope)
        if fault:
            await error_reply(*fault)(scope, receive, with_headers)
        else:
            await self._inner(scope, receive, with_headers)

    def _fault(self, scope: Scope) -> tuple[int, str] | None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        hosts = headers.get(b"host", [])
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return 421, "not the host that this server answers for"
        if any(origin != b"http://" + hosts[0] for origin in headers.get(b"origin", [])):
            return 403, "requests from other pages are refused"
        if not scope["path"].startswith(("/api/", "/v1/")):
            return None
        given = headers.get(b"authorization", [b""])[0].removeprefix(b"Bearer ")
        if not hmac.compare_digest(given, self._token):
            return 401, "the token is missing or wrong: it stands in the line that ldrt-edge printed at its start"
        return None


class _Server(uvicorn.Server):
    """Stops the answers before it waits for their readers to be done."""

    def __init__(self, config: uvicorn.Config, desk: Desk) -> None:
        super().__init__(config)
        self._desk = desk

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._desk.turns.stop()
        await super().shutdown(sockets)


def own_files(package: str) -> list[Route]:
    """The files of a page, from the folder `web` of a package, read now."""
    routes = []
    for file in resources.files(package).joinpath("web").iterdir():
        if media_type := _TYPES.get(Path(file.name).suffix):
            answer = _always(file.read_bytes(), media_type)
            routes.append(Route("/" if file.name == "index.html" else f"/{file.name}", answer))
    return routes


def _description() -> Route:
    """What programs may ask for, in OpenAPI's words."""
    told = yaml.safe_load(resources.files("ldrt_edge.chat").joinpath("openapi.yaml").read_bytes())
    return Route("/openapi.json", _always(json.dumps(told).encode(), "application/json"))


def _always(content: bytes, media_type: str) -> Callable[[Request], Response]:
    return lambda _: Response(content, media_type=media_type)


def _refused(_: Request, error: Exception) -> Response:
    statuses = {NotThere: 404, NotNow: 409, DataError: 400, ConfigError: 400}
    return error_reply(next((statuses[kind] for kind in type(error).mro() if kind in statuses), 500), str(error))


def _busy(_: Request, __: Exception) -> Response:
    text = "too many questions wait already: try again in a moment"
    return error_reply(429, text, {"retry-after": str(RETRY_AFTER_S)})


def _no_such(_: Request, __: Exception) -> Response:
    return error_reply(404, "there is nothing here")


def _no_such_method(request: Request, _: Exception) -> Response:
    routes = request.app.routes
    path = next(route.path for route in routes if route.matches(request.scope)[0] is not Match.NONE)
    allowed = sorted({method for route in routes if route.path == path for method in route.methods})
    return error_reply(405, f"there is only {', '.join(allowed)}", {"allow": ", ".join(allowed)})


def _too_large(_: Request, __: Exception) -> Response:
    return error_reply(413, f"too large: a picture file may have {MAX_BYTES >> 20} MiB")


def listen(port: int) -> socket.socket:
    """A listening socket on 127.0.0.1; port 0 takes any that is free.

    Raises:
        ConfigError: the port is taken.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()  # who comes before the server is ready waits
    except OSError as error:
        listener.close()
        raise ConfigError(f"port {port}: {error.strerror}: choose another with --port") from error
    return listener
