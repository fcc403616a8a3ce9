"""Quantisers side by side: what importance from pictures and a plan gain over llama.cpp's presets, at equal bytes.

    python -m ldrt_edge.bench.quantisers MERGED --data DATASET --out FOLDER [--bases Q4_K_M,Q3_K_M] [--questions N]

For every base preset the language model is quantised in these ways; the vision tower and the projector stay F16:

- none: the preset as llama.cpp makes it by itself.
- text: with an importance matrix from the calibration questions' text alone, without their pictures and every token
  counting alike: what llama.cpp's own tool could have measured on them.
- pooled, balanced, answer: with ours, from pictures and text (`ldrt-edge importance`).
- plan: a type for every matrix (`ldrt-edge plan`), in the bytes that the preset's matrices take.

Each answers the same held-out questions about pictures, teacher-forced, and is held against the merged model in
transformers: divergence (KLD, nats an answer token), same top token, and exact match, for which one pass is enough:
where the argmax over the reference answer is that answer, greedy decoding gives it too. All intervals are 95%,
clustered by picture; ratios of KLD are paired. Calibration sees training rows only, and a picture that is in both
splits is refused. `--calibration NAME=DATASET`, given several times, compares calibration sets.

Every step runs in a process of its own, for its time and memory, and is written to a journal in FOLDER with what it
depends on: what is there is not done again. FOLDER gets `quantisers.json` and `quantisers.png`, and keeps the merged
model's logits for later runs.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray

from ldrt_edge import __version__, artifact, console
from ldrt_edge.artifact import Json
from ldrt_edge.bench.quantisers_view import draw, label, table
from ldrt_edge.bench.statistics import Difference, Rate, Ratio, joined, paired_difference, paired_ratio, rate
from ldrt_edge.bench.steps import Cost, Journal, apart, digest
from ldrt_edge.convert.allocate import allocate
from ldrt_edge.convert.gguf import check_choice, check_room, finish, identity, write
from ldrt_edge.convert.importance import Weighting, imatrix_path, importance
from ldrt_edge.convert.plan import mmproj_plan, text_plan
from ldrt_edge.convert.quantize import TYPES, Gguf, Importance, Wanted, lossless, read_back, run_quantizer, write_full
from ldrt_edge.convert.sensitivity import Matrix, Option, sensitivities
from ldrt_edge.convert.source import open_source
from ldrt_edge.dataset import Dataset, choose_rows, group_by_image
from ldrt_edge.errors import ArtifactError, ConfigError, DataError, LdrtError, require
from ldrt_edge.fidelity import compare_logits
from ldrt_edge.front import Front, conversation
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.base import FloatArray, Prompt
from ldrt_edge.runtimes.llamacpp import LlamaCppRuntime

SCHEMA = "ldrt-edge/quantisers/1"
BASES = ("Q4_K_M", "Q3_K_M", "Q5_K_M", "IQ4_XS", "Q4_0")
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)
SIZES = {"7B": 7.06e9, "13B": 13.35e9}
"""Parameters of LLaVA-1.5, all parts."""
_LEAST_PARAMETERS = 1e8
"""In smaller models most of the cost does not grow with the model, so that it says nothing about other sizes."""
_TORCH = ("torch", "transformers", "ldrt_edge.runtimes.hf")
_MODEL = "model-SUBJECT.gguf"


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

    family: none, text, a weighting, or plan. calibration: the name of the set; "" for none.
    bytes: of the file. bytes_ratio: of the file to the preset's. fallbacks: matrices that could not have the preset's
        type.
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
    """All results of a run, in the order of the bases, and what its steps cost.

    images, tokens: that were asked about, and of reference answers. exact: the merged model's share of exact matches.
    image_tokens: a picture's, in the prompt.
    """

    results: tuple[Result, ...]
    steps: tuple[Step, ...]
    questions: int
    images: int
    tokens: int
    exact: Rate
    parameters: int
    image_tokens: int


def compare(
    merged: Path, data: Path, out: Path, bases: Sequence[str] = BASES, weightings: Sequence[str] = WEIGHTINGS,
    calibrations: Mapping[str, Path] | None = None, questions: int | None = None, calibration_rows: int = 128,
    sensitivity_rows: int = 16, seed: int = 0, threads: int | None = None,
) -> Comparison:
    """Measure what is not measured yet in `out`, and write `quantisers.json` and `quantisers.png` there.

    data: its test rows are asked. calibrations: datasets by name, whose training rows are watched; None takes `data`.
    questions, calibration_rows, sensitivity_rows: about how many rows, as whole pictures; None for all.

    Raises:
        ConfigError: an unknown base or weighting.
        DataError: no test rows, or a calibration set holds a picture that is asked about.
        ArtifactError: a folder is of another kind, or llama.cpp failed.
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "bench")  # before hours are spent
    for base in bases:
        check_choice("--bases", base, TYPES)
    for weighting in weightings:
        check_choice("--weightings", weighting, WEIGHTINGS)
    calibrations = calibrations or {data.resolve().name: data}
    out.mkdir(parents=True, exist_ok=True)
    run = _Run(merged, data, out, calibrations, questions, calibration_rows, sensitivity_rows, seed, threads)
    total = len(bases) * (1 + len(calibrations) * (2 + len(weightings)))
    results: list[Result] = []
    started = time.monotonic()
    for base in bases:
        for result in run.family(base, weightings):
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
    (out / "quantisers.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    draw(found, out / "quantisers.png")
    return found


@dataclass(frozen=True, eq=False)
class _Question:
    prompt: Prompt
    answer: tuple[int, ...]
    cluster: Hashable


class _Run:
    """One run over a model and its questions: steps that are done once, and the results they lead to.

    measured: how many language models were quantised and asked just now.
    """

    def __init__(
        self, merged: Path, data: Path, out: Path, calibrations: Mapping[str, Path], questions: int | None,
        calibration_rows: int, sensitivity_rows: int, seed: int, threads: int | None,
    ) -> None:
        self.measured = 0
        self._merged, self._out, self._work = merged, out, out / "work"
        self._calibrations, self._seed, self._threads = calibrations, seed, threads
        self._calibration_rows, self._sensitivity_rows = calibration_rows, sensitivity_rows
        self._model = {
            "version": __version__, "libraries": artifact.library_versions(), "merged": identity(merged).manifest_sha256
        }  # fmt: skip
        self._asked = ask(Front.load(merged), Dataset(data), questions, seed, calibrations)
        self._test = {"data": artifact.identity(data).manifest_sha256, "questions": questions, "seed": seed}
        self._journal = Journal(out / "journal.jsonl")
        self._steps: list[tuple[str, str, Cost]] = []
        self._parameters = open_source(merged).weights.count
        self._groups = [question.cluster for question in self._asked]
        self._token_groups = [q.cluster for q in self._asked for _ in q.answer]
        self._ends = np.cumsum([len(question.answer) for question in self._asked])

    def family(self, base: str, weightings: Sequence[str]) -> Iterator[Result]:
        """The results of one base preset, as they are measured."""
        none = self._measure(base, "none", Wanted(base))
        yield self._result(base, "none", "", none, none, None)
        for name in self._calibrations:
            imatrix = imatrix_path(self._importance(name, pictures=False), "pooled")
            text = self._measure(base, f"text {name}", Wanted(base, imatrix=imatrix))
            yield self._result(base, "text", name, text, none, None)
            for weighting in weightings:
                imatrix = imatrix_path(self._importance(name), weighting)
                ours = self._measure(base, f"{weighting} {name}", Wanted(base, imatrix=imatrix))
                yield self._result(base, weighting, name, ours, none, text)
            plan = self._measure(base, f"plan {name}", self._planned(base, name, none["matrix_bytes"]))
            yield self._result(base, "plan", name, plan, none, text)

    def finish(self, results: Sequence[Result]) -> Comparison:
        """Put everything together, and remove the full-precision files."""
        shutil.rmtree(self._work, ignore_errors=True)
        steps = [Step(name, what, cost, self._at(name, cost)) for name, what, cost in self._steps]
        pictures = {image.sha256: image.token_count for question in self._asked for image in question.prompt.images}
        return Comparison(
            tuple(results), tuple(steps), len(self._asked), len(pictures), int(self._ends[-1]),
            rate(self._exact.tolist(), self._groups, self._seed), self._parameters, max(pictures.values()),
        )  # fmt: skip

    def _at(self, name: str, cost: Cost) -> dict[str, Cost]:
        """A step's cost at other sizes; allocation takes as long for matrices of any size."""
        if self._parameters < _LEAST_PARAMETERS:
            return {}
        factors = {size: 1 if name == "allocation" else count / self._parameters for size, count in SIZES.items()}
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
            return asdict(apart(_TORCH, importance, *arguments)[1])

        self._spent("importance" if pictures else "importance, text", name, self._journal.once(key, work, kept=folder))
        return folder

    def _planned(self, base: str, name: str, target_bytes: int) -> Wanted:
        """Types for the language model's matrices within `target_bytes`, with the balanced importance."""
        given, data = Importance(self._importance(name)), self._calibrations[name]
        imatrix = imatrix_path(given.folder, given.weighting)
        key = {
            "step": "sensitivity", **self._model, "imatrix": artifact.file_sha256(imatrix),
            "data": artifact.identity(data).manifest_sha256, "rows": self._sensitivity_rows, "seed": self._seed,
        }  # fmt: skip

        def measure() -> Json:
            arguments = self._merged, data, given, self._sensitivity_rows, self._seed, self._threads
            found, cost = apart(_TORCH, _sensitivities, *arguments)
            return {"matrices": [asdict(matrix) for matrix in found], **asdict(cost)}

        gave = self._journal.once(key, measure)
        self._spent("sensitivity", name, gave)
        matrices = [
            Matrix(m["name"], m["part"], m["weights"], tuple(Option(**option) for option in m["options"]))
            for m in gave["matrices"] if m["part"] == "model"
        ]  # fmt: skip

        def solve() -> Json:
            plan, cost = apart(("scipy.optimize",), allocate, "gguf", matrices, 0, target_bytes)
            return {"types": dict(plan.parts["model"]), **asdict(cost)}

        solved = self._journal.once({"step": "allocation", "of": digest(key), "bytes": target_bytes}, solve)
        self._spent("allocation", f"{base} {name}", solved)
        return Wanted(base, solved["types"], imatrix)

    def _measure(self, base: str, what: str, wanted: Wanted) -> Json:
        """Quantise the language model, ask it everything, delete it."""
        imatrix = artifact.file_sha256(wanted.imatrix) if wanted.imatrix else None
        described = {"type": wanted.type, "types": dict(wanted.types), "imatrix": imatrix}
        key = {"step": "quantisation", **self._model, "test": self._test, "wanted": described}

        def work() -> Json:
            self.measured += 1
            full, pair, weights = self._files
            subject = pair / _MODEL
            _, cost = apart((), run_quantizer, full, subject, wanted, weights)
            stored = read_back(subject, None if wanted.types else base)
            matrices = [int(t.n_bytes) for t in GGUFReader(subject).tensors if len(t.shape) == 2]
            answers = self._answers(pair)
            subject.unlink()
            return {
                "bytes": stored.bytes, "bits_per_weight": stored.bits_per_weight, "types": dict(stored.types),
                "fallbacks": len(stored.fallbacks), "matrix_bytes": sum(matrices), **asdict(cost), **answers,
            }  # fmt: skip

        gave = self._journal.once(key, work)
        self._spent("quantisation", f"{base} {what}", gave)
        return gave

    def _answers(self, pair: Path) -> dict[str, Json]:
        """Per answer token kld and top1, per question exact, of a GGUF pair."""
        kld, top1, exact = [], [], []
        runtime = LlamaCppRuntime(pair, threads=self._threads)
        try:
            expected = np.split(self._reference, self._ends[:-1])
            for question, logits in console.track(list(zip(self._asked, expected, strict=True)), "asking"):
                given = runtime.score(question.prompt, question.answer)
                tokens = compare_logits(logits, given)
                kld += tokens.kld.tolist()
                top1 += tokens.top1.tolist()
                exact.append(bool((given.argmax(axis=1) == question.answer).all()))
        finally:
            runtime.close()
        return {"kld": kld, "top1": top1, "exact": exact}

    def _result(self, base: str, family: str, calibration: str, given: Json, none: Json, text: Json | None) -> Result:
        tokens, seed = self._token_groups, self._seed
        return Result(
            base=base, family=family, calibration=calibration, bytes=given["bytes"],
            bits_per_weight=given["bits_per_weight"], bytes_ratio=given["bytes"] / none["bytes"], types=given["types"],
            fallbacks=given["fallbacks"],
            kld=paired_ratio(given["kld"], np.ones(len(tokens)).tolist(), tokens, seed),
            top1=rate(given["top1"], tokens, seed),
            loss=paired_difference(self._exact.tolist(), given["exact"], self._groups, seed),
            flips=rate((self._exact != np.array(given["exact"])).tolist(), self._groups, seed),
            kld_to_none=paired_ratio(given["kld"], none["kld"], tokens, seed),
            kld_to_text=paired_ratio(given["kld"], text["kld"], tokens, seed) if text else None,
        )  # fmt: skip

    @cached_property
    def _reference(self) -> FloatArray:
        """The merged model's logits on all answer tokens: (tokens, vocab), read from disk as they are wanted."""
        path = self._out / f"reference-{digest({**self._model, 'test': self._test})}.npy"
        if not path.exists():
            apart(_TORCH, _score, self._merged, self._asked, path, self._threads)
        logits: FloatArray = np.load(path, mmap_mode="r")
        if len(logits) != self._ends[-1]:
            raise ArtifactError(f"{path}: logits of {len(logits)} tokens, not {self._ends[-1]}: remove it")
        return logits

    @cached_property
    def _exact(self) -> NDArray[np.bool_]:
        """Which questions the merged model answers exactly."""
        expected = np.split(self._reference, self._ends[:-1])
        pairs = zip(self._asked, expected, strict=True)
        return np.array([bool((logits.argmax(axis=1) == question.answer).all()) for question, logits in pairs])

    @cached_property
    def _files(self) -> tuple[Path, Path, int]:
        """The full-precision language model, a folder with the rest of a pair, and how many weights the model has."""
        pair = self._work / "pair"
        shutil.rmtree(self._work, ignore_errors=True)
        pair.mkdir(parents=True)
        source = open_source(self._merged)
        text, vision = text_plan(source, lossless(source)), mmproj_plan(source, "f16")
        check_room(self._work, 2 * text.nbytes + vision.nbytes)
        write(vision, pair / "mmproj-F16.gguf", "vision")
        finish(source, pair)
        return write_full(text, self._work), pair, sum(math.prod(tensor.shape) for tensor in text.tensors)

    def _spent(self, name: str, what: str, gave: Mapping[str, Json]) -> None:
        step = name, what, Cost(gave["seconds"], gave["peak_bytes"], gave["idle_bytes"])
        if step not in self._steps:
            self._steps.append(step)


def ask(
    front: Front, dataset: Dataset, limit: int | None, seed: int, calibrations: Mapping[str, Path]
) -> list[_Question]:
    """The held-out questions, picture by picture.

    Raises:
        DataError: no test rows, one that cannot be asked, or a calibration set that trains on their pictures.
    """
    rows = choose_rows(dataset.rows("test"), limit, seed)
    if not rows:
        raise DataError(f"{dataset.folder}: no rows in split 'test': quantisers are compared on held-out rows only")
    pictures = {row.image_sha256 for row in rows}
    for name, folder in calibrations.items():
        if any(row.image_sha256 in pictures for row in Dataset(folder).rows("train")):
            raise DataError(f"--calibration {name}: {folder} trains on pictures that are asked about: split it anew")
    labels = joined([row.image_sha256 for row in rows], [row.group for row in rows])
    clusters = {row.id: label for row, label in zip(rows, labels, strict=True)}
    asked = []
    for members in group_by_image(rows).values():
        image = front.image(read_image(dataset.image_path(members[0])).rgb)
        for row in members:
            messages = conversation(row.turns[:-1], image)
            try:
                prompt, answer = front.prompt(messages), front.answer_ids(messages, row.answer)
            except DataError as error:
                raise DataError(f"row {row.id}: {error}") from error
            asked.append(_Question(prompt, answer, clusters[row.id]))
    return asked


def _sensitivities(
    merged: Path, data: Path, given: Importance, limit: int, seed: int, threads: int | None
) -> list[Matrix]:
    return sensitivities(open_source(merged), data, Gguf(given), limit, seed, threads)


def _score(merged: Path, asked: Sequence[_Question], path: Path, threads: int | None) -> None:
    """Write the merged model's logits (answer tokens, vocab) as float32; the file appears when whole."""
    from ldrt_edge.runtimes.hf import HfRuntime

    runtime, part, place = HfRuntime(merged, threads=threads), path.with_suffix(".part"), 0
    try:
        shape = sum(len(question.answer) for question in asked), runtime.vocab_size
        logits = np.lib.format.open_memmap(part, "w+", np.dtype(np.float32), shape)
        for question in console.track(asked, "asking the merged model"):
            place += len(question.answer)
            logits[place - len(question.answer) : place] = runtime.score(question.prompt, question.answer)
        logits.flush()
    finally:
        runtime.close()
    part.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the results and costs for a reader, then where the JSON is."""
    parser = argparse.ArgumentParser(description="Quantisers of a merged model side by side, at equal bytes.")
    parser.add_argument("merged", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="a dataset: its test rows are asked")
    parser.add_argument("--out", type=Path, required=True, help="what was measured; a second run goes on from it")
    parser.add_argument("--bases", default=",".join(BASES), help="llama.cpp's presets")
    parser.add_argument("--weightings", default=",".join(WEIGHTINGS), help="of our importance, under each preset")
    parser.add_argument(
        "--calibration", action="append", default=[], metavar="NAME=DATASET",
        help="training rows to calibrate on, instead of --data's; may be given several times",
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
            given.merged, given.data, given.out, given.bases.split(","), given.weightings.split(","),
            _named(given.calibration), given.questions, given.calibration_rows, given.sensitivity_rows, given.seed,
            given.threads,
        )  # fmt: skip
    except LdrtError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(table(found)))
    print(given.out / "quantisers.json")
    return 0


def _named(given: Sequence[str]) -> dict[str, Path] | None:
    pairs = [text.partition("=") for text in given]
    for name, equals, folder in pairs:
        if not (name and equals and folder):
            raise ConfigError(f"--calibration {name}{equals}{folder}: wants NAME=DATASET")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise ConfigError("--calibration: every data set wants a NAME of its own")
    return {name: Path(folder) for name, _, folder in pairs} or None


if __name__ == "__main__":
    sys.exit(main())
