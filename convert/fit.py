"""`ldrt-edge quantize --fit`: whether weights are rescaled, get feedback, both or neither, decided by trying.

Each way makes an export of the same types, which answers training questions in the runtime that it is made for, about
pictures that no weights were fitted to. The one nearest to the model itself is kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from ldrt_edge import artifact, console
from ldrt_edge.convert.calibration import Calibration
from ldrt_edge.convert.exports import open_export
from ldrt_edge.convert.format import WORK, Format
from ldrt_edge.convert.gradients import Asked, questions
from ldrt_edge.convert.source import Source
from ldrt_edge.convert.type_plan import TypePlan
from ldrt_edge.fidelity import compare_logits
from ldrt_edge.runtimes.base import FloatArray, Runtime
from ldrt_edge.runtimes.hf import HfRuntime

WAYS = {
    "none": (False, False), "rescale": (True, False), "feedback": (False, True), "rescale+feedback": (True, True),
}  # fmt: skip
"""Whether weights are rescaled and get feedback, the plainest first: that is kept where two lose as much."""
QUESTIONS = 64
_TRIED, _TRIAL = ".fit.json", ".fit"

F = TypeVar("F", bound=Format)


def decided(to: F, source: Source, draft: Path, plan: TypePlan | None = None) -> tuple[F, dict[str, artifact.Json]]:
    """A format whose calibration says how weights are fitted, and what the manifest is to say of the choice.

    plan: the types that are tried; None takes four bits. draft: keeps what was tried, for a killed run to go on from.
    A calibration that said so already stays as it is.

    Raises:
        ArtifactError: the disk is too small, or the format's own quantiser failed.
        DataError: too few training pictures to set some aside, or a row that cannot be asked.
    """
    given = to.calibration
    if given is None or not given.undecided:
        return to, {}
    ways = {name: _way(given, *which) for name, which in WAYS.items()}
    tried = json.loads((draft / _TRIED).read_text()) if (draft / _TRIED).exists() else {}
    if left := [name for name in ways if name not in tried]:
        plan, trial = plan or to.preset(source, "q4"), given.for_plans()
        asked, expected = _reference(source, trial)
        for name in left:
            fitted = to.fitted_by(_way(trial, *WAYS[name]))
            tried[name] = _mean_kld(source, fitted, plan, draft, asked, expected)
            console.say(f"weights fitted by {name}: mean KLD {tried[name]:.2g} on {len(asked)} questions set aside")
            artifact.replace_text(draft / _TRIED, json.dumps(tried))
    kept = min(tried, key=lambda name: tried[name])
    console.say(f"weights are fitted by {kept}")
    return to.fitted_by(ways[kept]), {"fit": {"kept": kept, "mean_kld": tried}}


def _way(given: Calibration, rescale: bool, feedback: bool) -> Calibration | None:
    return replace(given, rescale=rescale, feedback=feedback, undecided=False) if rescale or feedback else None


def _reference(source: Source, trial: Calibration) -> tuple[list[Asked], list[FloatArray]]:
    """Training questions about pictures that are not fitted to, and the model's own logits."""
    runtime = HfRuntime(source.folder, threads=trial.threads)
    try:
        asked = questions(runtime, trial.data, QUESTIONS, trial.seed, but=trial.rows())
        return asked, _logits(runtime, asked, "asking the model")
    finally:
        runtime.close()


def _mean_kld(
    source: Source, to: Format, plan: TypePlan, draft: Path, asked: Sequence[Asked], expected: Sequence[FloatArray]
) -> float:
    folder = draft / _TRIAL
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    to.write(source, plan, folder, draft / WORK)
    with open_export(folder, source.front).loaded() as runtime:
        given = _logits(runtime, asked, "trying")
    shutil.rmtree(folder)
    return float(compare_logits(np.concatenate(expected), np.concatenate(given)).kld.mean())


def _logits(runtime: Runtime, asked: Sequence[Asked], label: str) -> list[FloatArray]:
    """Logits (answer tokens, vocab) of every question."""
    return [runtime.score(prompt, answer) for prompt, answer in console.track(asked, label)]
