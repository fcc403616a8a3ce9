"""Picture files to RGB pixels: PNG, JPEG, TIFF and DICOM, told apart by content and never trusted.

A file's size and its dimensions are checked before its pixels are decoded, and whatever goes wrong with a file is one
`DataError` line. Neither `Origin` nor any message holds patient data: no header value but the modality is passed on.

Grey values become 8 bits as a viewer would show them: through the given window, else through the window or lookup
table that a DICOM header asks for; else values of at most 8 bits stay as they are and deeper ones are stretched from
the smallest to the largest value of the frame. 16-bit colour keeps its high byte.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ldrt_edge.errors import DataError

MAX_BYTES = 512 << 20
MAX_PIXELS = 64_000_000
MIN_SIDE = 8
MAX_SIDE = 65_535  # what JPEG holds; nothing can be seen in a strip that is longer
_PIXELS_PER_BYTE = 8 * 1032  # of black and white, as deflate packs it at best; source: RFC 1951, 258 bytes in 2 bits
GIVEN = "LINEAR_EXACT"
"""The function of a window that the user gives: center ± width/2. DICOM's LINEAR, which the header's window is by
default, takes 1 off the width and 0.5 off the center, and so means something for whole numbers only, not for Gy.
Source: DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3.2."""
_FORMATS = ("PNG", "JPEG", "TIFF")
_TIFF_PHOTOMETRIC = 262  # TIFF 6.0, section 4; 0 is WhiteIsZero

Mapping = Literal["window", "lookup table", "full range", "as stored"]
Window = tuple[float, float]
Values = NDArray[Any]  # of any numeric dtype: a file decides


@dataclass(frozen=True)
class Overlay:
    """What was drawn over a picture: "RTDOSE" or "RTSTRUCT", its file's sha256, its colours as (label, "#rrggbb")."""

    modality: str
    sha256: str
    legend: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Origin:
    """Where pixels came from and what was done to them; no patient data.

    modality: DICOM's code ("CT", "RTDOSE"), None for other formats. window: (center, width) if one was applied, in
    the picture's own values (HU for CT). frame counts from 0, of `frames`. mapping: how values became 8 bits.
    sha256: of the file's bytes. overlays: what `ldrt_edge.overlay` drew over it. blacked_out:
    lines of burned-in text under black boxes.
    """

    format: str
    modality: str | None
    window: Window | None
    frame: int
    frames: int
    mapping: Mapping
    sha256: str
    overlays: tuple[Overlay, ...] = ()
    blacked_out: int = 0


@dataclass(frozen=True, eq=False)
class Picture:
    """rgb: (height, width, 3) uint8. levels: lowest and highest grey value, for a window; None in colour."""

    rgb: NDArray[np.uint8]
    origin: Origin
    levels: tuple[float, float] | None


Look = Callable[[Window | None], Picture]
"""A frame through a window, or as its file says."""


def read_image(path: Path, window: Window | None = None, frame: int = 0) -> Picture:
    """Read a picture file; `window` is (center, width) in the picture's grey values, `frame` counts from 0.

    Raises:
        DataError: no such file, not a picture that can be read, too large, or no such frame.
    """
    return read_image_bytes(read_file(path), window, frame, name=str(path))


def read_file(path: Path) -> bytes:
    """The bytes of what may be a picture file.

    Raises:
        DataError: no such file, no regular one, or too large.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise DataError(f"{path}: a folder, not a picture: name one file")
        if not path.is_file():
            raise DataError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{path}: {size >> 20} MiB, the limit is {MAX_BYTES >> 20} MiB")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def read_image_bytes(
    data: bytes, window: Window | None = None, frame: int = 0, name: str = "the picture"
) -> Picture:
    """Read a picture from a file's bytes; `name` is what messages call it. See `read_image`."""
    return read_frame(data, frame, name)(window)


def read_frame(data: bytes, frame: int = 0, name: str = "the picture") -> Look:
    """Decode a frame once, to look at it through several windows; each view is drawn once. See `read_image`.

    Raises:
        DataError: it cannot be read; when it is looked at, the window does not fit it.
    """
    with _named(name):
        if len(data) > MAX_BYTES:
            raise DataError(f"{len(data) >> 20} MiB, the limit is {MAX_BYTES >> 20} MiB")
        if frame < 0:
            raise DataError(f"frame {frame}: frames count from 0")
        if looks_like_dicom(data):
            from ldrt_edge.dicom import read_dicom

            draw = read_dicom(data, frame)
        else:
            draw = _read_pillow(data, frame)

    @cache
    def look(window: Window | None) -> Picture:
        with _named(name):
            if window is not None and not (math.isfinite(window[0]) and math.isfinite(window[1]) and window[1] > 0):
                raise DataError("a window is CENTER,WIDTH with a width above 0")
            return draw(window)

    return look


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{name}: {error}") from error.__cause__


def looks_like_dicom(data: bytes) -> bool:
    """The DICM mark, or an early file without one: an element of group 2 or 8, in either byte order."""
    if data[128:132] == b"DICM":
        return True
    return data[:2] in (b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08") and b"\x00" in data[2:12]


def _read_pillow(data: bytes, frame: int) -> Look:
    with decoding("not a readable picture"):
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.DecompressionBombError:
            raise DataError(f"more pixels than the limit of {MAX_PIXELS // 10**6} megapixels: scale it down") from None
        except UnidentifiedImageError:
            raise DataError("not a readable picture: neither PNG, JPEG, TIFF nor DICOM, or damaged") from None
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    check_size(*image.size)
    if math.prod(image.size) > len(data) * _PIXELS_PER_BYTE:
        raise DataError(f"a damaged {kind} file: {len(data)} bytes cannot hold {image.width}×{image.height} pixels")
    with decoding(f"a damaged or truncated {kind} file"):
        frames = int(getattr(image, "n_frames", 1))
        check_frame(frame, frames)
        if frame:
            image.seek(frame)
            check_size(*image.size)
        white_is_zero = kind == "TIFF" and image.getexif().get(_TIFF_PHOTOMETRIC) == 0
        image.load()
        upright = ImageOps.exif_transpose(image)
    origin = Origin(kind, None, None, frame, frames, "as stored", sha256(data))
    if upright.mode in ("1", "L") or upright.mode[0] in "IF":
        # Pillow turns WhiteIsZero round for 1 and 8 bits, and leaves deeper values as they are
        invert = white_is_zero and upright.mode not in ("1", "L")
        values = np.asarray(upright.convert("L") if upright.mode == "1" else upright)

        def draw(window: Window | None) -> Picture:
            grey, mapping = grey_to_uint8(values, window, 255.0 if values.dtype == np.uint8 else None)
            rgb = grey_to_rgb(255 - grey if invert else grey)
            return Picture(rgb, replace(origin, window=window, mapping=mapping), levels_of(values))

        return draw
    with decoding(f"a {kind} file in colours that cannot be converted ({upright.mode}): save it as RGB"):
        coloured = Picture(np.array(_colour_to_rgb(upright)), origin, None)

    def as_it_is(window: Window | None) -> Picture:
        refuse_window(window)
        return coloured

    return as_it_is


def _colour_to_rgb(image: Image.Image) -> Image.Image:
    """Any colour mode to RGB; what is transparent becomes black, as an empty film is."""
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over).convert("RGB")
    return image.convert("RGB")


def grey_to_uint8(
    values: Values, window: Window | None, stored_max: float | None, function: str = GIVEN,
    visible: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.uint8], Mapping]:
    """Grey values to 8 bits: by a window, unchanged out of `stored_max`, or stretched over the `visible` values."""
    if window is not None:
        return as_uint8(_windowed(values, window, function)), "window"
    if stored_max is not None:
        return as_uint8(values / stored_max * 255), "as stored"
    numbers = values.astype(np.float64)
    usable = np.isfinite(numbers) & (True if visible is None else visible)
    low, high = (float(numbers[usable].min()), float(numbers[usable].max())) if usable.any() else (0.0, 0.0)
    numbers = np.nan_to_num(numbers, nan=low, posinf=high, neginf=low)
    return as_uint8((np.clip(numbers, low, high) - low) / (high - low or 1.0) * 255), "full range"


def _windowed(values: Values, window: Window, function: str) -> NDArray[np.float64]:
    """Apply a window: 0 to 255. pydicom scales to the range that a header's bit depth names, so it gets one of 8."""
    from pydicom import Dataset
    from pydicom.pixels import processing

    asked = Dataset()
    asked.PhotometricInterpretation, asked.BitsStored, asked.PixelRepresentation = "MONOCHROME2", 8, 0
    asked.VOILUTFunction = function
    # DS elements hold at most 16 characters
    asked.WindowCenter, asked.WindowWidth = f"{window[0]:.8g}", f"{window[1]:.8g}"
    return np.asarray(processing.apply_windowing(np.nan_to_num(values.astype(np.float64)), asked))


def levels_of(values: Values) -> tuple[float, float]:
    """Lowest and highest value that is a number; 0 and 0 where none is."""
    numbers = values[np.isfinite(values)]
    return (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 0.0)


def sha256(data: bytes) -> str:
    """As hex."""
    return hashlib.sha256(data).hexdigest()


def as_uint8(values: Values) -> NDArray[np.uint8]:
    """Round and clip to uint8, contiguous."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values, dtype=np.uint8)
    return np.asarray(np.clip(np.rint(values), 0, 255), dtype=np.uint8)


def grey_to_rgb(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(height, width) to (height, width, 3)."""
    return np.repeat(grey[..., None], 3, axis=2)


def check_size(width: int, height: int) -> None:
    """Refuse dimensions that are too large to decode or too small to see anything.

    Raises:
        DataError: they are.
    """
    if width * height > MAX_PIXELS:
        raise DataError(f"{width}×{height} pixels, the limit is {MAX_PIXELS // 10**6} megapixels: scale it down")
    if max(width, height) > MAX_SIDE:
        raise DataError(f"{width}×{height} pixels: no side may be longer than {MAX_SIDE}")
    if min(width, height) < MIN_SIDE:
        raise DataError(f"{width}×{height} pixels: nothing can be seen in a picture below {MIN_SIDE}×{MIN_SIDE}")


def check_frame(frame: int, frames: int) -> None:
    """Refuse a frame that is not there.

    Raises:
        DataError: it is not.
    """
    if frame >= frames:
        raise DataError(f"frame {frame}: the file has {frames} (counted from 0)")


def refuse_window(window: Window | None) -> None:
    """Refuse a window on a coloured picture.

    Raises:
        DataError: one was given.
    """
    if window is not None:
        raise DataError("a window applies to grey pictures, and this one is in colour: leave it out")


@contextmanager
def decoding(problem: str) -> Iterator[None]:
    """Turn whatever a decoder raises into one line: on damaged bytes they raise anything.

    The cause is dropped on purpose, since pydicom quotes header values, which may be a patient's.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DataError:
        raise
    except Exception:
        raise DataError(problem) from None
