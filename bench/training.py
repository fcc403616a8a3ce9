"""How fast and how lean training is, beside the stock ways to do the same.

    python -m ldrt_edge.bench.training --data DATASET --out OUT [--questions 6] [--rounds 3] [--peers a,b] [--ladder]

The peers are transformers' Trainer with peft, as it comes (float32) and with its own `bf16=True`, and TRL's SFTTrainer
as it comes. All train the same adapter on the same base: LoRA on the language model's linears and the projector, the
same questions in the same optimizer steps, about the same number of tokens in a forward, AdamW with one learning rate.
So the losses of a step can be held against each other, not only the time it took.

Each run is a process of its own, which shows its peak memory; rounds turn about, so that load from elsewhere falls on
all. Samples a second (a sample is a question with its answer) are counted from the first optimizer step's end to the
last's: the first one warms up. They are counted twice: by the clock, and by the time that the process computed, which
on one thread is the same on a quiet machine and nearly so on a busy one; ratios are of the latter. What the vision
tower took beforehand, which is in ours only, is told apart (`features_s`): it is paid once and not in every epoch.

`--ladder` also runs ours with no switch on, with each alone, and with each left out. A run that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil

from ldrt_edge import artifact, console
from ldrt_edge.bench.steps import Journal, apart
from ldrt_edge.bench.training_peers import PEERS, Curve, Task, run_ours, run_peer
from ldrt_edge.dataset import Dataset, DatasetWriter, group_by_image
from ldrt_edge.errors import ConfigError, DataError, LdrtError

OURS = "ours"
SWITCHES: Mapping[str, tuple[str, str]] = {
    "cached features": ("cache_features=true", "cache_features=false"),
    "shared prefix": ("questions_per_row={questions}", "questions_per_row=1"),
    "answer-only logits": ("answer_only_logits=true", "answer_only_logits=false"),
    "bf16": ("precision=auto", "precision=fp32"),
    "fused LoRA": ("fused_lora=true", "fused_lora=false"),
}
"""Each switch of ours: the setting that turns it on, and off."""
SAMPLES_PER_STEP, FORWARD_SAMPLES = 12, 3
"""3 questions with a picture each are 870 tokens of the starter, 2 pictures with 6 questions each are 800."""
_PACKAGES = ("torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Side:
    """One side over all rounds: medians, and the losses of its last round.

    samples_per_s: by the clock; samples_per_processor_s: by the time that its process computed.
    losses: of every optimizer step. peak_bytes: of resident memory, with Python and its libraries.
    """

    name: str
    samples_per_s: float
    samples_per_processor_s: float
    slowest: float
    fastest: float
    peak_bytes: int
    features_s: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Found:
    """What one run of the benchmark found, on one machine."""

    questions_per_image: int
    samples_per_step: int
    steps: int
    rounds: int
    threads: int
    load_average: tuple[float, ...]
    sides: tuple[Side, ...]


def compare(
    data: Path, out: Path, base: str = "starter", questions: int = 6, rounds: int = 3, steps: int = 3,
    peers: Sequence[str] = PEERS, ladder: bool = False, threads: int = 1,
) -> Found:
    """Train all sides in turn; writes `training.json` into `out`.

    Raises:
        ConfigError: an unknown peer, or `questions` that do not divide a step.
        DataError: the dataset has too few pictures with that many questions.
    """
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise ConfigError(f"--peers {unknown[0]}: choose from {', '.join(PEERS)}")
    if SAMPLES_PER_STEP % questions:
        raise ConfigError(f"--questions {questions}: wants a divisor of {SAMPLES_PER_STEP}, the questions of a step")
    out.mkdir(parents=True, exist_ok=True)
    subset = _subset(data, out / f"questions-{questions}", questions, steps)
    task = Task(base, subset, out / "work", _settings(questions, {}), threads, FORWARD_SAMPLES)
    runs: dict[str, Task] = {OURS: task, **{name: task for name in peers}}
    if ladder:
        runs |= {name: _with(task, settings) for name, settings in _ladder(questions).items()}
    journal, identity = Journal(out / "journal.jsonl"), artifact.identity(subset).manifest_sha256
    curves: dict[str, list[tuple[Curve, int]]] = {name: [] for name in runs}
    load_average = psutil.getloadavg()
    for turn in range(rounds):
        for name in sorted(runs, reverse=turn % 2 == 1) if not ladder else runs:
            key = {"name": name, "turn": turn, "data": identity, "settings": runs[name].settings, "threads": threads}
            gave = journal.once(key, lambda name=name: _measured(name, runs[name]))  # type: ignore[misc]
            curve = Curve(**{**gave["curve"], "losses": tuple(gave["curve"]["losses"])})
            curves[name].append((curve, gave["peak_bytes"]))
            said = f"{curve.samples_per_s:.2f} samples/s, {curve.samples_per_processor_s:.2f} a processor second"
            console.say(f"round {turn + 1}, {name}: {said}, {gave['peak_bytes'] / 1e9:.2f} GB")
    sides = tuple(_side(name, found) for name, found in curves.items())
    found = Found(questions, SAMPLES_PER_STEP, steps, rounds, threads, load_average, sides)
    (out / f"training-{questions}{'-ladder' if ladder else ''}.json").write_text(json.dumps(asdict(found), indent=1))
    return found


def table(found: Found) -> list[str]:
    """The sides as lines of a Markdown table, the plain path first."""
    sides = {side.name: side for side in found.sides}
    plain = sides.get("trainer", sides.get("no switch", found.sides[0]))
    lines = [
        f"| {found.questions_per_image} questions a picture | samples/s | a processor second | ratio | peak GB | ratio "
        "| last loss | largest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side in sorted(found.sides, key=lambda side: side.samples_per_processor_s):
        apart_by = max(abs(a - b) for a, b in zip(side.losses, plain.losses, strict=True))
        lines.append(
            f"| {side.name} | {side.samples_per_s:.2f} | "
            f"{side.samples_per_processor_s:.2f} ({side.slowest:.2f}–{side.fastest:.2f}) | "
            f"{side.samples_per_processor_s / plain.samples_per_processor_s:.2f} | {side.peak_bytes / 1e9:.2f} | "
            f"{side.peak_bytes / plain.peak_bytes:.2f} | {side.losses[-1]:.4f} | {apart_by:.4f} |"
        )
    return lines


def _measured(name: str, task: Task) -> dict[str, object]:
    (curve, cost) = (
        apart(_PACKAGES, run_peer, name, task) if name in PEERS else apart(_PACKAGES, run_ours, task)
    )
    return {"curve": asdict(curve), "peak_bytes": cost.peak_bytes, "load_average": psutil.getloadavg()[0]}


def _side(name: str, found: Sequence[tuple[Curve, int]]) -> Side:
    rates = [curve.samples_per_processor_s for curve, _ in found]
    by_clock = median(curve.samples_per_s for curve, _ in found)
    peak = round(median(peak for _, peak in found))
    last = found[-1][0]
    features_s = round(median(curve.features_s for curve, _ in found), 2)
    return Side(name, by_clock, median(rates), min(rates), max(rates), peak, features_s, last.losses)


def _settings(questions: int, off: Mapping[str, bool]) -> tuple[str, ...]:
    """A recipe's overrides with all switches on but those named."""
    packed = not off.get("shared prefix", False)
    rows = SAMPLES_PER_STEP // questions if packed else SAMPLES_PER_STEP
    forward = min(rows, FORWARD_SAMPLES)
    switches = (pair[off.get(name, False)].format(questions=questions) for name, pair in SWITCHES.items())
    return (
        *switches, f"rows_per_step={forward}", f"accumulate={rows // forward}", "standardise_features=false",
        "vision_tokens=null", "validation_images=0", "log_steps=1", "group_by_length=false", "warmup=0",
        "instruct.learning_rate=1e-5", "instruct.projector_learning_rate=1e-5", "lora.dropout=0", "spike_factor=null",
        "save_steps=100000",
    )  # fmt: skip


def _ladder(questions: int) -> dict[str, tuple[str, ...]]:
    names = [name for name in SWITCHES if questions > 1 or name != "shared prefix"]
    all_off = {name: True for name in names}
    return {
        "no switch": _settings(questions, all_off),
        **{f"only {name}": _settings(questions, {**all_off, name: False}) for name in names},
        **{f"without {name}": _settings(questions, {name: True}) for name in names},
    }


def _with(task: Task, settings: tuple[str, ...]) -> Task:
    return Task(task.base, task.data, task.work, settings, task.threads, task.forward_samples)


def _subset(data: Path, out: Path, questions: int, steps: int) -> Path:
    """A dataset of just what the steps need: pictures with that many single questions each."""
    dataset = Dataset(data)
    pictures = steps * SAMPLES_PER_STEP // questions
    singles = [row for row in dataset.rows("train") if len(row.turns) == 2]
    chosen = [rows[:questions] for rows in group_by_image(singles).values() if len(rows) >= questions][:pictures]
    if len(chosen) < pictures:
        raise DataError(f"{data}: {len(chosen)} pictures have {questions} questions and more, {pictures} are wanted")
    config = {"questions": questions, "pictures": pictures}
    with artifact.create(out, "dataset", config, [data]) as draft:
        if not draft.complete:
            with DatasetWriter(draft.path) as writer:
                for rows in chosen:
                    path = dataset.image_path(rows[0])
                    writer.add_image(path.read_bytes(), path.suffix)
                    for row in rows:
                        writer.add(row)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m ldrt_edge.bench.training", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="starter")
    parser.add_argument("--questions", type=int, default=6, help="a picture's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of 12 questions, the first not counted")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--ladder", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    if min(given.questions, given.rounds, given.threads) < 1 or given.steps < 2:
        parser.error("--questions, --rounds and --threads want at least 1, --steps at least 2")
    peers = [name for name in given.peers.split(",") if name]
    try:
        found = compare(
            given.data, given.out, given.base, given.questions, given.rounds, given.steps, peers, given.ladder,
            given.threads,
        )
    except LdrtError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
