"""Whether an article is about low-dose radiation therapy: a score by a term list that a physicist can edit.

The list (`relevance.yaml`, or a file of your own) holds concepts with a weight and their terms in many languages. A
concept found in title or keywords counts in full, elsewhere by half; an article is kept from `threshold` on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from ldrt_edge.errors import ConfigError
from ldrt_edge.train.data.terms import TermIndex, terms_of

_ELSEWHERE = 0.5
_SHIPPED = Path(__file__).with_name("relevance.yaml")


@dataclass(frozen=True)
class Terms:
    """A term list: the threshold and, for each concept, its weight and terms."""

    threshold: float
    concepts: tuple[tuple[str, float, tuple[str, ...]], ...]

    def score(self, headings: Iterable[str], texts: Iterable[str]) -> float:
        """The score of an article by its headings (title, keywords) and other texts (abstract, captions)."""
        in_headings, elsewhere = (self._index.found(" | ".join(said)) for said in (headings, texts))
        total = 0.0
        for number, (_, weight, _) in enumerate(self.concepts):
            if number in in_headings:
                total += weight
            elif number in elsewhere:
                total += weight * _ELSEWHERE
        return round(total, 2)

    @functools.cached_property
    def _index(self) -> TermIndex:
        return TermIndex([terms for _, _, terms in self.concepts])


def load_terms(path: Path | None = None) -> Terms:
    """Read a term list; the shipped one without a path.

    Raises:
        ConfigError: no such file, or not a term list.
    """
    path = path or _SHIPPED
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        concepts = []
        for name, concept in data["concepts"].items():
            concepts.append((str(name), float(concept["weight"]), terms_of(concept["terms"])))
        return Terms(float(data["threshold"]), tuple(concepts))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        shape = "threshold, concepts: NAME: weight, terms: LANGUAGE: [..]"
        raise ConfigError(f"{path}: not a term list ({shape}): {error}") from error
