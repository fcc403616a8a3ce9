"""Contrast questions: what a wording alone is worth, and what may be asked of which picture."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image

from ldrt_edge import artifact
from ldrt_edge.dataset import AnswerType, Dataset, DatasetWriter, Row, Split, Turn, group_by_image
from ldrt_edge.errors import DataError
from ldrt_edge.train.data.contrast import contrast, known
from ldrt_edge.train.data.imports import import_vqa_rad

SHARED = Path(__file__).parents[1].parent / "shared" / "data"

Asked = tuple[str, str, str]  # task, question, answer


def _row(number: int, kind: str, asked: Asked, split: Split = "train") -> Row:
    task, question, answer = asked
    answer_type: AnswerType = "closed" if answer.lower() in ("yes", "no") else "open"
    return Row(
        id=f"{number}", image="", image_sha256="", turns=(Turn("user", question), Turn("assistant", answer)),
        language="en", task=task, answer_type=answer_type, source="clinicians", licence="CC0-1.0",
        group=f"patient-{number}", kind=kind, split=split,
    )


def _dataset(folder: Path, pictures: list[tuple[str, list[Asked], Split]]) -> Path:
    with artifact.create(folder, "dataset", {}) as draft, DatasetWriter(draft.path) as writer:
        for number, (kind, questions, split) in enumerate(pictures):
            encoded = io.BytesIO()
            Image.new("RGB", (8, 8), (number, number, number)).save(encoded, "PNG")
            image, digest = writer.add_image(encoded.getvalue(), ".png")
            for asked in questions:
                row = _row(number, kind, asked, split)
                writer.add(Row(**{**row.__dict__, "image": image, "image_sha256": digest}))
    return folder


PICTURES: list[tuple[str, list[Asked], Split]] = [
    ("HEAD", [("modality", "What modality is this?", "MR - FLAIR"), ("plane", "Is this an axial image?", "yes"),
              ("presence", "Is there edema in the temporal lobe?", "Yes")], "train"),
    ("HEAD", [("modality", "Is this a CT or MRI?", "CT"), ("presence", "Is there a midline shift?", "no")], "train"),
    ("CHEST", [("plane", "Is this a PA film?", "Yes"), ("presence", "Is there a pneumothorax?", "yes"),
               ("presence", "Are the lungs clear?", "yes")], "train"),
    ("ABD", [("presence", "Are the kidneys seen in this CT scan?", "yes")], "train"),
    ("HEAD", [("modality", "What modality is this?", "CT"), ("presence", "Is the skull fractured?", "yes")], "test"),
]


@pytest.mark.parametrize(("asked", "told"), [
    (("modality", "How was this taken?", "T2-weighted MR"), {"modality": "MRI"}),
    (("modality", "Is this a CT scan?", "No"), {}),
    (("modality", "Was this taken by CT or MRI?", "yes"), {}),
    (("modality", "Can CT be used to assess soft tissues?", "yes"), {}),
    (("modality", "What type of imaging does this not represent?", "ultrasound"), {}),
    (("plane", "Which plane is this?", "Posteroanterior"), {"plane": "PA", "modality": "x-ray"}),
    (("size", "Is the mass large in this MRI?", "no"), {"modality": "MRI"}),
])
def test_what_a_question_tells_of_its_picture(asked: Asked, told: dict[str, str]) -> None:
    assert known([_row(0, "", asked)]) == told


def test_nothing_is_known_where_answers_disagree() -> None:
    rows = [_row(0, "HEAD", ("modality", "What modality is this?", answer)) for answer in ("CT", "MRI")]
    assert known(rows) == {"organ": "brain"}


def test_each_wording_is_answered_both_ways_by_training_pictures_only(tmp_path: Path) -> None:
    data = _dataset(tmp_path / "data", PICTURES)
    rows = list(Dataset(contrast(data, tmp_path / "out")))

    _assert_even(rows)
    assert {row.split for row in rows} == {"train"} and "patient-4" not in {row.group for row in rows}
    assert {row.source for row in rows} == {"clinicians, question derived"}
    assert len({row.id for row in rows}) == len(rows)
    again = contrast(data, tmp_path / "again") / "rows.jsonl"
    assert again.read_bytes() == (tmp_path / "out" / "rows.jsonl").read_bytes()
    other = contrast(data, tmp_path / "other", seed=1) / "rows.jsonl"
    assert other.read_bytes() != again.read_bytes()


def test_findings_go_only_to_regions_that_cannot_show_them(tmp_path: Path) -> None:
    rows = list(Dataset(contrast(_dataset(tmp_path / "data", PICTURES), tmp_path / "out")))
    asked: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for row in rows:
        if row.task == "presence":
            asked[row.question].add((row.kind, row.answer))
    assert asked["Is there a pneumothorax?"] == {("CHEST", "yes"), ("HEAD", "no")}
    assert asked["Are the kidneys seen in this CT scan?"] == {("ABD", "yes"), ("HEAD", "no")}
    assert asked["Is there edema in the temporal lobe?"] in (
        {("HEAD", "yes"), ("CHEST", "no")}, {("HEAD", "yes"), ("ABD", "no")},
    )
    assert set(asked) == {
        "Is there a pneumothorax?", "Are the kidneys seen in this CT scan?", "Is there edema in the temporal lobe?",
    }, "neither what was denied, nor what may be said of a picture without the structure"


def test_a_dataset_that_tells_nothing_is_refused(tmp_path: Path) -> None:
    data = _dataset(tmp_path / "data", [("", [("count", "How many are there?", "two")], "train")])
    with pytest.raises(DataError, match="no training question tells"):
        contrast(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vqa_rad_gives_hundreds_of_even_questions(tmp_path: Path) -> None:
    if not (SHARED / "vqa-rad" / "qa.jsonl").is_file():
        pytest.skip("needs shared/data/vqa-rad")
    before = Dataset(import_vqa_rad(SHARED / "vqa-rad", tmp_path / "rad"))
    rows = list(Dataset(contrast(before.folder, tmp_path / "out")))
    _assert_even(rows)
    assert {"modality", "plane", "organ", "presence"} <= {row.task for row in rows} and len(rows) > 1000
    assert not {row.group for row in rows} & {row.group for row in before.rows("test")}
    told = [known(members).get("modality") for members in group_by_image(before.rows("train")).values()]
    assert {"MRI", "CT", "x-ray"} <= set(told)


def _assert_even(rows: list[Row]) -> None:
    """Every closed wording has its two answers equally often, and each picture hears it once."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        if row.answer_type == "closed":
            answers[row.question][row.answer] += 1
    assert answers and all(len(set(counts.values())) == 1 and len(counts) == 2 for counts in answers.values())
    heard = Counter((row.image, row.question, row.answer) for row in rows)
    assert max(heard.values()) == 1
