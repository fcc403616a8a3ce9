"""Artefact folders: what flows between stages, complete or not there.

Every artefact folder holds `manifest.json`: kind, versions, resolved config, seed, inputs, files with their
sha256, metrics. A stage writes into a temporary sibling (`.NAME.partial`), the manifest last, syncs, then
renames; so a manifest means complete. Names that begin with a dot are for what is being written, and end with the
draft. Stages dispatch on `kind`, never on a folder's name.

    with artifact.create(out, kind="gguf", config=config, inputs=[merged]) as draft:
        (draft.path / "model.gguf").write_bytes(...)
        draft.metrics["mean_kld"] = 1e-7
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ldrt_edge import __version__
from ldrt_edge.errors import ArtifactError, LdrtError

SCHEMA = "ldrt-edge/manifest/1"
MANIFEST = "manifest.json"
TIMES = "times.jsonl"
"""When and how long: no two runs share it, so no manifest lists it, and equal inputs give equal manifests."""
_SETTINGS = ".settings.json"
_LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "tokenizers", "gguf", "llama-cpp-python", "mlx", "mlx-lm",
    "mlx-vlm", "numpy", "pillow", "pydicom", "rouge-score", "sacrebleu", "lxml",
    "py3langid", "imagehash", "datasketch", "pypdfium2",
)
_MANIFEST_LIMIT_BYTES = 64 << 20
_NO_ROOM_BYTES = 1 << 20
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)
_NAME_LIMIT = 255

Kind = Literal[
    "base", "pairs", "dataset", "adapter", "merged", "importance", "gguf", "mlx", "app", "report", "bundle", "kit",
]
Json = Any
"""A JSON value; the one place where structure is not typed, because it is a file's."""


@dataclass(frozen=True)
class FileEntry:
    """One file of an artefact; `path` is relative, with forward slashes."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Input:
    """An artefact that a stage read: its kind and the sha256 of its manifest."""

    kind: str
    manifest_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says. `config` is the stage's resolved configuration."""

    kind: str
    config: Mapping[str, Json]
    seed: int | None
    inputs: tuple[Input, ...]
    files: tuple[FileEntry, ...]
    metrics: Mapping[str, Json]
    version: str
    libraries: Mapping[str, str]
    git_commit: str | None
    schema: str = SCHEMA
    sha256: str = field(default="", compare=False)
    """Of the manifest file itself: the artefact's identity."""


@dataclass
class Draft:
    """An artefact being written: fill `path`, then `metrics`. `complete` is True when it was there already."""

    path: Path
    metrics: dict[str, Json] = field(default_factory=dict)
    complete: bool = False


@contextmanager
def create(
    out: Path,
    kind: Kind,
    config: Mapping[str, Json],
    inputs: Sequence[Path | Input] = (),
    seed: int | None = None,
    resumable: bool = False,
) -> Iterator[Draft]:
    """Write an artefact folder so that it exists whole under `out`, or not at all.

    The same stage with the same config and inputs finds a finished folder again: then `draft.complete` is True and
    the block should do nothing. A partial folder left by a killed run, or by a full disk, is reused when `resumable`
    and its settings are the same, otherwise replaced.

    Raises:
        ArtifactError: `out` holds something else or is being written by another process, an input is no artefact, the
            disk is full, or nothing may be written there.
    """
    out = Path(out).absolute()
    described = [i if isinstance(i, Input) else identity(i) for i in inputs]
    settings = {
        "kind": kind, "config": config, "seed": seed, "inputs": [asdict(i) for i in described], "version": __version__,
    }
    settings_text = json.dumps(settings, sort_keys=True, indent=1)
    partial = partial_path(out)
    with writing(out):
        if out.exists():
            yield _reopen(out, settings)
            return
        if partial.exists():
            with _claimed(partial, out):
                same = resumable and _read_text(partial / _SETTINGS) == settings_text
            if not same:
                shutil.rmtree(partial)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            (partial / _SETTINGS).write_text(settings_text)
            draft = Draft(partial)
            with _claimed(partial, out):
                yield draft
            _sweep(partial)
            manifest = _describe(partial, kind, config, seed, tuple(described), draft.metrics)
            _write_synced(partial / MANIFEST, _dump(manifest))
            _sync_folder(partial)
            partial.rename(out)
            _sync_folder(out.parent)
        except Exception as error:
            if not resumable and _is_full(out.parent, error):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def partial_path(out: Path) -> Path:
    """Where `out` is written before it gets its name."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Say in one line why `out` cannot be written: no room, or no place that may be written to.

    Raises:
        ArtifactError: it cannot. What is no matter of writing `out` passes as it is.
    """
    out = out.absolute()
    try:
        yield
    except LdrtError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and _is_refused(error, out):
            raise ArtifactError(f"cannot write {out}: {error.strerror}: choose another --out") from error
        if _is_full(out.parent, error):
            raise ArtifactError(f"disk full while writing {out}: free some space, then run this again") from error
        raise


def _is_full(folder: Path, error: Exception) -> bool:
    """Whether a write failed for want of room.

    Some libraries tell so in words of their own (torch, MLX), so the disk itself is asked too.
    """
    if _system_error(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return not isinstance(error, LdrtError) and folder.is_dir() and shutil.disk_usage(folder).free < _NO_ROOM_BYTES


def _is_refused(error: OSError, out: Path) -> bool:
    """Whether the error says that `out`, a folder that leads to it, or its draft may not be written to.

    A file that is too large for its file system, as FAT's 4 GB, can only be one that is written.
    """
    if error.errno == errno.EFBIG:
        return True
    if error.errno not in _UNWRITABLE or not isinstance(error.filename, (str, os.PathLike)):
        return False
    path = Path(error.filename).absolute()
    return path in (out, *out.parents) or path.is_relative_to(partial_path(out))


def _system_error(error: Exception) -> int:
    """The system's number of an error, 0 for none: libraries written in Rust say it in words, PyTorch not at all."""
    if isinstance(error, OSError):
        return error.errno or 0
    if "PytorchStreamWriter" in str(error) or "inline_container.cc" in str(error):
        return errno.ENOSPC
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


@contextmanager
def _claimed(partial: Path, out: Path) -> Iterator[None]:
    """Hold a draft folder against a second process that was given the same `out`; a killed one holds nothing."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (partial / _SETTINGS).open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtifactError(f"{out}: another process is writing it now: wait for it, or choose another") from error
        yield


def read(folder: Path, *kinds: Kind) -> Manifest:
    """Read an artefact's manifest and check that it is of one of `kinds` (any, if none is named).

    Raises:
        ArtifactError: no manifest, not ours, or of another kind.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder")
    if not path.is_file():
        raise ArtifactError(f"{folder}: no {MANIFEST}, so not a finished artefact of ldrt-edge")
    if path.stat().st_size > _MANIFEST_LIMIT_BYTES:
        raise ArtifactError(f"{path}: larger than {_MANIFEST_LIMIT_BYTES >> 20} MiB, refused")
    raw = path.read_bytes()
    try:
        data = json.loads(raw)
        manifest = Manifest(
            kind=str(data["kind"]), config=dict(data["config"]), seed=data["seed"],
            inputs=tuple(Input(**i) for i in data["inputs"]), files=tuple(FileEntry(**f) for f in data["files"]),
            metrics=dict(data["metrics"]), version=data["version"], libraries=dict(data["libraries"]),
            git_commit=data["git_commit"], schema=data["schema"], sha256=hashlib.sha256(raw).hexdigest(),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a manifest that this version reads ({error!r})") from error
    if manifest.schema != SCHEMA:
        raise ArtifactError(f"{path}: schema {str(manifest.schema)[:60]!r}, this version reads {SCHEMA}")
    if problem := _problem(manifest):
        raise ArtifactError(f"{path}: not a manifest that this version reads ({problem})")
    if kinds and manifest.kind not in kinds:
        raise ArtifactError(f"{folder} holds a {manifest.kind} artefact, wanted: {' or '.join(kinds)}")
    return manifest


def _problem(manifest: Manifest) -> str | None:
    """What is not of its type, or names a file that no artefact holds; None where nothing is."""
    texts = [manifest.kind, manifest.version, *manifest.libraries, *manifest.libraries.values()]
    texts += [manifest.git_commit or "", *(text for i in manifest.inputs for text in (i.kind, i.manifest_sha256))]
    seeded = manifest.seed is None or type(manifest.seed) is int
    if not seeded or not all(isinstance(text, str) and text.isprintable() for text in texts):
        return "a field is not of its type"
    for entry in manifest.files:
        if not isinstance(entry.path, str) or type(entry.bytes) is not int or not isinstance(entry.sha256, str):
            return "a file's entry is none"
        parts = entry.path.split("/")
        if not entry.path.isprintable() or not all(parts) or max(map(len, parts)) > _NAME_LIMIT or entry.bytes < 0:
            return f"a file must not be named {entry.path[:80]!r}"
    if len({entry.path for entry in manifest.files}) < len(manifest.files):
        return "a file is named twice"
    return None


def identity(folder: Path) -> Input:
    """The artefact in `folder` as an input of another one."""
    manifest = read(folder)
    return Input(manifest.kind, manifest.sha256)


def verify(folder: Path, *kinds: Kind, quick: bool = False) -> Manifest:
    """Check every file against the manifest: sizes, and sha256 unless `quick`.

    Raises:
        ArtifactError: a file is missing, changed, or its path leaves the folder.
    """
    manifest = read(folder, *kinds)
    for entry in manifest.files:
        path = folder / entry.path
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(f"{folder}: the manifest names a file outside the folder: {entry.path}")
        if not path.is_file():
            raise ArtifactError(f"{folder}: {entry.path} is missing")
        if path.stat().st_size != entry.bytes:
            raise ArtifactError(f"{path}: {path.stat().st_size} bytes, the manifest says {entry.bytes}")
        if not quick and file_sha256(path) != entry.sha256:
            raise ArtifactError(f"{path}: changed since it was written (sha256 differs from the manifest)")
    return manifest


def file_sha256(path: Path) -> str:
    """The sha256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _reopen(out: Path, settings: Mapping[str, Json]) -> Draft:
    manifest = read(out) if (out / MANIFEST).is_file() else None
    if manifest is None:
        raise ArtifactError(f"{out} exists and is not an artefact of ldrt-edge: choose another --out")
    same = {
        "kind": manifest.kind, "config": manifest.config, "seed": manifest.seed,
        "inputs": [asdict(i) for i in manifest.inputs], "version": manifest.version,
    }
    if json.dumps(same, sort_keys=True) != json.dumps(settings, sort_keys=True):
        raise ArtifactError(f"{out} exists, made with other settings or inputs: choose another --out, or remove it")
    verify(out, quick=True)
    return Draft(out, dict(manifest.metrics), complete=True)


def _sweep(partial: Path) -> None:
    """Remove what begins with a dot: the settings, and scraps of writing, which a killed run or a library left."""
    for path in partial.rglob(".*"):
        if path.is_file() or path.is_symlink():
            path.unlink()


def _describe(
    folder: Path, kind: str, config: Mapping[str, Json], seed: int | None, inputs: tuple[Input, ...],
    metrics: Mapping[str, Json],
) -> Manifest:
    files = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != TIMES):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files.append(FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, file_sha256(path)))
    return Manifest(
        kind=kind, config=config, seed=seed, inputs=inputs, files=tuple(files), metrics=metrics,
        version=__version__, libraries=library_versions(), git_commit=git_commit(),
    )


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that results depend on."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """The commit of the checkout this code runs from, with `-dirty` if changed; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def _dump(manifest: Manifest) -> str:
    data = asdict(manifest)
    del data["sha256"]
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _read_text(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that a run that is killed here finds the old one or the new one."""
    partial = path.with_name(f".{path.name}")
    _write_synced(partial, text)
    partial.replace(path)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # Windows has no directory handles to sync
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
