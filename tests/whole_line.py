"""The line from a base and data to a bundle, in a process of its own: python tests/whole_line.py BASE DATASET FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

from ldrt_edge.bench.report import bench
from ldrt_edge.bundle.pack import pack
from ldrt_edge.convert.quantize import quantize
from ldrt_edge.train.base import resolve_base
from ldrt_edge.train.lora import train
from ldrt_edge.train.merge import merge
from ldrt_edge.train.recipe import load_recipe

SETTINGS = (
    "lora.rank=4", "lora.alpha=8", "precision=fp32", "validation_images=2", "rows_per_step=4", "vision_tokens=null",
    "instruct.epochs=2", "save_steps=3", "eval_steps=3", "sample_steps=4", "log_steps=2",
)  # fmt: skip


def line(base: Path, data: Path, folder: Path) -> Path:
    """Train, merge, quantise, measure without timing, pack; the bundle's path."""
    stock = resolve_base(str(base))
    adapter = train(stock, [data], folder / "adapter", load_recipe("starter", SETTINGS))
    merged = merge(stock, adapter, folder / "merged")
    edge = quantize(merged, folder / "gguf", "Q4_K_M")
    report = bench(edge, data, folder / "report", merged, runs=0, threads=1)
    return pack(edge, report, folder / "knee.ldrt", max_loss=100)


if __name__ == "__main__":
    print(line(*map(Path, sys.argv[1:])))
