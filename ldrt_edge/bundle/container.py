"""A bundle's bytes: a tar file whose every byte follows from its statement, its signature and its members' contents.

    bundle.json  bundle.sig  (each file of the statement, in its order)  two empty blocks

Any tar program lists and unpacks it. This reader parses none of it: from the statement it computes each header, and
refuses what differs in a single bit. So there are no links, no second entries, no compression and no sizes to believe:
the file is just as long as its statement says, or nothing is read. The signature's place has a fixed size, so that an
unsigned bundle is signed where it lies.

Source of the headers: POSIX.1-1988 tar as GNU writes it (binary sizes from 8 GiB on), by Python's tarfile.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ldrt_edge.artifact import FileEntry
from ldrt_edge.bundle.statement import LIMIT_BYTES, SIGNATURE, STATEMENT, Statement, digest, parse
from ldrt_edge.errors import ArtifactError

SIGNATURE_BYTES = 16 << 10  # a chain of certificates takes most of it
_BLOCK = tarfile.BLOCKSIZE
_END = b"\0" * (2 * _BLOCK)
_CHUNK_BYTES = 4 << 20
Sink = Callable[[bytes], object]
"""Takes a member's next bytes."""


@dataclass(frozen=True)
class Source:
    """Where a member's bytes come from when a bundle is written: a file, or the bytes themselves."""

    entry: FileEntry
    content: Path | bytes


@dataclass(frozen=True)
class Opened:
    """A bundle, packed or installed, whose statement was read; nothing else of it was looked at yet.

    path: the file, or the folder it was unpacked into. raw: the statement's bytes, which the signature covers.
    signature: the bytes in the signature's place.
    """

    path: Path
    raw: bytes
    statement: Statement
    signature: bytes

    @property
    def digest(self) -> str:
        """The bundle's identity; a signature does not change it."""
        return digest(self.raw)

    def check(self) -> None:
        """Hold every byte of the file against the statement.

        Raises:
            ArtifactError: one differs.
        """
        self.read(lambda _entry: len)  # a sink that keeps nothing

    def read(self, sink_for: Callable[[FileEntry], Sink]) -> None:
        """Give every member's bytes to the sink made for it, and hold all of them against the statement.

        A sink has had bytes that are wrong when this raises: what it wrote must go.

        Raises:
            ArtifactError: any byte is not what the statement says.
        """
        with _open(self.path) as stream:
            stream.seek(_members_at(len(self.raw)))
            for entry in self.statement.files:
                _expect(stream, _header(entry.path, entry.bytes), self.path, f"the header of {entry.path}")
                _copy_member(stream, entry, sink_for(entry), self.path)
                _expect(stream, _padding(entry.bytes), self.path, f"what follows {entry.path}")
            _expect(stream, _END, self.path, "its end")


def open_bundle(path: Path) -> Opened:
    """Read a bundle's statement and signature: the first few kilobytes, whatever the size of the file.

    Raises:
        ArtifactError: no bundle, or not as long as its statement says.
    """
    with _open(path) as stream:
        size = _statement_size(_read(stream, _BLOCK, path), path)
        raw = _read(stream, size, path)
        statement = parse(raw)
        length = os.fstat(stream.fileno()).st_size
        if length != (expected := _total(size, statement.files)):
            raise ArtifactError(f"{path}: {length} bytes, its statement says {expected}: incomplete, or changed")
        _expect(stream, _padding(size), path, "what follows its statement")
        _expect(stream, _header(SIGNATURE, SIGNATURE_BYTES), path, "the header of its signature")
        signature = _read(stream, SIGNATURE_BYTES, path)
        _expect(stream, _padding(SIGNATURE_BYTES), path, "what follows its signature")
        return Opened(path, raw, statement, signature)


def write(stream: BinaryIO, raw: bytes, signature: bytes, sources: Sequence[Source]) -> None:
    """Write a bundle; `sources` are in the order of the statement whose bytes are `raw`.

    Raises:
        ArtifactError: a file is not what its entry says.
    """
    for name, content in ((STATEMENT, raw), (SIGNATURE, signature)):
        stream.write(_header(name, len(content)) + content + _padding(len(content)))
    for source in sources:
        entry = source.entry
        stream.write(_header(entry.path, entry.bytes))
        if isinstance(source.content, bytes):
            stream.write(source.content)
        else:
            with _open(source.content) as file:
                _copy_member(file, entry, stream.write, source.content)
        stream.write(_padding(entry.bytes))
    stream.write(_END)


def replace_signature(opened: Opened, signature: bytes) -> None:
    """Put a signature into its place in the file.

    Raises:
        ArtifactError: the file cannot be written.
    """
    try:
        with opened.path.open("r+b") as stream:
            stream.seek(_padded(len(opened.raw)) + _BLOCK)
            stream.write(signature)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise ArtifactError(f"{opened.path}: cannot be written ({error.strerror})") from error


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error


def _read(stream: BinaryIO, size: int, path: Path) -> bytes:
    try:
        return stream.read(size)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error


def _statement_size(block: bytes, path: Path) -> int:
    """Of the first member, by its header: the one number that is taken from a header, and checked by rebuilding it."""
    try:
        size = tarfile.TarInfo.frombuf(block, "ascii", "strict").size
    except (tarfile.HeaderError, ValueError) as error:
        raise ArtifactError(f"{path}: not a bundle of ldrt-edge") from error
    if not 0 < size <= LIMIT_BYTES or block != _header(STATEMENT, size):
        raise ArtifactError(f"{path}: not a bundle of ldrt-edge: it does not begin with its {STATEMENT}")
    return size


def _copy_member(stream: BinaryIO, entry: FileEntry, sink: Sink, path: Path) -> None:
    seen, left = hashlib.sha256(), entry.bytes
    while left and (chunk := _read(stream, min(left, _CHUNK_BYTES), path)):
        seen.update(chunk)
        sink(chunk)
        left -= len(chunk)
    if left or seen.hexdigest() != entry.sha256:
        raise ArtifactError(f"{path}: {entry.path} is not what it was when the bundle was made: refused")


def _expect(stream: BinaryIO, wanted: bytes, path: Path, what: str) -> None:
    if _read(stream, len(wanted), path) != wanted:
        raise ArtifactError(f"{path}: {what} was changed: refused")


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")


def _total(statement_bytes: int, files: Sequence[FileEntry]) -> int:
    return _members_at(statement_bytes) + sum(_padded(entry.bytes) for entry in files) + len(_END)


def _members_at(statement_bytes: int) -> int:
    return _padded(statement_bytes) + _padded(SIGNATURE_BYTES)


def _padded(size: int) -> int:
    """What a member of this size takes, with its header."""
    return _BLOCK + size + len(_padding(size))


def _padding(size: int) -> bytes:
    return b"\0" * (-size % _BLOCK)
