"""The models of one run on the same questions: what training gained, what each quantisation cost.

The rungs stand in the order base, tuned, quantised. Each is held against the reference model (without one, against the
subject), question by question, also in what it makes up. Models are loaded one after the other, each with a journal of
its own, so that memory for one is enough (for an export also the reference's, which its divergence wants).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ldrt_edge.bench import hallucination
from ldrt_edge.bench.calibration import Calibration, calibration, ece_difference
from ldrt_edge.bench.fidelity import Fidelity, fidelity
from ldrt_edge.bench.hallucination import Hallucination
from ldrt_edge.bench.latency import Latency
from ldrt_edge.bench.probes import Probe
from ldrt_edge.bench.schema import Flips, ModelIdentity, Score, count_flips, score
from ldrt_edge.bench.significance import McNemar, NonInferiority, holm, mcnemar, non_inferiority
from ldrt_edge.bench.statistics import Difference, joined, paired_difference, paired_loss
from ldrt_edge.bench.vqa import Answer, Sample, cluster_labels, flip

EXPORTS = ("gguf", "mlx")
"""Kinds of artefact that a laptop runs."""


@dataclass(frozen=True)
class Rung:
    """One model of a run. `role` tells which of report.json's models it is; `score.accuracy` and so on as there.

    loss: accuracy of the model it is held against, `against`, minus its own, paired; negative is a gain. loss_test has
        Holm's correction over the rungs. flips, fidelity: to the same model. None on that model's own rung, and where
        no divergence was measured. non_inferiority: the loss held against the run's margin.
    calibration, hallucination: of its own answers, as the report's are of the subject's; None where it was not probed.
    invented, ece: its share of yes to what is absent, and its expected calibration error, minus those of `against`,
        paired; positive means more is made up, and less known of being right.
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
    non_inferiority: NonInferiority | None = None
    calibration: Calibration | None = None
    hallucination: Hallucination | None = None
    invented: Difference | None = None
    ece: Difference | None = None


def climb(
    samples: Sequence[Sample], others: Mapping[str, Sequence[Sample]], probes: Mapping[str, Sequence[Probe]],
    models: Mapping[str, ModelIdentity], latencies: Mapping[str, Latency], seed: int, margin: float,
) -> tuple[Rung, ...]:
    """The rungs of a run.

    samples: the subject's, with the reference's answers. others: further models' own samples, by name. probes, models,
    latencies: by the names of others, "subject" and "reference". margin: a loss within it, a share, counts as none.
    """
    told = {"subject": samples, **others}
    if "reference" in models:
        told["reference"] = [_told_by_reference(sample) for sample in samples]
    by_id = {name: {sample.id: sample for sample in asked} for name, asked in told.items()}
    told = {name: [asked[sample.id] for sample in samples] for name, asked in by_id.items()}
    held = "reference" if "reference" in models else "subject"
    order = sorted(models, key=lambda name: (models[name].kind in EXPORTS, name == "reference", name == "subject"))
    rungs = [_rung(name, held, told, probes, models, latencies.get(name), seed, margin) for name in order]
    tested = iter(holm([rung.loss_test for rung in rungs if rung.loss_test]))
    return tuple(replace(rung, loss_test=next(tested)) if rung.loss_test else rung for rung in rungs)


def _told_by_reference(sample: Sample) -> Sample:
    """The reference's answer in the subject's place; it was asked without controls."""
    assert sample.reference is not None, "the reference answers all questions or none"
    return replace(sample, subject=sample.reference, blind=None, blind_any=None, kld=None, top1=None)


def _rung(
    name: str, held: str, told: Mapping[str, Sequence[Sample]], probes: Mapping[str, Sequence[Probe]],
    models: Mapping[str, ModelIdentity], latency: Latency | None, seed: int, margin: float,
) -> Rung:
    ours, theirs, apart = told[name], told[held], name != held
    labels = cluster_labels(ours)
    clusters = dict(zip([sample.id for sample in ours], labels, strict=True))
    right, expected = ([sample.subject.correct for sample in column] for column in (ours, theirs))
    wrong = [_blind(sample).correct for sample in ours] if ours[0].blind else None
    changed = [flip(a.language, a.subject, b.subject) for a, b in zip(ours, theirs, strict=True)]
    loss = paired_loss(expected, right, labels, seed) if apart else None
    asked, sure, known = probes.get(name), _sure(ours), _sure(theirs)
    return Rung(
        name=models[name].name if name in ("subject", "reference") else name,
        role=name if name in ("subject", "reference") else "other",  # type: ignore[arg-type]
        model=models[name],
        score=score(ours, lambda sample: sample.subject, clusters, seed),
        blind=score(ours, _blind, clusters, seed) if wrong else None,
        image_gain=paired_difference(right, wrong, labels, seed) if wrong else None,
        against=models[held].name if apart else None,
        loss=loss,
        loss_test=mcnemar(expected, right, labels) if apart else None,
        flips=count_flips(changed, labels, seed) if apart else None,
        fidelity=fidelity(ours, seed),
        latency=latency,
        non_inferiority=non_inferiority(loss, margin) if loss else None,
        calibration=calibration(*sure, labels, seed) if sure else None,
        hallucination=hallucination.summarise(asked, ours, seed) if asked else None,
        invented=_invented(asked, probes[held], seed) if asked and apart else None,
        ece=ece_difference(sure, known, labels, seed) if apart and sure and known else None,
    )


def _sure(samples: Sequence[Sample]) -> tuple[list[float], list[bool]] | None:
    """How sure the model was of each answer, and whether it was right; None if an older version asked."""
    sure = [sample.subject.confidence for sample in samples]
    known = [confidence for confidence in sure if confidence is not None]
    return (known, [sample.subject.correct for sample in samples]) if len(known) == len(sure) else None


def _invented(ours: Sequence[Probe], theirs: Sequence[Probe], seed: int) -> Difference | None:
    """Both were asked the same questions; None where nothing that is absent was asked about."""
    absent = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.sort == "presence" and not a.present]
    if not absent:
        return None
    labels = joined([a.image_sha256 for a, _ in absent], [a.group for a, _ in absent])
    return paired_difference([_yes(a) for a, _ in absent], [_yes(b) for _, b in absent], labels, seed)


def _yes(probe: Probe) -> bool:
    return probe.right is not None and probe.right.yes is True


def _blind(sample: Sample) -> Answer:
    assert sample.blind is not None, "both blind controls are asked of all questions or of none"
    return sample.blind
