"""Weights fitted in the way that loses least: every way is tried, on pictures that none was fitted to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny as builders
from click.testing import CliRunner

from ldrt_edge import artifact
from ldrt_edge.cli import cli
from ldrt_edge.convert import budget, fit
from ldrt_edge.convert.budget import quantize_to_budget
from ldrt_edge.convert.calibration import Calibration
from ldrt_edge.convert.fit import WAYS
from ldrt_edge.convert.format import Format
from ldrt_edge.convert.gradients import Asked, questions
from ldrt_edge.convert.mlx import Mlx
from ldrt_edge.convert.parity import parity
from ldrt_edge.convert.planned import quantize_planned
from ldrt_edge.convert.quantize import Gguf
from ldrt_edge.convert.rescale import SCALES
from ldrt_edge.convert.source import open_source
from ldrt_edge.convert.type_plan import TypePlan
from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import DataError
from ldrt_edge.fidelity import compare_logits
from ldrt_edge.release import Verdict
from ldrt_edge.runtimes.base import FloatArray, Runtime, load
from ldrt_edge.runtimes.hf import HfRuntime
from ldrt_edge.train.data.phantom import phantom

FORMATS: list[Format] = [Gguf(), Mlx()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom(tmp_path_factory.mktemp("data") / "phantom", 8, 0, test_fraction=0.25, languages=("en",))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose norms make some inputs much larger than others, so that there is something to fit."""
    return builders.uneven(tmp_path_factory.mktemp("uneven") / "model")


def files(folder: Path) -> dict[str, str]:
    """The sha256 of an artefact's files of weights and scales."""
    weights = (".gguf", ".safetensors", ".npz")
    return {f.path: f.sha256 for f in artifact.verify(folder).files if f.path.endswith(weights)}


PLANS = [
    TypePlan("gguf", {"model": {"*": "Q4_0"}, "mmproj": {"*": "F16"}}),
    TypePlan("mlx", {"model": {"*": "affine-6-g64"}, "vision": {"*": "f16"}}),
]


@pytest.mark.parametrize(("to", "plan"), list(zip(FORMATS, PLANS, strict=True)), ids=["gguf", "mlx"])
def test_what_loses_least_is_kept(to: Format, plan: TypePlan, uneven: Path, data: Path, tmp_path: Path) -> None:
    few = Calibration(data, limit=8, threads=1)
    made = quantize_planned(uneven, tmp_path / "fit", plan, to.fitted_by(replace(few, undecided=True)))
    told = artifact.verify(made).metrics["fit"]
    assert told["mean_kld"].keys() == WAYS.keys() and told["kept"] == min(told["mean_kld"], key=told["mean_kld"].get)
    assert told["mean_kld"][told["kept"]] < 0.8 * told["mean_kld"]["none"]

    runtime = HfRuntime(uneven, threads=1)
    asked = questions(runtime, data, fit.QUESTIONS, 0, but=few.rows())
    shown = {row.image_sha256 for row in Dataset(data).rows("train")} - {row.image_sha256 for row in few.rows()}
    assert shown and len(asked) == sum(row.image_sha256 in shown for row in Dataset(data).rows("train"))
    expected = score(runtime, asked)
    for name, (rescale, feedback) in WAYS.items():
        way = Calibration(data, rescale, feedback, limit=8, threads=1) if name != "none" else None
        alone = quantize_planned(uneven, tmp_path / name, plan, to.fitted_by(way))
        given = score(load(alone, threads=1), asked)
        assert told["mean_kld"][name] == pytest.approx(compare_logits(expected, given).kld.mean(), rel=0.02)
        assert (files(alone) == files(made)) == (name == told["kept"])
    [pair] = parity(uneven, [made])
    assert pair.stage is None


def score(runtime: Runtime, asked: Sequence[Asked]) -> FloatArray:
    try:
        return np.concatenate([runtime.score(prompt, answer) for prompt, answer in asked])
    finally:
        runtime.close()


@pytest.mark.parametrize("best", WAYS)
def test_any_way_can_win(
    best: str, tiny: builders.Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the search too, whose candidates are all fitted so."""
    monkeypatch.setattr(budget, "BITS", (8.5, 6.0))
    losses = iter([0.1 if name == best else 0.2 for name in WAYS])
    monkeypatch.setattr(fit, "_mean_kld", lambda *_: next(losses))
    released = Verdict(True, "as planned", 1.0, 0.0, 0.0, 0.0, None, 0.0, 0.0, 9, 9, None)

    to, out = Mlx(Calibration(data, limit=8, undecided=True)), tmp_path / "edge"
    quantize_to_budget(tiny("llava15", "llama"), out, data, to, lambda _: released, {"max_loss": 1.0}, limit=4)

    manifest = artifact.verify(out, "mlx")
    assert manifest.metrics["fit"]["kept"] == best and manifest.config["fit"] == "8"
    assert (out / SCALES).exists() == ("rescale" in best)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_of_two_that_lose_as_much_the_plainer_is_kept(
    tiny: builders.Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "_mean_kld", lambda *_: 0.25)
    source = open_source(tiny("llava15", "llama"))
    kept, told = fit.decided(Mlx(Calibration(data, undecided=True)), source, tmp_path)
    assert kept.calibration is None and told["fit"]["kept"] == "none"  # type: ignore[index,call-overload]


@pytest.mark.parametrize("to", FORMATS, ids=lambda to: to.name)
def test_a_killed_run_tries_only_what_it_has_not(
    to: Format, tiny: builders.Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = tiny("llava15", "smollm2")
    plan, given = to.preset(open_source(merged), "q4"), to.fitted_by(Calibration(data, limit=8, undecided=True))
    whole = quantize_planned(merged, tmp_path / "whole", plan, given)
    times = itertools.count()
    measure = fit._mean_kld

    def killed(*arguments: object) -> float:
        if next(times) == 2:
            (tmp_path / ".edge.partial" / fit._TRIAL).mkdir()
            (tmp_path / ".edge.partial" / fit._TRIAL / "scrap.gguf").write_bytes(b"half")
            raise KeyboardInterrupt
        return measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fit, "_mean_kld", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize_planned(merged, tmp_path / "edge", plan, given)
    done = quantize_planned(merged, tmp_path / "edge", plan, given)

    assert next(times) == 1 + 2 + 2
    assert files(done) == files(whole)
    assert artifact.read(done).metrics["fit"] == artifact.read(whole).metrics["fit"]


def test_pictures_are_set_aside_or_there_is_nothing_to_try(tiny: builders.Tiny, tmp_path: Path) -> None:
    one = phantom(tmp_path / "few", 2, 0, test_fraction=0.5, languages=("en",))
    with pytest.raises(DataError, match="none is left"):
        fit.decided(Mlx(Calibration(one, undecided=True)), open_source(tiny("llava15", "llama")), tmp_path)


def test_on_the_command_line(tiny: builders.Tiny, data: Path, tmp_path: Path) -> None:
    words = ["quantize", str(tiny("llava15", "llama")), "--q4", "--to", "mlx", "--fit", "--data", str(data)]
    done = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "edge")], catch_exceptions=False)
    assert done.stdout.strip() == str(tmp_path / "edge")
    assert artifact.verify(tmp_path / "edge", "mlx").metrics["fit"]["kept"] in WAYS
    assert done.stderr.count("questions set aside") == len(WAYS) and "weights are fitted by" in done.stderr
