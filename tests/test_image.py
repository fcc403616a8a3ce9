"""Pictures as clinics have them: real DICOM in many syntaxes, PNG, JPEG and TIFF in many modes, and damaged ones."""

from __future__ import annotations

import hashlib
import io
import random
import re
import struct
import traceback
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset

from ldrt_edge import image as image_room
from ldrt_edge.errors import DataError
from ldrt_edge.image import MAX_PIXELS, Picture, read_image, read_image_bytes


def dicom_path(name: str) -> Path:
    found = get_testdata_file(name, download=False)
    if not isinstance(found, str):
        pytest.skip(f"{name} is in neither pydicom nor pydicom-data")
    return Path(found)


def dicom(name: str) -> FileDataset:
    return pydicom.dcmread(dicom_path(name))


def saved(dataset: FileDataset) -> bytes:
    stream = io.BytesIO()
    dataset.save_as(stream)
    return stream.getvalue()


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def ramp(dtype: str = "uint8", top: int = 255) -> np.ndarray:
    return np.linspace(0, top, 16 * 32).reshape(16, 32).round().astype(dtype)


def looks_like(picture: Picture, height: int, width: int) -> None:
    assert picture.rgb.shape == (height, width, 3) and picture.rgb.dtype == np.uint8
    assert picture.rgb.flags.c_contiguous


def refusal(data: bytes, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        read_image_bytes(data, name="film", **options)
    line = str(caught.value)
    assert line.startswith("film: ") and "\n" not in line
    return line


# --- DICOM ----------------------------------------------------------------------------------------------------------


def test_ct_goes_through_rescale_and_a_window_in_hounsfield_units() -> None:
    stored = dicom("CT_small.dcm")
    hounsfield = stored.pixel_array * float(stored.RescaleSlope) + float(stored.RescaleIntercept)
    picture = read_image(dicom_path("CT_small.dcm"), window=(40, 400))
    expected = np.clip((hounsfield - (40 - 200)) / 400 * 255, 0, 255).round()
    looks_like(picture, 128, 128)
    assert np.abs(picture.rgb[..., 0] - expected).max() <= 1
    assert picture.origin.window == (40, 400) and picture.origin.mapping == "window"
    assert picture.origin.modality == "CT"


def test_the_header_window_is_used_unless_another_is_given() -> None:
    path = dicom_path("693_UNCR.dcm")
    by_header, by_hand, wide = (read_image(path, window=w) for w in (None, (39.5, 99), (40, 1000)))
    assert by_header.origin.window == (40, 100)
    assert np.array_equal(by_header.rgb, by_hand.rgb)  # PS3.3 C.11.2.1.2.1: a header's window is off by these
    assert not np.array_equal(by_header.rgb, wide.rgb)


def test_the_first_of_several_windows_and_the_sigmoid_function() -> None:
    data = dicom("MR_small.dcm")
    data.WindowCenter, data.WindowWidth = [600, 300], [1600, 200]
    picture = read_image_bytes(saved(data))
    assert picture.origin.window == (600, 1600)
    data.VOILUTFunction = "SIGMOID"
    curved = read_image_bytes(saved(data))
    expected = 255 / (1 + np.exp(-4 * (data.pixel_array - 600.0) / 1600))  # PS3.3 C.11.2.1.3.1
    assert np.abs(curved.rgb[..., 0] - expected).max() <= 1


@pytest.mark.parametrize("width", ["0", "", "0.5"])
def test_a_useless_window_in_the_header_is_passed_over(width: str) -> None:
    data = dicom("MR_small.dcm")
    data.WindowWidth = width
    picture = read_image_bytes(saved(data))
    assert picture.origin.mapping == "full range" and (picture.rgb.min(), picture.rgb.max()) == (0, 255)


@pytest.mark.parametrize(
    ("function", "used"), [("LINEAR_EXACT", True), ("SIGMOID", True), ("LINEAR", False), ("", False)]
)
def test_a_window_below_1_is_for_values_that_are_no_whole_numbers(function: str, used: bool) -> None:
    grid = dicom("rtdose.dcm")
    low, high = np.percentile(grid.pixel_array[3] * float(grid.DoseGridScaling), [25, 75])
    grid.WindowCenter, grid.WindowWidth = f"{(low + high) / 2:.8g}", f"{high - low:.8g}"
    grid.VOILUTFunction = function
    picture = read_image_bytes(saved(grid), frame=3)
    assert high - low < 1 and (picture.origin.mapping == "window") is used
    if function == "LINEAR_EXACT":
        by_hand = read_image_bytes(saved(grid), window=picture.origin.window, frame=3)
        assert np.array_equal(picture.rgb, by_hand.rgb)


@pytest.mark.parametrize(
    ("slope", "intercept", "line"),
    [("2", None, (2, 0)), (None, "-1024", (1, -1024)), ("2", "", (2, 0)), ("", "5", (1, 5))],
)
def test_a_slope_without_an_intercept_counts_and_the_other_way_round(
    slope: str | None, intercept: str | None, line: tuple[int, int]
) -> None:
    scan = dicom("CT_small.dcm")
    for name, value in (("RescaleSlope", slope), ("RescaleIntercept", intercept)):
        if value is None:
            delattr(scan, name)
        else:
            setattr(scan, name, value)
    stored = scan.pixel_array.astype(float)
    expected = (stored.min() * line[0] + line[1], stored.max() * line[0] + line[1])
    assert read_image_bytes(saved(scan)).levels == expected


def test_padding_does_not_spoil_the_full_range() -> None:
    data = dicom("CT_small.dcm")
    pixels = data.pixel_array.astype(np.int16)
    pixels[:4] = -2000
    data.PixelData, data.PixelPaddingValue = pixels.tobytes(), -2000
    picture = read_image_bytes(saved(data))
    assert picture.rgb[:4].max() == 0
    assert np.array_equal(picture.rgb[4:], _stretched(pixels[4:]))


@pytest.mark.parametrize(("value", "limit"), [(-2000, -1990), (-1990, -2000)])
def test_a_range_of_padding_spoils_neither_the_full_range_nor_the_levels(value: int, limit: int) -> None:
    data = dicom("CT_small.dcm")
    pixels = data.pixel_array.astype(np.int16)
    pixels[:2], pixels[2:3], pixels[3:4] = -2000, -1995, -1990
    data.PixelData, data.PixelPaddingValue = pixels.tobytes(), value
    data.add_new("PixelPaddingRangeLimit", "SS", limit)
    picture = read_image_bytes(saved(data))
    assert picture.rgb[:4].max() == 0 and np.array_equal(picture.rgb[4:], _stretched(pixels[4:]))
    in_hu = pixels[4:] * float(data.RescaleSlope) + float(data.RescaleIntercept)
    assert picture.levels == (in_hu.min(), in_hu.max())


def _stretched(values: np.ndarray) -> np.ndarray:
    scaled = (values.astype(float) - values.min()) / np.ptp(values) * 255
    return np.repeat(scaled.round().astype(np.uint8)[..., None], 3, axis=2)


def test_monochrome1_is_turned_round() -> None:
    film = dicom("RG3_UNCR.dcm")
    assert film.PhotometricInterpretation == "MONOCHROME1"
    negative = read_image_bytes(saved(film)).rgb
    film.PhotometricInterpretation = "MONOCHROME2"
    assert np.array_equal(255 - read_image_bytes(saved(film)).rgb, negative)


def test_lookup_tables_of_modality_and_display() -> None:
    assert read_image(dicom_path("vlut_04.dcm")).origin.mapping == "lookup table"
    # the SMPTE pattern, stored with a modality table in one file and a display table in the other
    one, other = (read_image(dicom_path(f"{name}.dcm")).rgb for name in ("vlut_04", "mlut_18"))
    assert np.abs(one.astype(int) - other).mean() < 2 and np.ptp(one) == 255


def test_dose_grids_show_dose_in_gray_and_take_a_window_in_gray() -> None:
    stored = dicom("rtdose.dcm")
    dose_gy = stored.pixel_array[3] * float(stored.DoseGridScaling)
    picture = read_image(dicom_path("rtdose.dcm"), frame=3)
    assert picture.origin.modality == "RTDOSE" and (picture.origin.frame, picture.origin.frames) == (3, 15)
    assert np.array_equal(picture.rgb, _stretched(dose_gy))
    low, high = np.percentile(dose_gy, [25, 75])
    windowed = read_image(dicom_path("rtdose.dcm"), window=((low + high) / 2, high - low), frame=3)
    expected = np.clip((dose_gy - low) / (high - low) * 255, 0, 255)
    assert np.abs(windowed.rgb[..., 0] - expected).max() <= 1 and high - low < 1


def test_enhanced_objects_carry_their_window_in_functional_groups() -> None:
    picture = read_image(dicom_path("eCT_Supplemental.dcm"))
    assert picture.origin.mapping == "window" and picture.origin.frames == 2


@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("MR_small_RLE.dcm", "MR_small.dcm"), ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"), ("MR_small_bigendian.dcm", "MR_small.dcm"),
        ("MR_small_implicit.dcm", "MR_small.dcm"), ("MR_small_expb.dcm", "MR_small.dcm"),
        ("emri_small_RLE.dcm", "emri_small.dcm"), ("emri_small_big_endian.dcm", "emri_small.dcm"),
        ("emri_small_jpeg_2k_lossless.dcm", "emri_small.dcm"), ("emri_small_jpeg_ls_lossless.dcm", "emri_small.dcm"),
        ("693_J2KR.dcm", "693_UNCR.dcm"), ("RG1_J2KR.dcm", "RG1_UNCR.dcm"), ("US1_J2KR.dcm", "US1_UNCR.dcm"),
        ("rtdose_expb.dcm", "rtdose.dcm"), ("rtdose_rle.dcm", "rtdose.dcm"), ("liver_expb.dcm", "liver.dcm"),
        ("OBXXXX1A_expb.dcm", "OBXXXX1A.dcm"), ("OBXXXX1A_rle.dcm", "OBXXXX1A.dcm"),
        ("gdcm-US-ALOKA-16_big.dcm", "gdcm-US-ALOKA-16.dcm"), ("color-pl.dcm", "color-px.dcm"),
        ("SC_rgb_rle.dcm", "SC_rgb.dcm"), ("SC_rgb_jpeg_gdcm.dcm", "SC_rgb.dcm"), ("SC_rgb_expb.dcm", "SC_rgb.dcm"),
        ("SC_rgb_16bit.dcm", "SC_rgb.dcm"), ("SC_rgb_32bit.dcm", "SC_rgb.dcm"), ("SC_rgb_expb_16bit.dcm", "SC_rgb.dcm"),
        ("SC_rgb_rle_16bit.dcm", "SC_rgb.dcm"), ("SC_rgb_gdcm_KY.dcm", "SC_rgb.dcm"),
    ],
)
def test_lossless_syntaxes_give_the_same_picture(name: str, same_as: str) -> None:
    assert np.array_equal(read_image(dicom_path(name)).rgb, read_image(dicom_path(same_as)).rgb)


@pytest.mark.parametrize(
    ("name", "same_as"),
    [
        ("SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb.dcm"), ("SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb.dcm"),
        ("SC_rgb_dcmtk_+eb+cy+s2.dcm", "SC_rgb.dcm"), ("SC_rgb_dcmtk_+eb+cy+s4.dcm", "SC_rgb.dcm"),
        ("SC_rgb_jpeg_lossy_gdcm.dcm", "SC_rgb.dcm"), ("SC_ybr_full_uncompressed.dcm", "SC_rgb.dcm"),
        ("SC_ybr_full_422_uncompressed.dcm", "SC_rgb.dcm"), ("US1_J2KI.dcm", "US1_UNCI.dcm"),
        ("SC_rgb_jls_lossy_line.dcm", "SC_rgb_jls_lossy_sample.dcm"), ("693_J2KI.dcm", "693_UNCI.dcm"),
    ],
)
def test_lossy_syntaxes_and_ybr_give_nearly_the_same_picture(name: str, same_as: str) -> None:
    one, other = (read_image(dicom_path(n)).rgb.astype(int) for n in (name, same_as))
    assert np.abs(one - other).mean() < 4


@pytest.mark.parametrize(
    "name", ["JPEG2000.dcm", "JPEG-LL.dcm", "JPEGLSNearLossless_16.dcm", "bad_sequence.dcm", "image_dfl.dcm",
             "JPGLosslessP14SV1_1s_1f_8b.dcm", "J2K_pixelrep_mismatch.dcm", "examples_palette.dcm", "liver.dcm"]
)
def test_other_syntaxes_are_read(name: str) -> None:
    header = dicom(name)
    picture = read_image(dicom_path(name))
    looks_like(picture, header.Rows, header.Columns)
    assert np.ptp(picture.rgb) > 200


def test_colours_of_a_jpeg_2000_file_are_named_right() -> None:
    picture = read_image(dicom_path("GDCMJ2K_TextGBR.dcm")).rgb  # the words red, green and blue in their colours
    for rows, channel in ((slice(20, 120), 0), (slice(140, 240), 1), (slice(270, 360), 2)):
        bright = picture[rows][(np.ptp(picture[rows], axis=2) > 200)]
        assert (bright.argmax(axis=1) == channel).mean() > 0.99


def test_palette_colours_are_those_of_the_tables() -> None:
    data = dicom("OBXXXX1A.dcm")
    tables = [
        np.frombuffer(data[f"{colour}PaletteColorLookupTableData"].value, "<u2")[data.pixel_array] / 65535 * 255
        for colour in ("Red", "Green", "Blue")
    ]
    picture = read_image(dicom_path("OBXXXX1A.dcm"))
    assert np.array_equal(picture.rgb, np.stack(tables, axis=-1).round().astype(np.uint8))


def test_frames_are_chosen_by_number_from_zero() -> None:
    path = dicom_path("examples_ybr_color.dcm")
    first, last = read_image(path), read_image(path, frame=29)
    assert first.origin.frames == 30 and not np.array_equal(first.rgb, last.rgb)
    with pytest.raises(DataError, match=r"frame 30: the file has 30 \(counted from 0\)"):
        read_image(path, frame=30)
    with pytest.raises(DataError, match="frame -1"):
        read_image(path, frame=-1)


@pytest.mark.parametrize("name", ["rtplan.dcm", "rtstruct.dcm", "test-SR.dcm", "ExplVR_BigEndNoMeta.dcm"])
def test_objects_without_a_picture_say_so(name: str) -> None:
    assert "without a picture" in refusal(dicom_path(name).read_bytes())


def test_a_window_on_a_coloured_picture_is_refused() -> None:
    assert "in colour" in refusal(dicom_path("SC_rgb.dcm").read_bytes(), window=(40, 400))
    assert "in colour" in refusal(encoded(Image.new("RGB", (9, 9)), "PNG"), window=(40, 400))


@pytest.mark.parametrize("window", [(40, 0), (40, -3), (float("nan"), 400), (40, float("inf"))])
def test_a_window_without_width_is_refused(window: tuple[float, float]) -> None:
    assert "CENTER,WIDTH" in refusal(dicom_path("CT_small.dcm").read_bytes(), window=window)


def test_nothing_about_the_patient_gets_out() -> None:
    data = dicom("CT_small.dcm")
    secret = "ZZSECRET"
    data.PatientName = data.PatientID = data.StudyDescription = data.Modality = secret
    whole = saved(data)
    assert secret not in repr(read_image_bytes(whole).origin)
    odd_window = dicom("CT_small.dcm")
    odd_window.add_new("WindowCenter", "LO", secret)
    odd_window.WindowWidth = "400"
    broken = [whole[:-5000], whole.replace(b"MONOCHROME2", b"ZZSECRET   "), saved(odd_window)]
    for file in broken:
        with pytest.raises(DataError) as caught:
            read_image_bytes(file)
        assert secret not in "".join(traceback.format_exception(caught.value))


def test_a_dicom_file_that_claims_to_be_huge_is_refused_before_decoding() -> None:
    data = dicom("CT_small.dcm")
    data.Rows = data.Columns = 20_000
    assert "20000×20000 pixels, the limit is 64 megapixels" in refusal(saved(data))


def test_a_deflated_bomb_is_not_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dicom_path("image_dfl.dcm").read_bytes()
    start = 144 + struct.unpack("<L", whole[140:144])[0]
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    private = struct.pack("<HH2sHL", 0x0009, 0x1001, b"OB", 0, 4 << 20)
    bomb = whole[:start] + compressor.compress(private + bytes(4 << 20)) + compressor.flush()
    monkeypatch.setattr(image_room, "MAX_BYTES", 1 << 20)
    assert "inflates to more than the limit of 1 MiB" in refusal(bomb)
    assert read_image_bytes(whole).rgb.shape == (512, 512, 3)


# --- PNG, JPEG, TIFF ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_eight_bit_grey_and_rgb_come_back_exactly(kind: str) -> None:
    grey = read_image_bytes(encoded(Image.fromarray(ramp()), kind))
    assert np.array_equal(grey.rgb[..., 0], ramp()) and grey.origin.mapping == "as stored"
    colour = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    assert np.array_equal(read_image_bytes(encoded(Image.fromarray(colour), kind)).rgb, colour)
    assert grey.origin.format == kind and grey.origin.modality is None


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_stretched_or_windowed(kind: str) -> None:
    data = encoded(Image.fromarray(ramp("uint16", 4000) + np.uint16(500)), kind)
    full = read_image_bytes(data)
    assert full.origin.mapping == "full range"
    assert np.array_equal(full.rgb, _stretched(ramp("uint16", 4000)))
    windowed = read_image_bytes(data, window=(2500, 1000)).rgb[..., 0]
    assert (windowed[ramp("uint16", 4000) < 1490] == 0).all() and (windowed[ramp("uint16", 4000) > 2510] == 255).all()


def test_floating_point_tiff_with_gaps() -> None:
    values = ramp("float32", 3)
    values[0, 0], values[0, 1] = np.nan, np.inf
    picture = read_image_bytes(encoded(Image.fromarray(values), "TIFF"))
    assert picture.rgb[0, 0, 0] == 0 and picture.rgb[0, 1, 0] == 255 and picture.rgb[-1, -1, 0] == 255


@pytest.mark.parametrize("bits", [1, 8, 16])
def test_tiff_with_white_as_zero(bits: int) -> None:
    values = {1: ramp() > 128, 8: ramp(), 16: ramp("uint16", 60_000)}[bits]
    data = encoded(Image.fromarray(values), "TIFF")
    plain = read_image_bytes(data).rgb
    tag = struct.pack("<HHLL", 262, 3, 1, 1)
    assert tag in data
    turned = read_image_bytes(data.replace(tag, struct.pack("<HHLL", 262, 3, 1, 0))).rgb
    assert np.array_equal(turned, 255 - plain)


def test_one_bit_palette_and_cmyk_pictures() -> None:
    mask = ramp() > 128
    assert np.array_equal(read_image_bytes(encoded(Image.fromarray(mask), "PNG")).rgb[..., 1], mask * np.uint8(255))
    colour = Image.new("RGB", (20, 10), (200, 30, 60))
    palette = encoded(colour.quantize(16), "PNG")
    assert np.abs(read_image_bytes(palette).rgb.astype(int) - (200, 30, 60)).max() <= 4
    cmyk = encoded(colour.convert("CMYK"), "JPEG", quality=95)
    picture = read_image_bytes(cmyk)
    assert picture.origin.format == "JPEG"
    assert np.abs(picture.rgb.astype(int) - (200, 30, 60)).max() <= 6


def test_what_is_transparent_becomes_black() -> None:
    rgba = np.full((10, 10, 4), 255, np.uint8)
    rgba[:5, :, 3] = 0
    for picture in (Image.fromarray(rgba), Image.fromarray(rgba[..., 2:], "LA")):
        rgb = read_image_bytes(encoded(picture, "PNG")).rgb
        assert (rgb[:5] == 0).all() and (rgb[5:] == 255).all()
    keyed = encoded(Image.fromarray(np.full((10, 10, 3), 255, np.uint8)), "PNG", transparency=(255, 255, 255))
    assert (read_image_bytes(keyed).rgb == 0).all()


def test_a_photograph_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # held on its side
    picture = Image.fromarray(np.concatenate([np.zeros((16, 32)), np.full((16, 32), 255)]).astype(np.uint8))
    turned = read_image_bytes(encoded(picture, "JPEG", exif=exif)).rgb
    assert turned[:, -4:].max() < 10 and turned[:, :4].min() > 245


def test_pages_of_a_tiff() -> None:
    pages = [Image.fromarray(np.full((12, 12), level, np.uint8)) for level in (10, 20, 30)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert [int(read_image_bytes(data, frame=i).rgb[0, 0, 0]) for i in range(3)] == [10, 20, 30]
    assert "frame 3: the file has 3" in refusal(data, frame=3)


def test_content_decides_and_not_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "film.dcm"
    path.write_bytes(encoded(Image.fromarray(ramp()), "PNG"))
    origin = read_image(path).origin
    assert origin.format == "PNG" and origin.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# --- bad input ------------------------------------------------------------------------------------------------------


def _png_that_claims(width: int, height: int) -> bytes:
    data = encoded(Image.new("1", (8, 8)), "PNG")
    header = struct.pack(">4sLL", b"IHDR", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">L", zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize("side", [9_000, 10_000, 20_000, 2**31 - 1])
def test_huge_dimensions_are_refused_with_the_limit(side: int, recwarn: pytest.WarningsRecorder) -> None:
    assert side**2 > MAX_PIXELS
    assert "64 megapixels" in refusal(_png_that_claims(side, side))
    assert not recwarn.list


@pytest.mark.parametrize("size", [(1, 1), (7, 400)])
def test_pictures_too_small_to_see_are_refused(size: tuple[int, int]) -> None:
    assert "below 8×8" in refusal(encoded(Image.new("L", size), "PNG"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_truncated_files_are_refused(kind: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for keep in (0.03, 0.5, 0.9):
        refusal(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
    "data", [b"", b"The patient was seen today.\n" * 20, b"\x89PNG\r\n\x1a\n", b"\x00" * 4096, b"GIF89a" + bytes(99)]
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    assert re.search("not a .*picture|damaged", refusal(data))


def test_paths_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="a folder, not a picture"):
        read_image(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="not a regular file"):
        read_image(Path("/dev/zero"))
    with pytest.raises(DataError):
        read_image(Path("a\0b.png"))
    monkeypatch.setattr(image_room, "MAX_BYTES", 1000)
    (tmp_path / "big.png").write_bytes(bytes(2000))
    with pytest.raises(DataError, match=r"big\.png: .*the limit"):
        read_image(tmp_path / "big.png")


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm",
             "SC_rgb_jpeg_dcmtk.dcm", "vlut_04.dcm", "OBXXXX1A_rle.dcm"]
)
def test_damaged_bytes_give_a_picture_or_one_line(name: str) -> None:
    whole = dicom_path(name).read_bytes()
    rng = random.Random(7)
    for _ in range(30):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 8, 64))):
            damaged[rng.randrange(132, len(damaged))] = rng.randrange(256)
        try:
            read_image_bytes(bytes(damaged[: rng.choice((None, rng.randrange(200, len(damaged))))]))
        except DataError as error:
            assert "\n" not in str(error)


def test_a_stream_that_kills_the_decoder_does_not_kill_us() -> None:
    data = bytearray(dicom_path("JPEGLSNearLossless_08.dcm").read_bytes())
    start_of_frame = data.index(b"\xff\xf7\x00\x0b")
    data[start_of_frame + 4] = 126  # bits per sample: GDCM ends its process on it
    assert "cannot be decoded" in refusal(bytes(data))


def test_the_library_stays_quiet_about_odd_headers(recwarn: pytest.WarningsRecorder) -> None:
    odd = dicom("CT_small.dcm")
    item = Dataset()
    item.add_new(0x00080100, "SH", "X" * 40)
    odd.add_new(0x00081032, "SQ", [item])
    read_image_bytes(saved(odd))
    assert not [w for w in recwarn.list if "XXXX" in str(w.message)]
