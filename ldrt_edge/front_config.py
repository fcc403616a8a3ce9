"""The front end's settings, and how to derive them from a Hugging Face LLaVA folder.

Both layouts are read: the hub's (preprocessor_config.json, chat_template.json) and that of transformers 5
(processor_config.json, chat_template.jinja).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from PIL import Image
from tokenizers import Tokenizer

from ldrt_edge.errors import ArtifactError

TOKENIZER = "tokenizer.json"
_FILE_LIMIT_BYTES = 128 << 20
_SIDE_LIMIT = 8192
_PINPOINTS_LIMIT = 256
_COLOUR_LIMIT = 1e4

Fit = Literal["crop", "pad", "stretch", "tiles"]


@dataclass(frozen=True)
class FrontConfig:
    """Everything that decides how a conversation becomes a prompt.

    fit: how a picture becomes `image_size` square: `crop` (shortest edge, then centre crop), `pad` (square in the
        mean colour, then resize), `stretch`, or `tiles` (LLaVA-NeXT: base tile plus the tiles of the best of
        `grid_pinpoints`, (height, width) each).
    vision_tokens: image tokens after pooling, None for all.
    image_mean, image_std: of RGB in 0..1; the runtime normalises.
    """

    chat_template: str
    special_tokens: dict[str, str]
    image_token: str
    image_token_id: int
    stop_ids: tuple[int, ...]
    context_length: int
    image_size: int
    patch_size: int
    fit: Fit
    resample: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    grid_pinpoints: tuple[tuple[int, int], ...] | None = None
    vision_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse what nobody's model has, and what would be allocated for it.

        Raises:
            ValueError: says which setting.
        """
        tokens = isinstance(self.special_tokens, dict) and all(isinstance(t, str) for t in self.special_tokens.values())
        colours = (*self.image_mean, *self.image_std)
        pinpoints = [side for size in self.grid_pinpoints or () for side in size]
        wrong = {
            "chat_template": not isinstance(self.chat_template, str),
            "special_tokens": not tokens,
            "image_token": not isinstance(self.image_token, str) or not self.image_token,
            "image_token_id": not _is_count(self.image_token_id, 0),
            "stop_ids": not self.stop_ids or not all(_is_count(number, 0) for number in self.stop_ids),
            "context_length": not _is_count(self.context_length, 1),
            "image_size": not _is_count(self.image_size, 1, _SIDE_LIMIT),
            "patch_size": not _is_count(self.patch_size, 1, _SIDE_LIMIT),
            "fit": self.fit not in get_args(Fit),
            "resample": self.resample not in set(Image.Resampling),
            "image_mean, image_std": len(colours) != 6
            or not all(isinstance(value, (int, float)) and abs(value) < _COLOUR_LIMIT for value in colours)
            or not all(self.image_std),
            "grid_pinpoints": len(pinpoints) > _PINPOINTS_LIMIT
            or not all(_is_count(side, 1, _SIDE_LIMIT) for side in pinpoints),
            "vision_tokens": self.vision_tokens is not None and not _is_count(self.vision_tokens, 1),
        }
        if any(wrong.values()):
            raise ValueError(f"{', '.join(name for name in wrong if wrong[name])}: not what a model has")


def _is_count(value: object, least: int, most: int = 1 << 24) -> bool:
    return type(value) is int and least <= value <= most


def config_from_hf(folder: Path) -> FrontConfig:
    """Derive the settings from a folder's JSON files.

    Raises:
        ArtifactError: a file is missing, or says something that this front end cannot do.
    """
    model = read_json(folder / "config.json")
    vision, text = model.get("vision_config", {}), model.get("text_config", {})
    kind = model.get("model_type")
    if kind not in ("llava", "llava_next"):
        raise ArtifactError(f"{folder}: model type {kind!r} is no LLaVA: supported are llava and llava_next")
    if model.get("vision_feature_select_strategy", "default") != "default":
        raise ArtifactError(f"{folder}: only vision_feature_select_strategy 'default' is supported")
    processor = _processor_settings(folder)
    special = _special_tokens(folder)
    image_token_id = int(model.get("image_token_index", model.get("image_token_id", 32000)))
    tokenizer = read_tokenizer(folder / TOKENIZER)
    image_token = tokenizer.id_to_token(image_token_id)
    if image_token is None:
        raise ArtifactError(f"{folder}: the tokenizer has no token {image_token_id}, the model's image token")
    image_size = int(vision.get("image_size", 336))
    crop = processor.get("crop_size", image_size)
    side = int(crop["height"] if isinstance(crop, dict) else crop)
    if side != image_size:
        raise ArtifactError(f"{folder}: pictures are cut to {side} pixels, the vision tower wants {image_size}")
    fit = _fit(processor, kind)
    pinpoints = model.get("image_grid_pinpoints") if fit == "tiles" else None
    return FrontConfig(
        chat_template=_chat_template(folder),
        special_tokens=special,
        image_token=image_token,
        image_token_id=image_token_id,
        stop_ids=_stop_ids(folder, tokenizer, special),
        context_length=int(text.get("max_position_embeddings", 2048)),
        image_size=image_size,
        patch_size=int(vision.get("patch_size", 14)),
        fit=fit,
        resample=int(processor.get("resample", Image.Resampling.BICUBIC)),
        image_mean=_triple(processor["image_mean"]),
        image_std=_triple(processor["image_std"]),
        grid_pinpoints=tuple((int(h), int(w)) for h, w in pinpoints) if pinpoints else None,
    )


def _fit(processor: dict[str, Any], kind: str) -> Fit:
    if kind == "llava_next":
        return "tiles"
    if str(processor.get("image_processor_type", "")).startswith("Llava") and processor.get("do_pad"):
        return "pad"
    size = processor.get("size", {})
    if isinstance(size, dict) and "height" in size and not processor.get("do_center_crop", True):
        return "stretch"
    return "crop"


def _processor_settings(folder: Path) -> dict[str, Any]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            data: dict[str, Any] = read_json(folder / name)
            data = data.get("image_processor", data)
            if "image_mean" in data:
                return data
    raise ArtifactError(f"{folder}: no preprocessor_config.json or processor_config.json with image settings")


def _chat_template(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = read_json(folder / name).get("chat_template")
            if isinstance(template, str):
                return template
    raise ArtifactError(f"{folder}: no chat template (chat_template.jinja); copy the one of the model's hub page there")


def _special_tokens(folder: Path) -> dict[str, str]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings.update(read_json(folder / name))
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _stop_ids(folder: Path, tokenizer: Tokenizer, special: dict[str, str]) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    stop = read_json(path).get("eos_token_id") if path.is_file() else None
    if stop is None:
        stop = tokenizer.token_to_id(special.get("eos_token", ""))
    if stop is None:
        raise ArtifactError(f"{folder}: neither generation_config.json nor the tokenizer names an end-of-text token")
    return tuple(stop) if isinstance(stop, list) else (int(stop),)


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size.

    Raises:
        ArtifactError: missing, too large, or no JSON object.
    """
    if not path.is_file():
        raise ArtifactError(f"{path.parent}: {path.name} is missing")
    if path.stat().st_size > _FILE_LIMIT_BYTES:
        raise ArtifactError(f"{path}: larger than {_FILE_LIMIT_BYTES >> 20} MiB, refused")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: not a JSON object")
    return data


def read_tokenizer(path: Path) -> Tokenizer:
    """A `tokenizers` tokenizer from its file.

    Raises:
        ArtifactError: missing, too large, or no tokenizer.
    """
    if not path.is_file():
        raise ArtifactError(f"{path.parent}: {path.name} is missing (a fast tokenizer is needed)")
    if path.stat().st_size > _FILE_LIMIT_BYTES:
        raise ArtifactError(f"{path}: larger than {_FILE_LIMIT_BYTES >> 20} MiB, refused")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for any fault of the file
        raise ArtifactError(f"{path}: not a tokenizer ({error})") from error
