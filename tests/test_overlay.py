"""Dose and contours over their slice: real objects of pydicom's, placed by hand so that the answer is known."""

from __future__ import annotations

import copy
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


def squares(**planes: float) -> bytes:
    """Regions by colour ("r", "g", "b"): squares of 20 mm whose left edge is at 10 · (1 + place), on planes at z."""
    header = pydicom.dcmread(io.BytesIO(structures()), force=True)
    (pattern, *_), regions = header.ROIContourSequence, []
    for letter, heights in planes.items():
        region = copy.deepcopy(pattern)
        region.ReferencedROINumber = "rgb".index(letter) + 1
        region.ROIDisplayColor = [255 if letter == other else 0 for other in "rgb"]
        region.ContourSequence = [copy.deepcopy(pattern.ContourSequence[0]) for _ in heights]
        for place, (contour, z) in enumerate(zip(region.ContourSequence, heights, strict=True)):
            left = 10 * (1 + place)
            contour.ContourData = [left, 20, z, left + 20, 20, z, left + 20, 40, z, left, 40, z]
        regions.append(region)
    header.ROIContourSequence = regions
    return saved(header)


def drawn_at(data: bytes, frame: int, overlay: bytes) -> dict[str, list[int]]:
    """Of a picture with contours over it: by colour, the columns where lines from row 20 to 40 lie."""
    over = lay_over(read_image_bytes(data, None, frame), data, [read_overlay(overlay)])
    found = {}
    for letter in "rgb":
        colour = [255 if letter == other else 0 for other in "rgb"]
        columns = np.flatnonzero((over.rgb[21:40] == colour).all(axis=2).all(axis=0))
        if columns.size:
            found[letter] = columns.tolist()
    return found


def volume(**changes: Any) -> bytes:
    """pydicom's enhanced CT of two frames, with pixels of 1 mm; the frames at z = 0 and 5."""
    header = pydicom.dcmread(str(get_testdata_file("eCT_Supplemental.dcm")))
    header.FrameOfReferenceUID = FRAME
    (shared,) = header.SharedFunctionalGroupsSequence
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence[0].PixelSpacing, shared.PixelMeasuresSequence[0].SliceThickness = [1, 1], 5
    for frame, group in enumerate(header.PerFrameFunctionalGroupsSequence):
        group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 5 * frame]
    for name, value in changes.items():
        setattr(header, name, value)
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


def test_a_single_plane_may_be_given_by_its_place() -> None:
    for offsets in ([-10.0], [0.0], -10.0):
        read = read_overlay(dose(ramp()[:1], GridFrameOffsetVector=offsets))
        assert isinstance(read, Dose) and read.offsets_mm == pytest.approx([0])


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


def test_a_contour_is_drawn_on_the_pixels_nearest_to_it() -> None:
    contour = [40.9, 50.4, 0, 60.9, 50.4, 0, 60.9, 80.6, 0, 40.9, 80.6, 0]
    data = ct()
    over = lay_over(read_image_bytes(data), data, [read_overlay(structures(contour=contour))])
    rows, columns = np.nonzero((over.rgb == (255, 0, 255)).all(axis=2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (50, 81, 41, 61)


def test_overlapping_slices_show_their_own_contours() -> None:
    """5 mm thick and 2.5 mm apart: each slice reaches to its neighbours' planes."""
    plan = squares(r=[0, 2.5, 5], g=[2.5])
    shown = {z: drawn_at(ct(z=z, SliceThickness=5), 0, plan) for z in (-2.5, 0, 2.5, 5, 7.5)}
    assert shown == {
        -2.5: {}, 0: {"r": [10, 30]}, 2.5: {"r": [20, 40], "g": [10, 30]}, 5: {"r": [30, 50]}, 7.5: {}
    }  # fmt: skip
    alone = squares(r=[0])  # nothing tells how far its planes are apart, but the slices say how far they are
    for z in (-2.5, 0, 2.5):
        apart = ct(z=z, SliceThickness=5, SpacingBetweenSlices=2.5)
        assert bool(drawn_at(apart, 0, alone)) is (z == 0)


def test_a_contour_that_names_its_slice_is_on_no_other_of_the_series() -> None:
    """Overlapping slices that do not say how far they are apart: both reach the region's one plane."""
    header = pydicom.dcmread(io.BytesIO(squares(r=[0])), force=True)
    (study,) = header.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence
    series = study.RTReferencedSeriesSequence[0].SeriesInstanceUID
    named = pydicom.Dataset()
    named.ReferencedSOPClassUID, named.ReferencedSOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.3.0"
    header.ROIContourSequence[0].ContourSequence[0].ContourImageSequence = [named]
    plan = saved(header)

    def shown(z: float, **changes: Any) -> bool:
        return bool(drawn_at(ct(z=z, SliceThickness=5, **changes), 0, plan))

    assert shown(0, SeriesInstanceUID=series, SOPInstanceUID="1.2.3.0")
    assert not shown(2, SeriesInstanceUID=series, SOPInstanceUID="1.2.3.2")
    assert shown(2, SeriesInstanceUID="1.2.4", SOPInstanceUID="1.2.4.2"), "another series is not what it speaks of"
    assert not shown(9, SeriesInstanceUID=series, SOPInstanceUID="1.2.3.0"), "a name does not carry it over millimetres"


def test_a_contour_between_slices_is_on_the_nearest_and_half_way_on_one() -> None:
    for at, on in ((2.4, [0]), (2.5, [5]), (2.6, [5])):
        plan = squares(r=[at])
        assert [z for z in (0, 5, 10) if drawn_at(ct(z=z, SliceThickness=5), 0, plan)] == on
    # every second slice was contoured: the one between keeps what its reader left empty
    plan = squares(r=[0, 5])
    assert [z for z in (0, 2.5, 5) if drawn_at(ct(z=z, SliceThickness=2.5), 0, plan)] == [0, 5]
    two_of_one_plane = squares(r=[0.02, -0.02])
    assert drawn_at(ct(), 0, two_of_one_plane) == {"r": [10, 20, 30, 40]}


def test_contours_lie_over_the_frames_that_they_belong_to() -> None:
    plan, enhanced = squares(r=[0, 5, 10]), volume()
    assert [drawn_at(enhanced, frame, plan) for frame in (0, 1)] == [{"r": [10, 30]}, {"r": [20, 40]}]
    grid = dose(np.ones((3, 60, 60)), PixelSpacing=[1, 1], ImagePositionPatient=[0, 0, -10], SliceThickness=2)
    assert [drawn_at(grid, frame, plan) for frame in range(3)] == [{}, {"r": [10, 30]}, {"r": [30, 50]}]
    assert plane(enhanced, 1).corner.tolist() == [0, 0, 5]  # type: ignore[union-attr]


def test_frames_that_do_not_say_where_each_lies_are_left_bare() -> None:
    header = pydicom.dcmread(io.BytesIO(ct()))
    header.NumberOfFrames, header.PixelData = 2, 2 * header.PixelData
    film = saved(header)
    for frame in (0, 1):
        with pytest.raises(DataError, match="where in the patient"):
            lay_over(read_image_bytes(film, None, frame), film, [read_overlay(structures())])
    assert Pictures().add(film)["frames_of_reference"] == [], "so the page does not offer it"
    assert Pictures().add(volume())["frames_of_reference"] != []


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
