"""What `--base` may name, and whether that is a model this line can work with, found out before anything heavy runs.

`starter`, an artefact of ours, a folder in Hugging Face form (hub or transformers-5 layout), or a hub id with an
optional revision. Weights are read as safetensors only: loading a pickle runs code that its author chose.
"""

from __future__ import annotations

import errno
import hashlib
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldrt_edge import __version__, artifact
from ldrt_edge.console import say, track
from ldrt_edge.errors import ArtifactError, ConfigError, all_problems, require
from ldrt_edge.front_config import read_json
from ldrt_edge.tensor_file import read_header

STARTER = "starter"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt", "LICENSE*")
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_SUPPORTED = {
    "model_type": ("llava", "llava_next"),
    "text_config": ("llama", "mistral"),
    "vision_config": ("clip_vision_model",),
}


@dataclass(frozen=True)
class Base:
    """A checked base model on disk.

    identity: of its weights; an adapter fits only the base with the same one.
    name: what to call it in a report: `starter`, the hub id, or the folder's name.
    revision: the hub's commit, None for a local one.
    """

    folder: Path
    identity: artifact.Input
    name: str
    revision: str | None = None


def resolve_base(spec: str, revision: str | None = None) -> Base:
    """Find and check the base model that `spec` names, downloading or assembling it where needed.

    `revision` is a branch, tag or commit of a hub id; `org/name@revision` says the same.

    Raises:
        ConfigError: nothing goes by that name, or the hub cannot be reached.
        ArtifactError: it is no LLaVA of a supported kind, or its files are incomplete, corrupt or pickled.
        MissingExtraError: a package is not installed.
    """
    folder = Path(spec).expanduser()
    if revision is not None and (spec == STARTER or folder.exists()):
        raise ConfigError(f"a revision ({revision}) goes with a hub id, not with {spec}")
    if spec == STARTER:
        folder = _cached_starter()
        return Base(folder, artifact.identity(folder), STARTER)
    if folder.is_dir():
        return _local(folder.resolve())
    if folder.exists():
        raise ConfigError(f"{spec} is a file: a base is a folder; pass the one it lies in")
    named = _HUB_ID.fullmatch(spec)
    if named is None or spec.startswith((".", "~")) or folder.parent.is_dir():
        raise ConfigError(f"{spec}: no such folder; a base is 'starter', a folder, or a hub id (org/name[@revision])")
    if revision and named["revision"] and revision != named["revision"]:
        raise ConfigError(f"two revisions for one base: {revision} and {named['revision']}")
    return _from_hub(named["id"], revision or named["revision"])


def check_checkpoint(folder: Path) -> tuple[Path, ...]:
    """The weight files of a Hugging Face LLaVA folder, after checking that all is there and whole.

    Raises:
        ArtifactError: no supported LLaVA, or files are missing, truncated, corrupt or pickled.
    """
    _check_kind(folder)
    index = folder / INDEX
    wanted: dict[str, set[str]] = {_SINGLE: set()}
    if index.is_file():
        wanted = _shards(index)
    elif not (folder / _SINGLE).is_file():
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES or p.name.endswith(".bin.index.json"))
        if pickled:
            raise ArtifactError(
                f"{folder}: pickle checkpoints are refused, since loading one runs its code ({pickled[0]}): "
                "use the model's safetensors, or convert it with transformers' save_pretrained"
            )
        raise ArtifactError(f"{folder}: no {_SINGLE} and no {INDEX}, so no weights")
    problems = []
    for name, tensors in sorted(wanted.items()):
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
            continue
        try:
            lacking = sorted(tensors - read_header(folder / name).keys())
        except ArtifactError as error:
            problems.append(str(error))
            continue
        if lacking:
            problems.append(f"{name} lacks {len(lacking)} tensors that {INDEX} names, such as {lacking[0]}")
    if problems:
        raise ArtifactError(all_problems(problems, f"{folder}: weights are incomplete or damaged, copy them again"))
    return tuple(folder / name for name in sorted(wanted))


def checkpoint_identity(folder: Path, weights: Sequence[Path]) -> artifact.Input:
    """What makes a Hugging Face folder this model and no other: the names and sha256 of its config and weight files."""
    files = sorted([folder / CONFIG, *weights])
    label = f"checking {sum(path.stat().st_size for path in files) / 1e9:.1f} GB of weights"
    lines = [f"{path.name} {artifact.file_sha256(path)}" for path in track(files, label)]
    return artifact.Input("hf", hashlib.sha256("\n".join(lines).encode()).hexdigest())


def _local(folder: Path) -> Base:
    if (folder / artifact.MANIFEST).is_file():
        artifact.verify(folder, "base", "merged", quick=True)
        return Base(folder, artifact.identity(folder), folder.name)
    return Base(folder, checkpoint_identity(folder, check_checkpoint(folder)), folder.name)


def _cached_starter() -> Path:
    from ldrt_edge.train.starter import assemble

    home = Path.home() / ".cache" / "ldrt-edge" / STARTER / __version__
    if not (home / artifact.MANIFEST).is_file():
        say(f"assembling the starter base, once, in {home}")
        home.parent.mkdir(parents=True, exist_ok=True)
        # built aside and moved, so that two commands at once do not write into each other's folder
        with tempfile.TemporaryDirectory(prefix=".building-", dir=home.parent) as aside:
            built = assemble(Path(aside) / STARTER)
            if not home.exists():
                built.rename(home)
    artifact.verify(home, "base", quick=True)
    return home


def _from_hub(repository: str, revision: str | None) -> Base:
    hub = require("huggingface_hub", "train")
    errors = require("huggingface_hub.errors", "train")
    absent = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)
    unreachable = (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError)
    spec = repository + (f"@{revision}" if revision else "")
    option = f" --revision {revision}" if revision else ""
    fetch = f"hf download {repository}{option} --local-dir FOLDER --exclude '*.bin'"
    try:
        folder = Path(hub.snapshot_download(repository, revision=revision, allow_patterns=list(_HUB_FILES)))
    except absent as error:
        raise ConfigError(
            f"{spec}: the hub has no such model or revision, or wants you to log in for it (hf auth login); "
            "a base is 'starter', a folder, or a hub id"
        ) from error
    except unreachable as error:
        raise ConfigError(
            f"{spec}: neither in the local cache nor can the hub be reached; on a machine with a network run "
            f"`{fetch}`, copy FOLDER here and pass it as the base"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(
            f"{spec}: the disk is full: free some space and run the same command again, which goes on downloading"
        ) from error
    # a snapshot's folder is named by its commit
    return Base(folder, checkpoint_identity(folder, check_checkpoint(folder)), repository, folder.name)


def _check_kind(folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        raise ArtifactError(f"{folder}: no {CONFIG}, so no model in Hugging Face form")
    config = read_json(folder / CONFIG)
    if config.get("model_type") not in _SUPPORTED["model_type"]:
        found = repr(config.get("model_type"))
        raise ArtifactError(f"{folder}: model type {found} is no LLaVA; supported: {_list('model_type')}")
    for part in ("text_config", "vision_config"):
        settings = config.get(part)
        inner = settings.get("model_type", _SUPPORTED[part][0]) if isinstance(settings, dict) else None
        if inner not in _SUPPORTED[part]:
            raise ArtifactError(f"{folder}: {part} is of type {inner!r}; supported: {_list(part)}")


def _list(part: str) -> str:
    return ", ".join(_SUPPORTED[part])


def _shards(index: Path) -> dict[str, set[str]]:
    """Shard file names, each with the tensors that the index says it holds."""
    shards: dict[str, set[str]] = {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{index}: names no weights")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ArtifactError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
        shards.setdefault(name, set()).add(tensor)
    return shards
