"""A dataset artefact as others read it: LLaVA's conversation JSON, or a folder that Hugging Face `datasets` loads.

    ldrt-edge data export DATASET OUT --to llava    train.json, test.json, images/
    ldrt-edge data export DATASET OUT --to hf       datasets.load_dataset("imagefolder", data_dir=OUT)

Licence, source and group stay on every row, so that whoever splits again splits by article.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Literal, get_args

from ldrt_edge import artifact
from ldrt_edge.dataset import IMAGES, Dataset, Row, Split
from ldrt_edge.errors import ConfigError

Form = Literal["llava", "hf"]
_SPLITS: tuple[Split, ...] = ("train", "test")


def export(dataset: Path, form: str, out: Path) -> Path:
    """Write a dataset in another form; returns `out`, an artefact of kind "app".

    Raises:
        ConfigError: an unknown form.
        ArtifactError, DataError: not a whole dataset.
    """
    if form not in get_args(Form):
        raise ConfigError(f"--to {form}: there are {', '.join(get_args(Form))}")
    data = Dataset(dataset)
    with artifact.create(out, "app", {"stage": "export", "to": form}, [dataset]) as draft:
        if not draft.complete:
            (_llava if form == "llava" else _imagefolder)(data, draft.path)
            draft.metrics.update(rows=len(data))
    return out


def _llava(data: Dataset, folder: Path) -> None:
    """LLaVA's own shape. Source: haotian-liu/LLaVA, docs/Finetune_Custom_Data.md."""
    (folder / IMAGES).mkdir()
    for split in _SPLITS:
        rows = []
        for row in data.rows(split):
            _copy(data, row, folder / row.image)
            said = []
            for number, turn in enumerate(row.turns):
                tag = "" if number else "<image>\n"
                said.append({"from": "human" if turn.role == "user" else "gpt", "value": tag + turn.text})
            rows.append({"id": row.id, "image": row.image, "conversations": said, **_about(row)})
        if rows:
            text = json.dumps(rows, ensure_ascii=False, indent=1)
            (folder / f"{split}.json").write_text(text + "\n", encoding="utf-8")


def _imagefolder(data: Dataset, folder: Path) -> None:
    """`datasets`' imagefolder: `metadata.jsonl` in each split's folder, a row for each picture.

    Source: https://huggingface.co/docs/datasets/image_dataset (ImageFolder). A picture has one row there, so that its
    conversations are a list.
    """
    licences = Counter[str]()
    for split in _SPLITS:
        by_image: dict[str, list[Row]] = {}
        for row in data.rows(split):
            by_image.setdefault(row.image, []).append(row)
            licences[row.licence] += 1
        if not by_image:
            continue
        (folder / split).mkdir()
        with (folder / split / "metadata.jsonl").open("w", encoding="utf-8") as stream:
            for image, rows in by_image.items():
                _copy(data, rows[0], folder / split / Path(image).name)
                conversations = [
                    {"id": row.id, "messages": [{"role": turn.role, "content": turn.text} for turn in row.turns],
                     **_about(row)}
                    for row in rows
                ]
                line = {"file_name": Path(image).name, "group": rows[0].group, "conversations": conversations}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    told = "".join(f"- {licence}: {count} rows\n" for licence, count in sorted(licences.items()))
    card = f"# Figures and conversations\n\nMade by ldrt-edge. Every row has its licence and its source:\n\n{told}"
    (folder / "README.md").write_text(card, encoding="utf-8")


def _about(row: Row) -> dict[str, str]:
    return {
        "language": row.language, "task": row.task, "answer_type": row.answer_type, "source": row.source,
        "licence": row.licence, "group": row.group,
    }


def _copy(data: Dataset, row: Row, target: Path) -> None:
    if not target.exists():
        shutil.copyfile(data.image_path(row), target)
