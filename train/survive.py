"""How a run outlives what ends it: preemption leaves a checkpoint, and the best evaluation is what is kept."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ldrt_edge import artifact, console
from ldrt_edge.train import devices
from ldrt_edge.train.model import PackedLlava
from ldrt_edge.train.trainer import load_trained, save_trained

_EVALUATIONS = "evaluations.json"


class Preemption(TrainerCallback):
    """On SIGTERM, finishes the step, writes a checkpoint and stops; all devices at the same step."""

    def __init__(self) -> None:
        self.stopped = False
        self._told = False
        self._before: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._before = signal.signal(signal.SIGTERM, self._tell)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if devices.any_of_them(self._told) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if self.stopped:
            console.say(f"stopped: checkpoint written at step {state.global_step}; the same command goes on from it")

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True


class BestKept(TrainerCallback):
    """Keeps the weights of the lowest evaluation loss; stops when `patience` evaluations brought nothing better."""

    def __init__(self, model: PackedLlava, folder: Path, patience: int | None) -> None:
        self._model, self._folder, self._patience = model, folder, patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        so_far = {step: loss for step, loss in _losses(self._folder).items() if step <= state.global_step}
        control.should_training_stop |= self._is_patience_out(so_far)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_evaluate = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        metrics: dict[str, float] | None = None, **_: Any,
    ) -> None:
        losses = {step: loss for step, loss in _losses(self._folder).items() if step < state.global_step}
        losses[state.global_step] = float((metrics or {})["eval_loss"])
        best = min(losses, key=lambda step: losses[step])
        if best == state.global_step:
            save_trained(self._model, self._folder)
        if state.is_world_process_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            artifact.replace_text(self._folder / _EVALUATIONS, json.dumps(losses))
        if self._is_patience_out(losses):
            console.say(f"step {state.global_step}: no evaluation was better than step {best}'s, so it ends here")
            control.should_training_stop = True

    def restore(self) -> int | None:
        """Put the best weights back; the step that they are of, None where nothing was evaluated."""
        step = best_step(self._folder)
        if step is not None:
            load_trained(self._model, self._folder)
        return step

    def _is_patience_out(self, losses: dict[int, float]) -> bool:
        if self._patience is None or not losses:
            return False
        best = min(losses, key=lambda step: losses[step])
        return sum(step > best for step in losses) >= self._patience


def best_step(folder: Path) -> int | None:
    """The step of the best evaluation noted in a folder, None where there is none."""
    losses = _losses(folder)
    return min(losses, key=lambda step: losses[step]) if losses else None


def _losses(folder: Path) -> dict[int, float]:
    path = folder / _EVALUATIONS
    return {int(step): loss for step, loss in json.loads(path.read_text()).items()} if path.is_file() else {}
