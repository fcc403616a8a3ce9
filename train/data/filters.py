"""The steps that keep a pair or drop it, each with a name that is counted and a reason for each thing dropped.

Articles pass `ARTICLE_STEPS`, then each of their pictures `PAIR_STEPS`; the last of those (the duplicates) need to
know all other pairs and live in `duplicates.py`. The order here is the order of the funnel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.artifact import Json
from ldrt_edge.errors import ConfigError
from ldrt_edge.train.data.articles import Article, Figure
from ldrt_edge.train.data.language import letters
from ldrt_edge.train.data.licences import OPEN, is_allowed
from ldrt_edge.train.data.relevance import Terms

ARTICLE_STEPS = {
    "refused": "not opened: a link, a bomb, a damaged package",
    "unreadable": "not an article that can be read",
    "repeated article": "the same article in another package",
    "licence": "not under an allowed licence",
    "off topic": "below the term list's threshold",
    "no figure": "an article without figures",
}
PAIR_STEPS = {
    "scanned page": "of a PDF: a picture of a page, without text",
    "licence of the figure": "reprinted under another licence, or none",
    "equation, table or logo": "not a figure",
    "caption too short": "says too little",
    "language": "not wanted, or not to be told",
    "no picture named": "a caption without a graphic",
    "picture not found": "no file that the XML's name means",
    "picture unreadable": "damaged, too large, or of another format",
    "picture too small": "",
    "picture blank": "",
    "repeated picture": "the same picture with a caption in the same language",
    "near picture": "nearly the same picture",
    "near caption": "nearly the same caption",
    "struck": "by a person, in data view",
}
_NAME = re.compile(
    r"(?<![a-z])logos?(?![a-z])|orcid|crossmark|banner|creative[-_]?commons|(?:^|[-_.])(?:icons?|cc[-_]by|inline)(?![a-z])|"
    r"[-_.](?:e|t|i|eq|equ|tab|table)\d{2,4}(?:\.|$)", re.I,
)
_LABEL = re.compile(r"^(?:table|tabla|tabela|tabelle|tableau|tab|cuadro|quadro|equation|scheme eq)\b", re.I)
_STRIP = 8.0


@dataclass(frozen=True)
class Settings:
    """What `data curate` keeps.

    licences: SPDX names, a name without a version stands for all. terms: None keeps every topic. languages: two-letter
    tags, none for all. max_side: larger pictures are scaled down to it. panels: cut compound figures where possible.
    """

    licences: tuple[str, ...] = OPEN
    terms: Terms | None = None
    languages: tuple[str, ...] = ()
    min_caption_letters: int = 20
    min_side: int = 96
    max_side: int = 1344
    panels: bool = True

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: a setting out of range.
        """
        if not 8 <= self.min_side <= self.max_side:
            raise ConfigError(f"--min-side {self.min_side}, --max-side {self.max_side}: from 8, in this order")
        if not self.licences:
            raise ConfigError("no licence is allowed: nothing would be kept")
        unknown = [tag for tag in self.languages if not re.fullmatch(r"[a-z]{2,3}", tag)]
        if unknown:
            raise ConfigError(f"--languages {','.join(unknown)}: two-letter tags such as en,de")

    def config(self) -> dict[str, Json]:
        """For the manifest."""
        return dict(asdict(self))


@dataclass(frozen=True)
class Drop:
    """At which step something is dropped, and why."""

    step: str
    reason: str


def judge_article(article: Article, settings: Settings) -> tuple[Drop | None, float]:
    """Why an article is dropped, if it is, and its relevance (0 when every topic is kept)."""
    if not is_allowed(article.licence, settings.licences):
        return Drop("licence", article.licence), 0.0
    score = 0.0
    if settings.terms is not None:
        texts = [article.abstract, *(figure.caption for figure in article.figures)]
        score = settings.terms.score([*article.titles.values(), *article.keywords], texts)
        if score < settings.terms.threshold:
            return Drop("off topic", f"score {score:g} of {settings.terms.threshold:g}"), score
    if not article.figures:
        aside = ", ".join(f"{count} {what}" for what, count in sorted(article.aside.items()))
        return Drop("no figure", aside), score
    return None, score


def judge_figure(figure: Figure, settings: Settings) -> Drop | None:
    """Why a figure is dropped before its picture is looked at."""
    if figure.licence is not None and not is_allowed(figure.licence, settings.licences):
        return Drop("licence of the figure", figure.licence)
    if _LABEL.search(figure.label):
        return Drop("equation, table or logo", f"labelled {figure.label}")
    if letters(figure.caption) < settings.min_caption_letters:
        return Drop("caption too short", f"{letters(figure.caption)} letters")
    if not figure.pictures:
        return Drop("no picture named", "")
    return None


def judge_name(name: str) -> Drop | None:
    """Why a picture is dropped for its name alone."""
    if found := _NAME.search(name.rsplit("/", 1)[-1]):
        return Drop("equation, table or logo", f"named like one ({found[0]})")
    return None


def judge_pixels(rgb: NDArray[np.uint8], settings: Settings) -> Drop | None:
    """Why a picture is dropped for its pixels, (height, width, 3)."""
    height, width = rgb.shape[:2]
    if min(height, width) < settings.min_side:
        return Drop("picture too small", f"{width}×{height}")
    if max(height, width) > _STRIP * min(height, width):
        return Drop("equation, table or logo", f"a strip of {width}×{height}")
    values = rgb[:: max(1, height // 256), :: max(1, width // 256)].reshape(-1, 3)
    commonest = np.median(values, axis=0)
    differs = (np.abs(values.astype(np.int16) - commonest) > 12).any(axis=1).mean()
    if differs < 0.002:
        return Drop("picture blank", f"{differs:.2%} of its pixels differ from the rest")
    return None


def funnel(counts: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """The funnel as (what, step, count) in order: what came in, what each step dropped, what was kept."""
    return [
        ("articles", "found", counts.get("articles", 0)),
        *(("articles", step, counts.get(step, 0)) for step in ARTICLE_STEPS),
        ("pairs", "found", counts.get("candidates", 0)),
        *(("pairs", step, counts.get(step, 0)) for step in PAIR_STEPS),
        ("pairs", "kept", counts.get("kept", 0)),
    ]
