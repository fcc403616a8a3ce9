"""The commands that make exports and hold them against their model: convert, importance, plan, quantize, parity."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ldrt_edge.errors import ArtifactError, ConfigError, all_problems
from ldrt_edge.options import PATH, beside, json_option, show_artifact

if TYPE_CHECKING:
    from ldrt_edge.convert.calibration import Calibration
    from ldrt_edge.convert.format import Format
    from ldrt_edge.convert.quantize import Importance

F = TypeVar("F", bound=Callable[..., Any])


def _weighting_option(command: F) -> F:
    kinds, told = click.Choice(["pooled", "balanced", "answer"]), "Of picture, prompt and answer. Default: balanced."
    return click.option("--weighting", type=kinds, help=told)(command)


def _calibration_options(command: F) -> F:
    rescale = "Round what meets large inputs more finely (AWQ), as --data's training rows show it."
    feedback = "Let weights make good for others' rounding (GPTQ), likewise."
    command = click.option("--feedback", is_flag=True, help=feedback)(command)
    return click.option("--rescale", is_flag=True, help=rescale)(command)


@click.command()
@click.argument("model", type=PATH)
@click.option("--to", type=click.Choice(["gguf", "mlx"]), help="Default: gguf.")
@click.option("--type", "type_", type=click.Choice(["f32", "f16", "bf16"]), help="Default: f16.")
@click.option("--mmproj", type=click.Choice(["f32", "f16", "q8_0"]), help="GGUF's. Default: f32 for f32, else f16.")
@click.option("--for", "app", type=click.Choice(["ollama", "lmstudio"]), help="Lay out an export as an app wants it.")
@click.option("--out", type=PATH, help="Default: MODEL-TO-TYPE, or MODEL-APP, beside it.")
@json_option
def convert(
    model: Path, to: str | None, type_: str | None, mmproj: str | None, app: str | None, out: Path | None, as_json: bool
) -> None:
    """Convert merged weights for llama.cpp or MLX, held against them by logits before the result gets its name.

    With --for, lay out a finished export (converted or quantised) as another app imports it.
    """
    if app is not None:
        from ldrt_edge.convert.apps import for_app

        _refuse(f"--for {app}", to=to, type=type_, mmproj=mmproj)
        made = for_app(model, app, out or beside(model, app))
        show_artifact(made, as_json)
        return
    type_ = type_ or "f16"
    if to == "mlx":
        from ldrt_edge.convert import mlx

        _refuse("--to mlx", mmproj=mmproj)
        made = mlx.convert(model, out or beside(model, f"mlx-{type_.upper()}"), type_)
    else:
        from ldrt_edge.convert import gguf

        made = gguf.convert(model, out or beside(model, f"gguf-{type_.upper()}"), type_, mmproj)
    show_artifact(made, as_json)


@click.command()
@click.argument("model", type=PATH)
@click.option("--data", "dataset", required=True, type=PATH, help="Dataset artefact; its training rows are shown.")
@click.option("--out", type=PATH, help="Default: MODEL-importance beside it.")
@click.option("--limit", type=click.IntRange(min=1), help="About this many rows, as whole pictures.")
@click.option("--seed", default=0, show_default=True, help="Of the choice of pictures.")
@click.option("--threads", type=click.IntRange(min=1))
@json_option
def importance(
    model: Path, dataset: Path, out: Path | None, limit: int | None, seed: int, threads: int | None, as_json: bool
) -> None:
    """Measure which inputs of each matrix matter, on your own pictures and questions, for quantize --importance.

    MODEL is a merged model, watched in transformers, or an unquantised GGUF folder, watched in llama.cpp.
    """
    from ldrt_edge.convert.importance import importance as run

    out = out or beside(model, "importance")
    show_artifact(run(model, dataset, out, limit, seed, threads), as_json)


@click.command()
@click.argument("merged", type=PATH)
@click.option("--to", type=click.Choice(["gguf", "mlx"]), default="gguf", show_default=True)
@click.option("--q4", is_flag=True, help="Four bits: Q4_K_M, or MLX's affine 4.")
@click.option("--q8", is_flag=True, help="Eight bits: Q8_0, or MLX's affine 8.")
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
@_calibration_options
@click.option("--fit", is_flag=True, help="Try both, either and neither on some of --data; keep what loses least.")
@click.option("--data", "dataset", type=PATH, help="Its training rows guide, with --max-loss its test rows judge.")
@click.option("--limit", type=click.IntRange(min=1), help="With --max-loss: about how many test rows are asked.")
@click.option("--out", type=PATH, help="Default: MERGED-TO-TYPE beside it.")
@json_option
def quantize(
    merged: Path, to: str, q4: bool, q8: bool, type_: str | None, mmproj: str | None, group_size: str | None,
    importance: Path | None, weighting: str | None, plan: Path | None, max_loss: float | None, max_flips: float | None,
    rescale: bool, feedback: bool, fit: bool, dataset: Path | None, limit: int | None, out: Path | None, as_json: bool,
) -> None:
    """Quantise merged weights to GGUF or MLX: to a preset, by a plan, or as far as a loss budget allows.

    Falls back per tensor where rows do not divide into a preset's type, and says so.
    """
    types = [name for name in ("q4" * q4, "q8" * q8, type_) if name]
    if len(types) + (plan is not None) + (max_loss is not None) != 1:
        raise ConfigError("which types? one of --q4, --q8 or --type TYPE, --plan FILE, --max-loss POINTS")
    type_ = types[0] if types else None
    if to == "mlx":
        _refuse(f"--to {to}", importance=importance)
    else:
        _refuse(f"--to {to}", group_size=group_size)
    given = _importance(importance, weighting)
    if max_loss is None and (max_flips, limit) != (None, None):
        raise ConfigError("--max-flips and --limit go with --max-loss")
    if fit and (rescale or feedback):
        raise ConfigError("--fit tries --rescale and --feedback itself")
    if (fit or rescale or feedback) and dataset is None:
        raise ConfigError("--fit, --rescale and --feedback want --data")
    if max_loss is None and dataset is not None and not (fit or rescale or feedback):
        raise ConfigError("--data goes with --max-loss, --fit, --rescale or --feedback")
    if type_ is None and (mmproj, group_size) != (None, None):
        raise ConfigError("--mmproj and --group-size go with a preset: a plan has every type itself")
    wanted = _format(to, given, _calibration(dataset, rescale, feedback, fit))
    if max_loss is not None:
        if dataset is None or (given is None and to == "gguf"):
            raise ConfigError("--max-loss wants --data, and for GGUF --importance")
        out = out or beside(merged, f"{to}-loss{max_loss:g}")
        _to_budget(merged, out, dataset, wanted, (max_loss, max_flips), limit, as_json)
    elif plan is not None:
        from ldrt_edge.convert.planned import quantize_planned
        from ldrt_edge.convert.type_plan import read_type_plan

        out = out or beside(merged, f"{to}-{plan.stem}")
        show_artifact(quantize_planned(merged, out, read_type_plan(plan, wanted.name), wanted), as_json)
    else:
        assert type_ is not None
        made = _to_preset(merged, out, type_, wanted, mmproj, int(group_size) if group_size else None)
        _tell_loss(merged, made)
        show_artifact(made, as_json)


def _to_preset(
    merged: Path, out: Path | None, type_: str, to: Format, mmproj: str | None, group_size: int | None
) -> Path:
    from ldrt_edge.convert import mlx
    from ldrt_edge.convert.planned import quantize_planned
    from ldrt_edge.convert.quantize import Gguf
    from ldrt_edge.convert.quantize import quantize as run
    from ldrt_edge.convert.quantizer import PRESETS
    from ldrt_edge.convert.source import open_source

    fitted = "".join(f"-{name}" for name in to.calibration.config()) if to.calibration else ""
    if isinstance(to, Gguf):
        out = out or beside(merged, f"gguf-{PRESETS.get(type_, type_)}{fitted}")
        if not fitted:
            return run(merged, out, type_, mmproj, to.importance)
        return quantize_planned(merged, out, to.preset(open_source(merged), type_, mmproj), to)
    assert isinstance(to, mlx.Mlx)
    _refuse("--to mlx", mmproj=mmproj)
    out = out or beside(merged, f"mlx-{type_}{fitted}")
    if not fitted:
        return mlx.quantize(merged, out, type_, group_size)
    return quantize_planned(merged, out, to.preset(open_source(merged), type_, group_size), to)


def _tell_loss(merged: Path, made: Path) -> None:
    """How a preset compares with its model, and how to know what that means."""
    from ldrt_edge import artifact
    from ldrt_edge.console import say

    found = artifact.read(made).metrics["fidelity"]
    measured = f"mean KLD {found['mean_kld']:.2g}, same top token {found['top1_agreement']:.1%} of {found['tokens']}"
    say(f"{made.name}, held against {merged.name}: {measured}")
    say("what that costs in answers: ldrt-edge quantize --max-loss POINTS --data DATASET")


def _importance(folder: Path | None, weighting: str | None) -> Importance | None:
    from ldrt_edge.convert.quantize import Importance

    if folder is None:
        if weighting is not None:
            raise ConfigError("--weighting goes with --importance")
        return None
    return Importance(folder, weighting or Importance.weighting)


def _calibration(data: Path | None, rescale: bool, feedback: bool, fit: bool = False) -> Calibration | None:
    from ldrt_edge.convert.calibration import Calibration

    return Calibration(data, rescale, feedback, undecided=fit) if data and (fit or rescale or feedback) else None


def _format(to: str, importance: Importance | None, calibration: Calibration | None = None) -> Format:
    if to == "mlx":
        from ldrt_edge.convert.mlx import Mlx

        return Mlx(calibration)
    from ldrt_edge.convert.quantize import Gguf

    return Gguf(importance, calibration)


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
    show_artifact(out, as_json)
    if not verdict.released:
        raise ArtifactError(f"{out}: not released: {verdict.reason}")


@click.command()
@click.argument("merged", type=PATH)
@click.option("--data", "dataset", required=True, type=PATH, help="Dataset artefact; its training rows are asked.")
@click.option("--to", type=click.Choice(["gguf", "mlx"]), default="gguf", show_default=True)
@click.option("--importance", type=PATH, help="What `ldrt-edge importance` measured; MLX rounds without.")
@_weighting_option
@click.option("--target-size", type=float, metavar="MB", help="Of the weights' files, vision tower and projector too.")
@click.option("--bpw", type=float, metavar="BITS", help="Bits a weight, over all matrices of the export.")
@click.option("--max-kld", type=float, help="The least size whose estimated mean KLD stays within this.")
@click.option(
    "--min-speed", type=float, metavar="TOKENS",
    help="A second, at most, by memory bandwidth: bounds what a token reads. What else it takes comes on top.",
)
@click.option("--bandwidth", type=float, metavar="GB/S", help="With --min-speed: the laptop's, as doctor tells there.")
@_calibration_options
@click.option("--limit", default=16, show_default=True, type=click.IntRange(min=1), help="About this many rows.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=PATH, required=True, help="The plan file (YAML).")
@json_option
def plan(
    merged: Path, dataset: Path, to: str, importance: Path | None, weighting: str | None, target_size: float | None,
    bpw: float | None, max_kld: float | None, min_speed: float | None, bandwidth: float | None, rescale: bool,
    feedback: bool, limit: int, seed: int, out: Path, as_json: bool,
) -> None:
    """Choose a type for every matrix: least damage to the answers within a size, or within what a speed lets a token
    read; or least size within a damage.

    The plan is a file to read, edit and pass to `ldrt-edge quantize --plan`. It names GGUF's types (Q4_K, IQ3_S, Q8_0,
    …), or MLX's as affine-BITS-gGROUP: 2, 3, 4, 5, 6 or 8 bits a weight, 32, 64 or 128 weights to a scale. Both have
    f16. With --rescale and --feedback it is made for an export that gets them too.
    """
    from ldrt_edge.convert.allocate import Speed
    from ldrt_edge.convert.allocate import plan as run

    if (min_speed is None) != (bandwidth is None):
        raise ConfigError("--min-speed and --bandwidth go together: a token waits for the memory it reads")
    if to == "mlx":
        _refuse(f"--to {to}", importance=importance)
    elif importance is None:
        raise ConfigError("plan --to gguf wants --importance: run ldrt-edge importance first")
    wanted = _format(to, _importance(importance, weighting), _calibration(dataset, rescale, feedback))
    target = None if target_size is None else target_size * 1e6
    speed = None if min_speed is None or bandwidth is None else Speed(min_speed, bandwidth)
    made = run(
        merged, dataset, wanted, out, target_bytes=target, bits_per_weight=bpw, max_kld=max_kld, speed=speed,
        limit=limit, seed=seed,
    )  # fmt: skip
    click.echo(json.dumps({"path": str(made)}) if as_json else made)


@click.command()
@click.argument("reference", type=PATH, required=False)
@click.argument("exports", type=PATH, nargs=-1)
@click.option("--golden", type=PATH, metavar="EDGE", help="Replay an export's golden answers: needs no torch.")
@click.option("--peers", is_flag=True, help="Also show how far stock runtimes are off, where they are installed.")
@click.option("--out", type=PATH, help="Also write the table there, as an artefact.")
@json_option
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


def _refuse(chosen: str, **options: object) -> None:
    """Options that mean nothing beside the one chosen."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {value} does not go with {chosen}")
