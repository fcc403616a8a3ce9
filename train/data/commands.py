"""`ldrt-edge data`: the commands that make datasets."""

from __future__ import annotations

import json
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
@click.argument("articles", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, help="The pairs artefact.")
@click.option(
    "--licences", default="CC0-1.0,public-domain,CC-BY,CC-BY-SA", show_default=True,
    help="SPDX; a name without a version stands for all.",
)
@click.option("--languages", default="", help="Two-letter tags (en,de); all when left out.")
@click.option("--terms", type=PATH, help="A term list (YAML) of your own, instead of the one for LDRT.")
@click.option("--any-topic", is_flag=True, help="Keep articles whatever they are about.")
@click.option("--min-side", default=96, show_default=True, help="Pixels; smaller pictures are dropped.")
@click.option("--max-side", default=1344, show_default=True, help="Pixels; larger pictures are scaled down.")
@click.option("--panels/--whole", default=True, help="Cut compound figures where caption and picture agree.")
@click.option("--strikes", type=PATH, help="Pairs struck by a person in `data view`.")
@click.option("--workers", default=1, show_default=True, help="Processes; with --ray, tasks at once.")
@click.option(
    "--ray", "ray_address", metavar="ADDRESS", help="Of a Ray cluster that sees the same folders; 'local' starts one."
)
@json_option
def curate(
    articles: tuple[Path, ...], out: Path, licences: str, languages: str, terms: Path | None, any_topic: bool,
    min_side: int, max_side: int, panels: bool, strikes: Path | None, workers: int, ray_address: str | None,
    as_json: bool,
) -> None:
    """Articles (JATS, folders, zips, tars, PDFs) to pairs of a picture and its caption, with licence and origin."""
    from ldrt_edge import artifact
    from ldrt_edge.errors import ConfigError, require

    require("lxml", "train")
    from ldrt_edge.train.data.curate import curate as run
    from ldrt_edge.train.data.curate import read_strikes
    from ldrt_edge.train.data.filters import Settings
    from ldrt_edge.train.data.funnel import funnel_text
    from ldrt_edge.train.data.relevance import load_terms

    if terms and any_topic:
        raise ConfigError("--terms and --any-topic exclude each other")
    settings = Settings(
        licences=_listed(licences), terms=None if any_topic else load_terms(terms), languages=_listed(languages),
        min_side=min_side, max_side=max_side, panels=panels,
    )
    path = run(articles, out, settings, workers, ray_address, read_strikes(strikes) if strikes else None)
    if not as_json:
        click.echo(funnel_text([(what, step, count) for what, step, count in artifact.read(path).metrics["funnel"]]))
    show_artifact(path, as_json)


@data.command()
@click.argument("pairs", type=PATH)
@click.option("--out", type=PATH, required=True, help="The dataset artefact.")
@click.option(
    "--generator", default="none", show_default=True, metavar="none|URL|MODEL",
    help="Who writes: an OpenAI-compatible address (key in LDRT_EDGE_API_KEY), a model folder, or the captions alone.",
)
@click.option("--model", help="The model's name at the URL, where it has several.")
@click.option("--tasks", default="conversation,detailed description,complex reasoning,closed", show_default=True)
@click.option("--test-fraction", default=0.05, show_default=True, type=click.FloatRange(0, 1), help="Of the clusters.")
@click.option("--seed", default=0, show_default=True)
@click.option("--max-requests", type=click.IntRange(min=0), help="Stop when so many were asked in this run.")
@click.option("--max-tokens", type=click.IntRange(min=0), help="Stop when so many tokens were used in this run.")
@click.option("--parallel", default=4, show_default=True, type=click.IntRange(1, 64), help="Requests at once.")
@click.option("--cache", type=PATH, help="A file that keeps answers beyond this dataset.")
@json_option
def instruct(
    pairs: Path, out: Path, generator: str, model: str | None, tasks: str, test_fraction: float, seed: int,
    max_requests: int | None, max_tokens: int | None, parallel: int, cache: Path | None, as_json: bool,
) -> None:
    """Pairs to a dataset: conversations, descriptions, reasoning and closed questions, held to their source."""
    from ldrt_edge.errors import require

    require("pydantic", "train")
    from ldrt_edge.train.data.generators import Budget, open_generator
    from ldrt_edge.train.data.instruct import instruct as run

    writer = None if generator == "none" else open_generator(generator, model)
    try:
        budget = Budget(max_requests, max_tokens)
        path = run(pairs, out, writer, _listed(tasks), test_fraction, seed, budget, parallel, cache)
    finally:
        if writer is not None:
            writer.close()
    show_artifact(path, as_json)


@data.command("export")
@click.argument("dataset", type=PATH)
@click.argument("out", type=PATH)
@click.option("--to", "form", required=True, type=click.Choice(["llava", "hf"]))
@json_option
def export_(dataset: Path, out: Path, form: str, as_json: bool) -> None:
    """A dataset as LLaVA's conversation JSON, or as a folder for Hugging Face `datasets`."""
    from ldrt_edge.train.data.outputs import export as run

    show_artifact(run(dataset, form, out), as_json)


@data.command()
@click.argument("artefact", type=PATH)
@click.option("--plot", type=PATH, metavar="PNG", help="Draw the counts, too.")
@json_option
def stats(artefact: Path, plot: Path | None, as_json: bool) -> None:
    """Counts of a pairs or dataset artefact: languages, licences, tasks, lengths."""
    from ldrt_edge.train.data.stats import count, draw, stats_text

    counts = count(artefact)
    if plot:
        draw(counts, plot)
    click.echo(json.dumps(counts, ensure_ascii=False) if as_json else stats_text(counts))


@data.command()
@click.argument("pairs", type=PATH)
@click.option("--strikes", type=PATH, required=True, help="The file of decisions; made if need be, and gone on with.")
@click.option("--port", default=0, show_default=True, type=click.IntRange(0, 65535), help="0 takes any free one.")
@click.option("--browser/--no-browser", default=True, help="Open the page.")
@json_option
def view(pairs: Path, strikes: Path, port: int, browser: bool, as_json: bool) -> None:
    """A local page to leaf through pairs and strike bad ones, for `data curate --strikes` to leave out."""
    from ldrt_edge.train.data.view import view as run

    run(pairs, strikes, port, browser, as_json)


def _listed(values: str) -> tuple[str, ...]:
    return tuple(value.strip() for value in values.split(",") if value.strip())


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
