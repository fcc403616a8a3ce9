"""When two answers count as the same: normalisation, exact match and token F1.

Both the reference and the model's answer pass through `normalise`, in this order:

1. Unicode NFKC, then case folding: "２ Gy" is "2 gy", "STRASSE" is "strasse".
2. Numbers to one spelling: "0.50" is "0.5", "+3" is "3", "007" is "7". A comma before digits is a decimal comma
   ("1,0" is "1"), but in English and Chinese one before exactly three digits groups thousands ("1,000" is "1000").
   "6×0.5" is "6 x 0.5", "5cm" is "5 cm".
3. Punctuation to spaces (Unicode category P), but for the point and the minus sign of a number.
4. The unit "Gy" behind a number goes ("3 Gy" is "3"): the questions name their unit.
5. English only: the articles a, an, the go; zero … ten become digits (the VQA v2 evaluator's rule).
6. A whole answer that means yes or no, in one of the six languages, becomes "yes" or "no".

Exact match compares the normalised texts. One rule more for a reference of "yes" or "no": there the answer's first
word decides, so that "Yes, two of them." is "yes"; it must be a word for yes or no, so "cannot be told" stays wrong.

Token F1 is SQuAD's, over the words of the normalised texts, with each Chinese character a word of its own.

Source: SQuAD v1.1 `evaluate-v1.1.py` (token F1, articles); VQA v2 `vqaEval.py` (number words).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from ldrt_edge.dataset import Row

_YES = {"yes", "yeah", "yep", "true", "ja", "jawohl", "sí", "si", "oui", "sim", "是", "是的", "有", "对", "會", "会"}
_NO = {"no", "nope", "false", "nein", "non", "não", "nao", "否", "不", "不是", "没有", "沒有", "不会", "不會", "不对"}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_DIGITS)}
_ARTICLES = {"a", "an", "the"}
_NUMBER = re.compile(r"(?<![\w.,])([-−+])?(\d+(?:[.,]\d+)*)(?![.,]?\d)(?=([^\W\d_])?)")
_TIMES = re.compile(r"(?<=\d)\s*[x×]\s*(?=\d)")
_UNIT = re.compile(r"(?<=\d)\s*gy(?![a-z])")
_CHINESE = re.compile(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+")
_POINT, _MINUS = "\ue000", "\ue001"  # private use: they survive the removal of punctuation


def correct(row: Row, answer: str) -> bool:
    """Whether `answer` is the row's reference answer, after normalisation (see the module's docstring)."""
    wanted, given = normalise(row.answer, row.language), normalise(answer, row.language)
    if wanted in ("yes", "no"):
        return _leading_polarity(given) == wanted
    return given == wanted


def token_f1(row: Row, answer: str) -> float:
    """Harmonic mean of word precision and recall between `answer` and the reference, 0 to 1."""
    wanted = Counter(words(normalise(row.answer, row.language)))
    given = Counter(words(normalise(answer, row.language)))
    if not wanted or not given:
        return float(wanted == given)
    shared = (wanted & given).total()
    return 2 * shared / (wanted.total() + given.total())


def normalise(text: str, language: str) -> str:
    """One spelling for all answers that mean the same; `language` is BCP 47 ("en", "zh-Hans")."""
    language = language.partition("-")[0].lower()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    numbered = _NUMBER.sub(lambda found: _number(found, language), _TIMES.sub(" x ", folded))
    spaced = "".join(" " if unicodedata.category(letter).startswith("P") else letter for letter in numbered)
    unitless = _UNIT.sub(" ", spaced.replace(_POINT, ".").replace(_MINUS, "-"))
    kept = unitless.split()
    if language == "en":
        kept = [_NUMBER_WORDS.get(word, word) for word in kept if word not in _ARTICLES]
    whole = " ".join(kept)
    return _polarity(whole) or whole


def words(normalised: str) -> list[str]:
    """The words of a normalised answer; each Chinese character is one."""
    return _CHINESE.findall(normalised)


def _polarity(word: str) -> str:
    return "yes" if word in _YES else "no" if word in _NO else ""


def _leading_polarity(normalised: str) -> str:
    """What the first word says; in Chinese, where words are not spaced, the longest beginning that is one."""
    first = normalised.partition(" ")[0]
    if not _CHINESE.match(first) or first.isascii():
        return _polarity(first)
    return next((p for end in (3, 2, 1) if (p := _polarity(first[:end]))), "")


def _number(found: re.Match[str], language: str) -> str:
    sign, digits, letter = found.groups()
    groups = re.split(r"([.,])", digits)
    behind_commas = [group for mark, group in zip(groups[1::2], groups[2::2], strict=True) if mark == ","]
    if language in ("en", "zh") and all(len(group) == 3 for group in behind_commas):
        digits = digits.replace(",", "")
    parts = re.split(r"[.,]", digits)
    if len(parts) > 2:  # a date, a version: numbers in a row
        return " ".join(part.lstrip("0") or "0" for part in parts)
    whole, _, fraction = digits.replace(",", ".").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    minus = _MINUS if sign in ("-", "−") and (whole, fraction) != ("0", "") else ""
    return minus + whole + (_POINT + fraction if fraction else "") + (" " if letter else "")
