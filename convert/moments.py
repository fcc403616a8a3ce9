"""The second moments of what goes into each matrix of the language model, as far as answers depend on what comes out.

Rounding a matrix by E costs the answers about Σ e H eᵀ over the rows e of E, with

    H = Σ_t c_t xₜ xₜᵀ,    c_t = ½ ‖gₜ‖² / answer tokens

of whose diagonal `sensitivity` makes its estimates. `rescale` and `feedback` make that sum small.

Source: Kim et al., "GuidedQuant", ICML 2025 (the weights c_t; here they come from answers that the model draws itself).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.convert.gguf import check_room
from ldrt_edge.convert.gradients import Asked, gradients, linears, prompts
from ldrt_edge.convert.source import EMBEDDINGS, HEAD, Source, is_tied
from ldrt_edge.dataset import Row
from ldrt_edge.machine import available_bytes
from ldrt_edge.runtimes.base import FloatArray
from ldrt_edge.runtimes.hf import HfRuntime

_LANGUAGE = ("language_model.", HEAD)
_MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Moments:
    """H of each matrix, (row length, row length) float32, by the checkpoint's names, read one at a time.

    files: where they are. columns: what the weights' columns are multiplied by, so that their inputs are divided by it.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    columns: Mapping[str, FloatArray] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> FloatArray:
        moments: FloatArray = np.load(self.files[name])
        scales = self.columns.get(name)
        return moments if scales is None else moments / np.outer(scales, scales)

    def rescaled(self, columns: Mapping[str, FloatArray]) -> Moments:
        """The moments that belong to weights with multiplied columns."""
        return replace(self, columns=columns)


def measure(
    source: Source, data: Path, rows: Sequence[Row], folder: Path, seed: int = 0, threads: int | None = None
) -> Moments:
    """Measure H of every matrix of the language model into `folder`; what is there is not done again.

    rows: of the dataset artefact `data`; asked again for as many matrices as memory holds.

    Raises:
        ArtifactError: the disk is too small.
        DataError: a row cannot be asked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    widths = _widths(source)
    files = {name: folder / f"{name}.npy" for name in widths}
    missing = {name: width for name, width in widths.items() if not files[name].exists()}
    if not missing:
        return Moments(files)
    check_room(folder, 4 * sum(width**2 for width in missing.values()))
    runtime = HfRuntime(source.folder, threads=threads)
    try:
        asked = prompts(runtime, data, rows)
        for names in _batches(missing, int(_MEMORY_SHARE * _free_bytes(runtime))):
            for name, moments in _moments(runtime, source, names, asked, seed).items():
                part = files[name].with_suffix(".part")
                with part.open("wb") as stream:
                    np.save(stream, moments)
                part.rename(files[name])
    finally:
        runtime.close()
    return Moments(files)


def _widths(source: Source) -> dict[str, int]:
    """Row lengths of the language model's matrices; an embedding table that is no head has one input at a time."""
    entries = source.weights.entries
    left_out = HEAD if is_tied(source) else EMBEDDINGS
    names = [name for name in entries if name.startswith(_LANGUAGE) and name != left_out]
    return {name: entries[name].shape[1] for name in names if len(entries[name].shape) == 2}


def _batches(widths: Mapping[str, int], room_bytes: int) -> Iterator[list[str]]:
    batch: list[str] = []
    held = 0
    for name, width in widths.items():
        if batch and held + 4 * width**2 > room_bytes:
            yield batch
            batch, held = [], 0
        batch.append(name)
        held += 4 * width**2
    yield batch


def _moments(
    runtime: HfRuntime, source: Source, wanted: Sequence[str], asked: Sequence[Asked], seed: int
) -> dict[str, NDArray[np.float32]]:
    """H of each wanted matrix."""
    tokens, tied = sum(len(answer) for _, answer in asked), is_tied(source)
    sums: dict[str, Any] = {}

    def see(name: str, inputs: Any, gradient: Any) -> None:
        weighted = inputs * (gradient.square().sum(-1, keepdim=True) / (2 * tokens))
        sums[name] = sums[name].addmm_(weighted.T, inputs) if name in sums else weighted.T @ inputs

    names = {HEAD if tied and name == EMBEDDINGS else name: name for name in wanted}
    with linears(runtime, names, see):
        for words in gradients(runtime, asked, seed, "moments"):
            if tied and EMBEDDINGS in sums:  # as a table, its rows are read one at a time
                sums[EMBEDDINGS].diagonal().add_(words.square().sum(0) / (2 * tokens))
    return {name: value.cpu().numpy() for name, value in sums.items()}


def _free_bytes(runtime: HfRuntime) -> int:
    device = runtime.model.device
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return available_bytes()
