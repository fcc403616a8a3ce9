"""How a run outlives what ends it: preemption leaves a checkpoint, and the best evaluation is what is kept."""

from __future__ import annotations

import json
import shutil
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
    """On SIGTERM, finishes the step, writes a checkpoint and stops; all devices at the same step.

    One for all stages of a run: what comes in a stage's last step, or behind it, ends the run before the next stage.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._told = False
        self._before: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._before = signal.signal(signal.SIGTERM, self._tell)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.came() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if self.stopped:
            console.say(f"stopped: checkpoint written at step {state.global_step}; the same command goes on from it")

    def came(self) -> bool:
        """Whether any device was told to stop while it trained; all must ask."""
        return devices.any_of_them(self._told)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True


class BestKept(TrainerCallback):
    """Keeps the weights of the lowest evaluation loss; stops when `patience` evaluations brought nothing better.

    `STEP/` holds those of the best step, and those of the best up to the last checkpoint: a run that is killed goes on
    from there, and on other devices may come by other losses than before.
    """

    def __init__(self, model: PackedLlava, folder: Path, patience: int | None) -> None:
        self._model, self._folder, self._patience = model, folder, patience
        self._losses: dict[int, float] = {}
        self._checkpoint = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._losses = {step: loss for step, loss in _read(self._folder).items() if step <= state.global_step}
        self._checkpoint = state.global_step
        control.should_training_stop |= self._is_patience_out()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_evaluate = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        metrics: dict[str, float] | None = None, **_: Any,
    ) -> None:
        self._losses[state.global_step] = float((metrics or {})["eval_loss"])
        best = _best(self._losses)
        if best == state.global_step:
            save_trained(self._model, self._folder / str(best))
        if state.is_world_process_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            artifact.replace_text(self._folder / _EVALUATIONS, json.dumps(self._losses))
            self._tidy()
        if self._is_patience_out():
            console.say(f"step {state.global_step}: no evaluation was better than step {best}'s, so it ends here")
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._checkpoint = state.global_step
        if state.is_world_process_zero:
            self._tidy()

    def restore(self) -> int | None:
        """Put the best weights back; the step that they are of, None where nothing was evaluated."""
        step = _best(self._losses)
        devices.state().wait_for_everyone()  # the first one has written them
        if step is not None:
            load_trained(self._model, self._folder / str(step))
        return step

    def _tidy(self) -> None:
        so_far = {step: loss for step, loss in self._losses.items() if step <= self._checkpoint}
        wanted = {str(_best(self._losses)), str(_best(so_far))}
        for path in self._folder.glob("*"):
            if path.is_dir() and path.name not in wanted:
                shutil.rmtree(path)

    def _is_patience_out(self) -> bool:
        best = _best(self._losses)
        if self._patience is None or best is None:
            return False
        return sum(step > best for step in self._losses) >= self._patience


def best_step(folder: Path) -> int | None:
    """The step of the best evaluation noted in a folder, None where there is none."""
    return _best(_read(folder))


def _best(losses: dict[int, float]) -> int | None:
    return min(losses, key=lambda step: losses[step]) if losses else None


def _read(folder: Path) -> dict[int, float]:
    path = folder / _EVALUATIONS
    return {int(step): loss for step, loss in json.loads(path.read_text()).items()} if path.is_file() else {}
