"""The model that is trained: a stock LLaVA with a PEFT adapter, fed packed rows, its loss on answers only.

`PackedLlava` adds no weights. It runs transformers' own tower, projector and language model, packs image features by
the front end's table, masks branches from each other, and computes logits only where an answer token is predicted.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ldrt_edge.front import Front
from ldrt_edge.runtimes.hf import load_model
from ldrt_edge.train.collate import IGNORED, Example, expand, visible
from ldrt_edge.train.devices import gathered, parts_callable
from ldrt_edge.train.features import compute_features
from ldrt_edge.train.fused_lora import fuse
from ldrt_edge.train.recipe import Recipe

_LIVE_DEVIATION = 1e-4
"""Feature channels that vary less carry nothing (a tower may have constant ones); they are switched off."""


class PackedLlava(nn.Module):
    """A PEFT-wrapped LLaVA over packed rows; see `train.collate` for the layout of a batch."""

    feature_mean: torch.Tensor
    feature_scale: torch.Tensor

    def __init__(self, peft_model: Any, front: Front, recipe: Recipe) -> None:
        super().__init__()
        self.peft = peft_model
        self.front = front
        self.recipe = recipe
        self._no_split_modules = list(self.llava.model.language_model._no_split_modules)  # what FSDP2 shards apart
        width = self.llava.config.vision_config.hidden_size
        self.register_buffer("feature_mean", torch.zeros(width))
        self.register_buffer("feature_scale", torch.ones(width))

    @property
    def llava(self) -> Any:
        """The transformers model inside."""
        return self.peft.get_base_model()

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segments: torch.Tensor,
        labels: torch.Tensor,
        layout: torch.Tensor,
        features: torch.Tensor | None = None,
        tiles: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy of answer tokens: `loss`, their mean, and `row_losses`, each row's sum, without gradient.

        Shapes: ids, positions, segments, labels (batch, length); layout (image_tokens of all rows, k); features
        (patches of all rows, width) or tiles (n, size, size, 3) uint8; row_losses (batch,).
        """
        if features is None:
            assert tiles is not None
            features = compute_features(self.llava, self.front, tiles).flatten(0, 1)
        embeddings = self._embed(input_ids, features, layout)
        hidden = self.llava.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=visible(segments),
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        wanted = labels != IGNORED
        if self.recipe.answer_only_logits:
            hidden, labels = hidden[wanted], labels[wanted]
        losses = self._token_losses(hidden.flatten(0, -2), labels.flatten())
        if self.recipe.answer_only_logits:
            losses = losses.new_zeros(wanted.shape).masked_scatter(wanted, losses)
        rows = losses.view(wanted.shape).sum(1)
        items = num_items_in_batch if num_items_in_batch is not None else wanted.sum()
        return {"loss": rows.sum() / items, "row_losses": rows.detach()}

    def answer(self, prompt: Sequence[int], example: Example, most_tokens: int) -> list[int]:
        """The greedy answer to a prompt (its image one placeholder long) about an example's picture."""
        device = self.feature_mean.device
        config = self.front.config
        ids = torch.tensor([expand(prompt, config.image_token_id, len(example.layout))], device=device)
        training = self.training
        self.eval()
        try:
            with torch.no_grad(), parts_callable(self):
                if example.features is not None:
                    features = example.features.to(device).float()
                else:
                    tiles = torch.from_numpy(example.tiles)
                    features = compute_features(self.llava, self.front, tiles).flatten(0, 1)
                embeddings = self._embed(ids, features, torch.from_numpy(example.layout).long().to(device))
                answer: list[int] = self.llava.generate(
                    inputs_embeds=embeddings, attention_mask=torch.ones_like(ids), do_sample=False,
                    max_new_tokens=most_tokens, eos_token_id=list(config.stop_ids), pad_token_id=config.stop_ids[0],
                )[0].tolist()
        finally:
            self.train(training)
        return answer

    def standardise(self, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        """Rewrite the projector for features of zero mean and unit deviation: the same function of raw features."""
        live = deviation > _LIVE_DEVIATION
        self.feature_mean.copy_(mean)
        self.feature_scale.copy_(torch.where(live, 1 / deviation.clamp(min=_LIVE_DEVIATION), 0))
        linear: Any = self._projector().linear_1
        with torch.no_grad():
            linear.bias += linear.weight @ mean.to(linear.weight)
            linear.weight *= torch.where(live, deviation, 0).to(linear.weight)

    def amplify(self, gain: float) -> None:
        """Multiply the projector's output."""
        linear: Any = self._projector().linear_2
        with torch.no_grad():
            linear.weight *= gain
            linear.bias *= gain

    def drop_tower(self) -> None:
        """Free the vision tower, once its features are kept."""
        self.llava.model.vision_tower = nn.Identity()

    def folded_projector(self) -> dict[str, torch.Tensor]:
        """The trained projector as stock LLaVA weights on raw features: `linear_1.weight`, … in float32."""
        state = {name: gathered(tensor).float() for name, tensor in self._projector().named_parameters()}
        weight = state["linear_1.weight"] * self.feature_scale.cpu()
        return {
            **state,
            "linear_1.weight": weight,
            "linear_1.bias": state["linear_1.bias"] - weight @ self.feature_mean.cpu(),
        }

    def trainable(self, lora: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Switch on what a stage trains; returns (projector, LoRA) parameters, the latter empty when `lora` is off."""
        projector = list(self._projector().parameters())
        adapter = [p for name, p in self.peft.named_parameters() if "lora_" in name]
        for parameter in projector:
            parameter.requires_grad_(True)
        for parameter in adapter:
            parameter.requires_grad_(lora)
        return projector, adapter if lora else []

    def _token_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(positions,) cross-entropies of (positions, width) hidden states; logits live a chunk at a time."""
        chunk = self.recipe.loss_chunk if self.recipe.answer_only_logits else len(labels)
        parts = list(zip(hidden.split(chunk), labels.split(chunk), strict=True))
        if len(parts) == 1:
            return self._chunk_losses(*parts[0])
        return torch.cat([checkpoint(self._chunk_losses, *part, use_reentrant=False) for part in parts])

    def _chunk_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.llava.lm_head(hidden).float()
        return functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)

    def _embed(self, ids: torch.Tensor, features: torch.Tensor, layout: torch.Tensor) -> torch.Tensor:
        llava = self.llava
        projector = next(self._projector().parameters())
        standard = (features.to(self.feature_mean) - self.feature_mean) * self.feature_scale
        projected = llava.model.multi_modal_projector(standard.to(projector.dtype))
        newline = getattr(llava.model, "image_newline", None)
        if newline is not None:
            projected = torch.cat([projected, newline[None].to(projected)])
        images = projected[layout].mean(1)
        embeddings = llava.get_input_embeddings()(ids)
        place = (ids == self.front.config.image_token_id)[..., None]
        # float32, and so is all that the decoder adds to it
        scattered: torch.Tensor = embeddings.float().masked_scatter(place, images.float())
        return scattered

    def _projector(self) -> nn.Module:
        module: nn.Module = self.llava.model.multi_modal_projector.modules_to_save["default"]
        return module


def build(base: Path, front: Front, recipe: Recipe, device: str | torch.device, bf16: bool) -> PackedLlava:
    """Load a base and put the recipe's adapter on it; LoRA and projector train in float32.

    Raises:
        RuntimeLoadError: the base does not load.
    """
    # each part goes straight to its own precision: a 13B in float32 would take 52 GB on the way
    llava = load_model(base, "auto", _packed_weights() if recipe.base_precision == "nf4" else None)
    for part in (llava.model.language_model, llava.lm_head):
        set_precision(part, bf16)
    for module in (llava.model.vision_tower, llava.model.multi_modal_projector):
        module.to(torch.float32)._apply(torch.clone)  # a view would keep the whole mapped file in memory
    if recipe.kernels == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        # its fused loss is for a model with a head; this one's loss stands in PackedLlava
        _apply_liger_kernel_to_instance(llava.model.language_model, fused_linear_cross_entropy=False)
    return PackedLlava(adapted(llava, recipe), front, recipe).to(device)


def set_precision(part: nn.Module, bf16: bool) -> None:
    """Products in bf16, the rest in float32; in bf16 all are copies, since one view would keep the whole mapped file.

    Rounded, the frequencies of RoPE turn late tokens by other angles than inference does, and norms move every loss.
    """
    for module in part.modules():
        rounded = bf16 and isinstance(module, nn.Linear | nn.Embedding)
        for own in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if own.is_floating_point():
                own.data = own.data.to(torch.bfloat16 if rounded else torch.float32, copy=bf16 and not rounded)


def adapted(llava: Any, recipe: Recipe) -> Any:
    """A base with the recipe's LoRA on its language model, and its projector set to train."""
    from peft import LoraConfig, get_peft_model

    names = "|".join(recipe.lora.target_modules)
    config = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=rf".*language_model.*\.({names})",
        modules_to_save=["multi_modal_projector"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that is going away
        peft_model = get_peft_model(llava, config)
    if recipe.gradient_checkpointing:
        llava.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.fused_lora:
        fuse(peft_model)
    return peft_model


def _packed_weights() -> Any:
    """The decoder's linears in four bits, the rest as it is. Source: QLoRA, Dettmers et al., arXiv 2305.14314."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )
