"""The parity table: for people on the terminal and in Markdown, for tools as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldrt_edge import artifact
from ldrt_edge.convert.parity import Pair

REPORT = "parity.json"
_COLUMNS = (
    "export", "runtime", "type", "pixels", "prompt", "embeddings", "KLD", "same top token", "largest logit difference",
    "greedy answers", "first difference",
)  # fmt: skip


def as_json(pairs: Sequence[Pair]) -> dict[str, Any]:
    """`{"pairs": [...], "passed"}`: numbers beside names, null where a comparison could not be made."""
    return {"pairs": [_flat(pair) for pair in pairs], "passed": passed(pairs)}


def passed(pairs: Sequence[Pair]) -> bool:
    """Whether nothing differs that must not; other people's runtimes are shown, not judged."""
    return not any(pair.stage for pair in pairs if not pair.peer)


def markdown(pairs: Sequence[Pair]) -> str:
    """One row for each export."""
    rows = [_COLUMNS, tuple("---" for _ in _COLUMNS), *map(_row, pairs)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def save(reference: Path, exports: Sequence[Path], pairs: Sequence[Pair], out: Path) -> Path:
    """Write the table as an artefact of kind "report"; returns `out`.

    Raises:
        ArtifactError: `out` holds something else, or the disk is full.
    """
    found = as_json(pairs)
    config = {"stage": "parity", "table": found}  # other numbers are another table
    inputs = [folder for folder in (reference, *exports) if (folder / artifact.MANIFEST).is_file()]
    with artifact.create(out, "report", config, inputs) as draft:
        if not draft.complete:
            text = json.dumps(found, indent=1, ensure_ascii=False)
            (draft.path / REPORT).write_text(text + "\n", encoding="utf-8")
            (draft.path / "parity.md").write_text(markdown(pairs), encoding="utf-8")
            draft.metrics["passed"] = passed(pairs)
    return out


def _flat(pair: Pair) -> dict[str, Any]:
    flat = asdict(pair)
    names = (
        "max_abs_logit_diff", "mean_kld", "top1_agreement", "undecided", "tokens", "prompt_kld", "embedding_rel_error",
    )  # fmt: skip
    flat |= flat.pop("fidelity") or dict.fromkeys(names)
    return {key: _finite(value) for key, value in flat.items()}


def _finite(value: Any) -> Any:
    """JSON knows no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(pair: Pair) -> tuple[str, ...]:
    types = pair.weights if pair.weights == pair.vision else f"{pair.weights}, vision {pair.vision}"
    start = (pair.subject, pair.runtime, types, _yes(pair.pixels_equal), _yes(pair.prompt_equal))
    first = f"{pair.stage}: {pair.fault}" if pair.stage else "" if pair.peer else "none"
    answers = "" if pair.answers_equal is None else f"{pair.answers_equal} of {pair.answers}"
    f = pair.fidelity
    if f is None:
        return (*start, "", "", "", "", answers, first)
    either = f" (+{f.undecided:.1%} undecided)" if f.undecided else ""
    embeddings = "" if f.embedding_rel_error is None else f"{f.embedding_rel_error:.1e}"
    top = f"{f.top1_agreement:.1%}{either}"
    return (*start, embeddings, f"{f.mean_kld:.1e}", top, f"{f.max_abs_logit_diff:.1e}", answers, first)


def _yes(equal: bool | None) -> str:
    return "not known" if equal is None else "equal" if equal else "differ"
