"""The wheels that a machine without a network needs: each requirement's, in the versions that are installed here.

pip downloads for another system, but evaluates the conditions of requirements ("on Windows, colorama") for the one it
runs on. So pip fetches wheels one by one, and what they require in turn is decided here, for the machine meant. Two are
built: ldrt-edge's own, and llama.cpp's, which comes as source and would otherwise suit the builder's processor alone.

Source: https://packaging.python.org/en/latest/specifications/platform-compatibility-tags/
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from ldrt_edge import __version__
from ldrt_edge.bundle.home import home
from ldrt_edge.console import say
from ldrt_edge.errors import ArtifactError, ConfigError, require

if TYPE_CHECKING:
    from packaging.requirements import Requirement

Platform = Literal["linux-x86_64", "macos-arm64", "windows-x86_64"]
_LLAMA = "llama-cpp-python"
_OWN = "ldrt-edge"
_PORTABLE = (
    "-DGGML_NATIVE=OFF", "-DGGML_AVX=ON", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON", "-DGGML_BMI2=ON",
    "-DGGML_OPENMP=OFF",  # llama.cpp has threads of its own, and a clinic's laptop may have no libgomp
)  # fmt: skip
"""x86-64-v3, as any laptop since about 2015; on Apple silicon llama.cpp passes over those of AVX."""
_SOURCES = ("ldrt_edge", "train", "convert", "bench", "pyproject.toml", "README.md", "LICENSE")
_TAGS: dict[Platform, tuple[str, ...]] = {  # the most widely usable first: pip takes the first that it finds
    "linux-x86_64": ("manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(18, 36))),
    "macos-arm64": ("macosx_11_0_arm64", "macosx_12_0_arm64", "macosx_13_0_arm64", "macosx_14_0_arm64"),
    "windows-x86_64": ("win_amd64",),
}
_MARKERS: dict[Platform, dict[str, str]] = {
    "linux-x86_64": {
        "os_name": "posix", "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64",
    },
    "macos-arm64": {
        "os_name": "posix", "sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64",
    },
    "windows-x86_64": {
        "os_name": "nt", "sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A machine to install on. python: its version, "3.11"."""

    platform: Platform
    python: str

    @property
    def is_here(self) -> bool:
        """Whether this machine is such a one, and can build for it."""
        return (self.platform, self.python) == _here()

    @property
    def markers(self) -> dict[str, str]:
        """The values by which requirements decide whether they are wanted. Source: PEP 508."""
        return _MARKERS[self.platform] | {
            "python_version": self.python, "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython", "implementation_version": f"{self.python}.0",
            "platform_python_implementation": "CPython", "platform_release": "", "platform_version": "",
        }  # fmt: skip

    @property
    def pip_options(self) -> list[str]:
        """What makes pip fetch for this machine instead of the one it runs on."""
        tags = [option for tag in _TAGS[self.platform] for option in ("--platform", tag)]
        return ["--only-binary=:all:", "--implementation", "cp", "--python-version", self.python, *tags]


@dataclass(frozen=True)
class Wheel:
    """A wheel file, by its own metadata. requires: with their conditions."""

    path: Path
    name: str
    version: str
    requires: tuple[Requirement, ...]


def target(name: str, python: str | None) -> Target:
    """The machine meant, by its platform's name; `python` is its Python's version, None for the one that runs here.

    Raises:
        ConfigError: no such platform, or no such version.
    """
    if name not in get_args(Platform):
        raise ConfigError(f"--platform {name}: choose one of {', '.join(get_args(Platform))}")
    chosen = python or _here()[1]
    major, _, minor = chosen.partition(".")
    if major != "3" or not minor.isdecimal() or int(minor) < 11:
        raise ConfigError(f"--python {chosen}: wants 3.11 or newer, as 3.11")
    return Target(name, chosen)  # type: ignore[arg-type] # it is one of them


def collect(machine: Target, extras: Sequence[str], folder: Path, given: Path | None) -> tuple[list[Wheel], list[str]]:
    """Put into `folder` every wheel that ldrt-edge with these extras needs on that machine, and none besides.

    given: a folder with wheels of one's own, which come first. Returns the wheels, and which requirements lack one.

    Raises:
        ArtifactError: ldrt-edge's or llama.cpp's wheel cannot be built.
        MissingExtraError: what that needs is not installed.
    """
    requirements = require("packaging.requirements", "kit")
    if given:
        for path in sorted(given.glob("*.whl")):
            shutil.copy(path, folder)
    _build_own(folder)
    if machine.is_here and not any(folder.glob("llama_cpp_python-*.whl")):
        shutil.copy(_portable_llama(), folder)
    root = requirements.Requirement(f"{_OWN}[{','.join(extras)}]=={__version__}")
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        pins = Path(scratch) / "pins.txt"
        pins.write_text("".join(sorted(f"{name}=={version}\n" for name, version in _installed())))
        while True:
            found, wanted = _closure(root, _read_wheels(folder), machine)
            wanted = {name: asked for name, asked in wanted.items() if name not in missing}
            if not wanted:
                break
            missing |= _download(wanted, machine, folder, pins)
    for path in set(folder.glob("*.whl")) - {wheel.path for wheel in found}:
        path.unlink()
    return sorted(found, key=lambda wheel: wheel.name), sorted(missing.values())


def _here() -> tuple[str, str]:
    """This machine's system and processor in a platform's words, and its Python; kits need not exist for it."""
    system = {"darwin": "macos", "win32": "windows"}.get(sys.platform, sys.platform)
    machine = platform.machine().lower().replace("amd64", "x86_64")
    return f"{system}-{machine}", f"{sys.version_info.major}.{sys.version_info.minor}"


def _installed() -> Iterator[tuple[str, str]]:
    """Name and version of every package here: a kit carries what was tested. A build's own tag, +cpu, is left out."""
    for package in importlib.metadata.distributions():
        yield package.metadata["Name"], package.version.partition("+")[0]


def _closure(
    root: Requirement, wheels: dict[str, list[Wheel]], machine: Target
) -> tuple[list[Wheel], dict[str, str]]:
    """The wheels that `root` leads to, and by name what it leads to and no wheel satisfies."""
    found: dict[str, Wheel] = {}
    wanted: dict[str, str] = {}
    waiting, seen = [root], {str(root)}
    while waiting:
        asked = waiting.pop()
        name = _canonical(asked.name)
        fitting = [wheel for wheel in wheels.get(name, []) if asked.specifier.contains(wheel.version, prereleases=True)]
        if not fitting:
            wanted[name] = f"{asked.name}{asked.specifier}"
            continue
        found[name] = wheel = fitting[-1]
        for needed in wheel.requires:
            cases = [machine.markers | {"extra": extra} for extra in asked.extras or {""}]
            applies = needed.marker is None or any(map(needed.marker.evaluate, cases))
            if applies and str(needed) not in seen:
                seen.add(str(needed))
                waiting.append(needed)
    return list(found.values()), wanted


def _read_wheels(folder: Path) -> dict[str, list[Wheel]]:
    """By canonical name."""
    from packaging.metadata import Metadata

    wheels: dict[str, list[Wheel]] = {}
    for path in sorted(folder.glob("*.whl")):
        try:
            with zipfile.ZipFile(path) as archive:
                [name] = [n for n in archive.namelist() if n.count("/") == 1 and n.endswith(".dist-info/METADATA")]
                told = Metadata.from_email(archive.read(name), validate=False)
            wheel = Wheel(path, _canonical(told.name), str(told.version), tuple(told.requires_dist or ()))
        except (OSError, ValueError, zipfile.BadZipFile, ExceptionGroup) as error:
            raise ArtifactError(f"{path}: not a wheel that can be read ({error})") from error
        wheels.setdefault(wheel.name, []).append(wheel)
    return wheels


def _canonical(name: str) -> str:
    from packaging.utils import canonicalize_name

    return str(canonicalize_name(name))


def _download(wanted: dict[str, str], machine: Target, folder: Path, pins: Path) -> dict[str, str]:
    """Fetch wheels into `folder`; returns those that are not to be had, by name."""
    say(f"Fetching {', '.join(sorted(wanted))}")
    fetch = ["download", "--no-deps", *machine.pip_options, "--constraint", str(pins), "--dest", str(folder)]
    local = {name: asked for name, asked in wanted.items() if name in (_LLAMA, _OWN)}  # pip's own would not be portable
    asked = {name: text for name, text in wanted.items() if name not in local}
    if not asked or _pip(*fetch, *asked.values()).returncode == 0:
        return local
    return local | {name: text for name, text in asked.items() if _pip(*fetch, text).returncode != 0}


def _build_own(folder: Path) -> None:
    """ldrt-edge's wheel from this checkout, unless one of this version was given."""
    if any(folder.glob(f"ldrt_edge-{__version__}-*.whl")):
        return
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file():
        raise ArtifactError("this ldrt-edge runs from no checkout, so its wheel cannot be built: put it into --wheels")
    with tempfile.TemporaryDirectory() as scratch:  # setuptools would leave its traces in the checkout
        for name in _SOURCES:
            if (root / name).is_dir():
                shutil.copytree(root / name, Path(scratch) / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(root / name, scratch)
        _built(_pip("wheel", "--no-deps", "--wheel-dir", str(folder), scratch), _OWN)


def _portable_llama() -> Path:
    """llama.cpp's wheel, built once from its source distribution for a portable processor, and kept for other kits.

    On Linux it is tagged with the glibc that it needs.
    """
    version = importlib.metadata.version(_LLAMA)
    recipe = hashlib.sha256(repr((version, _here(), _PORTABLE)).encode()).hexdigest()
    kept = home() / "built" / recipe[:16]
    if not kept.is_dir():
        require("wheel", "kit")
        say(f"Building {_LLAMA} {version} for any processor with AVX2: about 5 minutes on 2 cores")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".") as scratch:
            folder = Path(scratch) / "wheel"
            options = ["--no-deps", "--no-cache-dir", f"--no-binary={_LLAMA}", "--wheel-dir", str(folder)]
            flags = {"CMAKE_ARGS": " ".join(_PORTABLE), "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}
            _built(_pip("wheel", *options, f"{_LLAMA}=={version}", **flags), _LLAMA)
            if sys.platform == "linux":
                [plain] = folder.glob("*.whl")
                tag = f"manylinux_2_{_glibc(plain)}_x86_64"
                _built(_python("wheel", "tags", "--remove", "--platform-tag", tag, str(plain)), _LLAMA)
            folder.rename(kept)
    [wheel] = kept.glob("*.whl")
    return wheel


def _glibc(wheel: Path) -> int:
    """The minor version of glibc 2 that a wheel's libraries ask for: the newest symbol version that they name.

    Source: https://refspecs.linuxfoundation.org/LSB_5.0.0/LSB-Core-generic/LSB-Core-generic/symversion.html
    """
    with zipfile.ZipFile(wheel) as archive:
        libraries = [archive.read(name) for name in archive.namelist() if ".so" in Path(name).suffixes]
    return max(int(minor) for data in libraries for minor in re.findall(rb"\0GLIBC_2\.(\d+)(?=[.\0])", data))


def _built(done: subprocess.CompletedProcess[str], name: str) -> None:
    if done.returncode:
        raise ArtifactError(f"{name}'s wheel cannot be built: {' / '.join(done.stderr.split(chr(10))[-4:]).strip()}")


def _pip(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return _python("pip", *arguments, **{"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", **environment})


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
