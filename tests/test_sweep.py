"""Ablations: one file, every variant trained over seeds, one table with intervals; and switches that change nothing."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_train import FAST, colour_dataset

from ldrt_edge import artifact
from ldrt_edge.bench.sweep import _seconds, main, read_sweep, recipes_of, sweep, table
from ldrt_edge.dataset import Dataset, DatasetWriter
from ldrt_edge.errors import ConfigError, DataError
from ldrt_edge.runtimes.hf import HfRuntime, Place
from ldrt_edge.train.model import PackedLlava

Tiny = Callable[..., Path]
SHIPPED = sorted(Path(str(resources.files("ldrt_edge.train") / "sweeps")).glob("*.yaml"))
LEARNING = ["instruct.learning_rate=5e-3", "instruct.projector_learning_rate=5e-3", "keep_best=false"]
OFF = [
    "questions_per_row=1", "answer_only_logits=false", "fused_lora=false", "group_by_length=false", "length_bucket=1",
    "cache_features=false", "standardise_features=false", "rows_per_step=12",
]  # fmt: skip
ON = ["questions_per_row=8", "loss_chunk=8", "standardise_features=false", "gradient_checkpointing=true"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_dataset(tmp_path_factory.mktemp("data") / "colours", images=24)


def written(path: Path, base: Path, data: Path, **changes: object) -> Path:
    shared = [setting for setting in FAST if "rows_per_step" not in setting]
    given = {"base": str(base), "data": [str(data)], "set": [*shared, *LEARNING], **changes}
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


def test_a_sweep_trains_each_variant_once_and_goes_on(
    tiny: Tiny, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = {"short": ["instruct.epochs=1"], "longer": ["instruct.epochs=12"]}
    file = written(tmp_path / "sweep.yaml", tiny("llava15", "smollm2"), data, variants=variants, seeds=[0, 1])
    assert main([str(file), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| short", "| longer"]
    assert lines[-1] == str(tmp_path / "out" / "sweep.json")
    made = {path: path.stat().st_mtime for path in (tmp_path / "out").glob("*/adapter_model.safetensors")}
    assert len(made) == 4
    monkeypatch.setattr("ldrt_edge.bench.sweep.HfRuntime", None)
    found = sweep(file, tmp_path / "out")
    assert {path: path.stat().st_mtime for path in made} == made, "nothing is trained twice, and nothing asked"
    short, longer = found
    assert short.difference is None and longer.difference is not None
    assert longer.accuracy.n == 2 * 12 and longer.accuracy.clusters == 4
    assert max(longer.losses) < min(short.losses)
    assert table(found) == lines[:4]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"variants": 3, "sedes": [1]}, r"variants: .*sedes"),
        ({"seeds": []}, r"seeds: .*at least 1"),
        ({"seeds": [0, 1, 0]}, r"seeds names one twice: 0, 1, 0$"),
        ({"seeds": [-1]}, r"seed: .*\(got -1\)"),
        ({"variants": {}}, r"variants: .*at least 1"),
        ({"variants": {"a": ["lora.rnak=4"]}}, r"lora\.rnak"),
    ],
)
def test_what_is_wrong_in_a_sweep_file_is_told_at_once(
    data: Path, tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    """Before the base is looked for."""
    file = written(tmp_path / "sweep.yaml", tmp_path / "no base", data, **{"variants": {"a": []}, **changes})
    with pytest.raises(ConfigError, match=told):
        sweep(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_yaml_is_no_sweep(tmp_path: Path) -> None:
    for content in (b"base: [", b"base: \xff", b"base: 2026-13-01"):
        (tmp_path / "sweep.yaml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"sweep\.yaml: not YAML"):
            sweep(tmp_path / "sweep.yaml", tmp_path / "out")


def test_what_a_sweep_cannot_do_is_told_before_it_trains(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    base = tiny("llava15", "smollm2")
    untested = tmp_path / "untested"
    with artifact.create(untested, "dataset", {}, []) as draft, DatasetWriter(draft.path) as writer:
        source = Dataset(data)
        for row in source.rows("train"):
            writer.add_image(source.image_path(row).read_bytes(), ".png")
            writer.add(row)
    with pytest.raises(DataError, match="no rows in their test split"):
        sweep(written(tmp_path / "sweep.yaml", base, untested, variants={"a": []}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "taken").write_text("")
    file = written(tmp_path / "sweep.yaml", base, data, variants={"a": []})
    for out in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(DataError, match=f"{out}: no folder can be made there"):
            sweep(file, out)


def test_a_sweep_takes_a_recipe_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("lora: {rank: 3}\n")
    file = written(tmp_path / "sweep.yaml", tmp_path, tmp_path, variants={"a": []}, seeds=[4])
    shared = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**shared, "recipe": str(tmp_path / "mine.yaml"), "set": []}))
    (recipe,) = recipes_of(read_sweep(file)).values()
    assert (recipe.lora.rank, recipe.seed) == (3, 4)


@pytest.mark.parametrize("begun", [1.7e9, None])
@pytest.mark.parametrize("torn", ["", '{"stage": "instr', '{"stage": "instruct", "step": 9, "seconds": 11.0'])
def test_the_seconds_of_a_run_are_those_of_all_its_starts(tmp_path: Path, begun: float | None, torn: str) -> None:
    """Also where a start's first line comes later on the clock than the last of the one before, or shares its line."""
    starts = [
        [("align", 1, 0.5, 2.0), ("align", 2, 3.0, 5.0)],
        [("instruct", 1, 4.0, 6.0), ("instruct", 2, 10.0, 12.0)],
        [("instruct", 2, 11.0, 9.0), ("instruct", 3, 20.0, 18.0), ("instruct", 4, 30.0, 28.0)],
        [("instruct", 3, 31.0, 29.0)],
        [("instruct", 4, 1.0, 30.0)],
    ]
    names, lines = ("stage", "step", "seconds", "processor_seconds"), []
    for start in starts:
        lines += [] if begun is None else [json.dumps({"began": begun}) + "\n"]
        lines += [json.dumps(dict(zip(names, line, strict=True))) + "\n" for line in start]
        lines.append(torn)
    path = tmp_path / artifact.TIMES
    path.write_text("".join(lines))
    assert _seconds(path) == 3.0 + 10.0 + 30.0 + 31.0 + 1.0
    path.write_text("")
    assert _seconds(path) == 0.0


def test_a_start_that_only_its_mark_tells(tmp_path: Path) -> None:
    told = [{"began": 1.0}, 10.0, {"began": 2.0}, {"began": 3.0}, 11.0, 20.0, 30.0]
    lines = [
        line if isinstance(line, dict) else {"stage": "instruct", "step": i, "seconds": line, "processor_seconds": line}
        for i, line in enumerate(told)
    ]
    (tmp_path / artifact.TIMES).write_text("\n".join(map(json.dumps, lines)))
    assert _seconds(tmp_path / artifact.TIMES) == 40.0


def test_a_torn_line_of_times_stops_no_finished_sweep(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    base, variants = tiny("llava15", "smollm2"), {"a": ["max_steps=1"]}
    file = written(tmp_path / "sweep.yaml", base, data, variants=variants, seeds=[0])
    (first,) = sweep(file, tmp_path / "out")
    (times,) = (tmp_path / "out").glob(f"*/{artifact.TIMES}")
    with times.open("a") as stream:
        stream.write('{"stage": "instruct", "st')
    assert sweep(file, tmp_path / "out") == [first]


def test_all_variants_answer_in_one_place_and_another_place_asks_all_again(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    asked: list[tuple[str, int]] = []

    class Noting(HfRuntime):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            held = sum(type(thing) is PackedLlava for thing in gc.get_objects())
            super().__init__(*arguments, **options)
            asked.append((str(self.place), held))

    monkeypatch.setattr("ldrt_edge.bench.sweep.HfRuntime", Noting)
    base, out = tiny("llava15", "smollm2"), tmp_path / "out"
    variants = {"a": ["max_steps=1"], "b": ["max_steps=2"]}
    request.addfinalizer(gc.enable)
    gc.disable()  # which would free by chance, or not
    for dtype, names in [("bfloat16", ["a"]), ("bfloat16", ["a", "b"]), ("float32", ["a", "b"]), ("bfloat16", ["b"])]:
        monkeypatch.setattr("ldrt_edge.bench.sweep.fitting", lambda _, dtype=dtype: Place(dtype, "cpu"))
        given = {name: variants[name] for name in names}
        file = written(tmp_path / "sweep.yaml", base, data, variants=given, seeds=[0])
        assert main([str(file), "--out", str(out)]) == 0
        assert f"right, {dtype} on cpu" in capsys.readouterr().out.splitlines()[0]
        assert {line["place"] for line in json.loads((out / "sweep.json").read_text())} == {f"{dtype} on cpu"}
    assert [place for place, _ in asked] == ["bfloat16 on cpu"] * 2 + ["float32 on cpu"] * 2
    assert [held for _, held in asked] == [0] * 4, "what was trained is gone before its answers are asked for"


def test_variants_of_like_names_do_not_share_a_folder(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    """Not where disks ignore case either, nor where they allow 255 bytes."""
    names = ["r 4", "r-4", "R 4", "+", "-", "long " * 60]
    variants = {name: [f"lora.rank={rank}"] for rank, name in enumerate(names, start=1)}
    file = written(tmp_path / "sweep.yaml", tiny("llava15", "smollm2"), data, variants=variants, seeds=[0])
    shared = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**shared, "set": [*shared["set"], "max_steps=1"]}, sort_keys=False))
    assert [variant.name for variant in sweep(file, tmp_path / "out")] == names
    adapters = {path.parent.name.lower() for path in (tmp_path / "out").glob("*/adapter_model.safetensors")}
    assert len(adapters) == len(names)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_sweep_compares_recipes_over_three_seeds(file: Path) -> None:
    given = read_sweep(file)
    recipes = recipes_of(given)
    assert given.base == "starter" and len(given.seeds) >= 3
    of_one_seed = [recipes[name, given.seeds[0]] for name in given.variants]
    assert len(of_one_seed) >= 2 and len(set(of_one_seed)) == len(of_one_seed), "two variants say the same"


def test_the_sweep_of_switches_takes_as_many_questions_a_step() -> None:
    (file,) = (file for file in SHIPPED if file.stem == "switches")
    recipes = recipes_of(read_sweep(file))
    plain, switched = (recipes[name, 0] for name in ("plain", "all switches"))
    assert plain.rows_per_step * plain.accumulate == 15
    assert switched.rows_per_step * switched.questions_per_row * switched.accumulate == 16
    on = (switched.answer_only_logits, switched.fused_lora, switched.group_by_length, switched.precision)
    off = (plain.answer_only_logits, plain.fused_lora, plain.group_by_length, plain.precision)
    assert on == (True, True, True, "auto") and off == (False, False, False, "fp32")


def test_the_sweep_of_ranks_changes_rank_and_nothing_else() -> None:
    (file,) = (file for file in SHIPPED if file.stem == "rank")
    recipes = list(recipes_of(read_sweep(file)).values())
    assert {recipe.lora.rank for recipe in recipes} == {8, 16, 64}
    assert {recipe.lora.alpha / recipe.lora.rank for recipe in recipes} == {2.0}
    alike = {replace(recipe, seed=0, lora=replace(recipe.lora, rank=1, alpha=1)) for recipe in recipes}
    assert len(alike) == 1


@pytest.mark.slow
def test_all_switches_end_where_the_plain_path_ends(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    """Three seeds of each: the same accuracy within noise, the same last loss within the seeds' own spread."""
    variants = {"plain": [*OFF, "instruct.epochs=16"], "all switches": [*ON, "rows_per_step=3", "instruct.epochs=16"]}
    found = sweep(
        written(tmp_path / "sweep.yaml", tiny("llava15", "smollm2"), data, variants=variants), tmp_path / "out"
    )
    plain, switched = found
    assert plain.accuracy.value > 0.5, "there is something to learn, and some of it was learned"
    assert switched.difference is not None
    assert switched.difference.ci_low <= 0 <= switched.difference.ci_high, table(found)
    spread = max(plain.losses) - min(plain.losses) + 0.1
    assert abs(sum(switched.losses) - sum(plain.losses)) / 3 <= spread, table(found)
