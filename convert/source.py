"""A merged or base LLaVA folder, opened and checked: what every export starts from, whatever it becomes.

The rules that GGUF and MLX share stand here, so that the two refuse the same folders, for the same reasons: which
architectures, which tensors, which numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.console import say
from ldrt_edge.convert.weights import Weights
from ldrt_edge.errors import ArtifactError, all_problems, require
from ldrt_edge.front import Front

NAMES = {"llava": "LLaVA-1.5", "llava_next": "LLaVA-NeXT"}  # not the folder's: equal models give equal files
EMBEDDINGS, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"
_TEXT_MODELS = ("llama", "mistral")
_TOWER_ACTIVATIONS = ("quick_gelu", "gelu")
_ROPE_SCALINGS = ("default", "linear", "llama3", "yarn")
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
_IGNORED = ("rotary_emb.inv_freq", "position_ids", "vision_tower.post_layernorm", "vision_tower.head")
_F16_MAX = 65504.0


@dataclass(frozen=True)
class Source:
    """A Hugging Face LLaVA folder, opened and checked."""

    folder: Path
    config: Any  # transformers' LlavaConfig or LlavaNextConfig, defaults filled in
    weights: Weights
    front: Front


def open_source(folder: Path) -> Source:
    """Read a folder's configuration, weight index and front end.

    Raises:
        ArtifactError: not a LLaVA that the laptop's runtimes can compute; all reasons at once.
    """
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder}: no config.json, so not a Hugging Face model folder")
    transformers = require("transformers", "train")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{folder}: config.json is not readable: {str(error).splitlines()[0]}") from error
    problems = list(_unsupported(config))
    if problems:
        raise ArtifactError(all_problems(problems, f"{folder}: cannot be converted"))
    return Source(folder, config, Weights(folder), Front.load(folder))


def check_tensors(
    weights: Weights, expected: Mapping[str, tuple[int, ...]], ours: Callable[[str], bool], tied: bool
) -> None:
    """Hold the checkpoint's tensors of which `ours` is true against the `expected` names and shapes.

    Raises:
        ArtifactError: tensors are missing, unknown or of another shape; all at once.
    """
    ignored = (*_IGNORED, HEAD) if tied else _IGNORED
    found = {name: entry.shape for name, entry in weights.entries.items() if ours(name)}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [
        f"{name} is unknown" for name in found if name not in expected and not any(part in name for part in ignored)
    ]
    problems += [
        f"{name} is {found[name]}, the configuration says {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise ArtifactError(all_problems(problems, f"{weights.folder}: tensors"))


def check_values(values: NDArray[np.float32], name: str, folder: Path, half: bool) -> None:
    """Refuse values that are not numbers, or, with `half`, that half precision cannot hold.

    Raises:
        ArtifactError: there is one.
    """
    largest = float(np.maximum(values.max(initial=0.0), -values.min(initial=0.0)))  # no copy, as abs would make
    if not np.isfinite(largest):
        raise ArtifactError(f"{folder}: {name} holds values that are not numbers")
    if half and largest > _F16_MAX:
        raise ArtifactError(f"{folder}: {name} holds {largest:.3g}, beyond f16: take f32")


def feature_layers(config: Any) -> int:
    """How many layers of the tower run before LLaVA takes its features."""
    layer, layers = int(config.vision_feature_layer), int(config.vision_config.num_hidden_layers)
    return layer if layer >= 0 else layers + 1 + layer


def is_tied(source: Source) -> bool:
    """Whether the output is the embedding matrix: as transformers does it, not if both are stored and differ."""
    if not source.config.tie_word_embeddings:
        return False
    stored = source.weights.entries
    if HEAD not in stored or EMBEDDINGS not in stored:
        return True
    return np.array_equal(source.weights.read(HEAD), source.weights.read(EMBEDDINGS))


def head_dim(text: Any) -> int:
    """Width of an attention head, which need not be hidden size over heads."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def kv_heads(text: Any) -> int:
    """Number of key and value heads."""
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def context_length(text: Any) -> int:
    """The trained context; cut to a sliding window, which no runtime of ours knows."""
    length, window = int(text.max_position_embeddings), getattr(text, "sliding_window", None)
    if window and window < length:
        say(f"note: the runtimes attend to everything, so the context is cut to the sliding window, {window} tokens")
        return int(window)
    return length


def yarn_attention_factor(text: Any) -> float:
    """By what YaRN multiplies queries and keys, as transformers computes it from a text model's configuration."""
    factors = require("transformers.modeling_rope_utils", "train").ROPE_INIT_FUNCTIONS
    return float(factors["yarn"](text, "cpu")[1])


def _unsupported(config: Any) -> Iterator[str]:
    if config.model_type not in NAMES:
        yield f"model type {config.model_type!r} is no LLaVA: supported are {', '.join(NAMES)}"
        return
    text, vision = config.text_config, config.vision_config
    if getattr(config, "quantization_config", None):
        yield "the weights are quantised already: convert the full-precision model"
    if text.model_type not in _TEXT_MODELS:
        yield f"text model {text.model_type!r}, supported are {', '.join(_TEXT_MODELS)}"
    else:
        yield from _unsupported_text(text)
    if vision.model_type != "clip_vision_model":
        yield f"vision model {vision.model_type!r}, supported is clip_vision_model"
    elif vision.hidden_act not in _TOWER_ACTIVATIONS:
        yield f"vision activation {vision.hidden_act!r}, supported are {', '.join(_TOWER_ACTIVATIONS)}"
    if config.projector_hidden_act != "gelu" or not getattr(config, "multimodal_projector_bias", True):
        yield "the projector is not linear, gelu, linear with biases"
    if not isinstance(config.vision_feature_layer, int):
        yield f"vision_feature_layer {config.vision_feature_layer}, supported is a single layer"
    elif not 1 <= feature_layers(config) <= vision.num_hidden_layers:
        yield f"vision_feature_layer {config.vision_feature_layer} of {vision.num_hidden_layers} layers"
    if config.vision_feature_select_strategy != "default":
        yield f"vision_feature_select_strategy {config.vision_feature_select_strategy!r}, supported is 'default'"


def _unsupported_text(text: Any) -> Iterator[str]:
    if text.hidden_act != "silu":
        yield f"text activation {text.hidden_act!r}, supported is silu"
    rope = text.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_SCALINGS:
        yield f"RoPE scaling {kind!r}, supported are {', '.join(_ROPE_SCALINGS[1:])}"
    elif kind == "yarn" and any(rope.get(key) not in (None, value) for key, value in _YARN.items()):
        yield f"RoPE scaling yarn, supported with {_YARN} only, as the runtimes have it"
