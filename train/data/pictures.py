"""How a foreign picture enters a dataset: read once to prove that it can be, stored without what else its file says."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldrt_edge.errors import DataError
from ldrt_edge.image import Picture, read_image

_KEPT_AS_IS = {"PNG": ".png", "JPEG": ".jpg"}
_JPEG_SEGMENTS = {"APP0", "APP14"}  # JFIF's density, Adobe's colour transform
_HARMLESS = {
    "jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi", "adobe", "adobe_transform", "gamma", "srgb",
    "progressive", "progression",
}


def picture_bytes(path: Path) -> tuple[bytes, str]:
    """A picture file as a dataset stores it: encoded bytes and suffix.

    PNG and JPEG in RGB or grey stay byte for byte, unless they carry text, EXIF or other metadata, which may name a
    patient; everything else becomes a PNG of what `read_image` makes of it.

    Raises:
        DataError: the file is missing or no readable picture.
    """
    picture = read_image(path)
    return stored_as(path.read_bytes(), picture)


def stored_as(data: bytes, picture: Picture) -> tuple[bytes, str]:
    """A read picture as a dataset stores it; `data` are its file's bytes. See `picture_bytes`."""
    suffix = _KEPT_AS_IS.get(picture.origin.format)
    if suffix and _says_nothing_else(data):
        return data, suffix
    return png_bytes(picture.rgb), ".png"


def _says_nothing_else(data: bytes) -> bool:
    """Whether a file holds plain RGB or grey pixels and no metadata beyond what decoding needs."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()  # PNG text may follow the pixels
        segments = {name for name, _ in getattr(image, "applist", ())}
        return image.mode in ("RGB", "L") and set(image.info) <= _HARMLESS and segments <= _JPEG_SEGMENTS


def png_bytes(pixels: NDArray[np.uint8]) -> bytes:
    """A uint8 picture, (h, w) or (h, w, 3), as PNG; grey is stored as grey."""
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "PNG", compress_level=3)
    return stream.getvalue()


def find_picture(root: Path, name: str, folders: Sequence[str]) -> Path:
    """The file that `name` means in `root`, or in one of the `folders` under it.

    Raises:
        DataError: not there, outside `root`, or no name that a file can have.
    """
    inside = root.resolve()
    try:
        for folder in ("", *folders):
            path = root / folder / name
            if not path.resolve().is_relative_to(inside):
                raise DataError(f"image {name}: outside {root}")
            if path.is_file():
                return path
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, links in a circle
        raise DataError(f"image {name[:80]!r}: not the name of a file ({getattr(error, 'strerror', error)})") from error
    raise DataError(f"image {name}: no such file")


def file_digest(path: Path) -> str:
    """The sha256 of an input file, for a stage's config."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
