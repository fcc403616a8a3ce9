"""The data room: phantoms whose answers hold, imports that name every problem, volumes with exact answers."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ldrt_edge import artifact
from ldrt_edge.dataset import Dataset, Row, Turn
from ldrt_edge.errors import ConfigError, DataError
from ldrt_edge.train.data.augment import alter, augment
from ldrt_edge.train.data.imports import import_llava, import_vqa_rad
from ldrt_edge.train.data.modalities import import_dicom_known
from ldrt_edge.train.data.phantom import phantom
from ldrt_edge.train.data.phantom_text import LANGUAGES, QUESTIONS, TERMS
from ldrt_edge.train.data.volume_slices import LoadedVolume, Plane, Slice, add_lesions, cut, load_volume
from ldrt_edge.train.data.volumes import Volume, import_volumes, read_volumes, region_name


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset(phantom(tmp_path_factory.mktemp("phantom") / "data", images=150, seed=11))


def _by_image(data: Dataset) -> dict[str, list[Row]]:
    images: dict[str, list[Row]] = defaultdict(list)
    for row in data:
        images[row.image].append(row)
    return images


def _answers(rows: list[Row]) -> dict[str, str]:
    """Task to answer, as language-neutral terms."""
    neutral = {(language, form): name for name, forms in TERMS.items() for language, form in forms.items()}
    return {row.task: neutral.get((row.language, row.answer), row.answer) for row in rows}  # type: ignore[call-overload]


def test_phantom_is_a_dataset_of_small_pngs_in_six_languages(drawn: Dataset) -> None:
    images = _by_image(drawn)
    assert len(images) == 150
    assert all(5 <= len(rows) <= 8 for rows in images.values())
    assert {row.language for row in drawn} == set(LANGUAGES)
    assert len({row.task for row in drawn}) >= 10
    assert {row.source for row in drawn} == {"phantom (synthetic)"} and {row.licence for row in drawn} == {"CC0-1.0"}
    with Image.open(drawn.image_path(drawn[0])) as picture:
        assert (picture.format, picture.size, picture.mode) == ("PNG", (224, 224), "RGB")


def test_phantom_splits_by_image(drawn: Dataset) -> None:
    splits = {image: {row.split for row in rows} for image, rows in _by_image(drawn).items()}
    assert all(len(found) == 1 for found in splits.values())
    assert sum(found == {"test"} for found in splits.values()) == 30
    for kind in ("dose map", "DVH", "table"):
        assert {row.split for row in drawn if row.kind == kind} == {"train", "test"}


def test_phantom_closed_answers_are_balanced_in_each_split(drawn: Dataset) -> None:
    yes, no = (set(TERMS[word].values()) for word in ("yes", "no"))
    counts: dict[tuple[str, str], Counter[bool]] = defaultdict(Counter)
    for row in drawn:
        if row.answer_type == "closed":
            assert row.answer in yes | no
            counts[row.task, row.split][row.answer in yes and row.answer not in no] += 1
    assert len({task for task, _ in counts}) == 6
    for key, count in counts.items():
        assert abs(count[True] - count[False]) <= 1, key


def test_phantom_blind_prior_is_what_majority_guessing_scores(drawn: Dataset) -> None:
    train: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in drawn.rows("train"):
        train[row.task, row.language][row.answer] += 1
    tests = drawn.rows("test")
    best = {key: max(counts, key=lambda answer: (counts[answer], answer)) for key, counts in train.items()}
    lowered = sum(row.answer.lower() == best[row.task, row.language].lower() for row in tests) / len(tests)
    assert drawn.manifest.metrics["blind_prior"] == pytest.approx(lowered, abs=0.02)
    assert 0.2 < lowered < 0.45


def test_phantom_asks_what_cannot_be_told(drawn: Dataset) -> None:
    unknown = set(TERMS["unknown"].values())
    tasks = Counter(row.task for row in drawn if row.answer in unknown)
    assert set(tasks) == {"prescribed dose", "scale maximum", "sessions per week"}
    for rows in _by_image(drawn).values():
        answers = _answers(rows)
        if "scale maximum" in answers:
            assert (answers["scale maximum"] == "unknown") == (answers["colour bar"] == "no")


def test_phantom_pictures_show_what_the_answers_say(drawn: Dataset) -> None:
    """Read back from the pixels: target side, colour wash, curves of each colour."""
    from ldrt_edge.train.data.phantom_charts import COLOURS

    for image, rows in _by_image(drawn).items():
        answers = _answers(rows)
        rgb = np.asarray(Image.open(drawn.folder / image), np.int16)
        if rows[0].kind == "dose map":
            columns = np.flatnonzero((np.abs(rgb - (255, 0, 255)).sum(2) < 60).any(axis=0))
            middle = columns.mean() / 224
            side = "left" if middle < 0.35 else "right" if middle > 0.6 else "centre"
            assert side == answers["target side"]
            tinted = (rgb.max(2) - rgb.min(2))[:192, :192] > 25
            areas = np.lib.stride_tricks.sliding_window_view(tinted, (6, 6)).all(axis=(2, 3))  # thicker than any line
            assert (areas.mean() > 0.02) == (answers["colour wash"] == "yes")
            assert (rgb[40:150, 200:214].std() > 20) == (answers["colour bar"] == "yes")
        if rows[0].kind == "DVH":
            found = [name for name, colour in COLOURS.items() if (np.abs(rgb - colour).sum(2) < 40).sum() > 40]
            assert str(len(found)) == answers["curve count"]
            assert {answers["highest curve"], answers["lowest curve"]} <= set(found)


def test_phantom_schedules_add_up_and_stay_in_the_low_dose_range(drawn: Dataset) -> None:
    for rows in _by_image(drawn).values():
        if rows[0].kind != "table":
            continue
        answers = _answers(rows)
        per_fraction, total = float(answers["dose per fraction"]), float(answers["total dose"])
        assert 0.5 <= per_fraction <= 1.0 and 3 <= total <= 6
        assert int(answers["fraction count"]) * per_fraction == total


def test_phantom_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        files = {entry.path: entry.sha256 for entry in artifact.verify(folder, "dataset").files}
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

    first, again, other = (
        digest(phantom(tmp_path / name, images=12, seed=seed)) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first == again != other


def test_phantom_in_one_language_only(tmp_path: Path) -> None:
    data = Dataset(phantom(tmp_path / "de", images=10, seed=1, languages=("de",)))
    assert {row.language for row in data} == {"de"}


def test_phantom_names_all_wrong_options_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"images 0.*test-fraction 2.*languages en,xx"):
        phantom(tmp_path / "x", images=0, seed=1, test_fraction=2, languages=("en", "xx"))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_every_question_and_term_exists_in_every_language() -> None:
    for task, wordings in QUESTIONS.items():
        assert set(wordings) == set(LANGUAGES), task
        assert all(2 <= len(forms) <= 3 and len(set(forms)) == len(forms) for forms in wordings.values()), task
        every = [form.lower() for forms in wordings.values() for form in forms]
        assert len({("{a}" in form, "{b}" in form) for form in every}) == 1, f"{task}: a wording forgets its terms"
    assert all(set(forms) == set(LANGUAGES) for forms in TERMS.values())


SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def _grey_square(path: Path, level: int, size: int = 24) -> Path:
    Image.fromarray(np.full((size, size), level, np.uint8)).save(path)
    return path


@pytest.fixture
def public_form(tmp_path: Path) -> Path:
    """VQA-RAD as it is published: one JSON list and a folder of images; three pictures of each of three organs."""
    folder = tmp_path / "VQA_RAD"
    (folder / "VQA_RAD Image Folder").mkdir(parents=True)
    rows = []
    for number in range(9):
        _grey_square(folder / "VQA_RAD Image Folder" / f"synpic{number}.png", 20 * number + 10)
        for extra, (question, answer, answer_type, question_type) in enumerate([
            ("Is this an axial image? ", "Yes", "CLOSED ", "PLANE"), ("How many lesions?", 2, "OPEN", "COUNT, PRES"),
            ("Is a mass seen?", "no", "CLOSED", "PRSE"),
        ]):
            rows.append({
                "qid": str(number * 10 + extra), "image_name": f"synpic{number}.png", "question": question,
                "answer": answer, "answer_type": answer_type, "question_type": question_type,
                "image_organ": ("HEAD", "CHEST", "ABD")[number % 3], "phrase_type": "freeform",
            })
    (folder / "VQA_RAD Dataset Public.json").write_text(json.dumps(rows))
    return folder


def test_vqa_rad_public_json(public_form: Path, tmp_path: Path) -> None:
    data = Dataset(import_vqa_rad(public_form, tmp_path / "rad", test_fraction=1 / 3))
    rows = list(data)
    assert len(rows) == 27
    first = next(row for row in rows if row.id == "vqa-rad-0")
    assert (first.question, first.answer, first.answer_type) == ("Is this an axial image?", "yes", "closed")
    assert Counter(row.task for row in rows) == {"plane": 9, "count": 9, "presence": 9}
    assert {row.answer for row in rows if row.task == "count"} == {"2"}
    tests = {row.group: row.kind for row in rows if row.split == "test"}
    assert Counter(tests.values()) == {"HEAD": 1, "CHEST": 1, "ABD": 1}, "stratified by organ"
    assert not {row.group for row in rows if row.split == "train"} & set(tests)


def test_imports_leave_no_file_name_behind(public_form: Path, tmp_path: Path) -> None:
    out = import_vqa_rad(public_form, tmp_path / "rad")
    stored = [path.name for path in (out / "images").iterdir()]
    assert stored and not any("synpic" in name for name in stored)
    assert "synpic" not in (out / "rows.jsonl").read_text() + (out / "manifest.json").read_text()


def test_vqa_rad_from_the_shared_form(tmp_path: Path) -> None:
    if not (SHARED / "vqa-rad" / "qa.jsonl").is_file():
        pytest.skip("needs shared/data/vqa-rad")
    data = Dataset(import_vqa_rad(SHARED / "vqa-rad", tmp_path / "rad"))
    assert (len(data), data.manifest.metrics["images"], data.manifest.metrics["bad_rows"]) == (1806, 251, 0)
    row = data[0]
    original = (SHARED / "vqa-rad" / "images" / "synpic100132.jpg").read_bytes()
    assert data.image_path(row).read_bytes() == original, "a plain JPEG stays as it is"
    assert {row.kind for row in data} == {"HEAD", "CHEST", "ABD"}


def _llava_row(number: int, image: str | None, *said: tuple[str, str]) -> dict[str, object]:
    row: dict[str, object] = {
        "id": f"x{number}", "conversations": [{"from": speaker, "value": value} for speaker, value in said]
    }
    return row | ({"image": image} if image else {})


def test_llava_conversations(tmp_path: Path) -> None:
    _grey_square(tmp_path / "a.png", 40)
    rows = [
        _llava_row(1, "a.png", ("human", "<image>\nWhat is it?"), ("gpt", "A square."), ("human", "Is it grey?"),
                   ("gpt", "Yes")),
        _llava_row(2, None, ("human", "Hello"), ("gpt", "Hello.")),
    ]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    data = Dataset(import_llava(tmp_path / "llava.json", tmp_path / "out", licence="CC-BY-4.0"))
    (row,) = list(data)
    assert [turn.text for turn in row.turns] == ["What is it?", "A square.", "Is it grey?", "Yes"]
    assert (row.answer_type, row.licence) == ("closed", "CC-BY-4.0")
    assert data.manifest.metrics["without_image"] == 1


def test_all_problems_of_an_import_are_told_at_once_and_can_be_skipped(tmp_path: Path) -> None:
    _grey_square(tmp_path / "good.png", 40)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a jpeg")
    _grey_square(tmp_path / "tiny.png", 40, size=1)
    ask = (("human", "Q"), ("gpt", "A"))
    rows = [
        _llava_row(1, "good.png", *ask), _llava_row(2, "missing.png", *ask), _llava_row(3, "broken.jpg", *ask),
        _llava_row(4, "../../etc/passwd", *ask), _llava_row(5, "good.png", ("human", "Q"), ("gpt", " ")),
        _llava_row(6, "good.png", ("gpt", "A"), ("human", "Q")), _llava_row(7, "tiny.png", *ask),
    ]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    with pytest.raises(DataError) as caught:
        import_llava(tmp_path / "llava.json", tmp_path / "out")
    line = str(caught.value)
    assert "\n" not in line and "6 of 7 rows" in line
    for part in ("missing.png: no such file", "broken.jpg", "etc/passwd: outside", "row 5", "row 6", "tiny.png"):
        assert part in line
    assert not (tmp_path / "out").exists()
    data = Dataset(import_llava(tmp_path / "llava.json", tmp_path / "out", skip_bad=True))
    assert (len(data), data.manifest.metrics["bad_rows"]) == (1, 6)


@pytest.mark.parametrize("name", ["a\0b.png", "long" * 2000])
def test_what_is_no_name_of_a_file_is_told_as_any_bad_row(name: str, tmp_path: Path) -> None:
    (tmp_path / "llava.json").write_text(json.dumps([_llava_row(1, name, ("human", "Q"), ("gpt", "A"))]))
    with pytest.raises(DataError, match=r"1 of 1 rows: .*not the name of a file"):
        import_llava(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("change", [{"image": 5}, {"group": None}, {"turns": [{"role": "user", "text": 1}]}])
def test_a_row_with_what_is_no_text_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    turns = (Turn("user", "Q"), Turn("assistant", "A"))
    row = Row("1", "images/a.png", "0", turns, "en", "task", "open", "source", "licence", "group")
    with artifact.create(tmp_path / "data", "dataset", {}) as draft:
        (draft.path / "rows.jsonl").write_text(json.dumps(asdict(row) | change) + "\n")
    with pytest.raises(DataError, match="line 1 is not a dataset row"):
        Dataset(tmp_path / "data").rows()


def test_pictures_lose_their_metadata_and_odd_modes_become_png(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("PatientName", "DOE^JANE")
    rng = np.random.default_rng(0)
    square = Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8))
    square.save(tmp_path / "named.png", pnginfo=text)
    square.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 60000, (24, 24), np.uint16)).save(tmp_path / "deep.png")
    names = ["named.png", "cmyk.jpg", "deep.png"]
    rows = [_llava_row(i, name, ("human", "Q"), ("gpt", "A")) for i, name in enumerate(names)]
    (tmp_path / "llava.json").write_text(json.dumps(rows))
    out = import_llava(tmp_path, tmp_path.parent / f"{tmp_path.name}-out")
    stored = list((out / "images").iterdir())
    assert len(stored) == 3
    for path in stored:
        assert b"DOE" not in path.read_bytes()
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.mode in ("RGB", "L")


def test_equal_ids_of_a_foreign_set_stay_apart(tmp_path: Path) -> None:
    _grey_square(tmp_path / "a.png", 40)
    row = _llava_row(1, "a.png", ("human", "Q"), ("gpt", "A"))
    (tmp_path / "llava.json").write_text(json.dumps([row, row]))
    assert len({row.id for row in Dataset(import_llava(tmp_path, tmp_path / "out"))}) == 2


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up head as NIfTI: an ellipsoid, with a front and a back lobe, a core, and a nose that shows the front.

    The label map has its own, coarser grid, as atlases do.
    """
    nibabel = pytest.importorskip("nibabel")
    folder = tmp_path_factory.mktemp("head")

    def grid(step_mm: float) -> tuple[np.ndarray, ...]:
        ticks = np.arange(-100, 100, step_mm)
        return np.meshgrid(ticks, ticks, ticks, indexing="ij")

    def affine(step_mm: float) -> np.ndarray:
        return np.array([[step_mm, 0, 0, -100], [0, step_mm, 0, -100], [0, 0, step_mm, -100], [0, 0, 0, 1.0]])

    x, y, z = grid(2.5)
    brain = (x / 65) ** 2 + (y / 85) ** 2 + (z / 75) ** 2
    values = np.where(brain < 1, 120, 0) + np.where((brain < 1.25) & (brain > 1.1), 200, 0)
    values = values + np.where((np.abs(x) < 8) & (y > 85) & (y < 99) & (np.abs(z) < 8), 250, 0)
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine(2.5)), folder / "head.nii.gz")
    x, y, z = grid(5.0)
    inside = (x / 63) ** 2 + (y / 83) ** 2 + (z / 73) ** 2 < 1
    labels = np.where(inside & (y > 10), np.where(x > 0, 2, 1), 0) + np.where(inside & (y < -10), 3, 0)
    labels[inside & (np.abs(z) > 45)] = 4
    nibabel.save(nibabel.Nifti1Image(labels.astype(np.int16), affine(5.0)), folder / "labels.nii.gz")
    (folder / "names.txt").write_text("1 Frontal_Sup_L 2101\n2 Frontal_Sup_R 2102\n3 Occipital_Mid_L 5201\n4 Pole\n")
    (folder / "volumes.yaml").write_text(
        "- {image: head.nii.gz, labels: labels.nii.gz, names: names.txt, modality: MRI, organ: brain, group: HEAD,\n"
        "   source: made up, licence: CC0-1.0, subject: nobody}\n"
    )
    return folder


@pytest.fixture(scope="module")
def sliced(head: Path) -> Dataset:
    volumes = read_volumes(head / "volumes.yaml")
    return Dataset(import_volumes(volumes, head / "out", images=90, test_fraction=0.25, size=96))


def test_volume_closed_answers_are_balanced(sliced: Dataset) -> None:
    rows = list(sliced)
    presence = Counter(row.answer for row in rows if row.task == "presence")
    assert set(presence) == {"yes", "no"} and abs(presence["yes"] - presence["no"]) < 0.2 * presence.total()
    lesions = Counter(row.answer for row in rows if row.task == "lesion presence")
    assert abs(lesions["yes"] - lesions["no"]) < 0.2 * lesions.total()
    planes = Counter(row.answer for row in rows if row.task == "plane" and row.answer_type == "open")
    assert set(planes) == {"axial", "coronal", "sagittal"}


def test_volume_rows_say_where_they_come_from(sliced: Dataset) -> None:
    for image, rows in _by_image(sliced).items():
        lesion = {row.answer for row in rows if row.task == "lesion presence"}
        assert all(row.source.startswith("made up") and row.licence == "CC0-1.0" for row in rows), image
        assert ("yes" in lesion) == ("simulated lesion" in rows[0].source)
    assert {row.kind for row in sliced} == {"HEAD"}
    assert "head.nii" not in (sliced.folder / "manifest.json").read_text()


def test_volume_split_goes_by_slab(sliced: Dataset) -> None:
    splits: dict[str, set[str]] = defaultdict(set)
    for row in sliced:
        splits[row.group].add(row.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {split for found in splits.values() for split in found} == {"train", "test"}


def _slice_with(volume: LoadedVolume, plane: Plane, flipped: bool, regions: set[str], rng: random.Random) -> Slice:
    for _ in range(300):
        piece = cut(volume, plane, flipped, 96, rng)
        if piece is not None and regions <= set(piece.regions):
            return piece
    raise AssertionError("no such slice")


def test_volume_sides_follow_the_radiological_display_and_its_flip(head: Path) -> None:
    """The patient's right lies on the image's left, unless flipped; the front is on top of an axial slice."""
    whole = load_volume(
        head / "head.nii.gz", head / "labels.nii.gz", {1: "left front", 2: "right front", 3: "back"}, hounsfield=False
    )
    rng = random.Random(0)
    for flipped in (False, True):
        axial = _slice_with(whole, "axial", flipped, {"left front", "right front", "back"}, rng)
        columns = {name: mask.nonzero()[1].mean() for name, mask in axial.regions.items()}
        assert (columns["right front"] < columns["left front"]) != flipped
        assert axial.regions["right front"].nonzero()[0].mean() < axial.regions["back"].nonzero()[0].mean()
        sagittal = _slice_with(whole, "sagittal", flipped, {"back", "right front"}, rng)
        fronts = sagittal.regions["right front"].nonzero()[1].mean()
        assert (fronts < sagittal.regions["back"].nonzero()[1].mean()) != flipped
        for _ in range(30):
            with_lesion = add_lesions(axial, 1, True, rng)
            for lesion in with_lesion.lesions:
                if lesion.side:
                    assert (lesion.column < 48) == ((lesion.side == "right") != flipped)
                    assert lesion.region in (f"{lesion.side} front", "back", None)


def test_volume_lesions_can_be_seen_where_they_are_said_to_be(head: Path) -> None:
    whole = load_volume(head / "head.nii.gz", head / "labels.nii.gz", {1: "a", 2: "b", 3: "c"}, hounsfield=False)
    rng = random.Random(1)
    found = 0
    for number in range(20):
        plain = _slice_with(whole, "axial", False, {"a", "b", "c"}, rng)
        marked = add_lesions(plain, 2, bright=number % 2 == 0, rng=rng)
        change = marked.pixels.astype(int) - plain.pixels
        for lesion in marked.lesions:
            assert (change[round(lesion.row), round(lesion.column)] > 40) == lesion.bright
            found += 1
        assert marked.lesions or not change.any()
    assert found > 10


def test_volumes_refuse_what_they_cannot_use(head: Path, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- {image: nothing.nii, modality: MRI}\n- {imagee: x}\n")
    with pytest.raises(DataError, match=r"volume 1: missing.*licence.*volume 2"):
        read_volumes(tmp_path / "list.yaml")
    (tmp_path / "broken.nii.gz").write_bytes(b"not a volume")
    broken = Volume(tmp_path / "broken.nii.gz", "MRI", "brain", "HEAD", "s", "l")
    with pytest.raises(DataError, match="not a readable NIfTI volume"):
        import_volumes([broken], tmp_path / "out", images=3)
    gone = Volume(tmp_path / "gone.nii.gz", "MRI", "brain", "HEAD", "s", "l")
    with pytest.raises(DataError, match="no such file"):
        import_volumes([gone], tmp_path / "out", images=3)
    with pytest.raises(ConfigError, match=r"modality 'PET'.*images 0"):
        import_volumes([replace(gone, modality="PET")], tmp_path / "out", images=0)
    assert not (tmp_path / "out").exists()


def test_region_names_are_plain() -> None:
    names = ("Frontal_Sup_L 2101", "Caudate_R 7002", "Kidney_left", "Cerebelum_Crus1_L", "left lung", "liver")
    assert [region_name(name) for name in names] == [
        "frontal lobe", "caudate nucleus", "kidney", "cerebellum", "lung", "liver",
    ]


def test_dicom_of_known_modality(tmp_path: Path) -> None:
    from pydicom.data import get_testdata_file

    folder = tmp_path / "dicom"
    folder.mkdir()
    for name in ("CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "rtplan.dcm"):
        found = get_testdata_file(name)
        assert isinstance(found, str)
        shutil.copy(found, folder)
    out = import_dicom_known([folder], tmp_path / "out", images=20, test_fraction=0, licence="MIT")
    data = Dataset(out)
    assert data.manifest.metrics["source_pictures"] == {"CT": 1, "MRI": 1}, "copies in another compression count once"
    assert data.manifest.metrics["files_left"] == 1
    truth = {row.group: row.answer for row in data if row.answer_type == "open"}
    assert Counter(row.answer for row in data if row.answer_type == "open") == {"CT": 10, "MRI": 10}
    for row in data:
        if row.question in ("Is this a CT scan?", "Is the image a CT scan?"):
            assert (row.answer == "yes") == (truth[row.group] == "CT")
    with pytest.raises(DataError, match="no such file or folder"):
        import_dicom_known([tmp_path / "out" / "nothing"], tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no DICOM picture of a known modality here, among 0 files"):
        import_dicom_known([tmp_path / "empty"], tmp_path / "none")


def test_augmented_pictures_keep_questions_groups_and_sides(tmp_path: Path) -> None:
    data = phantom(tmp_path / "data", 10, seed=0, languages=("en",))
    out = augment(data, tmp_path / "more", copies=2)

    before, after = Dataset(data), Dataset(out)
    train = before.rows("train")
    assert len(after) == 2 * len(train) and not after.rows("test")
    assert {row.group for row in after} == {row.group for row in train}
    assert {(row.question, row.answer) for row in after} == {(row.question, row.answer) for row in train}
    assert len({row.image_sha256 for row in after}) == 2 * len({row.image_sha256 for row in train})
    assert augment(data, tmp_path / "again", copies=2).joinpath("rows.jsonl").read_bytes() == (
        out / "rows.jsonl"
    ).read_bytes()
    picture = np.zeros((100, 120, 3), np.uint8)
    picture[20:80, 10:40] = 200
    for seed in range(20):
        altered = alter(picture, random.Random(seed)).astype(float)
        assert altered.shape == picture.shape
        assert altered[:, :60].sum() > 2 * altered[:, 60:].sum(), "what was on the left stays there"
