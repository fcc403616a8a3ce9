"""Parity: every export on every runtime answers as its model does, and each planted fault is named."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny as builders
import torch
from click.testing import CliRunner
from crashing import crash
from tiny import edit_tensors

from ldrt_edge import artifact, golden
from ldrt_edge.cli import cli
from ldrt_edge.convert import apps, gguf, mlx, parity_report
from ldrt_edge.convert.exports import open_export
from ldrt_edge.convert.observation import Fidelity
from ldrt_edge.convert.parity import Pair, parity
from ldrt_edge.convert.plan import FilePlan, TensorPlan, text_plan
from ldrt_edge.convert.probes import probes
from ldrt_edge.convert.quantize import quantize
from ldrt_edge.convert.source import open_source
from ldrt_edge.convert.stock import Peer
from ldrt_edge.errors import ArtifactError, ConfigError
from ldrt_edge.front import Front, Message
from ldrt_edge.runtimes import llamacpp_models
from ldrt_edge.runtimes.base import Sampling, load
from ldrt_edge.runtimes.cached import CachedRuntime
from ldrt_edge.runtimes.hf import HfRuntime
from ldrt_edge.runtimes.llamacpp import LlamaCppRuntime
from ldrt_edge.runtimes.llamacpp_bindings import VisionGraph
from ldrt_edge.runtimes.mlx import MlxRuntime

HAS_MLX = importlib.util.find_spec("mlx") is not None
needs_mlx = pytest.mark.skipif(not HAS_MLX, reason="the mlx extra is not installed")
ON_BOTH = pytest.mark.parametrize("to", ["gguf", pytest.param("mlx", marks=needs_mlx)])
FAMILIES = ("llava15", "llavanext")
TEXTS = ("llama", "mistral", "smollm2")
Plant = Callable[[Path], None]


@needs_mlx
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", TEXTS)
def test_every_type_on_every_runtime(tiny: builders.Tiny, tmp_path: Path, family: str, text: str) -> None:
    source = tiny(family, text)
    exports = [
        gguf.convert(source, tmp_path / "gguf-f32", "f32"), gguf.convert(source, tmp_path / "gguf-f16", "f16"),
        quantize(source, tmp_path / "gguf-q8", "q8"), quantize(source, tmp_path / "gguf-q4", "q4"),
        mlx.convert(source, tmp_path / "mlx-f32", "f32"), mlx.convert(source, tmp_path / "mlx-f16", "f16"),
        mlx.quantize(source, tmp_path / "mlx-q8", "q8"), mlx.quantize(source, tmp_path / "mlx-q4", "q4"),
    ]  # fmt: skip

    pairs = {pair.subject: pair for pair in parity(source, [source, *exports])}

    assert [pair.stage for pair in pairs.values()] == [None] * 9
    kld = {name: pair.fidelity.mean_kld for name, pair in pairs.items() if pair.fidelity}
    assert pairs.pop(source.name).runtime == "hf"
    assert kld["gguf-f32"] < 1e-6 and kld["mlx-f32"] < 1e-9
    assert kld["gguf-f16"] < 5e-5 and kld["mlx-f16"] < 5e-5
    assert kld["gguf-q8"] < 1e-2 < 2 * kld["gguf-q4"] < 2
    assert kld["mlx-q8"] < 1e-2 < 2 * kld["mlx-q4"] < 2
    for name, pair in pairs.items():
        assert pair.pixels_equal and pair.prompt_equal
        assert "f32" not in name or pair.answers_equal == pair.answers
        assert pair.runtime == ("mlx" if name.startswith("mlx") else "llamacpp")


@pytest.mark.slow
def test_the_starter_passes_its_gates_where_stock_parts_are_off(starter: Path, tmp_path: Path) -> None:
    exports = [gguf.convert(starter, tmp_path / type_, type_) for type_ in ("f32", "f16")]  # MLX's: test_mlx.py

    pairs = parity(starter, exports, peers=True)

    own = [pair for pair in pairs if not pair.peer]
    assert [pair.stage for pair in own] == [None, None]
    assert own[0].fidelity and own[0].fidelity.mean_kld < 1e-6
    stock = next(pair for pair in pairs if pair.runtime == "llama-cpp-python")
    assert stock.fidelity and stock.fidelity.mean_kld > 1e-2, "stock parts are right now: say so in the README"


@needs_mlx
@pytest.mark.parametrize("family", FAMILIES)
def test_several_pictures_and_turns(tiny: builders.Tiny, tmp_path: Path, family: str) -> None:
    source = tiny(family, "smollm2")
    front = Front.load(source)
    rng = np.random.default_rng(0)
    shapes = ((56, 56), (150, 40), (40, 150), (5, 6))
    seen = [front.image(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    messages = [
        Message("user", "What is in these images?", (seen[0], seen[1])), Message("assistant", "Two beams."),
        Message("user", "And in this one?", (seen[2],)), Message("assistant", "A table."),
        Message("user", "Which side is treated?", (seen[3],)),
    ]  # fmt: skip
    prompt = front.prompt(messages)
    answer = front.answer_ids(messages, "The left knee, with a dose of 3.0 Gy.")
    said, scored = [], []
    edges = gguf.convert(source, tmp_path / "g", "f32"), mlx.convert(source, tmp_path / "m", "f32")
    for runtime in (HfRuntime(source), LlamaCppRuntime(edges[0], exact=True), MlxRuntime(edges[1])):
        scored.append(runtime.score(prompt, answer))
        said.append([token.id for token in runtime.generate(prompt, Sampling(max_tokens=12))])
        runtime.close()

    assert said[0] == said[1] == said[2]
    assert max(np.abs(scored[0] - other).max() for other in scored[1:]) < 5e-3


def edit_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    for key, value in changes.items():
        data[key] = data[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(data))


def swap_projector(folder: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("weight", "bias"):
            first, second = (f"multi_modal_projector.linear_{i}.{part}" for i in (1, 2))
            tensors[first], tensors[second] = tensors[second], tensors[first]

    edit_tensors(folder, swap)


def reverse_colours(folder: Path) -> None:
    def reverse(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("patch_embedding.weight"))
        tensors[name] = tensors[name].flip(1).contiguous()

    edit_tensors(folder, reverse)


def lose_newline(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors[next(n for n in tensors if n.endswith("image_newline"))].zero_())


def copy_of_another_layer(folder: Path) -> None:
    def duplicate(tensors: dict[str, torch.Tensor]) -> None:
        first, second = (f"layers.{i}.mlp.down_proj.weight" for i in (0, 1))
        names = [next(n for n in tensors if "language_model" in n and n.endswith(end)) for end in (first, second)]
        tensors[names[0]] = tensors[names[1]].clone()

    edit_tensors(folder, duplicate)


def move_feature_layer(folder: Path) -> None:
    edit_json(folder / "config.json", vision_feature_layer=-3)


def change_rope(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 5e5
    (folder / "config.json").write_text(json.dumps(config))


def change_mean(folder: Path) -> None:
    edit_json(folder / "processor_config.json", image_processor={"image_mean": [0.4, 0.4, 0.4]})


def add_space(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    text = path.read_text()
    assert "part['text']" in text
    path.write_text(text.replace("part['text']", "part['text'] + ' '", 1))


FAULTS: Sequence[tuple[str, Plant, tuple[str, str], tuple[str, str]]] = (
    ("llava15", swap_projector, ("embeddings", "projector's two layers are swapped"), ("embeddings", "are swapped")),
    ("llava15", reverse_colours, ("embeddings", "BGR"), ("embeddings", "BGR")),
    ("llavanext", lose_newline, ("embeddings", "newline embedding is zero"), ("embeddings", "embedding is zero")),
    ("llava15", copy_of_another_layer, ("logits", "it holds blk.1.ffn_down"), ("logits", "layers.1.mlp.down_proj")),
    ("llava15", move_feature_layer, ("settings", "clip.vision.block_count"), ("settings", "tower layers is 1, the")),
    ("llavanext", change_rope, ("settings", "llama.rope.freq_base is 5"), ("settings", "text rope_theta is 5")),
    ("llava15", change_mean, ("settings", "clip.vision.image_mean"), ("pixels", "image_mean is (0.4, 0.4, 0.4)")),
    ("llava15", add_space, ("settings", "tokenizer.chat_template"), ("prompt", "217 tokens, the model's")),
)  # fmt: skip


@ON_BOTH
@pytest.mark.parametrize(("family", "plant", "in_gguf", "in_mlx"), FAULTS, ids=[fault[1].__name__ for fault in FAULTS])
def test_a_planted_fault_is_named(
    tiny: builders.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, family: str, plant: Plant,
    in_gguf: tuple[str, str], in_mlx: tuple[str, str],
) -> None:  # fmt: skip
    good = tiny(family, "smollm2")
    faulty = tmp_path / "faulty"
    shutil.copytree(good, faulty)
    plant(faulty)

    pair = one(good, unchecked(faulty, tmp_path / "edge", to, monkeypatch))

    stage, words = in_gguf if to == "gguf" else in_mlx
    assert pair.stage == stage
    assert pair.fault and words in pair.fault


def test_a_quantised_export_cannot_hide_a_wrong_setting(
    tiny: builders.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, faulty = tiny("llava15", "llama"), tmp_path / "faulty"
    shutil.copytree(good, faulty)
    change_rope(faulty)
    monkeypatch.setattr("ldrt_edge.convert.quantize.check", no_check)

    pair = one(good, quantize(faulty, tmp_path / "edge", "q4"))

    assert pair.stage == "settings" and pair.fault and "rope.freq_base" in pair.fault


@ON_BOTH
def test_a_quantised_export_cannot_hide_a_wrong_tensor(
    tiny: builders.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    good, faulty = tiny("llava15", "llama"), tmp_path / "faulty"
    shutil.copytree(good, faulty)
    copy_of_another_layer(faulty)
    monkeypatch.setattr("ldrt_edge.convert.quantize.check", no_check)
    monkeypatch.setattr("ldrt_edge.convert.mlx.check", no_check)

    edge = (quantize if to == "gguf" else mlx.quantize)(faulty, tmp_path / "edge", "q4")
    pair = one(good, edge)

    assert pair.stage == "logits" and pair.fault and "off its source: it holds" in pair.fault
    assert one(faulty, edge).stage is None


def test_a_runtime_that_steps_otherwise_than_it_reads_is_named(
    tiny: builders.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("llava15", "llama")
    edge = gguf.convert(source, tmp_path / "edge", "f16")
    right = CachedRuntime._step
    monkeypatch.setattr(LlamaCppRuntime, "_step", lambda self, token: right(self, token)[::-1].copy())

    pair = one(source, edge)

    assert pair.stage == "answers" and pair.fault and "not what the runtime itself ranks first" in pair.fault


def test_a_runtime_with_the_class_token_out_of_order_is_named(
    tiny: builders.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("llava15", "llama")
    edge = gguf.convert(source, tmp_path / "edge", "f16")
    assert one(source, edge).stage is None

    class Stock(VisionGraph):
        def _see(self, address: int, ask: bool, _user_data: object) -> bool:
            return not ask

    monkeypatch.setattr(llamacpp_models, "VisionGraph", Stock)
    pair = one(source, edge)

    assert pair.stage == "embeddings"
    assert pair.fault and "the class token stands behind the patches" in pair.fault


def test_somebody_elses_pair_is_read(tiny: builders.Tiny, tmp_path: Path) -> None:
    source, other = tiny("llavanext", "mistral"), tmp_path / "download"
    edge = gguf.convert(source, tmp_path / "edge", "f16")
    other.mkdir()
    shutil.copy(edge / "model-F16.gguf", other / "llava-v1.6.gguf")
    shutil.copy(edge / "mmproj-F16.gguf", other / "llava-v1.6-mmproj.gguf")

    same = one(source, other)
    another = one(tiny("llavanext", "mistral", seed=1), other)

    assert same.stage is None and same.fidelity and same.fidelity.mean_kld < 5e-4
    assert same.prompt_equal is True, "the file's own template was rendered"
    assert another.stage == "embeddings"

    def others_do(plan: FilePlan) -> FilePlan:
        """Fewer rows of vocabulary, a template for text alone, no word about types."""
        writer = plan.metadata
        keys = writer.kv_data[0]
        rows = len(keys["tokenizer.ggml.tokens"].value) - 3
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
            keys[key].value = keys[key].value[:rows]
        keys["llama.vocab_size"].value = rows
        keys["tokenizer.chat_template"].value = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        del keys["general.file_type"]
        return replace(plan, tensors=tuple(map(lambda tensor: shortened(tensor, rows), plan.tensors)))

    def shortened(tensor: TensorPlan, rows: int) -> TensorPlan:
        if tensor.name not in ("token_embd.weight", "output.weight"):
            return tensor
        return replace(tensor, shape=(rows, tensor.shape[1]), rearrange=lambda values: values[:rows])

    gguf.write(others_do(text_plan(open_source(source), "f16")), other / "llava-v1.6.gguf", "test")
    shorter = one(source, other)

    assert (shorter.stage, shorter.prompt_equal, shorter.weights) == (None, None, "f16")
    assert shorter.fidelity and shorter.fidelity.mean_kld < 5e-4


@needs_mlx
def test_peers_stand_in_the_table_and_are_not_judged(tiny: builders.Tiny, tmp_path: Path) -> None:
    source = tiny("llava15", "smollm2")
    edges = [gguf.convert(source, tmp_path / "g", "f32"), mlx.convert(source, tmp_path / "m", "f32")]

    pairs = parity(source, edges, peers=True)

    peers = {pair.runtime: pair for pair in pairs if pair.peer}
    stock = peers["llama-cpp-python"]
    assert stock.fidelity and stock.fidelity.mean_kld > 1e-2, "stock llama.cpp puts the class token in the wrong place"
    assert parity_report.passed(pairs)
    if "mlx-vlm" in peers:
        assert peers["mlx-vlm"].fidelity and peers["mlx-vlm"].fidelity.mean_kld < 1e-6
    if "xllamacpp" in peers:
        assert peers["xllamacpp"].answers_equal is not None


def test_a_peer_that_crashes_takes_nothing_along(tiny: builders.Tiny) -> None:
    source = tiny("llava15", "smollm2")
    front = Front.from_hf(source)
    probes(front, 1)  # compiles the template, which cannot be handed to another process

    with pytest.raises(RuntimeError, match="it crashed"):
        Peer("crashing", crash).observe(open_export(source, front), [], [], [])


def test_the_command_prints_a_table_and_fails_where_a_gate_does(
    tiny: builders.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, faulty = tiny("llava15", "smollm2"), tmp_path / "faulty"
    shutil.copytree(good, faulty)
    swap_projector(faulty)
    right = gguf.convert(good, tmp_path / "right", "f32")
    wrong = unchecked(faulty, tmp_path / "wrong", "gguf", monkeypatch)

    passed = CliRunner().invoke(cli, ["parity", str(good), str(right), "--json"])
    failed = CliRunner().invoke(cli, ["parity", str(good), str(right), str(wrong), "--out", str(tmp_path / "table")])

    [pair] = json.loads(passed.stdout)["pairs"]
    assert json.loads(passed.stdout)["passed"]
    assert set(pair) >= {
        "reference", "subject", "runtime", "stage", "max_abs_logit_diff", "mean_kld", "top1_agreement", "prompt_equal",
        "pixels_equal",
    }  # fmt: skip
    assert isinstance(failed.exception, ArtifactError) and "wrong: embeddings" in str(failed.exception)
    assert "| right | llamacpp | f32 | equal | equal |" in failed.stdout
    assert artifact.read(tmp_path / "table").metrics == {"passed": False}
    assert json.loads((tmp_path / "table" / "parity.json").read_text())["passed"] is False


@ON_BOTH
def test_golden_answers_are_replayed_without_the_model_or_torch(
    tiny: builders.Tiny, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("llavanext", "llama")
    edge = (gguf.convert if to == "gguf" else mlx.convert)(source, tmp_path / "edge", "f16")
    monkeypatch.setitem(sys.modules, "torch", None)

    found = golden.replay(edge)

    assert len(found) == 4 and not any(entry.fault for entry in found)
    assert all(entry.answer == entry.expected for entry in found)
    assert any(entry.expected for entry in found), "empty answers prove nothing"


def test_a_changed_export_does_not_say_what_it_said(tiny: builders.Tiny, tmp_path: Path) -> None:
    edge = gguf.convert(tiny("llava15", "llama"), tmp_path / "edge", "f16")
    records = edge / "golden" / "records.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    lines[0]["answer_ids"][0] += 1
    lines[0]["margins"][0] = 3.0
    lines[1] |= {"answer_ids": [lines[1]["answer_ids"][0] + 1], "margins": [0.01]}
    lines[2]["tiles_sha256"] = "0" * 64
    lines[3]["prompt_ids"].append(1)
    front = Front.load(edge)
    runtime = load(edge)
    found = [golden._replay(runtime, front, edge, golden._record(line)) for line in lines]
    runtime.close()

    assert [entry.fault and entry.fault.split(" is ")[0] for entry in found] == [
        "the answer", None, "the picture", "the prompt has other tokens than it had",
    ]  # fmt: skip
    for text in ("{}\n", "[]\n", "", json.dumps(lines[0] | {"image": ".."})):
        records.write_text(text)
        with pytest.raises(ArtifactError, match=r"records\.jsonl"):
            golden.read_records(edge)


def no_check(_merged: Path, _folder: Path) -> Fidelity:
    return Fidelity(0.0, 0.0, 1.0, 0.0, 0, 0.0, 0.0)


def unchecked(source: Path, out: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An f32 export that nobody held against anything."""
    monkeypatch.setattr(f"ldrt_edge.convert.{to}.check", no_check)
    return (gguf.convert if to == "gguf" else mlx.convert)(source, out, "f32")


def one(reference: Path, edge: Path) -> Pair:
    [pair] = parity(reference, [edge])
    return pair


def test_an_export_is_laid_out_for_ollama(
    tiny: builders.Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edge = gguf.convert(tiny("llava15", "smollm2"), tmp_path / "knee", "f16")

    out = apps.for_app(edge, "ollama", tmp_path / "out")

    assert {entry.path for entry in artifact.verify(out, "app").files} == {
        "Modelfile", "model-F16.gguf", "mmproj-F16.gguf"
    }  # fmt: skip
    text = (out / "Modelfile").read_text()
    assert text.startswith("FROM ./model-F16.gguf\nFROM ./mmproj-F16.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    front = Front.load(edge)
    turns = [("user", "one"), ("assistant", "two"), ("user", "three")]
    assert go_template(text, turns) == front.render([Message(role, said) for role, said in turns])
    assert "class token stands behind the patches" in capsys.readouterr().err


@needs_mlx
def test_an_export_is_laid_out_for_lm_studio(tiny: builders.Tiny, tmp_path: Path) -> None:
    source = tiny("llavanext", "mistral")
    exports = gguf.convert(source, tmp_path / "knee", "f16"), mlx.convert(source, tmp_path / "knee-mlx", "f16")

    g, m = (apps.for_app(edge, "lmstudio", tmp_path / f"{edge.name}-out") for edge in exports)

    assert {path.name for path in (g / "ldrt-edge" / "knee").iterdir()} == {"knee-F16.gguf", "mmproj-knee-F16.gguf"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (m / "ldrt-edge" / "knee-mlx").iterdir()
    }
    with pytest.raises(ConfigError, match="ollama reads GGUF"):
        apps.for_app(exports[1], "ollama", tmp_path / "no")
    text = apps.modelfile(Front.load(exports[0]), "a", "b", True)
    assert "[INST] one [/INST]" in go_template(text, [("user", "one")])


def go_template(modelfile: str, turns: Sequence[tuple[str, str]]) -> str:
    """What ollama makes of the one form of template that is written here."""
    template = modelfile.split('TEMPLATE """')[1].split('"""')[0]
    inner = re.fullmatch(r"\{\{- range \$i, \$message := \.Messages }}(.*)\{\{ end }}", template, re.DOTALL)
    assert inner
    user = re.match(
        r'\{\{ if eq \.Role "user" }}\{\{ if \$i }}(.*?)\{\{ else }}(.*?)\{\{ end }}\{\{ \.Content }}(.*?)'
        r'\{\{ else if eq \.Role "assistant" }}(.*?)\{\{ \.Content }}\{\{ end }}',
        inner[1], re.DOTALL,
    )  # fmt: skip
    assert user
    between, first, behind, before_answer = user.groups()
    text = ""
    for number, (role, said) in enumerate(turns):
        text += f"{between if number else first}{said}{behind}" if role == "user" else before_answer + said
    return text
