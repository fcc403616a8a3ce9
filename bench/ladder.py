"""Several models on the same questions in one run: what training gained, what each quantisation cost.

The rungs stand in the order base, tuned, quantised. Each is held against the reference model (without one, against the
subject), question by question. Models are loaded one after the other, each with a journal of its own, so that memory
for one is enough (for an export also the reference's, which its divergence wants).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ldrt_edge.bench.fidelity import Fidelity, fidelity
from ldrt_edge.bench.latency import Latency
from ldrt_edge.bench.schema import Flips, ModelIdentity, Score, count_flips, score
from ldrt_edge.bench.significance import McNemar, holm, mcnemar
from ldrt_edge.bench.statistics import Difference, paired_difference
from ldrt_edge.bench.vqa import Answer, Sample, cluster_labels, flip

_EXPORTS = ("gguf", "mlx")


@dataclass(frozen=True)
class Rung:
    """One model of a run. `role` tells which of report.json's models it is; `score.accuracy` and so on as there.

    loss: accuracy of the model it is held against, `against`, minus its own, paired; negative is a gain. loss_test has
        Holm's correction over the rungs. flips, fidelity: to the same model. None on that model's own rung, and where
        no divergence was measured.
    """

    name: str
    role: Literal["subject", "reference", "other"]
    model: ModelIdentity
    score: Score
    blind: Score | None
    image_gain: Difference | None
    against: str | None
    loss: Difference | None
    loss_test: McNemar | None
    flips: Flips | None
    fidelity: Fidelity | None
    latency: Latency | None


def climb(
    samples: Sequence[Sample], others: Mapping[str, Sequence[Sample]], models: Mapping[str, ModelIdentity],
    latencies: Mapping[str, Latency], seed: int,
) -> tuple[Rung, ...]:
    """The rungs of a run.

    samples: the subject's, with the reference's answers. others: further models' own samples, by name. models,
    latencies: by the names of others, "subject" and "reference".
    """
    labels = cluster_labels(samples)
    clusters = dict(zip([sample.id for sample in samples], labels, strict=True))
    told = {"subject": samples, **others}
    given = {name: {s.id: s.subject for s in asked} for name, asked in told.items()}
    blind = {name: {s.id: s.blind for s in asked if s.blind} for name, asked in told.items()}
    if "reference" in models:
        given["reference"] = {s.id: s.reference for s in samples if s.reference}
    held = "reference" if "reference" in models else "subject"
    order = sorted(models, key=lambda name: (models[name].kind in _EXPORTS, name == "reference", name == "subject"))
    rungs = [
        _rung(name, held, samples, clusters, given, blind.get(name), models, latencies.get(name),
              fidelity(told[name]) if name in told else None, seed)
        for name in order
    ]  # fmt: skip
    tested = iter(holm([rung.loss_test for rung in rungs if rung.loss_test]))
    return tuple(replace(rung, loss_test=next(tested)) if rung.loss_test else rung for rung in rungs)


def _rung(
    name: str, held: str, samples: Sequence[Sample], clusters: Mapping[str, object],
    given: Mapping[str, Mapping[str, Answer]], blind: Mapping[str, Answer] | None,
    models: Mapping[str, ModelIdentity], latency: Latency | None, close: Fidelity | None, seed: int,
) -> Rung:
    labels = list(clusters.values())
    ours, theirs = ([given[who][sample.id] for sample in samples] for who in (name, held))
    right, expected = ([answer.correct for answer in listed] for listed in (ours, theirs))
    wrong = [blind[sample.id].correct for sample in samples] if blind else None
    apart = name != held
    changed = [flip(sample.language, a, b) for sample, a, b in zip(samples, ours, theirs, strict=True)]
    return Rung(
        name=models[name].name if name in ("subject", "reference") else name,
        role=name if name in ("subject", "reference") else "other",  # type: ignore[arg-type]
        model=models[name],
        score=score(samples, lambda sample: given[name][sample.id], clusters, seed),
        blind=score(samples, lambda sample: blind[sample.id], clusters, seed) if blind else None,
        image_gain=paired_difference(right, wrong, labels, seed) if wrong else None,
        against=models[held].name if apart else None,
        loss=paired_difference(expected, right, labels, seed) if apart else None,
        loss_test=mcnemar(expected, right, labels) if apart else None,
        flips=count_flips(changed, labels, seed) if apart else None,
        fidelity=close if held == "reference" else None,
        latency=latency,
    )
