"""`ldrt-edge quantize --max-loss`: the smallest export whose measured loss stays within a budget.

Plans are allocated for fewer and fewer bits, and each is quantised and judged on held-out questions, until one fails;
the last that passed is released. Going down in an order that was fixed before, and stopping at the first failure, lets
every step be judged at the full 95%: trying many candidates does not make it easier for a bad one to pass.

Source: Maurer, Hothorn and Lehmacher, "Multiple comparisons in drug clinical trials and preclinical assays: a-priori
ordered hypotheses", Biometrie in der chemisch-pharmazeutischen Industrie 6 (1995).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from ldrt_edge import artifact, console
from ldrt_edge.convert.allocate import OutOfReach, allocate
from ldrt_edge.convert.fallbacks import report
from ldrt_edge.convert.gguf import identity
from ldrt_edge.convert.parity import check
from ldrt_edge.convert.planned import WORK, Format
from ldrt_edge.convert.sensitivity import Matrix, sensitivities
from ldrt_edge.convert.source import open_source
from ldrt_edge.convert.type_plan import FormatName, TypePlan, write_type_plan
from ldrt_edge.release import RELEASE, Verdict, read_verdict

BITS = (8.5, 7.0, 6.0, 5.5, 5.0, 4.75, 4.5, 4.25, 4.0, 3.75, 3.5, 3.25, 3.0, 2.75, 2.5)
"""Bits a weight of the whole export, tried in this order."""
PLAN = "plan.yaml"
Judge = Callable[[Path], Verdict]


def quantize_to_budget(
    merged: Path, out: Path, data: Path, to: Format, judge: Judge, budget: dict[str, float | None], limit: int = 16,
    seed: int = 0,
) -> Verdict:
    """Search, quantise and judge; writes `out`, an artefact of the format's kind with its plan; returns its verdict.

    data: a dataset artefact: training rows for the sensitivities; `judge` asks the test rows. budget: what the judge
    holds against, for the manifest. limit: about how many training rows.
    When even the largest candidate fails, it is written, unreleased, with the evidence.

    Raises:
        ArtifactError, DataError: the model, the dataset or what the format was given is wrong, or its quantiser failed.
    """
    config = {"to": to.name, "budget": budget, "limit": limit, **to.config()}
    given = [identity(merged), *to.inputs(), artifact.identity(data)]
    with artifact.create(out, to.name, config, given, seed) as draft:
        if draft.complete:
            return _recorded(draft.metrics)
        source = open_source(merged)
        work, trial, best = (draft.path / name for name in (WORK, ".trial", ".best"))
        found = sensitivities(source, data, to, limit, seed, work=work)
        steps = []
        for bits, plan in _plans(to.name, found, to.fixed_bytes(source)):
            trial.mkdir()
            held = to.write(source, plan, trial, work)
            write_type_plan(plan, trial / PLAN)
            verdict = judge(trial)
            size = sum(path.stat().st_size for path in trial.glob(to.files))
            steps.append({"bits": bits, "bytes": size, "expected_kld": plan.expected["kld"], **asdict(verdict)})
            console.say(f"{bits:g} bits, {size / 1e6:.1f} MB: {verdict.reason}")
            if best.exists() and not verdict.released:
                break
            shutil.rmtree(best, ignore_errors=True)
            trial.rename(best)
            kept, result = verdict, held
            if not verdict.released:
                break
        for path in best.iterdir():
            path.rename(draft.path / path.name)
        for folder in (work, trial, best):
            shutil.rmtree(folder, ignore_errors=True)
        report(result, "search")
        draft.metrics["quantized"] = asdict(result)
        draft.metrics["fidelity"] = asdict(check(merged, draft.path))
        draft.metrics["search"] = steps
        draft.metrics[RELEASE] = asdict(kept)
    return kept


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
