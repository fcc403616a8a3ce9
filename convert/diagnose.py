"""Naming a fault by making it: which known mistake turns the reference's image embeddings into the ones found?

Exports and runtimes of vision models go wrong in few ways. Each is played on the reference model; the one that gives
what the subject gave is the fault, wherever it sits: in the files, in the runtime's graph, or in the preparation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ldrt_edge.runtimes.base import FloatArray, FrontImage

if TYPE_CHECKING:
    from ldrt_edge.runtimes.hf import HfRuntime

_STATISTICS = {
    "CLIP's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5 and 0.5": ((0.5,) * 3, (0.5,) * 3),
    "0 and 1": ((0.0,) * 3, (1.0,) * 3),
}
_ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh")
_EPSILONS = (1e-5, 1e-6, 1e-12)
_EXPLAINED = 0.2
"""A mistake is the fault if it leaves at most this part of the difference."""


class _Mistake(NamedTuple):
    """How to err: attributes of the reference (object, name, wrong value), and what is done to a picture before."""

    name: str
    changes: Sequence[tuple[Any, str, Any]] = ()
    alter: Callable[[FrontImage], FrontImage] = lambda image: image


def explain_embeddings(
    reference: HfRuntime, images: Sequence[FrontImage], found: Sequence[FloatArray]
) -> str | None:
    """The mistake that makes `reference` give `found` for `images`, in words; None if it is none of the known ones.

    found: image embeddings, (image_tokens, hidden) each.
    """
    least = _EXPLAINED * _distance([reference.encode(image) for image in images], found)
    named = None
    for mistake in _mistakes(reference):
        with _changed(mistake.changes):
            distance = _distance([reference._encode(mistake.alter(image)) for image in images], found)
        if distance < least:
            least, named = distance, mistake.name
    return named


def _mistakes(reference: HfRuntime) -> Iterator[_Mistake]:
    llava, config, front = reference.model.model, reference.model.config, reference.front
    tower, projector = llava.vision_tower, llava.multi_modal_projector
    yield _Mistake(
        "the class token stands behind the patches, not before them",
        [(tower.embeddings, "forward", _class_token_last(tower.embeddings))],
    )
    depth = config.vision_config.num_hidden_layers + 1
    for shift, which in ((-1, "an earlier"), (1, "a later")):
        layer = config.vision_feature_layer % depth + shift
        if 0 <= layer < depth:
            yield _Mistake(f"features of {which} layer of the tower", [(config, "vision_feature_layer", layer)])
    yield _Mistake("colour channels in the order BGR", alter=_bgr)
    for whose, (mean, std) in _STATISTICS.items():
        wrong = front.with_config(replace(front.config, image_mean=mean, image_std=std))
        yield _Mistake(f"pixels normalised by {whose} mean and deviation", [(reference, "front", wrong)])
    for name in _ACTIVATIONS:
        wanted = config.vision_config.hidden_act
        yield _Mistake(
            f"{name} in the tower, not {wanted}",
            [(layer.mlp, "activation_fn", _activation(name)) for layer in tower.encoder.layers],
        )
    for epsilon in _EPSILONS:
        norms = [norm for layer in tower.encoder.layers for norm in (layer.layer_norm1, layer.layer_norm2)]
        yield _Mistake(f"layer norms of the tower with epsilon {epsilon:g}", [(norm, "eps", epsilon) for norm in norms])
    first, second = projector.linear_1, projector.linear_2
    if first.weight.shape == second.weight.shape:
        swapped = [(projector, "linear_1", second), (projector, "linear_2", first)]
        yield _Mistake("the projector's two layers are swapped", swapped)
    if front.config.fit == "tiles":
        yield _Mistake("the newline embedding is zero", [(llava.image_newline, "data", llava.image_newline.data * 0)])
        yield _Mistake("no newline behind the rows of tiles", alter=_without_newlines)
        yield _Mistake("tiles one after another, neither merged nor unpadded", alter=_tile_by_tile)


def _distance(expected: Sequence[FloatArray], found: Sequence[FloatArray]) -> float:
    """Largest relative distance over the pictures; infinite where the number of tokens differs."""
    if any(e.shape != f.shape for e, f in zip(expected, found, strict=True)):
        return float("inf")
    return max(float(np.linalg.norm(f - e) / np.linalg.norm(e)) for e, f in zip(expected, found, strict=True))


@contextmanager
def _changed(changes: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes for a while."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _class_token_last(embeddings: Any) -> Callable[..., Any]:
    right = embeddings.forward

    def forward(*inputs: Any, **options: Any) -> Any:
        positions = embeddings.position_embedding.weight
        return (right(*inputs, **options) - positions).roll(-1, dims=1) + positions

    return forward


def _activation(name: str) -> Any:
    from transformers.activations import ACT2FN

    return ACT2FN[name]


def _bgr(image: FrontImage) -> FrontImage:
    return replace(image, tiles=np.ascontiguousarray(image.tiles[..., ::-1]))


def _without_newlines(image: FrontImage) -> FrontImage:
    return replace(image, layout=image.layout[image.layout[:, 0] >= 0])


def _tile_by_tile(image: FrontImage) -> FrontImage:
    patches = np.arange(int(image.layout.max()) + 1, dtype=np.int32)
    return replace(image, layout=patches[:, None])
