"""report.html in a real browser: without a network, in light, dark and on paper; and its answers as another's logs."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from serving import tiny_edge

from ldrt_edge.bench.report import bench
from ldrt_edge.bench.vqa import read_samples
from ldrt_edge.cli import cli
from ldrt_edge.errors import ArtifactError
from ldrt_edge.train.data.phantom import phantom

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def report(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it: probes, a further model, samples of several states."""
    folder = tmp_path_factory.mktemp("report")
    edge = tiny_edge(tiny("llava15", "smollm2"), folder)
    data = phantom(folder / "phantom", 20, seed=1, test_fraction=0.4, languages=("en", "zh"))
    return bench(edge, data, folder / "report", edge.parent / "merged", beside=[edge], limit=20, threads=1, runs=0,
                 probes=2)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with sync_api.sync_playwright() as play:
        as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = play.chromium.launch(executable_path=CHROMIUM, args=as_root)
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_stands_alone_and_its_samples_can_be_sifted(browser: Any, report: Path, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1100, "height": 800}, offline=True)
    page, asked, faults = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda line: faults.append(line.text))
    page.goto((report / "report.html").as_uri())
    assert not faults and all(url.startswith(("file:", "data:image/jpeg")) for url in asked)
    verdict = page.locator(".verdict").first.bounding_box()
    assert verdict["y"] < page.locator("h2").first.bounding_box()["y"], "the verdict comes first"
    titles = page.locator("h2").all_inner_texts()
    for title in ("All models of this run", "What it makes up", "Whether it knows when it is right", "Samples"):
        assert title in titles
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wide tables scroll by themselves"
    paper, ink = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    light, dark = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (paper, ink))
    assert (light > dark) == (scheme == "light")

    cards = page.locator(".card")
    shown = cards.count()
    states = [card.get_attribute("data-state") for card in cards.all()]
    order = ["worse", "better", "other", "wrong", "right"]
    assert states == sorted(states, key=order.index), "what changed comes first"
    assert page.locator(".card:visible").count() == shown
    page.locator("input[value=wrong]").check()
    assert page.locator(".card:visible").count() == states.count("wrong") > 0
    page.locator("input[value=all]").focus()
    page.keyboard.press("Space")
    assert page.locator(".card:visible").count() == shown, "by keyboard too"
    first = cards.first
    assert first.locator("img").evaluate("image => image.naturalWidth") > 0
    assert {"key", "gguf", "before", "now"} <= set(first.locator("dt").all_inner_texts()), "each model's answer"
    context.close()


def test_the_page_prints(browser: Any, report: Path) -> None:
    page = browser.new_page()
    page.goto((report / "report.html").as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("fieldset").is_hidden() and page.locator(".card:visible").count() > 0
    assert page.pdf().startswith(b"%PDF")
    page.close()


def test_a_page_to_give_away_shows_no_picture_question_or_answer(report: Path, tmp_path: Path) -> None:
    edge, data = report.with_name("gguf"), report.with_name("phantom")
    out = bench(edge, data, tmp_path / "report", edge.parent / "merged", beside=[edge], limit=20, threads=1, runs=0,
                probes=2, samples=False)  # fmt: skip
    samples = read_samples(out / "samples.jsonl")
    shown, hidden = ((folder / "report.html").read_text() for folder in (report, out))
    told = {html.escape(text) for sample in samples for text in (sample.question, sample.image_sha256[:8])}
    assert any(text in shown for text in told) and "data:image/jpeg" in shown
    assert not any(text in hidden for text in told) and "data:image/jpeg" not in hidden
    assert "--no-samples" in hidden and "verdict" in hidden
    figures = [json.loads((folder / "report.json").read_text())["vqa"] for folder in (report, out)]
    assert figures[0] == figures[1]


def test_export_as_logs_of_lmms_eval(report: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["bench", "export", str(report), "--out", str(tmp_path), "--json"])
    folder = Path(json.loads(done.stdout)["path"])
    (log,), (results,) = folder.glob("*_samples_ldrt_edge_phantom_test.jsonl"), folder.glob("*_results.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    samples = read_samples(report / "samples.jsonl")
    assert [line["filtered_resps"] for line in lines] == [sample.subject.text for sample in samples]
    assert [line["doc_id"] for line in lines] == list(range(len(samples)))
    assert len({line["doc_hash"] for line in lines}) == len(lines)
    told = json.loads(results.read_text())
    (task,) = told["results"]
    assert task in log.name
    assert told["results"][task]["exact_match,none"] == pytest.approx(sum(s["exact_match"] for s in lines) / len(lines))
    again = CliRunner().invoke(cli, ["bench", "export", str(report), "--out", str(tmp_path)])
    assert isinstance(again.exception, ArtifactError)


def test_bench_knows_a_model_from_a_command(tmp_path: Path) -> None:
    for words in ([str(tmp_path / "nowhere")], ["measure", "nowhere"]):
        done = CliRunner().invoke(cli, ["bench", *words, "--data", "x"])
        assert isinstance(done.exception, ArtifactError) and "no such folder" in str(done.exception)
    assert "judge" in CliRunner().invoke(cli, ["bench", "--help"]).stdout
    assert "--reference" in CliRunner().invoke(cli, ["bench", "measure", "--help"]).stdout
