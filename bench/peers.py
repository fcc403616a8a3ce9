"""Side by side with the stock way to use the same files: is our runtime as fast, and our converter?

    python -m ldrt_edge.bench.peers EDGE [--merged MERGED] [--converter convert_hf_to_gguf.py]

The peer is llama-cpp-python's high-level interface, `Llama` with its multimodal chat handler, on the same GGUF pair,
with the same threads, context, batch and libraries, and otherwise with the defaults of each (the peer turns flash
attention off, ours leaves it to llama.cpp; on AMX both go without repacked weights, which crash llama.cpp there):

- **TTFT**: from a PNG in memory and a question to the first token. Ours: picture, front end, encoding, prefill. The
  peer's: `create_chat_completion(max_tokens=1)` with the PNG as a data URI. Both start from an empty cache, with a
  picture they have not seen, and with all image tokens; where our front end pools them, a line of its own says what
  that gains.
- **prefill**: the same 512 token ids, `Llama.eval` against `Runtime.score`.
- **decode**: a fixed number of greedy tokens behind the picture's prompt, `Llama.generate` against
  `Runtime.generate`, stop tokens or not; from the first token to the last.

Repeats are interleaved and the order turns about, so that load from elsewhere falls on both; medians are compared.
Ratios above 1 mean that ours is faster, but for TTFT and conversion, where they are time to time and below 1 is faster.

The peer's answers may differ from ours, which is no matter of speed: stock llama.cpp puts the class token of LLaVA's
vision tower after the patches (upstream issue #25814; our runtime mends it), its tokenizer adds a space behind the
picture, and a LLaVA-NeXT model gets no tiles.

Conversion is timed for the language model only, as the official converter refuses CLIP LLaVA's vision tower; it comes
with llama.cpp's sources (or llama-cpp-python's sdist), not with its wheel, so without `--converter` it is skipped. Its
time includes the start of its process, as a user's wait does; ours is measured the same way.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from ldrt_edge import artifact, console
from ldrt_edge.bench.latency import Spread, spread
from ldrt_edge.errors import LdrtError, require
from ldrt_edge.front import Front, Message
from ldrt_edge.runtimes.base import Prompt, Sampling
from ldrt_edge.runtimes.processor import has_amx, physical_cores

QUESTION = "What does this picture show? Describe it in detail."
CONTEXT, BATCH, PREFILL_TOKENS, DECODE_TOKENS = 2048, 512, 512, 48
_WRITE_TEXT = (
    "import sys; from pathlib import Path; from ldrt_edge.convert.gguf import write_text; "
    "write_text(Path(sys.argv[1]), Path(sys.argv[2]), 'f16')"
)


@dataclass(frozen=True)
class Pair:
    """One comparison: both spreads, and the ratio of their medians, ours to the peer's."""

    ours: Spread
    peer: Spread
    ratio: float


@dataclass(frozen=True)
class Comparison:
    """What one run found. conversion_s is None where the official converter was not at hand."""

    ttft_ms: Pair
    prefill_tok_per_s: Pair
    decode_tok_per_s: Pair
    ttft_pooled_ms: Spread | None
    conversion_s: Pair | None
    prompt_tokens: tuple[int, int]
    threads: int
    load_average: tuple[float, float, float]


def compare(
    edge: Path, merged: Path | None = None, converter: Path | None = None, threads: int | None = None, repeats: int = 7
) -> Comparison:
    """Time both on this machine, now.

    Raises:
        ArtifactError: `edge` is no gguf artefact.
        MissingExtraError: llama-cpp-python is not installed.
    """
    artifact.verify(edge, "gguf", quick=True)
    threads, load_average = threads or physical_cores(), psutil.getloadavg()
    ours, peer = Ours(edge, threads), Peer(edge, threads)
    rng = np.random.default_rng(0)
    ids = _text_ids(ours.front, rng)
    sides: dict[str, Ours | Peer] = {"ours": ours, "peer": peer}
    found: dict[str, dict[str, list[float]]] = {
        measure: {name: [] for name in sides} for measure in ("ttft", "prefill", "decode")
    }
    with console.bar("ours and the peer's", repeats + 1) as shown:
        for turn in range(repeats + 1):
            for name in sorted(sides, reverse=turn % 2 == 1):
                side = sides[name]
                first, decode = side.chat(_picture(rng))
                prefill = side.prefill(ids)
                if turn:  # the first is warm-up
                    found["ttft"][name].append(first)
                    found["decode"][name].append(decode)
                    found["prefill"][name].append(prefill)
            shown.advance()
    pooled = spread([ours.chat(_picture(rng), pooled=True)[0] for _ in range(repeats)]) if ours.pools else None
    ours.close()
    peer.close()
    return Comparison(
        ttft_ms=_pair(found["ttft"]),
        prefill_tok_per_s=_pair(found["prefill"]),
        decode_tok_per_s=_pair(found["decode"]),
        ttft_pooled_ms=pooled,
        conversion_s=convert_both(merged, converter, min(repeats, 3)) if merged and converter else None,
        prompt_tokens=(ours.prompt_tokens, peer.prompt_tokens),
        threads=threads,
        load_average=load_average,
    )


class Ours:
    """Our runtime on the pair."""

    def __init__(self, edge: Path, threads: int) -> None:
        from ldrt_edge.runtimes.llamacpp import LlamaCppRuntime

        front = Front.load(edge)
        self.pools = front.config.vision_tokens is not None
        self.front, self._pooled = front.with_vision_tokens(None) if self.pools else front, front
        self._runtime = LlamaCppRuntime(edge, threads=threads, context_length=CONTEXT)
        self.prompt_tokens = 0

    def chat(self, png: bytes, pooled: bool = False) -> tuple[float, float]:
        """Milliseconds to the first token, and tokens a second behind it."""
        front = self._pooled if pooled else self.front
        self._runtime.forget()
        started = time.perf_counter()
        image = front.image(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")))
        prompt = replace(front.prompt([Message("user", QUESTION, (image,))]), stop_ids=())
        tokens = self._runtime.generate(prompt, Sampling(max_tokens=DECODE_TOKENS + 1))
        next(tokens)
        first_ms = (time.perf_counter() - started) * 1e3
        self.prompt_tokens = len(prompt.ids)
        return first_ms, _rate(tokens)

    def prefill(self, ids: list[int]) -> float:
        """Tokens a second through an empty cache."""
        prompt = Prompt(tuple(ids), (), self.front.config.image_token_id, self.front.config.stop_ids)
        self._runtime.forget()
        started = time.perf_counter()
        self._runtime.score(prompt, (ids[0],))
        return len(ids) / (time.perf_counter() - started)

    def close(self) -> None:
        """Free the model."""
        self._runtime.close()


class Peer:
    """llama-cpp-python's high-level chat on the same pair."""

    def __init__(self, edge: Path, threads: int) -> None:
        llama_cpp = require("llama_cpp", "")
        formats = require("llama_cpp.llama_chat_format", "")
        model, mmproj = (next(edge.glob(f"{kind}-*.gguf")) for kind in ("model", "mmproj"))
        with _guarded():
            self._llama: Any = llama_cpp.Llama(
                str(model),
                chat_handler=formats.MTMDChatHandler(str(mmproj), verbose=False, use_gpu=False),
                n_ctx=CONTEXT,
                n_batch=BATCH,
                n_threads=threads,
                n_threads_batch=threads,
                no_perf=True,
                verbose=False,
            )
        self.prompt_tokens = 0

    def chat(self, png: bytes) -> tuple[float, float]:
        """Milliseconds to the first token, and tokens a second behind it."""
        picture = {"type": "image_url", "image_url": "data:image/png;base64," + base64.b64encode(png).decode()}
        messages = [{"role": "user", "content": [picture, {"type": "text", "text": QUESTION}]}]
        started = time.perf_counter()
        self._llama.create_chat_completion(messages, max_tokens=1, temperature=0.0, repeat_penalty=1.0)
        first_ms = (time.perf_counter() - started) * 1e3
        self.prompt_tokens = int(self._llama.n_tokens)
        held = self._llama.input_ids[: self._llama.n_tokens].tolist()
        tokens = islice(self._llama.generate(held, temp=0.0, repeat_penalty=1.0), DECODE_TOKENS + 1)
        next(tokens)
        return first_ms, _rate(tokens)

    def prefill(self, ids: list[int]) -> float:
        """Tokens a second through an empty cache."""
        self._llama.reset()
        self._llama._ctx.kv_cache_clear()
        started = time.perf_counter()
        self._llama.eval(ids)
        self._llama._ctx.get_logits()  # waits for the computation, as reading our logits does
        return len(ids) / (time.perf_counter() - started)

    def close(self) -> None:
        """Free the model."""
        self._llama.close()


@contextmanager
def _guarded() -> Iterator[None]:
    """On AMX, load the peer as ours is: with repacked weights it would crash, and `Llama` has no setting for them."""
    stock: Any = require("llama_cpp.llama_cpp", "")
    defaults = stock.llama_model_default_params

    def without_repacking() -> Any:
        wanted = defaults()
        wanted.use_extra_bufts = wanted.use_extra_bufts and not has_amx()
        return wanted

    stock.llama_model_default_params = without_repacking
    try:
        yield
    finally:
        stock.llama_model_default_params = defaults


def convert_both(merged: Path, converter: Path, repeats: int) -> Pair | None:
    """Seconds to write the language model as F16 GGUF, start of the process included; None where the peer refuses."""
    found: dict[str, list[float]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.gguf"
        commands: dict[str, list[str]] = {
            "ours": [sys.executable, "-c", _WRITE_TEXT, str(merged), str(out)],
            "peer": [sys.executable, str(converter), str(merged), "--outtype", "f16", "--outfile", str(out)],
        }
        for _ in range(repeats):
            for name, command in commands.items():
                started = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    console.say(f"conversion, {name}: {done.stderr.strip().splitlines()[-1:]}")
                    return None
                found[name].append(time.perf_counter() - started)
                out.unlink()
    return _pair(found)


def _rate(tokens: Iterator[Any]) -> float:
    """Tokens a second of what is still to come."""
    started = time.perf_counter()
    count = sum(1 for _ in tokens)
    return count / (time.perf_counter() - started)


def _pair(found: dict[str, list[float]]) -> Pair:
    ours, peer = spread(found["ours"]), spread(found["peer"])
    return Pair(ours, peer, ours.median / peer.median)


def _picture(rng: np.random.Generator) -> bytes:
    """A PNG that nobody has seen: coarse noise, 448 pixels square."""
    coarse: NDArray[np.uint8] = rng.integers(256, size=(28, 28, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((448, 448), Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def _text_ids(front: Front, rng: np.random.Generator) -> list[int]:
    """Ordinary token ids, none of them a control token."""
    control = list(front.tokenizer.get_added_tokens_decoder())
    usable = np.setdiff1d(np.arange(front.tokenizer.get_vocab_size(with_added_tokens=False)), control)
    return [int(token) for token in rng.choice(usable, PREFILL_TOKENS)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison for a reader, and as one JSON line at the end."""
    parser = argparse.ArgumentParser(description="Time our runtime and converter beside the stock ones.")
    parser.add_argument("edge", type=Path, help="a gguf artefact")
    parser.add_argument("--merged", type=Path, help="the merged folder it was made from, for the conversion time")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args(arguments)
    try:
        found = compare(given.edge, given.merged, given.converter, given.threads, given.repeats)
    except LdrtError as error:
        print(error, file=sys.stderr)
        return 1
    for label, pair, target in (
        ("TTFT, ms", found.ttft_ms, "at most 1.05"),
        ("prefill, tokens/s", found.prefill_tok_per_s, "at least 0.98"),
        ("decode, tokens/s", found.decode_tok_per_s, "at least 0.98"),
        ("conversion, s", found.conversion_s, ""),
    ):
        if pair is None:
            print(f"{label:18} skipped: wants --merged and llama.cpp's convert_hf_to_gguf.py (--converter)")
            continue
        print(f"{label:18} {_show(pair.ours)}  peer {_show(pair.peer)}  ratio {pair.ratio:.3f}  {target}".rstrip())
    if found.ttft_pooled_ms:
        print(f"{'TTFT pooled, ms':18} {_show(found.ttft_pooled_ms)}")
    print(json.dumps(asdict(found)))
    return 0


def _show(one: Spread) -> str:
    return f"{one.median:9.2f} ({one.p10:.2f}–{one.p90:.2f})"


if __name__ == "__main__":
    sys.exit(main())
