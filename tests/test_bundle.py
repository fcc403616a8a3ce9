"""The bundle: what is in it, whom it is from, and that nothing which was touched or made up gets through."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from bundling import Made, make, sign, write_small
from click.testing import CliRunner, Result
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard
from PIL import Image
from serving import Server

from ldrt_edge import artifact
from ldrt_edge.artifact import FileEntry
from ldrt_edge.bundle import container, keys
from ldrt_edge.bundle.container import open_bundle
from ldrt_edge.bundle.evidence import read_evidence
from ldrt_edge.bundle.open import accept, check_whole, install, model_folder, open_any
from ldrt_edge.bundle.pack import _source, pack
from ldrt_edge.bundle.statement import dump, parse
from ldrt_edge.chat.desk import Model
from ldrt_edge.cli import cli
from ldrt_edge.errors import ArtifactError, ConfigError, LdrtError
from ldrt_edge.release import RELEASE, Verdict

Tiny = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tiny("llava15", "smollm2"), tmp_path_factory.mktemp("bundle"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test is another user, who trusts nobody yet."""
    monkeypatch.setenv("LDRT_EDGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def signed(made: Made, tmp_path: Path) -> Path:
    """A bundle of the export, signed by its maker."""
    path = pack(made.edge, made.report, tmp_path / "tiny.ldrt", base="a base", licence="apache-2.0", max_loss=100)
    return sign(path, made.key)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def check(path: Path) -> None:
    opened = open_any(path)
    accept(opened)
    check_whole(opened)


def strict(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar, "r:") as stream:
        return {member.name: stream.extractfile(member).read() for member in stream}  # type: ignore[union-attr]


# --- what is in it --------------------------------------------------------------------------------------------------


def test_a_bundle_holds_the_export_its_report_and_both_papers(signed: Path, made: Made) -> None:
    files = strict(signed)

    packed = {f"models/tiny/{path.relative_to(made.edge)}": path for path in made.edge.rglob("*") if path.is_file()}
    packed |= {f"report/{path.relative_to(made.report)}": path for path in made.report.rglob("*") if path.is_file()}
    assert set(files) == {"bundle.json", "bundle.sig", "README.md", "sbom.cdx.json", *packed}
    assert all(files[name] == path.read_bytes() for name, path in packed.items())
    assert list(files) == ["bundle.json", "bundle.sig", *sorted(set(files) - {"bundle.json", "bundle.sig"})]
    assert "models/tiny/golden/records.jsonl" in files and "report/report.html" in files


def test_the_papers_say_what_was_measured(signed: Path, made: Made) -> None:
    files, report = strict(signed), json.loads((made.report / "report.json").read_text())
    loss = report["vqa"]["loss"]

    bill = json.loads(files["sbom.cdx.json"])
    model = bill["metadata"]["component"]
    shown = {m["type"]: m for m in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    assert shown["loss against the reference"]["confidenceInterval"] == {
        "lowerBound": f"{loss['ci_low']:.6g}", "upperBound": f"{loss['ci_high']:.6g}",
    }  # fmt: skip
    assert float(shown["accuracy"]["value"]) == pytest.approx(report["vqa"]["overall"]["accuracy"]["value"])
    kinds = {component["type"] for component in bill["components"]}
    assert kinds == {"data", "file", "library"} and model["licenses"] == [{"license": {"name": "apache-2.0"}}]
    weights = {c["name"]: c["hashes"][0]["content"] for c in bill["components"] if c["type"] == "file"}
    assert weights == {path.name: artifact.file_sha256(path) for path in made.edge.glob("*.gguf")}

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(files["sbom.cdx.json"].decode()) is None
    assert validator.validate_str(json.dumps(bill | {"version": "x"})) is not None, "the validator finds nothing"
    considerations = model["modelCard"]["considerations"]
    assert "Research" in considerations["useCases"][0] and len(considerations["technicalLimitations"]) == 3

    card = ModelCard(files["README.md"].decode())  # as the hub reads it
    assert card.data.license == "apache-2.0" and card.data.base_model == "a base"
    assert {result.metric_type for result in card.data.eval_results or ()} == set(shown)
    assert "Not for diagnosis" in card.text


def test_the_same_inputs_give_the_same_bytes_signature_included(made: Made, signed: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    again = tmp_path / "again" / "tiny.ldrt"
    pack(made.edge, made.report, again, base="a base", licence="apache-2.0", max_loss=100)
    assert open_bundle(again).digest == open_bundle(signed).digest
    assert sign(again, made.key).read_bytes() == signed.read_bytes()

    before = signed.read_bytes()
    pack(made.edge, made.report, signed, base="a base", licence="apache-2.0", max_loss=100)
    assert signed.read_bytes() == before, "made again, it stays, with its signature"
    with pytest.raises(ConfigError, match="another bundle"):
        pack(made.edge, made.report, signed, base="another", max_loss=100)


def test_a_model_that_its_loss_does_not_release_is_packed_only_as_such(made: Made, tmp_path: Path, home: Path) -> None:
    out = tmp_path / "lossy.ldrt"
    arguments = ("bundle", made.edge, "--report", made.report, "--out", out, "--max-loss", "-101")
    refused = run(*arguments)
    assert isinstance(refused.exception, ArtifactError) and "not released: loss" in str(refused.exception)
    assert not list(tmp_path.glob("*.ldrt"))

    assert run(*arguments, "--unreleased").exit_code == 0
    keys.trust(made.pub)
    assert run("bundle", "sign", out, "--key", made.key).exit_code == 0
    for command in (("bundle", "verify"), ("inspect",)):
        assert "not released: loss" in run(*command, out).stdout
    assert json.loads(run("inspect", out, "--json").stdout)["statement"]["released"] is False
    assert "not released" in strict(out)["README.md"].decode().lower()

    asked = run("chat", out, "--ask", "What is it?", "--max-tokens", "2", "--threads", "1", "--json")
    assert "WARNING" in asked.stderr and "not released: loss" in json.loads(asked.stdout)["unreleased"]
    model = Model.of(model_folder(out))
    assert model.unreleased is not None and model.unreleased.startswith("not released: loss")
    assert Model.of(made.edge).unreleased is None


def test_an_export_that_its_gate_did_not_release_says_so_wherever_it_answers(made: Made, tmp_path: Path) -> None:
    judged = asdict(Verdict(False, "too many flips", 1.0, 0.0, 0.0, 0.5, 5.0, 9.0, 12.0, 100, 50, None))
    edge = tmp_path / "judged"
    shutil.copytree(made.edge, edge)
    manifest = json.loads((edge / "manifest.json").read_text())
    manifest["metrics"][RELEASE] = judged
    (edge / "manifest.json").write_text(json.dumps(manifest))
    asked = run("chat", edge, "--ask", "What is it?", "--max-tokens", "2", "--threads", "1", "--json")
    assert "WARNING: judged is not released: too many flips" in asked.stderr
    assert json.loads(asked.stdout)["unreleased"] == "not released: too many flips"
    server = Server(edge)
    told, listed = server.json("GET", "/api/model"), server.json("GET", "/v1/models")["data"][0]
    assert "WARNING" in server.close()
    assert told["unreleased"] == listed["unreleased"] == "not released: too many flips"


def test_a_model_that_two_measurements_judge_differently_says_one_thing(
    made: Made, tmp_path: Path, home: Path
) -> None:
    """Released by its gate, and packed although a later report found more loss: nobody calls it released."""
    edge, report = tmp_path / "judged", tmp_path / "report"
    shutil.copytree(made.edge, edge)
    manifest = json.loads((edge / "manifest.json").read_text())
    judged = asdict(Verdict(True, "within budget: loss +0.4 points", 1.0, 0.4, -0.2, 0.9, None, 2.0, 3.0, 400, 50, 400))
    (edge / "manifest.json").write_text(json.dumps(manifest | {"metrics": manifest["metrics"] | {RELEASE: judged}}))
    alone = run("chat", edge, "--ask", "What is it?", "--max-tokens", "2", "--threads", "1")
    assert "judged is released: within budget" in alone.stderr and "WARNING" not in alone.stderr

    shutil.copytree(made.report, report)
    found = json.loads((report / "report.json").read_text())
    found["subject"]["manifest_sha256"] = artifact.read(edge).sha256
    (report / "report.json").write_text(json.dumps(found))
    described = json.loads((report / "manifest.json").read_text())
    for entry in described["files"]:
        path = report / entry["path"]
        entry |= {"bytes": path.stat().st_size, "sha256": artifact.file_sha256(path)}
    (report / "manifest.json").write_text(json.dumps(described))
    told = read_evidence(report, artifact.read(edge), 100)
    assert told.released and "its gate, when it was quantised: within budget: loss +0.4 points" in told.verdict
    out = tmp_path / "judged.ldrt"
    assert run("bundle", edge, "--report", report, "--out", out, "--max-loss", "-101", "--unreleased").exit_code == 0
    asked = run("chat", out, "--trust-once", "--ask", "What is it?", "--max-tokens", "2", "--threads", "1")
    assert "not released: loss" in asked.stderr and " is released" not in asked.stderr


def test_an_interval_that_reaches_beyond_the_budget_releases_nothing(made: Made) -> None:
    model = artifact.read(made.edge)
    loss = 100 * json.loads((made.report / "report.json").read_text())["vqa"]["loss"]["ci_high"]
    assert read_evidence(made.report, model, loss).released
    assert not read_evidence(made.report, model, loss - 1e-6).released
    judged = Verdict(False, "too many flips", 1.0, 0.0, 0.0, 0.5, 5.0, 9.0, 12.0, 100, 50, None)
    refused = read_evidence(made.report, replace(model, metrics={RELEASE: asdict(judged)}), loss)
    assert not refused.released and "too many flips" in refused.verdict


def test_a_report_about_another_model_and_a_damaged_export_are_refused(made: Made, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(made.edge, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"seed": 7}))
    with pytest.raises(ArtifactError, match="not about this model"):
        pack(other, made.report, tmp_path / "a.ldrt", max_loss=100)

    damaged = tmp_path / "damaged"
    shutil.copytree(made.edge, damaged)
    weights = next(damaged.glob("model-*.gguf"))
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(ArtifactError, match="is not what it was"):
        pack(damaged, made.report, tmp_path / "a.ldrt", max_loss=100)
    assert not list(tmp_path.glob("*.ldrt*")) and not list(tmp_path.glob(".*.partial"))
    for name in ("a.zip", "A B.ldrt", "con.ldrt", ".ldrt"):
        with pytest.raises(ConfigError, match="name"):
            pack(made.edge, made.report, tmp_path / name, max_loss=100)


def test_a_file_that_cannot_be_written_whole_leaves_nothing(made: Made, tmp_path: Path) -> None:
    code = (
        "import sys, resource; from pathlib import Path; from ldrt_edge.bundle.pack import pack\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "pack(*map(Path, sys.argv[1:]), max_loss=100)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, made.edge, made.report, tmp_path / "a.ldrt"], capture_output=True, text=True
    )
    assert "ArtifactError" in done.stderr and "cannot write" in done.stderr
    assert not list(tmp_path.iterdir()) or [p.name for p in tmp_path.iterdir()] == ["home"]


KILLED = """
import itertools, sys
from pathlib import Path
from ldrt_edge.bundle.open import install
from ldrt_edge.bundle.pack import pack
what, edge, report, bundle, folder = sys.argv[1], *map(Path, sys.argv[2:])
print("ready", flush=True)
for number in itertools.count():
    if what == "pack":
        pack(edge, report, folder / f"n{number}" / "tiny.ldrt", max_loss=100)
    else:
        install(bundle, folder / f"n{number}" / "here", trust_once=True)
    print("one", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["pack", "install"])
def test_a_killed_process_leaves_a_whole_bundle_or_none(made: Made, tmp_path: Path, what: str) -> None:
    """Killed 40 times, at random moments, while it writes one bundle after another."""
    wanted = pack(made.edge, made.report, tmp_path / "tiny.ldrt", max_loss=100)
    keys.trust(made.pub)
    sign(wanted, made.key)
    unsigned, chosen, folder = open_bundle(wanted).raw, random.Random(0), tmp_path / "killed"
    whole = partial = 0
    took_s = 0.0
    for trial in range(41):
        for number in range(200):
            (folder / f"n{number}").mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", KILLED, what, made.edge, made.report, wanted, folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            started = time.monotonic()
            if trial == 0:  # how long one takes here
                assert process.stdout.readline() == b"one\n"
                took_s = time.monotonic() - started
            time.sleep(chosen.uniform(0, 2 * took_s))
            process.kill()
        for path in folder.glob("*/*"):
            if path.name.startswith("."):
                partial += 1
                again = path.with_name(path.name.removeprefix(".").removesuffix(".partial"))
                if what == "pack":
                    pack(made.edge, made.report, again, max_loss=100)
                else:
                    install(wanted, again)
            else:
                whole += 1
                assert open_any(path).raw == unsigned
                check_whole(open_any(path))
        shutil.rmtree(folder)
    assert whole > 10 and partial > 10, "killed too early or too late to prove anything"


# --- whom it is from ------------------------------------------------------------------------------------------------


def test_only_trusted_keys_open_a_bundle(made: Made, signed: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="a key that you do not trust"):
        check(signed)
    _, stranger = keys.keygen(tmp_path / "stranger")
    keys.trust(stranger)
    with pytest.raises(ArtifactError, match="a key that you do not trust"):
        check(signed)
    assert "maker, " in run("bundle", "trust", made.pub).stdout
    check(signed)
    told = json.loads(run("bundle", "verify", signed, "--json").stdout)
    assert told["signer"]["trusted_as"] == "maker"


def test_an_unsigned_bundle_opens_once_with_a_warning(made: Made, tmp_path: Path) -> None:
    path = write_small(tmp_path / "small.ldrt")
    with pytest.raises(ArtifactError, match="signed by nobody"):
        check(path)
    opened = run("bundle", "verify", path, "--trust-once")
    assert opened.exit_code == 0 and "WARNING" in opened.stderr and "signed by  nobody" in opened.stdout
    with pytest.raises(ArtifactError, match="signed by nobody"):
        check(path)


def test_a_signature_is_of_one_bundle_and_one_key(made: Made, tmp_path: Path) -> None:
    keys.trust(made.pub)
    one, two = write_small(tmp_path / "one.ldrt", made.key), write_small(tmp_path / "two.ldrt", made.key, version="2")
    container.replace_signature(open_bundle(two), open_bundle(one).signature)
    with pytest.raises(ArtifactError, match="not that of this bundle"):
        check(two)

    key, _ = keys.keygen(tmp_path / "thief")
    stolen = json.loads(keys.sign(open_bundle(one).raw, key)) | {"key": json.loads(open_bundle(one).signature)["key"]}
    container.replace_signature(open_bundle(one), keys._written(stolen))
    with pytest.raises(ArtifactError, match="not that of this bundle"):
        check(one)


def test_keys_are_kept_from_others_and_never_overwritten(tmp_path: Path) -> None:
    secret, public = keys.keygen(tmp_path / "clinic", "a passphrase")
    assert secret.stat().st_mode & 0o777 == 0o600 and b"ENCRYPTED" in secret.read_bytes()
    with pytest.raises(ConfigError, match="File exists"):
        keys.keygen(tmp_path / "clinic")
    with pytest.raises(ConfigError, match="wrong passphrase"):
        keys.sign(b"", secret, "another")
    with pytest.raises(ConfigError, match="no public key"):
        keys.trust(secret)
    assert keys.trust(public) == keys.trust(public)

    (tmp_path / "b").mkdir()
    _, other = keys.keygen(tmp_path / "b" / "clinic")
    with pytest.raises(ConfigError, match="another key is trusted as 'clinic'"):
        keys.trust(other)


def test_signing_asks_for_the_passphrase_and_refuses_a_damaged_bundle(tmp_path: Path) -> None:
    secret, public = keys.keygen(tmp_path / "clinic", "a passphrase")
    path = write_small(tmp_path / "small.ldrt")
    asked = CliRunner().invoke(cli, ["bundle", "sign", str(path), "--key", str(secret)], input="a passphrase\n")
    assert asked.exit_code == 0
    keys.trust(public)
    check(path)
    flip(path, -2000)
    again = CliRunner().invoke(cli, ["bundle", "sign", str(path), "--key", str(secret)], input="a passphrase\n")
    assert isinstance(again.exception, ArtifactError)


# --- what was touched -----------------------------------------------------------------------------------------------


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_any_changed_byte_is_found(made: Made, tmp_path: Path) -> None:
    """Bytes of a whole bundle, one bit at a time: headers, padding, signature, statement, members, end.

    Each of them, but only a part of the blanks behind a signature.
    """
    keys.trust(made.pub)
    path = write_small(tmp_path / "small.ldrt", made.key)
    whole, chosen = path.read_bytes(), random.Random(0)
    check(path)
    for position in (at for at, byte in enumerate(whole) if byte != ord(" ") or at % 16 == 0):
        with path.open("r+b") as stream:
            stream.seek(position)
            stream.write(bytes([whole[position] ^ 1 << chosen.randrange(8)]))
        with pytest.raises(ArtifactError):
            check(path)
        with path.open("r+b") as stream:
            stream.seek(position)
            stream.write(whole[position : position + 1])
    check(path)


@pytest.mark.slow
def test_ten_thousand_changed_bytes_of_a_real_bundle_are_found(made: Made, signed: Path) -> None:
    keys.trust(made.pub)
    whole, chosen = signed.read_bytes(), random.Random(0)
    for _ in range(10_000):
        position = chosen.randrange(len(whole))
        with signed.open("r+b") as stream:
            stream.seek(position)
            stream.write(bytes([whole[position] ^ 1 << chosen.randrange(8)]))
        with pytest.raises(ArtifactError):
            check(signed)
        with signed.open("r+b") as stream:
            stream.seek(position)
            stream.write(whole[position : position + 1])
    check(signed)


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 1024, 3000, -1, -512, -1024])
def test_a_bundle_cut_short_or_grown_is_refused(made: Made, tmp_path: Path, length: int) -> None:
    keys.trust(made.pub)
    path = write_small(tmp_path / "small.ldrt", made.key)
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    with pytest.raises(ArtifactError):
        check(path)
    path.write_bytes(whole + whole[: abs(length) or 1])
    with pytest.raises(ArtifactError, match="its statement says"):
        check(path)


def test_swapped_members_are_refused(made: Made, tmp_path: Path) -> None:
    keys.trust(made.pub)
    one, two = b"A" * 512, b"B" * 512
    members = {"models/small/manifest.json": b"{}", "models/small/a": one, "models/small/b": two}
    path = write_small(tmp_path / "small.ldrt", made.key, members, model_sha256=_source("", b"{}").entry.sha256)
    check(path)
    data = path.read_bytes()
    path.write_bytes(data.replace(one, b"?" * 512).replace(two, one).replace(b"?" * 512, two))
    assert path.read_bytes() != data
    with pytest.raises(ArtifactError, match="models/small/a is not what it was"):
        check(path)


HOSTILE_PATHS = (
    "../evil", "/etc/passwd", "models/../../evil", "models//evil", "./evil", "models/small/.", "C:/evil", "a\\b",
    "..\\evil", "models/small/con", "models/small/NUL.txt", "models/small/x.", "models/small/x ", ".hidden",
    "bundle.json", "bundle.sig", "manifest.json", "a" * 101, "tab\tname", "nul\0name", "esc\x1b[2J", "ü", "",
    "models/small/manifest.json/x", "models/small/MANIFEST.JSON", "models",
)  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE_PATHS, ids=ascii)
def test_names_that_leave_the_folder_or_clash_are_refused(tmp_path: Path, hostile: str) -> None:
    honest = open_bundle(write_small(tmp_path / "small.ldrt")).statement
    files = sorted((*honest.files, FileEntry(hostile, 1, "0" * 64)), key=lambda entry: entry.path)
    with pytest.raises(ArtifactError, match=r"bundle\.json"):
        parse(dump(replace(honest, files=tuple(files))))


HOSTILE_FIELDS: dict[str, Any] = {
    "schema of the future": {"schema": "ldrt-edge/bundle/3"},
    "unknown field": {"extra": 1},
    "no files": {"files": []},
    "files that are none": {"files": ["x"]},
    "a file twice": {"files": [{"path": "a", "bytes": 1, "sha256": "0" * 64}] * 2},
    "negative size": {"files": [{"path": "a", "bytes": -1, "sha256": "0" * 64}]},
    "size that is true": {"files": [{"path": "a", "bytes": True, "sha256": "0" * 64}]},
    "fractional size": {"files": [{"path": "a", "bytes": 1.0, "sha256": "0" * 64}]},
    "size beyond any disk": {"files": [{"path": "a", "bytes": 1 << 62, "sha256": "0" * 64}]},
    "a hash that is none": {"files": [{"path": "a", "bytes": 1, "sha256": "x"}]},
    "name with a path": {"name": "../x"},
    "name of a number": {"name": 7},
    "another kind": {"kind": "pickle"},
    "released by a word": {"released": "yes"},
    "a model that is not there": {"model_sha256": "1" * 64},
    "verdict that rewrites the screen": {"verdict": "\x1b[2Jreleased"},
    "verdict without end": {"verdict": "x" * 1000},
    "metric that is no number": {"metrics": [{"name": "accuracy", "value": float("nan")}]},
    "metric beyond numbers": {"metrics": [{"name": "accuracy", "value": 10**400}]},
    "metric without value": {"metrics": [{"name": "accuracy"}]},
}


@pytest.mark.parametrize("changes", HOSTILE_FIELDS.values(), ids=HOSTILE_FIELDS)
def test_statements_that_are_made_up_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match=r"bundle\.json"):
        open_bundle(write_small(tmp_path / "small.ldrt", **changes))


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b"1", b'"x"', b"{", b"\xff\xfe", b"[" * 200_000, b"9" * 10_000])
def test_what_is_no_statement_is_refused(raw: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"bundle\.json"):
        parse(raw)


def tar_with(path: Path, *members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as stream:
        for member, content in members:
            member.size = len(content) if member.isreg() else 0
            stream.addfile(member, io.BytesIO(content))
    return path


def test_other_archives_links_and_huge_sizes_are_refused(made: Made, tmp_path: Path) -> None:
    keys.trust(made.pub)
    honest = write_small(tmp_path / "small.ldrt", made.key)
    statement = open_bundle(honest).raw
    link = tarfile.TarInfo("bundle.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    named = tarfile.TarInfo("bundle.json")
    named.pax_headers = {"path": "../../evil"}
    huge = tarfile.TarInfo("bundle.json")
    huge.size = 1 << 40
    bomb = tmp_path / "bomb.ldrt"
    with bomb.open("wb") as stream:
        stream.write(huge.tobuf(tarfile.GNU_FORMAT))
        stream.truncate(1 << 30)  # sparse: takes no room, as a bomb does not
    for path in (
        tar_with(tmp_path / "link.ldrt", (link, b"")),
        tar_with(tmp_path / "pax.ldrt", (named, statement), form=tarfile.PAX_FORMAT),
        tar_with(tmp_path / "other.ldrt", (tarfile.TarInfo("other"), statement)),
        bomb,
        Path(shutil.make_archive(str(tmp_path / "zip"), "zip", made.report)),
        Path(shutil.make_archive(str(tmp_path / "gz"), "gztar", made.report)),
    ):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ArtifactError, match="not a bundle of ldrt-edge"):
            check(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"

    claimed = write_small(tmp_path / "claimed.ldrt", made.key)
    told = json.loads(open_bundle(claimed).raw)
    told["files"][1]["bytes"] = 1 << 45
    with claimed.open("wb") as stream:
        container.write(stream, raw := json.dumps(told).encode(), keys.sign(raw, made.key), [])
    with pytest.raises(ArtifactError, match="its statement says"):
        check(claimed)


def test_a_member_that_is_a_link_in_the_archive_is_refused(made: Made, tmp_path: Path) -> None:
    keys.trust(made.pub)
    path = write_small(tmp_path / "small.ldrt", made.key)
    data = path.read_bytes()
    plain = container._header("models/small/model.gguf", 768)
    member = tarfile.TarInfo("models/small/model.gguf")
    member.size, member.type, member.linkname = 768, tarfile.SYMTYPE, "/etc/passwd"
    path.write_bytes(data.replace(plain, member.tobuf(tarfile.GNU_FORMAT)))
    with pytest.raises(ArtifactError, match=r"header of models/small/model\.gguf was changed"):
        check(path)


# --- installed ------------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network and no torch."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setitem(sys.modules, "torch", None)
    yield


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("offline")
def test_a_bundle_installs_and_answers_without_a_network(made: Made, signed: Path, tmp_path: Path, home: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (80, 60), "red").save(picture)
    ask = ("--image", picture, "--ask", "What colour is it?", "--max-tokens", "8", "--threads", "1", "--json")
    refused = run("chat", signed, *ask)
    assert isinstance(refused.exception, ArtifactError) and "do not trust" in str(refused.exception)
    assert not (home / "bundles").exists(), "nothing of a refused bundle is unpacked"
    wanted = json.loads(run("chat", made.edge, *ask).stdout)

    keys.trust(made.pub)
    for bundle in (signed, Path(run("bundle", "install", signed, "--out", tmp_path / "here").stdout.strip())):
        answered = run("chat", bundle, *ask)
        given = json.loads(answered.stdout)
        assert given["answer"] == wanted["answer"] and given["model"] == wanted["model"], answered.stderr
    assert [path.name for path in (home / "bundles").iterdir()] == [open_bundle(signed).digest]
    assert contents(tmp_path / "here" / "models" / "tiny") == contents(made.edge)
    assert install(signed, tmp_path / "here") == tmp_path / "here", "again, it is there already"
    assert run("parity", "--golden", tmp_path / "here").exit_code == 0


def test_a_model_that_answers_otherwise_is_not_installed(made: Made, tmp_path: Path, home: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(made.edge, other)
    records = other / "golden" / "records.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    for line in lines:
        line["answer_ids"], line["margins"] = [1, *line["answer_ids"]], [9.0, *line["margins"]]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    named = contents(other)
    manifest = json.loads(named.pop("manifest.json"))
    manifest["files"] = [asdict(_source(name, content).entry) for name, content in sorted(named.items())]
    named["manifest.json"] = json.dumps(manifest).encode()
    members = {f"models/small/{name}": content for name, content in named.items()}
    model = _source("", named["manifest.json"]).entry.sha256
    path = write_small(tmp_path / "small.ldrt", made.key, members, model_sha256=model)
    keys.trust(made.pub)
    check(path)
    with pytest.raises(ArtifactError, match="does not say what it said"):
        install(path, tmp_path / "here")
    with pytest.raises(ArtifactError, match="does not say what it said"):
        model_folder(path)
    assert not (tmp_path / "here").exists() and not list(tmp_path.glob(".here*")) and not list(home.glob("bundles/*"))


def touch_model(folder: Path) -> None:
    flip(folder / "models" / "tiny" / "front.json", 10)


def add_model(folder: Path) -> None:
    shutil.copy(next((folder / "models" / "tiny").glob("model*.gguf")), folder / "models" / "tiny" / "a-model.gguf")


def remove_paper(folder: Path) -> None:
    (folder / "README.md").unlink()


def swap_pictures(folder: Path) -> None:
    one, two = (folder / "models" / "tiny" / "golden" / f"0{number}.png" for number in (0, 1))
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)


def link_file(folder: Path) -> None:
    path = folder / "models" / "tiny" / "tokenizer.json"
    path.rename(folder.parent / "tokenizer.json")
    path.symlink_to(folder.parent / "tokenizer.json")


def link_folder(folder: Path) -> None:
    (folder / "report").rename(folder.parent / "report")
    (folder / "report").symlink_to(folder.parent / "report")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "models" / "tiny" / "pipe")


def touch_statement(folder: Path) -> None:
    path = folder / "bundle.json"
    path.write_text(path.read_text().replace('"released": true', '"released": false'))


def drop_signature(folder: Path) -> None:
    (folder / "bundle.sig").write_bytes(keys.UNSIGNED)


def grow_statement(folder: Path) -> None:
    (folder / "bundle.json").write_bytes(b" " * (5 << 20))


TOUCHES = (
    touch_model, add_model, remove_paper, swap_pictures, link_file, link_folder, pipe, touch_statement, drop_signature,
    grow_statement,
)  # fmt: skip


@pytest.fixture
def installed(made: Made, signed: Path, tmp_path: Path) -> Path:
    keys.trust(made.pub)
    return install(signed, tmp_path / "clinic" / "installed")


def test_what_is_touched_after_installing_is_refused(installed: Path) -> None:
    """One after another on copies, as installing takes longest."""
    assert model_folder(installed) == installed / "models" / "tiny"
    for touch in TOUCHES:
        folder = installed.parent / touch.__name__ / "installed"
        shutil.copytree(installed, folder)
        model_folder(folder)
        touch(folder)
        with pytest.raises(ArtifactError):
            model_folder(folder)


def test_an_installed_bundle_must_be_the_one_that_is_opened(made: Made, signed: Path, installed: Path) -> None:
    with pytest.raises(ArtifactError, match="is not this bundle"):
        install(write_small(installed.parent / "small.ldrt", made.key), installed)
    unpacked = model_folder(signed)
    flip(unpacked / "front.json", 10)
    with pytest.raises(ArtifactError, match=r"front\.json is not what it was"):
        model_folder(signed)
    (installed.parent / "notes").mkdir()
    with pytest.raises(ArtifactError, match="is not this bundle"):
        install(signed, installed.parent / "notes")


def test_a_bench_of_a_bundle_leaves_the_bundle_as_it_was(made: Made, signed: Path, tmp_path: Path) -> None:
    keys.trust(made.pub)
    data = made.edge.with_name("data")
    done = run("bench", signed, "--data", data, "--runs", "0", "--threads", "1")
    assert done.exit_code == 0, done.exception
    assert (tmp_path / "tiny.ldrt-report" / "report.html").is_file()
    model_folder(signed)


def test_inspect_reads_a_few_kilobytes_and_loads_nothing(made: Made, signed: Path) -> None:
    flip(signed, -5000)
    shown = run("inspect", signed)
    assert shown.exit_code == 0 and "a key that you do not trust" in shown.stdout
    assert "accuracy with a wrong picture of the same kind" in shown.stdout
    assert "models/tiny/golden/records.jsonl" in shown.stdout
    with pytest.raises(LdrtError):
        check_whole(open_any(signed))
