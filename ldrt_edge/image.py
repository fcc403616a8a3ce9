"""Picture files to RGB pixels: PNG, JPEG, TIFF and DICOM, told apart by content and never trusted.

A file's size and its dimensions are checked before its pixels are decoded, and whatever goes wrong with a file is one
`DataError` line. Neither `Origin` nor any message holds patient data: no header value but the modality is passed on.

Grey values become 8 bits as a viewer would show them: through the given window, else through the window or lookup
table that a DICOM header asks for; else values of at most 8 bits stay as they are and deeper ones are stretched from
the smallest to the largest value of the frame. 16-bit colour keeps its high byte.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ldrt_edge.errors import DataError

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_BYTES = 512 << 20
MAX_PIXELS = 64_000_000
MIN_SIDE = 8
READABLE = "PNG, JPEG, TIFF and DICOM"
_FORMATS = ("PNG", "JPEG", "TIFF")
_TIFF_PHOTOMETRIC = 262  # TIFF 6.0, section 4; 0 is WhiteIsZero
_PALETTES = tuple(f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue"))
_DEFLATED = "1.2.840.10008.1.2.1.99"

Mapping = Literal["window", "lookup table", "full range", "as stored"]
Window = tuple[float, float]
Values = NDArray[Any]  # of any numeric dtype: a file decides


@dataclass(frozen=True)
class Origin:
    """Where pixels came from and what was done to them; no patient data.

    modality: DICOM's code ("CT", "RTDOSE"), None for other formats. window: (center, width) if one was applied, in
    the picture's own values (HU for CT). frame counts from 0, of `frames`. mapping: how values became 8 bits.
    """

    format: str
    modality: str | None
    window: Window | None
    frame: int
    frames: int
    mapping: Mapping


@dataclass(frozen=True, eq=False)
class Picture:
    """rgb: (height, width, 3) uint8."""

    rgb: NDArray[np.uint8]
    origin: Origin


def read_image(path: Path, window: Window | None = None, frame: int = 0) -> Picture:
    """Read a picture file; `window` is (center, width) in the picture's grey values, `frame` counts from 0.

    Raises:
        DataError: no such file, not a picture that can be read, too large, or no such frame.
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
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    return read_image_bytes(data, window, frame, name=str(path))


def read_image_bytes(
    data: bytes, window: Window | None = None, frame: int = 0, name: str = "the picture"
) -> Picture:
    """Read a picture from a file's bytes; `name` is what messages call it. See `read_image`."""
    try:
        if len(data) > MAX_BYTES:
            raise DataError(f"{len(data) >> 20} MiB, the limit is {MAX_BYTES >> 20} MiB")
        if frame < 0:
            raise DataError(f"frame {frame}: frames count from 0")
        if window is not None and not (math.isfinite(window[0]) and math.isfinite(window[1]) and window[1] >= 1):
            raise DataError("a window is CENTER,WIDTH with a width of at least 1")
        return _read_dicom(data, window, frame) if _looks_like_dicom(data) else _read_pillow(data, window, frame)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error.__cause__


def _read_pillow(data: bytes, window: Window | None, frame: int) -> Picture:
    with _decoding("not a readable picture"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what `_check_size` refuses
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.DecompressionBombError:
            raise DataError(f"more pixels than the limit of {MAX_PIXELS // 10**6} megapixels: scale it down") from None
        except UnidentifiedImageError:
            raise DataError(f"not a picture that can be read ({READABLE} are), or its beginning is damaged") from None
    kind = "JPEG" if image.format == "MPO" else str(image.format)
    _check_size(*image.size)
    with _decoding(f"a damaged or truncated {kind} file"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frames = int(getattr(image, "n_frames", 1))
        _check_frame(frame, frames)
        if frame:
            image.seek(frame)
            _check_size(*image.size)
        white_is_zero = kind == "TIFF" and image.getexif().get(_TIFF_PHOTOMETRIC) == 0
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("1", "L") or upright.mode[0] in "IF":
            # Pillow turns WhiteIsZero round for 1 and 8 bits, and leaves deeper values as they are
            invert = white_is_zero and upright.mode not in ("1", "L")
            values = np.asarray(upright.convert("L") if upright.mode == "1" else upright)
            stored = 255.0 if values.dtype == np.uint8 else None
            grey, mapping = _grey_to_uint8(values, window, stored)
            rgb = _grey_to_rgb(255 - grey if invert else grey)
        else:
            _refuse_window(window)
            rgb, mapping = np.array(_colour_to_rgb(upright)), "as stored"
    return Picture(rgb, Origin(kind, None, window, frame, frames, mapping))


def _colour_to_rgb(image: Image.Image) -> Image.Image:
    """Any colour mode to RGB; what is transparent becomes black, as an empty film is."""
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over).convert("RGB")
    return image.convert("RGB")


def _looks_like_dicom(data: bytes) -> bool:
    """The DICM mark, or an early file without one: an element of group 2 or 8, in either byte order."""
    if data[128:132] == b"DICM":
        return True
    return data[:2] in (b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08") and b"\x00" in data[2:12]


def _read_dicom(data: bytes, window: Window | None, frame: int) -> Picture:
    from pydicom.pixels.utils import pixel_array

    header = _dicom_header(data)
    modality = _modality(header)
    named = f"a DICOM {modality} object" if modality else "a DICOM object"
    if not any(element in header for element in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise DataError(f"{named} without a picture: choose a file that holds an image or a dose grid")
    with _decoding(f"{named} whose header is damaged"):
        frames = max(int(header.get("NumberOfFrames") or 1), 1)
        rows, columns = int(header.Rows), int(header.Columns)
        photometric = str(header.PhotometricInterpretation)
        bits_stored = int(header.get("BitsStored", header.BitsAllocated))
        signed = int(header.get("PixelRepresentation", 0)) == 1
        syntax = header.file_meta.TransferSyntaxUID
    _check_size(columns, rows)
    _check_frame(frame, frames)
    with _decoding(f"{named} whose pixels cannot be decoded ({syntax.name}): damaged, truncated or not supported"):
        stored = pixel_array(header, index=frame)
        display = _with_frame_groups(header, frame)
        if photometric == "PALETTE COLOR":
            stored = _through_palette(stored, header)
            bits_stored = 8 * stored.dtype.itemsize
        if stored.ndim == 3:
            _refuse_window(window)
            rgb = stored[..., :3] if bits_stored == 8 else stored[..., :3] / (2.0**bits_stored - 1) * 255
            return _picture(rgb, modality, None, frame, frames, "as stored")
        grey, used, mapping = _dicom_grey(stored, display, window, None if signed or bits_stored > 8 else bits_stored)
        rgb = _grey_to_rgb(255 - grey if photometric == "MONOCHROME1" else grey)
    return _picture(rgb, modality, used, frame, frames, mapping)


def _dicom_header(data: bytes) -> Dataset:
    """Parse a DICOM file, with a transfer syntax even where an early file has none."""
    from pydicom import dcmread, uid

    _refuse_inflating(data)
    with _decoding("a damaged DICOM file"):
        header = dcmread(io.BytesIO(data), force=True)
        if "TransferSyntaxUID" not in header.file_meta:
            implicit, little = header.original_encoding
            explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
            header.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
        return header


def _refuse_inflating(data: bytes) -> None:
    """Refuse a deflated file that would grow beyond the limit: pydicom inflates without one."""
    from pydicom.filereader import read_dataset

    if data[128:132] != b"DICM":
        return
    stream = io.BytesIO(data)
    stream.seek(132)
    with _decoding("a damaged DICOM file"):
        meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        if meta.get("TransferSyntaxUID") == _DEFLATED:
            inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[stream.tell() :], MAX_BYTES + 1)
            if len(inflated) > MAX_BYTES:
                raise DataError(f"inflates to more than the limit of {MAX_BYTES >> 20} MiB")


def _with_frame_groups(header: Dataset, frame: int) -> Dataset:
    """The grey transformation of one frame as a flat dataset: enhanced objects nest it in functional groups.

    Source: DICOM PS3.3 C.7.6.16.2.9 (pixel value transformation) and C.7.6.16.2.10 (frame VOI LUT).
    """
    from pydicom import Dataset

    flat = Dataset()
    flat.file_meta = header.file_meta
    shared = header.get("SharedFunctionalGroupsSequence") or []
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    groups = [header, *shared[:1], *per_frame[frame : frame + 1]]
    names = (
        "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence", "WindowCenter", "WindowWidth",
        "VOILUTFunction", "PixelPaddingValue", "DoseGridScaling",
    )
    for group in groups:
        nested = [
            item for sequence in ("PixelValueTransformationSequence", "FrameVOILUTSequence")
            for item in (group.get(sequence) or [])[:1]
        ]
        for source in [group, *nested]:
            for name in names:
                if name in source:
                    flat.add(source[name])
    return flat


def _dicom_grey(
    stored: Values, display: Dataset, window: Window | None, small_bits: int | None
) -> tuple[NDArray[np.uint8], Window | None, Mapping]:
    """Stored values to 8 bits: modality LUT, then the window given, the header's LUT or window, or the full range.

    small_bits: bits stored, if unsigned and at most 8. Source: DICOM PS3.3 C.11.1 and C.11.2.
    """
    from pydicom.pixels import processing

    values = processing.apply_modality_lut(stored, display)
    if "DoseGridScaling" in display:  # PS3.3 C.8.8.3: stored value to dose
        values = stored * float(display.DoseGridScaling)
    if window is None and display.get("VOILUTSequence"):
        return _through_voi_lut(values, display), None, "lookup table"
    used = window or _header_window(display)
    function = str(display.get("VOILUTFunction", "LINEAR")).upper() if window is None else "LINEAR"
    visible = stored != int(display.PixelPaddingValue) if "PixelPaddingValue" in display else None
    scaled = "ModalityLUTSequence" in display or "RescaleSlope" in display or "DoseGridScaling" in display
    as_stored = 2.0**small_bits - 1 if small_bits and not scaled else None
    grey, mapping = _grey_to_uint8(values, used, as_stored, function, visible)
    return grey, used, mapping


def _header_window(display: Dataset) -> Window | None:
    """The header's first window, if it has a usable one."""
    values = [display.get(name) for name in ("WindowCenter", "WindowWidth")]
    if any(value in (None, "") for value in values):
        return None
    center, width = (float(np.atleast_1d(value)[0]) for value in values)
    return (center, width) if width >= 1 and math.isfinite(center) and math.isfinite(width) else None


def _through_voi_lut(values: Values, display: Dataset) -> NDArray[np.uint8]:
    from pydicom.pixels import processing

    entries, first, depth = (int(n) for n in display.VOILUTSequence[0].LUTDescriptor)
    # a lookup wants integers, and pydicom's wraps round for values beyond the table's reach
    inside = np.clip(np.rint(values), first, first + (entries or 2**16) - 1).astype(np.int64)
    return _as_uint8(processing.apply_voi(inside, display) / (2.0**depth - 1) * 255)


def _through_palette(stored: Values, header: Dataset) -> Values:
    from pydicom.pixels import processing

    entries, _, depth = (int(n) for n in header.RedPaletteColorLookupTableDescriptor)
    if depth == 16 and not header.original_encoding[1]:  # pydicom reads the tables as if they were little-endian
        for element in [e for e in header if e.keyword in _PALETTES]:
            element.value = np.frombuffer(element.value, ">u2").astype("<u2").tobytes()
    coloured = np.asarray(processing.apply_color_lut(stored, header))
    if coloured.dtype == np.uint8 and not 0 < entries <= 256:
        raise DataError("a palette of more than 256 entries of 8 bits, which is not supported: convert it to RGB")
    if depth == 8 and coloured.dtype == np.uint16:  # 8-bit entries in 16-bit words
        return coloured.astype(np.uint8)
    return coloured


def _grey_to_uint8(
    values: Values, window: Window | None, stored_max: float | None, function: str = "LINEAR",
    visible: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.uint8], Mapping]:
    """Grey values to 8 bits: by a window, unchanged out of `stored_max`, or stretched over the `visible` values."""
    if window is not None:
        return _as_uint8(_windowed(values, window, function)), "window"
    if stored_max is not None:
        return _as_uint8(values / stored_max * 255), "as stored"
    numbers = values.astype(np.float64)
    usable = np.isfinite(numbers) & (True if visible is None else visible)
    low, high = (float(numbers[usable].min()), float(numbers[usable].max())) if usable.any() else (0.0, 0.0)
    numbers = np.nan_to_num(numbers, nan=low, posinf=high, neginf=low)
    return _as_uint8((np.clip(numbers, low, high) - low) / (high - low or 1.0) * 255), "full range"


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


def _modality(header: Dataset) -> str | None:
    """DICOM's modality code, if it is one: a header's text is not passed on unseen."""
    value = str(header.get("Modality") or "")
    return value if re.fullmatch(r"[A-Z]{2,8}", value) else None


def _picture(
    rgb: Values, modality: str | None, window: Window | None, frame: int, frames: int, mapping: Mapping
) -> Picture:
    return Picture(_as_uint8(rgb), Origin("DICOM", modality, window, frame, frames, mapping))


def _as_uint8(values: Values) -> NDArray[np.uint8]:
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values, dtype=np.uint8)
    return np.asarray(np.clip(np.rint(values), 0, 255), dtype=np.uint8)


def _grey_to_rgb(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey[..., None], 3, axis=2)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"{width}×{height} pixels, the limit is {MAX_PIXELS // 10**6} megapixels: scale it down")
    if min(width, height) < MIN_SIDE:
        raise DataError(f"{width}×{height} pixels: nothing can be seen in a picture below {MIN_SIDE}×{MIN_SIDE}")


def _check_frame(frame: int, frames: int) -> None:
    if frame >= frames:
        raise DataError(f"frame {frame}: the file has {frames} (counted from 0)")


def _refuse_window(window: Window | None) -> None:
    if window is not None:
        raise DataError("a window applies to grey pictures, and this one is in colour: leave it out")


@contextmanager
def _decoding(problem: str) -> Iterator[None]:
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
