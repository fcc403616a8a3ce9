"""LLaVA in MLX: CLIP's tower up to LLaVA's feature layer, the projector, and mlx-lm's Llama behind them.

Parameters have mlx-vlm's names (`vision_tower.vision_model.…`, `language_model.model.…`), so that folders written for
it load here and ours load there. The tower is our own, since mlx-vlm 0.7.10 always takes the quick GELU and ignores the
first norm's epsilon. What a folder holds is checked against its files' headers before a single weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from ldrt_edge.errors import ArtifactError, RuntimeLoadError, all_problems
from ldrt_edge.front_config import read_json
from ldrt_edge.tensor_file import StoredTensor, read_header

# What transformers fills in where a hub checkpoint's text_config says nothing. Sources: LlamaConfig, MistralConfig.
_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
    },
    "mistral": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}  # fmt: skip
_ACTIVATIONS = {"gelu": nn.gelu, "quick_gelu": nn.gelu_fast_approx}
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
_TOWER = "vision_tower.vision_model"
_HEAD = "language_model.lm_head"
_STORED_AS = {mx.float32: ("F32", "F16", "BF16"), mx.uint32: ("U32",), mx.uint8: ("U8",)}
_QUANTIZATION = ("group_size", "bits", "mode")

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Tower:
    """A CLIP vision tower. layers: how many run before LLaVA takes its features."""

    hidden_size: int
    intermediate_size: int
    heads: int
    layers: int
    image_size: int
    patch_size: int
    activation: str
    layer_norm_eps: float


@dataclass(frozen=True)
class Architecture:
    """What a folder's config.json says. newline: whether there is LLaVA-NeXT's newline embedding."""

    tower: Tower
    text: llama.ModelArgs
    newline: bool
    context_length: int

    @classmethod
    def read(cls, config: Json) -> Architecture:
        """Read a LLaVA's settings as mlx-vlm or transformers write them.

        Raises:
            ValueError, KeyError, TypeError: this network cannot compute it, or a setting is missing or no number.
        """
        _demand(config, "model_type", "llava", "llava_next")
        _demand(config, "vision_feature_select_strategy", "default")
        _demand(config, "projector_hidden_act", "gelu")
        _demand(config, "multimodal_projector_bias", True)
        text = _text(config)
        length, window = text["max_position_embeddings"], text.pop("sliding_window", None)
        return cls(
            tower=_tower(config["vision_config"], config.get("vision_feature_layer", -2)),
            text=llama.ModelArgs.from_dict(text),
            newline=config["model_type"] == "llava_next",
            context_length=min(length, window or length),
        )


class Network(nn.Module):
    """The network of one architecture; its weights are what `load_network` puts in."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width = architecture.text.hidden_size
        self.architecture = architecture
        self.vision_tower = _VisionTower(architecture.tower)
        self.multi_modal_projector = _Projector(architecture.tower.hidden_size, width)
        self.language_model = llama.Model(architecture.text)
        self.image_newline = mx.zeros((width,)) if architecture.newline else None

    def image_features(self, pixels: mx.array) -> mx.array:
        """(n, size, size, 3) pixel values to projected patch features (n, patches, hidden), no class token."""
        return self.multi_modal_projector(self.vision_tower(pixels))

    def embed(self, ids: mx.array) -> mx.array:
        """Token ids (n,) to embeddings (n, hidden)."""
        return self.language_model.model.embed_tokens(ids)

    def hidden(self, embeddings: mx.array, cache: list[Any]) -> mx.array:
        """Run (n, hidden) embeddings behind what the cache holds: (n, hidden), normalised for the head."""
        typed = embeddings.astype(self.language_model.model.norm.weight.dtype)
        return self.language_model.model(None, cache, typed[None])[0]

    def logits(self, hidden: mx.array) -> mx.array:
        """(n, hidden) to (n, vocab)."""
        if self.architecture.text.tie_word_embeddings:
            return self.language_model.model.embed_tokens.as_linear(hidden)
        return self.language_model.lm_head(hidden)


def load_network(folder: Path, widen: bool) -> Network:
    """Build the network of an MLX folder, quantised as its config.json says, with its weights.

    Tensors behind the feature layer and the tower's last norm are left unread. With `widen`, half-precision tensors
    become float32, scales of quantised ones too.

    Raises:
        RuntimeLoadError: a file is missing, truncated or of another model; all problems at once.
    """
    try:
        config = read_json(folder / "config.json")
        stored = _headers(folder)
        network = _quantized(config, stored)
    except ArtifactError as error:
        raise RuntimeLoadError(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise RuntimeLoadError(f"{folder / 'config.json'}: MLX cannot run this model: {reason}") from error
    wanted = dict(tree_flatten(network.parameters()))
    problems = list(_misfits(wanted, stored, network.architecture.tower.layers))
    if problems:
        raise RuntimeLoadError(all_problems(problems, f"{folder}: weights"))
    try:
        network.load_weights(list(_read(folder, wanted, widen)), strict=True)
        mx.eval(network.parameters())
    except (RuntimeError, ValueError) as error:
        raise RuntimeLoadError(f"{folder}: MLX cannot read the weights: {str(error).splitlines()[0]}") from error
    return network


def scheme_of(config: Json, path: str) -> dict[str, Any]:
    """How a quantised layer is packed (group_size, bits, mode), by its path: its own setting, or the one for all.

    Raises:
        ValueError: the configuration does not say.
    """
    quantization = config.get("quantization") or config.get("quantization_config") or {}
    own = quantization.get(path, quantization.get(path.removeprefix("language_model.")))
    settings = own if isinstance(own, dict) else quantization
    if not settings.keys() & set(_QUANTIZATION):
        raise ValueError(f"{path} is quantised, and no 'quantization' of MLX's kind says how")
    return {key: settings[key] for key in _QUANTIZATION if key in settings}


class _VisionTower(nn.Module):
    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.vision_model = _Clip(tower)

    def __call__(self, pixels: mx.array) -> mx.array:
        return self.vision_model(pixels)


class _Clip(nn.Module):
    """Source: `CLIPVisionTransformer` in transformers, hidden state of LLaVA's feature layer."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.embeddings = _Embeddings(tower)
        self.pre_layrnorm = nn.LayerNorm(tower.hidden_size, eps=tower.layer_norm_eps)
        self.encoder = _Encoder(tower)

    def __call__(self, pixels: mx.array) -> mx.array:
        hidden = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            hidden = layer(hidden)
        return hidden[:, 1:]


class _Embeddings(nn.Module):
    def __init__(self, tower: Tower) -> None:
        super().__init__()
        width, patch = tower.hidden_size, tower.patch_size
        self.class_embedding = mx.zeros((width,))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((tower.image_size // patch) ** 2 + 1, width)

    def __call__(self, pixels: mx.array) -> mx.array:
        patches = self.patch_embedding(pixels.astype(self.class_embedding.dtype)).flatten(1, 2)
        first = mx.broadcast_to(self.class_embedding, (patches.shape[0], 1, patches.shape[2]))
        embedded = mx.concatenate([first, patches], axis=1)
        return embedded + self.position_embedding(mx.arange(embedded.shape[1]))


class _Encoder(nn.Module):
    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.layers = [_EncoderLayer(tower) for _ in range(tower.layers)]


class _EncoderLayer(nn.Module):
    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.self_attn = _Attention(tower)
        self.mlp = _Mlp(tower)
        self.layer_norm1 = nn.LayerNorm(tower.hidden_size, eps=tower.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(tower.hidden_size, eps=tower.layer_norm_eps)

    def __call__(self, hidden: mx.array) -> mx.array:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class _Attention(nn.Module):
    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.heads = tower.heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(tower.hidden_size, tower.hidden_size))

    def __call__(self, hidden: mx.array) -> mx.array:
        queries, keys, values = (
            mx.unflatten(projection(hidden), -1, (self.heads, -1)).swapaxes(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scale = queries.shape[-1] ** -0.5
        attended = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale)
        return self.out_proj(attended.swapaxes(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[tower.activation]
        self.fc1 = nn.Linear(tower.hidden_size, tower.intermediate_size)
        self.fc2 = nn.Linear(tower.intermediate_size, tower.hidden_size)

    def __call__(self, hidden: mx.array) -> mx.array:
        return self.fc2(self.activation(self.fc1(hidden)))


class _Projector(nn.Module):
    def __init__(self, tower_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(tower_width, width)
        self.linear_2 = nn.Linear(width, width)

    def __call__(self, features: mx.array) -> mx.array:
        return self.linear_2(nn.gelu(self.linear_1(features)))


def _text(config: Json) -> dict[str, Any]:
    """The text model's settings for mlx-lm, with transformers' defaults and its newer form of the RoPE settings."""
    given = config["text_config"]
    _demand(given, "model_type", *_TEXT_DEFAULTS, absent="llama")
    _demand(given, "hidden_act", "silu")
    text = _TEXT_DEFAULTS[given.get("model_type", "llama")] | dict(given)
    rope = text.get("rope_parameters") or {}
    text.setdefault("rope_theta", rope.get("rope_theta", 1e4))
    if rope.get("rope_type", "default") != "default":
        text.setdefault("rope_scaling", rope)
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    text["model_type"] = "llama"
    text["num_key_value_heads"] = text.get("num_key_value_heads") or text["num_attention_heads"]
    for key in (*_SIZES, "num_key_value_heads"):
        _positive(text, key)
    if text["num_attention_heads"] % text["num_key_value_heads"]:
        raise ValueError("num_attention_heads is no multiple of num_key_value_heads")
    text.pop("layer_types", None)
    return text


def _tower(vision: Json, feature_layer: Any) -> Tower:
    _demand(vision, "model_type", "clip_vision_model")
    _demand(vision, "num_channels", 3)
    _demand(vision, "hidden_act", *_ACTIVATIONS, absent="quick_gelu")
    if not isinstance(feature_layer, int):
        raise ValueError(f"vision_feature_layer {feature_layer}, supported is a single layer")
    layers = _positive(vision, "num_hidden_layers")
    wanted = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 1 <= wanted <= layers:
        raise ValueError(f"vision_feature_layer {feature_layer} of {layers} layers")
    return Tower(
        hidden_size=_positive(vision, "hidden_size"),
        intermediate_size=_positive(vision, "intermediate_size"),
        heads=_positive(vision, "num_attention_heads"),
        layers=wanted,
        image_size=_positive(vision, "image_size"),
        patch_size=_positive(vision, "patch_size"),
        activation=vision.get("hidden_act", "quick_gelu"),
        layer_norm_eps=float(vision.get("layer_norm_eps", 1e-5)),
    )


def _demand(settings: Json, key: str, *choices: Any, absent: Any = None) -> None:
    value = settings.get(key, absent if absent is not None else choices[0])
    if value not in choices:
        raise ValueError(f"{key} is {value!r}, supported: {', '.join(map(str, choices))}")


def _positive(settings: Json, key: str) -> int:
    value = settings[key]
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} is {value!r}, no positive number")
    return value


def _headers(folder: Path) -> dict[str, StoredTensor]:
    """What the folder's weight files hold."""
    stored: dict[str, StoredTensor] = {}
    files = _files(folder)
    if not files:
        raise ArtifactError(f"{folder}: no model*.safetensors, so no weights")
    for path in files:
        try:
            header = read_header(path)
        except ArtifactError as error:
            raise ArtifactError(f"{folder}: {error}: copy it again") from error
        if twice := sorted(stored.keys() & header.keys()):
            raise ArtifactError(f"{folder}: {twice[0]} is in {path.name} and in another file")
        stored |= header
    return stored


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def _quantized(config: Json, stored: Mapping[str, StoredTensor]) -> Network:
    """The network with each layer whose scales are stored quantised as the configuration says.

    Source: `load_model` in mlx-lm and mlx-vlm: one setting for all, and layers of their own beside it.
    """
    for part in ("text_config", "vision_config"):
        if config[part].get("num_hidden_layers", 0) > len(stored):
            raise ValueError(f"{part} wants more layers than there are tensors ({len(stored)})")
    architecture = Architecture.read(config)
    architecture.text.tie_word_embeddings &= f"{_HEAD}.weight" not in stored  # mlx-vlm's LLaVA-NeXT always stores it
    network = Network(architecture)

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in stored or not hasattr(module, "to_quantized"):
            return False
        return scheme_of(config, path)

    nn.quantize(network, class_predicate=choose)
    return network


def _misfits(wanted: Mapping[str, mx.array], stored: Mapping[str, StoredTensor], layers: int) -> Iterator[str]:
    """How the stored tensors differ from the wanted ones."""
    for name, parameter in wanted.items():
        tensor = stored.get(name)
        if tensor is None:
            yield f"{name} is missing"
        elif tensor.shape != parameter.shape:
            yield f"{name} is {tensor.shape}, the configuration says {parameter.shape}"
        elif tensor.dtype not in _STORED_AS[parameter.dtype]:
            yield f"{name} is of type {tensor.dtype}"
    yield from (f"{name} is unknown" for name in stored if name not in wanted and not _unused(name, layers))


def _unused(name: str, layers: int) -> bool:
    """Whether a tensor comes behind the feature layer, or is no weight at all."""
    if name.startswith(f"{_TOWER}.encoder.layers."):
        number = name.removeprefix(f"{_TOWER}.encoder.layers.").partition(".")[0]
        return number.isdigit() and int(number) >= layers
    return name.startswith(f"{_TOWER}.post_layernorm.") or name.endswith(("position_ids", "rotary_emb.inv_freq"))


def _read(folder: Path, wanted: Mapping[str, mx.array], widen: bool) -> Iterator[tuple[str, mx.array]]:
    for path in _files(folder):
        for name, values in mx.load(str(path), format="safetensors").items():
            if name in wanted:
                half = widen and values.dtype in (mx.float16, mx.bfloat16)
                yield name, values.astype(mx.float32) if half else values
