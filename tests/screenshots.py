"""Draws the README's screenshots: python tests/screenshots.py EDGE REPORT OUT, with a model that knows phantoms.

The pictures are phantoms of ours: a knee drawn by `data phantom`'s code, as CT with dose and contours; a dose map.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from serving import Server
from test_overlay import ct, dose, structures

from ldrt_edge.train.data.phantom_dose import DoseMapSpec, _dose, draw_dose_map
from ldrt_edge.train.data.phantom_sites import draw_site

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SIZE = {"width": 1360, "height": 820}
TARGET = (224.0, 224.0)


def main(edge: Path, report: Path, out: Path) -> None:
    """Ask about both pictures, in light and in dark."""
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as play:
        files = _knee(Path(scratch))
        plan = Path(scratch) / "plan.png"
        spec = DoseMapSpec("knee", "left", 3, True, True, True, 4, True, 5, True, False)
        draw_dose_map(spec, random.Random(4)).image.save(plan)
        server = Server(edge, "--report", str(report), "--max-tokens", "32")
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        for theme, pictures, questions in (
            ("light", files, ("What joint or body part is this?", "What is the prescribed dose in Gy?")),
            ("dark", [plan], ("How many beams are used?", "What is the highest dose on the scale?")),
        ):
            page = browser.new_context(locale="en-GB", viewport=SIZE, color_scheme=theme).new_page()  # type: ignore[arg-type]
            page.goto(server.address)
            page.click("#new")
            page.set_input_files("#file", pictures)
            if theme == "dark":  # what is printed on a phantom names nobody
                page.get_by_role("button", name="Show as it is").click()
            page.locator("#seen-view[src]").wait_for()
            if len(pictures) > 1:
                page.select_option("#preset", "bone")
            for number, question in enumerate(questions, 1):
                page.fill("#question", question)
                page.press("#question", "Enter")
                expect(page.locator(".facts")).to_have_count(number, timeout=60_000)
            page.wait_for_timeout(1000)
            _save(page, out / f"page-{theme}.png")
        browser.close()
        server.close()


def _knee(folder: Path) -> list[Path]:
    """A slice with the dose of two fields and a square around the joint, 0.5 mm a pixel."""
    anatomy = draw_site("knee", TARGET, random.Random(3))
    hounsfield = np.where(anatomy.body > 0, (anatomy.grey - 80) * 6 + 40, -1000)
    stored = np.clip(np.round(hounsfield) + 1024, 0, 4095).astype("<u2")
    relative = _dose(anatomy.body[::2, ::2], TARGET, [0.1, np.pi + 0.1], 27)
    x, y = (side / 2 for side in TARGET)
    corners = [x - 16, y - 14, 0, x + 16, y - 14, 0, x + 16, y + 14, 0, x - 16, y + 14, 0]
    files = {
        "slice": ct(Rows=448, Columns=448, PixelSpacing=[0.5, 0.5], PixelData=stored.tobytes(), PixelRepresentation=0,
                    RescaleIntercept=-1024, RescaleSlope=1, BitsStored=12, HighBit=11),
        "dose": dose(np.stack([relative] * 3) * 0.5, PixelSpacing=[1, 1], ImagePositionPatient=[0, 0, -10]),
        "plan": structures(contour=corners),
    }  # fmt: skip
    paths = [folder / f"{name}.dcm" for name in files]
    for path, data in zip(paths, files.values(), strict=True):
        path.write_bytes(data)
    return paths


def _save(page: Any, path: Path) -> None:
    page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
