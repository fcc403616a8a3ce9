"""How fast a model answers on this machine, and how much memory it takes.

Measured in a process of its own (`python -m ldrt_edge.bench.latency`) that loads nothing but the subject, so that
neither the reference model's memory nor its threads count. Peak memory includes the mapped weights that were touched.

One run is one question about a picture that the runtime has never seen, with an empty key-value cache: image encoding,
prefill of the whole prompt, the time to the first token (TTFT, from the pixels in memory, so with the front end's
work), then a fixed number of further tokens, stop tokens or not. Runs after the warm-up count: median, 10th and 90th
percentile. Loading is timed on the same files once more, so with a warm file cache.

Decoding one token reads the language model's weights once, so tokens a second cannot exceed memory bandwidth over
model bytes; both stand beside the timings, with the threads and the load average, without which none of them says
anything. The bandwidth is that of reading alone, as decoding does, with as many threads (`ldrt_edge.machine`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from itertools import cycle
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from ldrt_edge import artifact, console
from ldrt_edge.dataset import Dataset, Row, Split, group_by_image
from ldrt_edge.errors import DataError, LdrtError, RuntimeLoadError
from ldrt_edge.front import Front, conversation
from ldrt_edge.image import read_image
from ldrt_edge.machine import read_gb_per_s
from ldrt_edge.runtimes.base import Runtime, Sampling, load
from ldrt_edge.runtimes.processor import physical_cores

WARMUP_RUNS, DECODE_TOKENS, LOADS = 1, 32, 3
_WEIGHTS = (".gguf", ".safetensors")


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of `runs` measurements."""

    median: float
    p10: float
    p90: float
    runs: int


@dataclass(frozen=True)
class Latency:
    """Timings of one model on one machine; token counts are of the median run.

    threads: of llama.cpp and torch; MLX has no such setting, there it is what the bandwidth was measured with.
    """

    image_encode_ms: Spread
    prefill_tok_per_s: Spread
    ttft_ms: Spread
    decode_tok_per_s: Spread
    load_ms: Spread
    peak_rss_bytes: int
    runtime: str
    threads: int
    load_average: tuple[float, float, float]
    bandwidth_gb_per_s: float
    model_bytes: int
    prompt_tokens: int
    image_tokens: int
    decode_tokens: int


@dataclass(frozen=True)
class _Run:
    image_encode_ms: float
    prefill_tok_per_s: float
    ttft_ms: float
    decode_tok_per_s: float
    prompt_tokens: int
    image_tokens: int


def measure(
    folder: Path, data: Path, split: Split = "test", runs: int = 5, threads: int | None = None, seed: int = 0
) -> Latency:
    """Time the model in `folder` on questions of the dataset in `data`, in a process of its own.

    Raises:
        RuntimeLoadError: that process failed, with its reason.
    """
    command = [
        sys.executable, "-m", "ldrt_edge.bench.latency", str(folder), str(data), "--split", split,
        "--runs", str(runs), "--threads", str(threads or physical_cores()), "--seed", str(seed),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    last = done.stdout.splitlines()[-1:]
    if done.returncode and last:
        raise RuntimeLoadError(f"timing {folder}: {last[0]}")
    if done.returncode:
        raise RuntimeLoadError(f"timing {folder}: the process ended with status {done.returncode}")
    return _parse(last[0])


def time_model(folder: Path, rows: Sequence[Row], dataset: Dataset, runs: int, threads: int, seed: int) -> Latency:
    """The same within this process: the first load serves all runs, the further ones are timed."""
    load_average = psutil.getloadavg()
    runtime, front = load(folder, threads=threads), Front.load(folder)
    prompts = _fresh_questions(front, dataset, rows, seed)
    with console.bar("timing", WARMUP_RUNS + runs + LOADS) as shown:
        measured = []
        for _ in range(WARMUP_RUNS + runs):
            measured.append(_run(runtime, front, *next(prompts)))
            shown.advance()
        peak, name = peak_rss_bytes(), runtime.name
        runtime.close()
        loads = []
        for _ in range(LOADS):
            runtime = load(folder, threads=threads)
            loads.append(runtime.load_ms)
            runtime.close()
            shown.advance()
    columns = list(zip(*map(astuple, measured[WARMUP_RUNS:]), strict=True))
    encode, prefill, first, decode = map(spread, columns[:4])
    return Latency(
        image_encode_ms=encode,
        prefill_tok_per_s=prefill,
        ttft_ms=first,
        decode_tok_per_s=decode,
        load_ms=spread(loads),
        peak_rss_bytes=peak,
        runtime=name,
        threads=threads,
        load_average=load_average,
        bandwidth_gb_per_s=read_gb_per_s(threads),
        model_bytes=sum(weights(folder).values()),
        prompt_tokens=int(np.median(columns[4])),
        image_tokens=int(np.median(columns[5])),
        decode_tokens=DECODE_TOKENS,
    )


def spread(values: Sequence[float]) -> Spread:
    """Median, 10th and 90th percentile."""
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return Spread(float(middle), float(low), float(high), len(values))


def weights(folder: Path) -> dict[str, int]:
    """Weight files of an artefact and their bytes, by its manifest."""
    return {entry.path: entry.bytes for entry in artifact.read(folder).files if entry.path.endswith(_WEIGHTS)}


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far.

    Linux hands `ru_maxrss` of the parent down through exec, so there the kernel's own high-water mark is read.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS


def _run(runtime: Runtime, front: Front, rgb: NDArray[np.uint8], row: Row) -> _Run:
    prompt = front.prompt(conversation(row.turns[:-1], front.image(rgb)))
    runtime.forget()
    started = time.perf_counter()
    prompt = front.prompt(conversation(row.turns[:-1], front.image(rgb)))
    tokens = runtime.generate(replace(prompt, stop_ids=()), Sampling(max_tokens=DECODE_TOKENS))
    next(tokens)
    first_ms = (time.perf_counter() - started) * 1e3
    list(tokens)
    timings = runtime.timings
    return _Run(
        image_encode_ms=timings.image_encode_ms,
        prefill_tok_per_s=timings.prefill_tokens / timings.prefill_ms * 1e3,
        ttft_ms=first_ms,
        decode_tok_per_s=timings.decode_tokens / timings.decode_ms * 1e3,
        prompt_tokens=len(prompt.ids),
        image_tokens=sum(image.token_count for image in prompt.images),
    )


def _fresh_questions(
    front: Front, dataset: Dataset, rows: Sequence[Row], seed: int
) -> Iterator[tuple[NDArray[np.uint8], Row]]:
    """Questions about pictures that no cache holds: the dataset's, with random noise in the lowest bit."""
    rng = np.random.default_rng(seed)
    pictures = list(group_by_image(rows).values())
    order = rng.permutation(len(pictures))
    for place in cycle(order):
        row = pictures[place][0]
        rgb = read_image(dataset.image_path(row)).rgb
        yield rgb ^ rng.integers(2, size=rgb.shape, dtype=np.uint8), row


def _parse(line: str) -> Latency:
    fields = json.loads(line)
    spreads = {key: Spread(**value) for key, value in fields.items() if isinstance(value, dict)}
    return Latency(**(fields | spreads | {"load_average": tuple(fields["load_average"])}))


def main() -> int:
    """Print the timings as one JSON line; an error of the user's as one line and status 1."""
    parser = argparse.ArgumentParser(description="Time one model artefact on questions of a dataset.")
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        dataset = Dataset(given.data)
        rows = dataset.rows(given.split)
        if not rows:
            raise DataError(f"{given.data}: no rows in split {given.split!r}")
        print(json.dumps(asdict(time_model(given.model, rows, dataset, given.runs, given.threads, given.seed))))
    except LdrtError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
