"""What ends a run does not cost it: SIGTERM, kill -9, no number for a loss, an evaluation that got worse."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import FAST, colour_dataset

from ldrt_edge import artifact
from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import ArtifactError, ConfigError, DataError
from ldrt_edge.front import Front, Message, conversation
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.hf import HfRuntime
from ldrt_edge.train import devices
from ldrt_edge.train.base import Base, resolve_base
from ldrt_edge.train.lora import _last_checkpoint, gather_material, train
from ldrt_edge.train.losses import Losses
from ldrt_edge.train.model import PackedLlava
from ldrt_edge.train.plan import plan
from ldrt_edge.train.recipe import Recipe, load_recipe
from ldrt_edge.train.survive import BestKept
from ldrt_edge.train.trainer import PackedTrainer, arguments
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


def killed(*_: object) -> None:
    raise KeyboardInterrupt


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


@pytest.mark.parametrize("where", ["training_step", "evaluate"])
def test_sigterm_in_the_last_step_of_a_stage_ends_the_run_before_the_next(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    """In its last forward, or in the evaluation that closes it."""
    settings = [*QUICK, "validation_images=1", "align.epochs=1", "max_steps=3", "eval_steps=3"]
    base, recipe = resolve_base(str(tiny("llava15", "smollm2"))), load_recipe("starter", settings)
    whole, stock = train(base, [data], tmp_path / "whole", recipe), getattr(PackedTrainer, where)

    def told(self: PackedTrainer, *given: Any, **options: Any) -> Any:
        if self.state.global_step == (2 if where == "training_step" else 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return stock(self, *given, **options)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(PackedTrainer, where, told)
        train(base, [data], tmp_path / "told", recipe)
    assert ended.value.code == 143 and "stopped before instruct: the same command" in capsys.readouterr().err
    assert {entry["stage"] for entry in read_metrics(tmp_path / ".told.partial" / METRICS)} == {"align"}
    assert artifact.read(train(base, [data], tmp_path / "told", recipe)).files == artifact.read(whole).files


@pytest.mark.parametrize(("first", "later"), [(1, 4), (3, 1)])
def test_a_run_goes_on_with_the_threads_that_it_began_with(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, later: int
) -> None:
    """However many cores are free now: another number of threads sums to other last digits. It gives them back."""
    base = resolve_base(str(tiny("llava15", "smollm2")))
    recipe = load_recipe("starter", [*QUICK, "validation_images=0", "max_steps=1"])
    before, used = torch.get_num_threads(), []

    def watched(*given: Any, **options: Any) -> Any:
        used.append(torch.get_num_threads())
        return arguments(*given, **options)

    monkeypatch.setattr("ldrt_edge.train.lora.arguments", watched)
    try:
        torch.set_num_threads(4)
        monkeypatch.setattr("ldrt_edge.train.lora.free_cores", lambda: first)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("ldrt_edge.train.lora.build", killed)
            train(base, [data], tmp_path / "x", recipe)
        assert torch.get_num_threads() == 4
        monkeypatch.setattr("ldrt_edge.train.lora.free_cores", lambda: later)
        out = train(base, [data], tmp_path / "x", recipe)
        assert set(used) == {first} and torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert not list(out.rglob(".*")) and "threads" not in (out / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("settings", "began", "forwards"), [([], 3, 3), (["accumulate=2"], 4, 8), (["devices=2"], 3, 2)]
)
def test_a_run_goes_on_with_the_steps_that_it_began_with(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], began: int,
    forwards: int,
) -> None:
    """On one device where there were several, with or without having been told for how many."""
    base = resolve_base(str(tiny("llava15", "smollm2")))
    recipe = load_recipe("starter", [*QUICK, "validation_images=0", "max_steps=1", "accumulate=1", *settings])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("ldrt_edge.train.lora.build", killed)
        patched.setattr(devices.state(), "num_processes", began)
        train(base, [data], tmp_path / "x", recipe)
    made = []

    def watched(*given: Any, **options: Any) -> Any:
        made.append(arguments(*given, **options))
        return made[-1]

    monkeypatch.setattr("ldrt_edge.train.lora.arguments", watched)
    train(base, [data], tmp_path / "x", recipe)
    assert {one.gradient_accumulation_steps for one in made} == {forwards}


@pytest.mark.parametrize(("error", "goes"), [(errno.ENOENT, True), (errno.EIO, False), (errno.ESTALE, False)])
def test_only_a_checkpoint_that_is_not_whole_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, goes: bool
) -> None:
    """One that a disk elsewhere does not give just now may be the only one."""
    checkpoint = tmp_path / "checkpoint-7"
    checkpoint.mkdir()

    def read(_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("ldrt_edge.train.lora.TrainerState.load_from_json", read)
    with nullcontext() if goes else pytest.raises(ArtifactError, match=f"checkpoint-7: .*{os.strerror(error)}"):
        assert _last_checkpoint(tmp_path) is None
    assert checkpoint.exists() != goes


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


@pytest.mark.parametrize("rows", [1, 2])
def test_a_gradient_that_is_no_number_stops_and_names_the_rows_of_its_step(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Of all forwards of the step, and not of those before; the loss is a number."""
    stock, calls = PackedLlava._token_losses, []

    def rootless(self: PackedLlava, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(labels)
        losses = stock(self, hidden, labels)
        return losses + (hidden.sum() * 0).sqrt() if len(calls) == 4 else losses  # the root of 0 has no slope

    monkeypatch.setattr(PackedLlava, "_token_losses", rootless)
    settings = [*QUICK, f"rows_per_step={rows}", "accumulate=2", "questions_per_row=1", "validation_images=0"]
    with pytest.raises(DataError, match=r"step 2: the gradient is nan: .*rows of this step: ") as told:
        train(resolve_base(str(tiny("llava15", "smollm2"))), [data], tmp_path / "x", load_recipe("starter", settings))
    assert len(re.findall(r"\d+-(?:colour|red|talk)", str(told.value))) == 2 * rows


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
    """A learning rate that ruins the model after a good start; the adapter is held against what was evaluated."""
    settings = [
        *QUICK, "validation_images=1", "eval_steps=1", "instruct.learning_rate=3e-2", "early_stop=4",
        "spike_factor=null", "instruct.projector_learning_rate=1e-2", "warmup=0", "instruct.epochs=8",
    ]  # fmt: skip
    base, recipe = resolve_base(str(tiny("llava15", "smollm2"))), load_recipe("starter", settings)
    out = train(base, [data], tmp_path / "kept", recipe)
    evaluated = {entry["step"]: entry["eval_loss"] for entry in read_metrics(out / METRICS) if "eval_loss" in entry}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert max(evaluated) == best + 4, "it ends when four evaluations brought nothing better"
    last = next(entry["eval_loss"] for entry in reversed(read_metrics(out / METRICS)) if "eval_loss" in entry)
    assert last > 1.01 * evaluated[best]
    assert artifact.read(out).metrics["kept_steps"] == {"instruct": best}
    assert held_out_loss(base, data, out, recipe) == pytest.approx(evaluated[best], rel=1e-4)


def held_out_loss(base: Base, data: Path, adapter: Path, recipe: Recipe) -> float:
    """Mean loss per answer token on the rows that training held out, by inference with the adapter on."""
    runtime, dataset = HfRuntime(base.folder, adapter=adapter), Dataset(data)
    held = {name for row in gather_material([dataset], runtime.front, recipe).held_out for name in row.row_ids}
    losses: list[float] = []
    for row in (row for row in dataset.rows("train") if row.id in held):
        messages = conversation(row.turns, runtime.front.image(read_image(dataset.image_path(row)).rgb))
        for i in range(1, len(messages), 2):
            answer = runtime.front.answer_ids(messages[:i], messages[i].text)
            logits = torch.from_numpy(runtime.score(runtime.front.prompt(messages[:i]), answer))
            losses += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none").tolist()
    runtime.close()
    return sum(losses) / len(losses)


def test_the_evaluation_loss_is_per_answer_token_however_rows_are_batched(
    tiny: Tiny, data: Path, tmp_path: Path, copy: Callable[..., Path]
) -> None:
    """Six rows of three questions and of one, so that the last batch is short; one word costs more than the others."""
    whole = colour_dataset(tmp_path / "more", images=44)
    knowing = copy(tiny("llava15", "smollm2"))
    weights = load_file(knowing / "model.safetensors")
    embeddings = next(weights[name] for name in weights if name.endswith("embed_tokens.weight"))
    front = Front.from_hf(knowing)
    embeddings[front.answer_ids([Message("user", "x")], "red")[0]] *= 8
    save_file(weights, knowing / "model.safetensors", metadata={"format": "pt"})
    base = resolve_base(str(knowing))
    settings = [*QUICK, "validation_images=3", "questions_per_row=3", "max_steps=1", "instruct.learning_rate=1e-9",
                "instruct.projector_learning_rate=1e-9"]
    found = {}
    for rows in (1, 2, 4):
        recipe = load_recipe("starter", [*settings, f"rows_per_step={rows}"])
        out = train(base, [whole], tmp_path / str(rows), recipe)
        (found[rows],) = (entry["eval_loss"] for entry in read_metrics(out / METRICS) if "eval_loss" in entry)
    expected = held_out_loss(base, whole, tmp_path / "1", recipe)
    assert found == pytest.approx(dict.fromkeys(found, expected), rel=1e-5)


@pytest.mark.parametrize("ends_at", [6, 7])
def test_a_run_that_goes_on_keeps_no_weights_that_it_did_not_come_by_again(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_at: int
) -> None:
    """Killed behind better evaluations than its checkpoint's; where it goes on, they are worse."""
    settings = [
        *QUICK, "validation_images=1", "eval_steps=1", "save_steps=4", "warmup=0", "instruct.learning_rate=2e-3",
        "max_steps=9",
    ]  # fmt: skip
    base, recipe = resolve_base(str(tiny("llava15", "smollm2"))), load_recipe("starter", settings)
    note, kept = BestKept.on_evaluate, tmp_path / ".x.partial" / "instruct" / "best"

    def killed(self: BestKept, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        note(self, args, state, control, metrics)
        assert sum(path.is_dir() for path in kept.iterdir()) <= 2
        if state.global_step == ends_at:
            raise KeyboardInterrupt

    def worse(self: BestKept, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        note(self, args, state, control, {"eval_loss": metrics["eval_loss"] + 10})

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(BestKept, "on_evaluate", killed)
        train(base, [data], tmp_path / "x", recipe)
    losses = [entry["eval_loss"] for entry in read_metrics(tmp_path / ".x.partial" / METRICS) if "eval_loss" in entry]
    assert losses == sorted(losses, reverse=True) and len(losses) == ends_at
    with monkeypatch.context() as patched:
        patched.setattr(BestKept, "on_evaluate", worse)
        out = train(base, [data], tmp_path / "x", recipe)
    assert artifact.read(out).metrics["kept_steps"] == {"instruct": 4}
    assert held_out_loss(base, data, out, recipe) == pytest.approx(losses[3], rel=1e-4)


@pytest.mark.parametrize("log_steps", [100, 3])
def test_a_run_that_ends_early_logs_all_its_losses(tiny: Tiny, data: Path, tmp_path: Path, log_steps: int) -> None:
    settings = [
        *QUICK, "validation_images=1", "eval_steps=2", "instruct.learning_rate=3e-2", "early_stop=1",
        "spike_factor=null", "warmup=0", f"log_steps={log_steps}",
    ]  # fmt: skip
    out = train(resolve_base(str(tiny("llava15", "smollm2"))), [data], tmp_path / "x", load_recipe("starter", settings))
    logged = [(entry["step"], entry["loss"]) for entry in read_metrics(out / METRICS) if "loss" in entry]
    summary = read_metrics(out / METRICS)[-1]
    assert logged[-1][0] == summary["step"] < 100 and summary["step"] % log_steps
    summed = sum(loss * (step - before) for (step, loss), (before, _) in zip(logged, [(0, 0), *logged], strict=False))
    assert summed / summary["step"] == pytest.approx(summary["train_loss"])
    assert artifact.read(out).metrics["loss"] == logged[-1][1] and (out / "loss.png").is_file()


@pytest.mark.parametrize("keep_best", ["true", "false"])
@pytest.mark.parametrize("patience", [1, 3])
def test_patience_ends_a_run_whichever_weights_are_kept(
    tiny: Tiny, data: Path, tmp_path: Path, keep_best: str, patience: int
) -> None:
    settings = [
        *QUICK, "validation_images=1", "eval_steps=1", "instruct.learning_rate=3e-2", f"early_stop={patience}",
        "spike_factor=null", "warmup=0", f"keep_best={keep_best}",
    ]  # fmt: skip
    out = train(resolve_base(str(tiny("llava15", "smollm2"))), [data], tmp_path / "x", load_recipe("starter", settings))
    evaluated = {entry["step"]: entry["eval_loss"] for entry in read_metrics(out / METRICS) if "eval_loss" in entry}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert max(evaluated) == best + patience
    assert artifact.read(out).metrics["kept_steps"] == ({"instruct": best} if keep_best == "true" else {})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["early_stop=3", "validation_images=0"], "early_stop=3 waits for evaluations, and no pictures are held out"),
        (["early_stop=2", "keep_best=false", "validation_images=0"], "early_stop=2 waits .*: raise it, or set"),
        (["standardise_features=true"], "standardise_features measures .* cache_features=true, or"),
    ],
)
def test_a_setting_that_could_not_act_is_refused(
    tiny: Tiny, data: Path, tmp_path: Path, settings: list[str], told: str
) -> None:
    base, recipe = resolve_base(str(tiny("llava15", "smollm2"))), load_recipe("starter", [*QUICK, *settings])
    with pytest.raises(ConfigError, match=told) as caught:
        train(base, [data], tmp_path / "x", recipe)
    assert "\n" not in str(caught.value) and not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match=told):
        plan(base, [data], recipe, probe_s=0)


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


@pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="trackio is not installed")
def test_trackio_keeps_a_run_on_this_machine(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    """In a process of its own: trackio asks for its folder when it is imported."""
    settings = [*QUICK, "max_steps=4", "report_to=[trackio]"]
    given = command(tiny("llava15", "smollm2"), data, tmp_path / "x", settings)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO_")}
    kept = tmp_path / "kept"
    subprocess.run(given, check=True, capture_output=True, timeout=300, env={**environment, "TRACKIO_DIR": str(kept)})
    (path,) = kept.rglob("*.db")
    with closing(sqlite3.connect(path)) as database:
        logged = [json.loads(line) for (line,) in database.execute("select metrics from metrics order by id")]
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "x" / METRICS) if "loss" in entry]
    assert [entry["train/loss"] for entry in logged if "train/loss" in entry] == pytest.approx(losses) and losses
