"""Pictures to exact tiles, and the table that packs their features into image tokens.

The steps are those of transformers' PIL image processors (CLIP, LLaVA, LLaVA-NeXT), done on uint8, so that every
runtime gets the same bytes and none resizes anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldrt_edge.errors import ConfigError
from ldrt_edge.front_config import FrontConfig


def cut_tiles(picture: Image.Image, config: FrontConfig) -> list[NDArray[np.uint8]]:
    """An RGB picture of any size as tiles of (image_size, image_size, 3) uint8; one, or base tile first."""
    size = config.image_size
    square = (size, size)
    if config.fit == "tiles":
        assert config.grid_pinpoints is not None
        best = select_best_resolution((picture.height, picture.width), config.grid_pinpoints)
        canvas = _fit_into(picture, best, config.resample)
        base = np.asarray(picture.resize(square, config.resample))
        rows, columns = best[0] // size, best[1] // size
        return [base, *(
            canvas[r * size : (r + 1) * size, c * size : (c + 1) * size] for r in range(rows) for c in range(columns)
        )]
    if config.fit == "pad":
        picture = _pad_to_square(picture, tuple(int(mean * 255) for mean in config.image_mean))
    if config.fit in ("pad", "stretch"):
        return [np.asarray(picture.resize(square, config.resample))]
    short, long = sorted(picture.size)
    other = int(size * long / short)
    resized = picture.resize((size, other) if picture.width <= picture.height else (other, size), config.resample)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return [np.asarray(resized.crop((left, top, left + size, top + size)))]


def _pad_to_square(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    side = max(picture.size)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas


def _fit_into(picture: Image.Image, target: tuple[int, int], resample: int) -> NDArray[np.uint8]:
    """Resize into (height, width), keeping the aspect ratio, on black. Source: LlavaNextImageProcessor."""
    scale_h, scale_w = target[0] / picture.height, target[1] / picture.width
    if scale_w < scale_h:
        height, width = min(math.ceil(picture.height * scale_w), target[0]), target[1]
    else:
        height, width = target[0], min(math.ceil(picture.width * scale_h), target[1])
    canvas = np.zeros((*target, 3), np.uint8)
    top, left = (target[0] - height) // 2, (target[1] - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(picture.resize((width, height), resample))
    return canvas


def select_best_resolution(size: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) that keeps most of the picture and wastes least. Source: transformers, same name."""

    def merit(target: tuple[int, int]) -> tuple[int, int]:
        scale = min(target[1] / size[1], target[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - target[0] * target[1]

    return max(pinpoints, key=merit)


def packing_layout(config: FrontConfig, size: tuple[int, int]) -> NDArray[np.int32]:
    """Packing table (image_tokens, k) for a picture of (height, width); see `runtimes.base.pack`."""
    base = base_layout(config)
    if config.fit != "tiles":
        return base
    assert config.grid_pinpoints is not None
    side = config.image_size // config.patch_size
    best = select_best_resolution(size, config.grid_pinpoints)
    rows, columns = best[0] // config.image_size, best[1] // config.image_size
    grid = side * side + np.arange(rows * columns * side * side).reshape(rows, columns, side, side)
    grid = _unpad(grid.transpose(0, 2, 1, 3).reshape(rows * side, columns * side), size)
    lines = np.concatenate([grid, np.full((grid.shape[0], 1), -1)], axis=1)
    return np.concatenate([base[:, 0], lines.reshape(-1)])[:, None].astype(np.int32)


def base_layout(config: FrontConfig) -> NDArray[np.int32]:
    """Packing table of one tile: all its patches, or blocks of them pooled to `vision_tokens`.

    Raises:
        ConfigError: the patches do not pool evenly to that many, or the model tiles its pictures.
    """
    side = config.image_size // config.patch_size
    patches = np.arange(side * side, dtype=np.int32)
    if config.vision_tokens in (None, side * side):
        return patches[:, None]
    pooled_side = math.isqrt(config.vision_tokens or 0)
    if config.fit == "tiles" or pooled_side < 1 or pooled_side**2 != config.vision_tokens or side % pooled_side:
        possible = [str((side // k) ** 2) for k in range(1, side + 1) if side % k == 0]
        detail = "all (tiled pictures are not pooled)" if config.fit == "tiles" else ", ".join(possible)
        raise ConfigError(f"vision_tokens = {config.vision_tokens} is not possible here, only: {detail}")
    k = side // pooled_side
    blocks = patches.reshape(pooled_side, k, pooled_side, k).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(blocks.reshape(-1, k * k))


def _unpad(grid: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.int64]:
    """Cut away rows or columns that saw only padding. Source: `unpad_image` in transformers' LLaVA-NeXT."""
    height, width = size
    rows, columns = grid.shape
    if width / height > columns / rows:
        cut = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[cut : rows - cut]
    cut = (columns - int(round(width * (rows / height), 7))) // 2
    return grid[:, cut : columns - cut]
