"""The server over real HTTP: the command in a process of its own, a tiny model, the openai client."""

from __future__ import annotations

import asyncio
import base64
import gc
import hashlib
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from serving import Server, tiny_edge
from starlette.requests import Request

from ldrt_edge import artifact
from ldrt_edge.chat.audit import AuditLog, verify
from ldrt_edge.chat.desk import Conversation, Desk, Model
from ldrt_edge.chat.page import Page
from ldrt_edge.chat.pictures import Shot
from ldrt_edge.chat.session import Session
from ldrt_edge.front import Front, Message
from ldrt_edge.image import read_image_bytes
from ldrt_edge.runtimes.base import FrontImage, Sampling, Token, load

LONG = 3000  # tokens: an answer that goes on until it is stopped


@pytest.fixture(scope="module")
def edge(tiny, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    return tiny_edge(tiny("llava15", "smollm2"), tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    return Path(tmp_path_factory.mktemp("log") / "audit.log")


@pytest.fixture(scope="module")
def server(edge: Path, log: Path) -> Iterator[Server]:
    opened = Server(edge, "--audit", str(log), "--max-tokens", "24")
    yield opened
    assert "Traceback" not in opened.close()


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=server.token, max_retries=0)


@pytest.fixture(scope="module")
def ct() -> bytes:
    return Path(str(get_testdata_file("CT_small.dcm"))).read_bytes()


def new(server: Server) -> str:
    return f"/api/conversations/{server.json('POST', '/api/conversations', {})['name']}"


def film(seed: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


# --- who is let in --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/api/model", "/api/conversations", "/v1/models", "/v1/nothing"])
@pytest.mark.parametrize("given", ["", "Bearer ", "Bearer wrong", "Basic abc"])
def test_without_the_token_there_is_nothing(server: Server, path: str, given: str) -> None:
    status, _, data = server.send("GET", path, authorization=given)
    assert status == 401 and "token" in json.loads(data)["error"]["message"]


@pytest.mark.parametrize("path", ["/", "/app.js", "/api/model", "/v1/models"])
def test_other_hosts_and_other_pages_are_refused(server: Server, path: str) -> None:
    own = f"127.0.0.1:{server.port}"
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1", f"127.0.0.1.evil.example:{server.port}"):
        assert server.send("GET", path, host=host)[0] == 421, "DNS rebinding"
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", f"https://{own}"):
        assert server.send("GET", path, origin=origin)[0] == 403, "another page in the same browser"
    assert server.send("GET", path, origin=f"http://{own}")[0] == 200
    assert server.send("GET", path, host=f"localhost:{server.port}")[0] == 200


def test_a_websocket_is_no_way_in(server: Server) -> None:
    status, _, _ = server.send(
        "GET", "/api/model", connection="Upgrade", upgrade="websocket", authorization="",
        sec_websocket_key="AAAAAAAAAAAAAAAAAAAAAA==", sec_websocket_version="13",
    )
    assert status == 401


def test_the_port_listens_on_loopback_only(server: Server) -> None:
    addresses = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert f"0100007F:{server.port:04X}" in addresses and f"00000000:{server.port:04X}" not in addresses


@pytest.mark.parametrize("path", ["/", "/app.js", "/api/model", "/nothing"])
def test_every_reply_forbids_other_content(server: Server, path: str) -> None:
    _, headers, _ = server.send("GET", path)
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "path", ["/../session.py", "/web/app.js", "/%2e%2e/session.py", "/..%2fsession.py", "//etc/passwd", "/app.js/../x"]
)
def test_no_path_of_a_request_reaches_the_disk(server: Server, path: str) -> None:
    status, _, data = server.send("GET", path)
    assert status == 404 and b"import" not in data


def test_the_pages_files_name_no_other_place(server: Server) -> None:
    scripts = ("app", "api", "facts", "files", "markdown", "slots", "strings", "viewer")
    for path in ("/", *(f"/{name}.js" for name in scripts), "/style.css", "/icon.svg"):
        status, _, data = server.send("GET", path, authorization="")
        text = data.decode().replace("http://www.w3.org/2000/svg", "")
        assert status == 200 and "http" not in text and "innerHTML" not in text and "//cdn" not in text


# --- pictures -------------------------------------------------------------------------------------------------------


def test_a_view_is_the_picture_through_its_window_and_the_model_sees_its_tiles(
    server: Server, edge: Path, ct: bytes
) -> None:
    told = server.json("POST", "/api/pictures", ct)
    assert (told["modality"], told["frames"], told["levels"]) == ("CT", 1, [-896.0, 1167.0])
    status, headers, data = server.send("GET", f"/api/pictures/{told['name']}?window=40,400")
    expected = read_image_bytes(ct, (40, 400))
    assert status == 200 and np.array_equal(np.asarray(Image.open(io.BytesIO(data))), expected.rgb)
    assert json.loads(headers["x-picture"])["window"] == [40, 400]
    _, headers, data = server.send("GET", f"/api/pictures/{told['name']}/seen?window=40,400")
    image = Front.load(edge).image(expected.rgb)
    assert json.loads(headers["x-picture"])["seen_sha256"] == image.sha256
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), image.tiles[0]), "the exact pixels"


def test_frames_of_a_dose_grid(server: Server) -> None:
    dose = Path(str(get_testdata_file("rtdose.dcm"))).read_bytes()
    told = server.json("POST", "/api/pictures", dose)
    assert told["modality"] == "RTDOSE" and told["frames"] == 15
    views = {server.send("GET", f"/api/pictures/{told['name']}?frame={frame}")[2] for frame in (0, 7)}
    assert len(views) == 2
    status, _, data = server.send("GET", f"/api/pictures/{told['name']}?frame=15")
    assert status == 400 and b"frame 15" in data


def test_bad_uploads_are_one_line_each(server: Server, ct: bytes) -> None:
    for data in (b"", b"nothing", b"<html><script>", ct[:2000], film()[:200], b"%PDF-1.4"):
        status, _, reply = server.send("POST", "/api/pictures", data)
        message = json.loads(reply)["error"]["message"]
        assert status == 400 and "\n" not in message and "CompressedSamples" not in message


def test_an_upload_beyond_the_limit_is_refused_early(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
        raw.sendall(
            f"POST /api/pictures HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAuthorization: Bearer {server.token}\r\n"
            f"Content-Length: {1 << 40}\r\n\r\n".encode()
        )
        assert b" 413 " in raw.recv(100)


def test_oldest_pictures_go_when_memory_runs_short(ct: bytes) -> None:
    from ldrt_edge.chat.pictures import Pictures
    from ldrt_edge.errors import DataError

    kept = Pictures(most_bytes=int(2.5 * len(ct)))
    names = [str(kept.add(ct)["name"]) for _ in range(3)]
    with pytest.raises(DataError, match="not there any more"):
        kept.view(Shot(names[0], None, 0))
    assert kept.view(Shot(names[2], None, 0)).rgb.shape == (128, 128, 3)


def test_slices_of_a_series_know_their_place() -> None:
    import pydicom

    from ldrt_edge.dicom import slice_position

    for z in (-12.5, 40.0):
        header = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
        header.ImagePositionPatient, header.ImageOrientationPatient = [1, 2, z], [1, 0, 0, 0, 1, 0]
        stream = io.BytesIO()
        header.save_as(stream)
        assert slice_position(stream.getvalue()) == z


def test_slices_of_one_stack_share_a_word_that_names_nobody(server: Server) -> None:
    import pydicom

    identifiers = ["1.2.3.4", "1.2.3.5"]

    def word(series: str, frame: str, directions: list[float]) -> str:
        header = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
        header.SeriesInstanceUID, header.FrameOfReferenceUID, header.ImageOrientationPatient = series, frame, directions
        stream = io.BytesIO()
        header.save_as(stream)
        _, _, told = server.send("POST", "/api/pictures", stream.getvalue())
        assert not any(identifier in told.decode() for identifier in identifiers)
        return str(json.loads(told)["series"])

    across, along, first, second = [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], *identifiers
    assert word(first, first, across) == word(first, first, [1, 0, 0, 0, 0.99999, 0.00001]), "as scanners round"
    words = {word(*asked) for asked in (
        (first, first, across), (second, first, across), (first, second, across), (first, first, along),
    )}  # fmt: skip
    assert len(words) == 4
    assert server.json("POST", "/api/pictures", film())["series"] is None


def test_forgotten_pictures_are_gone_with_all_that_was_drawn_of_them(server: Server, ct: bytes) -> None:
    from ldrt_edge.chat.pictures import Pictures
    from ldrt_edge.errors import NotThere

    names = [str(server.json("POST", "/api/pictures", ct)["name"]) for _ in range(3)]
    assert server.send("GET", f"/api/pictures/{names[0]}")[0] == 200
    for _ in range(2):
        assert server.json("POST", "/api/pictures/forget", {"names": [names[0], "never known", names[1]]}) == {}
    assert [server.send("GET", f"/api/pictures/{name}")[0] for name in names] == [404, 404, 200]
    kept = Pictures()
    gone, stays = (str(kept.add(ct)["name"]) for _ in range(2))
    views = [Shot(gone, (40, 400), 0), Shot(stays, (40, 400), 0)]
    for shot in views:
        kept.view(shot)
    kept.forget([gone])
    assert list(kept._views) == views[1:] and list(kept._files) == [stays]
    with pytest.raises(NotThere):
        kept.view(views[0])


def test_a_series_of_a_thousand_slices_is_forgotten_at_once_and_what_are_no_names_is_refused(
    server: Server, ct: bytes
) -> None:
    name = server.json("POST", "/api/pictures", ct)["name"]
    for body in (
        {}, {"names": name}, {"names": [3]}, {"names": [name, None]}, {"names": [name, "\ud800"]},
        {"names": [name, "x" * 101]}, {"names": [name, *[""] * 100_000]},
    ):  # fmt: skip
        assert server.send("POST", "/api/pictures/forget", body)[0] == 400, str(body)[:80]
    assert server.send("GET", f"/api/pictures/{name}")[0] == 200, "nothing was forgotten by half"
    many = [f"{number:016}" for number in range(999)]
    server.json("POST", "/api/pictures/forget", {"names": [*many, name]})
    assert server.send("GET", f"/api/pictures/{name}")[0] == 404
    assert server.send("DELETE", f"/api/pictures/{name}")[0] == 405, "there is one way"
    status, headers, _ = server.send("PUT", "/api/pictures/forget")
    assert status == 405 and headers["allow"] == "POST"


def test_text_is_looked_for_in_every_frame(server: Server, ct: bytes) -> None:
    import pydicom
    from PIL import ImageDraw, ImageFont

    plain = Image.new("L", (300, 200))
    worded = plain.copy()
    ImageDraw.Draw(worded).text((20, 20), "DOE JANE 1950", 255, ImageFont.load_default(20))
    stream = io.BytesIO()
    plain.save(stream, "TIFF", save_all=True, append_images=[worded])
    told = server.json("POST", "/api/pictures", stream.getvalue())
    assert (told["burned_in"], told["text_lines"]) == (False, 0)
    found = [server.json("GET", f"/api/pictures/{told['name']}/text?frame={frame}") for frame in (0, 1)]
    assert [one["burned_in"] for one in found] == [False, True] and found[1]["text_lines"] > 0
    assert server.send("GET", f"/api/pictures/{told['name']}/text?frame=2")[0] == 400
    header = pydicom.dcmread(io.BytesIO(ct))
    header.BurnedInAnnotation = "YES"
    stream = io.BytesIO()
    header.save_as(stream)
    told = server.json("POST", "/api/pictures", stream.getvalue())
    assert (told["burned_in"], told["text_lines"]) == (True, 0), "it says so, and none was found"


# --- conversations --------------------------------------------------------------------------------------------------


def test_the_answer_is_the_sessions_and_what_it_rests_on_is_told(server: Server, edge: Path, ct: bytes) -> None:
    name = server.json("POST", "/api/pictures", ct)["name"]
    talk = new(server)
    body = {"question": "How many beams?", "pictures": [{"name": name, "frame": 0, "window": [40, 400]}]}
    events = server.events(f"{talk}/ask", body)
    assert [event["stage"] for event in events if "stage" in event] == ["encoding", "reading"]
    assert events[-1] == {"done": True}
    text = "".join(event.get("text", "") for event in events)

    runtime = load(edge, threads=1)
    session = Session(runtime, Front.load(edge), Sampling(max_tokens=24))
    session.attach(read_image_bytes(ct, (40, 400)))
    assert text == "".join(session.ask("How many beams?"))
    runtime.close()

    (turn,) = server.json("GET", talk)["turns"]
    assert turn["answer"] == text and turn["sampling"]["seed"] == 0 and turn["timings"]["ttft_ms"] > 0
    (image,) = turn["images"]
    assert image["window"] == [40, 400] and image["seen_sha256"] == session.exchanges[0].shown[0].image.sha256
    status, _, seen = server.send("GET", f"{talk}/seen/0/0")
    tile = session.exchanges[0].shown[0].image.tiles[0]
    assert status == 200 and np.array_equal(np.asarray(Image.open(io.BytesIO(seen))), tile)
    assert {"name": talk.rpartition("/")[2], "title": "How many beams?"} in server.json("GET", "/api/conversations")


def test_a_dicom_report_names_pixels_by_hash_and_no_patient(server: Server, ct: bytes, tmp_path: Path) -> None:
    import highdicom
    import pydicom

    picture = server.json("POST", "/api/pictures", ct)["name"]
    talk = new(server)
    assert server.send("GET", f"{talk}/report")[0] == 409, "nothing was asked yet"
    shown = [{"name": picture, "window": [40, 400]}]
    server.events(f"{talk}/ask", {"question": "Wie viele Felder? 几个射野？", "pictures": shown})
    server.events(f"{talk}/ask", {"question": "And now?"})
    told = server.json("GET", talk)["turns"]
    status, headers, content = server.send("GET", f"{talk}/report")
    assert status == 200 and headers["content-type"] == "application/dicom"

    (tmp_path / "report.dcm").write_bytes(content)
    report = highdicom.sr.srread(tmp_path / "report.dcm")
    assert isinstance(report, highdicom.sr.EnhancedSR) and report.ContentQualification == "RESEARCH"
    assert "not for diagnosis" in report.SeriesDescription and "not for diagnosis" in _text(report, "notice")[0]
    assert report.VerificationFlag == "UNVERIFIED" and report.PreliminaryFlag == "PRELIMINARY"
    first, second = (item for item in report.ContentSequence if _value(item) == "exchange")
    for turn, item in zip(told, (first, second), strict=True):
        assert _text(item, "question") == [turn["question"]]
        assert _text(item, "answer")[0].split() == _printable(turn["answer"]).split()
        (measured,) = (one for one in item.ContentSequence if _value(one) == "122157")
        assert float(measured.MeasuredValueSequence[0].NumericValue) == pytest.approx(turn["probability"], rel=1e-5)
    (seen,) = (item for item in first.ContentSequence if _value(item) == "picture")
    (image,) = told[0]["images"]
    assert (_text(seen, "seen-sha256"), _text(seen, "file-sha256")) == ([image["seen_sha256"]], [image["sha256"]])
    assert _text(seen, "seen-as") == ["CT, 128×128, window 40 / 400"]

    assert report.PatientIdentityRemoved == "YES" and "CurrentRequestedProcedureEvidenceSequence" not in report
    scan = pydicom.dcmread(io.BytesIO(ct))
    for keyword in ("PatientName", "PatientID", "InstitutionName", "StudyInstanceUID", "SOPInstanceUID", "StudyDate"):
        assert scan[keyword].value and str(scan[keyword].value).encode() not in content, keyword


def _value(item: Any) -> str:
    return str(item.ConceptNameCodeSequence[0].CodeValue)


def _text(item: Any, value: str) -> list[str]:
    return [str(one.TextValue) for one in item.ContentSequence if _value(one) == value]


def _printable(text: str) -> str:
    return "".join(character for character in text if character >= " " or character in "\t\n")


def test_several_pictures_and_a_follow_up_that_starts_at_once(server: Server, ct: bytes) -> None:
    names = [server.json("POST", "/api/pictures", data)["name"] for data in (ct, film())]
    talk = new(server)
    server.events(f"{talk}/ask", {"question": "What is the same?", "pictures": [{"name": name} for name in names]})
    server.events(f"{talk}/ask", {"question": "And what differs?", "pictures": []})
    first, second = server.json("GET", talk)["turns"]
    assert len(first["images"]) == 2 and second["images"] == []
    assert second["timings"]["reused_tokens"] > 32, "both pictures were in the cache"


def test_pictures_are_read_while_the_question_is_typed(server: Server) -> None:
    name = server.json("POST", "/api/pictures", film())["name"]
    talk, pictures = new(server), [{"name": name}]
    for shown in ([{"name": "gone"}], pictures, pictures):
        server.json("POST", f"{talk}/read", {"pictures": shown})
    assert server.json("GET", talk)["turns"] == []
    server.events(f"{talk}/ask", {"question": "How many?", "pictures": pictures})
    (turn,) = server.json("GET", talk)["turns"]
    assert turn["timings"]["reused_tokens"] > 16 and turn["timings"]["prefill_tokens"] < 20 and len(turn["images"]) == 1


def test_a_picture_that_is_only_read_ahead_is_not_asked_about(server: Server, ct: bytes) -> None:
    names = [server.json("POST", "/api/pictures", data)["name"] for data in (ct, film())]
    talk = new(server)
    server.events(f"{talk}/ask", {"question": "How many?", "pictures": [{"name": names[0]}], "max_tokens": 4})
    (asked,) = server.json("GET", talk)["turns"]
    branches = []
    for question, pictures in (("And now?", None), ("And both?", [{"name": names[1]}])):
        branch = f"/api/conversations/{server.json('POST', f'{talk}/branch', {'exchange': 0})['name']}"
        server.json("POST", f"{branch}/read", {"pictures": [{"name": names[1]}], "question": "And"})
        assert server.json("GET", branch)["waiting"] == 1
        server.events(f"{branch}/ask", {"question": question, "pictures": pictures, "max_tokens": 4})
        told = server.json("GET", branch)
        branches.append(told["turns"][0]["images"])
        assert told["waiting"] == 0
    assert branches[0] == asked["images"]
    assert branches[1][0] == asked["images"][0] and len(branches[1]) == 2, "those that waited, and the new one"


def test_a_question_is_read_as_far_as_it_is_typed(server: Server) -> None:
    name = server.json("POST", "/api/pictures", film())["name"]
    talk, asked = new(server), "of the beams that are drawn here meet each other in front of the joint?"
    server.events(f"{talk}/ask", {"question": "How many?", "pictures": [{"name": name}], "max_tokens": 4})
    prefilled = []
    for number, typed in enumerate(("", "<image> is never typed", asked[:40], f"{asked} ")):
        question = f"{number} {asked}"
        if typed:
            server.json("POST", f"{talk}/read", {"question": f"{number} {typed}"})
            server.events(f"{talk}/ask", {"question": ""})  # waits for its turn: then it was read
        server.events(f"{talk}/ask", {"question": question, "pictures": [], "max_tokens": 4})
        turn = server.json("GET", talk)["turns"][-1]
        prefilled.append(turn["timings"]["prefill_tokens"])
        talk = f"/api/conversations/{server.json('POST', f'{talk}/branch', {'exchange': 1})['name']}"
    _, unread, begun, whole = prefilled  # the first reads the answer before it too
    assert unread > begun + 5 and begun > whole == 1
    assert server.send("POST", f"{talk}/read", {"question": 3})[0] == 400


def test_another_answer_takes_the_place_of_the_last_and_a_branch_leaves_it(server: Server, ct: bytes) -> None:
    name = server.json("POST", "/api/pictures", ct)["name"]
    talk = new(server)
    server.events(f"{talk}/ask", {"question": "How many?", "pictures": [{"name": name}]})
    (before,) = server.json("GET", talk)["turns"]
    assert server.events(f"{talk}/again", {})[-1] == {"done": True}
    (after,) = server.json("GET", talk)["turns"]
    assert after["question"] == "How many?" and after["images"] == before["images"]
    assert after["answer"] != before["answer"]
    assert (after["sampling"]["seed"], after["sampling"]["temperature"]) == (1, 0.7)

    branch = f"/api/conversations/{server.json('POST', f'{talk}/branch', {'exchange': 0})['name']}"
    server.events(f"{branch}/ask", {"question": "How large?"})
    (other,) = server.json("GET", branch)["turns"]
    assert other["question"] == "How large?" and other["images"] == before["images"], "the picture waited there"
    assert server.json("GET", talk)["turns"] == [after]
    assert server.send("POST", f"{talk}/branch", {"exchange": 7})[0] == 409


@pytest.mark.parametrize("place", [f"{'9' * 4400}/0", "0/-1", "-1/0", "x/0", "0/"])
def test_a_seen_pictures_place_that_is_none_is_refused(server: Server, place: str) -> None:
    name, talk = server.json("POST", "/api/pictures", film())["name"], new(server)
    server.events(f"{talk}/ask", {"question": "How many?", "pictures": [{"name": name}], "max_tokens": 2})
    assert server.send("GET", f"{talk}/seen/{place}")[0] == (404 if place == "0/" else 400)
    assert server.send("GET", f"{talk}/seen/0/1")[0] == server.send("GET", f"{talk}/seen/1/0")[0] == 404


def test_what_reading_a_picture_took_after_the_question_came_is_the_answers(server: Server, edge: Path) -> None:
    unread, read = (server.json("POST", "/api/pictures", data)["name"] for data in (film(11), film(12)))
    front, tokens = Front.load(edge), []
    for name, ahead in ((unread, False), (read, True)):
        talk, pictures = new(server), [{"name": name}]
        if ahead:
            server.json("POST", f"{talk}/read", {"pictures": pictures})
            server.events(f"{talk}/ask", {"question": "", "pictures": pictures})  # its turn comes when they are read
        server.events(f"{talk}/ask", {"question": "How many beams?", "pictures": pictures, "max_tokens": 2})
        tokens.append(server.json("GET", talk)["turns"][0]["timings"])
    picture = front.image(read_image_bytes(film(11)).rgb).token_count
    behind, before = tokens
    assert behind["prefill_tokens"] > picture > behind["reused_tokens"]
    assert before["prefill_tokens"] < behind["prefill_tokens"] and before["reused_tokens"] > picture


def test_more_pictures_than_the_model_holds_are_refused_before_all_are_decoded(server: Server) -> None:
    name, talk = server.json("POST", "/api/pictures", film())["name"], new(server)
    many = [*[{"name": name}] * 400, {"name": "gone"}]
    (*_, last) = server.events(f"{talk}/ask", {"question": "How many?", "pictures": many})
    assert "show fewer" in last["error"] and server.json("GET", talk)["turns"] == []


def test_refused_questions_change_nothing(server: Server) -> None:
    talk = new(server)
    for question in ("", "what is <image> here?", "very " * 6000):
        assert "error" in server.events(f"{talk}/ask", {"question": question})[-1]
    for body in (
        {}, {"question": 3}, {"question": "\ud800"}, {"question": "?", "pictures": 3}, {"question": "?", "seed": -1},
        {"question": "?", "pictures": [{"name": "x", "window": [1]}]}, {"question": "?", "temperature": "warm"},
        {"question": "?", "max_tokens": 0}, {"question": "?", "max_tokens": 1e999},
    ):
        assert server.send("POST", f"{talk}/ask", body)[0] == 400, body
    assert "error" in server.events(f"{talk}/ask", {"question": "?", "pictures": [{"name": "gone"}]})[-1]
    assert server.send("POST", f"{talk}/ask", b"[" * 100_000)[0] == 400
    assert server.send("POST", f"{talk}/ask", b" " * (5 << 20))[0] == 413
    assert server.json("GET", talk)["turns"] == []


def test_forgotten_is_forgotten(server: Server) -> None:
    talk = new(server)
    server.events(f"{talk}/ask", {"question": "How many?"})
    server.json("DELETE", talk)
    assert server.send("GET", talk)[0] == 404


class Held:
    """A request whose body comes later than its head."""

    def __init__(self, server: Server, path: str, body: dict[str, Any]) -> None:
        self._body = json.dumps(body).encode()
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        self._socket.sendall(
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAuthorization: Bearer {server.token}\r\n"
            f"Connection: close\r\nContent-Length: {len(self._body)}\r\n\r\n".encode()
        )

    def go(self) -> None:
        self._socket.sendall(self._body)

    def status(self) -> int:
        with self._socket.makefile("rb") as reply:
            return int(reply.readline().split()[1])

    def leave(self) -> None:
        self._socket.close()


def test_nothing_is_read_for_a_conversation_that_was_forgotten_meanwhile(server: Server) -> None:
    for path, body in (("read", {"question": "Mister Miller"}), ("ask", {"question": "Mister Miller"}), ("again", {})):
        talk = new(server)
        server.events(f"{talk}/ask", {"question": "Hello", "max_tokens": 2})
        held = Held(server, f"{talk}/{path}", body)
        time.sleep(0.3)  # its head is with the server
        server.json("DELETE", talk)
        held.go()
        assert held.status() == 404, path
        held.leave()


def test_of_two_questions_at_once_one_is_refused(server: Server) -> None:
    talk = new(server)
    held = [Held(server, f"{talk}/ask", {"question": question, "max_tokens": LONG}) for question in ("One", "Two")]
    time.sleep(0.3)
    for one in held:
        one.go()
    assert sorted(one.status() for one in held) == [200, 409]
    for one in held:
        one.leave()
    server.events(f"{new(server)}/ask", {"question": ""})  # waits until the other has ended


# --- stop, disconnect, queue ----------------------------------------------------------------------------------------


class Asking(threading.Thread):
    """A client that reads an answer as it comes."""

    def __init__(self, server: Server, talk: str, tokens: int = LONG) -> None:
        super().__init__(daemon=True)
        self._connection = server.connect()
        body = json.dumps({"question": "Go on", "max_tokens": tokens})
        self._connection.request("POST", f"{talk}/ask", body, {"authorization": f"Bearer {server.token}"})
        self.begun, self.events = threading.Event(), []  # type: ignore[var-annotated]
        self.reply = self._connection.getresponse()
        self.start()

    def run(self) -> None:
        for line in self.reply:
            self.events.append(json.loads(line))
            if "text" in self.events[-1]:
                self.begun.set()

    def leave(self) -> None:
        """Hang up."""
        sock = self._connection.sock or self.reply.fp.raw._sock  # type: ignore[union-attr]
        sock.shutdown(socket.SHUT_RDWR)


def test_stop_keeps_what_was_said(server: Server) -> None:
    talk = new(server)
    asking = Asking(server, talk)
    assert asking.begun.wait(30)
    assert server.send("POST", f"{talk}/ask", {"question": "meanwhile"})[0] == 409, "one answer at a time"
    server.json("POST", f"{talk}/stop", {})
    asking.join(30)
    said = "".join(event.get("text", "") for event in asking.events)
    (turn,) = server.json("GET", talk)["turns"]
    assert asking.events[-1] == {"done": True} and turn["finish"] == "stopped"
    assert said and turn["answer"].startswith(said.strip()) and turn["tokens"] < LONG


def test_a_client_that_leaves_frees_the_model(server: Server) -> None:
    talk = new(server)
    asking = Asking(server, talk)
    assert asking.begun.wait(30)
    asking.leave()
    server.events(f"{new(server)}/ask", {"question": "Next", "max_tokens": 2})
    (turn,) = server.json("GET", talk)["turns"]
    assert turn["finish"] == "stopped" and turn["tokens"] < LONG


class Program(threading.Thread):
    """A program at OpenAI's API that reads a stream as it comes; its place is taken when this is made, or refused."""

    def __init__(self, server: Server, user: str = "", tokens: int = 2) -> None:
        super().__init__(daemon=True)
        self._connection = server.connect()
        asked = {"model": "gguf", "messages": [{"role": "user", "content": f"I am {user}"}], "max_tokens": tokens}
        self.begun, self.chunks = threading.Event(), list[str]()
        body = json.dumps(asked | {"stream": True, "user": user})
        self._connection.request("POST", "/v1/chat/completions", body, {"authorization": f"Bearer {server.token}"})
        self.reply = self._connection.getresponse()
        if self.reply.status == 200:
            self.reply.readline()  # the role, which comes before the answer
            self.start()

    def run(self) -> None:
        with suppress(ConnectionError):  # after it left
            for line in self.reply:
                if line.strip():
                    self.chunks.append(line.decode())
                    self.begun.set()

    def leave(self) -> None:
        """Hang up."""
        self.reply.fp.raw._sock.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]


def test_one_that_asks_much_neither_starves_others_nor_waits_without_end(server: Server, log: Path) -> None:
    before = verify(log).lines
    first = Program(server, "much", LONG)
    assert first.begun.wait(30)
    waiting = [Program(server, "much") for _ in range(8)]
    refused = Program(server, "much").reply
    assert refused.status == 429 and int(refused.headers["retry-after"]) > 0
    assert json.loads(refused.read())["error"]["type"] == "rate_limit_error"
    others = [Program(server, user) for user in ("other", "third", "other")]
    person = Asking(server, new(server), tokens=2)
    first.leave()
    for one in (*waiting, *others, person):
        one.join(60)
    assert person.events[-1] == {"done": True}
    names = {hashlib.sha256(f"I am {user}".encode()).hexdigest(): user for user in ("much", "other", "third")}
    lines = [json.loads(line)["question"] for line in log.read_text().splitlines()[before:]]
    order = [names.get(line, "person") for line in lines]
    assert order == ["much", "other", "third", "person", "much", "other", *["much"] * 7]


def test_a_waiting_client_that_leaves_frees_its_place_at_once(server: Server) -> None:
    first = Program(server, tokens=LONG)
    assert first.begun.wait(30)
    waiting = [Program(server) for _ in range(8)]
    waiting[3].leave()
    deadline = time.monotonic() + 20
    while (late := Program(server)).reply.status == 429 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert late.reply.status == 200 and not late.begun.is_set() and first.is_alive()
    first.leave()
    for one in (*waiting, late):
        one.join(60)
    assert all("[DONE]" in one.chunks[-1] for one in (*waiting[:3], *waiting[4:], late))


def test_a_program_that_leaves_before_its_whole_answer_frees_the_model(server: Server, edge: Path, log: Path) -> None:
    runtime, front, before = load(edge, threads=1), Front.load(edge), verify(log).lines
    tokens = runtime.generate(front.prompt([Message("user", "Go on")]), Sampling(max_tokens=LONG))
    whole = front.decode([token.id for token in tokens]).strip()
    runtime.close()
    asked = {"model": "gguf", "messages": [{"role": "user", "content": "Go on"}], "max_tokens": LONG}
    connection = server.connect()
    connection.request("POST", "/v1/chat/completions", json.dumps(asked), {"authorization": f"Bearer {server.token}"})
    time.sleep(0.5)
    connection.close()
    server.events(f"{new(server)}/ask", {"question": "Next", "max_tokens": 2})
    *first, following = [json.loads(line) for line in log.read_text().splitlines()[before:]]
    assert following["question"] == hashlib.sha256(b"Next").hexdigest() and len(first) <= 1
    assert all(line["answer"] != hashlib.sha256(whole.encode()).hexdigest() for line in first), "it was not written out"


def test_there_is_an_end_to_what_waits_of_all(server: Server) -> None:
    first = Program(server, tokens=LONG)
    assert first.begun.wait(30)
    talks = [new(server) for _ in range(33)]
    waiting = [Asking(server, talk) for talk in talks[:32]]
    assert server.send("POST", f"{talks[32]}/ask", {"question": "One more"})[0] == 429
    for talk in talks[:32]:
        server.json("POST", f"{talk}/stop", {})
    for one in waiting:
        one.join(30)
        assert one.events == [{"done": False}], "it had not begun, and need not wait to be told so"
    assert first.is_alive()
    first.leave()
    assert server.events(f"{talks[32]}/ask", {"question": "Now", "max_tokens": 2})[-1]["done"]


def test_conversations_may_be_forgotten_while_they_are_listed(edge: Path) -> None:
    """Another thread gets its turn wherever Python makes objects; here the garbage collector is that thread."""
    with closing(load(edge, threads=1)) as runtime:
        desk = Desk(runtime, Front.load(edge), Model.of(edge), Sampling(max_tokens=2))
        session = desk.conversations[desk.open()].session
        names = [str(number) for number in range(5000)]  # more than the tuples that Python has at hand
        desk.conversations |= {name: Conversation(name, session) for name in names}

        def forget(phase: str, info: dict[str, int]) -> None:
            if phase == "stop" and len(names) > 1000:
                desk.conversations.pop(names.pop())

        threshold = gc.get_threshold()
        gc.callbacks.append(forget)
        gc.set_threshold(1)
        try:
            listed = [conversation.name for conversation in desk.opened()]
        finally:
            gc.callbacks.remove(forget)
            gc.set_threshold(*threshold)
        assert set(names) <= set(listed)


def test_what_is_read_ahead_gives_way_to_a_question_elsewhere(edge: Path) -> None:
    runtime = load(edge, threads=1)

    async def answered() -> list[str]:
        desk = Desk(runtime, Front.load(edge), Model.of(edge), Sampling(max_tokens=2))
        reading, asking = (desk.conversations[desk.open()] for _ in range(2))

        def read_without_end() -> Generator[None, None, None]:
            while desk._reading is None or not desk._reading.stopped:
                reading.session.read()
            yield

        desk.read_ahead(reading, read_without_end)
        turn = desk.take(asking.name, lambda: asking.session.ask("And here?"))
        said = [piece async for piece in turn.events()]
        desk.turns.close()
        return said

    said = asyncio.run(asyncio.wait_for(answered(), 60))
    runtime.close()
    assert "".join(said)


def test_a_question_about_another_window_does_not_wait_for_the_last_ones_reading(edge: Path) -> None:
    runtime = load(edge, threads=1)
    one, other = (Shot("film", window, 0) for window in ((40.0, 400.0), (-600.0, 1500.0)))

    async def answered() -> None:
        desk = Desk(runtime, Front.load(edge), Model.of(edge), Sampling(max_tokens=2))
        talk = desk.conversations[desk.open()]

        def read_until_stopped() -> Generator[None, None, None]:
            while desk._reading is None or not desk._reading.stopped:
                talk.session.read()
            yield

        for pictures, stays in (((one,), True), ((one, other), True), ((other,), False), ((), False)):
            desk.read_ahead(talk, read_until_stopped, (one,))
            reading = desk._reading
            turn = desk.take(talk.name, lambda: talk.session.ask("And here?"), pictures)
            assert reading is not None and reading.stopped is not stays, pictures
            reading.stop()
            assert [piece async for piece in turn.events()]
        desk.turns.close()

    asyncio.run(asyncio.wait_for(answered(), 60))
    runtime.close()


def test_forgetting_stops_what_is_read_ahead_and_what_has_yet_to_be(edge: Path) -> None:
    runtime = load(edge, threads=1)

    async def forgotten() -> list[str]:
        desk = Desk(runtime, Front.load(edge), Model.of(edge), Sampling(max_tokens=2))
        talk, read, free = desk.conversations[desk.open()], [], threading.Event()
        desk.turns.tidy(lambda: cast(None, free.wait(30)))

        def noted(when: str) -> Generator[None, None, None]:
            read.append(when)
            yield

        desk.read_ahead(talk, lambda: noted("ahead"))
        reading = desk._reading
        desk.forget(talk)
        desk.read_ahead(talk, lambda: noted("late"))
        assert reading is not None and reading.stopped
        free.set()
        desk.turns._thread.submit(lambda: None).result(30)
        desk.turns.close()
        return read

    assert asyncio.run(asyncio.wait_for(forgotten(), 60)) == []
    runtime.close()


def asked_for(talk: Conversation, **body: Any) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode()}

    return Request({"type": "http", "path_params": {"name": talk.name}}, receive)


async def told(reply: Any) -> list[dict[str, Any]]:
    return [json.loads(line) async for line in reply.body_iterator]


def test_what_was_typed_is_forgotten_though_another_answer_was_asked_for_while_it_was_read(edge: Path) -> None:
    runtime = load(edge, threads=1)
    runtime.remember(1 << 30)

    async def left() -> list[Any]:
        desk = Desk(runtime, Front.load(edge), Model.of(edge), Sampling(max_tokens=3))
        page, talk, free = Page(desk), desk.conversations[desk.open()], threading.Event()
        await told(await page.ask(asked_for(talk, question="Hello")))
        desk.turns.tidy(lambda: cast(None, free.wait(30)))
        await page.read(asked_for(talk, question="Mister Miller of Hamburg has pain in the left knee"))
        again = await page.again(asked_for(talk))
        free.set()
        assert (await told(again))[-1] == {"done": True}
        desk.forget(talk)
        desk.turns.close()
        return [*cast(Any, runtime)._prefix.keys, *cast(Any, runtime)._left]

    assert asyncio.run(asyncio.wait_for(left(), 60)) == []
    runtime.close()


class Preparing(Front):
    """Takes its time over a picture."""

    def __init__(self, front: Front) -> None:
        super().__init__(front.config, front.tokenizer, front._tokenizer_path)
        self.begun, self.go_on = threading.Event(), threading.Event()

    def image(self, rgb: np.ndarray) -> FrontImage:
        self.begun.set()
        self.go_on.wait(30)
        return super().image(rgb)


def test_the_time_to_the_first_word_has_that_in_which_the_picture_was_prepared(edge: Path) -> None:
    runtime = load(edge, threads=1)

    async def answered() -> tuple[float, float]:
        front = Preparing(Front.load(edge))
        desk = Desk(runtime, front, Model.of(edge), Sampling(max_tokens=3))
        talk, about = desk.conversations[desk.open()], [{"name": desk.pictures.add(film())["name"]}]
        reply = await Page(desk).ask(asked_for(talk, question="How many?", pictures=about))
        await asyncio.to_thread(front.begun.wait, 30)
        began = time.perf_counter()
        await asyncio.sleep(0.1)
        held_ms = (time.perf_counter() - began) * 1e3
        front.go_on.set()
        await told(reply)
        desk.turns.close()
        return held_ms, talk.session.exchanges[0].timings.ttft_ms

    held_ms, ttft_ms = asyncio.run(asyncio.wait_for(answered(), 60))
    assert ttft_ms > held_ms
    runtime.close()


@pytest.mark.parametrize("asking", [True, False])
def test_a_stop_while_a_picture_is_prepared_keeps_the_model_from_it(edge: Path, asking: bool) -> None:
    """By a person who asked about it, or by another's question while it is read ahead."""
    runtime = load(edge, threads=1)

    async def encoded() -> list[Any]:
        front = Preparing(Front.load(edge))
        desk = Desk(runtime, front, Model.of(edge), Sampling(max_tokens=3))
        page, (talk, other) = Page(desk), (desk.conversations[desk.open()] for _ in range(2))
        about = [{"name": desk.pictures.add(film())["name"]}]
        if asking:
            reply = await page.ask(asked_for(talk, question="How many?", pictures=about))
            await asyncio.to_thread(front.begun.wait, 30)
            await page.stop(asked_for(talk))
        else:
            await page.read(asked_for(talk, pictures=about))
            await asyncio.to_thread(front.begun.wait, 30)
            reply = await page.ask(asked_for(other, question="And here?"))
        front.go_on.set()
        assert (await told(reply))[-1] == {"done": not asking}
        desk.turns.close()
        return list(cast(Any, runtime)._embeddings)

    assert asyncio.run(asyncio.wait_for(encoded(), 60)) == []
    runtime.close()


def test_an_empty_conversation_that_makes_room_is_forgotten_by_the_model(edge: Path) -> None:
    from ldrt_edge.chat import desk as desks

    runtime = load(edge, threads=1)

    async def opened() -> None:
        desk = Desk(runtime, Front.load(edge), Model.of(edge), Sampling(max_tokens=2))
        first = desk.conversations[desk.open()]
        first.session.read("Mister Miller of Hamburg")
        for _ in range(desks._MOST_CONVERSATIONS):
            desk.open()
        desk.turns.close()

    asyncio.run(asyncio.wait_for(opened(), 60))
    assert cast(Any, runtime)._prefix.keys == []
    runtime.close()


# --- OpenAI's API ---------------------------------------------------------------------------------------------------


def _with_picture(question: str) -> list[dict[str, Any]]:
    url = "data:image/png;base64," + base64.b64encode(film()).decode()
    parts = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]


def test_the_openai_client_gets_the_models_answer(client: Any, edge: Path) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == edge.name
    made = client.chat.completions.create(model=model.id, messages=_with_picture("How many?"), logprobs=True, seed=3)
    runtime, front = load(edge, threads=1), Front.load(edge)
    image = front.image(read_image_bytes(film()).rgb)
    prompt = front.prompt([Message("user", "Be brief.\n\nHow many?", (image,))])
    tokens = list(runtime.generate(prompt, Sampling(max_tokens=24)))
    runtime.close()
    (choice,) = made.choices
    assert choice.message.content == front.decode([token.id for token in tokens]).strip()
    assert [told.logprob for told in choice.logprobs.content] == pytest.approx([t.logprob for t in tokens], abs=1e-4)
    assert made.usage.prompt_tokens == len(prompt.ids) and made.usage.completion_tokens == len(tokens) == 24
    assert choice.finish_reason == "length"


def test_a_stream_joins_to_the_whole_answer(client: Any, edge: Path) -> None:
    asked: dict[str, Any] = {"model": edge.name, "messages": _with_picture("How many?")}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content and sum(map(bool, pieces)) > 1
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == "length"


def test_another_client_gets_the_same_whole_and_streamed(server: Server, client: Any, edge: Path) -> None:
    """Of Hugging Face: it has its own requests, reads its own streams and takes none of OpenAI's code."""
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import BadRequestError

    other = InferenceClient(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=server.token)
    asked: dict[str, Any] = {"model": edge.name, "messages": _with_picture("How many?"), "seed": 3, "logprobs": True}
    expected = client.chat.completions.create(**asked)
    whole = other.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected.choices[0].message.content
    assert whole.usage.total_tokens == expected.usage.total_tokens and whole.choices[0].finish_reason == "length"
    logprobs = [told.logprob for told in expected.choices[0].logprobs.content]
    assert [told.logprob for told in whole.choices[0].logprobs.content] == logprobs
    pieces = [chunk.choices[0].delta.content or "" for chunk in other.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces) == expected.choices[0].message.content and sum(map(bool, pieces)) > 1
    with pytest.raises(BadRequestError, match="temperature"):
        other.chat.completions.create(**asked | {"temperature": -1})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"messages": []}, "list of messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}, "role 'tool'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "ends with a question"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, "control token"),
        ({"messages": [{"role": "user", "content": "x " * 9000}]}, "the model holds"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input_audio"),
        ({"n": 2}, "n: this server"),
        ({"stop": ["x"]}, "stop: this server"),
        ({"temperature": -1}, "sampling wants"),
        ({"max_tokens": "many"}, "max_tokens: wants a number"),
    ],
)
def test_what_it_cannot_do_is_refused_in_openais_shape(
    client: Any, edge: Path, change: dict[str, Any], said: str
) -> None:
    from openai import BadRequestError

    asked = {"model": edge.name, "messages": [{"role": "user", "content": "?"}]} | change
    with pytest.raises(BadRequestError, match=said):
        client.chat.completions.create(**asked)


def test_another_model_is_not_there(client: Any) -> None:
    from openai import NotFoundError

    with pytest.raises(NotFoundError, match="there is only"):
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "?"}])


def test_nothing_is_fetched_from_elsewhere(client: Any, edge: Path) -> None:
    from openai import BadRequestError

    for url in ("http://127.0.0.1:1/a.png", "file:///etc/passwd", "data:image/png,abc", "data:image/png;base64,%%%%"):
        parts = [{"type": "image_url", "image_url": {"url": url}}]
        with pytest.raises(BadRequestError, match="image_url"):
            client.chat.completions.create(model=edge.name, messages=[{"role": "user", "content": parts}])


# --- what is left behind --------------------------------------------------------------------------------------------


def test_every_answer_is_in_the_audit_log(server: Server, client: Any, edge: Path, log: Path) -> None:
    before = verify(log).lines
    server.events(f"{new(server)}/ask", {"question": "Logged?", "max_tokens": 2})
    client.chat.completions.create(model=edge.name, messages=[{"role": "user", "content": "Logged?"}], max_tokens=2)
    assert verify(log).lines == before + 2
    lines = [json.loads(line) for line in log.read_text().splitlines()[-2:]]
    assert lines[0]["question"] == lines[1]["question"]
    assert lines[0]["model"] == artifact.identity(edge).manifest_sha256


def test_the_log_names_every_picture_that_an_answer_rests_on(server: Server, log: Path) -> None:
    names = [server.json("POST", "/api/pictures", film(seed))["name"] for seed in (0, 1)]
    talk, before = new(server), verify(log).lines
    for shown in ([names[0]], [], [names[1]]):
        pictures = [{"name": name} for name in shown]
        server.events(f"{talk}/ask", {"question": "And now?", "pictures": pictures, "max_tokens": 2})
    server.events(f"{talk}/again", {"max_tokens": 2})
    first, _, last = (turn["images"] for turn in server.json("GET", talk)["turns"])
    one, other = first[0]["seen_sha256"], last[0]["seen_sha256"]
    logged = [json.loads(line)["images"] for line in log.read_text().splitlines()[before:]]
    assert logged == [[one], [one], [one, other], [one, other]]


def test_an_answer_that_was_seen_but_cannot_be_kept_is_in_the_log(edge: Path, tmp_path: Path) -> None:
    """One that spells a control token, which a random model does not."""
    real, front = load(edge, threads=1), Front.load(edge)
    ids = [number for part in ("<ima", "ge>") for number in front.tokenizer.encode(part, add_special_tokens=False).ids]

    class Spelling:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def generate(self, *_: object) -> Iterator[Token]:
            return iter([Token(number, -1.0) for number in ids])

    async def asked() -> tuple[list[dict[str, Any]], int]:
        log = AuditLog(tmp_path / "audit.log")
        desk = Desk(cast(Any, Spelling()), front, Model.of(edge), Sampling(), log)
        talk = desk.conversations[desk.open()]
        events = await told(await Page(desk).ask(asked_for(talk, question="Which?")))
        desk.turns.close()
        log.close()
        return events, len(talk.session.exchanges)

    events, kept = asyncio.run(asyncio.wait_for(asked(), 60))
    real.close()
    seen = "".join(event.get("text", "") for event in events)
    assert seen == "<image>" and events[-1] == {"done": False} and kept == 0
    (line,) = map(json.loads, (tmp_path / "audit.log").read_text().splitlines())
    assert line["answer"] == hashlib.sha256(seen.encode()).hexdigest()


def test_a_taken_port_and_a_broken_log_are_one_line(server: Server, edge: Path, tmp_path: Path) -> None:
    broken = tmp_path / "audit.log"
    broken.write_text("{}\n")
    for options, said in ((("--port", str(server.port)), "choose another"), (("--audit", str(broken)), "line 1")):
        with pytest.raises(AssertionError, match=said) as caught:
            Server(edge, *options)
        assert "Traceback" not in str(caught.value)


def test_programs_get_where_it_listens_as_json(edge: Path) -> None:
    server = Server(edge, "--json")
    told = json.loads(server.address)
    server.close()
    page = urlsplit(told["page"])
    assert told["base_url"] == f"http://127.0.0.1:{page.port}/v1" and page.fragment == f"token={told['api_key']}"


def test_nothing_is_written_and_ctrl_c_ends_it_while_it_answers(edge: Path, ct: bytes, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    prefix = ("env", "-C", str(home), f"HOME={home}", f"TMPDIR={home}")
    server = Server(edge, prefix=prefix)
    name = server.json("POST", "/api/pictures", ct)["name"]
    server.events(f"{new(server)}/ask", {"question": "What?", "pictures": [{"name": name}], "max_tokens": 4})
    asking = Asking(server, new(server))
    assert asking.begun.wait(30)
    notes = server.close()
    assert server.process.returncode == 0 and "Traceback" not in notes
    assert list(home.iterdir()) == []


def _in_namespace() -> bool:
    tools = shutil.which("unshare") and shutil.which("ip")
    return bool(tools) and subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not _in_namespace(), reason="no network namespaces here")
def test_it_answers_where_there_is_no_network_at_all(edge: Path) -> None:
    """In a namespace whose only interface is a loopback: the client runs in there too."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path; from serving import Server\n"
        "server = Server(Path(sys.argv[1]))\n"
        "talk = '/api/conversations/' + server.json('POST', '/api/conversations', {})['name']\n"
        "print(server.events(talk + '/ask', {'question': 'Anybody?', 'max_tokens': 4})[-1])\n"
        "server.close()"
    )
    inside = 'ip link set lo up; ip -o link show | wc -l; exec "$0" -c "$1" "$2" "$3"'
    command = ["unshare", "-rn", "sh", "-c", inside, sys.executable, script, str(edge), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["1", "{'done': True}"], done.stderr


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_its_only_sockets_are_on_loopback(edge: Path, ct: bytes, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    prefix = ("strace", "-f", "-qq", "-e", "trace=connect,bind,sendto", "-o", str(trace))
    server = Server(edge, prefix=prefix)
    name = server.json("POST", "/api/pictures", ct)["name"]
    events = server.events(f"{new(server)}/ask", {"question": "?", "pictures": [{"name": name}], "max_tokens": 4})
    assert events[-1] == {"done": True}
    for child in psutil.Process(server.process.pid).children():
        child.send_signal(signal.SIGINT)
    server.process.communicate(timeout=30)
    internet = [line for line in trace.read_text().splitlines() if "AF_INET" in line]
    assert internet and all('"127.0.0.1"' in line or '"::1"' in line for line in internet), internet
