"""What every runtime does around its model: keep image embeddings and the prompt's prefix, count time, generate.

A second question about a picture finds the picture's embeddings, and the keys and values of everything up to the
question, in memory: only the question itself is computed. A server that `remember`s keeps them for each of its
conversations, so that several go on side by side.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ldrt_edge.kept import Kept
from ldrt_edge.runtimes.base import (
    FloatArray,
    FrontImage,
    Key,
    PrefixCache,
    Prompt,
    Sampling,
    Timings,
    Token,
    check_room,
    generate_tokens,
    keys_of,
    of_pictures,
    remaining,
)

CONTEXT = 4096
"""Tokens that a laptop's runtime makes room for, where the model knows more."""
_EMBEDDINGS_BYTES = 256 << 20
"""Of image embeddings: 27 pictures of a LLaVA-1.5-7B, hundreds of the starter's."""

Part = FloatArray | tuple[int, ...]
"""A run of token ids, or image embeddings (image_tokens, hidden)."""


@dataclass(frozen=True)
class State:
    """What a context held: keys and values as the runtime has them, and how many bytes these are."""

    content: Any
    bytes: int


class CachedRuntime(ABC):
    """The `Runtime` protocol over a model's operations: encode a picture, append to the context, change contexts."""

    context_length: int

    def __init__(self) -> None:
        self.timings = Timings()
        self._prefix = PrefixCache()
        self._embeddings = Kept[str, FloatArray](_EMBEDDINGS_BYTES, lambda packed: packed.nbytes)
        self._left = Kept[tuple[Key, ...], State](0, lambda state: state.bytes)

    @abstractmethod
    def _encode(self, image: FrontImage) -> FloatArray:
        """Image embeddings, packed: (image_tokens, hidden) float32."""

    @abstractmethod
    def _append(self, parts: Sequence[Part], held: int, last: int) -> FloatArray:
        """Keep the first `held` positions, run `parts` behind them; logits of the `last` positions."""

    @abstractmethod
    def _leave(self, held: int, most_bytes: int) -> State | None:
        """Give away the context's first `held` positions, unless they are more bytes, and leave it empty."""

    @abstractmethod
    def _enter(self, state: State, held: int) -> None:
        """Take back what `_leave` gave, `held` positions."""

    def encode(self, image: FrontImage) -> FloatArray:
        """Image embeddings, packed: (image_tokens, hidden) float32; the last pictures' are kept."""
        packed = self._embeddings.get(image.sha256)
        if packed is None:
            packed = self._encode(image)
            self._embeddings.put(image.sha256, packed)
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
        """`generate` of several prompts, one after the other, each as if it were the first after its pictures.

        What other questions begin with as well is computed again: in another batch it was rounded otherwise.
        """
        given = []
        for prompt in prompts:
            self._prefix.keys = self._prefix.keys[: of_pictures(prompt)]
            given.append(list(self.generate(prompt, sampling)))
        return given

    def remember(self, most_bytes: int) -> None:
        """Keep what was read for other conversations too, in at most so many bytes: they go on as if not left."""
        self._left.most_bytes = most_bytes

    def forget(self, prompt: Prompt | None = None, then: Prompt | None = None) -> None:
        """Hold neither pictures nor prefixes any longer, as after loading; of one prompt, if it is given.

        then: what comes next; what it goes on from stays.
        """
        if prompt is None:
            self._embeddings.clear()
            self._left.clear()
            self._prefix.keys = []
            return
        wanted, coming = keys_of(prompt), keys_of(then) if then else []
        if 2 * self._prefix.shared(wanted) > len(self._prefix.keys):
            self._prefix.keys = self._prefix.keys[: self._prefix.shared(coming)]
        held = self._prefix.shared(coming)
        for keys in self._left:
            left = PrefixCache(list(keys))
            of_both = left.shared(coming)
            if 2 * left.shared(wanted) > len(keys) and left.shared(wanted) > of_both and of_both <= held:
                self._left.take(keys)
        still_shown = {image.sha256 for image in then.images} if then else set()
        for image in prompt.images:
            if image.sha256 not in still_shown:
                self._embeddings.take(image.sha256)

    def interrupt(self) -> None:  # noqa: B027 - a runtime without a way to stop half-way stops after its prefill
        """Called from another thread: let a prefill that runs raise KeyboardInterrupt, where the runtime can."""

    def _first_logits(self, prompt: Prompt) -> FloatArray:
        return np.asarray(self._prefill(prompt, (), last=1)[0])

    def _hold(self, prompt: Prompt, length: int) -> None:
        """Let the cache hold the first `length` tokens of a prompt, all its pictures among them."""
        if self._prefix.shared(keys_of(prompt)) < length:
            self._prefill(replace(prompt, ids=prompt.ids[:length]), (), last=1)

    def _prefill(self, prompt: Prompt, extra: Sequence[int], last: int) -> FloatArray:
        """Run what the context does not hold already; logits of the `last` positions."""
        wanted = keys_of(prompt, extra)
        before = time.perf_counter()
        self._change_to(wanted)
        held = self._prefix.shared(wanted, last)
        self._prefix.keys = wanted[:held]  # what is surely there, should the run be stopped
        parts = [
            self.encode(part) if isinstance(part, FrontImage) else part for part in remaining(prompt, extra, held)
        ]
        encoded = time.perf_counter()
        logits = self._append(parts, held, last)
        self._prefix.keys = wanted
        self.timings.image_encode_ms = (encoded - before) * 1e3
        self.timings.prefill_ms = (time.perf_counter() - encoded) * 1e3
        self.timings.prefill_tokens = len(wanted) - held
        self.timings.reused_tokens = held
        return logits

    def _change_to(self, wanted: list[Key]) -> None:
        """Go back to the conversation that `wanted` goes on with, if it was left; remember the one that is left now."""
        if not self._left.most_bytes:
            return
        held = self._prefix.shared(wanted)
        known = {keys: PrefixCache(list(keys)).shared(wanted) for keys in self._left}
        best = max(known, key=known.__getitem__, default=())
        found = self._left.take(best) if known.get(best, 0) > held else None
        keys = tuple(self._prefix.keys)
        if keys and (found or 2 * held < len(keys)):  # not for an answer that is asked for again
            self._prefix.keys = []
            for older in self._left:
                if keys[: len(older)] == older:  # the same conversation, earlier
                    self._left.take(older)
            if left := self._leave(len(keys), self._left.most_bytes):
                self._left.put(keys, left)
        if found:
            self._enter(found, len(best))
            self._prefix.keys = list(best)

    def _step(self, token: int) -> FloatArray:
        logits = self._append([(token,)], len(self._prefix.keys), last=1)
        self._prefix.keys.append(token)
        return np.asarray(logits[0])
