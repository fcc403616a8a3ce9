"""Does an export compute what the merged model computes? Measured on pictures and text, and what differs is named.

The two models read the same drawn pictures, questions and long answers through the one front end, and their logits on
the answers are compared token by token. Pictures and texts are fixed: the same model always gives the same numbers.
An export that fails is searched for the first thing that differs: metadata or a tensor of the files, the image
embeddings, the logits on text alone, the logits on text behind a picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from ldrt_edge import console
from ldrt_edge.convert.plan import FilePlan, Source, mmproj_plan, open_source, text_plan
from ldrt_edge.errors import ArtifactError, require
from ldrt_edge.front import Front, Message
from ldrt_edge.runtimes.base import FloatArray, Prompt, Runtime, log_softmax
from ldrt_edge.runtimes.processor import free_cores

_SEED = 20250115
_PROBES = 4  # about 300 answer tokens
_SIZES = ((224, 224), (180, 320), (400, 150), (97, 96), (600, 450))  # height, width
_QUESTIONS_AND_ANSWERS = (
    (
        "What does this picture show?",
        "The picture shows a transverse slice through a treatment plan. The target lies near the middle, drawn as a "
        "red contour, and the coloured area around it is the dose. Away from the target the dose falls off quickly, so "
        "that the skin and the bone marrow receive only a small part of it.",
    ),
    (
        "Describe the dose distribution in detail.",
        "Two opposed beams enter from the left and from the right side of the joint. Where they overlap, the dose is "
        "nearly uniform and reaches the prescribed value. The isodose lines at 95, 80 and 50 percent run close "
        "together at the edges, which means a steep gradient, and the penumbra is about five millimetres wide.",
    ),
    (
        "¿Qué se ve en la imagen?",
        "La imagen muestra una radiografía de la rodilla izquierda en dos proyecciones. El espacio articular está "
        "reducido en el lado interno y hay pequeños osteofitos. El tratamiento propuesto es una serie de seis sesiones "
        "con una dosis baja, y el control se hace después de tres meses.",
    ),
    (
        "Which organs at risk are close to the target?",
        "The spinal cord and the thyroid are drawn as organs at risk. Both lie outside the 20 percent isodose line. "
        "According to the table, the largest dose to the cord is 0.31 Gy and the mean dose to the thyroid is 0.08 Gy, "
        "so that no limit is reached or even approached.",
    ),
    (
        "How many fractions are planned, and with which dose?",
        "Six fractions of 0.5 Gy are planned, two in a week, which makes a total dose of 3.0 Gy in three weeks. After "
        "twelve weeks the patient is seen again. If the pain has not improved enough by then, a second series with the "
        "same total dose can be given.",
    ),
)

_BYTES_PER_WEIGHT = 4.5  # of float32, with what computing takes

Probe = tuple[Prompt, tuple[int, ...]]


@dataclass(frozen=True)
class Fidelity:
    """How close one model's numbers are to another's, on the same answer tokens behind pictures.

    mean_kld: Kullback-Leibler divergence of the subject's next-token distribution from the reference's, nats a token.
    top1_agreement: part of the tokens where both find the same token likeliest.
    undecided: part of the tokens where they do not, but the reference's own two candidates lie closer together than
        half-precision numbers do at the size of its logits.
    embedding_rel_error: largest over the pictures of |subject - reference| / |reference| (Frobenius).
    """

    max_abs_logit_diff: float
    mean_kld: float
    top1_agreement: float
    undecided: float
    tokens: int
    embedding_rel_error: float


class Gate(NamedTuple):
    """What an unquantised export must reach, and how far its image embeddings may be off before they are suspect.

    Undecided tokens count as agreeing: llama.cpp reads pixels, and with f16 weights every activation, in half
    precision, so below that distance either choice is right.
    """

    mean_kld: float
    top1_agreement: float
    embedding_rel_error: float

    def passes(self, fidelity: Fidelity) -> bool:
        """Whether a comparison reaches the gate."""
        agreement = fidelity.top1_agreement + fidelity.undecided
        return fidelity.mean_kld <= self.mean_kld and agreement >= self.top1_agreement - 1e-9


GATES = {"f32": Gate(2e-5, 1.0, 1e-3), "f16": Gate(5e-4, 0.996, 1e-2), "bf16": Gate(5e-3, 0.98, 1e-2)}
"""By type of the weights, loosest last. bf16 rounds activations to 8 bits too, so it cannot reach what f16 reaches."""


def probes(front: Front, count: int = _PROBES) -> list[Probe]:
    """Prompts with drawn pictures of several shapes, and the answers to score behind them."""
    made = []
    for i in range(count):
        question, answer = _QUESTIONS_AND_ANSWERS[i % len(_QUESTIONS_AND_ANSWERS)]
        image = front.image(_draw(np.random.default_rng(_SEED + i), _SIZES[i % len(_SIZES)]))
        messages = [Message("user", question, (image,))]
        made.append((front.prompt(messages), front.answer_ids(messages, answer)))
    return made


def text_probes(front: Front) -> list[Probe]:
    """The same questions and answers without pictures."""
    made = []
    for question, answer in _QUESTIONS_AND_ANSWERS:
        messages = [Message("user", question)]
        made.append((front.prompt(messages), front.answer_ids(messages, answer)))
    return made


def compare(reference: Runtime, subject: Runtime, wanted: Sequence[Probe]) -> Fidelity:
    """Hold one loaded model against another."""
    return _difference(_observe(reference, wanted), _observe(subject, wanted))


def check(merged: Path, folder: Path, type_: str, mmproj_type: str) -> Fidelity:
    """Hold a GGUF pair against the merged model it was made from; one model is loaded at a time.

    Quantised types are measured only, so long as they compute numbers at all.

    Raises:
        ArtifactError: the pair misses its gate; the line says what differs first.
    """
    source = open_source(merged)
    reference = _Reference.fitting(source)
    gate = _gate(type_, mmproj_type, "f32" if reference.dtype == "float32" else "bf16")
    wanted = probes(source.front)
    exact = type_ == mmproj_type == "f32"
    fidelity = _difference(reference.observe(wanted), _observe_gguf(folder, wanted, exact))
    if not math.isfinite(fidelity.mean_kld):
        raise ArtifactError(f"{merged} as {type_} computes values that are not numbers: choose another type")
    if gate and not gate.passes(fidelity):
        raise ArtifactError(
            f"the GGUF does not compute what {merged} computes: mean KLD {fidelity.mean_kld:.2g} (allowed "
            f"{gate.mean_kld:g}), top-1 {fidelity.top1_agreement:.1%} (wanted {gate.top1_agreement:.1%}); "
            f"first difference: {_first_difference(reference, folder, (type_, mmproj_type), gate, exact)}"
        )
    return fidelity


def _gate(*types: str) -> Gate | None:
    """The gate of the loosest of the types; None if one of them is quantised."""
    if any(type_ not in GATES for type_ in types):
        return None
    return max((GATES[type_] for type_ in types), key=lambda gate: gate.mean_kld)


def _first_difference(reference: _Reference, folder: Path, types: tuple[Any, Any], gate: Gate, exact: bool) -> str:
    source = reference.source
    for kind, plan in (("model", text_plan(source, types[0])), ("mmproj", mmproj_plan(source, types[1]))):
        for path in folder.glob(f"{kind}-*.gguf"):
            for difference in file_differences(plan, path):
                return f"{path.name}: {difference}"
    wanted, text_only = probes(source.front), text_probes(source.front)
    fidelity = _difference(reference.observe(wanted), _observe_gguf(folder, wanted, exact))
    if not fidelity.embedding_rel_error <= gate.embedding_rel_error:
        return f"image embeddings, off by {fidelity.embedding_rel_error:.2%} (vision tower or projector)"
    alone = _difference(reference.observe(text_only), _observe_gguf(folder, text_only, exact))
    if not alone.mean_kld <= gate.mean_kld:
        return f"logits on text alone, mean KLD {alone.mean_kld:.2g} (language model)"
    return "logits behind a picture only (order or place of the image embeddings)"


def file_differences(plan: FilePlan, path: Path) -> Iterator[str]:
    """How a GGUF file differs from its plan: metadata, then tensors, in the file's order."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    for key, planned in plan.metadata.kv_data[0].items():
        if key.startswith("general."):
            continue
        field = reader.fields.get(key)
        found = None if field is None else field.contents()
        if not _same(planned.value, found):
            yield f"{key} is {str(found)[:60]}, planned was {str(planned.value)[:60]}"
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for tensor in plan.tensors:
        if tensor.name not in stored:
            yield f"{tensor.name} is missing"
        elif not np.array_equal(stored[tensor.name].data.view(np.uint8).ravel(), _bytes(plan.encoded(tensor))):
            yield f"{tensor.name} differs from {tensor.source if isinstance(tensor.source, str) else 'its values'}"
    planned_names = {tensor.name for tensor in plan.tensors}
    yield from (f"{name} should not be there" for name in stored if name not in planned_names)


def _same(planned: Any, found: Any) -> bool:
    if isinstance(planned, list | tuple):
        return isinstance(found, list) and len(planned) == len(found) and all(map(_same, planned, found))
    if isinstance(planned, float) and isinstance(found, float):
        return math.isclose(planned, found, rel_tol=1e-6)
    return bool((planned.decode("utf-8", "replace") if isinstance(planned, bytes) else planned) == found)


def _bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).view(np.uint8).ravel()


class _Observed(NamedTuple):
    embeddings: list[FloatArray]
    logits: list[FloatArray]


def _observe(runtime: Runtime, wanted: Sequence[Probe]) -> _Observed:
    embeddings = [runtime.encode(image) for prompt, _ in wanted for image in prompt.images]
    return _Observed(embeddings, [runtime.score(prompt, answer) for prompt, answer in wanted])


@dataclass(frozen=True)
class _Reference:
    """The merged model, loaded only while observed: in float32 wherever that fits, as rounding would hide faults."""

    source: Source
    dtype: str
    device: str | None

    @classmethod
    def fitting(cls, source: Source) -> _Reference:
        torch = require("torch", "train")
        needed = _BYTES_PER_WEIGHT * sum(entry.count for entry in source.weights.entries.values())
        if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > needed:
            return cls(source, "float32", "cuda")
        if psutil.virtual_memory().available > needed:
            return cls(source, "float32", "cpu")
        console.say(f"note: the reference runs in bfloat16; in float32 it would take {needed / 1e9:.0f} GB of memory")
        return cls(source, "bfloat16", None)

    def observe(self, wanted: Sequence[Probe]) -> _Observed:
        from ldrt_edge.runtimes.hf import HfRuntime

        runtime = HfRuntime(self.source.folder, threads=free_cores(), dtype=self.dtype, device=self.device)
        try:
            return _observe(runtime, wanted)
        finally:
            runtime.close()


def _observe_gguf(folder: Path, wanted: Sequence[Probe], exact: bool) -> _Observed:
    from ldrt_edge.runtimes.llamacpp import LlamaCppRuntime

    runtime = LlamaCppRuntime(folder, exact=exact)
    try:
        return _observe(runtime, wanted)
    finally:
        runtime.close()


def _difference(reference: _Observed, subject: _Observed) -> Fidelity:
    klds, agreements, undecided, largest = [], [], [], 0.0
    for expected, found in zip(reference.logits, subject.logits, strict=True):
        log_p, log_q = log_softmax(expected), log_softmax(found)
        klds.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
        chosen = np.take_along_axis(expected, found.argmax(axis=-1)[:, None], axis=-1)[:, 0]
        margin = expected.max(axis=-1) - chosen
        agreements.append(margin == 0)
        undecided.append((margin > 0) & (margin < np.spacing(np.abs(expected).max(axis=-1).astype(np.float16))))
        largest = max(largest, float(np.abs(expected - found).max()))
    errors = [
        float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        for expected, found in zip(reference.embeddings, subject.embeddings, strict=True)
    ]
    return Fidelity(
        max_abs_logit_diff=largest,
        mean_kld=float(np.concatenate(klds).mean()),
        top1_agreement=float(np.concatenate(agreements).mean()),
        undecided=float(np.concatenate(undecided).mean()),
        tokens=sum(map(len, klds)),
        embedding_rel_error=max(errors, default=0.0),
    )


def _draw(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A picture of (height, width): soft colours with hard-edged boxes on them."""
    height, width = size
    coarse = rng.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8)
    picture = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    for _ in range(4):
        top, left = int(rng.integers(height - 8)), int(rng.integers(width - 8))
        picture[top : top + height // 4, left : left + width // 4] = rng.integers(0, 256, 3)
    return picture
