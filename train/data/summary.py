"""What a guess that never looks is worth on a dataset: the number that every accuracy must be read against."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable

from ldrt_edge.artifact import Json
from ldrt_edge.dataset import Row


def summary(rows: Iterable[Row]) -> dict[str, Json]:
    """Counts and majority rates, for a dataset's manifest. Goes once through the rows and keeps none.

    `majority_rate`: for each split and task, the share of its most frequent answer in each language and answer type,
    as answered by someone who knows that split's answers. `blind_prior`: share of test rows that a guesser gets right
    who knows only the most frequent training answer to each of these (the test's own where training has none), and
    the same among closed questions alone.
    """
    answers: dict[tuple[str, str, str, str], Counter[bytes]] = defaultdict(Counter)
    by_split, by_language, by_kind = Counter[str](), Counter[str](), Counter[str]()
    images: set[str] = set()
    for row in rows:
        answers[row.split, row.task, row.language, row.answer_type][_digest(row.answer)] += 1
        by_split[row.split] += 1
        by_language[row.language] += 1
        by_kind[row.kind] += 1
        images.add(row.image_sha256)
    hits, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    guessed, tests = Counter[str](), Counter[str]()
    for (split, task, language, answer_type), counts in answers.items():
        hits[split, task] += max(counts.values())
        sizes[split, task] += counts.total()
        if split == "test":
            known = answers.get(("train", task, language, answer_type)) or counts
            guessed[answer_type] += counts[max(known, key=lambda answer: (known[answer], answer))]
            tests[answer_type] += counts.total()
    majority: dict[str, dict[str, float]] = {"train": {}, "test": {}}
    for split, task in sorted(sizes):
        majority[split][task] = round(hits[split, task] / sizes[split, task], 4)
    return {
        "rows": by_split.total(),
        "images": len(images),
        "rows_by_split": dict(sorted(by_split.items())),
        "rows_by_language": dict(sorted(by_language.items())),
        "rows_by_kind": dict(sorted(by_kind.items())),
        "majority_rate": majority,
        "blind_prior": round(guessed.total() / tests.total(), 4) if tests else None,
        "blind_prior_closed": round(guessed["closed"] / tests["closed"], 4) if tests["closed"] else None,
    }


def _digest(answer: str) -> bytes:
    """Stands for an answer: a corpus's answers are long, and nearly all different."""
    return hashlib.blake2b(answer.strip().rstrip(".").lower().encode(), digest_size=8).digest()
