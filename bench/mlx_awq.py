"""mlx-lm's own AWQ on a merged model's language model, as a peer for `ldrt_edge.bench.quantisers`.

    python -m ldrt_edge.bench.mlx_awq MERGED --data DATASET --out FOLDER [--tokens N]
    python -m ldrt_edge.bench.quantisers MERGED --to mlx --data DATASET --other AWQ=FOLDER --out OUT

Four bits in groups of 64, the bytes of the preset q4. It reads text alone: the questions and answers of training rows,
one behind the other, in pieces of 512 tokens as its command line does with its own text. Products of many rows go
through numpy, since on Linux MLX's own are slow (`ldrt_edge.runtimes.mlx_host`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldrt_edge.bench.text_tools import pieces, run
from ldrt_edge.convert.mlx import write
from ldrt_edge.convert.mlx_plan import LANGUAGE, mlx_plan
from ldrt_edge.convert.source import open_source
from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import require

_BITS, _GROUP_SIZE = 4, 64


def quantise(merged: Path, data: Path, out: Path, tokens: int) -> None:
    """Write an MLX folder whose language model mlx-lm's AWQ made; the rest of it is that of the preset q4.

    tokens: about how many it reads.

    Raises:
        DataError: the training rows have less than a piece of text.
        ArtifactError: the folder cannot become MLX.
    """
    mx = require("mlx.core", "mlx")
    from mlx.utils import tree_flatten
    from mlx_lm.quant.awq import awq_quantize, llama_awq

    from ldrt_edge.runtimes.mlx_host import use_numpy
    from ldrt_edge.runtimes.mlx_model import load_network

    source = open_source(merged)
    read = pieces(source.front, Dataset(data), tokens)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        write(source, mlx_plan(source, "f16"), Path(work))
        network = load_network(Path(work), widen=True)
    use_numpy(network)
    awq_quantize(
        network.language_model, mx.array(read), llama_awq, bits=_BITS, group_size=_GROUP_SIZE, embed_bits=_BITS,
        embed_group_size=_GROUP_SIZE,
    )  # fmt: skip
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    write(source, mlx_plan(source, "q4"), part, shard_bytes=sys.maxsize)
    made = {f"{LANGUAGE}{name}": _half(value, mx) for name, value in tree_flatten(network.language_model.parameters())}
    plain, whole = part / "model.safetensors", part / ".model.safetensors"
    mx.save_safetensors(str(whole), {**mx.load(str(plain)), **made}, metadata={"format": "mlx"})
    whole.replace(plain)
    part.rename(out)


def _half(value: Any, mx: Any) -> Any:
    return value.astype(mx.float16) if value.dtype == mx.float32 else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the folder."""
    parser = argparse.ArgumentParser(description="mlx-lm's AWQ on a merged model's language model.")
    parser.add_argument("merged", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="a dataset; the text of its training rows is read")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="about how many")
    given = parser.parse_args(arguments)
    return run(lambda: quantise(given.merged, given.data, given.out, given.tokens), given.out)


if __name__ == "__main__":
    sys.exit(main())
