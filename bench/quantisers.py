"""Quantisers side by side: what importance from pictures and a plan gain over presets, at equal bytes.

    python -m ldrt_edge.bench.quantisers MERGED --data DATASET --out FOLDER [--to mlx] [--bases Q4_K_M] [--questions N]

For every base preset the language model is quantised in these ways; the vision tower and the projector stay F16:

- none: the preset as llama.cpp or MLX makes it by itself.
- text: with an importance matrix from the calibration questions' text alone, without their pictures and every token
  counting alike: what llama.cpp's own tool could have measured on them.
- pooled, balanced, answer: with ours, from pictures and text (`ldrt-edge importance`).
- plan: a type for every matrix (`ldrt-edge plan`), in the bytes that the preset's matrices take.
- feedback: the same types, and what rounding takes is given back by other weights (`ldrt-edge quantize --feedback`).

`--other NAME=GGUF` adds the same language model as another tool quantised it, with a plan and feedback in its bytes.

MLX knows no importance, so there it is none, plan and feedback. Each answers the same held-out questions about pictures
and is held against the merged model in transformers: divergence (KLD, nats an answer token), same top token, and exact
match. All intervals are 95%, clustered by picture; ratios of KLD are paired. Calibration sees training rows only, and a
picture that is in both splits is refused. `--calibration NAME=DATASET`, given several times, compares calibration sets.

Every step runs in a process of its own, for its time and memory, and is written to a journal in FOLDER with what it
depends on: what is there is not done again. FOLDER gets `quantisers-FORMAT.json` and `.png`, and keeps the merged
model's logits for later runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import get_args

import numpy as np

from ldrt_edge import __version__, artifact, console
from ldrt_edge.artifact import Json
from ldrt_edge.bench.held_out import TORCH, HeldOut, ask
from ldrt_edge.bench.quantisers_view import draw, label, table
from ldrt_edge.bench.statistics import Difference, Rate, Ratio, paired_difference, paired_ratio, rate
from ldrt_edge.bench.steps import Cost, Journal, apart, digest
from ldrt_edge.bench.subjects import GgufSubjects, MlxSubjects, Subject, Subjects, planned
from ldrt_edge.convert.allocate import allocate
from ldrt_edge.convert.calibration import Calibration
from ldrt_edge.convert.gguf import check_choice, identity
from ldrt_edge.convert.importance import Weighting, imatrix_path, importance
from ldrt_edge.convert.mlx import Mlx
from ldrt_edge.convert.planned import Format
from ldrt_edge.convert.quantize import Gguf, Importance
from ldrt_edge.convert.quantizer import Wanted
from ldrt_edge.convert.sensitivity import Matrix, Option, sensitivities
from ldrt_edge.convert.source import open_source
from ldrt_edge.convert.type_plan import FormatName
from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import ConfigError, LdrtError, require
from ldrt_edge.front import Front

SCHEMA = "ldrt-edge/quantisers/2"
FORMATS: Mapping[FormatName, type[GgufSubjects | MlxSubjects]] = {"gguf": GgufSubjects, "mlx": MlxSubjects}
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)
SIZES = {"7B": 7.06e9, "13B": 13.35e9}
"""Parameters of LLaVA-1.5, all parts."""
_GROWTH = {"allocation": 0.0, "feedback": 1.5}
"""Power of the number of parameters by which a step's cost grows, if not as it: there are as many matrices to allocate,
and feedback takes row lengths times weights, which is a bound from above for its other half."""
_LEAST_PARAMETERS = 1e8
"""In smaller models most of the cost does not grow with the model, so that it says nothing about other sizes."""


@dataclass(frozen=True)
class Step:
    """A step's cost here, and what it would be at other sizes with as many questions of as many tokens.

    at: nothing, if the model is too small to tell.
    """

    name: str
    what: str
    cost: Cost
    at: Mapping[str, Cost]


@dataclass(frozen=True)
class Result:
    """One quantised language model against the merged model.

    family: none, other, text, a weighting, plan, or feedback. calibration: the name of the set; "" for none.
    bytes: of the GGUF file, or of MLX's tensors. bytes_ratio: to the preset's. fallbacks: matrices that could not have
        the preset's type.
    kld: nats an answer token. loss: of exact matches, merged minus this one. flips: questions that one of the two has
        right and the other wrong. kld_to_none, kld_to_text: this one's KLD over theirs.
    """

    base: str
    family: str
    calibration: str
    bytes: int
    bits_per_weight: float
    bytes_ratio: float
    types: Mapping[str, int]
    fallbacks: int
    kld: Ratio
    top1: Rate
    loss: Difference
    flips: Rate
    kld_to_none: Ratio
    kld_to_text: Ratio | None


@dataclass(frozen=True)
class Comparison:
    """All results of a run in one format, in the order of the bases, and what its steps cost.

    images, tokens: that were asked about, and of reference answers. exact: the merged model's share of exact matches.
    image_tokens: a picture's, in the prompt.
    """

    to: FormatName
    results: tuple[Result, ...]
    steps: tuple[Step, ...]
    questions: int
    images: int
    tokens: int
    exact: Rate
    parameters: int
    image_tokens: int


def compare(
    merged: Path, data: Path, out: Path, to: FormatName = "gguf", bases: Sequence[str] | None = None,
    weightings: Sequence[str] = WEIGHTINGS, calibrations: Mapping[str, Path] | None = None,
    others: Mapping[str, Path] | None = None, questions: int | None = None, calibration_rows: int = 128,
    sensitivity_rows: int = 16, seed: int = 0, threads: int | None = None,
) -> Comparison:
    """Measure what is not measured yet in `out`, and write `quantisers-TO.json` and its picture there.

    data: its test rows are asked. bases: None for the format's usual ones. calibrations: datasets by name, whose
    training rows are watched; None takes `data`. others: other tools' files, by what to call them. questions,
    calibration_rows, sensitivity_rows: about how many rows, as whole pictures; None for all.

    Raises:
        ConfigError: an unknown base or weighting.
        DataError: no test rows, or a calibration set holds a picture that is asked about.
        ArtifactError: a folder is of another kind, or a quantiser failed.
        RuntimeLoadError: an other's file is no whole GGUF.
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "bench")  # before hours are spent
    out.mkdir(parents=True, exist_ok=True)
    subjects = FORMATS[to](merged, out / "work")
    bases = bases or subjects.bases
    for base in bases:
        check_choice("--bases", base, subjects.types)
    for weighting in weightings:
        check_choice("--weightings", weighting, WEIGHTINGS)
    others = others or {}
    for name, path in others.items():
        if not path.is_file() or to != "gguf":
            raise ConfigError(f"--other {name}={path}: wants a GGUF file of the language model, and --to gguf")
    calibrations = calibrations or {data.resolve().name: data}
    run = _Run(subjects, merged, data, out, calibrations, questions, calibration_rows, sensitivity_rows, seed, threads)
    total = len(bases) * (1 + len(calibrations) * (3 + len(weightings) if to == "gguf" else 2))
    total += len(others) * (1 + 2 * len(calibrations))
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
    (out / f"quantisers-{to}.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    draw(found, out / f"quantisers-{to}.png")
    return found


class _Run:
    """One run over a model and its questions: steps that are done once, and the results they lead to.

    measured: how many language models were quantised and asked just now.
    """

    def __init__(
        self, subjects: Subjects, merged: Path, data: Path, out: Path, calibrations: Mapping[str, Path],
        questions: int | None, calibration_rows: int, sensitivity_rows: int, seed: int, threads: int | None,
    ) -> None:
        self.measured = 0
        self._subjects, self._merged, self._out = subjects, merged, out
        self._calibrations, self._seed, self._threads = calibrations, seed, threads
        self._calibration_rows, self._sensitivity_rows = calibration_rows, sensitivity_rows
        self._model = {
            "version": __version__, "libraries": artifact.library_versions(), "merged": identity(merged).manifest_sha256
        }  # fmt: skip
        self._test = {"data": artifact.identity(data).manifest_sha256, "questions": questions, "seed": seed}
        asked = ask(Front.load(merged), Dataset(data), questions, seed, calibrations)
        logits = out / f"reference-{digest({**self._model, 'test': self._test})}.npy"
        self._asked = HeldOut(merged, asked, logits, threads)
        self._journal = Journal(out / "journal.jsonl")
        self._steps: list[tuple[str, str, Cost]] = []
        self._parameters = open_source(merged).weights.count

    def family(self, base: str, weightings: Sequence[str]) -> Iterator[Result]:
        """The results of one base preset, as they are measured."""
        none = self._measure(base, "none", Wanted(base))
        yield self._result(base, "none", "", none, none, None)
        for name in self._calibrations:
            text = None
            if self._subjects.name == "gguf":
                imatrix = imatrix_path(self._importance(name, pictures=False), "pooled")
                text = self._measure(base, f"text {name}", Wanted(base, imatrix=imatrix))
                yield self._result(base, "text", name, text, none, None)
                for weighting in weightings:
                    imatrix = imatrix_path(self._importance(name), weighting)
                    ours = self._measure(base, f"{weighting} {name}", Wanted(base, imatrix=imatrix))
                    yield self._result(base, weighting, name, ours, none, text)
            yield from self._ours(base, name, none, text)

    def beside(self, other: str, path: Path) -> Iterator[Result]:
        """Another tool's file, and ours in its bytes."""
        key = {
            "step": "other", **self._model, "to": self._subjects.name, "test": self._test, "file": _sha256(path)
        }  # fmt: skip

        def make() -> Json:
            self.measured += 1
            assert isinstance(self._subjects, GgufSubjects)  # see `compare`
            with self._subjects.given(path) as subject:
                return self._answers(subject)

        theirs = self._journal.once(key, make)
        yield self._result(other, "other", "", theirs, theirs, None)
        for name in self._calibrations:
            yield from self._ours(other, name, theirs, None)

    def _ours(self, base: str, name: str, none: Json, text: Json | None) -> Iterator[Result]:
        """A plan in the bytes of `none`'s matrices, and the same with feedback."""
        wanted = self._planned(base, name, none["matrix_bytes"])
        plan = self._measure(base, f"plan {name}", wanted, self._format(name))
        yield self._result(base, "plan", name, plan, none, text)
        fed = self._measure(base, f"feedback {name}", wanted, self._format(name, feedback=True))
        yield self._result(base, "feedback", name, fed, none, text)

    def finish(self, results: Sequence[Result]) -> Comparison:
        """Put everything together, and remove the full-precision files."""
        for folder in [self._out / "work", self._out / "shared", *self._out.glob("moments-*")]:
            shutil.rmtree(folder, ignore_errors=True)
        steps = [Step(name, what, cost, self._at(name, cost)) for name, what, cost in self._steps]
        asked = self._asked
        pictures = {image.sha256: image.token_count for one in asked.questions for image in one.prompt.images}
        return Comparison(
            self._subjects.name, tuple(results), tuple(steps), len(asked.questions), len(pictures),
            len(asked.token_groups), rate(asked.exact.tolist(), asked.groups, self._seed), self._parameters,
            max(pictures.values()),
        )  # fmt: skip

    def _at(self, name: str, cost: Cost) -> dict[str, Cost]:
        """A step's cost at other sizes."""
        if self._parameters < _LEAST_PARAMETERS:
            return {}
        power = _GROWTH.get(name, 1)
        factors = {size: (count / self._parameters) ** power for size, count in SIZES.items()}
        return {size: cost.scaled(factor) for size, factor in factors.items()}

    def _importance(self, name: str, pictures: bool = True) -> Path:
        """The importance artefact of a calibration set."""
        data = self._calibrations[name]
        key = {
            "step": "importance", **self._model, "data": artifact.identity(data).manifest_sha256,
            "rows": self._calibration_rows, "seed": self._seed, "pictures": pictures,
        }  # fmt: skip
        folder = self._out / f"importance-{digest(key)}"

        def work() -> Json:
            shutil.rmtree(folder, ignore_errors=True)
            arguments = self._merged, data, folder, self._calibration_rows, self._seed, self._threads, pictures
            return asdict(apart(TORCH, importance, *arguments)[1])

        self._spent("importance" if pictures else "importance, text", name, self._journal.once(key, work, kept=folder))
        return folder

    def _planned(self, base: str, name: str, target_bytes: int) -> Wanted:
        """Types for the language model's matrices within `target_bytes`; for GGUF with the balanced importance."""
        to, data, format_ = self._subjects.name, self._calibrations[name], self._format(name)
        imatrix = format_.imatrix if isinstance(format_, Gguf) else None
        key = {
            "step": "sensitivity", **self._model, "to": to, "imatrix": _sha256(imatrix),
            "data": artifact.identity(data).manifest_sha256, "rows": self._sensitivity_rows, "seed": self._seed,
        }  # fmt: skip

        def measure() -> Json:
            arguments = self._merged, data, format_, self._sensitivity_rows, self._seed, self._threads
            found, cost = apart(TORCH, _sensitivities, *arguments)
            return {"matrices": [asdict(matrix) for matrix in found], **asdict(cost)}

        gave = self._journal.once(key, measure)
        self._spent("sensitivity", name, gave)
        matrices = [
            Matrix(m["name"], m["part"], m["weights"], tuple(Option(**option) for option in m["options"]))
            for m in gave["matrices"] if m["part"] == "model"
        ]  # fmt: skip

        def solve() -> Json:
            plan, cost = apart(("scipy.optimize",), allocate, to, matrices, 0, target_bytes)
            return {"types": dict(plan.parts["model"]), **asdict(cost)}

        solved = self._journal.once({"step": "allocation", "of": digest(key), "bytes": target_bytes}, solve)
        self._spent("allocation", f"{base} {name}", solved)
        return Wanted(base, solved["types"], imatrix)

    def _format(self, name: str, feedback: bool = False) -> Gguf | Mlx:
        """The format with what was measured on a calibration set."""
        given = Feedback(self._calibrations[name], self._calibration_rows, self._seed, self._threads)
        fed = given if feedback else None
        return Mlx(fed) if self._subjects.name == "mlx" else Gguf(Importance(self._importance(name)), fed)

    def _measure(self, base: str, what: str, wanted: Wanted, to: Gguf | Mlx | None = None) -> Json:
        """Quantise the language model, to a preset or in a format by plan; ask it everything, delete it."""
        described = {"type": wanted.type, "types": dict(wanted.types), "imatrix": _sha256(wanted.imatrix)}
        key: dict[str, Json] = {
            "step": "quantisation", **self._model, "to": self._subjects.name, "test": self._test, "wanted": described
        }  # fmt: skip
        work = self._out / "shared"
        if to and to.feedback:
            fed = {"data": artifact.identity(to.feedback.data).manifest_sha256, "rows": to.feedback.limit}
            key, work = {**key, "feedback": fed}, self._out / f"moments-{digest(fed)}"

        def make() -> Json:
            self.measured += 1
            subject_of = (
                planned(self._merged, to, wanted.types, self._out / "subject", work) if to
                else self._subjects.quantised(wanted)
            )  # fmt: skip
            with subject_of as subject:
                return self._answers(subject)

        gave = self._journal.once(key, make)
        self._spent("feedback" if to and to.feedback else "quantisation", f"{base} {what}", gave)
        return gave

    def _answers(self, subject: Subject) -> Json:
        """What a quantised model holds, took and answers."""
        stored = subject.stored
        return {
            "bytes": stored.bytes, "bits_per_weight": stored.bits_per_weight, "types": dict(stored.types),
            "fallbacks": len(stored.fallbacks), "matrix_bytes": subject.matrix_bytes, **asdict(subject.cost),
            **self._asked.against(self._subjects.load(subject.folder, self._threads)),
        }  # fmt: skip

    def _result(self, base: str, family: str, calibration: str, given: Json, none: Json, text: Json | None) -> Result:
        tokens, groups, seed = self._asked.token_groups, self._asked.groups, self._seed
        exact = self._asked.exact
        return Result(
            base=base, family=family, calibration=calibration, bytes=given["bytes"],
            bits_per_weight=given["bits_per_weight"], bytes_ratio=given["bytes"] / none["bytes"], types=given["types"],
            fallbacks=given["fallbacks"],
            kld=paired_ratio(given["kld"], np.ones(len(tokens)).tolist(), tokens, seed),
            top1=rate(given["top1"], tokens, seed),
            loss=paired_difference(exact.tolist(), given["exact"], groups, seed),
            flips=rate((exact != np.array(given["exact"])).tolist(), groups, seed),
            kld_to_none=paired_ratio(given["kld"], none["kld"], tokens, seed),
            kld_to_text=paired_ratio(given["kld"], text["kld"], tokens, seed) if text else None,
        )  # fmt: skip

    def _spent(self, name: str, what: str, gave: Mapping[str, Json]) -> None:
        step = name, what, Cost(gave["seconds"], gave["peak_bytes"], gave["idle_bytes"])
        if step not in self._steps:
            self._steps.append(step)


def _sensitivities(
    merged: Path, data: Path, to: Format, limit: int, seed: int, threads: int | None
) -> list[Matrix]:
    return sensitivities(open_source(merged), data, to, limit, seed, threads)


def _sha256(path: Path | None) -> str | None:
    return None if path is None else artifact.file_sha256(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the results and costs for a reader, then where the JSON is."""
    parser = argparse.ArgumentParser(description="Quantisers of a merged model side by side, at equal bytes.")
    parser.add_argument("merged", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="a dataset: its test rows are asked")
    parser.add_argument("--out", type=Path, required=True, help="what was measured; a second run goes on from it")
    parser.add_argument("--to", choices=list(FORMATS), default="gguf")
    parser.add_argument("--bases", help="llama.cpp's presets, or MLX's")
    parser.add_argument("--weightings", default=",".join(WEIGHTINGS), help="GGUF's: of our importance")
    parser.add_argument(
        "--calibration", action="append", default=[], metavar="NAME=DATASET",
        help="training rows to calibrate on, instead of --data's; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--other", action="append", default=[], metavar="NAME=GGUF",
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
            given.weightings.split(","), _named(given.calibration, "--calibration NAME=DATASET"),
            _named(given.other, "--other NAME=GGUF"), given.questions, given.calibration_rows, given.sensitivity_rows,
            given.seed, given.threads,
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
