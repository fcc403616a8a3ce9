"""Who writes instruction data: any OpenAI-compatible endpoint, or a model of ours on this machine.

Answers are kept in a file as they come, by a hash of the request: a run that was killed, or whose budget was spent,
goes on without asking again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeVar

from ldrt_edge import console
from ldrt_edge.errors import DataError, RuntimeLoadError, require

API_KEY = "LDRT_EDGE_API_KEY"
MAX_TOKENS = 900
_RETRIES = 5
_TIMEOUT_S = 300.0
_BYTES_A_TOKEN = 4  # where an endpoint does not tell: of English, and near to it of other scripts
_GOES_ON = "the same command goes on where it stopped"

T = TypeVar("T")


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
        RuntimeLoadError: it does not answer, not as such an endpoint does, or names no model.
    """

    def __init__(self, address: str, model: str | None) -> None:
        openai: Any = require("openai", "train")
        self._openai = openai
        self._refused = (openai.BadRequestError, openai.UnprocessableEntityError)
        self._client = openai.OpenAI(
            base_url=address, api_key=os.environ.get(API_KEY, "none"), max_retries=_RETRIES, timeout=_TIMEOUT_S
        )
        self._address = address
        self._structured, self._told = True, False
        if model is None:
            try:
                models = self._asked(self._client.models.with_raw_response.list, {}, _models)
            except self._refused as error:
                raise RuntimeLoadError(f"{address} does not tell its models ({_short(error)}): set --model") from error
            if len(models) != 1:
                listed = ", ".join(models[:8]) or "none"
                raise RuntimeLoadError(f"{address} has {len(models)} models ({listed}): choose one with --model")
            model = models[0]
        self.name = model

    def ask(self, request: Request) -> Reply:
        """One answer, as JSON where the endpoint can be held to it; "" for a text that it does not take.

        Raises:
            RuntimeLoadError: it does not answer, or again and again with what is no answer.
        """
        messages = [{"role": "system", "content": request.system}, {"role": "user", "content": request.user}]
        options: dict[str, Any] = {
            "model": self.name, "messages": messages, "max_tokens": MAX_TOKENS, "seed": request.attempt,
            "temperature": 0.2 + 0.3 * request.attempt,
        }
        create = self._client.chat.completions.with_raw_response.create
        structured = self._structured
        if structured:
            try:
                return self._asked(create, options | {"response_format": {"type": "json_object"}}, _completion(request))
            except self._refused:
                pass  # it does not know that option, then our check of the answer stays; or does not take this text
        try:
            reply = self._asked(create, options, _completion(request))
        except self._refused as error:  # this text is too long, or has a control token in it
            if not self._told:
                console.say(f"{self._address} does not take every text: {_short(error)}")
            self._told = True
            return Reply("", 0)
        if structured:
            self._structured = False
        return reply

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def _asked(self, call: Callable[..., Any], options: dict[str, Any], read: Callable[[Any], T | None]) -> T:
        """What `read` makes of the JSON in a reply; asked again where that is nothing."""
        body = ""
        for attempt in range(_RETRIES + 1):
            time.sleep(_wait_s(attempt))
            try:
                body = call(**options).text
                found = read(json.loads(body))
            except self._refused:
                raise
            except self._openai.OpenAIError as error:
                raise RuntimeLoadError(f"{self._address} did not answer ({_short(error)}); {_GOES_ON}") from error
            except (ValueError, RecursionError):
                continue
            if found is not None:
                return found
        said = _short(body) or "nothing"
        raise RuntimeLoadError(f"{self._address} does not answer as an OpenAI endpoint does ({said}); {_GOES_ON}")


def _models(body: Any) -> list[str] | None:
    try:
        return [str(one["id"]) for one in body["data"]]
    except (KeyError, TypeError):
        return None


def _completion(request: Request) -> Callable[[Any], Reply | None]:
    def read(body: Any) -> Reply | None:
        try:
            said = body["choices"][0]["message"]["content"]
            if isinstance(said, list):  # of parts
                said = "".join(part["text"] for part in said)
            text = (said or "").encode("utf-8", "replace").decode()
        except (KeyError, IndexError, TypeError, AttributeError):
            return None
        usage = body.get("usage")
        told = usage.get("total_tokens") if isinstance(usage, dict) else None
        asked = len(f"{request.system}{request.user}{text}".encode())
        return Reply(text, told if type(told) is int and told > 0 else -(-asked // _BYTES_A_TOKEN))

    return read


def _wait_s(attempt: int) -> float:
    return min(0.5 * 2 ** (attempt - 1), 8.0) if attempt else 0.0


def _short(said: object) -> str:
    return " ".join(str(said).split())[:200]


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
            self.path.touch()  # SQLite does not say why it cannot make a file
            self._base = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            self._base.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT) WITHOUT ROWID")
        except (sqlite3.Error, OSError) as error:
            self._failed(error)

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._base.close()

    def get(self, request: Request) -> str:
        """The answer to a request: the kept one, or a new one, which is kept unless it is empty.

        Raises:
            DataError: the budget is spent, or the answer cannot be kept.
            RuntimeLoadError: the generator does not answer.
        """
        key = request.key(self.generator.name)
        with self._lock:
            kept = self._query("SELECT text FROM answers WHERE key = ? AND text != ''", key).fetchone()
            if kept is not None:
                return str(kept[0])
            self.budget.check()
            self.budget.spent_requests += 1
        reply = self.generator.ask(request)
        with self._lock:
            self.budget.spent_tokens += reply.tokens
            if reply.text:
                self._query("INSERT OR REPLACE INTO answers VALUES (?, ?)", key, reply.text)
        return reply.text

    def _query(self, command: str, *values: str) -> sqlite3.Cursor:
        try:
            return self._base.execute(command, values)
        except sqlite3.Error as error:
            self._failed(error)

    def _failed(self, error: sqlite3.Error | OSError) -> NoReturn:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest says in which system call
        no_room = code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)  # for its journal
        if no_room or getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DataError(f"{self.path}: disk full: free some space, then run this again") from error
        if isinstance(error, OSError) or code == sqlite3.SQLITE_READONLY:
            said = getattr(error, "strerror", error)
            raise DataError(f"{self.path}: answers cannot be kept here ({said}): choose another --cache") from error
        raise DataError(f"{self.path}: not a file of kept answers ({error})") from error


def first_valid(requests: Sequence[Request], answers: Answers, check: Callable[[str], Any]) -> Any:
    """The first answer that `check` accepts (it returns something but None), or None."""
    for request in requests:
        found = check(answers.get(request))
        if found is not None:
            return found
    return None
