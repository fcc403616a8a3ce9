"""DICOM pictures of known modality as questions: what made this picture?

A DICOM header's Modality is reliable; what it says of the body part is not, so nothing else is asked. A few files
become many pictures by crop, turn, flip and brightness. Copies of one picture (the same in another compression) count
once, and the split goes by picture.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldrt_edge import artifact
from ldrt_edge.console import track
from ldrt_edge.dataset import DatasetWriter, Row, Turn, assign_splits
from ldrt_edge.errors import ConfigError, DataError, all_problems
from ldrt_edge.image import read_image
from ldrt_edge.train.data.balance import Balance, deal
from ldrt_edge.train.data.pictures import file_digest, png_bytes
from ldrt_edge.train.data.questions import MODALITIES, MODALITY_FORMS, Asker
from ldrt_edge.train.data.summary import summary

WORDS = {
    "CT": "CT", "MR": "MRI", "CR": "x-ray", "DX": "x-ray", "RF": "x-ray", "XA": "x-ray", "US": "ultrasound",
    "NM": "nuclear medicine scan",
}
"""DICOM's defined terms to the words of `questions.MODALITIES`. Source: PS3.3, C.7.3.1.1.1."""
_MIN_SIDE = 64
_FRAMES = 3  # of a multi-frame file: the first, one in the middle, the last
_FINGERPRINT, _SAME = 12, 0.06  # pixels a side; the share that may differ between copies


@dataclass(frozen=True, eq=False)
class Known:
    """A picture, uint8 (h, w, 3), its modality in words and a name for its content."""

    rgb: NDArray[np.uint8]
    modality: str
    group: str


def import_dicom_known(
    folders: Sequence[Path], out: Path, images: int = 300, test_fraction: float = 0.2, seed: int = 0, size: int = 224,
    source: str = "DICOM files", licence: str = "unknown",
) -> Path:
    """Write a dataset artefact of `images` pictures from usable DICOM files, modalities in turn.

    folders: DICOM files, or folders that hold some at any depth.

    Files that are no picture of a known modality are left out and counted (`files_left`).

    Raises:
        ConfigError: an option is out of range.
        DataError: no usable picture in the folders.
    """
    if images < 1 or not 0 <= test_fraction <= 1 or not 64 <= size <= 1024:
        raise ConfigError(f"--images {images}, --test-fraction {test_fraction}, --size {size}: out of range")
    missing = [str(place) for place in folders if not Path(place).exists()]
    if missing:
        raise DataError(all_problems(missing, "no such file or folder"))
    files = sorted({path for place in folders for path in _files(Path(place))})
    config = {
        "stage": "known modality", "images": images, "test_fraction": test_fraction, "size": size, "source": source,
        "licence": licence, "files_sha256": sorted({file_digest(path) for path in files}),
    }
    with artifact.create(out, "dataset", config, seed=seed) as draft:
        if draft.complete:
            return out
        known, left = _read_all(files)
        by_modality: dict[str, list[Known]] = defaultdict(list)
        for picture in known:
            by_modality[picture.modality].append(picture)
        if not by_modality:
            raise DataError(f"{folders[0]}: no DICOM picture of a known modality here, among {len(files)} files in all")
        rng = random.Random(f"{seed}/modalities")
        balance = Balance(random.Random(f"{seed}/balance"))
        rows: list[Row] = []
        with DatasetWriter(draft.path) as writer:
            for number, modality in enumerate(track(deal(sorted(by_modality), images, rng), "varying")):
                picture = rng.choice(by_modality[modality])
                image, digest = writer.add_image(png_bytes(_vary(picture.rgb, size, rng)), ".png")
                ask = Asker(balance, rng)
                for form in rng.sample(MODALITY_FORMS, len(MODALITY_FORMS)):
                    ask.modality(form, modality, rng.choice([name for name in MODALITIES if name != modality]))
                for index, question in enumerate(ask.questions):
                    rows.append(Row(
                        id=f"modality-{number:05d}-{index}", image=image, image_sha256=digest,
                        turns=(Turn("user", question.text), Turn("assistant", question.answer)), language="en",
                        task=question.task, answer_type=question.answer_type, source=source, licence=licence,
                        group=picture.group, kind="DICOM",
                    ))
            modality_of = {picture.group: picture.modality for picture in known}
            splits = assign_splits(
                [row.group for row in rows], test_fraction, seed, [modality_of[row.group] for row in rows]
            )
            rows = [replace(row, split=splits[row.group]) for row in rows]
            for row in rows:
                writer.add(row)
        draft.metrics.update(summary(rows))
        draft.metrics.update(files_left=left, source_pictures={name: len(found) for name, found in by_modality.items()})
    return out


def _files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
    else:
        yield from (path for path in place.rglob("*") if path.is_file())


def _read_all(files: Sequence[Path]) -> tuple[list[Known], int]:
    """All distinct pictures of known modality, and how many files gave none."""
    found: list[tuple[NDArray[np.bool_], Known]] = []
    left = 0
    for path in track(files, "reading"):
        try:
            first = read_image(path)
        except DataError:
            left += 1
            continue
        modality = WORDS.get(first.origin.modality or "")
        if modality is None or min(first.rgb.shape[:2]) < _MIN_SIDE:
            left += 1
            continue
        frames = sorted({0, first.origin.frames // 2, first.origin.frames - 1})[:_FRAMES]
        for frame in frames:
            try:
                rgb = first.rgb if frame == 0 else read_image(path, frame=frame).rgb
            except DataError:
                continue
            mark = _fingerprint(rgb)
            if all(known.modality != modality or (mark != other).mean() > _SAME for other, known in found):
                found.append((mark, Known(rgb, modality, f"{modality}-{len(found)}")))
    return [known for _, known in found], left


def _fingerprint(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Nearly equal for copies of a picture in other compressions: small, and each pixel bright or not."""
    small = np.asarray(Image.fromarray(rgb).convert("L").resize((_FINGERPRINT, _FINGERPRINT), Image.Resampling.BOX))
    bright: NDArray[np.bool_] = small > small.mean()
    return bright


def _vary(rgb: NDArray[np.uint8], size: int, rng: random.Random) -> NDArray[np.uint8]:
    """A random view: part of the picture, turned a little, perhaps mirrored, brighter or darker; (size, size, 3)."""
    image = Image.fromarray(rgb)
    side = max(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    square = square.resize((2 * size, 2 * size), Image.Resampling.LANCZOS if side > size else Image.Resampling.BICUBIC)
    square = square.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC)
    grey = bool((rgb == rgb[..., :1]).all())
    if grey and rng.random() < 0.5:  # coloured ones are screens with print on them
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    share = rng.uniform(0.6, 1.0)
    width = int(2 * size * share)
    left, top = (rng.randint(0, 2 * size - width) for _ in range(2))
    part = square.crop((left, top, left + width, top + width)).resize((size, size), Image.Resampling.LANCZOS)
    shown = (np.asarray(part) / 255.0) ** rng.uniform(0.7, 1.4) * rng.uniform(0.85, 1.1) * 255
    return np.asarray(np.clip(np.rint(shown), 0, 255), dtype=np.uint8)
