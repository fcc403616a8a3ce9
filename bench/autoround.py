"""AutoRound on a merged model's language model, as a peer for `ldrt_edge.bench.quantisers`.

    pip install auto-round
    python -m ldrt_edge.bench.autoround MERGED --data DATASET --out FILE.gguf [--iterations N] [--tokens N]
    python -m ldrt_edge.bench.quantisers MERGED --data DATASET --other AutoRound=FILE.gguf --out OUT

llama.cpp's Q4_K_M. It reads text alone: the questions and answers of training rows, one behind the other.

Source: Cheng et al., "Optimize weight rounding via signed gradient descent for the quantization of LLMs", EMNLP 2024.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ldrt_edge.bench.text_tools import PIECE, pieces, run
from ldrt_edge.convert.source import open_source
from ldrt_edge.dataset import Dataset
from ldrt_edge.errors import ArtifactError, MissingExtraError, require
from ldrt_edge.runtimes.hf import load_model

_SCHEME = "gguf:q4_k_m"


def quantise(merged: Path, data: Path, out: Path, iterations: int, tokens: int) -> None:
    """Write the language model as AutoRound's GGUF export.

    iterations: of its search for each layer. tokens: about how many it reads.

    Raises:
        DataError: the training rows have less than a piece of text.
        ArtifactError: the folder is no merged model, or AutoRound wrote no file.
        MissingExtraError: it is not installed.
    """
    torch, transformers = require("torch", "train"), require("transformers", "train")
    try:
        auto_round = importlib.import_module("auto_round")
    except ImportError as error:
        raise MissingExtraError("AutoRound is not installed: pip install auto-round") from error

    read = pieces(open_source(merged).front, Dataset(data), tokens)
    whole = load_model(merged, "float32")
    text = transformers.AutoModelForCausalLM.from_config(whole.config.text_config, dtype=torch.float32)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        text.save_pretrained(work)
        transformers.AutoTokenizer.from_pretrained(merged, local_files_only=True).save_pretrained(work)
        rounding = auto_round.AutoRound(
            work, scheme=_SCHEME, iters=iterations, nsamples=len(read), seqlen=PIECE, batch_size=4,
            dataset=[{"input_ids": torch.tensor([ids])} for ids in read],
        )  # fmt: skip
        rounding.quantize_and_save(str(Path(work, "made")), format=_SCHEME)
        made = list(Path(work, "made").rglob("*.gguf"))
        if len(made) != 1:
            raise ArtifactError(f"{merged}: AutoRound wrote {len(made)} GGUF files, wanted one")
        made[0].replace(out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the file."""
    parser = argparse.ArgumentParser(description="AutoRound on a merged model's language model.")
    parser.add_argument("merged", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="a dataset; the text of its training rows is read")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.gguf")
    parser.add_argument("--iterations", type=int, default=200, help="for each layer; AutoRound's own number")
    parser.add_argument("--tokens", type=int, default=8192, help="about how many")
    given = parser.parse_args(arguments)
    return run(lambda: quantise(given.merged, given.data, given.out, given.iterations, given.tokens), given.out)


if __name__ == "__main__":
    sys.exit(main())
