"""A frozen linear and its LoRA as one function: the update is added into the product, in place.

PEFT's forward makes four tensors of the activations' size for every linear (the product, the update, the scaled
update, their sum), and as many casts under autocast; this makes one, and backward again one. On a CPU that is a fifth
of a step. Parameters, names and checkpoints stay PEFT's.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def fuse(peft_model: nn.Module) -> int:
    """Give every plain LoRA linear the fused forward; returns how many have it.

    A linear with dropout (its LoRA reads another input than its weight), with a quantised weight, or with a variant
    such as DoRA keeps PEFT's.
    """
    from peft.tuners.lora.layer import Linear

    fused = 0
    for module in peft_model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and _plain(module):
            vars(module)["forward"] = MethodType(_forward, module)
            fused += 1
    return fused


def _plain(module: Any) -> bool:
    dropout = module.lora_dropout["default"]
    return isinstance(dropout, nn.Identity) and not module.lora_variant and not module.lora_bias["default"]


def _forward(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    base, low, high = module.base_layer, module.lora_A["default"].weight, module.lora_B["default"].weight
    product: torch.Tensor = _LoraProduct.apply(  # type: ignore[no-untyped-call]
        inputs.to(base.weight.dtype), base.weight, base.bias, low, high, module.scaling["default"]
    )
    return product


class _LoraProduct(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T for x (..., in), W (out, in), A (rank, in), B (out, rank); W is frozen."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, low: torch.Tensor,
        high: torch.Tensor, scale: float,
    ) -> torch.Tensor:
        flat = inputs.flatten(0, -2)
        low_cast, high_scaled = low.to(weight.dtype), (high * scale).to(weight.dtype)
        product = functional.linear(flat, weight, bias)
        reduced = flat @ low_cast.t()
        product.addmm_(reduced, high_scaled.t())
        ctx.save_for_backward(flat, weight, low_cast, high_scaled, reduced)
        ctx.scale, ctx.dtype = scale, low.dtype
        return product.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, weight, low, high_scaled, reduced = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        through = gradient @ high_scaled
        of_inputs = of_low = of_high = None
        if ctx.needs_input_grad[0]:
            of_inputs = (gradient @ weight).addmm_(through, low).view(*gradients[0].shape[:-1], -1)
        if ctx.needs_input_grad[3]:
            of_low = (through.t() @ flat).to(ctx.dtype)
            of_high = (gradient.t() @ reduced).to(ctx.dtype) * ctx.scale
        return of_inputs, None, None, of_low, of_high, None
