"""What the doctor says about this machine, and about others."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ldrt_edge import doctor, machine
from ldrt_edge.doctor import Diagnosis, ModelFit, diagnose, models_on, render
from ldrt_edge.machine import Memory

GB = 10**9


@pytest.fixture(scope="module")
def here() -> Diagnosis:
    return diagnose()


def _fit(memory: Memory, model: str, type_: str) -> ModelFit:
    return next(fit for fit in models_on(memory) if (fit.model, fit.type) == (model, type_))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LLaVA-1.5-7B", {}),
        ("LLaVA-1.5-13B", {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "heads": 40}),
        ("LLaVA-1.6-Mistral-7B", {"intermediate_size": 14336, "kv_heads": 8}),
    ],
)
def test_sizes_follow_from_the_real_architectures(name: str, text: dict[str, int]) -> None:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    shape = dict(text)
    heads = shape.pop("heads", 32)
    llama = LlamaConfig(num_attention_heads=heads, num_key_value_heads=shape.pop("kv_heads", heads), **shape)
    tower = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=llama, vision_config=tower))
    sizes = {key: sum(p.numel() for p in part.parameters()) for key, part in (
        ("text", model.model.language_model), ("head", model.lm_head), ("tower", model.model.vision_tower),
        ("last layer", model.model.vision_tower.encoder.layers[-1]), ("projector", model.model.multi_modal_projector),
    )}
    known = next(model for model in doctor._ARCHITECTURES if model.name == name)
    assert known.text_parameters == pytest.approx(sizes["text"] + sizes["head"], rel=1e-3)
    vision = sizes["tower"] - sizes["last layer"] + sizes["projector"]
    assert known.vision_parameters == pytest.approx(vision, rel=1e-3)
    assert (known.layers, known.kv_width) == (llama.num_hidden_layers, llama.num_key_value_heads * llama.head_dim)


def test_bits_give_the_sizes_of_published_files() -> None:
    fit = _fit(Memory(64 * GB, 60 * GB, 50.0, 0.0), "LLaVA-1.5-13B", "Q4_K_M")
    # Llama-2-13B in Q4_K_M is published as 7.87 GB; the rest is the mmproj
    assert fit.file_bytes == pytest.approx(7.87 * GB + 2 * 322.4e6, rel=0.005)


def test_a_laptop_of_eight_gigabytes_runs_a_small_model_and_knows_what_is_too_much() -> None:
    laptop = Memory(8 * GB, 5 * GB, 40.0, 0.0)
    assert _fit(laptop, "starter", "Q4_K_M").fit == "fits"
    assert _fit(laptop, "LLaVA-1.5-7B", "F16").fit == "no"
    assert _fit(laptop, "LLaVA-1.5-13B", "Q4_K_M").fit == "no"
    busy = Memory(16 * GB, 3 * GB, 40.0, 0.0)
    assert _fit(busy, "LLaVA-1.5-7B", "Q4_K_M").fit == "tight"
    assert _fit(replace(busy, available_bytes=12 * GB), "LLaVA-1.5-7B", "Q4_K_M").fit == "fits"


def test_the_ceiling_is_bandwidth_over_bytes() -> None:
    slow, fast = (_fit(Memory(64 * GB, 60 * GB, speed, 0.0), "LLaVA-1.5-7B", "Q4_K_M") for speed in (40.0, 80.0))
    # an M1 of 68 GB/s decodes a 4-bit 7B at 14 tokens a second: below the ceiling, and not far below
    assert 8 < slow.decode_tok_per_s_at_most < 12
    assert fast.decode_tok_per_s_at_most == pytest.approx(2 * slow.decode_tok_per_s_at_most, abs=0.2)


def test_this_machine_is_described_truly(here: Diagnosis) -> None:
    assert 0 < here.memory.available_bytes <= here.memory.total_bytes <= psutil.virtual_memory().total
    assert 1 <= here.processor.usable_cores <= here.processor.logical_cores
    assert here.memory.read_gb_per_s > 0.5
    assert here.disk_free_bytes > 0 and here.processor.name
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and "avx2" in cpuinfo.read_text().split():
        assert "AVX2" in here.processor.features


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limit", "used", "cache", "total", "available"),
    [
        (16 * GB, 15 * GB, 2 * GB, 16 * GB, 3 * GB),
        (16 * GB, 17 * GB, 0, 16 * GB, 0),
        (16 * GB, GB, 2 * GB, 16 * GB, 16 * GB),
        (4 * GB, None, None, 4 * GB, 4 * GB),
        (1 << 60, 70 * GB, 0, 64 * GB, 50 * GB),
        (None, 70 * GB, 0, 64 * GB, 50 * GB),
    ],
)
def test_a_container_has_what_its_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, limit: int | None, used: int | None,
    cache: int | None, total: int, available: int,
) -> None:  # fmt: skip
    """Of what it uses, files that can be read again do not count; and never more than the machine has."""
    names = {1: ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), 2: ("max", "current", "inactive_file")}
    most, now, dropped = names[version]
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / f"memory.{most}").write_text(f"{limit or 'max'}\n")
    if used is not None:
        (folder / f"memory.{now}").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon {GB}\n{dropped} {cache}\nactive_file {GB}\n")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "read_gb_per_s", lambda threads: 1.0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GB, available=50 * GB))
    found = machine.memory()
    assert (found.total_bytes, found.available_bytes) == (total, available)


def test_installed_runtimes_are_loaded_and_their_flaws_named(here: Diagnosis) -> None:
    states = {runtime.name: runtime for runtime in here.runtimes}
    assert states["llama.cpp"].version == importlib.metadata.version("llama-cpp-python") and states["llama.cpp"].works
    assert "class token" in " ".join(states["llama.cpp"].notes)
    assert states["torch"].version == importlib.metadata.version("torch")


def test_the_page_is_plain_text_and_names_everything(here: Diagnosis) -> None:
    page = render(here)
    assert "\x1b" not in page and max(map(len, page.splitlines())) <= 110
    for wanted in (here.processor.name, "LLaVA-1.6-Mistral-7B", "Q4_K_M", "class token", "GB/s", "tok/s at most"):
        assert wanted in page
    assert json.loads(json.dumps(asdict(here)))["models"][0]["model"] == "starter"


def test_what_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    really = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("llama-cpp-python", "peft", "onnx"):
            raise importlib.metadata.PackageNotFoundError(name)
        return really(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = doctor.diagnose()
    advice = {item.what: item.command for item in found.advice}
    assert any("compiler" in what for what in advice)
    assert "pip install --force-reinstall --no-cache-dir llama-cpp-python==0.3.36" in advice.values()
    assert advice["for 'train', missing peft"] == "pip install 'ldrt-edge[train]'"
    assert advice["for 'starter', missing onnx"] == "pip install 'ldrt-edge[starter]'"
    page = render(found)
    assert "not installed" in page and "ldrt-edge[train]" in page


def test_the_command_speaks_json() -> None:
    done = subprocess.run([sys.executable, "-m", "ldrt_edge.cli", "doctor", "--json"], capture_output=True, check=True)
    assert {"processor", "memory", "runtimes", "models", "advice"} <= set(json.loads(done.stdout))
