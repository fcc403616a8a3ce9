"""An audit log: who asked which model what, and about which picture, as hashes in a chain.

Each line is a JSON object that holds the hash of the line before it, so that a line changed, dropped, added or moved
breaks the chain from there on. Nobody can tell from the file alone that its last lines were cut off, or that all of it
was written anew: keep its last hash elsewhere, and give it to `verify`. The log holds hashes of pictures, questions
and answers, never their text; a question that can be guessed can be confirmed by its hash.
"""

from __future__ import annotations

import errno
import getpass
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from ldrt_edge.errors import DataError

START = "0" * 64
"""What the first line has for the hash of the line before it."""
_FIELDS = ("number", "time", "who", "model", "images", "question", "answer", "previous", "sha256")


@dataclass(frozen=True)
class Chain:
    """A log that holds together: how many lines it has, and the hash of the last one."""

    lines: int
    head: str


def verify(path: Path, head: str | None = None) -> Chain:
    """Check every line of a log, and that it ends with `head` where that is known.

    Raises:
        DataError: it cannot be read, or a line does not hold; the message names the first.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    chain = _verify(path, data)
    if head is not None and head != chain.head:
        raise DataError(f"{path}: its {chain.lines} lines hold together, but end with {chain.head}, not with {head}")
    return chain


class AuditLog:
    """A log that is open for writing, by one process.

    Raises:
        DataError: it cannot be written, another process writes it, or what it holds does not hold together.
    """

    def __init__(self, path: Path) -> None:
        self._lock, self._who = threading.Lock(), _user()
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, mode=0o600)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from error
        self._stream: BinaryIO = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            _claim(path, descriptor)
            data = self._stream.read()
            self.chain = _verify(path, data)
        except BaseException:
            self._stream.close()
            raise
        self._whole_bytes, self._torn = len(data), False

    def record(self, model: str, images: Sequence[str], question: str, answer: str) -> None:
        """Add a line, on disk before this returns, or nothing.

        Args:
            model: sha256 of the model's manifest.
            images: sha256 of what the model saw.
            question: as asked; its hash is written.
            answer: as given; its hash is written.

        Raises:
            DataError: the disk is full, or gone.
        """
        with self._lock:
            line: dict[str, object] = {
                "number": self.chain.lines + 1,
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "who": self._who,
                "model": model,
                "images": list(images),
                "question": hashlib.sha256(question.encode()).hexdigest(),
                "answer": hashlib.sha256(answer.encode()).hexdigest(),
                "previous": self.chain.head,
            }
            head = _hash(line)
            content = _dump(line | {"sha256": head})
            try:
                self._mend()
                self._torn = True
                if self._stream.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._stream.fileno())
            except OSError as error:
                with suppress(OSError):  # else the next record mends it
                    self._mend()
                problem = f"the audit log cannot be written ({error.strerror}): this answer is not in it"
                raise DataError(problem) from error
            self.chain = Chain(self.chain.lines + 1, head)
            self._whole_bytes, self._torn = self._whole_bytes + len(content), False

    def close(self) -> None:
        """Let another process write it."""
        self._stream.close()

    def _mend(self) -> None:
        """Cut off what a write that failed left behind: the next line would continue it."""
        if self._torn:
            self._stream.truncate(self._whole_bytes)
            self._torn = False


def _verify(path: Path, data: bytes) -> Chain:
    chain = Chain(0, START)
    for number, raw in enumerate(data.splitlines(keepends=True), 1):
        try:
            line = json.loads(raw)
            whole = tuple(line) == _FIELDS and raw == _dump(line)
        except (ValueError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise DataError(f"{path}: line {number} is not a line of an audit log, or was cut off")
        told = line.pop("sha256")
        if told != _hash(line):
            raise DataError(f"{path}: line {number} was changed: it does not have its own hash")
        if line["previous"] != chain.head or line["number"] != number:
            raise DataError(f"{path}: before line {number} a line was changed, dropped, added or moved")
        chain = Chain(number, told)
    return chain


def _hash(line: dict[str, object]) -> str:
    return hashlib.sha256(_dump(line)).hexdigest()


def _dump(line: dict[str, object]) -> bytes:
    return json.dumps(line, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def _user() -> str:
    """Who runs this: the name, or the number of one without a name, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):  # by Python's version and system
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"


def _claim(path: Path, descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise DataError(f"{path}: another process writes it: name another file") from error
