"""The stages of the line on a tiny model, each in a process forked from this one, to do harm to.

All is imported before the fork, so that what happens to a process happens in the stage and not in an import.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from articles import figure, jats, picture
from articles import folder as article_folder
from bundling import Made, make
from test_train import colour_dataset

from ldrt_edge import artifact
from ldrt_edge.bench.report import bench
from ldrt_edge.bundle.container import open_bundle
from ldrt_edge.bundle.pack import pack
from ldrt_edge.convert.gguf import convert
from ldrt_edge.convert.quantize import quantize
from ldrt_edge.errors import LdrtError
from ldrt_edge.train.base import resolve_base
from ldrt_edge.train.data.curate import curate
from ldrt_edge.train.data.generators import Reply, Request
from ldrt_edge.train.data.instruct import instruct
from ldrt_edge.train.lora import train
from ldrt_edge.train.merge import merge
from ldrt_edge.train.recipe import load_recipe

STAGES = ("train", "merge", "convert", "quantize", "bench", "bundle", "instruct")
SMALL = (
    "lora.rank=2", "lora.alpha=4", "lora.dropout=0", "precision=fp32", "validation_images=0", "rows_per_step=4",
    "vision_tokens=null", "align.epochs=1", "instruct.epochs=1", "save_steps=1",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """What the stages read."""

    base: Path
    data: Path
    adapter: Path
    made: Made
    pairs: Path

    def run(self, stage: str, out: Path) -> None:
        """A stage into `out`."""
        torch.set_num_threads(1)
        merged = self.made.edge.with_name("merged")
        match stage:
            case "train":
                train(resolve_base(str(self.base)), [self.data], out, load_recipe("starter", SMALL))
            case "merge":
                merge(resolve_base(str(self.base)), self.adapter, out)
            case "convert":
                convert(merged, out, "f32")
            case "quantize":
                quantize(merged, out, "q8")
            case "bench":
                bench(self.made.edge, self.data, out, merged, runs=0, threads=1)
            case "bundle":
                pack(self.made.edge, self.made.report, out, max_loss=100)
            case "instruct":
                instruct(self.pairs, out, Writer(), ["complex reasoning"], parallel=1)


class Writer:
    """A generator that answers from what it is told, at length."""

    name = "writer"

    def ask(self, request: Request) -> Reply:
        caption = request.user.partition("Caption: ")[2].partition("\n")[0]
        return Reply(json.dumps({"question": "What does it show?", "answer": " ".join([caption] * 40)}), 1)

    def close(self) -> None:
        pass


def make_line(base: Path, folder: Path) -> Line:
    """Everything that a stage reads, made of a tiny checkpoint in a new folder."""
    data = colour_dataset(folder / "colours", 12)
    adapter = train(resolve_base(str(base)), [data], folder / "adapter", load_recipe("starter", SMALL))
    files: dict[str, bytes] = {}
    for number in range(24):
        caption = f"Dose distribution over the left heel of patient {number + 100} in plan {number + 300}"
        files[f"{number}/a.xml"] = jats(f"10.1/{number}", figure(1, caption))
        files[f"{number}/x-g001.png"] = picture(number)
    pairs = curate([article_folder(folder / "articles", files)], folder / "pairs")
    return Line(base, data, adapter, make(base, folder), pairs)


def forked(work: Callable[[], None], told: Path = Path(os.devnull)) -> int:
    """Do `work` in a process of its own; its id. It exits with 0, or 3 after an error that a user would read.

    That error, or the traceback of another, goes into the file `told`.
    """
    child = os.fork()
    if child:
        return child
    status, reason = 9, ""
    try:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        work()
        status = 0
    except LdrtError as error:
        status, reason = 3 if "\n" not in str(error) else 4, str(error)
    except BaseException:
        reason = traceback.format_exc()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
        told.write_text(reason)
        os._exit(status)


def finished(child: int) -> int:
    """The exit status of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def name_of(stage: str) -> str:
    return "made.ldrt" if stage == "bundle" else "made"


def check_whole(out: Path) -> None:
    """What has its name is whole."""
    if out.is_file():
        open_bundle(out).check()
    elif out.exists():
        artifact.verify(out)


def result(out: Path) -> Any:
    """What must come out the same: all bytes, but for a report those of its times."""
    if out.is_file():
        return hashlib.sha256(out.read_bytes()).hexdigest()
    manifest = artifact.read(out)
    if manifest.kind == "report":
        report = json.loads((out / "report.json").read_text())
        samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        return report["vqa"], rounded(report["fidelity"]), rounded(samples)
    return [(entry.path, entry.sha256) for entry in manifest.files], manifest.metrics


def rounded(value: Any) -> Any:
    """JSON with its numbers to four digits: a bench that goes on adds up in another order."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
