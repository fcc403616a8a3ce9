"""The line at size: a LLaVA-1.5 of real shape with random weights, through every stage after training, on this machine.

    python -m ldrt_edge.bench.at_size FOLDER [--layers 32] [--converter convert_hf_to_gguf.py] [--stages a,b]

Nothing is downloaded: about 14 GB of bf16 weights are drawn, merged with a random adapter, converted, quantised and
asked a question. Each stage runs in a process of its own, whose wall time and peak memory are printed; with
`--converter`, llama.cpp's official text converter and its quantiser run on the same files beside ours. FOLDER needs
about 50 GB and can be deleted afterwards. A merge or an export that is there is neither made nor timed again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldrt_edge import artifact, console
from ldrt_edge.bench.shapes import DEVIATION, QUESTION, SHAPES, tensor_shapes, write_config
from ldrt_edge.bench.steps import digest
from ldrt_edge.errors import ConfigError, LdrtError, require
from ldrt_edge.runtimes.processor import physical_cores

STAGES = ("merge", "text", "upstream", "gguf", "mlx", "chat")
_SHARD_BYTES = 5_000_000_000
_RANK = 8
_PROJECTIONS = ("q_proj", "v_proj")
_WRITE_TEXT = (
    "import sys; from pathlib import Path; from ldrt_edge.convert.gguf import write_text; "
    "write_text(Path(sys.argv[1]), Path(sys.argv[2]), 'bf16')"
)
_STOCK_QUANTIZE = (
    "import ctypes, sys, llama_cpp as l; p = l.llama_model_quantize_default_params(); "
    "p.ftype, p.nthread = l.LLAMA_FTYPE_MOSTLY_Q4_K_M, int(sys.argv[3]); "
    "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))"
)
_LEFTOVERS = {"text": ("ours.gguf", "ours-q4.gguf"), "upstream": ("upstream.gguf", "upstream-q4.gguf")}
"""Files that no later stage reads: 18 GB each pair."""
_QUANTIZE = (
    "import sys; from ldrt_edge.convert.quantize_worker import Job, main; "
    "sys.exit(main(Job(sys.argv[1], sys.argv[2], 15, int(sys.argv[3]))))"  # 15: llama.cpp's number of Q4_K_M
)


@dataclass(frozen=True)
class Cost:
    """One stage's process."""

    stage: str
    seconds: float
    peak_bytes: int


def run(
    folder: Path, layers: int = 32, converter: Path | None = None, stages: Sequence[str] = STAGES
) -> list[Cost]:
    """Make the checkpoint in `folder` if it is not there, run the stages, return what each cost.

    converter: llama.cpp's `convert_hf_to_gguf.py`; without it "upstream" is skipped.

    Raises:
        ConfigError: an unknown stage, or one that failed.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ConfigError(f"--stages {unknown[0]}: choose from {', '.join(STAGES)}")
    folder.mkdir(parents=True, exist_ok=True)
    base, adapter, merged = make_base(folder / "base", layers), folder / "adapter", folder / "merged"
    make_adapter(base, adapter)
    picture = folder / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)).save(picture)
    ours, theirs = folder / "ours.gguf", folder / "upstream.gguf"
    ours_q4, theirs_q4 = folder / "ours-q4.gguf", folder / "upstream-q4.gguf"
    threads = physical_cores()
    ldrt = [sys.executable, "-c", "from ldrt_edge.cli import main; main()"]
    gguf, mlx = folder / "gguf-q4", folder / "mlx-q4"
    commands: dict[str, list[tuple[str, list[Any]]]] = {
        "merge": [("merge, proof included", [*ldrt, "merge", "--base", base, "--adapter", adapter, "--out", merged])],
        "text": [
            ("ours: text to GGUF", [sys.executable, "-c", _WRITE_TEXT, merged, ours]),
            ("ours: quantiser", [sys.executable, "-c", _QUANTIZE, ours, ours_q4, threads]),
        ],
        "upstream": [
            ("upstream: text to GGUF", [sys.executable, converter, merged, "--outtype", "bf16", "--outfile", theirs]),
            ("upstream: quantiser", [sys.executable, "-c", _STOCK_QUANTIZE, theirs, theirs_q4, threads]),
        ],
        "gguf": [("quantize --q4, parity included", [*ldrt, "quantize", merged, "--q4", "--out", gguf])],
        "mlx": [("quantize --to mlx --q4", [*ldrt, "quantize", merged, "--to", "mlx", "--q4", "--out", mlx])],
        "chat": [("chat --ask", [*ldrt, "chat", gguf, "--image", picture, "--ask", QUESTION, "--max-tokens", 16])],
    }
    if converter is None:
        commands["upstream"] = []
    costs = []
    made = {"merge": merged, "gguf": gguf, "mlx": mlx}
    for stage in stages:
        if stage in made and made[stage].exists():
            console.say(f"{stage}: {made[stage]} is there already")
            continue
        costs += [_measure(label, command) for label, command in commands[stage]]
        for name in _LEFTOVERS.get(stage, ()):
            (folder / name).unlink(missing_ok=True)
    return costs


def make_base(
    out: Path, layers: int, name: str = "llava-1.5-7b", texts: Sequence[str] = (QUESTION,), vocabulary: int = 300
) -> Path:
    """A base artefact in a model's shape (7B: 13.5 GB at 32 layers), sharded bf16 safetensors, drawn from a seed.

    texts, vocabulary: see `shapes.write_config`.
    """
    torch, save_file = require("torch", "train"), require("safetensors.torch", "train").save_file
    config = {"shape": name, "layers": layers, "texts": digest({"texts": list(texts)}), "vocabulary": vocabulary}
    with artifact.create(out, "base", config, seed=0) as draft:
        if draft.complete:
            return out
        shape = replace(SHAPES[name], text=SHAPES[name].text | {"num_hidden_layers": layers})
        shapes = tensor_shapes(write_config(draft.path, shape, texts, vocabulary))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator, shard, weight_map, number = torch.Generator(device).manual_seed(0), {}, {}, 1
        for tensor, sizes in console.track(list(shapes.items()), "drawing weights"):
            is_norm = tensor.endswith("weight") and len(sizes) == 1
            drawn = torch.empty(sizes, dtype=torch.bfloat16, device=device)
            shard[tensor] = drawn.fill_(1) if is_norm else drawn.normal_(0, DEVIATION, generator=generator)
            weight_map[tensor] = f"model-{number:05}.safetensors"
            if sum(t.nbytes for t in shard.values()) > _SHARD_BYTES or tensor == list(shapes)[-1]:
                save_file(shard, draft.path / weight_map[tensor], metadata={"format": "pt"})
                shard, number = {}, number + 1
        index = {"metadata": {}, "weight_map": weight_map}
        (draft.path / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def make_adapter(base: Path, out: Path) -> None:
    """A LoRA adapter artefact for `base` that changes something."""
    torch, peft = require("torch", "train"), require("peft", "train")
    save_file = require("safetensors.torch", "train").save_file
    from ldrt_edge.convert.weights import Weights
    from ldrt_edge.front import Front
    from ldrt_edge.train.base import resolve_base

    with artifact.create(out, "adapter", {"rank": _RANK}, [resolve_base(str(base)).identity], seed=0) as draft:
        if draft.complete:
            return
        generator, state = torch.Generator().manual_seed(1), {}
        for name, entry in Weights(base).entries.items():
            module = f"base_model.model.model.{name}"
            if name.startswith("language_model.") and name.split(".")[-2] in _PROJECTIONS:
                rows, columns = entry.shape
                stem = module.removesuffix(".weight")
                state[f"{stem}.lora_A.weight"] = torch.randn(_RANK, columns, generator=generator) / columns**0.5
                state[f"{stem}.lora_B.weight"] = torch.randn(rows, _RANK, generator=generator) * DEVIATION
            elif name.startswith("multi_modal_projector."):
                state[module] = torch.randn(entry.shape, generator=generator) * DEVIATION
        save_file(state, draft.path / "adapter_model.safetensors", metadata={"format": "pt"})
        peft.LoraConfig(
            r=_RANK, lora_alpha=2 * _RANK, target_modules=rf".*language_model.*\.({'|'.join(_PROJECTIONS)})",
            modules_to_save=["multi_modal_projector"], base_model_name_or_path="random",
        ).save_pretrained(str(draft.path))  # fmt: skip
        Front.load(base).save(draft.path)


def _measure(label: str, command: Sequence[Any]) -> Cost:
    """Run a command to its end; its wall time, and its own peak of resident memory."""
    console.say(label)
    started = time.perf_counter()
    child = os.spawnv(os.P_NOWAIT, str(command[0]), [str(word) for word in command])
    _, status, usage = os.wait4(child, 0)
    if status:
        raise ConfigError(f"{label}: ended with status {os.waitstatus_to_exitcode(status)}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    cost = Cost(label, round(time.perf_counter() - started, 1), peak)
    console.say(f"{cost.stage}: {cost.seconds:.1f} s, peak {cost.peak_bytes / 1e9:.2f} GB")
    return cost


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and one JSON line at the end."""
    parser = argparse.ArgumentParser(description="The line at the size of LLaVA-1.5-7B, with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32, help="of the language model; fewer for a trial")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--stages", default=",".join(STAGES))
    given = parser.parse_args(arguments)
    try:
        costs = run(given.folder, given.layers, given.converter, given.stages.split(","))
    except LdrtError as error:
        print(error, file=sys.stderr)
        return 1
    for cost in costs:
        print(f"{cost.stage:34} {cost.seconds:8.1f} s   peak {cost.peak_bytes / 1e9:6.2f} GB")
    print(json.dumps([asdict(cost) for cost in costs]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
