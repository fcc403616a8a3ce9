"""Who trains and who tests, so that nothing leaks: whole clusters go to one side, and a check proves it.

A cluster is an article with all that share a picture or a caption with it (`data curate` finds them). `train` runs the
same check on all of its datasets together, and refuses to start on a leak.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ldrt_edge.dataset import Row, Split, assign_splits
from ldrt_edge.errors import DataError, all_problems


def split_by_group(rows: Sequence[Row], test_fraction: float, seed: int) -> list[Row]:
    """Rows with their split: whole groups, `test_fraction` of those of each language and mix of tasks.

    Raises:
        DataError: a leak, which would be our bug.
    """
    languages: dict[str, Counter[str]] = {}
    tasks: dict[str, set[str]] = {}
    for row in rows:
        languages.setdefault(row.group, Counter())[row.language] += 1
        tasks.setdefault(row.group, set()).add(row.task)
    groups = sorted(languages)
    strata = [f"{_commonest(languages[group])} {' '.join(sorted(tasks[group]))}" for group in groups]
    splits = assign_splits(groups, test_fraction, seed, strata)
    divided = [replace(row, split=splits[row.group]) for row in rows]
    check_leakage(divided)
    return divided


def check_leakage(rows: Iterable[Row]) -> None:
    """Refuse rows of which a group or a picture stands on both sides.

    Raises:
        DataError: it does; the message names them.
    """
    sides: dict[tuple[str, str], set[Split]] = {}
    first: dict[tuple[str, str], str] = {}
    leaks: dict[tuple[str, str], None] = {}
    for row in rows:
        for key in (("group", row.group), ("picture", row.image_sha256)):
            seen = sides.setdefault(key, set())
            first.setdefault(key, row.id)
            seen.add(row.split)
            if len(seen) > 1:
                leaks.setdefault(key)
    if leaks:
        told = [f"{what} {name[:40]} (row {first[what, name]})" for what, name in leaks]
        raise DataError(all_problems(told, f"training and test share {len(leaks)} groups or pictures", 4))


def _commonest(counts: Counter[str]) -> str:
    return min(counts, key=lambda name: (-counts[name], name))
