"""How fast a model answers on this machine, and how much memory it takes.

Measured in a process of its own (`python -m ldrt_edge.bench.latency`) that loads nothing but the subject, so that
neither the reference model's memory nor its threads count. Peak memory includes the mapped weights that were touched.

One run is one question about a picture that the runtime has never seen, with an empty key-value cache: image encoding,
prefill of the whole prompt, the time to the first token (TTFT, from the pixels in memory, so with the front end's
work), then a fixed number of further tokens, stop tokens or not. Runs after the warm-up count: median, 10th and 90th
percentile. Loading is timed on the same files once more, so with a warm file cache; and once with a cold one, where the
system lets its cache be emptied for a file, up to the first token.

Decoding one token reads the language model's weights once, so tokens a second cannot exceed the speed at which memory
can be read over these bytes: `roofline` is the share of it that is reached. It stands beside the timings, with the
threads and the load average, without which none of them says anything. The bandwidth is that of reading alone, as
decoding does, with as many threads (`ldrt_edge.machine`). Energy is what the processor's own counters tell, if they may
be read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
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
from ldrt_edge.bench.energy import Meter
from ldrt_edge.dataset import Dataset, Row, Split, Turn, group_by_image
from ldrt_edge.errors import DataError, LdrtError, RuntimeLoadError
from ldrt_edge.front import Front, conversation
from ldrt_edge.image import read_image
from ldrt_edge.machine import read_gb_per_s
from ldrt_edge.runtimes.base import Runtime, Sampling, load
from ldrt_edge.runtimes.processor import physical_cores
from ldrt_edge.tensor_file import StoredTensor, read_header

WARMUP_RUNS, DECODE_TOKENS, LOADS, SWEEP_RUNS = 1, 32, 3, 3
_STOCK = "How many beams are used?"
_WEIGHTS = (".gguf", ".safetensors")
_SEES = re.compile(r"(^|\.)(vision_tower|multi_modal_projector|image_newline)(\.|$)")

Question = tuple[NDArray[np.uint8], Sequence[Turn]]
"""A picture, (height, width, 3), and what is asked about it."""


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of `runs` measurements."""

    median: float
    p10: float
    p90: float
    runs: int


@dataclass(frozen=True)
class AtThreads:
    """Medians at one number of threads, and the load average (1 minute) before them."""

    threads: int
    image_encode_ms: float
    prefill_tok_per_s: float
    ttft_ms: float
    decode_tok_per_s: float
    load_average: float


@dataclass(frozen=True)
class Latency:
    """Timings of one model on one machine; token counts are of the median run.

    threads: of llama.cpp and torch; MLX has no such setting, there it is what the bandwidth was measured with.
    end_to_end_ms: a question with its answer of `decode_tokens` tokens. cold_start_ms: from files that are not in
        memory to the first token, once. joules_per_question: of the whole package; None where the system does not tell.
    bandwidth_gb_per_s, roofline: memory's speed for reading, and decoding as a share of what it allows.
    by_threads: the same question at other numbers of threads, where it was asked for.
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
    end_to_end_ms: Spread | None = None
    cold_start_ms: float | None = None
    roofline: float | None = None
    joules_per_question: float | None = None
    by_threads: tuple[AtThreads, ...] = ()


@dataclass(frozen=True)
class _Run:
    image_encode_ms: float
    prefill_tok_per_s: float
    ttft_ms: float
    decode_tok_per_s: float
    end_to_end_ms: float
    prompt_tokens: int
    image_tokens: int


def measure(
    folder: Path, data: Path | None, split: Split = "test", runs: int = 5, threads: int | None = None, seed: int = 0,
    sweep: Sequence[int] = (),
) -> Latency:
    """Time the model in `folder` on questions of the dataset in `data`, in a process of its own.

    data: None takes noise for pictures, with a stock question. sweep: further numbers of threads to try.

    Raises:
        RuntimeLoadError: that process failed, with its reason.
    """
    command = [
        sys.executable, "-m", "ldrt_edge.bench.latency", str(folder), *([str(data)] if data else []), "--split", split,
        "--runs", str(runs), "--threads", str(threads or physical_cores()), "--seed", str(seed),
        "--sweep", ",".join(map(str, sweep)),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    last = done.stdout.splitlines()[-1:]
    if done.returncode and last:
        raise RuntimeLoadError(f"timing {folder}: {last[0]}")
    if done.returncode:
        raise RuntimeLoadError(f"timing {folder}: the process ended with status {done.returncode}")
    return _parse(last[0])


def further_threads(threads: int, cores: int) -> tuple[int, ...]:
    """Numbers of threads that are worth trying beside: all cores, half of them and a quarter, the most first."""
    return tuple(count for count in (cores, cores // 2, cores // 4) if count not in (0, threads))


def time_model(
    folder: Path, questions: Iterator[Question], runs: int, threads: int, sweep: Sequence[int] = ()
) -> Latency:
    """The same within this process: the first load serves all runs, the further ones are timed."""
    artifact.verify(folder, quick=True)
    load_average, front = psutil.getloadavg(), Front.load(folder)
    with console.bar("timing", 2 + WARMUP_RUNS + runs + LOADS + len(sweep)) as shown:
        cold_start_ms = _cold_start(folder, front, next(questions), threads)
        shown.advance()
        runtime = load(folder, threads=threads)
        _run(runtime, front, *next(questions))
        measured, meter = [], Meter()
        for _ in range(runs):
            measured.append(_run(runtime, front, *next(questions)))
            shown.advance()
        joules = meter.joules()
        peak, name = peak_rss_bytes(), runtime.name
        runtime.close()
        loads = []
        for _ in range(LOADS):
            runtime = load(folder, threads=threads)
            loads.append(runtime.load_ms)
            runtime.close()
            shown.advance()
        by_threads = []
        for count in sweep:
            by_threads.append(_at_threads(folder, front, questions, count))
            shown.advance()
    columns = list(zip(*map(astuple, measured), strict=True))
    encode, prefill, first, decode, whole = map(spread, columns[:5])
    read = read_gb_per_s(threads)
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
        bandwidth_gb_per_s=read,
        model_bytes=sum(weights(folder).values()),
        prompt_tokens=int(np.median(columns[5])),
        image_tokens=int(np.median(columns[6])),
        decode_tokens=DECODE_TOKENS,
        end_to_end_ms=whole,
        cold_start_ms=cold_start_ms,
        roofline=decode.median * _read_a_token(folder) / read / 1e9,
        joules_per_question=None if joules is None else joules / runs,
        by_threads=tuple(by_threads),
    )


def table(found: Latency) -> str:
    """For a terminal: a line a figure."""
    rows = [
        ("cold start to the first token", found.cold_start_ms and f"{found.cold_start_ms / 1e3:.1f} s"),
        ("loading, warm", f"{found.load_ms.median / 1e3:.2f} s"),
        ("image encoding", f"{found.image_encode_ms.median / 1e3:.2f} s for {found.image_tokens} tokens"),
        ("prefill", f"{found.prefill_tok_per_s.median:.1f} tokens/s over {found.prompt_tokens} tokens"),
        ("time to the first token", f"{found.ttft_ms.median / 1e3:.2f} s"),
        ("decoding", f"{found.decode_tok_per_s.median:.1f} tokens/s"),
        (f"a question with {found.decode_tokens} tokens of answer", found.end_to_end_ms
         and f"{found.end_to_end_ms.median / 1e3:.1f} s"),
        ("of what memory allows", found.roofline and f"{found.roofline:.0%} of {found.bandwidth_gb_per_s:.1f} GB/s"),
        ("peak memory", f"{found.peak_rss_bytes / 1e9:.2f} GB; weights {found.model_bytes / 1e9:.2f} GB"),
        ("energy", f"{found.joules_per_question:.0f} J a question" if found.joules_per_question is not None
         else "not told by this system"),
    ]  # fmt: skip
    lines = [f"{found.runtime}, {found.threads} threads, load average {found.load_average[0]:.2f}"]
    lines += [f"{name:36} {value}" for name, value in rows if value]
    lines += [
        f"{at.threads:3} threads: first token {at.ttft_ms / 1e3:.2f} s, prefill {at.prefill_tok_per_s:.1f}, decoding "
        f"{at.decode_tok_per_s:.1f} tokens/s (load average {at.load_average:.2f})"
        for at in found.by_threads
    ]
    return "\n".join(lines)


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


def _run(runtime: Runtime, front: Front, rgb: NDArray[np.uint8], turns: Sequence[Turn]) -> _Run:
    runtime.forget()
    started = time.perf_counter()
    prompt = front.prompt(conversation(turns, front.image(rgb)))
    tokens = runtime.generate(replace(prompt, stop_ids=()), Sampling(max_tokens=DECODE_TOKENS))
    next(tokens)
    first_ms = (time.perf_counter() - started) * 1e3
    list(tokens)
    whole_ms = (time.perf_counter() - started) * 1e3
    timings = runtime.timings
    return _Run(
        image_encode_ms=timings.image_encode_ms,
        prefill_tok_per_s=timings.prefill_tokens / timings.prefill_ms * 1e3,
        ttft_ms=first_ms,
        decode_tok_per_s=timings.decode_tokens / timings.decode_ms * 1e3,
        end_to_end_ms=whole_ms,
        prompt_tokens=len(prompt.ids),
        image_tokens=sum(image.token_count for image in prompt.images),
    )


def _read_a_token(folder: Path) -> int:
    """Bytes that decoding a token reads: the language model's, without vision tower and projector."""
    return sum(
        sum(_bytes(tensor) for name, tensor in read_header(folder / path).items() if not _SEES.search(name))
        if path.endswith(".safetensors")
        else count
        for path, count in weights(folder).items()
        if "mmproj" not in path
    )


def _bytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * int(tensor.dtype.lstrip("BFIU").partition("_")[0]) // 8


def _cold_start(folder: Path, front: Front, question: Question, threads: int) -> float | None:
    """From the disk to the first token; None where the system cannot be told to drop a file from its cache."""
    if not hasattr(os, "posix_fadvise"):
        return None
    for name in weights(folder):
        with (folder / name).open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    runtime = load(folder, threads=threads)
    loaded_ms = (time.perf_counter() - started) * 1e3
    first = _run(runtime, front, *question)
    runtime.close()
    return loaded_ms + first.ttft_ms


def _at_threads(folder: Path, front: Front, questions: Iterator[Question], threads: int) -> AtThreads:
    before = psutil.getloadavg()[0]
    runtime = load(folder, threads=threads)
    measured = [_run(runtime, front, *next(questions)) for _ in range(WARMUP_RUNS + SWEEP_RUNS)][WARMUP_RUNS:]
    runtime.close()
    columns = zip(*map(astuple, measured), strict=True)
    encode, prefill, first, decode, *_ = (float(np.median(column)) for column in columns)
    return AtThreads(threads, encode, prefill, first, decode, before)


def noise_questions(seed: int) -> Iterator[Question]:
    """A stock question about pictures of noise, each large enough for all tiles of a model that tiles."""
    rng = np.random.default_rng(seed)
    while True:
        yield rng.integers(256, size=(672, 672, 3), dtype=np.uint8), (Turn("user", _STOCK),)


def _fresh_questions(dataset: Dataset, rows: Sequence[Row], seed: int) -> Iterator[Question]:
    """Questions about pictures that no cache holds: the dataset's, with random noise in the lowest bit."""
    rng = np.random.default_rng(seed)
    pictures = list(group_by_image(rows).values())
    order = rng.permutation(len(pictures))
    for place in cycle(order):
        row = pictures[place][0]
        rgb = read_image(dataset.image_path(row)).rgb
        yield rgb ^ rng.integers(2, size=rgb.shape, dtype=np.uint8), row.turns[:-1]


def _parse(line: str) -> Latency:
    fields = json.loads(line)
    spreads = {key: Spread(**value) for key, value in fields.items() if isinstance(value, dict)}
    swept = tuple(AtThreads(**value) for value in fields["by_threads"])
    return Latency(**(fields | spreads | {"load_average": tuple(fields["load_average"]), "by_threads": swept}))


def main() -> int:
    """Print the timings as one JSON line; an error of the user's as one line and status 1."""
    parser = argparse.ArgumentParser(description="Time one model artefact on questions of a dataset.")
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sweep", default="")
    given = parser.parse_args()
    try:
        questions = noise_questions(given.seed)
        if given.data is not None:
            dataset = Dataset(given.data)
            rows = dataset.rows(given.split)
            if not rows:
                raise DataError(f"{given.data}: no rows in split {given.split!r}")
            questions = _fresh_questions(dataset, rows, given.seed)
        sweep = [int(count) for count in given.sweep.split(",") if count]
        print(json.dumps(asdict(time_model(given.model, questions, given.runs, given.threads, sweep))))
    except LdrtError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
