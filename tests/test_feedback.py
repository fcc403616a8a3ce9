"""Errors of rounding fed back: the best other weights can do, stock files, and less lost on questions not seen."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
import pytest
import tiny as builders

from ldrt_edge import artifact
from ldrt_edge.bench.held_out import ask
from ldrt_edge.convert import moments as moments_module
from ldrt_edge.convert.calibration import Calibration
from ldrt_edge.convert.exports import open_export
from ldrt_edge.convert.faults import _tensor_fault
from ldrt_edge.convert.feedback import Compensated, Rounding, compensated, gains
from ldrt_edge.convert.format import Format
from ldrt_edge.convert.gradients import gradients, linears, prompts
from ldrt_edge.convert.mlx import Mlx
from ldrt_edge.convert.moments import Moments, measure
from ldrt_edge.convert.planned import quantize_planned
from ldrt_edge.convert.quantize import Gguf
from ldrt_edge.convert.rounding import round_ggml
from ldrt_edge.convert.source import open_source
from ldrt_edge.convert.type_plan import TypePlan, block_weights
from ldrt_edge.dataset import Dataset
from ldrt_edge.fidelity import compare_logits
from ldrt_edge.front import Front
from ldrt_edge.runtimes.base import load
from ldrt_edge.runtimes.hf import HfRuntime
from ldrt_edge.train.data.phantom import phantom


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom(tmp_path_factory.mktemp("data") / "phantom", 8, 0, test_fraction=0.5, languages=("en",))


def correlated(width: int) -> np.ndarray:
    inputs = np.random.default_rng(0).normal(size=(400, 6)) @ np.random.default_rng(1).normal(size=(6, width))
    return (inputs.T @ inputs / 400 + 0.05 * np.eye(width)).astype(np.float32)


def test_the_weights_behind_do_the_best_they_can() -> None:
    moments, values = correlated(12), np.random.default_rng(2).normal(size=(5, 12)).astype(np.float32)
    nothing = Rounding(4, lambda rows, columns: rows[:, columns] * (columns.start > 0))

    changed = compensated(values, gains(moments, 4), nothing)

    damped = moments + 0.01 * np.trace(moments) / 12 * np.eye(12)
    lost = values[:, :4]  # all of the first block, and nothing of the others
    best = np.linalg.solve(damped[4:, 4:], damped[4:, :4]) @ lost.T
    np.testing.assert_allclose(changed[:, 4:], values[:, 4:] + best.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(changed[:, :4], values[:, :4])


@pytest.mark.parametrize(("to", "type_", "block"), [(Mlx(), "affine-4-g32", 32), (Gguf(), "Q4_0", 32)])
def test_what_was_changed_rounds_to_what_does_less_damage(to: Format, type_: str, block: int) -> None:
    moments, values = correlated(128), np.random.default_rng(2).normal(size=(64, 128)).astype(np.float32)
    rounding = Rounding(block, lambda rows, columns: to.rounded("any", rows, type_, columns))

    plain = to.rounded("any", values, type_) - values
    fed = to.rounded("any", compensated(values, gains(moments, block), rounding), type_) - values

    damage = [float(np.einsum("ri,ij,rj", error, moments, error)) for error in (plain, fed)]
    assert damage[1] < 0.5 * damage[0]


@pytest.mark.parametrize("type_", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q4_K", "Q6_K"])
def test_a_block_rounds_as_in_its_row(type_: str) -> None:
    """With an importance some types look at the whole row: a block of it alone would be rounded otherwise."""
    rng, block = np.random.default_rng(3), block_weights(type_)
    rows = (rng.normal(size=(48, 512)) * rng.lognormal(0, 1, (48, 1)) * rng.lognormal(0, 0.7, 512)).astype(np.float32)
    importance = rng.lognormal(0, 2, 512).astype(np.float32)

    whole = round_ggml(rows, type_, importance)
    pieces = [round_ggml(rows, type_, importance, slice(i, i + block)) for i in range(0, 512, block)]

    same = (np.concatenate(pieces, axis=1) == whole).reshape(48, -1, block).all(axis=2)
    assert same.mean() > 0.98, "all but ties; alone, half to three quarters of them differ"
    with pytest.raises(ValueError, match="importances"):
        round_ggml(rows, type_, importance[:256])


@pytest.mark.parametrize("type_", ["Q4_0", "Q5_0"])
def test_feedback_reckons_with_the_rounding_that_a_file_gets(type_: str) -> None:
    rng = np.random.default_rng(2)
    values = (rng.normal(size=(64, 256)) * rng.lognormal(0, 0.7, 256)).astype(np.float32)
    moments = correlated(256) * np.outer(*2 * [rng.lognormal(0, 1, 256)])
    importance = np.diag(moments).astype(np.float32)

    def alone(rows: np.ndarray, columns: slice) -> np.ndarray:
        return round_ggml(np.ascontiguousarray(rows[:, columns]), type_, importance[columns])

    damage = []
    for rounded in (alone, lambda rows, columns: round_ggml(rows, type_, importance, columns)):
        changed = compensated(values, gains(moments, 32), Rounding(32, rounded))
        error = round_ggml(changed, type_, importance) - values
        damage.append(float(np.einsum("ri,ij,rj", error, moments, error)))
    assert damage[1] < 0.9 * damage[0]


def test_moments_are_the_same_in_any_number_of_passes(
    tiny: builders.Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, rows = open_source(tiny("llava15", "smollm2")), Calibration(data, limit=8).rows()
    measure(source, data, rows, tmp_path / "one")
    monkeypatch.setattr(moments_module, "_MEMORY_SHARE", 0)
    measure(source, data, rows, tmp_path / "many")

    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "language_model.embed_tokens.weight.npy" in files, "the tied table is the head too"
    assert files == sorted(path.name for path in (tmp_path / "many").iterdir())
    for name in files:
        one, many = np.load(tmp_path / "one" / name), np.load(tmp_path / "many" / name)
        np.testing.assert_allclose(one, many, rtol=1e-3, atol=1e-5 * one.max())
        assert (np.diag(one) >= 0).all() and np.allclose(one, one.T, rtol=1e-3, atol=1e-5 * one.max())


def test_moments_weigh_inputs_by_what_answers_depend_on(tiny: builders.Tiny, data: Path, tmp_path: Path) -> None:
    merged, rows = tiny("llava15", "llama"), Calibration(data, limit=8).rows()
    name, expected, seen = "language_model.layers.0.mlp.down_proj.weight", 0.0, []
    runtime = HfRuntime(merged)
    asked = prompts(runtime, data, rows)
    with linears(runtime, {name: name}, lambda _, inputs, gradient: seen.append((inputs.numpy(), gradient.numpy()))):
        deque(gradients(runtime, asked, 0, "gradients"), maxlen=0)
    runtime.close()
    for inputs, gradient in seen:
        expected = expected + (inputs.T * 0.5 * (gradient**2).sum(1)) @ inputs

    found = measure(open_source(merged), data, rows, tmp_path)[name]
    expected = expected / sum(len(answer) for _, answer in asked)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * found.max())


def test_rows_are_changed_alike_one_by_one(tiny: builders.Tiny, tmp_path: Path) -> None:
    source, name = open_source(tiny("llava15", "llama")), "language_model.layers.0.mlp.down_proj.weight"
    width = source.weights.entries[name].shape[1]
    np.save(tmp_path / "H.npy", correlated(width))
    rounding = Rounding(32, lambda rows, columns: Gguf().rounded(name, rows, "Q4_0", columns))
    weights = Compensated(source.weights, Moments({name: tmp_path / "H.npy"}), {name: rounding})

    whole = weights.read(name)
    np.testing.assert_allclose(weights.read(name, slice(3, 5)), whole[3:5], rtol=1e-5, atol=1e-7)
    assert np.abs(whole - source.weights.read(name)).max() > 0
    other = "language_model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(weights.read(other), source.weights.read(other))


def test_parity_lets_feedback_move_weights_farther(tiny: builders.Tiny, data: Path, tmp_path: Path) -> None:
    """Where inputs are few, as in a first layer, eight bits with feedback move a matrix by more than a hundredth."""
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 256)) * np.geomspace(30, 1, 256)
    moments = (inputs.T @ inputs).astype(np.float32)
    values = (rng.normal(size=(64, 256)) * rng.lognormal(0, 1.0, (64, 256))).astype(np.float32)
    rounding = Rounding(32, lambda rows, columns: round_ggml(rows, "Q8_0", None, columns))
    plain = round_ggml(values, "Q8_0", None)
    fed = round_ggml(compensated(values, gains(moments, 32), rounding), "Q8_0", None)
    assert not _tensor_fault(values, plain, 8.5, fed_back=False)
    assert _tensor_fault(values, fed, 8.5, fed_back=False) and not _tensor_fault(values, fed, 8.5, fed_back=True)

    eight = TypePlan("gguf", {"model": {"*": "Q8_0"}, "mmproj": {"*": "F16"}})
    for name, to in (("plain", Gguf()), ("fed", Gguf(calibration=Calibration(data, feedback=True, limit=1)))):
        merged = tiny("llava15", "llama")
        out = quantize_planned(merged, tmp_path / name, eight, to)
        assert open_export(out, Front.load(merged)).fed_back == (name == "fed")


@pytest.mark.parametrize(("to", "type_"), [("mlx", "affine-4-g64"), ("gguf", "Q4_0")])
def test_less_is_lost_on_questions_that_were_not_seen(
    tiny: builders.Tiny, data: Path, tmp_path: Path, to: str, type_: str
) -> None:
    merged = tiny("llava15", "llama", hidden=256)
    asked = ask(Front.load(merged), Dataset(data), None, 0, {})
    vision = {"vision": {"*": "f16"}} if to == "mlx" else {"mmproj": {"*": "F16"}}
    plan = TypePlan("mlx" if to == "mlx" else "gguf", {"model": {"*": type_}, **vision})
    given = (None, Calibration(data, feedback=True, limit=16))
    formats: list[Format] = [Mlx(fed) if to == "mlx" else Gguf(calibration=fed) for fed in given]
    folders = [quantize_planned(merged, tmp_path / str(i), plan, one) for i, one in enumerate(formats)]

    logits = []
    for runtime in (HfRuntime(merged, threads=1), *(load(folder, threads=1) for folder in folders)):
        logits.append(np.concatenate([runtime.score(question.prompt, question.answer) for question in asked]))
        runtime.close()

    plain, less = (float(compare_logits(logits[0], other).kld.mean()) for other in logits[1:])
    assert less < 0.85 * plain
    manifests = [artifact.verify(folder, to) for folder in folders]
    assert manifests[0].metrics["quantized"] == manifests[1].metrics["quantized"], "the same types in as many bytes"
    assert manifests[1].config["feedback"] == "16" and len(manifests[1].inputs) == len(manifests[0].inputs) + 1
    assert not list(tmp_path.rglob("*.npy"))
