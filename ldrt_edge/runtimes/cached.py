"""What every runtime does around its model: keep image embeddings and the prompt's prefix, count time, generate.

A second question about a picture finds the picture's embeddings, and the keys and values of everything up to the
question, in memory: only the question itself is computed.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

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
    remaining,
)

CONTEXT = 4096
"""Tokens that a laptop's runtime makes room for, where the model knows more."""
_IMAGES_KEPT = 8

Part = FloatArray | tuple[int, ...]
"""A run of token ids, or image embeddings (image_tokens, hidden)."""


class CachedRuntime(ABC):
    """The `Runtime` protocol over two operations of a model: encode a picture, append to the context."""

    context_length: int

    def __init__(self) -> None:
        self.timings = Timings()
        self._embeddings: OrderedDict[str, FloatArray] = OrderedDict()
        self._prefix = PrefixCache()

    @abstractmethod
    def _encode(self, image: FrontImage) -> FloatArray:
        """Image embeddings, packed: (image_tokens, hidden) float32."""

    @abstractmethod
    def _append(self, parts: Sequence[Part], held: int, last: int) -> FloatArray:
        """Keep the first `held` positions, run `parts` behind them; logits of the `last` positions."""

    def encode(self, image: FrontImage) -> FloatArray:
        """Image embeddings, packed: (image_tokens, hidden) float32; the last few pictures' are kept."""
        packed = self._embeddings.pop(image.sha256, None)
        if packed is None:
            packed = self._encode(image)
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

    def score_all(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[FloatArray]:
        """`score` of several prompts, one after the other."""
        return [self.score(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def generate_all(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Token]]:
        """`generate` of several prompts, one after the other."""
        return [list(self.generate(prompt, sampling)) for prompt in prompts]

    def forget(self) -> None:
        """Hold neither pictures nor a prefix any longer, as after loading."""
        self._embeddings.clear()
        self._prefix.keys = []

    def interrupt(self) -> None:  # noqa: B027 - a runtime without a way to stop half-way stops after its prefill
        """Called from another thread: let a prefill that runs raise KeyboardInterrupt, where the runtime can."""

    def _first_logits(self, prompt: Prompt) -> FloatArray:
        return np.asarray(self._prefill(prompt, (), last=1)[0])

    def _hold(self, prompt: Prompt, length: int) -> None:
        """Let the cache hold the first `length` tokens of a prompt, all its pictures among them."""
        if self._prefix.shared(prompt) < length:
            self._prefill(replace(prompt, ids=prompt.ids[:length]), (), last=1)

    def _prefill(self, prompt: Prompt, extra: Sequence[int], last: int) -> FloatArray:
        """Run what the context does not hold already; logits of the `last` positions."""
        wanted = keys_of(prompt, extra)
        held = self._prefix.shared(prompt, extra, last)
        before = time.perf_counter()
        parts = [
            self.encode(part) if isinstance(part, FrontImage) else part for part in remaining(prompt, extra, held)
        ]
        encoded = time.perf_counter()
        self._prefix.keys = wanted[:held]  # what is surely there, should the run be stopped
        logits = self._append(parts, held, last)
        self._prefix.keys = wanted
        self.timings.image_encode_ms = (encoded - before) * 1e3
        self.timings.prefill_ms = (time.perf_counter() - encoded) * 1e3
        self.timings.prefill_tokens = len(wanted) - held
        self.timings.reused_tokens = held
        return logits

    def _step(self, token: int) -> FloatArray:
        logits = self._append([(token,)], len(self._prefix.keys), last=1)
        self._prefix.keys.append(token)
        return np.asarray(logits[0])
