"""What comes out of the corpus: LLaVA JSON, Hugging Face folders, counts, and the page that strikes pairs."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from articles import figure, folder, jats, picture

from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import DataError
from ldrt_edge.train.data.curate import curate, read_strikes
from ldrt_edge.train.data.imports import import_llava
from ldrt_edge.train.data.instruct import instruct
from ldrt_edge.train.data.outputs import export
from ldrt_edge.train.data.pairs import Pairs
from ldrt_edge.train.data.stats import count, draw, stats_text
from ldrt_edge.train.data.view import Desk

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six articles, two of them German."""
    root = tmp_path_factory.mktemp("articles")
    for n in range(6):
        caption = f"Dose distribution of plan {n} over the heel of patient {n * 7}, view {n + 20}, series {n + 90}"
        data = jats(f"10.1/{n}", figure(1, caption), language="de" if n > 3 else "en", title=f"Heels <b>{n}</b>")
        folder(root / str(n), {"a.xml": data, "x-g001.png": picture(n)})
    return root


@pytest.fixture(scope="module")
def pairs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return curate([source], tmp_path_factory.mktemp("pairs") / "pairs")


@pytest.fixture(scope="module")
def dataset(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return instruct(pairs, tmp_path_factory.mktemp("data") / "data", test_fraction=0.5)


def test_llava_json_comes_back_as_it_went(dataset: Path, tmp_path: Path) -> None:
    out = export(dataset, "llava", tmp_path / "llava")
    rows = json.loads((out / "train.json").read_text())
    assert rows[0]["conversations"][0]["value"].startswith("<image>\n")
    assert {row["licence"] for row in rows} == {"CC-BY-4.0"} and all(row["group"] for row in rows)
    again = Dataset(import_llava(out / "train.json", tmp_path / "again", test_fraction=0))
    said = {(row.image_sha256, row.question, row.answer) for row in again.rows()}
    assert said == {(row.image_sha256, row.question, row.answer) for row in Dataset(dataset).rows("train")}
    assert len(json.loads((out / "test.json").read_text())) == len(Dataset(dataset).rows("test")) == 3


def test_hugging_face_datasets_loads_the_folder(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    out = export(dataset, "hf", tmp_path / "hf")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(out), cache_dir=str(tmp_path / "cache"))
    rows = Dataset(dataset)
    assert {split: loaded[split].num_rows for split in loaded} == {"train": 3, "test": 3}
    first = loaded["test"][0]
    assert first["image"].size == (320, 240)
    (conversation,) = first["conversations"]
    wanted = next(row for row in rows if row.id == conversation["id"])
    assert [turn["content"] for turn in conversation["messages"]] == [turn.text for turn in wanted.turns]
    assert (conversation["licence"], first["group"]) == (wanted.licence, wanted.group)


def test_counts_of_pairs_and_of_a_dataset(pairs: Path, dataset: Path, tmp_path: Path) -> None:
    counts = count(pairs)
    assert counts["rows"] == {"all": 6} and counts["language"] == {"en": 4, "de": 2}
    assert counts["licence"] == {"CC-BY-4.0": 6} and counts["year"] == {"2021": 6}
    assert "language: en 4, de 2" in stats_text(counts)
    assert count(dataset)["split"] == {"train": 3, "test": 3}
    draw(counts, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


class Viewer:
    """`ldrt-edge data view` as a user starts it."""

    def __init__(self, pairs: Path, strikes: Path) -> None:
        command = [sys.executable, "-m", "ldrt_edge.cli", "data", "view", str(pairs), "--strikes", str(strikes)]
        self.process = subprocess.Popen(
            [*command, "--no-browser"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=strikes.parent
        )
        assert self.process.stdout
        self.address = self.process.stdout.readline().strip()
        assert self.address, self.process.communicate()[1]
        self.port = urlsplit(self.address).port or 0
        self.token = urlsplit(self.address).fragment.removeprefix("token=")

    def send(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        given = {"authorization": f"Bearer {self.token}"} | headers
        connection.request(method, path, None if body is None else json.dumps(body), given)
        reply = connection.getresponse()
        return reply.status, reply.read()

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.communicate(timeout=30)[1] == "", "no traceback, no notes"


@pytest.fixture
def viewer(pairs: Path, tmp_path: Path) -> Iterator[Viewer]:
    opened = Viewer(pairs, tmp_path / "strikes.jsonl")
    yield opened
    opened.close()


def test_strikes_are_kept_at_once_and_applied_on_the_next_build(
    viewer: Viewer, pairs: Path, source: Path, tmp_path: Path
) -> None:
    strikes = tmp_path / "strikes.jsonl"
    assert json.loads(viewer.send("GET", "/api/about")[1]) == {"pairs": 6, "struck": 0}
    chosen = json.loads(viewer.send("GET", "/api/pairs/2")[1])
    assert viewer.send("GET", "/api/pairs/2/picture")[1] == (pairs / chosen["image"]).read_bytes()
    viewer.send("POST", "/api/pairs/2/strike", {"struck": True, "reason": "wrong\npicture"})
    viewer.send("POST", "/api/pairs/3/strike", {"struck": True})
    viewer.send("POST", "/api/pairs/3/strike", {"struck": False})
    assert read_strikes(strikes) == {chosen["id"]: "wrong picture"}
    assert json.loads(viewer.send("GET", "/api/pairs/2")[1])["struck"] is True
    built = curate([source], tmp_path / "again", strikes=read_strikes(strikes))
    assert chosen["id"] not in {pair.id for pair in Pairs(built)} and len([*Pairs(built)]) == 5
    assert '"step": "struck"' in (built / "dropped.jsonl").read_text()


@pytest.mark.parametrize("before", ["", "\n", "\n\n"])
def test_a_strikes_file_that_a_person_edited_goes_on(pairs: Path, tmp_path: Path, before: str) -> None:
    strikes = tmp_path / "strikes.jsonl"
    strikes.write_text('{"id": "mine", "reason": "one\u2028line, half a \\ud83d"}' + before)
    desk = Desk(pairs, strikes)
    desk.strike(0, True, "bad \ud83d")
    desk.strike(1, True, "")
    wanted = {"mine": "one\u2028line, half a ?", desk.pair(0).id: "bad ?", desk.pair(1).id: ""}
    assert desk.strikes == read_strikes(strikes) == wanted


def test_the_page_needs_its_token_and_takes_nothing_else(viewer: Viewer, tmp_path: Path) -> None:
    assert viewer.send("GET", "/api/about", authorization="Bearer wrong")[0] == 401
    assert viewer.send("GET", "/api/about", host="evil.example")[0] == 421
    assert viewer.send("POST", "/api/pairs/1/strike", {"struck": True}, origin="http://evil.example")[0] == 403
    assert viewer.send("GET", "/api/pairs/99")[0] == 400
    assert viewer.send("POST", "/api/pairs/1/strike", {"struck": "yes"})[0] == 400
    assert viewer.send("GET", "/../pairs.jsonl")[0] == 404
    assert not (tmp_path / "strikes.jsonl").exists()


def test_a_damaged_strikes_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text('{"id": "a"}\n[1]\n')
    with pytest.raises(DataError, match="line 2 is not a strike"):
        read_strikes(tmp_path / "bad")
    with pytest.raises(DataError, match="cannot be read"):
        read_strikes(tmp_path / "nowhere")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt-get install chromium)")
def test_the_page_in_a_browser_by_keyboard(viewer: Viewer, tmp_path: Path) -> None:
    api: Any = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as play:
        as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = play.chromium.launch(executable_path=CHROMIUM, args=as_root)
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        faults: list[str] = []
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(viewer.address)
        api.expect(page.locator("#count")).to_have_text("1 of 6, 0 struck")
        page.keyboard.press("ArrowRight")
        api.expect(page.locator("#count")).to_have_text("2 of 6, 0 struck")
        assert page.locator("#title").text_content() == "Heels 1", "markup of a title is text"
        assert page.evaluate("document.getElementById('picture').naturalWidth") == 320
        page.keyboard.press("s")
        api.expect(page.locator("#count")).to_have_text("2 of 6, 1 struck")
        assert page.locator("#strike").get_attribute("aria-pressed") == "true"
        page.screenshot(path=tmp_path / "page.png")
        browser.close()
    assert faults == []
    assert len(read_strikes(tmp_path / "strikes.jsonl")) == 1
