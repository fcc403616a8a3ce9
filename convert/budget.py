"""`ldrt-edge quantize --max-loss`: the smallest export whose measured loss stays within a budget.

Plans are allocated for fewer and fewer bits, and each is quantised and judged on held-out questions, until one fails;
the last that passed is released. Going down in an order that was fixed before, and stopping at the first failure, lets
every step be judged at the full 95%: trying many candidates does not make it easier for a bad one to pass.

Source: Maurer, Hothorn and Lehmacher, "Multiple comparisons in drug clinical trials and preclinical assays: a-priori
ordered hypotheses", Biometrie in der chemisch-pharmazeutischen Industrie 6 (1995).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldrt_edge import artifact, console
from ldrt_edge.convert.allocate import OutOfReach, allocate
from ldrt_edge.convert.fallbacks import Fallback, Quantized, report
from ldrt_edge.convert.gguf import identity
from ldrt_edge.convert.parity import check
from ldrt_edge.convert.planned import WORK, Format
from ldrt_edge.convert.sensitivity import Matrix, Option, sensitivities
from ldrt_edge.convert.source import open_source
from ldrt_edge.convert.type_plan import FormatName, TypePlan, write_type_plan
from ldrt_edge.dataset import Dataset
from ldrt_edge.release import RELEASE, Verdict, read_verdict
from ldrt_edge.train.data.split import check_leakage

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
        ArtifactError, DataError: the model, the dataset (training and test rows share pictures) or what the format was
            given is wrong, or its quantiser failed.
    """
    config = {"to": to.name, "budget": budget, "limit": limit, **to.config()}
    given = [identity(merged), *to.inputs(), artifact.identity(data)]
    with artifact.create(out, to.name, config, given, seed, resumable=True) as draft:
        if draft.complete:
            return _recorded(draft.metrics)
        check_leakage(Dataset(data))
        source = open_source(merged)
        work, trial, best = (draft.path / name for name in (WORK, ".trial", ".best"))
        steps = [_Step.read(told) for told in _kept(draft.path / _STEPS)]
        if not _ended(steps):
            found = [_matrix(told) for told in _kept(draft.path / _FOUND)]
            if not found:
                found = sensitivities(source, data, to, limit, seed, work=work)
                _keep(draft.path / _FOUND, found)
            for bits, plan in [*_plans(to.name, found, to.fixed_bytes(source))][len(steps) :]:
                shutil.rmtree(trial, ignore_errors=True)
                trial.mkdir()
                held = to.write(source, plan, trial, work)
                write_type_plan(plan, trial / PLAN)
                verdict = judge(trial)
                size = sum(path.stat().st_size for path in trial.glob(to.files))
                steps.append(_Step(bits, size, plan.expected["kld"], held, verdict))
                console.say(f"{bits:g} bits, {size / 1e6:.1f} MB: {verdict.reason}")
                if verdict.released or len(steps) == 1:
                    shutil.rmtree(best, ignore_errors=True)
                    trial.rename(best)
                _keep(draft.path / _STEPS, steps)
                if _ended(steps):
                    break
        kept = next((step for step in reversed(steps) if step.verdict.released), steps[0])
        shutil.copytree(best, draft.path, copy_function=_link, dirs_exist_ok=True)
        report(kept.quantized, "search")
        draft.metrics["quantized"] = asdict(kept.quantized)
        draft.metrics["fidelity"] = asdict(check(merged, draft.path, fed_back="feedback" in config))
        draft.metrics["search"] = [step.told for step in steps]
        draft.metrics[RELEASE] = asdict(kept.verdict)
        for folder in (work, trial, best):
            shutil.rmtree(folder, ignore_errors=True)
    return kept.verdict


@dataclass(frozen=True)
class _Step:
    """A candidate that was judged."""

    bits: float
    nbytes: int
    expected_kld: float
    quantized: Quantized
    verdict: Verdict

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


def _matrix(told: dict[str, Any]) -> Matrix:
    return Matrix(**told | {"options": tuple(Option(**option) for option in told["options"])})


def _keep(path: Path, made: Sequence[Matrix] | Sequence[_Step]) -> None:
    """For a killed run to go on from; the file appears when whole."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps([asdict(one) for one in made]))
    part.replace(path)


def _kept(path: Path) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return told


def _link(source: str, target: str) -> None:
    """The candidate's file also as the artefact's: until that is whole, a killed run finds the candidate."""
    Path(target).unlink(missing_ok=True)
    os.link(source, target)


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
