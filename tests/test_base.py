"""What `--base` may name: folders in both layouts, artefacts, the starter, the hub; and what is refused."""

from __future__ import annotations

import errno
import http.server
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Tiny

from ldrt_edge import __version__, artifact
from ldrt_edge.errors import ArtifactError, ConfigError
from ldrt_edge.train.base import resolve_base

HUB_ID = "llava-hf/llava-tiny-hf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def checkpoint(tiny: Tiny, tmp_path: Path) -> Path:
    """A sharded checkpoint in the hub's layout that a test may damage."""
    return Path(shutil.copytree(tiny("llava15", "llama", layout="hub"), tmp_path / "checkpoint"))


def refusal(spec: str | Path, kind: type[Exception] = ArtifactError, **options: Any) -> str:
    with pytest.raises(kind) as refused:
        resolve_base(str(spec), **options)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("layout", ["transformers5", "hub"])
@pytest.mark.parametrize(("family", "text"), [("llava15", "llama"), ("llavanext", "mistral"), ("llava15", "smollm2")])
def test_hugging_face_folders_are_bases(tiny: Tiny, family: str, text: str, layout: str) -> None:
    folder = tiny(family, text, layout=layout)
    base = resolve_base(str(folder))
    assert (base.folder, base.name, base.revision) == (folder, folder.name, None)
    assert base.identity.kind == "hf"


def test_identity_is_of_the_weights_not_of_the_place(checkpoint: Path, tiny: Tiny) -> None:
    identity = resolve_base(str(checkpoint)).identity
    assert identity == resolve_base(str(tiny("llava15", "llama", layout="hub"))).identity
    shard = checkpoint / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    next(iter(tensors.values())).flatten()[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    assert resolve_base(str(checkpoint)).identity != identity


def test_an_artefact_is_known_by_its_manifest(tiny: Tiny, tmp_path: Path) -> None:
    with artifact.create(tmp_path / "merged", "merged", {}) as draft:
        shutil.copytree(tiny("llava15", "llama"), draft.path, dirs_exist_ok=True)
    assert resolve_base(str(tmp_path / "merged")).identity == artifact.identity(tmp_path / "merged")
    with artifact.create(tmp_path / "report", "report", {}):
        pass
    assert "wanted: base or merged" in refusal(tmp_path / "report")
    (tmp_path / "merged" / "model.safetensors").write_bytes(b"short")
    assert "model.safetensors: 5 bytes" in refusal(tmp_path / "merged")


def test_the_word_starter_is_assembled_once(starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cached = tmp_path / ".cache" / "ldrt-edge" / "starter" / __version__
    cached.parent.mkdir(parents=True)
    cached.symlink_to(starter)
    base = resolve_base("starter")
    assert (base.name, base.folder) == ("starter", cached)
    assert base.identity == artifact.identity(starter)


@pytest.mark.slow
def test_the_word_starter_assembles_it_when_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    base = resolve_base("starter")
    artifact.verify(base.folder, "base")
    assert [path.name for path in base.folder.parent.iterdir()] == [__version__], "nothing half-written stays"


def config_with(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


def cut_shard(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:40])


def scramble_header(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:8] + b"]" + raw[9:])


def huge_header(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    with shard.open("wb") as stream:
        stream.write(struct.pack("<Q", 1 << 40))
        stream.truncate(200_000_000)


def drop_shards(folder: Path) -> None:
    for shard in folder.glob("*.safetensors"):
        shard.unlink()


def drop_tensor(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    tensors.popitem()
    save_file(tensors, shard, metadata={"format": "pt"})


def index_that_leaves(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))


def only_pickles(folder: Path) -> None:
    drop_shards(folder)
    (folder / "model.safetensors.index.json").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    drop_shards(folder)
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (config_with(model_type="qwen2_vl"), ["'qwen2_vl' is no LLaVA", "llava, llava_next"]),
        (config_with(model_type=None), ["None is no LLaVA"]),
        (config_with(text_config={"model_type": "qwen2"}), ["text_config", "'qwen2'", "llama, mistral"]),
        (config_with(vision_config={"model_type": "siglip_vision_model"}), ["vision_config", "siglip", "clip"]),
        (cut_shard, ["model-00002-of-00002.safetensors is truncated", "its header says"]),
        (cut_header, ["model-00001-of-00002.safetensors is truncated", "40 bytes"]),
        (scramble_header, ["model-00001-of-00002.safetensors is corrupt"]),
        (huge_header, ["model-00001-of-00002.safetensors is truncated or no safetensors"]),
        (drop_shards, ["model-00001-of-00002.safetensors is missing", "model-00002-of-00002.safetensors is missing"]),
        (drop_tensor, ["lacks 1 tensors"]),
        (index_that_leaves, ["'../other.safetensors' is not the name of a safetensors file"]),
        (only_pickles, ["pickle checkpoints are refused", "pytorch_model.bin", "safetensors"]),
        (no_weights, ["no weights"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "not JSON"]),
        (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
    ],
)
def test_bad_checkpoints_are_refused(checkpoint: Path, damage: Callable[[Path], None], wanted: list[str]) -> None:
    damage(checkpoint)
    message = refusal(checkpoint)
    assert str(checkpoint) in message
    for words in wanted:
        assert words in message


@pytest.mark.parametrize("spec", ["/no/such/folder", "./nowhere", "~/nowhere", "nowhere", "a/b/c"])
def test_paths_that_lead_nowhere_are_told_from_hub_ids(spec: str) -> None:
    assert f"{spec}: no such folder" in refusal(spec, ConfigError)


def test_a_missing_folder_beside_others_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "no such folder" in refusal("models/llava", ConfigError)


def test_a_file_and_needless_revisions_are_refused(checkpoint: Path) -> None:
    assert "is a file" in refusal(checkpoint / "config.json", ConfigError)
    assert "goes with a hub id" in refusal(checkpoint, ConfigError, revision="main")
    assert "goes with a hub id" in refusal("starter", ConfigError, revision="main")
    assert "two revisions" in refusal(f"{HUB_ID}@v1", ConfigError, revision="v2")


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[str]:
    """A hub on loopback with one model, which also offers a pickle."""
    torch.save({}, checkpoint / "pytorch_model.bin")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            if path in (f"/api/models/{HUB_ID}/revision/{revision}" for revision in ("main", "v1", COMMIT)):
                self.send(json.dumps({"id": HUB_ID, "sha": COMMIT}).encode(), body)
            elif path == f"/api/models/{HUB_ID}/tree/{COMMIT}":
                files = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": f"{index:040x}"}
                    for index, file in enumerate(sorted(checkpoint.iterdir()))
                ]
                self.send(json.dumps(files).encode(), body)
            elif path.startswith(f"/{HUB_ID}/resolve/{COMMIT}/"):
                self.send((checkpoint / path.rpartition("/")[2]).read_bytes(), body)
            else:
                known = HUB_ID in path
                self.send_response(404)
                self.send_header("X-Error-Code", "RevisionNotFound" if known else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def send(self, content: bytes, body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hash(content):x}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def resolve_elsewhere(spec: str, home: Path, **environment: str) -> str:
    """What resolving says in a fresh process: the hub's client reads its settings at import."""
    code = (
        "import sys\n"
        "from ldrt_edge.errors import LdrtError\n"
        "from ldrt_edge.train.base import resolve_base\n"
        "try:\n"
        "    base = resolve_base(sys.argv[1])\n"
        "    files = sorted(path.name for path in base.folder.iterdir())\n"
        "    print(base.name, base.revision, base.identity.manifest_sha256, files)\n"
        "except LdrtError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, spec], capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "HF_HOME": str(home), **environment},
    )
    return done.stdout


def test_a_hub_id_is_fetched_without_its_pickles(hub: str, checkpoint: Path, tmp_path: Path) -> None:
    identity = resolve_base(str(checkpoint)).identity.manifest_sha256
    for spec in (HUB_ID, f"{HUB_ID}@v1"):
        said = resolve_elsewhere(spec, tmp_path / "cache", HF_ENDPOINT=hub)
        assert said.startswith(f"{HUB_ID} {COMMIT} {identity}")
        assert "tokenizer.model" in said and "pytorch_model.bin" not in said
    # what was fetched is found again without a network
    assert identity in resolve_elsewhere(f"{HUB_ID}@v1", tmp_path / "cache", HF_HUB_OFFLINE="1")


def test_unknown_ids_and_revisions_are_refused(hub: str, tmp_path: Path) -> None:
    for spec in ("llava-hf/no-such-model", f"{HUB_ID}@no-such-revision"):
        said = resolve_elsewhere(spec, tmp_path / "cache", HF_ENDPOINT=hub)
        assert said.startswith(f"ConfigError {spec}: the hub has no such model or revision")
        assert said.count("\n") == 1


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_offline_says_what_to_do(tmp_path: Path, environment: dict[str, str]) -> None:
    said = resolve_elsewhere("llava-hf/llava-1.5-7b-hf@main", tmp_path / "cache", **environment)
    assert said.startswith("ConfigError llava-hf/llava-1.5-7b-hf@main: ")
    assert "hf download llava-hf/llava-1.5-7b-hf --revision main" in said
    assert said.count("\n") == 1


def test_a_disk_that_fills_while_downloading_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)

    with pytest.raises(ConfigError, match=r"llava-hf/llava-1\.5-7b-hf: the disk is full"):
        resolve_base("llava-hf/llava-1.5-7b-hf")
