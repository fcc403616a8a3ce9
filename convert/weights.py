"""The weights of a Hugging Face LLaVA folder, one tensor at a time, under one set of names.

Hub checkpoints, transformers 4 and transformers 5 name the same tensors differently; here they have the short names
of transformers 5: `language_model.layers.0.…`, `lm_head.weight`, `vision_tower.encoder.layers.0.…`,
`multi_modal_projector.linear_1.weight`, `image_newline`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.errors import ArtifactError, all_problems, require
from ldrt_edge.train.base import check_checkpoint

_RENAMES = (
    (r"^model\.(?=language_model|vision_tower|multi_modal_projector|image_newline)", ""),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "language_model."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
)
_ALL = slice(None)


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its file, its name there, its shape and safetensors dtype ("F32", "BF16", …)."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class Weights:
    """The tensors of a folder by canonical name; `read` loads one.

    changed: names of those that `read` gives otherwise than they are stored.

    Raises:
        ArtifactError: no LLaVA, a missing, truncated or pickled file, or two tensors of one name.
    """

    changed: frozenset[str] = frozenset()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        problems = []
        for path in check_checkpoint(folder):
            for name, entry in _entries(path):
                if name in self.entries:
                    problems.append(f"{name} is in {self.entries[name].path.name} and again in {path.name}")
                self.entries[name] = entry
        if problems:
            raise ArtifactError(all_problems(problems, f"{folder}: tensors stored twice"))

    def read(self, name: str, rows: slice = _ALL) -> NDArray[np.float32]:
        """One tensor, or some of its rows, as float32."""
        return np.asarray(self._tensor(name, rows).float().numpy())

    def bits(self, name: str, rows: slice = _ALL) -> NDArray[np.uint16]:
        """The same of a tensor stored in 16 bits, f16 or bf16, as it is stored."""
        return np.asarray(self._tensor(name, rows).view(require("torch", "train").uint16).numpy())

    @property
    def count(self) -> int:
        """Number of values in all tensors."""
        return sum(entry.count for entry in self.entries.values())

    def _tensor(self, name: str, rows: slice) -> Any:
        """A copy: the file is opened for it alone, so that no mapped page outlives the call."""
        entry = self.entries[name]
        with _open(entry.path) as file:
            return file.get_slice(entry.key)[rows].clone()

    def dtypes(self) -> set[str]:
        """The safetensors dtypes that occur."""
        return {entry.dtype for entry in self.entries.values()}


def canonical(name: str) -> str:
    """A checkpoint's tensor name in transformers 5's short form."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _entries(path: Path) -> Iterator[tuple[str, Entry]]:
    with _open(path) as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            view = file.get_slice(key)
            yield canonical(key), Entry(path, key, tuple(view.get_shape()), view.get_dtype())


def _open(path: Path) -> Any:
    require("torch", "train")
    safetensors = require("safetensors", "train")
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: truncated or no safetensors file ({error}): copy it again") from error
