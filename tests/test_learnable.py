"""The probe of the frozen tower finds what pictures tell, finds nothing where they tell nothing, and does not leak."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ldrt_edge.bench.learnable import probe
from ldrt_edge.cli import cli
from ldrt_edge.dataset import Row, Turn
from ldrt_edge.train.data.phantom import phantom

PICTURES, WIDTH = 120, 24
QUESTIONS = ("Is the lung collapsed?", "Are the kidneys enlarged?", "Does the skull show a fracture?")
RNG = np.random.default_rng(7)
FEATURES = {f"{i}.png": RNG.normal(size=WIDTH).astype(np.float32) for i in range(PICTURES)}


def rows(answer: Callable[[int, int], bool], group: Callable[[int], int] = lambda picture: picture) -> list[Row]:
    """Three yes/no questions about every picture, `answer` of (picture, question), pictures of two kinds."""
    return [
        Row(
            id=f"{picture}-{question}", image=f"{picture}.png", image_sha256=f"{picture:064}", language="en",
            turns=(Turn("user", text), Turn("assistant", "yes" if answer(picture, question) else "no")),
            task=f"task {question}", answer_type="closed", source="made", licence="CC0-1.0", group=str(group(picture)),
            kind="AB"[picture % 2],
        )
        for picture in range(PICTURES) for question, text in enumerate(QUESTIONS)
    ]  # fmt: skip


def test_finds_what_pictures_tell() -> None:
    found = probe(rows(lambda picture, question: FEATURES[f"{picture}.png"][question] > 0), FEATURES)
    assert set(found) == {"overall", "task 0", "task 1", "task 2"}
    overall = found["overall"]
    assert overall.worth.ci_low > 0.15
    assert overall.right.value > 0.7 > overall.words.value + 0.1
    assert abs(overall.wrong.value - 0.5) < 0.1
    assert overall.worth.n == 3 * PICTURES
    assert overall.worth.clusters == PICTURES


def test_finds_nothing_where_wording_alone_answers() -> None:
    overall = probe(rows(lambda picture, question: question == 1), FEATURES)["overall"]
    assert overall.words.value == overall.right.value == overall.wrong.value == 1.0


def test_finds_nothing_in_noise() -> None:
    coin = np.random.default_rng(3).integers(0, 2, (PICTURES, 3))
    overall = probe(rows(lambda picture, question: bool(coin[picture, question])), FEATURES)["overall"]
    assert overall.worth.ci_low < 0 < overall.worth.ci_high


def test_what_only_the_kind_tells_is_worth_nothing_against_its_kind() -> None:
    """A vector that says the kind and no more: any other picture does worse, one of the same kind as well."""
    kinds = {image: np.repeat(np.float32(int(image[:-4]) % 2), WIDTH) for image in FEATURES}
    overall = probe(rows(lambda picture, question: (picture + question) % 2 == 0), kinds)["overall"]
    assert overall.right.value == overall.wrong.value == 1.0
    assert overall.any.value < 0.8


def test_a_group_is_never_learned_from_and_asked_about_at_once() -> None:
    """Six pictures a group, all alike and with the group's own random answers: a leak would know nearly all of them."""
    group = lambda picture: picture // 6  # noqa: E731
    alike = {image: FEATURES[f"{group(int(image[:-4]))}.png"] for image in FEATURES}
    coin = np.random.default_rng(5).integers(0, 2, (PICTURES, 3))
    asked = rows(lambda picture, question: bool(coin[group(picture), question]), group)
    overall = probe(asked, alike)["overall"]
    assert overall.right.value < 0.7
    assert overall.worth.clusters == PICTURES // 6
    leaking = probe(rows(lambda picture, question: bool(coin[group(picture), question])), alike)["overall"]
    assert leaking.right.value > 0.9


def test_command(tiny: Any, tmp_path: Path) -> None:
    data = phantom(tmp_path / "data", 24, 0, test_fraction=0, languages=("en",))
    command = ["bench", "learnable", str(tiny("llavanext", "smollm2")), "--data", str(data)]
    first, second = (CliRunner().invoke(cli, [*command, "--json"], catch_exceptions=False) for _ in range(2))
    assert first.output == second.output
    overall = json.loads(first.output)["overall"]
    assert overall["worth"]["value"] == pytest.approx(overall["right"]["value"] - overall["wrong"]["value"])
    shown = CliRunner().invoke(cli, command, catch_exceptions=False).output
    assert "worth of the picture" in shown
    assert "overall" in shown


def test_too_few_pictures(tiny: Any, tmp_path: Path) -> None:
    data = phantom(tmp_path / "few", 5, 0, test_fraction=0, languages=("en",))
    failed = CliRunner().invoke(cli, ["bench", "learnable", str(tiny("llava15", "llama")), "--data", str(data)])
    assert failed.exit_code == 1
    assert "10 groups" in str(failed.exception)
