"""The reference runtime: the merged model in transformers, on the GPU and in float32 wherever memory allows it.

What llama.cpp and MLX give is held against what this gives. It uses transformers' own modules (vision tower,
projector, language model) and the product's front end for everything around them; tests hold it against the stock
model's forward on pixel values.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from ldrt_edge import console
from ldrt_edge.errors import RuntimeLoadError, require
from ldrt_edge.front import Front
from ldrt_edge.machine import available_bytes
from ldrt_edge.runtimes.base import FloatArray, FrontImage, pack
from ldrt_edge.runtimes.cached import CachedRuntime, Part, State
from ldrt_edge.tensor_file import read_header

if TYPE_CHECKING:
    import torch

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_WITH_COMPUTING = 1.125  # times the weights' bytes


class Place(NamedTuple):
    """What a model computes in, by torch's names: dtype and device."""

    dtype: str
    device: str

    def __str__(self) -> str:
        return f"{self.dtype} on {self.device}"


def fitting(weights: int, dtypes: Sequence[str] = ("float32", "bfloat16"), precise: bool = False) -> Place:
    """Where a model of so many weights runs with the memory at hand, said where that is not in the first dtype.

    The GPU comes before the CPU, there a dtype before the next; precise: a dtype anywhere before the next. Where
    nothing fits, the last dtype on the CPU.
    """
    torch = require("torch", "train")
    free = {"cuda": torch.cuda.mem_get_info()[0]} if torch.cuda.is_available() else {}
    free["cpu"] = available_bytes()
    places = [Place(dtype, device) for device in free for dtype in dtypes]
    if precise:
        places.sort(key=lambda place: dtypes.index(place.dtype))
    needed = {dtype: weights * _BYTES.get(dtype, 4) * _WITH_COMPUTING for dtype in dtypes}
    place = next((place for place in places if free[place.device] > needed[place.dtype]), Place(dtypes[-1], "cpu"))
    if place.dtype != dtypes[0]:
        told = f"in {dtypes[0]} it would take {needed[dtypes[0]] / 1e9:.0f} GB of memory"
        console.say(f"note: the reference runs in {place}; {told}")
    return place


class HfRuntime(CachedRuntime):
    """A base or merged model in transformers.

    Args:
        folder: a model artefact, or a Hugging Face LLaVA folder.
        threads: CPU threads of this process's torch until `close`; None leaves torch's choice.
        dtype: of the weights, by torch's name; None takes what fits (`fitting`).
        device: "cpu", "cuda", …; None takes what fits, the GPU if it does.
        adapter: a PEFT adapter folder to put on the model, unmerged; its front end is used.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        RuntimeLoadError: the folder does not load.
    """

    name: Literal["hf"] = "hf"

    def __init__(
        self,
        folder: Path,
        threads: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        adapter: Path | None = None,
    ) -> None:
        self._torch = require("torch", "train")
        super().__init__()
        started = time.perf_counter()
        self.front = Front.load(adapter or folder)
        if dtype is None or device is None:
            chosen = fitting(_weights(folder), (dtype,) if dtype else ("float32", "bfloat16"))
            dtype, device = dtype or chosen.dtype, device or chosen.device
        self.place, self._device = Place(dtype, device), device
        self.model = load_model(folder, dtype)
        if adapter is not None:
            peft = require("peft", "train")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that is going away
                self.model = peft.PeftModel.from_pretrained(self.model, adapter).get_base_model()
        self.model.eval().to(self._device)
        self.load_ms = (time.perf_counter() - started) * 1e3
        self.context_length = self.front.config.context_length
        self.vocab_size = int(self.model.config.text_config.vocab_size)
        self._cache: Any = None
        self._threads_before = self._torch.get_num_threads() if threads else None
        if threads:
            self._torch.set_num_threads(threads)

    def close(self) -> None:
        """Free the model, and give torch its threads back: what comes next sums as if this had not been."""
        self._cache = None
        del self.model
        if self._threads_before:
            self._torch.set_num_threads(self._threads_before)

    def _encode(self, image: FrontImage) -> FloatArray:
        torch = self._torch
        with torch.inference_mode():
            pixels = normalise(torch.from_numpy(image.tiles), self.front, self._device).to(self.model.dtype)
            features = self.model.model.multi_modal_projector(tower_features(self.model, pixels))
        newline = getattr(self.model.model, "image_newline", None)
        return pack(
            features.flatten(0, 1).float().cpu().numpy(),
            image.layout,
            newline.detach().float().cpu().numpy() if newline is not None else None,
        )

    def _append(self, parts: Sequence[Part], held: int, last: int) -> FloatArray:
        from transformers import DynamicCache

        if held and self._cache is not None:
            if self._cache.get_seq_length() > held:
                self._cache.crop(held - self._cache.get_seq_length())
        else:
            self._cache = DynamicCache(config=self.model.config.text_config)
        embeddings = [self._embed(part) if isinstance(part, tuple) else part for part in parts]
        return self._forward(np.concatenate(embeddings), last)

    def _leave(self, held: int, most_bytes: int) -> State | None:
        left, self._cache = self._cache, None
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in left.layers)
        return State(left, size) if size <= most_bytes else None

    def _enter(self, state: State, held: int) -> None:
        self._cache = state.content

    def _embed(self, ids: Sequence[int]) -> FloatArray:
        with self._torch.inference_mode():
            table = self.model.get_input_embeddings()
            return np.asarray(table(self._torch.tensor(ids, device=self._device)).float().cpu().numpy())

    def _forward(self, embeddings: FloatArray, last: int) -> FloatArray:
        torch = self._torch
        with torch.inference_mode():
            hidden = self.model.model.language_model(
                inputs_embeds=torch.from_numpy(embeddings)[None].to(self._device, self.model.dtype),
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state
            return np.asarray(self.model.lm_head(hidden[0, -last:]).float().cpu().numpy())


def _weights(folder: Path) -> int:
    tensors = (tensor for path in folder.glob("*.safetensors") for tensor in read_header(path).values())
    return sum(math.prod(tensor.shape) for tensor in tensors)


def load_model(folder: Path, dtype: str, quantization: Any = None) -> Any:
    """The transformers model of a LLaVA or LLaVA-NeXT folder, from safetensors only; dtype "auto" is the files' own.

    quantization: transformers' settings for weights that are packed as they are loaded.

    Raises:
        RuntimeLoadError: transformers refuses the folder.
    """
    torch = require("torch", "train")
    transformers = require("transformers", "train")
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=getattr(torch, dtype, dtype), use_safetensors=True, local_files_only=True,
            quantization_config=quantization,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise RuntimeLoadError(f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}") from error


def normalise(tiles: torch.Tensor, front: Front, device: str | torch.device) -> torch.Tensor:
    """(n, size, size, 3) uint8 tiles to (n, 3, size, size) float32 pixel values in the tower's mean and deviation."""
    pixels = tiles.to(device).float() / 255
    mean, std = pixels.new_tensor(front.config.image_mean), pixels.new_tensor(front.config.image_std)
    return ((pixels - mean) / std).permute(0, 3, 1, 2).contiguous()


def tower_features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Patch features of the frozen tower, before the projector: (n, 3, size, size) → (n, patches, width).

    Source: `LlavaModel.get_image_features` in transformers, feature strategy "default" (no class token).
    """
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    features: torch.Tensor = hidden[model.config.vision_feature_layer][:, 1:]
    return features
