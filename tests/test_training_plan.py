"""`train --plan`: parameters of real shapes, the memory and the steps that a run then takes, what makes it fit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_train import FAST, colour_dataset
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from ldrt_edge import artifact
from ldrt_edge.bench.steps import apart
from ldrt_edge.cli import cli
from ldrt_edge.dataset import Dataset
from ldrt_edge.front import Front
from ldrt_edge.train.base import resolve_base
from ldrt_edge.train.lora import gather_material, train
from ldrt_edge.train.model import build
from ldrt_edge.train.plan import Shape, _kept_bytes, count, estimate, plan
from ldrt_edge.train.recipe import load_recipe
from ldrt_edge.train.watch import METRICS, read_metrics

Tiny = Callable[..., Path]
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
    assert 0.4 * card_gb < estimate(shape, recipe, bf16=True, device="cuda").total / 1e9 < 0.95 * card_gb


def test_what_backward_needs_is_what_autograd_keeps(tiny: Tiny, data: Path) -> None:
    """Counted on shapes alone, against the bytes that a real forward saves."""
    recipe = load_recipe("starter", [*FAST, "lora.dropout=0", "cache_features=false", "standardise_features=false"])
    folder = tiny("llava15", "llama")
    front = Front.from_hf(folder)
    material = gather_material([Dataset(data)], front, recipe)
    shape = Shape.of(folder, front, material, recipe)
    model = build(folder, front, recipe, "cpu", bf16=False)
    length = shape.batch_tokens // shape.rows
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    inputs = torch.randn(shape.rows, length, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.llava.model.language_model(
            inputs_embeds=inputs * 1, position_ids=torch.arange(length)[None].expand(shape.rows, -1), use_cache=False,
            attention_mask=torch.ones(shape.rows, 1, length, length, dtype=torch.bool).tril(),
        )  # fmt: skip
    real = sum(storage.nbytes() for name, storage in kept.items() if name not in weights)
    assert _kept_bytes(shape, recipe, 4, layers=2) == pytest.approx(real, rel=0.15)


def test_a_plan_is_what_then_happens(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    base, recipe = resolve_base(str(tiny("llava15", "smollm2"))), load_recipe("starter", QUICK)
    found = plan(base, [data], recipe, probe_s=2, price_per_hour=3600)
    out = train(base, [data], tmp_path / "adapter", recipe)
    metrics, logged = artifact.read(out).metrics, read_metrics(out / METRICS)
    assert found.steps == max(entry["step"] for entry in logged)
    assert (found.questions, found.rows) == (metrics["questions"], metrics["rows"])
    assert found.probe is not None and found.probe.steps >= 3 and found.seconds is not None
    assert found.cost == pytest.approx(found.seconds)
    assert found.fits and not found.remedies


def test_what_does_not_fit_is_told_with_the_switches_that_make_it_fit(tiny: Tiny, data: Path) -> None:
    base = tiny("llava15", "llama")
    arguments = ["train", "--base", str(base), "--data", str(data), "--plan"]
    for setting in ("rows_per_step=16", "vision_tokens=null"):
        arguments += ["--set", setting]
    plenty = CliRunner().invoke(cli, [*arguments, "--memory-gb", "8", "--json"], catch_exceptions=False)
    found = json.loads(plenty.output)
    assert found["fits"] and found["probe"] is None
    needed = sum(found["memory"].values()) / 1e9
    lean = CliRunner().invoke(cli, [*arguments, "--memory-gb", f"{needed - 0.001}"], catch_exceptions=False)
    assert "does not fit" in lean.output and "--set gradient_checkpointing=true" in lean.output
    hopeless = CliRunner().invoke(cli, [*arguments, "--memory-gb", "0.5"], catch_exceptions=False)
    assert re.search("no switch makes it fit", hopeless.output)


@pytest.mark.slow
def test_the_starter_takes_the_memory_that_its_plan_says(
    starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base, data = resolve_base(str(starter)), colour_dataset(tmp_path / "colours", images=12)
    settings = ["vision_tokens=null", "rows_per_step=4", "instruct.epochs=2", "validation_images=0"]
    recipe = load_recipe("starter", settings)
    found = plan(base, [data], recipe, probe_s=0)
    _, cost = apart(("torch", "transformers", "peft", "accelerate"), train, base, [data], tmp_path / "adapter", recipe)
    assert cost.peak_bytes == pytest.approx(found.memory.total, rel=0.15)
