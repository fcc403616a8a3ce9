"""Ablations: one file, every variant trained over seeds, one table with intervals; and switches that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import yaml
from test_train import FAST, colour_dataset

from ldrt_edge import artifact
from ldrt_edge.bench.sweep import _seconds, main, read_sweep, recipes_of, sweep, table
from ldrt_edge.dataset import Dataset, DatasetWriter
from ldrt_edge.errors import ConfigError, DataError

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


def test_the_seconds_of_a_run_are_those_of_all_its_starts() -> None:
    assert _seconds([{"seconds": told} for told in (0.5, 3.0, 4.0, 0.25, 2.0, 1.0)]) == 4.0 + 2.0 + 1.0
    assert _seconds([]) == 0.0


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
