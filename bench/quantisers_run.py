"""One comparison of quantisers: which language models are made and asked, each once, and the results they lead to."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldrt_edge import __version__, artifact
from ldrt_edge.artifact import Json
from ldrt_edge.bench.held_out import TORCH, HeldOut, ask
from ldrt_edge.bench.quantisers_results import Comparison, Result, Step
from ldrt_edge.bench.statistics import paired_loss, paired_ratio, rate
from ldrt_edge.bench.steps import Cost, Journal, apart, digest
from ldrt_edge.bench.subjects import Subject, Subjects, planned
from ldrt_edge.convert.allocate import allocate
from ldrt_edge.convert.calibration import Calibration
from ldrt_edge.convert.format import Format
from ldrt_edge.convert.gguf import identity
from ldrt_edge.convert.importance import imatrix_path, importance
from ldrt_edge.convert.mlx import Mlx
from ldrt_edge.convert.quantize import Gguf, Importance
from ldrt_edge.convert.quantizer import Wanted
from ldrt_edge.convert.sensitivity import Matrix, Option, sensitivities
from ldrt_edge.convert.source import open_source
from ldrt_edge.dataset import Dataset
from ldrt_edge.front import Front


class Way(NamedTuple):
    """A way to quantise: whether by a plan or with a preset's types, and what is done to weights before."""

    planned: bool
    rescale: bool
    feedback: bool


WAYS = {
    "rescale": Way(False, True, False), "feedback": Way(False, False, True), "both": Way(False, True, True),
    "plan": Way(True, False, False), "plan+feedback": Way(True, False, True), "plan+both": Way(True, True, True),
}  # fmt: skip
"""Ours, by family."""
SIZES = {"7B": 7.06e9, "13B": 13.35e9}
"""Parameters of LLaVA-1.5, all parts."""
_GROWTH = {"allocation": 0.0, "feedback": 1.5, "rescale+feedback": 1.5}
"""Power of the number of parameters by which a step's cost grows, if not as it: there are as many matrices to allocate,
and feedback takes row lengths times weights, which is a bound from above for its other half."""
_LEAST_PARAMETERS = 1e8
"""In smaller models most of the cost does not grow with the model, so that it says nothing about other sizes."""


class Run:
    """One run over a model and its questions: steps that are done once, and the results they lead to.

    measured: how many language models were quantised and asked just now.
    """

    def __init__(
        self, subjects: Subjects, merged: Path, data: Path, out: Path, calibrations: Mapping[str, Path],
        ways: Sequence[str], questions: int | None, calibration_rows: int, sensitivity_rows: int, seed: int,
        threads: int | None,
    ) -> None:
        self.measured, self._ways = 0, {family: WAYS[family] for family in ways}
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
        self._source = open_source(merged)
        self._parameters = self._source.weights.count

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
        """Another tool's file or folder, and plans of ours in its bytes."""
        key = {
            "step": "other", **self._model, "to": self._subjects.name, "test": self._test, "file": _sha256(path)
        }  # fmt: skip

        def make() -> Json:
            self.measured += 1
            with self._subjects.given(path) as subject:
                return self._answers(subject)

        theirs = self._journal.once(key, make)
        yield self._result(other, "other", "", theirs, theirs, None)
        for name in self._calibrations:
            yield from self._ours(other, name, theirs, None, preset=False)

    def _ours(
        self, base: str, name: str, none: Json, text: Json | None, preset: bool = True
    ) -> Iterator[Result]:
        """The types of `base`, if that is a preset, and plans in the bytes of `none`'s matrices; weights are fitted."""
        for family, way in self._ways.items():
            if not (way.planned or preset):
                continue
            to = self._format(name, way)
            wanted = self._planned(base, name, to, none["matrix_bytes"]) if way.planned else self._preset(base, to)
            yield self._result(base, family, name, self._measure(base, f"{family} {name}", wanted, to), none, text)

    def _preset(self, base: str, to: Gguf | Mlx) -> Wanted:
        """The types that a preset gives to matrices."""
        plan = (Mlx() if isinstance(to, Mlx) else Gguf()).preset(self._source, base)
        return Wanted(base, plan.parts["model"], None if isinstance(to, Mlx) else to.imatrix)

    def finish(self, results: Sequence[Result]) -> Comparison:
        """Put everything together, and remove the full-precision files."""
        for folder in [self._out / "work", *self._out.glob("shared-*"), *self._out.glob("moments-*")]:
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

    def _planned(self, base: str, name: str, to: Gguf | Mlx, target_bytes: int) -> Wanted:
        """Types for the language model's matrices within `target_bytes`; for GGUF with the balanced importance."""
        data, imatrix = self._calibrations[name], to.imatrix if isinstance(to, Gguf) else None
        key = {
            "step": "sensitivity", **self._model, "to": to.name, "imatrix": _sha256(imatrix), **_fit(to),
            "data": artifact.identity(data).manifest_sha256, "rows": self._sensitivity_rows, "seed": self._seed,
        }  # fmt: skip

        def measure() -> Json:
            arguments = self._merged, data, to, self._sensitivity_rows, self._seed, self._threads, self._work(to)
            found, cost = apart(TORCH, _sensitivities, *arguments)
            return {"matrices": [asdict(matrix) for matrix in found], **asdict(cost)}

        gave = self._journal.once(key, measure)
        self._spent("sensitivity", name, gave)
        matrices = [
            Matrix(m["name"], m["part"], m["weights"], tuple(Option(**option) for option in m["options"]))
            for m in gave["matrices"] if m["part"] == "model"
        ]  # fmt: skip

        def solve() -> Json:
            plan, cost = apart(("scipy.optimize",), allocate, to.name, matrices, 0, target_bytes)
            return {"types": dict(plan.parts["model"]), **asdict(cost)}

        solved = self._journal.once({"step": "allocation", "of": digest(key), "bytes": target_bytes}, solve)
        self._spent("allocation", f"{base} {name}", solved)
        return Wanted(base, solved["types"], imatrix)

    def _format(self, name: str, way: Way) -> Gguf | Mlx:
        """The format with what was measured on a calibration set."""
        given = Calibration(
            self._calibrations[name], way.rescale, way.feedback, self._calibration_rows, self._seed, self._threads
        )  # fmt: skip
        calibration = given if way.rescale or way.feedback else None
        if self._subjects.name == "mlx":
            return Mlx(calibration)
        return Gguf(Importance(self._importance(name)), calibration)

    def _work(self, to: Gguf | Mlx) -> Path:
        """A folder for what several models are made from, named after what that depends on."""
        if (given := to.calibration) is None:
            return self._out / f"shared-{digest(self._model)}"
        data = artifact.identity(given.data).manifest_sha256
        return self._out / f"moments-{digest({**self._model, 'data': data, 'rows': given.limit, 'seed': given.seed})}"

    def _measure(self, base: str, what: str, wanted: Wanted, to: Gguf | Mlx | None = None) -> Json:
        """Quantise the language model, to a preset or in a format by plan; ask it everything, delete it."""
        described = {"type": wanted.type, "types": dict(wanted.types), "imatrix": _sha256(wanted.imatrix)}
        key: dict[str, Json] = {
            "step": "quantisation", **self._model, "to": self._subjects.name, "test": self._test, "wanted": described,
            **(_fit(to) if to else {}),
        }  # fmt: skip

        def make() -> Json:
            self.measured += 1
            subject_of = (
                planned(self._merged, to, wanted.types, self._out / "subject", self._work(to)) if to
                else self._subjects.quantised(wanted)
            )  # fmt: skip
            with subject_of as subject:
                return self._answers(subject)

        gave = self._journal.once(key, make)
        fit = "+".join(to.calibration.config()) if to and to.calibration else "quantisation"
        self._spent(fit, f"{base} {what}", gave)
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
            loss=paired_loss(exact.tolist(), given["exact"], groups, seed),
            flips=rate((exact != np.array(given["exact"])).tolist(), groups, seed),
            kld_to_none=paired_ratio(given["kld"], none["kld"], tokens, seed),
            kld_to_text=paired_ratio(given["kld"], text["kld"], tokens, seed) if text else None,
        )  # fmt: skip

    def _spent(self, name: str, what: str, gave: Mapping[str, Json]) -> None:
        step = name, what, Cost(gave["seconds"], gave["peak_bytes"], gave["idle_bytes"])
        if step not in self._steps:
            self._steps.append(step)


def _sensitivities(
    merged: Path, data: Path, to: Format, limit: int, seed: int, threads: int | None, work: Path
) -> list[Matrix]:
    return sensitivities(open_source(merged), data, to, limit, seed, threads, work)


def _fit(to: Gguf | Mlx) -> dict[str, Json]:
    """What a result depends on, of how weights are fitted."""
    if to.calibration is None:
        return {}
    return {**to.calibration.config(), "fitted to": artifact.identity(to.calibration.data).manifest_sha256}


def _sha256(path: Path | None) -> str | None:
    """Of a file, or of a folder's weights."""
    if path is not None and path.is_dir():
        return digest({file.name: artifact.file_sha256(file) for file in path.glob("*.safetensors")})
    return None if path is None else artifact.file_sha256(path)


