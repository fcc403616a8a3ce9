"""`ldrt-edge train --plan`: what a run needs, before it starts: memory by part, steps, time, cost, what makes it fit.

Little of it is a rule of thumb. Parameters are counted on the model's own shape, without weights. What backward
needs is found by running one and two decoder layers, in training's own precision, on tensors that have shapes only,
and counting what autograd keeps of them; all layers keep as much. Time comes from real steps (`train.probe`).
"""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from ldrt_edge import console
from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import ConfigError
from ldrt_edge.front import Front
from ldrt_edge.machine import available_bytes
from ldrt_edge.train import devices
from ldrt_edge.train.base import Base
from ldrt_edge.train.collate import most_image_tokens, sequences, visible
from ldrt_edge.train.lora import STAGES, Material, gather_material, uses_bf16
from ldrt_edge.train.model import adapted, set_precision
from ldrt_edge.train.probe import Probe, probe
from ldrt_edge.train.recipe import Recipe
from ldrt_edge.train.switches import check

PROBE_S = 30.0
_OPTIMIZER_BYTES = {"adamw": 8.0, "paged_adamw": 8.0, "adamw_8bit": 2.1, "paged_adamw_8bit": 2.1, "adafactor": 0.1}
"""Of state for a trained parameter: two float32, two bytes with a scale for each 256, or sums of rows and columns."""
_NF4_BYTES = 0.5 + 4 / 64
"""A weight in four bits, with a float32 scale for each block of 64. Source: Dettmers et al., arXiv 2305.14314."""
_PROGRAM_BYTES = {"cpu": 0.7e9, "cuda": 0.9e9, "mps": 0.9e9}
"""Python, its libraries and the device's context."""
_FRAGMENTATION = {"cpu": 1.3, "cuda": 1.05, "mps": 1.25}
"""What allocators take for the same tensors. glibc keeps those below 32 MiB in one heap and fills its holes only in
part: the starter's runs took 1.3 to 1.5 times what their tensors do, in bf16 and in fp32, and 1.0 times where
MALLOC_MMAP_THRESHOLD_=262144 gave each its own pages. CUDA's is by one run of a 7B."""
_LIGHTER: Sequence[tuple[str, Mapping[str, Any]]] = (
    ("gradient_checkpointing=true", {"gradient_checkpointing": True}),
    ("rows_per_step=1, accumulate raised as much", {"rows_per_step": 1}),
    ("base_precision=nf4", {"base_precision": "nf4"}),
    ("optimizer=adamw_8bit", {"optimizer": "adamw_8bit"}),
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at a step's peak, by what they are for.

    loading: beside program and weights before the first step: a file that is copied from, and a tower that is dropped
    once its features are kept. The system takes a file's pages back where it must, so they need not fit.
    """

    program: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loading: int = 0

    @property
    def total(self) -> int:
        """What a step takes, which must fit."""
        return self.program + self.weights + self.gradients + self.optimizer + self.activations

    @property
    def peak(self) -> int:
        """The most that a run is seen to hold where there is plenty, in a step or while it loads."""
        return max(self.total, self.program + self.weights + self.loading)


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    longest_row: tokens; batch_tokens: of the largest forward, padding included. remedies: switches that together make
    it fit, the first that help most; empty where it fits, or where nothing does (`fits` tells which).
    """

    trainable: int
    frozen: int
    questions: int
    rows: int
    steps: int
    longest_row: int
    batch_tokens: int
    memory: Memory
    available_bytes: int
    fits: bool
    remedies: tuple[str, ...]
    remedied_bytes: int | None
    probe: Probe | None = None
    seconds: float | None = None
    cost: float | None = None
    device: str = field(default="cpu")


def plan(
    base: Base, data: Sequence[Path], recipe: Recipe, probe_s: float = PROBE_S, memory_gb: float | None = None,
    price_per_hour: float | None = None,
) -> Plan:
    """Find out what `train` with the same arguments would need here, or on a CUDA GPU elsewhere with `memory_gb`.

    probe_s: seconds of steps in the probe, beside loading and a few features; three steps at least of each stage. 0
        leaves the probe out, and whether features fit into the cache is not known then; so does a GPU elsewhere, or
        too little memory.

    Raises:
        DataError, ConfigError, RuntimeLoadError: as `train` would, also where the features do not fit into the cache.
        ConfigError: a cost is wanted of a GPU elsewhere.
    """
    if memory_gb is not None and price_per_hour is not None:
        raise ConfigError(
            "a cost is a price times hours, which a probe finds, and a GPU elsewhere (--memory-gb) has none: give "
            "--price there, without --memory-gb"
        )
    if memory_gb is None:
        device, bf16 = devices.state().device, uses_bf16(recipe)
        check(recipe, device)
        devices.say_idle()
    else:  # which has what the recipe wants
        device, bf16 = torch.device("cuda"), recipe.precision != "fp32"
    front = Front.load(base.folder).with_vision_tokens(recipe.vision_tokens)
    material = gather_material([Dataset(folder) for folder in data], front, recipe)
    shape = Shape.of(base.folder, front, material, recipe)
    available = round(memory_gb * 1e9) if memory_gb is not None else _available(device)
    memory = estimate(shape, recipe, bf16, device.type)
    remedies, remedied = _remedies(shape, recipe, bf16, device.type, available)
    of_epoch = math.ceil(len(material.rows) / (recipe.rows_per_step * devices.state().num_processes))
    of_step = min(devices.accumulation(recipe.accumulate, recipe.devices), of_epoch)  # forwards, of each device
    each = math.ceil(of_epoch / of_step)
    epochs = {stage: getattr(recipe, stage).epochs for stage in STAGES}
    steps = {stage: recipe.max_steps or math.ceil(each * number) for stage, number in epochs.items() if number}
    found = Plan(
        shape.trainable, shape.frozen, sum(len(row.questions) for row in material.rows), len(material.rows),
        sum(steps.values()), shape.longest_row, shape.batch_tokens, memory, available, memory.total <= available,
        remedies, remedied,
        device=devices.name(device) if memory_gb is None else "a GPU",
    )  # fmt: skip
    if probe_s and found.fits and memory_gb is None:
        tried = probe(base, front, material, recipe, bf16, tuple(steps), of_step, probe_s)
        seconds = tried.start_s + tried.features_s
        evaluation = math.ceil(len(material.held_out) / (recipe.rows_per_step * devices.state().num_processes))
        for stage, number in steps.items():
            whole_epochs, rest = divmod(number, each)
            forwards = whole_epochs * of_epoch + rest * of_step  # an epoch's last step has fewer
            step_s, forward_s = tried.step_s[stage], tried.forward_s[stage]
            seconds += number * (step_s - of_step * forward_s) + forwards * forward_s
            seconds += evaluation * math.ceil(number / recipe.eval_steps) * forward_s / 3  # one at the end
            if recipe.sample_steps is not None:
                seconds += math.ceil(number / recipe.sample_steps) * tried.sample_s
        cost = None if price_per_hour is None else price_per_hour * devices.state().num_processes * seconds / 3600
        found = replace(found, probe=tried, seconds=seconds, cost=cost)
    return found


@dataclass(frozen=True)
class Shape:
    """What memory depends on: the model's parameters by part, and the largest forward of the data.

    linear: of the language model's decoder, which quantisation packs; answers: tokens that are predicted; file_bytes:
    of the checkpoint's weights on the disk, in `config.dtype`.
    """

    config: Any
    language: int
    linear: int
    tower: int
    projector: int
    lora: int
    longest_row: int
    batch_tokens: int
    rows: int
    answers: int
    file_bytes: int = 0

    @property
    def trainable(self) -> int:
        """LoRA and the projector."""
        return self.lora + self.projector

    @property
    def frozen(self) -> int:
        """The language model and the vision tower."""
        return self.language + self.tower

    @classmethod
    def of(cls, folder: Path, front: Front, material: Material, recipe: Recipe) -> Shape:
        """Count a checkpoint's parameters by its config, and the tokens of the longest rows that share a step."""
        most = most_image_tokens(front.config)
        lengths = [len(sequences(row, front.config.image_token_id, most).ids) for row in material.rows]
        answers = [sum(len(question.answer) for question in row.questions) for row in material.rows]
        longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])[: recipe.rows_per_step]
        padded = math.ceil(lengths[longest[0]] / recipe.length_bucket) * recipe.length_bucket
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        counts = count(config, recipe)
        return cls(
            config, *counts, lengths[longest[0]], padded * len(longest), len(longest), sum(answers[i] for i in longest),
            sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        )  # fmt: skip


def count(config: Any, recipe: Recipe) -> tuple[int, int, int, int, int]:
    """Parameters: (language model, those of its decoder's linears, vision tower, projector, LoRA)."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    linears = {
        name: module for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "language_model" in name
    }  # fmt: skip
    targets = [m for name, m in linears.items() if name.rpartition(".")[2] in recipe.lora.target_modules]
    lora = sum(recipe.lora.rank * (module.in_features + module.out_features) for module in targets)
    tower, projector = (_size(part) for part in (model.model.vision_tower, model.model.multi_modal_projector))
    return _size(model) - tower - projector, sum(_size(m) for m in linears.values()), tower, projector, lora


def estimate(shape: Shape, recipe: Recipe, bf16: bool, device: str) -> Memory:
    """Memory of one device without sharding."""
    compute = 2 if bf16 else 4
    packed = shape.linear if recipe.base_precision == "nf4" else 0
    weights = (shape.language - packed) * compute + packed * _NF4_BYTES
    loading = 0
    if device == "cpu" and shape.file_bytes:
        if _stays_mapped(shape, bf16):  # whole, while one weight lies there
            same = (shape.config.dtype or torch.float32).itemsize == compute
            weights = shape.file_bytes + (0 if same else weights)
        else:
            loading = shape.file_bytes
    weights += 4 * (2 * shape.projector + shape.lora)  # PEFT keeps the untrained projector beside the trained one
    if recipe.cache_features:
        loading += 4 * shape.tower
    else:
        weights += 4 * shape.tower
    return Memory(
        round(_PROGRAM_BYTES[device]),
        round(weights),
        4 * shape.trainable,
        round(_OPTIMIZER_BYTES[recipe.optimizer] * shape.trainable),
        round(_FRAGMENTATION[device] * activation_bytes(shape, recipe, bf16)),
        loading,
    )


def activation_bytes(shape: Shape, recipe: Recipe, bf16: bool) -> int:
    """What forward keeps for backward, and backward's own work on one layer and on the logits."""
    one, two = (_kept_bytes(shape, recipe, bf16, layers) for layers in (1, 2))
    layers = int(shape.config.text_config.num_hidden_layers)
    vocabulary = int(shape.config.text_config.vocab_size)
    predicted = min(shape.answers, recipe.loss_chunk) if recipe.answer_only_logits else shape.batch_tokens
    logits = predicted * vocabulary * ((2 if bf16 else 4) + 4 + 4)  # as computed, in float32, and their gradient
    layer = two - one
    hidden = shape.batch_tokens * int(shape.config.text_config.hidden_size) * 4
    kept = one + (layers - 1) * layer
    if recipe.gradient_checkpointing:  # each layer's input, and one layer at a time in full
        kept = layers * hidden + one
    return kept + max(logits, layer)


def render(found: Plan) -> str:
    """The plan for a person."""
    parts = ("program", "weights", "gradients", "optimizer", "activations")
    gb = {name: getattr(found.memory, name) / 1e9 for name in parts}
    peak = "" if found.memory.peak == found.memory.total else f"; {found.memory.peak / 1e9:.2f} while it loads"
    lines = [
        f"trains        {found.trainable / 1e6:.1f} M parameters of {(found.trainable + found.frozen) / 1e6:.1f} M",
        f"data          {found.questions} questions in {found.rows} rows, the longest of {found.longest_row} tokens",
        f"steps         {found.steps}, up to {found.batch_tokens} tokens in a forward",
        f"memory        {found.memory.total / 1e9:.2f} GB on {found.device}: "
        + ", ".join(f"{name} {size:.2f}" for name, size in gb.items()) + peak,
        f"available     {found.available_bytes / 1e9:.2f} GB: it {'fits' if found.fits else 'does not fit'}",
    ]
    if not found.fits and found.remedied_bytes is not None:
        lines.append(f"              --set {'; --set '.join(found.remedies)}: {found.remedied_bytes / 1e9:.2f} GB")
    elif not found.fits:
        lines.append("              no switch makes it fit: a larger device, or several with FSDP2 (docs/scaling.md)")
    if found.probe is not None and found.seconds is not None:
        lines.append(
            f"time          {console.duration(found.seconds)}: "
            + ", ".join(f"{step_s:.2f} s a step to {stage}" for stage, step_s in found.probe.step_s.items())
            + f", {found.probe.steps} tried here, at a peak of {found.probe.peak_bytes / 1e9:.2f} GB"
        )
    if found.cost is not None:
        lines.append(f"cost          {found.cost:.2f}")
    return "\n".join(lines)


def _kept_bytes(shape: Shape, recipe: Recipe, bf16: bool, layers: int) -> int:
    """Bytes that autograd keeps of a forward through so many decoder layers, found on tensors without data."""
    from peft.helpers import disable_input_dtype_casting

    with torch.device("meta"):
        llava = AutoModelForImageTextToText.from_config(_of_layers(shape.config, layers), dtype=torch.float32)
        set_precision(llava.model.language_model, bf16)
        model = adapted(llava, replace(recipe, gradient_checkpointing=False))
    decoder, length = llava.model.language_model, shape.batch_tokens // shape.rows
    kept: dict[int, torch.UntypedStorage] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):  # autocast knows no meta device, but a CPU's without data
        weights = {
            name: torch.empty_like(own, device="cpu").requires_grad_(own.requires_grad)
            for name, own in [*decoder.named_parameters(), *decoder.named_buffers()]
        }
        own = {tensor.untyped_storage()._cdata for tensor in weights.values()}
        width = shape.config.text_config.hidden_size
        inputs = torch.empty(shape.rows, length, width, dtype=torch.float32, requires_grad=True)
        segments = torch.zeros(shape.rows, length, dtype=torch.long)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        given = {
            "inputs_embeds": inputs * 1, "attention_mask": visible(segments), "position_ids": segments,
            "use_cache": False,
        }  # fmt: skip
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            disable_input_dtype_casting(model, active=bf16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            functional_call(decoder, weights, kwargs=given)
    return sum(storage.nbytes() for storage in kept.values())


def _stays_mapped(shape: Shape, bf16: bool) -> bool:
    """Whether training's precision leaves a weight of the language model as and where it was read from the file."""
    text = _of_layers(shape.config, 1).text_config
    with torch.device("meta"):
        decoder = AutoModel.from_config(text, dtype=shape.config.dtype or torch.float32)
    read = [own.untyped_storage() for own in decoder.parameters()]
    set_precision(decoder, bf16)
    return any(own.untyped_storage()._cdata == was._cdata for own, was in zip(decoder.parameters(), read, strict=True))


def _of_layers(config: Any, layers: int) -> Any:
    """The same model with so many decoder layers."""
    short = type(config)(**config.to_dict())
    short.text_config.num_hidden_layers = layers
    return short


def _remedies(
    shape: Shape, recipe: Recipe, bf16: bool, device: str, available: int
) -> tuple[tuple[str, ...], int | None]:
    """Switches that make the run fit, added in turn; and what it then takes, None where that is not enough."""
    taken: list[str] = []
    for name, settings in _LIGHTER:
        if estimate(shape, recipe, bf16, device).total <= available:
            break
        if all(getattr(recipe, key) == value for key, value in settings.items()):
            continue
        if name.startswith("base_precision") and device != "cuda":
            continue
        lighter = replace(recipe, **settings)
        if "rows_per_step" in settings:
            shape = replace(
                shape, rows=1, batch_tokens=shape.batch_tokens // shape.rows, answers=shape.answers // shape.rows
            )
        recipe = lighter
        taken.append(name)
    total = estimate(shape, recipe, bf16, device).total
    return (tuple(taken), total) if taken and total <= available else ((), None)


def _available(device: torch.device) -> int:
    """Bytes that a run could take of a process's device, where there are the fewest.

    On a GPU what is free and what this process's allocator holds; processes of one machine share its memory.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    else:
        free = available_bytes() // gather_object([socket.gethostname()]).count(socket.gethostname())
    least: int = min(gather_object([int(free)]))
    return least


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
