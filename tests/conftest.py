"""Models that tests share: tiny random ones of the real architectures, and the starter, each made once a session."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoProcessor

from ldrt_edge.errors import MissingExtraError

# Here and in processes that tests start: more threads wait for each other wherever another program keeps a core busy,
# and another number sums to other last digits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

_STOCK = AutoProcessor.__dict__["from_pretrained"]
_WITH_MLX_VLM = ("test_mlx", "test_parity")


@pytest.fixture(autouse=True)
def _own_processors(request: pytest.FixtureRequest) -> Iterator[None]:
    """mlx-vlm, once imported, puts its processors into transformers for good: not for other modules' tests."""
    patched = AutoProcessor.__dict__["from_pretrained"]
    if request.module.__name__ not in _WITH_MLX_VLM:
        AutoProcessor.from_pretrained = _STOCK
    yield
    if request.module.__name__ not in _WITH_MLX_VLM:
        AutoProcessor.from_pretrained = patched


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a tiny checkpoint, once for each choice: `tiny("llava15", "llama", hidden=256, layout="hub") -> folder`.

    Tests must not write into the folder: it is shared.
    """
    import tiny as builders

    made: dict[tuple[Any, ...], Path] = {}

    def make(
        family: str, text: str, *, layout: Literal["transformers5", "hub"] = "transformers5", **options: Any
    ) -> Path:
        key = (family, text, layout, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny") / f"{family}-{text}"
            if layout == "hub":
                made[key] = builders.to_hub_layout(make(family, text, **options), folder)
            else:
                made[key] = builders.build(folder, family, text, **options)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter base artefact; tests must not write into it."""
    from ldrt_edge.train.starter import assemble

    try:
        return assemble(tmp_path_factory.mktemp("base") / "starter")
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """Copies a model folder, with settings of its config.json changed."""

    def make(folder: Path, name: str = "copy", **changes: Any) -> Path:
        out = tmp_path / name
        shutil.copytree(folder, out)
        config = json.loads((out / "config.json").read_text())
        for part in ("text_config", "vision_config"):
            config[part] |= changes.pop(part, {})
        (out / "config.json").write_text(json.dumps(config | changes))
        return out

    return make
