"""Ablations: one file, every variant trained over seeds, one table with intervals; and switches that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from test_train import FAST, colour_dataset

from ldrt_edge.bench.sweep import main, sweep, table
from ldrt_edge.errors import ConfigError

Tiny = Callable[..., Path]
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
    tiny: Tiny, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {"short": ["instruct.epochs=1"], "longer": ["instruct.epochs=12"]}
    file = written(tmp_path / "sweep.yaml", tiny("llava15", "smollm2"), data, variants=variants, seeds=[0, 1])
    assert main([str(file), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| short", "| longer"]
    assert lines[-1] == str(tmp_path / "out" / "sweep.json")
    made = {path: path.stat().st_mtime for path in (tmp_path / "out").glob("*/adapter_model.safetensors")}
    assert len(made) == 4
    found = sweep(file, tmp_path / "out")
    assert {path: path.stat().st_mtime for path in made} == made, "nothing is trained twice"
    short, longer = found
    assert short.difference is None and longer.difference is not None
    assert longer.accuracy.n == 2 * 12 and longer.accuracy.clusters == 4
    assert max(longer.losses) < min(short.losses)
    assert table(found) == lines[:4]


def test_what_is_wrong_in_a_sweep_file_is_told_at_once(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "sweep.yaml", tiny("llava15", "smollm2"), data, variants=3, sedes=[1])
    with pytest.raises(ConfigError, match=r"variants: .*sedes"):
        sweep(file, tmp_path / "out")


@pytest.mark.slow
def test_all_switches_end_where_the_plain_path_ends(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    """Three seeds of each: the same accuracy within noise, the same last loss within the seeds' own spread."""
    variants = {"plain": [*OFF, "instruct.epochs=16"], "all switches": [*ON, "rows_per_step=3", "instruct.epochs=16"]}
    found = sweep(
        written(tmp_path / "sweep.yaml", tiny("llava15", "smollm2"), data, variants=variants), tmp_path / "out"
    )
    plain, switched = found
    assert switched.difference is not None
    assert switched.difference.ci_low <= 0 <= switched.difference.ci_high, table(found)
    spread = max(plain.losses) - min(plain.losses) + 0.1
    assert abs(sum(switched.losses) - sum(plain.losses)) / 3 <= spread, table(found)
