"""Builders of articles for tests: JATS, packages as publishers ship them, and pictures with something on them."""

from __future__ import annotations

import io
import os
import signal
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ldrt_edge.errors import DataError
from ldrt_edge.train.data import reading

LICENCE = (
    '<permissions><license xlink:href="https://creativecommons.org/licenses/by/4.0/"><license-p>CC</license-p>'
    "</license></permissions>"
)


def picture(seed: int, size: tuple[int, int] = (320, 240), form: str = "PNG") -> bytes:
    """A drawing that no other seed looks like."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for _ in range(14):
        x, y = rng.integers(0, size[0]), rng.integers(0, size[1])
        w, h = rng.integers(20, size[0] // 2), rng.integers(20, size[1] // 2)
        box = (int(x - w / 2), int(y - h / 2), int(x + w / 2), int(y + h / 2))
        draw.ellipse(box, fill=tuple(rng.integers(0, 230, 3)))
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


def figure(number: int, caption: str, graphic: str | None = None, more: str = "") -> str:
    """One `fig` with its caption and graphic."""
    named = f'<graphic xlink:href="{graphic or f"x-g{number:03d}"}"/>' if graphic != "" else ""
    return f'<fig id="f{number}"><label>Figure {number}</label><caption><p>{caption}</p></caption>{named}{more}</fig>'


def jats(
    doi: str,
    figures: str,
    *,
    title: str = "Low-dose radiotherapy of plantar fasciitis",
    body: str = "",
    language: str = "en",
    permissions: str = LICENCE,
    after: str = "",
    head: str = "",
) -> bytes:
    """A JATS article."""
    declared = f' xml:lang="{language}"' if language else ""
    return (
        f'<?xml version="1.0" encoding="utf-8"?>{head}<article xmlns:xlink="http://www.w3.org/1999/xlink"{declared}>'
        "<front><journal-meta><journal-title-group><journal-title>Journal of Tests</journal-title>"
        "</journal-title-group></journal-meta><article-meta>"
        f'<article-id pub-id-type="doi">{doi}</article-id><title-group><article-title>{title}</article-title>'
        "</title-group><pub-date pub-type='epub'><day>6</day><month>8</month><year>2021</year></pub-date>"
        f"{permissions}<kwd-group><kwd>radiotherapy</kwd><kwd>heel</kwd></kwd-group></article-meta></front>"
        f"<body><sec><p>{body}</p>{figures}</sec></body>{after}</article>"
    ).encode()


def folder(root: Path, files: dict[str, bytes]) -> Path:
    """Files in a folder."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    """Files in a zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    """Files (and symbolic links) in a tar.gz, as PubMed Central ships them."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return path


def refusing_reader(chunk: reading.Chunk) -> int:
    """As `read_chunk` where the machine has no room."""
    raise DataError("the disk is full")


def dying_reader(chunk: reading.Chunk) -> int:
    """A worker that dies on the article in folder 007, as a crash of a decoder ends a process."""
    if any("/007/" in unit.where and unit.where not in chunk.given_up for unit in chunk.units):
        os._exit(9)
    return reading.read_chunk(chunk)


def always_dying_reader(chunk: reading.Chunk) -> int:
    """A worker that dies whatever it is given."""
    os._exit(9)


def killing_reader(chunk: reading.Chunk) -> int:
    """A worker that kills the whole run at its fourth chunk, as kill -9 does."""
    if chunk.number == 3:
        os.killpg(os.getpgid(0), signal.SIGKILL)
    return reading.read_chunk(chunk)
