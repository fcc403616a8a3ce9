"""llama.cpp through ctypes: its libraries loaded once, its log caught, and its vision graph put right.

llama-cpp-python's high-level class does not show what this product needs: logits at chosen positions, embeddings in
and out, and llama.cpp's evaluation callback. The libraries are the ones in its wheel. `ggml_tensor` is bound to that
wheel's version, so a self-check builds two graph nodes and reads them back before any model is loaded.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.errors import RuntimeLoadError, require

_LOG_LINES = 200
_LEVEL_ERROR = 4
_LEVEL_CONTINUED = 5
_F32 = 0  # GGML_TYPE_F32
_OBJECT_BYTES = 32  # sizeof(struct ggml_object)
_CLASS_TOKEN = b"v.class_embd"
_OTHER_LAYOUT = (
    "this build of llama-cpp-python lays out its tensors in another way than the one that ldrt-edge pins: "
    "pip install llama-cpp-python==0.3.36"
)

Watch = Callable[[str, NDArray[np.float32]], None]
"""Sees the input of a product with a weight matrix: the matrix's name in the file, and its input (rows, width)."""


class Tensor(ctypes.Structure):
    """`struct ggml_tensor`. Source: ggml/include/ggml.h of llama-cpp-python 0.3.36; verified by `_read_nodes`."""


Tensor._fields_ = [
    ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10), ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64), ("extra", ctypes.c_void_p), ("padding", ctypes.c_char * 8),
]


class Log:
    """What llama.cpp, mtmd and ggml say; kept, not printed. `listener` sees every piece of text as it comes."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=_LOG_LINES)
        self.listener: Callable[[str], None] | None = None
        self.callback: Any = None  # the ctypes object, which nothing else keeps alive
        self._level = 0
        self._lock = threading.Lock()

    def __call__(self, level: int, text: bytes, _user_data: object) -> None:
        """Take one piece of log text; llama.cpp calls this from any thread."""
        words = text.decode("utf-8", errors="replace")
        with self._lock:
            self._level = self._level if level == _LEVEL_CONTINUED else level
            if self._level == _LEVEL_ERROR and words.strip():
                self.errors.append(words.strip())
        if self.listener is not None:
            self.listener(words)

    def last_error(self) -> str:
        """The last line logged as an error, for the one line that a user sees."""
        return self.errors[-1] if self.errors else "llama.cpp gave no reason"


@dataclass(frozen=True)
class Nodes:
    """Numbers by which this build of ggml names the operations that callbacks look for."""

    product: int
    concat: int
    unary: int
    gelu: int
    exact_gelu: int


@dataclass(frozen=True)
class Library:
    """The loaded libraries, their log, and their operation numbers."""

    llama: Any
    mtmd: Any
    ggml: Any
    log: Log
    nodes: Nodes


@cache
def library() -> Library:
    """Load llama.cpp once per process, with its log caught.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        RuntimeLoadError: its tensors have another layout than the one this version knows.
    """
    # read by libgomp as it loads. Its threads spin at each of the ~1000 barriers of a token, by default for so long
    # that one core busy elsewhere slows two threads a hundredfold; short spinning costs nothing on free cores
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    llama = require("llama_cpp.llama_cpp", "")
    mtmd = require("llama_cpp.mtmd_cpp", "")
    loader = require("llama_cpp._ctypes_extensions", "")
    log = Log()
    log.callback = llama.llama_log_callback(log)
    for register in (llama.llama_log_set, mtmd.mtmd_log_set, mtmd.mtmd_helper_log_set):
        register(log.callback, None)
    folder = Path(str(llama.__file__)).parent / "lib"
    ggml = loader.load_shared_library("ggml-base", folder)
    nodes = _read_nodes(ggml)
    llama.llama_backend_init()
    return Library(llama, mtmd, ggml, log, nodes)


class MatrixInputs:
    """An evaluation callback that shows a watcher the input of every product with a weight matrix.

    Each such product ends a piece of the graph, so a watched model runs slower.
    Source: `IMatrixCollector::collect_imatrix` in llama.cpp's tools/imatrix/imatrix.cpp.
    """

    def __init__(self, loaded: Library, watch: Watch) -> None:
        self._loaded, self._watch = loaded, watch
        self.callback = loaded.llama.ggml_backend_sched_eval_callback(
            lambda address, ask, _user_data: self.see(Tensor.from_address(address), ask)
        )

    def see(self, node: Tensor, ask: bool) -> bool:
        """Whether the node is wanted, before it is computed; show its input, after."""
        if node.op != self._loaded.nodes.product:
            return not ask
        weight, rows = node.src[0].contents, node.src[1].contents
        wanted = weight.name.endswith(b".weight") and rows.type == _F32
        if wanted and not ask:
            self._watch(weight.name.decode(), self._read(rows))
        return bool(wanted or not ask)

    def _read(self, tensor: Tensor) -> NDArray[np.float32]:
        """A float32 tensor as rows, wherever it lies and however it is strided."""
        shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
        if 0 in shape:
            return np.empty((0, shape[-1]), np.float32)
        span = sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True)) + strides[-1]
        buffer = np.empty(span // strides[-1], np.float32)
        self._loaded.ggml.ggml_backend_tensor_get(ctypes.byref(tensor), buffer.ctypes.data, 0, buffer.nbytes)
        return np.lib.stride_tricks.as_strided(buffer, shape, strides).reshape(-1, shape[-1])


class VisionGraph:
    """An evaluation callback that puts llama.cpp's vision graph for LLaVA right while it runs.

    Two things, each done as the scheduler asks about a node, before anything is computed:
    - the class token: llama.cpp joins patches and class token in the wrong order and then reads positions and rows
      in the right one. The two inputs of that node are swapped. A mended build has them right and is left alone.
    - GELU: llama.cpp computes the tanh approximation, through a half-precision table; CLIP towers and LLaVA's
      projector were trained with the exact one.

    Source: tools/mtmd/models/llava.cpp; upstream issue ggml-org/llama.cpp #25814.
    """

    def __init__(self, loaded: Library, watch: Watch | None = None) -> None:
        self.class_tokens_moved = 0
        self._nodes = loaded.nodes
        self._inputs = None if watch is None else MatrixInputs(loaded, watch)
        self.callback = loaded.llama.ggml_backend_sched_eval_callback(self._see)

    def _see(self, address: int, ask: bool, _user_data: object) -> bool:
        node = Tensor.from_address(address)
        if node.op == self._nodes.unary and node.op_params[0] == self._nodes.gelu:
            node.op_params[0] = self._nodes.exact_gelu
        elif node.op == self._nodes.concat and node.src[1] and node.src[1].contents.name == _CLASS_TOKEN:
            patches, token = (ctypes.addressof(node.src[i].contents) for i in (0, 1))
            node.src[0], node.src[1] = _pointer(token), _pointer(patches)
            self.class_tokens_moved += 1
        if self._inputs is not None:
            return self._inputs.see(node, ask)
        return not ask  # never split the graph; and go on


def _pointer(address: int) -> Any:
    return ctypes.cast(address, ctypes.POINTER(Tensor))


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def _read_nodes(ggml: Any) -> Nodes:
    """Build the nodes that callbacks look for, without data, and read them through `Tensor`."""
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("ggml_tensor_overhead", ctypes.c_size_t, []),
        ("ggml_op_name", ctypes.c_char_p, [ctypes.c_int]),
        ("ggml_init", pointer, [_InitParams]),
        ("ggml_free", None, [pointer]),
        ("ggml_new_tensor_1d", pointer, [pointer, ctypes.c_int, ctypes.c_int64]),
        ("ggml_set_name", pointer, [pointer, ctypes.c_char_p]),
        ("ggml_concat", pointer, [pointer, pointer, pointer, ctypes.c_int]),
        ("ggml_mul_mat", pointer, [pointer, pointer, pointer]),
        ("ggml_backend_tensor_get", None, [pointer, pointer, ctypes.c_size_t, ctypes.c_size_t]),
        ("ggml_gelu", pointer, [pointer, pointer]),
        ("ggml_gelu_erf", pointer, [pointer, pointer]),
    ):
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    if ggml.ggml_tensor_overhead() != ctypes.sizeof(Tensor) + _OBJECT_BYTES:
        raise RuntimeLoadError(_OTHER_LAYOUT)
    context = ggml.ggml_init(_InitParams(16 * ggml.ggml_tensor_overhead(), None, True))
    try:
        left, right = ggml.ggml_new_tensor_1d(context, 0, 4), ggml.ggml_new_tensor_1d(context, 0, 4)
        ggml.ggml_set_name(right, _CLASS_TOKEN)
        concat = Tensor.from_address(ggml.ggml_concat(context, left, right, 0))
        product = Tensor.from_address(ggml.ggml_mul_mat(context, left, right))
        gelu = Tensor.from_address(ggml.ggml_gelu(context, left))
        exact = Tensor.from_address(ggml.ggml_gelu_erf(context, left))
        sources = tuple(ctypes.addressof(concat.src[i].contents) if concat.src[i] else None for i in range(3))
        known = (
            sources == (left, right, None)
            and concat.src[1].contents.name == _CLASS_TOKEN
            and tuple(concat.ne) == (8, 1, 1, 1)
            and ggml.ggml_op_name(concat.op) == b"CONCAT"
            and ggml.ggml_op_name(product.op) == b"MUL_MAT"
            and ggml.ggml_op_name(gelu.op) == ggml.ggml_op_name(exact.op) == b"UNARY"
            and gelu.op_params[0] != exact.op_params[0]
        )
        if not known:
            raise RuntimeLoadError(_OTHER_LAYOUT)
        return Nodes(product.op, concat.op, gelu.op, gelu.op_params[0], exact.op_params[0])
    finally:
        ggml.ggml_free(context)
