"""Burned-in text in real pictures of the usual modalities, and none where there is none."""

from __future__ import annotations

import io

import numpy as np
import pydicom
import pytest
from PIL import Image, ImageDraw, ImageFont
from pydicom.data import get_testdata_file

from ldrt_edge.burned_in import black_out, text_lines
from ldrt_edge.chat.pictures import Pictures, Shot
from ldrt_edge.image import read_image_bytes


def file(name: str) -> bytes:
    with open(str(get_testdata_file(name)), "rb") as stream:  # noqa: PTH123 - pydicom gives text
        return stream.read()


@pytest.mark.parametrize("name", ["examples_rgb_color.dcm", "examples_palette.dcm", "examples_jpeg2k.dcm"])
def test_an_ultrasounds_text_is_found_and_goes_under_black_boxes(name: str) -> None:
    rgb = read_image_bytes(file(name)).rgb
    lines = text_lines(rgb)
    assert len(lines) >= 4
    covered = black_out(rgb, lines)
    for line in lines:
        assert not covered[line.top : line.bottom, line.left : line.right].any()
    assert (covered == rgb).all(axis=2).mean() > 0.85, "the rest is as it was"


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm", "rtdose.dcm", "693_J2KR.dcm", "examples_overlay.dcm"])
def test_no_text_is_found_where_there_is_none(name: str) -> None:
    assert text_lines(read_image_bytes(file(name)).rgb) == []


@pytest.mark.parametrize(("ink", "paper"), [(255, 0), (255, 110), (0, 230), (150, 30)])
@pytest.mark.parametrize("size", [10, 16, 40])
def test_a_name_is_found_in_any_tone_and_size(ink: int, paper: int, size: int) -> None:
    noise = np.random.default_rng(0).normal(paper, 6, (200, 400)).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(noise).convert("RGB")
    ImageDraw.Draw(picture).text((20, 60), "DOE JANE 1950", (ink, ink, ink), ImageFont.load_default(size))
    lines = text_lines(np.asarray(picture))
    assert lines and min(line.left for line in lines) < 20 + 2 * size
    assert all(line.top < 60 + 2 * size and line.bottom > 60 for line in lines)


def test_a_name_that_runs_onto_a_brighter_ground_is_one_line_and_covered_whole() -> None:
    """Through one threshold its second half cannot be seen, and through another the whole can."""
    picture = Image.new("RGB", (300, 60))
    ImageDraw.Draw(picture).rectangle((100, 0, 300, 60), (110, 110, 110))
    ImageDraw.Draw(picture).text((10, 20), "DOE JANE", (255, 255, 255), ImageFont.load_default(20))
    ImageDraw.Draw(picture).text((104, 20), "OF HAMBURG", (255, 255, 255), ImageFont.load_default(20))
    rgb = np.asarray(picture)
    (line,) = text_lines(rgb)
    assert line.left < 20 and line.right > 200 and (black_out(rgb, [line]) < 255).all()


def named(ink: int, ground: int) -> bytes:
    """A CT whose own window is 40 / 400, with a name in stored values; HU are 1024 less."""
    header = pydicom.dcmread(io.BytesIO(file("CT_small.dcm")))
    header.WindowCenter, header.WindowWidth = 40, 400
    values = header.pixel_array.copy()
    canvas = Image.new("L", (128, 128))
    ImageDraw.Draw(canvas).text((4, 4), "DOE JANE", 255, ImageFont.load_default(14))
    values[:24] = np.where(np.asarray(canvas)[:24] > 127, ink, ground)
    header.PixelData = values.tobytes()
    stream = io.BytesIO()
    header.save_as(stream)
    return stream.getvalue()


def test_text_that_only_the_full_range_shows_is_asked_about_and_covered() -> None:
    kept = Pictures()
    told = kept.add(named(2800, 1500))
    assert text_lines(read_image_bytes(named(2800, 1500)).rgb) == [], "both are white through its own window"
    assert told["burned_in"] is True and kept.text(str(told["name"]), 0)["text_lines"] == 1
    for window in (None, (400.0, 1800.0), (1000.0, 4000.0)):
        shown = kept.view(Shot(str(told["name"]), window, 0, black_out=True))
        assert shown.origin.blacked_out == 1 and not shown.rgb[8:16, 8:60].any()


def test_text_that_only_the_window_asked_for_shows_is_found_through_it() -> None:
    kept = Pictures()
    told = kept.add(named(1540, 1500))
    name, window = str(told["name"]), (496.0, 40.0)
    assert told["text_lines"] == kept.text(name, 0)["text_lines"] == 0
    assert kept.text(name, 0, window)["text_lines"] == 1
    assert text_lines(kept.view(Shot(name, window, 0)).rgb)
    shown = kept.view(Shot(name, window, 0, black_out=True))
    assert shown.origin.blacked_out == 1 and not shown.rgb[8:16, 8:60].any()


def test_a_picture_whose_header_says_so_is_asked_about() -> None:
    kept = Pictures()
    header = pydicom.dcmread(io.BytesIO(file("CT_small.dcm")))
    for value, expected in (("YES", True), ("NO", False)):
        header.BurnedInAnnotation = value
        stream = io.BytesIO()
        header.save_as(stream)
        assert kept.add(stream.getvalue())["burned_in"] is expected


def test_a_view_without_text_hides_it_through_any_window() -> None:
    header = pydicom.dcmread(io.BytesIO(file("CT_small.dcm")))
    values = header.pixel_array.copy()
    canvas = Image.new("L", (128, 128))
    ImageDraw.Draw(canvas).text((4, 4), "DOE JANE", 255, ImageFont.load_default(14))
    values[:24] = np.where(np.asarray(canvas)[:24] > 127, 2000, 0)
    header.PixelData = values.tobytes()
    stream = io.BytesIO()
    header.save_as(stream)
    kept = Pictures()
    told = kept.add(stream.getvalue())
    assert told["burned_in"] is True
    for window in (None, (40.0, 400.0), (-600.0, 100.0)):
        shown = kept.view(Shot(str(told["name"]), window, 0, black_out=True))
        assert shown.origin.blacked_out >= 1 and not shown.rgb[8:16, 8:60].any()
        assert kept.view(Shot(str(told["name"]), window, 0)).rgb[8:16, 8:60].any()
