"""Whether an answer says only what its source says: numbers, doses, units, parts of the body, sides, modalities.

A language model fills in what sounds right. What can be checked against caption and mentions is checked: every number
of an answer must stand in the source, with its unit where both have one (50 cGy is 0.5 Gy), and so must every concept
of `anatomy.yaml`, in any language. What remains is not proven true; what is dropped is not grounded.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import yaml

from ldrt_edge.train.data.terms import TermIndex, terms_of

_NUMBER = re.compile(
    r"(?<![\w.,])([-−]?\d{1,3}(?:[,.\s ]\d{3})+(?![\d.,]*\d)|\d+(?:[.,]\d+)?)"
    r"\s*(?:×\s*)?(cGy|mGy|Gy|mSv|Sv|kV|MV|MeV|mm|cm|%|°|m[lL]|mg|keV)?(?![A-Za-z])"
)
_TO_BASE = {"cGy": ("Gy", 0.01), "mGy": ("Gy", 0.001), "mSv": ("Sv", 0.001), "cm": ("mm", 10.0), "mL": ("ml", 1.0)}
_WORDS = {
    word: value
    for words, value in (
        ("two deux zwei dos dois duas due", 2), ("three trois drei tres três tre", 3),
        ("four quatre vier cuatro quatro quattro", 4), ("five cinq fünf cinco cinque", 5),
        ("six sechs seis sei", 6), ("seven sept sieben siete sete sette", 7),
        ("eight huit acht ocho oito otto", 8),
        ("nine neuf neun nueve nove", 9),
        ("ten dix zehn diez dez dieci", 10),
        ("twelve douze zwölf doce doze dodici", 12),
    )
    for word in words.split()
}
_AMBIGUOUS = {"due", "dos", "sei", "sept", "sete", "neuf", "acht"}  # also "owed", "of the", "be", "September", "new"


def ungrounded(answer: str, source: str) -> list[str]:
    """What an answer states that its source does not, as short claims; none if it may stay."""
    known = _numbers(source)
    values = {value for value, _ in known}
    claims = []
    for value, unit in sorted(_numbers(answer)):
        bare_in_source = (value, "") in known
        if value not in values or (unit and (value, unit) not in known and not bare_in_source):
            claims.append(f"{value:g} {unit}".strip())
    names, index = _anatomy()
    missing = index.found(answer) - index.found(source)
    return claims + [names[number] for number in sorted(missing)]


def _numbers(text: str) -> set[tuple[float, str]]:
    """Numbers with their unit in base units, "" where they have none; number words of six languages count."""
    found = set()
    for written, unit in _NUMBER.findall(text):
        value = _value(written)
        base, factor = _TO_BASE.get(unit, (unit, 1.0))
        found.add((round(value * factor, 6), base))
    for word in re.findall(r"[^\W\d_]+", text.casefold()):
        if word in _WORDS and word not in _AMBIGUOUS:
            found.add((float(_WORDS[word]), ""))
    return found


def _value(written: str) -> float:
    """1,234.5 and 1 234 are thousands; 0,5 and 0.5 are halves."""
    plain = re.sub(r"[\s ]", "", written).replace("−", "-")
    if re.fullmatch(r"-?\d{1,3}(?:[,.]\d{3})+", plain) and not plain.lstrip("-").startswith("0"):
        return float(re.sub(r"[,.]", "", plain))
    return float(plain.replace(",", "."))


@functools.cache
def _anatomy() -> tuple[list[str], TermIndex]:
    data = yaml.safe_load(Path(__file__).with_name("anatomy.yaml").read_text(encoding="utf-8"))
    return [*map(str, data)], TermIndex([terms_of(by_language) for by_language in data.values()])
