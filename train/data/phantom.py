"""Phantom treatment plans: pictures drawn from a seed, questions whose answers are exactly known.

As physicists calibrate machines with phantoms, this calibrates models. Nothing is downloaded, nothing is a patient, and
every row says that it is synthetic. Answers are dealt like cards, in each split and language, so that a blind guess
scores what the manifest's `blind_prior` says.

    phantom(Path("phantom"), images=1200, seed=7)
"""

from __future__ import annotations

import functools
import hashlib
import io
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image

from ldrt_edge import artifact
from ldrt_edge.console import track
from ldrt_edge.dataset import DatasetWriter, Row, Split, Turn, assign_splits
from ldrt_edge.errors import ConfigError, all_problems
from ldrt_edge.train.data.balance import deal
from ldrt_edge.train.data.phantom_charts import COLOURS, draw_dvh, draw_table, dvh_specs, table_specs
from ldrt_edge.train.data.phantom_dose import dose_map_specs, draw_dose_map
from ldrt_edge.train.data.phantom_plate import Fact, Plate, PlateKind
from ldrt_edge.train.data.phantom_sites import SITES
from ldrt_edge.train.data.phantom_text import LANGUAGES, QUESTIONS, TERMS, Language
from ldrt_edge.train.data.summary import summary

SOURCE = "phantom (synthetic)"
LICENCE = "CC0-1.0"
_SHARES: dict[PlateKind, float] = {"dose map": 0.6, "DVH": 0.2, "table": 0.2}
THINGS = (*SITES, "colour wash", "colour bar", *(f"{colour} curve" for colour in COLOURS))
"""What a picture may show and another may not; rows say which theirs does."""
Drawing = Callable[[random.Random], Plate]
"""A spec that waits for its random details."""
S = TypeVar("S")


def phantom(
    out: Path,
    images: int,
    seed: int,
    test_fraction: float = 0.2,
    languages: Sequence[Language] = LANGUAGES,
    size: int = 224,
) -> Path:
    """Write a dataset artefact of `images` phantom pictures, `size` × `size` PNG, with 6 to 8 questions each.

    The same arguments give the same bytes.

    Raises:
        ConfigError: a number out of range, or a language that has no questions here.
    """
    _check(images, test_fraction, languages, size)
    config = {"images": images, "test_fraction": test_fraction, "languages": list(languages), "size": size}
    with artifact.create(out, "dataset", {"stage": "phantom", **config}, seed=seed) as draft:
        if draft.complete:
            return out
        rows: list[Row] = []
        with DatasetWriter(draft.path) as writer:
            seen: set[bytes] = set()
            wording = Wording(languages, random.Random(f"{seed}/wording"))
            for number, (kind, split, drawing) in enumerate(track(_plan(images, test_fraction, seed), "drawing")):
                rng = random.Random(f"{seed}/{number}")
                plate, png = _new_picture(drawing, rng, size, seen)
                image, digest = writer.add_image(png, ".png")
                for question, fact in enumerate(rng.sample(plate.facts, len(plate.facts))):
                    language, asked, answer = wording.ask(split, fact)
                    row = Row(
                        id=f"phantom-{seed}-{number:06d}-{question}", image=image, image_sha256=digest,
                        turns=(Turn("user", asked), Turn("assistant", answer)), language=language, task=fact.task,
                        answer_type="closed" if fact.answer in ("yes", "no") else "open", source=SOURCE,
                        licence=LICENCE, group=f"phantom-{seed}-{number:06d}", kind=kind, split=split,
                        present=plate.present, absent=tuple(t for t in THINGS if t not in plate.present),
                    )
                    writer.add(row)
                    rows.append(row)
        draft.metrics.update(summary(rows))
    return out


class Wording:
    """Puts facts into words; every answer to a question kind goes through the languages in turn."""

    def __init__(self, languages: Sequence[Language], rng: random.Random) -> None:
        self._languages, self._rng = languages, rng
        self._queues: defaultdict[tuple[Split, str, str], list[Language]] = defaultdict(list)

    def ask(self, split: Split, fact: Fact) -> tuple[Language, str, str]:
        """The next language for this answer, the question and the answer in it."""
        queue = self._queues[split, fact.task, fact.answer]
        if not queue:
            queue.extend(deal(self._languages, len(self._languages), self._rng))
        language = queue.pop()
        words = {slot: term(word, language) for slot, word in fact.words.items()}
        words |= {slot.upper(): word.capitalize() for slot, word in words.items()}
        question = self._rng.choice(QUESTIONS[fact.task][language]).format(**words)
        return language, question, term(fact.answer, language)


def term(word: str, language: Language) -> str:
    """`word` in `language`; digits stay as they are."""
    return word if word.replace(".", "").isdigit() else TERMS[word][language]


def _plan(images: int, test_fraction: float, seed: int) -> list[tuple[PlateKind, Split, Drawing]]:
    """What to draw, in order; specs are dealt within each kind and split, so that both splits are balanced."""
    rng = random.Random(f"{seed}/plan")
    counts = {kind: round(images * share) for kind, share in _SHARES.items()}
    counts["dose map"] += images - sum(counts.values())
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    names = [str(index) for index in range(images)]
    split_of = assign_splits(names, test_fraction, seed, kinds)
    splits = [split_of[name] for name in names]
    plan: list[tuple[PlateKind, Split, Drawing]] = []
    for split in ("train", "test"):
        maps, dvhs, tables = (
            sum(k == kind and s == split for k, s in zip(kinds, splits, strict=True)) for kind in _SHARES
        )
        plan += [("dose map", split, d) for d in _bind(draw_dose_map, dose_map_specs(maps, min(maps, dvhs), rng))]
        plan += [("DVH", split, d) for d in _bind(draw_dvh, dvh_specs(dvhs, rng))]
        plan += [("table", split, d) for d in _bind(draw_table, table_specs(tables, rng))]
    rng.shuffle(plan)
    return plan


def _bind(draw: Callable[[S, random.Random], Plate], specs: Sequence[S]) -> list[Drawing]:
    return [functools.partial(draw, spec) for spec in specs]


def _new_picture(drawing: Drawing, rng: random.Random, size: int, seen: set[bytes]) -> tuple[Plate, bytes]:
    """Draw until the picture is none of those before: the same table in both splits would be a leak."""
    while True:
        plate = drawing(rng)
        png = _png(plate.image, size)
        digest = hashlib.sha256(png).digest()
        if digest not in seen:
            seen.add(digest)
            return plate, png


def _png(image: Image.Image, size: int) -> bytes:
    stream = io.BytesIO()
    image.resize((size, size), Image.Resampling.LANCZOS).save(stream, "PNG", compress_level=3)
    return stream.getvalue()


def _check(images: int, test_fraction: float, languages: Sequence[Language], size: int) -> None:
    problems = []
    if images < 1:
        problems.append(f"--images {images}: at least 1")
    if not 0 <= test_fraction <= 1:
        problems.append(f"--test-fraction {test_fraction}: from 0 to 1")
    unknown = [language for language in languages if language not in LANGUAGES]
    if unknown or not languages:
        problems.append(f"--languages {','.join(languages)}: choose from {', '.join(LANGUAGES)}")
    if not 32 <= size <= 2048:
        problems.append(f"--size {size}: from 32 to 2048 pixels")
    if problems:
        raise ConfigError(all_problems(problems, "phantom"))
