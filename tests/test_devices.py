"""Several devices train what one trains: processes on this machine's CPU, talking through gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import psutil
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from test_train import FAST, colour_dataset
from torch.distributed.run import get_args_parser

from ldrt_edge.train.devices import accumulation, keep_precision, say_idle
from ldrt_edge.train.recipe import load_recipe
from ldrt_edge.train.trainer import arguments
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


def zero3(folder: Path, processes: int, own_linear: bool = True) -> list[str]:
    """`accelerate launch` with the config that ships, but that small parameters are spread as well.

    own_linear: DeepSpeed's, which adds a bias to what is rounded already.
    """
    shipped = yaml.safe_load((resources.files("ldrt_edge.train") / "launch" / "zero3.yaml").read_text())
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    spread = {
        "stage": shipped["deepspeed_config"].pop("zero_stage"), "stage3_param_persistence_threshold": 0,
        "memory_efficient_linear": own_linear,
    }  # fmt: skip
    told = folder / "zero3.json"
    told.write_text(json.dumps({"zero_optimization": spread, **dict.fromkeys(sizes, "auto")}))
    shipped["deepspeed_config"] = {"deepspeed_config_file": str(told), "zero3_init_flag": False}
    config = folder / "zero3.yaml"
    config.write_text(yaml.safe_dump(shipped))
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(processes)]
    return [sys.executable, *launch, *CLI]


def losses(adapter: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(adapter / METRICS) if "loss" in entry]


def evaluated(adapter: Path) -> list[float]:
    found = [entry["eval_loss"] for entry in read_metrics(adapter / METRICS) if "eval_loss" in entry]
    assert found
    return found


def same_adapter(first: Path, second: Path, within: float = 2e-5) -> None:
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys() and len(one) == 32
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=within, msg=name)


def alone_among(monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int = 1) -> None:
    """What a process finds on a machine with GPUs, as far as it can be found without one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    place = SimpleNamespace(device=torch.device("cuda"), num_processes=processes, is_main_process=True)
    monkeypatch.setattr("ldrt_edge.train.devices.state", lambda: place)


def test_launchers_read_the_files_that_ship() -> None:
    folder = resources.files("ldrt_edge.train") / "launch"
    environment = launch_environment("fsdp2", 2)
    assert (environment["ACCELERATE_USE_FSDP"], environment["FSDP_VERSION"]) == ("true", "2")
    zero3 = load_config_from_file(str(folder / "zero3.yaml"))
    assert zero3.distributed_type.value == "DEEPSPEED" and zero3.deepspeed_config["zero_stage"] == 3


def clusters() -> dict[str, tuple[list[str], int]]:
    """For each example of a cluster: torchrun's command line, and the seconds from SIGTERM until all is killed."""
    folder = resources.files("ldrt_edge.train") / "launch"
    _, job = yaml.safe_load_all((folder / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    script = (folder / "slurm.sbatch").read_text()
    settings = dict(re.findall(r"^#SBATCH --(\w+)=(.*)", script, re.MULTILINE))
    command = script.partition("srun torchrun ")[2].partition(" &\n")[0].replace("\\\n", "")
    command = command.replace("$SLURM_NNODES", settings["nodes"])
    return {
        "kubernetes": (pod["containers"][0]["command"][1:], pod["terminationGracePeriodSeconds"]),
        "slurm": (shlex.split(command), int(settings["signal"].partition("@")[2])),
    }


@pytest.mark.parametrize(("name", "nodes", "rows"), [("kubernetes", (2, 3, 4), 192), ("slurm", (2,), 32)])
def test_a_cluster_takes_the_same_step_on_as_many_nodes_as_its_file_allows(
    name: str, nodes: tuple[int, ...], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, grace_s = clusters()[name]
    launch = get_args_parser().parse_args(given)
    least, _, most = launch.nnodes.partition(":")
    assert tuple(range(int(least), int(most or least) + 1)) == nodes
    assert 60 < launch.shutdown_timeout < grace_s, "time for a checkpoint, and some for torchrun itself"
    train = launch.training_script_args
    settings = [value for flag, value in pairwise(train) if flag == "--set"]
    recipe = load_recipe(train[train.index("--recipe") + 1], settings)
    for number in nodes:
        gpus = number * int(launch.nproc_per_node)
        alone_among(monkeypatch, 8, processes=gpus)
        assert recipe.rows_per_step * accumulation(recipe.accumulate, recipe.devices) * gpus == rows


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(("status", "requeued"), [(143, True), (0, False)])
def test_slurm_waits_for_the_checkpoint_and_puts_the_job_back_into_the_queue(
    tmp_path: Path, status: int, requeued: bool
) -> None:
    """Or lets it end, where training was done by then."""
    programs = {
        "srun": f"trap 'echo stopped; exit {status}' TERM; echo started; for _ in {{1..400}}; do sleep 0.05; done",
        "scontrol": "echo scontrol $1 $2",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = resources.files("ldrt_edge.train") / "launch" / "slurm.sbatch"
    job = {
        "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "nodes",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    run = subprocess.Popen(["bash", str(script)], env={**os.environ, **job}, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "started\n"
    run.terminate()
    told, _ = run.communicate(timeout=20)
    assert told.splitlines() == ["stopped", *["scontrol requeue 7"] * requeued]


@pytest.mark.parametrize(("gpus", "processes", "told"), [(4, 1, True), (2, 1, True), (1, 1, False), (4, 4, False)])
def test_one_process_uses_one_of_several_gpus_and_says_so(
    gpus: int, processes: int, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone_among(monkeypatch, gpus, processes)
    say_idle()
    assert (f"{gpus} GPUs here, one is used: torchrun" in capsys.readouterr().err) == told
    recipe = load_recipe("starter", ["rows_per_step=3"])
    given = arguments("instruct", tmp_path, tmp_path, recipe, False, False)
    assert given.n_gpu <= 1 and given.train_batch_size == 3, "else transformers wraps the model in nn.DataParallel"


@pytest.mark.parametrize("bf16", [True, False])
def test_zero3_leaves_each_weight_its_precision(bf16: bool) -> None:
    """DeepSpeed's bf16 rounds all weights, and runs without autocast."""
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "bf16": {"enabled": bf16}})
    plugin = SimpleNamespace(hf_ds_config=config, deepspeed_config=config.config)
    keep_precision(cast(Accelerator, SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))))
    assert config.is_false("bf16.enabled")
    assert config.is_true("torch_autocast.enabled") == bf16
    assert config.get_value("torch_autocast.lower_precision_safe_modules") == ([] if bf16 else None)


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


def test_two_processes_fill_an_empty_cache_together(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    base, settings = tiny("llava15", "smollm2"), ["devices=2", "cache_features=true", "standardise_features=true"]
    one = [sys.executable, *CLI, *command(base, data, tmp_path / "one", settings)]
    two = [*TORCHRUN, "--nproc-per-node", "2", *CLI, *command(base, data, tmp_path / "two", settings)]
    for name, program in (("one", one), ("two", two)):
        run(program, XDG_CACHE_HOME=str(tmp_path / f"cache-{name}"))
    kept = [{path.name for path in (tmp_path / f"cache-{name}").rglob("*.safetensors")} for name in ("one", "two")]
    assert kept[0] == kept[1] and len(kept[0]) == 22
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    same_adapter(tmp_path / "one", tmp_path / "two")


def test_two_processes_evaluate_what_one_evaluates(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    """Four rows, of three questions and of one, in batches of three: one is filled up with rows of the other."""
    base, settings = tiny("llava15", "smollm2"), ["devices=2", "questions_per_row=3", "rows_per_step=3", "max_steps=1"]
    run([sys.executable, *CLI, *command(base, data, tmp_path / "one", settings)])
    run([*TORCHRUN, "--nproc-per-node", "2", *CLI, *command(base, data, tmp_path / "two", settings)])
    assert evaluated(tmp_path / "two") == pytest.approx(evaluated(tmp_path / "one"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "cached", "rel", "within", "answers"),
    [("fp32", "false", 1e-5, 2e-5, 6), ("bf16", "true", 3e-3, 1e-4, 2)],
)
def test_fsdp2_trains_what_one_process_trains(
    tiny: Tiny, data: Path, tmp_path: Path, precision: str, cached: str, rel: float, within: float, answers: int
) -> None:
    """Weights, gradients and optimizer sharded over two processes, sample answers, the adapter gathered whole.

    In bf16 as exact as in float32, until a sum's last digit tips a weight's rounding, some steps on. Gradients that are
    summed in bf16 would leave the adapter 7e-4 off.
    """
    base = tiny("llava15", "smollm2")
    settings = ["devices=2", f"precision={precision}", f"cache_features={cached}", "sample_steps=4"]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    run([sys.executable, *CLI, *command(base, data, tmp_path / "one", settings)], **cache)
    program = [*FSDP_ON_CPU, *command(base, data, tmp_path / "sharded", settings)]
    run([*TORCHRUN, "--nproc-per-node", "2", *program], **launch_environment("fsdp2", 2), **cache)
    found, expected = (losses(tmp_path / name) for name in ("sharded", "one"))
    assert found[:2] == pytest.approx(expected[:2], rel=1e-6)
    assert found == pytest.approx(expected, rel=rel)
    same_adapter(tmp_path / "one", tmp_path / "sharded", within)
    assert evaluated(tmp_path / "sharded") == pytest.approx(evaluated(tmp_path / "one"), rel=rel)
    said = [(tmp_path / name / SAMPLES).read_text().splitlines() for name in ("sharded", "one")]
    assert said[0][:answers] == said[1][:answers] and len(said[0]) == len(said[1]) == 6


@pytest.mark.slow
@deepspeed
@pytest.mark.parametrize(
    ("precision", "own_linear", "first", "rel", "within"),
    [("fp32", True, 1e-6, 1e-4, 2e-5), ("bf16", False, 1e-6, 3e-3, 1e-3), ("bf16", True, 1e-3, 3e-3, 3e-3)],
)
def test_zero3_trains_what_one_process_trains(
    tiny: Tiny, data: Path, tmp_path: Path, precision: str, own_linear: bool, first: float, rel: float, within: float
) -> None:
    """Both stages, the best weights put back, sample answers; every parameter spread over two processes.

    In bf16 as exact as in float32, until a weight's rounding tips, if DeepSpeed's own linear is off.
    """
    base = tiny("llava15", "smollm2")
    settings = ["align.epochs=1", "keep_best=true", "eval_steps=3", "sample_steps=4", f"precision={precision}"]
    given = ["devices=2", *settings]
    run([sys.executable, *CLI, *command(base, data, tmp_path / "one", given)])
    run([*zero3(tmp_path, 2, own_linear), *command(base, data, tmp_path / "spread", given)], DS_ACCELERATOR="cpu")
    found, expected = (losses(tmp_path / name) for name in ("spread", "one"))
    assert found[:2] == pytest.approx(expected[:2], rel=first)
    assert found == pytest.approx(expected, rel=rel)
    same_adapter(tmp_path / "one", tmp_path / "spread", within)
    assert evaluated(tmp_path / "spread") == pytest.approx(evaluated(tmp_path / "one"), rel=rel)
    said = [(tmp_path / name / SAMPLES).read_text().splitlines() for name in ("spread", "one")]
    assert said[0][:2] == said[1][:2] and len(said[0]) == len(said[1])
    assert said[0] == said[1] or precision == "bf16"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "processes", "told"),
    [
        ("ddp", 2, ["devices=2"]), ("ddp", 1, ["devices=2"]), ("ddp", 1, []),
        ("fsdp2", 2, ["devices=2"]), ("fsdp2", 1, []), pytest.param("zero3", 2, ["devices=2"], marks=deepspeed),
    ],
)  # fmt: skip
def test_a_killed_run_goes_on_with_as_many_processes_or_fewer(
    tiny: Tiny, data: Path, tmp_path: Path, kind: str, processes: int, told: list[str]
) -> None:
    """It takes the steps that it began with, whether it was told for how many devices they are or not."""
    base, settings = tiny("llava15", "smollm2"), ["save_steps=10", "instruct.epochs=12"]

    def started(number: int) -> subprocess.Popen[str]:
        torchrun = [*TORCHRUN, "--nproc-per-node", str(number)]
        program = {"ddp": [*torchrun, *CLI], "fsdp2": [*torchrun, *FSDP_ON_CPU], "zero3": zero3(tmp_path, number)}[kind]
        environment = launch_environment(kind, number) if kind == "fsdp2" else {"DS_ACCELERATOR": "cpu"}
        return subprocess.Popen(
            [*program, *command(base, data, tmp_path / "out", [*settings, *told])],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    run([sys.executable, *CLI, *command(base, data, tmp_path / "one", [*settings, "devices=2"])])
    killed, written = started(2), tmp_path / ".out.partial" / "instruct"
    deadline = time.monotonic() + 240
    states = "checkpoint-*/trainer_state.json"  # written last; its end is there when all is
    while not any(path.read_text().endswith("}\n") for path in written.glob(states)) and time.monotonic() < deadline:
        assert killed.poll() is None
        time.sleep(0.005)
    launcher = psutil.Process(killed.pid)
    for process in (launcher, *launcher.children(recursive=True)):  # they are in sessions of their own
        process.kill()
    killed.communicate()
    if kind == "zero3":  # its shards are for as many
        said, _ = started(1).communicate(timeout=300)
        assert "was written by 2 processes under ZeRO-3" in said and not (tmp_path / "out").exists()
    said, _ = started(processes).communicate(timeout=300)
    assert "going on from step" in said
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
