"""What a format's quantiser makes of a matrix's rows: rounded to a type and read back, without a file.

The quantisers are ggml's and MLX's own, so a matrix rounds here exactly as it will in the exported file.
"""

from __future__ import annotations

import ctypes
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from numpy.typing import NDArray

from ldrt_edge.convert.mlx_plan import Quantization
from ldrt_edge.errors import require
from ldrt_edge.runtimes.base import FloatArray
from ldrt_edge.runtimes.llamacpp_bindings import library
from ldrt_edge.runtimes.processor import physical_cores

_CHUNK_WEIGHTS = 1 << 20
_WEIGHED_BY_ROW = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Types in which, with an importance, a weight counts by how large it is beside its row's: by its square and their mean
square, where others take those of the block. Source: `quantize_row_q4_0_impl` and its like in ggml-quants.c."""


def round_half(values: FloatArray) -> FloatArray:
    """Round float32 to half precision and back."""
    return values.astype(np.float16).astype(np.float32)


def round_ggml(
    rows: FloatArray, type_: str, importance: FloatArray | None, columns: slice = slice(None)
) -> FloatArray:
    """Round (rows, row length) float32 to one of ggml's block types and back.

    importance: mean square of each input, (row length,). llama.cpp has none for the embedding table of most models.
    columns: those that are wanted, whole blocks: (rows, columns).

    Raises:
        ValueError: not one importance a column.
    Source: `ggml_quantize_chunk` in ggml.h, as `llama_tensor_quantize_impl` in llama-quant.cpp calls it.
    """
    if importance is not None and importance.shape != rows.shape[1:]:
        raise ValueError(f"{importance.shape} importances for rows of {rows.shape[1]}")
    values = rows[:, columns]
    wanted = values.shape[1]
    if importance is not None:
        importance = importance[columns]
        if type_ in _WEIGHED_BY_ROW and wanted < rows.shape[1]:
            values = _as_large_as_the_rows(values, rows)
            importance = np.concatenate([importance, np.ones(values.shape[1] - wanted, np.float32)])
    return _round_all(values, type_, importance)[:, :wanted]


def _as_large_as_the_rows(values: FloatArray, rows: FloatArray) -> FloatArray:
    """Columns of rows with blocks of one value behind them, so that their mean square is that of the whole rows."""
    width, mean = values.shape[1], np.square(rows, dtype=np.float64).mean(axis=1)
    sums = np.square(values, dtype=np.float64).sum(axis=1)
    most = (sums / np.maximum(mean * width, np.finfo(np.float64).tiny)).max()
    blocks = max(1, math.ceil(most) - 1)
    filling = np.sqrt(np.maximum((1 + blocks) * width * mean - sums, 0) / (blocks * width))
    return np.concatenate([values, np.repeat(filling[:, None], blocks * width, axis=1)], axis=1, dtype=np.float32)


def _round_all(values: FloatArray, type_: str, importance: FloatArray | None) -> FloatArray:
    cores = physical_cores()
    step = max(1, min(_CHUNK_WEIGHTS // values.shape[1], math.ceil(len(values) / cores)))
    parts = [np.ascontiguousarray(values[i : i + step], np.float32) for i in range(0, len(values), step)]
    ggml, number = library().ggml, GGMLQuantizationType[type_]
    with ThreadPoolExecutor(cores) as pool:  # the call gives Python's lock away
        return np.concatenate(list(pool.map(lambda part: _round(ggml, part, number, importance), parts)))


def round_mlx(values: FloatArray, quantization: Quantization) -> FloatArray:
    """Round (rows, row length) float32 as an MLX folder stores them, scales in half precision, and back.

    Source: `mx.quantize`.
    """
    mx = require("mlx.core", "mlx")
    weight, scales, biases = mx.quantize(mx.array(values).astype(mx.float16), **asdict(quantization))
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return np.array(mx.dequantize(weight, scales, biases, **asdict(quantization)))


def _round(ggml: Any, values: FloatArray, type_: GGMLQuantizationType, importance: FloatArray | None) -> FloatArray:
    block, size = GGML_QUANT_SIZES[type_]
    rows, length = values.shape
    packed: NDArray[np.uint8] = np.empty((rows, length // block * size), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    ggml.ggml_quantize_chunk(
        ctypes.c_int(type_.value), ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(packed.ctypes.data),
        ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(length),
        ctypes.c_void_p(weights.ctypes.data if weights is not None else None),
    )  # fmt: skip
    return np.asarray(dequantize(packed, type_), np.float32).reshape(rows, length)
