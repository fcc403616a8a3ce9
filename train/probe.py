"""Real steps on this machine, for `train --plan`: what time a run will take, and what it takes before its first step.

Steps of one or two forwards are tried for half a minute, from which a step of many follows. The shared cache of
features stays as the run, or the next plan, will find it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback, TrainerCallback

from ldrt_edge.front import Front
from ldrt_edge.runtimes.processor import free_cores
from ldrt_edge.train import devices
from ldrt_edge.train.base import Base
from ldrt_edge.train.features import FeatureStore, PackedDataset, cache_folder, collator, draft_folder
from ldrt_edge.train.lora import SAMPLED_ROWS, Material, prepare
from ldrt_edge.train.model import PackedLlava, build
from ldrt_edge.train.order import RowOrder
from ldrt_edge.train.recipe import Recipe
from ldrt_edge.train.trainer import PackedTrainer, arguments
from ldrt_edge.train.watch import SAMPLES, SampleAnswers


@dataclass(frozen=True)
class Probe:
    """Real steps on this machine: how many were timed, the peak of memory.

    step_s: of each stage that the recipe has, with all its forwards; forward_s: of one of them, backward included.
    start_s: to load the model, to know its features' place in the cache, and what each stage's first step takes beyond
    the others, such as compilation. features_s: for the features that the cache lacks; sample_s: to answer the
    questions of `sample_steps` once, before much is learned, when answers are long.
    """

    step_s: Mapping[str, float]
    forward_s: Mapping[str, float]
    steps: int
    peak_bytes: int
    start_s: float
    features_s: float
    sample_s: float


def probe(
    base: Base, front: Front, material: Material, recipe: Recipe, bf16: bool, stages: Sequence[str], of_step: int,
    probe_s: float,
) -> Probe:
    """Real steps of the stages for about `probe_s` seconds, and what comes before them in a run.

    of_step: a step's forwards on each device. Two are tried where there are more: the others are as the first.

    Raises:
        DataError: the features of all rows do not fit into the cache. RuntimeLoadError: the base does not load.
    """
    from peft.helpers import disable_input_dtype_casting

    place = devices.state()
    if place.device.type == "cpu":  # as many threads as the run will have
        torch.set_num_threads(min(torch.get_num_threads(), free_cores()))
    started = time.monotonic()
    model = build(base.folder, front, recipe, place.device, bf16)
    start_s, features_s, sample_s = time.monotonic() - started, 0.0, 0.0
    order = RowOrder([1] * len(material.rows), recipe.seed, None)
    some = Material([material.rows[i] for i in order][: 64 * recipe.rows_per_step * place.num_processes], [])
    train_set, _ = prepare(model, some, replace(recipe, cache_features=False), bf16)
    tried = replace(recipe, report_to=(), accumulate=min(of_step, 2), devices=None)
    watches = {stage: _Stopwatch(probe_s / len(stages)) for stage in stages}
    with _scratch() as folder:
        if recipe.cache_features:
            train_set, key_s, features_s = _with_features(model, some, material, recipe, bf16, folder)
            start_s += key_s
        for stage, watch in watches.items():
            started = time.monotonic()
            options = arguments(stage, folder, folder, tried, bf16, False)
            options.num_train_epochs, options.max_steps, options.save_strategy = 1000, -1, "no"
            trainer = PackedTrainer(
                model, tried, stage == "instruct", train_set, args=options,
                data_collator=collator(front, recipe.length_bucket), callbacks=[watch],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
            with disable_input_dtype_casting(model.peft, active=bf16):  # as the run does
                trainer.train()
                start_s += max(0.0, watch.ended[0] - started - watch.mean_s)
                if recipe.sample_steps is not None:
                    questions = some.rows[: min(SAMPLED_ROWS, len(material.held_out) or SAMPLED_ROWS)]
                    answers = SampleAnswers(stage, 1, model, train_set, questions, folder / SAMPLES)
                    started = time.monotonic()
                    answers.on_step_end(trainer.args, trainer.state, trainer.control)
                    sample_s = time.monotonic() - started
    seconds = {stage: watch.of(of_step) for stage, watch in watches.items()}
    return Probe(
        {stage: step_s for stage, (step_s, _) in seconds.items()},
        {stage: forward_s for stage, (_, forward_s) in seconds.items()},
        sum(len(watch.ended) - 1 for watch in watches.values()), _peak_bytes(place.device), start_s, features_s,
        sample_s,
    )  # fmt: skip


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for a while, the same for all processes, on the disk that has room for features."""
    place = devices.state()
    if place.is_main_process:
        with draft_folder(cache_folder()) as folder:
            broadcast_object_list([str(folder)])
            yield folder
            place.wait_for_everyone()
    else:
        yield Path(broadcast_object_list([""])[0])
        place.wait_for_everyone()


def _with_features(
    model: PackedLlava, some: Material, material: Material, recipe: Recipe, bf16: bool, folder: Path
) -> tuple[PackedDataset, float, float]:
    """(some rows with features, seconds for the cache's key, seconds for the features that the run will lack).

    They are computed into `folder`, so that the shared cache stays as the run, or the next plan, will find it.

    Raises:
        DataError: those of all rows do not fit into the cache; on the first device.
    """
    limit_bytes, place = round(recipe.cache_gb * 1e9), devices.state()
    started = time.monotonic()
    store = FeatureStore(model.llava, model.front, not bf16, limit_bytes)
    key_s, features_s = time.monotonic() - started, 0.0
    wanted = {row.image_sha256 for row in [*material.rows, *material.held_out]}
    if place.is_main_process:
        store.to_drop(wanted)
    lacking = sum(not store.has(digest) for digest in wanted)
    if devices.any_of_them(lacking > 0):
        store = FeatureStore(model.llava, model.front, not bf16, limit_bytes, folder)
        started = time.monotonic()
        store.fill(model.llava, some.rows, share=(place.process_index, place.num_processes))
        features_s = (time.monotonic() - started) * lacking / len({row.image_sha256 for row in some.rows})
    if recipe.standardise_features:
        model.standardise(*store.statistics(some.rows))
    model.drop_tower()
    return PackedDataset(some.rows, model.front, store), key_s, features_s


class _Stopwatch(TrainerCallback):
    """Times steps of one or two forwards, and has all processes stop after a while.

    ended: when each step did. The first step warms up, two more are timed at least.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._began = self._loading_s = 0.0
        self._forwards_s: list[float] = []
        self.ended: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """With its rows read."""
        self._began = time.monotonic()
        if self.ended:
            self._loading_s += self._began - self.ended[-1]

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Of a forward that is not a step's last."""
        if self.ended:
            self._forwards_s.append(time.monotonic() - self._began)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended.append(time.monotonic())
        late = len(self.ended) > 2 and self.ended[-1] - self.ended[0] > self._limit_s
        control.should_training_stop |= devices.any_of_them(late)

    @property
    def mean_s(self) -> float:
        """Of the steps that were timed."""
        return (self.ended[-1] - self.ended[0]) / (len(self.ended) - 1)

    def of(self, forwards: int) -> tuple[float, float]:
        """Seconds of a step of so many forwards, and of one of them with its rows read; of one alone it is the step."""
        if not self._forwards_s:
            return self.mean_s, self.mean_s
        steps, number = len(self.ended) - 1, len(self._forwards_s)
        forward_s = self._loading_s / (steps + number) + sum(self._forwards_s) / number
        return self.mean_s + (forwards - 1 - number / steps) * forward_s, forward_s


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
