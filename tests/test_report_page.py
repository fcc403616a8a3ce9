"""report.html in a real browser: without a network, in light, dark and on paper; and its answers as another's logs."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from serving import tiny_edge

from ldrt_edge.bench.figures import size_against_accuracy
from ldrt_edge.bench.hallucination import hedging
from ldrt_edge.bench.ladder import climb
from ldrt_edge.bench.latency import further_threads
from ldrt_edge.bench.page import verdicts
from ldrt_edge.bench.probes import Probe, Said
from ldrt_edge.bench.report import bench
from ldrt_edge.bench.schema import DatasetIdentity, Environment, ModelIdentity, Report, summarise
from ldrt_edge.bench.statistics import Rate
from ldrt_edge.bench.vqa import Answer, Sample, flip, read_samples
from ldrt_edge.cli import cli
from ldrt_edge.errors import ArtifactError
from ldrt_edge.runtimes.processor import physical_cores
from ldrt_edge.train.data.phantom import phantom

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def report(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it: probes, a further model, timings, samples of several states."""
    folder = tmp_path_factory.mktemp("report")
    edge = tiny_edge(tiny("llava15", "smollm2"), folder)
    data = phantom(folder / "phantom", 20, seed=1, test_fraction=0.4, languages=("en", "zh"))
    return bench(edge, data, folder / "report", edge.parent / "merged", beside=[edge], limit=20, threads=1, runs=1,
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
    beside = f"{report.parent.name}/gguf"  # the subject is called gguf too
    assert {"key", beside, "before", "now"} <= set(first.locator("dt").all_inner_texts()), "each model's answer"
    context.close()


def test_the_page_prints(browser: Any, report: Path) -> None:
    page = browser.new_page()
    page.goto((report / "report.html").as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("fieldset").is_hidden() and page.locator(".card:visible").count() > 0
    assert page.pdf().startswith(b"%PDF")
    page.close()


def test_the_page_tells_of_each_model_what_the_report_knows(browser: Any, report: Path) -> None:
    told, page = json.loads((report / "report.json").read_text()), browser.new_page()
    page.goto((report / "report.html").as_uri())
    names = [rung["name"] for rung in told["ladder"]]
    assert len(set(names)) == 3 and {rung["role"] for rung in told["ladder"]} == {"subject", "reference", "other"}
    tables = {title: page.locator(f"h2:has-text('{title}') ~ .scroll").first for title in (
        "All models of this run", "Where this comes from"
    )}  # fmt: skip
    assert tables["All models of this run"].locator("thead th").all_inner_texts()[1:] == names
    rows = tables["All models of this run"].locator("tbody th").all_inner_texts()
    for what in (
        "right", "lost no more than the margin", "yes to what is absent", "expected calibration error",
        "first token, ms", "load average at its start", "divergence, nats a token",
    ):  # fmt: skip
        assert what in rows
    provenance = tables["Where this comes from"].inner_text()
    assert all(rung["model"]["manifest_sha256"][:16] in provenance for rung in told["ladder"])
    assert all(made["manifest_sha256"][:16] in provenance for made in told["subject"]["made_from"])
    text = page.locator("main").inner_text()
    for command in (told["environment"]["command"], *told["environment"]["replay"].values()):
        assert command in text
    assert "ldrt-edge bench latency gguf --data phantom --runs 1 --threads 1" in text
    assert "ldrt-edge parity --golden gguf" in text
    assert "this system does not tell" in text or told["latency"]["joules_per_question"] is not None
    assert "same first token" not in text and "the same token is the most likely one" in text
    swept = [at["threads"] for at in told["latency"]["by_threads"]]
    assert swept == list(further_threads(1, physical_cores())) and ("By number of threads" in text) == bool(swept)
    for figure in ("Right answers against bytes", "Change of right answers", "Milliseconds of a question"):
        assert page.locator(f"svg[aria-label^='{figure}']").is_visible()
    assert page.locator("svg[aria-label^=Milliseconds] rect.t3").count() == 2 + len(swept)
    page.close()


def test_names_of_models_of_like_size_stand_apart() -> None:
    def rung(name: str, nbytes: float) -> Any:
        score = SimpleNamespace(accuracy=Rate(0.4, 0.3, 0.5, 100, 50))
        return SimpleNamespace(name=name, role="other", model=SimpleNamespace(weights={"model": nbytes}), score=score)

    plot = size_against_accuracy([rung("q4", 156e6), rung("q8", 195e6), rung("f16", 332e6), rung("merged", 647e6)])
    assert plot is not None
    spans = []
    for point in plot.points:
        width = 9 + 8.0 * len(point.label)
        spans.append((point.x - width, point.x) if point.anchor == "end" else (point.x, point.x + width))
    assert all(first[1] <= second[0] for first, second in pairwise(sorted(spans)))


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


def sample(place: int, subject: bool, reference: bool, wrong: bool = False) -> Sample:
    """A question about a picture of its own, answered right or wrong by either, and with a wrong picture."""
    ours, theirs, blind = (
        Answer("yes" if right else "no", right, 0.0, f"{place}", confidence=0.5)
        for right in (subject, reference, wrong)
    )
    changed = flip("en", ours, theirs)
    return Sample(f"{place}", f"{place}", f"{place}", "k", "en", "t", "closed", f"{place}?", "yes", ours, blind, blind,
                  theirs, changed, (0.1,), (True,))  # fmt: skip


def summed_up(samples: list[Sample], probes: list[Probe], margin: float = 0.01) -> Report:
    """The report of a subject with these answers, held against a reference that was probed with the same result."""
    models = {name: ModelIdentity(name, "gguf", "0", "1", None, {"w": 1}) for name in ("subject", "reference")}
    ladder = climb(samples, {}, {"subject": probes, "reference": probes} if probes else {}, models, {}, 0, margin)
    subject = next(rung for rung in ladder if rung.role == "subject")
    environment = Environment("", "", "", 1, 1, 1, None, 1, 0, None, "1", None, {}, "ldrt-edge bench")
    questions = DatasetIdentity("data", "0", "test", len(samples), len(samples), len(samples), ("s",), ("l",))
    return Report(
        "ldrt-edge/report/1", models["subject"], models["reference"], questions, environment,
        summarise(samples, [], 0, margin), subject.fidelity, None, subject.calibration, subject.hallucination,
        hedging(samples), ladder,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("worse", "better", "margin", "verdict", "claim"),
    [
        (6, 4, 0.01, "undecided", "no loss shown, none ruled out"),
        (0, 0, 0.01, "undecided", "no loss shown, none ruled out"),
        (0, 0, 0.05, "non-inferior", "at most 5 points lost"),
        (12, 0, 0.01, "inferior", "something was lost"),
        (12, 0, 0.50, "non-inferior", "at most 50 points lost"),
    ],
)
def test_a_loss_looks_well_only_where_it_is_shown_to_be_small(
    worse: int, better: int, margin: float, verdict: str, claim: str
) -> None:
    rest = 100 - worse - better
    samples = [sample(n, n >= worse, not worse <= n < worse + better) for n in range(worse + better + rest)]
    report = summed_up(samples, [], margin)
    assert report.vqa.non_inferiority and report.vqa.non_inferiority.verdict == verdict
    loss = next(tile for tile in verdicts(report) if "against reference" in tile.claim)
    assert loss.good == (verdict == "non-inferior") and claim in loss.claim
    rung = next(rung for rung in report.ladder if rung.role == "subject")
    assert rung.non_inferiority == report.vqa.non_inferiority and rung.loss == report.vqa.loss


def asked(model: Callable[[bool, bool], bool]) -> list[Probe]:
    """Forty pictures with two structures that are there and five that are not; `model` says yes by (there, sees it)."""
    foils = (("random",), ("popular",), ("adversarial",), ("popular", "adversarial"), ("random",))
    probes = []
    for picture in range(40):
        for structure, ways in (("a", ()), ("b", ()), *zip("cdefg", foils, strict=True)):
            right, wrong = (Said("", 0.9, model(not ways, sees), False) for sees in (True, False))
            probes.append(
                Probe(f"{picture}", f"{picture}", "presence", "en", "?", structure, not ways, ways, right, wrong, wrong)
            )
    return probes


@pytest.mark.parametrize(
    ("model", "good"),
    [
        (lambda there, sees: there and sees, True),
        (lambda there, sees: False, False),
        (lambda there, sees: True, False),
        (lambda there, sees: there, False),
    ],
    ids=["sees", "always no", "always yes", "knows without looking"],
)
def test_making_nothing_up_looks_well_only_for_a_model_that_finds_what_is_there(
    model: Callable[[bool, bool], bool], good: bool
) -> None:
    report = summed_up([sample(n, True, True) for n in range(8)], asked(model))
    (tile,) = (tile for tile in verdicts(report) if "not in the picture" in tile.claim)
    assert tile.good == good, tile.evidence
    assert "of those that are there are found" in tile.evidence and "points against reference" in tile.evidence


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
