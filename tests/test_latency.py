"""Timings: what a model of real shape with random weights takes, what cannot fit, energy counters."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from ldrt_edge import artifact
from ldrt_edge.bench.energy import Meter
from ldrt_edge.bench.feel import refuse
from ldrt_edge.bench.latency import _read_a_token, further_threads
from ldrt_edge.bench.shapes import SHAPES, Shape, draw, tensor_shapes, write_config
from ldrt_edge.cli import cli
from ldrt_edge.doctor import _ARCHITECTURES
from ldrt_edge.errors import ConfigError
from ldrt_edge.machine import Memory

SMALL = {
    "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
TOWER = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56,
}  # fmt: skip


def test_shapes_have_the_parameters_that_the_doctor_counts_with(tmp_path: Path) -> None:
    counted = {model.name.lower(): model.text_parameters for model in _ARCHITECTURES}
    for name, shape in SHAPES.items():
        folder = tmp_path / name
        folder.mkdir()
        tensors = tensor_shapes(write_config(folder, shape))
        text = [s for key, s in tensors.items() if "language_model" in key or "lm_head" in key]
        total = sum(s[0] * (s[1] if len(s) > 1 else 1) for s in text)
        assert total == pytest.approx(counted[name], rel=0.001), "the vocabulary is padded by 64 rows"


@pytest.mark.parametrize(("type_", "tiled"), [("Q4_K_M", False), ("Q8_0", True)])
def test_a_drawn_model_runs_and_is_timed(tmp_path: Path, type_: str, tiled: bool) -> None:
    shape = Shape(SHAPES["llava-1.5-7b"].text | SMALL, tiled, SHAPES["llava-1.5-7b"].vision | TOWER)
    out = draw(shape, type_, tmp_path / "drawn")  # type: ignore[arg-type]
    options = ["--runs", "1", "--threads", "1", "--sweep", "1,2", "--json"]
    done = CliRunner().invoke(cli, ["bench", "latency", str(out), *options])
    assert done.exception is None, done.output
    found = json.loads(done.stdout)
    assert found["image_tokens"] == (88 if tiled else 16), "five tiles of 4 × 4, and a newline behind each of 8 rows"
    assert found["cold_start_ms"] > 0 and found["end_to_end_ms"]["median"] > found["ttft_ms"]["median"]
    assert [at["threads"] for at in found["by_threads"]] == [1, 2]
    assert found["model_bytes"] == sum(p.stat().st_size for p in out.glob("*.gguf"))
    read = found["decode_tok_per_s"]["median"] * _read_a_token(out) / 1e9
    assert found["roofline"] == pytest.approx(read / found["bandwidth_gb_per_s"])
    assert 0 < _read_a_token(out) < found["model_bytes"]


def test_what_cannot_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    room = Memory(8 << 30, 6 << 30, 20.0, 0.0)
    with pytest.raises(ConfigError, match=r"13b in Q4_K_M wants about \d.*6.4 GB are free.*What fits: .*7b in Q4_K_M"):
        refuse("llava-1.5-13b", "Q4_K_M", room)
    refuse("llava-1.6-mistral-7b", "Q4_K_M", room)
    with pytest.raises(ConfigError, match="None of the known models"):
        refuse("llava-1.5-7b", "F16", replace(room, available_bytes=1 << 30))
    for arguments, reason in (
        (["--arch", "llava-9b"], "choose from llava-1.5-7b"), ([], "times EDGE"), (["x", "--arch", "y"], "times EDGE"),
        ([str(tmp_path), "--sweep", "1,x"], "numbers of threads"),
    ):
        done = CliRunner().invoke(cli, ["bench", "latency", *arguments])
        assert isinstance(done.exception, ConfigError) and reason in str(done.exception)


@pytest.mark.parametrize("prefix", ["", "model."], ids=["MLX", "transformers"])
def test_decoding_does_not_read_what_only_sees(tmp_path: Path, prefix: str) -> None:
    """MLX keeps all of a model in one file, quantised weights as U32; nothing of the tower is read for a token."""
    language = {
        f"{prefix}language_model.model.layers.0.mlp.up_proj.weight": np.zeros((8, 4), np.uint32),
        f"{prefix}language_model.model.layers.0.mlp.up_proj.scales": np.zeros((8, 2), np.float16),
        f"{prefix}language_model.lm_head.weight": np.zeros((16, 8), np.float32),
    }
    seeing = {
        f"{prefix}vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": np.zeros((64, 64), np.float16),
        f"{prefix}multi_modal_projector.linear_1.weight": np.zeros((32, 8), np.float16),
        f"{prefix}image_newline": np.zeros(8, np.float16),
    }
    for name, tensors in (("whole", language | seeing), ("blind", language)):
        with artifact.create(tmp_path / name, "mlx", {}) as draft:
            save_file(tensors, draft.path / "model.safetensors")
        assert _read_a_token(tmp_path / name) == sum(tensor.nbytes for tensor in language.values())


@pytest.mark.parametrize(
    ("cores", "threads", "further"),
    [(1, 1, ()), (2, 2, (1,)), (2, 1, (2,)), (4, 4, (2, 1)), (8, 8, (4, 2)), (8, 6, (8, 4, 2)), (6, 3, (6, 1))],
)
def test_threads_worth_trying(cores: int, threads: int, further: tuple[int, ...]) -> None:
    assert further_threads(threads, cores) == further


def test_energy_counters(tmp_path: Path) -> None:
    """Two sockets beside what their counters hold already: a core's zone, and a platform's."""
    assert Meter(tmp_path).joules() is None
    for name, called, start in (
        ("intel-rapl:0", "package-0", 5_000_000), ("intel-rapl:1", "package-1", 9_000_000),
        ("intel-rapl:0:0", "core", 1), ("intel-rapl:2", "psys", 3),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(f"{called}\n")
        (tmp_path / name / "energy_uj").write_text(f"{start}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("10000000")
    meter = Meter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("7000000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("500000")  # wrapped
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("99")  # a part of the package: not twice
    (tmp_path / "intel-rapl:2" / "energy_uj").write_text("9000000")  # the packages and more: not twice
    assert meter.joules() == pytest.approx(3.5)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.joules() is None, "no figure is better than half of one"


def test_energy_as_powermetrics_prints_it(tmp_path: Path) -> None:
    printing = (
        "import time\n"
        "for number, milliwatts in enumerate((4000, 8000, 8000)):\n"
        "    print(f'*** Sampled system activity (Sat Nov 28 10:00:0{number} 2026 +0100) (50.00ms elapsed) ***')\n"
        "    print(f'\\n**** Processor usage ****\\n\\nCPU Power: 9 mW\\nGPU Power: 7 mW\\nANE Power: 0 mW')\n"
        "    print(f'Combined Power (CPU + GPU + ANE): {milliwatts} mW', flush=True)\n"
        "print('*** Sampled system activity (Sat Nov 28 10:00:09 2026 +0100) (50.00ms elapsed) ***', flush=True)\n"
        f"open({str(tmp_path / 'printed')!r}, 'w').close()\n"
        "time.sleep(100)\n"
    )
    before = time.monotonic()
    meter = Meter(tmp_path, (sys.executable, "-c", printing))
    after = time.monotonic()
    while not (tmp_path / "printed").exists():
        assert time.monotonic() - before < 60
        time.sleep(0.05)
    least, joules, most = time.monotonic() - after, meter.joules(), time.monotonic() - before
    assert joules is not None
    assert least < joules / (20 / 3) < most, "the mean of whole intervals, for all of the time"
    assert Meter(tmp_path, ("false",)).joules() is None
