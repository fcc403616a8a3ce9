"""Finding the terms of an editable list in texts of any language, by reading each text once.

Words match whole; a trailing * stands for any ending, a leading one for any beginning; hyphens and spaces are one.
Scripts without spaces are searched for as they stand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_Phrase = tuple[tuple[str, ...], int]
_REMEMBERED_WORDS = 200_000
_UNSPACED = re.compile(r"[぀-ヿ㐀-鿿가-힯]")
_WORDS = re.compile(r"[^\W぀-ヿ㐀-鿿가-힯]+|[぀-ヿ㐀-鿿가-힯]+")  # CT in CT扫描 is a word


class TermIndex:
    """Concepts, each a list of terms, by their terms' first words.

    Args:
        concepts: the terms of each concept; concepts are numbered in this order.
    """

    def __init__(self, concepts: Sequence[Sequence[str]]) -> None:
        self._exact: dict[str, list[_Phrase]] = {}
        self._starts: dict[str, list[_Phrase]] = {}
        self._ends: dict[str, list[_Phrase]] = {}
        self._anywhere: list[tuple[str, int]] = []
        self._known: dict[str, tuple[_Phrase, ...]] = {}
        for number, terms in enumerate(concepts):
            for term in map(plain, terms):
                words = tuple(re.findall(r"\*?\w+\*?", term))
                first = words[0]
                if _UNSPACED.search(term):
                    self._anywhere.append((term, number))
                elif first[0] == "*":
                    self._ends.setdefault(first.strip("*"), []).append((words, number))
                elif first[-1] == "*":
                    self._starts.setdefault(first.strip("*"), []).append((words, number))
                else:
                    self._exact.setdefault(first, []).append((words, number))
        self._start_lengths = sorted({len(start) for start in self._starts})

    def found(self, text: str) -> set[int]:
        """The numbers of the concepts that a text names."""
        searched = plain(text)
        words = _WORDS.findall(searched)
        unspaced = self._anywhere if _UNSPACED.search(searched) else ()
        found = {number for term, number in unspaced if term in searched}
        phrases = {word: begun for word in set(words) if (begun := self._beginning(word))}
        for place, word in enumerate(words):
            if word in phrases:
                found.update(number for phrase, number in phrases[word] if _fits(phrase, words, place))
        return found

    def _beginning(self, word: str) -> tuple[_Phrase, ...]:
        """The phrases that may begin with a word; remembered, since texts share most of their words."""
        known = self._known.get(word)
        if known is None:
            phrases = [*self._exact.get(word, ())]
            for length in self._start_lengths:
                phrases += self._starts.get(word[:length], ())
            for end, some in self._ends.items():
                if end in word:
                    phrases += some
            if len(self._known) >= _REMEMBERED_WORDS:
                self._known.clear()
            known = self._known[word] = tuple(phrases)
        return known


def _fits(phrase: tuple[str, ...], words: list[str], place: int) -> bool:
    following = words[place : place + len(phrase)]
    return len(following) == len(phrase) and all(map(_matches, phrase, following))


def _matches(term: str, word: str) -> bool:
    bare = term.strip("*")
    if term[0] == "*":
        return bare in word if term[-1] == "*" else word.endswith(bare)
    return word.startswith(bare) if term[-1] == "*" else word == bare


def terms_of(by_language: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The terms of a concept, of all languages.

    Raises:
        ValueError: one is empty, or there are none.
    """
    terms = tuple(dict.fromkeys(plain(str(term)).strip() for some in by_language.values() for term in some))
    if not terms or not all(re.search(r"\w", term) for term in terms):
        raise ValueError("an empty term")
    return terms


def plain(text: str) -> str:
    """As terms are compared: in small letters, without hyphens."""
    return re.sub(r"[‐‑‒–—-]", " ", text.casefold())
