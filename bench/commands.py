"""The commands that measure: `bench EDGE`, and what else `bench` does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from ldrt_edge.bundle.commands import trust_once_option
from ldrt_edge.errors import ConfigError
from ldrt_edge.options import PATH, F, beside, json_option, show_artifact

if TYPE_CHECKING:
    from ldrt_edge.dataset import Split

_MEASURE = "measure"
_FILE = click.Path(path_type=Path, dir_okay=False)


class _Bench(click.Group):
    """`bench EDGE …` is `bench measure EDGE …`: the first word names a model unless it names a command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = bool(args) and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named or not args else [_MEASURE, *args])


def _seed_option(of_what: str) -> Callable[[F], F]:
    """`--seed`, with what is drawn by it."""
    return click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help=of_what)


@click.group(cls=_Bench, invoke_without_command=False)
def bench() -> None:
    """Measure a model: `bench EDGE --data D` (its options: `bench measure --help`). Or one of the commands below."""


@bench.command(_MEASURE)
@click.argument("edge", type=PATH)
@click.option("--data", "dataset", required=True, type=PATH, help="Dataset artefact.")
@click.option("--reference", type=PATH, help="The merged model, for paired loss, flips and fidelity.")
@click.option("--out", type=PATH, help="Default: EDGE-report beside it.")
@click.option("--limit", type=click.IntRange(min=1), help="About this many questions, as whole pictures.")
@click.option("--split", type=click.Choice(["test", "train"]), default="test", show_default=True)
@click.option("--runs", default=5, show_default=True, type=click.IntRange(min=0), help="Timings; 0 leaves latency out.")
@_seed_option("Of wrong pictures, choice of questions and intervals.")
@click.option("--margin", default=1.0, show_default=True, help="Points of accuracy: a loss within it counts as none.")
@click.option("--probes", default=0, show_default=True, type=click.IntRange(min=0), metavar="PICTURES",
              help="Probe with so many pictures what each model makes up.")
@click.option("--beside", type=PATH, multiple=True, help="Another model to ask the same (base, exports); repeatable.")
@click.option("--answer-tokens", default=256, show_default=True, type=click.IntRange(min=1),
              help="Of an answer to an open question, at most.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one for each physical core.")
@click.option("--samples/--no-samples", default=True, show_default=True,
              help="Whether report.html shows pictures, questions and answers; without, it may be given away.")
@trust_once_option
@json_option
def measure(
    edge: Path, dataset: Path, reference: Path | None, out: Path | None, trust_once: bool, as_json: bool, **options: Any
) -> None:
    """Measure a model: accuracy with its blind control, loss against the merged model, speed. Writes report.html."""
    from ldrt_edge.bench.report import bench as run
    from ldrt_edge.bundle.open import model_folder

    out = out or beside(edge, "report")
    show_artifact(run(model_folder(edge, trust_once), dataset, out, reference, **options), as_json)


@bench.command()
@click.argument("report", type=PATH)
@click.option(
    "--judge", "judges", multiple=True, metavar="MODEL@URL|FOLDER",
    help="An OpenAI-compatible endpoint (qwen2-72b@http://host:8000/v1), or a model on this machine; repeatable.",
)
@click.option("--out", type=PATH, help="Default: REPORT-judged beside it.")
@click.option(
    "--questions", "answer_type", type=click.Choice(["open", "closed", "all"]), default="open", show_default=True
)
@click.option("--limit", type=click.IntRange(min=1), help="So many questions, drawn by the seed.")
@click.option("--max-calls", type=click.IntRange(min=1), help="Requests of this run, retries included; again goes on.")
@click.option("--parallel", default=4, show_default=True, type=click.IntRange(1, 64), help="Questions at a time.")
@click.option("--timeout", "timeout_s", default=60.0, show_default=True, help="Seconds for a request.")
@click.option("--retries", default=4, show_default=True, type=click.IntRange(min=0))
@click.option("--key-env", "key_variable", default="OPENAI_API_KEY", show_default=True, metavar="NAME")
@click.option("--cache", type=_FILE, metavar="FILE", help="Of replies. Default: judge-calls.jsonl beside OUT.")
@click.option("--threads", type=click.IntRange(min=1), help="Of judges on this machine.")
@_seed_option("Of the choice of questions and the intervals.")
@json_option
def judge(report: Path, out: Path | None, judges: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Have a report's answers judged: 0 to 10, and in pairs in both orders. Writes them into report.html.

    Question, key and answers go to the endpoints that you name; no picture does, and no model's name.
    """
    from ldrt_edge.errors import require

    for package in ("openai", "pydantic"):
        require(package, "bench")
    from ldrt_edge.bench.judge import judge as run

    show_artifact(run(report, out or beside(report, "judged"), judges, **options), as_json)


@bench.command()
@click.argument("edge", type=PATH, required=False)
@click.option("--arch", help="Instead of EDGE: random weights of this shape (llava-1.5-7b, ...).")
@click.option("--q4", "type_", flag_value="Q4_K_M", default=True, help="Of --arch: Q4_K_M (the default).")
@click.option("--q8", "type_", flag_value="Q8_0", help="Of --arch: Q8_0.")
@click.option("--f16", "type_", flag_value="F16", help="Of --arch: F16.")
@click.option("--data", "dataset", type=PATH, help="Of EDGE: ask about a dataset's pictures instead of noise.")
@click.option("--runs", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--threads", type=click.IntRange(min=1), help="Default: one for each physical core.")
@click.option("--sweep", default="", metavar="1,2,4", help="Numbers of threads to try beside.")
@click.option("--keep", type=PATH, metavar="FOLDER", help="Of --arch: keep what was drawn, to use it again.")
@trust_once_option
@json_option
def latency(
    edge: Path | None, arch: str | None, type_: str, dataset: Path | None, runs: int, threads: int | None, sweep: str,
    keep: Path | None, trust_once: bool, as_json: bool,
) -> None:
    """Time a model on this machine: cold start, image, prefill, first token, decoding, threads, energy."""
    from ldrt_edge.bench.latency import measure as time_one
    from ldrt_edge.bench.latency import table
    from ldrt_edge.bundle.open import model_folder

    if (edge is None) == (arch is None) or (arch and dataset) or (edge and keep):
        raise ConfigError("bench latency times EDGE [--data D], or --arch ARCH [--keep FOLDER]")
    counts = tuple(int(count) if count.isdecimal() and int(count) else 0 for count in sweep.split(",") if count)
    if 0 in counts:
        raise ConfigError(f"--sweep {sweep}: wants numbers of threads, for instance 1,2,4")
    if arch is not None:
        from ldrt_edge.bench.feel import feel

        found = feel(arch, cast("Any", type_), runs, threads, counts, keep)
    else:
        assert edge is not None
        found = time_one(model_folder(edge, trust_once), dataset, runs=runs, threads=threads, sweep=counts)
    click.echo(json.dumps(asdict(found)) if as_json else table(found))


@bench.command()
@click.argument("edge", type=PATH)
@click.option("--data", "dataset", required=True, type=PATH, help="Dataset artefact.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(min=1), help="About so many questions.")
@click.option("--split", type=click.Choice(["test", "train"]), default="test", show_default=True)
@click.option("--branches", default=16, show_default=True, type=click.IntRange(2, 64), help="Questions side by side.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one for each physical core.")
@click.option("--journal", type=_FILE, metavar="FILE", help="Keep timings there; a killed run goes on from them.")
@_seed_option("Of the choice of questions.")
@trust_once_option
@json_option
def throughput(edge: Path, dataset: Path, trust_once: bool, as_json: bool, **options: Any) -> None:
    """Questions a minute: each alone, one after the other, and side by side."""
    from ldrt_edge.bench.throughput import throughput as run
    from ldrt_edge.bundle.open import model_folder

    found = run(model_folder(edge, trust_once), dataset, **options)
    if as_json:
        click.echo(json.dumps(asdict(found) | {"gain": found.gain}))
        return
    asked, load = found.questions, "load average {:.2f} to {:.2f}".format(*found.load_average)
    click.echo(f"{asked} questions about {found.pictures} pictures, {found.threads} threads, {load}")
    for name in ("alone", "one_by_one", "side_by_side"):
        same = f"{getattr(found, f'{name}_identical', asked)} of {asked} answers identical to those alone"
        click.echo(f"{name.replace('_', ' '):13} {getattr(found, f'{name}_per_min'):7.1f} a minute, {same}")
    click.echo(f"side by side: {found.gain:.1f} times as many as alone")


@bench.command("learnable")
@click.argument("base")
@click.option("--data", "dataset", required=True, type=PATH, help="Dataset artefact.")
@click.option("--split", type=click.Choice(["test", "train"]), default="train", show_default=True)
@click.option("--limit", default=4000, show_default=True, type=click.IntRange(min=100), help="About so many questions.")
@_seed_option("Of folds, wrong pictures and intervals.")
@json_option
def learnable_(base: str, dataset: Path, split: Split, limit: int, seed: int, as_json: bool) -> None:
    """Before training: does the tower of BASE see anything that answers these questions, beyond how they are worded?

    A small learner is trained on four fifths of the pictures and asked about the rest, by turns, in seconds.
    """
    from ldrt_edge.errors import require

    require("torch", "train")
    require("sklearn", "bench")
    from ldrt_edge.bench.learnable import learnable
    from ldrt_edge.train.base import resolve_base

    found = learnable(resolve_base(base).folder, dataset, split, limit, seed)
    if as_json:
        click.echo(json.dumps({name: asdict(part) for name, part in found.items()}, ensure_ascii=False))
        return
    click.echo("questions       n  words alone  right picture  wrong, same kind  wrong, any  worth of the picture")
    for name, part in found.items():
        click.echo(
            f"{name[:13]:13} {part.worth.n:>4} {part.words.value:>12.1%} {part.right.value:>14.1%} "
            f"{part.wrong.value:>17.1%} {part.any.value:>11.1%}  {100 * part.worth.value:+.1f} points "
            f"({100 * part.worth.ci_low:+.1f} to {100 * part.worth.ci_high:+.1f})"
        )


@bench.command("export")
@click.argument("report", type=PATH)
@click.option("--out", type=PATH, help="Default: REPORT-lmms beside it.")
@json_option
def export_(report: Path, out: Path | None, as_json: bool) -> None:
    """Write a report's answers as logs of lmms-eval, for tools that read those."""
    from ldrt_edge.bench.lmms import export

    made = export(report, out or beside(report, "lmms"))
    click.echo(json.dumps({"path": str(made)}) if as_json else made)


@bench.command()
@click.argument("reports", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, help="Also write the table there, with a page, as an artefact.")
@json_option
def compare(reports: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Put reports of `bench` side by side, of several models or machines, on the same questions.

    Each is held against the first. Refuses reports about other questions, or with another reference model.
    """
    from ldrt_edge.bench import compare as stage

    found = stage.compare(reports)
    click.echo(json.dumps(asdict(found), ensure_ascii=False) if as_json else stage.markdown(found), nl=as_json)
    if out is not None:
        click.echo(stage.save(reports, found, out), err=as_json)
