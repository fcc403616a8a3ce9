"""From the name that an article gives a picture to pixels that may enter a dataset.

Publishers ship other names than their XML gives: another suffix, other case, a prefix or an ending of their own. The
known variants are tried in order, in the folder that the XML names, then by the last name alone; a file that none of
them names, or that several do, is counted and never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.errors import DataError
from ldrt_edge.image import read_image_bytes
from ldrt_edge.train.data.packages import Files
from ldrt_edge.train.data.pictures import png_bytes, stored_as

SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".dcm")
"""What can be read, best first; a GIF beside them is a thumbnail."""
_OTHER_SUFFIXES = (".gif", ".eps", ".svg", ".pdf", ".bmp", ".webp")
_ENDINGS = ("", "_html", "_lrg", "-large", "_l", "-m", "_m", ".original")
"""BMC and Springer (_HTML), Elsevier (_lrg), Silverchair (-large, -m), PLOS (.original)."""
_PREFIX = "journal."
"""PLOS: journal.pone.0000217.g001 on disk, pone.0000217.g001 in the XML."""
_JPEG_QUALITY = 92


@dataclass(frozen=True, eq=False)
class Pixels:
    """A picture as it will be stored: pixels (height, width, 3) uint8, encoded bytes and suffix."""

    rgb: NDArray[np.uint8]
    data: bytes
    suffix: str


def find_file(names: Sequence[str], files: Files) -> str:
    """The file beside an article that one of a picture's names means.

    Raises:
        DataError: none, or several that cannot be told apart.
    """
    unreadable: str | None = None
    for name in names:
        path = PurePosixPath(unquote(name.replace("\\", "/").split("?")[0]).rstrip("/").lower())
        suffix = next((end for end in (*SUFFIXES, *_OTHER_SUFFIXES) if path.name.endswith(end)), "")
        stem = path.name.removesuffix(suffix)
        if not stem:
            continue
        suffixes = dict.fromkeys((suffix, *SUFFIXES) if suffix in SUFFIXES else SUFFIXES)
        for folder in dict.fromkeys((f"{path.parent}/" if path.parent.name else "", "")):
            for prefix in ("", _PREFIX):
                for ending in _ENDINGS:
                    for candidate in suffixes:
                        found = files.named(f"{folder}{prefix}{stem}{ending}{candidate}")
                        if len(found) == 1:
                            return found[0]
                        if found:
                            raise DataError(f"{len(found)} files are called {prefix}{stem}{ending}{candidate}")
        unreadable = unreadable or next((end for end in _OTHER_SUFFIXES if files.named(stem + end)), None)
    if unreadable:
        raise DataError(f"only as {unreadable[1:].upper()}")
    raise DataError("no file of that name")


def read_pixels(handle: str, files: Files) -> Pixels:
    """Read a picture file in its full size.

    Raises:
        DataError: too large, damaged, or no picture that can be read.
    """
    data = files.read(handle)
    picture = read_image_bytes(data, name="picture")
    return Pixels(picture.rgb, *stored_as(data, picture))


def shrunk(rgb: NDArray[np.uint8], max_side: int) -> NDArray[np.uint8]:
    """Scaled down so that the longer side has `max_side` pixels; as it is where it has fewer."""
    height, width = rgb.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return rgb
    from PIL import Image

    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0))


def encoded(rgb: NDArray[np.uint8], lossy: bool = False) -> Pixels:
    """Pixels as they will be stored: a JPEG where they came from one, else a PNG."""
    if not lossy:
        return Pixels(rgb, png_bytes(rgb), ".png")
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(rgb)).save(stream, "JPEG", quality=_JPEG_QUALITY)
    return Pixels(rgb, stream.getvalue(), ".jpg")
