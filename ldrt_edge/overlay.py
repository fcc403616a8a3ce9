"""A dose grid as isodose wash, and structures as contours, over the slice that they were planned on.

Everything is placed by patient coordinates, in mm: nothing but a common frame of reference tells that two files
describe the same patient in the same position, so files that do not share one are refused. Percentages are of the
grid's highest dose. Names of structures are free text and may hold anything: they stay in the file, and a structure is
called by its type ("PTV 1", "ORGAN 2").

    picture = lay_over(read_image_bytes(ct), ct, [read_overlay(dose), read_overlay(structures)])

Source: DICOM PS3.3 C.7.6.2.1.1 (pixel to patient), C.7.6.16.2.1, C.7.6.16.2.3 and C.7.6.16.2.4 (the same of frames),
C.8.8.3 (dose), C.8.8.5, C.8.8.6 and C.8.8.8 (structures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ldrt_edge import dicom, image
from ldrt_edge.errors import DataError
from ldrt_edge.image import Overlay, Picture, decoding

if TYPE_CHECKING:
    from pydicom import Dataset

Colour = tuple[int, int, int]
FloatArray = NDArray[np.float64]

ISODOSES: tuple[tuple[float, Colour], ...] = (
    (0.30, (60, 90, 255)), (0.50, (0, 200, 255)), (0.70, (0, 210, 90)), (0.80, (240, 230, 0)), (0.90, (255, 140, 0)),
    (0.95, (255, 30, 30)),
)
"""Shares of the highest dose, and the colour from there to the next."""
_WASH = 0.3
_TYPES = {  # PS3.3 C.8.8.8.1; another word is free text
    "EXTERNAL", "PTV", "CTV", "GTV", "ITV", "TREATED_VOLUME", "IRRAD_VOLUME", "BOLUS", "AVOIDANCE", "ORGAN", "MARKER",
    "REGISTRATION", "ISOCENTER", "CONTRAST_AGENT", "CAVITY", "BRACHY_CHANNEL", "BRACHY_ACCESSORY", "SUPPORT",
    "FIXATION", "DOSE_REGION", "CONTROL", "DOSE_MEASUREMENT",
}
_COLOURS: tuple[Colour, ...] = ((255, 80, 200), (120, 255, 120), (255, 255, 255), (150, 190, 255), (255, 200, 120))
_THINNEST_MM = 1.0  # of a slice that does not say how thick it is
_ROUNDING = 1e-6  # coordinates come as decimal text
_ONE_PLANE_MM = 0.1  # contours that are no farther from each other lie in one plane
_PLACES = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
_PLACE = (
    "FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness",
    "SpacingBetweenSlices", "SOPInstanceUID", "SeriesInstanceUID",
)


@dataclass(frozen=True, eq=False)
class Plane:
    """Where a grid's pixels lie: pixel (row, column) is at `corner` + column · `across` + row · `down`, in mm.

    normal: unit vector. thickness_mm: of the slice, or the distance to the next where that is less: slices may overlap.
    image, series: its UIDs, by which contours may name the slice that they were drawn on.
    """

    frame_of_reference: str
    corner: FloatArray
    across: FloatArray
    down: FloatArray
    normal: FloatArray
    thickness_mm: float
    image: str
    series: str

    def pixel(self, points: FloatArray) -> FloatArray:
        """(..., 3) patient coordinates to (..., 3): row and column as fractions, and mm along the normal."""
        away = points - self.corner
        row = away @ self.down / (self.down @ self.down)
        column = away @ self.across / (self.across @ self.across)
        return np.stack([row, column, away @ self.normal], axis=-1)

    def points(self, rows: int, columns: int) -> FloatArray:
        """(rows, columns, 3): where the pixels' centres lie."""
        row, column = np.mgrid[:rows, :columns].astype(np.float64)
        return np.asarray(self.corner + column[..., None] * self.across + row[..., None] * self.down)


@dataclass(frozen=True, eq=False)
class Dose:
    """values: (planes, rows, columns) in Gy, or relative. offsets_mm: rising, of the planes along the normal."""

    plane: Plane
    values: NDArray[np.float32]
    offsets_mm: FloatArray
    in_gray: bool
    sha256: str

    @property
    def frames_of_reference(self) -> frozenset[str]:
        """The one that it lies in."""
        return frozenset({self.plane.frame_of_reference})

    def draw(self, rgb: NDArray[np.uint8], on: Plane) -> tuple[NDArray[np.uint8], Overlay]:
        """Wash a slice with it: (height, width, 3) uint8 to the same, with lines where a level begins."""
        level = np.digitize(self.at(on.points(*rgb.shape[:2])) / self.highest, [share for share, _ in ISODOSES])
        colours = np.array([(0, 0, 0), *(colour for _, colour in ISODOSES)], np.float64)
        covered = (level > 0)[..., None]
        washed = np.where(covered, (1 - _WASH) * rgb + _WASH * colours[level], rgb)
        beside = np.pad(level, ((0, 1), (0, 1)), mode="edge")
        highest = np.maximum(level, np.maximum(beside[1:, :-1], beside[:-1, 1:]))
        border = (level != beside[1:, :-1]) | (level != beside[:-1, 1:])
        return image.as_uint8(np.where(border[..., None], colours[highest], washed)), self._overlay()

    def at(self, points: FloatArray) -> FloatArray:
        """Dose at (..., 3) patient coordinates, linear between the grid's points; 0 outside of it."""
        from scipy.ndimage import map_coordinates

        row, column, along = np.moveaxis(np.round(self.plane.pixel(points) / _ROUNDING) * _ROUNDING, -1, 0)
        if len(self.offsets_mm) > 1:
            place = np.interp(along, self.offsets_mm, np.arange(len(self.offsets_mm)), left=-1, right=-1)
        else:
            place = np.where(np.abs(along) <= self.plane.thickness_mm / 2, 0.0, -1.0)
        found = map_coordinates(self.values, [place, row, column], np.float64, order=1, mode="constant", cval=0.0)
        return np.asarray(found)

    @cached_property
    def highest(self) -> float:
        """The grid's highest value, above 0."""
        return float(self.values.max())

    def _overlay(self) -> Overlay:
        def label(share: float) -> str:
            return f"{share:.0%}" + (f" · {share * self.highest:.2f} Gy" if self.in_gray else "")

        return Overlay("RTDOSE", self.sha256, tuple((label(share), _hex(colour)) for share, colour in ISODOSES))


@dataclass(frozen=True, eq=False)
class Contour:
    """points: (points, 3) in mm. images: UIDs of the slices that it was drawn on, where it names them."""

    points: FloatArray
    closed: bool
    images: frozenset[str]


@dataclass(frozen=True, eq=False)
class Structure:
    """One region of interest: its label, colour and contours."""

    label: str
    colour: Colour
    frame_of_reference: str
    contours: tuple[Contour, ...]


@dataclass(frozen=True, eq=False)
class _Lying:
    """A contour over a slice: (points, 3) as `Plane.pixel` gives them, and whether it is closed."""

    places: FloatArray
    closed: bool

    @cached_property
    def away_mm(self) -> float:
        """From the slice to its farthest point, along the normal."""
        along = self.places[:, 2]
        return float(along[np.abs(along).argmax()])


@dataclass(frozen=True, eq=False)
class Structures:
    """The regions of a structure set. series: UIDs of those whose slices its contours were drawn on."""

    regions: tuple[Structure, ...]
    series: frozenset[str]
    sha256: str

    @property
    def frames_of_reference(self) -> frozenset[str]:
        """Those that its regions lie in."""
        return frozenset(region.frame_of_reference for region in self.regions)

    def draw(self, rgb: NDArray[np.uint8], on: Plane) -> tuple[NDArray[np.uint8], Overlay]:
        """Draw the contours that lie in a slice; the legend has those that do.

        Of each region, those of its plane nearest to the slice. A contour stands for half of the way to the next plane
        and no more than half of the slice, so that a region that ends before the slice is not drawn on it. One that
        names other slices of this series was not drawn on this one.
        """
        canvas = Image.fromarray(rgb)
        pen = ImageDraw.Draw(canvas)
        legend = []
        lying = [
            (region, [_Lying(on.pixel(one.points), one.closed) for one in region.contours if self._may_lie(one, on)])
            for region in self.regions
            if region.frame_of_reference == on.frame_of_reference
        ]
        spacings_mm = [_spacing(contours) for _, contours in lying]
        for (region, contours), spacing_mm in zip(lying, spacings_mm, strict=True):
            reach_mm = min(on.thickness_mm, spacing_mm if spacing_mm < np.inf else min(spacings_mm)) / 2
            near = _nearest(contours, reach_mm)
            for contour in near:
                _trace(pen, contour, region.colour)
            if near:
                legend.append((region.label, _hex(region.colour)))
        return np.asarray(canvas), Overlay("RTSTRUCT", self.sha256, tuple(legend))

    def _may_lie(self, contour: Contour, on: Plane) -> bool:
        return not contour.images or on.series not in self.series or on.image in contour.images


def read_overlay(data: bytes) -> Dose | Structures:
    """Read a DICOM file's dose grid or structures.

    Raises:
        DataError: it is neither, damaged, too large, or does not say where it lies.
    """
    if structures := read_structures(data):
        return structures
    header = dicom.read_header(data)
    with decoding("a damaged DICOM file"):
        modality = dicom.modality_of(header)
    if modality == "RTDOSE":
        return _dose(data, header)
    raise DataError("neither a dose grid (RTDOSE) nor structures (RTSTRUCT): nothing to lay over a picture")


def read_structures(data: bytes) -> Structures | None:
    """Read a file's structures, if it is a DICOM file of them.

    Raises:
        DataError: it is, and damaged.
    """
    if not image.looks_like_dicom(data):
        return None
    header = dicom.read_header(data)
    with decoding("a damaged DICOM file"):
        if dicom.modality_of(header) != "RTSTRUCT":
            return None
    with decoding("a DICOM RTSTRUCT object whose contours are damaged"):
        return _structures(data, header)


def lay_over(picture: Picture, data: bytes, overlays: Sequence[Dose | Structures]) -> Picture:
    """Draw over a picture that was read from the DICOM file `data`, the dose first.

    Raises:
        DataError: the picture does not say where it, or its frame, lies, or an overlay has another frame of reference.
    """
    if not overlays:
        return picture
    on = plane(data, picture.origin.frame)
    if on is None:
        raise DataError("the picture does not say where in the patient it lies: nothing can be laid over it")
    rgb, drawn = picture.rgb, []
    for overlay in sorted(overlays, key=lambda one: isinstance(one, Structures)):
        if on.frame_of_reference not in overlay.frames_of_reference:
            kind = "structures belong" if isinstance(overlay, Structures) else "dose belongs"
            raise DataError(f"the {kind} to another frame of reference than the picture: not laid over it")
        rgb, note = overlay.draw(rgb, on)
        drawn.append(note)
    return replace(picture, rgb=np.ascontiguousarray(rgb), origin=replace(picture.origin, overlays=tuple(drawn)))


def plane(data: bytes, frame: int = 0) -> Plane | None:
    """Where a DICOM slice lies, if it is one and says so; of several frames, this one.

    Raises:
        DataError: what it says is damaged.
    """
    header = dicom.read_header(data)
    with decoding("a DICOM file whose geometry is damaged"):
        lies = _plane(dicom.of_frame(header, frame, _PLACES, _PLACE))
        frames = int(header.get("NumberOfFrames") or 1)
        if lies is None or frames == 1 or "ImagePositionPatient" not in header:  # each frame has told its own place
            return lies
        if "GridFrameOffsetVector" not in header:
            return None
        return replace(lies, corner=lies.corner + lies.normal * _offsets(header, lies, frames)[frame])


def _plane(header: Dataset) -> Plane | None:
    if any(header.get(name) in (None, "") for name in _PLACE[:4]):
        return None
    corner = np.array([float(value) for value in header.ImagePositionPatient])
    directions = np.array([float(value) for value in header.ImageOrientationPatient]).reshape(2, 3)
    row_spacing, column_spacing = (float(value) for value in header.PixelSpacing)
    normal = np.cross(*directions)
    length = float(np.linalg.norm(normal))
    placed = corner.shape == (3,) and np.isfinite(corner).all()
    if not (min(row_spacing, column_spacing) > 0 and abs(length - 1) < 1e-2 and placed):
        raise DataError("a DICOM file whose geometry is damaged: its place, directions or spacings are none")
    told = (float(header.get(name) or 0) for name in ("SliceThickness", "SpacingBetweenSlices"))
    thickness = min((mm for mm in told if mm > 0), default=_THINNEST_MM)
    return Plane(
        str(header.FrameOfReferenceUID), corner, directions[0] * column_spacing, directions[1] * row_spacing,
        normal / length, max(thickness, _ROUNDING),
        str(header.get("SOPInstanceUID")), str(header.get("SeriesInstanceUID")),
    )


def _offsets(header: Dataset, lies: Plane, frames: int) -> FloatArray:
    """(frames,) mm along the normal, of a dose grid's frames from the first.

    Raises:
        DataError: they are not as many, or no places.
    """
    given = [float(value) for value in np.atleast_1d(header.get("GridFrameOffsetVector") or [0.0])]  # one is no list
    offsets = np.array(given)
    if len(offsets) != frames or len(set(given)) != frames or not np.isfinite(offsets).all():
        raise DataError("a dose grid whose planes are not where its header says")
    if offsets[0] != 0:  # positions along the patient's z instead of distances: C.8.8.3.2
        offsets = (offsets - lies.corner[2]) * np.sign(lies.normal[2])
    return offsets


def _dose(data: bytes, header: Dataset) -> Dose:
    with decoding("a DICOM RTDOSE object whose header is damaged"):
        lies = _plane(header)
        frames, rows, columns = int(header.get("NumberOfFrames") or 1), int(header.Rows), int(header.Columns)
        scaling, in_gray = float(header.DoseGridScaling), str(header.get("DoseUnits")) == "GY"
    if lies is None:
        raise DataError("a dose grid that does not say where it lies")
    if frames * rows * columns > image.MAX_PIXELS:
        raise DataError(f"a dose grid of more than {image.MAX_PIXELS // 10**6} million points: too large")
    with decoding("a DICOM RTDOSE object whose header is damaged"):
        offsets = _offsets(header, lies, frames)
    with decoding("a DICOM RTDOSE object whose pixels cannot be decoded: damaged, truncated or not supported"):
        stored = np.stack([dicom.decode(data, header, frame) for frame in range(frames)])
        values = (stored * scaling).astype(np.float32)
    order = np.argsort(offsets)
    if not (np.isfinite(values).all() and values.max() > 0):
        raise DataError("a dose grid without dose")
    return Dose(lies, values[order], offsets[order], in_gray, image.sha256(data))


def _structures(data: bytes, header: Dataset) -> Structures:
    frames = {
        int(region.ROINumber): str(region.get("ReferencedFrameOfReferenceUID") or "")
        for region in header.get("StructureSetROISequence") or []
    }
    types = {
        int(seen.ReferencedROINumber): str(seen.get("RTROIInterpretedType") or "")
        for seen in header.get("RTROIObservationsSequence") or []
    }
    regions = []
    for place, region in enumerate(header.get("ROIContourSequence") or []):
        number = int(region.ReferencedROINumber)
        kind = types.get(number, "")
        contours = tuple(
            Contour(points, str(contour.ContourGeometricType).startswith("CLOSED"), _images(contour))
            for contour in region.get("ContourSequence") or []
            if len(points := np.array([float(n) for n in contour.ContourData]).reshape(-1, 3))
            and np.isfinite(points).all()
        )
        colour = [int(value) & 255 for value in region.get("ROIDisplayColor") or _COLOURS[place % len(_COLOURS)]]
        label = f"{kind if kind in _TYPES else 'ROI'} {number}"
        if frames.get(number):
            regions.append(Structure(label, (colour[0], colour[1], colour[2]), frames[number], contours))
    if not any(region.contours for region in regions):
        raise DataError("a DICOM RTSTRUCT object without contours that say where they lie")
    series = {
        str(series.SeriesInstanceUID)
        for frame in header.get("ReferencedFrameOfReferenceSequence") or []
        for study in frame.get("RTReferencedStudySequence") or []
        for series in study.get("RTReferencedSeriesSequence") or []
    }
    return Structures(tuple(regions), frozenset(series), image.sha256(data))


def _images(contour: Dataset) -> frozenset[str]:
    return frozenset(str(one.ReferencedSOPInstanceUID) for one in contour.get("ContourImageSequence") or [])


def _spacing(contours: Sequence[_Lying]) -> float:
    """The least distance between the planes of contours, in mm; infinite where there is one plane or none."""
    offsets = np.sort([contour.away_mm for contour in contours])
    gaps = np.diff(offsets)
    return float(gaps[gaps > _ONE_PLANE_MM].min(initial=np.inf))


def _nearest(contours: Sequence[_Lying], reach_mm: float) -> list[_Lying]:
    """The contours of the plane that is nearest to the slice, if it is in reach; half-way between slices, of one."""
    inside = [one for one in contours if -reach_mm - _ROUNDING <= one.away_mm < reach_mm - _ROUNDING]
    nearest_mm = min((one.away_mm for one in inside), key=abs, default=0.0)
    return [one for one in inside if abs(one.away_mm - nearest_mm) <= _ONE_PLANE_MM]


def _trace(pen: ImageDraw.ImageDraw, contour: _Lying, colour: Colour) -> None:
    """Draw its line, a single point as a cross. Pillow cuts fractions off: pixels are rounded before."""
    pixels = np.floor(np.clip(contour.places[:, :2], -1e5, 1e5) + 0.5).astype(int)
    corners = [(int(column), int(row)) for row, column in pixels]
    if len(corners) == 1:
        ((x, y),) = corners
        pen.line([(x - 3, y), (x + 3, y)], colour)
        pen.line([(x, y - 3), (x, y + 3)], colour)
    else:
        pen.line([*corners, corners[0]] if contour.closed else corners, colour)


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
