"""How sure an answer is: the probability is the one that was measured, and the statement rests on enough answers."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from bundling import Made, make, sign
from click.testing import CliRunner
from scipy.stats import binomtest

from ldrt_edge import artifact
from ldrt_edge.bench.calibration import BINS as BENCH_BINS
from ldrt_edge.bench.calibration import calibration
from ldrt_edge.bench.vqa import ANSWER_TOKENS, read_samples
from ldrt_edge.bundle.open import install
from ldrt_edge.bundle.pack import pack
from ldrt_edge.chat.session import Exchange, Session
from ldrt_edge.chat.terminal import ask_once
from ldrt_edge.cli import cli
from ldrt_edge.confidence import BINS, LEAST_ANSWERS, Confidence, _confidence, read_confidence
from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import ArtifactError
from ldrt_edge.front import Front
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.base import Sampling, Timings, load


@pytest.fixture(scope="module")
def made(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tiny("llava15", "llama"), tmp_path_factory.mktemp("sure"))


def test_a_statement_is_what_the_bench_counted() -> None:
    sure = [0.05] * 40 + [0.62] * 50 + [0.97] * 30
    right = [False] * 36 + [True] * 4 + [True] * 20 + [False] * 30 + [True] * 29 + [False]
    found = calibration(sure, right, list(range(len(sure))))
    confidence = _confidence("phantom", [asdict(one) for one in found.bins])

    said = confidence.of(0.61)
    assert (said.answers, said.right, said.dataset, said.probability) == (50, pytest.approx(0.4), "phantom", 0.61)
    interval = binomtest(20, 50).proportion_ci(method="wilson")
    assert (said.ci_low, said.ci_high) == pytest.approx((interval.low, interval.high), abs=1e-4)
    assert confidence.of(0.03).right == pytest.approx(0.1)
    assert confidence.of(1.0).right == pytest.approx(29 / 30)
    assert BINS == BENCH_BINS


def test_few_answers_are_read_with_their_neighbours() -> None:
    counts = [0] * BINS
    counts[6], counts[7], counts[8], counts[14] = 8, 1, 12, 100
    confidence = Confidence("d", [count / 2 for count in counts], counts)
    assert confidence.of(7.5 / BINS).answers == 8 + 1 + 12 >= LEAST_ANSWERS
    assert confidence.of(1.0).answers == 100
    assert confidence.of(0.0).answers >= LEAST_ANSWERS
    few = Confidence("d", [0.0] * 14 + [1.0], [0] * 14 + [3])
    assert (few.of(0.0).answers, few.of(0.0).ci_high) == (3, pytest.approx(0.79, abs=0.01))


def test_the_probability_is_the_one_that_was_measured(made: Made) -> None:
    dataset = Dataset(made.edge.parent / "data")
    samples = {sample.image_sha256: sample for sample in read_samples(made.report / "samples.jsonl")}
    seen = set()
    for row in dataset.rows("test"):
        measured = samples[row.image_sha256].subject
        tokens = 24 if row.answer_type == "closed" else ANSWER_TOKENS
        answer = ask_once(made.edge, row.question, dataset.image_path(row), sampling=Sampling(max_tokens=tokens))
        if answer.answer == measured.text:
            assert answer.probability == pytest.approx(measured.confidence, rel=0.05)
            seen.add(answer.answer)
    assert seen


def test_only_what_was_measured_is_said(made: Made) -> None:
    runtime, front = load(made.edge, threads=1), Front.load(made.edge)
    session = Session(runtime, front, confidence=Confidence("phantom", [1.0] * BINS, [30] * BINS))
    data = made.edge.parent / "data"
    picture = read_image(next((data / "images").iterdir()))
    session.attach(picture)
    "".join(session.ask("What colour is it?"))
    runtime.close()
    whole = replace(session.exchanges[0], finish="end")
    assert whole.shown
    assert whole.probability is not None
    sure = session.how_sure(whole)
    assert sure is not None
    assert "of 30 measured answers" in sure.told
    assert session.how_sure(replace(whole, finish="length")) is None
    assert session.how_sure(replace(whole, shown=())) is None
    assert session.how_sure(replace(whole, sampling=Sampling(temperature=0.7))) is None
    assert session.how_sure(replace(whole, probability=None)) is None
    assert Session(runtime, front).how_sure(whole) is None
    session.exchanges[0] = whole
    (turn,) = session.fork(1).transcript()["turns"]  # type: ignore[misc]
    assert turn["how_sure"] == asdict(sure)


def test_a_report_must_be_about_the_model_and_whole(made: Made, tmp_path: Path) -> None:
    assert read_confidence(made.edge) is None
    assert read_confidence(made.edge, made.report) is not None
    other = tmp_path / "other"
    with artifact.create(other, "gguf", {}) as draft:
        (draft.path / "x").write_text("x")
    with pytest.raises(ArtifactError, match="not about this model"):
        read_confidence(other, made.report)
    changed = tmp_path / "changed"
    shutil.copytree(made.report, changed)
    (changed / "report.json").write_text((changed / "report.json").read_text().replace('"n"', '"N"'))
    with pytest.raises(ArtifactError):
        read_confidence(made.edge, changed)
    told = json.loads((made.report / "report.json").read_text())
    for name, value, wanted in (
        ("none", None, "how sure the model was is not in it"), ("odd", {"bins": [{"n": "many"}]}, "not a report that"),
        ("more", {"bins": [{"confidence": 0.5, "accuracy": 2, "n": 9}]}, "not a report that"),
    ):  # fmt: skip
        with artifact.create(tmp_path / name, "report", {}) as draft:
            (draft.path / "report.json").write_text(json.dumps(told | {"calibration": value}))
        with pytest.raises(ArtifactError, match=wanted):
            read_confidence(made.edge, tmp_path / name)


def test_a_bundle_brings_its_own(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDRT_EDGE_HOME", str(tmp_path / "home"))
    bundle = pack(made.edge, made.report, tmp_path / "tiny.ldrt", unreleased=True)
    model = next((install(sign(bundle, made.key), tmp_path / "there", trust_once=True) / "models").iterdir())
    confidence = read_confidence(model)
    assert confidence is not None
    assert confidence.of(0.5).dataset == "data"


def test_the_command_says_it(made: Made) -> None:
    picture = next((made.edge.parent / "data" / "images").iterdir())
    command = ["chat", str(made.edge), "--image", str(picture), "--ask", "What colour is it?", "--max-tokens", "4"]
    said = CliRunner().invoke(cli, [*command, "--report", str(made.report), "--json"], catch_exceptions=False)
    told = json.loads(said.stdout.splitlines()[-1])
    assert 0 < told["probability"] <= 1
    assert told["how_sure"] is None or told["how_sure"]["answers"] == 4
    failed = CliRunner().invoke(cli, [*command, "--report", str(made.edge)])
    assert failed.exit_code == 1


def test_an_exchange_of_an_earlier_history_has_no_probability() -> None:
    assert Exchange("?", (), "yes", "end", 1, Sampling(), Timings()).probability is None
