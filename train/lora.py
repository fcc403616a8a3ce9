"""`ldrt-edge train`: dataset and base in, LoRA adapter out.

Two stages on transformers' Trainer: *align* trains the projector alone, *instruct* trains LoRA on the language model
together with the projector; the vision tower is frozen. The adapter is a PEFT adapter that
`PeftModel.from_pretrained` loads. A run that was killed goes on from its last checkpoint when the same command is
given again.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, set_seed

from ldrt_edge import artifact, console
from ldrt_edge.dataset import Dataset, Row
from ldrt_edge.errors import DataError
from ldrt_edge.front import Front
from ldrt_edge.runtimes.processor import free_cores
from ldrt_edge.train.base import Base
from ldrt_edge.train.collate import pack_rows
from ldrt_edge.train.data.split import check_leakage
from ldrt_edge.train.features import FeatureStore, PackedDataset, collator
from ldrt_edge.train.model import PackedLlava, build
from ldrt_edge.train.recipe import Recipe

METRICS = "metrics.jsonl"
_TRAINABLE = "trainable.safetensors"


def train(base: Base, data: Sequence[Path], out: Path, recipe: Recipe, resume: bool = True) -> Path:
    """Train an adapter artefact at `out` from dataset artefacts; returns `out`.

    Raises:
        ArtifactError, DataError, ConfigError, RuntimeLoadError: an input does not fit.
    """
    datasets = [Dataset(folder) for folder in data]
    inputs: list[artifact.Input | Path] = [base.identity, *data]
    with artifact.create(
        out, "adapter", {"recipe": asdict(recipe)}, inputs, seed=recipe.seed, resumable=resume
    ) as draft:
        if not draft.complete:
            _run(base, datasets, recipe, draft)
    return out


def _run(base: Base, datasets: Sequence[Dataset], recipe: Recipe, draft: artifact.Draft) -> None:
    set_seed(recipe.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # a thread that shares its core with another program holds up all
        torch.set_num_threads(min(torch.get_num_threads(), free_cores()))
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and native_bf16())
    front = Front.load(base.folder).with_vision_tokens(recipe.vision_tokens)
    training, validation = _split(datasets, recipe)
    rows = pack_rows(training, front, recipe.questions_per_row, recipe.max_tokens, recipe.seed)
    held_out = pack_rows(validation, front, recipe.questions_per_row, recipe.max_tokens, recipe.seed)
    questions = sum(len(row.questions) for row in rows)
    console.say(f"{questions} questions in {len(rows)} packed rows, {'bf16' if bf16 else 'fp32'} on {device}")

    model = build(base.folder, front, recipe, device, bf16)
    model.amplify(recipe.projector_gain)
    store = FeatureStore(model.llava, front) if recipe.cache_features else None
    if store is not None:
        store.fill([*rows, *held_out])
        if recipe.standardise_features:
            model.standardise(*store.statistics(rows))
    train_set, eval_set = PackedDataset(rows, front, store), PackedDataset(held_out, front, store)

    started = time.monotonic()
    for stage, epochs in (("align", recipe.align.epochs), ("instruct", recipe.instruct.epochs)):
        if epochs:
            _stage(stage, epochs, model, train_set, eval_set, recipe, draft.path, bf16)
    draft.metrics.update(
        questions=questions,
        rows=len(rows),
        seconds=round(time.monotonic() - started, 1),
        precision="bf16" if bf16 else "fp32",
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        **_last_losses(draft.path / METRICS),
    )
    _save_adapter(model, draft.path, base.name)
    front.save(draft.path)
    for stage in ("align", "instruct"):
        shutil.rmtree(draft.path / stage, ignore_errors=True)


def native_bf16() -> bool:
    """Whether bf16 arithmetic is native here: on the GPU, or on a CPU with AVX512-BF16 or AMX."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and "avx512_bf16" in _cpu_flags()


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
    epochs: float,
    model: PackedLlava,
    train_set: PackedDataset,
    eval_set: PackedDataset,
    recipe: Recipe,
    folder: Path,
    bf16: bool,
) -> None:
    """One stage: from its last checkpoint if there is one, to its end."""
    done = folder / stage / "done" / _TRAINABLE
    if done.is_file():
        model.load_state_dict(load_file(done), strict=False)
        return
    arguments = TrainingArguments(
        output_dir=str(folder / stage),
        num_train_epochs=epochs,
        per_device_train_batch_size=recipe.rows_per_step,
        per_device_eval_batch_size=recipe.rows_per_step,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.instruct.learning_rate if stage == "instruct" else recipe.align.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_learning_rate_ratio},
        warmup_steps=recipe.warmup,
        adam_beta2=recipe.adam_beta2,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        save_steps=recipe.save_steps,
        save_total_limit=1,
        prediction_loss_only=True,
        eval_strategy="steps" if len(eval_set) else "no",
        eval_steps=recipe.eval_steps,
        seed=recipe.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    trainer = _PackedTrainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=eval_set if len(eval_set) else None,
        data_collator=collator(model.front, recipe.length_bucket),
        callbacks=[_Progress(stage, folder / METRICS)],
    )
    trainer.recipe, trainer.packed, trainer.lora = recipe, model, stage == "instruct"
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
    last = get_last_checkpoint(str(folder / stage)) if (folder / stage).is_dir() else None
    if last:
        console.say(f"{stage}: going on from step {Path(last).name.rpartition('-')[2]}")
    # Under bf16 autocast PEFT's own casts to float32 and back cost a tenth of a step and change nothing.
    with disable_input_dtype_casting(model.peft, active=bf16):
        trainer.train(resume_from_checkpoint=last)
    trainer._save(str(done.parent))


class _PackedTrainer(Trainer):
    """transformers' Trainer with two learning rates and checkpoints of the trained weights alone."""

    recipe: Recipe
    packed: PackedLlava
    lora: bool

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            projector, adapter = self.packed.trainable(self.lora)
            instruct = self.recipe.instruct
            groups: list[dict[str, Any]] = [{"params": projector, "lr": self.recipe.align.learning_rate}]
            if self.lora:
                groups[0]["lr"] = instruct.projector_learning_rate
                groups.append({"params": adapter, "lr": instruct.learning_rate})
            kind, options = Trainer.get_optimizer_cls_and_kwargs(self.args)
            options.pop("lr")
            self.optimizer = kind(groups, weight_decay=self.args.weight_decay, **options)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        trained = (pair for pair in self.packed.named_parameters() if pair[1].requires_grad)
        kept = {name: parameter.detach().cpu().contiguous() for name, parameter in trained}
        kept |= {"feature_mean": self.packed.feature_mean.cpu(), "feature_scale": self.packed.feature_scale.cpu()}
        partial = folder / f".{_TRAINABLE}"
        save_file(kept, partial)
        partial.rename(folder / _TRAINABLE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.packed.load_state_dict(load_file(Path(resume_from_checkpoint) / _TRAINABLE), strict=False)


class _Progress(TrainerCallback):
    """Progress with time left for people, one JSON line per log for machines."""

    def __init__(self, stage: str, metrics: Path) -> None:
        self._stage, self._metrics = stage, metrics
        self._context: Any = None
        self._bar: Any = None
        self._loss = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._context = console.bar(self._stage, state.max_steps - state.global_step)
        self._bar = self._context.__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.advance(1, self._loss)

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
            if not math.isfinite(logs["loss"]):
                where = f"{self._stage}, step {state.global_step}"
                raise DataError(f"{where}: the loss is {logs['loss']}: lower the learning rate")
        if state.is_world_process_zero:
            with self._metrics.open("a") as stream:
                stream.write(json.dumps({"stage": self._stage, "step": state.global_step, **logs}) + "\n")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._context.__exit__(None, None, None)


def _save_adapter(model: PackedLlava, folder: Path, base_name: str) -> None:
    """A stock PEFT adapter: LoRA weights, and the projector for raw features."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model.peft)
    folded = model.folded_projector()
    for name in list(state):
        state[name] = folded[name.rpartition("multi_modal_projector.")[2]] if "projector" in name else state[name]
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    config = model.peft.peft_config["default"]
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _last_losses(path: Path) -> dict[str, float]:
    losses: dict[str, float] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        losses |= {name: entry[name] for name in ("loss", "eval_loss") if name in entry}
    return losses
