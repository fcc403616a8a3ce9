"""`ldrt-edge train`: dataset and base in, LoRA adapter out.

Two stages on transformers' Trainer: *align* trains the projector alone, *instruct* trains LoRA on the language model
together with the projector; the vision tower is frozen. The adapter is a PEFT adapter that
`PeftModel.from_pretrained` loads. A run that was killed goes on from its last checkpoint when the same command is
given again.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint, set_seed

from ldrt_edge import artifact, console
from ldrt_edge.dataset import Dataset, Row
from ldrt_edge.errors import ArtifactError, ConfigError, DataError
from ldrt_edge.front import Front
from ldrt_edge.options import beside
from ldrt_edge.runtimes.processor import free_cores
from ldrt_edge.train import devices
from ldrt_edge.train.base import Base
from ldrt_edge.train.collate import PackedRow, pack_rows
from ldrt_edge.train.data.split import check_leakage
from ldrt_edge.train.features import FeatureStore, PackedDataset, collator
from ldrt_edge.train.losses import Losses
from ldrt_edge.train.model import PackedLlava, build
from ldrt_edge.train.recipe import Recipe
from ldrt_edge.train.survive import BestKept, Preemption, best_step
from ldrt_edge.train.switches import check
from ldrt_edge.train.trainer import TRAINED, PackedTrainer, arguments, load_trained, save_trained
from ldrt_edge.train.watch import METRICS, SAMPLES, Progress, SampleAnswers, plot, read_metrics

STAGES = ("align", "instruct")
SAMPLED_ROWS = 6
_THREADS, _DEVICES = ".threads", ".devices"
_PREEMPTED = 128 + 15
"""Exit status of a process that SIGTERM ended, which is what batch systems look for."""


@dataclass(frozen=True)
class Material:
    """What a run trains on: packed rows of the training split, those held out of it for the evaluation loss."""

    rows: list[PackedRow]
    held_out: list[PackedRow]


def train(base: Base, data: Sequence[Path], out: Path, recipe: Recipe, resume: bool = True) -> Path:
    """Train an adapter artefact at `out` from dataset artefacts; returns `out`.

    Raises:
        ArtifactError, DataError, ConfigError, RuntimeLoadError: an input does not fit.
    """
    datasets = [Dataset(folder) for folder in data]
    inputs: list[artifact.Input | Path] = [base.identity, *data]
    threads = torch.get_num_threads()
    try:
        with devices.shared_draft(out, {"recipe": asdict(recipe)}, inputs, recipe.seed, resume) as draft:
            if not draft.complete:
                _run(base, datasets, recipe, draft, beside(out, "logs"))
    finally:
        torch.set_num_threads(threads)
    return out


def _run(base: Base, datasets: Sequence[Dataset], recipe: Recipe, draft: artifact.Draft, logs: Path) -> None:
    set_seed(recipe.seed)
    device = devices.state().device
    check(recipe, device)
    if device.type == "cpu":  # a thread that shares its core with another program holds up all
        torch.set_num_threads(_as_begun(draft.path / _THREADS, lambda: min(torch.get_num_threads(), free_cores())))
    if recipe.devices is None:
        recipe = replace(recipe, devices=_as_begun(draft.path / _DEVICES, lambda: devices.state().num_processes))
    devices.say_idle()
    bf16 = uses_bf16(recipe)
    front = Front.load(base.folder).with_vision_tokens(recipe.vision_tokens)
    material = gather_material(datasets, front, recipe)
    questions = sum(len(row.questions) for row in material.rows)
    console.say(
        f"{questions} questions in {len(material.rows)} packed rows, {'bf16' if bf16 else 'fp32'} on "
        f"{devices.state().num_processes} x {device.type}"
    )
    model = build(base.folder, front, recipe, device, bf16)
    train_set, eval_set = prepare(model, material, recipe, bf16)

    kept: dict[str, int] = {}
    preemption = Preemption()
    for stage in STAGES:
        if getattr(recipe, stage).epochs:
            step = _stage(stage, model, train_set, eval_set, material, recipe, draft.path, logs, bf16, preemption)
            kept |= {stage: step} if step is not None else {}
    draft.metrics.update(
        questions=questions,
        rows=len(material.rows),
        precision="bf16" if bf16 else "fp32",
        device=devices.name(device),
        devices=devices.state().num_processes,
        kept_steps=kept,
    )
    _save_adapter(model, draft.path, base.name)
    if devices.state().is_main_process:
        draft.metrics.update(_last_losses(draft.path / METRICS))
        plot(draft.path)
        front.save(draft.path)
        for stage in STAGES:
            shutil.rmtree(draft.path / stage, ignore_errors=True)


def _as_begun(kept: Path, now: Callable[[], int]) -> int:
    """A number of threads or devices as it was at a run's first start: by another, the run would be another."""
    with devices.state().main_process_first():
        if not kept.is_file():
            artifact.replace_text(kept, str(now()))
    return int(kept.read_text())


def gather_material(datasets: Sequence[Dataset], front: Front, recipe: Recipe) -> Material:
    """Pack the datasets' training rows as the recipe says, a few groups of them held out.

    Raises:
        DataError: no rows, or a question that is too long.
        ConfigError: the recipe asks for what could not act: early_stop without held-out rows, or standardise_features
            without features that are kept.
    """
    if recipe.standardise_features and not recipe.cache_features:
        raise ConfigError(
            "standardise_features measures the features that cache_features keeps: set cache_features=true, or "
            "standardise_features=false"
        )
    training, validation = _split(datasets, recipe)
    if recipe.early_stop is not None and not any(rows for _, rows in validation):
        raise ConfigError(
            f"early_stop={recipe.early_stop} waits for evaluations, and no pictures are held out for them "
            f"(validation_images={recipe.validation_images}, at most one in ten): raise it, or set early_stop=null"
        )
    packed = (
        pack_rows(part, front, recipe.questions_per_row, recipe.max_tokens, recipe.seed)
        for part in (training, validation)
    )
    return Material(*packed)


def prepare(
    model: PackedLlava, material: Material, recipe: Recipe, bf16: bool
) -> tuple[PackedDataset, PackedDataset]:
    """Compute the tower's features where they are kept, and set the projector's scales; (training, evaluation) sets."""
    model.amplify(recipe.projector_gain)
    store = None
    if recipe.cache_features:
        place = devices.state()
        store = FeatureStore(model.llava, model.front, not bf16, round(recipe.cache_gb * 1e9))
        store.fill(model.llava, [*material.rows, *material.held_out], share=(place.process_index, place.num_processes))
        if recipe.standardise_features:
            model.standardise(*store.statistics(material.rows))
        model.drop_tower()
    return PackedDataset(material.rows, model.front, store), PackedDataset(material.held_out, model.front, store)


def uses_bf16(recipe: Recipe) -> bool:
    """Whether this run computes in bf16 here."""
    return recipe.precision == "bf16" or (recipe.precision == "auto" and native_bf16())


def native_bf16() -> bool:
    """Whether bf16 arithmetic is native here: on the GPU, or on a CPU with AVX512-BF16 or AMX; on a Mac it is not.

    MPS has bf16 on macOS 14 and later only, and torch's builds for Apple silicon have no oneDNN, nor its operators.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not torch.backends.mkldnn.is_available() or "avx512_bf16" not in _cpu_flags():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _cpu_flags() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


def _split(
    datasets: Sequence[Dataset], recipe: Recipe
) -> tuple[list[tuple[Dataset, list[Row]]], list[tuple[Dataset, list[Row]]]]:
    """Training rows, and those of a few held-out groups of the training split for the evaluation loss."""
    check_leakage(row for dataset in datasets for row in dataset)
    rows = [(dataset, dataset.rows("train")) for dataset in datasets]
    groups = sorted({row.group for _, part in rows for row in part})
    if not groups:
        raise DataError("the datasets have no rows in their training split")
    count = min(recipe.validation_images, len(groups) // 10)
    held = set(random.Random(recipe.seed).sample(groups, count))
    training = [(dataset, [row for row in part if row.group not in held]) for dataset, part in rows]
    validation = [(dataset, [row for row in part if row.group in held]) for dataset, part in rows]
    return training, validation


def _stage(
    stage: str,
    model: PackedLlava,
    train_set: PackedDataset,
    eval_set: PackedDataset,
    material: Material,
    recipe: Recipe,
    folder: Path,
    logs: Path,
    bf16: bool,
    preemption: Preemption,
) -> int | None:
    """One stage: from its last checkpoint if there is one, to its end; the step whose weights are kept, if chosen.

    logs: where trackers keep their files, outside the artefact.

    Raises:
        SystemExit: SIGTERM came; a checkpoint is written, or it came at the end of the stage before.
    """
    done = folder / stage / "done"
    if (done / TRAINED).is_file():
        load_trained(model, done)
        return best_step(folder / stage / "best") if recipe.keep_best else None
    if preemption.came():
        console.say(f"stopped before {stage}: the same command goes on with it")
        raise SystemExit(_PREEMPTED)
    from peft.helpers import disable_input_dtype_casting

    evaluate = len(eval_set) > 0
    callbacks: list[TrainerCallback] = [Progress(stage, folder), preemption]
    best = BestKept(model, folder / stage / "best", recipe.early_stop)
    if evaluate and (recipe.keep_best or recipe.early_stop is not None):
        callbacks.append(best)
    if recipe.sample_steps is not None:
        sampled = (eval_set, material.held_out) if evaluate else (train_set, material.rows)
        callbacks.append(
            SampleAnswers(stage, recipe.sample_steps, model, sampled[0], sampled[1][:SAMPLED_ROWS], folder / SAMPLES)
        )
    trainer = PackedTrainer(
        model,
        recipe,
        stage == "instruct",
        train_set,
        args=arguments(stage, folder, logs, recipe, bf16, evaluate),
        eval_dataset=eval_set if evaluate else None,
        data_collator=collator(model.front, recipe.length_bucket),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
    last = _last_checkpoint(folder / stage)
    if last:
        console.say(f"{stage}: going on from step {Path(last).name.rpartition('-')[2]}")
    # Under bf16 autocast PEFT's own casts to float32 and back cost a tenth of a step and change nothing. Trackers talk
    # on stdout, which is for results.
    with disable_input_dtype_casting(model.peft, active=bf16), redirect_stdout(sys.stderr):
        trainer.train(resume_from_checkpoint=last)
    if preemption.stopped:
        raise SystemExit(_PREEMPTED)
    step = best.restore() if recipe.keep_best else None
    if step is not None:
        console.say(f"{stage}: kept the weights of step {step}, the best evaluation")
    save_trained(model, done)
    return step


def _last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that is whole, as the first process sees it; what a kill or a full disk cut off is removed.

    transformers writes the trainer's state last, and counts any folder of that name as a checkpoint.

    Raises:
        ArtifactError: one cannot be read just now; it stays.
    """
    last = None
    if devices.state().is_main_process and folder.is_dir():
        for path in folder.glob("checkpoint-*"):
            try:
                TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
                Losses(None).load(path)
            except (FileNotFoundError, ValueError, TypeError, KeyError):
                shutil.rmtree(path)
            except OSError as error:
                raise ArtifactError(f"{path}: a checkpoint that cannot be read: {error.strerror}") from error
        last = get_last_checkpoint(str(folder))
    return devices.by_the_first(last)


def _save_adapter(model: PackedLlava, folder: Path, base_name: str) -> None:
    """A stock PEFT adapter: LoRA weights, and the projector for raw features."""
    from peft import get_peft_model_state_dict

    trained = get_peft_model_state_dict(model.peft, state_dict=dict(model.peft.named_parameters()))
    state = {name: devices.gathered(parameter) for name, parameter in trained.items()}
    folded = model.folded_projector()
    for name in list(state):
        state[name] = folded[name.rpartition("multi_modal_projector.")[2]] if "projector" in name else state[name]
    if not devices.state().is_main_process:
        return
    state = {name: tensor.float().contiguous() for name, tensor in state.items()}
    config = model.peft.peft_config["default"]
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _last_losses(path: Path) -> dict[str, float]:
    losses: dict[str, float] = {}
    for entry in read_metrics(path):
        losses |= {name: entry[name] for name in ("loss", "eval_loss") if name in entry}
    return losses
