"""Golden answers: what a model said when it was exported, carried by the export and asked again where it is installed.

Each record holds a question, its picture, the prompt's token ids, and two answers: the merged model's, and the export's
own on its runtime. A laptop replays them without the merged model and without torch: the export must say what it said,
but where its two best candidates lay so close together that another processor's rounding may turn them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldrt_edge import artifact
from ldrt_edge.errors import ArtifactError
from ldrt_edge.fidelity import KERNELS_APART
from ldrt_edge.front import Front, Message
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.base import Prompt, Runtime, Sampling, load

GOLDEN = "golden"
_RECORDS = "records.jsonl"
RECORDS_PATH = f"{GOLDEN}/{_RECORDS}"


@dataclass(frozen=True)
class Record:
    """One question about a picture in the export's `golden` folder.

    prompt_ids: with one placeholder a picture. reference_ids, answer_ids: greedy, of the merged model and of the
    export; margins: distance of the export's two best logits at each of its tokens.
    """

    question: str
    image: str
    tiles_sha256: str
    prompt_ids: tuple[int, ...]
    reference_ids: tuple[int, ...]
    reference: str
    answer_ids: tuple[int, ...]
    answer: str
    margins: tuple[float, ...]


@dataclass(frozen=True)
class Replay:
    """A record asked again. fault: what is not as it was, in words, or None."""

    question: str
    expected: str
    reference: str
    answer: str
    fault: str | None


def replay(edge: Path) -> list[Replay]:
    """Ask an installed gguf or mlx artefact its golden questions.

    Raises:
        ArtifactError: the artefact is damaged, or carries no golden answers.
        MissingExtraError, RuntimeLoadError: it does not load here.
    """
    artifact.read(edge, "gguf", "mlx")
    records, front = read_records(edge), Front.load(edge)
    runtime = load(edge)
    try:
        return [_replay(runtime, front, edge, record) for record in records]
    finally:
        runtime.close()


def write(
    folder: Path,
    front: Front,
    asked: Sequence[tuple[str, NDArray[np.uint8]]],
    reference: Sequence[tuple[int, ...]],
    answers: Sequence[tuple[int, ...]],
    margins: Sequence[tuple[float, ...]],
) -> None:
    """Put records into an export's draft folder; `asked` are questions with their pictures (height, width, 3)."""
    (folder / GOLDEN).mkdir(exist_ok=True)
    lines = []
    for number, (question, picture) in enumerate(asked):
        name = f"{number:02d}.png"
        Image.fromarray(picture).save(folder / GOLDEN / name)
        prompt = _prompt(front, question, picture)
        record = Record(
            question, name, prompt.images[0].sha256, _collapsed(prompt), reference[number],
            front.decode(reference[number]), answers[number], front.decode(answers[number]), margins[number],
        )
        lines.append(json.dumps(asdict(record), ensure_ascii=False) + "\n")
    (folder / GOLDEN / _RECORDS).write_text("".join(lines), encoding="utf-8")


def _replay(runtime: Runtime, front: Front, edge: Path, record: Record) -> Replay:
    picture = read_image(edge / GOLDEN / record.image).rgb
    prompt = _prompt(front, record.question, picture)
    sampling = Sampling(max_tokens=max(len(record.answer_ids), 1))
    given = tuple(token.id for token in runtime.generate(prompt, sampling))
    fault = None
    if prompt.images[0].sha256 != record.tiles_sha256:
        fault = "the picture is prepared otherwise than it was"
    elif _collapsed(prompt) != record.prompt_ids:
        fault = "the prompt has other tokens than it had"
    elif given != record.answer_ids and not _turned(runtime, prompt, record):
        fault = "the answer is another"
    return Replay(record.question, record.answer, record.reference, front.decode(given), fault)


def _turned(runtime: Runtime, prompt: Prompt, record: Record) -> bool:
    """Whether nothing but near ties fell out otherwise: forced, each other token of the answer still comes first."""
    if not record.answer_ids:
        return False
    first = runtime.score(prompt, record.answer_ids).argmax(axis=1) == np.asarray(record.answer_ids)
    return bool((first | (np.asarray(record.margins) < KERNELS_APART)).all())


def _prompt(front: Front, question: str, picture: NDArray[np.uint8]) -> Prompt:
    return front.prompt([Message("user", question, (front.image(picture),))])


def _collapsed(prompt: Prompt) -> tuple[int, ...]:
    """Token ids with one placeholder a picture."""
    ids: list[int] = []
    for part in prompt.segments():
        ids.extend(part if isinstance(part, tuple) else (prompt.image_token_id,))
    return tuple(ids)


def read_records(edge: Path) -> list[Record]:
    """The records that an export carries.

    Raises:
        ArtifactError: none, or not such as this version reads.
    """
    path = edge / GOLDEN / _RECORDS
    if not path.is_file():
        raise ArtifactError(f"{edge}: it carries no golden answers: convert or quantise it again")
    try:
        records = [_record(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path}: not golden answers that this version reads ({error})") from error
    if not records:
        raise ArtifactError(f"{path}: no golden answers in it: convert or quantise again")
    return records


def _record(data: dict[str, Any]) -> Record:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    record = Record(**values)
    if Path(record.image).name != record.image or not record.image.endswith(".png"):
        raise ValueError(f"{record.image} is no picture in its folder")
    if not (len(record.answer_ids) == len(record.margins) and all(isinstance(t, int) for t in record.answer_ids)):
        raise ValueError("an answer without as many margins as tokens")
    return record
