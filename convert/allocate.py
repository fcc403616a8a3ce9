"""`ldrt-edge plan MERGED`: the types that do the least damage within a size or above a speed, or the reverse.

Each matrix takes one of its options; sizes and damages add up. That is a multiple-choice knapsack, which HiGHS solves
to within a thousandth of the largest damage or size, always with the same result; at 7 bits and more, where all damage
is small, the result can be a few hundredths above the optimum.

Source: Huangfu and Hall, "Parallelizing the dual revised simplex method", Math. Prog. Comp. 10 (2018) (HiGHS).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldrt_edge import artifact
from ldrt_edge.convert.gguf import identity
from ldrt_edge.convert.planned import Format
from ldrt_edge.convert.sensitivity import Matrix, Option, sensitivities
from ldrt_edge.convert.source import EMBEDDINGS, Source, is_tied, open_source
from ldrt_edge.convert.type_plan import FormatName, TypePlan, refuse_existing, write_type_plan
from ldrt_edge.errors import ConfigError

_GAP = 1e-3
_INFEASIBLE = 2  # scipy's status


class OutOfReach(ConfigError):
    """A bound that no allocation meets."""


@dataclass(frozen=True)
class Speed:
    """A floor for decoding, which reads the language model's matrices once a token and waits for memory alone.

    gb_per_s: what the machine reads at; `ldrt-edge doctor` measures it there.
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
    """Allocate types within one bound, above a speed, or both, and write the plan file; returns `out`.

    target_bytes: of all tensors of the export. bits_per_weight: of the same. max_kld: of the sum of estimated damages.

    Raises:
        ConfigError: no bound or several, or one that cannot be met; or `out` exists.
        ArtifactError, DataError: the model, the dataset or what the format was given is wrong.
    """
    refuse_existing(out)
    bounds = [bound for bound in (target_bytes, bits_per_weight, max_kld) if bound is not None]
    if len(bounds) > 1 or not (bounds or speed):
        raise ConfigError("plan wants one of --target-size, --bpw and --max-kld, or --min-speed, which goes with each")
    numbers = [*bounds, *((speed.tokens_per_s, speed.gb_per_s) if speed else ())]
    if not all(0 < number < math.inf for number in numbers):
        raise ConfigError("--target-size, --bpw, --max-kld, --min-speed and --bandwidth want a number above 0")
    source = open_source(merged)
    fixed = to.fixed_bytes(source)
    asked = [asdict(given) for given in (identity(merged), *to.inputs(), artifact.identity(data))]
    with _scratch(out, {"inputs": asked, "config": to.config(), "limit": limit, "seed": seed}) as work:
        found = sensitivities(source, data, to, limit, seed, work=work)
    if bits_per_weight is not None:
        target_bytes = int(bits_per_weight * sum(matrix.weights for matrix in found) / 8) + fixed
    read = _read_for_a_token(to, source) if speed else ()
    write_type_plan(allocate(to.name, found, fixed, target_bytes, max_kld, speed, read), out)
    return out


@contextmanager
def _scratch(out: Path, settings: Mapping[str, object]) -> Iterator[Path]:
    """A folder beside `out` from which the same command goes on when it was killed; gone when it is done."""
    folder, stamp = artifact.partial_path(out), json.dumps(settings, sort_keys=True)
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
    bounds = [LinearConstraint(once, 1, 1)]

    def within(cost: NDArray[np.float64], most: float, unit: float, told: str, beside: float = 0) -> None:
        least = sum(cost[owner == i].min() for i in range(len(matrices)))
        if least > most:
            raise OutOfReach(f"the bound cannot be met: the least possible is {told.format((least + beside) / unit)}")
        scale = cost.max() or 1
        bounds.append(LinearConstraint(cost[None] / scale, -np.inf, most / scale))

    if target_bytes is not None:
        within(size, target_bytes - fixed, 1e6, "{:.2f} MB", fixed)
    if max_damage is not None:
        within(damage, max_damage, 1, "an estimated KLD of {:.3g}")
    if speed is not None:
        reading = np.array([option.nbytes if matrices[i].name in read else 0 for i, option in options], float)
        within(reading, speed.nbytes, speed.gb_per_s * 1e9, "{:.3g} s a token")
    goal = damage if max_damage is None else size
    solved = milp(
        goal / (goal.max() or 1), integrality=np.ones(len(options)), bounds=Bounds(0, 1), constraints=bounds,
        options={"mip_rel_gap": _GAP},
    )  # fmt: skip
    if solved.status == _INFEASIBLE:
        raise OutOfReach("the bounds cannot be met together")
    if solved.x is None:
        raise ConfigError(f"no allocation was found: {solved.message}")
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
