"""How fast and how lean training is, beside the stock ways to do the same.

    python -m ldrt_edge.bench.training --data DATASET --out OUT [--questions 6] [--rounds 3] [--peers a,b] [--ladder]
        [--also compile=true]…
    python -m ldrt_edge.bench.training --data DATASET --out OUT --arch llava-1.5-7b --step 48   # on a GPU

The peers are transformers' Trainer with peft, as it comes (float32) and with its own `bf16=True`, and TRL's SFTTrainer
as it comes. All train the same adapter on the same base: LoRA on the language model's linears and the projector, the
same questions in the same optimizer steps, about the same number of tokens in a forward, AdamW with one learning rate.
So the losses of a step can be held against each other, not only the time it took.

Each run is a process of its own, which shows its peak memory; rounds turn about, so that load from elsewhere falls on
all. Samples a second (a sample is a question with its answer) are counted from the first optimizer step's end to the
last's: the first one warms up. They are counted twice: by the clock, and by the time that the process computed, which
on one thread is the same on a quiet machine and nearly so on a busy one; ratios are of the latter. What the vision
tower took beforehand, which is in ours only, is told apart (`features_s`): it is paid once and not in every epoch.

On a GPU the peers load the base in its own bf16, the clock decides and memory is the GPU's. `--arch` draws a base of
real shape with random weights: speed and memory do not ask what weights are worth. MFU is told there (`bench.mfu`).

`--ladder` also runs ours with no switch on, with each alone, and with each left out; `--also` with a setting of the
recipe that is no switch there and leaves each step its questions: compilation, or another optimizer or rank, with which
losses go another way. A run that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from ldrt_edge import artifact, console
from ldrt_edge.bench.at_size import make_base
from ldrt_edge.bench.mfu import Ceiling, decoder_weights, measure_ceiling
from ldrt_edge.bench.shapes import SHAPES
from ldrt_edge.bench.steps import Journal, apart, made
from ldrt_edge.bench.training_peers import PEERS, Curve, Task, run_ours, run_peer
from ldrt_edge.dataset import Dataset, DatasetWriter, group_by_image
from ldrt_edge.errors import ConfigError, DataError, LdrtError
from ldrt_edge.train.base import resolve_base
from ldrt_edge.train.recipe import load_recipe

OURS = "ours"
SWITCHES: Mapping[str, tuple[str, str]] = {
    "cached features": ("cache_features=true", "cache_features=false"),
    "shared prefix": ("questions_per_row={questions}", "questions_per_row=1"),
    "answer-only logits": ("answer_only_logits=true", "answer_only_logits=false"),
    "bf16": ("precision=auto", "precision=fp32"),
    "fused LoRA": ("fused_lora=true", "fused_lora=false"),
}
"""Each switch of ours: the setting that turns it on, and off."""
CUDA_SWITCHES: Mapping[str, tuple[str, str]] = {"Liger": ("kernels=liger", "kernels=torch")}
SAMPLES_PER_STEP, FORWARD_SAMPLES = 12, 3
"""3 questions with a picture each are 870 tokens of the starter, 2 pictures with 6 questions each are 800."""
_OF_STEPS = ("seed", "max_steps", "max_tokens", "devices", "early_stop", "instruct.epochs", "align.epochs")
"""Settings that decide how many steps there are and which questions each has, beside those that `_settings` makes."""
_VOCABULARY = 1000
_PACKAGES = ("torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Side:
    """One side over all rounds: medians, and the losses of its last round.

    samples_per_s: by the clock; samples_per_processor_s: by the time that its process computed.
    rate: that of the two which decides; slowest, fastest: of its rounds.
    losses: of every optimizer step. same_steps: whether these are of the same questions as the peers'; ours without a
        shared prefix shuffles single questions.
    peak_bytes: reserved on the GPU, or else of resident memory, with Python.
    tokens: of one pass over all questions. mfu: see the module's text; None on a CPU.
    """

    name: str
    samples_per_s: float
    samples_per_processor_s: float
    rate: float
    slowest: float
    fastest: float
    peak_bytes: int
    features_s: float
    losses: tuple[float, ...]
    tokens: int
    same_steps: bool = True
    mfu: float | None = None


@dataclass(frozen=True)
class Found:
    """What one run of the benchmark found, on one machine."""

    device: str
    ceiling: Ceiling | None
    questions_per_image: int
    samples_per_step: int
    steps: int
    rounds: int
    threads: int
    load_average: tuple[float, ...]
    sides: tuple[Side, ...]


@dataclass(frozen=True)
class Size:
    """What a run trains: questions in an optimizer step, in a peer's forward, and rows at most in one of ours."""

    step: int = SAMPLES_PER_STEP
    forward: int = FORWARD_SAMPLES
    rows: int = FORWARD_SAMPLES


def compare(
    data: Path, out: Path, base: str = "starter", recipe: str = "starter", questions: int = 6, rounds: int = 3,
    steps: int = 3, peers: Sequence[str] = PEERS, ladder: bool = False, threads: int = 1, size: Size | None = None,
    also: Sequence[str] = (),
) -> Found:
    """Train all sides in turn; writes `training-QUESTIONS.json` into `out`.

    also: settings of the recipe, each of which makes one more side of ours.

    Raises:
        ConfigError: an unknown peer, `questions` that do not divide a step, or a setting in `also` that is none, that
            changes nothing, or that all sides have alike.
        DataError: the dataset has too few pictures with that many questions.
    """
    size = size or Size()
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise ConfigError(f"--peers {unknown[0]}: choose from {', '.join(PEERS)}")
    if size.step % questions or size.step % size.forward:
        raise ConfigError(f"--step {size.step}: no multiple of --questions {questions} and --forward {size.forward}")
    subset = _subset(data, made(out) / f"questions-{questions}-{steps * size.step}", questions, steps, size.step)
    switches = _switches()
    off: dict[str, dict[str, bool]] = {name: {} for name in (OURS, *peers)}
    off |= _ladder(questions, switches) if ladder else {}
    settings = {name: _settings(questions, o, size, switches) for name, o in off.items()}
    settings |= {f"{OURS}, {one}": _with(recipe, settings[OURS], one) for one in also}
    runs = {
        name: Task(base, subset, out / "work", recipe, given, threads, size.forward)
        for name, given in settings.items()
    }
    journal, identity = Journal(out / "journal.jsonl"), artifact.identity(subset).manifest_sha256
    curves: dict[str, list[tuple[Curve, int]]] = {name: [] for name in runs}
    load_average, ceiling = psutil.getloadavg(), measure_ceiling()
    device = "CPU" if ceiling is None else ceiling.device
    for turn in range(rounds):
        for name in sorted(runs, reverse=turn % 2 == 1) if not ladder else runs:
            key = {
                "name": name, "turn": turn, "data": identity, "settings": runs[name].settings, "threads": threads,
                "base": base, "recipe": recipe, "forward": size.forward, "device": device,
            }  # fmt: skip
            gave = journal.once(key, lambda name=name: _measured(name, runs[name]))  # type: ignore[misc]
            curve = Curve(**{**gave["curve"], "losses": tuple(gave["curve"]["losses"])})
            peak = curve.gpu_peak_bytes or gave["peak_bytes"]
            curves[name].append((curve, peak))
            said = f"{curve.samples_per_s:.2f} samples/s, {curve.samples_per_processor_s:.2f} a processor second"
            console.say(f"round {turn + 1}, {name}: {said}, {peak / 1e9:.2f} GB")
    weights = decoder_weights(resolve_base(base).folder)
    sides = tuple(
        _side(name, found, size.step * steps, weights, ceiling, not off.get(name, {}).get("shared prefix", False))
        for name, found in curves.items()
    )
    found = Found(device, ceiling, questions, size.step, steps, rounds, threads, load_average, sides)
    name = f"training-{questions}{'-ladder' if ladder else ''}.json"
    artifact.replace_text(out / name, json.dumps(asdict(found), indent=1) + "\n")
    return found


def table(found: Found) -> list[str]:
    """The sides as lines of a Markdown table, the plain path first."""
    sides = {side.name: side for side in found.sides}
    plain = sides.get("trainer", sides.get("no switch", found.sides[0]))
    compared = next((side for side in (plain, *found.sides) if side.same_steps), plain)
    unit = "a processor second" if found.ceiling is None else "a second"
    lines = [
        f"| {found.questions_per_image} questions a picture, {found.device} | samples {unit} | ratio | peak GB | ratio "
        "| tokens a sample | MFU | last loss | largest difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for side in sorted(found.sides, key=lambda side: side.rate):
        apart_by = max(abs(a - b) for a, b in zip(side.losses, compared.losses, strict=True))
        lines.append(
            f"| {side.name} | {side.rate:.2f} ({side.slowest:.2f}–{side.fastest:.2f}) | {side.rate / plain.rate:.2f} | "
            f"{side.peak_bytes / 1e9:.2f} | {side.peak_bytes / plain.peak_bytes:.2f} | "
            f"{side.tokens / (found.samples_per_step * found.steps):.0f} | "
            f"{'' if side.mfu is None else format(side.mfu, '.0%')} | {side.losses[-1]:.4f} | "
            f"{format(apart_by, '.4f') if side.same_steps else 'other questions'} |"
        )
    return lines


def _measured(name: str, task: Task) -> dict[str, object]:
    (curve, cost) = (
        apart(_PACKAGES, run_peer, name, task) if name in PEERS else apart(_PACKAGES, run_ours, task)
    )
    return {"curve": asdict(curve), "peak_bytes": cost.peak_bytes, "load_average": psutil.getloadavg()[0]}


def _side(
    name: str, found: Sequence[tuple[Curve, int]], samples: int, weights: int, ceiling: Ceiling | None,
    same_steps: bool = True,
) -> Side:
    by_clock = [curve.samples_per_s for curve, _ in found]
    by_processor = [curve.samples_per_processor_s for curve, _ in found]
    rates = by_processor if ceiling is None else by_clock
    peak, last = round(median(peak for _, peak in found)), found[-1][0]
    features_s = round(median(curve.features_s for curve, _ in found), 2)
    tokens_per_s = median(by_clock) * last.tokens / samples
    mfu = None if ceiling is None else ceiling.utilisation(weights, tokens_per_s)
    return Side(
        name, median(by_clock), median(by_processor), median(rates), min(rates), max(rates), peak, features_s,
        last.losses, last.tokens, same_steps, mfu,
    )


def _switches() -> Mapping[str, tuple[str, str]]:
    import torch

    return {**SWITCHES, **CUDA_SWITCHES} if torch.cuda.is_available() else SWITCHES


def _settings(
    questions: int, off: Mapping[str, bool], size: Size, switches: Mapping[str, tuple[str, str]]
) -> tuple[str, ...]:
    """A recipe's overrides with all switches on but those named."""
    packed = not off.get("shared prefix", False)
    rows = size.step // questions if packed else size.step
    forward = max(number for number in range(1, size.rows + 1) if rows % number == 0)
    turned = (pair[off.get(name, False)].format(questions=questions) for name, pair in switches.items())
    return (
        *turned, f"rows_per_step={forward}", f"accumulate={rows // forward}", "standardise_features=false",
        "vision_tokens=null", "validation_images=0", "log_steps=1", "group_by_length=false", "warmup=0",
        "instruct.learning_rate=1e-5", "instruct.projector_learning_rate=1e-5", "lora.dropout=0", "spike_factor=null",
        "save_steps=100000",
    )  # fmt: skip


def _with(recipe: str, settings: tuple[str, ...], one: str) -> tuple[str, ...]:
    """Settings with one more, which changes neither what `_settings` makes nor which questions a step has.

    It may change what they are learnt by, as the optimizer and LoRA's rank, which take their own time and memory.
    """
    before, after = (_flat(asdict(load_recipe(recipe, given))) for given in (settings, (*settings, one)))
    changed = [name for name in after if after[name] != before[name]]
    held = {*_OF_STEPS, *(setting.partition("=")[0] for setting in settings)}
    if not changed:
        raise ConfigError(f"--also {one}: {OURS} has it so already")
    if refused := [name for name in changed if name in held]:
        raise ConfigError(
            f"--also {one}: {refused[0]} cannot be chosen: it is a switch of --ladder, or all sides have it alike so "
            "that their steps are of the same questions and can be compared"
        )
    return (*settings, one)


def _flat(settings: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """A recipe's settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{group}{name}.") if isinstance(value, dict) else {f"{group}{name}": value}
    return flat


def _ladder(questions: int, switches: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, bool]]:
    """Which switches are off in ours, by what such a run is called."""
    names = [name for name in switches if questions > 1 or name != "shared prefix"]
    all_off = dict.fromkeys(names, True)
    return {
        "no switch": all_off,
        **{f"only {name}": {**all_off, name: False} for name in names},
        **{f"without {name}": {name: True} for name in names},
    }


def _subset(data: Path, out: Path, questions: int, steps: int, step: int) -> Path:
    """A dataset of just what the steps need: pictures with that many single questions each."""
    dataset = Dataset(data)
    pictures = steps * step // questions
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
    parser.add_argument("--arch", choices=sorted(SHAPES), help="draw a base of this shape instead")
    parser.add_argument("--layers", type=int, help="of its language model, for a trial; all of them by itself")
    parser.add_argument("--recipe", default="starter", help="whose LoRA ranks and optimizer all sides take")
    parser.add_argument("--questions", type=int, default=6, help="a picture's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps, the first not counted")
    parser.add_argument("--step", type=int, default=SAMPLES_PER_STEP, help="questions in an optimizer step")
    parser.add_argument("--forward", type=int, default=FORWARD_SAMPLES, help="of them in one forward of a peer")
    parser.add_argument("--rows", type=int, default=FORWARD_SAMPLES, help="packed rows in one forward of ours, at most")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--ladder", action="store_true")
    parser.add_argument(
        "--also", action="append", default=[], metavar="NAME=VALUE",
        help="one more side of ours, by a setting that leaves each step its questions; may be given several times",
    )
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    if min(given.questions, given.rounds, given.threads, given.step, given.forward, given.rows) < 1 or given.steps < 2:
        parser.error("--steps wants at least 2, all other numbers at least 1")
    peers = [name for name in given.peers.split(",") if name]
    try:
        base = given.base if given.arch is None else str(_drawn(given.out, given.data, given.arch, given.layers))
        found = compare(
            given.data, given.out, base, given.recipe, given.questions, given.rounds, given.steps, peers, given.ladder,
            given.threads, Size(given.step, given.forward, given.rows), given.also,
        )
    except LdrtError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(table(found)))
    return 0


def _drawn(out: Path, data: Path, arch: str, layers: int | None) -> Path:
    """A base of that shape, whose tokenizer knows the dataset's words: about as many tokens as a real one makes."""
    texts = [turn.text for row in Dataset(data).rows("train") for turn in row.turns]
    layers = layers or int(SHAPES[arch].text["num_hidden_layers"])
    return make_base(out / f"base-{layers}", layers, arch, texts, _VOCABULARY)


if __name__ == "__main__":
    sys.exit(main())
