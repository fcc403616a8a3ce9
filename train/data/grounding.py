"""Whether an answer says only what its source says: numbers, doses, units, parts of the body, sides, modalities.

A language model fills in what sounds right. What can be checked against caption and mentions is checked: every number
of an answer must stand in the source, with its unit where both have one (50 cGy are 0.5 Gy, 6 fractions are not 6 Gy),
and so must every concept of `anatomy.yaml`, in any language. What may be read in several ways is grounded if one of
them is. What remains is not proven true; what is dropped is not grounded.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from ldrt_edge.train.data.quantities import Quantity, quantities
from ldrt_edge.train.data.terms import TermIndex, terms_of

_NO_SIDE = re.compile(
    r"\bleft (?:untreated|alone|out|over|behind|blank|unchanged|open|in place)\b"
    r"|\bright (?:angles?|away|after|before|now|about|that)\b", re.I,
)


def ungrounded(answer: str, source: str, language: str = "") -> list[str]:
    """What an answer states that its source does not, as short claims; none if it may stay.

    Args:
        answer: what is checked.
        source: all that it may rest on.
        language: the answer's, BCP 47; without it words of any language count as they may be meant.
    """
    spoken = (language,) if language else ()
    known = _Known(quantities(source, (*spoken, "en") if spoken else ()))
    claims = set[tuple[float, str]]()
    for number in quantities(answer, spoken):
        if number.sure and not known.state(number):
            claims.update(map(number.based, number.readings[0]))
    names, index = _anatomy(language)
    everywhere = _anatomy("")[1]
    missing = index.found(_NO_SIDE.sub(" ", answer)) - everywhere.found(source)
    said = [f"{value:g} {unit}".strip() for value, unit in sorted(claims)]
    return said + [names[number] for number in sorted(missing)]


class _Known:
    """The numbers of a source: with their unit, without one, and all as they are written."""

    def __init__(self, numbers: Iterable[Quantity]) -> None:
        self._based, self._bare, self._written = set[tuple[float, str]](), set[float](), set[float]()
        for number in numbers:
            for value in (value for reading in number.readings for value in reading):
                self._written.add(value)
                if number.unit:
                    self._based.add(number.based(value))
                elif not number.counts:
                    self._bare.add(value)

    def state(self, number: Quantity) -> bool:
        """Whether a reading of a number stands among them, in the same unit unless one of the two has none."""
        if not number.unit:
            return any(self._written.issuperset(reading) for reading in number.readings)
        return any(
            all(number.based(value) in self._based or value in self._bare for value in reading)
            for reading in number.readings
        )


@functools.cache
def _anatomy(language: str) -> tuple[list[str], TermIndex]:
    """The concepts' names and terms, in one language or, without one or in one that is not there, in all."""
    data = yaml.safe_load(Path(__file__).with_name("anatomy.yaml").read_text(encoding="utf-8"))
    chosen = [
        {language: by_language[language]} if language in by_language else by_language for by_language in data.values()
    ]
    return [*map(str, data)], TermIndex([terms_of(by_language) for by_language in chosen])
