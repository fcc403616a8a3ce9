"""`ldrt-edge importance MODEL --data D`: which inputs of each weight matrix are large where it matters.

A quantiser rounds best when it knows by what each weight will be multiplied. So the model is shown training rows
through its own front end, each question with its picture and its answer, and every matrix's inputs are squared and
summed: of the language model, the projector and the vision tower. The sums are kept apart by kind of token, since
pictures have many more tokens than answers and far smaller sensitivity (MBQ, CVPR 2025):

- vision: the picture's tokens; the tower and the projector have no others.
- answer: positions whose output predicts a token of the answer.
- prompt: all other text.

A merged model is watched in transformers (on the GPU, if there is one), a GGUF pair in llama.cpp, without torch; both
give the same sums. Each weighting of the three kinds becomes a file that stock `llama-quantize --imatrix` reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from numpy.typing import NDArray

from ldrt_edge import artifact, console
from ldrt_edge.convert.gguf import check_choice, identity
from ldrt_edge.convert.plan import mmproj_plan, text_plan
from ldrt_edge.convert.source import EMBEDDINGS, HEAD, Source, is_tied, open_source
from ldrt_edge.convert.weights import canonical
from ldrt_edge.dataset import Dataset, Row, choose_rows
from ldrt_edge.errors import ArtifactError, DataError, require
from ldrt_edge.front import Front, conversation
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.base import PrefixCache, Prompt, Runtime, keys_of

Kind = Literal["vision", "prompt", "answer"]
Weighting = Literal["pooled", "balanced", "answer"]
Means = dict[str, tuple[NDArray[np.float64], int]]
"""Mean squares, and over how many tokens, by GGUF tensor name."""
MeanSquares = dict[str, NDArray[np.float32]]
"""By GGUF tensor name: the weighted mean square of each input of the matrix, (row length,)."""

_KINDS: tuple[Kind, ...] = get_args(Kind)
_VISION, _PROMPT, _ANSWER = range(3)
_LAST_LAYER = ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_PICTURES = "pictures.txt"


class Moments(NamedTuple):
    """Of one matrix's input. squares: (kinds, row length) float64 sums; counts: (kinds,) rows that were summed."""

    squares: NDArray[np.float64]
    counts: NDArray[np.int64]

    def mean(self, weighting: Weighting) -> NDArray[np.float64]:
        """The weighted mean square: (row length,).

        pooled: every token counts alike. balanced: every kind of token does. answer: only answers, where there are any.
        """
        if weighting == "answer" and self.counts[_ANSWER]:
            return np.asarray(self.squares[_ANSWER] / self.counts[_ANSWER])
        if weighting == "balanced":
            met = self.counts > 0
            return np.asarray((self.squares[met] / self.counts[met, None]).mean(axis=0))
        return np.asarray(self.squares.sum(axis=0) / self.counts.sum())


def importance(
    model: Path, data: Path, out: Path, limit: int | None = None, seed: int = 0, threads: int | None = None,
    pictures: bool = True,
) -> Path:
    """Watch a model on training rows; returns `out`, an artefact of kind "importance".

    model: merged or base (watched in transformers), or an unquantised GGUF pair (in llama.cpp).
    limit: about how many rows, as whole pictures; None for all. pictures: False shows the text alone, to compare with.

    Raises:
        ArtifactError: a folder is of another kind, or values are not numbers.
        DataError: no training rows, or one that cannot be asked.
    """
    dataset = Dataset(data)
    rows = choose_rows(dataset.rows("train"), limit, seed)
    if not rows:
        raise DataError(f"{data}: no rows in split 'train': importance is not measured on test rows")
    converted = any(model.glob("*.gguf"))
    inputs = [artifact.identity(model) if converted else identity(model), artifact.identity(data)]
    with artifact.create(out, "importance", {"limit": limit, "pictures": pictures}, inputs, seed) as draft:
        if not draft.complete:
            watched = _watch_llamacpp if converted else _watch_torch
            with watched(model, threads) as (runtime, front, tally):
                for row in console.track(rows, "watching"):
                    _show(row, dataset.image_path(row) if pictures else None, runtime, front, tally)
                computed_in = str(getattr(runtime, "place", "float32 on cpu"))
            shown = sorted({row.image_sha256 for row in rows})
            (draft.path / _PICTURES).write_text("".join(f"{digest}\n" for digest in shown))
            tally.save(draft.path, [dataset.folder.resolve().name], len(rows))
            tokens = tally.moments["blk.0.attn_q.weight"].counts
            draft.metrics.update(
                collector="llamacpp" if converted else "torch", computed_in=computed_in, questions=len(rows),
                images=len({row.image for row in rows}), matrices=len(tally.moments),
                tokens=dict(zip(_KINDS, tokens.tolist(), strict=True)),
            )
    return out


def imatrix_path(folder: Path, weighting: str) -> Path:
    """The file of an importance artefact for one weighting, after checking the folder.

    Raises:
        ArtifactError: no importance artefact.
        ConfigError: an unknown weighting.
    """
    check_choice("--weighting", weighting, get_args(Weighting))
    artifact.verify(folder, "importance")
    return folder / f"imatrix-{weighting}.gguf"


def pictures_of(folder: Path) -> frozenset[str] | None:
    """The pictures of the rows that an importance artefact is of, by sha256; None where it does not say."""
    path = folder / _PICTURES
    return frozenset(path.read_text().split()) if path.is_file() else None


def read_imatrix(path: Path) -> MeanSquares:
    """The mean squares of an importance-matrix file: ours, or one that llama.cpp's own tool wrote.

    Raises:
        ArtifactError: not such a file, or with values that cannot be mean squares.
    """
    try:
        stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        names = [name.removesuffix(".in_sum2") for name in stored if name.endswith(".in_sum2")]
        found = {}
        for name in names:
            squares, counts = stored[f"{name}.in_sum2"], stored[f"{name}.counts"]
            if {squares.tensor_type, counts.tensor_type} != {GGMLQuantizationType.F32}:
                raise ValueError(f"{name} is not float32")
            found[name] = np.asarray(squares.data, np.float32).reshape(-1) / np.float32(counts.data.item())
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ArtifactError(f"{path}: no importance matrix in GGUF ({error}): run ldrt-edge importance") from error
    wrong = [name for name, values in found.items() if not (np.isfinite(values).all() and (values >= 0).all())]
    if wrong or not found:
        raise ArtifactError(f"{path}: {wrong[0] if wrong else 'nothing'} holds no mean squares: measure them again")
    return found


def write_imatrix(path: Path, means: Means, datasets: list[str], rows: int) -> None:
    """Write mean squares as llama.cpp's GGUF importance matrix.

    Source: `IMatrixCollector::save_imatrix` in tools/imatrix/imatrix.cpp, `common_imatrix_load` in common/.
    """
    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", datasets)
    writer.add_uint32("imatrix.chunk_count", rows)  # a chunk is a row here
    writer.add_uint32("imatrix.chunk_size", max(1, max(count for _, count in means.values()) // rows))
    for name, (mean, count) in sorted(means.items()):
        writer.add_tensor(f"{name}.in_sum2", (mean * count).astype(np.float32)[None])
        writer.add_tensor(f"{name}.counts", np.array([[count]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Tally:
    """Sums of squares by matrix and kind of token.

    A runtime computes a sequence in batches, and in each it meets every matrix once: so a matrix met again starts the
    next batch. Some products only take the batch's last rows (llama.cpp's last layer, every output head).
    """

    def __init__(self, layers: int) -> None:
        self.moments: dict[str, Moments] = {}
        last = tuple(f"blk.{layers - 1}.{name}.weight" for name in _LAST_LAYER)
        self._reach_answers = (*last, "output.weight", "token_embd.weight")
        self._cache = PrefixCache()
        self._kinds: list[int] = []
        self._batch: set[str] = set()
        self._start = self._rows = 0

    def expect(self, prompt: Prompt, answer: Sequence[int]) -> int:
        """Announce that this will be scored; returns how many of its tokens the runtime still has from before."""
        asked = len(prompt.ids) - 1
        kinds = [_VISION if token == prompt.image_token_id else _PROMPT for token in prompt.ids[:asked]]
        wanted = keys_of(prompt, answer[:-1])
        held = self._cache.shared(wanted, len(answer))
        self._cache.keys = wanted
        self._kinds = [*kinds, *[_ANSWER] * len(answer)][held:]
        self._batch.clear()
        self._start = self._rows = 0
        return held

    def runs(self, name: str, rows: int) -> Iterator[tuple[int, int, int]]:
        """Which rows of a product's input count as which kind: (kind, first, end)."""
        if name.startswith(("v.", "mm.")):
            yield _VISION, 0, rows
            return
        if name in self._batch:
            self._batch.clear()
            self._start += self._rows
        if not self._batch:
            self._rows = rows
        self._batch.add(name)
        end = self._start + self._rows
        for kind, places in groupby(enumerate(self._kinds[end - rows : end]), key=lambda place: place[1]):
            # in the last layer, other tokens reach the answer by their keys and values alone
            if kind == _ANSWER or name not in self._reach_answers:
                first, *others = [row for row, _ in places]
                yield kind, first, first + 1 + len(others)

    def add(self, name: str, kind: int, squares: NDArray[np.float64], count: int) -> None:
        """Add a sum of squares (row length,) over `count` rows."""
        if name not in self.moments:
            zeros = np.zeros((len(_KINDS), len(squares))), np.zeros(len(_KINDS), np.int64)
            self.moments[name] = Moments(*zeros)
        self.moments[name].squares[kind] += squares
        self.moments[name].counts[kind] += count

    def watch(self, name: str, rows: NDArray[np.float32]) -> None:
        """See the input (rows, row length) of a product."""
        for kind, first, end in self.runs(name, len(rows)):
            self.add(name, kind, np.square(rows[first:end], dtype=np.float64).sum(axis=0), end - first)

    def save(self, folder: Path, datasets: list[str], rows: int) -> None:
        """Write an importance matrix for each weighting, and one for each kind of token alone that was met.

        Raises:
            ArtifactError: the model computed values that are not numbers.
        """
        for name, moments in self.moments.items():
            if not np.isfinite(moments.squares).all():
                raise ArtifactError(f"{name} was given values that are not numbers: take a model in another type")
        for weighting in get_args(Weighting):
            means = {name: (m.mean(weighting), int(m.counts.sum())) for name, m in self.moments.items()}
            write_imatrix(folder / f"imatrix-{weighting}.gguf", means, datasets, rows)
        for kind, label in enumerate(_KINDS):
            alone = {
                name: (m.squares[kind] / m.counts[kind], int(m.counts[kind]))
                for name, m in self.moments.items() if m.counts[kind]
            }  # fmt: skip
            if alone:
                write_imatrix(folder / f"only-{label}.gguf", alone, datasets, rows)


def _show(row: Row, picture: Path | None, runtime: Runtime, front: Front, tally: Tally) -> None:
    """Let the model read a row's question, picture and answer."""
    try:
        messages = conversation(row.turns[:-1], front.image(read_image(picture).rgb) if picture else None)
        prompt, answer = front.prompt(messages), front.answer_ids(messages, row.answer)
        held = tally.expect(prompt, answer)
        runtime.score(prompt, answer)
    except DataError as error:
        raise DataError(f"row {row.id}: {error}") from error
    assert runtime.timings.reused_tokens == held


@contextmanager
def _watch_llamacpp(folder: Path, threads: int | None) -> Iterator[tuple[Runtime, Front, Tally]]:
    from ldrt_edge.runtimes.llamacpp import LlamaCppRuntime, gguf_pair

    model, _ = gguf_pair(folder)
    tally = Tally(int(GGUFReader(model).fields["llama.block_count"].contents()))
    runtime = LlamaCppRuntime(folder, threads=threads, exact=True, watch=tally.watch)
    try:
        yield runtime, Front.load(folder), tally
    finally:
        runtime.close()


@contextmanager
def _watch_torch(folder: Path, threads: int | None) -> Iterator[tuple[Runtime, Front, Tally]]:
    from ldrt_edge.runtimes.hf import HfRuntime

    torch = require("torch", "train")
    source = open_source(folder)
    names = matrices(source)
    tally = Tally(source.config.text_config.num_hidden_layers)

    def hook(name: str) -> Any:
        def see(_module: Any, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2)
            for kind, first, end in tally.runs(name, len(rows)):
                squares = rows[first:end].float().square().sum(0, dtype=torch.float64)
                tally.add(name, kind, squares.cpu().numpy(), end - first)

        return see

    runtime = HfRuntime(folder, threads=threads)
    try:
        for path, module in runtime.model.named_modules():
            if isinstance(module, torch.nn.Linear) and (name := names.get(canonical(f"{path}.weight"))):
                module.register_forward_pre_hook(hook(name))
        yield runtime, runtime.front, tally
    finally:
        runtime.close()


def matrices(source: Source) -> dict[str, str]:
    """GGUF names of the weight matrices by their checkpoint names; a tied output head has the embedding's."""
    tensors = [*text_plan(source, "f32").tensors, *mmproj_plan(source, "f32").tensors]
    found = {t.source: t.name for t in tensors if isinstance(t.source, str) and len(t.shape) == 2}
    if is_tied(source):
        found[HEAD] = found[EMBEDDINGS]
    return found

