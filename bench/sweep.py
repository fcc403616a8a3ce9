"""Ablations: one file of variants, each trained over some seeds, all in one table with intervals.

    python -m ldrt_edge.bench.sweep SWEEP.yaml --out OUT

    base: starter
    data: [DATASET]
    recipe: starter                     # or a file, MINE.yaml
    seeds: [0, 1, 2]
    set: [instruct.epochs=1]            # for all variants
    variants:
      plain: []                         # the first is what the others are held against
      rank 32: [lora.rank=32, lora.alpha=64]

`train/sweeps/` has ready ones, on phantoms:

    ldrt-edge data phantom phantoms --images 200
    python -m ldrt_edge.bench.sweep train/sweeps/rank.yaml --out rank

Every run is an adapter in OUT, and what it answered is in a journal there; a second call finds both, so a sweep that
was stopped goes on. Accuracy is that of whole answers on the datasets' test split, as greedy decoding would give them:
the most likely token at every place of the right answer. All variants answer in one precision on one device, those that
fit when the sweep starts; where others do at a later start, all are asked again. Differences are paired by question and
clustered by what a split must not divide (an article).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from ldrt_edge import artifact, console
from ldrt_edge.bench.statistics import Difference, Rate, paired_difference, rate
from ldrt_edge.bench.steps import Journal, made
from ldrt_edge.convert.weights import Weights
from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import ConfigError, DataError, LdrtError, all_problems
from ldrt_edge.front import conversation
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.hf import HfRuntime, Place, fitting
from ldrt_edge.train.base import Base, resolve_base
from ldrt_edge.train.lora import train
from ldrt_edge.train.recipe import Recipe, load_recipe

RESULTS, JOURNAL = "sweep.json", "journal.jsonl"
_WHOLE = re.compile(r"\{[^{}]*\}")
"""A line of `times.jsonl` from its beginning to its end; nothing in one has parts."""
_ONWARD = ("step", "seconds", "processor_seconds")


@checked(frozen=True, config=ConfigDict(extra="forbid"))
class Sweep:
    """A sweep file; see the module's text."""

    base: str
    data: Annotated[tuple[Path, ...], Field(min_length=1)]
    variants: Annotated[dict[str, tuple[str, ...]], Field(min_length=1)]
    recipe: str = "starter"
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    set: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"seeds names one twice: {', '.join(map(str, self.seeds))}")


@dataclass(frozen=True)
class Variant:
    """One line of the table. difference: to the first variant, None for itself.

    seconds: of one run's steps and evaluations, all its starts together, each up to its last log line.
    place: what all variants' answers were computed in, as "float32 on cuda".
    """

    name: str
    settings: tuple[str, ...]
    accuracy: Rate
    difference: Difference | None
    losses: tuple[float, ...]
    seconds: float
    place: str


def sweep(file: Path, out: Path) -> list[Variant]:
    """Train and measure every variant; writes `sweep.json` into `out`.

    Raises:
        ConfigError: the file is no sweep, or a setting in it is none. DataError: the datasets have no test split.
            And what `train` raises.
    """
    given = read_sweep(file)
    recipes = recipes_of(given)
    datasets = [Dataset(folder) for folder in given.data]
    if not any(dataset.rows("test") for dataset in datasets):
        raise DataError("the datasets have no rows in their test split, so there is nothing to compare variants on")
    base = resolve_base(given.base)
    place = fitting(Weights(base.folder).count)
    made(out)
    journal, asked = Journal(out / JOURNAL), [artifact.identity(folder).manifest_sha256 for folder in given.data]
    right: dict[str, list[float]] = {name: [] for name in given.variants}
    metrics: dict[str, list[dict[str, Any]]] = {name: [] for name in given.variants}
    seconds = dict.fromkeys(given.variants, 0.0)
    clusters: list[str] = []
    for seed in given.seeds:  # seed by seed: a sweep that is stopped has whole comparisons
        for name in given.variants:
            console.say(f"{name}, seed {seed}")
            adapter = train(base, given.data, out / f"{_slug(name)}-seed{seed}", recipes[name, seed])
            metrics[name].append(dict(artifact.read(adapter).metrics))
            seconds[name] += _seconds(adapter / artifact.TIMES)
            key = {"adapter": artifact.identity(adapter).manifest_sha256, "data": asked, "place": str(place)}
            gave = journal.once(key, partial(_answers, base, adapter, datasets, place))
            right[name] += gave["right"]
        clusters += gave["groups"]
    first = next(iter(given.variants))
    found = [
        Variant(
            name, settings, rate(right[name], clusters),
            None if name == first else paired_difference(right[name], right[first], clusters),
            tuple(entry["loss"] for entry in metrics[name]),
            seconds[name] / len(given.seeds),
            str(place),
        )
        for name, settings in given.variants.items()
    ]  # fmt: skip
    artifact.replace_text(out / RESULTS, json.dumps([asdict(variant) for variant in found], indent=1, default=str))
    return found


def table(found: Sequence[Variant]) -> list[str]:
    """Markdown: accuracy with its 95% interval, the paired difference to the first variant, last losses, time."""
    lines = [
        f"| variant | right, {found[0].place} | against the first, points | last loss of each seed | seconds |",
        "|" + "---|" * 5,
    ]
    for variant in found:
        accuracy, against = variant.accuracy, variant.difference
        points = "" if against is None else (
            f"{100 * against.value:+.1f} ({100 * against.ci_low:+.1f} to {100 * against.ci_high:+.1f})"
        )
        losses = ", ".join(f"{loss:.3f}" for loss in variant.losses)
        lines.append(
            f"| {variant.name} | {accuracy.value:.1%} ({accuracy.ci_low:.1%}–{accuracy.ci_high:.1%}) | {points} | "
            f"{losses} | {variant.seconds:.0f} |"
        )
    return lines


def read_sweep(file: Path) -> Sweep:
    """What a sweep file says.

    Raises:
        ConfigError: it is no sweep; all that is wrong at once.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such sweep file")
    try:
        return TypeAdapter(Sweep).validate_python(yaml.safe_load(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise ConfigError(all_problems(problems, str(file))) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, a date of month 13
        raise ConfigError(f"{file}: not YAML ({str(error).splitlines()[0]})") from error


def recipes_of(given: Sweep) -> dict[tuple[str, int], Recipe]:
    """The recipe of every run, by variant and seed.

    Raises:
        ConfigError: a setting that the recipe does not have, or does not allow.
    """
    named = Path(given.recipe) if given.recipe.endswith((".yaml", ".yml")) else given.recipe
    return {
        (name, seed): load_recipe(named, [*given.set, *settings, f"seed={seed}"])
        for name, settings in given.variants.items() for seed in given.seeds
    }  # fmt: skip


def _answers(base: Base, adapter: Path, datasets: Sequence[Dataset], place: Place) -> dict[str, list[Any]]:
    """1.0 for every question of the test split whose whole answer is the most likely one (`right`); their `groups`."""
    import torch

    rows = [(dataset, row) for dataset in datasets for row in dataset.rows("test")]
    gc.collect()  # what was trained hangs together in circles, and torch keeps a GPU's memory
    torch.cuda.empty_cache()
    runtime = HfRuntime(base.folder, dtype=place.dtype, device=place.device, adapter=adapter)
    right = []
    try:
        for dataset, row in console.track(rows, "test split"):
            picture = runtime.front.image(read_image(dataset.image_path(row)).rgb)
            messages = conversation(row.turns[:-1], picture)
            answer = runtime.front.answer_ids(messages, row.answer)
            likely = runtime.score(runtime.front.prompt(messages), answer).argmax(-1)
            right.append(float(likely.tolist() == list(answer)))
    finally:
        runtime.close()
    return {"right": right, "groups": [row.group for _, row in rows]}


def _seconds(times: Path) -> float:
    """Of all starts and stages in a run's `times.jsonl`; each counts from its own beginning.

    A line with `began` tells a beginning. A file without is older, and there one is seen where the stage is another, or
    the step or a clock goes back. A line that a full disk cut off is passed over, but not one that follows on it.
    """
    spent: list[float] = []
    before: dict[str, Any] = {}
    for line in map(json.loads, _WHOLE.findall(times.read_text(encoding="utf-8", errors="replace"))):
        if "began" not in line:
            goes_on = before.get("stage") == line["stage"] and all(before[name] <= line[name] for name in _ONWARD)
            spent = [*(spent[:-1] if goes_on else spent), float(line["seconds"])]
        before = line
    return sum(spent)


def _slug(name: str) -> str:
    """A variant's part of a folder's name: no other variant has it, not even where disks ignore case."""
    slug = "".join(letter if letter.isalnum() else "-" for letter in name.lower())[:60]
    return slug if slug == name else f"{slug}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m ldrt_edge.bench.sweep", description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    try:
        found = sweep(given.file, given.out)
    except LdrtError as error:
        print(f"ldrt-edge: {error}", file=sys.stderr)
        return 1
    print("\n".join(table(found)))
    print(given.out / RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
