"""Questions that share an image, packed into one row that shares the image's prefix.

A packed row is `prefix | branch 1 | branch 2 | …`: the prefix (chat template and image tokens) is computed once; each
branch (a question and its answer) sees the prefix and itself, never another branch, and its positions go on from
where the prefix ends. So every branch gets exactly the hidden states it would get alone, at a fraction of the cost
(measured: 4× the samples a second with six questions an image).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldrt_edge.dataset import Dataset, Row
from ldrt_edge.errors import DataError
from ldrt_edge.front import Front, conversation
from ldrt_edge.front_config import FrontConfig
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.base import FrontImage
from ldrt_edge.tiles import packing_layout

IGNORED = -100  # torch's cross_entropy ignore_index
ROW_IDS = "row_ids"  # in a batch: whose questions they are, for messages


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt (its image one placeholder long) and of the answer, stop token included.

    row_id: of the dataset row that asks it.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    row_id: str


@dataclass(frozen=True)
class PackedRow:
    """One image and the questions asked about it."""

    image: Path
    image_sha256: str
    questions: tuple[Question, ...]

    @property
    def row_ids(self) -> tuple[str, ...]:
        """Of the dataset rows whose questions these are."""
        return tuple(dict.fromkeys(question.row_id for question in self.questions))


@dataclass(frozen=True)
class Sequences:
    """A packed row as arrays of (length,) int64; see the module's text. Labels stand where they are predicted."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """A packed row with its picture: tower features (patches, width), or tiles that the tower still has to see.

    `layout` packs the picture's `patches` features, all tiles together.
    """

    sequences: Sequences
    layout: NDArray[np.int32]
    patches: int
    features: torch.Tensor | None
    tiles: NDArray[np.uint8] | None
    row_ids: tuple[str, ...]


def pack_rows(
    datasets: Sequence[tuple[Dataset, Sequence[Row]]], front: Front, questions_per_row: int, max_tokens: int, seed: int
) -> list[PackedRow]:
    """Group rows by image into packed rows of at most `questions_per_row` questions and `max_tokens` tokens of text.

    Raises:
        DataError: a single question with its answer is longer than `max_tokens`, or with its picture than the model's
            context; the row is named.
    """
    rng, most = random.Random(seed), most_image_tokens(front.config)
    packed: list[PackedRow] = []
    for dataset, rows in datasets:
        by_image: dict[str, list[Question]] = {}
        paths: dict[str, Path] = {}
        for row in rows:
            by_image.setdefault(row.image_sha256, []).extend(questions_of(row, front))
            paths[row.image_sha256] = dataset.image_path(row)
        for digest, questions in by_image.items():
            _check_context(questions, paths[digest], front, most)
            rng.shuffle(questions)
            for chunk in _chunks(questions, questions_per_row, max_tokens):
                packed.append(PackedRow(paths[digest], digest, chunk))
    return packed


def questions_of(row: Row, front: Front) -> list[Question]:
    """Every assistant turn of a row as a question: the exact prompt that inference would build, and its answer."""
    stand_in = FrontImage(np.empty((0, 0, 0, 3), np.uint8), np.zeros((1, 1), np.int32), (0, 0), "")
    messages = conversation(row.turns, stand_in)
    return [
        Question(front.prompt(messages[:i]).ids, front.answer_ids(messages[:i], message.text), row.id)
        for i, message in enumerate(messages)
        if message.role == "assistant"
    ]


def sequences(row: PackedRow, image_token_id: int, image_tokens: int) -> Sequences:
    """Lay a packed row out, its image `image_tokens` long."""
    prompts = [expand(question.prompt, image_token_id, image_tokens) for question in row.questions]
    shared = _shared_prefix(prompts)
    ids = list(prompts[0][:shared])
    positions, segments, labels = list(range(shared)), [0] * shared, [IGNORED] * shared
    for branch, (prompt, question) in enumerate(zip(prompts, row.questions, strict=True), start=1):
        whole = [*prompt, *question.answer]
        inputs = whole[shared:-1]
        ids += inputs
        positions += range(shared, shared + len(inputs))
        segments += [branch] * len(inputs)
        labels += [IGNORED] * (len(prompt) - shared - 1) + list(question.answer)
    return Sequences(*(np.asarray(values, np.int64) for values in (ids, positions, segments, labels)))


class Collator:
    """Examples to one padded batch of tensors, the arguments of `PackedLlava.forward`, and their rows' ids."""

    def __init__(self, pad_id: int, bucket: int) -> None:
        self._pad_id, self._bucket = pad_id, bucket

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        longest = max(len(example.sequences.ids) for example in examples)
        length = -(-longest // self._bucket) * self._bucket
        batch: dict[str, Any] = {
            ROW_IDS: [name for example in examples for name in example.row_ids],
            "input_ids": _pad([e.sequences.ids for e in examples], length, self._pad_id),
            "position_ids": _pad([e.sequences.positions for e in examples], length, 0),
            "segments": _pad([e.sequences.segments for e in examples], length, -1),
            "labels": _pad([e.sequences.labels for e in examples], length, IGNORED),
            "layout": torch.from_numpy(_joined_layout(examples)),
        }
        features = [e.features for e in examples if e.features is not None]
        if features:
            batch["features"] = torch.cat(features).float()
        else:
            batch["tiles"] = torch.from_numpy(np.concatenate([e.tiles for e in examples if e.tiles is not None]))
        return batch


def most_image_tokens(config: FrontConfig) -> int:
    """Tokens of the picture that takes most of them: one of a size that tiles fill, where the model tiles."""
    sizes = config.grid_pinpoints or ((config.image_size, config.image_size),)
    return max(len(packing_layout(config, size)) for size in sizes)


def visible(segments: torch.Tensor) -> torch.Tensor:
    """Which key each query may see: (batch, length) segments → (batch, 1, length, length) bool.

    Causal, and within one's own branch or the shared prefix; padding sees only itself, so that no row is empty.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    return (((query == key) | ((key == 0) & (query > 0))) & causal)[:, None]


def expand(ids: Sequence[int], image_token_id: int, image_tokens: int) -> list[int]:
    """Token ids with the image's placeholder repeated once for each image token."""
    expanded: list[int] = []
    for token in ids:
        expanded.extend([token] * (image_tokens if token == image_token_id else 1))
    return expanded


def _check_context(questions: Sequence[Question], image: Path, front: Front, most: int) -> None:
    """That each question fits, alone: branches of a row count their positions from the same prefix on.

    most: tokens of any picture; this one's own are counted only where so many do not fit.
    """
    longest = max(questions, key=lambda question: len(question.prompt) + len(question.answer))
    text, context = len(longest.prompt) - 1 + len(longest.answer), front.config.context_length
    if text + most <= context:
        return
    picture = len(packing_layout(front.config, read_image(image).rgb.shape[:2]))
    if text + picture > context:
        raise DataError(
            f"row {longest.row_id}: {text + picture} tokens, {picture} of them its picture's, and the model holds "
            f"{context}: shorten it, or leave it out"
        )


def _chunks(questions: Sequence[Question], most: int, max_tokens: int) -> list[tuple[Question, ...]]:
    chunks: list[list[Question]] = [[]]
    used = 0
    for question in questions:
        length = len(question.prompt) + len(question.answer)
        if length > max_tokens:
            raise DataError(f"row {question.row_id}: {length} tokens of text, max_tokens is {max_tokens}: raise it")
        if chunks[-1] and (len(chunks[-1]) == most or used + length > max_tokens):
            chunks.append([])
            used = 0
        chunks[-1].append(question)
        used += length
    return [tuple(chunk) for chunk in chunks if chunk]


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share; each keeps at least its last token, which predicts the answer."""
    limit = min(len(prompt) for prompt in prompts) - 1
    return next((i for i in range(limit) if len({prompt[i] for prompt in prompts}) > 1), limit)


def _pad(rows: Sequence[NDArray[np.int64]], length: int, value: int) -> torch.Tensor:
    padded = np.full((len(rows), length), value, np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)


def _joined_layout(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Packing tables of several pictures over their concatenated features; -1 stays the newline."""
    joined, offset = [], 0
    for example in examples:
        table = example.layout.astype(np.int64)
        joined.append(np.where(table >= 0, table + offset, -1))
        offset += example.patches
    return np.concatenate(joined)
