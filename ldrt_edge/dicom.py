"""DICOM files to RGB: the grey pipeline, palettes and colour spaces of the standard, through pydicom.

Stored values go through the modality transformation (to HU, to dose), then the window or lookup table for display,
per frame where an enhanced object says so. `ldrt_edge.image` is the door; nothing here passes on patient data.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ldrt_edge import image
from ldrt_edge.dicom_frame import decode_apart
from ldrt_edge.errors import DataError
from ldrt_edge.image import Look, Mapping, Origin, Picture, Values, Window, decoding

if TYPE_CHECKING:
    from pydicom import Dataset

_MODALITIES = r"[A-Z]{2}|SEG|ECG|OCT|OPT|IVUS|RT(DOSE|IMAGE|PLAN|STRUCT|RECORD)"  # PS3.3 C.7.3.1.1.1
_PALETTES = tuple(f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue"))
_DEFLATED = "1.2.840.10008.1.2.1.99"


def read_dicom(data: bytes, frame: int) -> Look:
    """Read one frame of a DICOM file. See `ldrt_edge.image.read_frame`.

    Raises:
        DataError: damaged, without a picture, too large, or in a syntax that no installed decoder reads.
    """
    header = read_header(data)
    with decoding("a damaged DICOM file"):
        modality = modality_of(header)
    named = f"a DICOM {modality} object" if modality else "a DICOM object"
    if not any(element in header for element in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise DataError(f"{named} without a picture: choose a file that holds an image or a dose grid")
    with decoding(f"{named} whose header is damaged"):
        frames = max(int(header.get("NumberOfFrames") or 1), 1)
        rows, columns = int(header.Rows), int(header.Columns)
        photometric = str(header.PhotometricInterpretation)
        bits_stored = int(header.get("BitsStored", header.BitsAllocated))
        signed = int(header.get("PixelRepresentation", 0)) == 1
        syntax = _syntax_name(header)
    image.check_size(columns, rows)
    image.check_frame(frame, frames)
    undecodable = f"{named} whose pixels cannot be decoded ({syntax}): damaged, truncated or not supported"
    with decoding(undecodable):
        stored = decode(data, header, frame)
        display = _display_settings(header, frame)
        if photometric == "PALETTE COLOR":
            stored = _through_palette(stored, header)
            bits_stored = 8 * stored.dtype.itemsize
    origin = Origin("DICOM", modality, None, frame, frames, "as stored", image.sha256(data))
    small_bits = bits_stored if bits_stored <= 8 and not signed else None

    def draw(window: Window | None) -> Picture:
        with decoding(undecodable):
            if stored.ndim == 3:
                image.refuse_window(window)
                rgb = image.as_uint8(stored if bits_stored == 8 else stored / (2.0**bits_stored - 1) * 255)[..., :3]
                return Picture(np.ascontiguousarray(rgb), origin, None)
            grey, used, mapping, levels = _grey(stored, display, window, small_bits)
            rgb = image.grey_to_rgb(255 - grey if photometric == "MONOCHROME1" else grey)
            return Picture(rgb, replace(origin, window=used, mapping=mapping), levels)

    return draw


def slice_position(data: bytes) -> float | None:
    """Where a slice lies along its series, to sort it: mm along the slices' normal, else its number; None if unknown.

    Source: DICOM PS3.3 C.7.6.2.1.1 (the normal is the cross product of row and column direction).
    """
    with decoding("a damaged DICOM file"):
        header = read_header(data)
        if "ImagePositionPatient" in header and "ImageOrientationPatient" in header:
            across = [float(value) for value in header.ImageOrientationPatient]
            return float(np.cross(across[:3], across[3:]) @ [float(value) for value in header.ImagePositionPatient])
        number = header.get("InstanceNumber")
        return None if number is None else float(number)


def series_of(data: bytes) -> tuple[str, str, tuple[float, ...]] | None:
    """What slices that can be scrolled as one stack share: series, frame of reference and directions; None if unknown.

    The identifiers may lead to a patient. Source: DICOM PS3.3 C.7.3.1, C.7.4.1 and C.7.6.2.
    """
    with decoding("a damaged DICOM file"):
        header = read_header(data)
        series, frame = str(header.get("SeriesInstanceUID") or ""), str(header.get("FrameOfReferenceUID") or "")
        directions = tuple(round(float(value), 3) + 0.0 for value in header.get("ImageOrientationPatient") or ())
        return (series, frame, directions) if series else None


def declares_text(data: bytes) -> bool:
    """Whether a file says that what names the patient is burned into its pixels (PS3.3 C.7.6.1.1)."""
    with decoding("a damaged DICOM file"):
        return str(read_header(data).get("BurnedInAnnotation") or "").strip().upper() == "YES"


def read_header(data: bytes) -> Dataset:
    """Parse a DICOM file, with a transfer syntax even where an early file has none."""
    from pydicom import dcmread, uid

    _refuse_inflating(data)
    with decoding("a damaged DICOM file"):
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
    with decoding("a damaged DICOM file"):
        meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        if meta.get("TransferSyntaxUID") == _DEFLATED:
            limit = image.MAX_BYTES
            inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[stream.tell() :], limit + 1)
            if len(inflated) > limit:
                raise DataError(f"inflates to more than the limit of {limit >> 20} MiB")


def decode(data: bytes, header: Dataset, frame: int) -> Values:
    """One frame as stored, colours as RGB. GDCM comes last and in a process of its own: see `dicom_frame`."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array

    decoder = get_decoder(header.file_meta.TransferSyntaxUID)
    if decoder.is_native:
        return pixel_array(header, index=frame)
    for plugin in decoder.available_plugins:
        if plugin == "gdcm":
            continue
        try:
            return pixel_array(header, index=frame, decoding_plugin=plugin)
        except Exception:  # each plug-in reads only a part of the standard: the next may do
            continue
    return decode_apart(data, frame)


def of_frame(header: Dataset, frame: int, sequences: Sequence[str], names: Sequence[str]) -> Dataset:
    """The elements `names` of one frame as a flat dataset: enhanced objects nest them in functional groups' sequences.

    Source: DICOM PS3.3 C.7.6.16 (multi-frame functional groups).
    """
    from pydicom import Dataset

    flat = Dataset()
    flat.file_meta = header.file_meta
    shared = header.get("SharedFunctionalGroupsSequence") or []
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    for group in (header, *shared[:1], *per_frame[frame : frame + 1]):
        nested = [item for sequence in sequences for item in (group.get(sequence) or [])[:1]]
        for source in (group, *nested):
            for name in names:
                if name in source:
                    flat.add(source[name])
    return flat


def _display_settings(header: Dataset, frame: int) -> Dataset:
    """The grey transformation of one frame.

    Source: DICOM PS3.3 C.7.6.16.2.9 (pixel value transformation) and C.7.6.16.2.10 (frame VOI LUT).
    """
    names = (
        "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence", "WindowCenter", "WindowWidth",
        "VOILUTFunction", "PixelPaddingValue", "PixelPaddingRangeLimit", "DoseGridScaling",
    )
    display = of_frame(header, frame, ("PixelValueTransformationSequence", "FrameVOILUTSequence"), names)
    if "RescaleSlope" in display or "RescaleIntercept" in display:  # pydicom passes over one without the other
        for name, neutral in (("RescaleSlope", 1), ("RescaleIntercept", 0)):
            if display.get(name) in (None, ""):
                setattr(display, name, neutral)
    return display


def _grey(
    stored: Values, display: Dataset, window: Window | None, small_bits: int | None
) -> tuple[NDArray[np.uint8], Window | None, Mapping, tuple[float, float]]:
    """Stored values to 8 bits: modality LUT, then the window given, the header's LUT or window, or the full range.

    Also which window was used, how values became 8 bits, and the lowest and highest value that is no padding.

    small_bits: bits stored, if unsigned and at most 8. Source: DICOM PS3.3 C.11.1 and C.11.2.
    """
    from pydicom.pixels import processing

    values: Values = processing.apply_modality_lut(stored, display)
    if "DoseGridScaling" in display:  # PS3.3 C.8.8.3: stored value to dose
        values = stored * float(display.DoseGridScaling)
    visible = _no_padding(stored, display)
    levels = image.levels_of(values if visible is None else values[visible])
    if window is None and display.get("VOILUTSequence"):
        return _through_voi_lut(values, display), None, "lookup table", levels
    function = str(display.get("VOILUTFunction") or "LINEAR").upper() if window is None else image.GIVEN
    used = window or _header_window(display, function)
    scaled = "ModalityLUTSequence" in display or "RescaleSlope" in display or "DoseGridScaling" in display
    stored_max = 2.0**small_bits - 1 if small_bits and not scaled else None
    grey, mapping = image.grey_to_uint8(values, used, stored_max, function, visible)
    return grey, used, mapping, levels


def _no_padding(stored: Values, display: Dataset) -> NDArray[np.bool_] | None:
    """Where stored values are none that the picture was filled up with; None where it was not.

    Source: DICOM PS3.3 C.7.5.1.1.2 (the range's two ends, which belong to it, come in either order).
    """
    if "PixelPaddingValue" not in display:
        return None
    ends = [int(display[name].value) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit") if name in display]
    return np.asarray((stored < min(ends)) | (stored > max(ends)))


def _header_window(display: Dataset, function: str) -> Window | None:
    """The header's first window, if it has a usable one.

    Source: DICOM PS3.3 C.11.2.1.2.1 (LINEAR is for widths from 1) and C.11.2.1.3 (the others from above 0).
    """
    values = [display.get(name) for name in ("WindowCenter", "WindowWidth")]
    if any(value in (None, "") for value in values):
        return None
    center, width = (float(np.atleast_1d(value)[0]) for value in values)
    wide_enough = width >= 1 if function == "LINEAR" else width > 0
    return (center, width) if wide_enough and math.isfinite(center) and math.isfinite(width) else None


def _through_voi_lut(values: Values, display: Dataset) -> NDArray[np.uint8]:
    from pydicom.pixels import processing

    entries, first, depth = (int(n) for n in display.VOILUTSequence[0].LUTDescriptor)
    # a lookup wants integers, and pydicom's wraps round for values beyond the table's reach
    inside = np.clip(np.rint(values), first, first + (entries or 2**16) - 1).astype(np.int64)
    return image.as_uint8(processing.apply_voi(inside, display) / (2.0**depth - 1) * 255)


def _through_palette(stored: Values, header: Dataset) -> Values:
    from pydicom.pixels import processing

    entries, _, depth = (int(n) for n in header.RedPaletteColorLookupTableDescriptor)
    if depth == 16 and not header.original_encoding[1]:  # pydicom reads the tables as if they were little-endian
        for element in [e for e in header if e.keyword in _PALETTES]:
            element.value = np.frombuffer(element.value, ">u2").astype("<u2").tobytes()
    coloured = np.asarray(processing.apply_color_lut(stored, header))
    if coloured.dtype == np.uint8 and not 0 < entries <= 256:  # pydicom looks them up modulo 256
        raise DataError("a palette of more than 256 entries of 8 bits, which is not supported: convert it to RGB")
    return coloured.astype(np.uint8) if depth == 8 else coloured  # 8-bit entries may come in 16-bit words


def _syntax_name(header: Dataset) -> str:
    """Of the transfer syntax, as the standard has it: what else the element may hold is not passed on."""
    from pydicom.uid import UID

    found = UID(str(header.file_meta.TransferSyntaxUID))
    return found.name if found.is_valid and found.name != str(found) else "an unknown syntax"


def modality_of(header: Dataset) -> str | None:
    """The modality, if it is a code of DICOM's: a header's free text is not passed on."""
    value = str(header.get("Modality") or "")
    return value if re.fullmatch(_MODALITIES, value) else None
