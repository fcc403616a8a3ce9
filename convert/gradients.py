"""What moves the answers of a model: gradients of their likelihood, at every matrix and for every token.

The answers are drawn from the model itself, so that the mean square of the gradients is the Fisher information.

Source: Kunstner et al., "Limitations of the empirical Fisher approximation", NeurIPS 2019, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldrt_edge import console
from ldrt_edge.convert.weights import canonical
from ldrt_edge.dataset import Dataset, Row, choose_rows
from ldrt_edge.errors import DataError, require
from ldrt_edge.front import conversation
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.base import FloatArray, Prompt
from ldrt_edge.runtimes.hf import HfRuntime, normalise, tower_features

if TYPE_CHECKING:
    from torch import Tensor

Asked = tuple[Prompt, tuple[int, ...]]


def questions(runtime: HfRuntime, data: Path, limit: int, seed: int, but: Sequence[Row] = ()) -> list[Asked]:
    """About `limit` training rows, as whole pictures: prompts and answers.

    but: rows of pictures and groups that are left out.

    Raises:
        DataError: no training rows, or one that cannot be asked.
    """
    pictures, groups = {row.image_sha256 for row in but}, {row.group for row in but}
    rows = [
        row for row in Dataset(data).rows("train") if row.image_sha256 not in pictures and row.group not in groups
    ]
    if but and not rows:
        raise DataError(f"{data}: weights are fitted to all training pictures: none is left to try a plan on")
    if not rows:
        raise DataError(f"{data}: no rows in split 'train': sensitivity is not measured on test rows")
    return prompts(runtime, data, choose_rows(rows, limit, seed))


def prompts(runtime: HfRuntime, data: Path, rows: Sequence[Row]) -> list[Asked]:
    """Prompts and answers of a dataset's rows.

    Raises:
        DataError: a row cannot be asked.
    """
    dataset, front, asked = Dataset(data), runtime.front, []
    for row in rows:
        try:
            messages = conversation(row.turns[:-1], front.image(read_image(dataset.image_path(row)).rgb))
            asked.append((front.prompt(messages), front.answer_ids(messages, row.answer)))
        except DataError as error:
            raise DataError(f"row {row.id}: {error}") from error
    return asked


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


def answers(runtime: HfRuntime, asked: Sequence[Asked]) -> list[FloatArray]:
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
