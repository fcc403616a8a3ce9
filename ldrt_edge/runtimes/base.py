"""The one protocol that every runtime speaks, and what all of them share.

A runtime never preprocesses, tokenises or templates: it takes token ids and images already of the exact size (both
from `ldrt_edge.front`), and gives embeddings, logits, tokens and timings.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.errors import ConfigError, DataError

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class FrontImage:
    """A picture as every runtime gets it.

    tiles: (n_tiles, size, size, 3) uint8 RGB, not yet normalised.
    layout: (image_tokens, k) int32: image token i is the mean of the patch features `layout[i]`, counted over all
        tiles in order (tile 0 first); -1 is the newline embedding. See `pack`.
    size: (height, width) of the original picture, in pixels.
    sha256: of the tiles; identifies exactly what the model saw.
    """

    tiles: NDArray[np.uint8]
    layout: NDArray[np.int32]
    size: tuple[int, int]
    sha256: str

    @property
    def token_count(self) -> int:
        """Number of image tokens in the prompt."""
        return int(self.layout.shape[0])


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids with every image's placeholder already repeated `token_count` times, and the images in order."""

    ids: tuple[int, ...]
    images: tuple[FrontImage, ...]
    image_token_id: int
    stop_ids: tuple[int, ...]

    def segments(self) -> list[tuple[int, ...] | FrontImage]:
        """The prompt as runs of text ids and images, in order.

        Raises:
            DataError: placeholders and images do not match.
        """
        parts: list[tuple[int, ...] | FrontImage] = []
        position, waiting = 0, list(self.images)
        while position < len(self.ids):
            end = position
            if self.ids[position] == self.image_token_id:
                if not waiting:
                    raise DataError("the prompt has more image placeholders than images")
                image = waiting.pop(0)
                end += image.token_count
                if self.ids[position:end] != (self.image_token_id,) * image.token_count:
                    raise DataError("an image placeholder has not the length of its image")
                parts.append(image)
            else:
                while end < len(self.ids) and self.ids[end] != self.image_token_id:
                    end += 1
                parts.append(self.ids[position:end])
            position = end
        if waiting:
            raise DataError("the prompt has fewer image placeholders than images")
        return parts


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 is greedy."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or min(self.top_k, self.seed) < 0:
            raise ConfigError("sampling wants max_tokens ≥ 1, temperature ≥ 0, 0 < top_p ≤ 1, top_k ≥ 0, seed ≥ 0")


@dataclass(frozen=True)
class Token:
    """A generated token and its log-probability under the model (temperature 1)."""

    id: int
    logprob: float


@dataclass
class Timings:
    """Of the last `generate` or `score`: wall milliseconds and counts. Reused tokens were in the cache already."""

    image_encode_ms: float = 0.0
    prefill_ms: float = 0.0
    prefill_tokens: int = 0
    reused_tokens: int = 0
    ttft_ms: float = 0.0
    decode_ms: float = 0.0
    decode_tokens: int = 0


class Runtime(Protocol):
    """A loaded model. `hf` is the reference; `llamacpp` and `mlx` must give its numbers."""

    @property
    def name(self) -> Literal["hf", "llamacpp", "mlx"]:
        """Which runtime this is."""
        ...

    context_length: int
    vocab_size: int
    load_ms: float
    timings: Timings

    def encode(self, image: FrontImage) -> FloatArray:
        """Image embeddings, packed: (image_tokens, hidden) float32."""
        ...

    def score(self, prompt: Prompt, answer: Sequence[int]) -> FloatArray:
        """Logits that predict each answer token, teacher-forced: (len(answer), vocab) float32."""
        ...

    def generate(self, prompt: Prompt, sampling: Sampling) -> Iterator[Token]:
        """Tokens one by one, until a stop id (not yielded), `max_tokens` or the end of the context."""
        ...

    def score_all(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[FloatArray]:
        """`score` of several prompts; where the runtime can, those about one picture side by side."""
        ...

    def generate_all(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Token]]:
        """`generate` of several prompts; where the runtime can, those about one picture side by side."""
        ...

    def remember(self, most_bytes: int) -> None:
        """Keep what was read for other conversations too, in at most so many bytes: they go on as if not left."""
        ...

    def forget(self, prompt: Prompt | None = None, then: Prompt | None = None) -> None:
        """Hold neither pictures nor prefixes any longer, as after loading; of one prompt, if it is given.

        then: what comes next; what it goes on from stays.
        """
        ...

    def interrupt(self) -> None:
        """Called from another thread: let a prefill that runs raise KeyboardInterrupt, where the runtime can."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


def load(folder: Path, name: str | None = None, threads: int | None = None, branches: int = 0) -> Runtime:
    """Load the runtime that fits the artefact's kind: merged and base → hf, gguf → llamacpp, mlx → mlx.

    branches: questions that shall run side by side, where the runtime can (llamacpp). Every file is held against the
    manifest before, by its sha256: what answers is what was proven.

    Raises:
        ArtifactError: `folder` is no model artefact, or a file is not what it was when it was made.
        MissingExtraError: the runtime's package is not installed.
        RuntimeLoadError: the runtime refuses the model.
    """
    from ldrt_edge import artifact

    kind = artifact.verify(folder, "base", "merged", "gguf", "mlx").kind
    if kind == "gguf":
        return _load_llamacpp(folder, threads, branches)
    return _load_mlx(folder, threads) if kind == "mlx" else _load_hf(folder, threads)


def pack(features: FloatArray, layout: NDArray[np.int32], newline: FloatArray | None) -> FloatArray:
    """Put patch features into the order the language model reads: gather by `layout`, mean over its k columns.

    features: (n_tiles * patches, hidden) float32; newline: (hidden,) or None; returns (image_tokens, hidden).
    The same table serves numpy here, torch in training, and MLX.
    Source: `LlavaNextModel.pack_image_features` in transformers, as an index table.
    """
    if newline is not None:
        features = np.concatenate([features, newline[None].astype(np.float32)])
    gathered = features[layout]  # -1 is the last row: the newline
    return np.ascontiguousarray(gathered[:, 0] if layout.shape[1] == 1 else gathered.mean(axis=1), dtype=np.float32)


def log_softmax(logits: FloatArray) -> NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


_COLDEST = 1e-6
"""Below it nothing changes any more, and float32 overflows."""


def sample(logits: FloatArray, sampling: Sampling, rng: np.random.Generator) -> Token:
    """Draw one token from `logits` (vocab,): top-k, then top-p, at the temperature; argmax at temperature 0."""
    if sampling.temperature == 0:
        best = int(logits.argmax())
        return Token(best, -float(np.log(np.exp(logits - logits[best]).sum())))
    logprobs = log_softmax(logits)
    scaled = log_softmax((logprobs / max(sampling.temperature, _COLDEST)).astype(np.float32))
    k = min(sampling.top_k or scaled.size, scaled.size)
    order = np.argpartition(-scaled, k - 1)[:k]
    order = order[np.argsort(-scaled[order])]
    weights = np.exp(scaled[order])
    keep = np.concatenate([[True], np.cumsum(weights)[:-1] < sampling.top_p])
    order, weights = order[keep], weights[keep]
    chosen = int(rng.choice(order, p=weights / weights.sum()))
    return Token(chosen, float(logprobs[chosen]))


def generate_tokens(
    prefill: Callable[[], FloatArray],
    step: Callable[[int], FloatArray],
    prompt: Prompt,
    sampling: Sampling,
    room: int,
    timings: Timings,
) -> Iterator[Token]:
    """The generation loop of every runtime.

    `prefill` gives the logits (vocab,) after the prompt; `step` takes a token and gives the next logits; `room` is
    how many tokens still fit into the context.
    """
    rng = np.random.default_rng(sampling.seed)
    started = time.perf_counter()
    token = sample(prefill(), sampling, rng)
    timings.ttft_ms = (time.perf_counter() - started) * 1e3
    for _ in range(min(sampling.max_tokens, room) - 1):
        if token.id in prompt.stop_ids:
            return
        yield token
        before = time.perf_counter()
        token = sample(step(token.id), sampling, rng)
        timings.decode_ms += (time.perf_counter() - before) * 1e3
        timings.decode_tokens += 1
    if token.id not in prompt.stop_ids:
        yield token


Key = int | tuple[str, int]
"""Of a cell in the key-value cache: a text token's id, or an image token's (hash, index). Equal keys, equal cells."""


@dataclass
class PrefixCache:
    """Which tokens the runtime's key-value cache holds, so that a second question about a picture starts at once."""

    keys: list[Key] = field(default_factory=list)

    def shared(self, wanted: Sequence[Key], last: int = 1) -> int:
        """How many leading tokens of `wanted` are held already.

        Whole images or none; and never the `last` ones, whose logits are wanted.
        """
        count = 0
        for held, new in zip(self.keys, wanted, strict=False):
            if held != new:
                break
            count += 1
        count = min(count, len(wanted) - last)
        while count > 0 and _within_image(wanted[count]):
            count -= 1
        return max(count, 0)


def _within_image(key: Key) -> bool:
    return isinstance(key, tuple) and key[1] > 0


def keys_of(prompt: Prompt, extra: Sequence[int] = ()) -> list[Key]:
    """Cache keys of a prompt followed by `extra` text tokens."""
    keys: list[Key] = []
    for part in prompt.segments():
        if isinstance(part, FrontImage):
            keys.extend((part.sha256, i) for i in range(part.token_count))
        else:
            keys.extend(part)
    return [*keys, *extra]


def of_pictures(prompt: Prompt) -> int:
    """How many tokens a prompt has up to the end of its last picture; 0 without one."""
    places = [place for place, key in enumerate(keys_of(prompt), 1) if isinstance(key, tuple)]
    return max(places, default=0)


def common_prefix(prompts: Sequence[Prompt]) -> int:
    """How many leading tokens all prompts share, with pictures those up to their end: text runs through kernels whole.

    0 where a picture stands behind them, or one would have none left.
    """
    keys = [keys_of(prompt) for prompt in prompts]
    count = 0
    for column in zip(*keys, strict=False):
        if any(key != column[0] for key in column):
            break
        count += 1
    count = min(count, min(map(len, keys)) - 1)
    seen = of_pictures(prompts[0])
    behind = any(isinstance(key, tuple) for key in itertools.chain(*(k[count:] for k in keys)))
    return 0 if behind else seen or count


def remaining(prompt: Prompt, extra: Sequence[int], start: int) -> list[tuple[int, ...] | FrontImage]:
    """The segments of `prompt` followed by `extra` text tokens, without the first `start` tokens."""
    parts: list[tuple[int, ...] | FrontImage] = []
    position = 0
    for part in [*prompt.segments(), tuple(extra)]:
        length = part.token_count if isinstance(part, FrontImage) else len(part)
        if length and position + length > start:
            parts.append(part if isinstance(part, FrontImage) else part[max(start - position, 0) :])
        position += length
    return parts


def check_room(prompt: Prompt, answer_tokens: int, context_length: int) -> int:
    """How many tokens still fit behind the prompt.

    Raises:
        DataError: prompt and answer are longer than the context.
    """
    room = context_length - len(prompt.ids)
    if room < max(answer_tokens, 1):
        raise DataError(
            f"the question and its picture take {len(prompt.ids)} tokens, the model holds {context_length}: "
            "ask shorter, or /reset"
        )
    return room


def _load_hf(folder: Path, threads: int | None) -> Runtime:
    from ldrt_edge.runtimes.hf import HfRuntime

    return HfRuntime(folder, threads=threads)


def _load_llamacpp(folder: Path, threads: int | None, branches: int) -> Runtime:
    from ldrt_edge.runtimes.llamacpp import LlamaCppRuntime

    return LlamaCppRuntime(folder, threads=threads, branches=branches)


def _load_mlx(folder: Path, threads: int | None) -> Runtime:
    from ldrt_edge.runtimes.mlx import MlxRuntime, say_if_slow

    say_if_slow()
    return MlxRuntime(folder)  # MLX has no setting for threads
