"""What quantisers of others share that read text alone: the words of training rows, and how they are run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from ldrt_edge import console
from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import DataError, LdrtError
from ldrt_edge.front import Front, conversation
from ldrt_edge.runtimes.processor import physical_cores

PIECE = 512
"""Tokens, as mlx-lm's command line has them."""


def pieces(front: Front, dataset: Dataset, tokens: int) -> list[list[int]]:
    """Questions and answers one behind the other, about `tokens` of them, in pieces of `PIECE` token ids.

    Raises:
        DataError: the training rows have less than a piece.
    """
    ids: list[int] = []
    for row in dataset.rows("train"):
        messages = conversation(row.turns[:-1], None)
        ids += [*front.prompt(messages).ids, *front.answer_ids(messages, row.answer)]
        if len(ids) >= tokens:
            break
    found = [ids[start : start + PIECE] for start in range(0, len(ids) - PIECE + 1, PIECE)]
    if not found:
        raise DataError(f"{dataset.folder}: its training rows have {len(ids)} tokens of text: it takes {PIECE}")
    return found


def run(quantise: Callable[[], None], out: Path) -> int:
    """Say how long it took and print what it wrote, or say in one line why it could not; returns the exit code."""
    started = time.monotonic()
    try:
        quantise()
    except LdrtError as error:
        print(error, file=sys.stderr)
        return 1
    console.say(f"{console.duration(time.monotonic() - started)} on {physical_cores()} cores")
    print(out)
    return 0
