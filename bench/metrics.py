"""When two answers count as the same, and how near they come: normalisation, exact match and overlap measures.

Both the reference and the model's answer pass through `normalise`, in this order:

1. Unicode NFKC, then case folding: "２ Gy" is "2 gy", "STRASSE" is "strasse".
2. Numbers to one spelling: "0.50" is "0.5", "+3" is "3", "007" is "7", "1,5" is "1.5". What groups thousands goes: a
   comma in English and Chinese ("1,000" is "1000"), a point or a space in German, Spanish, French and Portuguese
   ("1.000" and "1 000" are "1000"); it stands before exactly three digits, and not behind a zero ("0,500" is "0.5").
   "0.5×6" and "0.5 Gy x 6" are "0.5 x 6", "5cm" is "5 cm". A Chinese numeral below a hundred is a number before a
   measure word ("共三次" is "共3次", "两个" is "2个").
3. Punctuation to spaces (Unicode category P), but for the point and the minus sign of a number.
4. The unit "Gy" (gray, grays, 戈瑞) behind a number goes ("3 Gy" is "3"): the questions name their unit.
5. Articles go, by language, unless nothing else is left: English a, an, the; German, Spanish, French and Portuguese
   theirs ("das Knie" is "knie", "l'épaule" is "épaule"). Chinese has none.
6. Words for zero to ten become digits, by language ("un" is "1" where it is the whole answer).
7. Chinese is written without spaces: those beside a Chinese character go ("共 3 次" is "共3次").
8. A whole answer that means yes or no in its language becomes "yes" or "no"; of another language than the six, in
   any of them.

Exact match compares the normalised texts. One rule more for a reference of "yes" or "no": there the answer's first
word decides, so that "Yes, two of them." is "yes"; in Chinese, which does not space words, how the first clause begins
("能看到" is yes, "对不起" is not). It must mean yes or no in the question's language ("No joelho" is Portuguese for "in
the knee"), and the answer must not say that the picture does not tell (`bench.wordings`): "no se puede saber" is
neither.

Three measures say how near an open answer comes, each from 0 to 1 on the normalised texts:

- Token F1 is SQuAD's, over words, with each Chinese character a word of its own.
- ROUGE-L is rouge-score's F measure of the longest common subsequence, over the same words: its own tokenizer knows
  the letters a to z only.
- chrF is sacreBLEU's chrF2 of one sentence, over characters: no words are needed, so it is the measure for languages
  that do not space them, and kind to inflected ones.

All three count "1.0 Gy left" against "6.0 Gy left" as near: they grade wording, exact match judges the fact. Similarity
of sentence embeddings, which does so even more, is for long answers only: `bench.similarity`.

`RULES` counts changes of these rules: scores judged by other rules are not compared.

Source: SQuAD v1.1 `evaluate-v1.1.py` (token F1, English articles); MLQA `mlqa_evaluation_v1.py` (German and Spanish
articles, Chinese characters as words); VQA v2 `vqaEval.py` (number words); Lin, "ROUGE", ACL 2004 workshop; Popović,
"chrF", WMT 2015.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ldrt_edge.bench.wordings import base, fold, wordings
from ldrt_edge.dataset import Row
from ldrt_edge.errors import require

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.chrf import CHRF

RULES = 3

_YES = {
    "en": r"(?:yes|yeah|yep|true)(?!\w)", "de": r"(?:ja|jawohl)(?!\w)", "es": r"s[íi](?!\w)", "fr": r"oui(?!\w)",
    "pt": r"sim(?!\w)",
    "zh": "(?:对|對|对的|會|会|能|可以)$|是(?!否|不是)的?|有(?!没|沒|无|可能)|(?:能够?|可以|看得)[看见到清]|看[到见]"
          "|显示|存在",
}  # fmt: skip
_NO = {
    "en": r"(?:no|nope|false)(?!\w)", "de": r"nein(?!\w)", "es": r"no(?!\w)", "fr": r"non(?!\w)",
    "pt": r"n[ãa]o(?!\w)",
    "zh": "(?:不|否|不对|不對)$|不(?:是|会|會|能|可以|可见|存在|显示)|[没沒无](?!法)有?|看不[到见]",
}  # fmt: skip
"""How answers begin that mean yes and no, by language."""
_NUMBER_WORDS = {
    language: {word: str(value) for value, words in enumerate(line.split()) for word in words.split("/")}
    for language, line in {
        "en": "zero one two three four five six seven eight nine ten",
        "de": "null eins/ein/eine zwei drei vier fünf sechs sieben acht neun zehn",
        "es": "cero uno/un/una dos tres cuatro cinco seis siete ocho nueve diez",
        "fr": "zéro un/une deux trois quatre cinq six sept huit neuf dix",
        "pt": "zero um/uma dois/duas três quatro cinco seis sete oito nove dez",
        "zh": "零 一 二/两 三 四 五 六 七 八 九 十",
    }.items()
}
_ARTICLES = {
    language: frozenset(words.split())
    for language, words in {
        "en": "a an the",
        "de": "der die das den dem des ein eine einen einem eines einer",
        "es": "el la los las un una unos unas",
        "fr": "le la l les un une des",
        "pt": "o a os as um uma uns umas",
    }.items()
}
_GROUPS = {"en": ",", "zh": ","} | dict.fromkeys(("de", "es", "fr", "pt"), ".")
"""What groups thousands; where it is the point, a space does too."""
_SPACED_GROUPS = re.compile(r"(?<![\w.,])[1-9]\d{0,2}(?: \d{3})+(?!\d)")
_DIGITS = "零一二三四五六七八九"
_CHINESE_NUMBER = re.compile(
    f"(?<![{_DIGITS}两十百千万])(?:([{_DIGITS}])?十([{_DIGITS}])?|([{_DIGITS}两]))"
    r"(?=\s*(?:[次个個条條束处處天周张張种種根例倍层層节節块塊枚度岁年月日厘毫]|gy|戈瑞))"
)
_NUMBER = re.compile(r"(?<![.,])(?<![^\W\u3400-\u9fff])([-−+])?(\d+(?:[.,]\d+)*)(?![.,]?\d)(?=([^\W\d_])?)")
_TIMES = re.compile(r"(?<=\d)\s*(?:gy|grays?|戈瑞)?\s*[x×]\s*(?=\d)")
_UNIT = re.compile(r"(?<=\d)\s*(?:(?:gy|grays?)(?![a-z])|戈瑞)")
_CHINESE = re.compile(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+")
_BESIDE_CHINESE = re.compile(r"(?<=[\u3400-\u9fff])\s+|\s+(?=[\u3400-\u9fff])")
_POINT, _MINUS = "\ue000", "\ue001"  # private use: they survive the removal of punctuation


def correct(row: Row, answer: str) -> bool:
    """Whether `answer` is the row's reference answer, after normalisation (see the module's docstring)."""
    wanted, given = normalise(row.answer, row.language), normalise(answer, row.language)
    return polarity(answer, row.language) == wanted if wanted in ("yes", "no") else given == wanted


def polarity(answer: str, language: str) -> str:
    """"yes", "no", or "" where an answer begins with neither, or says that the picture does not tell."""
    said = _said(answer, base(language))
    if not said or wordings().abstains(answer, language):
        return ""
    return next((meaning for meaning, form in _meanings(base(language)).items() if form.match(said[0])), "")


def token_f1(row: Row, answer: str) -> float:
    """Harmonic mean of word precision and recall between `answer` and the reference, 0 to 1."""
    wanted = Counter(words(normalise(row.answer, row.language)))
    given = Counter(words(normalise(answer, row.language)))
    if not wanted or not given:
        return float(wanted == given)
    shared = (wanted & given).total()
    return 2 * shared / (wanted.total() + given.total())


def rouge_l(row: Row, answer: str) -> float:
    """ROUGE-L between `answer` and the reference, 0 to 1.

    Raises:
        MissingExtraError: rouge-score is not installed.
    """
    wanted, given = normalise(row.answer, row.language), normalise(answer, row.language)
    return float(_rouge().score(wanted, given)["rougeL"].fmeasure)


def chrf(row: Row, answer: str) -> float:
    """chrF2 between `answer` and the reference, 0 to 1.

    Raises:
        MissingExtraError: sacreBLEU is not installed.
    """
    wanted, given = normalise(row.answer, row.language), normalise(answer, row.language)
    return float(_chrf().sentence_score(given, [wanted]).score) / 100


def overlap_installed() -> bool:
    """Whether the extra `bench`, which `rouge_l` and `chrf` need, is installed."""
    return all(find_spec(name) for name in ("rouge_score", "sacrebleu"))


def normalise(text: str, language: str) -> str:
    """One spelling for all answers that mean the same; `language` is BCP 47 ("en", "zh-Hans")."""
    whole = _BESIDE_CHINESE.sub("", " ".join(_said(text, base(language))))
    return next((meaning for meaning, form in _meanings(base(language)).items() if form.fullmatch(whole)), whole)


def words(normalised: str) -> list[str]:
    """The words of a normalised answer; each Chinese character is one."""
    return _CHINESE.findall(normalised)


class _Words:
    """The tokenizer that rouge-score is given."""

    @staticmethod
    def tokenize(text: str) -> Sequence[str]:
        return words(text)


@cache
def _rouge() -> RougeScorer:
    scorer: RougeScorer = require("rouge_score.rouge_scorer", "bench").RougeScorer(["rougeL"], tokenizer=_Words())
    return scorer


@cache
def _chrf() -> CHRF:
    scorer: CHRF = require("sacrebleu.metrics.chrf", "bench").CHRF()
    return scorer


@cache
def _meanings(language: str) -> Mapping[str, re.Pattern[str]]:
    """How answers begin that mean "yes" and "no"."""
    told = {"yes": _YES, "no": _NO}
    return {m: re.compile(by.get(language) or "|".join(by.values())) for m, by in told.items()}


def _said(text: str, language: str) -> list[str]:
    """The words of an answer by rules 1 to 6; in Chinese its clauses, as far as spaces and punctuation divide them."""
    folded = _TIMES.sub(" x ", fold(text))
    if language == "zh":
        folded = _CHINESE_NUMBER.sub(_chinese_number, folded)
    if _GROUPS.get(language) == ".":
        folded = _SPACED_GROUPS.sub(lambda found: found[0].replace(" ", ""), folded)
    numbered = _NUMBER.sub(lambda found: _number(found, language), folded)
    spaced = "".join(" " if unicodedata.category(letter).startswith("P") else letter for letter in numbered)
    said = _UNIT.sub(" ", spaced.replace(_POINT, ".").replace(_MINUS, "-")).split()
    kept = [word for word in said if word not in _ARTICLES.get(language, ())] or said
    numbers = _NUMBER_WORDS.get(language, {})
    return [numbers.get(word, word) for word in kept]


def _chinese_number(found: re.Match[str]) -> str:
    tens, ones, one = found.groups()
    if one:
        return _NUMBER_WORDS["zh"][one]
    return str(10 * (_DIGITS.index(tens) if tens else 1) + (_DIGITS.index(ones) if ones else 0))


def _number(found: re.Match[str], language: str) -> str:
    sign, digits, letter = found.groups()
    mark = _GROUPS.get(language)
    if mark and re.fullmatch(rf"[1-9]\d{{0,2}}(?:\{mark}\d{{3}})+(?:[.,]\d+)?", digits):
        digits = digits.replace(mark, "")
    parts = re.split(r"[.,]", digits)
    if len(parts) > 2:  # a date, a version: numbers in a row
        return " ".join(part.lstrip("0") or "0" for part in parts)
    whole, _, fraction = digits.replace(",", ".").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    minus = _MINUS if sign in ("-", "−") and (whole, fraction) != ("0", "") else ""
    return minus + whole + (_POINT + fraction if fraction else "") + (" " if letter else "")
