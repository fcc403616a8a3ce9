"""`ldrt-edge quantize --rescale`: weights that meet large inputs are made larger before they are rounded.

What makes a matrix's inputs, a norm's gains or the rows of another matrix, is divided by scales, and the matrix's
columns are multiplied by them: the model computes the same, from stock files, and rounds otherwise. The scales go into
the export too, so that it can be held against its source tensor by tensor.

Where there is a group: query, key and value read the input norm, the output projection the value projection, gate and
up the post-attention norm, down the up projection, and a head of its own the last norm. Heads that share a value head
share its scales.

Source: Lin et al., "AWQ", MLSys 2024.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.convert.source import HEAD, Source, head_dim, is_tied, kv_heads
from ldrt_edge.convert.weights import Weights
from ldrt_edge.errors import ArtifactError
from ldrt_edge.runtimes.base import FloatArray

SCALES = "rescaling.npz"
"""In an export: the scales of every group, by the checkpoint's name of its maker."""

_LIMIT_BYTES = 256 << 20

Scales = Mapping[str, FloatArray]


@dataclass(frozen=True)
class Group:
    """Matrices with the same inputs, and the tensor whose rows make these.

    places: which of the maker's rows makes each input, (row length,); None where they are in the same order.
    """

    maker: str
    readers: tuple[str, ...]
    places: NDArray[np.intp] | None = None

    def columns(self, scales: FloatArray) -> FloatArray:
        """What the readers' columns are multiplied by, of what the maker's rows are divided by."""
        return scales if self.places is None else scales[self.places]


class Rescaled(Weights):
    """A checkpoint's weights with the scales of its groups folded in: another form of the same function.

    columns: what the columns of matrices are multiplied by, by the checkpoint's names.
    """

    def __init__(self, source: Source, scales: Scales) -> None:
        self.folder, self.entries = source.weights.folder, source.weights.entries
        self._weights = source.weights
        self._rows: dict[str, FloatArray] = {}
        self.columns: dict[str, FloatArray] = {}
        for group in groups(source):
            if group.maker in scales:
                self._rows[group.maker] = self._rows[f"{group.maker.removesuffix('weight')}bias"] = scales[group.maker]
                self.columns |= dict.fromkeys(group.readers, group.columns(scales[group.maker]))
        self.changed = frozenset(self._rows.keys() & self.entries.keys() | self.columns.keys())

    def dtypes(self) -> set[str]:
        """What changed is float32."""
        return {"F32"}

    def read(self, name: str, rows: slice = slice(None)) -> NDArray[np.float32]:
        """One tensor, or some of its rows, as float32."""
        values = self._weights.read(name, rows)
        if name in self.columns:
            values = values * self.columns[name]
        if name in self._rows:
            scales = self._rows[name][rows]
            values = values / (scales if values.ndim == 1 else scales[:, None])
        return values

    def unscaled(self, name: str, values: FloatArray, rows: slice) -> FloatArray:
        """Rows of a matrix as `read` gives them, or what was added to them, without the scales."""
        if name in self._rows:
            values = values * self._rows[name][rows, None]
        return values / self.columns[name] if name in self.columns else values


def groups(source: Source) -> Iterator[Group]:
    """The groups of a language model, layer by layer."""
    text = source.config.text_config
    width, heads = head_dim(text), int(text.num_attention_heads)
    shared = np.arange(heads) * kv_heads(text) // heads  # the value head of each head
    places = (shared[:, None] * width + np.arange(width)).reshape(-1)
    for number in range(text.num_hidden_layers):
        layer = f"language_model.layers.{number}"
        query, key, value, out = (f"{layer}.self_attn.{name}_proj.weight" for name in "qkvo")
        gate, up, down = (f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        yield Group(f"{layer}.input_layernorm.weight", (query, key, value))
        yield Group(value, (out,), places)
        yield Group(f"{layer}.post_attention_layernorm.weight", (gate, up))
        yield Group(up, (down,))
    if not is_tied(source):
        yield Group("language_model.norm.weight", (HEAD,))


def as_exported(source: Source, folder: Path) -> Source:
    """A source as the export in a folder holds it: rescaled, if that was.

    Raises:
        ArtifactError: the scales there are not this model's.
    """
    if not (folder / SCALES).is_file():
        return source
    return replace(source, weights=Rescaled(source, read_scales(source, folder / SCALES)))


def write_scales(scales: Scales, path: Path) -> None:
    """Write a file of scales; it appears when whole."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as stream:
        np.savez(stream, **scales)  # type: ignore[arg-type]
    part.rename(path)


def read_scales(source: Source, path: Path) -> dict[str, FloatArray]:
    """The scales of a file, held against a source's groups.

    Raises:
        ArtifactError: no such file, or not of this model.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > _LIMIT_BYTES:
                raise ValueError(f"larger than {_LIMIT_BYTES >> 20} MiB")
        with np.load(path, allow_pickle=False) as stored:
            scales = {name: np.asarray(stored[name]) for name in stored.files}
    except (
        OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error
    ) as error:  # fmt: skip
        raise ArtifactError(f"{path}: no scales of a rescaled model ({error})") from error
    shapes = {group.maker: source.weights.entries[group.maker].shape[:1] for group in groups(source)}
    for name, values in scales.items():
        if values.dtype != np.float32 or values.shape != shapes.get(name):
            raise ArtifactError(f"{path}: {name} is no scale of this model")
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ArtifactError(f"{path}: {name} holds what nothing can be divided by")
    return scales
