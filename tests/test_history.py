"""Conversations that outlive the program: what is on disk, what comes back, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pydicom.data import get_testdata_file
from serving import Server, tiny_edge
from test_chat import Terminal

from ldrt_edge.artifact import Input
from ldrt_edge.chat.history import History
from ldrt_edge.chat.session import Session
from ldrt_edge.cli import cli
from ldrt_edge.errors import DataError

QUESTION = "Is the patient's shoulder in the field?"
PASSPHRASE = "correct horse"


@pytest.fixture(scope="module")
def edge(tiny, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    return tiny_edge(tiny("llava15", "smollm2"), tmp_path_factory.mktemp("history"))


def open_server(edge: Path, folder: Path, passphrase: str = PASSPHRASE) -> Server:
    prefix = ("env", f"LDRT_EDGE_PASSPHRASE={passphrase}")
    return Server(edge, "--history", str(folder), "--max-tokens", "12", prefix=prefix)


def ask(server: Server, talk: str, question: str, pictures: list[dict[str, Any]] | None = None) -> None:
    body = {"question": question} | ({"pictures": pictures} if pictures else {})
    assert server.events(f"/api/conversations/{talk}/ask", body)[-1] == {"done": True}


def test_a_conversation_comes_back_goes_on_and_can_be_forgotten(edge: Path, tmp_path: Path) -> None:
    folder = tmp_path / "history"
    server = open_server(edge, folder)
    assert server.json("GET", "/api/model")["history"] is True
    picture = server.json("POST", "/api/pictures", Path(str(get_testdata_file("CT_small.dcm"))).read_bytes())
    talk = server.json("POST", "/api/conversations", {})["name"]
    ask(server, talk, QUESTION, [{"name": picture["name"], "window": [40, 400]}])
    other = server.json("POST", "/api/conversations", {})["name"]
    ask(server, other, "Anything else?")
    before = server.json("GET", f"/api/conversations/{talk}")
    seen = server.send("GET", f"/api/conversations/{talk}/seen/0/0")[2]
    server.process.send_signal(signal.SIGKILL)  # as when the battery is empty: what was answered is there
    server.process.communicate()

    written = [path for path in folder.rglob("*") if path.is_file()]
    assert len(written) == 3 and all(path.stat().st_mode & 0o077 == 0 for path in written)
    for content in [path.read_bytes() for path in written]:
        for secret in (QUESTION, before["turns"][0]["answer"], PASSPHRASE, "CompressedSamples", "CT_small"):
            assert secret.encode() not in content

    server = open_server(edge, folder)
    listed = server.json("GET", "/api/conversations")
    assert [one["name"] for one in listed] == [other, talk], "the newest first"
    assert server.json("GET", f"/api/conversations/{talk}") == before
    assert server.send("GET", f"/api/conversations/{talk}/seen/0/0")[2] == seen
    ask(server, talk, "And the other one?")
    assert len(server.json("GET", f"/api/conversations/{talk}")["turns"]) == 2
    assert server.send("DELETE", f"/api/conversations/{other}")[0] == 200
    assert server.close() == ""

    server = open_server(edge, folder)
    assert [one["name"] for one in server.json("GET", "/api/conversations")] == [talk]
    assert len(server.json("GET", f"/api/conversations/{talk}")["turns"]) == 2
    server.close()

    with pytest.raises(AssertionError, match="not the passphrase") as caught:
        open_server(edge, folder, "wrong")
    assert "Traceback" not in str(caught.value)
    (file,) = folder.glob("*.talk")
    content = file.read_bytes()
    for changed in (content[:-1], content[:40] + bytes([content[40] ^ 1]) + content[41:], b""):
        file.write_bytes(changed)
        with pytest.raises(AssertionError, match="changed or cut off"):
            open_server(edge, folder)
    file.rename(folder / f"{'x' * 16}.talk").write_bytes(content)
    with pytest.raises(AssertionError, match="changed or cut off"):
        open_server(edge, folder)


def test_what_is_no_history_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("hello")
    with pytest.raises(DataError, match="neither empty nor a history"):
        History(tmp_path, PASSPHRASE)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    for content in ("{", "[]", json.dumps({"schema": "ldrt-edge/history/1", "salt": "zz", "check": ""})):
        folder = tmp_path / "history"
        folder.mkdir(exist_ok=True)
        (folder / "lock.json").write_text(content)
        with pytest.raises(DataError, match="damaged"):
            History(folder, PASSPHRASE)
    with pytest.raises(DataError, match="wants a passphrase"):
        History(tmp_path / "new", "")


def test_without_a_passphrase_or_a_conversation_it_is_one_line(edge: Path, tmp_path: Path) -> None:
    runner = CliRunner(env={"LDRT_EDGE_PASSPHRASE": None})
    for command, said in (
        (["serve", str(edge), "--history", str(tmp_path / "new")], "LDRT_EDGE_PASSPHRASE"),
        (["chat", str(edge), "--history", str(tmp_path / "new"), "--ask", "Why?"], "leave out --ask"),
    ):
        done = runner.invoke(cli, command)
        assert done.exit_code == 1 and said in str(done.exception)
    assert not (tmp_path / "new").exists()


def test_another_models_newer_conversations_hide_none(tmp_path: Path) -> None:
    history = History(tmp_path / "history", PASSPHRASE)
    own, other = (Input("gguf", letter * 64) for letter in "ab")
    talk: Any = Session(None, None)  # type: ignore[arg-type] # nothing is asked
    for number, model in enumerate((own, own, own, *[other] * 4)):
        talk.model = model
        history.keep(f"talk-{number:04}", talk)
        os.utime(tmp_path / "history" / f"talk-{number:04}.talk", ns=(number, number))
    assert [name for name, _ in history.read(own, 3)] == ["talk-0000", "talk-0001", "talk-0002"]
    assert [name for name, _ in history.read(own, 2)] == ["talk-0001", "talk-0002"], "the last ones"
    assert [name for name, _ in history.read(other, 1)] == ["talk-0006"]


@pytest.mark.parametrize("opened", [True, False])
def test_what_a_write_that_was_cut_off_left_is_forgotten_too(tmp_path: Path, opened: bool) -> None:
    """While it is open, with the conversation; else when it is opened again."""
    folder = tmp_path / "history"
    history, talk = History(folder, PASSPHRASE), Session(None, None)  # type: ignore[arg-type] # nothing is asked
    for name in ("talk-0001", "talk-0002"):
        history.keep(name, talk)
        (folder / f"{name}.partial").write_bytes((folder / f"{name}.talk").read_bytes())
    if opened:
        history.forget("talk-0001")
        left = {"talk-0002.talk", "talk-0002.partial"}
    else:
        with pytest.raises(DataError, match="not the passphrase"):
            History(folder, "wrong")
        assert len(list(folder.glob("*.partial"))) == 2
        History(folder, PASSPHRASE)
        left = {"talk-0001.talk", "talk-0002.talk"}
    assert {path.name for path in folder.iterdir()} == {"lock.json", *left}


def test_a_conversation_that_cannot_be_read_is_one_line_that_names_it(tmp_path: Path) -> None:
    history = History(tmp_path / "history", PASSPHRASE)
    (tmp_path / "history" / "talk-0001.talk").mkdir()
    with pytest.raises(DataError, match=r"talk-0001\.talk: cannot be read"):
        list(history.read(Input("gguf", "a" * 64), 9))


@pytest.mark.parametrize("there", [True, False])
def test_a_new_historys_passphrase_is_typed_twice(edge: Path, tmp_path: Path, there: bool) -> None:
    """In an empty folder too: a slip would lock what is kept there for good."""
    folder = tmp_path / "history"
    if there:
        folder.mkdir()
    command = [sys.executable, "-m", "ldrt_edge.cli", "chat", str(edge), "--threads", "1", "--history", str(folder)]
    typed = (("Passphrase", "corect horse"), ("Repeat", PASSPHRASE), ("do not match", ""), ("Passphrase", PASSPHRASE))
    terminal = Terminal(command, tmp_path)
    for wanted, text in (*typed, ("Repeat", PASSPHRASE)):
        terminal.until(wanted)
        if text:
            terminal.type(f"{text}\r")
    terminal.until("/help shows the commands")
    terminal.close()
    History(folder, PASSPHRASE)

    terminal = Terminal(command, tmp_path)  # now it is known, and typed once
    terminal.until("Passphrase")
    terminal.type(f"{PASSPHRASE}\r")
    assert "Repeat" not in terminal.until("/help shows the commands")
    terminal.close()
