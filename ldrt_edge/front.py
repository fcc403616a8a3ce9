"""The one front end: from a conversation and a picture to token ids and exact tiles, the same for every runtime.

Training, transformers, llama.cpp and MLX all read what this module makes: the rendered chat template, the token ids,
the resized pictures and the table that packs image features. So a difference between two runtimes cannot come from
here. A model artefact carries the front end's settings as `front.json` beside `tokenizer.json`.

    front = Front.load(folder)
    image = front.image(rgb)
    prompt = front.prompt([Message("user", "How many beams are used?", (image,))])
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Template
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from ldrt_edge.chat_template import compile_template
from ldrt_edge.dataset import Turn
from ldrt_edge.errors import ArtifactError, DataError
from ldrt_edge.front_config import TOKENIZER, FrontConfig, config_from_hf, read_json, read_tokenizer
from ldrt_edge.runtimes.base import FrontImage, Prompt
from ldrt_edge.tiles import base_layout, cut_tiles, packing_layout

FRONT = "front.json"
_ANSWER = "\ue000answer\ue000"  # a private-use sentinel: no template and no vocabulary contains it


@dataclass(frozen=True)
class Message:
    """One utterance, with the pictures that are shown with it."""

    role: Literal["user", "assistant"]
    text: str
    images: tuple[FrontImage, ...] = ()


class Front:
    """Chat template, tokenizer and picture preparation of one model."""

    def __init__(self, config: FrontConfig, tokenizer: Tokenizer, tokenizer_path: Path) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._tokenizer_path = tokenizer_path
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def __reduce__(self) -> tuple[type[Front], tuple[FrontConfig, Tokenizer, Path]]:
        """For another process: without what is cached, as templates stay where they were compiled."""
        return type(self), (self.config, self.tokenizer, self._tokenizer_path)

    @classmethod
    def load(cls, folder: Path) -> Front:
        """Load the front end that a model artefact carries; one without `front.json` is read as a Hugging Face folder.

        Raises:
            ArtifactError: a file is missing or unreadable.
        """
        if not (folder / FRONT).is_file():
            return cls.from_hf(folder)
        data = read_json(folder / FRONT)
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            if values["grid_pinpoints"]:
                values["grid_pinpoints"] = tuple((h, w) for h, w in values["grid_pinpoints"])
            config = FrontConfig(**values)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ArtifactError(f"{folder / FRONT}: not a front end that this version reads ({error})") from error
        return cls(config, read_tokenizer(folder / TOKENIZER), folder / TOKENIZER)

    @classmethod
    def from_hf(cls, folder: Path) -> Front:
        """Derive the front end from a Hugging Face LLaVA or LLaVA-NeXT folder (hub or transformers-5 layout).

        Raises:
            ArtifactError: a file is missing or says something that this front end cannot do.
        """
        try:
            config = config_from_hf(folder)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(f"{folder}: its settings are not those of a LLaVA ({str(error)[:120]})") from error
        return cls(config, read_tokenizer(folder / TOKENIZER), folder / TOKENIZER)

    def save(self, folder: Path) -> None:
        """Write `front.json` and `tokenizer.json` into a draft folder."""
        text = json.dumps(asdict(self.config), indent=1, ensure_ascii=False) + "\n"
        (folder / FRONT).write_text(text, encoding="utf-8")
        if not (folder / TOKENIZER).exists():
            partial = folder / f".{TOKENIZER}"  # a run that is killed here would find half of it, and keep that
            shutil.copyfile(self._tokenizer_path, partial)
            partial.rename(folder / TOKENIZER)

    def with_vision_tokens(self, count: int | None) -> Front:
        """The same front end with image features pooled to `count` tokens (None: all).

        Raises:
            ConfigError: the patches do not pool evenly to that many, or the model tiles its pictures.
        """
        front = self.with_config(replace(self.config, vision_tokens=count))
        base_layout(front.config)
        return front

    def with_config(self, config: FrontConfig) -> Front:
        """The same tokenizer behind other settings."""
        return Front(config, self.tokenizer, self._tokenizer_path)

    def image(self, rgb: NDArray[np.uint8]) -> FrontImage:
        """Prepare a picture: (height, width, 3) uint8 RGB, of any size, to exact tiles and their packing table."""
        height, width = rgb.shape[:2]
        tiles = np.ascontiguousarray(np.stack(cut_tiles(Image.fromarray(rgb), self.config)))
        layout = packing_layout(self.config, (height, width))
        digest = hashlib.sha256(repr((tiles.shape, layout.shape, height, width)).encode() + tiles.tobytes())
        return FrontImage(tiles, layout, (height, width), digest.hexdigest())

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """Render a conversation that waits for an answer.

        Raises:
            DataError: the template refuses it, or a text contains one of the model's control tokens.
        """
        ids = self._encode(self.render(messages))
        images = tuple(image for message in messages for image in message.images)
        expanded: list[int] = []
        waiting = iter(images)
        for token in ids:
            if token == self.config.image_token_id:
                image = next(waiting, None)
                if image is None:
                    raise DataError("the chat template writes more image placeholders than there are images")
                expanded.extend([token] * image.token_count)
            else:
                expanded.append(token)
        if next(waiting, None) is not None:
            raise DataError("the chat template writes fewer image placeholders than there are images")
        return Prompt(tuple(expanded), images, self.config.image_token_id, self.config.stop_ids)

    def answer_ids(self, messages: Sequence[Message], answer: str) -> tuple[int, ...]:
        """The tokens that the model should generate after `prompt(messages)`, the stop token included.

        Tokenised behind its prompt, as a model would go on writing: with the space that the template puts before it.
        """
        self._refuse_control_tokens(answer)
        text = self.render(messages)
        before = self._encode(text)
        both = self._encode(text + self._answer_prefix + answer.strip())
        if both[: len(before)] != before:
            raise DataError(f"the tokenizer joins the answer {answer[:40]!r} with its prompt")
        return (*both[len(before) :], self.config.stop_ids[0])

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text, without control tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def render(self, messages: Sequence[Message]) -> str:
        """The chat template over a conversation that ends with a user message, one placeholder per image."""
        if not messages or messages[-1].role != "user":
            raise DataError("a prompt ends with a question")
        for message in messages:
            self._refuse_control_tokens(message.text)
        return self._apply_template(messages, add_generation_prompt=True)

    def _apply_template(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        turns = []
        for message in messages:
            parts = [{"type": "image"} for _ in message.images] + [{"type": "text", "text": message.text.strip()}]
            turns.append({"role": message.role, "content": parts})
        template = self._template
        try:
            return template.render(
                messages=turns, add_generation_prompt=add_generation_prompt, **self.config.special_tokens
            )
        except Exception as error:  # a template is a program that came with a model, and may raise anything
            raise DataError(f"the model's chat template refuses this conversation: {error}") from error

    def _encode(self, text: str) -> list[int]:
        # transformers' rule: a template that writes the BOS token itself gets no second one
        bos = self.config.special_tokens.get("bos_token")
        written = bool(bos) and text.startswith(str(bos))
        return list(self.tokenizer.encode(text, add_special_tokens=not written).ids)

    def _refuse_control_tokens(self, text: str) -> None:
        found = [token for token in self._control_tokens if token in text]
        if found:
            raise DataError(f"the text contains {found[0]!r}, which is a control token of the model: rephrase it")

    @cached_property
    def _control_tokens(self) -> list[str]:
        added = self.tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special and token.content.strip()]

    @cached_property
    def _template(self) -> Template:
        return compile_template(self.config.chat_template)

    @cached_property
    def _answer_prefix(self) -> str:
        question = Message("user", "q")
        before = self._apply_template([question], add_generation_prompt=True)
        after = self._apply_template([question, Message("assistant", _ANSWER)], add_generation_prompt=False)
        prefix = after[len(before) :].partition(_ANSWER)[0]
        if not after.startswith(before) or prefix.strip():
            raise ArtifactError("the model's chat template does not answer where its generation prompt ends")
        return prefix


def conversation(turns: Sequence[Turn], image: FrontImage | None) -> list[Message]:
    """A dataset row's turns as messages; the image, if there is one, goes with the first user turn."""
    messages: list[Message] = []
    for turn in turns:
        first = turn.role == "user" and not any(m.images for m in messages)
        messages.append(Message(turn.role, turn.text, (image,) if image and first else ()))
    return messages
