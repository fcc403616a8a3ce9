"""`ldrt-edge convert --to gguf`: a merged LLaVA folder to the GGUF pair that llama.cpp loads.

Tensors stream from safetensors to GGUF one by one, so that a 7-billion-parameter model needs the memory of its largest
tensor. The pair is held against the merged model's logits before it gets its final name.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, get_args

from ldrt_edge import artifact, console
from ldrt_edge.convert.parity import check
from ldrt_edge.convert.plan import FilePlan, MmprojType, TextType, mmproj_plan, text_plan
from ldrt_edge.convert.source import Source, open_source
from ldrt_edge.errors import ArtifactError, ConfigError
from ldrt_edge.train.base import check_checkpoint, checkpoint_identity

_ALIGNMENT = 32
LICENCES = "LICENSES"
_MARGIN_BYTES = 32 << 20


def convert(merged: Path, out: Path, type_: str = "f16", mmproj_type: str | None = None) -> Path:
    """Convert a merged or base folder; returns `out`, an artefact of kind "gguf".

    type_: of the language model, `f32`, `f16` or `bf16`. mmproj_type: of vision tower and projector, `f32`, `f16` or
    `q8_0`; None takes f32 for f32 and f16 for the others.

    Raises:
        ConfigError: an unknown type.
        ArtifactError: the folder cannot become GGUF, or what was written does not compute what the folder does.
    """
    text_type: TextType = check_choice("--type", type_, get_args(TextType))
    vision_type: MmprojType = check_choice(
        "--mmproj", mmproj_type or ("f32" if type_ == "f32" else "f16"), get_args(MmprojType)
    )
    config = {"to": "gguf", "type": text_type, "mmproj_type": vision_type}
    with artifact.create(out, "gguf", config, [identity(merged)]) as draft:
        if not draft.complete:
            source = open_source(merged)
            text, vision = text_plan(source, text_type), mmproj_plan(source, vision_type)
            check_room(draft.path, text.nbytes + vision.nbytes)
            write(text, draft.path / f"model-{text_type.upper()}.gguf", "language model")
            write(vision, draft.path / f"mmproj-{vision_type.upper()}.gguf", "vision")
            finish(source, draft.path)
            draft.metrics["fidelity"] = asdict(check(merged, draft.path))
    return out


def write_text(folder: Path, out: Path, type_: TextType) -> None:
    """Write the language model of a Hugging Face LLaVA folder as one GGUF file.

    Raises:
        ArtifactError: the folder cannot become GGUF.
    """
    write(text_plan(open_source(folder), type_), out, "language model")


def write_mmproj(folder: Path, out: Path, type_: MmprojType) -> None:
    """Write vision tower and projector of a Hugging Face LLaVA folder as one mmproj file.

    Raises:
        ArtifactError: the folder cannot become GGUF.
    """
    write(mmproj_plan(open_source(folder), type_), out, "vision")


def write(plan: FilePlan, path: Path, label: str) -> None:
    """Write a planned file, some rows of a tensor in memory at a time."""
    with _begun(plan, path) as stream, console.bar(f"GGUF {label}", plan.nbytes / 1e6) as bar:
        for tensor in plan.tensors:
            stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
            for block in plan.blocks(tensor):
                stream.write(block.data)  # not numpy's tofile, which hides why a write failed
            bar.advance(tensor.nbytes / 1e6, "(MB)")
        stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))


def write_outline(plan: FilePlan, path: Path) -> None:
    """Write a planned file with nothing where its tensors would be: it takes no room on the disk."""
    with _begun(plan, path) as stream:
        stream.truncate(stream.tell() + plan.nbytes + _ALIGNMENT * (len(plan.tensors) + 1))


def header_bytes(plan: FilePlan) -> int:
    """Bytes that stand before a planned file's tensors: settings, vocabulary and the tensors' names."""
    with tempfile.TemporaryDirectory() as folder, _begun(plan, Path(folder) / "header.gguf") as stream:
        return stream.tell()


@contextmanager
def _begun(plan: FilePlan, path: Path) -> Iterator[IO[bytes]]:
    """A planned file with its header; behind it the tensors come, each aligned."""
    writer = plan.metadata
    for tensor in plan.tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, "float32", tensor.nbytes, raw_dtype=tensor.type)  # type: ignore[arg-type]
    writer.write_header_to_file(path)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        yield writer.fout[0]
    finally:
        writer.close()


def check_room(folder: Path, needed: int) -> None:
    """Refuse to start what cannot end: `needed` bytes will be written into `folder`, beside what it holds already.

    Raises:
        ArtifactError: the disk has less room.
    """
    held = sum(path.stat().st_size for path in folder.glob("*"))
    needed, free = needed + _MARGIN_BYTES - held, shutil.disk_usage(folder).free
    if free < needed:
        raise ArtifactError(
            f"{folder.parent}: {free / 1e9:.2f} GB free, and this needs about {needed / 1e9:.2f} GB for a while: "
            "free some space, or choose another --out"
        )


def finish(source: Source, folder: Path) -> None:
    """Put the front end and the licences beside the weights."""
    source.front.save(folder)
    if (source.folder / LICENCES).is_dir():
        shutil.copytree(source.folder / LICENCES, folder / LICENCES, dirs_exist_ok=True)


def identity(folder: Path) -> artifact.Input:
    """A folder as an input: by its manifest, or, if it comes straight from a hub, by the contents of its files.

    Raises:
        ArtifactError: the folder is an artefact of another kind.
    """
    if (folder / artifact.MANIFEST).is_file():
        manifest = artifact.verify(folder, "base", "merged", quick=True)
        return artifact.Input(manifest.kind, manifest.sha256)
    return checkpoint_identity(folder, check_checkpoint(folder))


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> Any:
    """`value` if it is one of `choices`; otherwise refuse it, naming them."""
    if value not in choices:
        raise ConfigError(f"{option} {value!r}: choose one of {', '.join(choices)}")
    return value
