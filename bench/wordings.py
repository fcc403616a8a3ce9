"""The words that probes ask with, and those by which answers are read, in six languages: `wordings.yaml`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import yaml

PRIMARY = "en"
_SPACED = r"(?<!\w){}(?!\w)"


@dataclass(frozen=True)
class Wordings:
    """By language: `presence` with a place for a name, `unanswerable` questions, `abstention`'s signs, `hedging` words.

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
        said = answer.casefold().replace("’", "'")
        return any(sign in said for sign in self.abstention.get(base(language), ()))

    def hedges(self, text: str, language: str) -> dict[str, int]:
        """How often each hedging word of the language stands in a text, those that do not left out."""
        patterns = _patterns(base(language))
        found = {word: len(pattern.findall(text.casefold())) for word, pattern in patterns.items()}
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


def base(language: str) -> str:
    """A BCP 47 tag without its region: "zh" of "zh-Hans"."""
    return language.partition("-")[0].lower()


@cache
def _patterns(language: str) -> dict[str, re.Pattern[str]]:
    """Of hedging words: whole words, but in Chinese, which does not space them."""
    form = "{}" if language == "zh" else _SPACED
    return {word: re.compile(form.format(re.escape(word))) for word in wordings().hedging.get(language, ())}
