"""Who writes instruction data: any OpenAI-compatible endpoint, or a model of ours on this machine.

Answers are kept in a file as they come, by a hash of the request: a run that was killed, or whose budget was spent,
goes on without asking again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ldrt_edge.errors import DataError, RuntimeLoadError, require

API_KEY = "LDRT_EDGE_API_KEY"
MAX_TOKENS = 900
_RETRIES = 5
_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Request:
    """What is asked: instructions, text, and the try (another try draws another answer)."""

    system: str
    user: str
    attempt: int = 0

    def key(self, generator: str) -> str:
        """What an answer is kept under."""
        text = json.dumps([generator, self.system, self.user, self.attempt], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """What came back, and what it cost."""

    text: str
    tokens: int


class Generator(Protocol):
    """Something that answers; `name` identifies it in the manifest."""

    name: str

    def ask(self, request: Request) -> Reply:
        """One answer."""

    def close(self) -> None:
        """Let go of it."""


def open_generator(where: str, model: str | None) -> Generator:
    """The generator at `where`: an http(s) address, or a model folder."""
    if where.startswith(("http://", "https://")):
        return Endpoint(where, model)
    return Local(Path(where))


class Endpoint:
    """An OpenAI-compatible chat endpoint; the key comes from the environment (LDRT_EDGE_API_KEY).

    Raises:
        RuntimeLoadError: it does not answer, or names no model.
    """

    def __init__(self, address: str, model: str | None) -> None:
        openai: Any = require("openai", "train")
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=address, api_key=os.environ.get(API_KEY, "none"), max_retries=_RETRIES, timeout=_TIMEOUT_S
        )
        self._address = address
        self._structured = True
        if model is None:
            models = self._call(lambda: [one.id for one in self._client.models.list()])
            if len(models) != 1:
                listed = ", ".join(models[:8]) or "none"
                raise RuntimeLoadError(f"{address} has {len(models)} models ({listed}): choose one with --model")
            model = models[0]
        self.name = model

    def ask(self, request: Request) -> Reply:
        """One answer, as JSON where the endpoint can be held to it."""
        messages = [{"role": "system", "content": request.system}, {"role": "user", "content": request.user}]
        options: dict[str, Any] = {
            "model": self.name, "messages": messages, "max_tokens": MAX_TOKENS, "seed": request.attempt,
            "temperature": 0.2 + 0.3 * request.attempt,
        }
        if self._structured:
            try:
                return self._complete(options | {"response_format": {"type": "json_object"}})
            except self._openai.BadRequestError:
                self._structured = False  # an endpoint that does not know it: our check of the answer stays
        try:
            return self._complete(options)
        except self._openai.BadRequestError:
            return Reply("", 0)  # this text is not taken: too long, or with a control token in it

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def _complete(self, options: dict[str, Any]) -> Reply:
        try:
            done = self._client.chat.completions.create(**options)
        except self._openai.BadRequestError:
            raise
        except self._openai.OpenAIError as error:
            raise self._unanswered(error) from error
        usage = done.usage.total_tokens if done.usage else 0
        return Reply((done.choices[0].message.content or "") if done.choices else "", int(usage))

    def _call(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except self._openai.OpenAIError as error:
            raise self._unanswered(error) from error

    def _unanswered(self, error: Exception) -> RuntimeLoadError:
        said = " ".join(str(error).split())[:200]
        return RuntimeLoadError(f"{self._address} did not answer ({said}); the same command goes on where it stopped")


class Local:
    """A model folder on this machine, asked without a picture."""

    def __init__(self, folder: Path) -> None:
        from ldrt_edge import artifact
        from ldrt_edge.front import Front
        from ldrt_edge.runtimes.base import load

        identity = artifact.identity(folder)
        self.name = f"{identity.kind} {identity.manifest_sha256[:16]}"
        self._runtime, self._front = load(folder), Front.load(folder)
        self._lock = threading.Lock()

    def ask(self, request: Request) -> Reply:
        """One answer; one at a time."""
        from ldrt_edge.chat.session import Session
        from ldrt_edge.runtimes.base import Sampling

        temperature = 0.0 if not request.attempt else 0.3 * request.attempt
        sampling = Sampling(max_tokens=MAX_TOKENS, temperature=temperature, seed=request.attempt)
        with self._lock:
            session = Session(self._runtime, self._front, sampling)
            try:
                text = "".join(session.ask(f"{request.system}\n\n{request.user}"))
            except DataError:
                return Reply("", 0)  # this text is not taken: too long, or with a control token in it
            return Reply(text, session.exchanges[-1].tokens if session.exchanges else 0)

    def close(self) -> None:
        """Free the model."""
        self._runtime.close()


@dataclass
class Budget:
    """How much may still be asked; None is no limit."""

    requests: int | None = None
    tokens: int | None = None
    spent_requests: int = 0
    spent_tokens: int = 0

    def check(self) -> None:
        """Refuse to ask when it is spent.

        Raises:
            DataError: it is.
        """
        if self.requests is not None and self.spent_requests >= self.requests:
            raise DataError(f"the budget of {self.requests} requests is spent: the same command goes on, with another")
        if self.tokens is not None and self.spent_tokens >= self.tokens:
            raise DataError(f"the budget of {self.tokens} tokens is spent: the same command goes on, with another")


@dataclass
class Answers:
    """A generator's answers, kept on disk; asked once each."""

    path: Path
    generator: Generator
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        try:
            self._base = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._base.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID")
        except sqlite3.Error as error:
            raise DataError(f"{self.path}: not a file of kept answers ({error})") from error

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._base.close()

    def get(self, request: Request) -> str:
        """The answer to a request: the kept one, or a new one.

        Raises:
            DataError: the budget is spent.
            RuntimeLoadError: the generator does not answer.
        """
        key = request.key(self.generator.name)
        with self._lock:
            kept = self._base.execute("SELECT text FROM answers WHERE key = ?", (key,)).fetchone()
            if kept is not None:
                return str(kept[0])
            self.budget.check()
            self.budget.spent_requests += 1
        reply = self.generator.ask(request)
        with self._lock:
            self.budget.spent_tokens += reply.tokens
            self._base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, reply.text))
        return reply.text


def first_valid(requests: Sequence[Request], answers: Answers, check: Callable[[str], Any]) -> Any:
    """The first answer that `check` accepts (it returns something but None), or None."""
    for request in requests:
        found = check(answers.get(request))
        if found is not None:
            return found
    return None
