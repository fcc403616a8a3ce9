"""Recipes: everything that decides a training run, as one typed object, from YAML and `--set`.

    recipe = load_recipe("starter", overrides=["lora.rank=32"])

A default lives here once; the YAML files in `recipes/` say only what differs, and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from ldrt_edge.errors import ConfigError, all_problems

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LINEARS: tuple[Linear, ...] = get_args(Linear)
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=_STRICT)
class Lora:
    """LoRA on the language model. Source: Hu et al., arXiv 2106.09685; the paper used rank 128, alpha 256."""

    rank: PositiveInt = 128
    alpha: PositiveInt = 256
    dropout: BelowOne = 0.05
    target_modules: Annotated[tuple[Linear, ...], Field(min_length=1)] = LINEARS


@dataclass(frozen=True, config=_STRICT)
class Align:
    """Stage one: the projector alone. Learning rate as LLaVA's own alignment; 0 epochs skips the stage."""

    epochs: NonNegativeFloat = 0.0
    learning_rate: PositiveFloat = 1e-3


@dataclass(frozen=True, config=_STRICT)
class Instruct:
    """Stage two: LoRA and projector together. Learning rates as LLaVA-1.5's own LoRA recipe."""

    epochs: NonNegativeFloat = 1.0
    learning_rate: PositiveFloat = 2e-4
    projector_learning_rate: PositiveFloat = 2e-5


@dataclass(frozen=True, config=_STRICT)
class Recipe:
    """A training run.

    rows_per_step: packed rows (one image, up to `questions_per_row` questions) in one forward of one device.
    max_tokens: of text in a packed row; its image's tokens come on top.
    accumulate: forwards per optimizer step, on each device.
    devices: how many `accumulate` is meant for; on fewer, each does more, so that a run that lost or gained devices
        takes the same steps. null: as many as there are.
    seed: of order, dropout and LoRA's first weights; in 32 bits, as numpy wants it.
    warmup: below 1 a share of each stage's steps, from 1 on that many steps.
    min_learning_rate_ratio: what the cosine schedule ends at, of where it began.
    max_grad_norm: a step's gradient is scaled down to it; a large one never does.
    precision: "auto" is bf16 on CUDA and on CPUs with native bf16, else fp32.
    cache_features: run the frozen tower once per image and keep its features on disk.
    cache_gb: of all features together; those not used for longest go first.
    standardise_features: train the projector on features of zero mean and unit deviation (the same function, better
        conditioned; folded back into the stock weights on save). For projectors that start from random weights.
    projector_gain: factor on the projector's output before training. Random projectors learn to be read faster when
        image tokens start out larger than words.
    vision_tokens: pool the image tokens after the projector to this many.
    length_bucket: sequences are padded to a multiple of this, so that kernels compiled per shape are reused.
    group_by_length: rows of like length share a step, so that little is padded.
    answer_only_logits: compute logits where an answer token is predicted, not at every position.
    loss_chunk: answer tokens whose logits are held at once; more are computed in turn, and again for the gradient.
    fused_lora: one product a linear and its LoRA, where dropout is 0.
    max_steps: optimizer steps of each stage, instead of its epochs.
    optimizer: 8-bit and paged ones are bitsandbytes'; paged ones are for CUDA.
    base_precision: of the language model's frozen linears; nf4 packs them in four bits (QLoRA), auto is `precision`.
    kernels: liger swaps Triton's RMSNorm, SwiGLU and RoPE in, on CUDA.
    compile: the model through torch.compile.
    spike_factor: a batch whose loss is this many times the recent median, and above where the run began, stops it.
    early_stop: stop after this many evaluations without a better one.
    keep_best: end with the weights of the lowest evaluation loss, not with the last.
    report_to: trackers of transformers' Trainer, beside `metrics.jsonl` and `loss.png`; they stay on this machine
        (TensorBoard's files beside the adapter, `ADAPTER-logs`; trackio's in its own folder, for `trackio show`).
    sample_steps: write the model's answers to a few fixed questions to `samples.jsonl` this often; null never does.
    log_steps: optimizer steps between two lines of `metrics.jsonl`; each evaluation has one beside it too.
    """

    align: Align = field(default_factory=Align)
    instruct: Instruct = field(default_factory=Instruct)
    lora: Lora = field(default_factory=Lora)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    questions_per_row: PositiveInt = 6
    max_tokens: PositiveInt = 2048
    rows_per_step: PositiveInt = 4
    accumulate: PositiveInt = 1
    devices: PositiveInt | None = None
    warmup: NonNegativeFloat = 0.03
    min_learning_rate_ratio: Share = 0.0
    adam_beta2: BelowOne = 0.999
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    validation_images: NonNegativeInt = 32
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    gradient_checkpointing: bool = False
    cache_features: bool = False
    cache_gb: PositiveFloat = 100.0
    standardise_features: bool = False
    projector_gain: PositiveFloat = 1.0
    vision_tokens: PositiveInt | None = None
    length_bucket: PositiveInt = 32
    group_by_length: bool = True
    answer_only_logits: bool = True
    loss_chunk: PositiveInt = 2048
    fused_lora: bool = True
    max_steps: PositiveInt | None = None
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor"] = "adamw"
    base_precision: Literal["auto", "nf4"] = "auto"
    kernels: Literal["torch", "liger"] = "torch"
    compile: bool = False
    spike_factor: Annotated[float, Field(gt=1)] | None = 8.0
    early_stop: PositiveInt | None = None
    keep_best: bool = True
    report_to: tuple[Literal["tensorboard", "trackio"], ...] = ()
    sample_steps: PositiveInt | None = None
    log_steps: PositiveInt = 10
    save_steps: PositiveInt = 200
    eval_steps: PositiveInt = 200

    def __post_init__(self) -> None:
        if not self.align.epochs and not self.instruct.epochs:
            raise ValueError("align.epochs and instruct.epochs are both 0, so nothing would be trained")


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A named recipe, or a YAML file, with `key=value` overrides (dotted keys, YAML values).

    Raises:
        ConfigError: no such recipe, unknown keys, values of the wrong type or out of bounds; all of them at once.
    """
    data = _read(source)
    for override in overrides:
        _override(data, override)
    try:
        return TypeAdapter(Recipe).validate_python(data)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" if e["loc"] else str(e["ctx"]["error"])
            for e in error.errors()
        ]
        raise ConfigError(all_problems(problems, f"recipe {source}")) from error


def recipe_names() -> list[str]:
    """The recipes that ship with the package."""
    folder = resources.files("ldrt_edge.train") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _read(source: str | Path) -> dict[str, Any]:
    if isinstance(source, Path):
        try:
            text = source.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{source}: a recipe file that cannot be read: {error}") from error
    elif source in recipe_names():
        text = (resources.files("ldrt_edge.train") / "recipes" / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        raise ConfigError(f"no recipe {source!r}; there are: {', '.join(recipe_names())}")
    data = _yaml(text, str(source)) or {}
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: a recipe is a mapping of settings")
    return data


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: wants key=value")
    *groups, last = key.strip().split(".")
    for group in groups:
        data = data.setdefault(group, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {override}: {group} holds a value, not a group of settings")
    data[last] = _yaml(value, f"--set {override}")


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date of month 13
        raise ConfigError(f"{where}: not YAML ({str(error).splitlines()[0]})") from error
