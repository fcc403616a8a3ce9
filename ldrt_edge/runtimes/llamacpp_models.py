"""llama.cpp's two models: the language model (ids or embeddings in, logits out) and the mmproj (tile in, features out).

They own llama.cpp's objects and its error codes; what to run, and when, is decided in `llamacpp.py`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ldrt_edge.errors import RuntimeLoadError
from ldrt_edge.runtimes.base import FloatArray
from ldrt_edge.runtimes.gguf_file import check_gguf
from ldrt_edge.runtimes.llamacpp_bindings import Library, MatrixInputs, VisionGraph, Watch
from ldrt_edge.runtimes.processor import has_amx

BATCH = 512
_DISABLED = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
_F32 = 0  # GGML_TYPE_F32
_ABORTED = 2

Inputs = np.ndarray[Any, Any]
"""Token ids (n,) int32, or embeddings (n, width) float32."""


class LanguageModel:
    """A llama.cpp model with one context: token ids or embeddings in, logits out."""

    def __init__(
        self, loaded: Library, path: Path, threads: int, context_length: int, exact: bool, watch: Watch | None = None,
        branches: int = 0,
    ) -> None:
        self._loaded, self._llama = loaded, loaded.llama
        self.branches = branches
        self._inputs = None if watch is None else MatrixInputs(loaded, watch)
        check_gguf(path)
        wanted = self._llama.llama_model_default_params()
        wanted.use_extra_bufts = not (exact or has_amx())
        self.model = self._llama.llama_model_load_from_file(str(path).encode(), wanted)
        if not self.model:
            raise RuntimeLoadError(f"{path}: llama.cpp cannot load it: {loaded.log.last_error()}")
        self.context_length = min(context_length, self._llama.llama_model_n_ctx_train(self.model))
        self.context = self._open_context(threads, exact)
        if not self.context:
            self._llama.llama_model_free(self.model)
            raise RuntimeLoadError(
                f"{path}: no room for a context of {self.context_length} tokens: {loaded.log.last_error()}"
            )
        self.width = int(self._llama.llama_model_n_embd(self.model))
        self.vocab_size = int(self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self.model)))
        self.aborting = threading.Event()
        self._abort = self._llama.ggml_abort_callback(lambda _: self.aborting.is_set())
        self._length = 0
        self._tokens, self._positions = np.zeros(BATCH, np.int32), np.zeros(BATCH, np.int32)
        self._outputs, self._sequences = np.zeros(BATCH, np.int8), np.zeros(BATCH, np.int32)
        self._token_pointer = _pointer(self._tokens, self._llama.llama_token)
        self._sequence_counts = np.ones(BATCH, np.int32)
        self._sequence_pointers = self._sequences.ctypes.data + 4 * np.arange(BATCH, dtype=np.uint64)
        self._batch = self._llama.llama_batch()
        self._batch.pos = _pointer(self._positions, self._llama.llama_pos)
        self._batch.logits = _pointer(self._outputs, ctypes.c_int8)

    def _open_context(self, threads: int, exact: bool) -> Any:
        wanted = self._llama.llama_context_default_params()
        wanted.n_ctx = self.context_length
        wanted.n_batch = wanted.n_ubatch = BATCH
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.no_perf = True
        if self.branches:
            wanted.n_seq_max, wanted.kv_unified = self.branches + 1, True  # unified: branches share the prefix's cells
        if self._inputs is not None:
            wanted.cb_eval = self._inputs.callback
        if exact:
            wanted.type_k = wanted.type_v = _F32
            wanted.flash_attn_type = _DISABLED
        return self._llama.llama_init_from_model(self.model, wanted)

    def keep(self, length: int) -> None:
        """Drop what the cache holds behind its first `length` positions; the next `run` goes on from there."""
        if length < self._length:
            self._llama.llama_memory_seq_rm(self._llama.llama_get_memory(self.context), 0, length, -1)
        self._length = length

    @property
    def copy_bytes(self) -> int:
        """How large a `copy` is."""
        return int(self._llama.llama_state_seq_get_size(self.context, 0))

    def copy(self) -> Inputs:
        """Keys and values of all that the cache holds, as llama.cpp packs them: (bytes,) uint8.

        Raises:
            RuntimeLoadError: llama.cpp failed.
        """
        packed = np.empty(self.copy_bytes, np.uint8)
        self._check_copied(self._llama.llama_state_seq_get_data, packed)
        return packed

    def restore(self, packed: Inputs, length: int) -> None:
        """Let the cache hold what `copy` gave, `length` positions, and nothing else.

        Raises:
            RuntimeLoadError: llama.cpp failed; `keep` is due next.
        """
        self._length = length
        self._check_copied(self._llama.llama_state_seq_set_data, packed)

    def _check_copied(self, move: Callable[..., int], packed: Inputs) -> None:
        if move(self.context, _pointer(packed, ctypes.c_uint8), packed.nbytes, 0) != packed.nbytes:
            raise RuntimeLoadError(f"llama.cpp could not copy its cache: {self._loaded.log.last_error()}")

    def run(self, inputs: Inputs, first_wanted: int) -> FloatArray:
        """Append `inputs`; logits (n, vocab) of those at or behind position `first_wanted`.

        Raises:
            KeyboardInterrupt: `aborting` was set while it ran; `keep` is due next.
            RuntimeLoadError: llama.cpp failed; `keep` is due next.
        """
        parts = [inputs[i : i + BATCH] for i in range(0, len(inputs), BATCH)]
        logits = [self._run_batch(np.ascontiguousarray(part), first_wanted) for part in parts]
        return logits[0] if len(logits) == 1 else np.concatenate(logits)

    def _run_batch(self, inputs: Inputs, first_wanted: int) -> FloatArray:
        count, start = len(inputs), self._length
        self._length += count  # at most so much is in the cache, should this fail half-way
        positions = np.arange(start, start + count)
        return self.decode(inputs, positions, positions >= first_wanted)

    def branch(self, sequence: int, length: int) -> None:
        """Let a further sequence begin with the first `length` positions of the main one, 0, and nothing else."""
        memory = self._llama.llama_get_memory(self.context)
        self._llama.llama_memory_seq_rm(memory, sequence, -1, -1)
        if length:
            self._llama.llama_memory_seq_cp(memory, 0, sequence, 0, length)

    def decode(
        self, inputs: Inputs, positions: Inputs, wanted: Inputs, sequences: Inputs | None = None
    ) -> FloatArray:
        """Run up to 512 `inputs` at their positions of their sequences (None: the main one); the `wanted` ones' logits.

        Raises:
            KeyboardInterrupt: `aborting` was set while it ran.
            RuntimeLoadError: llama.cpp failed.
        """
        count = len(inputs)
        self._positions[:count], self._outputs[:count] = positions, wanted
        self._batch.n_tokens = count
        self._batch.n_seq_id = self._batch.seq_id = None  # all of sequence 0
        if sequences is not None:
            self._sequences[:count] = sequences
            self._batch.n_seq_id = _pointer(self._sequence_counts, ctypes.c_int32)
            self._batch.seq_id = _pointer(self._sequence_pointers, ctypes.POINTER(ctypes.c_int32))
        if inputs.ndim == 1:
            self._tokens[:count] = inputs
            self._batch.token, self._batch.embd = self._token_pointer, None
        else:
            self._batch.token, self._batch.embd = None, _pointer(inputs, ctypes.c_float)
        code = self._llama.llama_decode(self.context, self._batch)
        if code == _ABORTED and self.aborting.is_set():
            raise KeyboardInterrupt
        if code:
            raise RuntimeLoadError(f"llama.cpp could not run the model (code {code}): {self._loaded.log.last_error()}")
        outputs = int(np.count_nonzero(wanted))
        if not outputs:
            return np.empty((0, self.vocab_size), np.float32)
        pointer = self._llama.llama_get_logits(self.context)
        values = (ctypes.c_float * (outputs * self.vocab_size)).from_address(ctypes.addressof(pointer.contents))
        return np.frombuffer(memoryview(values), np.float32).reshape(outputs, self.vocab_size).copy()

    def watch_abort(self, watch: bool) -> None:
        """Let `aborting` stop a running batch. It costs a call per graph node: for prefill, not for single tokens."""
        callback = self._abort if watch else self._llama.ggml_abort_callback()
        self._llama.llama_set_abort_callback(self.context, callback, None)

    def close(self) -> None:
        """Free context and model, once."""
        if self.context:
            self._llama.llama_free(self.context)
            self._llama.llama_model_free(self.model)
            self.context = self.model = None


class VisionModel:
    """An mmproj: one tile in, its projected patch features out."""

    def __init__(
        self, loaded: Library, path: Path, text: LanguageModel, threads: int, exact: bool, watch: Watch | None = None
    ) -> None:
        self._loaded, self._mtmd = loaded, loaded.mtmd
        check_gguf(path)
        self.graph = VisionGraph(loaded, watch)
        wanted = self._mtmd.mtmd_context_params_default()
        wanted.n_threads = threads
        wanted.print_timings = wanted.warmup = False
        wanted.cb_eval = self.graph.callback
        if exact:
            wanted.use_gpu = False
            wanted.flash_attn_type = _DISABLED
        self.context = self._mtmd.mtmd_init_from_file(str(path).encode(), text.model, wanted)
        if not self.context:
            raise RuntimeLoadError(f"{path}: llama.cpp cannot load it: {loaded.log.last_error()}")
        self._width = text.width
        self.image_size, self._patches, self.newline = _read_mmproj(path)
        self._marker = self._mtmd.mtmd_default_marker()

    def encode(self, tile: Inputs) -> FloatArray:
        """(image_size, image_size, 3) uint8 RGB to (patches, width) float32."""
        if tile.shape != (self.image_size, self.image_size, 3):
            raise RuntimeLoadError(
                f"the front end cuts tiles of {tile.shape[0]} pixels, the mmproj wants {self.image_size}: "
                "front.json and mmproj belong to different models"
            )
        mtmd = self._mtmd
        pixels = np.ascontiguousarray(tile, np.uint8)
        bitmap = mtmd.mtmd_bitmap_init(self.image_size, self.image_size, _pointer(pixels, ctypes.c_uint8))
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            text = mtmd.mtmd_input_text(self._marker, len(self._marker), False, True)
            images = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
            self._check(mtmd.mtmd_tokenize(self.context, chunks, ctypes.byref(text), images, 1))
            parts = (mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks)))
            chunk = next(p for p in parts if mtmd.mtmd_input_chunk_get_type(p) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE)
            self._check(mtmd.mtmd_encode_chunk(self.context, chunk))
            shape = (mtmd.mtmd_input_chunk_get_n_tokens(chunk), self._width)
            if shape[0] != self._patches:
                raise RuntimeLoadError(
                    f"llama.cpp makes {shape[0]} tokens of one tile, not {self._patches}: this mmproj has it tile by "
                    "itself (clip.vision.image_grid_pinpoints), which is not how LLaVA-NeXT packs: convert it again"
                )
            return np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(self.context), shape=shape).copy()
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def _check(self, code: int) -> None:
        if code:
            reason = self._loaded.log.last_error()
            raise RuntimeLoadError(f"llama.cpp could not encode the image (code {code}): {reason}")

    def close(self) -> None:
        """Free the context, once."""
        if self.context:
            self._mtmd.mtmd_free(self.context)
            self.context = None


def _pointer(array: Inputs, kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def _read_mmproj(path: Path) -> tuple[int, int, FloatArray | None]:
    """Side of a tile in pixels, its patches, and LLaVA-NeXT's newline embedding (hidden,) if there is one."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    size, patch = (int(reader.fields[f"clip.vision.{name}_size"].contents()) for name in ("image", "patch"))
    newline = next((t.data for t in reader.tensors if t.name == "model.image_newline"), None)
    return size, (size // patch) ** 2, None if newline is None else np.array(newline, np.float32)
