"""What a guess that never looks is worth on a dataset: the number that every accuracy must be read against."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from ldrt_edge.artifact import Json
from ldrt_edge.dataset import Row


def summary(rows: Sequence[Row]) -> dict[str, Json]:
    """Counts and majority rates, for a dataset's manifest.

    `majority_rate`: for each split and task, the share of its most frequent answer in each language and answer type,
    as answered by someone who knows that split's answers. `blind_prior`: share of test rows that a guesser gets right
    who knows only the most frequent training answer to each of these (the test's own where training has none), and
    the same among closed questions alone.
    """
    answers: dict[tuple[str, str, str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        answers[row.split, row.task, row.language, row.answer_type][_plain(row.answer)] += 1
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
    by_split = Counter(row.split for row in rows)
    return {
        "rows": len(rows),
        "images": len({row.image_sha256 for row in rows}),
        "rows_by_split": dict(sorted(by_split.items())),
        "rows_by_language": dict(sorted(Counter(row.language for row in rows).items())),
        "rows_by_kind": dict(sorted(Counter(row.kind for row in rows).items())),
        "majority_rate": majority,
        "blind_prior": round(guessed.total() / tests.total(), 4) if tests else None,
        "blind_prior_closed": round(guessed["closed"] / tests["closed"], 4) if tests["closed"] else None,
    }


def _plain(answer: str) -> str:
    return answer.strip().rstrip(".").lower()
