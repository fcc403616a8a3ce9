"""The line, end to end, on the starter: what `make demo` runs, with fewer pictures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ldrt_edge import artifact
from ldrt_edge.dataset import Dataset
from ldrt_edge.demo import demo

KINDS = {
    "starter": "base", "phantom": "dataset", "adapter": "adapter", "merged": "merged", "gguf-f16": "gguf",
    "gguf-q4": "gguf", "report": "report",
}


@pytest.fixture(scope="module")
def line(starter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder after a short run; the starter is put there, so that it is not assembled again."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "starter").symlink_to(starter)
    demo(folder, images=45, questions=16, settings=["align.epochs=0", "instruct.epochs=1", "validation_images=2"])
    return folder


def test_every_stage_left_a_whole_artefact_made_from_the_one_before(line: Path) -> None:
    manifests = {name: artifact.verify(line / name, kind) for name, kind in KINDS.items()}  # type: ignore[arg-type]
    made_from = {
        "adapter": ["starter", "phantom"], "merged": ["starter", "adapter"], "gguf-f16": ["merged"],
        "gguf-q4": ["merged"], "report": ["gguf-q4", "phantom", "merged"],
    }
    for name, sources in made_from.items():
        assert [i.manifest_sha256 for i in manifests[name].inputs] == [manifests[source].sha256 for source in sources]


def test_the_exports_compute_what_the_merged_model_computes(line: Path) -> None:
    f16 = artifact.read(line / "gguf-f16").metrics["fidelity"]
    assert f16["mean_kld"] <= 5e-4 and f16["top1_agreement"] + f16["undecided"] >= 0.996
    report = json.loads((line / "report" / "report.json").read_text())
    assert report["fidelity"]["mean_kld"] < 0.2 and report["fidelity"]["top1_agreement"] > 0.6
    assert report["vqa"]["overall"]["accuracy"]["n"] >= 16
    assert report["latency"]["decode_tok_per_s"]["median"] > 0


def test_the_demo_again_finds_everything_done(line: Path) -> None:
    before = artifact.read(line / "report").sha256
    demo(line, images=45, questions=16, settings=["align.epochs=0", "instruct.epochs=1", "validation_images=2"])
    assert artifact.read(line / "report").sha256 == before


def test_a_stranger_asks_about_a_picture(line: Path) -> None:
    dataset = Dataset(line / "phantom")
    picture = dataset.image_path(dataset.rows("test")[0])
    command = [sys.executable, "-m", "ldrt_edge.cli", "chat", line / "gguf-q4", "--image", picture, "--json"]
    done = subprocess.run(
        [*map(str, command), "--ask", "What does this image show?", "--max-tokens", "12"],
        capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["answer"].strip() and len(answer["image_sha256"]) == 64


def test_a_model_whose_file_was_changed_is_refused(line: Path, tmp_path: Path) -> None:
    copy = tmp_path / "edge"
    shutil.copytree(line / "gguf-q4", copy)
    with next(copy.glob("model-*.gguf")).open("ab") as stream:
        stream.write(b"x")
    command = [sys.executable, "-m", "ldrt_edge.cli", "chat", str(copy), "--ask", "hello"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "the manifest says" in done.stderr and "Traceback" not in done.stderr
