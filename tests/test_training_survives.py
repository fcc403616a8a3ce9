"""What ends a run does not cost it: SIGTERM, kill -9, no number for a loss, an evaluation that got worse."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_train import FAST, colour_dataset

from ldrt_edge import artifact
from ldrt_edge.errors import DataError
from ldrt_edge.train.base import resolve_base
from ldrt_edge.train.lora import train
from ldrt_edge.train.losses import Losses
from ldrt_edge.train.recipe import load_recipe
from ldrt_edge.train.watch import METRICS, read_metrics

Tiny = Callable[..., Path]
QUICK = [
    *FAST, "instruct.epochs=6", "rows_per_step=2", "log_steps=1", "cache_features=false", "standardise_features=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_dataset(tmp_path_factory.mktemp("data") / "colours", images=16)


def command(base: Path, data: Path, out: Path, settings: list[str]) -> list[str]:
    given = [sys.executable, "-m", "ldrt_edge.cli", "train", "--base", str(base), "--data", str(data)]
    given += ["--out", str(out)]
    for setting in settings:
        given += ["--set", setting]
    return given


def ended(given: list[str], out: Path, step: int, number: int) -> tuple[int, str]:
    """Start a run, send it a signal once it is at a step or later, return its exit status and what it said."""
    process = subprocess.Popen(given, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = out.with_name(f".{out.name}.partial") / METRICS
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.is_file() and any(entry["step"] >= step for entry in read_metrics(metrics)):
            break
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait(timeout=240), process.stderr.read() if process.stderr else ""


def test_sigterm_then_kill_9_then_the_same_bytes(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    """With dropout, grouping by length and several epochs: order, random numbers, optimizer and schedule come back."""
    settings = [
        *QUICK, "lora.dropout=0.1", "save_steps=3", "validation_images=1", "eval_steps=7", "log_steps=4",
        "sample_steps=9",
    ]  # fmt: skip
    base, whole, killed = tiny("llava15", "smollm2"), tmp_path / "whole", tmp_path / "killed"
    train(resolve_base(str(base)), [data], whole, load_recipe("starter", settings))
    given = command(base, data, killed, settings)
    status, said = ended(given, killed, random.randint(4, 10), signal.SIGTERM)
    assert status == 143 and "checkpoint written at step" in said, said
    ended(given, killed, random.randint(16, 24), signal.SIGKILL)
    assert not killed.exists()
    done = subprocess.run(given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "going on from step" in done.stderr, done.stderr
    one, two = (artifact.verify(folder) for folder in (whole, killed))
    assert one.files == two.files and {METRICS, "loss.png", "samples.jsonl"} <= {entry.path for entry in one.files}
    assert one.sha256 == two.sha256


@pytest.mark.parametrize(
    "end", [("max_steps=11",), ("early_stop=1", "instruct.learning_rate=3e-2", "spike_factor=null")]
)
def test_a_run_that_is_killed_behind_its_last_step_takes_no_more(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: tuple[str, ...]
) -> None:
    """It ends within an epoch, by its steps or by patience, and its weights are lost before they are put away."""
    settings = [*QUICK, "validation_images=1", "eval_steps=1", "save_steps=1", "warmup=0", *end]
    base, recipe = resolve_base(str(tiny("llava15", "smollm2"))), load_recipe("starter", settings)
    whole = train(base, [data], tmp_path / "whole", recipe)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("ldrt_edge.train.lora.save_trained", killed)
        train(base, [data], tmp_path / "killed", recipe)
    again = train(base, [data], tmp_path / "killed", recipe)
    last = read_metrics(whole / METRICS)[-1]
    assert "train_loss" in last and 0 < last["epoch"] % 1 < 1, "it ends within an epoch"
    assert artifact.read(again).files == artifact.read(whole).files


def test_a_loss_that_is_no_number_stops_and_names_its_rows(
    tiny: Tiny, data: Path, tmp_path: Path, copy: Callable[..., Path]
) -> None:
    folder = copy(tiny("llava15", "smollm2"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"step 1: the loss is nan.*rows of this batch: \d+-(colour|red|talk)"):
        train(resolve_base(str(folder)), [data], tmp_path / "x", load_recipe("starter", QUICK))
    assert not (tmp_path / "x").exists()


def test_a_leap_of_the_loss_stops_and_what_training_does_anyway_does_not() -> None:
    guard = Losses(factor=4.0)
    noise = random.Random(0)
    for step in range(300):  # falls from 6 to 0.05, with single batches three times as bad
        loss = max(6 * 0.97**step, 0.05) * noise.choice([0.5, 1, 1, 3])
        guard.check(loss, ["row"], f"step {step}")
    guard.check(1.0, ["row"], "above the recent median, below where it began")
    with pytest.raises(DataError, match=r"here: the loss leapt from .* to 40: .*rows of this batch: the one"):
        guard.check(40.0, ["the one"], "here")
    Losses(factor=None).check(1e9, ["row"], "switched off")


def test_the_best_evaluation_is_kept_and_patience_ends(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    """A learning rate that ruins the model after a good start."""
    settings = [
        *QUICK, "validation_images=1", "eval_steps=1", "instruct.learning_rate=3e-2", "early_stop=4",
        "spike_factor=null", "instruct.projector_learning_rate=1e-2", "warmup=0", "instruct.epochs=8",
    ]  # fmt: skip
    base = resolve_base(str(tiny("llava15", "smollm2")))
    out = train(base, [data], tmp_path / "kept", load_recipe("starter", settings))
    evaluated = {entry["step"]: entry["eval_loss"] for entry in read_metrics(out / METRICS) if "eval_loss" in entry}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert max(evaluated) == best + 4, "it ends when four evaluations brought nothing better"
    last = next(entry["eval_loss"] for entry in reversed(read_metrics(out / METRICS)) if "eval_loss" in entry)
    assert last > evaluated[best]
    assert artifact.read(out).metrics["kept_steps"] == {"instruct": best}


def test_a_watched_run_leaves_a_plot_and_sample_answers(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    settings = [*QUICK, "validation_images=1", "sample_steps=10", "eval_steps=10", "report_to=[tensorboard]"]
    out = train(resolve_base(str(tiny("llava15", "smollm2"))), [data], tmp_path / "x", load_recipe("starter", settings))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    steps = sorted({sample["step"] for sample in samples})
    assert len(steps) >= 3 and steps[0] == 10
    assert {sample["row"] for sample in samples if sample["step"] == 10} == {
        sample["row"] for sample in samples if sample["step"] == steps[-1]
    }
    assert all(sample["right"] for sample in samples)
    logged = list((tmp_path / "x-logs").rglob("events.out.tfevents.*"))
    assert logged and not list(out.rglob("events.out.tfevents.*"))
