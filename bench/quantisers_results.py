"""What a comparison of quantisers found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ldrt_edge.bench.statistics import Difference, Rate, Ratio
from ldrt_edge.bench.steps import Cost
from ldrt_edge.convert.type_plan import FormatName


@dataclass(frozen=True)
class Step:
    """A step's cost here, and what it would be at other sizes with as many questions of as many tokens.

    at: nothing, if the model is too small to tell.
    """

    name: str
    what: str
    cost: Cost
    at: Mapping[str, Cost]


@dataclass(frozen=True)
class Result:
    """One quantised language model against the merged model.

    family: none, other, text, a weighting, or one of `WAYS`. calibration: the name of the set; "" for none.
    bytes: of the GGUF file, or of MLX's tensors. bytes_ratio: to the preset's. fallbacks: matrices that could not have
        the preset's type.
    kld: nats an answer token. loss: of exact matches, merged minus this one. flips: questions that one of the two has
        right and the other wrong. kld_to_none, kld_to_text: this one's KLD over theirs.
    """

    base: str
    family: str
    calibration: str
    bytes: int
    bits_per_weight: float
    bytes_ratio: float
    types: Mapping[str, int]
    fallbacks: int
    kld: Ratio
    top1: Rate
    loss: Difference
    flips: Rate
    kld_to_none: Ratio
    kld_to_text: Ratio | None


@dataclass(frozen=True)
class Comparison:
    """All results of a run in one format, in the order of the bases, and what its steps cost.

    images, tokens: that were asked about, and of reference answers. exact: the merged model's share of exact matches.
    image_tokens: a picture's, in the prompt.
    """

    to: FormatName
    results: tuple[Result, ...]
    steps: tuple[Step, ...]
    questions: int
    images: int
    tokens: int
    exact: Rate
    parameters: int
    image_tokens: int
