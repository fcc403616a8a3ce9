"""From a bundle to a model that may be loaded: whose it is, whether it is whole, unpacked once.

    model_folder(NAME.ldrt)  or  model_folder(FOLDER)      what chat and bench call
    install(NAME.ldrt, FOLDER)                              unpacks, and asks the model its golden questions

The signature is looked at first, over a few kilobytes of statement; files are read only when that is accepted, and a
model is loaded only when each of its bytes is what the statement says, in a folder that holds nothing else.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldrt_edge import artifact
from ldrt_edge.artifact import MANIFEST, FileEntry
from ldrt_edge.bundle.container import SIGNATURE_BYTES, Opened, Sink, open_bundle
from ldrt_edge.bundle.home import home
from ldrt_edge.bundle.keys import Signer, signer_of
from ldrt_edge.bundle.statement import LIMIT_BYTES, SIGNATURE, STATEMENT, parse
from ldrt_edge.console import say
from ldrt_edge.errors import ArtifactError
from ldrt_edge.release import read_verdict

_MARGIN_BYTES = 64 << 20


def model_folder(path: Path, trust_once: bool = False) -> Path:
    """The model behind `path`: a bundle's, verified (and unpacked, the first time), or the folder itself.

    trust_once: accept a bundle that is unsigned, or signed by a key that this user does not trust, with a warning.

    Raises:
        ArtifactError: the bundle is changed, incomplete, or not accepted.
    """
    if path.is_file():
        return install(path, trust_once=trust_once) / open_bundle(path).statement.model_path
    if not (path / STATEMENT).is_file():
        if path.is_dir() and (reason := unreleased(path)):
            say(f"WARNING: {path.name} is {reason}")
        return path
    opened = open_any(path)
    accept(opened, trust_once)
    check_whole(opened)
    return path / opened.statement.model_path


def unreleased(model: Path) -> str | None:
    """Why the model in a folder is not released, for whoever sees its answers; None where nobody said so.

    The bundle says that it lies in, or the verdict that `quantize --max-loss` left in its manifest.
    """
    if bundle := bundle_of(model):
        statement = open_any(bundle).statement
        return None if statement.released else statement.verdict
    verdict = read_verdict(artifact.read(model).metrics) if (model / MANIFEST).is_file() else None
    return None if verdict is None or verdict.released else f"not released: {verdict.reason}"


def bundle_of(model: Path) -> Path | None:
    """The installed bundle that a model's folder lies in."""
    bundle = model.absolute().parent.parent
    return bundle if model.absolute().parent.name == "models" and (bundle / STATEMENT).is_file() else None


def install(path: Path, out: Path | None = None, trust_once: bool = False) -> Path:
    """Unpack a bundle into `out` (None: the user's own folder), where it appears whole or not at all; returns it.

    The model answers its golden questions before: one that does not say what it said when it was made is not
    installed. A bundle that is there already is held against its statement again.

    Raises:
        ArtifactError: the bundle is changed, incomplete, not accepted or does not answer as it did; no room; or `out`
            holds something else.
        MissingExtraError, RuntimeLoadError: its runtime is not here, or does not load it.
    """
    opened = open_bundle(path)
    accept(opened, trust_once)
    out = out or home() / "bundles" / opened.digest
    if out.exists():
        if not (out / STATEMENT).is_file() or open_any(out).raw != opened.raw:
            raise ArtifactError(f"{out} exists and is not this bundle: choose another --out, or remove it")
        check_whole(Opened(out, opened.raw, opened.statement, opened.signature))
        return out
    with artifact.create(out, "bundle", {"digest": opened.digest}) as draft, _removed_if_refused(draft.path):
        _check_room(draft.path, opened)
        (draft.path / STATEMENT).write_bytes(opened.raw)
        (draft.path / SIGNATURE).write_bytes(opened.signature)
        _unpack(opened, draft.path)
        _check_answers(draft.path / opened.statement.model_path, opened)
    return out


def open_any(path: Path) -> Opened:
    """A packed or an installed bundle, its statement read and nothing else.

    Raises:
        ArtifactError: no bundle.
    """
    if not path.is_dir():
        return open_bundle(path)
    raw = _read_bounded(path / STATEMENT, LIMIT_BYTES)
    return Opened(path, raw, parse(raw), _read_bounded(path / SIGNATURE, SIGNATURE_BYTES))


def accept(opened: Opened, trust_once: bool = False) -> Signer | None:
    """Let a bundle pass whose signer this user trusts; returns the signer.

    Warns of what was let pass with `trust_once`, and of a model that its measured loss does not release.

    Raises:
        ArtifactError: signed by nobody or by a stranger, and not `trust_once`; or the signature is wrong.
    """
    signer = signer_of(opened.raw, opened.signature)
    if signer is None or signer.trusted_as is None:
        stranger = f"signed by {signer.told}" if signer else "signed by nobody"
        if not trust_once:
            raise ArtifactError(
                f"{opened.path} is {stranger}: refused. Trust its maker's key with 'ldrt-edge bundle trust NAME.pub', "
                "or open it with --trust-once if you know where it comes from"
            )
        say(f"WARNING: {opened.path.name} is {stranger}. Anybody may have made or changed it.")
    if not opened.statement.released:
        say(f"WARNING: {opened.statement.name} is {opened.statement.verdict}")
    return signer


def check_whole(opened: Opened) -> None:
    """Hold every byte against the statement; an installed folder must hold nothing else besides.

    Raises:
        ArtifactError: a file is changed, missing, a link, or should not be there.
    """
    if not opened.path.is_dir():
        opened.check()
        return
    folder, wanted = opened.path, {entry.path: entry for entry in opened.statement.files}
    found = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(f"{folder}: {name} is a link or no plain file: refused")
        if path.is_file():
            found.add(name)
    for name in found ^ {*wanted, STATEMENT, SIGNATURE, MANIFEST}:
        raise ArtifactError(f"{folder}: {name} {'should not be there' if name in found else 'is missing'}: refused")
    for name, entry in wanted.items():
        path = folder / name
        if path.stat().st_size != entry.bytes or artifact.file_sha256(path) != entry.sha256:
            raise ArtifactError(f"{path} is not what it was when the bundle was made: refused")


def _unpack(opened: Opened, folder: Path) -> None:
    """Into new files in a folder of our own making; the names were checked with the statement."""
    with _Writer(folder) as writer:
        opened.read(writer.start)


class _Writer:
    """Writes one member after another, each into a file that did not exist."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._descriptor = folder, -1

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def start(self, entry: FileEntry) -> Sink:
        """Close the last file, open the next."""
        self._close()
        path = self._folder / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
        return self._write

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _check_answers(model: Path, opened: Opened) -> None:
    from ldrt_edge.golden import replay

    artifact.read(model, opened.statement.kind)
    say("Asking the model its golden questions")
    faults = [entry for entry in replay(model) if entry.fault]
    if faults:
        raise ArtifactError(
            f"{opened.path}: on this machine the model does not say what it said when it was made "
            f"({len(faults)} golden answers: {faults[0].fault}): not installed"
        )


def _check_room(folder: Path, opened: Opened) -> None:
    needed = sum(entry.bytes for entry in opened.statement.files) + _MARGIN_BYTES
    if (free := shutil.disk_usage(folder).free) < needed:
        raise ArtifactError(f"{folder.parent}: {free / 1e9:.2f} GB free, and this needs {needed / 1e9:.2f} GB")


@contextmanager
def _removed_if_refused(folder: Path) -> Iterator[None]:
    """What a refused bundle has left so far must not lie about."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _read_bounded(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as stream:
            raw = stream.read(limit + 1)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > limit:
        raise ArtifactError(f"{path}: larger than {limit} bytes, refused")
    return raw
