"""`ldrt-edge parity REFERENCE EXPORT...`: does an export compute what its model computes? If not, what is off first?

Both models read the same drawn pictures, questions and long answers. They are held against each other stage by stage:
settings in the files, pixel values, prompt tokens, image embeddings, logits, greedy answers; the first stage that
differs is named, with the tensor, the setting or the known mistake behind it. Unquantised exports must pass a gate;
quantised ones may differ in logits and answers, which is measured, and in nothing before that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil

from ldrt_edge import console
from ldrt_edge.convert import golden
from ldrt_edge.convert.exports import Export, open_export
from ldrt_edge.convert.faults import setting_differences, tensor_differences
from ldrt_edge.convert.probes import Probe, pictures, probe_count, probes, questions, text_probes
from ldrt_edge.convert.source import Source, open_source
from ldrt_edge.convert.stock import Peer, peers_of
from ldrt_edge.errors import ArtifactError, DataError, require
from ldrt_edge.fidelity import compare_logits, half_precision
from ldrt_edge.front import Front
from ldrt_edge.runtimes.base import FloatArray, FrontImage, Prompt, Runtime, Sampling
from ldrt_edge.runtimes.processor import free_cores

Stage = Literal["settings", "pixels", "prompt", "embeddings", "logits", "answers"]
_ANSWER_TOKENS = 16
_BYTES_PER_WEIGHT = 4.5  # of float32, with what computing takes
_PIXEL_SETTINGS = (
    "image_mean", "image_std", "image_size", "patch_size", "fit", "resample", "grid_pinpoints", "vision_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Fidelity:
    """How close one model's numbers are to another's, on the same tokens behind pictures.

    mean_kld, top1_agreement, undecided: over answer tokens; see `ldrt_edge.fidelity`.
    prompt_kld: mean over the prompt's own tokens behind the picture.
    max_abs_logit_diff: over both.
    embedding_rel_error: largest over the pictures of |subject - reference| / |reference| (Frobenius).
    Of somebody else's runtime, prompt and embeddings are not seen: None.
    """

    max_abs_logit_diff: float
    mean_kld: float
    top1_agreement: float
    undecided: float
    tokens: int
    prompt_kld: float | None
    embedding_rel_error: float | None


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


GATES = {"f32": Gate(2e-5, 1.0, 1e-3), "f16": Gate(5e-4, 0.996, 1e-2), "bf16": Gate(5e-3, 0.98, 1e-2)}
"""By type of the weights, loosest last. bf16 rounds activations to 8 bits too, so it cannot reach what f16 reaches."""
_MLX_F32 = Gate(1e-6, 1.0, 1e-4, 5e-3)
_ROUNDED_TOWER = 0.08
"""Image embeddings of a tower in 8 bits: its rounding, and no more."""


@dataclass(frozen=True)
class Pair:
    """One export held against the reference.

    stage, fault: the first stage that differs and what is wrong there; None where nothing is.
    reference, subject: the folders' own names; weights, vision: the subject's types. peer: whether it is somebody
    else's runtime, shown for comparison. answers, answers_equal: greedy answers, and how many are token for token the
    reference's; numbers are None where the prompts do not allow a comparison.
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
    for folder in exports:
        export = open_export(folder, source.front)
        pairs.append(_compare(wanted, export).pair)
        if peers:
            pairs += [_compare_peer(wanted, export, peer) for peer in peers_of(export)]
    return pairs


def check(merged: Path, folder: Path) -> Fidelity:
    """Hold a new export against the model it was made from, and leave golden answers in its folder.

    Raises:
        ArtifactError: it differs where it must not; the line says what differs first.
    """
    source = open_source(merged)
    pair, expected, observed = _compare(_Reference.fitting(source), open_export(folder, source.front))
    if pair.stage or expected is None or observed is None or pair.fidelity is None:
        raise ArtifactError(f"the export does not compute what {merged} computes: {pair.stage}: {pair.fault}")
    count = len(expected.answers)
    asked = [(question, picture) for (question, _), picture in zip(questions(count), pictures(count), strict=True)]
    golden.write(folder, source.front, asked, expected.answers, observed.answers, observed.margins)
    return pair.fidelity


def compare(reference: Runtime, subject: Runtime, wanted: Sequence[Probe]) -> Fidelity:
    """Hold one loaded model against another."""
    return _difference(_observe(reference, wanted), _observe(subject, wanted))


class _Comparison(NamedTuple):
    pair: Pair
    expected: _Observed | None
    observed: _Observed | None


def _compare(reference: _Reference, export: Export) -> _Comparison:
    source, wanted, found = reference.source, reference.wanted, _probes(export, len(reference.wanted))
    pixels_equal = all(map(_same_pixels, _views(source.front, wanted), _views(export.front, found)))
    prompt_equal = [prompt.ids for prompt, _ in wanted] == [prompt.ids for prompt, _ in found] and _same_template(
        source.front, export
    )
    fidelity = expected = observed = equal = None
    settings = next(setting_differences(source, export), None)
    if settings:
        verdict: tuple[Stage, str] | None = ("settings", settings)
    elif not pixels_equal:
        verdict = ("pixels", _pixel_fault(source.front, export.front))
    elif not prompt_equal:
        verdict = ("prompt", _prompt_fault(source.front, export, wanted, found))
    else:
        verdict = None
    if verdict is None or all(len(a.ids) == len(b.ids) for (a, _), (b, _) in zip(wanted, found, strict=True)):
        expected, observed = reference.expected, _observe_export(export, found)
        fidelity, equal = _difference(expected, observed), _equal_answers(expected, observed)
        verdict = verdict or _verdict(reference, export, fidelity, observed)
        if verdict is None and export.exact and equal < len(wanted):
            verdict = ("answers", f"{len(wanted) - equal} of {len(wanted)} greedy answers differ")
    stage, fault = verdict or (None, None)
    pair = Pair(
        source.folder.name, export.folder.name, export.runtime, export.weights, export.vision, stage, fault,
        pixels_equal, prompt_equal, fidelity, len(wanted), equal,
    )
    return _Comparison(pair, expected, observed)


def _compare_peer(reference: _Reference, export: Export, peer: Peer) -> Pair:
    """What somebody else's runtime makes of the same files, questions and pictures, prepared its own way."""
    expected, count = reference.expected, len(reference.wanted)
    stage: Stage | None = None
    fault = fidelity = equal = None
    try:
        asked = list(zip(questions(count), pictures(count), strict=True))
        logits, answers = peer.observe(export.folder, asked, reference.wanted, _ANSWER_TOKENS)
    except Exception as error:  # whatever another program raises is what the table is to show
        stage, fault = "answers", f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    else:
        equal = sum(map(_same_answer, expected.answers, answers, expected.undecided))
        if logits is not None:
            seen = _difference(expected, expected._replace(answer_logits=logits))
            fidelity = replace(seen, prompt_kld=None, embedding_rel_error=None)
            gate = _gate(reference, export)
            if gate and not gate.passes(fidelity):
                stage, fault = "logits", f"mean KLD {fidelity.mean_kld:.2g}"
    return Pair(
        reference.source.folder.name, export.folder.name, peer.name, export.weights, export.vision, stage, fault,
        None, None, fidelity, count, equal, peer=True,
    )


def _verdict(
    reference: _Reference, export: Export, fidelity: Fidelity, observed: _Observed
) -> tuple[Stage, str] | None:
    """What differs first behind the prompt, if more does than the export's types allow."""
    gate = _gate(reference, export)
    allowed = GATES[export.vision].embedding_rel_error if export.vision in GATES else _ROUNDED_TOWER
    error = fidelity.embedding_rel_error
    if error is None or not error <= max(allowed, gate.embedding_rel_error if gate else 0):
        mistake = reference.explain(observed.embeddings)
        tensor = next((t for t in tensor_differences(reference.source, export) if _is_vision(t)), None)
        what = mistake or tensor or "the files are right, so the runtime computes another vision tower"
        return "embeddings", f"off by {error:.2%}: {what}"
    if not math.isfinite(fidelity.mean_kld):
        return "logits", "values that are not numbers: choose another type"
    if gate is None or gate.passes(fidelity):
        return None
    told = (
        f"mean KLD {fidelity.mean_kld:.2g} (allowed {gate.mean_kld:g}), top-1 {fidelity.top1_agreement:.1%} (wanted "
        f"{gate.top1_agreement:.1%}), largest logit difference {fidelity.max_abs_logit_diff:.2g}"
    )
    return "logits", f"{told}: {_logit_fault(reference, export, gate)}"


def _logit_fault(reference: _Reference, export: Export, gate: Gate) -> str:
    tensor = next(tensor_differences(reference.source, export), None)
    if tensor:
        return tensor
    wanted = text_probes(reference.source.front)
    alone = _difference(reference.observe(wanted), _observe_export(export, wanted))
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
    return any(part in difference for part in ("mmproj", "vision_tower", "multi_modal_projector", "image_newline"))


def _probes(export: Export, count: int) -> list[Probe]:
    try:
        return probes(export.front, count)
    except DataError as error:
        raise ArtifactError(f"{export.folder}: its front end cannot make a prompt: {error}") from error


class _View(NamedTuple):
    """What the tower gets, and where its features go."""

    pixels: FloatArray
    layout: np.ndarray[Any, Any]


def _views(front: Front, wanted: Iterable[Probe]) -> list[_View]:
    return [_view(front, image) for prompt, _ in wanted for image in prompt.images]


def _view(front: Front, image: FrontImage) -> _View:
    mean, std = (np.asarray(values, np.float32) for values in (front.config.image_mean, front.config.image_std))
    return _View(np.asarray((image.tiles.astype(np.float32) / 255 - mean) / std, np.float32), image.layout)


def _same_pixels(wanted: _View, found: _View) -> bool:
    return np.array_equal(wanted.pixels, found.pixels) and np.array_equal(wanted.layout, found.layout)


def _pixel_fault(wanted: Front, found: Front) -> str:
    for name in _PIXEL_SETTINGS:
        told, right = getattr(found.config, name), getattr(wanted.config, name)
        if told != right and not _close(told, right):
            return f"{name} is {told}, the model's is {right}"
    return "pictures are prepared otherwise"


def _close(told: Any, right: Any) -> bool:
    """Whether two triples are the same in the float32 that files store."""
    if not (isinstance(told, tuple) and isinstance(right, tuple) and told and isinstance(told[0], float)):
        return False
    return np.array_equal(np.asarray(told, np.float32), np.asarray(right, np.float32))


def _same_template(front: Front, export: Export) -> bool:
    return export.template is None or not export.own or export.template == front.config.chat_template


def _prompt_fault(front: Front, export: Export, wanted: Sequence[Probe], found: Sequence[Probe]) -> str:
    for (right, _), (told, _) in zip(wanted, found, strict=True):
        if right.ids == told.ids:
            continue
        place = next((i for i, pair in enumerate(zip(right.ids, told.ids, strict=False)) if len(set(pair)) > 1), -1)
        at = min(place if place >= 0 else len(right.ids), len(right.ids) - 1, len(told.ids) - 1)
        return (
            f"{len(told.ids)} tokens, the model's prompt has {len(right.ids)}; token {at} is "
            f"{_piece(export.front, told.ids[at])}, the model's is {_piece(front, right.ids[at])}"
        )
    return "the chat template in the file is another than the model's"


def _piece(front: Front, token: int) -> str:
    return f"{token} {front.tokenizer.id_to_token(token)!r}"


class _Observed(NamedTuple):
    """What one model made of the probes.

    prompt_logits, answer_logits: (tokens, vocab) for each probe. answers: greedy; margins: the distance of the two
    best logits at each of their tokens, and undecided: whether that is below half precision.
    """

    embeddings: list[FloatArray]
    prompt_logits: list[FloatArray]
    answer_logits: list[FloatArray]
    answers: list[tuple[int, ...]]
    margins: list[tuple[float, ...]]
    undecided: list[tuple[bool, ...]]


def _observe(runtime: Runtime, wanted: Sequence[Probe]) -> _Observed:
    seen = _Observed([], [], [], [], [], [])
    for prompt, answer in wanted:
        seen.embeddings.extend(runtime.encode(image) for image in prompt.images)
        pictures, rest = _behind_pictures(prompt)
        logits = runtime.score(pictures, (*rest, *answer))
        seen.prompt_logits.append(logits[: len(rest)])
        seen.answer_logits.append(logits[len(rest) :])
        given = tuple(token.id for token in runtime.generate(prompt, Sampling(max_tokens=_ANSWER_TOKENS)))
        again = runtime.score(prompt, given) if given else np.empty((0, 2), np.float32)
        second, first = np.partition(again, -2, axis=1)[:, -2:].T
        seen.answers.append(given)
        seen.margins.append(tuple((first - second).tolist()))
        seen.undecided.append(tuple((first - second < half_precision(again)).tolist()))
    return seen


def _behind_pictures(prompt: Prompt) -> tuple[Prompt, tuple[int, ...]]:
    """The prompt up to its last picture (or its first token), and the tokens behind."""
    places = [i for i, token in enumerate(prompt.ids) if token == prompt.image_token_id]
    end = places[-1] + 1 if places else 1
    return Prompt(prompt.ids[:end], prompt.images, prompt.image_token_id, prompt.stop_ids), prompt.ids[end:]


def _observe_export(export: Export, wanted: Sequence[Probe]) -> _Observed:
    with export.loaded() as runtime:
        return _observe(runtime, wanted)


def _difference(reference: _Observed, subject: _Observed) -> Fidelity:
    answer, prompt = (
        [compare_logits(expected, found) for expected, found in zip(wanted, given, strict=True)]
        for wanted, given in (
            (reference.answer_logits, subject.answer_logits), (reference.prompt_logits, subject.prompt_logits),
        )
    )
    errors = map(_relative_error, reference.embeddings, subject.embeddings)
    return Fidelity(
        max_abs_logit_diff=max(part.max_abs_logit_diff for part in [*answer, *prompt]),
        mean_kld=float(np.concatenate([part.kld for part in answer]).mean()),
        top1_agreement=float(np.concatenate([part.top1 for part in answer]).mean()),
        undecided=float(np.concatenate([part.undecided for part in answer]).mean()),
        tokens=sum(len(part.kld) for part in answer),
        prompt_kld=float(np.concatenate([part.kld for part in prompt]).mean()),
        embedding_rel_error=max(errors, default=0.0),
    )


def _relative_error(expected: FloatArray, found: FloatArray) -> float:
    if expected.shape != found.shape:
        return math.inf
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _equal_answers(reference: _Observed, subject: _Observed) -> int:
    return sum(map(_same_answer, reference.answers, subject.answers, reference.undecided))


def _same_answer(wanted: tuple[int, ...], found: tuple[int, ...], undecided: tuple[bool, ...]) -> bool:
    """Whether two greedy answers are equal up to where the reference itself could have gone either way."""
    for right, given, either in zip(wanted, found, undecided, strict=False):
        if right != given:
            return either
    return len(wanted) == len(found)


@dataclass(frozen=True)
class _Reference:
    """The merged model, loaded only while observed: in float32 wherever that fits, as rounding would hide faults."""

    source: Source
    dtype: str
    device: str | None

    @classmethod
    def fitting(cls, source: Source) -> _Reference:
        torch = require("torch", "train")
        needed = _BYTES_PER_WEIGHT * source.weights.count
        if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > needed:
            return cls(source, "float32", "cuda")
        if psutil.virtual_memory().available > needed:
            return cls(source, "float32", "cpu")
        console.say(f"note: the reference runs in bfloat16; in float32 it would take {needed / 1e9:.0f} GB of memory")
        return cls(source, "bfloat16", None)

    def observe(self, wanted: Sequence[Probe]) -> _Observed:
        runtime = self._load()
        try:
            return _observe(runtime, wanted)
        finally:
            runtime.close()

    @cached_property
    def wanted(self) -> list[Probe]:
        """The probes through the reference's own front end."""
        return probes(self.source.front, probe_count(self.source.weights.count))

    @cached_property
    def expected(self) -> _Observed:
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
