"""What a judge is asked, and which replies count.

The words stand in `rubrics/*.yaml`, with examples and a version, so that a change of them shows in every report. A
judge never learns which model an answer is from. Replies are one JSON object, checked by a schema; a model that talks
around it is forgiven, one that says something else is not.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ldrt_edge.artifact import Json
from ldrt_edge.bench.vqa import Sample

MOST = 10
"""The best score; the worst is 0."""


class Score(BaseModel):
    """A reply to the absolute rubric."""

    model_config = ConfigDict(strict=True, extra="ignore")
    score: int = Field(ge=0, le=MOST)


class Preference(BaseModel):
    """A reply to the pairwise rubric."""

    model_config = ConfigDict(strict=True, extra="ignore")
    better: Literal["A", "B", "tie"]


Reply = TypeVar("Reply", bound=BaseModel)
VALID: dict[type[BaseModel], tuple[str, ...]] = {
    Score: tuple(json.dumps({"score": score}) for score in range(MOST + 1)),
    Preference: tuple(json.dumps({"better": better}) for better in ("A", "B", "tie")),
}
"""Every reply that counts, as it would be written."""


@dataclass(frozen=True)
class Rubric:
    """Words with places for a question and its answers; sha256 is of the file."""

    name: str
    version: int
    sha256: str
    template: str
    examples: str

    def ask(self, sample: Sample, **answers: str) -> str:
        """The words for one question; `answers` by the template's names."""
        given = {name: _plain(text) for name, text in answers.items()}
        return self.template.format(
            examples=self.examples, question=_plain(sample.question), reference=_plain(sample.answer), **given
        )


def read_rubric(name: Literal["absolute", "pairwise"]) -> Rubric:
    """A rubric that ships with the package."""
    raw = resources.files("ldrt_edge.bench").joinpath("rubrics", f"{name}.yaml").read_bytes()
    data = yaml.safe_load(raw)
    examples = "".join(data["example"].format(**example) for example in data["examples"])
    return Rubric(name, data["version"], hashlib.sha256(raw).hexdigest(), data["question"], examples)


def parse(text: str, schema: type[Reply]) -> Reply | None:
    """The first JSON object that fits the schema, behind what a model thinks aloud; None if there is none."""
    text = text.rpartition("</think>")[2].partition("<think>")[0]  # some templates open the thoughts, some models do
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            found, _ = decoder.raw_decode(text, start)
            return schema.model_validate(found)
        except (ValueError, ValidationError, RecursionError):
            start = text.find("{", start + 1)
    return None


def response_format(schema: type[BaseModel]) -> dict[str, Json]:
    """The same as OpenAI's `response_format`, for endpoints that can hold a model to it."""
    described: dict[str, Any] = schema.model_json_schema() | {"additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": schema.__name__, "strict": True, "schema": described}}


def _plain(text: str) -> str:
    """One paragraph: an answer must not look like the rubric's own lines."""
    return " ".join(text.split()) or "(nothing)"
