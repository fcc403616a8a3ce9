"""Training and merging: packed rows are exact, the adapter is stock PEFT, a killed run goes on, the merge is proven."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldrt_edge import artifact
from ldrt_edge.dataset import Dataset, DatasetWriter, Row, Turn
from ldrt_edge.errors import ArtifactError, ConfigError, DataError
from ldrt_edge.front import Front, Message, conversation
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.hf import HfRuntime
from ldrt_edge.train.base import Base, resolve_base
from ldrt_edge.train.collate import PackedRow, pack_rows, sequences
from ldrt_edge.train.features import PackedDataset, collator
from ldrt_edge.train.lora import train
from ldrt_edge.train.merge import merge
from ldrt_edge.train.model import PackedLlava, build
from ldrt_edge.train.plan import plan
from ldrt_edge.train.recipe import Recipe, load_recipe, recipe_names
from ldrt_edge.train.watch import read_metrics

Tiny = Callable[..., Path]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 230), "yellow": (230, 220, 40)}
FAST = ["lora.rank=4", "lora.alpha=8", "precision=fp32", "validation_images=2", "rows_per_step=4", "vision_tokens=null"]


def colour_dataset(out: Path, images: int = 24) -> Path:
    """Plain pictures: what colour, is it red, and a conversation of two turns."""
    rng = np.random.default_rng(0)
    with artifact.create(out, "dataset", {"images": images}) as draft, DatasetWriter(draft.path) as writer:
        for i in range(images):
            name, colour = list(COLOURS.items())[i % len(COLOURS)]
            pixels = np.clip(np.array(colour) + rng.normal(0, 12, (40 + i, 64, 3)), 0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            image, digest = writer.add_image(buffer.getvalue(), ".png")
            red = "yes" if name == "red" else "no"
            talks = [
                ("colour", [("What colour is it?", name)]),
                ("red", [("Is it red?", red)]),
                ("talk", [("Is it red?", red), ("Then which colour is it, in one word?", name)]),
            ]
            for task, pairs in talks:
                turns = tuple(
                    turn for q, a in pairs for turn in (Turn("user", q), Turn("assistant", a))
                )
                split = "test" if i >= images - 4 else "train"
                writer.add(
                    Row(f"{i}-{task}", image, digest, turns, "en", task, "open", "test", "CC0-1.0", digest, "", split)
                )
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_dataset(tmp_path_factory.mktemp("data") / "colours")


def packed_model(folder: Path, recipe: Recipe) -> tuple[PackedLlava, Front]:
    torch.manual_seed(0)
    front = Front.from_hf(folder)
    model = build(folder, front, recipe, "cpu", bf16=False)
    for name, parameter in model.named_parameters():  # LoRA's B starts at zero, and would hide its own gradient
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train(), front


def gradients(model: PackedLlava, front: Front, rows: list[PackedRow]) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss and its gradients over rows, as the trainer feeds them."""
    model.zero_grad()
    dataset = PackedDataset(rows, front, None)
    batch = collator(front, 16)([dataset[i] for i in range(len(dataset))])
    batch.pop("row_ids")
    loss = model(**batch, num_items_in_batch=1)["loss"]
    loss.backward()
    return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "text"), [("llava15", "llama"), ("llava15", "smollm2"), ("llavanext", "mistral")])
def test_packed_branches_do_not_see_each_other(tiny: Tiny, data: Path, family: str, text: str) -> None:
    recipe = load_recipe("starter", [*FAST, "lora.dropout=0"])
    model, front = packed_model(tiny(family, text), recipe)
    dataset = Dataset(data)
    rows = [(dataset, dataset.rows("train")[:12])]
    together = pack_rows(rows, front, 8, 4096, 0)
    alone = pack_rows(rows, front, 1, 4096, 0)
    assert len(together) == 4 and len(alone) == 16
    loss_together, grads_together = gradients(model, front, together)
    loss_alone, grads_alone = gradients(model, front, alone)
    assert loss_together == pytest.approx(loss_alone, rel=1e-5)
    assert grads_together.keys() == grads_alone.keys() and len(grads_alone) > 10
    for name, gradient in grads_alone.items():
        scale = float(gradient.abs().max())
        assert float((gradient - grads_together[name]).abs().max()) <= 1e-4 * scale + 1e-6, name


def test_a_packed_row_holds_exactly_what_inference_would_send(tiny: Tiny, data: Path) -> None:
    folder = tiny("llava15", "smollm2")
    front = Front.from_hf(folder)
    dataset = Dataset(data)
    (row, *_) = pack_rows([(dataset, dataset.rows("train")[:3])], front, 8, 4096, 0)
    laid = sequences(row, front.config.image_token_id, 16)
    prefix = laid.ids[laid.segments == 0]
    for branch, question in enumerate(row.questions, start=1):
        mine = laid.segments == branch
        ids = np.concatenate([prefix, laid.ids[mine]])
        expected = [
            token for t in question.prompt for token in [t] * (16 if t == front.config.image_token_id else 1)
        ] + list(question.answer[:-1])
        assert ids.tolist() == expected
        assert laid.positions[mine].tolist() == list(range(len(prefix), len(expected)))
        labels = laid.labels[mine]
        assert labels[labels >= 0].tolist() == list(question.answer)
        assert front.decode(question.answer) in (*COLOURS, "yes", "no")


def test_a_question_longer_than_a_row_is_refused(tiny: Tiny, data: Path) -> None:
    dataset = Dataset(data)
    with pytest.raises(DataError, match="max_tokens is 8"):
        pack_rows([(dataset, dataset.rows())], Front.from_hf(tiny("llava15", "llama")), 8, 8, 0)


@pytest.mark.parametrize(("family", "text"), [("llava15", "smollm2"), ("llavanext", "mistral")])
def test_a_question_that_its_model_cannot_hold_is_refused(tiny: Tiny, data: Path, family: str, text: str) -> None:
    """Each alone counts, its picture as large as it is: rows share the picture, and begin to count anew behind it."""
    front, dataset = Front.from_hf(tiny(family, text)), Dataset(data)
    rows = [(dataset, dataset.rows("train")[:9])]
    examples = PackedDataset(pack_rows(rows, front, 1, 4096, 0), front, None)
    lengths = [int(examples[i].sequences.positions.max()) + 2 for i in range(len(examples))]  # and the stop token
    longest = max(lengths)

    def packed(context: int) -> list[PackedRow]:
        return pack_rows(rows, front.with_config(replace(front.config, context_length=context)), 8, 4096, 0)

    held = PackedDataset(packed(longest), front, None)
    assert max(len(held[i].sequences.ids) for i in range(len(held))) > longest
    with pytest.raises(DataError, match=rf"row \d+-talk: {longest} tokens, \d+ .* holds {longest - 1}: ") as told:
        packed(longest - 1)
    assert "\n" not in str(told.value)


def test_training_and_its_plan_refuse_what_the_model_cannot_hold(
    tiny: Tiny, data: Path, tmp_path: Path, copy: Callable[..., Path]
) -> None:
    base = resolve_base(str(copy(tiny("llava15", "smollm2"), text_config={"max_position_embeddings": 48})))
    recipe = load_recipe("starter", FAST)
    with pytest.raises(DataError, match=r"row \d+-talk: \d+ tokens, 16 of them its picture's, and the model holds 48"):
        train(base, [data], tmp_path / "x", recipe)
    with pytest.raises(DataError, match="the model holds 48"):
        plan(base, [data], recipe, probe_s=0)


@pytest.fixture(scope="module")
def trained(tiny: Tiny, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path, Path]:
    """(base, adapter, merged) of a tiny model that has learned its colours."""
    folder = tmp_path_factory.mktemp("trained")
    base = resolve_base(str(tiny("llava15", "smollm2")))
    recipe = load_recipe(
        "starter", [*FAST, "align.epochs=2", "instruct.epochs=40", "instruct.learning_rate=5e-3",
                    "instruct.projector_learning_rate=5e-3"],
    )
    adapter = train(base, [data], folder / "adapter", recipe)
    return base, adapter, merge(base, adapter, folder / "merged")


def test_training_learns_to_see(trained: tuple[Base, Path, Path], data: Path) -> None:
    """Greedy answers on pictures it has not seen: the right colour, with the right picture only."""
    _, _, merged = trained
    runtime = HfRuntime(merged)
    dataset = Dataset(data)
    rows = [row for row in dataset.rows("test") if row.task == "colour"]
    answers = []
    for row in rows:
        messages = conversation(row.turns[:1], runtime.front.image(read_image(dataset.image_path(row)).rgb))
        target = runtime.front.answer_ids(messages, row.answer)
        answers.append(runtime.score(runtime.front.prompt(messages), target).argmax(-1).tolist() == list(target))
    assert sum(answers) >= 3, answers


def test_the_adapter_is_stock_peft_and_equals_the_merged_model(trained: tuple[Base, Path, Path]) -> None:
    """transformers' own processor and forward with PeftModel, against our runtime on the merged folder."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    base, adapter, merged = trained
    model = AutoModelForImageTextToText.from_pretrained(base.folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    processor = AutoProcessor.from_pretrained(merged)
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 255, (70, 90, 3), dtype=np.uint8))
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    inputs = processor(images=picture, text=text, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).logits[0, -1].numpy()

    runtime = HfRuntime(merged)
    image = runtime.front.image(np.asarray(picture))
    prompt = runtime.front.prompt([Message("user", "What colour is it?", (image,))])
    assert list(prompt.ids) == inputs["input_ids"][0].tolist()
    np.testing.assert_allclose(runtime.score(prompt, [0])[0], expected, atol=2e-4)
    metrics = artifact.read(merged).metrics
    assert metrics["top1_agreement"] == 1.0 and metrics["mean_kld"] < 1e-8


def test_merging_brings_everything_along(trained: tuple[Base, Path, Path]) -> None:
    base, _, merged = trained
    names = {path.name for path in merged.iterdir()}
    kept = {path.name for path in base.folder.iterdir() if path.is_file() and path.name != "manifest.json"}
    assert kept <= names and {"front.json", "manifest.json"} <= names
    before, after = load_file(base.folder / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("multi_modal_projector.linear_1.bias" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)
    linears = [name for name in before if "language_model" in name and "_proj.weight" in name]
    assert linears and all(name in changed for name in linears)


def test_an_adapter_of_another_base_is_refused(trained: tuple[Base, Path, Path], tiny: Tiny, tmp_path: Path) -> None:
    _, adapter, _ = trained
    with pytest.raises(ArtifactError, match="another base"):
        merge(resolve_base(str(tiny("llava15", "llama"))), adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("idle", ["one of LoRA's", "the projector", "all"])
def test_an_adapter_that_changes_nothing_is_refused(
    trained: tuple[Base, Path, Path], tmp_path: Path, idle: str
) -> None:
    base, adapter, _ = trained
    state = load_file(adapter / "adapter_model.safetensors")
    before = load_file(base.folder / "model.safetensors")
    high = [name for name in state if "lora_B" in name]
    for name in {"one of LoRA's": high[:1], "all": high}.get(idle, []):
        state[name] = torch.zeros_like(state[name])
    for name in (name for name in state if "projector" in name and idle != "one of LoRA's"):
        state[name] = next(t for n, t in before.items() if n.endswith(name.rpartition("multi_modal_projector")[2]))
    manifest = artifact.read(adapter)
    with artifact.create(tmp_path / "idle", "adapter", manifest.config, manifest.inputs) as draft:
        for path in adapter.iterdir():
            if path.name not in ("manifest.json", "adapter_model.safetensors"):
                (draft.path / path.name).write_bytes(path.read_bytes())
        save_file(state, draft.path / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="change nothing"):
        merge(base, tmp_path / "idle", tmp_path / "merged")


@pytest.mark.parametrize(("family", "text"), [("llava15", "smollm2"), ("llavanext", "mistral")])
def test_a_projector_that_was_trained_alone_is_merged(
    tiny: Tiny, data: Path, tmp_path: Path, family: str, text: str
) -> None:
    base = resolve_base(str(tiny(family, text)))
    settings = [*FAST, "align.epochs=1", "instruct.epochs=0", "standardise_features=false"]
    adapter = train(base, [data], tmp_path / "adapter", load_recipe("starter", settings))
    saved = load_file(adapter / "adapter_model.safetensors")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (base.folder, merge(base, adapter, tmp_path / "merged"))
    )
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if "multi_modal_projector" in name:
            (trained,) = (t for n, t in saved.items() if n.endswith(name.rpartition("multi_modal_projector")[2]))
            torch.testing.assert_close(tensor, trained)
            assert not torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor, before[name]), name


def test_vision_tokens_are_carried_to_the_merged_model(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    base = resolve_base(str(tiny("llava15", "smollm2")))
    side = Front.from_hf(base.folder).config.image_size // 14
    pooled = (side // 2) ** 2
    recipe = load_recipe("starter", [*FAST, "align.epochs=0", "instruct.epochs=0.5", f"vision_tokens={pooled}"])
    adapter = train(base, [data], tmp_path / "adapter", recipe)
    merged = merge(base, adapter, tmp_path / "merged")
    image = Front.load(merged).image(np.zeros((50, 50, 3), np.uint8))
    assert image.token_count == pooled


def test_the_projector_starts_out_amplified(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    base = resolve_base(str(tiny("llava15", "smollm2")))
    still = ["instruct.learning_rate=1e-12", "instruct.projector_learning_rate=1e-12", "instruct.epochs=0.2"]
    recipe = load_recipe("starter", [*FAST, *still, "projector_gain=3"])
    saved = load_file(train(base, [data], tmp_path / "adapter", recipe) / "adapter_model.safetensors")
    before = load_file(base.folder / "model.safetensors")
    for name in ("linear_2.weight", "linear_2.bias"):
        found, given = (next(t for n, t in state.items() if n.endswith(name)) for state in (saved, before))
        torch.testing.assert_close(found, 3 * given)


def test_metrics_are_written_as_training_goes(trained: tuple[Base, Path, Path]) -> None:
    _, adapter, _ = trained
    lines = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"align", "instruct"}
    losses = [line["loss"] for line in lines if "loss" in line and line["stage"] == "instruct"]
    assert losses[-1] < 0.5 * losses[0]
    assert any("eval_loss" in line for line in lines)
    assert not (adapter / "instruct").exists()


@pytest.mark.parametrize("seed", [4, 5, 6])  # whose orders have the odd row behind the first ten
def test_a_row_at_which_the_loss_leaps_stops_the_run_and_is_named(
    trained: tuple[Base, Path, Path], data: Path, tmp_path: Path, seed: int
) -> None:
    """A model that has learned its colours goes on with them, and one answer is another's."""
    _, _, merged = trained
    with artifact.create(tmp_path / "odd", "dataset", {}) as draft, DatasetWriter(draft.path) as writer:
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), COLOURS["red"]).save(buffer, "PNG")
        image, digest = writer.add_image(buffer.getvalue(), ".png")
        turns = (Turn("user", "What colour is it?"), Turn("assistant", "Quick zephyrs blow, vexing daft Jim"))
        writer.add(Row("odd", image, digest, turns, "en", "colour", "open", "test", "CC0-1.0", digest, "", "train"))
    settings = [*FAST, "rows_per_step=1", "validation_images=0", "group_by_length=false", "log_steps=1", f"seed={seed}"]
    with pytest.raises(DataError, match=r"the loss leapt from .* rows of this batch: odd$"):
        train(resolve_base(str(merged)), [data, tmp_path / "odd"], tmp_path / "x", load_recipe("starter", settings))
    logged = read_metrics(tmp_path / ".x.partial" / "metrics.jsonl")
    assert len(logged) >= 10 and not (tmp_path / "x").exists(), "it did train before"


def test_kill_9_in_training_then_the_same_command_ends_in_the_same_adapter(
    tiny: Tiny, data: Path, tmp_path: Path
) -> None:
    base = str(tiny("llava15", "smollm2"))
    settings = [*FAST, "align.epochs=1", "instruct.epochs=6", "save_steps=4", "cache_features=false",
                "standardise_features=false"]
    command = [sys.executable, "-m", "ldrt_edge.cli", "train", "--base", base, "--data", str(data)]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run([*command, "--out", tmp_path / "whole"], check=True, capture_output=True, timeout=300)
    process = subprocess.Popen([*command, "--out", tmp_path / "killed"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    checkpoints = tmp_path / ".killed.partial" / "instruct"
    states = "checkpoint-*/trainer_state.json"  # written last; its end is there when all is
    while not any(path.read_text().endswith("}\n") for path in checkpoints.glob(states)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    cut_off = checkpoints / "checkpoint-999"  # a second one, killed while it was written
    cut_off.mkdir()
    (cut_off / "optimizer.pt").write_bytes(b"PK")
    again = subprocess.run([*command, "--out", tmp_path / "killed"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "going on from step" in again.stderr
    whole, killed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_every_shipped_recipe_reads_and_the_paper_recipes_have_the_papers_ranks() -> None:
    assert {"starter", "llava-1.5-7b", "llava-1.6-vicuna-7b", "llava-1.5-13b", "llava-1.6-vicuna-13b"} <= set(
        recipe_names()
    )
    for name in recipe_names():
        recipe = load_recipe(name)
        if name != "starter":
            assert (recipe.lora.rank, recipe.lora.alpha) == (128, 256)
            assert (recipe.instruct.learning_rate, recipe.instruct.projector_learning_rate) == (2e-4, 2e-5)


def test_all_problems_of_a_recipe_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("starter", ["lora.rank=0", "no_such=1", "precision=fp8"])
    assert all(word in str(caught.value) for word in ("lora.rank", "no_such", "precision"))
    with pytest.raises(ConfigError, match=r"there are: .*starter"):
        load_recipe("nope")
    (tmp_path / "bad.yaml").write_text("[1, 2")
    with pytest.raises(ConfigError, match="not YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path / "bad.yaml")
    for value in ("[", "2026-13-01", "0b_"):
        with pytest.raises(ConfigError, match=rf"--set lora.rank={re.escape(value)}: not YAML"):
            load_recipe("starter", [f"lora.rank={value}"])


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("seed=-1", "seed: .*0"),
        ("seed=99999999999", "seed: .*4294967296"),
        ("lora.dropout=1.5", r"lora\.dropout: .*less than 1"),
        ("lora.dropout=.nan", r"lora\.dropout: "),
        ("lora.target_modules=[foo]", r"lora\.target_modules\.0: .*'q_proj'.*foo"),
        ("lora.target_modules=['q_proj|(']", r"lora\.target_modules\.0: .*'q_proj'"),
        ("adam_beta2=2", "adam_beta2: .*less than 1"),
        ("adam_beta2=1.0", "adam_beta2: .*less than 1"),
        ("weight_decay=-1", "weight_decay: .*0"),
        ("max_grad_norm=-1", "max_grad_norm: .*greater than 0"),
        ("min_learning_rate_ratio=5", "min_learning_rate_ratio: .*1"),
        ("cache_gb=.inf", "cache_gb: .*finite"),
        ("warmup=.inf", "warmup: .*finite"),
        ("align.epochs=.nan", r"align\.epochs: .*finite"),
        ("instruct.epochs=.inf", r"instruct\.epochs: .*finite"),
        ("instruct.learning_rate=.inf", r"instruct\.learning_rate: .*finite"),
        ("instruct.epochs=0", r"align\.epochs and instruct\.epochs are both 0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(setting: str, told: str, tmp_path: Path) -> None:
    """By `--set` and from a file, before anything is loaded."""
    *groups, last = setting.partition("=")[0].split(".")
    file = tmp_path / "recipe.yaml"
    file.write_text("".join(f"{group}: " for group in groups) + f"{{{last}: {setting.partition('=')[2]}}}")
    for source, overrides in (("starter", [setting]), (file, [])):
        with pytest.raises(ConfigError, match=told):
            load_recipe(source, overrides)
