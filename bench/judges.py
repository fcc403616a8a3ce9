"""Who judges: a model behind an OpenAI-compatible endpoint, or one of our own artefacts on this machine.

    MODEL@http://127.0.0.1:8000/v1     any endpoint; the key is read from an environment variable
    FOLDER                             a gguf, mlx, merged or base artefact

An endpoint is asked for a reply that fits a JSON schema, of so many tokens, drawn so. Not every server knows all of
that: until the first reply has come, each refusal takes one thing away (`_Asks`); from then on all are asked alike. The
client retries what may pass (429, 5xx, time-outs, broken connections), with back-off and as `Retry-After` says; every
request counts against the budget. A local model is not asked to write: each valid reply is scored, and the likeliest
one counts, so it cannot be invalid, however small the model.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel

from ldrt_edge import artifact
from ldrt_edge.artifact import Json
from ldrt_edge.bench.rubric import VALID, Score, parse, response_format
from ldrt_edge.errors import ConfigError, LdrtError, require
from ldrt_edge.runtimes.base import log_softmax

_REPLY_TOKENS, _THINKING_TOKENS = 200, 2000
_REFUSALS = (400, 422, 500)  # of an option: llama-cpp-python's server may answer 500
_SHORT = 'Reply with one JSON object and nothing else: {"score": 0}'
_REPLY_ROOM = 24  # tokens that the longest valid reply may take
_AT = "@http"


class BudgetSpent(Exception):
    """No further request may be made."""


class Unreachable(LdrtError):
    """An endpoint that does not answer, after all retries."""


class Budget:
    """How many requests may be made in all; None for any number."""

    def __init__(self, most: int | None) -> None:
        self._most, self._changed = most, threading.Condition()
        self.used = 0
        self._spare = 0  # of those, set aside for retries

    def take(self, wanted: int) -> int:
        """Set aside up to `wanted` requests, at least one; waits for it while others may still give one back.

        Raises:
            BudgetSpent: there is none left.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._most is None or self.used < self._most or not self._spare)
            granted = wanted if self._most is None else min(wanted, self._most - self.used)
            if granted < 1:
                raise BudgetSpent
            self.used += granted
            self._spare += granted - 1
            return granted

    def close(self) -> None:
        """Let no further request be made."""
        with self._changed:
            self._most = 0

    def give_back(self, granted: int, unused: int) -> None:
        """Return what was set aside and not needed."""
        with self._changed:
            self.used -= unused
            self._spare -= granted - 1
            self._changed.notify_all()


class Judge(Protocol):
    """Replies to a text; `identity` is all that a reply depends on but the text."""

    name: str
    identity: dict[str, Json]
    parallel: bool

    def reply(self, text: str, schema: type[BaseModel], attempt: int, budget: Budget) -> str:
        """The reply; a later `attempt` is another draw, where the first was of no use."""
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


def open_judge(spec: str, key_variable: str, timeout_s: float, retries: int, threads: int | None) -> Judge:
    """The judge that a specification names.

    Raises:
        ConfigError: it is neither MODEL@URL nor a folder.
        ArtifactError: the folder is no model.
    """
    if _AT in spec:
        model, _, rest = spec.partition(_AT)
        return Endpoint(model, "http" + rest, key_variable, timeout_s, retries)
    if not Path(spec).is_dir():
        raise ConfigError(f"--judge {spec}: wants MODEL@URL (for instance qwen2-72b@http://host:8000/v1) or a folder")
    return Local(Path(spec), threads)


@dataclass(frozen=True)
class _Asks:
    """What is asked beside a text: of each thing, 0 for what we would like, up to what any server takes.

    format: the schema, any JSON object, nothing. room: `max_tokens`, or its newer name. draw: temperature and seed, or
    the server's own.
    """

    format: int = 0
    room: int = 0
    draw: int = 0

    def options(self, schema: type[BaseModel], attempt: int, tokens: int) -> dict[str, Json]:
        """As fields of a request."""
        formats: tuple[dict[str, Json], ...] = (
            {"response_format": response_format(schema)}, {"response_format": {"type": "json_object"}}, {},
        )  # fmt: skip
        rooms: tuple[dict[str, Json], ...] = ({"max_tokens": tokens}, {"max_completion_tokens": tokens})
        draws: tuple[dict[str, Json], ...] = ({"temperature": 0 if attempt == 0 else 0.7, "seed": attempt}, {})
        return {**formats[self.format], **rooms[self.room], **draws[self.draw]}

    def less(self, refusal: str) -> _Asks | None:
        """One thing less: one that the refusal names, or else the next; None where nothing is left to take away."""
        left = [name for name, (last, _) in _TAKEN_AWAY.items() if getattr(self, name) < last]
        named = [name for name in left if any(word in refusal for word in _TAKEN_AWAY[name][1])]
        for name in named or left:
            return replace(self, **{name: getattr(self, name) + 1})
        return None


_TAKEN_AWAY = {
    "format": (2, ("response_format", "json_schema")),
    "room": (1, ("max_tokens",)),
    "draw": (1, ("temperature", "seed")),
}
"""How far each thing of `_Asks` goes, and the words by which a server refuses it."""


class Endpoint:
    """A model behind an OpenAI-compatible chat API.

    Raises:
        ConfigError: no model or no address, or a key that cannot be sent.
    """

    parallel = True

    def __init__(self, model: str, url: str, key_variable: str, timeout_s: float, retries: int) -> None:
        if not model or not (host := _host(url)):
            raise ConfigError(f"--judge {model}@{url}: wants MODEL@URL")
        key = os.environ.get(key_variable) or "none"
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{key_variable}: no API key: it holds characters that no request can carry")
        self._openai = require("openai", "bench")
        self._refused = (self._openai.BadRequestError, self._openai.UnprocessableEntityError)
        self.name, self._retries = model, retries
        self.identity = {"model": model, "url": url}
        self._host = host
        self._client = self._openai.OpenAI(base_url=url, api_key=key, timeout=timeout_s)
        self._asks: _Asks | None = None  # until a first reply has come
        self._first = threading.Lock()
        self._tokens = _REPLY_TOKENS

    def reply(self, text: str, schema: type[BaseModel], attempt: int, budget: Budget) -> str:
        """The model's text; nothing where it refuses this text alone, for instance as too long.

        Raises:
            BudgetSpent: no request is left.
            Unreachable: it did not answer, or refuses all that is asked.
        """
        try:
            with self._first:  # the others wait until it is known what may be asked
                if self._asks is None:
                    return self._begin(text, schema, attempt, budget)
            return self._send(self._asks, text, schema, attempt, budget)
        except self._openai.APIError as error:  # time-outs and broken connections too
            if self._asks is not None and isinstance(error, self._refused):
                return ""
            raise Unreachable(f"judge {self.name} at {self._host}: {_one_line(error)}") from error

    def _begin(self, text: str, schema: type[BaseModel], attempt: int, budget: Budget) -> str:
        """The first reply; where even the barest request is refused, a short text tells whether any is taken."""
        try:
            return self._settle(text, schema, attempt, budget)
        except self._refused:
            self._settle(_SHORT, Score, 0, budget)
            raise

    def _settle(self, text: str, schema: type[BaseModel], attempt: int, budget: Budget) -> str:
        """A reply, asking for less as long as the server refuses; what it took is asked for from then on."""
        asks = _Asks()
        while True:
            try:
                said = self._send(asks, text, schema, attempt, budget)
            except self._openai.APIStatusError as error:
                less = asks.less(error.response.text) if error.status_code in _REFUSALS else None
                if less is None:
                    raise
                asks = less
            else:
                self._asks = asks
                return said

    def _send(self, asks: _Asks, text: str, schema: type[BaseModel], attempt: int, budget: Budget) -> str:
        granted = budget.take(1 + self._retries)
        unused = 0
        try:
            answer = self._client.with_options(max_retries=granted - 1).chat.completions.with_raw_response.create(
                model=self.name, messages=[{"role": "user", "content": text}],
                **asks.options(schema, attempt, self._tokens),
            )  # fmt: skip
            unused = granted - 1 - answer.retries_taken
            said, cut = _said(answer.content)
            if cut and parse(said, schema) is None:
                self._tokens = _THINKING_TOKENS  # it thinks before it replies
            return said
        except self._refused:
            unused, self._tokens = granted - 1, _REPLY_TOKENS  # so much may be more than there is room for
            raise
        finally:
            budget.give_back(granted, unused)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


class Local:
    """One of our model artefacts, asked without a picture."""

    parallel = False

    def __init__(self, folder: Path, threads: int | None) -> None:
        from ldrt_edge.front import Front
        from ldrt_edge.runtimes.base import load

        self._runtime, self._front = load(folder, threads=threads), Front.load(folder)
        self.name = folder.resolve().name
        self.identity = {"model": self.name, "manifest_sha256": artifact.read(folder).sha256}

    def reply(self, text: str, schema: type[BaseModel], attempt: int, budget: Budget) -> str:
        """The likeliest of the valid replies; nothing where the text is longer than the context.

        Raises:
            BudgetSpent: no request is left.
        """
        from ldrt_edge.front import Message

        budget.take(1)
        messages = [Message("user", text)]
        prompt = self._front.prompt(messages)
        if len(prompt.ids) + _REPLY_ROOM > self._runtime.context_length:
            return ""

        def logprob(reply: str) -> float:
            ids = self._front.answer_ids(messages, reply)
            told = log_softmax(self._runtime.score(prompt, ids))
            return float(told[np.arange(len(ids)), ids].sum())

        return max(VALID[schema], key=logprob)

    def close(self) -> None:
        """Free the model."""
        self._runtime.close()


def check_names(judges: Sequence[Judge]) -> None:
    """Refuse two judges of one name: they could not be told apart in the report.

    Raises:
        ConfigError: there are.
    """
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise ConfigError(f"--judge: {', '.join(sorted(names))}: each judge needs a name of its own")


def _host(url: str) -> str | None:
    """Host and port of an address; None where it has none, or is no address."""
    try:
        parts = urlsplit(url)
        return parts.netloc if parts.hostname and parts.port != 0 and url.isprintable() else None
    except ValueError:
        return None


def _said(body: bytes) -> tuple[str, bool]:
    """What the assistant said, and whether it was cut short; whatever else a server sends says nothing."""
    try:
        choice = json.loads(body)["choices"][0]
        content, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "", False
    return content if isinstance(content, str) else "", cut


def _one_line(error: Exception) -> str:
    more = error.__cause__ or getattr(error, "body", None)
    told = str(error) if " - " in str(error) or not more else f"{error} ({more})"  # the client has put in what it found
    return " ".join(told.split())[:200]
