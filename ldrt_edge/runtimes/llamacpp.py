"""The laptop's runtime: a GGUF pair (model and mmproj) on llama.cpp, token for token what training used.

llama.cpp never resizes, tiles, templates or tokenises here. Each tile is encoded alone, the features are packed by the
front end's table, and embeddings and token ids go in through the low-level interface; logits come out where they are
wanted and nowhere else.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np

from ldrt_edge.errors import RuntimeLoadError
from ldrt_edge.runtimes.base import (
    FloatArray,
    FrontImage,
    PrefixCache,
    Prompt,
    Sampling,
    Timings,
    Token,
    check_room,
    generate_tokens,
    keys_of,
    pack,
    remaining,
)
from ldrt_edge.runtimes.llamacpp_bindings import Library, VisionGraph, library
from ldrt_edge.runtimes.processor import has_amx, physical_cores

_BATCH = 512
_CONTEXT = 4096
_IMAGES_KEPT = 8
_DISABLED = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
_F32 = 0  # GGML_TYPE_F32
_ABORTED = 2


class LlamaCppRuntime:
    """A gguf artefact on llama.cpp.

    Args:
        folder: holds one `model-*.gguf` and one `mmproj-*.gguf`.
        threads: None takes one for each physical core that this process may use.
        context_length: tokens; None takes the model's, at most 4096 (the cache's memory grows with it).
        exact: float32 cache and plain attention, to compare arithmetic with the reference.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        RuntimeLoadError: a file is missing, truncated or refused by llama.cpp.
    """

    name: Literal["llamacpp"] = "llamacpp"

    def __init__(
        self, folder: Path, threads: int | None = None, context_length: int | None = None, exact: bool = False
    ) -> None:
        started = time.perf_counter()
        model, mmproj = (_the_one(folder, f"{kind}-*.gguf") for kind in ("model", "mmproj"))
        loaded = library()
        self.threads = threads or physical_cores()
        self._text = _LanguageModel(loaded, model, self.threads, context_length or _default_context(folder), exact)
        try:
            self._vision = _VisionModel(loaded, mmproj, self._text, self.threads, exact)
        except RuntimeLoadError:
            self._text.close()
            raise
        self.context_length = self._text.context_length
        self.vocab_size = self._text.vocab_size
        self.timings = Timings()
        self._embeddings: OrderedDict[str, FloatArray] = OrderedDict()
        self._prefix = PrefixCache()
        self.load_ms = (time.perf_counter() - started) * 1e3

    @property
    def class_tokens_moved(self) -> int:
        """How often the class token was put in its place; stays 0 on a build of llama.cpp that is mended."""
        return self._vision.graph.class_tokens_moved

    def encode(self, image: FrontImage) -> FloatArray:
        """Image embeddings, packed: (image_tokens, hidden) float32."""
        kept = self._embeddings.get(image.sha256)
        if kept is not None:
            self._embeddings.move_to_end(image.sha256)
            return kept
        with _interrupts_held(self._text):  # lost in a callback, it could leave the graph unmended for that node
            features = np.concatenate([self._vision.encode(tile) for tile in image.tiles])
        packed = pack(features, image.layout, self._vision.newline)
        self._embeddings[image.sha256] = packed
        if len(self._embeddings) > _IMAGES_KEPT:
            self._embeddings.popitem(last=False)
        return packed

    def score(self, prompt: Prompt, answer: Sequence[int]) -> FloatArray:
        """Logits that predict each answer token, teacher-forced: (len(answer), vocab) float32."""
        check_room(prompt, len(answer), self.context_length)
        self.timings = Timings()
        return self._prefill(prompt, answer[:-1], last=len(answer))

    def generate(self, prompt: Prompt, sampling: Sampling) -> Iterator[Token]:
        """Tokens one by one, until a stop id (not yielded), `max_tokens` or the end of the context."""
        room = check_room(prompt, 1, self.context_length)
        self.timings = Timings()
        prefill = partial(self._first_logits, prompt)
        yield from generate_tokens(prefill, self._step, prompt, sampling, room, self.timings)

    def close(self) -> None:
        """Free the model."""
        self._vision.close()
        self._text.close()

    def _first_logits(self, prompt: Prompt) -> FloatArray:
        return np.asarray(self._prefill(prompt, (), last=1)[0])

    def _prefill(self, prompt: Prompt, extra: Sequence[int], last: int) -> FloatArray:
        """Run what the cache does not hold; logits of the `last` positions."""
        wanted = keys_of(prompt, extra)
        held = self._prefix.shared(prompt, extra, last)
        before = time.perf_counter()
        parts = _inputs(self.encode(p) if isinstance(p, FrontImage) else p for p in remaining(prompt, extra, held))
        encoded = time.perf_counter()
        self._text.forget(held)
        self._prefix.keys = wanted[:held]
        logits = []
        with _interrupts_held(self._text):
            for part in parts:
                start = len(self._prefix.keys)
                logits.append(self._text.run(part, start, first_wanted=len(wanted) - last))
                self._prefix.keys = wanted[: start + len(part)]
        self.timings.image_encode_ms = (encoded - before) * 1e3
        self.timings.prefill_ms = (time.perf_counter() - encoded) * 1e3
        self.timings.prefill_tokens = len(wanted) - held
        self.timings.reused_tokens = held
        return np.concatenate(logits)

    def _step(self, token: int) -> FloatArray:
        position = len(self._prefix.keys)
        logits = self._text.run(np.array([token], np.int32), position, first_wanted=position)
        self._prefix.keys.append(token)
        return np.asarray(logits[0])


class _LanguageModel:
    """A llama.cpp model with one context: token ids or embeddings in, logits out."""

    def __init__(self, loaded: Library, path: Path, threads: int, context_length: int, exact: bool) -> None:
        self._loaded, self._llama = loaded, loaded.llama
        _check_magic(path)
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
        self._positions, self._outputs = np.zeros(_BATCH, np.int32), np.zeros(_BATCH, np.int8)

    def _open_context(self, threads: int, exact: bool) -> Any:
        wanted = self._llama.llama_context_default_params()
        wanted.n_ctx = self.context_length
        wanted.n_batch = wanted.n_ubatch = _BATCH
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.no_perf = True
        if exact:
            wanted.type_k = wanted.type_v = _F32
            wanted.flash_attn_type = _DISABLED
        return self._llama.llama_init_from_model(self.model, wanted)

    def run(self, inputs: np.ndarray[Any, Any], start: int, first_wanted: int) -> FloatArray:
        """Append `inputs` at position `start`; logits (n, vocab) of those at or behind position `first_wanted`.

        inputs: token ids (n,) int32, or embeddings (n, width) float32.

        Raises:
            KeyboardInterrupt: `aborting` was set while it ran.
        """
        logits = [
            self._run_batch(np.ascontiguousarray(inputs[i : i + _BATCH]), start + i, first_wanted)
            for i in range(0, len(inputs), _BATCH)
        ]
        return np.concatenate(logits)

    def _run_batch(self, inputs: np.ndarray[Any, Any], start: int, first_wanted: int) -> FloatArray:
        count = len(inputs)
        self._positions[:count] = np.arange(start, start + count)
        self._outputs[:count] = self._positions[:count] >= first_wanted
        batch = self._llama.llama_batch(n_tokens=count)  # no sequence ids: all of sequence 0
        if inputs.ndim == 1:
            batch.token = _pointer(inputs, self._llama.llama_token)
        else:
            batch.embd = _pointer(inputs, ctypes.c_float)
        batch.pos = _pointer(self._positions, self._llama.llama_pos)
        batch.logits = _pointer(self._outputs, ctypes.c_int8)
        code = self._llama.llama_decode(self.context, batch)
        if code == _ABORTED and self.aborting.is_set():
            raise KeyboardInterrupt
        if code:
            raise RuntimeLoadError(f"llama.cpp could not run the model (code {code}): {self._loaded.log.last_error()}")
        outputs = int(self._outputs[:count].sum())
        if not outputs:
            return np.empty((0, self.vocab_size), np.float32)
        pointer = self._llama.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, shape=(outputs, self.vocab_size)).copy()

    def forget(self, start: int) -> None:
        """Drop what the cache holds at and behind position `start`."""
        memory = self._llama.llama_get_memory(self.context)
        self._llama.llama_memory_seq_rm(memory, 0, start, -1)

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


class _VisionModel:
    """An mmproj: one tile in, its projected patch features out."""

    def __init__(self, loaded: Library, path: Path, text: _LanguageModel, threads: int, exact: bool) -> None:
        self._loaded, self._mtmd = loaded, loaded.mtmd
        _check_magic(path)
        self.graph = VisionGraph(loaded)
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
        self.image_size, self.newline = _read_mmproj(path)
        self._marker = self._mtmd.mtmd_default_marker()

    def encode(self, tile: np.ndarray[Any, Any]) -> FloatArray:
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


@contextmanager
def _interrupts_held(text: _LanguageModel) -> Iterator[None]:
    """Let Ctrl-C stop a running prefill: raised inside a C callback it would be lost, so it sets a flag there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(_number: int, _frame: FrameType | None) -> None:
        text.aborting.set()

    before = signal.signal(signal.SIGINT, note)
    text.aborting.clear()
    text.watch_abort(True)
    try:
        yield
    finally:
        text.watch_abort(False)
        signal.signal(signal.SIGINT, before)
    if text.aborting.is_set():  # it came too late to abort
        raise KeyboardInterrupt


def _inputs(parts: Iterator[FloatArray | tuple[int, ...]]) -> list[np.ndarray[Any, Any]]:
    """Runs of token ids joined into one array each, embeddings as they are; nothing empty."""
    inputs: list[np.ndarray[Any, Any]] = []
    for is_text, group in itertools.groupby(parts, key=lambda part: isinstance(part, tuple)):
        if is_text:
            inputs.append(np.array(list(itertools.chain.from_iterable(group)), np.int32))  # type: ignore[arg-type]
        else:
            inputs.extend(np.asarray(part) for part in group)
    return [part for part in inputs if len(part)]


def _pointer(array: np.ndarray[Any, Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def _the_one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        what = "no" if not found else "more than one"
        raise RuntimeLoadError(f"{folder}: {what} {pattern}: not a gguf artefact of ldrt-edge")
    return found[0]


def _check_magic(path: Path) -> None:
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise RuntimeLoadError(f"{path}: not a GGUF file")


def _default_context(folder: Path) -> int:
    front = folder / "front.json"
    trained = json.loads(front.read_bytes())["context_length"] if front.is_file() else _CONTEXT
    return min(int(trained), _CONTEXT)


def _read_mmproj(path: Path) -> tuple[int, FloatArray | None]:
    """Side of a tile in pixels, and LLaVA-NeXT's newline embedding (hidden,) if there is one."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    size = int(reader.fields["clip.vision.image_size"].contents())
    newline = next((t.data for t in reader.tensors if t.name == "model.image_newline"), None)
    return size, None if newline is None else np.array(newline, np.float32)
