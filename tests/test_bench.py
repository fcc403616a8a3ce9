"""Bench: the rates, their intervals, the blind control, and a report that says where every figure comes from."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from ldrt_edge import artifact
from ldrt_edge.bench import peers
from ldrt_edge.bench.compare import compare, lines
from ldrt_edge.bench.course import follow, parts
from ldrt_edge.bench.fidelity import fidelity
from ldrt_edge.bench.latency import measure, peak_rss_bytes
from ldrt_edge.bench.metrics import RULES
from ldrt_edge.bench.report import _named, bench
from ldrt_edge.bench.schema import learn_prior
from ldrt_edge.bench.throughput import throughput
from ldrt_edge.bench.vqa import Answer, Model, Sample, _as_expected, answer_rows, draw_controls, read_samples
from ldrt_edge.cli import cli
from ldrt_edge.convert.gguf import convert
from ldrt_edge.convert.quantize import quantize
from ldrt_edge.dataset import Dataset, DatasetWriter, Row, Turn, choose_rows
from ldrt_edge.errors import ArtifactError, ConfigError, DataError, RuntimeLoadError
from ldrt_edge.fidelity import compare_logits
from ldrt_edge.front import Front, conversation
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.base import Sampling, load
from ldrt_edge.runtimes.branches import GAPS_APART
from ldrt_edge.runtimes.hf import load_model
from ldrt_edge.runtimes.hf import normalise as normalise_pixels

Tiny = Callable[..., Path]
COLOURS = (
    ("red", "ja", "红", (220, 30, 30)),
    ("green", "nein", "绿", (30, 200, 40)),
    ("blue", "nein", "蓝", (40, 50, 230)),
    ("yellow", "nein", "黄", (230, 220, 40)),
)
TASKS = {"colour", "red", "tone"}
IMAGES, TESTED = 12, 8


def row(answer: str, **changes: str) -> Row:
    blank = Row("1", "images/1.png", "0", (Turn("user", "?"), Turn("assistant", answer)), "en", "t", "closed", "test",
                "CC0-1.0", "g", "k", "test")
    return replace(blank, **changes)  # type: ignore[arg-type]


def test_divergence_of_logits() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 11)).astype(np.float32)
    same = compare_logits(logits, logits + 3)
    assert same.kld.max() < 1e-9 and same.top1.all() and same.max_abs_logit_diff == pytest.approx(3)
    other = compare_logits(logits, np.concatenate([-logits, np.full((5, 2), 9, np.float32)], axis=1))
    assert other.kld.min() > 0 and not other.top1.any(), "a padded vocabulary is compared over what both have"
    close = np.array([[8.0, 8.001, 0.0]], np.float32)
    assert compare_logits(close, close[:, [1, 0, 2]]).undecided.all(), "below half precision either choice is right"


def told(place: int, kld: tuple[float, ...], top1: tuple[bool, ...]) -> Sample:
    """A question about one of the pictures, two questions a picture, with divergences of the answer's tokens."""
    picture, given = f"{place // 2}", Answer("yes", True, 0.0, f"{place // 2}")
    return Sample(f"{place}", picture, picture, "k", "en", "t", "closed", "?", "yes", given, given, given, given, None,
                  kld, top1)  # fmt: skip


def test_closeness_has_intervals_by_picture() -> None:
    samples = [told(0, (0.1, 0.3), (True, True)), told(1, (0.2,), (False,)), told(2, (1.0, 0.4), (True, False))]
    found = fidelity(samples)
    assert found and found.mean and found.p99 and found.top1
    assert (found.mean.value, found.tokens) == (pytest.approx(0.4), 5) and found.mean.value == found.mean_kld
    assert found.top1.value == found.top1_agreement == 0.6 and found.p99.value == found.p99_kld
    for part in (found.mean, found.p99, found.top1):
        assert (part.n, part.clusters) == (5, 2) and part.ci_low <= part.value <= part.ci_high
    assert found.mean.ci_high > 0.5 > 0.3 > found.mean.ci_low, "two pictures promise little"
    assert fidelity([replace(samples[0], kld=None, top1=None)]) is None


def test_the_intervals_of_closeness_cover_what_is_true() -> None:
    """Divergences whose logarithm is half the picture's: the true mean and 99th percentile are known."""
    rng, runs, pictures, held = np.random.default_rng(0), 100, 60, {"mean": 0, "p99": 0}
    mean, p99 = np.exp(0.5), np.exp(2.326)
    for _ in range(runs):
        of_picture, of_token = rng.normal(size=(pictures, 1)).repeat(2, axis=0), rng.normal(size=(2 * pictures, 6))
        drawn = np.exp((of_picture + of_token) * 0.5**0.5)
        found = fidelity([told(n, tuple(row), (True,) * 6) for n, row in enumerate(drawn.tolist())])
        assert found and found.mean and found.p99
        held["mean"] += found.mean.ci_low <= mean <= found.mean.ci_high
        held["p99"] += found.p99.ci_low <= p99 <= found.p99.ci_high
    assert held["mean"] >= 0.85 * runs and held["p99"] >= 0.85 * runs, held


@pytest.mark.parametrize(
    ("beside", "names"),
    [
        (["/a/f16", "/a/q8"], ["f16", "q8"]),
        (["/b/q4"], ["b/q4"]),
        (["/b/merged", "/a/q8"], ["b/merged", "a/q8"]),
        (["/a/q8", "/b/q8"], ["a/q8", "b/q8"]),
        (["/b/subject"], ["b/subject"]),
    ],
)
def test_every_model_of_a_run_has_a_name_of_its_own(beside: list[str], names: list[str]) -> None:
    assert list(_named([Path(one) for one in beside], [Path("/a/q4"), Path("/a/merged")])) == names


def test_the_course_of_a_run_holds_all_its_work(capsys: pytest.CaptureFixture[str]) -> None:
    exports = {"subject": True, "reference": False, "base": False, "f16": True}
    run = parts(exports, pictures=10, probes=4, runs=5)
    assert [(part.what, part.model, part.pictures) for part in run] == [
        ("asking", "subject", 40), ("asking", "base", 30), ("asking", "f16", 40),
        ("probing", "subject", 12), ("probing", "reference", 12), ("probing", "base", 12), ("probing", "f16", 12),
        ("timing", "subject", 5), ("timing", "f16", 5),
    ]  # fmt: skip
    alone = parts({"subject": False}, pictures=10, probes=40, runs=0)
    assert [(part.what, part.pictures) for part in alone] == [("asking", 30), ("probing", 30)]
    assert list(follow(run, {name: f"/{name}" for name in exports})) == run
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(run) - 1, "behind the last one nothing is left"
    assert lines[0] == "1 of 9 parts done, asking /subject" and lines[-1] == "8 of 9 parts done, timing /subject"


def test_the_prior_is_by_task_and_language() -> None:
    answers = [("side", "en", "Left"), ("side", "en", "left."), ("side", "en", "right"), ("side", "de", "rechts")]
    assert learn_prior(answers) == {("side", "en"): "left", ("side", "de"): "rechts"}


def test_controls_show_another_picture_of_the_same_kind_and_another_group() -> None:
    rows = [
        row("x", image=f"images/{kind}{i}.png", kind=kind, group=f"{kind}{i // 2}")
        for kind, count in (("chest", 6), ("head", 4), ("knee", 1))
        for i in range(count)
    ]
    groups, kinds = {r.image: r.group for r in rows}, {r.image: r.kind for r in rows}
    controls = draw_controls(rows, seed=3)
    for image, wrong in controls.same_kind.items():
        assert wrong != image and groups[wrong] != groups[image]
        assert kinds[wrong] == kinds[image] or kinds[image] == "knee"
    assert sorted(controls.any_kind.values()) == sorted(groups), "every picture is used once"
    assert all(image != wrong for image, wrong in controls.any_kind.items())
    assert controls == draw_controls(rows[::-1], seed=3) != draw_controls(rows, seed=4)
    with pytest.raises(DataError, match="at least two pictures"):
        draw_controls(rows[:1], 0)


def test_a_limit_takes_whole_pictures_of_all_kinds() -> None:
    rows = [row("x", image=f"{kind}{i}", kind=kind, id=f"{kind}{i}{j}")
            for kind in ("a", "b") for i in range(9) for j in range(3)]
    chosen = choose_rows(rows, 12, seed=0)
    assert len(chosen) == 12 and {r.kind for r in chosen} == {"a", "b"}
    assert all(sum(r.image == c.image for r in chosen) == 3 for c in chosen)
    assert len({r.image for r in choose_rows(rows, 1, 0)}) == 2, "the blind control needs two"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain pictures of two kinds, asked for their colour in three languages, once behind another question."""
    out = tmp_path_factory.mktemp("bench") / "data"
    with artifact.create(out, "dataset", {}) as draft, DatasetWriter(draft.path) as writer:
        for i in range(IMAGES):
            english, german, chinese, colour = COLOURS[i % len(COLOURS)]
            stream = io.BytesIO()
            Image.new("RGB", (60 + i, 56), colour).save(stream, "PNG")
            image, digest = writer.add_image(stream.getvalue(), ".png")
            for task, language, asked, answer in (
                ("colour", "en", ("What colour is it?",), english),
                ("red", "de", ("Ist das ein Plan?", "ja", "Ist er rot?"), german),
                ("tone", "zh", ("这是什么颜色？",), chinese),
            ):
                texts = (*asked, answer)
                turns = tuple(Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts))
                writer.add(
                    Row(f"{i}-{task}", image, digest, turns, language, task, "open" if task == "tone" else "closed",
                        "drawn", "CC0-1.0", digest, f"kind {i // len(COLOURS) % 2}", "test" if i < TESTED else "train")
                )
    return out


@pytest.fixture(scope="module")
def merged(tiny: Tiny, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA that learnt all the answers by heart, from the pictures."""
    folder = tiny("llava15", "smollm2")
    front, model = Front.from_hf(folder), load_model(folder, "float32").train()
    dataset = Dataset(data)
    examples = []
    for asked in dataset:
        image = front.image(read_image(dataset.image_path(asked)).rgb)
        messages = conversation(asked.turns[:-1], image)
        prompt, answer = list(front.prompt(messages).ids), list(front.answer_ids(messages, asked.answer))
        pixels = normalise_pixels(torch.from_numpy(image.tiles), front, "cpu")
        examples.append((torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer]), pixels))
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):
        losses = [
            model(input_ids=ids, pixel_values=pixels, labels=labels).loss for ids, labels, pixels in examples
        ]
        loss = torch.stack(losses).mean()
        if loss.item() < 0.02:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    out = tmp_path_factory.mktemp("bench") / "merged"
    with artifact.create(out, "merged", {}) as draft:
        shutil.copytree(folder, draft.path, dirs_exist_ok=True)
        model.save_pretrained(draft.path)
        front.save(draft.path)
    return out


def edited(merged: Path, out: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The same model with its weights changed by `edit`."""
    with artifact.create(out, "merged", {}) as draft:
        shutil.copytree(merged, draft.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        weights = load_file(draft.path / "model.safetensors")
        edit(weights)
        save_file(weights, draft.path / "model.safetensors", {"format": "pt"})
    return out


def cover_its_eyes(weights: dict[str, torch.Tensor]) -> None:
    """An edit after which nothing of the picture reaches the language model."""
    for name, tensor in weights.items():
        if "multi_modal_projector" in name:
            weights[name] = 0 * tensor


def test_bench_of_a_gguf_against_its_merged_model(merged: Path, data: Path, tmp_path: Path) -> None:
    edge = convert(merged, tmp_path / "edge", type_="f16")
    out = bench(edge, data, tmp_path / "report", merged, threads=1, runs=2)
    assert {path.name for path in out.iterdir()} == {"manifest.json", "report.html", "report.json", "samples.jsonl"}
    report = json.loads((out / "report.json").read_text())
    assert list(report) == [
        "schema", "subject", "reference", "dataset", "environment", "vqa", "fidelity", "latency", "calibration",
        "hallucination", "hedging", "ladder",
    ]
    assert report["schema"] == "ldrt-edge/report/1"
    assert report["subject"]["manifest_sha256"] == artifact.read(edge).sha256
    assert report["reference"]["manifest_sha256"] == artifact.read(merged).sha256
    assert report["subject"]["kind"] == "gguf" and len(report["subject"]["weights"]) == 2
    assert report["environment"]["load_average"] and report["environment"]["libraries"]["llama-cpp-python"]

    vqa, interval = report["vqa"], {"value", "ci_low", "ci_high", "n", "clusters"}
    for name in ("overall", "blind", "blind_any", "prior", "reference"):
        assert set(vqa[name]) == {
            "accuracy", "closed_accuracy", "exact_match", "token_f1", "rouge_l", "chrf", "similarity", "truncated"
        }
        assert set(vqa[name]["accuracy"]) == set(vqa[name]["exact_match"]) == interval
    assert set(vqa["by"]) == {"task", "language", "answer_type", "kind", "source"}
    assert vqa["by"]["answer_type"]["closed"]["accuracy"] == vqa["overall"]["closed_accuracy"]
    assert vqa["by"]["answer_type"]["open"]["chrf"] == vqa["overall"]["chrf"]
    assert vqa["overall"]["rouge_l"]["n"] == TESTED and vqa["by"]["answer_type"]["closed"]["rouge_l"] is None
    assert set(vqa["by"]["task"]) == TASKS and set(vqa["by"]["language"]) == {"en", "de", "zh"}
    for part in vqa["by"]["task"].values():
        assert set(part["accuracy"]) == set(part["blind"]["accuracy"]) == interval
    assert set(vqa["loss"]) == interval and set(vqa["flips"]) >= {"rate", "worse", "better"}
    assert vqa["overall"]["accuracy"]["n"] == TESTED * len(TASKS)
    assert vqa["overall"]["accuracy"]["clusters"] == TESTED
    assert vqa["overall"]["token_f1"]["n"] == TESTED
    assert vqa["prior_from"] == "training rows" and vqa["prior"]["closed_accuracy"]["n"] == TESTED * 2
    for name in ("image_gain_test", "loss_test"):
        assert set(vqa[name]) == {"first_only", "second_only", "p_exact", "p_clustered", "p_holm"}
        assert vqa[name]["p_holm"] is None
        for part in vqa["by"]["task"].values():
            assert part[name]["p_clustered"] <= part[name]["p_holm"] <= 1
        assert vqa["by"]["source"]["drawn"][name] == vqa[name], "one source: the whole again, not corrected"
    assert vqa["non_inferiority"]["margin"] == 0.01
    gained = vqa["image_gain_power"]
    assert gained["questions_needed"] > gained["questions"] == TESTED * 3 and gained["clusters"] == TESTED

    assert vqa["reference"]["accuracy"]["value"] == 1, "it learnt them by heart"
    assert vqa["loss"]["value"] == pytest.approx(1 - vqa["overall"]["accuracy"]["value"])
    assert set(report["fidelity"]) >= {"mean_kld", "top1_agreement", "tokens"}
    for name, value in (("mean", "mean_kld"), ("p99", "p99_kld"), ("top1", "top1_agreement")):
        assert set(report["fidelity"][name]) == interval
        assert report["fidelity"][name]["value"] == report["fidelity"][value]
    assert 0 < report["fidelity"]["mean_kld"] < 1e-3 and report["fidelity"]["top1_agreement"] > 0.95

    latency = report["latency"]
    for name in ("image_encode_ms", "prefill_tok_per_s", "ttft_ms", "decode_tok_per_s", "load_ms"):
        assert set(latency[name]) == {"median", "p10", "p90", "runs"} and latency[name]["median"] > 0
    assert latency["ttft_ms"]["runs"] == 2 and latency["threads"] == 1
    assert latency["model_bytes"] == sum(report["subject"]["weights"].values())
    assert 0 < latency["peak_rss_bytes"] < peak_rss_bytes(), "this process holds torch, which must not count"

    samples = read_samples(out / "samples.jsonl")
    right = np.mean([sample.subject.correct for sample in samples])
    assert right == vqa["overall"]["accuracy"]["value"], "the samples carry the report"
    assert sum(len(sample.kld or ()) for sample in samples) == report["fidelity"]["tokens"]
    check_page(out / "report.html", report)
    assert bench(edge, data, tmp_path / "report", merged, threads=1, runs=2) == out, "the same again finds it done"


class _Page(HTMLParser):
    """Collects what a page would fetch, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]
        assert tag not in ("script", "link", "iframe", "object")

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(path: Path, report: dict[str, dict[str, str]]) -> None:
    text = path.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert all(url.startswith("data:image/jpeg") for url in page.fetched), "one file, no network"
    assert "@import" not in text and "url(" not in text
    assert report["environment"]["command"] in page.text
    assert report["subject"]["manifest_sha256"][:16] in page.text
    assert "images/" not in text, "no file names"


def test_the_blind_control_sees_what_the_picture_is_worth(merged: Path, data: Path, tmp_path: Path) -> None:
    seeing = read_samples(bench(merged, data, tmp_path / "seeing", threads=1, runs=0) / "samples.jsonl")
    kinds = {sample.image_sha256: sample.kind for sample in seeing}
    for sample in seeing:
        assert sample.blind and sample.blind_any
        assert sample.subject.image_sha256 == sample.image_sha256 != sample.blind.image_sha256
        assert kinds[sample.blind.image_sha256] == sample.kind
        assert sample.blind_any.image_sha256 != sample.image_sha256
    report = json.loads((tmp_path / "seeing" / "report.json").read_text())
    assert report["vqa"]["overall"]["accuracy"]["value"] == 1
    assert report["vqa"]["blind"]["accuracy"]["value"] < 0.9 and report["vqa"]["image_gain"]["ci_low"] > 0
    assert all(report[name] is None for name in ("reference", "fidelity", "latency"))
    assert report["vqa"]["loss"] is report["vqa"]["flips"] is None

    blindfold = edited(merged, tmp_path / "blindfold", cover_its_eyes)
    samples = read_samples(bench(blindfold, data, tmp_path / "blind", threads=1, runs=0) / "samples.jsonl")
    assert all(sample.blind and sample.subject.text == sample.blind.text for sample in samples)
    report = json.loads((tmp_path / "blind" / "report.json").read_text())
    assert report["vqa"]["overall"]["accuracy"]["value"] == report["vqa"]["blind"]["accuracy"]["value"]
    assert report["vqa"]["image_gain"]["ci_low"] < 0 < report["vqa"]["image_gain"]["ci_high"]
    assert "no proof that it looks at the picture" in (tmp_path / "blind" / "report.html").read_text()


def test_a_damaged_model_shows_as_loss_flips_and_divergence(merged: Path, data: Path, tmp_path: Path) -> None:
    def damage(weights: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in weights.items():
            if "language_model" in name:
                weights[name] = tensor + 0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator)

    damaged = edited(merged, tmp_path / "damaged", damage)
    out = bench(damaged, data, tmp_path / "report", merged, threads=1, runs=0)
    report = json.loads((out / "report.json").read_text())
    flips = report["vqa"]["flips"]
    assert flips["worse"] > 0 == flips["better"], "the reference is right everywhere"
    assert report["vqa"]["loss_test"]["first_only"] == flips["worse"]
    assert report["vqa"]["non_inferiority"]["verdict"] != "non-inferior"
    assert report["vqa"]["loss_power"]["design_effect"] >= 1
    assert flips["worse"] / report["dataset"]["questions"] == pytest.approx(report["vqa"]["loss"]["value"])
    assert report["fidelity"]["mean_kld"] > 0.01
    page = (out / "report.html").read_text()
    assert "right → wrong" in page and "data:image/jpeg" in page
    assert "by more than 1 point" in page or "loses at most 1 point" in page
    assert "To see 1 point of the loss takes about" in page and "McNemar&#39;s test, p by clusters" in page


def test_a_killed_run_goes_on_where_it_stopped(merged: Path, data: Path, tmp_path: Path) -> None:
    dataset, journal = Dataset(data), tmp_path / "samples.jsonl"
    rows = dataset.rows("test")
    controls = draw_controls(rows, 0)
    model = Model(load(merged, threads=1), Front.load(merged))
    whole = answer_rows(model, dataset, rows, controls, journal=journal)
    lines = journal.read_text().splitlines(keepends=True)
    lines[0] = lines[0].replace('"subject": {"text": "', '"subject": {"text": "kept: ')
    journal.write_text("".join(lines[:4]) + lines[4][:50])  # one picture whole, the second begun, a torn line
    again = answer_rows(model, dataset, rows, controls, journal=journal)
    model.runtime.close()
    assert again[0].subject.text == "kept: " + whole[0].subject.text, "what was answered is not asked again"
    assert again[1:] == whole[1:]
    assert read_samples(journal) == again


@pytest.fixture(scope="module")
def babbling(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that learnt nothing and does not stop."""
    folder, out = tiny("llava15", "smollm2"), tmp_path_factory.mktemp("babbling") / "merged"
    with artifact.create(out, "merged", {}) as draft:
        shutil.copytree(folder, draft.path, dirs_exist_ok=True)
        Front.from_hf(folder).save(draft.path)
    return out


def test_the_limit_of_an_answer_tells_nothing_of_the_key(babbling: Path, data: Path) -> None:
    dataset = Dataset(data)
    rows = [row for row in dataset.rows("test") if row.image == dataset.rows("test")[0].image]
    long = [replace(row, turns=(*row.turns[:-1], Turn("assistant", "no other way than this " * 20))) for row in rows]
    model = Model(load(babbling, threads=1), Front.load(babbling))
    for tokens in (6, 40):
        told = answer_rows(model, dataset, rows, answer_tokens=tokens)
        assert [s.subject.text for s in told] == [
            s.subject.text for s in answer_rows(model, dataset, long, answer_tokens=tokens)
        ]
        assert all(sample.subject.truncated for sample in told)
        for row, sample in zip(rows, told, strict=True):
            limit = min(tokens, 24) if row.answer_type == "closed" else tokens
            image = model.front.image(read_image(dataset.image_path(row)).rgb)
            prompt = model.front.prompt(conversation(row.turns[:-1], image))
            given = [token.id for token in model.runtime.generate(prompt, Sampling(max_tokens=limit))]
            assert len(given) == limit and sample.subject.text == model.front.decode(given).strip()
    model.runtime.close()


def test_an_answer_that_the_model_ends_is_not_cut(merged: Path, data: Path, tmp_path: Path) -> None:
    report = json.loads((bench(merged, data, tmp_path / "report", threads=1, runs=0) / "report.json").read_text())
    assert report["vqa"]["overall"]["truncated"]["value"] == 0
    short = bench(merged, data, tmp_path / "short", threads=1, runs=0, answer_tokens=1)
    report = json.loads((short / "report.json").read_text())
    assert report["vqa"]["overall"]["truncated"]["value"] == 1, "also where the model would say the key"
    assert "--answer-tokens 1" in report["environment"]["command"]
    assert artifact.read(short).config["answer_tokens"] == 1
    with pytest.raises(ConfigError, match="--answer-tokens"):
        bench(merged, data, tmp_path / "none", answer_tokens=0)


def test_a_near_tie_is_left_to_what_the_model_generates() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 9)).astype(np.float32)
    target = (4, 2, 7)
    logits[range(3), target] = 9
    sure = _as_expected(target, logits)
    assert sure and [token.id for token in sure] == [4, 2] and all(token.logprob > -0.1 for token in sure)
    for place in range(3):
        for gap, expected in ((GAPS_APART * 1.01, True), (GAPS_APART * 0.99, False), (-1.0, False)):
            near = logits.copy()
            near[place, 0] = 9 - gap
            assert (_as_expected(target, near) is not None) == expected, (place, gap)


def test_the_peer_reads_the_same_files(merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edge = quantize(merged, tmp_path / "edge", "q8")  # stock llama.cpp crashes of it on AMX
    assert peers.main([str(edge), "--threads", "1", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    for name in ("ttft_ms", "prefill_tok_per_s", "decode_tok_per_s"):
        assert found[name]["ratio"] == found[name]["ours"]["median"] / found[name]["peer"]["median"] > 0
    ours, peer = found["prompt_tokens"]
    assert abs(ours - peer) <= 2, "both read the same prompt, but for a space"
    assert any("conversion" in line and "skipped" in line for line in lines)


def test_timing_fails_in_one_line(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeLoadError, match="nowhere: no such folder"):
        measure(tmp_path / "nowhere", data, runs=1)


def test_bench_refuses_what_it_cannot_measure(merged: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--limit"):
        bench(merged, data, tmp_path / "out", limit=0)
    with pytest.raises(ArtifactError, match="holds a dataset"):
        bench(data, data, tmp_path / "out")
    long = tmp_path / "long"
    with artifact.create(long, "dataset", {}) as draft, DatasetWriter(draft.path) as writer:
        for shade in (0, 200):
            stream = io.BytesIO()
            Image.new("RGB", (32, 32), (shade,) * 3).save(stream, "PNG")
            image, digest = writer.add_image(stream.getvalue(), ".png")
            turns = (Turn("user", "How many beams? " * 2000), Turn("assistant", "2"))
            writer.add(Row(f"long {shade}", image, digest, turns, "en", "t", "open", "s", "l", digest, "", "test"))
    with pytest.raises(DataError, match=r"row long 0: .*the model holds"):
        bench(merged, long, tmp_path / "out")
    with pytest.raises(DataError, match="no rows in split 'train'"):
        bench(merged, long, tmp_path / "out", split="train")
    assert not (tmp_path / "out").exists()


def test_reports_about_the_same_questions_stand_side_by_side(merged: Path, data: Path, tmp_path: Path) -> None:
    blindfold = edited(merged, tmp_path / "blindfold", cover_its_eyes)
    seeing = bench(merged, data, tmp_path / "seeing", merged, threads=1, runs=0)
    blind = bench(blindfold, data, tmp_path / "blind", merged, threads=1, runs=0)

    found = compare([seeing, blind])

    assert [column.report for column in found.columns] == ["seeing", "blind"] and found.reference == "merged"
    first, second = found.columns
    assert first.gain is None and second.gain and second.gain_test and second.loss
    assert second.gain.value == pytest.approx(-second.loss.value) and second.gain_test.first_only == 0
    assert second.gain_test.p_holm == second.gain_test.p_clustered
    report = json.loads((blind / "report.json").read_text())
    assert second.score.accuracy.value == report["vqa"]["overall"]["accuracy"]["value"]
    shown = dict(lines(found))
    assert shown["right"][0].startswith("100.0%") and "chrF" in shown and "peak memory" not in shown

    command = ["bench", "compare", str(seeing), str(blind), "--out", str(tmp_path / "both"), "--json"]
    done = CliRunner().invoke(cli, command)
    assert json.loads(done.stdout)["columns"][1]["gain"]["value"] == second.gain.value
    page = _Page()
    page.feed((tmp_path / "both" / "comparison.html").read_text())
    assert page.fetched == [] and "seeing" in page.text and "blindfold" in page.text
    assert artifact.verify(tmp_path / "both", "report").inputs[1].manifest_sha256 == artifact.read(blind).sha256


def test_what_cannot_be_compared_is_refused_with_every_reason(merged: Path, data: Path, tmp_path: Path) -> None:
    whole = bench(merged, data, tmp_path / "whole", merged, threads=1, runs=0)

    def changed(name: str, edit: Callable[[dict[str, Any]], None], keep: int = 999, answer_tokens: int = 256) -> Path:
        """A report as `whole` but for some of what it says of itself."""
        with artifact.create(tmp_path / name, "report", {"answer_tokens": answer_tokens}) as draft:
            report = json.loads((whole / "report.json").read_text())
            edit(report)
            (draft.path / "report.json").write_text(json.dumps(report))
            asked = (whole / "samples.jsonl").read_text().splitlines(keepends=True)
            (draft.path / "samples.jsonl").write_text("".join(asked[:keep]))
        return tmp_path / name

    elsewhere = changed("elsewhere", lambda report: report["dataset"].update(manifest_sha256="0" * 64))
    fewer = changed("fewer", lambda report: None, keep=12)
    graded = changed("graded", lambda report: report["vqa"].update(rules=1))
    cut = changed("cut", lambda report: None, answer_tokens=32)
    held = changed("held", lambda report: report["reference"].update(manifest_sha256="1" * 64))
    free = changed("free", lambda report: report.update(reference=None))
    reseeded = bench(merged, data, tmp_path / "reseeded", merged, threads=1, runs=0, seed=1)
    assert len(compare([whole, free]).columns) == 2, "a report without a reference has no loss to mix"
    for report, reason in (
        (elsewhere, "elsewhere asks another dataset than whole"),
        (fewer, "fewer lacks 12 of the 24 questions of whole"),
        (graded, f"graded was graded by rules 1, whole by rules {RULES}"),
        (cut, "cut's answers were cut after 32 tokens, whole's after 256: bench with the same --answer-tokens"),
        (held, "held has another reference than whole"),
        (reseeded, r"reseeded shows other wrong pictures than whole with \d+ of the 24 questions: the same"),
        (merged, "holds a merged"),
    ):
        with pytest.raises(ArtifactError, match=reason):
            compare([whole, report])
    with pytest.raises(ArtifactError, match=r"another dataset.*lacks 12.*another reference"):
        compare([whole, elsewhere, fewer, held])
    with pytest.raises(ConfigError, match="which reports"):
        compare([whole])


def test_a_load_average_stands_beside_compared_timings(merged: Path, data: Path, tmp_path: Path) -> None:
    edge = convert(merged, tmp_path / "edge")
    timed = bench(edge, data, tmp_path / "timed", limit=4, threads=1, runs=1)
    untimed = bench(edge, data, tmp_path / "untimed", limit=4, threads=1, runs=0)
    found = compare([timed, untimed])
    told = json.loads((timed / "report.json").read_text())["latency"]["load_average"][0]
    assert [column.load_average for column in found.columns] == [told, None]
    assert dict(lines(found))["load average before the timings"] == [f"{told:.2f}", ""]


def test_throughput_goes_on_where_it_was_killed(merged: Path, data: Path, tmp_path: Path) -> None:
    edge, journal = convert(merged, tmp_path / "edge"), tmp_path / "new" / "timings.jsonl"
    whole = throughput(edge, data, limit=12, threads=1, journal=journal)
    lines_of = journal.read_text().splitlines(keepends=True)
    assert len(lines_of) == whole.pictures == 4 and whole.questions == 12
    taken = [json.loads(line)["gave"]["seconds"]["alone"] for line in lines_of]
    assert whole.alone_per_min == pytest.approx(60 * 12 / sum(taken)), "loading is in no rate"
    assert throughput(edge, data, limit=12, threads=1, journal=journal) == whole, "all of it is known"

    journal.write_text("".join(lines_of[:2]) + lines_of[2][:40])  # killed while it wrote
    again = throughput(edge, data, limit=12, threads=1, journal=journal)
    assert journal.read_text().splitlines(keepends=True)[:2] == lines_of[:2]
    retaken = [json.loads(line)["gave"]["seconds"]["alone"] for line in journal.read_text().splitlines()]
    assert len(retaken) == 4 and retaken[:2] == taken[:2]
    assert again.alone_per_min == pytest.approx(60 * 12 / sum(retaken))
    throughput(edge, data, limit=12, threads=1, branches=2, journal=journal)
    assert len(journal.read_text().splitlines()) == 8, "another setting is another measurement"

    done = CliRunner().invoke(
        cli, ["bench", "throughput", str(edge), "--data", str(data), "--limit", "12", "--threads", "1",
              "--journal", str(journal)]
    )  # fmt: skip
    least, most = again.load_average
    assert f"load average {least:.2f} to {most:.2f}" in done.output
    assert f"{again.side_by_side_identical} of 12 answers identical to those alone" in done.output.splitlines()[3]


@pytest.mark.parametrize(
    "command", ["measure x --data y", "judge x --judge y", "throughput x --data y", "learnable x --data y"]
)
def test_a_seed_below_zero_is_refused(command: str) -> None:
    done = CliRunner().invoke(cli, ["bench", *command.split(), "--seed", "-1"])
    assert done.exit_code == 2 and "--seed" in done.output and "x>=0" in done.output


@pytest.mark.parametrize("margin", [0.0, float("nan"), float("inf")])
def test_a_margin_that_is_none_is_refused_before_anything_is_asked(tmp_path: Path, margin: float) -> None:
    with pytest.raises(ConfigError, match="--margin wants"):
        bench(tmp_path / "edge", tmp_path / "data", tmp_path / "out", margin=margin)
