"""All of training's switches together, against the plain path: the same result over three seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny as builders
import yaml
from test_train import colour_dataset

from ldrt_edge.bench.sweep import sweep

STEP, QUESTIONS = 12, 3
ALIKE = [
    "lora.rank=4", "lora.alpha=8", "precision=fp32", "validation_images=4", "vision_tokens=null", "align.epochs=1",
    "instruct.epochs=4", "instruct.learning_rate=5e-3", "instruct.projector_learning_rate=5e-3", "keep_best=false",
]  # fmt: skip
PLAIN = [
    "questions_per_row=1", f"rows_per_step={STEP}", "cache_features=false", "standardise_features=false",
    "group_by_length=false", "answer_only_logits=false", "fused_lora=false", "length_bucket=1",
]  # fmt: skip
FAST = [
    f"questions_per_row={QUESTIONS}", f"rows_per_step={STEP // QUESTIONS}", "cache_features=true",
    "standardise_features=true", "group_by_length=true", "answer_only_logits=true", "fused_lora=true",
]  # fmt: skip


@pytest.mark.slow
def test_all_switches_end_where_the_plain_path_does(tiny: builders.Tiny, tmp_path: Path) -> None:
    data = colour_dataset(tmp_path / "data", images=40)
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({
        "base": str(tiny("llava15", "smollm2")), "data": [str(data)], "set": ALIKE, "seeds": [0, 1, 2],
        "variants": {"plain": PLAIN, "fast": FAST},
    }))  # fmt: skip
    plain, fast = sweep(file, tmp_path / "out")

    print(f"accuracy {plain.accuracy.value:.3f}, {fast.accuracy.value:.3f}; losses {plain.losses}, {fast.losses}")
    assert plain.accuracy.value > 0.5, "there is something to learn, and some of it was learned"
    assert fast.difference is not None and fast.difference.ci_low <= 0 <= fast.difference.ci_high
    spread = np.hypot(np.std(plain.losses, ddof=1), np.std(fast.losses, ddof=1)) / np.sqrt(3)
    assert abs(np.mean(plain.losses) - np.mean(fast.losses)) <= 2 * spread
