"""Numbers in a text, in digits or in words of many languages, each with its unit.

What words and units there are stands in `numbers.yaml`. A number that can be read in several ways ("1,234", "10,20,30")
comes with all of them; numbers of a list or a range have the unit of the last.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

_CJK = "぀-ヿ㐀-鿿가-힯"
_WORD = rf"[^\W\d_{_CJK}]"
_NUMBER = re.compile(
    rf"(?<![^\W_{_CJK}])(?:\.\d++|\d++(?:[.,]\d++|[ \u2009\u202f]\d{{3}}(?!\d))*+)"  # possessive: digits stay whole
    rf"|(?P<word>{_WORD}++)|(?P<cjk>[一二两兩三四五六七八九十百]++)|(?P<hangul>[가-힯]++)"
)
_UNIT = re.compile(rf"(?P<gap>[ \u2009\u202f-]?)(?P<unit>%|°C?|(?:{_WORD}|[µμ·])++[23]?|[{_CJK}]++)")
_PAIR = re.compile(r"\w++ \w++")  # pour cent
_NOUN = re.compile(rf"[ \u2009\u202f-]{_WORD}{{4}}")
_DIGITS = {sign: float(value) for value, sign in enumerate("一二三四五六七八九", 1)} | {"两": 2.0, "兩": 2.0}
_LONGEST = 40
_BARE_UNITS = {"%", "°", "°C", "MU", "min", "h", "day", "week", "month", "year"}
_NO_UNITS = {"x", "st", "nd", "rd", "th", "e", "er", "ème", "го", "й"}  # 2x2, 6th


_Words = dict[str, tuple[int, bool]]
"""Number words with their value, and whether they mean nothing else."""


@dataclass(frozen=True)
class Quantity:
    """A number as it stands in a text.

    readings: each a way to read it, as the values that it then is. unit: of `numbers.yaml`, "" for none. factor: what
    makes the values ones of that unit without prefix. counts: whether a noun follows instead ("6 fractions"). sure:
    whether it is a number, not a word like "one" or "sei".
    """

    readings: tuple[tuple[float, ...], ...]
    unit: str = ""
    factor: float = 1.0
    counts: bool = False
    sure: bool = True

    def based(self, value: float) -> tuple[float, str]:
        """A value in the unit without prefix: 50 of cGy are (0.5, "Gy"), of cm (500, "mm")."""
        scale = 1000.0 if self.unit == "m" else 1.0
        return float(f"{value * self.factor * scale:.9g}"), "mm" if self.unit == "m" else self.unit


def quantities(text: str, languages: tuple[str, ...] = ()) -> list[Quantity]:
    """The numbers of a text, in its order.

    Args:
        text: in any language.
        languages: whose number words count, BCP 47; without any, those of all.
    """
    found: list[tuple[int, int, Quantity]] = []
    plain = unicodedata.normalize("NFKC", text)
    for start, end, number in _numbers(plain, languages):
        unit, factor, after = _unit(plain, end)
        counts = not unit and (_NOUN.match(plain, end) is not None or plain[end : end + 1] in _lexicon().counters)
        found.append((start, after, replace(number, unit=unit, factor=factor, counts=counts)))
    for at in range(len(found) - 2, -1, -1):
        (start, end, number), (following, _, last) = found[at], found[at + 1]
        if not number.unit and last.unit and _joins(plain[end:following]):
            found[at] = (start, end, replace(number, unit=last.unit, factor=last.factor, counts=False))
    return [number for _, _, number in found]


def _numbers(text: str, languages: tuple[str, ...]) -> Iterator[tuple[int, int, Quantity]]:
    """Start, end and number; number words that follow one another are put together."""
    words = _words(languages)
    run: list[tuple[int, int, str]] = []
    for match in _NUMBER.finditer(text):
        if match["word"] or match["hangul"]:
            word = _folded(match[0]) if match["word"] else match[0]
            gap = text[run[-1][1] : match.start()] if run else ""
            if run and not re.fullmatch(r"[\s-]+", gap):
                yield from _composed(run, words)
                run = []
            if word in words or (run and word in _lexicon().between):
                run.append((match.start(), match.end(), word))
                continue
        yield from _composed(run, words)
        run = []
        if match["cjk"]:
            sure = text[match.end() : match.end() + 1] in _lexicon().counters and match[0] != "一"
            yield match.start(), match.end(), Quantity(((_cjk_value(match[0]),),), sure=sure)
        elif not match["word"] and not match["hangul"]:
            yield match.start(), match.end(), Quantity(_readings(match[0]))
    yield from _composed(run, words)


def _composed(run: list[tuple[int, int, str]], words: _Words) -> Iterator[tuple[int, int, Quantity]]:
    """What number words that follow one another mean: "twenty five" one number, "five and six" two."""
    value, sure, start, end = 0, False, 0, 0
    for begin, stop, word in run:
        number, certain = words.get(word, (0, False))
        if not number:
            continue
        small = value % 100
        if number == 100 and 0 < value < 10:
            value *= 100
        elif (value, number) == (4, 20) and word.startswith("vingt"):
            value = 80
        elif value and small % 10 == 0 and number < (100 if small == 0 else 20 if small in (60, 80) else 10):
            value += number  # soixante-douze, quatre-vingt-dix
        else:
            if value:
                yield start, end, Quantity(((float(value),),), sure=sure and value > 1)
            value, sure, start = number, certain, begin
        end = stop
        sure = sure or certain
    if value:
        yield start, end, Quantity(((float(value),),), sure=sure and value > 1)


def _readings(written: str) -> tuple[tuple[float, ...], ...]:
    """1,234.5 and 1 234 are thousands, 0,5 and .5 are halves; 1,234 is either, and 10,20,30 three numbers."""
    plain = re.sub(r"[\u2009\u202f]", " ", written)
    found: list[tuple[float, ...]] = []
    for thousands, point in ((",", "."), (".", ","), (" ", "."), (" ", ",")):
        if re.fullmatch(rf"(?!0)\d{{1,3}}(?:{re.escape(thousands)}\d{{3}})+(?:{re.escape(point)}\d+)?", plain):
            found.append((float(plain.replace(thousands, "").replace(point, ".")),))
    if re.fullmatch(r"(?:\d*\.|\d+,)?\d+", plain):
        found.append((float(plain.replace(",", ".")),))
    parts = re.split(r"[, ]", plain)
    listed = len(parts) > 2 and not found and all(re.fullmatch(r"\d+(?:\.\d+)?", part) for part in parts)
    if listed or re.fullmatch(r"\d{3}(?: \d{3})+", plain):
        found.append(tuple(map(float, parts)))
    return tuple(dict.fromkeys(found)) or (tuple(float(part) for part in re.findall(r"\d+", plain)),)


def _cjk_value(written: str) -> float:
    value = current = 0.0
    for sign in written:
        if sign in "十百":
            value += (current or 1.0) * (10 if sign == "十" else 100)
            current = 0.0
        else:
            current = _DIGITS[sign] if not current else current * 10 + _DIGITS[sign]
    return value + current


def _unit(text: str, end: int) -> tuple[str, float, int]:
    """The unit behind a number, its factor, and where it ends; a word that is none counts as one if it touches."""
    match = _UNIT.match(text, end)
    if match is None:
        return "", 1.0, end
    lexicon, written = _lexicon(), match["unit"]
    known = lexicon.unit(written)
    if known is None and re.match(rf"[{_CJK}]", written):
        lengths = range(min(len(written), 8), 0, -1)
        known = next((unit for length in lengths if (unit := lexicon.unit(written[:length]))), None)
    if known is None and (pair := _PAIR.match(text, match.start("unit"))):
        known = lexicon.unit(pair[0])
    if known is not None:
        return *known, match.end()
    if match["gap"] or re.match(rf"[{_CJK}]", written) or written.casefold() in _NO_UNITS:
        return "", 1.0, end
    return written.casefold(), 1.0, match.end()


def _joins(between: str) -> bool:
    word = between.strip(" ,;/-–—~")
    return between != "" and (not word or word.casefold() in _lexicon().ranges)


def _folded(word: str) -> str:
    """In small letters, without accents."""
    return "".join(sign for sign in unicodedata.normalize("NFD", word.casefold()) if not unicodedata.combining(sign))


class _Lexicon:
    """`numbers.yaml`, made ready."""

    def __init__(self, data: dict[str, Any]) -> None:
        values = [*range(1, 21), *range(30, 101, 10)]
        self.languages: dict[str, _Words] = {}
        for language, listed in data["words"].items():
            forms = [[_plain_word(form) for form in some.split("/")] for some in listed.split()]
            by_value = dict(zip(values, forms, strict=True))
            doubtful = {_plain_word(word) for word in data["doubtful"].get(language, ())}
            words = {form: (value, form not in doubtful) for value, some in by_value.items() for form in some}
            form = data["joined"].get(language, "{ten} {unit}")
            for tens, units in product(range(20, 91, 10), range(1, 10)):
                for ten, unit in product(by_value[tens], by_value[units]):
                    for start in (ten, ten[:-1]):  # ventuno, veintidós
                        words.setdefault(form.format(unit=unit, ten=start), (tens + units, True))
            self.languages[language] = words
        self.between = {_folded(word) for word in data["between"]}
        self.ranges = set(data["ranges"])
        self.counters = set(data["counters"])
        self._symbols: dict[str, tuple[str, float]] = {}
        self._names: dict[str, tuple[str, float]] = {}
        prefixes = [(1.0, [""], [""]), *data["prefixes"]]
        for unit, (symbols, names) in data["units"].items():
            for factor, signs, titles in prefixes[:1] if unit in _BARE_UNITS else prefixes:
                self._symbols |= {f"{sign}{symbol}": (unit, factor) for sign in signs for symbol in symbols}
                self._names |= {_plain_word(f"{title}{name}"): (unit, factor) for title in titles for name in names}

    def unit(self, written: str) -> tuple[str, float] | None:
        """The unit that a symbol or a name means, and its factor; cm2 and cm3 are units of their own."""
        if len(written) > _LONGEST:
            return None
        power = written[-1] if written[-1] in "23" and len(written) > 1 else ""
        bare = written.removesuffix(power)
        known = self._symbols.get(bare)
        if known is None:
            name = _plain_word(bare)
            known = self._names.get(name)
            for length in range(len(name), 2, -1) if known is None else ():
                known = known or self._names.get(f"{name[:length]}*")
        if known is None or not power:
            return known
        return f"{known[0]}{power}", known[1] ** int(power)


def _plain_word(word: str) -> str:
    return word if re.search(f"[{_CJK}]", word) else _folded(word)


@functools.cache
def _lexicon() -> _Lexicon:
    return _Lexicon(yaml.safe_load(Path(__file__).with_name("numbers.yaml").read_text(encoding="utf-8")))


@functools.cache
def _words(languages: tuple[str, ...]) -> _Words:
    known = _lexicon().languages
    return {word: said for one in languages or known for word, said in known.get(one, {}).items()}
