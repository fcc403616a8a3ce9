"""Held-out questions about pictures with the merged model's logits, against which quantised models are held.

Every question is teacher-forced: one pass gives the divergence on each answer token, and exact match too, for where the
argmax over the reference answer is that answer, greedy decoding gives it. The logits are kept on disk for later runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldrt_edge import console
from ldrt_edge.artifact import Json
from ldrt_edge.bench.statistics import joined
from ldrt_edge.bench.steps import apart
from ldrt_edge.dataset import Dataset, choose_rows, group_by_image
from ldrt_edge.errors import ArtifactError, DataError
from ldrt_edge.fidelity import compare_logits
from ldrt_edge.front import Front, conversation
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.base import FloatArray, Prompt, Runtime

TORCH = ("torch", "transformers", "ldrt_edge.runtimes.hf")
"""What a step's process loads before its cost is counted."""


@dataclass(frozen=True, eq=False)
class Question:
    """One question, and the cluster of pictures (and articles) that it stands and falls with."""

    prompt: Prompt
    answer: tuple[int, ...]
    cluster: Hashable


class HeldOut:
    """Questions, and what the merged model says to them.

    Args:
        path: where its logits are kept, or will be.

    Raises:
        ArtifactError: the logits there are of other questions.
    """

    def __init__(self, merged: Path, questions: Sequence[Question], path: Path, threads: int | None) -> None:
        self.questions = questions
        self.groups = [question.cluster for question in questions]
        self.token_groups = [question.cluster for question in questions for _ in question.answer]
        self._merged, self._path, self._threads = merged, path, threads
        self._ends = np.cumsum([len(question.answer) for question in questions])

    def against(self, runtime: Runtime) -> dict[str, Json]:
        """Per answer token kld and top1, per question exact, of a loaded model; closes it."""
        kld, top1, exact = [], [], []
        try:
            for question, logits in console.track(list(zip(self.questions, self._expected, strict=True)), "asking"):
                given = runtime.score(question.prompt, question.answer)
                tokens = compare_logits(logits, given)
                kld += tokens.kld.tolist()
                top1 += tokens.top1.tolist()
                exact.append(bool((given.argmax(axis=1) == question.answer).all()))
        finally:
            runtime.close()
        return {"kld": kld, "top1": top1, "exact": exact}

    @cached_property
    def exact(self) -> NDArray[np.bool_]:
        """Which questions the merged model answers exactly."""
        pairs = zip(self.questions, self._expected, strict=True)
        return np.array([bool((logits.argmax(axis=1) == question.answer).all()) for question, logits in pairs])

    @property
    def _expected(self) -> list[FloatArray]:
        """The merged model's logits for each question: (answer tokens, vocab), read from disk as they are wanted."""
        return np.split(self._reference, self._ends[:-1])

    @cached_property
    def _reference(self) -> FloatArray:
        if not self._path.exists():
            apart(TORCH, _score, self._merged, self.questions, self._path, self._threads)
        logits: FloatArray = np.load(self._path, mmap_mode="r")
        if len(logits) != self._ends[-1]:
            raise ArtifactError(f"{self._path}: logits of {len(logits)} tokens, not {self._ends[-1]}: remove it")
        return logits


def ask(
    front: Front, dataset: Dataset, limit: int | None, seed: int, calibrations: Mapping[str, Path]
) -> list[Question]:
    """The held-out questions, picture by picture.

    Raises:
        DataError: no test rows, one that cannot be asked, or a calibration set that trains on their pictures.
    """
    rows = choose_rows(dataset.rows("test"), limit, seed)
    if not rows:
        raise DataError(f"{dataset.folder}: no rows in split 'test': quantisers are compared on held-out rows only")
    pictures = {row.image_sha256 for row in rows}
    for name, folder in calibrations.items():
        if any(row.image_sha256 in pictures for row in Dataset(folder).rows("train")):
            raise DataError(f"--calibration {name}: {folder} trains on pictures that are asked about: split it anew")
    labels = joined([row.image_sha256 for row in rows], [row.group for row in rows])
    clusters = {row.id: label for row, label in zip(rows, labels, strict=True)}
    asked = []
    for members in group_by_image(rows).values():
        image = front.image(read_image(dataset.image_path(members[0])).rgb)
        for row in members:
            messages = conversation(row.turns[:-1], image)
            try:
                prompt, answer = front.prompt(messages), front.answer_ids(messages, row.answer)
            except DataError as error:
                raise DataError(f"row {row.id}: {error}") from error
            asked.append(Question(prompt, answer, clusters[row.id]))
    return asked


def _score(merged: Path, asked: Sequence[Question], path: Path, threads: int | None) -> None:
    """Write the merged model's logits (answer tokens, vocab) as float32; the file appears when whole."""
    from ldrt_edge.runtimes.hf import HfRuntime

    runtime, part, place = HfRuntime(merged, threads=threads), path.with_suffix(".part"), 0
    try:
        shape = sum(len(question.answer) for question in asked), runtime.vocab_size
        logits = np.lib.format.open_memmap(part, "w+", np.dtype(np.float32), shape)
        for question in console.track(asked, "asking the merged model"):
            place += len(question.answer)
            logits[place - len(question.answer) : place] = runtime.score(question.prompt, question.answer)
        logits.flush()
    finally:
        runtime.close()
    part.replace(path)
