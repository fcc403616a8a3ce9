"""The command line: one command a stage. Read options, call the stage's function, print the artefact's path.

Results go to stdout (the last line is the artefact's path, or one JSON object with `--json`), progress and errors to
stderr. Stages and runtimes are imported inside the commands, so that `--help` needs neither torch nor llama.cpp.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from ldrt_edge import __version__
from ldrt_edge.bench.commands import bench
from ldrt_edge.bundle.commands import bundle, inspect, trust_once_option
from ldrt_edge.convert.commands import convert, importance, parity, plan, quantize
from ldrt_edge.errors import ConfigError, LdrtError, require
from ldrt_edge.options import PATH, json_option, show_artifact
from ldrt_edge.train.data.commands import data

if TYPE_CHECKING:
    from ldrt_edge.chat.intake import BurnedIn

F = TypeVar("F", bound=Callable[..., Any])


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


for command in (data, convert, importance, plan, quantize, parity, bench, bundle, inspect):
    cli.add_command(command)


def _model_argument(command: F) -> F:
    """EDGE, a model folder or a bundle; the command gets the folder of a model that may be loaded."""

    @functools.wraps(command)
    def resolved(edge: Path, trust_once: bool, **options: Any) -> None:
        from ldrt_edge.bundle.open import model_folder

        command(edge=model_folder(edge, trust_once), **options)

    return click.argument("edge", type=PATH)(trust_once_option(cast(F, resolved)))


@cli.command()
@click.argument("out", type=PATH)
@click.option("--seed", default=0, show_default=True)
@json_option
def starter(out: Path, seed: int, as_json: bool) -> None:
    """Assemble the starter base model (162 M parameters) from two installed wheels."""
    require("torch", "train")
    from ldrt_edge.train.starter import assemble

    show_artifact(assemble(out, seed), as_json)


@cli.command()
@click.option("--base", required=True, help="'starter', a folder, or a hub id (org/name or org/name@revision).")
@click.option("--data", "datasets", required=True, multiple=True, type=PATH, help="Dataset artefact; repeatable.")
@click.option("--out", type=PATH, help="The adapter artefact.")
@click.option("--plan", "only_plan", is_flag=True, help="Only say what it needs: memory, steps, time, cost.")
@click.option("--memory-gb", type=click.FloatRange(min=0.1), help="With --plan: for a CUDA GPU elsewhere, unprobed.")
@click.option("--price", type=click.FloatRange(min=0), help="With --plan: of a device's hour, for the cost.")
@click.option("--recipe", help="A recipe that ships with ldrt-edge; an unknown name lists all.")
@click.option("--config", type=PATH, help="A recipe of your own (YAML), instead of --recipe.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting; repeatable.")
@click.option("--resume/--fresh", default=True, help="Go on from a killed run's checkpoint (the default), or not.")
@json_option
def train(
    base: str,
    datasets: tuple[Path, ...],
    out: Path | None,
    only_plan: bool,
    memory_gb: float | None,
    price: float | None,
    recipe: str | None,
    config: Path | None,
    overrides: tuple[str, ...],
    resume: bool,
    as_json: bool,
) -> None:
    """Train a LoRA adapter: align the projector, then instruct."""
    if recipe and config:
        raise ConfigError("--recipe and --config exclude each other")
    for option, value in (("--memory-gb", memory_gb), ("--price", price)):
        if value is not None and not only_plan:
            raise ConfigError(f"{option} is for --plan, which trains nothing: add --plan, or leave {option} out")
    require("torch", "train")
    from ldrt_edge.train import devices
    from ldrt_edge.train.base import resolve_base
    from ldrt_edge.train.lora import train as run
    from ldrt_edge.train.recipe import load_recipe

    settings = load_recipe(config or recipe or "starter", overrides)
    tells = os.environ.get("RANK", "0") == "0"  # of several processes on several devices, one
    if only_plan:
        from ldrt_edge.train.plan import plan, render

        found = plan(resolve_base(base), datasets, settings, memory_gb=memory_gb, price_per_hour=price)
        devices.leave()
        if tells:
            click.echo(json.dumps(asdict(found)) if as_json else render(found))
        return
    if out is None:
        raise ConfigError("--out FOLDER is missing (or --plan, to see what the run needs)")
    trained = run(resolve_base(base), datasets, out, settings, resume)
    devices.leave()
    if tells:
        show_artifact(trained, as_json)


@cli.command()
@click.option("--base", required=True, help="The base that the adapter was trained on.")
@click.option("--adapter", required=True, type=PATH)
@click.option("--out", required=True, type=PATH)
@json_option
def merge(base: str, adapter: Path, out: Path, as_json: bool) -> None:
    """Merge an adapter into its base, and prove that the logits agree.

    Also one that mlx-vlm or PEFT saved: LoRA on the language model, and a projector trained whole.
    """
    require("torch", "train")
    from ldrt_edge.train.base import resolve_base
    from ldrt_edge.train.merge import merge as run

    show_artifact(run(resolve_base(base), adapter, out), as_json)


_report_option = click.option(
    "--report", type=PATH, help="Of `bench`, about EDGE: answers then say how sure they are. A bundle has its own."
)


_audit_option = click.option(
    "--audit", type=PATH, metavar="FILE", help="Add a line to this log with each answer; see `audit verify`."
)


@cli.command()
@_model_argument
@click.option("--image", type=PATH, help="PNG, JPEG, TIFF or DICOM.")
@click.option("--ask", help="One question; without it, a conversation.")
@click.option("--web", is_flag=True, help="A conversation in the browser, on this machine only.")
@click.option("--history", type=PATH, metavar="FOLDER", help="Keep conversations there, encrypted with a passphrase.")
@click.option("--window", metavar="C,W", help="DICOM window centre and width, instead of the header's.")
@click.option("--frame", default=0, show_default=True, type=click.IntRange(min=0), help="Of a multi-frame picture.")
@click.option("--burned-in", type=click.Choice(["show", "black", "refuse"]), help=(
    "What becomes of text in a picture, where a name may stand. Else you are asked; if you cannot be, it is shown."
))  # fmt: skip
@_audit_option
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0))
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
@_report_option
@json_option
def chat(
    edge: Path, image: Path | None, ask: str | None, web: bool, history: Path | None, window: str | None, frame: int,
    burned_in: BurnedIn | None, audit: Path | None, max_tokens: int, temperature: float, seed: int,
    threads: int | None, report: Path | None, as_json: bool,
) -> None:
    """Ask about a picture, offline. Research use, not for diagnosis."""
    from dataclasses import asdict

    from ldrt_edge.chat.history import History
    from ldrt_edge.chat.terminal import ask_once, run_chat
    from ldrt_edge.runtimes.base import Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    level = _window(window)
    if web:
        if ask or image or window or frame or burned_in or as_json:
            others = "--ask, --image, --window, --frame, --burned-in and --json"
            raise ConfigError(f"--web opens a page, which asks for all the rest: leave out {others}")
        from ldrt_edge.chat.server import serve as run

        passphrase = _passphrase(history) if history else ""
        run(edge, 0, sampling, threads, audit, browser=True, history=history, passphrase=passphrase, report=report)
        return
    if audit:
        raise ConfigError("--audit is for the page: add --web, or leave it out")
    if ask is None:
        if as_json:
            raise ConfigError("--json answers one question: add --ask TEXT")
        past = History(history, _passphrase(history)) if history else None
        run_chat(edge, image, level, frame, sampling, threads, report, past, burned_in)
        return
    if history:
        raise ConfigError("--history keeps conversations: leave out --ask")
    answer = ask_once(edge, ask, image, level, frame, sampling, threads, report, burned_in)
    click.echo(json.dumps(asdict(answer), ensure_ascii=False) if as_json else answer.answer)


@cli.command()
@_model_argument
@click.option("--port", default=8420, show_default=True, type=click.IntRange(0, 65535), help="0 takes any free one.")
@_audit_option
@click.option("--history", type=PATH, metavar="FOLDER", help="Keep conversations there, encrypted with a passphrase.")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="Of an answer.")
@click.option("--cache", default=1024, show_default=True, type=click.IntRange(min=0), metavar="MIB", help=(
    "Keep so much of what was read for conversations that wait, so that they go on at once."
))  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1))
@_report_option
@json_option
def serve(
    edge: Path, port: int, audit: Path | None, history: Path | None, max_tokens: int, cache: int, threads: int | None,
    report: Path | None, as_json: bool,
) -> None:
    """The page and OpenAI's chat API on 127.0.0.1, behind a token. Prints one line: the address with the token.

    Programs take http://127.0.0.1:PORT/v1 as base URL and the token as API key.
    """
    from ldrt_edge.chat.server import serve as run
    from ldrt_edge.runtimes.base import Sampling

    passphrase = _passphrase(history) if history else ""
    run(
        edge, port, Sampling(max_tokens=max_tokens), threads, audit, as_json=as_json, history=history,
        passphrase=passphrase, report=report, cache_bytes=cache << 20,
    )


def _passphrase(history: Path) -> str:
    """From LDRT_EDGE_PASSPHRASE, else typed; twice for a new history, which a slip would lock for good."""
    from ldrt_edge.chat.history import exists

    if given := os.environ.pop("LDRT_EDGE_PASSPHRASE", ""):  # not for processes that this one starts
        return given
    if not sys.stdin.isatty():
        raise ConfigError("--history wants a passphrase: type it on a terminal, or set LDRT_EDGE_PASSPHRASE")
    return str(click.prompt("Passphrase", hide_input=True, confirmation_prompt=not exists(history), err=True))


@cli.group()
def audit() -> None:
    """Logs that `serve --audit` or `chat --web --audit` wrote."""


@audit.command()
@click.argument("file", type=PATH)
@click.option("--head", metavar="SHA256", help="The last line's hash, kept elsewhere: finds lines cut off at the end.")
@json_option
def verify(file: Path, head: str | None, as_json: bool) -> None:
    """Find any line that was changed, dropped, added or moved."""
    from ldrt_edge.chat.audit import verify as run

    chain = run(file, head)
    click.echo(json.dumps(asdict(chain)) if as_json else f"{chain.lines} lines hold together\n{chain.head}")


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """What this machine has, which models fit, and what to install."""
    from dataclasses import asdict

    from ldrt_edge.doctor import diagnose, render

    diagnosis = diagnose()
    click.echo(json.dumps(asdict(diagnosis), ensure_ascii=False) if as_json else render(diagnosis))


@cli.command()
@click.argument("folder", type=PATH, default=Path("runs/demo"))
@json_option
def demo(folder: Path, as_json: bool) -> None:
    """The whole line on the embedded defaults: starter, phantoms, train, merge, quantise, bench, an answer."""
    require("torch", "train")
    from ldrt_edge.demo import demo as run

    show_artifact(run(folder), as_json)


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
