"""`ldrt-edge bundle kit`: all that a machine without a network needs, in one folder on a stick.

    wheels/  requirements.txt  NAME.ldrt  trusted/SIGNER.pub  install.sh or install.ps1  guide.html  SHA256SUMS

The bundle's signature says nothing of the wheels, which run with the user's rights. So the kit has a digest, that of
SHA256SUMS; the installer wants it from whoever installs, who has it from the maker by another way, and hands pip each
wheel's hash. What the digest covers may then name the key to trust.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldrt_edge import __version__, artifact
from ldrt_edge.bundle.container import Opened, open_bundle
from ldrt_edge.bundle.keys import trusted_file
from ldrt_edge.bundle.open import accept
from ldrt_edge.bundle.wheels import Target, Wheel, collect, target
from ldrt_edge.console import say
from ldrt_edge.errors import ConfigError

SUMS = "SHA256SUMS"
DIGEST, MISSING = "digest", "missing"
"""Metrics of a kit: its digest, and the requirements for which no wheel was to be had."""
_WHEELS = "wheels"
_GLIBC = re.compile(r"manylinux(?:_2_(\d+)|(2014))_")
_MACOS = re.compile(r"macosx_(\d+)_")


@dataclass(frozen=True)
class _Carried:
    """The bundle in a kit: under which name, and the file that says whom to trust for it."""

    opened: Opened
    signer: str
    key: Path

    @property
    def name(self) -> str:
        return f"{self.opened.statement.name}.ldrt"


def kit(
    out: Path, platform: str, bundle: Path | None = None, python: str | None = None, wheels: Path | None = None
) -> Path:
    """Write a kit to `out`, an artefact of kind "kit"; returns `out`.

    Args:
        platform: linux-x86_64, macos-arm64 or windows-x86_64.
        bundle: NAME.ldrt, signed by a key that this user trusts; None makes a kit of the program alone.
        python: the version of Python there, "3.11"; None takes this one's.
        wheels: a folder with wheels that cannot be had here, such as llama.cpp's built on that platform.

    Where wheels are not to be had, the kit is written all the same, its installer and guide say what is missing, and so
    does the metric "missing".

    Raises:
        ConfigError: no such platform, or one that does not run the bundle.
        ArtifactError: the bundle is not accepted, or a wheel cannot be built.
    """
    machine = target(platform, python)
    carried = _accepted(bundle, machine) if bundle else None
    given = {path.name: artifact.file_sha256(path) for path in sorted(wheels.glob("*.whl"))} if wheels else {}
    config = {"platform": machine.platform, "python": machine.python, "wheels": given,
              "bundle": carried.opened.digest if carried else None}  # fmt: skip
    with artifact.create(out, "kit", config) as draft:
        if not draft.complete:
            folder = draft.path / _WHEELS
            folder.mkdir()
            extras = ["mlx"] if carried and carried.opened.statement.kind == "mlx" else []
            found, missing = collect(machine, extras, folder, wheels)
            _write(draft.path, machine, found, missing, carried)
            draft.metrics |= {DIGEST: artifact.file_sha256(draft.path / SUMS), MISSING: missing, "wheels": len(found)}
            if missing:
                say(f"WARNING: no wheels for {', '.join(missing)}: {out} does not install without (see its guide)")
    return out


def _accepted(bundle: Path, machine: Target) -> _Carried:
    opened = open_bundle(bundle)
    if opened.statement.kind == "mlx" and machine.platform == "windows-x86_64":
        raise ConfigError(f"{bundle} holds an MLX model, and there is no MLX for {machine.platform}")
    signer = accept(opened)
    assert signer is not None and signer.trusted_as, "without --trust-once only a trusted signer is accepted"
    opened.check()
    return _Carried(opened, signer.told, trusted_file(signer))


def _write(
    folder: Path, machine: Target, wheels: Sequence[Wheel], missing: Sequence[str], carried: _Carried | None
) -> None:
    """Everything besides the wheels; the checksums last."""
    windows = machine.platform == "windows-x86_64"
    values: dict[str, object] = {
        "version": __version__, "platform": machine.platform, "python": machine.python, "missing": missing,
        "needs": _needs(machine, wheels), "windows": windows, "linux": machine.platform == "linux-x86_64",
        "room_mb": sum(wheel.path.stat().st_size for wheel in wheels) * 3 // 10**7 * 10,
    }  # fmt: skip
    if carried:
        shutil.copyfile(carried.opened.path, folder / carried.name)
        (folder / "trusted").mkdir()
        shutil.copyfile(carried.key, folder / "trusted" / carried.key.name)
        statement = carried.opened.statement
        values |= {
            "bundle": carried.name, "bundle_digest": carried.opened.digest, "signer": carried.signer,
            "verdict": statement.verdict, "key": f"trusted/{carried.key.name}",
            "bundle_bytes": (folder / carried.name).stat().st_size,
        }  # fmt: skip
    lines = [f"{w.name}=={w.version} --hash=sha256:{artifact.file_sha256(w.path)}\n" for w in wheels]
    _write_text(folder / "requirements.txt", "".join(lines))
    for name in ("install.ps1" if windows else "install.sh", "guide.html"):
        _write_text(folder / name, _rendered(f"{name}.jinja", values))
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."
    )
    _write_text(folder / SUMS, "".join(f"{artifact.file_sha256(folder / n)}  {n}\n" for n in names if n != SUMS))


def _needs(machine: Target, wheels: Sequence[Wheel]) -> str:
    """The machine in words: the system's least version follows from the wheels' tags."""
    python = f"Python {machine.python}"
    if machine.platform == "windows-x86_64":
        return f"64-bit Windows 10 or newer on a processor with AVX2, {python}"
    if machine.platform == "macos-arm64":
        return f"macOS {max([11, *(_least(_MACOS, wheel) for wheel in wheels)])} or newer on Apple silicon, {python}"
    glibc = max([17, *(_least(_GLIBC, wheel) for wheel in wheels)])
    return f"Linux on a 64-bit Intel or AMD processor with AVX2, glibc 2.{glibc} or newer, {python} with venv"


def _least(pattern: re.Pattern[str], wheel: Wheel) -> int:
    """The lowest version that one of a wheel's tags is for; 0 for any."""
    found = [17 if tag[tag.lastindex or 1] == "2014" else int(tag[1]) for tag in pattern.finditer(wheel.path.name)]
    return min(found, default=0)


def _rendered(template: str, values: dict[str, object]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ldrt_edge.bundle", "offline"), keep_trailing_newline=True, trim_blocks=True,
        autoescape=lambda name: bool(name and ".html" in name), undefined=StrictUndefined,
    )  # fmt: skip
    return environment.get_template(template).render({"bundle": None, **values})


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
