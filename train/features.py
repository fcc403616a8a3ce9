"""Features of the frozen vision tower, computed once per picture and kept on disk.

The tower does not change in training, so its output is a function of picture, tower and picture preparation: the key
of the cache. One memory-mapped file a picture, shared between runs, under `~/.cache/ldrt-edge/features`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldrt_edge import console
from ldrt_edge.front import Front
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.hf import normalise, tower_features
from ldrt_edge.tiles import packing_layout
from ldrt_edge.train.collate import Collator, Example, PackedRow, sequences


class PackedDataset(torch.utils.data.Dataset[Example]):
    """Packed rows as examples; pictures are read, or their features mapped, when an example is asked for."""

    def __init__(self, rows: Sequence[PackedRow], front: Front, store: FeatureStore | None) -> None:
        self._rows, self._front, self._store = rows, front, store

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        image_token = self._front.config.image_token_id
        if self._store is not None:
            features, size = self._store.get(row.image_sha256)
            layout = packing_layout(self._front.config, size)
            return Example(sequences(row, image_token, len(layout)), layout, len(features), features, None)
        image = self._front.image(read_image(row.image).rgb)
        patches = len(image.tiles) * (self._front.config.image_size // self._front.config.patch_size) ** 2
        return Example(sequences(row, image_token, image.token_count), image.layout, patches, None, image.tiles)


class FeatureStore:
    """The tower's features of pictures, on disk."""

    def __init__(self, model: Any, front: Front, folder: Path | None = None) -> None:
        self._model, self._front = model, front
        self._folder = (folder or cache_folder()) / _key(model, front)
        self._folder.mkdir(parents=True, exist_ok=True)

    def fill(self, rows: Sequence[PackedRow], batch: int = 8) -> None:
        """Compute what is missing for these rows' pictures."""
        missing = {row.image_sha256: row.image for row in rows if not self._path(row.image_sha256).exists()}
        if not missing:
            return
        items = list(missing.items())
        with console.bar("vision tower", len(items)) as shown:
            for start in range(0, len(items), batch):
                chunk = items[start : start + batch]
                images = [self._front.image(read_image(path).rgb) for _, path in chunk]
                tiles = torch.from_numpy(np.concatenate([image.tiles for image in images]))
                features = compute_features(self._model, self._front, tiles).cpu()
                parts = features.split([len(image.tiles) for image in images])
                for (digest, _), image, part in zip(chunk, images, parts, strict=True):
                    self._write(digest, part.flatten(0, 1).to(torch.float16).numpy(), image.size)
                shown.advance(len(chunk))

    def get(self, digest: str) -> tuple[NDArray[np.float16], tuple[int, int]]:
        """Features (tiles * patches, width) of a picture, and its (height, width) in pixels."""
        with np.load(self._path(digest)) as held:
            height, width = (int(side) for side in held["size"])
            return held["features"], (height, width)

    def statistics(self, rows: Sequence[PackedRow], most: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of every feature channel, (width,) each, over up to `most` pictures."""
        digests = sorted({row.image_sha256 for row in rows})[:most]
        stacked = torch.from_numpy(np.concatenate([self.get(digest)[0] for digest in digests])).float()
        return stacked.mean(0), stacked.std(0)

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.npz"

    def _write(self, digest: str, features: NDArray[np.float16], size: tuple[int, int]) -> None:
        partial = self._folder / f".{digest}.{os.getpid()}.npz"
        np.savez(partial, features=features, size=np.asarray(size))
        partial.rename(self._path(digest))


def compute_features(model: Any, front: Front, tiles: torch.Tensor) -> torch.Tensor:
    """Tiles (n, size, size, 3) uint8 → features (n, patches, width), without gradients."""
    with torch.no_grad():
        tower = next(model.model.vision_tower.parameters())
        return tower_features(model, normalise(tiles, front, tower.device).to(tower.dtype))


def cache_folder() -> Path:
    """Where features are kept between runs."""
    root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return root / "ldrt-edge" / "features"


def collator(front: Front, bucket: int) -> Collator:
    """The collator for this front end; padding is never seen, so any token id serves."""
    return Collator(front.config.stop_ids[0], bucket)


def _key(model: Any, front: Front) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    settings = asdict(front.config)
    pictures = ("image_size", "patch_size", "fit", "resample", "image_mean", "image_std", "grid_pinpoints")
    digest.update(repr([settings[name] for name in pictures]).encode())
    digest.update(str(model.config.vision_feature_layer).encode())
    return digest.hexdigest()[:24]
