"""A real server on loopback for tests: `ldrt-edge serve` in a process of its own, with a tiny model."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ldrt_edge import artifact
from ldrt_edge.convert.gguf import convert
from ldrt_edge.front import Front


def tiny_edge(source: Path, folder: Path) -> Path:
    """A tiny checkpoint as a GGUF artefact."""
    merged = folder / "merged"
    with artifact.create(merged, "merged", {}) as draft:
        shutil.copytree(source, draft.path, dirs_exist_ok=True)
        Front.from_hf(source).save(draft.path)
    return convert(merged, folder / "gguf")


class Server:
    """The command as a user starts it; `address` is the line that it prints."""

    def __init__(self, edge: Path, *options: str, prefix: tuple[str, ...] = ()) -> None:
        command = [sys.executable, "-m", "ldrt_edge.cli", "serve", str(edge), "--port", "0", "--threads", "1", *options]
        # not a pipe: when full, one that nobody reads would stop it
        self._notes = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self.process = subprocess.Popen(
            [*prefix, *command], stdout=subprocess.PIPE, stderr=self._notes, text=True, start_new_session=True
        )
        assert self.process.stdout
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            self.process.wait(60)
            raise AssertionError(self.close())
        parts = urlsplit(self.address)
        self.port = parts.port or 0
        self.token = parts.fragment.removeprefix("token=")

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def send(
        self, method: str, path: str, body: bytes | dict[str, Any] | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body; underscores in the names of headers become hyphens."""
        given = {"authorization": f"Bearer {self.token}"} | {k.replace("_", "-"): v for k, v in headers.items()}
        connection = self.connect()
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        connection.request(method, path, content, {name: value for name, value in given.items() if value})
        reply = connection.getresponse()
        told = {name.lower(): value for name, value in reply.getheaders()}
        data = reply.read()
        connection.close()
        return reply.status, told, data

    def json(self, method: str, path: str, body: bytes | dict[str, Any] | None = None) -> Any:
        status, _, data = self.send(method, path, body)
        assert status == 200, data
        return json.loads(data)

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        status, _, data = self.send("POST", path, body)
        assert status == 200, data
        return [json.loads(line) for line in data.splitlines()]

    def close(self) -> str:
        """End it as Ctrl-C does; what it wrote to stderr."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        out, _ = self.process.communicate(timeout=30)
        assert out == "", "one line and nothing else on stdout"
        with self._notes:
            self._notes.seek(0)
            return self._notes.read()
