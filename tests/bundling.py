"""A tiny export with its report and its maker's keys, as bundles are made of, for tests."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldrt_edge import artifact
from ldrt_edge.bench.report import bench
from ldrt_edge.bundle import container, keys
from ldrt_edge.bundle.container import open_bundle
from ldrt_edge.bundle.pack import _source
from ldrt_edge.bundle.statement import Statement
from ldrt_edge.convert.gguf import convert
from ldrt_edge.dataset import DatasetWriter, Row, Turn
from ldrt_edge.front import Front


@dataclass(frozen=True)
class Made:
    """A tiny export with its report, and the key pair of its maker."""

    edge: Path
    report: Path
    key: Path
    pub: Path


def make(source: Path, folder: Path) -> Made:
    """Of a tiny checkpoint `source`; its merged model and four coloured pictures lie beside."""
    merged = folder / "merged"
    with artifact.create(merged, "merged", {}) as draft:
        shutil.copytree(source, draft.path, dirs_exist_ok=True)
        Front.from_hf(source).save(draft.path)
    with artifact.create(folder / "data", "dataset", {}) as draft, DatasetWriter(draft.path) as writer:
        for number, colour in enumerate(("red", "green", "blue", "yellow")):
            stream = io.BytesIO()
            Image.new("RGB", (64 + number, 56), colour).save(stream, "PNG")
            image, digest = writer.add_image(stream.getvalue(), ".png")
            turns = (Turn("user", "What colour is it?"), Turn("assistant", colour))
            row = (f"{number}", image, digest, turns, "en", "colour", "open", "drawn", "CC0-1.0", digest, "k", "test")
            writer.add(Row(*row))  # type: ignore[arg-type]
    edge = convert(merged, folder / "edge")
    report = bench(edge, folder / "data", folder / "report", merged, runs=0, threads=1)
    return Made(edge, report, *keys.keygen(folder / "maker"))


def sign(path: Path, key: Path) -> Path:
    """A bundle, signed where it lies."""
    opened = open_bundle(path)
    container.replace_signature(opened, keys.sign(opened.raw, key))
    return path


def write_small(path: Path, key: Path | None = None, contents: dict[str, bytes] | None = None, **changes: Any) -> Path:
    """A bundle of a few bytes that no runtime would load; `changes` go into its statement unchecked."""
    contents = contents or {"models/small/manifest.json": b"{}", "models/small/model.gguf": bytes(range(256)) * 3}
    sources = [_source(name, content) for name, content in sorted(contents.items())]
    model = sources[0].entry.sha256
    entries = tuple(source.entry for source in sources)
    told = Statement("small", "gguf", model, "0" * 64, True, "released: so", (), "1", entries)
    raw = (json.dumps(asdict(told) | changes) + "\n").encode()
    with path.open("wb") as stream:
        container.write(stream, raw, keys.UNSIGNED if key is None else keys.sign(raw, key), sources)
    return path
