"""What a bundle's signature stands for: the statement that names every file in it, and what was measured.

    {"schema", "name", "kind", "released", "verdict", "metrics", ..., "files": [{"path", "bytes", "sha256"}]}

A statement may come from anybody. So it is read as one: bounded, strict about types, and with paths that can be
written on every system, inside the folder that they are unpacked into and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ldrt_edge.artifact import MANIFEST, FileEntry
from ldrt_edge.errors import ArtifactError

SCHEMA = "ldrt-edge/bundle/2"
STATEMENT, SIGNATURE = "bundle.json", "bundle.sig"
LIMIT_BYTES = 4 << 20
PATH_LIMIT = 100  # what a plain tar header holds
_FILES_LIMIT = 10_000
_BYTES_LIMIT = 1 << 48
_TEXT_LIMIT = 400
_NUMBER_LIMIT = 1e15
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ +=@-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_OWN = (STATEMENT, SIGNATURE, MANIFEST)


@dataclass(frozen=True)
class Metric:
    """A measured figure, with its 95% interval where it has one."""

    name: str
    value: float
    ci_low: float | None = None
    ci_high: float | None = None


@dataclass(frozen=True)
class Statement:
    """All that a bundle says of itself.

    name: also the folder of its model, `models/NAME`. model_sha256, report_sha256: of the manifests of the model and
    of the report about it. released, verdict: whether the measured loss lies within its budget, and the reason in
    words. version: of ldrt-edge, which packed it.
    """

    name: str
    kind: Literal["gguf", "mlx"]
    model_sha256: str
    report_sha256: str
    released: bool
    verdict: str
    metrics: tuple[Metric, ...]
    version: str
    files: tuple[FileEntry, ...]
    schema: str = SCHEMA

    @property
    def model_path(self) -> str:
        """The model's folder among the files."""
        return f"models/{self.name}"


def dump(statement: Statement) -> bytes:
    """The statement as its bytes, which are signed and hashed; equal statements have equal bytes."""
    return (json.dumps(asdict(statement), indent=1, sort_keys=True) + "\n").encode()


def parse(raw: bytes) -> Statement:
    """Read a statement that nothing is known about yet.

    Raises:
        ArtifactError: not a statement of this version, or one that names files that must not be written.
    """
    try:
        data = json.loads(raw)
        schema = data["schema"]
        if schema != SCHEMA:
            raise ArtifactError(f"{STATEMENT}: schema {str(schema)[:60]!r}, this version reads {SCHEMA}")
        statement = Statement(
            **data | {
                "metrics": tuple(Metric(**metric) for metric in data["metrics"]),
                "files": tuple(FileEntry(**entry) for entry in data["files"]),
            }
        )
        problem = _problem(statement)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{STATEMENT}: not a statement that this version reads ({str(error)[:80]})") from error
    if problem:
        raise ArtifactError(f"{STATEMENT}: {problem}")
    return statement


def digest(raw: bytes) -> str:
    """A bundle's identity: the sha256 of its statement, which fixes every other byte but the signature."""
    return hashlib.sha256(raw).hexdigest()


def check_name(name: str) -> str | None:
    """What is wrong with a bundle's name, or None."""
    if not _NAME.fullmatch(name) or _DEVICES.fullmatch(name) or name.endswith("."):
        return f"{name[:60]!r} is no name for a bundle: small letters, digits, '.', '_' and '-', at most 40"
    return None


def check_paths(paths: Sequence[str]) -> str | None:
    """What keeps these paths from being written below one folder on Linux, macOS and Windows alike, or None."""
    if list(paths) != sorted(set(paths)):
        return "its files are not in order, or a name occurs twice"
    for path in paths:
        parts = path.split("/")
        if len(path) > PATH_LIMIT or path in _OWN or not all(map(_is_portable, parts)):
            return f"a file must not be named {path[:120]!r}"
    folded = {path.casefold() for path in paths}
    if len(folded) < len(paths):
        return "two file names differ by their case alone"
    folders = {path.rsplit("/", depth)[0] for path in folded for depth in range(1, path.count("/") + 1)}
    if clash := folders & folded:
        return f"{min(clash)!r} is both a file and a folder"
    return None


def _is_portable(part: str) -> bool:
    return bool(_PART.fullmatch(part)) and part[-1] not in ". " and not _DEVICES.fullmatch(part)


def _problem(statement: Statement) -> str | None:
    texts: tuple[Any, ...] = (statement.name, statement.verdict, statement.version)
    hashes: tuple[Any, ...] = (statement.model_sha256, statement.report_sha256)
    if not all(map(_is_text, texts)) or not isinstance(statement.released, bool):
        return "a field is not of its type, too long, or cannot be shown"
    if statement.kind not in ("gguf", "mlx"):
        return "a bundle holds a gguf or mlx model"
    if not all(map(_is_metric, statement.metrics)):
        return "a metric is not a name and numbers"
    if not 0 < len(statement.files) <= _FILES_LIMIT or not all(map(_is_entry, statement.files)):
        return "its list of files is empty, too long, or holds what is no file"
    if not all(_is_sha256(value) for value in hashes):
        return "a manifest's sha256 is none"
    paths = [entry.path for entry in statement.files]
    manifests = [entry.sha256 for entry in statement.files if entry.path == f"{statement.model_path}/{MANIFEST}"]
    if manifests != [statement.model_sha256]:
        return "the model that it names is not in it"
    return check_name(statement.name) or check_paths(paths)


def _is_entry(entry: FileEntry) -> bool:
    sized = type(entry.bytes) is int and 0 <= entry.bytes < _BYTES_LIMIT
    return isinstance(entry.path, str) and sized and _is_sha256(entry.sha256)


def _is_metric(metric: Metric) -> bool:
    numbers = [metric.value, *(bound for bound in (metric.ci_low, metric.ci_high) if bound is not None)]
    return _is_text(metric.name) and all(type(n) in (int, float) and abs(n) < _NUMBER_LIMIT for n in numbers)


def _is_text(value: object) -> bool:
    """Text that a terminal shows as it is: no control characters, which could say something else there."""
    return isinstance(value, str) and len(value) <= _TEXT_LIMIT and value.isprintable()


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and bool(_SHA256.fullmatch(value))
