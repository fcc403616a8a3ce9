"""Several devices train what one trains: processes on this machine's CPU, talking through gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from test_train import FAST, colour_dataset

from ldrt_edge.train.recipe import load_recipe
from ldrt_edge.train.watch import METRICS, SAMPLES, read_metrics

Tiny = Callable[..., Path]
SETTINGS = [
    *FAST, "lora.dropout=0", "rows_per_step=2", "log_steps=1", "instruct.epochs=2", "keep_best=false", "eval_steps=100",
    "cache_features=false", "standardise_features=false",
]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
CLI = ["-m", "ldrt_edge.cli"]
FSDP_ON_CPU = [str(Path(__file__).with_name("fsdp_on_cpu.py"))]
deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_dataset(tmp_path_factory.mktemp("data") / "colours", images=26)  # 20 rows to train on


def command(base: Path, data: Path, out: Path, settings: Sequence[str] = ()) -> list[str]:
    given = ["train", "--base", str(base), "--data", str(data), "--out", str(out)]
    for setting in (*SETTINGS, *settings):
        given += ["--set", setting]
    return given


def run(program: Sequence[str], **environment: str) -> str:
    done = subprocess.run(
        program, capture_output=True, text=True, timeout=560, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def launch_environment(name: str, processes: int) -> dict[str, str]:
    """What `accelerate launch` would hand to the processes, from a config that ships with the package."""
    config = resources.files("ldrt_edge.train") / "launch" / f"{name}.yaml"
    given = ["--config_file", str(config), "--num_processes", str(processes), "x.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    return {name: value for name, value in prepare_multi_gpu_env(arguments).items() if os.environ.get(name) != value}


def zero3(folder: Path, processes: int) -> list[str]:
    """`accelerate launch` with the config that ships, but that small parameters are spread as well."""
    shipped = yaml.safe_load((resources.files("ldrt_edge.train") / "launch" / "zero3.yaml").read_text())
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    spread = {"stage": shipped["deepspeed_config"].pop("zero_stage"), "stage3_param_persistence_threshold": 0}
    told = folder / "zero3.json"
    told.write_text(json.dumps({"zero_optimization": spread, **dict.fromkeys(sizes, "auto")}))
    shipped["deepspeed_config"] = {"deepspeed_config_file": str(told), "zero3_init_flag": False}
    config = folder / "zero3.yaml"
    config.write_text(yaml.safe_dump(shipped))
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(processes)]
    return [sys.executable, *launch, *CLI]


def losses(adapter: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(adapter / METRICS) if "loss" in entry]


def same_adapter(first: Path, second: Path) -> None:
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys() and len(one) == 32
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-5, msg=name)


def test_launchers_read_the_files_that_ship() -> None:
    folder = resources.files("ldrt_edge.train") / "launch"
    environment = launch_environment("fsdp2", 2)
    assert (environment["ACCELERATE_USE_FSDP"], environment["FSDP_VERSION"]) == ("true", "2")
    zero3 = load_config_from_file(str(folder / "zero3.yaml"))
    assert zero3.distributed_type.value == "DEEPSPEED" and zero3.deepspeed_config["zero_stage"] == 3
    _, job = yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
    (pod,) = job["spec"]["template"]["spec"]["containers"]
    slurm = (folder / "slurm.sbatch").read_text().partition("ldrt_edge.cli train ")[2].replace("\\\n", "").split()
    for given in (slurm, pod["command"][pod["command"].index("train") + 1 :]):
        settings = [value for flag, value in pairwise(given) if flag == "--set"]
        recipe = load_recipe(given[given.index("--recipe") + 1], settings)
        assert recipe.devices in (8, 32) and recipe.accumulate == 1


def test_two_processes_train_what_one_trains(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    base = tiny("llava15", "smollm2")
    run([sys.executable, *CLI, *command(base, data, tmp_path / "one", ["devices=2"])])
    told = run([*TORCHRUN, "--nproc-per-node", "2", *CLI, *command(base, data, tmp_path / "two", ["devices=2"])])
    assert told.splitlines() == [str(tmp_path / "two")]  # one of them speaks
    assert len(losses(tmp_path / "one")) == 10
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    same_adapter(tmp_path / "one", tmp_path / "two")
    metrics = [json.loads((tmp_path / name / "manifest.json").read_text())["metrics"] for name in ("one", "two")]
    assert [entry["devices"] for entry in metrics] == [1, 2]


@pytest.mark.slow
def test_fsdp2_trains_what_one_process_trains(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    """Weights, gradients and optimizer sharded over two processes; the adapter gathered whole."""
    base = tiny("llava15", "smollm2")
    run([sys.executable, *CLI, *command(base, data, tmp_path / "one", ["devices=2"])])
    program = [*FSDP_ON_CPU, *command(base, data, tmp_path / "sharded", ["devices=2"])]
    run([*TORCHRUN, "--nproc-per-node", "2", *program], **launch_environment("fsdp2", 2))
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    same_adapter(tmp_path / "one", tmp_path / "sharded")


@pytest.mark.slow
@deepspeed
def test_zero3_trains_what_one_process_trains(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    """Both stages, the best weights put back, sample answers; every parameter spread over two processes."""
    base = tiny("llava15", "smollm2")
    settings = ["devices=2", "align.epochs=1", "keep_best=true", "eval_steps=3", "sample_steps=4"]
    run([sys.executable, *CLI, *command(base, data, tmp_path / "one", settings)])
    run([*zero3(tmp_path, 2), *command(base, data, tmp_path / "spread", settings)], DS_ACCELERATOR="cpu")
    assert losses(tmp_path / "spread") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    same_adapter(tmp_path / "one", tmp_path / "spread")
    assert (tmp_path / "spread" / SAMPLES).read_text() == (tmp_path / "one" / SAMPLES).read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "processes"),
    [("ddp", 2), ("ddp", 1), ("fsdp2", 2), ("fsdp2", 1), pytest.param("zero3", 2, marks=deepspeed)],
)
def test_a_killed_run_goes_on_with_as_many_processes_or_fewer(
    tiny: Tiny, data: Path, tmp_path: Path, kind: str, processes: int
) -> None:
    base, settings = tiny("llava15", "smollm2"), ["devices=2", "save_steps=10", "instruct.epochs=12"]

    def started(number: int) -> subprocess.Popen[str]:
        torchrun = [*TORCHRUN, "--nproc-per-node", str(number)]
        program = {"ddp": [*torchrun, *CLI], "fsdp2": [*torchrun, *FSDP_ON_CPU], "zero3": zero3(tmp_path, number)}[kind]
        environment = launch_environment(kind, number) if kind == "fsdp2" else {"DS_ACCELERATOR": "cpu"}
        return subprocess.Popen(
            [*program, *command(base, data, tmp_path / "out", settings)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    run([sys.executable, *CLI, *command(base, data, tmp_path / "one", settings)])
    killed, written = started(2), tmp_path / ".out.partial" / "instruct"
    deadline = time.monotonic() + 240
    while not list(written.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        assert killed.poll() is None
        time.sleep(0.005)
    launcher = psutil.Process(killed.pid)
    for process in (launcher, *launcher.children(recursive=True)):  # they are in sessions of their own
        process.kill()
    killed.communicate()
    if kind == "zero3":  # its shards are for as many
        told, _ = started(1).communicate(timeout=300)
        assert "was written by 2 processes under ZeRO-3" in told and not (tmp_path / "out").exists()
    told, _ = started(processes).communicate(timeout=300)
    assert "going on from step" in told
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    same_adapter(tmp_path / "one", tmp_path / "out")


@pytest.mark.slow
def test_a_step_that_cannot_be_shared_out_is_refused(
    tiny: Tiny, data: Path, tmp_path: Path
) -> None:
    base = tiny("llava15", "smollm2")
    done = subprocess.run(
        [*TORCHRUN, "--nproc-per-node", "2", *CLI, *command(base, data, tmp_path / "x", ["devices=3"])],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "ldrt-edge: a step of 3 forwards (accumulate 1 on 3 devices) cannot be shared among 2 devices" in done.stderr
    assert not (tmp_path / "x").exists()
