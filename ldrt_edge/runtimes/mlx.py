"""Apple's runtime: an MLX folder on Apple silicon's GPU, token for token what training used.

On a machine without such a GPU it runs on the processor, where MLX has no fast half precision: there half-precision
tensors are widened to float32 as they are read, so an unquantised model takes twice its file's size in memory, and a
4-bit one an eighth more; and numpy multiplies matrices (`mlx_host.py`). That is for checking exports; its speed says
nothing about Apple's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ldrt_edge import console
from ldrt_edge.errors import RuntimeLoadError, require
from ldrt_edge.front import Front
from ldrt_edge.runtimes.base import FloatArray, FrontImage, pack
from ldrt_edge.runtimes.cached import CONTEXT, CachedRuntime, Part, State

_CHUNK = 512
"""Positions computed at once: Ctrl-C stops a prefill between two chunks."""


class MlxRuntime(CachedRuntime):
    """An MLX folder, ours or one that mlx-vlm wrote. MLX schedules its own threads.

    Args:
        folder: holds config.json, `model*.safetensors` and a front end.
        context_length: tokens; None takes the model's, at most 4096 (the cache's memory grows with it).

    Raises:
        MissingExtraError: mlx or mlx-lm is not installed.
        RuntimeLoadError: a file is missing, truncated, or not of a model that this network computes.
        ArtifactError: the front end's files are missing or unreadable.
    """

    name: Literal["mlx"] = "mlx"

    def __init__(self, folder: Path, context_length: int | None = None) -> None:
        self._mx = require("mlx.core", "mlx")
        require("mlx_lm.models.llama", "mlx")
        from ldrt_edge.runtimes.mlx_model import load_network

        super().__init__()
        started = time.perf_counter()
        self.front = Front.load(folder)
        self.network = load_network(folder, widen=not on_gpu())
        if not on_gpu():
            from ldrt_edge.runtimes.mlx_host import use_numpy

            use_numpy(self.network)
        self.load_ms = (time.perf_counter() - started) * 1e3
        architecture = self.network.architecture
        self.context_length = min(context_length or CONTEXT, architecture.context_length)
        self.vocab_size = int(architecture.text.vocab_size)
        self._cache: list[Any] = []
        self._check_front(folder)

    def close(self) -> None:
        """Free the model."""
        self._cache = []
        del self.network
        self._mx.clear_cache()

    def _check_front(self, folder: Path) -> None:
        """Refuse a front end of another model: MLX would read beyond its tables without a word."""
        size, largest = self.network.architecture.tower.image_size, max(self.front.tokenizer.get_vocab().values())
        if self.front.config.image_size != size:
            raise RuntimeLoadError(
                f"{folder}: the front end cuts tiles of {self.front.config.image_size} pixels, the tower wants {size}: "
                "they belong to different models"
            )
        if largest >= self.vocab_size:
            raise RuntimeLoadError(
                f"{folder}: the tokenizer has token {largest}, the model embeds only {self.vocab_size}: "
                "they belong to different models"
            )

    def _encode(self, image: FrontImage) -> FloatArray:
        newline = self.network.image_newline
        return pack(
            np.concatenate([self._encode_tile(tile) for tile in image.tiles]),
            image.layout,
            None if newline is None else self._numpy(newline),
        )

    def _encode_tile(self, tile: Any) -> FloatArray:
        mean, std = (np.array(each, np.float32) for each in (self.front.config.image_mean, self.front.config.image_std))
        pixels = (tile.astype(np.float32) / 255 - mean) / std
        return self._numpy(self.network.image_features(self._mx.array(pixels)[None])[0])

    def _append(self, parts: Sequence[Part], held: int, last: int) -> FloatArray:
        self._keep(held)
        embeddings = self._mx.concatenate([self._embed(part) for part in parts])
        first_wanted, hidden = len(embeddings) - last, []
        for start in range(0, len(embeddings), _CHUNK):
            chunk = self.network.hidden(embeddings[start : start + _CHUNK], self._cache)
            self._mx.eval(chunk)  # and with it the keys and values it was computed from
            if start + len(chunk) > first_wanted:
                hidden.append(chunk[max(first_wanted - start, 0) :])
        return self._numpy(self.network.logits(self._mx.concatenate(hidden)))

    def _leave(self, held: int, most_bytes: int) -> State | None:
        self._keep(held)
        left, self._cache = self._cache, []
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in left)
        return State(left, size) if size <= most_bytes else None

    def _enter(self, state: State, held: int) -> None:
        self._cache = state.content

    def _keep(self, held: int) -> None:
        """Drop what lies behind the first `held` positions, layer by layer: a stopped run may leave them uneven."""
        if held == 0 or not self._cache:
            self._cache = self.network.language_model.make_cache()
        for layer in self._cache:
            layer.trim(layer.offset - held)

    def _embed(self, part: Part) -> Any:
        return self.network.embed(self._mx.array(part)) if isinstance(part, tuple) else self._mx.array(part)

    def _numpy(self, values: Any) -> FloatArray:
        return np.array(values.astype(self._mx.float32))


def on_gpu() -> bool:
    """Whether MLX computes on a GPU here."""
    mx = require("mlx.core", "mlx")
    return bool(mx.default_device().type == mx.gpu)


@cache
def say_if_slow() -> None:
    """Tell whoever waits, once, that this is not the machine MLX is made for."""
    if not on_gpu():
        console.say("note: no Apple GPU here, MLX runs on the processor: right answers, and no measure of its speed")
