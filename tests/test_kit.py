"""The kit: every wheel that the machine meant needs and no other, an installer that refuses what was changed.

The slow test builds a whole one and installs it where there is no network interface, in an environment of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from bundling import make, sign
from click.testing import CliRunner
from pydicom.data import get_testdata_file

from ldrt_edge import __version__, artifact
from ldrt_edge.bundle import keys
from ldrt_edge.bundle.kit import DIGEST, MISSING, kit
from ldrt_edge.bundle.pack import pack
from ldrt_edge.cli import cli
from ldrt_edge.errors import ArtifactError, ConfigError

HOME = os.environ.get("LDRT_EDGE_HOME")
"""Of whoever runs the slow test; if it is set, llama.cpp's wheel is kept there from one run to the next."""
HERE = {"linux": "linux-x86_64", "darwin": "macos-arm64", "win32": "windows-x86_64"}[sys.platform]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who trusts nobody yet, on a machine whose pip reaches no index."""
    monkeypatch.setenv("LDRT_EDGE_HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "home"


def wheel(folder: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any") -> Path:
    """A wheel with nothing in it, which pip installs all the same."""
    folder.mkdir(exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    path, info = folder / f"{stem}-{tag}.whl", f"{stem}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {each}" for each in requires] + ["Provides-Extra: fast"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """Wheels of our own: what this version would need, made up."""
    folder = tmp_path / "given"
    wheel(folder, "ldrt-edge", __version__, "numpy>=2", "llama-cpp-python==0.3.36", "click", "torch; extra == 'train'")
    wheel(folder, "llama-cpp-python", "0.3.36", "diskcache", tag="py3-none-manylinux_2_31_x86_64")
    wheel(folder, "numpy", "2.4")
    wheel(folder, "numpy", "1.9")
    wheel(folder, "click", "8", "colorama; sys_platform == 'win32'", "Old_Typing; python_version < '3.12'")
    wheel(folder, "diskcache", "5")
    wheel(folder, "old-typing", "4", "extra-of-it[fast]")
    wheel(folder, "extra-of-it", "1", "needed-fast; extra == 'fast'")
    wheel(folder, "needed-fast", "1")
    wheel(folder, "colorama", "0.4")
    wheel(folder, "unasked", "9")
    return folder


def names(out: Path) -> set[str]:
    return {path.name.partition("-")[0] for path in (out / "wheels").iterdir()}


@pytest.mark.usefixtures("home")
def test_wheels_are_those_that_the_machine_meant_needs(given: Path, tmp_path: Path) -> None:
    linux = kit(tmp_path / "linux", "linux-x86_64", python="3.11", wheels=given)
    always = {"ldrt_edge", "llama_cpp_python", "numpy", "click", "diskcache"}
    assert names(linux) == always | {"old_typing", "extra_of_it", "needed_fast"}
    assert not any("numpy-1.9" in path.name for path in (linux / "wheels").iterdir())
    assert artifact.verify(linux, "kit").metrics[MISSING] == []
    assert "glibc 2.31 or newer, Python 3.11" in (linux / "guide.html").read_text()

    windows = kit(tmp_path / "windows", "windows-x86_64", python="3.12", wheels=given)
    assert names(windows) == always | {"colorama"}
    assert not (windows / "install.sh").exists() and "colorama" in (windows / "requirements.txt").read_text()


@pytest.mark.usefixtures("home")
def test_a_kit_says_what_it_lacks(given: Path, tmp_path: Path) -> None:
    for lost in ("llama_cpp_python-0.3.36-py3-none-manylinux_2_31_x86_64.whl", "numpy-2.4-py3-none-any.whl"):
        (given / lost).unlink()
    elsewhere = next(name for name in ("windows-x86_64", "macos-arm64") if name != HERE)
    out = tmp_path / "kit"
    made = CliRunner().invoke(
        cli, ["bundle", "kit", "--platform", elsewhere, "--out", str(out), "--wheels", str(given), "--json"]
    )
    missing = ["llama-cpp-python==0.3.36", "numpy>=2"]
    assert json.loads(made.stdout)["metrics"][MISSING] == missing and "WARNING" in made.stderr
    for name in (next(out.glob("install.*")).name, "guide.html"):
        text = (out / name).read_text().replace("&gt;", ">")
        assert "incomplete" in text and all(lack in text for lack in missing)
    assert "diskcache" not in (out / "requirements.txt").read_text()


@pytest.mark.usefixtures("home")
def test_wrong_wishes_are_refused_in_one_line(given: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="linux-x86_64, macos-arm64, windows-x86_64"):
        kit(tmp_path / "kit", "amiga", wheels=given)
    with pytest.raises(ConfigError, match="or newer"):
        kit(tmp_path / "kit", HERE, python="2.7", wheels=given)
    (given / "broken-1-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(ArtifactError, match="not a wheel"):
        kit(tmp_path / "kit", HERE, wheels=given)
    assert not (tmp_path / "kit").exists()


def install(kit: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(kit / "install.sh"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=300, cwd=kit.parent
    )


@pytest.mark.parametrize("platform", ["linux-x86_64", "macos-arm64"])
@pytest.mark.usefixtures("home")
def test_an_installer_is_for_any_posix_shell(given: Path, tmp_path: Path, platform: str) -> None:
    """macOS has bash 3.2 for sh, Debian dash, and neither takes bash's later words."""
    script = kit(tmp_path / "kit", platform, wheels=given) / "install.sh"
    lint = [Path(sys.executable).with_name("shellcheck"), "--shell=sh", "--severity=warning", script]
    for command in (lint, ["sh", "-n", script]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    script.write_text(script.read_text().replace('[ ! -e "$folder" ]', "[[ ! -e $folder ]]"))
    assert subprocess.run(lint, capture_output=True).returncode, "the check finds nothing"


@pytest.mark.skipif(HERE != "linux-x86_64", reason="runs the installer of Linux")
@pytest.mark.usefixtures("home")
def test_the_installer_refuses_what_is_not_the_makers(given: Path, tmp_path: Path) -> None:
    python, folder = f"{sys.version_info.major}.{sys.version_info.minor}", tmp_path / "installed"
    whole = kit(tmp_path / "kit", HERE, python=python, wheels=given)
    digest = artifact.read(whole).metrics[DIGEST]
    assert digest == hashlib.sha256((whole / "SHA256SUMS").read_bytes()).hexdigest()

    def refused(path: Path, *arguments: object) -> str:
        done = install(path, *arguments)
        assert done.returncode == 1 and not folder.exists(), done.stderr
        return done.stderr

    assert "wants the kit's digest" in refused(whole)
    assert "wants the kit's digest" in refused(whole, digest[:15], folder)
    assert "not the one given" in refused(whole, "0" * 64, folder)
    for name in ("install.sh", "requirements.txt", "wheels/click-8-py3-none-any.whl"):
        touched = shutil.copytree(whole, tmp_path / f"touched-{Path(name).name}")
        with (touched / name).open("ab") as stream:
            stream.write(b"\n")
        assert "were changed" in refused(touched, digest, folder)
    (touched / name).unlink()
    assert "were changed" in refused(touched, digest, folder)

    # a newer wheel that nobody listed is not taken, and one in place of another is not either
    wheel(whole / "wheels", "click", "9")
    done = install(whole, digest[:16], folder.name)  # from where the user is, not from the stick
    assert done.returncode == 0 and "Installed" in done.stdout, done.stderr
    assert any(folder.glob("lib/python*/site-packages/click-8.dist-info"))
    assert "exists" in install(whole, digest, folder).stderr


@pytest.mark.slow
@pytest.mark.skipif(HERE != "linux-x86_64", reason="network namespaces are Linux's")
def test_a_kit_installs_and_answers_where_there_is_no_network(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh environment, no interface but a loopback that is down, no torch: a question about a DICOM is answered."""
    cut_off = [shutil.which("unshare") or "unshare", "--map-root-user", "--net"]
    if subprocess.run([*cut_off, "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a network namespace")
    maker = tmp_path / "home"
    maker.mkdir()
    if HOME:
        (maker / "built").symlink_to(Path(HOME) / "built")
    monkeypatch.setenv("LDRT_EDGE_HOME", str(maker))
    made = make(tiny("llava15", "smollm2"), tmp_path)
    keys.trust(made.pub)
    bundle = sign(pack(made.edge, made.report, tmp_path / "tiny.ldrt", max_loss=100), made.key)
    whole = kit(tmp_path / "kit", HERE, bundle)
    metrics = artifact.verify(whole, "kit").metrics
    if metrics[MISSING]:
        pytest.skip(f"no index here has wheels for {', '.join(metrics[MISSING])}")

    clinic = tmp_path / "clinic"
    clinic.mkdir()
    environment = {"HOME": str(clinic), "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
    wheel(whole / "wheels", "click", "999")  # somebody's own, which nobody signed for

    def offline(*command: object) -> str:
        done = subprocess.run([*cut_off, *map(str, command)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    interfaces = offline(sys.executable, "-c", "import socket; print(socket.if_nameindex())")
    assert interfaces.count("(") == 1 and "'lo'" in interfaces
    told = offline("sh", whole / "install.sh", metrics[DIGEST][:16])
    edge, installed = clinic / "ldrt-edge" / "bin" / "ldrt-edge", told.split("'")[1]
    environment["PATH"] = ""  # nothing of this machine's, whatever lies there
    assert "torch" not in offline("/bin/ls", *(clinic / "ldrt-edge" / "lib").glob("python*/site-packages"))
    assert "signed by" in offline(edge, "bundle", "verify", installed)
    replayed = offline(edge, "parity", "--golden", installed)
    assert "not as it was" not in replayed
    film = get_testdata_file("CT_small.dcm")
    ask = ["--ask", "What is in this image?", "--max-tokens", "8", "--json"]
    answer = json.loads(offline(edge, "chat", installed, "--image", film, *ask))
    assert answer["image_sha256"] and answer["tokens"] > 0 and answer["runtime"] == "llamacpp"
