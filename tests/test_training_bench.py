"""The training benchmark: all sides take the same step, ratios are of what decides, drawn bases suit processors."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import FAST, colour_dataset
from transformers import AutoProcessor

from ldrt_edge.bench import training, training_peers
from ldrt_edge.bench.mfu import Ceiling
from ldrt_edge.bench.shapes import SHAPES, write_config
from ldrt_edge.bench.training import CUDA_SWITCHES, SWITCHES, Found, Side, Size, compare, table
from ldrt_edge.bench.training_peers import Task, run_ours
from ldrt_edge.errors import ConfigError
from ldrt_edge.front import Front
from ldrt_edge.train import lora
from ldrt_edge.train.features import FeatureStore
from ldrt_edge.train.recipe import load_recipe

Tiny = Callable[..., Path]
SIDE = Side("trainer", 2.0, 1.0, 1.0, 1.0, 1.0, 4_000_000_000, 0.0, (2.0, 1.0), 7200)


@pytest.mark.parametrize("questions", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [Size(), Size(48, 4, 4), Size(24, 8, 5)])
def test_a_step_of_ours_has_as_many_questions_as_a_peers(questions: int, size: Size) -> None:
    for off in [{}, *training._ladder(questions, {**SWITCHES, **CUDA_SWITCHES}).values()]:
        recipe = load_recipe("starter", training._settings(questions, off, size, {**SWITCHES, **CUDA_SWITCHES}))
        assert recipe.rows_per_step * recipe.accumulate * recipe.questions_per_row == size.step
        assert recipe.rows_per_step <= size.rows


def test_ratios_are_of_processor_time_on_a_cpu_and_of_the_clock_on_a_gpu() -> None:
    ceiling = Ceiling("a GPU", 1e12)
    curve = training.Curve(4.0, 9.0, (2.0, 1.1), 0.5, 3600, 3_000_000_000)
    on_cpu = training._side("ours", [(curve, 2_000_000_000)], 36, 1_000_000, None)
    on_gpu = training._side("ours", [(curve, curve.gpu_peak_bytes)], 36, 1_000_000, ceiling)
    assert (on_cpu.rate, on_cpu.mfu) == (9.0, None)
    assert on_gpu.rate == 4.0 and on_gpu.mfu == pytest.approx(4 * 1e6 * 4.0 * 100 / 1e12)
    found = Found("a GPU", ceiling, 6, 12, 3, 1, 1, (0.0,), (on_gpu, replace(SIDE, mfu=0.5)))
    assert table(found)[2:] == [
        "| trainer | 1.00 (1.00–1.00) | 1.00 | 4.00 | 1.00 | 200 | 50% | 1.0000 | 0.0000 |",
        "| ours | 4.00 (4.00–4.00) | 4.00 | 3.00 | 0.75 | 100 | 0% | 1.1000 | 0.1000 |",
    ]


def test_losses_of_other_questions_are_not_compared() -> None:
    """Without a shared prefix questions are shuffled one by one."""
    alone = (replace(SIDE, name=name, same_steps=False, losses=(2.0, 5.0)) for name in ("no switch", "only bf16"))
    ours = replace(SIDE, name="ours", rate=3.0, losses=(2.0, 1.1))
    lines = table(Found("CPU", None, 6, 12, 3, 1, 1, (0.0,), (*alone, ours, replace(SIDE, rate=4.0))))[2:]
    assert [line.split(" | ")[-1] for line in lines] == [*["other questions |"] * 2, "0.1000 |", "0.0000 |"]


def test_what_does_not_divide_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--step 12: no multiple of --questions 5"):
        compare(tmp_path, tmp_path / "out", questions=5)


@pytest.mark.parametrize(
    ("one", "told"),
    [
        ("seed=1", "seed cannot be chosen"),
        (" max_steps=1", "max_steps cannot be chosen"),
        ("max_tokens=64", "max_tokens cannot be chosen"),
        ("devices=2", "devices cannot be chosen"),
        ("early_stop=1", "early_stop cannot be chosen"),
        ("instruct={epochs: 2}", r"instruct\.epochs cannot be chosen"),
        ("rows_per_step=1", "rows_per_step cannot be chosen"),
        ("lora.dropout=0.1", r"lora\.dropout cannot be chosen"),
        ("lora={rank: 4}", r"lora\.dropout cannot be chosen"),
        ("precision=fp32", "precision cannot be chosen: it is a switch of --ladder"),
        ("compile=false", "has it so already"),
        ("bf16=true", "bf16"),
        ("compile=often", "compile"),
    ],
)
def test_one_more_side_that_would_not_train_on_the_same_is_refused(one: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        training._with("starter", training._settings(6, {}, Size(), SWITCHES), one)


@pytest.mark.parametrize("one", ["compile=true", "optimizer=adafactor", "lora.rank=4", "gradient_checkpointing=true"])
def test_one_more_side_may_compute_or_learn_otherwise(one: str) -> None:
    settings = training._settings(6, {}, Size(), SWITCHES)
    ours, other = (load_recipe("starter", given) for given in (settings, training._with("starter", settings, one)))
    assert other != ours and other == load_recipe("starter", [*settings, one])


@pytest.mark.parametrize("threads", [2, 3])
def test_ours_computes_with_as_many_threads_as_the_peers_on_a_busy_machine(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    data = colour_dataset(tmp_path / "colours", images=8)
    settings = (*FAST, "max_steps=2", "log_steps=1", "validation_images=0")
    task = Task(str(tiny("llava15", "smollm2")), data, tmp_path / "work", "starter", settings, threads, 1)
    before, used, prepare = torch.get_num_threads(), [], lora.prepare

    def noting(*arguments: Any) -> Any:
        used.append(torch.get_num_threads())
        return prepare(*arguments)

    monkeypatch.setattr(lora, "prepare", noting)
    monkeypatch.setattr("psutil.cpu_percent", lambda **_: [100.0] * (os.cpu_count() or 1))
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # this and two functions are changed by a run, in a process of its own
    monkeypatch.setattr(lora, "free_cores", lora.free_cores)
    monkeypatch.setattr(FeatureStore, "fill", FeatureStore.fill)
    try:
        run_ours(task)
    finally:
        torch.set_num_threads(before)
    assert used == [threads]


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.6-vicuna-7b"])
def test_a_stock_processor_lays_a_drawn_bases_picture_out_as_ours(tmp_path: Path, name: str) -> None:
    write_config(tmp_path, SHAPES[name], ["How many beams?", "three"], 320)
    picture = Image.new("RGB", (500, 300), "grey")
    processor, front = AutoProcessor.from_pretrained(tmp_path), Front.load(tmp_path)
    ids = processor(images=picture, text="USER: <image>\nHow many beams? ASSISTANT:")["input_ids"][0]
    assert list(ids).count(front.config.image_token_id) == front.image(np.asarray(picture)).token_count


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.6-vicuna-7b"])
def test_a_peer_learns_the_answers_and_nothing_else(tmp_path: Path, name: str) -> None:
    """Though the tokenizer begins a text in its own way."""
    answers = ["three", "three beams of five", "left", "5", "否"]
    write_config(tmp_path, SHAPES[name], ["How many beams? On the left: 5 of three 否", *answers], 340)
    processor, picture = AutoProcessor.from_pretrained(tmp_path), tmp_path / "picture.png"
    Image.new("RGB", (50, 30), "grey").save(picture)
    rows = [SimpleNamespace(question="How many beams?", answer=answer) for answer in answers]
    batch = training_peers._Collator(processor)([{"row": row, "image": picture} for row in rows])
    learnt = [processor.tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
    assert learnt == [answer + processor.tokenizer.eos_token for answer in answers]
