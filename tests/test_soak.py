"""Many clients for a while: they ask, leave, stop, reload, send rubbish. LDRT_EDGE_SOAK_S=7200 makes it two hours."""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydicom.data import get_testdata_file
from serving import Server, tiny_edge

SECONDS = float(os.environ.get("LDRT_EDGE_SOAK_S", "60"))
CLIENTS = 20
GROWTH_BYTES = 48 << 20  # after the warm-up: what an allocator may still hold back


@pytest.fixture(scope="module")
def edge(tiny, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    return tiny_edge(tiny("llava15", "smollm2"), tmp_path_factory.mktemp("soak"))


class Client(threading.Thread):
    """One person, or program, with a conversation at a time."""

    def __init__(self, server: Server, number: int, until: float) -> None:
        super().__init__(daemon=True)
        self.server, self.number, self.chance, self.until = server, number, random.Random(number), until
        self.data = Path(str(get_testdata_file("CT_small.dcm"))).read_bytes()
        self.did: Counter[str] = Counter()
        self.fault: BaseException | None = None

    def run(self) -> None:
        try:
            self.picture = self.server.json("POST", "/api/pictures", self.data)["name"]
            acts = [self.ask, self.ask, self.program, self.leave, self.stop, self.reload, self.rubbish]
            while time.monotonic() < self.until:
                act = self.chance.choice(acts)
                act()
                self.did[act.__name__] += 1
        except BaseException as fault:
            self.fault = fault

    def ask(self) -> None:
        talk = self.new()
        for question in ("What is this?", "And that?"):
            answer = self.answer(talk, question)
            assert self.server.json("GET", talk)["turns"][-1]["answer"] == answer, "every answer is whole"
        self.well("DELETE", talk)

    def program(self) -> None:
        """Ask as a program does, which brings its picture along."""
        url = f"data:application/dicom;base64,{base64.b64encode(self.data).decode()}"
        parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 8, "user": str(self.number)}
        told = json.loads(self.patiently("/v1/chat/completions", body))
        assert told["choices"][0]["message"]["content"] and told["usage"]["completion_tokens"] > 0

    def leave(self) -> None:
        """Go away in the middle of an answer."""
        talk = self.new()
        connection, reply = self.begin(talk)
        if reply.status == 200:
            reply.readline()
        connection.close()
        self.well("DELETE", talk)

    def stop(self) -> None:
        talk = self.new()
        connection, reply = self.begin(talk)
        self.server.json("POST", f"{talk}/stop", {})
        if reply.status == 200:
            assert "done" in json.loads(reply.read().splitlines()[-1])
        connection.close()
        self.well("DELETE", talk)

    def reload(self) -> None:
        for path in ("/", "/app.js", "/api/model", "/api/conversations", f"/api/pictures/{self.picture}/seen"):
            self.well("GET", path)

    def rubbish(self) -> None:
        assert self.server.send("POST", "/api/pictures", self.chance.randbytes(5000))[0] == 400
        assert self.server.send("POST", "/v1/chat/completions", b"{")[0] == 400

    def well(self, method: str, path: str) -> None:
        status, _, data = self.server.send(method, path)
        assert status == 200, (method, path, status, data)

    def new(self) -> str:
        return f"/api/conversations/{self.server.json('POST', '/api/conversations', {})['name']}"

    def answer(self, talk: str, question: str) -> str:
        body = {"question": question, "pictures": [{"name": self.picture}], "max_tokens": 8}
        events = [json.loads(line) for line in self.patiently(f"{talk}/ask", body).splitlines()]
        assert events[-1] == {"done": True}, events[-1]
        return "".join(event.get("text", "") for event in events)

    def patiently(self, path: str, body: dict[str, Any]) -> bytes:
        """Ask, and again where too many wait."""
        while True:
            status, headers, data = self.server.send("POST", path, body)
            if status == 200:
                return data
            assert status == 429 and int(headers["retry-after"]) > 0, data
            time.sleep(self.chance.uniform(0.2, 1))

    def begin(self, talk: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = self.server.connect()
        body = json.dumps({"question": "Go on?", "pictures": [{"name": self.picture}]})
        connection.request("POST", f"{talk}/ask", body, {"authorization": f"Bearer {self.server.token}"})
        reply = connection.getresponse()
        assert reply.status in (200, 429)
        return connection, reply


@pytest.mark.slow
def test_many_clients_for_a_while_leave_no_memory_and_no_stuck_slot(edge: Path) -> None:
    server = Server(edge, "--max-tokens", "200", "--cache", "4")
    process = psutil.Process(server.process.pid)
    started = time.monotonic()
    clients = [Client(server, number, started + SECONDS) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    time.sleep(SECONDS / 3)
    warm = process.memory_info().rss
    for client in clients:
        client.join(SECONDS + 120)
    if faults := [client.fault for client in clients if client.fault]:
        raise AssertionError(f"{faults}; the server said: {server.close()}")
    assert not any(client.is_alive() for client in clients), "somebody still waits"
    did = sum((client.did for client in clients), Counter())
    assert all(did[act] > 0 for act in ("ask", "program", "leave", "stop", "reload", "rubbish")), did
    last = Client(server, 0, 0)
    last.picture = clients[0].picture
    last.ask()
    grown = process.memory_info().rss - warm
    print(f"{dict(did)}, {warm >> 20} MiB after the warm-up, {grown / 2**20:+.1f} MiB since")
    assert grown < GROWTH_BYTES
    assert server.json("GET", "/api/conversations") == []
    assert server.close() == "", "and nothing was wrong enough to be told"
