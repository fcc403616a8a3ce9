"""MLX's matrix products by numpy, for processors on which MLX has none worth the name.

mlx-cpu 0.32.4 comes with the reference BLAS: 3 GFLOP/s a core, where numpy's reaches 50 to 80, the difference between
minutes and hours when a 7B export is held against its model. Everything else stays MLX's, unpacking of quantised
weights too. On Apple silicon nothing is replaced.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ldrt_edge.runtimes.base import FloatArray

_FEW_ROWS = 16
"""Up to here unpacking the weights costs more than MLX's own product."""


def use_numpy(network: nn.Module) -> None:
    """Let every linear layer of a network compute products of many rows by numpy, in float32."""
    for module in network.modules():
        replacement = _REPLACEMENTS.get(type(module))
        if replacement is not None:
            module.__class__ = replacement


def unpack(layer: nn.Module) -> FloatArray:
    """A layer's weight in float32, unpacked if it is quantised."""
    weight = _unpacked(layer) if "scales" in layer else layer.weight
    return np.array(weight.astype(mx.float32))


class _Linear(nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        return _product(x, self.weight, self.get("bias")) if _many(x) else super().__call__(x)


class _QuantizedLinear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        return _product(x, _unpacked(self), self.get("bias")) if _many(x) else super().__call__(x)


class _QuantizedEmbedding(nn.QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return _product(x, _unpacked(self), None) if _many(x) else super().as_linear(x)


class _Embedding(nn.Embedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return _product(x, self.weight, None) if _many(x) else super().as_linear(x)


_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Linear, nn.QuantizedLinear: _QuantizedLinear,
    nn.Embedding: _Embedding, nn.QuantizedEmbedding: _QuantizedEmbedding,
}  # fmt: skip


def _many(x: mx.array) -> bool:
    return bool(x.size // x.shape[-1] > _FEW_ROWS)


def _unpacked(layer: Any) -> mx.array:
    return mx.dequantize(
        layer.weight, layer.scales, layer.get("biases"), group_size=layer.group_size, bits=layer.bits, mode=layer.mode
    )


def _product(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    """(…, in) by (out, in), transposed: (…, out) of x's type."""
    left, right = (np.array(each.astype(mx.float32), copy=False) for each in (x, weight))
    product = mx.array(left.reshape(-1, left.shape[-1]) @ right.T).reshape(*x.shape[:-1], weight.shape[0])
    return (product if bias is None else product + bias).astype(x.dtype)
