"""Conversations that outlive the program: opt-in, in one folder, one encrypted file each.

The passphrase is never stored; without it nothing can be read, and nobody can help. A file is a conversation with the
pixels that the model saw, compressed, then sealed with AES-256-GCM under a key that scrypt makes of the passphrase. The
seal covers the file's name, so that a file changed, or put in another's place, is refused. What the folder tells
without the passphrase: how many conversations there are, how large, and when they were last written.

Source: RFC 7914 (scrypt), NIST SP 800-38D (GCM).
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ldrt_edge.artifact import Input
from ldrt_edge.chat.session import Exchange, Session, Shown
from ldrt_edge.errors import DataError
from ldrt_edge.image import Origin, Overlay
from ldrt_edge.runtimes.base import FrontImage, Sampling, Timings

SCHEMA = "ldrt-edge/history/1"
_LOCK = "lock.json"
_SUFFIX, _PARTIAL = ".talk", ".partial"
_NAME = re.compile(r"[A-Za-z0-9_-]{8,40}")
_NONCE_BYTES = 12
_SCRYPT = {"length": 32, "n": 2**17, "r": 8, "p": 1}  # 128 MiB, about half a second


class History:
    """A folder of sealed conversations, made if it is not there.

    Raises:
        DataError: the folder is no history, cannot be written, or has another passphrase.
    """

    def __init__(self, folder: Path, passphrase: str) -> None:
        if not passphrase:
            raise DataError("a history wants a passphrase")
        self._folder = folder
        lock = folder / _LOCK
        try:
            if not exists(folder):
                if folder.exists() and any(folder.iterdir()):
                    raise DataError(f"{folder}: neither empty nor a history: choose another folder")
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                salt = secrets.token_bytes(16)
                self._cipher = _cipher(passphrase, salt)
                told = {"schema": SCHEMA, "salt": salt.hex(), "check": self._seal(_LOCK, b"").hex()}
                self._write(lock, json.dumps(told).encode())
                return
            told = json.loads(lock.read_bytes())
            if told["schema"] != SCHEMA:
                raise DataError(f"{folder}: a history of another version ({told['schema']!r})")
            self._cipher = _cipher(passphrase, bytes.fromhex(told["salt"]))
            if self._open(_LOCK, bytes.fromhex(told["check"])) is None:
                raise DataError(f"{folder}: this is not the passphrase of this history")
            for partial in folder.glob(f"*{_PARTIAL}"):  # what a write that was cut off left
                partial.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot be used as a history ({error.strerror})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{lock}: damaged") from error

    def keep(self, name: str, session: Session) -> None:
        """Write a conversation, in place of what was known of it; whole or not at all.

        Raises:
            DataError: it cannot be written.
        """
        told = {
            "model": asdict(session.model) if session.model else None,
            "exchanges": [_exchange_to_json(exchange) for exchange in session.exchanges],
        }
        plain = zlib.compress(json.dumps(told, separators=(",", ":")).encode(), 1)
        try:
            self._write(self._path(name), self._seal(name, plain))
        except OSError as error:
            raise DataError(f"the history cannot be written ({error.strerror}): this answer is not in it") from error

    def forget(self, name: str) -> None:
        """Delete a conversation's file, if there is one, and what a write that was cut off left of it."""
        try:
            for path in (self._path(name), self._path(name).with_suffix(_PARTIAL)):
                path.unlink(missing_ok=True)
        except OSError as error:
            problem = f"the history cannot be changed ({error.strerror}): the conversation stays in it"
            raise DataError(problem) from error

    def read(self, model: Input, most: int) -> Iterator[tuple[str, list[Exchange]]]:
        """The last `most` conversations with a model, the oldest first; another model's stay where they are.

        Raises:
            DataError: a file cannot be read, was changed, or cut off; the message names it.
        """
        found: list[tuple[str, list[Exchange]]] = []
        try:
            files = [path for path in self._folder.glob(f"*{_SUFFIX}") if _NAME.fullmatch(path.stem)]
            for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
                if len(found) == most:
                    break
                plain = self._open(path.stem, path.read_bytes())
                if plain is None:
                    raise DataError(f"{path}: was changed or cut off since it was written: delete it to go on")
                told = json.loads(zlib.decompress(plain))
                if told["model"] == asdict(model):
                    found.append((path.stem, [_exchange_of_json(exchange) for exchange in told["exchanges"]]))
        except OSError as error:
            raise DataError(f"{error.filename or self._folder}: cannot be read ({error.strerror})") from error
        yield from reversed(found)

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(name)
        return self._folder / f"{name}{_SUFFIX}"

    def _seal(self, name: str, plain: bytes) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + bytes(self._cipher.encrypt(nonce, plain, f"{SCHEMA} {name}".encode()))

    def _open(self, name: str, sealed: bytes) -> bytes | None:
        from cryptography.exceptions import InvalidTag

        try:
            return bytes(
                self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], f"{SCHEMA} {name}".encode())
            )
        except (InvalidTag, ValueError):  # ValueError: too short for a nonce
            return None

    def _write(self, path: Path, content: bytes) -> None:
        partial = path.with_suffix(_PARTIAL)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode=0o600), "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)


def exists(folder: Path) -> bool:
    """Whether a folder is a history already, so that it has its passphrase."""
    try:
        return (folder / _LOCK).exists()
    except OSError:  # it may not be looked into
        return False


def _cipher(passphrase: str, salt: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

    return AESGCM(Scrypt(salt=salt, **_SCRYPT).derive(passphrase.encode()))


def _exchange_to_json(exchange: Exchange) -> dict[str, object]:
    return {
        "question": exchange.question,
        "shown": [
            {
                "tiles": _array_to_json(shown.image.tiles),
                "layout": _array_to_json(shown.image.layout),
                "size": list(shown.image.size),
                "sha256": shown.image.sha256,
                "origin": asdict(shown.origin),
            }
            for shown in exchange.shown
        ],
        "answer": exchange.answer,
        "finish": exchange.finish,
        "tokens": exchange.tokens,
        "sampling": asdict(exchange.sampling),
        "timings": asdict(exchange.timings),
        "probability": exchange.probability,
    }


def _exchange_of_json(told: dict[str, Any]) -> Exchange:
    shown = tuple(
        Shown(
            FrontImage(
                _array_of_json(one["tiles"]), _array_of_json(one["layout"]), (one["size"][0], one["size"][1]),
                one["sha256"],
            ),
            _origin_of_json(one["origin"]),
        )
        for one in told["shown"]
    )
    return Exchange(
        told["question"], shown, told["answer"], told["finish"], told["tokens"], Sampling(**told["sampling"]),
        Timings(**told["timings"]), told.get("probability"),
    )


def _origin_of_json(told: dict[str, Any]) -> Origin:
    window = told["window"] and (float(told["window"][0]), float(told["window"][1]))
    overlays = tuple(
        Overlay(one["modality"], one["sha256"], tuple((label, colour) for label, colour in one["legend"]))
        for one in told["overlays"]
    )
    return Origin(**{**told, "window": window, "overlays": overlays})


def _array_to_json(array: np.ndarray[Any, Any]) -> dict[str, object]:
    return {"shape": list(array.shape), "dtype": array.dtype.str, "data": base64.b64encode(array.tobytes()).decode()}


def _array_of_json(told: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(told["data"]), told["dtype"]).reshape(told["shape"])
