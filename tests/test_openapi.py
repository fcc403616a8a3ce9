"""The server against its OpenAPI description: schemathesis asks for what that allows, and for what it does not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server, tiny_edge

from ldrt_edge.chat import completions, page

HERE = Path(__file__).parent
SCHEMATHESIS = Path(sysconfig.get_path("scripts")) / "schemathesis"


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory) -> Iterator[Server]:  # type: ignore[no-untyped-def]
    opened = Server(tiny_edge(tiny("llava15", "smollm2"), tmp_path_factory.mktemp("openapi")), "--max-tokens", "4")
    yield opened
    assert "Traceback" not in opened.close()


def test_every_route_is_described_and_no_other(server: Server) -> None:
    status, _, content = server.send("GET", "/openapi.json", authorization="")
    paths = json.loads(content)["paths"]
    described = {(path, method.upper()) for path, item in paths.items() for method in item if method != "parameters"}
    desk: Any = None  # routes are made without looking at it
    routes = [*page.routes(desk), *completions.routes(desk)]
    real = {(re.sub(r":\w+", "", route.path), m) for route in routes for m in route.methods or () if m != "HEAD"}
    assert status == 200 and described == real


def test_requests_get_what_is_described(server: Server, tmp_path: Path) -> None:
    run(server, tmp_path, "--phases", "fuzzing", "--max-examples", "8")


@pytest.mark.slow
def test_many_requests_get_what_is_described(server: Server, tmp_path: Path) -> None:
    run(server, tmp_path, "--max-examples", "100")


def run(server: Server, folder: Path, *options: str) -> None:
    command = [
        str(SCHEMATHESIS), "--no-color", "--config-file", str(HERE / "schemathesis.toml"), "run", "--seed", "1",
        "--suppress-health-check", "all", "--header", f"Authorization: Bearer {server.token}", *options,
        f"http://127.0.0.1:{server.port}/openapi.json",
    ]  # fmt: skip
    hooked = os.environ | {
        "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
    }
    done = subprocess.run(command, env=hooked, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
