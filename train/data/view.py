"""`data view`: a local page to leaf through pairs and strike bad ones; the strikes are a file for the next build.

The page listens on 127.0.0.1 and wants the token of its start, like the chat's. It changes nothing in the artefact:
each decision is a line in the strikes file (`data curate --strikes FILE`), synced as it is made.
"""

from __future__ import annotations

import json
import os
import secrets
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ldrt_edge.chat.replies import error_reply, json_reply, read_object
from ldrt_edge.chat.server import Guard, listen, own_files, run
from ldrt_edge.errors import DataError, LdrtError
from ldrt_edge.train.data.curate import as_text, read_strikes
from ldrt_edge.train.data.pairs import Pair, Pairs, parse_pair

_PICTURES = {".png": "image/png", ".jpg": "image/jpeg"}
_REASON_LIMIT, _BODY_LIMIT_BYTES = 300, 64 << 10


def view(pairs: Path, strikes: Path, port: int = 0, browser: bool = False, as_json: bool = False) -> None:
    """Serve the page until Ctrl-C; prints one line with the address and the token.

    Raises:
        LdrtError: no pairs, a strikes file that is none, or the port is taken.
    """
    desk = Desk(pairs, strikes)
    with closing(listen(port)) as listener:
        token = secrets.token_urlsafe(32)
        run(application(desk, token, listener.getsockname()[1]), listener, token, browser, as_json)


class Desk:
    """The pairs (their byte offsets in memory, no more) and the strikes."""

    def __init__(self, pairs: Path, strikes: Path) -> None:
        self._pairs = Pairs(pairs)
        self._offsets: list[int] = []
        offset = 0
        with self._pairs.path.open("rb") as stream:
            for line in stream:
                self._offsets.append(offset)
                offset += len(line)
        if not self._offsets:
            raise DataError(f"{pairs}: no pairs to look at")
        self._file = strikes
        self.strikes = read_strikes(strikes) if strikes.exists() else {}

    def __len__(self) -> int:
        return len(self._offsets)

    def pair(self, number: int) -> Pair:
        """The pair of that number, from 0.

        Raises:
            DataError: there is none, or its line is damaged.
        """
        if not 0 <= number < len(self._offsets):
            raise DataError(f"no pair {number}: there are {len(self._offsets)}")
        with self._pairs.path.open("rb") as stream:
            stream.seek(self._offsets[number])
            return parse_pair(stream.readline(), f"pair {number}")

    def picture(self, number: int) -> tuple[bytes, str]:
        """The pair's picture and its media type."""
        path = self._pairs.image_path(self.pair(number))
        return path.read_bytes(), _PICTURES.get(path.suffix, "application/octet-stream")

    def strike(self, number: int, struck: bool, reason: str) -> None:
        """Strike a pair, or take it back; on disk before this returns.

        Raises:
            DataError: no such pair, or the file cannot be written.
        """
        identity, said = self.pair(number).id, as_text(reason[:_REASON_LIMIT])
        line = json.dumps({"id": identity, "struck": struck, "reason": said}, ensure_ascii=False) + "\n"
        try:
            with self._file.open("a+b") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
                if stream.read(1) not in (b"", b"\n"):
                    stream.write(b"\n")  # an editor left the last line without its end
                stream.write(line.encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise DataError(f"{self._file}: cannot be written ({error.strerror})") from error
        if struck:
            self.strikes[identity] = said
        else:
            self.strikes.pop(identity, None)


def application(desk: Desk, token: str, port: int) -> ASGIApp:
    """The ASGI application; `port` is the one that browsers name in Host and Origin."""

    async def about(_: Request) -> Response:
        return json_reply({"pairs": len(desk), "struck": len(desk.strikes)})

    async def pair(request: Request) -> Response:
        found = desk.pair(request.path_params["number"])
        reason = desk.strikes.get(found.id)
        return json_reply({**asdict(found), "struck": reason is not None, "reason": reason or ""})

    async def picture(request: Request) -> Response:
        content, media_type = desk.picture(request.path_params["number"])
        return Response(content, media_type=media_type)

    async def strike(request: Request) -> Response:
        body = await read_object(request)
        struck, reason = body.get("struck"), body.get("reason", "")
        if not isinstance(struck, bool) or not isinstance(reason, str):
            raise DataError("struck is true or false, reason is a text")
        desk.strike(request.path_params["number"], struck, " ".join(reason.split()))
        return await about(request)

    async def refused(_: Request, error: Exception) -> Response:
        return error_reply(400, str(error))

    routes = [
        Route("/api/about", about), Route("/api/pairs/{number:int}", pair),
        Route("/api/pairs/{number:int}/picture", picture),
        Route("/api/pairs/{number:int}/strike", strike, methods=["POST"]),
    ]
    handlers = {LdrtError: refused}
    every = [*own_files("ldrt_edge.train.data"), *routes]
    inner = Starlette(routes=every, max_body_size=_BODY_LIMIT_BYTES, exception_handlers=handlers)
    return Guard(inner, token, port)
