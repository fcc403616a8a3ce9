"""Quantisers side by side: what importance from pictures and a plan gain over presets, at equal bytes.

    python -m ldrt_edge.bench.quantisers MERGED --data DATASET --out FOLDER [--to mlx] [--bases Q4_K_M] [--questions N]

For every base preset the language model is quantised in these ways; the vision tower and the projector stay F16:

- none: the preset as llama.cpp or MLX makes it by itself.
- text: with an importance matrix from the calibration questions' text alone, without their pictures and every token
  counting alike: what llama.cpp's own tool could have measured on them.
- pooled, balanced, answer: with ours, from pictures and text (`ldrt-edge importance`).
- rescale, feedback, both: the preset's types with weights fitted before (`ldrt-edge quantize --rescale --feedback`).
- plan: a type for every matrix (`ldrt-edge plan`), in the bytes that the preset's matrices take; plan+feedback,
  plan+both: planned for fitted weights, and fitted. For GGUF these and the above have the balanced importance.

`--ways` chooses among ours. `--other NAME=PATH` adds the same language model as another tool quantised it, in a GGUF
file or an MLX folder, with plans in its bytes. MLX knows no importance.

Each answers the same held-out questions about pictures and is held against the merged model in transformers: divergence
(KLD, nats an answer token), same top token, and exact match. All intervals are 95%, clustered by picture; ratios of KLD
are paired. Calibration sees training rows only, and a picture that is in both splits is refused. `--calibration
NAME=DATASET`, given several times, compares calibration sets.

Every step runs in a process of its own, for its time and memory, and is written to a journal in FOLDER with what it
depends on: what is there is not done again. FOLDER gets `quantisers-FORMAT.json` and `.png`, and keeps the merged
model's logits for later runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import get_args

from ldrt_edge import artifact, console
from ldrt_edge.bench.quantisers_results import Comparison, Result
from ldrt_edge.bench.quantisers_run import WAYS, Run
from ldrt_edge.bench.quantisers_view import draw, label, table
from ldrt_edge.bench.steps import made
from ldrt_edge.bench.subjects import GgufSubjects, MlxSubjects
from ldrt_edge.convert.gguf import check_choice, identity
from ldrt_edge.convert.importance import Weighting
from ldrt_edge.convert.type_plan import FormatName
from ldrt_edge.errors import ConfigError, LdrtError, require

SCHEMA = "ldrt-edge/quantisers/3"
FORMATS: Mapping[FormatName, type[GgufSubjects | MlxSubjects]] = {"gguf": GgufSubjects, "mlx": MlxSubjects}
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)
def compare(
    merged: Path, data: Path, out: Path, to: FormatName = "gguf", bases: Sequence[str] | None = None,
    weightings: Sequence[str] = WEIGHTINGS, ways: Sequence[str] = tuple(WAYS),
    calibrations: Mapping[str, Path] | None = None, others: Mapping[str, Path] | None = None,
    questions: int | None = None, calibration_rows: int = 128, sensitivity_rows: int = 16, seed: int = 0,
    threads: int | None = None,
) -> Comparison:
    """Measure what is not measured yet in `out`, and write `quantisers-TO.json` and its picture there.

    data: its test rows are asked. bases: None for the format's usual ones. calibrations: datasets by name, whose
    training rows are watched; None takes `data`. others: other tools' files or folders, by what to call them.
    questions, calibration_rows, sensitivity_rows: about how many rows, as whole pictures; None for all.

    Raises:
        ConfigError: an unknown base, weighting or way.
        DataError: no test rows, or a calibration set holds a picture that is asked about.
        ArtifactError: a folder is of another kind, or a quantiser failed.
        RuntimeLoadError: an other's file is no whole GGUF.
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "bench")  # before hours are spent
    subjects = FORMATS[to](merged, made(out) / "work")
    bases = bases or subjects.bases
    for base in bases:
        check_choice("--bases", base, subjects.types)
    for weighting in weightings:
        check_choice("--weightings", weighting, WEIGHTINGS)
    for way in ways:
        check_choice("--ways", way, tuple(WAYS))
    others = others or {}
    for name, path in others.items():
        if not (path.is_file() if to == "gguf" else (path / "config.json").is_file()):
            wanted = "a GGUF file of the language model" if to == "gguf" else "an MLX folder of the whole model"
            raise ConfigError(f"--other {name}={path}: with --to {to} this is {wanted}")
    calibrations = calibrations or {data.resolve().name: data}
    run = Run(
        subjects, merged, data, out, calibrations, ways, questions, calibration_rows, sensitivity_rows, seed, threads
    )  # fmt: skip
    total = len(bases) * (1 + len(calibrations) * (len(ways) + (1 + len(weightings) if to == "gguf" else 0)))
    total += len(others) * (1 + len(calibrations) * sum(WAYS[way].planned for way in ways))
    results: list[Result] = []
    started = time.monotonic()
    families = (run.family(base, weightings) for base in bases), (run.beside(*other) for other in others.items())
    for family in chain(*families):
        for result in family:
            results.append(result)
            left_s = (time.monotonic() - started) / max(run.measured, 1) * (total - len(results))
            told = f"{result.bytes / 1e6:.1f} MB, KLD {result.kld.value:.4g}"
            console.say(f"{len(results)} of {total}: {label(result)}: {told}; about {left_s / 60:.0f} min left")
    found = run.finish(results)
    described = {
        "schema": SCHEMA, "merged": identity(merged).manifest_sha256, "data": artifact.identity(data).manifest_sha256,
        "seed": seed, "calibration_rows": calibration_rows, "sensitivity_rows": sensitivity_rows,
        "libraries": artifact.library_versions(), "git_commit": artifact.git_commit(), **asdict(found),
    }  # fmt: skip
    artifact.replace_text(out / f"quantisers-{to}.json", json.dumps(described, indent=1) + "\n")
    draw(found, out / f"quantisers-{to}.png")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the results and costs for a reader, then where the JSON is."""
    parser = argparse.ArgumentParser(description="Quantisers of a merged model side by side, at equal bytes.")
    parser.add_argument("merged", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="a dataset: its test rows are asked")
    parser.add_argument("--out", type=Path, required=True, help="what was measured; a second run goes on from it")
    parser.add_argument("--to", choices=list(FORMATS), default="gguf")
    parser.add_argument("--bases", help="llama.cpp's presets, or MLX's")
    parser.add_argument("--weightings", default=",".join(WEIGHTINGS), help="GGUF's: of our importance")
    parser.add_argument("--ways", default=",".join(WAYS), help="ours; an empty word for none of them")
    parser.add_argument(
        "--calibration", action="append", default=[], metavar="NAME=DATASET",
        help="training rows to calibrate on, instead of --data's; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--other", action="append", default=[], metavar="NAME=PATH",
        help="the language model as another tool quantised it; may be given several times",
    )  # fmt: skip
    parser.add_argument("--questions", type=int, help="about how many, as whole pictures; all if not given")
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--sensitivity-rows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args(arguments)
    numbers = (given.questions, given.calibration_rows, given.sensitivity_rows, given.threads)
    if any(number is not None and number < 1 for number in numbers):
        parser.error("--questions, --calibration-rows, --sensitivity-rows and --threads want at least 1")
    try:
        found = compare(
            given.merged, given.data, given.out, given.to, given.bases.split(",") if given.bases else None,
            given.weightings.split(","), [way for way in given.ways.split(",") if way],
            _named(given.calibration, "--calibration NAME=DATASET"), _named(given.other, "--other NAME=PATH"),
            given.questions, given.calibration_rows, given.sensitivity_rows, given.seed, given.threads,
        )  # fmt: skip
    except LdrtError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(table(found)))
    print(given.out / f"quantisers-{given.to}.json")
    return 0


def _named(given: Sequence[str], option: str) -> dict[str, Path] | None:
    pairs = [text.partition("=") for text in given]
    if not all(name and equals and path for name, equals, path in pairs):
        raise ConfigError(f"{option}: not {' '.join(given)}")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ConfigError(f"{option}: every one wants a NAME of its own")
    return {name: Path(path) for name, _, path in pairs} or None


if __name__ == "__main__":
    sys.exit(main())
