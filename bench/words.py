"""What peers that read text alone are calibrated on: the words of training rows."""

from __future__ import annotations

from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import DataError
from ldrt_edge.front import Front, conversation

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
