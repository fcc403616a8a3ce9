"""Conversations with real tiny models: through the session, through a pipe, and on a real pseudo-terminal."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from ldrt_edge import artifact
from ldrt_edge.chat.desk import Model
from ldrt_edge.chat.session import NOTICE, Session, cannot_be_told
from ldrt_edge.chat.spelling import Speller, joined
from ldrt_edge.chat.terminal import ask_once, run_chat
from ldrt_edge.convert.gguf import convert
from ldrt_edge.errors import ArtifactError, DataError
from ldrt_edge.front import Front
from ldrt_edge.image import read_image
from ldrt_edge.release import RELEASE, Verdict
from ldrt_edge.runtimes.base import Runtime, Sampling, Token, load

TEXTS = (
    "Three beams treat the left knee.",
    "Wie viele Felder? Täglich 0,5 Gy über der Ferse.",
    "低剂量放射治疗：三个射野。",
    "naïve façade 🙂👍🏽 emoji, ¿verdad?",
)
PROMPT = r"/help shows the commands\s+>"
SECRET = "DOE_JANE_1950"


@pytest.fixture(scope="module")
def merged(tiny, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    """A tiny merged model as an artefact."""
    source = tiny("llava15", "smollm2")
    out = tmp_path_factory.mktemp("chat") / "merged"
    with artifact.create(out, "merged", {}) as draft:
        shutil.copytree(source, draft.path, dirs_exist_ok=True)
        Front.from_hf(source).save(draft.path)
    return out


@pytest.fixture(scope="module")
def edge(merged: Path) -> Path:
    """The same as GGUF, for llama.cpp: what a laptop runs."""
    return convert(merged, merged.with_name("gguf"))


@pytest.fixture(scope="module")
def runtime(edge: Path) -> Iterator[Runtime]:
    loaded = load(edge, threads=1)
    yield loaded
    loaded.close()


@pytest.fixture
def session(edge: Path, runtime: Runtime) -> Session:
    return Session(runtime, Front.load(edge), Sampling(max_tokens=24), artifact.identity(edge))


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / f"{SECRET}.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    return path


# --- text as it comes -----------------------------------------------------------------------------------------------


def spell(speller: Speller, *ids: int) -> list[str]:
    return [joined(speller.add(Token(number, -1.0))) for number in ids]


@pytest.mark.parametrize("text", ["llama", "mistral", "smollm2"])
@pytest.mark.parametrize("answer", TEXTS)
def test_text_comes_in_whole_characters(tiny, text: str, answer: str) -> None:  # type: ignore[no-untyped-def]
    front = Front.from_hf(tiny("llava15", text))
    speller = Speller(front.tokenizer)
    pieces = spell(speller, *front.tokenizer.encode(answer, add_special_tokens=False).ids)
    assert "\ufffd" not in "".join(pieces)
    assert sum(map(bool, pieces)) > 1, "it comes in pieces, not all at the end"
    assert "".join(pieces) + joined(speller.finish()) == speller.text == front.decode(speller.ids).strip() == answer


def test_an_unfinished_character_waits_and_is_shown_as_such_at_the_end(edge: Path) -> None:
    front = Front.load(edge)
    speller = Speller(front.tokenizer)
    assert "".join(spell(speller, *front.tokenizer.encode("yes 🙂").ids[:-1])) == "yes"
    assert joined(speller.finish()).strip() == "\ufffd"


@pytest.mark.parametrize("text", ["llama", "mistral", "smollm2"])
def test_what_follows_half_a_character_is_not_lost(tiny, text: str) -> None:  # type: ignore[no-untyped-def]
    """A decoder with bytes to fall back on takes a whole character back when half of one is right behind it."""
    front = Front.from_hf(tiny("llava15", text))
    known = front.tokenizer.encode("🙂", add_special_tokens=False).ids
    whole = known[-4:] if text != "smollm2" else known
    behind = front.tokenizer.encode("two fields", add_special_tokens=False).ids
    speller = Speller(front.tokenizer)
    said = "".join(spell(speller, *whole, *whole[:1], *behind)) + joined(speller.finish())
    assert said == speller.text
    assert said.startswith("🙂\ufffd") and said.endswith("two fields")


# --- the session ----------------------------------------------------------------------------------------------------


def test_pieces_join_to_the_answer_of_a_plain_generation(session: Session, film: Path) -> None:
    (image,) = session.attach(read_image(film))
    pieces = list(session.ask("How many beams are used?"))
    exchange = session.exchanges[0]
    assert len(pieces) > 1 and "".join(pieces) == exchange.answer
    assert [shown.image for shown in exchange.shown] == [image]

    from ldrt_edge.front import Message

    prompt = session.front.prompt([Message("user", "How many beams are used?", (image,))])
    ids = [token.id for token in session.runtime.generate(prompt, session.sampling)]
    assert exchange.tokens == len(ids) and exchange.answer == session.front.decode(ids).strip()


def test_a_second_question_sees_the_picture_and_reuses_what_was_read(session: Session, film: Path) -> None:
    session.attach(read_image(film))
    list(session.ask("How many beams are used?"))
    list(session.ask("And which side is treated?"))
    first, second = session.exchanges
    assert second.shown == ()
    assert second.timings.reused_tokens > first.shown[0].image.token_count


def test_a_picture_read_before_its_question_changes_no_answer(session: Session, film: Path) -> None:
    answers, prefilled = [], []
    for read in (False, True):
        session.reset()
        list(session.ask("Something else"))
        session.reset()
        session.attach(read_image(film), read=read)
        answers.append("".join(session.ask("How many beams are used?")))
        prefilled.append(session.exchanges[0].timings.prefill_tokens)
    assert answers[0] == answers[1] and prefilled[1] <= prefilled[0] - 16


def test_what_is_read_ahead_changes_neither_what_waits_nor_what_is_asked(session: Session, film: Path) -> None:
    (waits,) = session.attach(read_image(film))
    other = session.see(replace(read_image(film), rgb=np.zeros((60, 80, 3), np.uint8)))
    session.read("How many beams", other)
    assert [shown.image for shown in session.waiting] == [waits] and not session.exchanges
    list(session.ask("How many beams are used?"))
    assert [shown.image for shown in session.exchanges[0].shown] == [waits]
    branch = session.fork(0)
    with pytest.raises(DataError):
        list(branch.ask("<image>", other))
    list(branch.ask("What differs?", other))
    assert [shown.image for shown in branch.exchanges[0].shown] == [waits, other[0].image], "nothing that waits is lost"
    assert branch.waiting == ()


def test_the_answer_depends_on_the_picture(session: Session, film: Path, tmp_path: Path) -> None:
    black = tmp_path / "black.png"
    Image.new("RGB", (60, 80)).save(black)
    answers = []
    for path in (film, black):
        session.reset()
        session.attach(read_image(path))
        answers.append("".join(session.ask("What is in this image?")))
    assert answers[0] != answers[1]


def test_stopping_keeps_what_was_said(session: Session, film: Path) -> None:
    session.attach(read_image(film))
    pieces = session.ask("How many beams are used?")
    said = next(pieces) + next(pieces)
    pieces.close()
    assert session.exchanges[0].answer == said and session.exchanges[0].finish == "stopped"
    list(session.ask("Go on"))
    assert [exchange.question for exchange in session.exchanges] == ["How many beams are used?", "Go on"]


def test_stopping_before_the_first_word_leaves_the_picture_waiting(session: Session, film: Path) -> None:
    session.attach(read_image(film))
    session.ask("How many beams are used?").close()
    assert not session.exchanges
    list(session.ask("How many beams are used?"))
    assert session.exchanges[0].shown


def test_a_prefill_in_another_thread_can_be_interrupted(session: Session) -> None:
    expected = "".join(session.ask("Is it well?"))
    session.reset()
    outcome: list[BaseException | None] = []

    def read_much() -> None:
        try:
            next(session.ask("very " * 900 + "long?"))
            outcome.append(None)
        except KeyboardInterrupt as error:
            outcome.append(error)

    reading = threading.Thread(target=read_much)
    reading.start()
    while reading.is_alive():
        session.runtime.interrupt()
    assert isinstance(outcome[0], KeyboardInterrupt) and not session.exchanges
    assert "".join(session.ask("Is it well?")) == expected


def test_a_refused_question_changes_nothing(session: Session, film: Path) -> None:
    session.attach(read_image(film))
    for question in ("   ", "what is <image> here?", "very " * 6000 + "long?"):
        with pytest.raises(DataError):
            list(session.ask(question))
    assert not session.exchanges
    list(session.ask("How many beams are used?"))
    assert session.exchanges[0].shown


def test_an_answer_cut_short_says_so(session: Session, edge: Path, runtime: Runtime) -> None:
    short = Session(runtime, session.front, Sampling(max_tokens=2))
    list(short.ask("What is the highest dose?"))
    assert short.exchanges[0].finish == "length" and short.exchanges[0].tokens == 2


def test_a_transcript_has_no_file_names_and_is_never_overwritten(session: Session, tmp_path: Path) -> None:
    film = tmp_path / f"{SECRET}.dcm"
    film.write_bytes(Path(str(get_testdata_file("CT_small.dcm"))).read_bytes())
    session.attach(read_image(film, window=(40, 400)))
    list(session.ask("How many beams are used?"))
    saved = tmp_path / "talk.json"
    session.save(saved)
    text = saved.read_text(encoding="utf-8")
    assert SECRET not in text and "CompressedSamples" not in text  # the file's PatientName
    data = json.loads(text)
    assert data["notice"] == NOTICE and "not for diagnosis" in NOTICE
    assert data["model"] == {"kind": "gguf", "manifest_sha256": session.model.manifest_sha256}  # type: ignore[union-attr]
    (picture,) = data["turns"][0]["images"]
    assert picture["sha256"] == artifact.file_sha256(film)
    assert (picture["width"], picture["height"], picture["window"], picture["modality"]) == (128, 128, [40, 400], "CT")
    assert stat.S_IMODE(saved.stat().st_mode) & 0o077 == 0
    with pytest.raises(DataError, match="exists"):
        session.save(saved)
    assert saved.read_text(encoding="utf-8") == text
    with pytest.raises(DataError, match="cannot be written"):
        session.save(tmp_path / "none" / "talk.json")


# --- one question ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Cannot be told from this  image.", True),
        ("Das ist aus diesem Bild nicht zu erkennen.", True),
        ("C'est impossible à dire d’après cette image", True),
        ("从这张图像无法判断。", True),
        ("Two beams.", False),
        ("Yes: the image can be told from this one", False),
    ],
)
def test_an_answer_that_says_it_cannot_tell_is_known_as_such(answer: str, expected: bool) -> None:
    assert cannot_be_told(answer) is expected


def test_one_question_gets_the_same_answer_from_both_runtimes(merged: Path, edge: Path, film: Path) -> None:
    sampling = Sampling(max_tokens=8)
    question = "How many beams are used?"
    answers = [ask_once(folder, question, film, sampling=sampling, threads=1) for folder in (merged, edge)]
    assert answers[0].answer and answers[0].answer == answers[1].answer
    assert [answer.runtime for answer in answers] == ["hf", "llamacpp"]
    for answer, folder in zip(answers, (merged, edge), strict=True):
        assert answer.image_sha256 == artifact.file_sha256(film) and answer.model == artifact.identity(folder)
        assert answer.tokens <= 8 and answer.timings.prefill_tokens > 16 and answer.timings.image_encode_ms > 0.1


def test_one_question_that_cannot_be_asked(edge: Path, film: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        ask_once(edge, "How many?", film.with_name("none.png"))
    with pytest.raises(ArtifactError):
        ask_once(film.parent, "How many?")


# --- through a pipe -------------------------------------------------------------------------------------------------


def _command(edge: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "ldrt_edge.cli", "chat", str(edge), "--threads", "1", *options]


def test_through_a_pipe_errors_are_lines_and_the_conversation_goes_on(edge: Path, film: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(film.read_bytes()[:500])
    (tmp_path / "taken.json").write_text("{}")
    lines = [
        f"/image {bad}", f"/image {tmp_path / 'none.png'}", "/image", "/nonsense", f'/image "{film}" 40,400',
        f"/image {film} 7",
        f"/image {film}", "How many beams are used?", "", f"/save {tmp_path / 'taken.json'}",
        f"/save {tmp_path / 'talk.json'}", f"/save {tmp_path / 'talk.dcm'}", "x" * 9000,
        "Which side is treated?", "/reset", f"/save {tmp_path / 'empty.json'}", f"/save {tmp_path / 'empty.dcm'}",
        "/quit", "What is never asked?",
    ]
    done = subprocess.run(
        _command(edge, "--max-tokens", "8"), input="\n".join(lines).encode() + b"\n", capture_output=True, timeout=120,
        check=True,
    )
    notes = done.stderr.decode()
    for note in (
        "bad.png: a damaged or truncated PNG", "none.png: no such file", "name the file", "/nonsense: no such command",
        "in colour", "frame 7: the file has 1", "picture: PNG, 80×60, 16 tokens", "taken.json exists",
        "the model holds", "forgotten", "nothing was asked yet",
    ):
        assert note in notes, notes
    assert "Traceback" not in notes
    talk = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    answer = talk["turns"][0]["answer"]
    assert done.stdout.decode().startswith(_printable(answer) + "\n"), "answers and nothing else on stdout"
    assert (tmp_path / "taken.json").read_text() == "{}"
    report = pydicom.dcmread(tmp_path / "talk.dcm")
    assert report.Modality == "SR" and report.PatientName == "" and not (tmp_path / "empty.dcm").exists()
    assert json.loads((tmp_path / "empty.json").read_text(encoding="utf-8"))["turns"] == []


def _printable(text: str) -> str:
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def test_a_first_picture_that_cannot_be_read_ends_it(edge: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder, not a picture"):
        run_chat(edge, tmp_path)


# --- on a terminal --------------------------------------------------------------------------------------------------


class Terminal:
    """A child on a pseudo-terminal of its own, so that Ctrl-C is the terminal's and not ours."""

    def __init__(self, command: list[str], folder: Path, **more: str) -> None:
        self.seen, self._cut, self._decoder = "", "", codecs.getincrementaldecoder("utf-8")("replace")
        self._pid, self._screen = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests behind others ignores it
            settings = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "200", "HOME": str(folder)}
            os.execve(command[0], command, os.environ | settings | more)

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def until(self, wanted: str, seconds: float = 60) -> str:
        """Read until the screen has shown the pattern; returns what was shown up to its end."""
        ends = time.monotonic() + seconds
        while not (found := re.search(wanted, self.seen)):
            readable, _, _ = select.select([self._screen], [], [], max(ends - time.monotonic(), 0))
            assert readable, f"{wanted!r} did not appear in: {self.seen[-2000:]!r}"
            try:
                data = os.read(self._screen, 65536)
            except OSError:  # Linux's end of file for a pseudo-terminal
                data = b""
            assert data, f"it ended without {wanted!r}: {self.seen[-2000:]!r}"
            text = self._cut + self._decoder.decode(data)
            whole = re.sub(r"\x1b(\[[0-9;?]*)?$", "", text)  # a read ends where it likes, in a letter or a sequence
            self._cut = text[len(whole) :]
            self.seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", whole)
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def wait(self) -> int:
        """The exit code of a child that ends of itself."""
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._pid = 0
                return os.waitstatus_to_exitcode(status)
            if select.select([self._screen], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self._screen, 65536).decode(errors="replace")
        raise AssertionError(f"it does not end: {self.seen[-2000:]!r}")

    def close(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._screen)


@pytest.mark.parametrize("name", ["model-F16.gguf", "front.json"])
def test_a_file_that_is_not_what_the_manifest_says_is_refused(edge: Path, tmp_path: Path, name: str) -> None:
    changed = Path(shutil.copytree(edge, tmp_path / "changed"))
    content = bytearray((changed / name).read_bytes())
    content[-2] ^= 1  # the size is as it was
    (changed / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}: changed since it was written"):
        ask_once(changed, "What?")


def test_what_a_budget_said_is_told_before_the_first_answer(
    edge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "judged"
    shutil.copytree(edge, folder)
    verdict = Verdict(True, "loss +0.4 points", 1.0, 0.4, -0.2, 0.9, None, 2.0, 3.0, 400, 50, 400)
    manifest = json.loads((folder / artifact.MANIFEST).read_text())
    manifest["metrics"][RELEASE] = asdict(verdict)
    (folder / artifact.MANIFEST).write_text(json.dumps(manifest))

    ask_once(folder, "How many?", sampling=Sampling(max_tokens=1), threads=1)

    assert "judged is released: loss +0.4 points" in capsys.readouterr().err
    assert Model.of(folder).verdict == verdict and Model.of(edge).verdict is None


@pytest.fixture
def terminal(edge: Path, tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(_command(edge, "--max-tokens", "4000"), tmp_path)
    yield opened
    opened.close()


def test_on_a_terminal_ctrl_c_stops_an_answer_and_not_the_program(
    terminal: Terminal, film: Path, tmp_path: Path
) -> None:
    assert "not for diagnosis" in terminal.until(PROMPT)
    terminal.type("\x03")
    terminal.until("Ctrl-D or /quit leaves")
    terminal.type("half a question\x03")
    terminal.type(f"/image {tmp_path}\r")
    terminal.until("a folder, not a picture")
    terminal.type(f"{film}\r")  # dropped on the terminal
    terminal.until("picture: PNG, 80×60")
    terminal.type("How many beams are used?\r")
    terminal.until(r"[^\r\n]{80}")  # the answer has begun, and would go on for long
    terminal.type("\x03\x03")  # the second one comes when there is nothing left to stop
    terminal.until(r"stopped\s+>")
    terminal.type("/save talk.json\r")
    terminal.until(r"saved to talk\.json\s+>")
    terminal.type("\x04")
    assert terminal.wait() == 0
    turns = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["turns"]
    assert [turn["finish"] for turn in turns] == ["stopped"]
    assert len(turns[0]["answer"]) >= 80 and turns[0]["tokens"] < 4000
    assert sorted(path.name for path in tmp_path.iterdir()) == [film.name, "talk.json"], "nothing else was written"


def test_on_a_terminal_words_complete_and_a_refused_question_is_offered_again(terminal: Terminal, film: Path) -> None:
    terminal.until(PROMPT)
    terminal.type("/im\t")
    terminal.until("/image")
    terminal.type(f" {str(film)[:-6]}\t")
    terminal.until(re.escape(film.name[-6:]))
    terminal.type("\r")
    terminal.until(r"picture: PNG, 80×60.*\s+>")
    terminal.type("what is <image> here?\r")
    terminal.until("control token")
    terminal.until(r">.?what is <image> here\?")
    terminal.type("\x03/quit\r")
    assert terminal.wait() == 0


def test_with_a_history_arrow_keys_bring_earlier_questions_and_reset_forgets(edge: Path, tmp_path: Path) -> None:
    folder, asked = tmp_path / "history", "Is the left shoulder in the field?"

    def opened() -> Terminal:
        command = _command(edge, "--max-tokens", "4", "--history", str(folder))
        terminal = Terminal(command, tmp_path, LDRT_EDGE_PASSPHRASE="correct horse")
        terminal.until(PROMPT)
        return terminal

    terminal = opened()
    terminal.type(f"{asked}\r")
    terminal.until(r"cut off by[^>]*>")
    terminal.type("/quit\r")
    assert terminal.wait() == 0
    (kept,) = folder.glob("*.talk")
    assert asked.encode() not in kept.read_bytes()

    terminal = opened()
    terminal.type("\x1b[A")  # arrow up
    terminal.until(re.escape(asked))
    terminal.type("\r")
    terminal.until(r"cut off by[^>]*>")
    assert len(list(folder.glob("*.talk"))) == 2
    terminal.type("/reset\r")
    terminal.until(r"forgotten\s+>")
    assert list(folder.glob("*.talk")) == [kept], "the other conversation stays"
    terminal.type("/quit\r")
    assert terminal.wait() == 0


def test_on_a_terminal_with_colours_the_picture_is_shown(edge: Path, film: Path, tmp_path: Path) -> None:
    terminal = Terminal(_command(edge), tmp_path, TERM="xterm-256color", COLORTERM="truecolor")
    terminal.until(PROMPT)
    terminal.type(f"/image {film}\r")
    assert terminal.until(r"picture: PNG, 80×60.*\s+>").count("▀") == 16 * 32
    terminal.type("/quit\r")
    assert terminal.wait() == 0
