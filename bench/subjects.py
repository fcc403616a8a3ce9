"""What a comparison of quantisers compares: language models that a format's own quantiser makes, one at a time.

The vision tower and the projector stay in half precision, so that only the language model's bytes and losses differ.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from gguf import GGUFReader

from ldrt_edge.bench.steps import Cost, apart
from ldrt_edge.convert.fallbacks import Quantized
from ldrt_edge.convert.format import Format
from ldrt_edge.convert.gguf import check_room, finish, write
from ldrt_edge.convert.mlx import write as write_mlx
from ldrt_edge.convert.mlx_plan import LANGUAGE, SCHEMES, mlx_plan
from ldrt_edge.convert.plan import mmproj_plan, text_plan
from ldrt_edge.convert.quantize import lossless, write_full
from ldrt_edge.convert.quantizer import TYPES, Wanted, read_back, run_quantizer
from ldrt_edge.convert.source import open_source
from ldrt_edge.convert.type_plan import FormatName, TypePlan
from ldrt_edge.convert.weights import canonical
from ldrt_edge.errors import require
from ldrt_edge.runtimes.base import Runtime
from ldrt_edge.runtimes.gguf_file import check_gguf
from ldrt_edge.runtimes.hf import HfRuntime
from ldrt_edge.runtimes.llamacpp import LlamaCppRuntime
from ldrt_edge.runtimes.mlx import MlxRuntime, on_gpu


class Subject(NamedTuple):
    """A quantised model in a folder that a runtime loads. matrix_bytes: of a preset's language model's matrices."""

    folder: Path
    stored: Quantized
    cost: Cost
    matrix_bytes: int = 0


class Subjects(Protocol):
    """A format. types: the presets that it knows; bases: those that are compared unless others are wanted."""

    name: ClassVar[FormatName]
    types: ClassVar[tuple[str, ...]]
    bases: ClassVar[tuple[str, ...]]

    def quantised(self, wanted: Wanted) -> AbstractContextManager[Subject]:
        """Quantise the language model to a preset; it is gone afterwards."""
        ...

    def given(self, path: Path) -> AbstractContextManager[Subject]:
        """The same language model as another tool quantised it: a GGUF file, or an MLX folder; its cost is not known.

        Raises:
            RuntimeLoadError, ArtifactError: it is not whole, or has no tensors that can be read.
        """
        ...

    def load(self, folder: Path, threads: int | None) -> Runtime:
        """A folder in the format's runtime."""
        ...


class GgufSubjects:
    """llama.cpp's. merged: is written in full precision once; work: a folder for all of this, which may be removed."""

    name: ClassVar[FormatName] = "gguf"
    types: ClassVar[tuple[str, ...]] = TYPES
    bases: ClassVar[tuple[str, ...]] = ("Q4_K_M", "Q3_K_M", "Q5_K_M", "IQ4_XS", "Q4_0")

    def __init__(self, merged: Path, work: Path) -> None:
        self._merged, self._work = merged, work

    @contextmanager
    def quantised(self, wanted: Wanted) -> Iterator[Subject]:
        """See `Subjects`."""
        full, pair, weights = self._files
        model = pair / "model-SUBJECT.gguf"
        _, cost = apart((), run_quantizer, full, model, wanted, weights)
        yield Subject(pair, read_back(model, wanted.type), cost, _matrix_bytes(model))
        model.unlink()

    @contextmanager
    def given(self, path: Path) -> Iterator[Subject]:
        """See `Subjects`."""
        check_gguf(path)
        _, pair, _ = self._files
        model = pair / "model-SUBJECT.gguf"
        model.symlink_to(path.resolve())
        yield Subject(pair, read_back(model), Cost(0, 0, 0), _matrix_bytes(model))
        model.unlink()

    def load(self, folder: Path, threads: int | None) -> Runtime:
        """See `Subjects`."""
        return LlamaCppRuntime(folder, threads=threads)

    @cached_property
    def _files(self) -> tuple[Path, Path, int]:
        """The full-precision language model, a folder with the rest of a pair, and how many weights the model has."""
        pair = self._work / "pair"
        shutil.rmtree(self._work, ignore_errors=True)
        pair.mkdir(parents=True)
        source = open_source(self._merged)
        text, vision = text_plan(source, lossless(source)), mmproj_plan(source, "f16")
        check_room(self._work, 2 * text.nbytes + vision.nbytes)
        write(vision, pair / "mmproj-F16.gguf", "vision")
        finish(source, pair)
        return write_full(text, self._work), pair, sum(math.prod(tensor.shape) for tensor in text.tensors)


class MlxSubjects:
    """MLX's. Where it has no GPU, transformers computes with the weights as MLX unpacks them, five times as fast."""

    name: ClassVar[FormatName] = "mlx"
    types: ClassVar[tuple[str, ...]] = tuple(SCHEMES)
    bases: ClassVar[tuple[str, ...]] = ("q4", "mixed_4_6", "mixed_3_6")

    def __init__(self, merged: Path, work: Path) -> None:
        self._merged, self._work = merged, work

    @contextmanager
    def quantised(self, wanted: Wanted) -> Iterator[Subject]:
        """See `Subjects`."""
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)
        (stored, matrix_bytes), cost = apart(("ldrt_edge.runtimes.mlx_model",), _pack, self._merged, self._work, wanted)
        yield Subject(self._work, stored, cost, matrix_bytes)

    @contextmanager
    def given(self, path: Path) -> Iterator[Subject]:
        """See `Subjects`."""
        mx = require("mlx.core", "mlx")
        arrays: dict[str, int] = {}
        for file in path.glob("*.safetensors"):
            arrays |= {name: array.nbytes for name, array in mx.load(str(file)).items() if name.startswith(LANGUAGE)}
        packed = tuple(name.removesuffix("scales") for name in arrays if name.endswith(".scales"))
        planned = [t for t in mlx_plan(open_source(self._merged), "f16").tensors if t.name.startswith(LANGUAGE)]
        bits = 8 * sum(arrays.values()) / sum(math.prod(tensor.shape) for tensor in planned)
        stored = Quantized(sum(arrays.values()), round(bits, 3), {}, ())
        yield Subject(path, stored, Cost(0, 0, 0), sum(n for name, n in arrays.items() if name.startswith(packed)))

    def load(self, folder: Path, threads: int | None) -> Runtime:
        """See `Subjects`; MLX schedules its own threads."""
        return MlxRuntime(folder) if on_gpu() else unpacked(self._merged, folder, threads)


def unpacked(merged: Path, folder: Path, threads: int | None) -> HfRuntime:
    """The merged model with the language model's tensors of an MLX folder made from it."""
    from ldrt_edge.runtimes.mlx_host import unpack
    from ldrt_edge.runtimes.mlx_model import load_network

    torch = require("torch", "train")
    runtime = HfRuntime(merged, threads=threads)
    parameters = {canonical(name): parameter for name, parameter in runtime.model.named_parameters()}
    for path, module in load_network(folder, widen=True).language_model.named_modules():
        given = {"weight": unpack(module)} if "weight" in module else {}
        given |= {"bias": np.array(module.bias)} if "bias" in module else {}
        for key, values in given.items():
            if (name := canonical(f"{LANGUAGE}{path}.{key}")) in parameters:  # a tied head has none of its own
                parameters[name].data.copy_(torch.from_numpy(values))
    return runtime


def _matrix_bytes(model: Path) -> int:
    return sum(int(tensor.n_bytes) for tensor in GGUFReader(model).tensors if len(tensor.shape) == 2)


@contextmanager
def planned(merged: Path, to: Format, types: Mapping[str, str], folder: Path, work: Path) -> Iterator[Subject]:
    """A language model whose matrices have these types, as `ldrt-edge quantize --plan` makes it; gone afterwards.

    work: keeps what several plans can be written from.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    work.mkdir(exist_ok=True)
    stored, cost = apart((), _write, merged, to, types, folder, work)
    yield Subject(folder, stored, cost)
    shutil.rmtree(folder)


def _write(merged: Path, to: Format, types: Mapping[str, str], folder: Path, work: Path) -> Quantized:
    vision = {"gguf": {"mmproj": {"*": "F16"}}, "mlx": {"vision": {"*": "f16"}}}[to.name]
    return to.write(open_source(merged), TypePlan(to.name, {"model": types, **vision}), folder, work)


def _pack(merged: Path, folder: Path, wanted: Wanted) -> tuple[Quantized, int]:
    """Write an MLX folder; returns what its language model comes to, and the bytes of that one's matrices."""
    source = open_source(merged)
    whole = mlx_plan(source, wanted.type)
    check_room(folder, whole.nbytes)
    write_mlx(source, whole, folder)
    language = (t for t in whole.tensors if t.name in whole.matrices and t.name.startswith(LANGUAGE))
    return whole.holds(), sum(tensor.nbytes for tensor in language)
