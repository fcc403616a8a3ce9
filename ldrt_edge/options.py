"""What the commands of all rooms share: options, and how a result is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def json_option(command: F) -> F:
    """`--json`, as the parameter `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(command)


def show_artifact(path: Path, as_json: bool) -> None:
    """Tell which artefact a command made: its path, or with `--json` its identity and metrics."""
    from ldrt_edge import artifact

    manifest = artifact.read(path)
    if as_json:
        summary = {"path": str(path), "kind": manifest.kind, "sha256": manifest.sha256, "metrics": manifest.metrics}
        click.echo(json.dumps(summary, ensure_ascii=False))
    else:
        click.echo(path)


def beside(folder: Path, suffix: str) -> Path:
    """FOLDER-SUFFIX beside it; `.` and `..` have a name only when resolved."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.with_name(f"{named.name}-{suffix}")
