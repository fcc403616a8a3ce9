"""`ldrt-edge merge`: base and adapter in, a complete Hugging Face folder out, with proof that it is the same model.

Tensors stream from the base's safetensors to the merged folder's, each LoRA product added on the way, in the base's
own layout and dtype. Then the merged model's logits are held against those of base plus adapter in PEFT, before the
folder gets its final name.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldrt_edge import artifact, console
from ldrt_edge.convert.probes import probe_count, probes
from ldrt_edge.convert.weights import Weights, canonical
from ldrt_edge.errors import ArtifactError, all_problems
from ldrt_edge.fidelity import compare_logits
from ldrt_edge.front import Front
from ldrt_edge.options import beside
from ldrt_edge.runtimes.base import FloatArray
from ldrt_edge.runtimes.hf import HfRuntime
from ldrt_edge.train.base import Base
from ldrt_edge.train.foreign import adopt, is_foreign

_PREFIX = "base_model.model."
_PROJECTOR = "multi_modal_projector."
_BIG_WEIGHTS = 2_000_000_000  # in float32 more than a laptop's memory
_TOLERANCE = {"F32": 1e-3, "F16": 2e-2, "BF16": 1e-1}
"""Largest logit difference, relative to the logits' own scale: rounding of the stored weights, and no more."""


def merge(base: Base, adapter: Path, out: Path) -> Path:
    """Merge an adapter into its base; returns `out`, an artefact of kind "merged".

    adapter: an artefact of ours, or another trainer's folder, which first becomes one beside it (`foreign`).

    Raises:
        ArtifactError: the adapter belongs to another base, changes nothing somewhere, or the logits disagree.
    """
    if is_foreign(adapter):
        adapter = adopt(base, adapter, beside(adapter, "adopted"))
    trained_on = artifact.verify(adapter, "adapter").inputs[0]
    if trained_on != base.identity:
        raise ArtifactError(
            f"{adapter} was trained on another base ({trained_on.manifest_sha256[:12]}…) than {base.folder} "
            f"({base.identity.manifest_sha256[:12]}…): pass the base it was trained on"
        )
    with artifact.create(out, "merged", {}, [base.identity, adapter]) as draft:
        if not draft.complete:
            _copy_other_files(base.folder, draft.path)
            draft.metrics.update(_merge_weights(base.folder, adapter, draft.path))
            Front.load(adapter).save(draft.path)
            draft.metrics.update(_prove(base, adapter, draft.path))
    return out


def _merge_weights(base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Write every weight file of the base with the adapter's changes added.

    LoRA changes nothing at all where only the projector was trained; beside LoRA that does, it is a fault.

    Raises:
        ArtifactError: adapter tensors that fit no weight, or that change nothing.
    """
    state = load_file(adapter / "adapter_model.safetensors")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    used: set[str] = set()
    changed: list[str] = []
    idle: list[str] = []
    weights = Weights(base)
    paths = sorted({entry.path for entry in weights.entries.values()})
    for path in console.track(paths, "merge"):
        merged: dict[str, torch.Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                name, tensor = canonical(key), file.get_tensor(key)
                change = _change(name, tensor, state, scale, used)
                if change is not None and torch.count_nonzero(change):
                    tensor = (tensor.float() + change).to(tensor.dtype)
                    changed.append(name)
                elif change is not None:
                    idle.append(name)
                merged[key] = tensor
        save_file(merged, out / path.name, metadata={"format": "pt"})
    unused = sorted(set(state) - used)
    if unused:
        raise ArtifactError(all_problems(unused, f"{adapter}: adapter tensors that fit no weight of the base"))
    aligned = changed and all(name.startswith(_PROJECTOR) for name in changed)
    if faults := [name for name in idle if name.startswith(_PROJECTOR) or not aligned]:
        raise ArtifactError(all_problems(faults, f"{adapter}: adapter tensors that change nothing (trained at all?)"))
    return {"changed_tensors": len(changed), "dtypes": sorted(weights.dtypes())}


def _change(
    name: str, tensor: torch.Tensor, state: dict[str, torch.Tensor], scale: float, used: set[str]
) -> torch.Tensor | None:
    """What the adapter adds to one weight, in float32; None if it has nothing for it."""
    module = f"{_PREFIX}model.{name}"
    if module in state:  # a module saved whole: the projector
        used.add(module)
        return state[module].float() - tensor.float()
    stem = module.removesuffix(".weight")
    low, high = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
    if low not in state:
        return None
    used.update((low, high))
    return (state[high].float() @ state[low].float()) * scale


def _copy_other_files(base: Path, out: Path) -> None:
    """Everything of the base that is neither weights nor manifest: configs, tokenizer.model, templates, licences."""
    left = {artifact.MANIFEST, "front.json"}
    for path in sorted(base.rglob("*")):
        name = path.relative_to(base)
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt", ".pth") and str(name) not in left:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / name)


def _prove(base: Base, adapter: Path, merged: Path) -> dict[str, float]:
    """Logits of base plus adapter against those of the merged weights, on pictures and questions.

    Raises:
        ArtifactError: they differ by more than the rounding of the stored dtype.
    """
    weights = Weights(merged)
    big = weights.count > _BIG_WEIGHTS
    dtype = "bfloat16" if big else "float32"
    tolerance = max(_TOLERANCE.get(name, 0.0) for name in (*weights.dtypes(), "BF16" if big else "F32"))
    count = probe_count(weights.count)
    expected = _logits(base.folder, dtype, adapter, count)
    found = compare_logits(expected, _logits(merged, dtype, None, count))
    scale, agreement = float(np.abs(expected).max()), float(found.top1.mean())
    if not found.max_abs_logit_diff <= tolerance * scale:
        raise ArtifactError(
            f"merged and adapter logits differ by {found.max_abs_logit_diff:.3g} on a scale of {scale:.3g} "
            f"(allowed {tolerance:g} of it), top-1 {agreement:.1%}"
        )
    return {
        "max_abs_logit_diff": found.max_abs_logit_diff,
        "mean_kld": float(found.kld.mean()),
        "top1_agreement": agreement,
    }


def _logits(folder: Path, dtype: str, adapter: Path | None, count: int) -> FloatArray:
    runtime = HfRuntime(folder, dtype=dtype, adapter=adapter)
    try:
        return np.concatenate([runtime.score(prompt, answer) for prompt, answer in probes(runtime.front, count)])
    finally:
        runtime.close()
