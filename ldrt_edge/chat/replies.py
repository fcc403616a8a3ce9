"""How the server answers: JSON, PNG, errors in OpenAI's shape, and what a turn of the model makes, as it comes."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ldrt_edge.chat.turns import Turn
from ldrt_edge.errors import DataError
from ldrt_edge.runtimes.base import Sampling

T = TypeVar("T")
_TYPES_OF_ERRORS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 409: "conflict_error",
    429: "rate_limit_error", 500: "server_error",
}


def json_reply(value: object) -> Response:
    """Any JSON value."""
    return Response(json.dumps(value, ensure_ascii=False), media_type="application/json")


def json_line(value: Mapping[str, object]) -> str:
    """One event of a stream."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def png_reply(content: bytes, about: Mapping[str, object]) -> Response:
    """A picture, and what is to be known about it in the header X-Picture, as JSON."""
    return Response(content, media_type="image/png", headers={"x-picture": json.dumps(about)})


def error_reply(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as OpenAI's API words it."""
    kind = _TYPES_OF_ERRORS.get(status, "invalid_request_error")
    body = {"error": {"message": text, "type": kind, "param": None, "code": None}}
    return JSONResponse(body, status, headers)


def follow(turn: Turn[Any], lines: AsyncIterator[str], media_type: str) -> Response:
    """Send what a turn makes; a client that leaves stops it and frees its place."""

    class Following(StreamingResponse):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                turn.stop()

    async def one_by_one() -> AsyncIterator[str]:
        async for line in lines:
            yield line
            await asyncio.sleep(0)  # lets the server hear that the client left, before it writes to nobody

    return Following(one_by_one(), media_type=media_type)


async def read_object(request: Request) -> dict[str, Any]:
    """A request's JSON object.

    Raises:
        DataError: it has none.
    """
    try:
        body = json.loads(await request.body(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise DataError("the request wants a JSON object")
    return body


def text_of(value: object, name: str) -> str:
    """A text out of a request.

    Raises:
        DataError: it is none, or has half a character in it.
    """
    if not isinstance(value, str) or any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{name}: wants text")
    return value


def number_of(value: object, name: str) -> float:
    """A number out of a request.

    Raises:
        DataError: it is none, or not finite.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > sys.float_info.max:
        raise DataError(f"{name}: wants a number")
    return value


def whole_of(value: object, name: str) -> int:
    """A whole number out of a request: 3, or 3.0, which JSON does not tell apart.

    Raises:
        DataError: it is none.
    """
    number = number_of(value, name)
    if number != int(number):
        raise DataError(f"{name}: wants a whole number")
    return int(number)


def sampling_of(body: Mapping[str, object], default: Sampling) -> Sampling:
    """What a request says of `default`; null says nothing.

    Raises:
        DataError: something is no number.
        ConfigError: a number is out of its bounds.
    """
    named = {name: body[name] for name in ("max_tokens", "temperature", "top_p", "seed") if body.get(name) is not None}
    read = {"max_tokens": whole_of, "seed": whole_of}
    given: Any = {name: read.get(name, number_of)(value, name) for name, value in named.items()}
    return replace(default, **given)


async def aside(work: Callable[..., T], *arguments: object) -> T:
    """Run what takes long beside the event loop."""
    return await run_in_threadpool(work, *arguments)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are not JSON
