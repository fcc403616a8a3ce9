"""`ldrt-edge bundle`: an export and the report about it into one file, NAME.ldrt.

    models/NAME/...  report/...  README.md (model card)  sbom.cdx.json

The golden answers, the front end and the licences of the base lie in the export already. The same export, report and
version of ldrt-edge give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from ldrt_edge import __version__, artifact
from ldrt_edge.artifact import MANIFEST, FileEntry, Manifest
from ldrt_edge.bundle import container, keys
from ldrt_edge.bundle.container import Source
from ldrt_edge.bundle.evidence import read_evidence
from ldrt_edge.bundle.papers import CARD, SBOM, Described, card, sbom
from ldrt_edge.bundle.statement import LIMIT_BYTES, Statement, check_name, check_paths, dump, parse
from ldrt_edge.errors import ArtifactError, ConfigError
from ldrt_edge.golden import RECORDS_PATH

SUFFIX = ".ldrt"
_MARGIN_BYTES = 16 << 20


def pack(
    edge: Path,
    report: Path,
    out: Path,
    *,
    base: str | None = None,
    licence: str | None = None,
    max_loss: float = 1.0,
    unreleased: bool = False,
) -> Path:
    """Write an unsigned bundle to `out`, which appears whole or not at all; returns `out`.

    Args:
        edge: a gguf or mlx artefact with golden answers.
        report: bench's report about it, with a reference.
        out: NAME.ldrt; NAME is the bundle's name too.
        base, licence: of the model, stated in its card and bill of materials.
        max_loss: percentage points of accuracy that it may have lost, to the upper bound of the 95% interval.
        unreleased: pack a model that lost more, or whose loss is not known; whoever opens it is told so.

    Raises:
        ConfigError: `out` is no name for a bundle, or holds another one.
        ArtifactError: the export or the report is damaged or does not belong to the other, or the model is not
            released.
    """
    problem = check_name(out.stem) if out.suffix == SUFFIX else f"a bundle's name ends in {SUFFIX}"
    if problem:
        raise ConfigError(f"--out {out.name}: {problem}")
    manifest = artifact.verify(edge, "gguf", "mlx", quick=True)
    if not any(entry.path == RECORDS_PATH for entry in manifest.files):
        raise ArtifactError(f"{edge}: it carries no golden answers: convert or quantise it again")
    evidence = read_evidence(report, manifest, max_loss)
    if not evidence.released and not unreleased:
        raise ArtifactError(f"{edge}: {evidence.verdict}. With --unreleased it is packed all the same, and says so")
    described = Described(out.stem, manifest, evidence, base, licence)
    sources = [
        *_artifact_sources(edge, manifest, f"models/{out.stem}"),
        *_artifact_sources(report, artifact.read(report), "report"),
        _source(CARD, card(described).encode()),
        _source(SBOM, sbom(described).encode()),
    ]
    sources.sort(key=lambda source: source.entry.path)
    if problem := check_paths([source.entry.path for source in sources]):
        raise ArtifactError(f"{edge}: {problem}, so it cannot be packed")
    raw = dump(Statement(
        name=out.stem, kind="mlx" if manifest.kind == "mlx" else "gguf", model_sha256=manifest.sha256,
        report_sha256=evidence.report_sha256, released=evidence.released, verdict=evidence.verdict,
        metrics=evidence.metrics, version=__version__, files=tuple(source.entry for source in sources),
    ))  # fmt: skip
    parse(raw)  # what is written can be read
    if len(raw) > LIMIT_BYTES:
        raise ArtifactError(f"{edge}: too many files for a bundle")
    if out.exists():
        return _found(out, raw)
    _write(out, raw, sources)
    return out


def _found(out: Path, raw: bytes) -> Path:
    """The same bundle, made before and perhaps signed since."""
    if not out.is_file() or (opened := container.open_bundle(out)).raw != raw:
        raise ConfigError(f"{out} exists and is another bundle: choose another --out, or remove it")
    opened.check()
    return out


def _write(out: Path, raw: bytes, sources: list[Source]) -> None:
    """Aside first; what was written is read again before it gets its name."""
    partial = artifact.partial_path(out)
    needed = sum(source.entry.bytes for source in sources) + _MARGIN_BYTES
    with artifact.writing(out):
        if not out.absolute().parent.is_dir():
            raise ArtifactError(f"{out}: no such folder: {out.parent}")
        if (free := shutil.disk_usage(out.absolute().parent).free) < needed:
            raise ArtifactError(f"{out}: {free / 1e9:.2f} GB free, and this needs {needed / 1e9:.2f} GB")
        stream = partial.open("wb")
        try:
            with stream:
                container.write(stream, raw, keys.UNSIGNED, sources)
                stream.flush()
                os.fsync(stream.fileno())
            container.open_bundle(partial).check()
            partial.rename(out)
        except (OSError, ArtifactError):
            partial.unlink()
            raise


def _artifact_sources(folder: Path, manifest: Manifest, under: str) -> list[Source]:
    """An artefact's files, and nothing else that may lie in its folder; written, they are held against it again."""
    raw = (folder / MANIFEST).read_bytes()
    if hashlib.sha256(raw).hexdigest() != manifest.sha256:
        raise ArtifactError(f"{folder}: its manifest was changed just now")
    return [
        _source(f"{under}/{MANIFEST}", raw),
        *(
            Source(FileEntry(f"{under}/{entry.path}", entry.bytes, entry.sha256), folder / entry.path)
            for entry in manifest.files
        ),
    ]


def _source(path: str, content: bytes) -> Source:
    return Source(FileEntry(path, len(content), hashlib.sha256(content).hexdigest()), content)
