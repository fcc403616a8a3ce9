"""An export as parity finds it: which runtime answers from it, in which type, behind which front end.

Ours say so in their own files. Somebody else's GGUF pair carries no front end of ours: it is read with the reference's,
as far as the files do not say otherwise (picture size, mean and deviation, chat template).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ldrt_edge.errors import ArtifactError
from ldrt_edge.front import FRONT, Front
from ldrt_edge.front_config import read_json
from ldrt_edge.runtimes.base import Runtime
from ldrt_edge.runtimes.llamacpp import gguf_pair
from ldrt_edge.tensor_file import StoredTensor, read_header

RuntimeName = Literal["hf", "llamacpp", "mlx"]
_CHANNELS = 3


@dataclass(frozen=True)
class Export:
    """A model folder that can answer.

    weights, vision: type of the language model and of tower and projector: f32, f16, bf16 or a quantised type's name.
    template: the chat template that other programs find in the files, where it is not the front end's own file.
    own: whether this product wrote it.
    """

    folder: Path
    runtime: RuntimeName
    weights: str
    vision: str
    front: Front
    template: str | None
    own: bool

    @property
    def exact(self) -> bool:
        """Whether nothing was rounded, so that arithmetic alone can differ."""
        return self.weights == self.vision == "f32"

    @contextmanager
    def loaded(self) -> Iterator[Runtime]:
        """The runtime with this model, closed at the end.

        Raises:
            MissingExtraError, RuntimeLoadError: it does not load.
        """
        runtime = self._load()
        try:
            yield runtime
        finally:
            runtime.close()

    def _load(self) -> Runtime:
        if self.runtime == "llamacpp":
            from ldrt_edge.runtimes.llamacpp import LlamaCppRuntime

            return LlamaCppRuntime(self.folder, exact=self.exact)
        if self.runtime == "mlx":
            from ldrt_edge.runtimes.mlx import MlxRuntime

            return MlxRuntime(self.folder)
        from ldrt_edge.runtimes.hf import HfRuntime

        return HfRuntime(self.folder)


def open_export(folder: Path, reference: Front) -> Export:
    """Find out what a folder is.

    reference: front end of the model that it is held against, for a GGUF pair that carries none.

    Raises:
        ArtifactError: no GGUF pair, MLX folder or Hugging Face model.
    """
    if any(folder.glob("*.gguf")):
        return _open_gguf(folder, reference)
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder}: no GGUF pair, no MLX folder and no Hugging Face model")
    config, own = read_json(folder / "config.json"), (folder / FRONT).is_file()
    stored = _stored(folder)
    if not stored.for_mlx:
        return Export(folder, "hf", stored.weights, stored.vision, Front.load(folder), None, own)
    quantization = config.get("quantization")
    weights = _mlx_name(quantization) if quantization else stored.weights
    return Export(folder, "mlx", weights, stored.vision, Front.load(folder), None, own)


def _open_gguf(folder: Path, reference: Front) -> Export:
    from gguf import GGUFReader

    try:
        text, vision = (GGUFReader(path).fields for path in gguf_pair(folder))
        weights, projector = (_gguf_type(fields) for fields in (text, vision))
        mean, std = (tuple(_contents(vision, f"clip.vision.image_{name}", ())) for name in ("mean", "std"))
        size = int(_contents(vision, "clip.vision.image_size", 0))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ArtifactError(f"{folder}: not a whole GGUF pair ({error})") from error
    own = (folder / FRONT).is_file()
    front = Front.load(folder) if own else reference
    told: dict[str, Any] = {"image_mean": mean, "image_std": std, "image_size": size}
    config = replace(front.config, **{name: value for name, value in told.items() if value})
    template = _contents(text, "tokenizer.chat_template", None)
    return Export(folder, "llamacpp", weights, projector, front.with_config(config), template, own)


def _contents(fields: dict[str, Any], key: str, otherwise: Any) -> Any:
    return fields[key].contents() if key in fields else otherwise


def _gguf_type(fields: dict[str, Any]) -> str:
    from gguf import LlamaFileType

    name = LlamaFileType(int(_contents(fields, "general.file_type", LlamaFileType.GUESSED))).name
    plain = name.removeprefix("ALL_").removeprefix("MOSTLY_")
    return plain.lower() if plain in ("F32", "F16", "BF16") else plain


class _Stored(NamedTuple):
    """What the headers of a folder's safetensors say."""

    for_mlx: bool
    weights: str
    vision: str


def _stored(folder: Path) -> _Stored:
    tensors: dict[str, StoredTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= read_header(path)
    patch = next((t for name, t in tensors.items() if name.endswith("patch_embedding.weight")), None)
    norm = next((t for name, t in tensors.items() if name.endswith("layers.0.input_layernorm.weight")), None)
    if patch is None or norm is None:
        raise ArtifactError(f"{folder}: its safetensors hold no LLaVA")
    # MLX convolves (out, height, width, in), torch (out, in, height, width)
    return _Stored(patch.shape[-1] == _CHANNELS, norm.dtype.lower(), patch.dtype.lower())


def _mlx_name(quantization: dict[str, Any]) -> str:
    """`affine 4 bits, groups of 64`, and whether single layers have others."""
    mixed = {layer["bits"] for layer in quantization.values() if isinstance(layer, dict)}
    bits = "/".join(map(str, sorted({quantization["bits"], *mixed})))
    return f"{quantization.get('mode', 'affine')} {bits} bits, groups of {quantization['group_size']}"
