"""lmms-eval asks our runtimes: the same answers and probabilities as the product's own way gives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldrt_edge.convert.gguf import convert
from ldrt_edge.dataset import Dataset, Row
from ldrt_edge.errors import ConfigError, DataError
from ldrt_edge.front import Front, Message
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.base import Runtime, Sampling, load, log_softmax
from ldrt_edge.train.data.phantom import phantom

INSTALLED = find_spec("lmms_eval") is not None
ADAPTER = "ldrt_edge.bench.lmms_model"
TASK = """
include: {pope}
task: pope_of_ours
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {questions}}}}}
"""


@dataclass
class Request:
    """What of lmms-eval's `Instance` a model reads."""

    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def edge(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tiny("llava15", "smollm2"), tmp_path_factory.mktemp("lmms") / "edge", "f16")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("lmms-data") / "data"
    return Dataset(phantom(folder, 3, 0, test_fraction=1.0, languages=("en",)))


@pytest.fixture
def adapter(edge: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Our model, over lmms-eval's base class or, where that is not installed, over what of it a model uses."""
    if not INSTALLED:
        class Base:
            def __init__(self) -> None:
                self.task_dict: dict[str, Any] = {}
                self.cache_hook = type("Hook", (), {"add_partial": lambda *_: None})()

        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["lmms_eval.api.model"].lmms = Base  # type: ignore[attr-defined]
        monkeypatch.delitem(sys.modules, ADAPTER, raising=False)
    from ldrt_edge.bench.lmms_model import LdrtEdge

    model = LdrtEdge(str(edge), threads=1, batch_size=1, device="cpu", max_batch_size=None)
    yield model
    model.clean()
    if not INSTALLED:
        sys.modules.pop(ADAPTER)  # made over the stand-in


@pytest.fixture
def ours(edge: Path) -> Iterator[tuple[Front, Runtime]]:
    runtime = load(edge, threads=1)
    yield Front.load(edge), runtime
    runtime.close()


def asked(adapter: Any, data: Dataset, *arguments: Any) -> tuple[list[Row], list[Request]]:
    """Two questions about each picture as requests with these arguments behind the text."""
    rows = list(data.rows("test"))
    chosen = [row for row in rows if row in [r for r in rows if r.image == row.image][:2]]
    adapter.task_dict["made"] = {"test": chosen}
    def picture(row: Row) -> list[Image.Image]:
        return [Image.fromarray(read_image(data.image_path(row)).rgb)]

    return chosen, [
        Request((f"<image>\n{row.question}", *arguments, picture, place, "made", "test"))
        for place, row in enumerate(chosen)
    ]


def test_answers_are_the_products(adapter: Any, ours: tuple[Front, Runtime], data: Dataset) -> None:
    front, runtime = ours
    rows, requests = asked(adapter, data, {"max_new_tokens": 12, "temperature": 0, "until": ["\n\n"]})
    assert len(rows) == 6
    expected = []
    for row in rows:
        image = front.image(read_image(data.image_path(row)).rgb)
        prompt = front.prompt([Message("user", row.question, (image,))])
        said = front.decode([token.id for token in runtime.generate(prompt, Sampling(max_tokens=12))])
        expected.append(said.strip().partition("\n\n")[0])
    assert adapter.generate_until(requests) == expected
    assert len(set(expected)) > 1
    cut = expected[0][3:5]
    _, requests = asked(adapter, data, {"max_new_tokens": 12, "until": cut})
    assert adapter.generate_until(requests[:1]) == [expected[0].partition(cut)[0]]


def test_log_probabilities_are_the_products(adapter: Any, ours: tuple[Front, Runtime], data: Dataset) -> None:
    front, runtime = ours
    rows, requests = asked(adapter, data, lambda row: row.answer)
    for row, (logprob, greedy) in zip(rows, adapter.loglikelihood(requests), strict=True):
        messages = [Message("user", row.question, (front.image(read_image(data.image_path(row)).rgb),))]
        answer = front.answer_ids(messages, row.answer)
        logits = runtime.score(front.prompt(messages), answer)
        assert logprob == pytest.approx(log_softmax(logits)[np.arange(len(answer)), answer].sum(), abs=0.05)
        assert greedy == bool((logits.argmax(1) == answer).all())


def test_what_it_cannot_do_is_said(adapter: Any, data: Dataset, edge: Path) -> None:
    with pytest.raises(ConfigError, match="not max_frames_num"):
        type(adapter)(str(edge), max_frames_num=8)
    with pytest.raises(ConfigError, match="one round"):
        adapter.generate_until_multi_round([])
    adapter.task_dict["made"] = {"test": [None]}
    with pytest.raises(DataError, match="no video"):
        adapter.generate_until([Request(("What happens?", {}, lambda _: ["film.mp4"], 0, "made", "test"))])


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed: pip install lmms-eval")
def test_lmms_evals_own_task(edge: Path, ours: tuple[Front, Runtime], data: Dataset, tmp_path: Path) -> None:
    """POPE, with lmms-eval's prompt, grading and metrics, about our pictures."""
    import datasets
    import lmms_eval

    front, runtime = ours
    rows = [row for row in data.rows("test") if row.answer in ("yes", "no")]
    columns = {
        "question_id": [row.id for row in rows], "question": [row.question for row in rows],
        "answer": [row.answer for row in rows], "category": ["random"] * len(rows),
        "image_source": [row.image for row in rows], "id": [row.id for row in rows],
        "image": [{"bytes": data.image_path(row).read_bytes(), "path": None} for row in rows],
    }  # fmt: skip
    features = datasets.Features({name: datasets.Value("string") for name in columns} | {"image": datasets.Image()})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "questions.parquet"))
    pope = Path(lmms_eval.__file__).parent / "tasks" / "pope"
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text((pope / "utils.py").read_text())
    (tasks / "ours.yaml").write_text(TASK.format(pope=pope / "pope.yaml", questions=tmp_path / "questions.parquet"))

    command = [
        sys.executable, "-m", "lmms_eval", "--model", "ldrt_edge", "--model_args", f"model={edge},threads=1",
        "--tasks", "pope_of_ours", "--include_path", tasks, "--output_path", tmp_path / "logs", "--log_samples",
    ]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = (tmp_path / "logs").rglob("*_samples_pope_of_ours.jsonl")
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(logged) == len(rows) > 3
    for row, line in zip(rows, sorted(logged, key=lambda line: line["doc_id"]), strict=True):
        image = front.image(read_image(data.image_path(row)).rgb)
        text = f"{row.question}\nAnswer the question using a single word or phrase."
        tokens = runtime.generate(front.prompt([Message("user", text, (image,))]), Sampling(max_tokens=128))
        said = front.decode([token.id for token in tokens]).strip()
        assert line["target"] == row.answer
        assert np.ravel(line["filtered_resps"])[0] == said
    (results,) = (tmp_path / "logs").rglob("*_results.json")
    assert "pope_accuracy" in results.read_text()
