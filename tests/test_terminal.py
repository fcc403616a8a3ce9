"""What the terminal asks before a model sees a picture, and how it opens the page."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pydicom
import pytest
from PIL import Image, ImageDraw, ImageFont
from pydicom.data import get_testdata_file
from serving import Server, tiny_edge
from test_chat import Terminal

from ldrt_edge.burned_in import black_out, text_lines
from ldrt_edge.chat.audit import verify
from ldrt_edge.chat.browser import in_browser
from ldrt_edge.chat.intake import take_in
from ldrt_edge.chat.terminal import ask_once
from ldrt_edge.errors import DataError
from ldrt_edge.front import Front
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.base import Sampling

PROMPT = r"/help shows the commands\s+>"
ASKED = r"where a name may stand[^>]*\[y/b/n\]"


@pytest.fixture(scope="module")
def edge(tiny, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    return tiny_edge(tiny("llava15", "smollm2"), tmp_path_factory.mktemp("terminal"))


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """A picture with a name burned into it."""
    picture = Image.new("RGB", (300, 200))
    ImageDraw.Draw(picture).text((20, 20), "DOE JANE 1950", (255, 255, 255), ImageFont.load_default(20))
    ImageDraw.Draw(picture).ellipse((120, 90, 200, 170), (90, 90, 90))
    path = tmp_path / "film.png"
    picture.save(path)
    return path


def scan(folder: Path, says: str) -> Path:
    """A CT in whose pixels no text is found, and whose header says so or otherwise."""
    header = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    header.BurnedInAnnotation = says
    path = folder / f"scan-{says}.dcm"
    header.save_as(path)
    return path


def command(edge: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "ldrt_edge.cli", "chat", str(edge), "--threads", "1", *options]


# --- burned-in text -------------------------------------------------------------------------------------------------


def test_where_nobody_can_be_asked_an_option_decides(
    edge: Path, named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    plain = read_image(named)
    assert (take_in(named, burned_in="show").rgb == plain.rgb).all()
    assert not capfd.readouterr().err
    assert (take_in(named).rgb == plain.rgb).all() and "--burned-in black or refuse" in capfd.readouterr().err
    covered, lines = take_in(named, burned_in="black"), text_lines(plain.rgb)
    assert covered.origin.blacked_out == len(lines) >= 1 and (covered.rgb == black_out(plain.rgb, lines)).all()
    with pytest.raises(DataError, match="left out"):
        take_in(named, burned_in="refuse")

    says_so = scan(tmp_path, "YES")
    assert take_in(says_so, burned_in="show").origin.modality == "CT"
    assert take_in(says_so).origin.modality == "CT" and "header says" in capfd.readouterr().err
    for chosen, said in (("refuse", "left out"), ("black", "none was found")):
        with pytest.raises(DataError, match=said):
            take_in(says_so, burned_in=chosen)  # type: ignore[arg-type]
    for clean in (scan(tmp_path, "NO"), Path(str(get_testdata_file("CT_small.dcm")))):
        for option in (None, "show", "black", "refuse"):
            assert take_in(clean, burned_in=option).origin.blacked_out == 0  # type: ignore[arg-type]
    assert not capfd.readouterr().err
    assert ask_once(edge, "How many?", named, sampling=Sampling(max_tokens=2), burned_in="black").answer


def test_text_is_found_through_the_files_own_window(tmp_path: Path) -> None:
    header = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    canvas = Image.new("L", (128, 128))
    ImageDraw.Draw(canvas).text((4, 4), "DOE JANE", 255, ImageFont.load_default(14))
    values = header.pixel_array.copy()
    values[:24] = np.where(np.asarray(canvas)[:24] > 127, 2000, 0)
    header.PixelData = values.tobytes()
    header.save_as(tmp_path / "film.dcm")
    shown = take_in(tmp_path / "film.dcm", (-600, 100), burned_in="black")
    assert shown.origin.window == (-600, 100) and shown.origin.blacked_out >= 1 and not shown.rgb[8:16, 8:60].any()


def test_text_is_found_through_the_full_range_and_the_window_asked_for(tmp_path: Path) -> None:
    canvas = Image.new("L", (128, 128))
    ImageDraw.Draw(canvas).text((4, 4), "DOE JANE", 255, ImageFont.load_default(14))
    for ink, window in ((2800, (400, 1800)), (1540, (496, 40))):  # each white on white through the file's own
        header = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
        header.WindowCenter, header.WindowWidth = 40, 400
        values = header.pixel_array.copy()
        values[:24] = np.where(np.asarray(canvas)[:24] > 127, ink, 1500)
        header.PixelData = values.tobytes()
        header.save_as(tmp_path / "film.dcm")
        shown = take_in(tmp_path / "film.dcm", window, burned_in="black")
        assert shown.origin.blacked_out == 1 and not shown.rgb[8:16, 8:60].any()


def test_through_a_pipe_it_is_shown_and_a_line_names_the_option(edge: Path, named: Path) -> None:
    once = command(edge, "--image", str(named), "--ask", "How many?", "--max-tokens", "2", "--json")
    done = subprocess.run(once, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)["answer"] and done.stderr.count("--burned-in") == 1 and str(named) not in done.stderr
    for option, said in (("black", ""), ("refuse", "left out")):
        done = subprocess.run([*once, "--burned-in", option], capture_output=True, text=True, timeout=120)
        assert (done.returncode == 0) == (option == "black")
        assert said in done.stderr and "it is shown" not in done.stderr

    lines = f"/image {named}\n{named}\nHow many?\n".encode()
    done_bytes = subprocess.run(command(edge, "--max-tokens", "2"), input=lines, capture_output=True, timeout=120)
    notes = done_bytes.stderr.decode()
    assert done_bytes.returncode == 0 and notes.count("--burned-in") == 2 and notes.count("picture: PNG") == 2


@pytest.fixture
def terminal(edge: Path, tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(command(edge, "--max-tokens", "2"), tmp_path)
    yield opened
    opened.close()


def test_on_a_terminal_one_is_asked_before_the_model_sees_it(
    terminal: Terminal, edge: Path, named: Path, tmp_path: Path
) -> None:
    terminal.until(PROMPT)
    for number, (typed, said) in enumerate(
        ((f"/image {named}", "left out"), (f"{named}", "picture: PNG"), (f"/image {named} 0", "1 lines of text"))
    ):
        terminal.type(f"{typed}\r")
        terminal.until(ASKED)
        terminal.type(f"{'nyb'[number]}\r")
        terminal.until(rf"{said}[^>]*>")
    terminal.type("How many?\r")
    terminal.until(r"cut off by[^>]*>")
    terminal.type(f"/save {tmp_path / 'talk.json'}\r")
    terminal.until("saved to")
    (image,) = json.loads((tmp_path / "talk.json").read_text())["turns"][0]["images"]
    seen = Front.load(edge).image(take_in(named, burned_in="black").rgb)
    assert image["blacked_out"] == 1 and image["seen_sha256"] == seen.sha256


def test_neither_enter_nor_ctrl_c_nor_ctrl_d_shows_it(terminal: Terminal, named: Path, tmp_path: Path) -> None:
    terminal.until(PROMPT)
    for key, said in (("\r", "left out"), ("\x03", "stopped"), ("\x04", "left out"), ("maybe\rn\r", "left out")):
        terminal.type(f"/image {named}\r")
        terminal.until(ASKED)
        terminal.type(key)
        assert "picture:" not in terminal.until(rf"{said}[^>]*>")
    terminal.type(f"/image {scan(tmp_path, 'YES')}\r")  # the header says so, and there is nothing to black out
    terminal.until(r"header says[^>]*\[y/n\]")
    terminal.type("y\r")
    terminal.until("picture: DICOM CT")


def test_the_first_picture_is_asked_about_before_the_model_is_loaded(edge: Path, named: Path, tmp_path: Path) -> None:
    for key, said in (("n", "ldrt-edge: .*left out"), ("b", "1 lines of text blacked out")):
        terminal = Terminal(command(edge, "--image", str(named)), tmp_path)
        assert "loading" not in terminal.until(ASKED)
        terminal.type(f"{key}\r")
        terminal.until(said)
        terminal.close()
    decided = Terminal(command(edge, "--image", str(named), "--burned-in", "show"), tmp_path)
    assert "a name" not in decided.until("picture: PNG")
    decided.close()


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--web", "--window", "40,400"), "leave out .*--window"),
        (("--web", "--frame", "3"), "leave out .*--frame"),
        (("--web", "--burned-in", "show"), "leave out .*--burned-in"),
        (("--audit", "log"), "add --web"),
        (("--ask", "How many?", "--audit", "log"), "add --web"),
    ],
)
def test_options_that_say_nothing_are_refused(edge: Path, options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = subprocess.run(command(edge, *options), capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and re.search(said, done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def home(tmp_path: Path) -> Path:
    made = tmp_path / "home"
    made.mkdir()
    return made


def test_the_browser_is_told_the_token_by_a_file_of_ones_own(edge: Path, tmp_path: Path, home: Path) -> None:
    """What it is started with stands in the list of processes, which other users can see."""
    told, log = tmp_path / "told", tmp_path / "audit.log"
    browser = tmp_path / "browser"
    browser.write_text(
        f"""#!/bin/sh
        (echo "$@"; stat -c %a "${{1#file://}}"; cat "${{1#file://}}") > '{told}.partial'
        mv '{told}.partial' '{told}'"""
    )
    browser.chmod(0o755)
    opened = subprocess.Popen(
        command(edge, "--web", "--audit", str(log)), stdout=subprocess.PIPE, text=True,
        env=os.environ | {"BROWSER": f"{browser} %s", "HOME": str(home)},
    )
    assert opened.stdout
    address = opened.stdout.readline().strip()
    deadline = time.monotonic() + 30
    while not told.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    where, mode, content = told.read_text().split("\n", 2)
    assert urlsplit(address).fragment.startswith("token=")
    assert where.startswith(home.as_uri()) and "token" not in where and mode == "600" and f"url={address}" in content
    opened.send_signal(signal.SIGINT)
    assert opened.wait(30) == 0
    opened.stdout.close()
    assert list(home.iterdir()) == [], "it is gone"
    assert verify(log).lines == 0, "the page writes an audit log as `serve` does"


def test_a_real_browser_follows_the_file(edge: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or pytest.skip("no Chromium is installed")
    monkeypatch.setenv("HOME", str(home))
    server = Server(edge)
    with sync_api.sync_playwright() as play:
        as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = play.chromium.launch(executable_path=chromium, args=as_root)
        monkeypatch.setattr(webbrowser, "open", lambda address: opened.set())
        opened = threading.Event()
        page = browser.new_page()
        with in_browser(server.address):
            (file,) = home.glob("ldrt-edge-*.html")
            assert opened.wait(30)
            page.goto(file.as_uri())
            page.locator("#model-facts").get_by_text("llamacpp").wait_for()  # which the token is needed for
        browser.close()
    assert "Traceback" not in server.close() and not file.exists()
