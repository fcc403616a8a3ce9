"""GGUF files compute what the checkpoint computes, faults are named, and quantised files say what they hold."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import tiny as builders
import torch
from gguf import GGUFReader
from tiny import edit_tensors
from transformers import LlavaConfig, LlavaForConditionalGeneration

from ldrt_edge import artifact, console, machine
from ldrt_edge.convert import plan
from ldrt_edge.convert.gguf import convert, write, write_mmproj, write_text
from ldrt_edge.convert.plan import text_plan
from ldrt_edge.convert.probes import probes
from ldrt_edge.convert.quantize import quantize
from ldrt_edge.convert.quantizer import TYPES, Wanted, read_back, run_quantizer
from ldrt_edge.convert.source import open_source
from ldrt_edge.errors import ArtifactError, ConfigError
from ldrt_edge.front import Front
from ldrt_edge.runtimes import hf

FAMILIES = ("llava15", "llavanext")
TEXTS = ("llama", "mistral", "smollm2")


def test_an_export_holds_what_a_laptop_needs_and_how_close_it_is(tiny: builders.Tiny, tmp_path: Path) -> None:
    out = convert(tiny("llava15", "llama"), tmp_path / "edge", type_="f32", mmproj_type="f32")

    manifest = artifact.verify(out, "gguf")
    assert {entry.path for entry in manifest.files} == {
        "model-F32.gguf", "mmproj-F32.gguf", "front.json", "tokenizer.json", "golden/records.jsonl",
        *(f"golden/0{i}.png" for i in range(4)),
    }  # fmt: skip
    fidelity = manifest.metrics["fidelity"]
    assert fidelity["mean_kld"] < 1e-6  # twenty times below the gate
    assert fidelity["top1_agreement"] + fidelity["undecided"] == 1
    assert fidelity["tokens"] >= 300


@pytest.mark.parametrize("contained", [False, True])
@pytest.mark.parametrize(
    ("gpu_gb", "cpu_gb", "wanted", "precise"),
    [
        (80, 64, ("float32", "cuda"), ("float32", "cuda")),
        (24, 64, ("bfloat16", "cuda"), ("float32", "cpu")),
        (24, 16, ("bfloat16", "cuda"), ("bfloat16", "cuda")),
        (8, 64, ("float32", "cpu"), ("float32", "cpu")),
        (8, 24, ("bfloat16", "cpu"), ("bfloat16", "cpu")),
        (None, 64, ("float32", "cpu"), ("float32", "cpu")),
        (None, 8, ("bfloat16", "cpu"), ("bfloat16", "cpu")),
    ],
)
def test_a_7b_runs_where_the_memory_at_hand_lets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_gb: int | None, cpu_gb: int, wanted: hf.Place,
    precise: hf.Place, contained: bool,
) -> None:  # fmt: skip
    """The machine's, or of a large machine what a container has."""
    said: list[str] = []
    monkeypatch.setattr(console, "say", said.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu_gb is not None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((gpu_gb or 0) * 10**9, 0))
    memory = SimpleNamespace(available=(1000 if contained else cpu_gb) * 10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    if contained:
        (tmp_path / "memory.max").write_text(f"{(cpu_gb + 1) * 10**9}")
        (tmp_path / "memory.current").write_text(f"{10**9}")
    found = [hf.fitting(7_060_000_000), hf.fitting(7_060_000_000, precise=True)]
    assert found == [wanted, precise]
    assert len(said) == sum(place.dtype == "bfloat16" for place in found)
    assert all(" in float32 it would take 32 GB" in line for line in said)


def test_the_reference_says_what_it_computes_in(tiny: builders.Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = tiny("llava15", "llama"), []
    monkeypatch.setattr(hf, "fitting", lambda weights, *_, **__: asked.append(weights) or hf.Place("bfloat16", "cpu"))
    runtime = hf.HfRuntime(folder)
    assert str(runtime.place) == "bfloat16 on cpu" and runtime.model.dtype == torch.bfloat16
    assert asked == [open_source(folder).weights.count]
    assert hf.HfRuntime(folder, dtype="float32", device="cpu").model.dtype == torch.float32 and len(asked) == 1


def test_the_reference_gives_torchs_threads_back(tiny: builders.Tiny) -> None:
    before = torch.get_num_threads()
    runtime = hf.HfRuntime(tiny("llava15", "llama"), threads=before + 2)
    assert torch.get_num_threads() == before + 2
    runtime.close()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", TEXTS)
def test_hub_and_transformers_5_layouts_give_identical_files(
    tiny: builders.Tiny, tmp_path: Path, family: str, text: str
) -> None:
    for layout in ("hub", "transformers5"):
        folder = tiny(family, text, layout=layout)
        write_text(folder, tmp_path / f"model-{layout}", "f16")
        write_mmproj(folder, tmp_path / f"mmproj-{layout}", "f16")

    for kind in ("model", "mmproj"):
        assert (tmp_path / f"{kind}-hub").read_bytes() == (tmp_path / f"{kind}-transformers5").read_bytes()


@pytest.mark.parametrize("rope", builders.ROPES.values(), ids=builders.ROPES)
def test_rope_scaling_survives(tiny: builders.Tiny, copy: Callable[..., Path], tmp_path: Path, rope: Any) -> None:
    folder = copy(tiny("llava15", "smollm2"), text_config={"rope_parameters": rope})

    out = convert(folder, tmp_path / "edge", type_="f32", mmproj_type="f32")

    assert artifact.read(out).metrics["fidelity"]["mean_kld"] < 1e-6


def test_own_head_width_biases_and_exact_gelu(tiny: builders.Tiny, copy: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"head_dim": 48, "attention_bias": True, "mlp_bias": True}
    folder = copy(tiny("llava15", "llama"), text_config=changes, vision_config={"hidden_act": "gelu"})
    model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(folder))
    builders._randomise(model, seed=1)
    model.save_pretrained(folder)

    out = convert(folder, tmp_path / "edge", type_="f32", mmproj_type="f32")

    assert artifact.read(out).metrics["fidelity"]["mean_kld"] < 1e-6


def test_a_sliding_window_limits_the_context(tiny: builders.Tiny, copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy(tiny("llava15", "mistral"), text_config={"sliding_window": 1024})

    write_text(folder, tmp_path / "model.gguf", "f32")

    assert GGUFReader(tmp_path / "model.gguf").fields["llama.context_length"].contents() == 1024


@pytest.mark.parametrize("text", ["llama", "mistral"])
def test_scores_without_tokenizer_model_are_those_with_it(
    tiny: builders.Tiny, copy: Callable[..., Path], tmp_path: Path, text: str
) -> None:
    folder = copy(tiny("llava15", text))
    write_text(folder, tmp_path / "with.gguf", "f16")
    (folder / "tokenizer.model").unlink()
    write_text(folder, tmp_path / "without.gguf", "f16")

    with_model, without = (
        GGUFReader(tmp_path / f"{name}.gguf").fields["tokenizer.ggml.scores"].contents() for name in ("with", "without")
    )
    assert with_model[:440] == without[:440]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "qwen2_vl"}, "qwen2_vl"),
        ({"vision_feature_layer": [-2, -5]}, "single layer"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"projector_hidden_act": "relu"}, "projector"),
        ({"text_config": {"hidden_act": "relu"}, "vision_config": {"hidden_act": "relu"}}, "text activation 'relu'"),
        ({"text_config": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}}, "'dynamic'"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "beta_fast": 16,
                                              "original_max_position_embeddings": 64}}}, "yarn"),
        ({"text_config": {"num_hidden_layers": 3}}, "language_model.layers.2.self_attn.q_proj.weight is missing"),
        ({"text_config": {"num_hidden_layers": 1}}, "language_model.layers.1.self_attn.q_proj.weight is unknown"),
        ({"text_config": {"intermediate_size": 96}}, "gate_proj.weight is (128, 64), the configuration says (96, 64)"),
    ],
)  # fmt: skip
def test_what_cannot_become_gguf_is_refused_in_one_line(
    tiny: builders.Tiny, copy: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    folder = copy(tiny("llava15", "llama"), **changes)

    with pytest.raises(ArtifactError) as caught:
        convert(folder, tmp_path / "edge")

    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "edge").exists()


def test_all_unknown_tensors_are_listed(tiny: builders.Tiny, copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy(tiny("llava15", "llama"))

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.bias"):
            tensors[name.replace("linear", "dense")] = tensors.pop(name)

    edit_tensors(folder, rename)
    with pytest.raises(ArtifactError) as caught:
        write_mmproj(folder, tmp_path / "mmproj.gguf", "f16")

    for name in ("linear_1.weight is missing", "dense_1.weight is unknown", "linear_2.bias is missing"):
        assert name in str(caught.value)


def test_values_too_large_for_f16_are_refused(tiny: builders.Tiny, copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy(tiny("llava15", "llama"))
    edit_tensors(folder, lambda tensors: tensors["language_model.lm_head.weight"].fill_(1e6))

    with pytest.raises(ArtifactError, match=r"lm_head\.weight holds 1e\+06, beyond f16"):
        write_text(folder, tmp_path / "model.gguf", "f16")


def test_a_full_disk_shows_as_such(tiny: builders.Tiny) -> None:
    with pytest.raises(OSError) as caught:
        write(text_plan(open_source(tiny("llava15", "llama")), "f32"), Path("/dev/full"), "test")

    assert caught.value.errno == errno.ENOSPC


def test_a_fault_of_the_writer_itself_is_named_by_stage(
    tiny: builders.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tiny("llava15", "llama")
    with monkeypatch.context() as patch:
        patch.setattr(plan, "_interleave", lambda heads: lambda values: values)
        with pytest.raises(ArtifactError, match=r"logits: .* text alone differs"):
            convert(good, tmp_path / "text", type_="f32", mmproj_type="f32")
    with monkeypatch.context() as patch:
        patch.setitem(plan._VISION_LAYER, "layer_norm1", "ln2")
        patch.setitem(plan._VISION_LAYER, "layer_norm2", "ln1")
        with pytest.raises(ArtifactError, match=r"embeddings: off by .* another vision tower"):
            convert(good, tmp_path / "vision", type_="f32", mmproj_type="f32")

    assert not (tmp_path / "text").exists()
    assert not (tmp_path / "vision").exists()


def test_q4_mix_is_read_back(tiny: builders.Tiny, tmp_path: Path) -> None:
    out = quantize(tiny("llava15", "llama", hidden=256), tmp_path / "edge", "q4", mmproj_type="q8_0")

    manifest = artifact.verify(out, "gguf")
    assert {"model-Q4_K_M.gguf", "mmproj-Q8_0.gguf", "front.json"} <= {entry.path for entry in manifest.files}
    quantized = manifest.metrics["quantized"]
    assert quantized["fallbacks"] == []
    assert set(quantized["types"]) == {"Q4_K", "Q6_K", "F32"}
    assert quantized["bits_per_weight"] < 6
    assert 1e-5 < manifest.metrics["fidelity"]["mean_kld"] < 1
    assert "Q8_0" in {tensor.tensor_type.name for tensor in GGUFReader(out / "mmproj-Q8_0.gguf").tensors}


def test_fall_backs_are_named_in_the_manifest_and_the_log(
    tiny: builders.Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = quantize(tiny("llava15", "smollm2"), tmp_path / "edge", "Q4_K_M")

    fallbacks = artifact.read(out).metrics["quantized"]["fallbacks"]
    by_name = {f["tensor"]: f for f in fallbacks}
    assert by_name["blk.0.attn_q.weight"] == {
        "tensor": "blk.0.attn_q.weight", "row_length": 64, "block": 256, "wanted": "Q4_K", "got": "Q5_0"
    }  # fmt: skip
    assert by_name["token_embd.weight"]["got"] == "Q8_0"
    stored = {t.name: t.tensor_type.name for t in GGUFReader(out / "model-Q4_K_M.gguf").tensors if len(t.shape) > 1}
    assert {name: f["got"] for name, f in by_name.items()} == stored
    assert "attn_q (2): Q4_K → Q5_0, rows of 64 are no multiple of 256" in capsys.readouterr().err


def test_q8_keeps_the_answers(tiny: builders.Tiny, tmp_path: Path) -> None:
    out = quantize(tiny("llavanext", "mistral"), tmp_path / "edge", "q8")

    assert (out / "model-Q8_0.gguf").is_file()
    assert artifact.read(out).metrics["quantized"]["fallbacks"] == []
    assert artifact.read(out).metrics["fidelity"]["mean_kld"] < 1e-2


@pytest.mark.parametrize("type_", TYPES)
def test_every_type_on_offer_quantises(tiny: builders.Tiny, tmp_path: Path, type_: str) -> None:
    source = tmp_path / "full.gguf"
    write_text(tiny("llava15", "llama", hidden=256), source, "f16")

    run_quantizer(source, tmp_path / "out.gguf", Wanted(type_), 1)

    result = read_back(tmp_path / "out.gguf", type_)
    assert not result.fallbacks
    assert result.bits_per_weight < 9


@pytest.mark.parametrize(
    ("type_", "reason"),
    [("IQ2_XS", "needs --importance"), ("f16", "convert --to gguf"), ("Q5_K_XL", "choose one of Q8_0")],
)
def test_types_that_cannot_be_are_refused(tiny: builders.Tiny, tmp_path: Path, type_: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        quantize(tiny("llava15", "llama"), tmp_path / "edge", type_)


def test_bf16_weights_are_quantised_without_a_detour(
    tiny: builders.Tiny, copy: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copy(tiny("llava15", "llama"))

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: value.bfloat16() for name, value in tensors.items()})

    edit_tensors(folder, halve)
    out = quantize(folder, tmp_path / "edge", "q8")

    assert artifact.read(out).metrics["fidelity"]["mean_kld"] < 1e-2


def test_a_disk_that_fills_while_llama_cpp_writes_is_told(tiny: builders.Tiny, tmp_path: Path) -> None:
    source, target = tmp_path / "full.gguf", tmp_path / "out.gguf"
    write_text(tiny("llava15", "llama"), source, "f16")
    target.symlink_to("/dev/full")

    with pytest.raises(OSError) as caught:
        run_quantizer(source, target, Wanted("Q8_0"), 1)

    assert caught.value.errno == errno.ENOSPC
    assert not target.is_symlink()


def test_what_llama_cpp_refuses_is_told_in_one_line(tiny: builders.Tiny, tmp_path: Path) -> None:
    source = tmp_path / "full.gguf"
    write_text(tiny("llava15", "llama"), source, "f16")
    source.write_bytes(source.read_bytes()[:-1000])

    with pytest.raises(ArtifactError, match=r"could not quantise to Q8_0: .*incomplete") as caught:
        run_quantizer(source, tmp_path / "out.gguf", Wanted("Q8_0"), 1)

    assert "\n" not in str(caught.value)


def test_a_small_disk_is_refused_before_anything_is_written(tiny: builders.Tiny, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    code = (
        "from pathlib import Path; from ldrt_edge.convert.quantize import quantize\n"
        f"quantize(Path({str(tiny('llava15', 'llama'))!r}), Path({str(mount / 'edge')!r}))"
    )
    script = f'mount -t tmpfs -o size=1m tmpfs "{mount}" && exec "{sys.executable}" -c "$CODE"'
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "mount", "-t", "tmpfs", "x", mount]).returncode:
        pytest.skip("mounting a small disk needs user namespaces")

    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", script], env={**os.environ, "CODE": code}, capture_output=True, text=True
    )

    assert "ArtifactError" in done.stderr
    assert "0.00 GB free, and this needs about" in done.stderr


def test_a_killed_run_goes_on_where_it_was(tiny: builders.Tiny, tmp_path: Path) -> None:
    folder, out = tiny("llava15", "llama"), tmp_path / "edge"
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom ldrt_edge.convert import quantize\n"
        "quantize.run_quantizer = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"quantize.quantize(Path({str(folder)!r}), Path({str(out)!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    assert not out.exists()
    left = tmp_path / ".edge.partial" / ".full-precision.gguf"
    before = left.stat()
    os.utime(left, ns=(before.st_atime_ns, 1))  # rewriting it would give it a new time

    again = subprocess.run(
        [sys.executable, "-c", code.replace("quantize.run_quantizer = ", "stamp = ")
         + f"\nprint(Path({str(out)!r}, 'model-Q4_K_M.gguf').is_file())"],
        capture_output=True, text=True,
    )  # fmt: skip

    assert again.stdout.strip() == "True"
    assert "GGUF full precision" not in again.stderr
    assert not left.parent.exists()
    assert sorted(p.name for p in out.iterdir() if p.name.startswith(".")) == []


def test_the_same_command_again_finds_its_result(tiny: builders.Tiny, tmp_path: Path) -> None:
    first = quantize(tiny("llava15", "llama"), tmp_path / "edge", "q8")
    before = (first / artifact.MANIFEST).stat().st_mtime_ns

    assert quantize(tiny("llava15", "llama"), tmp_path / "edge", "q8") == first
    assert (first / artifact.MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match="other settings or inputs"):
        quantize(tiny("llava15", "llama"), tmp_path / "edge", "q4")


def test_probes_are_the_same_every_time(tiny: builders.Tiny) -> None:
    front = Front.load(tiny("llavanext", "smollm2"))

    once, again = probes(front, 3), probes(front, 3)

    assert [p.ids for p, _ in once] == [p.ids for p, _ in again]
    assert all(np.array_equal(a.images[0].tiles, b.images[0].tiles) for (a, _), (b, _) in zip(once, again, strict=True))
    assert len({p.images[0].tiles.shape[0] for p, _ in once}) > 1  # several shapes of picture
