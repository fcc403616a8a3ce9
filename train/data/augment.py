"""More pictures of the same things: each training picture again, slightly turned, zoomed, moved and toned.

For small sets of real pictures, which a model would otherwise learn by heart. Nothing is mirrored, for left and right
are what questions ask about; the turn is small, so that planes and sides stay what they are. The test split is left
out: nothing of it may be learned.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldrt_edge import artifact
from ldrt_edge.console import track
from ldrt_edge.dataset import Dataset, DatasetWriter, Row
from ldrt_edge.errors import ConfigError, DataError
from ldrt_edge.image import read_image
from ldrt_edge.train.data.pictures import png_bytes
from ldrt_edge.train.data.summary import summary

_TURN_DEGREES = 8.0
_ZOOM = (0.88, 1.12)
_SHIFT = 0.05
"""Part of the picture's side."""
_GAMMA, _CONTRAST, _BRIGHTNESS = (0.75, 1.35), (0.85, 1.2), 18.0


def augment(data: Path, out: Path, copies: int, seed: int = 0) -> Path:
    """Write a dataset artefact with `copies` altered pictures for each training picture, each with all its questions.

    Groups, kinds and licences stay; the source says that the picture was altered. The same arguments give the same
    bytes.

    Raises:
        ConfigError: `copies` is below 1.
        DataError: the dataset has no training rows, or a picture cannot be read.
    """
    if copies < 1:
        raise ConfigError(f"--copies {copies}: at least 1")
    dataset = Dataset(data)
    by_image: dict[str, list[Row]] = {}
    for row in dataset.rows("train"):
        by_image.setdefault(row.image, []).append(row)
    if not by_image:
        raise DataError(f"{data}: no training rows to augment")
    with artifact.create(out, "dataset", {"stage": "augment", "copies": copies}, [data], seed=seed) as draft:
        if draft.complete:
            return out
        rows: list[Row] = []
        with DatasetWriter(draft.path) as writer:
            for image, members in track(sorted(by_image.items()), "augmenting"):
                picture = read_image(dataset.image_path(members[0])).rgb
                for copy in range(copies):
                    altered = alter(picture, random.Random(f"{seed}/{image}/{copy}"))
                    name, digest = writer.add_image(png_bytes(altered), ".png")
                    for row in members:
                        source = f"{row.source}, altered"
                        made = replace(row, id=f"{row.id}-a{copy}", image=name, image_sha256=digest, source=source)
                        writer.add(made)
                        rows.append(made)
        draft.metrics.update(summary(rows))
    return out


def alter(picture: NDArray[np.uint8], rng: random.Random) -> NDArray[np.uint8]:
    """A picture (height, width, 3) turned by up to 8°, zoomed and moved a little, with another gamma and contrast."""
    image = Image.fromarray(picture)
    zoom = rng.uniform(*_ZOOM)
    right, down = (rng.uniform(-_SHIFT, _SHIFT) * side for side in image.size)
    corner = tuple(int(value) for value in np.median([picture[0, 0], picture[0, -1], picture[-1, 0]], axis=0))
    degrees = rng.uniform(-_TURN_DEGREES, _TURN_DEGREES)
    moved = (round(right), round(down))
    turned = image.rotate(degrees, Image.Resampling.BICUBIC, translate=moved, fillcolor=corner)
    width, height = (side / zoom for side in image.size)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, left + width, top + height)
    zoomed = turned.transform(image.size, Image.Transform.EXTENT, box, Image.Resampling.BICUBIC, fillcolor=corner)
    tones = (np.arange(256) / 255) ** rng.uniform(*_GAMMA) * 255
    tones = (tones - 127.5) * rng.uniform(*_CONTRAST) + 127.5 + rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)
    toned: NDArray[np.uint8] = np.clip(tones, 0, 255).astype(np.uint8)[np.asarray(zoomed)]
    return toned
