"""MLX folders compute what the checkpoint computes, here and in stock mlx-vlm; bad ones are refused in one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn
import mlx_vlm
import numpy as np
import pytest
import tiny as builders
import torch
from mlx.utils import tree_flatten
from mlx_vlm.utils import load_model
from numpy.typing import NDArray
from tiny import edit_tensors
from tokenizers import Tokenizer
from transformers import LlavaConfig, LlavaForConditionalGeneration

from ldrt_edge import artifact
from ldrt_edge.chat.terminal import ask_once
from ldrt_edge.convert.fallbacks import report
from ldrt_edge.convert.mlx import Mlx, convert, quantize, write
from ldrt_edge.convert.mlx_plan import SCHEMES, mlx_plan
from ldrt_edge.convert.observation import compare
from ldrt_edge.convert.planned import quantize_planned
from ldrt_edge.convert.probes import probes, text_probes
from ldrt_edge.convert.source import open_source
from ldrt_edge.convert.type_plan import TypePlan
from ldrt_edge.convert.weights import canonical
from ldrt_edge.errors import ArtifactError, ConfigError, DataError, RuntimeLoadError
from ldrt_edge.fidelity import compare_logits
from ldrt_edge.front import Message
from ldrt_edge.runtimes import mlx as mlx_runtime
from ldrt_edge.runtimes.base import Prompt, Sampling, load
from ldrt_edge.runtimes.hf import HfRuntime, normalise
from ldrt_edge.runtimes.mlx import MlxRuntime
from ldrt_edge.runtimes.mlx_host import use_numpy

FAMILIES = ("llava15", "llavanext")
TEXTS = ("llama", "mistral", "smollm2")
Folder = Callable[..., Path]


@pytest.fixture(scope="session")
def folder(tiny: builders.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Makes an MLX folder of a tiny model, once for each: `folder("llava15", "llama", "q4")`."""
    made: dict[tuple[str, ...], Path] = {}

    def make(family: str, text: str, type_: str = "f32") -> Path:
        if (family, text, type_) not in made:
            made[family, text, type_] = write_folder(tiny(family, text), tmp_path_factory.mktemp("mlx"), type_)
        return made[family, text, type_]

    return make


@pytest.fixture
def runtime(folder: Folder) -> Iterator[MlxRuntime]:
    loaded = MlxRuntime(folder("llava15", "llama"))
    yield loaded
    loaded.close()


def write_folder(source: Path, out: Path, type_: str = "f32", shard_bytes: int = 1 << 30) -> Path:
    opened = open_source(source)
    write(opened, mlx_plan(opened, type_), out, shard_bytes)
    return out


def picture(seed: int, height: int = 90, width: int = 70) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ask(runtime: MlxRuntime | HfRuntime, question: str, *seeds: int) -> Prompt:
    images = tuple(runtime.front.image(picture(seed)) for seed in seeds)
    return runtime.front.prompt([Message("user", question, images)])


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", TEXTS)
def test_f32_computes_what_the_checkpoint_computes(
    tiny: builders.Tiny, folder: Folder, family: str, text: str
) -> None:
    reference, subject = HfRuntime(tiny(family, text)), MlxRuntime(folder(family, text))

    behind_pictures = compare(reference, subject, probes(reference.front, 5))
    alone = compare(reference, subject, text_probes(reference.front))

    for fidelity in (behind_pictures, alone):
        assert fidelity.max_abs_logit_diff <= 5e-3
        assert fidelity.mean_kld <= 1e-6
        assert fidelity.top1_agreement == 1
    assert behind_pictures.embedding_rel_error < 1e-5
    reference.close()
    subject.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", TEXTS)
def test_greedy_answers_are_the_references(tiny: builders.Tiny, folder: Folder, family: str, text: str) -> None:
    reference, subject = HfRuntime(tiny(family, text)), MlxRuntime(folder(family, text))
    prompt = ask(reference, "What is in this image?", 1)

    expected = [token.id for token in reference.generate(prompt, Sampling(max_tokens=24))]
    found = [token.id for token in subject.generate(prompt, Sampling(max_tokens=24))]

    assert found == expected
    assert subject.timings.prefill_tokens == len(prompt.ids)
    assert subject.timings.decode_tokens >= len(found) - 1
    reference.close()
    subject.close()


def test_the_hubs_layout_gives_the_same_folder(tiny: builders.Tiny, folder: Folder, tmp_path: Path) -> None:
    write_folder(tiny("llavanext", "mistral", layout="hub"), tmp_path)

    assert (tmp_path / "model.safetensors").read_bytes() == (
        folder("llavanext", "mistral") / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("type_", ["f16", "bf16", *SCHEMES])
def test_every_type_loses_no_more_than_its_bits(tiny: builders.Tiny, folder: Folder, type_: str) -> None:
    most = {"f16": 1e-5, "bf16": 1e-3, "q8": 1e-2, "mixed_3_6": 2, "mixed_3_4": 2}.get(type_, 0.5)
    reference, subject = HfRuntime(tiny("llavanext", "llama")), MlxRuntime(folder("llavanext", "llama", type_))

    kld = compare(reference, subject, probes(reference.front, 2)).mean_kld

    assert 1e-8 < kld < most
    reference.close()
    subject.close()


@pytest.mark.parametrize("type_", SCHEMES)
def test_quantised_layers_compute_with_the_values_that_are_stored(
    tiny: builders.Tiny, folder: Folder, copy: Callable[..., Path], type_: str
) -> None:
    subject, rounded = MlxRuntime(folder("llava15", "mistral", type_)), copy(tiny("llava15", "mistral"))
    values = dict(tree_flatten(subject.network.parameters()))
    for path, layer in subject.network.named_modules():
        if hasattr(layer, "bits"):
            quantisation = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
            values[f"{path}.weight"] = mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **quantisation)
    by_name = {canonical(name): torch.from_numpy(np.array(value.astype(mx.float32))) for name, value in values.items()}

    def round_(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            value = by_name.get(canonical(name), tensors[name])
            tensors[name] = value.permute(0, 3, 1, 2).contiguous() if "patch_embedding" in name else value

    edit_tensors(rounded, round_)
    reference = HfRuntime(rounded)
    assert compare(reference, subject, probes(reference.front, 2)).mean_kld < 1e-8
    reference.close()
    subject.close()


def test_more_bits_lose_less(tiny: builders.Tiny, folder: Folder) -> None:
    reference, klds = HfRuntime(tiny("llava15", "llama")), []
    for type_ in ("f16", "q8", "mixed_4_6", "q4", "mixed_3_4"):
        subject = MlxRuntime(folder("llava15", "llama", type_))
        klds.append(compare(reference, subject, probes(reference.front)).mean_kld)
        subject.close()

    assert klds == sorted(klds)
    reference.close()


def test_several_pictures_over_several_turns(tiny: builders.Tiny, folder: Folder) -> None:
    reference, subject = HfRuntime(tiny("llavanext", "smollm2")), MlxRuntime(folder("llavanext", "smollm2"))
    front = reference.front
    first, second, third = (front.image(picture(seed, 60 + 40 * seed, 150)) for seed in range(3))
    messages = [
        Message("user", "How many beams are used?", (first,)), Message("assistant", "Three beams."),
        Message("user", "Which side is treated?", (second, third)),
    ]  # fmt: skip
    for turns in (messages[:1], messages):
        prompt, answer = front.prompt(turns), front.answer_ids(turns, "The left side.")
        assert np.abs(subject.score(prompt, answer) - reference.score(prompt, answer)).max() < 1e-3
        assert subject.timings.reused_tokens == reference.timings.reused_tokens
    assert subject.timings.reused_tokens > first.token_count
    reference.close()
    subject.close()


def test_a_second_question_reuses_the_picture(runtime: MlxRuntime, folder: Folder) -> None:
    first, second = ask(runtime, "How many beams are used?", 3), ask(runtime, "Which side is treated?", 3)
    answer = (5, 6, 7)
    runtime.score(first, answer)
    list(runtime.generate(first, Sampling(max_tokens=300)))  # beyond what the cache was first made for

    found = runtime.score(second, answer)

    assert runtime.timings.reused_tokens > first.images[0].token_count
    fresh = MlxRuntime(folder("llava15", "llama"))
    assert np.abs(found - fresh.score(second, answer)).max() < 1e-4
    fresh.close()


def test_a_long_prompt_goes_through_in_chunks(tiny: builders.Tiny, folder: Folder) -> None:
    reference, subject = HfRuntime(tiny("llava15", "mistral")), MlxRuntime(folder("llava15", "mistral"))
    prompt = ask(reference, "How many beams are used? " * 100, 1)
    assert len(prompt.ids) > 2 * mlx_runtime._CHUNK
    answer = tuple(range(3, 403)) * 2  # more than a chunk of wanted logits

    assert np.abs(subject.score(prompt, answer) - reference.score(prompt, answer)).max() < 1e-3
    reference.close()
    subject.close()


def test_ctrl_c_stops_a_prefill_and_harms_nothing(runtime: MlxRuntime, folder: Folder) -> None:
    long, short = ask(runtime, "How many beams are used? " * 300, 1), ask(runtime, "Which side?", 1)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.03)
    try:
        with pytest.raises(KeyboardInterrupt):
            while True:
                runtime.score(long, (5,))
                runtime.score(short, (5,))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    fresh = MlxRuntime(folder("llava15", "llama"))
    for prompt in (short, long):
        assert np.abs(runtime.score(prompt, (5,)) - fresh.score(prompt, (5,))).max() < 1e-4
    fresh.close()


def test_the_context_ends_at_the_models_and_at_4096(
    tiny: builders.Tiny, copy: Callable[..., Path], tmp_path: Path, runtime: MlxRuntime
) -> None:
    windowed = copy(tiny("llava15", "mistral"), text_config={"sliding_window": 128})
    (tmp_path / "mlx").mkdir()
    small = MlxRuntime(write_folder(windowed, tmp_path / "mlx"))

    assert runtime.context_length == 4096
    assert small.context_length == 128
    with pytest.raises(DataError, match="the model holds 128"):
        small.score(ask(small, "How many beams are used? " * 20), (5,))
    small.close()


@pytest.mark.parametrize("rope", builders.ROPES.values(), ids=builders.ROPES)
def test_rope_scaling_survives(tiny: builders.Tiny, copy: Callable[..., Path], tmp_path: Path, rope: Any) -> None:
    source, out = copy(tiny("llava15", "smollm2"), text_config={"rope_parameters": rope}), tmp_path / "mlx"
    out.mkdir()
    reference, subject = HfRuntime(source), MlxRuntime(write_folder(source, out))

    assert compare(reference, subject, probes(reference.front, 2)).mean_kld < 1e-6
    reference.close()
    subject.close()


def with_changed_architecture(source: Path, **text: Any) -> None:
    edit_config(source, text_config=json.loads((source / "config.json").read_text())["text_config"] | text)
    model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(source))
    builders._randomise(model, seed=1)
    model.save_pretrained(source)


def test_own_head_width_biases_exact_gelu_and_epsilon(
    tiny: builders.Tiny, copy: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = copy(tiny("llava15", "llama"), vision_config={"hidden_act": "gelu", "layer_norm_eps": 1e-2}), tmp_path
    with_changed_architecture(source, head_dim=48, attention_bias=True, mlp_bias=True)
    reference, subject = HfRuntime(source), MlxRuntime(write_folder(source, out))

    fidelity = compare(reference, subject, probes(reference.front, 2))

    assert fidelity.embedding_rel_error < 1e-5
    assert fidelity.mean_kld < 1e-6
    reference.close()
    subject.close()


@pytest.mark.parametrize("type_", ["f32", "q4", "mixed_4_6", "mxfp4"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", TEXTS)
def test_stock_mlx_vlm_loads_our_folders(folder: Folder, family: str, text: str, type_: str) -> None:
    ours, stock = MlxRuntime(folder(family, text, type_)), load_model(folder(family, text, type_))

    ids = mx.array([list(ask(ours, "How many beams are used?").ids)])
    found = stock.language_model(ids).logits[0]
    network = ours.network
    expected = network.logits(network.hidden(network.embed(ids[0]), network.language_model.make_cache()))

    assert mx.abs(found - expected).max().item() < (1e-4 if type_ == "f32" else 0.1)  # stock computes in half
    ours.close()


def planned(source: Path, out: Path) -> Path:
    """An MLX folder with many types side by side, in the tower and in the projector too."""
    model = {"*.0.self_attn.*": "affine-3-g32", "*.layers.0.*": "f16", "*.mlp.*": "affine-5-g64", "*": "affine-4-g32"}
    vision = {"*.encoder.layers.0.*": "affine-6-g64", "multi_modal_projector.linear_1": "f16", "*": "affine-8-g32"}
    return quantize_planned(source, out, TypePlan("mlx", {"model": model, "vision": vision}), Mlx())


def test_stock_mlx_vlm_loads_a_plans_folder(tiny: builders.Tiny, tmp_path: Path) -> None:
    out = planned(tiny("llavanext", "mistral"), tmp_path / "edge")
    ours, stock = MlxRuntime(out), load_model(out)

    def scheme(layer: Any) -> Any:
        return getattr(layer, "bits", None), getattr(layer, "group_size", None)

    for path, layer in ours.network.named_modules():
        if path.endswith(("_proj", "fc1", "fc2", "linear_1", "linear_2", "lm_head", "embed_tokens")):
            theirs = stock
            for name in path.split("."):
                theirs = theirs[int(name)] if name.isdigit() else getattr(theirs, name)
            assert scheme(theirs) == scheme(layer), path
    tower, projector = ours.network.vision_tower.vision_model.encoder.layers, ours.network.multi_modal_projector
    assert (scheme(tower[0].mlp.fc1), scheme(tower[1].mlp.fc1)) == ((6, 64), (8, 32))
    assert (scheme(projector.linear_1), scheme(projector.linear_2)) == ((None, None), (8, 32))
    assert artifact.read(out).metrics["fidelity"]["embedding_rel_error"] < 0.05
    ours.close()


@pytest.mark.parametrize("folders", [*TEXTS, "planned"])
def test_stock_mlx_vlm_answers_behind_a_picture_as_we_do(
    tiny: builders.Tiny, folder: Folder, tmp_path: Path, folders: str
) -> None:
    edge = planned(tiny("llava15", "llama"), tmp_path / "edge") if folders == "planned" else folder("llava15", folders)
    ours, (stock, processor) = MlxRuntime(edge), mlx_vlm.load(str(edge))
    prompt = ask(ours, "What is in this image?", 1)
    pixels = normalise(torch.from_numpy(prompt.images[0].tiles), ours.front, "cpu").numpy()

    found = stock(mx.array([list(prompt.ids)]), mx.array(pixels), None).logits[0, -1]

    allowed = 0.1 if folders == "planned" else 1e-3  # stock computes in half where scales are half
    assert np.abs(np.array(found) - ours.score(prompt, (5,))[0]).max() < allowed
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == prompt.image_token_id
    ours.close()


def test_shards_load_here_and_in_mlx_vlm(tiny: builders.Tiny, folder: Folder, tmp_path: Path) -> None:
    out = write_folder(tiny("llavanext", "llama"), tmp_path, "q4", shard_bytes=50_000)

    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == names
    load_model(out)
    whole, sharded = MlxRuntime(folder("llavanext", "llama", "q4")), MlxRuntime(out)
    prompt = ask(whole, "What is in this image?", 1)
    assert np.array_equal(whole.score(prompt, (5,)), sharded.score(prompt, (5,)))
    (out / names[1]).unlink()
    with pytest.raises(RuntimeLoadError, match="is missing"):
        MlxRuntime(out)
    whole.close()
    sharded.close()


def test_a_folder_that_mlx_vlm_quantised_loads(tiny: builders.Tiny, tmp_path: Path) -> None:
    from mlx_vlm.convert import convert as stock_convert

    source = tiny("llava15", "llama", layout="hub")
    stock_convert(str(source), str(tmp_path / "stock"), quantize=True, q_bits=8, dtype="float32")

    reference, subject = HfRuntime(source), MlxRuntime(tmp_path / "stock")

    assert "language_model.model.layers.0.mlp.up_proj.scales" in mx.load(str(tmp_path / "stock" / "model.safetensors"))
    assert 1e-6 < compare(reference, subject, probes(reference.front, 2)).mean_kld < 1e-2
    reference.close()
    subject.close()


def test_rows_that_no_group_divides_are_named(
    tiny: builders.Tiny, copy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = copy(tiny("llava15", "llama", hidden=96))
    with_changed_architecture(source, head_dim=44)  # three heads: rows of 132, which not even 32 divides
    opened = open_source(source)
    plan = mlx_plan(opened, "q4")
    out = tmp_path / "mlx"
    out.mkdir()
    write(opened, plan, out)
    report(plan.holds(), "q4")

    by_name = {fallback.tensor: fallback for fallback in plan.fallbacks}
    layer = "language_model.model.layers.0"
    up, attention = (by_name[f"{layer}.{name}.weight"] for name in ("mlp.up_proj", "self_attn.o_proj"))
    assert (up.row_length, up.block, up.wanted, up.got) == (96, 64, "affine-4-g64", "affine-4-g32")
    assert (attention.row_length, attention.got) == (132, "f16")
    assert f"{layer}.mlp.down_proj.weight" not in by_name
    assert "mlp.up_proj (2): affine-4-g64 → affine-4-g32, rows of 96 are no multiple of 64" in capsys.readouterr().err
    subject = MlxRuntime(out)
    assert np.isfinite(subject.score(ask(subject, "How many?", 1), (5,))).all()
    subject.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_convert_leaves_a_verified_artefact(tiny: builders.Tiny, tmp_path: Path, family: str) -> None:
    out = convert(tiny(family, "smollm2"), tmp_path / "edge", "f32")

    manifest = artifact.verify(out, "mlx")
    assert {"config.json", "model.safetensors", "front.json", "tokenizer.json", "processor_config.json"} <= {
        entry.path for entry in manifest.files
    }
    assert manifest.metrics["fidelity"]["mean_kld"] <= 1e-6
    assert convert(tiny(family, "smollm2"), out, "f32") == out


def test_quantize_tells_what_the_folder_holds_and_chat_answers_from_it(
    tiny: builders.Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = quantize(tiny("llava15", "llama"), tmp_path / "edge", "q4", group_size=32)

    metrics = artifact.read(out, "mlx").metrics
    assert 5 <= metrics["quantized"]["bits_per_weight"] < 5.1  # 4, and two halves for each 32
    assert metrics["quantized"]["types"] == {"affine-4-g32": 16, "f16": 5}
    assert 1e-4 < metrics["fidelity"]["mean_kld"] < 0.5
    mlx_runtime.say_if_slow.cache_clear()
    answer = ask_once(out, "How many beams are used?", sampling=Sampling(max_tokens=4))
    assert answer.runtime == "mlx"
    load(out).close()
    assert capsys.readouterr().err.count("no Apple GPU") == (not mlx_runtime.on_gpu())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda a, b: convert(a, b, "q4"), "quantize --to mlx --type q4"),
        (lambda a, b: convert(a, b, "f64"), "choose one of f32, f16, bf16"),
        (lambda a, b: quantize(a, b, "f16"), "convert --to mlx --type f16"),
        (lambda a, b: quantize(a, b, "Q4_K_M"), "choose one of q4, q8, mixed_4_6"),
        (lambda a, b: quantize(a, b, "q4", 48), "groups of 32 or 64 or 128"),
        (lambda a, b: quantize(a, b, "mxfp4", 64), "groups of 32$"),
    ],
)
def test_types_that_cannot_be_are_refused(tmp_path: Path, make: Callable[[Path, Path], Path], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make(tmp_path / "merged", tmp_path / "edge")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["quantize", "x", "--to", "mlx", "--type", "Q4_K_M"], "choose one of q4, q8, mixed_4_6"),
        (["quantize", "x", "--type", "mxfp4"], "choose one of Q8_0, Q6_K"),
        (["quantize", "x", "--to", "mlx", "--q4", "--mmproj", "f16"], "--mmproj f16 does not go with --to mlx"),
        (["quantize", "x", "--q4", "--group-size", "32"], "--group-size 32 does not go with --to gguf"),
        (["convert", "x", "--to", "mlx", "--mmproj", "f32"], "--mmproj f32 does not go with --to mlx"),
    ],
)
def test_the_command_line_refuses_what_the_target_does_not_know(arguments: list[str], reason: str) -> None:
    done = subprocess.run([sys.executable, "-m", "ldrt_edge.cli", *arguments], capture_output=True, text=True)

    assert done.returncode == 1
    assert reason in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lie_about_an_offset(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["image_newline"] = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def lose_a_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("multi_modal_projector.linear_1.bias"))


def add_a_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"adapter.weight": torch.zeros(2)}))


def swap_channels(folder: Path) -> None:
    name = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].permute(0, 3, 1, 2).contiguous()}))


def store_integers(folder: Path) -> None:
    name = "language_model.model.norm.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].int()}))


def take_another_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<more {i}>" for i in range(100)])
    tokenizer.save(str(folder / "tokenizer.json"))


def cut_other_tiles(folder: Path) -> None:
    path = folder / "front.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": 336}))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (truncate, "model.safetensors is truncated or corrupt"),
        (lie_about_an_offset, "image_newline is not of the size that its shape and type say"),
        (lose_a_tensor, "multi_modal_projector.linear_1.bias is missing"),
        (add_a_tensor, "adapter.weight is unknown"),
        (swap_channels, r"patch_embedding.weight is \(64, 3, 14, 14\), the configuration says \(64, 14, 14, 3\)"),
        (store_integers, "language_model.model.norm.weight is of type I32"),
        (take_another_tokenizer, "the tokenizer has token"),
        (cut_other_tiles, "tiles of 336 pixels, the tower wants 56"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.*safetensors"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: edit_config(f, model_type="qwen2_vl"), "model_type is 'qwen2_vl', supported: llava, llava_next"),
        (lambda f: edit_config(f, vision_feature_layer=-9), "vision_feature_layer -9 of 3 layers"),
        (lambda f: edit_config(f, text_config={"model_type": "qwen2"}), "model_type is 'qwen2'"),
        (lambda f: edit_config(f, text_config={"hidden_size": -1}), "hidden_size is -1, no positive number"),
        (lambda f: edit_config(f, text_config={"num_hidden_layers": 10**9}), "more layers than there are tensors"),
        (lambda f: edit_config(f, vision_config=None), "MLX cannot run this model"),
    ],
)  # fmt: skip
def test_bad_folders_are_refused_in_one_line(
    folder: Folder, copy: Callable[..., Path], fault: Callable[[Path], None], reason: str
) -> None:
    broken = copy(folder("llava15", "llama"))
    fault(broken)

    with pytest.raises(RuntimeLoadError, match=reason) as caught:
        MlxRuntime(broken)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        (None, "no 'quantization' of MLX's kind says how"),
        ({"group_size": 64, "bits": 8}, "the configuration says"),
        ({"group_size": 48, "bits": 4}, "MLX cannot run this model"),
        ({"group_size": 64, "bits": 4, "mode": "fancy"}, "MLX cannot run this model"),
    ],
)
def test_quantisation_that_does_not_fit_is_refused(
    folder: Folder, copy: Callable[..., Path], quantization: Any, reason: str
) -> None:
    broken = copy(folder("llava15", "llama", "q4"), quantization=quantization, quantization_config=None)

    with pytest.raises(RuntimeLoadError, match=reason) as caught:
        MlxRuntime(broken)

    assert "\n" not in str(caught.value)


def test_values_too_large_for_f16_are_refused(tiny: builders.Tiny, copy: Callable[..., Path], tmp_path: Path) -> None:
    source = copy(tiny("llava15", "llama"))
    edit_tensors(source, lambda tensors: tensors["language_model.lm_head.weight"].fill_(1e6))
    (tmp_path / "mlx").mkdir()

    with pytest.raises(ArtifactError, match=r"lm_head\.weight holds 1e\+06, beyond f16"):
        write_folder(source, tmp_path / "mlx", "f16")


@pytest.mark.slow
def test_the_starter(starter: Path, tmp_path: Path) -> None:
    reference, found = HfRuntime(starter), {}
    prompt, answer = probes(reference.front, 1)[0]
    expected = reference.score(prompt, answer)
    reference.close()
    for type_ in ("f32", "mixed_4_6", "q4"):
        (tmp_path / type_).mkdir()
        subject = MlxRuntime(write_folder(starter, tmp_path / type_, type_))
        found[type_] = compare_logits(expected, subject.score(prompt, answer))
        subject.close()

    assert found["f32"].max_abs_logit_diff <= 5e-3 and found["f32"].top1.all()
    assert found["f32"].kld.mean() <= 1e-6 < found["mixed_4_6"].kld.mean() < found["q4"].kld.mean()


@pytest.mark.parametrize("scheme", [None, (4, 64, "affine"), (3, 32, "affine"), (4, 32, "mxfp4"), (4, 16, "nvfp4")])
def test_products_by_numpy_are_mlxs_own(scheme: tuple[int, int, str] | None) -> None:
    mx.random.seed(0)
    network = mlx.nn.Sequential(mlx.nn.Linear(128, 64), mlx.nn.Embedding(96, 64))
    if scheme:
        bits, group, mode = scheme
        mlx.nn.quantize(network, group_size=group, bits=bits, mode=mode, class_predicate=lambda _, m: True)
    rows = mx.random.normal((2, 40, 128))

    def products() -> NDArray[np.float32]:
        linear, table = network.layers
        return np.array(table.as_linear(linear(rows)))

    wanted = products()
    use_numpy(network)
    assert type(network.layers[0]).__module__.endswith("mlx_host")
    np.testing.assert_allclose(products(), wanted, atol=1e-4 * float(np.abs(wanted).max()))
