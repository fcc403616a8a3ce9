"""What a model makes up: probes with known answers, several models in one run, calibration, hedging."""

from __future__ import annotations

import io
import json
import random
import unicodedata
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving import tiny_edge

from ldrt_edge import artifact
from ldrt_edge.bench.calibration import calibration, ece_difference
from ldrt_edge.bench.hallucination import hedging, summarise
from ldrt_edge.bench.probes import Probe, Said, _Known, _questions
from ldrt_edge.bench.report import bench
from ldrt_edge.bench.vqa import Answer, Sample, read_samples
from ldrt_edge.bench.wordings import wordings
from ldrt_edge.dataset import Dataset, DatasetWriter, Row, Turn
from ldrt_edge.errors import ConfigError
from ldrt_edge.front import Front, Message, conversation
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.base import Sampling, load, of_pictures
from ldrt_edge.train.data.phantom import THINGS, phantom
from ldrt_edge.train.data.phantom_text import LANGUAGES


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom(tmp_path_factory.mktemp("probes") / "phantom", 24, seed=0, test_fraction=0.3, languages=("en", "de"))


@pytest.fixture(scope="module")
def edge(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_edge(tiny("llava15", "smollm2"), tmp_path_factory.mktemp("edge"))


def test_phantom_rows_say_what_their_pictures_show(data: Path) -> None:
    rows = Dataset(data).rows()
    for row in rows:
        assert sorted((*row.present, *row.absent)) == sorted(THINGS) and not set(row.present) & set(row.absent)
        if row.task == "site":
            assert row.answer in row.present or row.language != "en"
        if row.task == "colour bar":
            assert ("colour bar" in row.present) == (row.answer in ("yes", "ja"))
        if row.task == "curve shown" and row.language == "en":
            named = next(thing for thing in THINGS if thing.endswith("curve") and thing.split()[0] in row.question)
            assert (named in row.present) == (row.answer == "yes")
    assert {row.kind for row in rows if row.present} == {"dose map", "DVH"}


def test_foils_are_absent_and_chosen_as_their_names_say(tmp_path: Path) -> None:
    """Eight pictures: a is nearly everywhere, c stands beside b and nowhere else."""
    shown = ["ab", "ab", "a", "a", "bc", "bc", "b", "ad"]
    with artifact.create(tmp_path / "data", "dataset", {}) as draft, DatasetWriter(draft.path) as writer:
        for n, names in enumerate(shown):
            stream = io.BytesIO()
            Image.new("RGB", (8, 8), (n, n, n)).save(stream, "PNG")
            image, digest = writer.add_image(stream.getvalue(), ".png")
            turns = (Turn("user", "?"), Turn("assistant", "!"))
            writer.add(Row(f"{n}", image, digest, turns, "en", "t", "open", "s", "l", digest, "k", "test",
                           tuple(names), tuple(set("abcd") - set(names))))  # fmt: skip
    dataset = Dataset(tmp_path / "data")
    known = _Known(dataset)
    row = dataset[6]
    assert set(row.absent) == {"a", "c", "d"} and row.present == ("b",)
    chosen = [known.absent(row, 1, random.Random(seed)) for seed in range(20)]
    for picked in chosen:
        assert picked["a"] and "popular" in picked["a"], "a is the most frequent one that is not there"
        assert "adversarial" in picked.get("c", ()) or "adversarial" in picked["a"], "both stand beside b twice"
        assert set(picked) <= set(row.absent)
    assert len({name for picked in chosen for name, ways in picked.items() if "random" in ways}) == 3
    asked = _questions(row, [row], known, ["en", "de"], random.Random(0))
    assert [q.sort for q in asked].count("unanswerable") == 2, "one in each language"
    assert not [q for q in asked if q.sort == "translation"], "nobody knows what b is called in German"


def said(yes: bool | None, text: str = "", abstains: bool = False) -> Said:
    return Said(text, 0.5, yes, abstains)


def probe(**changes: Any) -> Probe:
    plain = Probe("0", "0", "presence", "en", "?", "hip", True, (), said(True), said(True), said(False))
    return replace(plain, **changes)


def sample(id: str, key: str, text: str, language: str = "en") -> Sample:
    given = Answer(text, text == key, 0.0, id)
    return Sample(id, id, id, "k", language, "t", "open", f"{id}?", key, given, None, None, None, None, None, None)


def test_what_is_made_up_is_told_from_what_is_missed() -> None:
    absent = {"present": False, "structure": "knee"}
    probes = [
        probe(), probe(image_sha256="1", group="1", right=said(False), wrong=said(None)),
        probe(**absent, foils=("random", "popular"), right=said(True), wrong=said(False)),
        probe(**absent, image_sha256="1", group="1", foils=("adversarial",), right=said(False), wrong=said(False),
              blank=said(True)),
        probe(sort="paraphrase"), probe(sort="paraphrase", **absent, right=said(None)),
        probe(sort="translation", language="de"),
        probe(sort="unanswerable", right=said(None, "cannot be told", True)),
        probe(sort="unanswerable", language="de", right=said(None, "120", False)),
        probe(sort="own", question="x?", right=said(None, "Three."), blank=said(None, "three")),
        probe(sort="own", image_sha256="1", group="1", question="y?", right=said(None, "4"),
              blank=said(None, "unknown", True)),
    ]  # fmt: skip
    samples = [replace(sample("x", "cannot be told", "three"), image_sha256="0"),
               replace(sample("y", "4", "4"), image_sha256="1")]  # fmt: skip
    found = summarise(probes, samples, 0)
    assert found.presence
    whole = found.presence["all"]
    assert (whole.accuracy.value, whole.invented.value, whole.recall, whole.precision) == (0.5, 0.5, 0.5, 0.5)
    assert found.presence["random"].invented.value == 1 and found.presence["adversarial"].invented.value == 0
    assert whole.precision_ci and whole.precision_ci[0] < 0.5 < whole.precision_ci[1] and whole.f1 == 0.5
    assert whole.recall_ci and whole.f1_ci and whole.f1_ci[0] < 0.5 < whole.f1_ci[1]
    assert whole.yes.value == 0.5 and whole.unclear.value == 0 and whole.accuracy.clusters == 2
    assert found.wrong_picture and found.wrong_picture.value == 0.75 and found.seen and found.seen.value == -0.25
    assert found.blank_invented and found.blank_invented.value == 0.25
    assert found.paraphrase and found.paraphrase.value == 0.5 and found.translation and found.translation.value == 1
    assert {language: rate.value for language, rate in found.unanswerable.items()} == {"all": 0.5, "en": 1, "de": 0}
    assert found.due and found.due.value == 0 and found.undue and found.undue.value == 0
    assert found.blank_unchanged and found.blank_unchanged.value == 0.5
    assert found.blank_abstains and found.blank_abstains.value == 0.5
    mute = summarise([replace(p, right=said(False)) for p in probes], samples, 0).presence
    assert mute and mute["all"].precision is mute["all"].precision_ci is None and mute["all"].recall == 0
    assert mute["all"].recall_ci and mute["all"].recall_ci[1] > 0.5, "two pictures prove little"
    nothing = summarise([probe(sort="unanswerable")], samples, 0)
    assert nothing.presence is nothing.seen is nothing.translation is nothing.calibration is None


def test_the_words_cover_six_languages() -> None:
    words = wordings()
    for listed in (words.presence, words.unanswerable, words.abstention, words.hedging):
        assert set(listed) == set(LANGUAGES) and all(listed.values())
    for thing in THINGS:
        assert all(words.name(thing, language) for language in LANGUAGES), f"{thing} has no name somewhere"
    from ldrt_edge.train.data.phantom_text import TERMS

    for language, unknown in TERMS["unknown"].items():
        assert words.abstains(unknown, language), f"{language}: {unknown}"
        assert not words.abstains(TERMS["knee"][language], language)
    assert len({len(wording) for wording in words.presence.values()}) == 1, "as many wordings in each language"


def test_hedging_counts_words_in_their_language() -> None:
    samples = [sample("1", "It appears so.", "It appears to appear, maybe disappears; dismay."),
               sample("2", "knee", "Knee"), sample("3", "是", "这似乎可能是膝关节", "zh-Hans")]  # fmt: skip
    found = hedging(samples, 0)
    assert found["en"]["subject"].words == {"appears": 1, "appear": 1} and found["en"]["subject"].answers == 2
    assert found["en"]["subject"].per_100_answers == 100 and found["en"]["key"].per_100_answers == 50
    subject, key = found["en"]["subject"], found["en"]["key"]
    assert subject.ci_low == 0 and subject.ci_high == 200 and key.ci_low == 0 and key.ci_high == 100
    assert found["zh"]["key"].ci_high > 50, "none in one answer proves nothing"
    assert found["zh"]["subject"].words == {"似乎": 1, "可能": 1} and not found["zh"]["key"].words
    for text, language, words in (
        ("这不可能是骨折", "zh", {}), ("不太可能，可能是膝", "zh", {"可能": 1}),
        ("WAHRSCHEINLICH", "de", {"wahrscheinlich": 1}),
        (unicodedata.normalize("NFD", "Möglicherweise könnte"), "de", {"möglicherweise": 1, "könnte": 1}),
        (unicodedata.normalize("NFD", "Cela paraît"), "fr", {"paraît": 1}),
    ):  # fmt: skip
        assert wordings().hedges(text, language) == words, text


def test_calibration_of_models_that_know_and_that_do_not() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(size=4000)
    right = rng.uniform(size=4000) < sure
    honest = calibration(sure.tolist(), right.tolist(), range(4000))
    assert honest.ece < 0.03 and honest.selective[-1].accuracy.value > 0.85 > honest.selective[0].accuracy.value
    assert honest.risk < 0.3 and sum(found.n for found in honest.bins) == 4000
    proud = calibration([0.99] * 10, [True] * 4 + [False] * 6, range(10))
    assert proud.ece == pytest.approx(0.59) and len(proud.bins) == 1
    assert calibration([0.0, 1.0], [False, True], [0, 1]).ece == 0
    with pytest.raises(ValueError, match="cluster labels"):
        calibration([], [], [])
    assert 0 < proud.ece_low < proud.ece < proud.ece_high < 1, "all alike, which is no certainty"
    assert honest.ece_low == 0 and honest.ece < honest.ece_high < 0.06


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.3])
def test_intervals_of_the_calibration_error_hold_where_answers_cluster(
    shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty pictures with five answers each, half of which go with the picture; too sure by `shift`."""
    monkeypatch.setattr("ldrt_edge.bench.calibration.DRAWS", 300)
    rng, runs, held, zero = np.random.default_rng(0), 60, 0, 0
    clusters = np.repeat(np.arange(40), 5).tolist()
    for seed in range(runs):
        sure = rng.beta(8, 2, size=(40, 5)) * 0.7 + 0.3
        luck = np.where(rng.uniform(size=(40, 5)) < 0.5, rng.uniform(size=(40, 1)), rng.uniform(size=(40, 5)))
        right = luck < sure - shift
        found = calibration(sure.ravel().tolist(), right.ravel().tolist(), clusters, seed)
        held += found.ece_low <= shift <= found.ece_high
        same = (sure.ravel().tolist(), right.ravel().tolist())
        zero += ece_difference(same, same, clusters, seed).value == 0
    assert held >= 0.88 * runs and zero == runs


def test_the_calibration_error_of_two_models_is_paired() -> None:
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(50), 4).tolist()
    sure, right = rng.uniform(0.5, 0.9, 200), rng.uniform(size=200) < 0.7
    proud = ((sure + 0.1).tolist(), right.tolist())
    more = ece_difference(proud, (sure.tolist(), right.tolist()), clusters)
    less = ece_difference((sure.tolist(), right.tolist()), proud, clusters)
    assert more.value == pytest.approx(-less.value) and more.ci_low <= more.value <= more.ci_high
    assert more.value == pytest.approx(
        calibration(*proud, clusters).ece - calibration(sure.tolist(), right.tolist(), clusters).ece
    )
    assert (more.n, more.clusters) == (200, 50)
    with pytest.raises(ValueError, match="cluster labels"):
        ece_difference(proud, ([0.5], [True]), clusters)


def test_a_run_with_probes_and_further_models(edge: Path, data: Path, tmp_path: Path) -> None:
    merged = edge.parent / "merged"
    options: dict[str, Any] = {"limit": 20, "threads": 1, "runs": 0, "probes": 3, "answer_tokens": 24}
    with pytest.raises(ConfigError, match="each model once"):
        bench(edge, data, tmp_path / "out", merged, beside=[merged, merged], **options)
    out = bench(edge, data, tmp_path / "out", merged, beside=[merged], **options)
    report = json.loads((out / "report.json").read_text())
    assert [(rung["name"], rung["role"]) for rung in report["ladder"]] == [
        (f"{merged.parent.name}/merged", "other"), ("merged", "reference"), ("gguf", "subject")
    ]  # fmt: skip
    same, itself, subject = report["ladder"]
    assert same["loss"]["value"] == 0 == same["flips"]["rate"] and itself["against"] is itself["loss"] is None
    assert subject["loss"] == report["vqa"]["loss"] and subject["flips"] == report["vqa"]["flips"]
    assert subject["fidelity"] == report["fidelity"] and same["blind"] and itself["blind"] is None
    samples = read_samples(out / "samples.jsonl")
    assert all(s.reference and s.others[same["name"]].text == s.reference.text for s in samples)
    assert all(s.subject.confidence is not None and 0 <= s.subject.confidence <= 1 for s in samples)
    found = report["hallucination"]
    assert found["pictures"] == 3 and set(found["presence"]) == {"all", "random", "popular", "adversarial"}
    assert set(found["unanswerable"]) == {"all", "en", "de"} and found["translation"]["n"] > 0
    assert report["calibration"]["accuracy"] == report["vqa"]["overall"]["accuracy"]["value"]
    assert f"--beside {same['name']}" in report["environment"]["command"]
    assert "--probes 3" in report["environment"]["command"]
    for journal in ("probes.jsonl", "others/reference-probes.jsonl", "others/0-probes.jsonl"):
        lines = [json.loads(line) for line in (out / journal).read_text().splitlines()]
        assert len(lines) == 3 and sum(len(line["gave"]) for line in lines) == found["probes"]
    assert subject["hallucination"] == found and subject["calibration"] == report["calibration"]
    assert same["hallucination"]["presence"] == itself["hallucination"]["presence"], "the same model twice"
    assert same["invented"]["value"] == same["ece"]["value"] == 0 and itself["invented"] is itself["ece"] is None
    made_up = [rung["hallucination"]["presence"]["all"]["invented"]["value"] for rung in (subject, itself)]
    assert subject["invented"]["value"] == pytest.approx(made_up[0] - made_up[1])
    assert subject["ece"]["value"] == pytest.approx(subject["calibration"]["ece"] - itself["calibration"]["ece"])
    assert subject["non_inferiority"] == report["vqa"]["non_inferiority"] and same["non_inferiority"]


def test_questions_one_after_the_other_are_computed_as_the_first_one(edge: Path, data: Path) -> None:
    """To the last bit: what two questions begin with as well comes in the batch that it came in alone."""
    dataset, front, greedy = Dataset(data), Front.load(edge), Sampling(max_tokens=4)
    image = front.image(read_image(dataset.image_path(dataset[0])).rgb)
    asked = ("Is the dose high?", "Is the dose low?", "Is the dose even?", "Why?")
    prompts = [front.prompt([Message("user", text, (image,))]) for text in asked]
    with closing(load(edge, threads=1)) as runtime:
        alone = []
        for prompt in prompts:
            runtime.forget()
            alone.append(list(runtime.generate(prompt, greedy)))
        runtime.forget()
        assert runtime.generate_all(prompts, greedy) == alone
        assert runtime.timings.reused_tokens == of_pictures(prompts[-1]) > image.token_count


def test_questions_side_by_side_get_the_answers_they_get_alone(edge: Path, data: Path) -> None:
    dataset, front = Dataset(data), Front.load(edge)
    runtime, plain = load(edge, threads=1, branches=3), load(edge, threads=1)
    rows = [row for row in dataset.rows() if row.image == dataset[0].image]
    image = front.image(read_image(dataset.image_path(rows[0])).rgb)
    prompts = [front.prompt(conversation(row.turns[:-1], image)) for row in rows]
    answers = [front.answer_ids(conversation(row.turns[:-1], image), row.answer) for row in rows]
    alone = [[token.id for token in plain.generate(prompt, Sampling(max_tokens=9))] for prompt in prompts]
    given = runtime.generate_all(prompts, Sampling(max_tokens=9))
    assert [[token.id for token in tokens] for tokens in given] == alone
    drawn = runtime.generate_all(prompts, Sampling(max_tokens=5, temperature=0.8, seed=3))
    assert all(1 <= len(tokens) <= 5 for tokens in drawn)
    assert len(prompts) > 3, "more questions than branches"
    for expected, scored in zip(plain.score_all(prompts, answers), runtime.score_all(prompts, answers), strict=True):
        assert expected.shape == scored.shape and np.abs(expected - scored).max() < 0.1
    long = Sampling(max_tokens=3700)  # no room for two: one after the other
    stopped = [replace(prompt, stop_ids=tuple(range(runtime.vocab_size))) for prompt in prompts]
    assert runtime.generate_all(stopped, long) == [[] for _ in prompts]
    text = [replace(prompt, ids=prompt.ids[-4:], images=()) for prompt in prompts]
    assert len(runtime.generate_all(text, Sampling(max_tokens=2))) == len(text), "nothing shared"
    other = front.image(np.zeros((64, 64, 3), np.uint8))
    mixed = [prompts[0], front.prompt(conversation(rows[1].turns[:-1], other))]
    assert [[t.id for t in tokens] for tokens in runtime.generate_all(mixed, Sampling(max_tokens=4))] == [
        [t.id for t in plain.generate(prompt, Sampling(max_tokens=4))] for prompt in mixed
    ]  # fmt: skip
    runtime.close()
    plain.close()
