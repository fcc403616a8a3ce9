"""The devices that one run trains on: this process's own, and how it keeps step with the others'.

`torchrun` and `accelerate launch` start a process for each device; Accelerate tells them apart. The first one writes
the artefact, the others work on the same draft, so `--out` lies where all of them see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ldrt_edge import artifact
from ldrt_edge.errors import ConfigError


def state() -> PartialState:
    """This process's place among those of the run."""
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return PartialState() if gpu else PartialState(cpu=True)


def name(device: torch.device) -> str:
    """What a report calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def accumulation(accumulate: int, meant_for: int | None) -> int:
    """Forwards per optimizer step here, so that a step stays the one of `meant_for` devices on fewer of them.

    Raises:
        ConfigError: they cannot be shared out evenly.
    """
    number: int = state().num_processes
    total = accumulate * (meant_for or number)
    if total % number:
        raise ConfigError(
            f"a step of {total} forwards (accumulate {accumulate} on {meant_for} devices) cannot be shared among "
            f"{number} devices: set devices or accumulate so that it can"
        )
    return total // number


@contextmanager
def shared_draft(
    out: Path, config: dict[str, Any], inputs: Sequence[artifact.Input | Path], seed: int, resumable: bool
) -> Iterator[artifact.Draft]:
    """The adapter artefact's draft: made by the first process, filled by all.

    Raises:
        ArtifactError: as `artifact.create`, in the first process; the launcher then ends the others.
    """
    place = state()
    if place.num_processes == 1:
        with artifact.create(out, "adapter", config, inputs, seed=seed, resumable=resumable) as draft:
            yield draft
        return
    if place.is_main_process:
        with artifact.create(out, "adapter", config, inputs, seed=seed, resumable=resumable) as draft:
            broadcast_object_list([str(draft.path), draft.complete])
            yield draft
            place.wait_for_everyone()
        place.wait_for_everyone()
        return
    path, complete = broadcast_object_list(["", False])
    yield artifact.Draft(Path(path), complete=complete)
    place.wait_for_everyone()  # with what they write
    place.wait_for_everyone()  # the artefact has its name


def any_of_them(flag: bool) -> bool:
    """Whether the flag is set in any process; all must ask."""
    place = state()
    if place.num_processes == 1:
        return flag
    told = torch.tensor([int(flag)], device=place.device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return bool(told.item())


def mean(number: float) -> float:
    """The mean over all processes; all must ask."""
    place = state()
    if place.num_processes == 1:
        return number
    told = torch.tensor([number], device=place.device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.SUM)
    return float(told.item() / place.num_processes)


def gathered(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter whole and on the CPU, however it is sharded; all processes must ask."""
    from torch.distributed.tensor import DTensor

    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.detach().cpu().contiguous()
