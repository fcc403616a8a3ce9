"""Which language a text is in: by the article's own word first, else by its letters.

The identifier is py3langid (BSD, its weights in the wheel). A short caption says little ("CT 1.0 Gy × 6"), so it is
read together with the title and the abstract around it; where that is not enough either, the language stays unknown.
"""

from __future__ import annotations

import re
from typing import Literal

ENOUGH_LETTERS = 40
_READ_LETTERS = 400  # more does not make it surer, and takes its time
_TAG = re.compile(r"[a-z]{2,3}", re.I)
_IDEOGRAPH = re.compile(r"[぀-ヿ㐀-鿿가-힯]")
_ALIASES = {"nb": "no", "nn": "no", "zho": "zh", "chi": "zh", "eng": "en", "deu": "de", "ger": "de", "fra": "fr",
            "fre": "fr", "spa": "es", "por": "pt", "ita": "it", "rus": "ru", "jpn": "ja", "kor": "ko", "pol": "pl"}

Source = Literal["declared", "identified"]


def language_of(declared: str, said: str, around: str = "") -> tuple[str, Source] | None:
    """The language of `said` as a two-letter tag and how it is known; None where nothing tells.

    Args:
        declared: the article's `xml:lang`, "" where it has none.
        said: the text in question.
        around: more text in the same language, for when `said` is short.
    """
    base = declared.replace("_", "-").split("-")[0].lower()
    if _TAG.fullmatch(base) and base not in ("und", "mul", "zxx"):
        return _ALIASES.get(base, base), "declared"
    read = said if letters(said) >= ENOUGH_LETTERS else f"{said} {around}"
    if letters(read) < ENOUGH_LETTERS:
        return None
    import py3langid

    found = str(py3langid.classify(read[:_READ_LETTERS])[0])
    return _ALIASES.get(found, found), "identified"


def letters(said: str) -> int:
    """How many letters a text has; an ideograph or a syllable counts as three."""
    return sum(map(str.isalpha, said)) + 2 * len(_IDEOGRAPH.findall(said))
