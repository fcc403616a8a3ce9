"""OpenAI's chat-completions API: text and data-URL pictures in, whole or streamed answers out.

What the model cannot do is refused, not ignored. A system message has no place in LLaVA's templates, so it goes before
the question behind it. Requests of one `user` wait for each other, and so do all without one; different users take
turns. An answer that the server's end cuts off is an error, never half a completion.

Nobody is asked about text that is burned into a picture, since there is nobody to ask: a client that sends pictures
decides for itself, and what it sends is shown to the model as it is. The page and the terminal ask.

Source: https://platform.openai.com/docs/api-reference/chat (request, response and stream chunk objects).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import secrets
import time
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ldrt_edge.chat.desk import Desk
from ldrt_edge.chat.pictures import refuse_too_many
from ldrt_edge.chat.replies import aside, follow, json_reply, read_object, sampling_of, text_of
from ldrt_edge.chat.spelling import Spelled, Speller, joined
from ldrt_edge.chat.turns import Turn
from ldrt_edge.errors import ConfigError, DataError, LdrtError, NotThere
from ldrt_edge.front import Message
from ldrt_edge.image import read_image_bytes
from ldrt_edge.runtimes.base import FrontImage, Prompt, Sampling, check_room

_LOOK_EVERY_S = 0.25
_MOST_BODY_BYTES = 128 << 20
_KNOWN = {
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "seed", "logprobs", "user", "store", "metadata",
}
_HARMLESS: dict[str, tuple[object, ...]] = {
    "n": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "top_logprobs": (0,), "stop": ([], ""),
    "response_format": ({"type": "text"},), "logit_bias": ({},), "tools": ([],), "parallel_tool_calls": (True, False),
}
"""Options that say nothing when they have these values, or none."""


Piece = tuple[Spelled, ...]
"""Tokens whose text became certain."""


@dataclass
class Completion:
    """An answer to be written: what was asked, and the state of the answer.

    finish: why it ends there; None until it is whole.
    """

    prompt: Prompt
    question: str
    user: str
    sampling: Sampling
    stream: bool
    with_usage: bool
    with_logprobs: bool
    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    written: list[Spelled] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None

    @property
    def text(self) -> str:
        """What was written so far."""
        return joined(self.written)

    def keep(self, piece: Piece) -> Piece:
        """Add it to what was written."""
        self.written += piece
        return piece

    @property
    def usage(self) -> dict[str, object]:
        """Counts of tokens."""
        asked, written = len(self.prompt.ids), len(self.written)
        return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


def routes(desk: Desk) -> list[Route]:
    """The API's part of the server."""
    api = Api(desk)
    return [
        Route("/v1/models", api.models),
        Route("/v1/models/{name}", api.model),
        Route("/v1/chat/completions", api.complete, methods=["POST"], max_body_size=_MOST_BODY_BYTES),
    ]


class Api:
    """The endpoints."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def models(self, _: Request) -> Response:
        """The one model."""
        return json_reply({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The one model, by its name."""
        self._check_name(request.path_params["name"])
        return json_reply(self._model())

    async def complete(self, request: Request) -> Response:
        """An answer, whole or as it is written."""
        body = await read_object(request)
        self._check_name(body.get("model", self._desk.model.name))
        asked = await aside(_read, body, self._desk)
        turn = self._desk.take(f"api:{asked.user}", lambda: self._write(asked))
        if asked.stream:
            return follow(turn, _chunks(asked, turn.events()), "text/event-stream")
        written = asyncio.ensure_future(_wait_for(turn))
        while not (await asyncio.wait({written}, timeout=_LOOK_EVERY_S))[0]:
            if await request.is_disconnected():
                turn.stop()
        written.result()
        _refuse_half(asked)
        return json_reply(_whole(asked))

    def _write(self, asked: Completion) -> Generator[Piece, None, None]:
        front, runtime = self._desk.front, self._desk.runtime
        speller = Speller(front.tokenizer)
        try:
            for token in runtime.generate(asked.prompt, asked.sampling):
                yield asked.keep(speller.add(token))
            yield asked.keep(speller.finish())
            limit = min(asked.sampling.max_tokens, runtime.context_length - len(asked.prompt.ids))
            asked.finish = "stop" if len(asked.written) < limit else "length"
        finally:
            if asked.text:
                self._desk.record([image.sha256 for image in asked.prompt.images], asked.question, asked.text)

    def _model(self) -> dict[str, object]:
        return {"id": self._desk.model.name, "object": "model", "created": 0, "owned_by": "ldrt-edge",
                "unreleased": self._desk.model.unreleased}  # fmt: skip

    def _check_name(self, name: object) -> None:
        if name != self._desk.model.name:
            raise NotThere(f"model: there is only {self._desk.model.name!r} here")


async def _wait_for(turn: Turn[Piece]) -> None:
    async for _ in turn.events():
        pass


def _refuse_half(asked: Completion) -> None:
    if asked.finish is None:
        raise LdrtError("the answer was stopped before it was whole: the server ends")


def _read(body: Mapping[str, Any], desk: Desk) -> Completion:
    """Check a request and prepare its prompt.

    Raises:
        DataError: something in it is wrong, or cannot be done here.
    """
    for name, value in body.items():
        if name not in _KNOWN and value is not None and value not in _HARMLESS.get(name, ()):
            raise DataError(f"{name}: this server cannot do that; leave it out")
    most = next((body[name] for name in ("max_completion_tokens", "max_tokens") if body.get(name) is not None), None)
    messages = _messages(body.get("messages"), desk)
    prompt = desk.front.prompt(messages)
    check_room(prompt, 1, desk.runtime.context_length)
    options = body.get("stream_options")
    return Completion(
        prompt=prompt,
        question=messages[-1].text,
        user=text_of(body.get("user") or "", "user"),
        sampling=sampling_of({**body, "max_tokens": most}, desk.sampling),
        stream=body.get("stream") is True,
        with_usage=isinstance(options, dict) and options.get("include_usage") is True,
        with_logprobs=body.get("logprobs") is True,
        model=desk.model.name,
    )


def _messages(listed: object, desk: Desk) -> list[Message]:
    if not isinstance(listed, list) or not listed:
        raise DataError("messages: wants a list of messages")
    found: list[Message] = []
    images: list[FrontImage] = []  # of all of them
    before: list[str] = []
    for message in listed:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "developer", "user", "assistant"):
            raise DataError(f"messages: a message of role {role!r}; there are system, user and assistant")
        shown = len(images)
        text = _content(message.get("content"), desk, images)
        if role in ("system", "developer"):
            if len(images) > shown:
                raise DataError("messages: a system message has no pictures: put them before a question")
            before.append(text)
            continue
        if role == "user" and before:
            text, before = "\n\n".join([*before, text]), []
        found.append(Message(role, text, tuple(images[shown:])))
    if before:
        raise DataError("messages: a system message has no question behind it: put it before the last one")
    return found


def _content(content: object, desk: Desk, images: list[FrontImage]) -> str:
    """Its text; its pictures are put behind `images`."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise DataError("messages: content wants text, or a list of parts")
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(text_of(part.get("text"), "messages"))
        elif kind == "image_url" and isinstance(part.get("image_url"), dict):
            images.append(desk.front.image(read_image_bytes(_data_url(part["image_url"].get("url"))).rgb))
            refuse_too_many(images, desk.runtime.context_length)
        else:
            raise DataError(f"messages: a part of type {kind!r}; there are text and image_url")
    return "\n".join(texts)


def _data_url(url: object) -> bytes:
    """The bytes of data:…;base64,… (RFC 2397); nothing is ever fetched."""
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise DataError("image_url: wants a data URL (data:image/png;base64,…); nothing is fetched from elsewhere")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise DataError("image_url: its base64 is damaged") from None


def _whole(asked: Completion) -> dict[str, object]:
    choice = {
        "index": 0, "message": {"role": "assistant", "content": asked.text, "refusal": None},
        "finish_reason": asked.finish, "logprobs": _logprobs(asked, asked.written),
    }
    return _head(asked, "chat.completion") | {"choices": [choice], "usage": asked.usage}


async def _chunks(asked: Completion, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
    head = _head(asked, "chat.completion.chunk") | ({"usage": None} if asked.with_usage else {})

    def chunk(delta: Mapping[str, object], finish: str | None = None, made: Piece = ()) -> str:
        logprobs = _logprobs(asked, made)
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return _event(head | {"choices": [choice]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for piece in pieces:
            yield chunk({"content": joined(piece)}, made=piece)
        _refuse_half(asked)
        yield chunk({}, asked.finish)
        if asked.with_usage:
            yield _event(head | {"choices": [], "usage": asked.usage})
    except LdrtError as error:
        yield _event(_error(error))
    yield "data: [DONE]\n\n"


def _logprobs(asked: Completion, tokens: Sequence[Spelled]) -> dict[str, object] | None:
    if not asked.with_logprobs:
        return None
    told = [
        {
            "token": token.spelled.decode("utf-8", "backslashreplace"), "logprob": token.logprob,
            "bytes": list(token.spelled), "top_logprobs": [],
        }
        for token in tokens
    ]
    return {"content": told, "refusal": None}


def _head(asked: Completion, kind: str) -> dict[str, object]:
    return {"id": asked.id, "object": kind, "created": asked.created, "model": asked.model}


def _error(error: LdrtError) -> dict[str, object]:
    kind = "invalid_request_error" if isinstance(error, (DataError, ConfigError)) else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": None}}


def _event(value: Mapping[str, object]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
