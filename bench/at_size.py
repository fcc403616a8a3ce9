"""The line at size: a LLaVA-1.5 of real shape with random weights, through every stage after training, on this machine.

    python -m ldrt_edge.bench.at_size FOLDER [--layers 32] [--converter convert_hf_to_gguf.py] [--stages a,b]

Nothing is downloaded: about 14 GB of bf16 weights are drawn, merged with a random adapter, converted, quantised and
asked a question. Each stage runs in a process of its own, whose wall time and peak memory are printed; with
`--converter`, llama.cpp's official text converter and its quantiser run on the same files beside ours. FOLDER needs
about 50 GB and can be deleted afterwards. A merge or an export that is there is neither made nor timed again.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldrt_edge import artifact, console
from ldrt_edge.errors import ConfigError, LdrtError, require
from ldrt_edge.runtimes.processor import physical_cores

STAGES = ("merge", "text", "upstream", "gguf", "mlx", "chat")
_SHARD_BYTES = 5_000_000_000
_RANK = 8
_PROJECTIONS = ("q_proj", "v_proj")
_DEVIATION = 0.02
_QUESTION = "How many beams are used?"
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
        "chat": [("chat --ask", [*ldrt, "chat", gguf, "--image", picture, "--ask", _QUESTION, "--max-tokens", 16])],
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


def make_base(out: Path, layers: int) -> Path:
    """A base artefact in LLaVA-1.5-7B's shape (13.5 GB at 32 layers), sharded bf16 safetensors, drawn from a seed."""
    torch, transformers = require("torch", "train"), require("transformers", "train")
    save_file = require("safetensors.torch", "train").save_file
    with artifact.create(out, "base", {"shape": "llava-1.5-7b", "layers": layers}, seed=0) as draft:
        if draft.complete:
            return out
        tokenizer = _tokenizer(draft.path)
        config = transformers.LlavaConfig(
            text_config={
                "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": layers,
                "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064,
                "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            },
            vision_config={
                "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
                "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
                "projection_dim": 768,
            },
            architectures=["LlavaForConditionalGeneration"],
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=False,
        )  # fmt: skip
        config.save_pretrained(draft.path)
        with torch.device("meta"):
            shapes = {n: t.shape for n, t in transformers.LlavaForConditionalGeneration(config).state_dict().items()}
        generator, shard, weight_map, number = torch.Generator().manual_seed(0), {}, {}, 1
        for name, shape in console.track(list(shapes.items()), "drawing weights"):
            is_norm = name.endswith("weight") and len(shape) == 1
            drawn = torch.empty(shape, dtype=torch.bfloat16)
            shard[name] = drawn.fill_(1) if is_norm else drawn.normal_(0, _DEVIATION, generator=generator)
            weight_map[name] = f"model-{number:05}.safetensors"
            if sum(t.nbytes for t in shard.values()) > _SHARD_BYTES or name == list(shapes)[-1]:
                save_file(shard, draft.path / weight_map[name], metadata={"format": "pt"})
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
                state[f"{stem}.lora_B.weight"] = torch.randn(rows, _RANK, generator=generator) * _DEVIATION
            elif name.startswith("multi_modal_projector."):
                state[module] = torch.randn(entry.shape, generator=generator) * _DEVIATION
        save_file(state, draft.path / "adapter_model.safetensors", metadata={"format": "pt"})
        peft.LoraConfig(
            r=_RANK, lora_alpha=2 * _RANK, target_modules=rf".*language_model.*\.({'|'.join(_PROJECTIONS)})",
            modules_to_save=["multi_modal_projector"], base_model_name_or_path="random",
        ).save_pretrained(str(draft.path))  # fmt: skip
        Front.load(base).save(draft.path)


def _tokenizer(folder: Path) -> Any:
    """Llama's kind of tokenizer (SentencePiece, bytes as fallback), a processor and Vicuna's chat form."""
    transformers, sentencepiece = require("transformers", "train"), require("sentencepiece", "train")
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([_QUESTION]), model_writer=trained, model_type="bpe", vocab_size=300,
        hard_vocab_limit=False, byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    described = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, **words}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "resample": 3,
        "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336},
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }))  # fmt: skip
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
        "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    return tokenizer


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
