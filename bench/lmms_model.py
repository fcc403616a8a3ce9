"""Our runtimes as a model of lmms-eval, so that its tasks can be asked of an export as it answers in the clinic.

    lmms-eval --model ldrt_edge --model_args model=EDGE,threads=2 --tasks pope

lmms-eval finds this module by the entry point `lmms_eval.models`; only it imports it. Prompt, picture and tokens go the
product's own way. Requests that follow each other about one picture run side by side, behind the picture's prefix.

Source: `api/model.py` and `models/registry_v2.py` of lmms-eval 0.7.3, MIT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from lmms_eval.api.model import lmms
from PIL import Image

from ldrt_edge.bundle.open import model_folder
from ldrt_edge.errors import ConfigError, DataError
from ldrt_edge.front import Front, Message
from ldrt_edge.runtimes.base import FrontImage, Sampling, check_room, load, log_softmax

BRANCHES, MAX_TOKENS = 8, 1024
_PLACEHOLDER = "<image>"


def manifest() -> Any:
    """What lmms-eval's registry wants of a plug-in."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("ldrt_edge", simple_class_path="ldrt_edge.bench.lmms_model.LdrtEdge")


class LdrtEdge(lmms):
    """A merged model, an export or a bundle, loaded in the runtime that it is for.

    model: the artefact's path. threads: None for one for each physical core. branches: questions at once. What else
    lmms-eval hands to every model (batch size, device) says nothing here.

    Raises:
        ConfigError: an argument that no model is handed.
        ArtifactError, MissingExtraError, RuntimeLoadError: as from `runtimes.base.load`.
    """

    def __init__(
        self, model: str, threads: int | None = None, branches: int = BRANCHES, batch_size: Any = 1, device: Any = None,
        max_batch_size: Any = None, **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ConfigError(f"--model_args: ldrt_edge takes model, threads and branches, not {', '.join(unknown)}")
        folder = model_folder(Path(model))
        self._front = Front.load(folder)
        self._runtime = load(folder, threads=threads, branches=branches)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer for each request; greedy unless the task wants a temperature."""
        said: list[str] = []
        for asked in self._together(requests):
            prompts = [self._front.prompt([Message("user", _text(one.args[0]), images)]) for one, images in asked]
            wanted = [_sampling(one.args[1]) for one, _ in asked]
            if len(set(wanted)) == 1:
                given = self._runtime.generate_all(prompts, wanted[0])
            else:
                given = [list(self._runtime.generate(*pair)) for pair in zip(prompts, wanted, strict=True)]
            for (one, _), tokens in zip(asked, given, strict=True):
                said.append(_cut(self._front.decode([token.id for token in tokens]).strip(), one.args[1]))
                self.cache_hook.add_partial("generate_until", one.args[:2], said[-1])
        return said

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each request's continuation, and whether it is what the model would say."""
        found: list[tuple[float, bool]] = []
        for asked in self._together(requests):
            conversations = [[Message("user", _text(one.args[0]), images)] for one, images in asked]
            prompts = [self._front.prompt(messages) for messages in conversations]
            answers = [
                self._front.answer_ids(messages, self._continuation(one))
                for messages, (one, _) in zip(conversations, asked, strict=True)
            ]
            for prompt, answer in zip(prompts, answers, strict=True):
                check_room(prompt, len(answer), self._runtime.context_length)
            for answer, logits in zip(answers, self._runtime.score_all(prompts, answers), strict=True):
                told = log_softmax(logits)[np.arange(len(answer)), answer]
                found.append((float(told.sum()), bool((logits.argmax(1) == answer).all())))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: no task that we know of asks a LLaVA in rounds.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("ldrt_edge answers tasks of one round")

    def clean(self) -> None:
        """Free the model."""
        self._runtime.close()

    def _together(self, requests: Sequence[Any]) -> Iterator[list[tuple[Any, tuple[FrontImage, ...]]]]:
        """Requests with their pictures, those that follow each other about the same ones together."""
        shown = ((one, self._images(one)) for one in requests)
        for _, members in groupby(shown, key=lambda pair: tuple(image.sha256 for image in pair[1])):
            yield list(members)

    def _images(self, request: Any) -> tuple[FrontImage, ...]:
        doc_to_visual, doc_id, task, split = request.args[-4:]
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        visuals = visuals if isinstance(visuals, list) else [visuals]
        if not all(isinstance(visual, Image.Image) for visual in visuals):
            raise DataError(f"task {task}, document {doc_id}: ldrt_edge sees pictures alone, no video and no sound")
        return tuple(self._front.image(np.asarray(visual.convert("RGB"))) for visual in visuals)

    def _continuation(self, request: Any) -> str:
        target: str | Callable[[Any], str] = request.args[1]
        doc_id, task, split = request.args[-3:]
        return target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])


def _text(context: str) -> str:
    """A task's question; pictures stand before it in our templates, wherever it wants them."""
    return context.replace(_PLACEHOLDER, "").strip()


def _sampling(wanted: Mapping[str, Any]) -> Sampling:
    greedy = wanted.get("do_sample") is False or not wanted.get("temperature")
    return Sampling(
        max_tokens=int(wanted.get("max_new_tokens") or MAX_TOKENS),
        temperature=0.0 if greedy else float(wanted["temperature"]), top_p=float(wanted.get("top_p") or 1.0),
    )  # fmt: skip


def _cut(text: str, wanted: Mapping[str, Any]) -> str:
    """The answer before the first of the strings that end it."""
    until = wanted.get("until") or ()
    for end in [until] if isinstance(until, str) else until:
        text = text.partition(end)[0] if end else text
    return text
