"""The page in a real browser: headless Chromium, a real server, a tiny model."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from serving import Server, tiny_edge

from ldrt_edge import artifact
from ldrt_edge.chat.history import History
from ldrt_edge.chat.session import Exchange, Session, Shown
from ldrt_edge.front import Front
from ldrt_edge.image import Origin, read_image
from ldrt_edge.runtimes.base import Sampling, Timings, load

sync_api = pytest.importorskip("playwright.sync_api")
sync_api.expect.set_options(timeout=30_000)  # milliseconds, for machines that are busy
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
SECRET = "DOE_JANE_1950"
LANGUAGES = ("en", "de", "es", "fr", "zh")


@pytest.fixture(scope="module")
def edge(tiny, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    return tiny_edge(tiny("llava15", "smollm2"), tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def server(edge: Path) -> Iterator[Server]:
    opened = Server(edge, "--max-tokens", "800")  # of a context of 4096: a conversation has room, however slow the test
    yield opened
    notes = opened.close()
    assert "Traceback" not in notes and SECRET not in notes


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = play.chromium.launch(executable_path=CHROMIUM, args=as_root)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page, open; afterwards: it asked nobody else, and nothing went wrong in it."""
    context = browser.new_context(locale="en-GB", viewport={"width": 1400, "height": 850}, accept_downloads=True)
    opened = context.new_page()
    asked: list[str] = []
    faults: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda line: faults.append(line.text) if "Content Security" in line.text else None)
    opened.goto(server.address)
    opened.locator("#model-facts").get_by_text("llamacpp").wait_for()
    opened.click("#new")  # not the last test's conversation
    yield opened
    origin = f"http://127.0.0.1:{server.port}/"
    assert not faults and all(url.startswith((origin, f"blob:{origin}")) for url in asked)
    assert not any(SECRET in url for url in asked)
    context.close()


@pytest.fixture
def remembered(edge: Path, tmp_path: Path) -> Iterator[Server]:
    """A server with a history of one conversation, in which the model could not tell, and a report about the model."""
    runtime, front = load(edge, threads=1), Front.load(edge)
    session = Session(runtime, front, model=artifact.identity(edge))
    told = "That cannot be told from this image."
    shown = Shown(front.image(np.zeros((56, 64, 3), np.uint8)), Origin("PNG", None, None, 0, 1, "as stored", "0" * 64))
    session.exchanges.append(Exchange("Which knee?", (shown,), told, "end", 9, Sampling(), Timings(), 0.62))
    with artifact.create(tmp_path / "report", "report", {}) as draft:
        bins = [{"confidence": 0.6, "accuracy": 0.5, "n": 30}]
        report = {"calibration": {"bins": bins}, "dataset": {"name": "phantom"}}
        about = {"subject": {"name": "gguf", "manifest_sha256": artifact.read(edge).sha256}}
        (draft.path / "report.json").write_text(json.dumps(report | about))
    History(tmp_path / "history", "correct horse").keep("remembered", session)
    runtime.close()
    options = "--history", str(tmp_path / "history"), "--report", str(tmp_path / "report")
    opened = Server(edge, *options, prefix=("env", "LDRT_EDGE_PASSPHRASE=correct horse"))
    yield opened
    assert opened.close() == ""


@pytest.fixture
def ct(tmp_path: Path) -> Path:
    path = tmp_path / f"{SECRET}.dcm"
    shutil.copyfile(str(get_testdata_file("CT_small.dcm")), path)
    return path


def drop(page: Any, *paths: Path) -> None:
    """Drop files on the page as a person would, but for the hand."""
    files = [(path.name, base64.b64encode(path.read_bytes()).decode()) for path in paths]
    transfer = page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, data] of files) {
                transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name));
            }
            return transfer;
        }""",
        files,
    )
    page.dispatch_event("#stage", "drop", {"dataTransfer": transfer})
    page.locator("#seen-view[src]").wait_for()


def expect(locator: Any) -> Any:
    return sync_api.expect(locator)


def seen(page: Any) -> str:
    """The hash under "the model sees"."""
    return str(page.locator("#seen-facts").get_attribute("title"))


class Held:
    """Requests that wait on their way, until they are let go; later ones of the kind are not held then."""

    def __init__(self, page: Any, pattern: str, method: str = "GET") -> None:
        self._page, self._method, self.routes, self._gone = page, method, list[Any](), False
        page.route(pattern, self._take)

    def _take(self, route: Any) -> None:
        if self._gone or route.request.method != self._method:
            route.continue_()
        else:
            self.routes.append(route)

    def wait(self) -> None:
        """Until one is held."""
        for _ in range(300):
            if self.routes:
                return
            self._page.wait_for_timeout(100)
        raise AssertionError("no request came")

    def go(self) -> None:
        self._gone = True
        for route in self.routes:
            route.continue_()


def answer(page: Any, question: str) -> None:
    """Ask, and stop the answer when it has begun, unless it is whole by then."""
    before = page.locator(".facts").count()
    page.fill("#question", question)
    page.press("#question", "Enter")
    stop(page, before)


def stop(page: Any, before: int = 0) -> None:
    """Stop the answer behind `before` others, when it has begun."""
    page.wait_for_function(
        "n => document.querySelector('.answer[aria-busy]')?.textContent.trim().length > 3"
        " || document.querySelectorAll('.facts').length > n",
        arg=before,
    )
    page.keyboard.press("Escape")
    expect(page.locator(".facts")).to_have_count(before + 1)


def test_a_picture_is_dropped_windowed_asked_about_stopped_and_exported(
    page: Any, edge: Path, ct: Path, tmp_path: Path
) -> None:
    front = Front.load(edge)
    drop(page, ct)
    expect(page.locator("#reading")).to_contain_text("CT · 128×128")
    assert seen(page) == front.image(read_image(ct).rgb).sha256
    page.select_option("#preset", "soft")
    expected = front.image(read_image(ct, (40, 400)).rgb).sha256
    expect(page.locator("#seen-facts")).to_have_attribute("title", expected)
    expect(page.locator("#hint")).to_contain_text("go with the next question")

    page.fill("#question", "How many vertebrae?")
    page.press("#question", "Enter")
    expect(page.locator("#status")).to_contain_text("Writing")
    page.keyboard.press("Escape")
    expect(page.locator(".facts")).to_contain_text("stopped by you")
    for told in ("f16", "window 40 / 400", expected[:12], "seed 0", "first word", "not for diagnosis", "KLD"):
        expect(page.locator(".facts")).to_contain_text(told)
    expect(page.locator("#hint")).to_contain_text("has these pictures already")

    with page.expect_download() as download:
        page.click("#export-json")
    assert download.value.suggested_filename == "ldrt-edge-conversation.json"
    saved = tmp_path / "saved.json"
    download.value.save_as(saved)
    talk = json.loads(saved.read_text())
    assert talk["turns"][0]["images"][0]["seen_sha256"] == expected and "not for diagnosis" in talk["notice"]
    assert SECRET not in saved.read_text() and "CompressedSamples" not in saved.read_text()
    with page.expect_download() as download:
        page.click("#export-sr")
    assert download.value.suggested_filename == "ldrt-edge-conversation.dcm"
    download.value.save_as(saved.with_suffix(".dcm"))
    assert pydicom.dcmread(saved.with_suffix(".dcm")).ContentQualification == "RESEARCH"


def test_dragging_changes_the_window_and_the_next_question_shows_it_anew(page: Any, ct: Path) -> None:
    drop(page, ct)
    answer(page, "What is this?")
    before = seen(page)
    box = page.locator("#stage").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 40, box["y"] + 160, steps=6)
    page.mouse.up()
    expect(page.locator("#seen-facts")).not_to_have_attribute("title", before)
    expect(page.locator("#hint")).to_contain_text("1 picture(s) go with")
    answer(page, "And now?")
    expect(page.locator("article").nth(1).locator(".question img")).to_have_count(1)
    answer(page, "And in words?")
    expect(page.locator("article").nth(2).locator(".question img")).to_have_count(0)


def test_dose_and_contours_lie_over_their_slice_for_the_eye_and_for_the_model(
    page: Any, edge: Path, tmp_path: Path
) -> None:
    from test_overlay import FRAME, ct, dose, structures

    from ldrt_edge.overlay import lay_over, read_overlay

    rows, columns = np.mgrid[:9, :8]
    grid = np.exp(-((rows - 4) ** 2 + (columns - 3.5) ** 2) / 9) * np.ones((3, 1, 1))
    files = {"slice": ct(), "dose": dose(grid), "plan": structures()}
    paths = {name: tmp_path / f"{SECRET}-{name}.dcm" for name in files}
    for name, data in files.items():
        paths[name].write_bytes(data)
    front = Front.load(edge)
    plain = read_image(paths["slice"])
    covered = lay_over(plain, files["slice"], [read_overlay(files["dose"]), read_overlay(files["plan"])])

    page.set_input_files("#file", paths["dose"])  # first a picture of its own, then over its slice
    expect(page.locator("#reading")).to_contain_text("RTDOSE")
    page.set_input_files("#file", [paths["slice"], paths["plan"]])
    expect(page.locator("#seen-facts")).to_have_attribute("title", front.image(covered.rgb).sha256)
    expect(page.locator("#legend")).to_contain_text("EXTERNAL 1")
    expect(page.locator("#legend")).to_contain_text("95%")
    expect(page.locator("#hint")).to_contain_text("1 picture(s) go with")
    if shots := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{shots}/overlay.png")
    page.locator("#stage").focus()
    page.keyboard.press("d")
    expect(page.locator("#seen-facts")).to_have_attribute("title", front.image(plain.rgb).sha256)
    expect(page.locator("#cover")).to_have_attribute("aria-pressed", "false")
    page.click("#cover")
    expect(page.locator("#seen-facts")).to_have_attribute("title", front.image(covered.rgb).sha256)
    answer(page, "How much dose does it get?")
    with page.expect_download() as download:
        page.click("#export-json")
    download.value.save_as(tmp_path / "saved.json")
    saved = (tmp_path / "saved.json").read_text()
    (told,) = json.loads(saved)["turns"][0]["images"]
    assert [overlay["modality"] for overlay in told["overlays"]] == ["RTDOSE", "RTSTRUCT"]
    assert SECRET not in saved and FRAME not in saved

    page.click("#new")
    stray = tmp_path / "stray.dcm"
    stray.write_bytes(structures(frame="1.2.3"))
    page.set_input_files("#file", [paths["slice"], stray])
    expect(page.locator("#status")).to_contain_text("frame of reference")
    expect(page.locator("#cover")).to_be_hidden()


def test_burned_in_text_is_asked_about_before_the_model_sees_it(page: Any, edge: Path, tmp_path: Path) -> None:
    from ldrt_edge.burned_in import black_out, text_lines

    path = tmp_path / f"{SECRET}.dcm"
    shutil.copyfile(str(get_testdata_file("examples_rgb_color.dcm")), path)
    front, plain = Front.load(edge), read_image(path).rgb
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for choice, rgb in (("Leave out", None), ("Show as it is", plain), ("Black", black_out(plain, text_lines(plain)))):
        page.set_input_files("#file", path)
        expect(page.locator("#worded")).to_be_visible()
        expect(page.locator("#worded")).to_contain_text("burned into 1 picture")
        page.wait_for_timeout(500)
        assert not any("/seen" in url or "/read" in url for url in asked), "nothing is shown before the answer"
        if choice == "Black" and (shots := os.environ.get("SCREENSHOTS")):
            page.screenshot(path=f"{shots}/worded.png")
        page.get_by_role("button", name=choice).click()
        if rgb is None:
            expect(page.locator("#hint")).to_contain_text("No picture")
            continue
        expect(page.locator("#seen-facts")).to_have_attribute("title", front.image(rgb).sha256)
        page.click("#new")
        page.wait_for_timeout(300)
        asked.clear()
    page.set_input_files("#file", path)
    expect(page.locator("#worded")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#hint")).to_contain_text("No picture")


def test_what_cannot_be_told_is_shown_as_such_and_a_history_comes_back(
    browser: Any, remembered: Server, tmp_path: Path
) -> None:
    page = browser.new_page(locale="en-GB")
    with page.expect_request(lambda request: request.url.endswith("/remembered/read")):  # so that it goes on at once
        page.goto(remembered.address)
    expect(page.locator(".question p")).to_have_text("Which knee?")
    expect(page.locator(".unknown")).to_contain_text("this picture does not tell")
    expect(page.locator(".facts")).to_contain_text(
        "sure to 62 %: of 30 measured answers about as sure, 50 % were right (33 % to 67 %; phantom)"
    )
    expect(page.locator("#written")).to_contain_text("encrypted with your passphrase")
    if shots := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{shots}/remembered.png")
    answer(page, "And the other one?")
    expect(page.locator(".unknown")).to_have_count(1)
    page.click("#forget")
    expect(page.locator("article")).to_have_count(0)
    assert not list((tmp_path / "history").glob("*.talk"))
    page.close()


def test_zoom_and_inversion_are_of_the_view_alone(page: Any, ct: Path) -> None:
    drop(page, ct)
    before = seen(page)
    page.locator("#stage").focus()
    for key in ("+", "+", "i", "ArrowRight"):
        page.keyboard.press(key)
    expect(page.locator("#view")).to_have_class("inverted")
    expect(page.locator("#reading")).to_contain_text("156 %")
    page.wait_for_timeout(500)
    assert seen(page) == before


def test_frames_and_a_series_in_the_order_of_its_slices(page: Any, edge: Path, tmp_path: Path) -> None:
    slices = []
    for name, z in (("a", 30), ("b", 10), ("c", 20)):
        header = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
        header.ImagePositionPatient, header.ImageOrientationPatient = [0, 0, z], [1, 0, 0, 0, 1, 0]
        header.PixelData = (header.pixel_array // z).tobytes()
        slices.append(tmp_path / f"{name}.dcm")
        header.save_as(slices[-1])
    drop(page, *slices)
    expect(page.locator("#frame-label")).to_have_text("Frame 2 of 3")
    hashes = []
    for place in range(3):
        page.locator("#frame").fill(str(place))
        expect(page.locator("#seen")).to_have_attribute("aria-busy", "false")
        hashes.append(seen(page))
    front = Front.load(edge)
    assert hashes == [front.image(read_image(slices[i]).rgb).sha256 for i in (1, 2, 0)], "from z = 10 to 30"
    answer(page, "What lies above?")
    expect(page.locator(".facts")).to_contain_text(hashes[2][:12])
    page.click("#new")
    drop(page, Path(str(get_testdata_file("rtdose.dcm"))))
    expect(page.locator("#frame-label")).to_have_text("Frame 1 of 15")
    page.locator("#stage").focus()
    page.keyboard.press("PageDown")
    expect(page.locator("#frame-label")).to_have_text("Frame 2 of 15")


def test_a_series_comes_with_its_dose_its_contours_and_a_stray_picture(page: Any, tmp_path: Path) -> None:
    from test_overlay import ct, dose, structures

    files = {f"slice{z}": ct(z=z) for z in (-2, 0, 2)}
    files |= {"dose": dose(np.ones((3, 9, 8))), "plan": structures()}
    paths = [tmp_path / f"{name}.dcm" for name in files]
    for path, data in zip(paths, files.values(), strict=True):
        path.write_bytes(data)
    Image.new("RGB", (40, 40)).save(tmp_path / "stray.png")
    page.set_input_files("#file", [tmp_path / "stray.png", *paths])
    expect(page.get_by_role("tab")).to_have_count(2)
    expect(page.locator("#hint")).to_contain_text("2 picture(s) go with")
    page.get_by_role("tab", name="1").click()
    expect(page.locator("#frame-label")).to_have_text("Frame 2 of 3")
    expect(page.locator("#legend")).to_contain_text("EXTERNAL 1")
    expect(page.locator("#legend")).to_contain_text("95%")
    page.get_by_role("tab", name="2").click()
    expect(page.locator("#reading")).to_contain_text("PNG · 40×40")


def test_two_series_of_one_size_stay_two(page: Any, edge: Path, tmp_path: Path) -> None:
    from test_overlay import ct

    paths = []
    for number in range(4):
        paths.append(tmp_path / f"{number}.dcm")
        paths[-1].write_bytes(ct(z=number, SeriesInstanceUID=f"1.2.{number % 2}"))
    page.set_input_files("#file", paths)
    expect(page.get_by_role("tab")).to_have_count(2)
    expect(page.locator("#frame-label")).to_have_text("Frame 2 of 2")
    expect(page.locator("#seen-facts")).to_have_attribute(
        "title", Front.load(edge).image(read_image(paths[2]).rgb).sha256
    )


def test_a_picture_that_was_removed_is_not_asked_about(page: Any, edge: Path, ct: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "other.png")
    drop(page, ct)
    answer(page, "Which film?")
    asked = page.locator(".facts").get_attribute("title")
    page.get_by_role("button", name="Ask differently").click()
    expect(page.locator("#hint")).to_contain_text("1 picture(s) go with")
    with page.expect_response(lambda response: response.url.endswith("/read") and "pictures" in
                              (response.request.post_data_json or {})):  # fmt: skip
        page.set_input_files("#file", tmp_path / "other.png")
    expect(page.locator("#hint")).to_contain_text("2 picture(s) go with")
    other = Front.load(edge).image(read_image(tmp_path / "other.png").rgb).sha256
    with page.expect_request("**/api/pictures/forget"):
        page.click("#remove")
    answer(page, "Which other?")
    expect(page.locator(".facts")).to_have_attribute("title", asked)
    page.get_by_role("button", name="Ask differently").click()
    expect(page.locator("#hint")).to_contain_text("1 picture(s) go with")
    page.set_input_files("#file", tmp_path / "other.png")
    expect(page.locator("#hint")).to_contain_text("2 picture(s) go with")
    answer(page, "Which of both?")
    expect(page.locator(".facts")).to_have_attribute("title", f"{asked} {other}")


def taken(page: Any, count: int, *files: Any) -> list[str]:
    """Pick files, and wait until the server took so many of them, the rest on its way: where it has those."""
    page.evaluate(
        """count => {
            window.taken = [];
            const send = window.fetch;
            window.fetch = async (...given) => {
                if (given[0] !== "/api/pictures") return send(...given);
                if (window.taken.length === count) return new Promise(() => {});
                const reply = await send(...given);
                window.taken.push((await reply.clone().json()).name);
                return reply;
            };
        }""",
        count,
    )
    page.set_input_files("#file", files)
    page.wait_for_function("count => window.taken.length === count", arg=count, timeout=90_000)
    return [f"/api/pictures/{name}" for name in page.evaluate("window.taken")]


def until_gone(server: Server, paths: list[str]) -> None:
    """Until the server has none of them any more."""
    for _ in range(100):
        paths = [path for path in paths if server.send("GET", path)[0] != 404]
        if not paths:
            return
        time.sleep(0.1)
    raise AssertionError(f"{len(paths)} are still there")


def looked_at(page: Any, path: Path) -> tuple[str, str]:
    """Drop a picture, which the model reads ahead: where the server has it, and the conversation's /read."""
    named = page.expect_response(lambda response: response.url.endswith("/api/pictures"))
    with named as sent, page.expect_response(lambda response: response.url.endswith("/read") and "pictures" in
                                             (response.request.post_data_json or {})) as read:  # fmt: skip
        drop(page, path)
    return f"/api/pictures/{sent.value.json()['name']}", urlsplit(read.value.url).path


def test_what_was_only_looked_at_can_be_forgotten(page: Any, server: Server, ct: Path) -> None:
    expect(page.locator("#forget")).to_be_disabled()
    file, read = looked_at(page, ct)
    talk = read.removesuffix("/read")
    assert [server.send("GET", path)[0] for path in (file, talk)] == [200, 200]
    page.fill("#question", "Is this Mister Miller?")
    with page.expect_response("**/api/pictures/forget") as forgot:
        page.click("#forget")
    assert forgot.value.request.post_data_json == {"names": [file.rpartition("/")[2]]}
    expect(page.locator("#forget")).to_be_disabled()
    expect(page.locator("#question")).to_have_value("")
    expect(page.locator("#question")).to_be_focused()
    assert [server.send("GET", path)[0] for path in (file, talk)] == [404, 404]


@pytest.mark.parametrize("leave", ["new", "remove", "reload"])
def test_what_is_left_is_gone_from_the_server(page: Any, server: Server, ct: Path, leave: str) -> None:
    file, read = looked_at(page, ct)
    gone = [file]
    if leave == "remove":
        with page.expect_request(f"**{read}") as again:
            page.click("#remove")
        assert again.value.post_data_json == {}, "the model reads on without it"
    else:
        gone.append(read.removesuffix("/read"))
        page.reload() if leave == "reload" else page.click("#new")
    until_gone(server, gone)


@pytest.mark.parametrize("leave", ["new", pytest.param("reload", marks=pytest.mark.slow)])
def test_a_long_series_is_gone_from_the_server_too(page: Any, server: Server, leave: str) -> None:
    header = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    header.Rows = header.Columns = 16
    header.PixelData = header.PixelData[:512]
    files = []
    for z in range(330):
        header.ImagePositionPatient, stream = [0, 0, z], io.BytesIO()
        header.save_as(stream)
        files.append({"name": f"{z}.dcm", "mimeType": "application/dicom", "buffer": stream.getvalue()})
    gone = taken(page, 330, *files)
    expect(page.locator("#frame-label")).to_have_text("Frame 166 of 330")
    page.reload() if leave == "reload" else page.click("#new")
    until_gone(server, gone)


def test_a_picture_that_cannot_be_forgotten_is_told_and_tried_again(page: Any, server: Server, ct: Path) -> None:
    file, _ = looked_at(page, ct)
    refused = {"status": 500, "json": {"error": {"message": "not forgotten"}}}
    page.route("**/api/pictures/forget", lambda route: route.fulfill(**refused))
    page.click("#remove")
    expect(page.locator("#status.wrong")).to_have_text("not forgotten")
    page.unroute("**/api/pictures/forget")
    page.click("#new")
    until_gone(server, [file])


def test_a_reload_forgets_what_nobody_answered_about_yet(page: Any, server: Server) -> None:
    gone = taken(page, 1, str(get_testdata_file("examples_rgb_color.dcm")))
    expect(page.locator("#worded")).to_be_visible()
    assert server.send("GET", gone[0])[0] == 200
    page.reload()
    until_gone(server, gone)


def test_a_reload_forgets_the_half_of_a_series_that_was_sent(page: Any, server: Server, ct: Path) -> None:
    gone = taken(page, 1, ct, str(get_testdata_file("MR_small.dcm")))
    expect(page.locator("#status")).to_contain_text("Reading 2 of 2")
    page.reload()
    until_gone(server, gone)


def test_the_model_sees_frame_is_of_the_last_window_whatever_comes_last(page: Any, edge: Path, ct: Path) -> None:
    held = Held(page, "**/seen?frame=0")
    page.set_input_files("#file", ct)
    held.wait()
    expect(page.locator("#seen")).to_have_attribute("aria-busy", "true")
    page.select_option("#preset", "lung")
    expected = Front.load(edge).image(read_image(ct, (-600, 1500)).rgb).sha256
    expect(page.locator("#seen-facts")).to_have_attribute("title", expected)
    expect(page.locator("#seen")).to_have_attribute("aria-busy", "false")
    with page.expect_response("**/seen?frame=0"):
        held.go()
    page.wait_for_timeout(300)
    assert seen(page) == expected
    page.select_option("#preset", "asStored")
    expect(page.locator("#seen-facts")).to_have_attribute("title", Front.load(edge).image(read_image(ct).rgb).sha256)


def test_text_that_a_header_declares_and_nobody_finds_is_asked_about(page: Any, edge: Path, ct: Path) -> None:
    header = pydicom.dcmread(ct)
    header.BurnedInAnnotation = "YES"
    header.save_as(ct)
    for choice in ("Leave out", "Show as it is"):
        page.set_input_files("#file", ct)
        expect(page.locator("#worded")).to_contain_text("none was found: look for yourself")
        expect(page.locator("#worded img[src^='blob:']")).to_have_count(1)
        expect(page.get_by_role("button", name="Black the text out")).to_be_hidden()
        page.get_by_role("button", name=choice).click()
        if choice == "Leave out":
            expect(page.locator("#hint")).to_contain_text("No picture")
    expect(page.locator("#seen-facts")).to_have_attribute("title", Front.load(edge).image(read_image(ct).rgb).sha256)


def test_text_on_a_later_frame_is_asked_about_before_the_model_sees_it(page: Any, edge: Path, tmp_path: Path) -> None:
    from PIL import ImageDraw, ImageFont

    from ldrt_edge.burned_in import black_out, text_lines

    plain, path = Image.new("L", (300, 200)), tmp_path / "frames.tiff"
    worded = plain.copy()
    ImageDraw.Draw(worded).text((20, 20), "DOE JANE 1950", 255, ImageFont.load_default(20))
    plain.save(path, "TIFF", save_all=True, append_images=[worded, worded])
    read, front = read_image(path, None, 1).rgb, Front.load(edge)
    told: list[Any] = []
    page.on("request", lambda request: told.append((request.url, request.post_data)))
    drop(page, path)
    page.locator("#frame").fill("1")
    expect(page.locator("#worded")).to_contain_text("burned into 1 picture")
    page.get_by_role("button", name="Leave out").click()
    expect(page.locator("#hint")).to_contain_text("No picture")
    expect(page.locator("#seen-facts")).to_have_text("")
    assert not any(("/seen" in url and "frame=1" in url) or '"frame":1' in (data or "") for url, data in told)
    page.locator("#frame").fill("2")
    expect(page.locator("#worded")).to_be_visible()
    page.get_by_role("button", name="Black").click()
    covered = front.image(black_out(read, text_lines(read))).sha256
    expect(page.locator("#seen-facts")).to_have_attribute("title", covered)
    answer(page, "What is written there?")
    expect(page.locator(".facts")).to_have_attribute("title", covered)


def test_text_that_may_be_shown_on_one_frame_is_asked_about_on_the_next(page: Any, edge: Path, tmp_path: Path) -> None:
    from PIL import ImageDraw, ImageFont

    from ldrt_edge.burned_in import black_out, text_lines

    drawn, path = [Image.new("L", (300, 200)) for _ in range(4)], tmp_path / "frames.tiff"
    for place, text in ((0, "LEFT 5 MHZ"), (2, "DOE JANE 1950"), (3, "DOE JANE 1950")):
        ImageDraw.Draw(drawn[place]).text((20, 20), text, 255, ImageFont.load_default(20))
    drawn[0].save(path, "TIFF", save_all=True, append_images=drawn[1:])
    front, read = Front.load(edge), [read_image(path, None, place).rgb for place in range(4)]
    page.set_input_files("#file", path)
    page.get_by_role("button", name="Show as it is").click()
    expect(page.locator("#seen-facts")).to_have_attribute("title", front.image(read[0]).sha256)
    page.locator("#frame").fill("2")
    expect(page.locator("#worded")).to_be_visible()
    page.get_by_role("button", name="Black").click()
    for place in (2, 3):  # black boxes hold for all
        page.locator("#frame").fill(str(place))
        covered = front.image(black_out(read[place], text_lines(read[place]))).sha256
        expect(page.locator("#seen-facts")).to_have_attribute("title", covered)
        expect(page.locator("#worded")).to_be_hidden()


def test_text_that_only_a_chosen_window_shows_is_asked_about_once(page: Any, edge: Path, tmp_path: Path) -> None:
    from PIL import ImageDraw, ImageFont

    letters, path = Image.new("L", (300, 200)), tmp_path / "deep.png"
    ImageDraw.Draw(letters).text((20, 20), "DOE JANE 1950", 255, ImageFont.load_default(20))
    values = np.where(np.asarray(letters) > 127, 1300, 1000).astype(np.uint16)
    values[150:, 200:] = 60_000  # so that over the full range no letter is told from what is around it
    Image.fromarray(values).save(path)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/text?" in request.url else None)

    def window(center: int, width: int) -> None:
        for name, value in (("#center", center), ("#width", width)):
            page.fill(name, str(value))
            page.press(name, "Enter")

    drop(page, path)
    expect(page.locator("#worded")).to_be_hidden()
    window(1150, 400)
    expect(page.locator("#worded")).to_contain_text("burned into 1 picture")
    expect(page.locator("#worded img[src^='blob:']")).to_have_count(1)
    page.get_by_role("button", name="Show as it is").click()
    shown = Front.load(edge).image(read_image(path, (1150, 400)).rgb).sha256
    expect(page.locator("#seen-facts")).to_have_attribute("title", shown)
    looked = len(asked)
    window(1160, 500)  # the same text again
    again = Front.load(edge).image(read_image(path, (1160, 500)).rgb).sha256
    expect(page.locator("#seen-facts")).to_have_attribute("title", again)
    assert len(asked) > looked
    expect(page.locator("#worded")).to_be_hidden()


def test_a_question_asks_about_text_before_it_is_sent(page: Any, tmp_path: Path) -> None:
    from PIL import ImageDraw, ImageFont

    plain, path = Image.new("L", (300, 200)), tmp_path / "frames.tiff"
    worded = plain.copy()
    ImageDraw.Draw(worded).text((20, 20), "DOE JANE 1950", 255, ImageFont.load_default(20))
    plain.save(path, "TIFF", save_all=True, append_images=[worded])
    drop(page, path)
    page.fill("#question", "What is written there?")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.evaluate(
        """() => {
            const frame = document.getElementById("frame");
            frame.value = 1;
            frame.dispatchEvent(new Event("input", { bubbles: true }));
            document.getElementById("composer").requestSubmit();
        }"""
    )
    expect(page.locator("#worded")).to_be_visible()
    page.wait_for_timeout(500)
    assert not any(url.endswith("/ask") for url in asked)
    page.get_by_role("button", name="Leave out").click()
    stop(page)
    expect(page.locator(".question img")).to_have_count(0)


def test_a_question_is_stopped_while_text_is_looked_for(page: Any) -> None:
    drop(page, Path(str(get_testdata_file("rtdose.dcm"))))
    held = Held(page, "**/text?frame=1")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.locator("#frame").fill("1")
    held.wait()
    page.fill("#question", "How much is it?")
    page.press("#question", "Enter")
    page.click("#stop")
    held.go()
    expect(page.locator("#status")).to_have_text("Stopped")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#question")).to_have_value("How much is it?")
    expect(page.locator("#question")).to_be_focused()
    assert not any(url.endswith("/ask") for url in asked)
    answer(page, "How much is it then?")


def test_one_conversation_is_opened_however_many_want_it(page: Any, ct: Path) -> None:
    held = Held(page, "**/api/conversations", "POST")
    drop(page, ct)
    held.wait()
    page.fill("#question", "What is this?")
    page.press("#question", "Enter")
    page.wait_for_timeout(500)
    assert len(held.routes) == 1
    held.go()
    stop(page)


def test_a_question_that_follows_at_once_does_not_show_the_picture_again(page: Any, ct: Path) -> None:
    drop(page, ct)
    held = Held(page, "**/api/conversations")
    answer(page, "What is this?")
    held.wait()  # the list of conversations is the last that is asked for
    answer(page, "And in words?")
    held.go()
    expect(page.locator("article").nth(0).locator(".question img")).to_have_count(1)
    expect(page.locator("article").nth(1).locator(".question img")).to_have_count(0)


def test_of_two_conversations_the_one_that_was_chosen_last_is_shown(page: Any) -> None:
    for question in ("About the left", "About the right"):
        answer(page, question)
        page.click("#new")
    held: list[Any] = []
    page.route("**/api/conversations/*", lambda route: route.continue_() if held else held.append(route))
    page.get_by_role("button", name="About the left").click()
    page.wait_for_timeout(300)
    page.get_by_role("button", name="About the right").click()
    expect(page.locator(".question p")).to_have_text("About the right")
    with page.expect_response(held[0].request.url):
        held[0].continue_()
    page.wait_for_timeout(300)
    expect(page.locator(".question p")).to_have_text("About the right")
    expect(page.locator("#conversations [aria-current]")).to_have_text("About the right")


def test_files_that_are_on_their_way_do_not_land_in_another_conversation(page: Any, server: Server, ct: Path) -> None:
    held = Held(page, "**/api/pictures", "POST")
    page.set_input_files("#file", ct)
    held.wait()
    page.click("#new")
    with page.expect_response("**/api/pictures/forget"):
        held.go()
    expect(page.get_by_role("tab")).to_have_count(0)
    expect(page.locator("#hint")).to_contain_text("No picture")


@pytest.mark.parametrize("status", [404, 409])
def test_a_reading_that_comes_too_late_is_no_error(page: Any, ct: Path, status: int) -> None:
    refused = {"status": status, "json": {"error": {"message": "too late"}}}
    page.route("**/read", lambda route: route.fulfill(**refused))
    with page.expect_response("**/read"):
        drop(page, ct)
    page.wait_for_timeout(300)
    expect(page.locator("#status")).not_to_contain_text("too late")


def test_a_window_in_gray_is_told_in_full(page: Any) -> None:
    drop(page, Path(str(get_testdata_file("rtdose.dcm"))))
    for name, value in (("#center", "0.25"), ("#width", "0.5")):
        page.fill(name, value)
        page.press(name, "Enter")
    expect(page.locator("#reading")).to_contain_text("window 0.25 / 0.5")
    answer(page, "How much?")
    expect(page.locator(".facts")).to_contain_text("window 0.25 / 0.5")


def test_a_screen_reader_hears_the_panel_and_the_questions(page: Any, ct: Path) -> None:
    hears = page.locator("body").aria_snapshot
    assert "Drop or paste pictures here" in hears()
    drop(page, ct)
    assert "CT · 128×128" in hears()
    answer(page, "Which bone?")
    assert 'group "You"' in hears()
    page.evaluate(
        """() => {
            const log = document.getElementById("log");
            window.heard = [];
            new MutationObserver((changes) => {
                for (const { addedNodes } of changes) window.heard.push(...addedNodes);
            }).observe(log, { childList: true });
        }"""
    )
    answer(page, "Which side?")
    expect(page.locator("#question")).to_be_focused()
    assert page.evaluate("heard.every((article) => article.textContent.includes('Which side?'))")
    expect(page.get_by_role("button", name="Another answer")).to_have_count(1)
    page.select_option("#language", "de")
    expect(page.get_by_role("button", name="Andere Antwort")).to_have_count(1)


def test_pictures_of_the_talk_are_not_kept_twice(page: Any, ct: Path) -> None:
    page.evaluate(
        """() => {
            window.open_urls = new Set();
            const [make, drop] = [URL.createObjectURL, URL.revokeObjectURL];
            URL.createObjectURL = (blob) => {
                const url = make.call(URL, blob);
                window.open_urls.add(url);
                return url;
            };
            URL.revokeObjectURL = (url) => (window.open_urls.delete(url), drop.call(URL, url));
        }"""
    )
    drop(page, ct)
    for question in ("One", "Two"):
        answer(page, question)
    expect(page.locator(".question img[src^='blob:']")).to_have_count(1)
    page.wait_for_function("window.open_urls.size === 2")  # the view and what the model sees of it


def test_another_answer_a_branch_a_reload_and_forgetting(page: Any, ct: Path) -> None:
    drop(page, ct)
    answer(page, "First question")
    page.get_by_role("button", name="Another answer").click()
    expect(page.locator("#status")).to_contain_text("Writing")
    page.click("#stop")
    expect(page.locator(".facts")).to_contain_text("seed 1, temperature 0.7")
    page.get_by_role("button", name="Ask differently").click()
    expect(page.locator("#question")).to_have_value("First question")
    expect(page.locator("article")).to_have_count(0)
    answer(page, "Second question")
    expect(page.locator(".question img")).to_have_count(1)
    expect(page.locator("#conversations [aria-current]")).to_have_text("Second question")
    assert "First question" in page.locator("#conversations button").all_inner_texts()
    assert "token" not in page.url
    page.reload()
    expect(page.locator(".question p")).to_have_text("Second question")
    expect(page.locator(".question img[src^='blob:']")).to_have_count(1)
    page.click("#forget")
    expect(page.locator("article")).to_have_count(0)
    expect(page.locator("#conversations")).not_to_contain_text("Second question")


def test_a_branch_is_shown_what_only_the_turns_behind_it_were(page: Any, ct: Path) -> None:
    def asks_with(question: str) -> list[Any]:
        with page.expect_request("**/ask") as asked:
            answer(page, question)
        expect(page.locator("#send")).to_be_visible()
        return [shot["window"] for shot in asked.value.post_data_json["pictures"]]

    def branch(turn: int) -> None:
        page.locator("article").nth(turn).get_by_role("button", name="Ask differently").click()
        expect(page.locator("article")).to_have_count(turn)
        expect(page.locator("#seen")).to_have_attribute("aria-busy", "false")

    assert asks_with("How many beams?") == []
    drop(page, ct)
    assert asks_with("Which side?") == [None]
    expect(page.locator("#hint")).to_contain_text("has these pictures already")
    branch(0)
    expect(page.locator("#hint")).to_contain_text("1 picture(s) go with")
    assert asks_with("How many vertebrae?") == [None]

    assert asks_with("And in words?") == []
    page.select_option("#preset", "lung")
    expect(page.locator("#hint")).to_contain_text("1 picture(s) go with")
    assert asks_with("And the lung?") == [[-600, 1500]]
    branch(1)
    expect(page.locator("#hint")).to_contain_text("1 picture(s) go with")
    page.select_option("#preset", "asStored")
    expect(page.locator("#hint")).to_contain_text("has these pictures already")
    page.select_option("#preset", "lung")
    assert asks_with("And in other words?") == [[-600, 1500]]


def test_a_branch_that_nobody_asked_in_is_not_kept(page: Any, server: Server) -> None:
    for question in ("Which side?", "Which other side?"):
        answer(page, question)
    before = server.json("GET", "/api/conversations")
    page.locator("article").nth(1).get_by_role("button", name="Ask differently").dblclick()
    expect(page.locator("#question")).to_have_value("Which other side?")
    expect(page.locator("article")).to_have_count(1)
    page.click("#new")
    expect(page.locator("article")).to_have_count(0)
    expect(page.locator("#conversations button")).to_have_count(len(before))
    assert server.json("GET", "/api/conversations") == before


def test_an_answer_that_cannot_be_written_down_is_an_answer(
    browser: Any, remembered: Server, ct: Path, tmp_path: Path
) -> None:
    page = browser.new_page(locale="en-GB")
    page.goto(remembered.address)
    expect(page.locator(".facts")).to_have_count(1)
    drop(page, ct)
    shutil.rmtree(tmp_path / "history")
    answer(page, "How many beams?")
    expect(page.locator("#status.wrong")).to_contain_text("history cannot be written")
    expect(page.locator("#question")).to_have_value("")
    expect(page.locator("#hint")).to_contain_text("has these pictures already")
    page.close()


def test_a_refused_question_does_not_take_the_place_of_the_next(page: Any) -> None:
    held = Held(page, "**/ask", "POST")
    page.fill("#question", "what is <image> here?")
    page.press("#question", "Enter")
    held.wait()
    page.fill("#question", "What is here?")
    held.go()
    expect(page.locator("#status.wrong")).to_contain_text("control token")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#question")).to_have_value("What is here?")


def test_a_frame_that_cannot_be_drawn_is_not_shown_as_another(page: Any) -> None:
    drop(page, Path(str(get_testdata_file("rtdose.dcm"))))
    refused = {"status": 400, "json": {"error": {"message": "damaged frame"}}}
    page.route("**/api/pictures/*frame=1", lambda route: route.fulfill(**refused))
    page.locator("#frame").fill("1")
    expect(page.locator("#frame-label")).to_have_text("Frame 2 of 15")
    expect(page.locator("#status.wrong")).to_have_text("damaged frame")
    expect(page.locator("#view[src]")).to_have_count(0)
    page.locator("#frame").fill("2")
    expect(page.locator("#view[src]")).to_have_count(1)


def test_bad_files_and_refused_questions_are_said_and_the_question_stays(page: Any, tmp_path: Path) -> None:
    bad = tmp_path / f"{SECRET}.png"
    bad.write_bytes(b"no picture")
    page.set_input_files("#file", bad)
    expect(page.locator("#status.wrong")).to_contain_text("not a readable picture")
    page.fill("#question", "what is <image> here?")
    page.press("#question", "Enter")
    expect(page.locator("#status.wrong")).to_contain_text("control token")
    expect(page.locator("#question")).to_have_value("what is <image> here?")


def test_a_file_can_be_picked_again_while_the_first_is_read(page: Any, ct: Path) -> None:
    held: list[Any] = []
    page.route("**/api/pictures", lambda route: held.append(route))
    for _ in range(2):
        with page.expect_request("**/api/pictures"):
            page.set_input_files("#file", ct)
        expect(page.locator("#file")).to_have_value("")
    for route in held:
        route.continue_()
    expect(page.get_by_role("tab")).to_have_count(2)


def test_what_is_typed_is_read_when_the_typing_pauses(page: Any, ct: Path, tmp_path: Path) -> None:
    question = "And how large is the largest of them?"
    drop(page, ct)
    answer(page, "What is this?")
    with page.expect_response(lambda response: response.url.endswith("/read")) as read:
        page.fill("#question", question)
    assert read.value.ok and read.value.request.post_data_json == {"question": question}
    answer(page, question)
    with page.expect_download() as download:
        page.click("#export-json")
    download.value.save_as(tmp_path / "talk.json")
    assert json.loads((tmp_path / "talk.json").read_text())["turns"][1]["timings"]["prefill_tokens"] == 1


def test_several_pictures_of_a_paste(page: Any, tmp_path: Path) -> None:
    for seed in (1, 2):
        noise = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{seed}.png")
    drop(page, tmp_path / "1.png", tmp_path / "2.png")
    expect(page.locator("#strip button")).to_have_count(2)
    expect(page.locator("#window-tools")).to_be_hidden()
    expect(page.locator("#hint")).to_contain_text("2 picture(s)")
    answer(page, "Which is brighter?")
    expect(page.locator(".question img")).to_have_count(2)


def test_what_a_model_writes_is_never_html(page: Any) -> None:
    text = (
        "# A *title*\n\n- one **bold** item\n- `code <b>`\n\n3. three\n\n```\n<i>raw</i>\n```\n"
        "<img src=x onerror=alert(1)> [link](http://evil.example) ![x](http://evil.example/x.png) a_b_c 2*3*4"
    )
    html = page.evaluate(
        """async text => {
            const { render } = await import("/markdown.js");
            const box = document.createElement("div");
            box.append(render(text));
            return box.innerHTML;
        }""",
        text,
    )
    for wanted in (
        "<h3>A <em>title</em></h3>", "<ul><li>one <strong>bold</strong> item</li>",
        "<li><code>code &lt;b&gt;</code></li></ul>", '<ol start="3"><li>three</li></ol>', 
        "<pre><code>&lt;i&gt;raw&lt;/i&gt;</code></pre>",
        "&lt;img src=x onerror=alert(1)&gt; [link](http://evil.example)", "a_b_c 2*3*4",
    ):
        assert wanted in html, html
    assert "<img" not in html and "<a" not in html


@pytest.mark.slow
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_control_has_a_name_in_every_language(page: Any, ct: Path, language: str) -> None:
    drop(page, ct)
    page.select_option("#language", language)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, textarea, [role=img], [role=group]")]
            .filter((node) => !(node.ariaLabel || node.labels?.[0]?.textContent.trim() || node.textContent.trim()))
            .map((node) => node.outerHTML)"""
    )
    assert nameless == []
    shown = page.locator("body").inner_text()
    assert "undefined" not in shown and "{0}" not in shown
    assert page.locator("html").get_attribute("lang") == language


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 768, 1024, 1600])
def test_nothing_sticks_out_at_any_width(page: Any, ct: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    drop(page, ct)
    answer(page, "A question of some length, to see whether it wraps where the page is narrow?")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for wanted in ("#question", "#send", ".notice", ".facts"):
        expect(page.locator(wanted)).to_be_in_viewport()


def test_all_of_it_with_the_keyboard(page: Any, ct: Path) -> None:
    page.set_input_files("#file", ct)
    page.locator("#seen-view[src]").wait_for()
    page.locator("body").press("Tab")
    reached = set()
    for _ in range(80):
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    assert {"new", "question", "send", "stage", "file", "preset", "center", "invert", "language", "theme"} <= reached

    page.set_input_files("#file", str(get_testdata_file("MR_small.dcm")))
    tabs = page.get_by_role("tab")
    expect(tabs).to_have_count(2)
    tabs.nth(1).focus()
    for key, place in (("ArrowLeft", 0), ("ArrowLeft", 1), ("ArrowRight", 0), ("Enter", 0)):
        page.keyboard.press(key)
        expect(tabs.nth(place)).to_be_focused()
        expect(tabs.nth(place)).to_have_attribute("aria-selected", "true")
        expect(page.locator("#reading")).to_contain_text(("CT", "MR")[place])
    page.keyboard.press("Shift+Tab")
    expect(page.locator("#strip :focus")).to_have_count(0)
    for left in (1, 0):
        page.locator("#remove").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#remove" if left else "#stage")).to_be_focused()
    for question in ("What lies above?", "What lies below?"):
        page.locator("#new").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#question")).to_be_focused()
        answer(page, question)
        expect(page.locator("#conversations [aria-current]")).to_have_text(question)
    page.locator("#conversations button").nth(1).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#conversations [aria-current]")).to_have_text("What lies above?")
    expect(page.locator("#conversations [aria-current]")).to_be_focused()


def test_escape_in_a_dialog_stops_no_answer(page: Any) -> None:
    stopped: list[str] = []
    page.on("request", lambda request: stopped.append(request.url) if request.url.endswith("/stop") else None)
    held = Held(page, "**/ask", "POST")
    page.fill("#question", "What is this?")
    page.press("#question", "Enter")
    held.wait()
    page.set_input_files("#file", str(get_testdata_file("examples_rgb_color.dcm")))
    expect(page.locator("#worded")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#worded")).to_be_hidden()
    page.wait_for_timeout(300)
    assert not stopped
    held.go()
    stop(page)


def test_without_the_token_the_page_asks_for_it(browser: Any, server: Server) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")
    expect(page.get_by_role("dialog", name="The token from the line")).to_be_visible()
    page.fill("#token", "wrong")
    page.press("#token", "Enter")
    page.fill("#token", server.token)
    page.press("#token", "Enter")
    page.locator("#model-facts").get_by_text("llamacpp").wait_for()
    context.close()


def test_a_print_has_the_answer_its_picture_and_the_notice(page: Any, ct: Path) -> None:
    drop(page, ct)
    answer(page, "What is printed?")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for wanted in (".question img", ".answer", ".facts", ".notice"):
        expect(page.locator(wanted).first).to_be_visible()
    for other in ("#composer", "#viewer", "#list", ".buttons"):
        expect(page.locator(other).first).to_be_hidden()
    assert io.BytesIO(page.pdf()).read(5) == b"%PDF-"
