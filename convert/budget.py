"""`ldrt-edge quantize --max-loss`: the smallest export whose measured loss stays within a budget.

Plans are allocated for fewer and fewer bits, and each is quantised and judged on held-out questions, until one fails;
the last that passed is released. Going down in an order that was fixed before, and stopping at the first failure, lets
every step be judged at the full 95%: trying many candidates does not make it easier for a bad one to pass.

Source: Maurer, Hothorn and Lehmacher, "Multiple comparisons in drug clinical trials and preclinical assays: a-priori
ordered hypotheses", Biometrie in der chemisch-pharmazeutischen Industrie 6 (1995).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldrt_edge import artifact, console
from ldrt_edge.convert.allocate import OutOfReach, allocate
from ldrt_edge.convert.fallbacks import Fallback, Quantized, report
from ldrt_edge.convert.fit import decided
from ldrt_edge.convert.format import WORK, Format, feeds_back
from ldrt_edge.convert.gguf import identity
from ldrt_edge.convert.parity import check
from ldrt_edge.convert.planned import check_held_out
from ldrt_edge.convert.sensitivity import Matrix, kept, sensitivities
from ldrt_edge.convert.source import open_source
from ldrt_edge.convert.type_plan import FormatName, TypePlan, write_type_plan
from ldrt_edge.errors import ArtifactError
from ldrt_edge.release import RELEASE, Verdict, read_verdict

BITS = (8.5, 7.0, 6.0, 5.5, 5.0, 4.75, 4.5, 4.25, 4.0, 3.75, 3.5, 3.25, 3.0, 2.75, 2.5)
"""Bits a weight of the whole export, tried in this order."""
PLAN = "plan.yaml"
_FOUND, _STEPS = ".found.json", ".steps.json"
Judge = Callable[[Path], Verdict]


def quantize_to_budget(
    merged: Path, out: Path, data: Path, to: Format, judge: Judge, budget: dict[str, float | None], limit: int = 16,
    seed: int = 0,
) -> Verdict:
    """Search, quantise and judge; writes `out`, an artefact of the format's kind with its plan; returns its verdict.

    data: a dataset artefact: training rows for the sensitivities; `judge` asks the test rows. budget: what the judge
    holds against, for the manifest. limit: about how many training rows.
    When even the largest candidate fails, it is written, unreleased, with the evidence. A killed run goes on behind the
    last candidate that was judged.

    Raises:
        ArtifactError, DataError: the model, the dataset or what the format was given is wrong (test rows share pictures
            with training rows, or with what was measured), or its quantiser failed.
    """
    config = {"to": to.name, "budget": budget, "limit": limit, **to.config()}
    given = [identity(merged), *to.inputs(), artifact.identity(data)]
    with artifact.create(out, to.name, config, given, seed, resumable=True) as draft:
        if draft.complete:
            return _recorded(draft.metrics)
        check_held_out(data, to)
        source, work = open_source(merged), draft.path / WORK
        to, fit = decided(to, source, draft.path)
        steps = _read(draft.path / _STEPS)
        if not _ended(steps):
            found = kept(draft.path / _FOUND, lambda: sensitivities(source, data, to, limit, seed, work=work))
            for bits, plan in [*_plans(to.name, found, to.fixed_bytes(source))][len(steps) :]:
                trial = _folder(draft.path, bits)
                shutil.rmtree(trial, ignore_errors=True)
                trial.mkdir()
                held = to.write(source, plan, trial, work)
                write_type_plan(plan, trial / PLAN)
                verdict, digest = judge(trial), artifact.file_sha256(trial / PLAN)
                steps.append(_Step(bits, _nbytes(trial, to), plan.expected["kld"], held, verdict, digest))
                console.say(f"{bits:g} bits, {steps[-1].nbytes / 1e6:.1f} MB: {verdict.reason}")
                _write(draft.path / _STEPS, steps)  # what a killed run goes by; only then is a folder given up
                for step in steps:
                    if step is not _best(steps):
                        shutil.rmtree(_folder(draft.path, step.bits), ignore_errors=True)
                if _ended(steps):
                    break
        best = _best(steps)
        _publish(draft.path, best, to)
        report(best.quantized, "search")
        draft.metrics["quantized"] = asdict(best.quantized)
        draft.metrics |= fit
        draft.metrics["fidelity"] = asdict(check(merged, draft.path, fed_back=feeds_back(to)))
        draft.metrics["search"] = [step.told for step in steps]
        draft.metrics[RELEASE] = asdict(best.verdict)
        for folder in (work, *(_folder(draft.path, step.bits) for step in steps)):
            shutil.rmtree(folder, ignore_errors=True)
    return best.verdict


@dataclass(frozen=True)
class _Step:
    """A candidate that was judged. plan_sha256: of its plan file."""

    bits: float
    nbytes: int
    expected_kld: float
    quantized: Quantized
    verdict: Verdict
    plan_sha256: str

    @property
    def told(self) -> dict[str, artifact.Json]:
        """For the manifest."""
        return {"bits": self.bits, "bytes": self.nbytes, "expected_kld": self.expected_kld, **asdict(self.verdict)}

    @staticmethod
    def read(told: dict[str, Any]) -> _Step:
        """Read one back."""
        held, verdict = told["quantized"], Verdict(**told["verdict"])
        fallbacks = tuple(Fallback(**one) for one in held["fallbacks"])
        return _Step(**told | {"quantized": Quantized(**held | {"fallbacks": fallbacks}), "verdict": verdict})


def _best(steps: Sequence[_Step]) -> _Step:
    """The last that was released, or the largest."""
    return next((step for step in reversed(steps) if step.verdict.released), steps[0])


def _folder(draft: Path, bits: float) -> Path:
    """Where a candidate lies until the search is over."""
    return draft / f".{bits:g}-bits"


def _nbytes(folder: Path, to: Format) -> int:
    return sum(path.stat().st_size for path in folder.glob(to.files))


def _publish(draft: Path, step: _Step, to: Format) -> None:
    """Make a candidate's files the artefact's, one by one: a killed run moves the rest.

    Raises:
        ArtifactError: they are not what was judged.
    """
    if (folder := _folder(draft, step.bits)).exists():
        for path in sorted(folder.iterdir()):
            path.replace(draft / path.name)
    whole = (draft / PLAN).is_file() and artifact.file_sha256(draft / PLAN) == step.plan_sha256
    if not whole or _nbytes(draft, to) != step.nbytes:
        raise ArtifactError(f"{draft}: what lies there is not what was judged: remove that folder, and run this again")


def _write(path: Path, steps: Sequence[_Step]) -> None:
    artifact.replace_text(path, json.dumps([asdict(step) for step in steps]))


def _read(path: Path) -> list[_Step]:
    return [_Step.read(told) for told in json.loads(path.read_text())] if path.exists() else []


def _ended(steps: Sequence[_Step]) -> bool:
    return bool(steps) and not steps[-1].verdict.released


def _recorded(metrics: Mapping[str, artifact.Json]) -> Verdict:
    verdict = read_verdict(metrics)
    assert verdict is not None, "an artefact with a budget has a verdict"
    return verdict


def _plans(to: FormatName, found: Sequence[Matrix], fixed: int) -> Iterator[tuple[float, TypePlan]]:
    """A plan for each number of bits, as far down as the options reach; none twice."""
    weights, before = sum(matrix.weights for matrix in found), None
    for bits in BITS:
        try:
            plan = allocate(to, found, fixed, target_bytes=int(bits * weights / 8) + fixed)
        except OutOfReach:  # smaller than the smallest types
            if before is None:
                raise
            return
        if plan != before:
            yield bits, plan
        before = plan
