"""Who judges: a model behind an OpenAI-compatible endpoint, or one of our own artefacts on this machine.

    MODEL@http://127.0.0.1:8000/v1     any endpoint; the key is read from an environment variable
    FOLDER                             a gguf, mlx, merged or base artefact

An endpoint is asked with the reply's JSON schema, and without it where it does not know that. The client retries what
may pass (429, 5xx, time-outs, broken connections), with back-off and as `Retry-After` says; every request counts
against the budget. A local model is not asked to write: each valid reply is scored, and the likeliest one counts, so it
cannot be invalid, however small the model.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel

from ldrt_edge import artifact
from ldrt_edge.artifact import Json
from ldrt_edge.bench.rubric import VALID, response_format
from ldrt_edge.errors import ConfigError, LdrtError, require
from ldrt_edge.runtimes.base import log_softmax

_REPLY_TOKENS = 200
_REPLY_ROOM = 24  # tokens that the longest valid reply may take
_AT = "@http"


class BudgetSpent(Exception):
    """No further request may be made."""


class Unreachable(LdrtError):
    """An endpoint that does not answer, after all retries."""


class Budget:
    """How many requests may be made in all; None for any number."""

    def __init__(self, most: int | None) -> None:
        self._most, self._lock = most, threading.Lock()
        self.used = 0

    def take(self, wanted: int) -> int:
        """Set aside up to `wanted` requests, at least one.

        Raises:
            BudgetSpent: there is none left.
        """
        with self._lock:
            granted = wanted if self._most is None else min(wanted, self._most - self.used)
            if granted < 1:
                raise BudgetSpent
            self.used += granted
            return granted

    def close(self) -> None:
        """Let no further request be made."""
        with self._lock:
            self._most = 0

    def give_back(self, unused: int) -> None:
        """Return what was set aside and not needed."""
        with self._lock:
            self.used -= unused


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


class Endpoint:
    """A model behind an OpenAI-compatible chat API."""

    parallel = True

    def __init__(self, model: str, url: str, key_variable: str, timeout_s: float, retries: int) -> None:
        if not model or not urlsplit(url).hostname:
            raise ConfigError(f"--judge {model}@{url}: wants MODEL@URL")
        self._openai = require("openai", "bench")
        self.name, self._retries = model, retries
        self.identity = {"model": model, "url": url}
        self._host = urlsplit(url).netloc
        self._client = self._openai.OpenAI(
            base_url=url, api_key=os.environ.get(key_variable) or "none", timeout=timeout_s
        )
        self._knows_schemas, self._answered = True, False

    def reply(self, text: str, schema: type[BaseModel], attempt: int, budget: Budget) -> str:
        """The model's text; nothing where it refuses this text alone, for instance as too long.

        Raises:
            BudgetSpent: no request is left.
            Unreachable: it did not answer, or refuses all that is asked.
        """
        openai = self._openai
        try:
            if self._knows_schemas:
                try:
                    return self._send(text, attempt, budget, response_format=response_format(schema))
                except openai.BadRequestError:
                    self._knows_schemas = False  # an older server, or ours: it is told in words as well
            return self._send(text, attempt, budget)
        except openai.APIError as error:  # time-outs and broken connections too
            if self._answered and isinstance(error, openai.BadRequestError):
                return ""
            raise Unreachable(f"judge {self.name} at {self._host}: {_one_line(error)}") from error

    def _send(self, text: str, attempt: int, budget: Budget, **options: Json) -> str:
        granted = budget.take(1 + self._retries)
        unused = 0
        try:
            answer = self._client.with_options(max_retries=granted - 1).chat.completions.with_raw_response.create(
                model=self.name, messages=[{"role": "user", "content": text}], max_tokens=_REPLY_TOKENS,
                temperature=0 if attempt == 0 else 0.7, seed=attempt, **options,
            )  # fmt: skip
            unused, self._answered = granted - 1 - answer.retries_taken, True
            return _text(answer.content)
        except self._openai.BadRequestError:
            unused = granted - 1
            raise
        finally:
            budget.give_back(unused)

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


def _text(body: bytes) -> str:
    """What the assistant said; whatever else a server sends is no reply, which is an answer too."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return content if isinstance(content, str) else ""


def _one_line(error: Exception) -> str:
    told = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
    return " ".join(told.split())[:200]
