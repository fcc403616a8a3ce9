"""transformers' Trainer for packed rows: two learning rates, checkpoints of what is trained, a guard on the loss.

Data order, random numbers, optimizer, schedule and losses come back with a checkpoint, so a run that was killed ends in
the same weights and logs, bit by bit where one process trains on a CPU. How devices work together (DDP, FSDP2,
DeepSpeed) is Accelerate's.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments

from ldrt_edge.errors import DataError, all_problems
from ldrt_edge.train import devices
from ldrt_edge.train.collate import IGNORED, ROW_IDS
from ldrt_edge.train.features import PackedDataset
from ldrt_edge.train.losses import Losses
from ldrt_edge.train.model import PackedLlava
from ldrt_edge.train.order import RowOrder
from ldrt_edge.train.recipe import Recipe

TRAINED = "trainable.safetensors"
_OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "adafactor": "adafactor",
}


def arguments(stage: str, folder: Path, logs: Path, recipe: Recipe, bf16: bool, evaluate: bool) -> TrainingArguments:
    """What a stage of a recipe is in transformers' words. logs: where trackers keep their files."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs / stage)  # transformers' only door for it
    device = devices.state().device
    cuda = device.type == "cuda"
    settings = getattr(recipe, stage)
    given = TrainingArguments(
        output_dir=str(folder / stage),
        run_name=f"{folder.name}-{stage}",
        num_train_epochs=settings.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.rows_per_step,
        per_device_eval_batch_size=recipe.rows_per_step,
        gradient_accumulation_steps=devices.accumulation(recipe.accumulate, recipe.devices),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_learning_rate_ratio},
        warmup_steps=recipe.warmup,
        optim=_OPTIMIZERS[recipe.optimizer],
        adam_beta2=recipe.adam_beta2,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=bf16,
        use_cpu=device.type == "cpu",
        torch_compile=recipe.compile,
        logging_steps=recipe.log_steps,
        logging_nan_inf_filter=False,  # it would write a made-up loss where there was none
        save_steps=recipe.save_steps,
        save_total_limit=1,
        prediction_loss_only=True,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=recipe.eval_steps,
        seed=recipe.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to=list(recipe.report_to),
        dataloader_pin_memory=cuda,
        dataloader_num_workers=4 if cuda else 0,
        ddp_find_unused_parameters=False,
    )
    # Alone on a machine with several GPUs, transformers would split batches among them, by a dimension that a picture's
    # features do not share with its text.
    given._n_gpu = min(given.n_gpu, 1)
    return given


class PackedTrainer(Trainer):
    """Trains `packed` on packed rows."""

    def __init__(self, packed: PackedLlava, recipe: Recipe, lora: bool, train_dataset: PackedDataset, **options: Any):
        self.packed, self.recipe, self.lora = packed, recipe, lora
        self._losses = Losses(recipe.spike_factor)
        self._rows_of_step: list[str] = []
        super().__init__(model=packed, train_dataset=train_dataset, compute_metrics=_token_mean, **options)
        devices.keep_precision(self.accelerator)
        step = recipe.rows_per_step * self.args.gradient_accumulation_steps * self.args.world_size
        self.order = RowOrder(train_dataset.lengths(), recipe.seed, step if recipe.group_by_length else None)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's optimizer, with a learning rate for the projector and one for LoRA."""
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

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """An epoch, unless the checkpoint is the end of the run, which was killed behind its last step."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*arguments, **options)  # type: ignore[no-untyped-call]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """One forward and backward; stops where the loss is no number, or leaps, and names the batch's rows."""
        rows = inputs.pop(ROW_IDS)
        self._rows_of_step.extend(rows)
        tokens = int((inputs["labels"] != IGNORED).sum())
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        items = tokens if num_items_in_batch is None else float(num_items_in_batch)
        self._losses.check(float(loss) * items / tokens / self.accelerator.num_processes, rows, self._where())
        self._losses.add(float(loss))
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Each row's summed loss and answer tokens, (batch,) both; transformers drops rows that fill a batch up."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses: torch.Tensor = model(**inputs)["row_losses"]
        return None, losses, (inputs["labels"] != IGNORED).sum(1)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """What Accelerate puts around a model's forward itself, but neither under FSDP2 nor ZeRO-3."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers does, but of all steps, where it knows of those since a checkpoint."""
        if "loss" in logs:
            logs["loss"] = self._losses.since_log(self.state.global_step)
        if "train_loss" in logs:
            logs["train_loss"] = self._losses.mean(self.state.global_step)
        super().log(logs, start_time)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        if not math.isfinite(float(norm)):
            named = all_problems(self._rows_of_step, "rows of this step")
            raise DataError(f"{self._where()}: the gradient is {float(norm)}: lower the learning rate; {named}")
        self._rows_of_step.clear()
        return norm

    def _where(self) -> str:
        return f"{Path(str(self.args.output_dir)).name}, step {self.state.global_step + 1}"

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:
        return self.order

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what is trained, whole, whatever the devices hold of it, and its losses."""
        folder = Path(str(output_dir or self.args.output_dir))
        save_trained(self.packed, folder)
        self._losses.save(folder)

    def train(self, resume_from_checkpoint: str | None = None) -> Any:  # type: ignore[override]
        """As transformers does, from a checkpoint's losses on; its weights come with the engine's way to load them.

        Raises:
            ConfigError: ZeRO-3's checkpoint is of another number of processes.
        """
        if resume_from_checkpoint:
            devices.check_shards(Path(resume_from_checkpoint))
            self._losses.load(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.packed, Path(resume_from_checkpoint))


def _token_mean(evaluated: EvalPrediction) -> dict[str, float]:
    """The loss per answer token over all rows, however they were batched, from what `prediction_step` gave."""
    return {"loss": float(np.sum(evaluated.predictions, dtype=np.float64) / np.sum(evaluated.label_ids))}


def save_trained(model: PackedLlava, folder: Path) -> None:
    """Write the trained parameters into `folder`, complete or not at all; all processes take part."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    kept = {name: devices.gathered(parameter) for name, parameter in trained}
    if not devices.state().is_main_process:
        return
    kept |= {"feature_mean": model.feature_mean.cpu(), "feature_scale": model.feature_scale.cpu()}
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{TRAINED}"
    save_file(kept, partial)
    partial.rename(folder / TRAINED)


def load_trained(model: PackedLlava, folder: Path) -> None:
    """Read what `save_trained` wrote, onto however many devices there are now."""
    devices.assign(model, load_file(folder / TRAINED))
