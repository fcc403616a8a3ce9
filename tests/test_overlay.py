"""Dose and contours over their slice: real objects of pydicom's, placed by hand so that the answer is known."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file

from ldrt_edge.chat.pictures import Pictures
from ldrt_edge.errors import DataError
from ldrt_edge.image import read_image_bytes
from ldrt_edge.overlay import ISODOSES, Dose, Structures, lay_over, plane, read_overlay

FRAME = "1.2.826.0.1.3680043.8.498.1"
SECRET = "DOE^JANE"
TOP_COLOUR = np.array(ISODOSES[-1][1])


def saved(header: Any) -> bytes:
    stream = io.BytesIO()
    header.save_as(stream)
    return stream.getvalue()


def ct(z: float = 0.0, **changes: Any) -> bytes:
    """128 × 128 pixels of 1 mm, the corner at (0, 0, z)."""
    header = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    header.FrameOfReferenceUID, header.PixelSpacing, header.SliceThickness = FRAME, [1, 1], 2
    header.ImagePositionPatient, header.ImageOrientationPatient = [0, 0, z], [1, 0, 0, 0, 1, 0]
    for name, value in changes.items():
        setattr(header, name, value)
    return saved(header)


def dose(values: np.ndarray, **changes: Any) -> bytes:
    """(planes, rows, columns) in Gy on a grid of 10 mm, the corner at (20, 30, -10), planes 10 mm apart."""
    header = pydicom.dcmread(str(get_testdata_file("rtdose.dcm")))
    header.FrameOfReferenceUID, header.DoseUnits, header.DoseGridScaling = FRAME, "GY", 1e-3
    header.ImagePositionPatient, header.ImageOrientationPatient = [20, 30, -10], [1, 0, 0, 0, 1, 0]
    header.NumberOfFrames, header.Rows, header.Columns = values.shape
    header.GridFrameOffsetVector = [10.0 * i for i in range(len(values))]
    header.PixelData = np.round(values * 1000).astype("<u4").tobytes()
    for name, value in changes.items():
        setattr(header, name, value)
    return saved(header)


def structures(digits: int = 0, **changes: Any) -> bytes:
    """pydicom's, with a square from (40, 50) to (60, 80) at z = 0 for its first region's contours."""
    header = pydicom.dcmread(str(get_testdata_file("rtstruct.dcm")), force=True)
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    for region in header.StructureSetROISequence:
        region.ReferencedFrameOfReferenceUID, region.ROIName = FRAME, SECRET
    first = header.ROIContourSequence[0]
    first.ROIDisplayColor = [255, 0, 255]
    first.ContourSequence = first.ContourSequence[:1]
    square = [40, 50, 0, 60, 50, 0, 60, 80, 0, 40, 80, 0]
    first.ContourSequence[0].ContourData = [f"{value:0{digits}.{digits // 2}f}" for value in square]
    if "contour" in changes:
        first.ContourSequence[0].ContourData = changes["contour"]
        header.ROIContourSequence = [first]
    for region in header.StructureSetROISequence if "frame" in changes else ():
        region.ReferencedFrameOfReferenceUID = changes["frame"]
    return saved(header)


def ramp() -> np.ndarray:
    """Dose of 1 Gy at z = 0, rising to 2 Gy at z = 10, that grows from column to column: 5 rows, 4 columns."""
    columns = np.array([0.25, 0.5, 0.75, 1.0])
    return np.stack([np.tile(factor * columns, (5, 1)) for factor in (0.5, 1.0, 2.0)])


def test_dose_lies_where_the_patients_coordinates_say() -> None:
    read = read_overlay(dose(ramp()))
    assert isinstance(read, Dose)
    inside = [[20, 30, 0], [25, 30, 0], [50, 70, 0], [50, 70, 5], [50, 70, -10]]
    points = np.array([*inside, [50, 71, 0], [19, 30, 0], [30, 40, 11]])
    assert read.at(points) == pytest.approx([0.25, 0.375, 1.0, 1.5, 0.5, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "flip"),
    [
        ({"GridFrameOffsetVector": [-10.0, 0.0, 10.0]}, False),  # places instead of distances
        ({"GridFrameOffsetVector": [0.0, -10.0, -20.0], "ImagePositionPatient": [20, 30, 10]}, True),
        ({"ImageOrientationPatient": [1, 0, 0, 0, -1, 0], "ImagePositionPatient": [20, 70, 10]}, True),
    ],
)
def test_planes_may_be_given_in_any_of_dicoms_ways(changes: dict[str, Any], flip: bool) -> None:
    read = read_overlay(dose(ramp()[::-1] if flip else ramp(), **changes))
    assert isinstance(read, Dose)
    assert read.at(np.array([[50, 50, -10], [50, 50, 0], [50, 50, 10]])) == pytest.approx([0.5, 1, 2], abs=1e-6)


def test_the_wash_covers_its_levels_and_nothing_else() -> None:
    data = ct()
    plain = read_image_bytes(data)
    flat = np.ones((3, 5, 4))
    washed = lay_over(plain, data, [read_overlay(dose(flat))])
    changed = (washed.rgb != plain.rgb).any(axis=2)
    rows, columns = np.nonzero(changed)
    # the grid reaches from (20, 30) to (50, 70) mm; its border is drawn from the pixel before it
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (29, 70, 19, 50)
    inside = washed.rgb[32:69, 22:49].astype(float)
    assert np.abs(inside - (0.7 * plain.rgb[32:69, 22:49] + 0.3 * TOP_COLOUR)).max() <= 1
    (overlay,) = washed.origin.overlays
    assert overlay.modality == "RTDOSE" and overlay.legend[-1] == ("95% · 0.95 Gy", "#ff1e1e")
    assert washed.origin.sha256 == plain.origin.sha256 and plain.origin.overlays == ()


def test_relative_dose_has_no_unit_and_a_slice_outside_stays_as_it_is() -> None:
    data = ct(z=40)
    plain = read_image_bytes(data)
    read = read_overlay(dose(ramp(), DoseUnits="RELATIVE"))
    washed = lay_over(plain, data, [read])
    assert (washed.rgb == plain.rgb).all()
    assert washed.origin.overlays[0].legend[0][0] == "30%"


def test_contours_are_drawn_on_their_slice_without_their_names() -> None:
    read = read_overlay(structures())
    for z, drawn in ((0, True), (0.9, True), (1.1, False), (10, False)):
        data = ct(z=z)
        over = lay_over(read_image_bytes(data), data, [read])
        rows, columns = np.nonzero((over.rgb == (255, 0, 255)).all(axis=2))
        (overlay,) = over.origin.overlays
        assert bool(len(rows)) is drawn and (("EXTERNAL 1", "#ff00ff") in overlay.legend) is drawn
        if drawn:
            assert (rows.min(), rows.max(), columns.min(), columns.max()) == (50, 80, 40, 60)
            assert len(rows) == 2 * (31 + 21) - 4, "a closed line, not an area"
        assert SECRET not in str(over.origin)


def test_a_slanted_slice_is_washed_where_it_meets_the_dose() -> None:
    data = ct(ImageOrientationPatient=[0, 0, 1, 0, 1, 0], ImagePositionPatient=[50, 0, -20])  # columns along z
    plain = read_image_bytes(data)
    washed = lay_over(plain, data, [read_overlay(dose(np.ones((3, 5, 4))))])
    rows, columns = np.nonzero((washed.rgb != plain.rgb).any(axis=2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (29, 70, 9, 30)


def test_what_does_not_belong_is_refused() -> None:
    data = ct()
    picture = read_image_bytes(data)
    for overlay in (dose(ramp(), FrameOfReferenceUID="1.2.3"), structures(frame="1.2.3")):
        with pytest.raises(DataError, match="another frame of reference"):
            lay_over(picture, data, [read_overlay(overlay)])
    header = pydicom.dcmread(io.BytesIO(data))
    del header.FrameOfReferenceUID
    with pytest.raises(DataError, match="where in the patient"):
        lay_over(picture, saved(header), [read_overlay(structures())])
    with pytest.raises(DataError, match="neither a dose grid"):
        read_overlay(data)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"GridFrameOffsetVector": [0.0, 10.0]}, "planes"),
        ({"GridFrameOffsetVector": [0.0, 10.0, 10.0]}, "planes"),
        ({"PixelSpacing": [0, 0]}, "geometry|none"),
        ({"NumberOfFrames": 10**9}, "too large"),
        ({"DoseGridScaling": 0}, "without dose"),
        ({"PixelData": b"\0\0"}, "damaged"),
    ],
)
def test_a_damaged_dose_grid_is_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_overlay(dose(ramp(), **changes))


def test_damaged_structures_are_one_line_without_what_they_hold() -> None:
    header = pydicom.dcmread(io.BytesIO(structures()), force=True)
    del header.ROIContourSequence
    with pytest.raises(DataError, match="without contours"):
        read_overlay(saved(header))
    header = pydicom.dcmread(io.BytesIO(structures()), force=True)
    header.ROIContourSequence[0].ContourSequence[0].ContourData = [1, 2, 3, 4]
    with pytest.raises(DataError, match="damaged") as caught:
        read_overlay(saved(header))
    assert SECRET not in str(caught.value)


def test_only_a_slice_with_directions_has_a_plane() -> None:
    assert plane(ct()) is not None
    with pytest.raises(DataError, match="geometry"):
        plane(ct(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]))
    assert isinstance(read_overlay(structures()), Structures)


def test_a_picture_with_a_damaged_geometry_is_still_a_picture() -> None:
    told = Pictures().add(ct(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]))
    assert told["width"] == 128 and told["frames_of_reference"] == []
    assert FRAME not in str(Pictures().add(ct()))
