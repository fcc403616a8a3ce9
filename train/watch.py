"""What a person sees of a run while it trains: progress, a line of metrics, a plot of the loss, sample answers.

All lies in the run's folder (`.OUT.partial` until it is done): `metrics.jsonl`, `loss.png`, `samples.jsonl`, from which
a run that goes on from a checkpoint drops the lines after it; and `times.jsonl`, which only grows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ldrt_edge import artifact, console
from ldrt_edge.train.collate import PackedRow
from ldrt_edge.train.features import PackedDataset
from ldrt_edge.train.model import PackedLlava

METRICS, PLOT, SAMPLES = "metrics.jsonl", "loss.png", "samples.jsonl"
_PLOT_EVERY_S = 20.0
_ANSWER_TOKENS = 48


class Progress(TrainerCallback):
    """Progress with time left for people, one JSON line per log for machines, the losses as a picture."""

    def __init__(self, stage: str, folder: Path) -> None:
        self._stage, self._folder = stage, folder
        self._context: Any = None
        self._bar: Any = None
        self._loss = ""
        self._started = self._plotted = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            _rewind(self._folder / METRICS, self._stage, state.global_step)
            with (self._folder / artifact.TIMES).open("a") as stream:
                stream.write(json.dumps({"began": round(time.time(), 3)}) + "\n")
        self._context = console.bar(self._stage, state.max_steps - state.global_step)
        self._bar = self._context.__enter__()
        self._started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.advance(1, self._loss)
        control.should_log |= control.should_evaluate or state.global_step == state.max_steps  # it may end here

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = dict(logs or {})
        if "loss" in logs:
            self._loss = f"loss {logs['loss']:.3f}"
        if not state.is_world_process_zero:
            return
        at: dict[str, str | float] = {"stage": self._stage, "step": state.global_step}
        timed = {name: value for name, value in logs.items() if name.endswith(("_runtime", "_per_second"))}
        timed |= {
            "seconds": round(time.monotonic() - self._started, 3), "processor_seconds": round(time.process_time(), 3),
        }  # fmt: skip
        measured = {name: value for name, value in logs.items() if name not in timed}
        for name, line in ((METRICS, at | measured), (artifact.TIMES, at | timed)):
            with (self._folder / name).open("a") as stream:
                stream.write(json.dumps(line) + "\n")
        if time.monotonic() - self._plotted > _PLOT_EVERY_S:
            plot(self._folder)
            self._plotted = time.monotonic()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._context.__exit__(None, None, None)


class SampleAnswers(TrainerCallback):
    """Every so many steps, the model's own answers to the same few questions, beside the right ones."""

    def __init__(
        self, stage: str, every: int, model: PackedLlava, dataset: PackedDataset, rows: Sequence[PackedRow], path: Path
    ) -> None:
        self._stage, self._every, self._model, self._path = stage, every, model, path
        self._dataset, self._rows = dataset, rows

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            _rewind(self._path, self._stage, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self._every and state.global_step != state.max_steps:
            return
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            lines = [self._answer(index, state.global_step) for index in range(len(self._rows))]
        if state.is_world_process_zero:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def _answer(self, index: int, step: int) -> dict[str, str | int]:
        question = self._rows[index].questions[0]
        front = self._model.front
        given = self._model.answer(question.prompt, self._dataset[index], _ANSWER_TOKENS)
        return {
            "stage": self._stage, "step": step, "row": question.row_id, "prompt": front.decode(question.prompt),
            "answer": front.decode(given), "right": front.decode(question.answer),
        }


def plot(folder: Path) -> None:
    """Draw `loss.png` from `metrics.jsonl`: training and evaluation loss over all stages' steps."""
    from matplotlib.figure import Figure

    training, evaluation = _curves(folder / METRICS)
    if not training:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*training, strict=True), color="#4477aa", linewidth=1.2, label="training")
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), "o-", color="#ee6677", markersize=4, label="evaluation")
        axes.legend()
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per answer token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    partial = folder / f".{PLOT}"
    figure.savefig(partial, format="png", dpi=100)
    partial.rename(folder / PLOT)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, or `times.jsonl`."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _rewind(log: Path, stage: str, step: int) -> None:
    """Drop from a log what a stage wrote after its checkpoint at `step`, its summary, and a line that was cut off."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["stage"] != stage or (entry["step"] <= step and "train_loss" not in entry):
            kept.append(line)
    artifact.replace_text(log, "".join(kept))


def _curves(path: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    training, evaluation = [], []
    before, stage, last = 0, "", 0
    for entry in read_metrics(path):
        if entry["stage"] != stage:
            before, stage = before + last, entry["stage"]
        last = max(last if entry["stage"] == stage else 0, entry["step"])
        if "loss" in entry:
            training.append((before + entry["step"], entry["loss"]))
        if "eval_loss" in entry:
            evaluation.append((before + entry["step"], entry["eval_loss"]))
    return training, evaluation
