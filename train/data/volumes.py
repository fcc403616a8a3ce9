"""Slices of labelled anatomical volumes as questions with exact answers: plane, side, structures, size, lesions.

A volume is an image and, if there is one, a label map with a table of names (`aal.nii.txt`: a number and a name a
line). Each becomes many slices, by random plane, position, tilt, zoom, window and flip; the answers follow. Lesions,
where asked for, are simulated, and their rows say so. A YAML list names the volumes, paths relative to it:

    - image: templates/ch2.nii.gz
      labels: templates/aal.nii.gz
      names: templates/aal.nii.txt
      modality: MRI
      organ: brain
      group: HEAD
      source: mricron-data ch2 (Colin 27) with AAL labels
      licence: BSD-3-Clause
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import yaml

from ldrt_edge import artifact
from ldrt_edge.console import bar
from ldrt_edge.dataset import DatasetWriter, Row, Turn, assign_splits
from ldrt_edge.errors import ConfigError, DataError, all_problems
from ldrt_edge.train.data.balance import Balance, deal
from ldrt_edge.train.data.pictures import file_digest, png_bytes
from ldrt_edge.train.data.questions import MODALITIES, MODALITY_FORMS, Asker, Question
from ldrt_edge.train.data.summary import summary
from ldrt_edge.train.data.volume_slices import PLANES, Lesion, LoadedVolume, Slice, add_lesions, cut, load_volume

REGION_SITES: dict[str, tuple[str, ...]] = {
    "frontal lobe": ("Precentral", "Frontal", "Rolandic", "Supp_Motor", "Olfactory", "Rectus", "Paracentral"),
    "parietal lobe": ("Postcentral", "Parietal", "SupraMarginal", "Angular", "Precuneus"),
    "occipital lobe": ("Calcarine", "Cuneus", "Lingual", "Occipital"),
    "temporal lobe": ("Fusiform", "Heschl", "Temporal"),
    "cerebellum": ("Cerebelum", "Vermis"),
    "caudate nucleus": ("Caudate",),
    "lentiform nucleus": ("Putamen", "Pallidum"),
    "thalamus": ("Thalamus",),
    "hippocampus": ("Hippocampus", "ParaHippocampal"),
    "insula": ("Insula",),
    "cingulate gyrus": ("Cingulum",),
}
"""Plain names for the AAL atlas. Source: Tzourio-Mazoyer et al., NeuroImage 15:273 (2002), table 2."""

_OTHER_ORGANS = ("brain", "chest", "abdomen", "pelvis", "heart")
_SHOWN = 0.01  # share of the picture from which on a structure counts as visible
_CLEAR = 0.12  # distance from the middle, in widths, from which on a side is clear
_SLAB_MM = 10.0  # neighbouring slices are nearly equal, so the split goes by slab


@dataclass(frozen=True)
class Volume:
    """A volume to slice. `weight`: its share of the pictures. `group`: the dataset rows' kind ("HEAD").

    Volumes of one `subject` are split alike, so that no slab of a person is on both sides.
    """

    image: Path
    modality: str
    organ: str
    group: str
    source: str
    licence: str
    labels: Path | None = None
    names: Path | None = None
    subject: str = ""
    weight: float = 1.0


def import_volumes(
    volumes: Sequence[Volume], out: Path, images: int = 1000, test_fraction: float = 0.1, seed: int = 0,
    size: int = 224, lesions: bool = True,
) -> Path:
    """Write a dataset artefact of `images` slices, `size` × `size` grey PNG, with 5 to 10 questions each.

    Closed answers are balanced for each thing asked about. The split goes by slabs of 10 mm of each volume and plane.

    Raises:
        ConfigError: an option out of range, or a modality without words.
        DataError: a volume, label map or table of names cannot be read.
        MissingExtraError: nibabel is not installed.
    """
    _check(volumes, images, test_fraction, size)
    config = {
        "stage": "volumes", "images": images, "test_fraction": test_fraction, "size": size, "lesions": lesions,
        "volumes": [_identity(volume) for volume in volumes],
    }
    with artifact.create(out, "dataset", config, seed=seed) as draft:
        if draft.complete:
            return out
        rows: list[Row] = []
        with DatasetWriter(draft.path) as writer, bar("slicing", images) as shown:
            balance = Balance(random.Random(f"{seed}/balance"))
            for index, (volume, count) in enumerate(_shares(volumes, images)):
                loaded = load_volume(volume.image, volume.labels, _regions(volume), volume.modality == "CT")
                rng = random.Random(f"{seed}/{index}/{volume.source}")
                for number, piece in enumerate(_slices(loaded, volume, count, size, lesions, rng)):
                    image, digest = writer.add_image(png_bytes(piece.pixels), ".png")
                    group = f"{volume.subject or index}/{piece.plane}/{int(piece.position_mm // _SLAB_MM)}"
                    source = "; ".join([volume.source, *_changes(piece)])
                    present, absent = _seen(piece, volume)
                    for asked, question in enumerate(_questions(piece, volume, lesions, Asker(balance, rng), rng)):
                        rows.append(Row(
                            id=f"volume-{index}-{number:05d}-{asked}", image=image, image_sha256=digest,
                            turns=(Turn("user", question.text), Turn("assistant", question.answer)), language="en",
                            task=question.task, answer_type=question.answer_type, source=source,
                            licence=volume.licence, group=group, kind=volume.group, present=present, absent=absent,
                        ))
                    shown.advance()
            splits = assign_splits([row.group for row in rows], test_fraction, seed, [_plane_of(row) for row in rows])
            rows = [replace(row, split=splits[row.group]) for row in rows]
            for row in rows:
                writer.add(row)
        draft.metrics.update(summary(rows))
    return out


def read_volumes(path: Path) -> list[Volume]:
    """The volumes that a YAML list names; its paths are relative to the list.

    Raises:
        DataError: no such list, or entries that are incomplete or name what is not known.
    """
    path = Path(path)
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not readable as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or not entries:
        raise DataError(f"{path}: wanted a list of volumes, each with image, modality, organ, group, source, licence")
    known = {field.name for field in fields(Volume)}
    needed = {"image", "modality", "organ", "group", "source", "licence"}
    problems, volumes = [], []
    for number, entry in enumerate(entries, start=1):
        missing, unknown = sorted(needed - entry.keys()), sorted(map(str, entry.keys() - known))
        if missing or unknown:
            problems.append(f"volume {number}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")
            continue
        values = {key: str(value) for key, value in entry.items()}
        values |= {key: str(path.parent / values[key]) for key in ("image", "labels", "names") if key in values}
        try:
            volumes.append(_volume(values))
        except (TypeError, ValueError):
            problems.append(f"volume {number}: weight must be a number")
    if problems:
        raise DataError(all_problems(problems, str(path)))
    return volumes


def _slices(
    loaded: LoadedVolume, volume: Volume, count: int, size: int, lesions: bool, rng: random.Random
) -> Iterator[Slice]:
    """`count` slices, planes in turn; half of those that can hold lesions get one or two."""
    planes, bright = deal(PLANES, count, rng), deal((True, False), count, rng)
    number_of_lesions = deal((0, 1, 0, 2) if lesions and loaded.labels is not None else (0,), count, rng)
    for plane, wanted, light in zip(planes, number_of_lesions, bright, strict=True):
        for _ in range(60):
            piece = cut(loaded, plane, rng.random() < (0.5 if plane == "sagittal" else 0.3), size, rng)
            if piece is not None and wanted:
                piece = add_lesions(piece, wanted, light, rng)
            if piece is not None and len(piece.lesions) == wanted:
                yield piece
                break
        else:
            raise DataError(f"{volume.image}: no {plane} slice shows enough (labelled) tissue")


def _changes(piece: Slice) -> list[str]:
    """What was done to the picture that is not in the volume; every row says so."""
    return ["inverted contrast"] * piece.inverted + ["simulated lesion"] * bool(piece.lesions)


def _questions(
    piece: Slice, volume: Volume, lesions: bool, ask: Asker, rng: random.Random
) -> list[Question]:
    """What is asked about one slice: its plane always, the rest as far as this slice can answer it."""
    others = [plane for plane in PLANES if plane != piece.plane]
    if rng.random() < 0.5:
        ask.open("plane", piece.plane)
    else:
        ask.check("plane check", piece.plane, rng.choice(others))
    if rng.random() < 0.2:
        foil = rng.choice([name for name in MODALITIES if name != volume.modality])
        ask.modality(rng.choice(MODALITY_FORMS), volume.modality, foil)
    if rng.random() < 0.15:
        if rng.random() < 0.5:
            ask.open("organ", volume.organ)
        else:
            ask.check("organ check", volume.organ, rng.choice([o for o in _OTHER_ORGANS if o != volume.organ]))
    _ask_regions(piece, volume, ask, rng)
    if lesions and piece.regions:
        _ask_lesions(piece, volume, ask, rng)
    rng.shuffle(ask.questions)
    return ask.questions


def _ask_regions(piece: Slice, volume: Volume, ask: Asker, rng: random.Random) -> None:
    visible, absent = _seen(piece, volume)
    for _ in range(0 if not visible else 1 if piece.lesions else 2):
        ask.presence(sorted(visible), absent)
    if piece.lesions:
        return
    size = piece.pixels.shape[0]
    shares = {name: float(piece.regions[name].mean()) for name in visible}
    middles = {name: piece.regions[name].nonzero() for name in visible}
    sides = [(name, "left" if columns.mean() < size / 2 else "right") for name, (_, columns) in middles.items()
             if abs(columns.mean() / size - 0.5) > _CLEAR and columns.std() < 0.2 * size]
    heights = [(name, "upper" if rows.mean() < size / 2 else "lower") for name, (rows, _) in middles.items()
               if abs(rows.mean() / size - 0.5) > _CLEAR and rows.std() < 0.2 * size]
    for task, candidates in (("position", sides), ("height", heights)):
        if candidates:
            ask.about(task, candidates)
    ask.larger([(a, b) for a in visible for b in visible if shares[a] >= 1.6 * shares[b]])


def _seen(piece: Slice, volume: Volume) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Regions that can be seen, and regions that the slice does not touch; what is barely touched is neither."""
    shares = {name: float(mask.mean()) for name, mask in piece.regions.items()}
    visible = tuple(name for name, share in shares.items() if share >= _SHOWN)
    return visible, tuple(sorted(name for name in set(_regions(volume).values()) if not shares.get(name)))


def _ask_lesions(piece: Slice, volume: Volume, ask: Asker, rng: random.Random) -> None:
    ask.add("lesion presence", "yes" if piece.lesions else "no", "closed")
    if not piece.lesions:
        return
    lesion: Lesion = piece.lesions[0]
    words = ("hyperdense", "hypodense") if volume.modality == "CT" else ("hyperintense", "hypointense")
    name, foil = words if lesion.bright else words[::-1]
    if rng.random() < 0.5:
        ask.check("lesion intensity check", name, foil)
    else:
        ask.add("lesion intensity", name, "closed", bright=words[0], dark=words[1])
    if rng.random() < 0.5:
        ask.add("lesion count", str(len(piece.lesions)), "open")
    else:
        ask.add("lesion count check", "yes" if len(piece.lesions) > 1 else "no", "closed")
    if len(piece.lesions) > 1:
        return
    size = piece.pixels.shape[0]
    if abs(lesion.column / size - 0.5) > 0.06:
        ask.add("lesion image side", "left" if lesion.column < size / 2 else "right", "closed")
    if lesion.side:
        shown = "left" if piece.flipped else "right"
        said = piece.flipped or rng.random() < 0.3
        note = f" The patient's {shown} is on the left of the image." if said else ""
        ask.add("lesion side", lesion.side, "closed", note, organ=volume.organ)
        if lesion.region:
            ask.add("lesion region", f"{lesion.side} {lesion.region}", "open", note)
    elif lesion.region:
        ask.add("lesion region", lesion.region, "open")


def _regions(volume: Volume) -> dict[int, str]:
    """Label values to plain region names, both sides and all parts of a region under one name.

    Raises:
        DataError: the table of names is missing or not a number and a name a line.
    """
    if volume.labels is None:
        return {}
    if volume.names is None:
        raise DataError(f"{volume.image}: labels need a table of names (a number and a name a line)")
    try:
        lines = volume.names.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{volume.names}: cannot be read as a table of names") from error
    regions = {}
    for number, line in enumerate(lines, start=1):
        parts = line.split(maxsplit=1)
        if not parts:
            continue
        if len(parts) < 2 or not parts[0].isdigit():
            raise DataError(f"{volume.names}: line {number}: wanted a number and a name")
        if int(parts[0]):
            regions[int(parts[0])] = region_name(parts[1])
    return regions


def region_name(name: str) -> str:
    """A plain name: `Frontal_Sup_L 2101` is in the frontal lobe, `Kidney_left` a kidney."""
    name = re.sub(r"\s+\d+$", "", name.strip())
    name = re.sub(r"(?i)[_ ](l|r|left|right)$|^(left|right)[_ ]", "", name)
    for plain, sites in REGION_SITES.items():
        if name.startswith(sites):
            return plain
    return name.replace("_", " ").lower()


def _volume(values: Mapping[str, str]) -> Volume:
    labels, names = values.get("labels"), values.get("names")
    return Volume(
        image=Path(values["image"]), modality=values["modality"], organ=values["organ"], group=values["group"],
        source=values["source"], licence=values["licence"], labels=Path(labels) if labels else None,
        names=Path(names) if names else None, subject=values.get("subject", ""), weight=float(values.get("weight", 1)),
    )


def _shares(volumes: Sequence[Volume], images: int) -> list[tuple[Volume, int]]:
    total = sum(volume.weight for volume in volumes)
    counts = [int(images * volume.weight / total) for volume in volumes]
    counts[0] += images - sum(counts)
    return list(zip(volumes, counts, strict=True))


def _identity(volume: Volume) -> dict[str, str | float | None]:
    """The volume by content, for the config: a machine's paths do not belong into a manifest."""
    files = {key: value for key, value in asdict(volume).items() if isinstance(value, Path)}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise DataError(all_problems(missing, "volumes: no such file"))
    return asdict(volume) | {key: file_digest(path) for key, path in files.items()}


def _plane_of(row: Row) -> str:
    return row.group.split("/")[-2]


def _check(volumes: Sequence[Volume], images: int, test_fraction: float, size: int) -> None:
    problems = []
    if not volumes:
        problems.append("no volume named")
    for volume in volumes:
        if volume.modality not in MODALITIES:
            problems.append(f"{volume.image.name}: modality {volume.modality!r}, known: {', '.join(MODALITIES)}")
        if volume.weight <= 0:
            problems.append(f"{volume.image.name}: weight {volume.weight}, wanted above 0")
    if images < 1:
        problems.append(f"--images {images}: at least 1")
    if not 0 <= test_fraction <= 1:
        problems.append(f"--test-fraction {test_fraction}: from 0 to 1")
    if not 64 <= size <= 1024:
        problems.append(f"--size {size}: from 64 to 1024 pixels")
    if problems:
        raise ConfigError(all_problems(problems, "volumes"))
