"""What is open before one model: its queue, the pictures, the conversations; in memory, but for an opt-in history."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ldrt_edge import artifact
from ldrt_edge.bundle.open import unreleased
from ldrt_edge.chat.audit import AuditLog
from ldrt_edge.chat.history import History
from ldrt_edge.chat.pictures import Pictures, Shot
from ldrt_edge.chat.session import Session
from ldrt_edge.chat.turns import Turn, Turns
from ldrt_edge.confidence import Confidence
from ldrt_edge.errors import DataError, LdrtError
from ldrt_edge.front import Front
from ldrt_edge.release import Verdict, read_verdict
from ldrt_edge.runtimes.base import Runtime, Sampling

T = TypeVar("T")
_MOST_CONVERSATIONS = 100


@dataclass(frozen=True)
class Model:
    """What the page and the API say of the model.

    type: of its weights ("Q4_K_M"), if its manifest says. fidelity: how far its export's tokens are from the model it
    was made of, as `convert` measured it: mean_kld, top1_agreement and on how many tokens. verdict: on its loss, of one
    that was quantised to a budget. unreleased: why it is not.
    """

    name: str
    identity: artifact.Input
    type: str | None
    fidelity: dict[str, float] | None
    verdict: Verdict | None
    unreleased: str | None

    @classmethod
    def of(cls, folder: Path) -> Model:
        """Read a model artefact's manifest."""
        manifest = artifact.read(folder)
        measured = manifest.metrics.get("fidelity") or {}
        fidelity = {name: measured[name] for name in ("mean_kld", "top1_agreement", "tokens") if name in measured}
        return cls(
            folder.resolve().name, artifact.identity(folder), manifest.config.get("type"), fidelity or None,
            read_verdict(manifest.metrics), unreleased(folder),
        )  # fmt: skip


@dataclass
class Conversation:
    """A session, and the answer that is being written in it."""

    name: str
    session: Session
    turn: Turn[dict[str, object]] | None = None

    @property
    def writing(self) -> bool:
        """Whether an answer is being written, or waits for its turn."""
        return self.turn is not None and not self.turn.ended


class Desk:
    """One model, and what is open before it.

    Raises:
        DataError: the history cannot be read.
    """

    def __init__(
        self, runtime: Runtime, front: Front, model: Model, sampling: Sampling, audit: AuditLog | None = None,
        history: History | None = None, confidence: Confidence | None = None,
    ) -> None:
        self.runtime, self.front, self.model, self.sampling, self.audit = runtime, front, model, sampling, audit
        self.confidence = confidence
        self.turns, self._reading = Turns(runtime), None  # type: Turns, Turn[None] | None
        self._read: tuple[Shot, ...] = ()  # the pictures of `_reading`
        self.pictures = Pictures()
        self.conversations: dict[str, Conversation] = {}
        self.history, self._keeping = history, threading.Lock()
        for name, exchanges in history.read(model.identity, _MOST_CONVERSATIONS) if history else ():
            self.conversations[name] = Conversation(name, self._session())
            self.conversations[name].session.exchanges = exchanges

    def take(
        self, client: str, work: Callable[[], Generator[T | None, None, None]], pictures: Sequence[Shot] = ()
    ) -> Turn[T]:
        """Put work about pictures at the end of a client's queue; what is read ahead for other work gives way.

        See `Turns.take`.
        """
        self._make_way(client, pictures)
        return self.turns.take(client, work)

    def read_ahead(
        self, conversation: Conversation, read: Callable[[], Generator[None, None, None]], pictures: Sequence[Shot] = ()
    ) -> None:
        """Let the model read about pictures while a question is thought of, if it has nothing else to do.

        It gives way where `read` yields, and where the runtime can be interrupted.
        """
        self._make_way(conversation.name, pictures)

        def work() -> Generator[None, None, None]:
            # what cannot be read now will say so when it is asked about
            with suppress(LdrtError):
                if self.is_open(conversation):
                    yield from read()

        if self.turns.idle:
            self._reading, self._read = self.turns.take(conversation.name, work), tuple(pictures)

    def opened(self) -> list[Conversation]:
        """Those that are open now, the oldest first."""
        return list(self.conversations.copy().values())  # copied at once: other threads forget theirs meanwhile

    def is_open(self, conversation: Conversation) -> bool:
        """Whether a conversation was not forgotten since."""
        return self.conversations.get(conversation.name) is conversation

    def open(self, session: Session | None = None) -> str:
        """Open a conversation; its name.

        Raises:
            DataError: too many are open.
        """
        if len(self.conversations) >= _MOST_CONVERSATIONS:
            for old in self.opened():
                if not old.session.exchanges and not old.writing:
                    self.conversations.pop(old.name, None)
                    self._end(old)
        if len(self.conversations) >= _MOST_CONVERSATIONS:
            raise DataError(f"{_MOST_CONVERSATIONS} conversations are open: delete some")
        name = secrets.token_urlsafe(12)
        self.conversations[name] = Conversation(name, session or self._session())
        return name

    def keep(self, conversation: Conversation) -> None:
        """Write a conversation into the history, if there is one and it was not forgotten since.

        Raises:
            DataError: it cannot be written.
        """
        with self._keeping:
            if self.history and self.is_open(conversation) and conversation.session.exchanges:
                self.history.keep(conversation.name, conversation.session)

    def forget(self, conversation: Conversation) -> None:
        """Forget a conversation, in the history too, and stop what is being written in it or read for it."""
        with self._keeping:
            if self.history:
                self.history.forget(conversation.name)
            self.conversations.pop(conversation.name, None)
        self._end(conversation)

    def record(self, images: Sequence[str], question: str, answer: str) -> None:
        """Note an answer in the audit log, if there is one."""
        if self.audit:
            self.audit.record(self.model.identity.manifest_sha256, images, question, answer)

    def _make_way(self, client: str, pictures: Sequence[Shot]) -> None:
        """Stop what is read ahead, unless this client's work about these pictures has to read it too."""
        reading = self._reading
        if reading and not (reading.client == client and tuple(pictures[: len(self._read)]) == self._read):
            reading.stop()

    def _end(self, conversation: Conversation) -> None:
        """Stop what goes on in a conversation, and let the model forget it."""
        if conversation.turn:
            conversation.turn.stop()
        if self._reading and self._reading.client == conversation.name:
            self._reading.stop()
        self.turns.tidy(lambda: conversation.session.reset())  # which an answer that is stopped now may replace

    def _session(self) -> Session:
        about = self.model.identity, self.model.unreleased, self.confidence
        return Session(self.runtime, self.front, self.sampling, *about)
