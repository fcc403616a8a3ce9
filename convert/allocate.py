"""`ldrt-edge plan MERGED`: the types that do the least damage within a size or what a token may read, or the reverse.

Each matrix takes one of its options; sizes and damages add up. That is a multiple-choice knapsack, which HiGHS solves
to within a thousandth of the largest damage or size, always with the same result; at 7 bits and more, where all damage
is small, the result can be a few hundredths above the optimum.

What bytes and shapes alone forbid is told before anything is measured; what was measured lies beside the plan, for the
next one from the same inputs.

Source: Huangfu and Hall, "Parallelizing the dual revised simplex method", Math. Prog. Comp. 10 (2018) (HiGHS).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldrt_edge import __version__, artifact
from ldrt_edge.convert.format import Format
from ldrt_edge.convert.gguf import identity
from ldrt_edge.convert.planned import check_held_out
from ldrt_edge.convert.sensitivity import Matrix, Option, admitted, kept, sensitivities
from ldrt_edge.convert.source import EMBEDDINGS, Source, is_tied, open_source
from ldrt_edge.convert.type_plan import FormatName, PlannedMatrix, TypePlan, nbytes, refuse_existing, write_type_plan
from ldrt_edge.errors import ConfigError

_GAP = 1e-3
_OVERSHOT = 1e-5  # of a bound; the solver's own tolerance is 1e-6
_INFEASIBLE = 2  # scipy's status


class OutOfReach(ConfigError):
    """A bound that no allocation meets."""


@dataclass(frozen=True)
class Speed:
    """What memory must allow: decoding reads the language model's matrices once a token, and is no faster than that.

    It is slower by what else a token takes. gb_per_s: what the machine reads at; `ldrt-edge doctor` measures it there.
    Source: Williams, Waterman and Patterson, "Roofline", CACM 52 (2009).
    """

    tokens_per_s: float
    gb_per_s: float

    @property
    def nbytes(self) -> float:
        """Bytes that a token may read."""
        return self.gb_per_s * 1e9 / self.tokens_per_s


def plan(
    merged: Path,
    data: Path,
    to: Format,
    out: Path,
    *,
    target_bytes: float | None = None,
    bits_per_weight: float | None = None,
    max_kld: float | None = None,
    speed: Speed | None = None,
    limit: int = 16,
    seed: int = 0,
) -> Path:
    """Allocate types within one bound, what a speed lets a token read, or both; write the plan file; returns `out`.

    target_bytes: of the files with the weights. bits_per_weight: over the matrices. max_kld: of the sum of estimated
    damages. What was measured is kept beside `out`, in `sensitivities-….json`, and taken from there the next time.

    Raises:
        ConfigError: no bound or several, or one that cannot be met; or `out` exists.
        ArtifactError, DataError: the model, the dataset or what the format was given is wrong (see `check_held_out`).
    """
    refuse_existing(out)
    bounds = [bound for bound in (target_bytes, bits_per_weight, max_kld) if bound is not None]
    if len(bounds) > 1 or not (bounds or speed):
        raise ConfigError("plan wants one of --target-size, --bpw and --max-kld, or --min-speed, which goes with each")
    numbers = [*bounds, *((speed.tokens_per_s, speed.gb_per_s) if speed else ())]
    if not all(0 < number < math.inf for number in numbers):
        raise ConfigError("--target-size, --bpw, --max-kld, --min-speed and --bandwidth want a number above 0")
    source = open_source(merged)
    fixed, read = to.fixed_bytes(source), _read_for_a_token(to, source) if speed else set()
    unmeasured = [_unmeasured(to, part, m) for part, members in to.matrices(source).items() for m in members]
    if bits_per_weight is not None:
        target_bytes = int(bits_per_weight * sum(matrix.weights for matrix in unmeasured) / 8) + fixed
    allocate(to.name, unmeasured, fixed, target_bytes, None, speed, read)  # refuses what bytes alone forbid
    check_held_out(data, to)
    asked = [asdict(given) for given in (identity(merged), *to.inputs(), artifact.identity(data))]
    settings = {"inputs": asked, "to": to.name, "config": to.config(), "limit": limit, "seed": seed}
    stamp = json.dumps(settings | {"version": __version__}, sort_keys=True)
    with artifact.writing(out):
        found = kept(
            out.with_name(f"sensitivities-{sha256(stamp.encode()).hexdigest()[:12]}.json"),
            lambda: _measured(source, data, to, limit, seed, out, stamp),
        )
    write_type_plan(allocate(to.name, found, fixed, target_bytes, max_kld, speed, read), out)
    return out


def _unmeasured(to: Format, part: str, matrix: PlannedMatrix) -> Matrix:
    weights = math.prod(matrix.shape)
    options = tuple(Option(type_, nbytes(type_, weights), 0.0) for type_ in admitted(to, part, matrix))
    return Matrix(matrix.name, part, weights, options)


def _measured(source: Source, data: Path, to: Format, limit: int, seed: int, out: Path, stamp: str) -> list[Matrix]:
    with _scratch(out, stamp) as work:
        return sensitivities(source, data, to, limit, seed, work=work)


@contextmanager
def _scratch(out: Path, stamp: str) -> Iterator[Path]:
    """A folder beside `out` from which the same command goes on when it was killed; gone when it is done."""
    folder = artifact.partial_path(out)
    told = folder / "settings.json"
    if folder.exists() and (not told.is_file() or told.read_text() != stamp):
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    told.write_text(stamp)
    yield folder
    shutil.rmtree(folder)


def allocate(
    to: FormatName, matrices: Sequence[Matrix], fixed: int = 0, target_bytes: float | None = None,
    max_damage: float | None = None, speed: Speed | None = None, read: Collection[str] = (),
) -> TypePlan:
    """Least damage within `target_bytes`, or fewest bytes within `max_damage`; either with `speed`, or that alone.

    to: the format of the options' types. fixed: bytes of what is never quantised; they count towards the size.
    read: names of the matrices that decoding a token reads.

    Raises:
        OutOfReach: the bounds cannot be met; says what can.
        ConfigError: the solver failed.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    options = [(i, option) for i, matrix in enumerate(matrices) for option in useful(matrix.options)]
    size = np.array([option.nbytes for _, option in options], float)
    damage = np.array([option.damage for _, option in options])
    owner = np.array([i for i, _ in options])
    once = csr_array((np.ones(len(options)), (owner, np.arange(len(options)))), (len(matrices), len(options)))
    bounds, possible = [LinearConstraint(once, 1, 1)], np.ones(len(options))
    limits: list[tuple[NDArray[np.float64], float]] = []

    def within(cost: NDArray[np.float64], most: float, unit: float, told: str, beside: float = 0) -> None:
        least = sum(cost[owner == i].min() for i in range(len(matrices)))
        if least > most:
            raise OutOfReach(f"the bound cannot be met: the least possible is {told.format((least + beside) / unit)}")
        alone = cost > most  # so that the solver's tolerance is one of the bound
        possible[alone] = 0
        bounds.append(LinearConstraint(np.where(alone, 0, cost)[None] / (most or 1), -np.inf, most / (most or 1)))
        limits.append((cost, most))

    if target_bytes is not None:
        within(size, target_bytes - fixed, 1e6, "{:.2f} MB", fixed)
    if max_damage is not None:
        within(damage, max_damage, 1, "an estimated KLD of {:.3g}")
    if speed is not None:
        reading = np.array([option.nbytes if matrices[i].name in read else 0 for i, option in options], float)
        within(reading, speed.nbytes, speed.gb_per_s * 1e9, "{:.3g} s a token, by memory bandwidth alone")
    goal = damage if max_damage is None else size
    solved = milp(
        goal / (goal.max() or 1), integrality=np.ones(len(options)), bounds=Bounds(0, possible), constraints=bounds,
        options={"mip_rel_gap": _GAP},
    )  # fmt: skip
    if solved.status == _INFEASIBLE:
        raise OutOfReach("the bounds cannot be met together")
    if solved.x is None:
        raise ConfigError(f"no allocation was found: {solved.message}")
    if any(cost[solved.x > 0.5].sum() > most * (1 + _OVERSHOT) for cost, most in limits):
        raise ConfigError("no allocation was found within the bound: choose one that is a little wider")
    chosen = [(matrices[i], option) for (i, option), taken in zip(options, solved.x, strict=True) if taken > 0.5]
    parts: dict[str, dict[str, str]] = {}
    for matrix, option in chosen:
        parts.setdefault(matrix.part, {})[matrix.name] = option.type
    kld = float(f"{sum(option.damage for _, option in chosen):.4g}")
    expected: dict[str, float] = {"kld": kld, "bytes": sum(option.nbytes for _, option in chosen) + fixed}
    if speed is not None:
        held = sum(option.nbytes for matrix, option in chosen if matrix.name in read)
        expected["tokens_per_s_at_most"] = float(f"{speed.gb_per_s * 1e9 / held:.4g}")
    return TypePlan(to, parts, expected)


def useful(options: Sequence[Option]) -> list[Option]:
    """Options, smallest first, without those that are no smaller than a less damaging one."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.damage)):
        if not kept or option.damage < kept[-1].damage:
            kept.append(option)
    return kept


def _read_for_a_token(to: Format, source: Source) -> set[str]:
    """Names of the language model's matrices, but for an embedding table of which a token reads one row."""
    tied = is_tied(source)
    return {matrix.name for matrix in to.matrices(source)["model"] if tied or matrix.source != EMBEDDINGS}
