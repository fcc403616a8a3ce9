"""Where articles come from: folders, zips, tars and PDFs, opened without trusting a byte of them.

`find_units` walks what the user named, in a fixed order, and yields one `Unit` for each thing that a worker reads by
itself: an XML file, an XML inside a zip, a whole tar, a PDF. `open_unit` gives a unit's articles, each with the files
beside it. Nothing is ever written under a name that an archive gives; links, special files and names that climb out
are refused by name; sizes are checked before memory is taken, and a tar's unpacked bytes are counted as they flow.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import lzma
import os
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal, Protocol, cast

from ldrt_edge.errors import DataError

XML_LIMIT_BYTES = 32 << 20
FILE_LIMIT_BYTES = 256 << 20
PACKAGE_LIMIT_BYTES = 4 << 30
MEMBERS_LIMIT = 100_000
_ZIP_DIRECTORY_LIMIT_BYTES = 64 << 20
_TAR_BLOCK_LIMIT_BYTES = 1 << 20  # long names and pax headers are read whole; ours come in blocks
_XML = (".xml", ".nxml")
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_KNOWN = (*_XML, *_TAR, ".zip", ".pdf")
_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError,
    NotImplementedError, ValueError, struct.error,
)

Kind = Literal["xml", "zip", "tar", "pdf"]


@dataclass(frozen=True)
class Unit:
    """What one worker reads at once. `member` is an XML or PDF inside a zip; `where` is how reports call it."""

    kind: Kind
    path: str
    member: str
    where: str


@dataclass(frozen=True)
class Refused:
    """Something that was not opened, and why."""

    where: str
    reason: str


class Files(Protocol):
    """The files beside an article."""

    def named(self, name: str) -> list[str]:
        """Handles of the files whose last name is `name` in lower case: of the article's own folder, else of others."""

    def read(self, handle: str, limit_bytes: int = FILE_LIMIT_BYTES) -> bytes:
        """A file's bytes; `DataError` when it is too large or damaged."""


@dataclass(frozen=True)
class Found:
    """One document of a unit: its bytes, or why there are none."""

    where: str
    kind: Literal["xml", "pdf"]
    data: bytes | Refused
    files: Files


def find_units(articles: Sequence[Path]) -> Iterator[Unit | Refused]:
    """Units in a fixed order: as named, and by name within folders and zips.

    PDFs count only where no XML lies in the same folder or zip: there they are that article's print.

    Raises:
        DataError: a named path does not exist, or is no article, package or folder.
    """
    for path in articles:
        if path.is_dir():
            yield from _in_folder(path)
        elif not path.is_file():
            raise DataError(f"{path}: no such file or folder")
        elif not path.name.lower().endswith(_KNOWN):
            raise DataError(f"{path}: not an article or a package (wanted {', '.join(_KNOWN)}, or a folder)")
        else:
            yield from _units_of(path, path.name)


def _in_folder(root: Path) -> Iterator[Unit | Refused]:
    inside = root.resolve()
    for folder, folders, names in os.walk(root):
        folders.sort()
        has_xml = any(name.lower().endswith(_XML) for name in names)
        for name in sorted(names):
            path = Path(folder, name)
            lower = name.lower()
            if not lower.endswith(_KNOWN) or (lower.endswith(".pdf") and has_xml):
                continue
            where = f"{root.name}/{path.relative_to(root).as_posix()}"
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                yield Refused(where, "a link that leaves the folder")
            elif not path.is_file():
                yield Refused(where, "not a regular file")
            else:
                yield from _units_of(path, where)


def _units_of(path: Path, where: str) -> Iterator[Unit | Refused]:
    lower = path.name.lower()
    if lower.endswith(_XML):
        yield Unit("xml", str(path), "", where)
    elif lower.endswith(".pdf"):
        yield Unit("pdf", str(path), "", where)
    elif lower.endswith(_TAR):
        yield Unit("tar", str(path), "", where)
    else:
        try:
            with _open_zip(path) as archive:
                names = sorted(_safe_members(archive))
                refused = sorted({name for name in archive.namelist() if name[-1:] != "/"} - set(names))
        except DataError as error:
            yield Refused(where, str(error))
            return
        for name in refused:
            yield Refused(f"{where}!{name}", "a link, a special file or a name that leaves the archive")
        xmls = [name for name in names if name.lower().endswith(_XML)]
        for name in xmls or [name for name in names if name.lower().endswith(".pdf")]:
            yield Unit("zip", str(path), name, f"{where}!{name}")


def open_unit(unit: Unit) -> Iterator[Found]:
    """The documents of one unit, one after the other; the files beside them can be read until the next is asked for."""
    if unit.kind == "tar":
        yield from _open_tar(unit)
    elif unit.kind == "zip":
        with _reading(unit.where) as problems, _open_zip(Path(unit.path)) as archive:
            files = ZipFiles(archive, str(PurePosixPath(unit.member).parent))
            yield _found(unit.where, unit.member, files, unit.member)
        for reason in problems:
            yield Found(unit.where, "xml", Refused(unit.where, reason), _NoFiles())
    else:
        path = Path(unit.path)
        folder = FolderFiles(path.parent)
        yield _found(unit.where, path.name, folder, str(path))


def _found(where: str, name: str, files: Files, handle: str) -> Found:
    kind: Literal["xml", "pdf"] = "pdf" if name.lower().endswith(".pdf") else "xml"
    try:
        data = files.read(handle, XML_LIMIT_BYTES if kind == "xml" else FILE_LIMIT_BYTES)
    except DataError as error:
        return Found(where, kind, Refused(where, str(error)), files)
    return Found(where, kind, data, files)


@contextmanager
def _reading(where: str) -> Iterator[list[str]]:
    """Collect what is wrong with an archive, instead of raising it."""
    problems: list[str] = []
    try:
        yield problems
    except DataError as error:
        problems.append(str(error))


class _NoFiles:
    def named(self, name: str) -> list[str]:
        return []

    def read(self, handle: str, limit_bytes: int = FILE_LIMIT_BYTES) -> bytes:
        raise DataError("no such file")


class FolderFiles:
    """The files in a folder and in the folders just below it (`images/`, `figures/`); links are left alone."""

    def __init__(self, folder: Path) -> None:
        self._index = _listing(str(folder))

    def named(self, name: str) -> list[str]:
        return self._index.get(name, [])

    def read(self, handle: str, limit_bytes: int = FILE_LIMIT_BYTES) -> bytes:
        return _read_file(Path(handle), limit_bytes)


def _nearest(handles: Iterable[tuple[str, str]], home: str) -> dict[str, list[str]]:
    """Handles by last name in lower case, from (archive name, handle); those in `home` hide others of their name."""
    own: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    for name, handle in sorted(handles):
        path = PurePosixPath(name)
        (own if str(path.parent) == home else others).setdefault(path.name.lower(), []).append(handle)
    return others | own


def _read_file(path: Path, limit_bytes: int) -> bytes:
    try:
        _check_bytes(path.stat().st_size, limit_bytes)
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from error


def _check_bytes(size: int, limit_bytes: int) -> None:
    if size > limit_bytes:
        raise DataError(f"{size >> 20} MiB, the limit is {limit_bytes >> 20} MiB")


@functools.lru_cache(maxsize=8)
def _listing(folder: str) -> dict[str, list[str]]:
    places = (folder, *sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)))
    files = (entry for place in places for entry in os.scandir(place) if entry.is_file(follow_symlinks=False))
    return _nearest(((entry.path, entry.path) for entry in files), str(PurePosixPath(folder)))


class ZipFiles:
    """The files of a zip; those in the article's own folder come first."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self._archive = archive
        self._index = _nearest(((name, name) for name in _safe_members(archive)), folder)

    def named(self, name: str) -> list[str]:
        return self._index.get(name, [])

    def read(self, handle: str, limit_bytes: int = FILE_LIMIT_BYTES) -> bytes:
        try:
            info = self._archive.getinfo(handle)
            _check_bytes(info.file_size, limit_bytes)
            with self._archive.open(info) as stream:
                data = stream.read(info.file_size + 1)
        except DataError:
            raise
        except _DAMAGE as error:
            raise DataError(f"damaged in its zip ({error})") from error
        return data


@contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        _check_zip_directory(path)
        archive = zipfile.ZipFile(path)
    except DataError:
        raise
    except _DAMAGE as error:
        raise DataError(f"not a readable zip ({error})") from error
    with archive:
        if len(archive.infolist()) > MEMBERS_LIMIT:
            raise DataError(f"{len(archive.infolist())} files in one zip, the limit is {MEMBERS_LIMIT}")
        unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > PACKAGE_LIMIT_BYTES:
            raise DataError(f"{unpacked >> 20} MiB unpacked, the limit is {PACKAGE_LIMIT_BYTES >> 20} MiB")
        yield archive


def _check_zip_directory(path: Path) -> None:
    """Refuse a directory that would fill the memory before its entries can be counted.

    Source: PKWARE APPNOTE 6.3.10, 4.3.14 to 4.3.16.
    """
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - (1 << 16) - 22))
        tail = stream.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise DataError("not a readable zip (no end of its directory)")
    size = struct.unpack_from("<I", tail, at + 12)[0]
    wide = tail.rfind(b"PK\x06\x06", 0, at)
    if size == 0xFFFFFFFF and wide >= 0 and len(tail) >= wide + 48:
        size = struct.unpack_from("<Q", tail, wide + 40)[0]
    if size > _ZIP_DIRECTORY_LIMIT_BYTES:
        raise DataError(f"a zip directory of {size >> 20} MiB, the limit is {_ZIP_DIRECTORY_LIMIT_BYTES >> 20} MiB")


def _safe_members(archive: zipfile.ZipFile) -> list[str]:
    """Regular files whose names stay inside."""
    safe = []
    for info in archive.infolist():
        mode = stat.S_IFMT(info.external_attr >> 16)
        if not info.is_dir() and mode in (0, stat.S_IFREG) and _stays_inside(info.filename):
            safe.append(info.filename)
    return safe


def _stays_inside(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return not (name.startswith(("/", "\\")) or ".." in parts or "\0" in name or ":" in parts[0])


class _TarFiles:
    """Files of a tar, unpacked under numbers."""

    def __init__(self, names: Mapping[str, Path], home: str) -> None:
        self._index = _nearest(((name, str(path)) for name, path in names.items()), home)

    def named(self, name: str) -> list[str]:
        return self._index.get(name, [])

    def read(self, handle: str, limit_bytes: int = FILE_LIMIT_BYTES) -> bytes:
        return _read_file(Path(handle), limit_bytes)


def _open_tar(unit: Unit) -> Iterator[Found]:
    with tempfile.TemporaryDirectory(prefix="ldrt-edge-") as scratch:
        names: dict[str, Path] = {}
        refused: list[Refused] = []
        with _reading(unit.where) as problems:
            _unpack(Path(unit.path), Path(scratch), names, refused, unit.where)
        refused.extend(Refused(unit.where, reason) for reason in problems)
        xmls = sorted(name for name in names if name.lower().endswith(_XML))
        for name in xmls or sorted(name for name in names if name.lower().endswith(".pdf")):
            files = _TarFiles(names, str(PurePosixPath(name).parent))
            yield _found(f"{unit.where}!{name}", name, files, str(names[name]))
        for one in refused:
            yield Found(one.where, "xml", one, _NoFiles())


def _unpack(path: Path, scratch: Path, names: dict[str, Path], refused: list[Refused], where: str) -> None:
    """Regular files of a tar into `scratch`, under numbers; what is whole stays usable when the rest is damaged."""
    try:
        with _unpacked_stream(path) as stream, tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as archive:
            for number, member in enumerate(archive):
                archive.members = []  # type: ignore[attr-defined]  # a tar of a million files is not kept in memory
                if number >= MEMBERS_LIMIT:
                    raise DataError(f"more than {MEMBERS_LIMIT} files in one tar")
                if member.isdir():
                    continue
                if not member.isreg() or not _stays_inside(member.name):
                    reason = "a link, a special file or a name that leaves the archive"
                    refused.append(Refused(f"{where}!{member.name}", reason))
                elif member.size > FILE_LIMIT_BYTES:
                    reason = f"{member.size >> 20} MiB, the limit is {FILE_LIMIT_BYTES >> 20} MiB"
                    refused.append(Refused(f"{where}!{member.name}", reason))
                else:
                    target = scratch / str(number)
                    source = archive.extractfile(member)
                    assert source is not None  # a regular file has bytes
                    with target.open("wb") as copy:
                        while block := source.read(_TAR_BLOCK_LIMIT_BYTES):
                            copy.write(block)
                    names[member.name] = target
    except DataError:
        raise
    except _DAMAGE as error:
        raise DataError(f"a damaged tar ({error})") from error


@contextmanager
def _unpacked_stream(path: Path) -> Iterator[_Counted]:
    with path.open("rb") as raw:
        magic = raw.read(6)
        raw.seek(0)
        plain: IO[bytes]
        if magic[:2] == b"\x1f\x8b":
            plain = cast(IO[bytes], gzip.GzipFile(fileobj=raw))
        elif magic[:3] == b"BZh":
            plain = cast(IO[bytes], bz2.BZ2File(raw))
        elif magic == b"\xfd7zXZ\x00":
            plain = cast(IO[bytes], lzma.LZMAFile(raw))  # noqa: SIM115
        else:
            plain = raw
        yield _Counted(plain)


class _Counted(io.RawIOBase):
    """A stream that refuses to be read in one gulp or past the package's limit: a bomb ends here."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        if offset > PACKAGE_LIMIT_BYTES:
            raise DataError(f"more than {PACKAGE_LIMIT_BYTES >> 20} MiB unpacked")
        return self._stream.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _TAR_BLOCK_LIMIT_BYTES:
            raise DataError("a tar header of absurd size")
        if self._stream.tell() + size > PACKAGE_LIMIT_BYTES + _TAR_BLOCK_LIMIT_BYTES:
            raise DataError(f"more than {PACKAGE_LIMIT_BYTES >> 20} MiB unpacked")
        return self._stream.read(size)
