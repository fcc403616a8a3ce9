"""The words that probes ask with, and those by which answers are read, in six languages: `wordings.yaml`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

PRIMARY = "en"
_SPACED, _CHINESE = r"(?<!\w){}(?!\w)", "(?<!不)(?<!不太){}"
_ENDS = " .,;:!?。、¡¿…\"'“”«»"


@dataclass(frozen=True)
class Wordings:
    """By language: `presence` with a place for a name, `unanswerable` questions, `abstention`'s signs, `hedging` words.

    abstention: regular expressions, searched for in the folded answer without punctuation at its ends.
    names: English name of a structure to its names in other languages.
    """

    version: int
    presence: Mapping[str, tuple[str, ...]]
    names: Mapping[str, Mapping[str, str]]
    unanswerable: Mapping[str, tuple[str, ...]]
    abstention: Mapping[str, tuple[str, ...]]
    hedging: Mapping[str, tuple[str, ...]]

    def name(self, structure: str, language: str) -> str | None:
        """What a structure is called in a language; None where that is not known."""
        return structure if language == PRIMARY else self.names.get(structure, {}).get(language)

    def abstains(self, answer: str, language: str) -> bool:
        """Whether an answer says that the picture does not tell."""
        said = fold(answer).replace("’", "'").strip(_ENDS)
        return any(sign.search(said) for sign in _signs(base(language)))

    def hedges(self, text: str, language: str) -> dict[str, int]:
        """How often each hedging word of the language stands in a text, those that do not left out."""
        said, patterns = fold(text), _patterns(base(language))
        found = {word: len(pattern.findall(said)) for word, pattern in patterns.items()}
        return {word: count for word, count in found.items() if count}


@cache
def wordings() -> Wordings:
    """The words that ship with the package."""
    data = yaml.safe_load(resources.files("ldrt_edge.bench").joinpath("wordings.yaml").read_text(encoding="utf-8"))
    lists = {
        name: {language: tuple(words) for language, words in data[name].items()}
        for name in ("presence", "unanswerable", "abstention", "hedging")
    }
    return Wordings(version=data["version"], names=data["names"], **lists)


def fold(text: str) -> str:
    """One spelling of what Unicode can spell in several ways: NFKC, without case ("Weiß" is "weiss")."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def base(language: str) -> str:
    """A BCP 47 tag without its region: "zh" of "zh-Hans"."""
    return language.partition("-")[0].lower()


@cache
def _signs(language: str) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(fold(sign)) for sign in wordings().abstention.get(language, ()))


@cache
def _patterns(language: str) -> dict[str, re.Pattern[str]]:
    """Of hedging words: whole words, but in Chinese, which does not space them; there none behind a "not"."""
    form = _CHINESE if language == "zh" else _SPACED
    return {word: re.compile(form.format(re.escape(fold(word)))) for word in wordings().hedging.get(language, ())}
