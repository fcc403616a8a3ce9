"""The laptop's runtime: a GGUF pair (model and mmproj) on llama.cpp, token for token what training used.

llama.cpp never resizes, tiles, templates or tokenises here. Each tile is encoded alone, the features are packed by the
front end's table, and embeddings and token ids go in through the low-level interface; logits come out where they are
wanted and nowhere else.
"""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal

import numpy as np

from ldrt_edge.errors import RuntimeLoadError
from ldrt_edge.front_config import read_json
from ldrt_edge.runtimes.base import FloatArray, FrontImage, Prompt, Sampling, Token, common_prefix, pack
from ldrt_edge.runtimes.branches import Branches
from ldrt_edge.runtimes.cached import CONTEXT, CachedRuntime, Part, State
from ldrt_edge.runtimes.llamacpp_bindings import Watch, library
from ldrt_edge.runtimes.llamacpp_models import Inputs, LanguageModel, VisionModel
from ldrt_edge.runtimes.processor import free_cores

_MOST_DOUBTED, _TRIED = 0.4, 16
"""Side by side, short answers take half of the time; so no more than that share of them may be asked again. It is
judged by so many answers at least."""


class LlamaCppRuntime(CachedRuntime):
    """A gguf artefact on llama.cpp.

    Args:
        folder: holds one model and one mmproj, `*.gguf`.
        threads: None takes one for each physical core that this process may use and nothing else keeps busy.
        context_length: tokens; None takes the model's, at most 4096 (the cache's memory grows with it).
        exact: float32 cache and plain attention, to compare arithmetic with the reference.
        watch: sees the input of every product with a weight matrix.
        branches: how many questions about one picture may run side by side, in the context's room.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        RuntimeLoadError: a file is missing, truncated or refused by llama.cpp.
    """

    name: Literal["llamacpp"] = "llamacpp"

    def __init__(
        self,
        folder: Path,
        threads: int | None = None,
        context_length: int | None = None,
        exact: bool = False,
        watch: Watch | None = None,
        branches: int = 0,
    ) -> None:
        super().__init__()
        self._side_by_side = self._doubted = 0
        self.threads = threads or free_cores()
        started = time.perf_counter()
        model, mmproj = gguf_pair(folder)
        loaded = library()
        self._text = LanguageModel(
            loaded, model, self.threads, context_length or _default_context(folder), exact, watch, branches
        )
        try:
            self._vision = VisionModel(loaded, mmproj, self._text, self.threads, exact, watch)
        except RuntimeLoadError:
            self._text.close()
            raise
        self.context_length = self._text.context_length
        self.vocab_size = self._text.vocab_size
        self.load_ms = (time.perf_counter() - started) * 1e3

    @property
    def class_tokens_moved(self) -> int:
        """How often the class token was put in its place; stays 0 on a build of llama.cpp that is mended."""
        return self._vision.graph.class_tokens_moved

    def interrupt(self) -> None:
        """Called from another thread: let a prefill that runs raise KeyboardInterrupt."""
        self._text.aborting.set()

    def score_all(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[FloatArray]:
        """`score` of several prompts, side by side where they share their pictures."""
        held = self._held_in_common(prompts, answers)
        if held is None:
            return super().score_all(prompts, answers)
        with _interrupts_held(self._text):
            return Branches(self._text, held).score([prompt.ids[held:] for prompt in prompts], answers)

    def generate_all(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Token]]:
        """`generate` of several prompts, side by side where they share their pictures; the same greedy answers.

        What kernels may have decided is asked again, alone. With a model that is undecided so often that this takes
        longer than it saves, questions are asked one after the other.
        """
        if self._doubted > _MOST_DOUBTED * max(self._side_by_side, _TRIED):
            return super().generate_all(prompts, sampling)
        held = self._held_in_common(prompts, [(0,) * sampling.max_tokens] * len(prompts))
        if held is None:
            return super().generate_all(prompts, sampling)
        with _interrupts_held(self._text):
            given = Branches(self._text, held).generate(prompts, sampling)
        self._side_by_side += len(given)
        self._doubted += given.count(None)
        doubted = [prompt for prompt, found in zip(prompts, given, strict=True) if found is None]
        again = iter(super().generate_all(doubted, sampling))
        return [next(again) if found is None else found for found in given]

    def _held_in_common(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> int | None:
        """Fill the cache with what all prompts begin with; its length, or None where side by side is not possible."""
        if self._text.branches < 2 or len(prompts) < 2:
            return None
        held = common_prefix(prompts)
        longest = max(len(p.ids) + len(a) for p, a in zip(prompts, answers, strict=True))
        if not held or held + 2 * (longest - held) > self.context_length:
            return None
        self._hold(prompts[0], held)
        return held

    def _leave(self, held: int, most_bytes: int) -> State | None:
        self._text.keep(held)
        content = self._text.copy() if self._text.copy_bytes <= most_bytes else None
        self._text.keep(0)
        return None if content is None else State(content, content.nbytes)

    def _enter(self, state: State, held: int) -> None:
        self._text.restore(state.content, held)

    def close(self) -> None:
        """Free the model."""
        self._vision.close()
        self._text.close()

    def _encode(self, image: FrontImage) -> FloatArray:
        features = []
        with _interrupts_held(self._text):  # lost in a callback, one could leave the graph unmended for that node
            for tile in image.tiles:
                if self._text.aborting.is_set():
                    break
                features.append(self._vision.encode(tile))
        return pack(np.concatenate(features), image.layout, self._vision.newline)

    def _append(self, parts: Sequence[Part], held: int, last: int) -> FloatArray:
        inputs = _joined(parts)
        first_wanted = held + sum(map(len, inputs)) - last
        self._text.keep(held)
        if sum(map(len, inputs)) == 1:
            return self._text.run(inputs[0], first_wanted)
        with _interrupts_held(self._text):
            return np.concatenate([self._text.run(part, first_wanted) for part in inputs])


@contextmanager
def _interrupts_held(text: LanguageModel) -> Iterator[None]:
    """Let Ctrl-C, or `interrupt`, stop a running prefill: raised inside a C callback Ctrl-C would be lost."""
    text.aborting.clear()
    signals = threading.current_thread() is threading.main_thread()  # they reach no other

    def note(_number: int, _frame: FrameType | None) -> None:
        text.aborting.set()

    before = signal.signal(signal.SIGINT, note) if signals else None
    text.watch_abort(True)
    try:
        yield
    finally:
        text.watch_abort(False)
        if signals:
            signal.signal(signal.SIGINT, before)
    if text.aborting.is_set():  # it came too late to abort
        raise KeyboardInterrupt


def _joined(parts: Sequence[Part]) -> list[Inputs]:
    """Runs of token ids joined into one array each, embeddings as they are; nothing empty."""
    inputs: list[Inputs] = []
    for is_text, group in itertools.groupby(parts, key=lambda part: isinstance(part, tuple)):
        if is_text:
            inputs.append(np.array([token for part in group for token in part], np.int32))
        else:
            inputs.extend(np.asarray(part) for part in group)
    return [part for part in inputs if len(part)]


def gguf_pair(folder: Path) -> tuple[Path, Path]:
    """A folder's model file and mmproj file; the latter has "mmproj" in its name, as everybody calls it.

    Raises:
        RuntimeLoadError: there are fewer or more.
    """
    files = sorted(folder.glob("*.gguf"))
    vision = [path for path in files if "mmproj" in path.name.lower()]
    text = [path for path in files if path not in vision]
    if len(text) != 1 or len(vision) != 1:
        raise RuntimeLoadError(
            f"{folder}: {len(text)} model and {len(vision)} mmproj files (*.gguf): one of each is wanted"
        )
    return text[0], vision[0]


def _default_context(folder: Path) -> int:
    front = folder / "front.json"
    trained = read_json(front).get("context_length") if front.is_file() else CONTEXT
    if not isinstance(trained, int) or trained < 1:
        raise RuntimeLoadError(f"{front}: a context of {trained!r} tokens")
    return min(trained, CONTEXT)
