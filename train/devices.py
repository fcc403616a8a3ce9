"""The devices that one run trains on: this process's own, and how it keeps step with the others'.

`torchrun` and `accelerate launch` start a process for each device; Accelerate tells them apart. The first one writes
the artefact, the others work on the same draft, so `--out` lies where all of them see it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from ldrt_edge import artifact, console
from ldrt_edge.errors import ConfigError

T = TypeVar("T")


def state() -> PartialState:
    """This process's place among those of the run."""
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return PartialState() if gpu else PartialState(cpu=True)


def name(device: torch.device) -> str:
    """What a report calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def say_idle() -> None:
    """Tell who started one process on a machine with several GPUs that it uses one."""
    number = torch.cuda.device_count()
    if state().device.type == "cuda" and state().num_processes == 1 and number > 1:
        console.say(f"{number} GPUs here, one is used: torchrun or accelerate launch uses all (docs/scaling.md)")


def accumulation(accumulate: int, meant_for: int | None) -> int:
    """Forwards per optimizer step here, so that a step stays the one of `meant_for` devices on fewer of them.

    Raises:
        ConfigError: they cannot be shared out evenly.
    """
    number: int = state().num_processes
    total = accumulate * (meant_for or number)
    if total % number:
        fitting = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        raise ConfigError(
            f"a step of {total} forwards (accumulate {accumulate} on {meant_for} devices) cannot be shared among "
            f"{number} devices: start {fitting}, or set devices or accumulate so that it can"
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


def leave() -> None:
    """End what this process shares with the others, when all are done: its threads could abort one that just exits."""
    if state().num_processes > 1:
        state().destroy_process_group()


def any_of_them(flag: bool) -> bool:
    """Whether the flag is set in any process; all must ask."""
    place = state()
    if place.num_processes == 1:
        return flag
    told = torch.tensor([int(flag)], device=place.device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return bool(told.item())


def by_the_first(value: T) -> T:
    """What the first process says; all must ask."""
    told: list[T] = broadcast_object_list([value])
    return told[0]


def mean(number: float) -> float:
    """The mean over all processes; all must ask."""
    place = state()
    if place.num_processes == 1:
        return number
    told = torch.tensor([number], device=place.device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.SUM)
    return float(told.item() / place.num_processes)


def keep_precision(accelerator: Accelerator) -> None:
    """Have FSDP2 and ZeRO-3 gather weights and sum gradients in the precision that each has, and cast nothing else.

    Accelerate's choice for bf16 rounds all to it: norms, gradients' sums, what layers add up, and the loss itself.
    DeepSpeed's runs without autocast besides, and RoPE's float32 meets values in bf16, which attention refuses.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy()
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.hf_ds_config.is_true("bf16.enabled"):
        config = plugin.hf_ds_config.config
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


@contextmanager
def parts_callable(model: nn.Module) -> Iterator[None]:
    """For calling a model's parts past its own forward, before which FSDP2 gathers what no layer of its own holds.

    Layers, and all parts under ZeRO-3, are gathered as they are called. All processes must call the same.
    """
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def gathered(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter whole and on the CPU, however it is sharded; all processes must ask."""
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach().cpu().contiguous()
    with _whole(parameter):
        return parameter.detach().cpu().contiguous().clone()


def assign(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give parameters and buffers whole values by name, however they are sharded; all processes must ask."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    rest: dict[str, Any] = dict(state)
    for name, parameter in model.named_parameters():
        if name in rest and _of_zero3(parameter):
            with _whole(parameter, written=True), torch.no_grad():
                parameter.copy_(rest.pop(name))
    set_model_state_dict(model, rest, options=StateDictOptions(full_state_dict=True, strict=False))


def check_shards(checkpoint: Path) -> None:
    """That a checkpoint's optimizer can be read by these processes: DeepSpeed's can by as many as wrote it.

    Raises:
        ConfigError: they are more, or fewer.
    """
    shards, number = len(list(checkpoint.glob("*/*zero_pp_rank_*_optim_states.pt"))), state().num_processes
    if shards and shards != number:
        raise ConfigError(
            f"{checkpoint.name} was written by {shards} processes under ZeRO-3, which goes on with as many only: "
            f"start {shards} instead of {number}, or begin anew with --fresh"
        )


def _of_zero3(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id")  # what DeepSpeed calls the parameters that it spreads


def _whole(parameter: torch.Tensor, written: bool = False) -> AbstractContextManager[Any]:
    """A parameter of ZeRO-3 put together, and spread again afterwards, with what the first process wrote to it."""
    if not _of_zero3(parameter):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    context: AbstractContextManager[Any] = GatheredParameters([parameter], modifier_rank=0 if written else None)
    return context
