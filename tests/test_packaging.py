"""The package as it installs: every folder listed, the wheel whole, the command line light."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_SHIPPED = (".py", ".yaml", ".jinja", ".html", ".css", ".js", ".svg")
ROOMS = {
    "ldrt_edge": "ldrt_edge",
    "train": "ldrt_edge.train",
    "convert": "ldrt_edge.convert",
    "bench": "ldrt_edge.bench",
}


def packages() -> set[str]:
    found = set()
    for folder, name in ROOMS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(ROOT / folder).parts]))
    return found


def test_pyproject_lists_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == packages()


def test_every_folder_with_code_is_a_package() -> None:
    for folder in ROOMS:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} would be missing from the wheel"


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "mlx", "llama_cpp", "numpy", "PIL", "pydicom", "rich")
    code = f"import sys, ldrt_edge.cli; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_data_file(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True
    )
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for folder, name in ROOMS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in _SHIPPED and "__pycache__" not in path.parts:
                assert f"{name.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert {entry.partition("/")[0] for entry in names if ".dist-info" not in entry} == {"ldrt_edge"}
