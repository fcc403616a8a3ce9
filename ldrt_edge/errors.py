"""The errors a user can cause and mend; everything else is our bug and keeps its traceback.

LdrtError
├── ConfigError        an option, a recipe or a combination of them
├── DataError          a dataset, a picture, a question
│   ├── NotThere       what a request names is not there, or not any more
│   └── NotNow         what a request wants cannot be done as things stand
├── ArtifactError      a model folder, a manifest, a checkpoint
├── MissingExtraError  a package that this command needs is not installed
└── RuntimeLoadError   a runtime could not load or run a model

Each carries one line that says what, where and what to do next, whatever the file that it quotes holds. Only the CLI
and the server translate them.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

_LONGEST = 4000


class LdrtError(Exception):
    """Base of all errors that are shown to the user as one line, without line breaks or a terminal's controls."""

    def __str__(self) -> str:
        text = super().__str__()
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:_LONGEST])
        return shown if len(text) <= _LONGEST else f"{shown}…"


class ConfigError(LdrtError):
    """An option, a recipe or a combination of them is wrong."""


class DataError(LdrtError):
    """A dataset, a picture or a question is wrong."""


class NotThere(DataError):
    """What a request names is not there, or not any more."""


class NotNow(DataError):
    """What a request wants cannot be done as things stand."""


class ArtifactError(LdrtError):
    """A model folder, a manifest or a checkpoint is wrong, incomplete or of another kind."""


class MissingExtraError(LdrtError):
    """A package that this command needs is not installed."""


class RuntimeLoadError(LdrtError):
    """A runtime could not load or run a model."""


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say in one sentence which extra brings it.

    Raises:
        MissingExtraError: `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        wanted = f"ldrt-edge[{extra}]" if extra else "ldrt-edge"
        raise MissingExtraError(
            f"this command needs {module.partition('.')[0]}: pip install '{wanted}' ({error})"
        ) from error


def all_problems(problems: Sequence[str], what: str, limit: int = 8) -> str:
    """Join the problems of one input into one line, the first `limit` of them in full."""
    shown = "; ".join(problems[:limit])
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return f"{what}: {shown}{more}"
