"""The bench at a 7B's width, with one layer: every stage runs, and conversion stays small in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ldrt_edge.bench import at_size
from ldrt_edge.errors import ConfigError


@pytest.mark.slow
def test_one_layer_of_a_7b_goes_through_every_stage(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 10e9:
        pytest.skip("needs 10 GB of disk")
    costs = {cost.stage: cost for cost in at_size.run(tmp_path, layers=1, stages=("merge", "text", "gguf", "chat"))}
    assert (tmp_path / "gguf-q4" / "manifest.json").is_file()
    assert not list(tmp_path.glob("*.gguf")), "what no later stage reads is deleted"
    assert costs["ours: text to GGUF"].peak_bytes < 1e9
    assert costs["chat --ask"].seconds > 0


def test_an_unknown_stage_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose from merge, text"):
        at_size.run(tmp_path / "new", stages=("everything",))
    assert not (tmp_path / "new").exists()
