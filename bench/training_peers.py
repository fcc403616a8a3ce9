"""One run of one side of `bench.training`, in a process of its own: ours, or a stock trainer on the same questions."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldrt_edge.dataset import Dataset, Row
from ldrt_edge.errors import require

PEERS = ("trainer", "trainer bf16", "trl")
_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


@dataclass(frozen=True)
class Task:
    """What all sides train: a recipe with overrides says how ours does it and what LoRA and AdamW are.

    forward_samples: questions in one forward of a peer.
    """

    base: str
    data: Path
    work: Path
    recipe: str
    settings: tuple[str, ...]
    threads: int
    forward_samples: int


@dataclass(frozen=True)
class Curve:
    """A run: speed after the first optimizer step, the loss of each, seconds for features computed beforehand.

    samples_per_processor_s: by the time that the process computed, which other programs' load hardly touches.
    tokens: of text and pictures that one pass over all questions sends through the language model, padding left out.
    gpu_peak_bytes: reserved on the GPU; 0 where there is none.
    """

    samples_per_s: float
    samples_per_processor_s: float
    losses: tuple[float, ...]
    features_s: float
    tokens: int
    gpu_peak_bytes: int


def run_ours(task: Task) -> Curve:
    """`ldrt-edge train`, from no cached features at all."""
    import torch

    from ldrt_edge.artifact import TIMES
    from ldrt_edge.train import features, lora
    from ldrt_edge.train.base import resolve_base
    from ldrt_edge.train.recipe import load_recipe
    from ldrt_edge.train.watch import METRICS, read_metrics

    torch.set_num_threads(task.threads)
    base, recipe = resolve_base(task.base), load_recipe(task.recipe, task.settings)
    task.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=task.work) as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        spent: list[float] = []
        fill = features.FeatureStore.fill

        def timed(*arguments: Any, **options: Any) -> None:
            started = time.process_time()
            fill(*arguments, **options)
            spent.append(time.process_time() - started)

        features.FeatureStore.fill = timed  # type: ignore[method-assign]
        # training takes fewer threads where other programs compute; the peers do not
        lora.free_cores = lambda: task.threads  # type: ignore[attr-defined]
        out = lora.train(base, [task.data], Path(folder) / "adapter", recipe)
        logged = [entry for entry in read_metrics(out / METRICS) if "loss" in entry]
        times = {entry["step"]: entry for entry in reversed(read_metrics(out / TIMES)) if "step" in entry}
    dataset = Dataset(task.data)
    ended = [(times[entry["step"]]["seconds"], times[entry["step"]]["processor_seconds"]) for entry in logged]
    losses = [entry["loss"] for entry in logged]
    return _curve(len(dataset.rows("train")), ended, losses, _our_tokens(base.folder, dataset, recipe), sum(spent))


def run_peer(name: str, task: Task) -> Curve:
    """A stock trainer on the same base, adapter, questions, steps and learning rate."""
    import torch
    import transformers

    from ldrt_edge.train.base import resolve_base
    from ldrt_edge.train.recipe import load_recipe

    torch.set_num_threads(task.threads)
    transformers.utils.logging.set_verbosity_error()
    recipe, folder = load_recipe(task.recipe, task.settings), resolve_base(task.base).folder
    transformers.set_seed(recipe.seed)
    model = _peft_model(folder, recipe)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    rows, dataset = _in_order(task, folder, recipe), Dataset(task.data)
    task.work.mkdir(parents=True, exist_ok=True)
    output = Path(tempfile.mkdtemp(dir=task.work))
    per_step = recipe.rows_per_step * recipe.accumulate * recipe.questions_per_row
    shared: dict[str, Any] = {
        "output_dir": str(output), "num_train_epochs": 1, "per_device_train_batch_size": task.forward_samples,
        "gradient_accumulation_steps": per_step // task.forward_samples, "warmup_steps": recipe.warmup,
        "learning_rate": recipe.instruct.learning_rate, "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": recipe.min_learning_rate_ratio}, "adam_beta2": recipe.adam_beta2,
        "weight_decay": recipe.weight_decay, "max_grad_norm": recipe.max_grad_norm, "logging_steps": 1,
        "seed": recipe.seed,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(),
        "train_sampling_strategy": "sequential", "dataloader_pin_memory": False,
    }  # fmt: skip
    watch, collator = _watch(transformers.TrainerCallback), _Collator(processor)
    with Path(os.devnull).open("w") as quiet, redirect_stdout(quiet):
        if name == "trl":
            trainer = _trl(model, processor, rows, dataset, shared, watch)
        else:
            trainer = transformers.Trainer(
                model=model,
                args=transformers.TrainingArguments(bf16=name != "trainer", remove_unused_columns=False, **shared),
                train_dataset=[{"row": row, "image": dataset.image_path(row)} for row in rows],
                data_collator=collator,
                callbacks=[watch],
            )
        trainer.train()
    shutil.rmtree(output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    examples = ({"row": row, "image": dataset.image_path(row)} for row in rows)
    tokens = sum(int(collator([example])["attention_mask"].sum()) for example in examples)
    return _curve(len(rows), watch.ended, losses, tokens, 0.0)


def _peft_model(folder: Path, recipe: Any) -> Any:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    # what guides load on a GPU is the checkpoint's own bf16
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    lora = LoraConfig(
        r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, lora_dropout=recipe.lora.dropout, target_modules=_TARGETS,
        modules_to_save=["multi_modal_projector"],
    )
    return get_peft_model(model, lora)


def _our_tokens(folder: Path, dataset: Dataset, recipe: Any) -> int:
    from ldrt_edge.front import Front
    from ldrt_edge.train.features import PackedDataset
    from ldrt_edge.train.lora import gather_material

    front = Front.load(folder)
    packed = PackedDataset(gather_material([dataset], front, recipe).rows, front, None)
    return sum(len(packed[i].sequences.ids) for i in range(len(packed)))


def _in_order(task: Task, folder: Path, recipe: Any) -> list[Row]:
    """The questions in the order in which ours trains on them."""
    from ldrt_edge.front import Front
    from ldrt_edge.train.lora import gather_material
    from ldrt_edge.train.order import RowOrder

    dataset = Dataset(task.data)
    packed = gather_material([dataset], Front.load(folder), recipe).rows
    by_id = {row.id: row for row in dataset.rows("train")}
    order = RowOrder([1] * len(packed), recipe.seed, None)
    return [by_id[row_id] for index in order for row_id in packed[index].row_ids]


def _prompt(processor: Any, row: Row) -> str:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row.question}]}
    prompt: str = processor.apply_chat_template([turn], add_generation_prompt=True)
    return prompt


class _Collator:
    """What transformers' guides write: the processor on text and pictures, labels where the answer is."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        from PIL import Image

        pictures = [Image.open(example["image"]).convert("RGB") for example in examples]
        prompts = [_prompt(self._processor, example["row"]) for example in examples]
        tokenizer = self._processor.tokenizer
        answers = [example["row"].answer + tokenizer.eos_token for example in examples]
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        batch = self._processor(images=pictures, text=texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = -100
        for label, mask, prompt, text in zip(labels, batch["attention_mask"], prompts, texts, strict=True):
            behind = len(tokenizer(text).input_ids) - len(tokenizer(prompt).input_ids)  # alone it may be other tokens
            label[: int(mask.sum()) - behind] = -100
        return {**batch, "labels": labels}


def _trl(model: Any, processor: Any, rows: list[Row], dataset: Dataset, shared: dict[str, Any], watch: Any) -> Any:
    trl, datasets = require("trl", "peers"), require("datasets", "peers")
    eos = processor.tokenizer.eos_token
    examples = [
        {"prompt": _prompt(processor, row), "completion": row.answer + eos, "images": [str(dataset.image_path(row))]}
        for row in rows
    ]
    table = datasets.Dataset.from_list(examples).cast_column("images", datasets.Sequence(datasets.Image()))
    arguments = trl.SFTConfig(max_length=None, **shared)
    return trl.SFTTrainer(
        model=model, args=arguments, train_dataset=table, processing_class=processor, callbacks=[watch]
    )


def _watch(base: type) -> Any:
    import torch

    class Watch(base):  # type: ignore[misc]
        """Notes when each optimizer step ended."""

        ended: list[tuple[float, float]]

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ended = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ended.append((time.perf_counter(), time.process_time()))

    return Watch()


def _curve(
    questions: int, ended: Sequence[tuple[float, float]], losses: Sequence[float], tokens: int, features_s: float
) -> Curve:
    """Speed from when each optimizer step ended, by the clock and by the process's own time."""
    import torch

    after_first = questions * (len(ended) - 1) / len(ended)
    by_clock, by_processor = (after_first / (last - first) for first, last in zip(ended[0], ended[-1], strict=True))
    gpu_peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
    return Curve(round(by_clock, 4), round(by_processor, 4), tuple(losses), round(features_s, 2), tokens, gpu_peak)
