"""`ldrt-edge parity REFERENCE EXPORT...`: does an export compute what its model computes? If not, what is off first?

Both models read the same drawn pictures, questions and long answers. They are held against each other stage by stage:
settings in the files, pixel values, prompt tokens, image embeddings, logits, greedy answers; the first stage that
differs is named, with the tensor, the setting or the known mistake behind it. Unquantised exports must pass a gate;
quantised ones may differ in logits and answers, which is measured, and in nothing before that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ldrt_edge import golden
from ldrt_edge.convert.exports import Export, open_export
from ldrt_edge.convert.faults import setting_differences, tensor_differences
from ldrt_edge.convert.inputs import pixel_fault, prompt_fault
from ldrt_edge.convert.observation import Fidelity, Observed, difference, equal_answers, observe
from ldrt_edge.convert.probes import ALL, Probe, pictures, probe_count, probes, questions, text_probes
from ldrt_edge.convert.source import Source, open_source
from ldrt_edge.convert.stock import Peer, peers_of
from ldrt_edge.errors import ArtifactError, DataError, LdrtError
from ldrt_edge.runtimes.base import FloatArray
from ldrt_edge.runtimes.processor import free_cores

Stage = Literal["load", "settings", "pixels", "prompt", "embeddings", "logits", "answers"]


class Gate(NamedTuple):
    """What an unquantised export must reach, and how far its image embeddings may be off before they are suspect.

    Undecided tokens count as agreeing: llama.cpp reads pixels, and with f16 weights every activation, in half
    precision, so below that distance either choice is right.
    """

    mean_kld: float
    top1_agreement: float
    embedding_rel_error: float
    max_abs_logit_diff: float = math.inf

    def passes(self, fidelity: Fidelity) -> bool:
        """Whether a comparison reaches the gate."""
        agreement = fidelity.top1_agreement + fidelity.undecided
        return (
            fidelity.mean_kld <= self.mean_kld
            and agreement >= self.top1_agreement - 1e-9
            and fidelity.max_abs_logit_diff <= self.max_abs_logit_diff
        )


GATES = {"f32": Gate(2e-5, 1.0, 1e-3), "f16": Gate(5e-4, 0.996, 1e-2), "bf16": Gate(5e-3, 0.98, 3e-2)}
"""By type of the weights, loosest last. bf16 rounds activations to 8 bits too, so it cannot reach what f16 reaches."""
_MLX_F32 = Gate(1e-6, 1.0, 1e-4, 5e-3)
_ROUNDED_TOWERS = {"Q8_0": 0.08, "Q6_K": 0.12}
"""How far image embeddings of a rounded tower may be off: its rounding, and no more; by 0.3 with fewer bits."""


@dataclass(frozen=True)
class Pair:
    """One export held against the reference.

    stage, fault: the first stage that differs and what is wrong there; None where nothing is.
    reference, subject: the folders' own names; weights, vision: the subject's types. peer: whether it is somebody
    else's runtime, shown for comparison. prompt_equal: None where the files do not say how a prompt is made. answers,
    answers_equal: greedy answers, and how many are token for token the reference's; numbers are None where the prompts
    do not allow a comparison. reference_type: what the reference computed in.
    """

    reference: str
    subject: str
    runtime: str
    weights: str
    vision: str
    stage: Stage | None
    fault: str | None
    pixels_equal: bool | None
    prompt_equal: bool | None
    fidelity: Fidelity | None
    answers: int
    answers_equal: int | None
    reference_type: str
    peer: bool = False


def parity(reference: Path, exports: Sequence[Path], peers: bool = False) -> list[Pair]:
    """Hold every export against the reference, a merged or base folder; one model is loaded at a time.

    peers: also hold what other people's runtimes make of the same files, as far as they are installed.

    Raises:
        ArtifactError: a folder holds no model that can be compared.
        MissingExtraError, RuntimeLoadError: a model does not load.
    """
    source = open_source(reference)
    wanted = _Reference.fitting(source)
    pairs = []
    for export in [open_export(folder, source.front) for folder in exports]:
        try:
            pairs.append(_compare(wanted, export).pair)
        except LdrtError as error:  # one that does not load costs the others nothing
            pairs.append(_unloadable(wanted, export, str(error)))
        if peers:
            pairs += [_compare_peer(wanted, export, peer) for peer in peers_of(export)]
    return pairs


def check(merged: Path, folder: Path, fed_back: bool = False) -> Fidelity:
    """Hold a new export against the model it was made from, and leave golden answers in its folder.

    fed_back: whether its weights make good for each other's rounding.

    Raises:
        ArtifactError: it differs where it must not; the line says what differs first.
    """
    source = open_source(merged)
    export = replace(open_export(folder, source.front), fed_back=fed_back)
    pair, expected, observed = _compare(_Reference.fitting(source), export)
    if pair.stage or expected is None or observed is None or pair.fidelity is None:
        raise ArtifactError(f"the export does not compute what {merged} computes: {pair.stage}: {pair.fault}")
    count = len(expected.answers)
    asked = [(question, picture) for (question, _), picture in zip(questions(count), pictures(count), strict=True)]
    golden.write(folder, source.front, asked, expected.answers, observed.answers, observed.margins)
    return pair.fidelity


class _Comparison(NamedTuple):
    pair: Pair
    expected: Observed | None
    observed: Observed | None


def _compare(reference: _Reference, export: Export) -> _Comparison:
    source, wanted, found = reference.source, probes(reference.source.front, ALL), _probes(export)
    faults: dict[Stage, str | None] = {
        "settings": next(setting_differences(source, export), None),
        "pixels": pixel_fault(source.front, export, wanted, found),
        "prompt": prompt_fault(source.front, export, wanted, found),
    }
    verdict = next(((stage, fault) for stage, fault in faults.items() if fault), None)
    fidelity = expected = observed = equal = None
    count = len(reference.wanted)
    if verdict is None or _lengths(wanted) == _lengths(found):
        expected, observed = reference.expected, _observe_export(export, found[:count])
        fidelity, equal = difference(expected, observed), equal_answers(expected, observed.answers)
        verdict = verdict or _verdict(reference, export, fidelity, observed)
        if verdict is None and export.exact and equal < count:
            verdict = ("answers", f"{count - equal} of {count} greedy answers differ")
    stage, fault = verdict or (None, None)
    pair = Pair(
        _name(source.folder), _name(export.folder), export.runtime, export.weights, export.vision, stage, fault,
        not faults["pixels"], not faults["prompt"] if export.tells_prompt else None, fidelity, count, equal,
        reference.dtype,
    )
    return _Comparison(pair, expected, observed)


def _unloadable(reference: _Reference, export: Export, reason: str) -> Pair:
    return Pair(
        _name(reference.source.folder), _name(export.folder), export.runtime, export.weights, export.vision, "load",
        reason, None, None, None, len(reference.wanted), None, reference.dtype,
    )


def _name(folder: Path) -> str:
    return folder.absolute().resolve().name


def _lengths(asked: Sequence[Probe]) -> list[tuple[int, int]]:
    return [(len(prompt.ids), len(answer)) for prompt, answer in asked]


def _compare_peer(reference: _Reference, export: Export, peer: Peer) -> Pair:
    """What somebody else's runtime makes of the same files, questions and pictures, prepared its own way."""
    expected, count = reference.expected, len(reference.wanted)
    stage: Stage | None = None
    fault = fidelity = equal = None
    try:
        asked = list(zip(questions(count), pictures(count), strict=True))
        logits, answers = peer.observe(export, asked, reference.wanted, expected.answers)
    except Exception as error:  # whatever another program raises is what the table is to show
        stage, fault = "answers", f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    else:
        equal = equal_answers(expected, answers)
        if logits is not None:
            seen = difference(expected, expected._replace(answer_logits=logits))
            fidelity = replace(seen, prompt_kld=None, embedding_rel_error=None)
            gate = _gate(reference, export)
            if gate and not gate.passes(fidelity):
                stage, fault = "logits", f"mean KLD {fidelity.mean_kld:.2g}"
    return Pair(
        _name(reference.source.folder), _name(export.folder), peer.name, export.weights, export.vision, stage, fault,
        None, None, fidelity, count, equal, reference.dtype, peer=True,
    )


def _verdict(
    reference: _Reference, export: Export, fidelity: Fidelity, observed: Observed
) -> tuple[Stage, str] | None:
    """What differs first behind the prompt, if more does than the export's types allow."""
    gate = _gate(reference, export)
    types = [export.vision, "f32" if reference.dtype == "float32" else "bf16"]
    allowed = max(GATES[t].embedding_rel_error if t in GATES else _ROUNDED_TOWERS.get(t, 0.3) for t in types)
    error = fidelity.embedding_rel_error or 0.0
    if not error <= max(allowed, gate.embedding_rel_error if gate else 0):
        mistake = reference.explain(observed.embeddings)
        tensor = next((t for t in tensor_differences(reference.source, export) if _is_vision(t)), None)
        what = mistake or tensor or "the files are right, so the runtime computes another vision tower"
        return "embeddings", f"off by {error:.2%}: {what}"
    if not math.isfinite(fidelity.mean_kld):
        return "logits", "values that are not numbers: choose another type"
    if gate is None:  # rounding moves logits by any amount, tensors by little
        wrong = next(tensor_differences(reference.source, export), None)
        if wrong:
            return "logits", f"mean KLD {fidelity.mean_kld:.2g}: {wrong}"
    if gate is None:  # kernels for one token and for many round quantised weights' inputs differently
        return None
    if gate.passes(fidelity):
        step = observed.consistent.count(False)
        return ("answers", f"{step} answers are not what the runtime itself ranks first") if step else None
    told = (
        f"mean KLD {fidelity.mean_kld:.2g} (allowed {gate.mean_kld:g}), top-1 {fidelity.top1_agreement:.1%} (wanted "
        f"{gate.top1_agreement:.1%}), largest logit difference {fidelity.max_abs_logit_diff:.2g}"
    )
    return "logits", f"{told}: {_logit_fault(reference, export, gate)}"


def _logit_fault(reference: _Reference, export: Export, gate: Gate) -> str:
    tensor = next(tensor_differences(reference.source, export), None)
    if tensor:
        return tensor
    wanted = text_probes(reference.source.front, len(reference.wanted))
    alone = difference(reference.observe(wanted), _observe_export(export, wanted))
    if not alone.mean_kld <= gate.mean_kld:
        return "the files are right, and text alone differs: the runtime computes another language model"
    return "only behind a picture: order or place of the image embeddings"


def _gate(reference: _Reference, export: Export) -> Gate | None:
    """The gate of the loosest of the types; None if the language model is quantised."""
    if export.weights not in GATES:
        return None
    if export.runtime == "mlx" and export.exact and reference.dtype == "float32":
        return _MLX_F32
    types = [export.weights, export.vision if export.vision in GATES else "bf16"]
    types.append("f32" if reference.dtype == "float32" else "bf16")
    return max((GATES[type_] for type_ in types), key=lambda gate: gate.mean_kld)


def _is_vision(difference: str) -> bool:
    parts = ("mmproj", "vision_tower", "multi_modal_projector", "image_newline")
    return any(part in difference.lower() for part in parts)


def _probes(export: Export) -> list[Probe]:
    try:
        return probes(export.front, ALL)
    except DataError as error:
        raise ArtifactError(f"{export.folder}: its front end cannot make a prompt: {error}") from error


def _observe_export(export: Export, wanted: Sequence[Probe]) -> Observed:
    with export.loaded() as runtime:
        return observe(runtime, wanted)


@dataclass(frozen=True)
class _Reference:
    """The merged model, loaded only while observed: in float32 wherever that fits, as rounding would hide faults."""

    source: Source
    dtype: str
    device: str

    @classmethod
    def fitting(cls, source: Source) -> _Reference:
        from ldrt_edge.runtimes.hf import fitting

        return cls(source, *fitting(source.weights.count, precise=True))

    def observe(self, wanted: Sequence[Probe]) -> Observed:
        runtime = self._load()
        try:
            return observe(runtime, wanted)
        finally:
            runtime.close()

    @cached_property
    def wanted(self) -> list[Probe]:
        """The probes through the reference's own front end."""
        return probes(self.source.front, probe_count(self.source.weights.count))

    @cached_property
    def expected(self) -> Observed:
        """What the reference makes of them."""
        return self.observe(self.wanted)

    def explain(self, found: Sequence[FloatArray]) -> str | None:
        """The known mistake that gives these embeddings of the probes' pictures, if one does."""
        from ldrt_edge.convert.diagnose import explain_embeddings

        images = [image for prompt, _ in self.wanted for image in prompt.images]
        runtime = self._load()
        try:
            return explain_embeddings(runtime, images, found)
        finally:
            runtime.close()

    def _load(self) -> Any:
        from ldrt_edge.runtimes.hf import HfRuntime

        return HfRuntime(self.source.folder, threads=free_cores(), dtype=self.dtype, device=self.device)
