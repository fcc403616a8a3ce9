"""The starter's language model and tokenizer, from a SmolLM2 GGUF file, taken off the 4-bit grid.

The file is quantised to Q4_1. Dequantised, its weights lie exactly on a 4-bit grid, and a LoRA moves them little: any
4-bit loss measured on them is flattered and importance matrices look useless. `off_grid` changes the weights, not the
function, so that quantising the starter costs what it costs other models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ldrt_edge.errors import ArtifactError

IMAGE_TOKEN = "<image>"
_RESERVED = "<filename>"
"""A token that SmolLM2 keeps for source code; as `<image>` it needs no new row in the embeddings."""
_SPREAD = 0.3
"""Standard deviation of the logarithm of the channel scales: enough to leave the grid, too little to make outliers."""


def read_gguf(path: Path) -> tuple[LlamaForCausalLM, Tokenizer]:
    """The language model in float32 and the tokenizer, with `<image>` as one of its control tokens.

    Raises:
        ArtifactError: the file is no Llama model with a byte-level BPE vocabulary.
    """
    reader = gguf.GGUFReader(path)
    try:
        return _language_model(reader), _tokenizer(reader)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{path}: not the expected SmolLM2 model ({error})") from error


@torch.no_grad()
def off_grid(model: LlamaForCausalLM, seed: int) -> None:
    """Take a Llama (head tied, no biases) off the grid it was quantised on, in place, computing the same as before.

    Folds every RMSNorm's gain, but for its mean size, into the linears that read it (the last one's cannot be: its
    reader is tied to the embeddings), shuffles the channels of the residual stream, so that other channels share a
    quantisation block, and scales channel pairs that cancel: up_proj with down_proj, v_proj with o_proj.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(model.config.hidden_size, generator=generator)
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, order])
    model.model.norm.weight.copy_(model.model.norm.weight[order])
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _fold(layer.input_layernorm.weight, (attention.q_proj, attention.k_proj, attention.v_proj), order)
        _fold(layer.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj), order)
        _scale_pair(mlp.up_proj, mlp.down_proj, 1, generator)
        _scale_pair(attention.v_proj, attention.o_proj, attention.head_dim, generator)
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.copy_(writer.weight[order])


def rounding_error(weight: Tensor, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q4_1) -> float:
    """Relative RMS error of rounding `weight` (rows, columns) to `kind`."""
    exact = np.ascontiguousarray(weight.detach().numpy())
    rounded = gguf.dequantize(gguf.quantize(exact, kind), kind)
    return float(np.sqrt(np.mean((exact - rounded) ** 2) / np.mean(exact**2)))


def _fold(gain: Tensor, readers: tuple[nn.Linear, ...], order: Tensor) -> None:
    """Fold all of a gain but its mean size, so that a LoRA sees inputs as large as before: its learning rate counts."""
    size = gain.abs().mean()
    for linear in readers:
        linear.weight.copy_((linear.weight * gain / size)[:, order])
    gain.fill_(float(size))


def _scale_pair(first: nn.Linear, second: nn.Linear, head_dim: int, generator: torch.Generator) -> None:
    """Scale the rows of `first` and undo it in the columns of `second`, where a head of keys serves several queries."""
    rows = first.weight.shape[0]
    scale = torch.exp(torch.randn(rows, generator=generator) * _SPREAD)
    repeats = second.weight.shape[1] // rows
    undo = scale.view(-1, 1, head_dim).expand(-1, repeats, -1).reshape(-1)
    first.weight.mul_(scale[:, None])
    second.weight.div_(undo)


def _language_model(reader: gguf.GGUFReader) -> LlamaForCausalLM:
    def number(name: str) -> Any:
        return _field(reader, f"llama.{name}")

    config = LlamaConfig(
        vocab_size=number("vocab_size"),
        hidden_size=number("embedding_length"),
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=number("attention.head_count"),
        num_key_value_heads=number("attention.head_count_kv"),
        max_position_embeddings=number("context_length"),
        rms_norm_eps=float(f"{number('attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5 went through float32
        rope_parameters={"rope_type": "default", "rope_theta": number("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = {}
    for name in model.state_dict():
        if name == "lm_head.weight":
            continue
        tensor = tensors[f"{names.get_name(name.removesuffix('.weight'))}.weight"]
        weight = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        weights[name] = _half_rotation(weight, heads) if heads else weight
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers are computed, not loaded
    model.requires_grad_(False)
    return model


def _half_rotation(weight: Tensor, heads: int) -> Tensor:
    """Rows from llama.cpp's order of rotary pairs (0, 1), (2, 3), … to transformers' (0, d/2), (1, d/2 + 1), …

    Source: the inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """SmolLM2's tokenizer.json, which the GGUF format holds in parts and without the names of its steps.

    Source: the `smollm` pre-tokenizer in llama.cpp's llama-vocab.cpp.
    """
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    types: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges: list[str] = _field(reader, "tokenizer.ggml.merges")
    tokens[tokens.index(_RESERVED)] = IMAGE_TOKEN
    left_and_right = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, left_and_right))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _field(reader: gguf.GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()
