"""Switches that need a library or a device: they train where they can run, and are refused in one line where not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import FAST, colour_dataset

from ldrt_edge.errors import ConfigError
from ldrt_edge.train.base import resolve_base
from ldrt_edge.train.lora import native_bf16, train
from ldrt_edge.train.recipe import load_recipe
from ldrt_edge.train.switches import check
from ldrt_edge.train.watch import METRICS, read_metrics

Tiny = Callable[..., Path]
SHORT = [
    *FAST, "validation_images=0", "instruct.epochs=4", "log_steps=1", "cache_features=false", "group_by_length=false",
    "standardise_features=false", "instruct.learning_rate=2e-3", "lora.dropout=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_dataset(tmp_path_factory.mktemp("data") / "colours", images=16)


def losses(base: Path, data: Path, out: Path, *settings: str) -> list[float]:
    adapter = train(resolve_base(str(base)), [data], out, load_recipe("starter", [*SHORT, *settings]))
    state = load_file(adapter / "adapter_model.safetensors")
    assert state and all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    return [entry["loss"] for entry in read_metrics(adapter / METRICS) if "loss" in entry]


def test_a_base_in_four_bits_trains_and_starts_out_near_the_whole_one(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = tiny("llava15", "llama", hidden=256)
    whole = losses(base, data, tmp_path / "whole")
    packed = losses(base, data, tmp_path / "packed", "base_precision=nf4")
    assert packed[0] == pytest.approx(whole[0], rel=0.1) and packed[0] != whole[0]
    assert packed[-1] < 0.9 * packed[0]


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw_8bit"])
def test_other_optimizers_train(tiny: Tiny, data: Path, tmp_path: Path, optimizer: str) -> None:
    """On a CPU too."""
    if "bit" in optimizer:
        pytest.importorskip("bitsandbytes")
    found = losses(tiny("llava15", "smollm2"), data, tmp_path / optimizer, f"optimizer={optimizer}")
    assert found[-1] < found[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("setting", ["kernels=liger", "optimizer=adamw_8bit", "optimizer=paged_adamw_8bit"])
def test_what_a_gpu_alone_can_do_trains_as_the_plain_path(
    tiny: Tiny, data: Path, tmp_path: Path, setting: str
) -> None:
    pytest.importorskip("bitsandbytes" if "bit" in setting else "liger_kernel")
    base = tiny("llava15", "llama", hidden=256)
    plain = losses(base, data, tmp_path / "plain")
    found = losses(base, data, tmp_path / "switched", setting)
    assert found == pytest.approx(plain, rel=0.05) and found[-1] < 0.9 * found[0]


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    base = tiny("llava15", "smollm2")
    plain = losses(base, data, tmp_path / "plain")
    assert losses(base, data, tmp_path / "compiled", "compile=true") == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("flags", ["", "fpu sse2 avx512_bf16 amx_bf16"])
@pytest.mark.parametrize("supported", [True, False])
def test_bf16_is_asked_of_onednn_only_where_torch_has_it(
    monkeypatch: pytest.MonkeyPatch, flags: str, supported: bool
) -> None:
    """Torch's builds for Apple silicon have neither oneDNN nor its operators."""

    def no_operator() -> bool:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_is_mkldnn_bf16_supported'")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("ldrt_edge.train.lora._cpu_flags", lambda: flags)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert native_bf16() == (supported and "avx512_bf16" in flags)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", no_operator)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not native_bf16()


@pytest.mark.parametrize("native", [True, False])
def test_bf16_that_a_gpu_only_emulates_is_not_native(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert native_bf16() == native


@pytest.mark.skipif(torch.cuda.is_available(), reason="they can run here")
def test_what_cannot_run_here_is_refused_at_once_and_together(tiny: Tiny, data: Path, tmp_path: Path) -> None:
    settings = ["optimizer=paged_adamw_8bit", "kernels=liger"]
    with pytest.raises(ConfigError, match=r"paged_adamw_8bit pages between .* cpu.*kernels=liger are Triton's") as told:
        losses(tiny("llava15", "smollm2"), data, tmp_path / "x", *settings)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "names", [["TRACKIO_SPACE_ID"], ["TRACKIO_SERVER_URL"], ["TRACKIO_DATASET_ID", "TRACKIO_BUCKET_ID"]]
)
def test_a_tracker_that_would_leave_this_machine_is_refused(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    recipe = load_recipe("starter", ["report_to=[tensorboard, trackio]"])
    for name in names:
        monkeypatch.setenv(name, "https://user:secret@example.org")
    with pytest.raises(ConfigError, match=rf"report_to=trackio stays on this machine, {', '.join(names)} ") as told:
        check(recipe, torch.device("cpu"))
    assert "secret" not in str(told.value)
    check(replace(recipe, report_to=("tensorboard",)), torch.device("cpu"))


def test_bf16_wants_a_mac_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, mac = load_recipe("starter", ("precision=bf16",)), torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: False)
    with pytest.raises(ConfigError, match="macOS 14"):
        check(recipe, mac)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: True)
    check(recipe, mac)


def test_aligning_under_fsdp2_is_sent_to_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"one device first \(instruct\.epochs=0\), merge, .* align\.epochs=0"):
        check(load_recipe("starter", ["align.epochs=1"]), torch.device("cpu"))
    check(load_recipe("starter", ["align.epochs=0"]), torch.device("cpu"))
