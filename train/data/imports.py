"""Public question sets to a dataset artefact: VQA-RAD, and LLaVA's conversation JSON.

Pictures are read before they are believed, and named by content, so no file name survives. Splits go by picture. All
problems of one input are told at once; `skip_bad` leaves the bad rows out instead and counts them in the manifest.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ldrt_edge import artifact
from ldrt_edge.artifact import Json
from ldrt_edge.console import track
from ldrt_edge.dataset import AnswerType, DatasetWriter, Row, Turn, assign_splits
from ldrt_edge.errors import ConfigError, DataError, all_problems
from ldrt_edge.train.data.pictures import file_digest, find_picture, picture_bytes
from ldrt_edge.train.data.summary import summary

VQA_RAD_TASKS = {
    "PRES": "presence", "PRSE": "presence", "POS": "position", "ABN": "abnormality", "SIZE": "size", "COUNT": "count",
    "MODALITY": "modality", "PLANE": "plane", "ATTRIB": "attribute", "ATRIB": "attribute", "ORGAN": "organ",
    "COLOR": "color", "OTHER": "other",
}
"""VQA-RAD's question types, its two misspellings included. Source: Lau et al., Sci Data 5:180251 (2018), table 2."""
_VQA_RAD_FOLDERS = ("images", "VQA_RAD Image Folder", "VQA_RAD_Image_Folder")
_IMAGE_TAG = "<image>"
_TEXT_LIMIT = 100_000
_YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Record:
    """One conversation of a foreign set, before its picture was looked at. `where` names it in messages."""

    where: str
    id: str
    image: str
    turns: tuple[Turn, ...]
    task: str
    answer_type: AnswerType
    kind: str


def import_vqa_rad(
    folder: Path, out: Path, test_fraction: float = 0.2, seed: int = 0, skip_bad: bool = False
) -> Path:
    """Import VQA-RAD from `folder`: the public JSON with its image folder, or `qa.jsonl` with `images/`.

    The split is by picture and stratified by organ. Yes and no are written in lower case (the source varies); other
    answers stay as they are.

    Raises:
        DataError: no VQA-RAD there, or (without `skip_bad`) rows or pictures that cannot be used.
        ConfigError: `test_fraction` is out of range.
    """
    folder = Path(folder)
    source = _vqa_rad_file(folder)
    return _import(
        _read_records(source), _vqa_rad_record, folder, out, folders=_VQA_RAD_FOLDERS, test_fraction=test_fraction,
        seed=seed, skip_bad=skip_bad, language="en", source="VQA-RAD", licence="CC0-1.0", stage="import vqa-rad",
        digest=file_digest(source),
    )


def import_llava(
    path: Path, out: Path, test_fraction: float = 0.2, seed: int = 0, skip_bad: bool = False,
    images: Path | None = None, language: str = "en", source: str = "LLaVA", licence: str = "unknown",
) -> Path:
    """Import LLaVA's conversation JSON: `path` is the file, or a folder that holds just one.

    Picture names are looked up in `images` (default: the JSON's folder, and `images/` in it). Rows without a picture
    are left out and counted (`without_image`). `language` (BCP 47), `source` and `licence` go onto every row.

    Raises:
        DataError: no such JSON, or (without `skip_bad`) rows or pictures that cannot be used.
        ConfigError: `test_fraction` is out of range.
    """
    path = _only_json(Path(path))
    records = _read_records(path)
    with_image = [
        (where, data) for where, data in records if not isinstance(data, Mapping) or data.get("image") is not None
    ]
    if not with_image:
        raise DataError(f"{path}: none of {len(records)} rows has an image")
    return _import(
        with_image, _llava_record, Path(images) if images else path.parent, out, folders=("images",),
        test_fraction=test_fraction, seed=seed, skip_bad=skip_bad, language=language, source=source, licence=licence,
        stage="import llava", digest=file_digest(path), without_image=len(records) - len(with_image),
    )


def _import(
    records: Sequence[tuple[str, Json]], parse: Callable[[str, Mapping[str, Json]], Record], root: Path, out: Path, *,
    folders: Sequence[str], test_fraction: float, seed: int, skip_bad: bool, language: str, source: str, licence: str,
    stage: str, digest: str, without_image: int = 0,
) -> Path:
    if not 0 <= test_fraction <= 1:
        raise ConfigError(f"--test-fraction {test_fraction}: from 0 to 1")
    config = {
        "stage": stage, "source_sha256": digest, "test_fraction": test_fraction, "skip_bad": skip_bad,
        "language": language, "source": source, "licence": licence,
    }
    with artifact.create(out, "dataset", config, seed=seed) as draft:
        if draft.complete:
            return out
        rows: list[Row] = []
        ids = Counter[str]()
        problems: dict[str, None] = {}
        bad_rows = 0
        stored: dict[str, tuple[str, str] | str] = {}
        with DatasetWriter(draft.path) as writer:
            for where, data in track(records, "importing"):
                try:
                    record = parse(where, _mapping(where, data))
                    image, sha256 = _stored(record, root, folders, writer, stored)
                except DataError as error:
                    problems[str(error)] = None
                    bad_rows += 1
                    continue
                ids[record.id] += 1
                rows.append(Row(
                    id=record.id if ids[record.id] == 1 else f"{record.id}-{ids[record.id]}", image=image,
                    image_sha256=sha256, turns=record.turns, language=language, task=record.task,
                    answer_type=record.answer_type, source=source, licence=licence, group=sha256[:24],
                    kind=record.kind,
                ))
            if problems and not skip_bad:
                raise DataError(all_problems([*problems], f"{root}: cannot import {bad_rows} of {len(records)} rows"))
            if not rows:
                raise DataError(f"{root}: nothing to import, all {len(records)} rows are bad: {next(iter(problems))}")
            splits = assign_splits([row.group for row in rows], test_fraction, seed, [row.kind for row in rows])
            rows = [replace(row, split=splits[row.group]) for row in rows]
            for row in rows:
                writer.add(row)
        draft.metrics.update(summary(rows))
        draft.metrics.update(bad_rows=bad_rows, without_image=without_image)
    return out


def _stored(
    record: Record, root: Path, folders: Sequence[str], writer: DatasetWriter, known: dict[str, tuple[str, str] | str]
) -> tuple[str, str]:
    """Read and store the record's picture once; its path in the dataset and its sha256, or its problem again."""
    if record.image not in known:
        try:
            known[record.image] = writer.add_image(*picture_bytes(find_picture(root, record.image, folders)))
        except DataError as error:
            known[record.image] = str(error)
    found = known[record.image]
    if isinstance(found, str):
        raise DataError(found)
    return found


def _vqa_rad_record(where: str, data: Mapping[str, Json]) -> Record:
    name = data.get("image_name", data.get("image"))
    question, answer = _text(where, data, "question"), _text(where, data, "answer")
    answer_type = str(data.get("answer_type", "")).strip().lower()
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: no image name")
    if answer_type not in ("closed", "open"):
        raise DataError(f"{where}: answer_type {data.get('answer_type')!r}, wanted CLOSED or OPEN")
    first_type = str(data.get("question_type", "")).split(",")[0].strip().upper()
    if answer.lower().rstrip(".") in _YES_NO:
        answer = answer.lower().rstrip(".")
    turns = (Turn("user", question), Turn("assistant", answer))
    return Record(
        where, f"vqa-rad-{data.get('qid', data.get('id', where))}", name, turns,
        VQA_RAD_TASKS.get(first_type, "other"), "closed" if answer_type == "closed" else "open",
        str(data.get("image_organ", "")).strip().upper(),
    )


def _llava_record(where: str, data: Mapping[str, Json]) -> Record:
    name, said = data.get("image"), data.get("conversations")
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: image is not a file name")
    if not isinstance(said, list) or len(said) < 2 or len(said) % 2:
        raise DataError(f"{where}: conversations must be pairs of human and gpt")
    turns = []
    for number, (utterance, speaker) in enumerate(zip(said, ("human", "gpt") * (len(said) // 2), strict=True), start=1):
        if not isinstance(utterance, dict) or utterance.get("from") != speaker:
            raise DataError(f"{where}: utterance {number} must be from {speaker}")
        text = _text(f"{where}, utterance {number}", utterance, "value")
        turns.append(Turn("user" if speaker == "human" else "assistant", text))
    closed = turns[-1].text.lower().rstrip(".") in _YES_NO
    return Record(
        where, f"llava-{data.get('id', where)}", name, tuple(turns),
        "conversation" if len(turns) > 2 else "instruction", "closed" if closed else "open", "",
    )


def _text(where: str, data: Mapping[str, Json], key: str) -> str:
    """The text under `key`, without image tags; the public VQA-RAD has a few numbers as answers."""
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{where}: no {key}")
    text = str(value).replace(_IMAGE_TAG, "").strip()
    if not text:
        raise DataError(f"{where}: empty {key}")
    if len(text) > _TEXT_LIMIT:
        raise DataError(f"{where}: {key} of {len(text)} characters, the limit is {_TEXT_LIMIT}")
    return text


def _mapping(where: str, data: Json) -> Mapping[str, Json]:
    if not isinstance(data, Mapping):
        raise DataError(f"{where}: not a JSON object")
    return data


def _vqa_rad_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    lines = folder / "qa.jsonl"
    return lines if lines.is_file() else _only_json(folder)


def _only_json(path: Path) -> Path:
    """`path` itself, or the only JSON file in it."""
    if path.is_dir():
        found = sorted(path.glob("*.json")) or sorted(path.glob("*.jsonl"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise DataError(f"{path}: wanted one JSON file of questions in the folder, found {names}")
        return found[0]
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return path


def _read_records(path: Path) -> list[tuple[str, Json]]:
    """Rows of a JSON list or of JSON lines, each with words that say where it stands."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            return list(_json_lines(path, text))
        data = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, list) or not data:
        raise DataError(f"{path}: wanted a JSON list of rows")
    return [(f"row {number}", row) for number, row in enumerate(data, start=1)]


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Json]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also split at U+2028 in a string
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}: line {number} is not JSON ({error})") from error
