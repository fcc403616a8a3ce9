"""An export as parity finds it: which runtime answers from it, in which type, behind which front end.

Ours say so in their own files. Somebody else's GGUF pair carries no front end of ours: it is read with the reference's,
as far as the files do not say otherwise (picture size, mean and deviation, and a chat template that knows pictures).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ldrt_edge import artifact
from ldrt_edge.convert.probes import probes
from ldrt_edge.errors import ArtifactError, DataError
from ldrt_edge.front import FRONT, Front
from ldrt_edge.front_config import read_json
from ldrt_edge.runtimes.base import Runtime
from ldrt_edge.runtimes.llamacpp import gguf_pair
from ldrt_edge.tensor_file import StoredTensor, read_header

RuntimeName = Literal["hf", "llamacpp", "mlx"]
_CHANNELS = 3
_LARGEST = 4096


@dataclass(frozen=True)
class Export:
    """A model folder that can answer.

    weights, vision: type of the language model and of tower and projector: f32, f16, bf16 or a quantised type's name.
    template: the chat template that other programs find in a GGUF file. own: whether this product wrote it.
    tells_prompt: whether its files say how a prompt is made; else the front end is the reference's. fed_back: whether
        its weights make good for what rounding took from others, which moves them farther from their source.
    """

    folder: Path
    runtime: RuntimeName
    weights: str
    vision: str
    front: Front
    template: str | None
    own: bool
    tells_prompt: bool = True
    fed_back: bool = False

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
    export = _open(folder, reference)
    made = export.own and (folder / artifact.MANIFEST).is_file()
    return replace(export, fed_back=made and _feeds_back(artifact.read(folder)))


def _feeds_back(manifest: artifact.Manifest) -> bool:
    """Whether it was asked to, or found to be best."""
    fit = manifest.metrics.get("fit")
    return "feedback" in manifest.config or (isinstance(fit, dict) and "feedback" in str(fit.get("kept")))


def _open(folder: Path, reference: Front) -> Export:
    if any(folder.glob("*.gguf")):
        return _open_gguf(folder, reference)
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder}: no GGUF pair, no MLX folder and no Hugging Face model")
    config, own = read_json(folder / "config.json"), (folder / FRONT).is_file()
    stored = _stored(folder)
    if not stored.for_mlx:
        return Export(folder, "hf", stored.weights, stored.vision, Front.load(folder), None, own)
    quantization = config.get("quantization") or config.get("quantization_config")
    weights = _mlx_name(folder, quantization) if quantization else stored.weights
    return Export(folder, "mlx", weights, stored.vision, Front.load(folder), None, own)


def _open_gguf(folder: Path, reference: Front) -> Export:
    from gguf import GGUFReader

    try:
        text, vision = (GGUFReader(path) for path in gguf_pair(folder))
        weights, projector = (_gguf_type(reader) for reader in (text, vision))
        told: dict[str, Any] = {
            "image_mean": tuple(_contents(vision, "clip.vision.image_mean", ())),
            "image_std": tuple(_contents(vision, "clip.vision.image_std", ())),
            "image_size": int(_contents(vision, "clip.vision.image_size", 0)),
        }
        template = _contents(text, "tokenizer.chat_template", None)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ArtifactError(f"{folder}: not a whole GGUF pair ({error})") from error
    if len(told["image_mean"]) not in (0, 3) or len(told["image_std"]) not in (0, 3) or told["image_size"] > _LARGEST:
        raise ArtifactError(f"{folder}: its mmproj describes no picture of three colours and {_LARGEST} pixels at most")
    own = (folder / FRONT).is_file()
    front = Front.load(folder) if own else reference
    front = front.with_config(replace(front.config, **{name: value for name, value in told.items() if value}))
    if own:
        return Export(folder, "llamacpp", weights, projector, front, template, own)
    theirs = front.with_config(replace(front.config, chat_template=template)) if template else front
    knows = theirs is not front and _knows_pictures(theirs)
    return Export(folder, "llamacpp", weights, projector, theirs if knows else front, template, own, knows)


def _knows_pictures(front: Front) -> bool:
    """Whether a front end's template writes a placeholder; those in GGUF files are often made for text alone."""
    try:
        probes(front, 1)
    except (DataError, ArtifactError):
        return False
    return True


def _contents(reader: Any, key: str, otherwise: Any) -> Any:
    return reader.fields[key].contents() if key in reader.fields else otherwise


def _gguf_type(reader: Any) -> str:
    """By the matrices themselves: f32, f16 or bf16 if all have that, else the file's name for its mixture."""
    from gguf import LlamaFileType

    held = Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2)
    plain = [name for name in ("BF16", "F16", "F32") if name in held]  # loosest first
    if held and len(plain) == len(held):
        return plain[0].lower()
    told = LlamaFileType(int(_contents(reader, "general.file_type", LlamaFileType.GUESSED))).name
    name = told.removeprefix("MOSTLY_")
    return name if told.startswith("MOSTLY_") and name not in ("F16", "BF16") else held.most_common(1)[0][0]


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
    packed = any(name.endswith(".scales") and not name.startswith("language_model.") for name in tensors)
    # MLX convolves (out, height, width, in), torch (out, in, height, width)
    return _Stored(patch.shape[-1] == _CHANNELS, norm.dtype.lower(), "quantised" if packed else patch.dtype.lower())


def _mlx_name(folder: Path, quantization: Any) -> str:
    """`affine 4 bits, groups of 64`, and whether single layers have others."""
    try:
        mixed = {layer["bits"] for layer in quantization.values() if isinstance(layer, dict)}
        bits = "/".join(map(str, sorted({quantization["bits"], *mixed})))
        return f"{quantization.get('mode', 'affine')} {bits} bits, groups of {quantization['group_size']}"
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{folder}/config.json: 'quantization' does not say bits and group size") from error
