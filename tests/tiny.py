"""Tiny LLaVA checkpoints with random weights and the real architecture, for tests.

Real models, tokenizers and files in everything but size: LLaVA-1.5 and LLaVA-NeXT on three kinds of text model, in the
layout that transformers 5 saves and in the one that the hub's llava-hf checkpoints have.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

Family = Literal["llava15", "llavanext"]
Text = Literal["llama", "mistral", "smollm2"]
Tiny = Callable[..., Path]
"""The `tiny` fixture: (family, text, *, layout="transformers5" | "hub", **options of `build`) -> folder."""

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32},
    "yarn-own-attention": {
        "rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip
"""Every kind of RoPE scaling that exports know, as transformers 5 says it."""
PATCH = 14
CHATML_END = "<|im_end|>"
_CORPUS = (
    "USER: What is in this image? ASSISTANT: A treatment plan with three beams and a colour bar.",
    "Low-dose radiation therapy of the knee, the heel and the shoulder: 6 fractions of 0.5 Gy, 3.0 Gy in all.",
    "How many beams are used? Which side is treated? What is the highest dose? yes no left right red green blue two",
    "Wie viele Felder werden benutzt? Strahlentherapie der Ferse, täglich eine Übung. ja nein links rechts",
    "¿Cuántos haces se usan? La dosis total es de tres grises. sí no izquierda derecha",
    "Combien de faisceaux ? La dose totale est de trois grays. oui non gauche droite",
    "Quantos feixes são usados? A dose total é de três grays. sim não esquerda direita",
    "低剂量放射治疗。总剂量是多少？左侧膝关节，三个射野。是 否",
)

_LLAVA15_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] != 'system' -%}{{- message['role'].upper() + ': ' -}}{%- endif -%}
    {%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}{{- '<image>\\n' -}}{%- endfor -%}
    {%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}
        {%- if message['role'] == 'assistant' -%}
            {% generation %}{{- part['text'] + ' ' -}}{% endgeneration %}
        {%- else -%}
            {{- part['text'] + ' ' -}}
        {%- endif -%}
    {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
_MISTRAL_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST] ' -}}
        {%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}
            {{- '<image>\\n' -}}
        {%- endfor -%}
        {%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}
            {{- part['text'] -}}
        {%- endfor -%}
        {{- ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + message['content'][0]['text'] + '</s> ' -}}
    {%- else -%}
        {{- raise_exception('Only user and assistant roles are supported!') -}}
    {%- endif -%}
{%- endfor -%}
"""
_CHATML_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}{{- '<image>\\n' -}}{%- endfor -%}
    {%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}{{- part['text'] -}}{%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
_TEMPLATES = {"llama": _LLAVA15_TEMPLATE, "mistral": _MISTRAL_TEMPLATE, "smollm2": _CHATML_TEMPLATE}


def build(
    folder: Path, family: Family, text: Text, *, hidden: int = 64, image_size: int = 56,
    rope_factor: float | None = None, seed: int = 0,
) -> Path:
    """Write a tiny checkpoint as transformers 5 saves it.

    hidden: width of text model and vision tower, a multiple of 32 (256 where a test wants K-quants).
    rope_factor: linear RoPE scaling.
    """
    folder.mkdir(parents=True)
    tokenizer = _byte_level_tokenizer() if text == "smollm2" else _sentencepiece_tokenizer(folder, text)
    config = _config(family, text, tokenizer, hidden, image_size, rope_factor)
    model = (LlavaForConditionalGeneration if family == "llava15" else LlavaNextForConditionalGeneration)(config)
    _randomise(model, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    _processor(family, text, tokenizer, config, image_size).save_pretrained(folder)
    if text == "mistral":  # transformers 5 reads this setting and forgets to save it
        _edit(folder / "tokenizer_config.json", legacy=True)
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the tensors of a folder's one weight file."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def uneven(folder: Path) -> Path:
    """A tiny model whose norms make some inputs much larger than others, as trained ones do; heads share values."""
    build(folder, "llava15", "mistral", hidden=256)

    def stretch(tensors: dict[str, torch.Tensor]) -> None:
        for name, values in tensors.items():
            if "language_model" in name and name.endswith("layernorm.weight"):
                values[::16] *= 10

    edit_tensors(folder, stretch)
    return folder


def to_hub_layout(folder: Path, out: Path, shards: int = 2) -> Path:
    """Rewrite a tiny checkpoint as the hub's llava-hf ones are, which transformers 4 saved: sharded, older names."""
    out.mkdir(parents=True)
    config = _read(folder / "config.json")
    config["torch_dtype"] = config.pop("dtype")
    text, vision = config["text_config"], config["vision_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        text["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    for settings in (config, text, vision):
        for name in ("dtype", "transformers_version", "head_dim"):
            settings.pop(name, None)
    _write(out / "config.json", config)

    processor = _read(folder / "processor_config.json")
    _write(out / "preprocessor_config.json", processor.pop("image_processor"))
    _write(out / "processor_config.json", processor)
    _write(out / "chat_template.json", {"chat_template": (folder / "chat_template.jinja").read_text()})
    _write(out / "generation_config.json", _read(folder / "generation_config.json"))
    _hub_tokenizer(folder, out)
    _hub_weights(folder, out, shards)
    return out


def _config(
    family: Family, text: Text, tokenizer: Any, hidden: int, image_size: int, rope_factor: float | None
) -> LlavaConfig | LlavaNextConfig:
    heads = hidden // 32
    rope = {"rope_type": "default", "rope_theta": {"llama": 1e4, "mistral": 1e6, "smollm2": 1e5}[text]}
    if rope_factor is not None:
        rope |= {"rope_type": "linear", "factor": rope_factor}
    text_config = {
        "model_type": "mistral" if text == "mistral" else "llama",
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,  # padded, as the hub's 32064
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if text == "llama" else heads // 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
        "tie_word_embeddings": text == "smollm2",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if text == "mistral":
        text_config["sliding_window"] = None
    vision_config = {
        "model_type": "clip_vision_model",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": PATCH,
        "projection_dim": hidden,
        "hidden_act": "quick_gelu",
    }
    shared: dict[str, Any] = {
        "text_config": text_config,
        "vision_config": vision_config,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_seq_length": (image_size // PATCH) ** 2,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": text == "smollm2",
    }
    if family == "llava15":
        return LlavaConfig(**shared)
    return LlavaNextConfig(**shared, image_grid_pinpoints=_pinpoints(image_size), use_image_newline_parameter=True)


def _pinpoints(size: int) -> list[list[int]]:
    """LLaVA-1.6's grids of tiles, (height, width), for tiles of `size` pixels."""
    return [[rows * size, columns * size] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Random weights whose logits depend on the picture and on each earlier token; the default ones hardly do."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        mean, std = 0.0, 1 / math.sqrt(value[0].numel())
        if "embed_tokens" in name:
            std *= 2  # it is the head too, where the two are tied
        elif "newline" in name or "class_embedding" in name:
            std = 0.5
        elif "position_embedding" in name:
            std = 0.3
        elif "patch_embedding" in name or "lm_head" in name:
            std *= 2
        elif name.endswith("bias"):
            std = 0.05
        elif "norm" in name:
            mean, std = 1.0, 0.1
        value.copy_(mean + std * torch.randn(value.shape, generator=generator))


def _sentencepiece_tokenizer(folder: Path, text: Text) -> Any:
    """Llama's kind: BPE by SentencePiece with byte fallback, in a real tokenizer.model."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS), model_writer=trained, model_type="bpe", vocab_size=440, hard_vocab_limit=False,
        byte_fallback=True, split_digits=True, character_coverage=0.98, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    _write(folder / "tokenizer_config.json", {
        "tokenizer_class": "LlamaTokenizer", "legacy": text == "mistral", "add_bos_token": True, "add_eos_token": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    })
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", special=True, normalized=False)]})
    tokenizer.add_special_tokens({"pad_token": AddedToken("<pad>", special=True, normalized=False)})
    return tokenizer


def _byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """SmolLM2's kind: byte-level BPE with single digits, control tokens first, no token put before the text."""
    control = ["<|endoftext|>", "<|im_start|>", CHATML_END, "<repo_name>", "<image>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(_CORPUS, trainers.BpeTrainer(
        vocab_size=440, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    ))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token=CHATML_END, pad_token=CHATML_END,
        unk_token="<|endoftext|>", clean_up_tokenization_spaces=False,
    )


def _processor(
    family: Family, text: Text, tokenizer: Any, config: LlavaConfig | LlavaNextConfig, image_size: int
) -> LlavaProcessor | LlavaNextProcessor:
    size = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    shared: dict[str, Any] = {
        "tokenizer": tokenizer,
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "chat_template": _TEMPLATES[text],
    }
    if family == "llava15":
        return LlavaProcessor(image_processor=CLIPImageProcessorPil(**size), **shared)
    images = LlavaNextImageProcessorPil(**size, image_grid_pinpoints=config.image_grid_pinpoints)
    return LlavaNextProcessor(image_processor=images, **shared)


def _hub_tokenizer(folder: Path, out: Path) -> None:
    settings = _read(folder / "tokenizer_config.json")
    for name in ("backend", "is_local", "local_files_only", "add_prefix_space"):
        settings.pop(name, None)
    tokenizer = _read(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        (out / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
        settings.setdefault("legacy", False)
    else:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if settings.get("legacy"):  # the older form of the same steps: a space before each piece of text
        tokenizer["pre_tokenizer"] = None
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]}
    _write(out / "tokenizer_config.json", settings)
    _write(out / "tokenizer.json", tokenizer)
    _write(out / "special_tokens_map.json", {k: v for k, v in settings.items() if k in (
        "bos_token", "eos_token", "unk_token", "pad_token"
    )})


def _hub_weights(folder: Path, out: Path, shards: int) -> None:
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    names = sorted(tensors)
    size = math.ceil(len(names) / shards)
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = names[index * size : (index + 1) * size]
        save_file({name: tensors[name].contiguous() for name in part}, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in tensors.values())
    _write(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _edit(path: Path, **changes: Any) -> None:
    _write(path, _read(path) | changes)


if __name__ == "__main__":  # python tests/tiny.py llavanext smollm2 FOLDER [WIDTH]
    build(Path(sys.argv[3]), *sys.argv[1:3], hidden=int((*sys.argv, 64)[4]))  # type: ignore[arg-type]
