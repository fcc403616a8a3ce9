"""Switches that need a library or a device: refused in one line where they cannot run, before anything heavy starts."""

from __future__ import annotations

import importlib.util
import os

import torch

from ldrt_edge.errors import ConfigError, all_problems
from ldrt_edge.train.recipe import Recipe

_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_DATASET_ID", "TRACKIO_BUCKET_ID")
"""By which trackio takes what it is given off this machine, or fetches what is elsewhere. Source: trackio 0.43,
`utils.py` and `sqlite_storage.py`; transformers' callback leaves the choice to them."""


def check(recipe: Recipe, device: torch.device) -> None:
    """Whether this machine can do what the recipe's switches ask for.

    Raises:
        ConfigError: it cannot; all that it cannot at once, with what to install or to set instead.
    """
    problems = [
        *_missing("bitsandbytes", "gpu", f"optimizer={recipe.optimizer}", "bit" in recipe.optimizer or _paged(recipe)),
        *_missing("bitsandbytes", "gpu", "base_precision=nf4", recipe.base_precision == "nf4"),
        *_missing("liger_kernel", "gpu", "kernels=liger", recipe.kernels == "liger"),
        *(problem for tracker in recipe.report_to for problem in _missing(tracker, "", f"report_to={tracker}", True)),
    ]
    if "trackio" in recipe.report_to and (remote := [name for name in _REMOTE if os.environ.get(name)]):
        problems.append(f"report_to=trackio stays on this machine, {', '.join(remote)} would have it leave: unset it")
    if _paged(recipe) and device.type != "cuda":
        problems.append(f"optimizer={recipe.optimizer} pages between GPU and host memory, this is {device.type}: adamw")
    if recipe.precision == "bf16" and device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        problems.append("precision=bf16 wants macOS 14 on mps: precision=auto")
    if recipe.base_precision == "nf4" and device.type == "mps":
        problems.append("base_precision=nf4 has no kernels on mps: base_precision=auto")
    if recipe.kernels == "liger" and device.type != "cuda":
        problems.append(f"kernels=liger are Triton's, for CUDA, this is {device.type}: kernels=torch")
    if recipe.align.epochs and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        problems.append(
            "align.epochs under FSDP2, which shards for one stage: align on one device first (instruct.epochs=0), "
            "merge, and train on from that with align.epochs=0"
        )
    if problems:
        raise ConfigError(all_problems(problems, "the recipe cannot run here"))


def _paged(recipe: Recipe) -> bool:
    return recipe.optimizer.startswith("paged")


def _missing(package: str, extra: str, switch: str, wanted: bool) -> list[str]:
    if not wanted or importlib.util.find_spec(package) is not None:
        return []
    command = f"pip install 'ldrt-edge[{extra}]'" if extra else f"pip install {package}"
    return [f"{switch} needs {package}: {command}"]
