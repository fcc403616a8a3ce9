"""Who trains and who tests, so that nothing leaks: whole clusters go to one side, and a check proves it.

A cluster is an article with all that share a picture or a caption with it (`data curate` finds them). `train` runs the
same check on all of its datasets together, and refuses to start on a leak.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ldrt_edge.dataset import Row, Split, assign_splits
from ldrt_edge.errors import DataError, all_problems


class Groups:
    """The groups of rows that go by: of each, how many rows in which language, and which tasks."""

    def __init__(self) -> None:
        self._languages: dict[str, Counter[str]] = {}
        self._tasks: dict[str, set[str]] = {}

    def __len__(self) -> int:
        return len(self._languages)

    def see(self, row: Row) -> None:
        """Take note of a row."""
        self._languages.setdefault(row.group, Counter())[row.language] += 1
        self._tasks.setdefault(row.group, set()).add(row.task)

    def splits(self, test_fraction: float, seed: int) -> dict[str, Split]:
        """Each group's split: `test_fraction` of the groups are for testing, of all languages and mixes of tasks."""
        groups = sorted(self._languages)
        strata = [f"{_commonest(self._languages[group])} {' '.join(sorted(self._tasks[group]))}" for group in groups]
        return assign_splits(groups, test_fraction, seed, strata)


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
