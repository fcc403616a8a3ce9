"""The tiny checkpoints are what they claim to be: stock transformers loads both layouts and they say the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import Tiny
from transformers import AutoModelForImageTextToText, AutoProcessor

from ldrt_edge.front import Front, Message

PICTURE = np.random.default_rng(0).integers(0, 255, (90, 150, 3), dtype=np.uint8)
QUESTION = "How many beams? 低剂量 täglich"


@torch.no_grad()
def ids_and_logits(folder: Path) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """The prompt's ids by transformers' own processor, the last logits, and those for another picture."""
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.fromarray(PICTURE), text=text, return_tensors="pt")
    seen = model(**inputs).logits[0, -1]
    other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits[0, -1]
    return inputs["input_ids"][0].tolist(), seen, other


@pytest.mark.parametrize("text", ["llama", "mistral", "smollm2"])
@pytest.mark.parametrize("family", ["llava15", "llavanext"])
def test_both_layouts_load_and_agree(tiny: Tiny, family: str, text: str) -> None:
    ids, seen, other = ids_and_logits(tiny(family, text))
    hub_ids, hub_seen, _ = ids_and_logits(tiny(family, text, layout="hub"))
    assert ids == hub_ids
    assert torch.equal(seen, hub_seen)
    assert (seen - other).abs().max() > 0.5, "the picture must matter, or parity tests prove nothing"
    for layout in ("transformers5", "hub"):
        front = Front.from_hf(tiny(family, text, layout=layout))
        assert list(front.prompt([Message("user", QUESTION, (front.image(PICTURE),))]).ids) == ids


def test_rope_scaling_reaches_both_layouts(tiny: Tiny) -> None:
    _, plain, _ = ids_and_logits(tiny("llava15", "llama"))
    _, scaled, _ = ids_and_logits(tiny("llava15", "llama", rope_factor=2.0))
    _, hub, _ = ids_and_logits(tiny("llava15", "llama", rope_factor=2.0, layout="hub"))
    assert (plain - scaled).abs().max() > 1e-3
    assert torch.equal(scaled, hub)
