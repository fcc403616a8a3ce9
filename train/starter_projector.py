"""The starter's projector: random, but with the scales that let a short training succeed.

Features of the tower differ in scale from channel to channel by orders of magnitude, and the language model expects
inputs as large as its token embeddings. Both are measured on pictures drawn here and folded into LLaVA's own two
linears: what enters the first acts as standardised, what leaves the second has the embeddings' spread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor
from transformers import LlavaForConditionalGeneration

Pixels = NDArray[np.uint8]

_BATCH = 8
_DEAD = 1e-4
"""A channel that varies less than this carries nothing: the tower's added ones are exactly 0."""
_WORDS = ("dose", "0.5 Gy", "target", "isodose", "knee", "left", "3.0", "beam", "CT", "organ at risk", "heel", "12 cm")


@torch.no_grad()
def initialise(model: LlavaForConditionalGeneration, pixel_values: Tensor, seed: int) -> None:
    """Draw the projector's weights, scaled by what the tower makes of `pixel_values` (n, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    with _one_thread():
        features = _patch_features(model, pixel_values)
        mean, deviation = features.mean(0), features.std(0)
        live = deviation > _DEAD
        projector: Any = model.model.multi_modal_projector
        first, second = projector.linear_1, projector.linear_2
        drawn = torch.randn(first.weight.shape, generator=generator) / math.sqrt(int(live.sum()))
        first.weight.copy_(torch.where(live, drawn / deviation.clamp(min=_DEAD), 0.0))
        first.bias.copy_(-first.weight @ mean)
        second.weight.copy_(torch.randn(second.weight.shape, generator=generator))
        second.bias.zero_()
        # the head's rows are the token embeddings: the two are tied
        second.weight.mul_(model.lm_head.weight.std() / projector(features).std())


def calibration_pictures(count: int, size: int, seed: int) -> Pixels:
    """Pictures (count, size, size, 3) uint8: gradients, shapes, smooth noise and text in turn, half of them grey."""
    rng = np.random.default_rng(seed)
    kinds = (_gradient, _shapes, _noise, _text)
    pictures = []
    for index in range(count):
        picture = kinds[index % len(kinds)](rng, size)
        if (index // len(kinds)) % 2:
            picture = picture.convert("L").convert("RGB")
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


def _patch_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """What the projector reads, (n * patches, width): the configured hidden state without the class token."""
    layer = model.config.vision_feature_layer
    states = [
        model.model.vision_tower(pixel_values=batch, output_hidden_states=True).hidden_states[layer][:, 1:]
        for batch in torch.split(pixel_values, _BATCH)
    ]
    return torch.cat(states).flatten(0, 1)


def _gradient(rng: np.random.Generator, size: int) -> Image.Image:
    y, x = np.mgrid[0:size, 0:size] / size
    angle, waves = rng.uniform(0, 2 * math.pi, 3), rng.uniform(0.2, 3.0, 3)
    along = np.cos(angle) * x[..., None] + np.sin(angle) * y[..., None]
    return Image.fromarray((127.5 + 127.5 * np.sin(2 * math.pi * waves * along)).astype(np.uint8))


def _shapes(rng: np.random.Generator, size: int) -> Image.Image:
    picture = Image.new("RGB", (size, size), _colour(rng))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(3, 12))):
        (left, right), (top, bottom) = np.sort(rng.integers(0, size, (2, 2)), axis=1).tolist()
        paint = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        paint((left, top, right, bottom), fill=_colour(rng), outline=_colour(rng), width=int(rng.integers(1, 5)))
    return picture


def _noise(rng: np.random.Generator, size: int) -> Image.Image:
    cells = int(rng.choice([4, 8, 16, 32, 64]))
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    fine = coarse.resize((size, size), Image.Resampling.BICUBIC)
    return fine.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 2))))


def _text(rng: np.random.Generator, size: int) -> Image.Image:
    background = _colour(rng)
    ink = tuple(255 - value for value in background)
    picture = Image.new("RGB", (size, size), background)
    draw = ImageDraw.Draw(picture)
    height = int(rng.integers(10, 28))
    font = ImageFont.load_default(height)
    for top in range(4, size - height, int(height * 1.4)):
        draw.text((4, top), " ".join(rng.choice(_WORDS, 8)), fill=ink, font=font)
    return picture


def _colour(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.integers(0, 256, 3).tolist())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums over threads differ in their last digits; on one thread the same seed gives the same bytes anywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
