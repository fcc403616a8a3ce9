"""Adapters that other trainers made, in our form: `merge` takes them like our own.

What is read: LoRA on the language model and a projector that was trained whole, as mlx-vlm saves them, or as PEFT does,
which TRL, Unsloth and ms-swift save by. Nothing says which base they were trained on: shapes are held against the one
that is given, and after merging the logits against it with the adapter on.

Source: mlx-vlm 0.7, `trainer/peft`: update = scale · (x A) B, A being (in, rank); PEFT: scale · B (A x), A (rank, in).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from ldrt_edge import artifact
from ldrt_edge.convert.weights import Weights, canonical
from ldrt_edge.errors import ArtifactError, all_problems
from ldrt_edge.front import Front
from ldrt_edge.front_config import read_json
from ldrt_edge.tensor_file import read_header
from ldrt_edge.train.base import Base

CONFIG, WEIGHTS, MLX_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "lora_dtype", "lorap_emb_lr", "lorap_lr_ratio",
    "modules_to_save", "peft_type", "peft_version", "r", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
"""What PEFT's settings, and those of ms-swift's LoRA+, say of where plain LoRA stands and how it was trained."""
_BASE_UNTOUCHED = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""First weights of LoRA that leave the base's as they were; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA do not."""
_PREFIX, _PROJECTOR = "base_model.model.", "multi_modal_projector"
_MLX_NAMES = {".lora_a": ".lora_A.weight", ".lora_b": ".lora_B.weight", ".A": ".lora_A.weight", ".B": ".lora_B.weight"}
"""Also those of mlx-vlm's own layers before it took mlx-lm's."""


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds an adapter, and not as an artefact of ours."""
    return (folder / CONFIG).is_file() and not (folder / artifact.MANIFEST).exists()


def adopt(base: Base, folder: Path, out: Path) -> Path:
    """Write another trainer's adapter as an artefact of kind "adapter"; returns `out`.

    Raises:
        ArtifactError: no adapter, not for this base, or of a kind that is not merged (DoRA, other modules, ranks that
            differ).
    """
    files = [path for name in (WEIGHTS, MLX_WEIGHTS) if (path := folder / name).is_file()]
    if len(files) != 1:
        raise ArtifactError(f"{folder}: wants one of {WEIGHTS} and {MLX_WEIGHTS} beside its {CONFIG}")
    config = {"from": {path.name: artifact.file_sha256(path) for path in (folder / CONFIG, *files)}}
    read_header(files[0])
    given = _mlx(folder, files[0]) if files[0].name == MLX_WEIGHTS else _peft(folder, files[0])
    _hold_against(Weights(base.folder), given, folder)
    with artifact.create(out, "adapter", config, [base.identity]) as draft:
        if not draft.complete:
            _save(given, base.name, draft.path)
            Front.load(base.folder).save(draft.path)
    return out


class _Adapter(NamedTuple):
    """LoRA's matrices by checkpoint names with .lora_A.weight (rank, in) and .lora_B.weight (out, rank), and whole
    tensors of the projector."""

    tensors: Mapping[str, torch.Tensor]
    rank: int
    scale: float


def _mlx(folder: Path, weights: Path) -> _Adapter:
    config = read_json(folder / CONFIG)
    if (kind := config.get("fine_tune_type", "lora")) != "lora":
        raise ArtifactError(f"{folder}: fine-tuned as {kind!r}, which is not merged; LoRA is")
    given = config.get("lora_parameters", config)  # before mlx-lm's layers: rank and alpha at the top
    try:
        rank = int(given["rank"])
        scale = float(given["scale"] if "scale" in given else given["alpha"] / rank)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ArtifactError(f"{folder / CONFIG}: no rank and scale of a LoRA ({error!r})") from error
    tensors = {}
    for name, tensor in load_file(weights).items():
        ending = next((ending for ending in _MLX_NAMES if name.endswith(ending)), None)
        named = canonical(name) if ending is None else canonical(name.removesuffix(ending)) + _MLX_NAMES[ending]
        tensors[named] = tensor if ending is None else tensor.T
    return _Adapter(tensors, rank, scale)


def _peft(folder: Path, weights: Path) -> _Adapter:
    from peft import LoraConfig

    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ArtifactError(f"{folder}: an adapter of kind {config.get('peft_type')!r}, which is not merged; LoRA is")
    if (first := config.get("init_lora_weights")) not in _BASE_UNTOUCHED:
        raise ArtifactError(
            f"{folder / CONFIG}: init_lora_weights={first!r} changed the base too, which is not merged: have PEFT make "
            "plain LoRA of it (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    plain = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    known = _NEUTRAL | {"init_lora_weights"}
    if odd := [name for name, value in config.items() if name not in known and value and value != plain.get(name)]:
        raise ArtifactError(f"{folder / CONFIG}: {', '.join(odd)}: not merged; plain LoRA of one rank is")
    try:
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ArtifactError(f"{folder / CONFIG}: no rank and scale of a LoRA ({error!r})") from error
    tensors = {canonical(name.removeprefix(_PREFIX)): tensor for name, tensor in load_file(weights).items()}
    return _Adapter(tensors, rank, scale)


def _hold_against(weights: Weights, given: _Adapter, folder: Path) -> None:
    """Raises: ArtifactError: tensors of another base, or for something else than language model and projector."""
    problems = []
    for name, tensor in given.tensors.items():
        stem, lora, _ = name.partition(".lora_")
        entry = weights.entries.get(f"{stem}.weight" if lora else name)
        if entry is None or not name.startswith("language_model.layers." if lora else f"{_PROJECTOR}."):
            problems.append(f"{name}: LoRA on the language model's layers and a whole projector are merged")
            continue
        rows, columns = (*entry.shape, 0)[:2]
        wanted = {".lora_A.weight": (given.rank, columns), ".lora_B.weight": (rows, given.rank)}
        shape = wanted.get(name.removeprefix(stem), entry.shape)
        if tuple(tensor.shape) != shape:
            problems.append(f"{name} is {tuple(tensor.shape)}, and {shape} on this base")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} holds what is no number")
    lone = {name.partition(".lora_")[0] for name in given.tensors if ".lora_" in name}
    problems += [
        f"{stem} wants lora_A and lora_B" for stem in sorted(lone)
        if not all(f"{stem}.lora_{side}.weight" in given.tensors for side in "AB")
    ]  # fmt: skip
    if not lone:
        problems.append("no LoRA, which PEFT cannot do without")
    if problems:
        raise ArtifactError(all_problems(problems, f"{folder}: an adapter that does not fit the base"))


def _save(given: _Adapter, base_name: str, folder: Path) -> None:
    from peft import LoraConfig

    targets = sorted({name.partition(".lora_")[0] for name in given.tensors if ".lora_" in name})
    whole: dict[str, Any] = {}
    if any(name.startswith(_PROJECTOR) for name in given.tensors):
        whole["modules_to_save"] = [_PROJECTOR]
    config = LoraConfig(
        r=given.rank, lora_alpha=given.scale * given.rank,  # type: ignore[arg-type]  # PEFT divides: any number does
        target_modules=[f"model.{name}" for name in targets], inference_mode=True, base_model_name_or_path=base_name,
        **whole,
    )  # fmt: skip
    config.save_pretrained(str(folder))
    state = {f"{_PREFIX}model.{name}": tensor.float().contiguous() for name, tensor in given.tensors.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
