"""`ldrt-edge data`: the commands that make datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from ldrt_edge.options import PATH, json_option, show_artifact

if TYPE_CHECKING:
    from ldrt_edge.train.data.phantom_text import Language


@click.group()
def data() -> None:
    """Make dataset artefacts: drawn phantoms, imported questions, labelled volumes."""


@data.command()
@click.argument("out", type=PATH)
@click.option("--images", default=1000, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True)
@click.option("--test-fraction", default=0.2, show_default=True, type=click.FloatRange(0, 1))
@click.option("--languages", default="en,de,es,fr,pt,zh", show_default=True, help="Of the questions.")
@json_option
def phantom(out: Path, images: int, seed: int, test_fraction: float, languages: str, as_json: bool) -> None:
    """Draw synthetic LDRT treatment plans with questions whose answers are exactly known, in six languages."""
    from ldrt_edge.train.data.phantom import phantom as make

    chosen = cast("tuple[Language, ...]", tuple(languages.split(",")))  # checked there
    show_artifact(make(out, images, seed, test_fraction, chosen), as_json)


@data.command("import")
@click.argument("form", type=click.Choice(["vqa-rad", "llava"]))
@click.argument("source", type=PATH)
@click.argument("out", type=PATH)
@click.option("--test-fraction", default=0.2, show_default=True, type=click.FloatRange(0, 1))
@click.option("--seed", default=0, show_default=True, help="Of the split by image.")
@click.option("--skip-bad", is_flag=True, help="Count rows that cannot be read, and leave them out.")
@json_option
def import_(
    form: str, source: Path, out: Path, test_fraction: float, seed: int, skip_bad: bool, as_json: bool
) -> None:
    """Import VQA-RAD's public JSON, or LLaVA's conversation JSON, with its images."""
    from ldrt_edge.train.data.imports import import_llava, import_vqa_rad

    if form == "vqa-rad":
        path = import_vqa_rad(source, out, test_fraction, seed, skip_bad)
    else:
        path = import_llava(source, out, test_fraction, seed, skip_bad)
    show_artifact(path, as_json)


@data.command()
@click.argument("listing", type=PATH)
@click.argument("out", type=PATH)
@click.option("--images", default=1000, show_default=True, type=click.IntRange(min=1))
@click.option("--test-fraction", default=0.1, show_default=True, type=click.FloatRange(0, 1))
@click.option("--seed", default=0, show_default=True)
@click.option("--lesions/--no-lesions", default=True, help="Also draw simulated lesions; their rows say so.")
@json_option
def volumes(
    listing: Path, out: Path, images: int, test_fraction: float, seed: int, lesions: bool, as_json: bool
) -> None:
    """Slices of labelled NIfTI volumes, named in a YAML list, with exact answers about plane, side and structure."""
    from ldrt_edge.train.data.volumes import import_volumes, read_volumes

    found = read_volumes(listing)
    show_artifact(import_volumes(found, out, images, test_fraction, seed, lesions=lesions), as_json)


@data.command()
@click.argument("dataset", type=PATH)
@click.argument("out", type=PATH)
@click.option("--copies", default=4, show_default=True, type=click.IntRange(min=1), help="Of each training picture.")
@click.option("--seed", default=0, show_default=True)
@json_option
def augment(dataset: Path, out: Path, copies: int, seed: int, as_json: bool) -> None:
    """Training pictures again, slightly turned, zoomed and toned, with the same questions; never the test split."""
    from ldrt_edge.train.data.augment import augment as run

    show_artifact(run(dataset, out, copies, seed), as_json)


@data.command()
@click.argument("dataset", type=PATH)
@click.argument("out", type=PATH)
@click.option("--seed", default=0, show_default=True)
@json_option
def contrast(dataset: Path, out: Path, seed: int, as_json: bool) -> None:
    """Questions that only the picture answers: each put to as many pictures where it is true as to others."""
    from ldrt_edge.train.data.contrast import contrast as run

    show_artifact(run(dataset, out, seed), as_json)


@data.command()
@click.argument("folders", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, required=True)
@click.option("--images", default=300, show_default=True, type=click.IntRange(min=1))
@click.option("--test-fraction", default=0.2, show_default=True, type=click.FloatRange(0, 1))
@click.option("--seed", default=0, show_default=True)
@json_option
def modalities(
    folders: tuple[Path, ...], out: Path, images: int, test_fraction: float, seed: int, as_json: bool
) -> None:
    """Cuttings of DICOM files with questions about their modality, which their headers tell."""
    from ldrt_edge.train.data.modalities import import_dicom_known

    show_artifact(import_dicom_known(folders, out, images, test_fraction, seed), as_json)
