"""Grading: when two answers count as the same, and how near an open one comes."""

from __future__ import annotations

import sys

import pytest

from ldrt_edge.bench import metrics
from ldrt_edge.bench.metrics import chrf, correct, normalise, overlap_installed, rouge_l, token_f1
from ldrt_edge.dataset import Row, Turn
from ldrt_edge.errors import MissingExtraError
from ldrt_edge.train.data.phantom_text import LANGUAGES, TERMS


def row(answer: str, language: str = "en") -> Row:
    turns = (Turn("user", "?"), Turn("assistant", answer))
    return Row("1", "images/1.png", "0", turns, language, "t", "open", "test", "CC0-1.0", "g")


@pytest.mark.parametrize(
    ("language", "given", "wanted"),
    [
        ("en", "0.50", "0.5"),
        ("en", "The answer: 3.0 Gy.", "answer 3"),
        ("en", "1.0Gy", "1"),
        ("en", "300 cGy", "300 cgy"),
        ("en", "3 gym", "3 gym"),
        ("en", "1,000", "1000"),
        ("en", "1,5", "1.5"),
        ("de", "1,0 Gy", "1"),
        ("de", "1,000", "1"),
        ("fr", "１,５ ＧＹ", "1.5"),
        ("es", "0,50", "0.5"),
        ("pt", "0,5 Gy", "0.5"),
        ("de", "6×0,50 Gy", "6 x 0.5"),
        ("en", "-5", "-5"),
        ("en", "0.5-1.0 Gy", "0.5 1"),
        ("en", "12.05.2020", "12 5 2020"),
        ("en", "An X-ray", "x ray"),
        ("de", "Das Knie", "knie"),
        ("es", "el codo", "codo"),
        ("fr", "L'épaule", "épaule"),
        ("pt", "o ombro", "ombro"),
        ("fr", "a", "a"),
        ("en", "A", "a"),
        ("en", "Three", "3"),
        ("de", "drei Felder", "3 felder"),
        ("de", "ein Feld", "feld"),
        ("es", "una", "1"),
        ("fr", "Deux faisceaux", "2 faisceaux"),
        ("pt", "três", "3"),
        ("zh", "三", "3"),
        ("de", "STRASSE", normalise("Straße", "de")),
        ("pt-BR", "Não.", "no"),
        ("es", "¡Sí!", "yes"),
        ("fr", "Oui.", "yes"),
        ("de", "Nein!", "no"),
        ("zh-Hans", "是的。", "yes"),
        ("zh", "左 侧", "左侧"),
        ("zh", "３ Ｇｙ的剂量", "3的剂量"),
        ("zh", "总剂量1.0戈瑞", "总剂量1"),
        ("zh", "共 3 次。", "共3次"),
        ("zh", "0.5Gy×6次", "0.5 x 6次"),
        ("en", " - ", ""),
    ],
)
def test_answers_are_normalised_as_documented(language: str, given: str, wanted: str) -> None:
    assert normalise(given, language) == wanted
    assert normalise(wanted, language) == wanted, "normalising twice changes nothing"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_term_of_the_phantoms_stands_for_itself_alone(language: str) -> None:
    spelled = {name: normalise(term[language], language) for name, term in TERMS.items()}  # type: ignore[index]
    assert all(spelled.values()) and len(set(spelled.values())) == len(spelled)
    for term in TERMS.values():
        said = term[language]  # type: ignore[index]
        assert correct(row(said, language), f" {said.upper()}. ")


def test_a_yes_or_no_is_read_from_the_first_word() -> None:
    assert correct(row("yes"), "Yes, two of them.")
    assert not correct(row("yes"), "No, not yes.")
    assert not correct(row("no"), "Cannot be told.")
    assert not correct(row("no"), "nothing")
    assert correct(row("没有", "zh"), "没有颜色条。")
    assert correct(row("否", "zh"), "不，是左侧。")
    assert correct(row("是", "zh"), "是的")
    assert not correct(row("left"), "left or right")


def test_token_f1_is_squads() -> None:
    opened = row("right upper lobe")
    assert token_f1(opened, "the right lobe") == pytest.approx(2 * 2 / (3 + 2))
    assert token_f1(opened, "Right upper lobe.") == 1
    assert token_f1(opened, "") == 0
    assert token_f1(row("左膝", "zh"), "右膝") == pytest.approx(0.5)


def test_rouge_l_reads_every_script_and_minds_the_order() -> None:
    opened = row("the dose lies in the left knee")
    assert rouge_l(opened, "The dose lies in left knee.") == 1
    assert rouge_l(opened, "knee left in lies dose") == pytest.approx(1 / 5)
    assert rouge_l(opened, "") == 0
    assert rouge_l(row("剂量在左膝", "zh"), "剂量在右膝") == pytest.approx(4 / 5)
    assert rouge_l(row("épaule gauche", "fr"), "l'épaule droite") == pytest.approx(1 / 2)


def test_chrf_needs_no_words() -> None:
    assert chrf(row("从这张图像无法判断", "zh"), "从这张图像无法判断。") == pytest.approx(1)
    near, far = chrf(row("左侧膝关节", "zh"), "右侧膝关节"), chrf(row("左侧膝关节", "zh"), "彩色填充")
    assert 0.3 < near < 1 and far == 0
    assert chrf(row("Schultergelenk", "de"), "Schulter") > 0.4 > token_f1(row("Schultergelenk", "de"), "Schulter")


def test_sacrebleu_agrees_with_its_definition() -> None:
    """chrF2 by hand: "ab" against "abc", n-grams of 1 and 2 characters (no longer ones in both)."""
    precision, recall = (2 / 2 + 1 / 1) / 2, (2 / 3 + 1 / 2) / 2
    assert chrf(row("abc"), "ab") == pytest.approx(5 * precision * recall / (4 * precision + recall))


def test_a_missing_extra_is_known_beforehand_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert overlap_installed()
    for name in ("rouge_score", "rouge_score.rouge_scorer", "sacrebleu", "sacrebleu.metrics.chrf"):
        monkeypatch.setitem(sys.modules, name, None)
    metrics._rouge.cache_clear()
    metrics._chrf.cache_clear()
    assert not overlap_installed()
    for measure in (rouge_l, chrf):
        with pytest.raises(MissingExtraError, match=r"pip install 'ldrt-edge\[bench\]'"):
            measure(row("left knee"), "left")
