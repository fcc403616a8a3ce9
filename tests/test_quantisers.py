"""Quantisers side by side: equal bytes, numbers from real files, steps that are done once and cost what they cost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import psutil
import pytest
import tiny as builders
from gguf import GGUFReader, dequantize
from PIL import Image
from safetensors.torch import load_file, save_file

from ldrt_edge import artifact
from ldrt_edge.bench import autoround, held_out, mlx_awq, quantisers_run, subjects
from ldrt_edge.bench.held_out import ask
from ldrt_edge.bench.quantisers import compare, main
from ldrt_edge.bench.statistics import paired_ratio
from ldrt_edge.bench.steps import Cost, Journal, apart
from ldrt_edge.convert import mlx
from ldrt_edge.convert.calibration import Calibration
from ldrt_edge.convert.importance import imatrix_path, importance, read_imatrix
from ldrt_edge.convert.mlx import Mlx
from ldrt_edge.convert.probes import probes
from ldrt_edge.convert.quantize import Gguf, quantize
from ldrt_edge.dataset import Dataset, DatasetWriter
from ldrt_edge.errors import ArtifactError, DataError
from ldrt_edge.fidelity import compare_logits
from ldrt_edge.front import Front
from ldrt_edge.runtimes.hf import HfRuntime
from ldrt_edge.runtimes.llamacpp import LlamaCppRuntime
from ldrt_edge.runtimes.mlx import MlxRuntime
from ldrt_edge.train.data.phantom import phantom

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom(tmp_path_factory.mktemp("data") / "phantom", 8, 0, test_fraction=0.5, languages=("en",))


def test_a_ratio_is_paired_and_its_interval_knows_clusters() -> None:
    rng = np.random.default_rng(0)
    pictures = np.repeat(np.arange(40), 6)
    hard = rng.lognormal(0, 1.5, 40)[pictures]  # one picture's tokens are hard together
    theirs = hard * rng.lognormal(0, 0.2, 240)
    ours = 0.5 * hard * rng.lognormal(0, 0.2, 240)

    found = paired_ratio(ours.tolist(), theirs.tolist(), pictures.tolist())
    mean = paired_ratio(theirs.tolist(), [1.0] * 240, pictures.tolist())
    by_row = paired_ratio(theirs.tolist(), [1.0] * 240, list(range(240)))

    assert found.value == pytest.approx(ours.sum() / theirs.sum())
    assert (found.n, found.clusters) == (240, 40)
    assert found.ci_low < 0.5 < found.ci_high and found.ci_high - found.ci_low < 0.1
    assert mean.value == pytest.approx(theirs.mean())
    assert mean.ci_high - mean.ci_low > 1.5 * (by_row.ci_high - by_row.ci_low)
    assert (mean.ci_high - mean.ci_low) / mean.value > 3 * (found.ci_high - found.ci_low) / found.value
    with pytest.raises(ValueError, match="sum of 0"):
        paired_ratio([1.0], [0.0], [0])


def test_a_step_is_done_once_and_half_a_line_is_done_again(tmp_path: Path) -> None:
    path, done = tmp_path / "journal.jsonl", []

    def work() -> int:
        done.append(len(done))
        return done[-1]

    journal = Journal(path)
    assert [journal.once({"a": 1}, work), journal.once({"a": 1}, work), journal.once({"a": 2}, work)] == [0, 0, 1]
    assert Journal(path).once({"a": 2}, work) == 1
    assert Journal(path).once({"a": 2}, work, kept=tmp_path / "gone") == 2
    path.write_bytes(path.read_bytes()[:-5])
    assert Journal(path).once({"a": 2}, work) == 1, "the line that a killed run did not end is not counted"
    assert Journal(path).once({"a": 3}, work) == 3
    assert [json.loads(line)["key"]["a"] for line in path.read_text().splitlines()] == [1, 2, 3]
    path.write_text("no journal\n")
    with pytest.raises(DataError, match="no journal of steps"):
        Journal(path)


def test_each_step_has_its_own_peak_of_memory() -> None:
    middle, much = apart((), median, range(6_000_001))  # sorted into a list: 8 bytes a place, 32 a number
    _, little = apart((), median, range(3))
    assert middle == 3_000_000
    assert much.peak_bytes - much.idle_bytes > 200 << 20
    assert little.peak_bytes - little.idle_bytes < 50 << 20
    assert Cost(2.0, 300, 100).scaled(3) == Cost(6.0, 700, 100)


def test_pictures_that_are_asked_about_are_not_calibrated_on(
    tiny: builders.Tiny, data: Path, tmp_path: Path
) -> None:
    front, dataset, same = Front.load(tiny("llava15", "llama")), Dataset(data), tmp_path / "same"
    with artifact.create(same, "dataset", {}) as draft, DatasetWriter(draft.path) as writer:
        for row in dataset:
            image, _ = writer.add_image(dataset.image_path(row).read_bytes(), ".png")
            writer.add(replace(row, image=image, split="train"))
    assert ask(front, dataset, None, 0, {"own": data})
    with pytest.raises(DataError, match=r"--calibration other: .* trains on pictures that are asked about"):
        ask(front, dataset, None, 0, {"own": data, "other": same})


def test_what_a_stopped_run_left_is_no_other_runs(tiny: builders.Tiny, data: Path, tmp_path: Path) -> None:
    """Its full-precision file, or moments, are of one model, data set, number of rows and seed."""
    first, second = tiny("llava15", "llama"), tmp_path / "second"
    shutil.copytree(first, second)
    weights = {name: 2 * value if "up_proj" in name else value for name, value in load_file(second / WEIGHTS).items()}
    save_file(weights, second / WEIGHTS, {"format": "pt"})
    more = phantom(tmp_path / "more", 4, 1, test_fraction=0.5, languages=("en",))

    def run(merged: Path, calibration: Path = data, rows: int = 4, seed: int = 0) -> quantisers_run.Run:
        given = subjects.GgufSubjects(merged, tmp_path / "out" / "work")
        return quantisers_run.Run(given, merged, data, tmp_path / "out", {"own": calibration}, [], 4, rows, 4, seed, 1)

    def made(merged: Path) -> Any:
        to, out = Gguf(), tmp_path / "out"
        with subjects.planned(merged, to, {"*": "Q8_0"}, out / "subject", run(merged)._work(to)) as subject:
            [tensor] = [
                t for t in GGUFReader(subject.folder / "model-PLANNED.gguf").tensors if t.name == "blk.0.ffn_up.weight"
            ]
            return dequantize(tensor.data, tensor.tensor_type)

    (tmp_path / "out").mkdir()
    np.testing.assert_allclose(made(second), 2 * made(first), rtol=0.02, atol=1e-3)

    def fitted(merged: Path, calibration: Path = data, rows: int = 4, seed: int = 0) -> Path:
        to = Mlx(Calibration(calibration, feedback=True, limit=rows, seed=seed))
        return run(merged, calibration, rows, seed)._work(to)

    folders = [fitted(first), fitted(second), fitted(first, more), fitted(first, rows=8), fitted(first, seed=1)]
    assert len(set(folders)) == 5 and fitted(first) == folders[0]


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (["--bases", "Q4_K_M,IQ2_XXS"], "--bases 'IQ2_XXS': choose one of"),  # needs an importance matrix
        (["--weightings", "all"], "--weightings 'all': choose one of pooled, balanced, answer"),
        (["--ways", "awq"], "--ways 'awq': choose one of rescale, feedback"),
        (["--calibration", "phantom"], "--calibration NAME=DATASET: not phantom"),
        (["--other", "theirs=gone.gguf"], "--other theirs=gone.gguf: with --to gguf this is a GGUF file"),
        (["--to", "mlx", "--other", f"theirs={__file__}"], "with --to mlx this is an MLX folder"),
    ],
)
def test_wrong_options_are_one_line(
    tiny: builders.Tiny, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str], told: str
) -> None:
    merged = tiny("llava15", "llama")
    capsys.readouterr()  # what its making said
    assert main([str(merged), "--data", str(data), "--out", str(tmp_path / "out"), *option]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and told in said[0]


def test_text_importance_sees_no_picture(tiny: builders.Tiny, data: Path, tmp_path: Path) -> None:
    merged = tiny("llava15", "llama")
    whole = importance(merged, data, tmp_path / "whole", limit=8)
    text = importance(merged, data, tmp_path / "text", limit=8, pictures=False)

    counts = [artifact.read(folder).metrics["tokens"] for folder in (whole, text)]
    assert counts[0]["vision"] > 0 == counts[1]["vision"]
    assert counts[0]["answer"] == counts[1]["answer"]
    means = [read_imatrix(imatrix_path(folder, "pooled")) for folder in (whole, text)]
    assert {name for name in means[0] if name.startswith(("v.", "mm."))} == means[0].keys() - means[1].keys()
    assert not np.allclose(means[0]["blk.0.attn_q.weight"], means[1]["blk.0.attn_q.weight"], rtol=0.05)


def test_mlx_lms_awq_is_a_peer(tiny: builders.Tiny, data: Path, tmp_path: Path) -> None:
    merged, out = tiny("llava15", "llama", hidden=128), tmp_path / "awq"
    assert mlx_awq.main([str(merged), "--data", str(data), "--out", str(out), "--tokens", "1100"]) == 0

    plain = mlx.quantize(merged, tmp_path / "q4", "q4")
    stored = [mx.load(str(folder / "model.safetensors")) for folder in (plain, out)]
    shapes = [{name: array.shape for name, array in arrays.items()} for arrays in stored]
    assert shapes[0] == shapes[1]
    assert (out / "config.json").read_text() == (plain / "config.json").read_text()
    with subjects.MlxSubjects(merged, tmp_path).given(out) as subject:
        assert subject.stored.bits_per_weight == artifact.read(plain).metrics["quantized"]["bits_per_weight"]
        assert 0.9 < subject.matrix_bytes / subject.stored.bytes < 1
    [prompt, answer], *_ = probes(Front.load(merged), 1)
    logits = [subjects.unpacked(merged, folder, 1).score(prompt, answer) for folder in (plain, out)]
    assert 0 < np.abs(logits[0] - logits[1]).max() < 20
    assert mlx_awq.main([str(merged), "--data", str(data), "--out", str(tmp_path / "no"), "--tokens", "9"]) == 1


def test_autoround_is_a_peer(tiny: builders.Tiny, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("auto_round", reason="AutoRound is no dependency: pip install auto-round")
    merged, out = tiny("llava15", "llama", hidden=256), tmp_path / "autoround.gguf"
    words = [str(merged), "--data", str(data), "--tokens", "1100", "--iterations", "2", "--out"]
    assert autoround.main([*words, str(out)]) == 0
    with subjects.GgufSubjects(merged, tmp_path / "work").given(out) as subject:
        assert 4 < subject.stored.bits_per_weight < 9
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["autoround.gguf"], "nothing is left over"


def test_peers_that_are_not_there_or_have_nothing_to_read_are_told(
    tiny: builders.Tiny, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(tiny("llava15", "llama")), "--data", str(data), "--tokens", "9", "--out", str(tmp_path / "no.gguf")]
    monkeypatch.setitem(sys.modules, "auto_round", None)
    assert autoround.main(words) == 1
    monkeypatch.setitem(sys.modules, "auto_round", ModuleType("auto_round"))
    assert autoround.main(words) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "pip install auto-round" in said[0] and "tokens of text" in said[1]


@pytest.mark.slow
def test_quantisers_side_by_side(
    tiny: builders.Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    merged, out = tiny("llava15", "llama", hidden=256), tmp_path / "out"
    given: dict[str, Any] = {"calibration_rows": 16, "sensitivity_rows": 8, "threads": 1}
    given |= {"ways": ["both", "plan", "plan+both"]}

    found = compare(merged, data, out, "gguf", ["Q4_K_M"], ["balanced"], **given)

    by_family = {result.family: result for result in found.results}
    assert list(by_family) == ["none", "text", "balanced", "both", "plan", "plan+both"]
    none, plan = by_family["none"], by_family["plan"]
    assert all(0.99 <= result.bytes_ratio <= 1.01 for result in found.results)
    assert len(plan.types) > len(none.types) and plan.kld_to_none.ci_high < 0.8
    assert plan.kld_to_text is not None and plan.kld_to_text.value == pytest.approx(
        plan.kld.value / by_family["text"].kld.value
    )
    assert none.kld_to_none.value == 1 and none.kld_to_text is None

    edge = quantize(merged, tmp_path / "q4", "Q4_K_M")  # the same by the product's own way
    asked = ask(Front.load(merged), Dataset(data), None, 0, {})
    scores = []
    for runtime in (HfRuntime(merged, threads=1), LlamaCppRuntime(edge, threads=1)):
        scores.append([runtime.score(question.prompt, question.answer) for question in asked])
        runtime.close()
    kld = np.concatenate([compare_logits(*pair).kld for pair in zip(*scores, strict=True)])
    assert none.bytes == (edge / "model-Q4_K_M.gguf").stat().st_size
    assert none.kld.value == pytest.approx(kld.mean(), rel=1e-3)
    assert (found.questions, found.tokens) == (len(asked), len(kld))

    costs = {step.name: step.cost for step in found.steps}
    assert list(costs) == [
        "quantisation", "importance, text", "importance", "rescale+feedback", "sensitivity", "allocation"
    ]  # fmt: skip
    assert costs["sensitivity"].seconds > costs["importance"].seconds > 0
    assert all(cost.peak_bytes >= cost.idle_bytes > 0 for cost in costs.values())
    written = json.loads((out / "quantisers-gguf.json").read_text())
    assert [result["kld"]["value"] for result in written["results"]] == [r.kld.value for r in found.results]
    assert str(tmp_path) not in (out / "quantisers-gguf.json").read_text()
    with Image.open(out / "quantisers-gguf.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24) or ()) > 50
    assert not list(out.rglob("*.gguf.part")) and not (out / "work").exists(), "subjects are deleted"

    theirs = edge / "model-Q4_K_M.gguf"
    beside = compare(merged, data, out, "gguf", ["Q4_K_M"], ["balanced"], others={"theirs": theirs}, **given)
    assert beside.results[: len(found.results)] == found.results
    other, *ours = beside.results[len(found.results) :]
    assert (other.base, other.family, other.bytes) == ("theirs", "other", none.bytes)
    assert other.kld == none.kld and other.kld_to_none.value == 1
    assert [(one.base, one.family) for one in ours] == [("theirs", "plan"), ("theirs", "plan+both")]
    assert [one.kld for one in ours] == [plan.kld, by_family["plan+both"].kld], "as large, so the same plan"

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    for module in (quantisers_run, held_out, subjects):
        monkeypatch.setattr(module, "apart", refuse)
    assert compare(merged, data, out, "gguf", ["Q4_K_M"], ["balanced"], **given) == found
    with pytest.raises(AssertionError, match="measured again"):
        compare(merged, data, out, "gguf", ["Q4_K_M"], ["balanced", "answer"], **given)
    command = [merged, "--data", data, "--out", out, "--bases", "Q4_K_M", "--weightings", "balanced"]
    options = ["--calibration-rows", 16, "--sensitivity-rows", 8, "--threads", 1, "--ways", "both,plan,plan+both"]
    capsys.readouterr()
    assert main([str(word) for word in [*command, *options]]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == str(out / "quantisers-gguf.json")
    assert any(line.startswith("Q4_K_M plan phantom") for line in told)


@pytest.mark.slow
def test_mlx_side_by_side(tiny: builders.Tiny, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged, out = tiny("llava15", "llama", hidden=256), tmp_path / "out"
    command = [merged, "--to", "mlx", "--bases", "q4", "--data", data, "--out", out, "--sensitivity-rows", 8]
    command += ["--calibration-rows", 16, "--ways", "rescale,both,plan,plan+both"]

    assert main([str(word) for word in command]) == 0

    told = capsys.readouterr().out.splitlines()
    assert told[-1] == str(out / "quantisers-mlx.json") and (out / "quantisers-mlx.png").stat().st_size > 10_000
    none, rescaled, both, plan, fed = json.loads((out / "quantisers-mlx.json").read_text())["results"]
    families = [one["family"] for one in (none, rescaled, both, plan, fed)]
    assert families == ["none", "rescale", "both", "plan", "plan+both"]
    assert rescaled["bytes"] == both["bytes"] == none["bytes"] and both["kld"]["value"] < 0.9 * none["kld"]["value"]
    assert 0.99 <= plan["bytes_ratio"] <= 1 and fed["bytes"] == plan["bytes"]
    assert fed["kld"]["value"] < 0.9 * plan["kld"]["value"]
    assert len(plan["types"]) > len(none["types"]) and plan["kld_to_none"]["ci_high"] < 0.9
    assert plan["kld_to_text"] is None

    edge = mlx.quantize(merged, tmp_path / "q4", "q4")  # the same by the product's own way
    asked = ask(Front.load(merged), Dataset(data), None, 0, {})
    scores = []
    for runtime in (HfRuntime(merged, threads=1), MlxRuntime(edge)):
        scores.append([runtime.score(question.prompt, question.answer) for question in asked])
        runtime.close()
    kld = np.concatenate([compare_logits(*pair).kld for pair in zip(*scores, strict=True)])
    assert none["kld"]["value"] == pytest.approx(kld.mean(), rel=1e-3)


def test_a_step_that_is_killed_is_one_line() -> None:
    with pytest.raises(ArtifactError, match="a step was killed"):
        apart((), os.abort)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("step", ["time.sleep(1)", "time.sleep(600)", "while True: pass"])
def test_a_step_ends_with_the_run_that_wanted_it(tmp_path: Path, number: int, step: str) -> None:
    """However it was killed, whatever the step does: none computes or holds memory beside the next start's."""
    told = tmp_path / "pid"
    work = f"import os, pathlib, time\npathlib.Path({str(told)!r}).write_text(f'{{os.getpid()}}\\n')\n{step}"
    command = f"from ldrt_edge.bench.steps import apart; apart((), exec, {work!r})"
    run = subprocess.Popen([sys.executable, "-c", command])
    deadline = time.monotonic() + 120
    while not (told.is_file() and told.read_text().endswith("\n")):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    worker = psutil.Process(int(told.read_text()))
    run.send_signal(number)
    assert run.wait() == -number
    with suppress(psutil.NoSuchProcess):
        while worker.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                worker.kill()
                pytest.fail("it outlives its run")
            time.sleep(0.01)


def test_a_journal_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(DataError, match="no journal of steps"):
        Journal(tmp_path / "journal.jsonl")


def test_numbers_and_names_are_checked_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main([*words, "--questions", "0"])
    assert "want at least 1" in capsys.readouterr().err
    assert main([*words, "--calibration", "a=x", "--calibration", "a=y"]) == 1
    assert "a NAME of its own" in capsys.readouterr().err
