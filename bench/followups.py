"""How soon the next question of a conversation gets its first token, by what lies between it and the last one.

    python -m ldrt_edge.bench.followups EDGE [--threads 1] [--repeats 7]

    first        of a conversation: picture and question are read then
    next         nothing lies between
    typed        it was read while it was typed, as the page has it read when the typing pauses
    after other  another conversation, about another picture, was asked in the meantime (`serve --cache`)
    restarted    the program was ended and started; what was said comes from its history, and is read then
    reopened     the same, but the page opened the conversation before the question, and it was read meanwhile

Pictures are noise, and what was said is given: an untrained model may have nothing to say. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from ldrt_edge import console
from ldrt_edge.bench.latency import Spread, spread
from ldrt_edge.chat.server import CACHE_BYTES
from ldrt_edge.chat.session import Exchange, Session, Shown
from ldrt_edge.front import Front
from ldrt_edge.image import Origin, Picture
from ldrt_edge.runtimes.base import Runtime, Sampling, Timings, load

_QUESTION, _NEXT = "Describe the plan.", "And what is the highest dose at the skin?"
_OTHER = "And how deep does half of the dose come?"
_ANSWER = (
    "Two opposing fields on the left knee. The total dose is three gray in six fractions of one half gray each, which "
    "is usual for benign diseases of joints."
)
_ONE = Sampling(max_tokens=1)


@dataclass(frozen=True)
class Followups:
    """ttft_ms: by what lies between; reading_ms: of a conversation that is opened, meanwhile."""

    ttft_ms: dict[str, Spread]
    reading_ms: Spread
    threads: int | None
    load_average: tuple[float, float]


def followups(edge: Path, threads: int | None = None, repeats: int = 7) -> Followups:
    """Measure a model artefact; each repeat loads it three times and takes two pictures of its own.

    Raises:
        LdrtError: the model does not load.
    """
    front, found = Front.load(edge), defaultdict[str, list[float]](list)
    before = psutil.getloadavg()[0]

    def start() -> Runtime:
        runtime = load(edge, threads=threads)
        runtime.remember(CACHE_BYTES)
        return runtime

    def ask(session: Session, question: str, kind: str) -> None:
        for _ in session.ask(question):
            pass
        found[kind].append(session.runtime.timings.ttft_ms)

    for number in console.track(range(repeats), "asking"):
        picture, other = (_noise(front.config.image_size, 2 * number + k) for k in range(2))
        runtime = start()
        new = Session(runtime, front, _ONE)
        new.attach(picture)
        ask(new, _QUESTION, "first")
        talk = _remembered(runtime, front, picture)
        talk.read()
        ask(talk, _NEXT, "next")
        talk = _remembered(runtime, front, picture)
        talk.read(_OTHER)
        ask(talk, _OTHER, "typed")
        _remembered(runtime, front, other).read()
        ask(talk, "Is it a joint?", "after other")
        runtime.close()
        for kind in ("restarted", "reopened"):
            runtime = start()
            talk = _remembered(runtime, front, picture)
            if kind == "reopened":
                began = time.perf_counter()
                talk.read()
                found["reading"].append((time.perf_counter() - began) * 1e3)
            ask(talk, _NEXT, kind)
            runtime.close()
    reading = spread(found.pop("reading"))
    told = {kind: spread(values) for kind, values in found.items()}
    return Followups(told, reading, threads, (before, psutil.getloadavg()[0]))


def _noise(size: int, seed: int) -> Picture:
    rgb = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Picture(rgb, Origin("PNG", None, None, 0, 1, "as stored", "0" * 64), None)


def _remembered(runtime: Runtime, front: Front, picture: Picture) -> Session:
    session = Session(runtime, front, _ONE)
    shown = Shown(front.image(picture.rgb), picture.origin)
    session.exchanges.append(Exchange(_QUESTION, (shown,), _ANSWER, "end", 0, _ONE, Timings()))
    return session


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("edge", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args(arguments)
    found = followups(given.edge, given.threads, given.repeats)
    first = found.ttft_ms["first"].median
    for kind, one in found.ttft_ms.items():
        print(f"{kind:12} {one.median:8.1f} ms ({one.p10:.1f} to {one.p90:.1f}), {one.median / first:.3f} of the first")
    print(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
