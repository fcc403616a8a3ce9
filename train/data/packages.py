"""Where articles come from: folders, zips, tars and PDFs, opened without trusting a byte of them.

`find_units` walks what the user named, in a fixed order, and yields one `Unit` for each thing that a worker reads by
itself: an XML file, an XML inside a zip, a whole tar, a PDF. `open_unit` gives a unit's articles, each with the files
beside it: those of its folder, and of folders below it that hold no article of their own. Nothing is ever written
under a name that an archive gives; links, special files and names that climb out are refused by name; sizes are checked
before memory is taken, and a tar's unpacked bytes are counted as they flow. What is wrong with a file is a line of its
own; what is wrong with the machine ends the run (`Halted`).
"""

from __future__ import annotations

import bz2
import errno
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
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal, Protocol, cast

from ldrt_edge.errors import DataError, LdrtError

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
_MACHINE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
)

Kind = Literal["xml", "zip", "tar", "pdf"]


@dataclass(frozen=True)
class Unit:
    """What one worker reads at once. `member` is an XML or PDF inside a zip; `where` is how reports call it."""

    kind: Kind
    path: str
    member: str
    where: str


class Halted(LdrtError):
    """The machine failed while something was read: no room, no memory, a broken disk. Nothing was dropped for it."""


def check_machine(error: BaseException, where: str) -> None:
    """Tell what is wrong with the machine from what is wrong with a file.

    Raises:
        Halted: `error` says nothing about the file `where`: another time it may be read.
    """
    if isinstance(error, Halted):
        raise error
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _MACHINE):
        said = error.strerror if isinstance(error, OSError) else "not enough memory"
        raise Halted(f"{where}: {said} while it was read: mend that, then run this again; it goes on") from error


@dataclass(frozen=True)
class Refused:
    """Something that was not opened, and why."""

    where: str
    reason: str


class Files(Protocol):
    """The files beside an article."""

    def named(self, name: str) -> list[str]:
        """Handles of the files that `name`, in lower case, may mean.

        A path from the article's folder means that file; a last name alone also files of that name further below.
        """

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
        try:
            about = Path(unit.path).stat()
            archive, territories = _read_zip(unit.path, about.st_mtime_ns, about.st_size)
        except DataError as error:
            yield Found(unit.where, "xml", Refused(unit.where, str(error)), _NoFiles())
            return
        files = ZipFiles(archive, territories.get(PurePosixPath(unit.member).parent, {}))
        yield _found(unit.where, unit.member, files, unit.member)
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
def _checked(what: str, where: str) -> Iterator[None]:
    """Say what is wrong with a file or an archive as `DataError`, and what is wrong with the machine as `Halted`."""
    try:
        yield
    except DataError:
        raise
    except _DAMAGE as error:
        check_machine(error, where)
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{what} ({said})") from error


class _NoFiles:
    def named(self, name: str) -> list[str]:
        return []

    def read(self, handle: str, limit_bytes: int = FILE_LIMIT_BYTES) -> bytes:
        raise DataError("no such file")


Territory = Mapping[str, Sequence[str]]
"""Handles of an article's files by path from its folder, and by last name, in lower case."""


class FolderFiles:
    """The files in a folder and in folders below it (`images/`, `figures/`); links are left alone."""

    def __init__(self, folder: Path) -> None:
        self._files = _listing(str(folder))

    def named(self, name: str) -> list[str]:
        return [*self._files.get(name, ())]

    def read(self, handle: str, limit_bytes: int = FILE_LIMIT_BYTES) -> bytes:
        return _read_file(Path(handle), limit_bytes)


def _territories(files: Iterable[tuple[str, str]]) -> dict[PurePosixPath, Territory]:
    """What belongs to the articles of each folder that holds some, from (path, handle).

    A file belongs to the nearest folder above it that has an article; where one folder alone has some, all files are
    theirs. One that lies beside the article hides those of its name further below.
    """
    paths = sorted((PurePosixPath(name), handle) for name, handle in files)
    homes = {path.parent for path, _ in paths if path.name.lower().endswith(_XML)}
    by_path: dict[PurePosixPath, dict[str, list[str]]] = {home: defaultdict(list) for home in homes}
    by_name: dict[PurePosixPath, dict[str, list[str]]] = {home: defaultdict(list) for home in homes}
    only = min(homes) if len(homes) == 1 else None
    for path, handle in paths:
        home = next((folder for folder in path.parents if folder in homes), only)
        if home is not None:
            by_name[home][path.name.lower()].append(handle)
            if path.is_relative_to(home):
                by_path[home][str(path.relative_to(home)).lower()].append(handle)
    return {home: {**by_name[home], **by_path[home]} for home in homes}


def _read_file(path: Path, limit_bytes: int) -> bytes:
    with _checked("cannot be read", str(path)):
        _check_bytes(path.stat().st_size, limit_bytes)
        return path.read_bytes()


def _check_bytes(size: int, limit_bytes: int, how: str = "") -> None:
    if size > limit_bytes:
        raise DataError(f"{size >> 20} MiB{how}, the limit is {limit_bytes >> 20} MiB")


@functools.lru_cache(maxsize=8)
def _listing(folder: str) -> Territory:
    """A folder's own territory: folders with an article of their own are not gone into."""
    files: list[tuple[str, str]] = []
    places = [folder]
    for place in places:  # which grows on the way
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except PermissionError:
            continue
        own = [entry for entry in entries if entry.is_file(follow_symlinks=False)]
        if place == folder or not any(entry.name.lower().endswith(_XML) for entry in own):
            files.extend((entry.path, entry.path) for entry in own)
            places.extend(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
    return _territories(files).get(PurePosixPath(folder), {})


class ZipFiles:
    """The files of a zip that belong to one of its articles."""

    def __init__(self, archive: zipfile.ZipFile, files: Territory) -> None:
        self._archive, self._files = archive, files

    def named(self, name: str) -> list[str]:
        return [*self._files.get(name, ())]

    def read(self, handle: str, limit_bytes: int = FILE_LIMIT_BYTES) -> bytes:
        with _checked("damaged in its zip", handle):
            info = self._archive.getinfo(handle)
            _check_bytes(info.file_size, limit_bytes)
            with self._archive.open(info) as stream:
                return stream.read(info.file_size + 1)


@functools.lru_cache(maxsize=1)
def _read_zip(path: str, _modified_ns: int, _size: int) -> tuple[zipfile.ZipFile, Mapping[PurePosixPath, Territory]]:
    """An open zip and what belongs to its articles, kept while its units come one after the other."""
    archive = _open_zip(Path(path))
    return archive, _territories((name, name) for name in _safe_members(archive))


def _open_zip(path: Path) -> zipfile.ZipFile:
    with _checked("not a readable zip", str(path)):
        _check_zip_directory(path)
        archive = zipfile.ZipFile(path)
    members, unpacked = len(archive.infolist()), sum(info.file_size for info in archive.infolist())
    try:
        if members > MEMBERS_LIMIT:
            raise DataError(f"{members} files in one zip, the limit is {MEMBERS_LIMIT}")
        _check_bytes(unpacked, PACKAGE_LIMIT_BYTES, " unpacked")
    except DataError:
        archive.close()
        raise
    return archive


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
    """Files of a tar, unpacked under numbers, that belong to one of its articles."""

    def __init__(self, files: Territory) -> None:
        self._files = files

    def named(self, name: str) -> list[str]:
        return [*self._files.get(name, ())]

    def read(self, handle: str, limit_bytes: int = FILE_LIMIT_BYTES) -> bytes:
        return _read_file(Path(handle), limit_bytes)


def _open_tar(unit: Unit) -> Iterator[Found]:
    with tempfile.TemporaryDirectory(prefix="ldrt-edge-") as scratch:
        names: dict[str, Path] = {}
        refused: list[Refused] = []
        try:
            _unpack(Path(unit.path), Path(scratch), names, refused, unit.where)
        except DataError as error:
            refused.append(Refused(unit.where, str(error)))
        territories = _territories((name, str(path)) for name, path in names.items())
        xmls = sorted(name for name in names if name.lower().endswith(_XML))
        for name in xmls or sorted(name for name in names if name.lower().endswith(".pdf")):
            files = _TarFiles(territories.get(PurePosixPath(name).parent, {}))
            yield _found(f"{unit.where}!{name}", name, files, str(names[name]))
        for one in refused:
            yield Found(one.where, "xml", one, _NoFiles())


def _unpack(path: Path, scratch: Path, names: dict[str, Path], refused: list[Refused], where: str) -> None:
    """Regular files of a tar into `scratch`, under numbers; what is whole stays usable when the rest is damaged."""
    written = 0
    with (
        _checked("a damaged tar", where),
        _unpacked_stream(path) as stream,
        tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as archive,
    ):
        for number, member in enumerate(archive):
            archive.members = []  # type: ignore[attr-defined]  # a tar of a million files is not kept in memory
            if number >= MEMBERS_LIMIT:
                raise DataError(f"more than {MEMBERS_LIMIT} files in one tar")
            if member.isdir():
                continue
            if reason := _not_unpacked(member):
                refused.append(Refused(f"{where}!{member.name}", reason))
                continue
            target = scratch / str(number)
            source = archive.extractfile(member)
            assert source is not None  # a regular file has bytes
            with target.open("wb") as copy:
                while block := source.read(_TAR_BLOCK_LIMIT_BYTES):
                    written += len(block)
                    _check_bytes(written, PACKAGE_LIMIT_BYTES, " unpacked")
                    copy.write(block)
            names[member.name] = target


def _not_unpacked(member: tarfile.TarInfo) -> str:
    """Why a member is left in its tar, "" where it is not."""
    if not member.isreg() or not _stays_inside(member.name):
        return "a link, a special file or a name that leaves the archive"
    if member.issparse():
        return "a sparse file: holes that its tar does not hold"
    if member.size > FILE_LIMIT_BYTES:
        return f"{member.size >> 20} MiB, the limit is {FILE_LIMIT_BYTES >> 20} MiB"
    return ""


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
