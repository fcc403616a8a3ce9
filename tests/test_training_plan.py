"""`train --plan`: parameters of real shapes, the memory and the steps that a run then takes, what makes it fit."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft.helpers import disable_input_dtype_casting
from test_train import FAST, colour_dataset
from tiny import edit_tensors
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from ldrt_edge import artifact
from ldrt_edge.bench.steps import apart
from ldrt_edge.cli import cli
from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import ConfigError, DataError
from ldrt_edge.front import Front
from ldrt_edge.train import devices
from ldrt_edge.train import probe as probing
from ldrt_edge.train.base import Base, resolve_base
from ldrt_edge.train.features import PackedDataset
from ldrt_edge.train.lora import gather_material, native_bf16, train
from ldrt_edge.train.model import PackedLlava, build
from ldrt_edge.train.plan import Plan, Shape, _kept_bytes, _stays_mapped, count, estimate, plan
from ldrt_edge.train.recipe import Recipe, load_recipe
from ldrt_edge.train.trainer import PackedTrainer
from ldrt_edge.train.watch import METRICS, read_metrics

Tiny = Callable[..., Path]
MAPS = Path("/proc/self/maps")
PACKAGES = ("torch", "transformers", "peft", "accelerate")
QUICK = [*FAST, "instruct.epochs=4", "rows_per_step=2", "log_steps=1", "save_steps=1000"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_dataset(tmp_path_factory.mktemp("data") / "colours", images=24)


def llava15(hidden: int, intermediate: int, layers: int) -> LlavaConfig:
    text = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, vocab_size=32064,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    return LlavaConfig(text_config=text.to_dict(), vision_config=vision.to_dict())


@pytest.mark.parametrize(
    ("shape", "language", "lora", "weights_gb"),
    [((4096, 11008, 32), 6_738_939_904, 319_815_680, 13.5), ((5120, 13824, 40), 13_016_519_680, 500_695_040, 26.0)],
)
def test_the_papers_models_are_counted_without_weights(
    shape: tuple[int, int, int], language: int, lora: int, weights_gb: float
) -> None:
    """Llama-2's own counts, with 64 more rows of two vocabularies; LoRA of rank 128 on seven linears a layer."""
    recipe = load_recipe("llava-1.5-7b")
    counts = count(llava15(*shape), recipe)
    assert (counts[0], counts[4]) == (language, lora)
    found = Shape(llava15(*shape), *counts, longest_row=700, batch_tokens=700, rows=1, answers=60)
    plain = estimate(found, recipe, bf16=True, device="cuda")
    rest = 4 * (found.tower + 2 * found.projector + lora) / 1e9
    assert plain.weights / 1e9 == pytest.approx(weights_gb + rest, rel=0.01)
    assert plain.optimizer == 2 * plain.gradients == 8 * (lora + found.projector)
    packed = estimate(found, replace(recipe, base_precision="nf4"), bf16=True, device="cuda")
    assert plain.weights - packed.weights == pytest.approx((2 - 0.5625) * counts[1])


@pytest.mark.parametrize("card_gb", [24, 48, 80])
def test_the_recipes_for_cards_fit_them(card_gb: int) -> None:
    """A forward of rows of 1,024 tokens, which LLaVA-1.5's pictures with six short questions stay below."""
    recipe, config = load_recipe(f"llava-1.5-7b-{card_gb}gb"), llava15(4096, 11008, 32)
    rows = recipe.rows_per_step
    shape = Shape(config, *count(config, recipe), 1024, batch_tokens=1024 * rows, rows=rows, answers=150 * rows)
    needed = estimate(shape, recipe, bf16=True, device="cuda").total / 1e9
    assert 0.4 * card_gb < needed < 0.95 * card_gb
    told = (resources.files("ldrt_edge.train") / "recipes" / f"llava-1.5-7b-{card_gb}gb.yaml").read_text()
    said = re.search(r"About (\d+) GB with rows of 1,024 tokens by `--plan`", told.replace("\n# ", " "))
    assert said is not None and float(said[1]) == pytest.approx(needed, abs=0.5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("text", "hidden", "dropout"), [("llama", 64, 0.0), ("smollm2", 128, 0.0), ("llama", 64, 0.1)])
def test_what_backward_needs_is_what_autograd_keeps(
    tiny: Tiny, data: Path, precision: str, text: str, hidden: int, dropout: float
) -> None:
    """Counted on shapes alone, to the byte what a real forward saves in the precision that training has."""
    recipe = load_recipe(
        "starter", [*FAST, f"lora.dropout={dropout}", "cache_features=false", "standardise_features=false"]
    )
    folder, bf16 = tiny("llava15", text, hidden=hidden), precision == "bf16"
    front = Front.from_hf(folder)
    shape = Shape.of(folder, front, gather_material([Dataset(data)], front, recipe), recipe)
    model = build(folder, front, recipe, "cpu", bf16)
    length = shape.batch_tokens // shape.rows
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    inputs = torch.randn(shape.rows, length, hidden, requires_grad=True)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        disable_input_dtype_casting(model.peft, active=bf16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model.llava.model.language_model(
            inputs_embeds=inputs * 1, position_ids=torch.arange(length)[None].expand(shape.rows, -1), use_cache=False,
            attention_mask=torch.ones(shape.rows, 1, length, length, dtype=torch.bool).tril(),
        )  # fmt: skip
    real = sum(storage.nbytes() for name, storage in kept.items() if name not in weights)
    assert _kept_bytes(shape, recipe, bf16, layers=2) == real


@pytest.mark.skipif(not MAPS.is_file(), reason="the system does not tell what a process has mapped")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_file_that_stays_mapped_counts_as_memory(
    tiny: Tiny, data: Path, copy: Callable[..., Path], precision: str, stored: torch.dtype
) -> None:
    """Of a model on a CPU: the plan says so where the system says so."""
    recipe, bf16 = load_recipe("starter", FAST), precision == "bf16"
    folder = copy(tiny("llava15", "llama"), dtype=str(stored).rpartition(".")[2])
    edit_tensors(folder, lambda tensors: tensors.update({n: t.to(stored) for n, t in tensors.items()}))
    front = Front.from_hf(folder)
    shape = Shape.of(folder, front, gather_material([Dataset(data)], front, recipe), recipe)
    model = build(folder, front, recipe, "cpu", bf16)
    gc.collect()
    mapped = str(folder / "model.safetensors") in MAPS.read_text()
    assert _stays_mapped(shape, bf16) == mapped
    copied = 0 if bf16 == (stored is torch.bfloat16) else shape.language * (2 if bf16 else 4)
    trained = 4 * (2 * shape.projector + shape.lora)
    found = estimate(shape, recipe, bf16, "cpu")
    assert found.weights == mapped * shape.file_bytes + copied + trained
    tower = 4 * shape.tower
    assert found.loading == (tower if mapped else shape.file_bytes + tower)
    assert found.peak == max(found.total, found.program + found.weights + found.loading)
    del model


def test_a_plan_is_what_then_happens(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, recipe = resolve_base(str(tiny("llava15", "smollm2"))), load_recipe("starter", QUICK)
    found = plan(base, [data], recipe, probe_s=2, price_per_hour=7.2)
    assert capsys.readouterr().out == ""
    out = train(base, [data], tmp_path / "adapter", recipe)
    metrics, logged = artifact.read(out).metrics, read_metrics(out / METRICS)
    assert found.steps == max(entry["step"] for entry in logged)
    assert (found.questions, found.rows) == (metrics["questions"], metrics["rows"])
    assert found.probe is not None and found.probe.steps >= 3 and found.seconds is not None
    assert found.cost is not None and found.cost == pytest.approx(found.seconds * 7.2 / 3600)
    assert found.fits and not found.remedies


def test_stages_are_tried_apart(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with what it trains, in a run's order; evaluations of both are counted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    class Noted(PackedTrainer):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            made.append((Path(str(self.args.output_dir)).name, self.lora))

    monkeypatch.setattr(probing, "PackedTrainer", Noted)
    base, settings = resolve_base(str(tiny("llava15", "llama"))), [*QUICK, "validation_images=2"]
    found = plan(base, [data], load_recipe("starter", [*settings, "align.epochs=2"]), probe_s=0.2)
    assert made == [("align", False), ("instruct", True)]
    assert found.probe is not None and found.seconds is not None
    align, instruct = (found.probe.step_s[stage] for stage in ("align", "instruct"))
    each = found.steps // 6
    assert found.steps == 6 * each
    evaluations = (align + instruct) / 3  # one of each stage, of the two pictures held out
    expected = 2 * each * align + 4 * each * instruct + evaluations + found.probe.start_s + found.probe.features_s
    assert found.seconds == pytest.approx(expected)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[seconds] of a clock that rows read, forwards, optimizers and answers move, a first forward by 100; and forwards.

    An eighth of a second a row, one a forward, a quarter an optimizer's step, seven an answer.
    """
    now = [0.0, 0]

    class Clocked(PackedTrainer):
        def training_step(self, *given: Any, **options: Any) -> torch.Tensor:
            loss = super().training_step(*given, **options)
            now[0] += 1 if now[1] else 101
            now[1] += 1
            return loss

        def _get_grad_norm(self, *given: Any, **options: Any) -> Any:
            now[0] += 0.25
            return super()._get_grad_norm(*given, **options)

    read = PackedDataset.__getitem__

    def slow_read(self: PackedDataset, index: int) -> Any:
        now[0] += 0.125
        return read(self, index)

    def slow_answer(*_: Any) -> list[int]:
        now[0] += 7
        return []

    monkeypatch.setattr(probing, "PackedTrainer", Clocked)
    monkeypatch.setattr(probing, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(PackedDataset, "__getitem__", slow_read)
    monkeypatch.setattr(PackedLlava, "answer", slow_answer)
    return now


@pytest.mark.parametrize(
    ("settings", "steps", "forwards"),
    [
        (["accumulate=1"], 36, 36),
        (["accumulate=2"], 20, 36),  # an epoch of nine forwards ends with a step of one
        (["accumulate=4"], 12, 36),
        (["accumulate=128"], 4, 36),
        (["accumulate=4", "max_steps=5"], 5, 17),
        (["accumulate=50", "rows_per_step=1", "instruct.epochs=3"], 3, 54),
        (["accumulate=7", "rows_per_step=1", "instruct.epochs=3"], 9, 54),
    ],
)
def test_a_step_is_foretold_with_all_its_forwards_and_an_epochs_last_with_those_it_has(
    tiny: Tiny, data: Path, clock: list[float], settings: list[str], steps: int, forwards: int
) -> None:
    """However many they are, no more than six are tried, and a first one's compilation is paid once."""
    recipe = load_recipe("starter", [*QUICK, "cache_features=false", "standardise_features=false", *settings])
    found = plan(resolve_base(str(tiny("llava15", "llama"))), [data], recipe, probe_s=0.1)
    assert found.steps == steps and found.probe is not None
    assert clock[1] == 3 * min(recipe.accumulate, 2)
    assert found.probe.start_s == pytest.approx(100 + 0.125 * recipe.rows_per_step)  # rows are read one forward ahead
    forward_s = 1 + 0.125 * recipe.rows_per_step
    of_step = min(recipe.accumulate, -(-18 // recipe.rows_per_step))
    assert found.probe.step_s == {"instruct": pytest.approx(of_step * forward_s + 0.25)}
    evaluation = 2 / recipe.rows_per_step * (forward_s + (0.25 if of_step == 1 else 0)) / 3
    assert found.seconds == pytest.approx(found.probe.start_s + forwards * forward_s + steps * 0.25 + evaluation)


@pytest.mark.parametrize(
    ("settings", "evaluations"),
    [
        (["max_steps=6", "eval_steps=3"], 2),  # the last step's is one of them
        (["max_steps=6", "eval_steps=6", "keep_best=false"], 1),
        (["max_steps=7", "eval_steps=3", "keep_best=false"], 3),  # the last step's is one more
        (["max_steps=2", "eval_steps=1", "align.epochs=1"], 4),
        (["max_steps=2", "eval_steps=1", "validation_images=0"], 0),
    ],
)
def test_as_many_evaluations_are_foretold_as_there_will_be(
    tiny: Tiny, data: Path, tmp_path: Path, clock: list[float], settings: list[str], evaluations: int
) -> None:
    off = ["cache_features=false", "standardise_features=false"]
    base, recipe = resolve_base(str(tiny("llava15", "llama"))), load_recipe("starter", [*QUICK, *off, *settings])
    found = plan(base, [data], recipe, probe_s=0.1)
    assert found.probe is not None and found.seconds is not None
    step_s = 1 + 0.125 * recipe.rows_per_step + 0.25
    evaluated_s = found.seconds - found.probe.start_s - found.steps * step_s
    assert evaluated_s == pytest.approx(evaluations * step_s / 3)  # of one forward each
    logged = read_metrics(train(base, [data], tmp_path / "adapter", recipe) / METRICS)
    assert sum("eval_loss" in entry for entry in logged) == evaluations


@pytest.mark.parametrize(("settings", "answers"), [([], 2), (["validation_images=0", "instruct.epochs=1"], 6)])
def test_sample_answers_are_foretold(
    tiny: Tiny, data: Path, clock: list[float], settings: list[str], answers: int
) -> None:
    """Every five steps and at a stage's end, to the questions held out, or to six."""
    off = ["cache_features=false", "standardise_features=false", "align.epochs=1"]
    base = resolve_base(str(tiny("llava15", "llama")))
    without, found = (
        plan(base, [data], load_recipe("starter", [*QUICK, *off, *settings, *more]), probe_s=0.1)
        for more in ([], ["sample_steps=5"])
    )
    assert without.seconds is not None and found.seconds is not None
    assert without.probe is not None and without.probe.sample_s == 0
    rounds = {2: 2 + 8, 6: 2 + 2}[answers]
    assert found.seconds - without.seconds + 100 == pytest.approx(rounds * answers * 7.125)


@pytest.mark.parametrize("pictures", [19, 1])
def test_a_plan_refuses_what_does_not_fit_into_the_cache_and_leaves_it_alone(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: int
) -> None:
    """Features of all twenty pictures, those of the two held out as well."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base = resolve_base(str(tiny("llava15", "llama")))
    config = Front.from_hf(base.folder).config
    width = json.loads((base.folder / "config.json").read_text())["vision_config"]["hidden_size"]
    size_gb = (config.image_size // config.patch_size) ** 2 * width * 4 / 1e9
    other = tmp_path / "ldrt-edge" / "features" / "other-float32" / "old.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"0")
    (too_little, enough) = (
        load_recipe("starter", [*QUICK, f"cache_gb={number * size_gb}"]) for number in (pictures, 20)
    )
    with pytest.raises(DataError, match=r"features of 20 pictures .*: raise cache_gb") as raised:
        plan(base, [data], too_little)
    assert plan(base, [data], too_little, memory_gb=24).fits, "of the cache elsewhere nothing is known"
    assert plan(base, [data], enough, probe_s=0.1).fits
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == [other]
    with pytest.raises(DataError, match=re.escape(str(raised.value).partition("the disk")[0])):
        train(base, [data], tmp_path / "out", too_little)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=19e9 * size_gb))
    with pytest.raises(DataError, match=r"the disk has 0.0 left"):
        plan(base, [data], enough, probe_s=0.1)


ODD_DEVICES = """
import functools, os
from ldrt_edge.cli import main
from ldrt_edge.train import plan as planning
rank = int(os.environ["RANK"])
planning.available_bytes = lambda: 10**6 if f"memory of {1 - rank}" == os.environ["ODD"] else 10**10
planning.plan = functools.partial(planning.plan, probe_s=0.1 if rank else 4)
main()
"""


@pytest.mark.parametrize(("odd", "fits"), [("clock", True), ("memory of 0", False), ("memory of 1", False)])
def test_devices_plan_together_and_one_tells(tiny: Tiny, data: Path, tmp_path: Path, odd: str, fits: bool) -> None:
    """Though one's time is up before the other's, or one has the memory and the other has not."""
    program = tmp_path / "odd.py"
    program.write_text(ODD_DEVICES)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    settings = [part for setting in (*QUICK, "accumulate=2", "sample_steps=9") for part in ("--set", setting)]
    given = ["train", "--base", str(tiny("llava15", "llama")), "--data", str(data), "--plan", "--json", *settings]
    ended = subprocess.run(
        [sys.executable, *torchrun, *given], capture_output=True, text=True, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path), "ODD": odd},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(ended.stdout)  # one document
    assert found["fits"] == fits and (found["probe"] is not None) == fits
    assert found["available_bytes"] == (10**10 if fits else 10**6) // 2  # which both share
    assert found["steps"] == 12  # of 18 rows, five forwards on each device
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--memory-gb", "24", "--out", "adapter"], "--memory-gb is for --plan"),
        (["--price", "3", "--out", "adapter"], "--price is for --plan"),
        (["--plan", "--memory-gb", "24", "--price", "3"], "a GPU elsewhere .* without --memory-gb"),
    ],
)
def test_options_that_could_not_act_are_refused(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=told) as raised:
        CliRunner().invoke(
            cli, ["train", "--base", str(tiny("llava15", "llama")), "--data", str(data), *given], catch_exceptions=False
        )
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_features_are_foretold_as_long_as_the_cache_lacks_them(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, recipe = resolve_base(str(tiny("llava15", "llama"))), load_recipe("starter", QUICK)

    def foretold() -> float:
        probe = plan(base, [data], recipe, probe_s=0.1).probe
        assert probe is not None
        return probe.features_s

    first, second = foretold(), foretold()
    assert not list(tmp_path.glob("cache/**/*.safetensors"))
    assert 0.2 < second / first < 5
    train(base, [data], tmp_path / "adapter", recipe)
    assert foretold() == 0
    kept = sorted(tmp_path.glob("cache/**/*.safetensors"))
    kept[0].unlink()
    assert 0 < foretold() < max(first, second) / len(kept) * 5
    assert sorted(tmp_path.glob("cache/**/*.safetensors")) == kept[1:]


@pytest.mark.parametrize(("free_gb", "held_gb"), [(0.5, 0), (0, 0.5), (30, 1), (1, 30)])
def test_a_gpu_has_what_other_programs_leave_of_it(
    tiny: Tiny, data: Path, monkeypatch: pytest.MonkeyPatch, free_gb: float, held_gb: float
) -> None:
    """Of 80 GB; what this process's allocator holds is its own."""
    monkeypatch.setattr(devices, "state", lambda: SimpleNamespace(device=torch.device("cuda"), num_processes=1))
    monkeypatch.setattr(devices, "name", lambda device: "a GPU of 80 GB")
    monkeypatch.setattr(devices, "say_idle", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (round(free_gb * 1e9), 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: round(held_gb * 1e9))
    found = plan(resolve_base(str(tiny("llava15", "llama"))), [data], load_recipe("starter", QUICK), probe_s=0)
    assert found.available_bytes == (free_gb + held_gb) * 1e9
    assert found.fits == (free_gb + held_gb > 1)


def test_what_does_not_fit_is_told_with_the_switches_that_make_it_fit(tiny: Tiny, data: Path) -> None:
    base = tiny("llava15", "llama")
    arguments = ["train", "--base", str(base), "--data", str(data), "--plan"]
    for setting in ("rows_per_step=16", "vision_tokens=null"):
        arguments += ["--set", setting]
    plenty = CliRunner().invoke(cli, [*arguments, "--memory-gb", "8", "--json"], catch_exceptions=False)
    found = json.loads(plenty.output)
    assert found["fits"] and found["probe"] is None
    needed = sum(size for part, size in found["memory"].items() if part != "loading") / 1e9
    lean = CliRunner().invoke(cli, [*arguments, "--memory-gb", f"{needed - 0.001}"], catch_exceptions=False)
    assert "does not fit" in lean.output and "--set gradient_checkpointing=true" in lean.output
    hopeless = CliRunner().invoke(cli, [*arguments, "--memory-gb", "0.5"], catch_exceptions=False)
    assert re.search("no switch makes it fit", hopeless.output)


def test_a_gpu_elsewhere_is_planned_for_as_one(tiny: Tiny, data: Path) -> None:
    """With the recipe's own switches, which this machine may lack, in bf16 and with a GPU's context."""
    settings = ["precision=auto", "optimizer=paged_adamw_8bit", "base_precision=nf4", "kernels=liger"]
    base, recipe = resolve_base(str(tiny("llava15", "llama"))), load_recipe("starter", [*FAST, *settings])
    found = plan(base, [data], recipe, memory_gb=24)
    assert found.device == "a GPU" and found.fits and found.probe is None
    front = Front.from_hf(base.folder)
    shape = Shape.of(base.folder, front, gather_material([Dataset(data)], front, recipe), recipe)
    assert found.memory == estimate(shape, recipe, bf16=True, device="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="pages between GPU and host memory, this is cpu"):
            plan(base, [data], recipe)


@pytest.mark.slow
def test_a_plan_with_a_probe_is_json_and_nothing_else(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base = str(tiny("llava15", "llama"))
    command = [sys.executable, "-m", "ldrt_edge.cli", "train", "--base", base, "--plan", "--json"]
    settings = [part for setting in QUICK for part in ("--set", setting)]
    ended = subprocess.run([*command, "--data", str(data), *settings], capture_output=True, text=True, check=True)
    found = json.loads(ended.stdout)
    assert found["probe"]["steps"] >= 3 and found["seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_starter_takes_the_memory_that_its_plan_says(
    starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    if precision == "bf16" and not native_bf16():
        pytest.skip("no native bf16 here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base, data = resolve_base(str(starter)), colour_dataset(tmp_path / "colours", images=12)
    settings = ["vision_tokens=null", "rows_per_step=4", "instruct.epochs=2", "validation_images=0"]
    recipe = load_recipe("starter", [*settings, f"precision={precision}"])
    found = plan(base, [data], recipe, probe_s=0)
    _, cost = apart(PACKAGES, train, base, [data], tmp_path / "adapter", recipe)
    assert cost.peak_bytes == pytest.approx(found.memory.peak, rel=0.15)


@pytest.mark.slow
def test_a_default_run_takes_the_time_and_the_memory_that_its_plan_says(
    starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one thread, in its processor's time, which other programs hardly add to; three tries, as they do a little."""
    base, data = resolve_base(str(starter)), colour_dataset(tmp_path / "colours", images=24)
    recipe = load_recipe("starter", ["instruct.epochs=3", "validation_images=0"])
    seen = []
    for attempt in range(3):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{attempt}"))
        found, _ = apart(PACKAGES, _foretold, base, data, recipe)
        seconds, cost = apart(PACKAGES, _trained, base, data, tmp_path / f"adapter{attempt}", recipe)
        assert cost.peak_bytes == pytest.approx(found.memory.peak, rel=0.15)
        assert found.seconds is not None
        seen.append((round(found.seconds, 1), round(seconds, 1)))
        if found.seconds == pytest.approx(seconds, rel=0.15):
            return
    pytest.fail(f"foretold and taken seconds of the processor: {seen}")


def _foretold(base: Base, data: Path, recipe: Recipe) -> Plan:
    """A plan whose probe reads the processor's clock; for a process of its own."""
    torch.set_num_threads(1)
    vars(probing)["time"] = SimpleNamespace(monotonic=time.process_time)
    return plan(base, [data], recipe, probe_s=10)


def _trained(base: Base, data: Path, out: Path, recipe: Recipe) -> float:
    """The processor's seconds of a run."""
    torch.set_num_threads(1)
    started = time.process_time()
    train(base, [data], out, recipe)
    return time.process_time() - started
