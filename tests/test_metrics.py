"""Grading: when two answers count as the same, and how near an open one comes."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from ldrt_edge.bench import metrics
from ldrt_edge.bench.metrics import chrf, correct, normalise, overlap_installed, polarity, rouge_l, token_f1
from ldrt_edge.bench.wordings import wordings
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
        ("de", "1.000", "1000"),
        ("es", "1.234.567,50", "1234567.5"),
        ("pt", "0.500", "0.5"),
        ("fr", "1 000", "1000"),
        ("fr", "12\u202f500,5 Gy", "12500.5"),
        ("en", "0,500", "0.5"),
        ("en", "1,234.50", "1234.5"),
        ("en", "10 100", "10 100"),
        ("de", "3 Gray", "3"),
        ("en", "3 grays left", "3 left"),
        ("en", "3 grayish spots", "3 grayish spots"),
        ("en", "6 × 0.5 gray", "6 x 0.5"),
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
        ("zh", "三次", "3次"),
        ("zh", "共 三 次", "共3次"),
        ("zh", "两个", "2个"),
        ("zh", "十次", "10次"),
        ("zh", "二十五天", "25天"),
        ("zh", "十二 戈瑞", "12"),
        ("zh", "两三次", "两三次"),
        ("zh", "二百次", "二百次"),
        ("zh", "一样", "一样"),
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


@pytest.mark.parametrize(
    ("language", "given", "meant"),
    [
        ("en", "No, two.", "no"), ("en", "Nein.", ""), ("es", "No aparece", "no"), ("es", "Si, a la izquierda", "yes"),
        ("pt", "No joelho esquerdo", ""), ("pt-BR", "nao", "no"), ("de", "Jawohl", "yes"), ("fr", "Sí", ""),
        ("it", "sí", "yes"), ("it", "不是", "no"), ("", "no", "no"), ("de", "Janein", ""), ("en", "", ""),
        ("zh", "能", "yes"), ("zh", "能看到丘脑", "yes"), ("zh", "可以看到。", "yes"), ("zh", "看得到", "yes"),
        ("zh", "对，有两个", "yes"), ("zh", "有", "yes"), ("zh", "不，是左侧", "no"), ("zh", "看不到", "no"),
        ("zh", "不能", "no"), ("zh", "无骨折", "no"), ("zh", "对不起", ""), ("zh", "对称", ""), ("zh", "有没有", ""),
        ("zh", "是否", ""), ("zh", "不同", ""), ("zh", "有可能", ""), ("zh", "无法判断", ""),
    ],
)  # fmt: skip
def test_a_yes_or_no_is_one_in_its_language(language: str, given: str, meant: str) -> None:
    assert polarity(given, language) == meant


ABSTAINING = {
    "en": ("Cannot be determined from this image.", "No idea", "I don’t know.", "No, cannot be told", "Unknown."),
    "de": ("Ich weiß es nicht.", "Das kann man anhand des Bildes nicht sagen", "Das lässt sich so nicht bestimmen",
           "Keine Angabe"),
    "es": ("No se puede determinar con esta imagen", "No lo sé.", "No es posible saber", "no puede determinarse"),
    "fr": ("Je ne sais pas", "On ne peut pas le savoir", "Il n’est pas possible de le dire", "Inconnu"),
    "pt": ("Não sei.", "Não é possível dizer com esta imagem", "não se pode determinar"),
    "zh": ("不知道", "不确定。", "不能判断", "对不起，无法判断", "不清楚"),
}  # fmt: skip
PLAINLY_NO = {
    "en": ("The image does not show pneumothorax", "Not visible in this image", "No."),
    "de": ("Eine Fraktur ist auf diesem Bild nicht zu erkennen", "Man kann keine sehen", "Nein, kann man nicht sehen"),
    "es": ("La fractura no aparece", "No, no se puede ver", "No se ve"),
    "fr": ("La fracture n'est pas visible", "On ne peut pas la voir"),
    "pt": ("Não aparece", "Não se pode ver", "Não pode ser vista"),
    "zh": ("看不到", "没有", "边界不清楚", "看不出骨折"),
}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_who_abstains_says_neither_yes_nor_no(language: str) -> None:
    for said in (TERMS["unknown"][language], *ABSTAINING[language]):
        for spelled in (said, said.upper(), unicodedata.normalize("NFD", said)):
            assert wordings().abstains(spelled, language) and polarity(spelled, language) == "", spelled
            assert not any(correct(row(TERMS[key][language], language), spelled) for key in ("yes", "no"))
    for said in (*PLAINLY_NO[language], *(TERMS[key][language] for key in ("yes", "no", "knee"))):
        assert not wordings().abstains(said, language), said


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
