"""`ldrt-edge plan MERGED`: the type of every matrix that does the least damage within a size, or the reverse.

Each matrix takes one of its options; sizes and damages add up. That is a multiple-choice knapsack, which HiGHS solves
to within a thousandth of the optimum, always with the same result.

Source: Huangfu and Hall, "Parallelizing the dual revised simplex method", Math. Prog. Comp. 10 (2018) (HiGHS).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldrt_edge.convert.planned import Format
from ldrt_edge.convert.sensitivity import Matrix, Option, sensitivities
from ldrt_edge.convert.source import open_source
from ldrt_edge.convert.type_plan import FormatName, TypePlan, refuse_existing, write_type_plan
from ldrt_edge.errors import ConfigError

_GAP = 1e-3


class OutOfReach(ConfigError):
    """A bound that no allocation meets."""


def plan(
    merged: Path,
    data: Path,
    to: Format,
    out: Path,
    *,
    target_bytes: float | None = None,
    bits_per_weight: float | None = None,
    max_kld: float | None = None,
    limit: int = 16,
    seed: int = 0,
) -> Path:
    """Allocate types within exactly one bound, and write the plan file; returns `out`.

    target_bytes: of all tensors of the export. bits_per_weight: of the same. max_kld: of the sum of estimated damages.

    Raises:
        ConfigError: no bound or several, or one that cannot be met; or `out` exists.
        ArtifactError, DataError: the model, the dataset or what the format was given is wrong.
    """
    refuse_existing(out)
    if sum(bound is not None for bound in (target_bytes, bits_per_weight, max_kld)) != 1:
        raise ConfigError("plan wants one of --target-size, --bpw and --max-kld")
    if not 0 < (target_bytes or bits_per_weight or max_kld or 0) < math.inf:
        raise ConfigError("--target-size, --bpw and --max-kld want a number above 0")
    source = open_source(merged)
    found, fixed = sensitivities(source, data, to, limit, seed), to.fixed_bytes(source)
    if bits_per_weight is not None:
        target_bytes = int(bits_per_weight * sum(matrix.weights for matrix in found) / 8) + fixed
    write_type_plan(allocate(to.name, found, fixed, target_bytes, max_kld), out)
    return out


def allocate(
    to: FormatName, matrices: Sequence[Matrix], fixed: int = 0, target_bytes: float | None = None,
    max_damage: float | None = None,
) -> TypePlan:
    """Least damage within `target_bytes`, or fewest bytes within `max_damage`.

    to: the format of the options' types. fixed: bytes of what is never quantised; they count towards the size.

    Raises:
        OutOfReach: the bound cannot be met; says what can.
        ConfigError: the solver failed.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    options = [(i, option) for i, matrix in enumerate(matrices) for option in useful(matrix.options)]
    size = np.array([option.nbytes for _, option in options], float)
    damage = np.array([option.damage for _, option in options])
    goal, cost, bound = (damage, size, target_bytes) if target_bytes is not None else (size, damage, max_damage)
    assert bound is not None
    bound -= fixed if target_bytes is not None else 0
    owner = np.array([i for i, _ in options])
    least = sum(cost[owner == i].min() for i in range(len(matrices)))
    if least > bound:
        told = f"{(least + fixed) / 1e6:.2f} MB" if target_bytes is not None else f"an estimated KLD of {least:.3g}"
        raise OutOfReach(f"the bound cannot be met: the least possible is {told}")
    once = csr_array((np.ones(len(options)), (owner, np.arange(len(options)))), (len(matrices), len(options)))
    scale = cost.max() or 1
    within = LinearConstraint(cost[None] / scale, -np.inf, bound / scale)
    solved = milp(
        goal / (goal.max() or 1), integrality=np.ones(len(options)), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(once, 1, 1), within], options={"mip_rel_gap": _GAP},
    )  # fmt: skip
    if solved.x is None:
        raise ConfigError(f"no allocation was found: {solved.message}")
    chosen = [(matrices[i], option) for (i, option), taken in zip(options, solved.x, strict=True) if taken > 0.5]
    parts: dict[str, dict[str, str]] = {}
    for matrix, option in chosen:
        parts.setdefault(matrix.part, {})[matrix.name] = option.type
    kld = float(f"{sum(option.damage for _, option in chosen):.4g}")
    return TypePlan(to, parts, {"kld": kld, "bytes": sum(option.nbytes for _, option in chosen) + fixed})


def useful(options: Sequence[Option]) -> list[Option]:
    """Options, smallest first, without those that are no smaller than a less damaging one."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.damage)):
        if not kept or option.damage < kept[-1].damage:
            kept.append(option)
    return kept
