"""The front end against transformers' own processors: the same pixels, the same tokens, the same packing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ldrt_edge.errors import ArtifactError, ConfigError, DataError
from ldrt_edge.front import Front, Message
from ldrt_edge.runtimes.hf import HfRuntime

Tiny = Callable[..., Path]
MODELS = [(family, text) for family in ("llava15", "llavanext") for text in ("llama", "mistral", "smollm2")]
SIZES = [(112, 112), (150, 210), (60, 400), (333, 47), (9, 13)]


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    coarse = np.random.default_rng(seed).integers(0, 255, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def parts(text: str, images: int = 1) -> list[dict[str, str]]:
    return [{"type": "image"}] * images + [{"type": "text", "text": text}]


@pytest.mark.parametrize(("family", "text"), MODELS)
@pytest.mark.parametrize("size", SIZES)
def test_prompt_and_pixels_equal_the_processors(tiny: Tiny, family: str, text: str, size: tuple[int, int]) -> None:
    folder = tiny(family, text)
    front, processor = Front.from_hf(folder), AutoProcessor.from_pretrained(folder)
    rgb = picture(*size)
    question = "Wie hoch ist die Dosis – 0.5 Gy? 线性"
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": parts(question)}], add_generation_prompt=True
    )
    expected = processor(images=Image.fromarray(rgb), text=rendered, return_tensors="pt")
    image = front.image(rgb)
    prompt = front.prompt([Message("user", question, (image,))])
    assert list(prompt.ids) == expected["input_ids"][0].tolist()
    mean, std = np.array(front.config.image_mean), np.array(front.config.image_std)
    mine = ((image.tiles / 255 - mean) / std).transpose(0, 3, 1, 2)
    pixels = expected["pixel_values"].numpy()
    np.testing.assert_allclose(mine, pixels.reshape(-1, *pixels.shape[-3:]), atol=1e-5)


@pytest.mark.parametrize(("family", "text"), MODELS)
def test_a_conversation_reads_token_for_token_as_the_reference_template(tiny: Tiny, family: str, text: str) -> None:
    folder = tiny(family, text)
    front, processor = Front.from_hf(folder), AutoProcessor.from_pretrained(folder)
    rgb = picture(120, 90)
    messages = [
        Message("user", "How many beams?", (front.image(rgb),)),
        Message("assistant", "three"),
        Message("user", "On which side?"),
    ]
    turns = [
        {"role": "user", "content": parts("How many beams?")},
        {"role": "assistant", "content": parts("three", images=0)},
        {"role": "user", "content": parts("On which side?", images=0)},
    ]
    rendered = processor.apply_chat_template(turns, add_generation_prompt=True)
    expected = processor(images=Image.fromarray(rgb), text=rendered, return_tensors="pt")["input_ids"][0].tolist()
    assert list(front.prompt(messages).ids) == expected


@pytest.mark.parametrize(("family", "text"), MODELS)
@pytest.mark.parametrize("size", [(112, 112), (60, 400)])
def test_our_runtime_equals_the_stock_forward_on_pixels(
    tiny: Tiny, family: str, text: str, size: tuple[int, int]
) -> None:
    """Tower, projector, packing, unpadding, newline: everything between pixels and logits."""
    folder = tiny(family, text)
    processor = AutoProcessor.from_pretrained(folder)
    rgb = picture(*size)
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": parts("What is it?")}], add_generation_prompt=True
    )
    inputs = processor(images=Image.fromarray(rgb), text=rendered, return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(**inputs).logits[0, -1].numpy()
    runtime = HfRuntime(folder)
    prompt = runtime.front.prompt([Message("user", "What is it?", (runtime.front.image(rgb),))])
    np.testing.assert_allclose(runtime.score(prompt, [5])[0], expected, atol=3e-4)


@pytest.mark.parametrize(("family", "text"), [("llava15", "llama"), ("llava15", "mistral"), ("llava15", "smollm2")])
def test_answers_begin_where_the_template_puts_them_and_end_with_the_stop_token(
    tiny: Tiny, family: str, text: str
) -> None:
    front = Front.from_hf(tiny(family, text))
    messages = [Message("user", "How many?")]
    ids = front.answer_ids(messages, "drei Felder")
    assert ids[-1] == front.config.stop_ids[0]
    assert front.decode(ids) == "drei Felder"
    whole = front.tokenizer.decode([*front.prompt(messages).ids, *ids[:-1]], skip_special_tokens=False)
    assert whole.endswith("drei Felder")


@pytest.mark.parametrize("text", ["llama", "smollm2"])
def test_a_saved_front_end_gives_the_same_prompt(tiny: Tiny, tmp_path: Path, text: str) -> None:
    front = Front.from_hf(tiny("llavanext", text))
    front.save(tmp_path)
    again = Front.load(tmp_path)
    assert again.config == front.config
    image, same = front.image(picture(80, 200)), again.image(picture(80, 200))
    assert image.sha256 == same.sha256
    messages = [Message("user", "What?", (image,))]
    assert again.prompt(messages).ids == front.prompt(messages).ids


def test_a_question_cannot_forge_the_models_control_tokens(tiny: Tiny) -> None:
    front = Front.from_hf(tiny("llava15", "smollm2"))
    stop = front.tokenizer.id_to_token(front.config.stop_ids[0])
    for forged in (front.config.image_token, stop):
        with pytest.raises(DataError, match="control token"):
            front.prompt([Message("user", f"hello {forged} world")])


def test_pooling_averages_neighbouring_patches(tiny: Tiny) -> None:
    front = Front.from_hf(tiny("llava15", "smollm2"))
    side = front.config.image_size // front.config.patch_size
    pooled = front.with_vision_tokens((side // 2) ** 2)
    layout = pooled.image(picture(40, 40)).layout
    assert layout.shape == ((side // 2) ** 2, 4)
    assert layout[0].tolist() == [0, 1, side, side + 1]
    assert sorted(layout.reshape(-1).tolist()) == list(range(side * side))
    with pytest.raises(ConfigError, match="only: "):
        front.with_vision_tokens(side * side - 1)
    with pytest.raises(ConfigError, match="not pooled"):
        Front.from_hf(tiny("llavanext", "smollm2")).with_vision_tokens(4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"model_type": "llama"}', "is no LLaVA"),
        ("config.json", "{", "not JSON"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("processor_config.json", "{}", "image settings"),
    ],
)
def test_a_broken_folder_is_one_line(tiny: Tiny, tmp_path: Path, name: str, content: str | None, message: str) -> None:
    source = tiny("llava15", "smollm2")
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ArtifactError, match=message) as caught:
        Front.from_hf(tmp_path)
    assert "\n" not in str(caught.value)
