"""Switches that make training faster or leaner leave gradients alone: held against transformers' own model."""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from test_train import FAST, colour_dataset
from transformers import AutoProcessor

from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import DataError
from ldrt_edge.front import Front
from ldrt_edge.train import probe as probing
from ldrt_edge.train.collate import ROW_IDS, PackedRow
from ldrt_edge.train.features import FeatureStore, collator
from ldrt_edge.train.lora import gather_material, prepare
from ldrt_edge.train.model import PackedLlava, build
from ldrt_edge.train.order import RowOrder
from ldrt_edge.train.recipe import Recipe, load_recipe

Tiny = Callable[..., Path]
Gradients = dict[str, torch.Tensor]
OFF = [
    *FAST, "lora.dropout=0", "questions_per_row=1", "answer_only_logits=false", "fused_lora=false",
    "cache_features=false", "standardise_features=false", "length_bucket=1", "validation_images=0",
]  # fmt: skip
SWITCHES = {
    "none": [],
    "shared prefix": ["questions_per_row=8"],
    "cached features": ["cache_features=true"],
    "answer-only logits": ["answer_only_logits=true"],
    "chunked loss": ["answer_only_logits=true", "loss_chunk=3"],
    "fused LoRA": ["fused_lora=true"],
    "buckets": ["length_bucket=64"],
    "checkpointing": ["gradient_checkpointing=true"],
}
SWITCHES["all"] = [setting for settings in SWITCHES.values() for setting in settings]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_dataset(tmp_path_factory.mktemp("data") / "colours", images=6)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def model_of(folder: Path, recipe: Recipe, device: str = "cpu") -> PackedLlava:
    torch.manual_seed(0)
    model = build(folder, Front.from_hf(folder), recipe, "cpu", bf16=False)
    for name, parameter in model.named_parameters():  # LoRA's B starts at zero, and would hide its own gradient
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.trainable(lora=True)
    return model.to(device).train()


def of(model: PackedLlava) -> Gradients:
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def ours(folder: Path, data: Path, settings: list[str], device: str = "cpu") -> tuple[float, Gradients]:
    """Summed loss and gradients over the whole dataset, in the batches that the trainer would make."""
    recipe = load_recipe("starter", [*OFF, *settings])
    model = model_of(folder, recipe, device)
    material = gather_material([Dataset(data)], model.front, recipe)
    dataset, _ = prepare(model, material, recipe, bf16=False)
    order, collate, total = list(RowOrder(dataset.lengths(), 0, 2)), collator(model.front, recipe.length_bucket), 0.0
    for start in range(0, len(order), 2):
        batch = collate([dataset[i] for i in order[start : start + 2]])
        batch.pop(ROW_IDS)
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}, num_items_in_batch=1)["loss"]
        loss.backward()
        total += loss.item()
    return total, of(model)


def plain(folder: Path, data: Path) -> tuple[float, Gradients]:
    """The same by transformers' processor and forward on pixel values, a question at a time, all logits."""
    recipe = load_recipe("starter", OFF)
    model, processor = model_of(folder, recipe), AutoProcessor.from_pretrained(folder)
    placeholder = "<image>"
    total = 0.0
    rows: list[PackedRow] = gather_material([Dataset(data)], model.front, recipe).rows
    for row in rows:
        (question,) = row.questions
        text = processor.tokenizer.decode(question.prompt)
        assert text.count(placeholder) == 1
        inputs = processor(images=Image.open(row.image), text=text, return_tensors="pt", add_special_tokens=False)
        answer = torch.tensor([question.answer])
        ids = torch.cat([inputs.pop("input_ids"), answer], 1)
        inputs["attention_mask"] = torch.ones_like(ids)
        labels = torch.cat([torch.full_like(ids[:, : -answer.shape[1]], -100), answer], 1)
        loss = model.peft(input_ids=ids, labels=labels, **inputs).loss * answer.shape[1]
        loss.backward()
        total += loss.item()
    return total, of(model)


@pytest.mark.parametrize(("family", "text"), [("llava15", "smollm2"), ("llavanext", "mistral")])
def test_no_switch_changes_the_gradients(tiny: Tiny, data: Path, family: str, text: str) -> None:
    folder = tiny(family, text)
    loss, expected = plain(folder, data)
    for name, settings in SWITCHES.items():
        found_loss, found = ours(folder, data, settings)
        assert found_loss == pytest.approx(loss, rel=1e-5), name
        assert found.keys() == expected.keys() and len(found) == 32, name
        for parameter, gradient in expected.items():
            apart = float((found[parameter] - gradient).abs().max() / gradient.abs().max())
            assert apart <= 1e-5, f"{name}: {parameter} differs by {apart:.2g}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_gradients_of_the_cpu(tiny: Tiny, data: Path) -> None:
    folder = tiny("llava15", "llama")
    loss, expected = ours(folder, data, [])
    for name, settings in {**SWITCHES, "Liger": ["kernels=liger"]}.items():
        found_loss, found = ours(folder, data, settings, "cuda")
        assert found_loss == pytest.approx(loss, rel=1e-5), name
        for parameter, gradient in expected.items():
            apart = float((found[parameter] - gradient).abs().max() / gradient.abs().max())
            assert apart <= 1e-4, f"{name}: {parameter} differs by {apart:.2g}"


def test_bf16_rounds_products_and_nothing_else(tiny: Tiny, data: Path) -> None:
    """A RoPE frequency in bf16 is off by up to 0.4%, which at token 700 is another angle altogether."""
    folder, recipe = tiny("llava15", "smollm2"), load_recipe("starter", OFF)
    exact, rounded = (
        build(folder, Front.from_hf(folder), recipe, "cpu", bf16).llava.model.language_model for bf16 in (False, True)
    )
    assert torch.equal(rounded.rotary_emb.inv_freq, exact.rotary_emb.inv_freq)
    for (name, module), other in zip(rounded.named_modules(), exact.modules(), strict=True):
        if "lora" in name:
            continue
        for own, its in zip(module.parameters(recurse=False), other.parameters(recurse=False), strict=True):
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                assert own.dtype == torch.bfloat16
            else:
                assert torch.equal(own, its), name


def test_processes_that_read_batches_ahead_get_no_weights(tiny: Tiny, data: Path) -> None:
    recipe = load_recipe("starter", [*OFF, "cache_features=true"])
    model = model_of(tiny("llava15", "smollm2"), recipe)
    dataset, _ = prepare(model, gather_material([Dataset(data)], model.front, recipe), recipe, bf16=False)
    sent = pickle.dumps((dataset, collator(model.front, recipe.length_bucket)))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert len(sent) < weights / 4
    again, collate = pickle.loads(sent)
    assert torch.equal(collate([again[0]])["features"], collate([dataset[0]])["features"])


@pytest.fixture
def kept(tiny: Tiny, tmp_path: Path) -> tuple[PackedLlava, list[PackedRow], FeatureStore]:
    """A model, rows of eight pictures, and an empty store for their features."""
    recipe = load_recipe("starter", OFF)
    model = model_of(tiny("llava15", "smollm2"), recipe)
    pictures = Dataset(colour_dataset(tmp_path / "colours", images=12))
    return model, gather_material([pictures], model.front, recipe).rows, store_of(model)


def store_of(model: PackedLlava, exact: bool = True, limit_bytes: int = 10**9) -> FeatureStore:
    return FeatureStore(model.llava, model.front, exact, limit_bytes)


def files(tmp_path: Path) -> set[Path]:
    return set(tmp_path.glob("ldrt-edge/features/*/*.safetensors"))


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1)])
def test_devices_that_come_one_after_the_other_leave_no_picture_out(
    kept: tuple[PackedLlava, list[PackedRow], FeatureStore], order: tuple[int, ...]
) -> None:
    """A slow device finds what a quick one has written already, and knows its own share all the same."""
    model, rows, store = kept
    for place in order:
        store.fill(model.llava, rows, batch=1, share=(place, len(order)))
    assert {store.get(row.image_sha256)[0].shape[1] for row in rows} == {model.llava.config.vision_config.hidden_size}


def test_the_store_drops_what_was_not_used_for_longest_and_nothing_that_this_run_wants(
    kept: tuple[PackedLlava, list[PackedRow], FeatureStore], tmp_path: Path
) -> None:
    model, rows, _ = kept
    of = {row.image_sha256: row for row in rows}
    oldest, older, recent, new = list(of)[:4]
    store_of(model).fill(model.llava, [of[oldest], of[older], of[recent]])
    for age, digest in enumerate((recent, older, oldest)):
        path = next(path for path in files(tmp_path) if path.stem == digest)
        os.utime(path, (1e9 - age, 1e9 - age))
    size = next(iter(files(tmp_path))).stat().st_size
    small = store_of(model, limit_bytes=3 * size)
    small.fill(model.llava, [of[oldest], of[new]])  # the oldest is wanted, so the next one goes
    assert {path.stem for path in files(tmp_path)} == {oldest, recent, new}
    with pytest.raises(DataError, match=r"cache_gb allows .*: raise cache_gb, .* or cache_features=false"):
        small.fill(model.llava, rows)


def of_pictures(rows: list[PackedRow]) -> list[PackedRow]:
    """A row of each picture."""
    return list({row.image_sha256: row for row in rows}.values())


def refused(model: PackedLlava, rows: list[PackedRow], limit_bytes: int, told: str) -> None:
    before = sorted(Path(os.environ["XDG_CACHE_HOME"]).rglob("*"))
    with pytest.raises(DataError, match=told) as raised:
        store_of(model, limit_bytes=limit_bytes).fill(model.llava, rows)
    assert "\n" not in str(raised.value)
    after = sorted(Path(os.environ["XDG_CACHE_HOME"]).rglob("*"))
    assert [path for path in after if path.name != ".lock"] == [path for path in before if path.name != ".lock"]


@pytest.mark.parametrize(("mine", "others"), [(2, 2), (1, 3)])
def test_no_run_drops_what_another_reads(
    kept: tuple[PackedLlava, list[PackedRow], FeatureStore], tmp_path: Path, mine: int, others: int
) -> None:
    """Until that one is done; also pictures of another tower's run, and those that it wants only now."""
    model, rows, first = kept
    rows = of_pictures(rows)
    first.fill(model.llava, rows[:mine])
    size = next(iter(files(tmp_path))).stat().st_size
    refused(model, rows[mine : mine + others], others * size, "runs under way read 0.0 others")
    store_of(model, exact=False).fill(model.llava, rows[mine : mine + 1])
    refused(model, rows[mine : mine + others], others * size, "runs under way read 0.0 others")
    first.fill(model.llava, rows[mine : mine + 1])  # what it wants now is listed instead
    second = store_of(model, limit_bytes=others * size)
    second.fill(model.llava, rows[mine : mine + others])
    assert {path.stem for path in files(tmp_path)} == {row.image_sha256 for row in rows[mine : mine + others]}
    refused(model, rows[:mine], others * size, "cache_gb allows")
    del second
    store_of(model, limit_bytes=(1 + mine) * size).fill(model.llava, rows[:mine])
    for row in rows[: mine + 1]:
        first.get(row.image_sha256)


@pytest.mark.parametrize(("mine", "others", "shared"), [(3, 4, 0), (5, 2, 0), (4, 4, 2)])
def test_what_another_run_has_yet_to_compute_has_its_room(
    kept: tuple[PackedLlava, list[PackedRow], FeatureStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    mine: int, others: int, shared: int,
) -> None:  # fmt: skip
    """In the cache and on the disk, at the size of its own precision; what both want is there once."""
    model, rows, _ = kept
    rows = of_pictures(rows)
    store_of(model).fill(model.llava, rows[:1])
    size = next(iter(files(tmp_path))).stat().st_size
    next(iter(files(tmp_path))).unlink()
    first, wanted = store_of(model), rows[mine - shared : mine - shared + others]
    with monkeypatch.context() as begun:  # and not come far
        begun.setattr(FeatureStore, "_compute", lambda *_: None)
        first.fill(model.llava, rows[:mine])
    both = mine + others - shared
    refused(model, wanted, (both - 1) * size, "runs under way read 0.0 others")
    exact, half = store_of(model, limit_bytes=both * size), store_of(model, False, mine * size + others * size // 2)
    for fits in [exact, *([] if shared else [half])]:
        assert not fits.to_drop({row.image_sha256 for row in wanted})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=(both - 1) * size))
    refused(model, wanted, 10**9, "the disk has 0.0 left")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=both * size))
    store_of(model).fill(model.llava, wanted)
    del first
    store_of(model, limit_bytes=others * size).fill(model.llava, wanted)


def test_a_plan_that_looks_at_a_list_just_then_leaves_it_locked(
    kept: tuple[PackedLlava, list[PackedRow], FeatureStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows, store = kept
    rows, opened, looking = of_pictures(rows), os.open, []

    def seen(path: Any, *given: Any) -> int:
        """Opens a file that a plan has locked, for half a second from now on, to see whether anybody has."""
        file = opened(path, *given)
        if Path(path).name.startswith(".read-by-") and not looking:
            looking.append(opened(path, os.O_RDONLY))
            fcntl.flock(looking[0], fcntl.LOCK_SH)
            Timer(0.5, os.close, looking).start()
        return file

    monkeypatch.setattr(os, "open", seen)
    store.fill(model.llava, rows[:2])
    size = next(iter(files(tmp_path))).stat().st_size
    refused(model, rows[2:4], 2 * size, "runs under way read")


@contextmanager
def in_another_process(work: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """While another process, which is killed then, has come to where `work` calls what it is given."""
    reader, writer = os.pipe()

    def wait() -> None:
        os.write(writer, b"!")
        time.sleep(600)

    child = os.fork()
    if not child:
        try:
            work(wait)
        finally:
            os._exit(1)
    try:
        assert os.read(reader, 1) == b"!"
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("where", ["a plan", "a picture"])
def test_what_a_killed_process_has_begun_to_write_goes_and_what_another_writes_stays(
    kept: tuple[PackedLlava, list[PackedRow], FeatureStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    model, rows, _ = kept
    rows = of_pictures(rows)

    def planned(wait: Callable[[], None]) -> None:
        with probing._scratch() as folder:
            FeatureStore(model.llava, model.front, True, 10**9, folder).fill(model.llava, rows[:2])
            wait()

    def stopped(wait: Callable[[], None]) -> None:
        monkeypatch.setattr(Path, "rename", lambda *_: wait())  # written, but under no final name
        store_of(model).fill(model.llava, rows[:2])

    def begun() -> set[Path]:
        names = tmp_path.glob("ldrt-edge/**/*")
        return {p for p in names if p.is_file() and p.stat().st_size > 1000 and p not in files(tmp_path)}

    work = planned if where == "a plan" else stopped
    with in_another_process(work):
        left = begun()
        assert left
        with in_another_process(work):
            living = begun() - left
            assert living
        store_of(model).fill(model.llava, rows[2:3])
        assert begun() == left, "one lives, the other was killed"
        with probing._scratch():
            assert begun() == left
    with probing._scratch() as folder:
        assert begun() == set() and folder.is_dir()
    assert not folder.exists()
    store_of(model).fill(model.llava, rows)
    assert len(files(tmp_path)) == len(rows)


def test_a_killed_run_keeps_nothing_from_being_dropped(
    kept: tuple[PackedLlava, list[PackedRow], FeatureStore], tmp_path: Path
) -> None:
    model, rows, _ = kept
    rows = of_pictures(rows)
    store_of(model).fill(model.llava, rows[:3])
    size = next(iter(files(tmp_path))).stat().st_size

    def other(wait: Callable[[], None]) -> None:
        """Finds all that it wants."""
        store = store_of(model)
        store.fill(model.llava, rows[:3])
        wait()

    with in_another_process(other):
        refused(model, rows[3:5], 2 * size, "runs under way read")
    store_of(model, limit_bytes=2 * size).fill(model.llava, rows[3:5])
    assert {path.stem for path in files(tmp_path)} == {row.image_sha256 for row in rows[3:5]}
    assert len(list(tmp_path.rglob(".read-by-*"))) == 1, "lists of runs that ended go"


def test_features_that_someone_removes_are_told_in_a_line(
    kept: tuple[PackedLlava, list[PackedRow], FeatureStore], tmp_path: Path
) -> None:
    """While they are counted they are not there; when they are read the run says so."""
    model, rows, store = kept
    rows = of_pictures(rows)
    store.fill(model.llava, rows[:2])
    for path in files(tmp_path):
        (path.parent / "gone.safetensors").unlink(missing_ok=True)
        (path.parent / "gone.safetensors").symlink_to("nowhere")
    store.fill(model.llava, rows)
    for row in (rows[0], rows[-1]):
        next(path for path in files(tmp_path) if path.stem == row.image_sha256).unlink()
        with pytest.raises(DataError, match=r"were removed: give the same command again") as raised:
            store.get(row.image_sha256)
        assert "\n" not in str(raised.value)


def test_features_are_kept_apart_by_tower_by_preparation_and_by_precision(
    kept: tuple[PackedLlava, list[PackedRow], FeatureStore], tmp_path: Path
) -> None:
    model, rows, store = kept
    store.fill(model.llava, rows)
    held = files(tmp_path)
    store_of(model).fill(model.llava, rows)
    assert files(tmp_path) == held, "the same tower finds them again"
    store_of(model, exact=False).fill(model.llava, rows)
    assert len(files(tmp_path)) == 2 * len(held)
    with torch.no_grad():
        next(model.llava.model.vision_tower.parameters()).flatten()[0] += 1
    store_of(model).fill(model.llava, rows)
    assert len(files(tmp_path)) == 3 * len(held)
    model.front = model.front.with_config(replace(model.front.config, image_mean=(0.5, 0.5, 0.5)))
    store_of(model).fill(model.llava, rows)
    assert len(files(tmp_path)) == 4 * len(held)


def test_standardised_features_leave_the_function_and_loras_gradients(tiny: Tiny, data: Path) -> None:
    folder = tiny("llava15", "llama")
    loss, expected = ours(folder, data, ["cache_features=true"])
    found_loss, found = ours(folder, data, ["cache_features=true", "standardise_features=true"])
    assert found_loss == pytest.approx(loss, rel=1e-5)
    for name in (name for name in expected if "lora" in name):
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5 * scale)
