"""What goes into two models: whether their front ends make the same pixels and the same prompts, and if not, why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldrt_edge.convert.exports import Export
from ldrt_edge.convert.probes import Probe
from ldrt_edge.front import Front
from ldrt_edge.runtimes.base import FloatArray, FrontImage

_PIXEL_SETTINGS = (
    "image_mean", "image_std", "image_size", "patch_size", "fit", "resample", "grid_pinpoints", "vision_tokens",
)  # fmt: skip


def pixel_fault(front: Front, export: Export, wanted: Sequence[Probe], found: Sequence[Probe]) -> str | None:
    """Why the export's tower would not get the pixels, and its language model the image tokens, that the model gets."""
    for name in _PIXEL_SETTINGS:
        told, right = getattr(export.front.config, name), getattr(front.config, name)
        if told != right and not _close(told, right):
            return f"{name} is {told}, the model's is {right}"
    same = all(map(_same_view, _views(front, wanted), _views(export.front, found)))
    return None if same else "pictures are prepared otherwise"


def prompt_fault(front: Front, export: Export, wanted: Sequence[Probe], found: Sequence[Probe]) -> str | None:
    """The first token at which the export's prompt, or the answer behind it, is another than the model's."""
    for (prompt, answer), (found_prompt, found_answer) in zip(wanted, found, strict=True):
        right, told = (*prompt.ids, *answer), (*found_prompt.ids, *found_answer)
        if right == told:
            continue
        place = next((i for i, pair in enumerate(zip(right, told, strict=False)) if len(set(pair)) > 1), -1)
        at = place if place >= 0 else min(len(right), len(told)) - 1
        return (
            f"{len(told)} tokens, the model's prompt and answer have {len(right)}; token {at} is "
            f"{_piece(export.front, told[at])}, the model's is {_piece(front, right[at])}"
        )
    if export.own and export.template not in (None, front.config.chat_template):
        return "the chat template in the file is another than the model's"
    return None


class _View(NamedTuple):
    """What the tower gets, and where its features go."""

    pixels: FloatArray
    layout: np.ndarray[Any, Any]


def _views(front: Front, wanted: Iterable[Probe]) -> list[_View]:
    return [_view(front, image) for prompt, _ in wanted for image in prompt.images]


def _view(front: Front, image: FrontImage) -> _View:
    mean, std = (np.asarray(values, np.float32) for values in (front.config.image_mean, front.config.image_std))
    return _View(np.asarray((image.tiles.astype(np.float32) / 255 - mean) / std, np.float32), image.layout)


def _same_view(wanted: _View, found: _View) -> bool:
    return np.array_equal(wanted.pixels, found.pixels) and np.array_equal(wanted.layout, found.layout)


def _close(told: Any, right: Any) -> bool:
    """Whether two triples are the same in the float32 that files store."""
    if not (isinstance(told, tuple) and isinstance(right, tuple) and told and isinstance(told[0], float)):
        return False
    return np.array_equal(np.asarray(told, np.float32), np.asarray(right, np.float32))


def _piece(front: Front, token: int) -> str:
    return f"{token} {front.tokenizer.id_to_token(token)!r}"
