"""How much the answers suffer when a matrix is rounded to a type: estimated for every pair, then held against measure.

Rounding a matrix W by E moves its output by E·x. To second order that moves the next-token distribution by

    KLD ≈ ½ Σ_t gₜᵀ (E xₜ) (E xₜ)ᵀ gₜ ≈ Σ_j c_j · mean_i e²_ij,    c_j = ½ Σ_t ‖gₜ‖² x²_tj / answer tokens

with gₜ the gradient, at the matrix's output for token t, of the log-likelihood of answers drawn from the model itself
(whose mean square is the Fisher information), and with errors taken as independent. One backward pass over a few
training rows gives c for every matrix at once, the tower's and the projector's too, and weighs each token by what it
does to an answer: what MBQ does with two weights, for picture and text, is done here token by token.

What independence leaves out is made good by measuring: each kind of matrix is rounded as a whole, the divergence of the
answers is measured, and the kind's estimates are scaled to it.

Source: Kunstner et al., "Limitations of the empirical Fisher approximation", NeurIPS 2019, section 2 (Fisher and KLD);
Li et al., "MBQ: Modality-balanced quantization", CVPR 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldrt_edge import console
from ldrt_edge.convert.planned import Format
from ldrt_edge.convert.source import EMBEDDINGS, HEAD, Source, check_values, is_tied
from ldrt_edge.convert.type_plan import PlannedMatrix, fits, nbytes
from ldrt_edge.convert.weights import canonical
from ldrt_edge.dataset import Dataset, choose_rows
from ldrt_edge.errors import DataError, require
from ldrt_edge.fidelity import compare_logits
from ldrt_edge.front import conversation
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.base import FloatArray, Prompt
from ldrt_edge.runtimes.hf import HfRuntime, normalise, tower_features

if TYPE_CHECKING:
    from torch import Tensor

_ROWS_ROUNDED = 32
"""Of each matrix, evenly spread: rows of one matrix hardly differ in how well they round."""

Asked = tuple[Prompt, tuple[int, ...]]


@dataclass(frozen=True)
class Option:
    """A type that a matrix can have: its bytes, and the damage, in nats of mean KLD an answer token."""

    type: str
    nbytes: int
    damage: float


@dataclass(frozen=True)
class Matrix:
    """A weight matrix with its options, smallest first. part: of the export, as its plan names it."""

    name: str
    part: str
    weights: int
    options: tuple[Option, ...]

    def scaled(self, factor: float) -> Matrix:
        """The same options with their damage multiplied."""
        return replace(self, options=tuple(replace(o, damage=o.damage * factor) for o in self.options))


def sensitivities(
    source: Source, data: Path, to: Format, limit: int = 16, seed: int = 0, threads: int | None = None
) -> list[Matrix]:
    """Every matrix of an export with its options.

    limit: about how many training rows are asked.

    Raises:
        ArtifactError: a weight is no number, or beyond half precision.
        DataError: no training rows, or one that cannot be asked.
    """
    runtime = HfRuntime(source.folder, threads=threads)
    try:
        asked = questions(runtime, data, limit, seed)
        parts = to.matrices(source)
        planned = [matrix for members in parts.values() for matrix in members]
        curvature = _curvature(runtime, source, {matrix.source for matrix in planned}, asked, seed)
        found = [
            _options(source, to, part, matrix, curvature[matrix.source])
            for part, members in parts.items()
            for matrix in console.track(members, f"rounding {part}")
        ]
        scales = _measure(runtime, to, list(zip(planned, found, strict=True)), asked)
    finally:
        runtime.close()
    return [given.scaled(scales[kind(matrix.source)]) for matrix, given in zip(planned, found, strict=True)]


def kind(source: str) -> str:
    """What sort of matrix a checkpoint's tensor is: q_proj, down_proj, …, embed_tokens, lm_head; tower; projector."""
    path = source.split(".")
    return path[-2] if path[0] == "language_model" else path[0]


def questions(runtime: HfRuntime, data: Path, limit: int, seed: int) -> list[Asked]:
    """About `limit` training rows, as whole pictures: prompts and answers.

    Raises:
        DataError: no training rows, or one that cannot be asked.
    """
    dataset, front = Dataset(data), runtime.front
    asked = []
    for row in choose_rows(dataset.rows("train"), limit, seed):
        try:
            messages = conversation(row.turns[:-1], front.image(read_image(dataset.image_path(row)).rgb))
            asked.append((front.prompt(messages), front.answer_ids(messages, row.answer)))
        except DataError as error:
            raise DataError(f"row {row.id}: {error}") from error
    if not asked:
        raise DataError(f"{data}: no rows in split 'train': sensitivity is not measured on test rows")
    return asked


def _options(source: Source, to: Format, part: str, matrix: PlannedMatrix, curvature: FloatArray) -> Matrix:
    values = source.weights.read(matrix.source)
    check_values(values, matrix.source, source.folder, half=True)
    rows = values[:: math.ceil(len(values) / _ROWS_ROUNDED)]
    options = []
    for type_ in to.types(part, matrix.name):
        if fits(type_, rows.shape[1]):
            error = np.square(to.rounded(matrix.name, rows, type_) - rows, dtype=np.float64).mean(axis=0)
            options.append(Option(type_, nbytes(type_, values.size), float(error @ curvature)))
    return Matrix(matrix.name, part, values.size, tuple(sorted(options, key=lambda o: (o.nbytes, o.damage))))


def _curvature(
    runtime: HfRuntime, source: Source, wanted: Iterable[str], asked: Sequence[Asked], seed: int
) -> dict[str, FloatArray]:
    """The vector c of each wanted matrix, (row length,) float64, by its name in the checkpoint."""
    names = {name: name for name in wanted}
    if is_tied(source):  # then the head's damage is the embedding matrix's
        names[HEAD] = EMBEDDINGS
    tokens = sum(len(answer) for _, answer in asked)
    sums: dict[str, Any] = {}

    def add(name: str, values: Tensor) -> None:
        sums[name] = sums.get(name, 0) + values.double().cpu().numpy() / (2 * tokens)

    with linears(runtime, names, lambda name, inputs, gradient: add(name, gradient.square().sum(-1) @ inputs.square())):
        for words in gradients(runtime, asked, seed, "sensitivity"):
            add(EMBEDDINGS, words.square().sum(0))
    return sums


@contextmanager
def linears(runtime: HfRuntime, names: Mapping[str, str], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Let `see` look at the matrices of a model while `gradients` runs.

    names: what to call them, by their names in the checkpoint; others are not shown.
    see: gets the name, the inputs (tokens, row length) and the gradient at the outputs (tokens, rows), float32.
    """
    torch = require("torch", "train")

    def watch(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            seen = inputs[0].detach().flatten(0, -2).float()
            output.register_hook(lambda gradient: see(name, seen, gradient.flatten(0, -2).float()))

        return hook

    hooks = [
        module.register_forward_hook(watch(name))
        for path, module in runtime.model.named_modules()
        if isinstance(module, torch.nn.Linear) and (name := names.get(canonical(f"{path}.weight")))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def gradients(runtime: HfRuntime, asked: Sequence[Asked], seed: int, label: str) -> Iterator[Tensor]:
    """Go back through the model from answers that it draws itself, question by question.

    Yields each time the gradient at the embeddings of all tokens: (tokens, hidden) float32.
    """
    torch = require("torch", "train")
    runtime.model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for prompt, answer in console.track(asked, label):
        words = _words(runtime, prompt, answer).requires_grad_(True)
        likelihood = torch.log_softmax(_logits(runtime, prompt, len(answer), words).float(), dim=-1)
        drawn = torch.multinomial(likelihood.detach().exp().cpu(), 1, generator=generator).to(runtime.model.device)
        likelihood.gather(1, drawn).sum().backward()
        assert words.grad is not None
        yield words.grad.float()


def _answers(runtime: HfRuntime, asked: Sequence[Asked]) -> list[FloatArray]:
    """Logits (answer tokens, vocab) of every question."""
    torch = require("torch", "train")
    with torch.inference_mode():
        return [
            _logits(runtime, prompt, len(answer), _words(runtime, prompt, answer)).float().cpu().numpy()
            for prompt, answer in asked
        ]


def _words(runtime: HfRuntime, prompt: Prompt, answer: tuple[int, ...]) -> Tensor:
    """Embeddings (tokens, hidden) of a prompt and of the answer but for its last token."""
    torch = require("torch", "train")
    words: Tensor = runtime.model.get_input_embeddings()(
        torch.tensor(prompt.ids + answer[:-1], device=runtime.model.device)
    )
    return words


def _logits(runtime: HfRuntime, prompt: Prompt, last: int, words: Tensor) -> Tensor:
    """Logits (last, vocab) with a graph for gradients, from the embeddings (tokens, hidden) of all tokens.

    The rows of `words` at the picture's places are replaced.
    """
    torch = require("torch", "train")
    model = runtime.model
    embeddings = words.clone()
    places = torch.tensor([i for i, token in enumerate(prompt.ids) if token == prompt.image_token_id])
    pictures = []
    for image in prompt.images:
        pixels = normalise(torch.from_numpy(image.tiles), runtime.front, model.device).to(model.dtype)
        pixels.requires_grad_(torch.is_grad_enabled())  # so that gradients reach back through the whole tower
        features = model.model.multi_modal_projector(tower_features(model, pixels)).flatten(0, 1)
        newline = getattr(model.model, "image_newline", None)
        if newline is not None:
            features = torch.cat([features, newline[None]])
        pictures.append(features[torch.from_numpy(image.layout).long()].mean(dim=1))
    if pictures:
        embeddings[places.to(model.device)] = torch.cat(pictures).to(embeddings.dtype)
    hidden = model.model.language_model(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state
    logits: Tensor = model.lm_head(hidden[0, -last:])
    return logits


def _measure(
    runtime: HfRuntime, to: Format, found: Sequence[tuple[PlannedMatrix, Matrix]], asked: Sequence[Asked]
) -> dict[str, float]:
    """By how much the measured divergence exceeds the estimate, for each kind of matrix."""
    torch = require("torch", "train")
    parameters = {canonical(name): value for name, value in runtime.model.named_parameters()}
    kinds: dict[str, list[tuple[PlannedMatrix, Matrix]]] = {}
    for matrix, given in found:
        kinds.setdefault(kind(matrix.source), []).append((matrix, given))

    expected, scales = _answers(runtime, asked), {}
    for label, members in console.track(sorted(kinds.items()), "measuring"):
        probe = next((t for t in to.probes if all(any(o.type == t for o in m.options) for _, m in members)), None)
        estimate = sum(o.damage for _, m in members for o in m.options if o.type == probe)
        kept: dict[Any, Any] = {}
        for matrix, _ in members if probe else ():
            parameter = parameters[matrix.source]
            if parameter in kept:  # a tied matrix that an export stores twice
                continue
            kept[parameter] = parameter.data.clone()
            rounded = to.rounded(matrix.name, parameter.data.float().cpu().numpy(), str(probe))
            parameter.data.copy_(torch.from_numpy(rounded))
        moved = map(compare_logits, expected, _answers(runtime, asked))
        measured = np.concatenate([tokens.kld for tokens in moved]).mean()
        for parameter, values in kept.items():
            parameter.data.copy_(values)
        scales[label] = float(measured / estimate) if probe and estimate > 0 else 1.0
    return scales
