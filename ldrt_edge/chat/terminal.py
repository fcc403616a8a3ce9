"""`ldrt-edge chat`: one question, or a conversation on a terminal or through a pipe.

Answers go to stdout as they are written, everything else to stderr. Nothing is written to disk unless /save or a
history asks for it; what was typed is remembered until the program ends. Ctrl-C stops an answer and not the program.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import secrets
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

from ldrt_edge import artifact
from ldrt_edge.artifact import Input
from ldrt_edge.bundle.open import unreleased
from ldrt_edge.chat import preview
from ldrt_edge.chat.history import History
from ldrt_edge.chat.intake import BurnedIn, take_in
from ldrt_edge.chat.session import NOTICE, Finish, Session
from ldrt_edge.chat.typed import COMMANDS, typed
from ldrt_edge.confidence import Sure, read_confidence
from ldrt_edge.console import say, stderr
from ldrt_edge.errors import DataError, LdrtError
from ldrt_edge.front import Front
from ldrt_edge.image import Picture, Window
from ldrt_edge.release import read_verdict
from ldrt_edge.runtimes.base import Sampling, Timings, load

HELP = """\
Type a question. Commands:
  /image FILE [CENTER,WIDTH] [FRAME]  show a picture (PNG, JPEG, TIFF, DICOM) with the next question
  /reset                              forget the conversation and its pictures
  /save FILE                          write the conversation to a new file: DICOM SR if it ends in .dcm, else JSON
  /help                               this
  /quit                               leave (or Ctrl-D); Ctrl-C stops an answer"""
_MOST_CONVERSATIONS = 100  # that earlier questions are taken from
_WINDOW = re.compile(r"(-?\d+(?:\.\d+)?),(\d+(?:\.\d+)?)")
_UNPRINTABLE = {code: None for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class Answer:
    """One answer and what it rests on.

    finish: "end", or "length" where `max_tokens` or the context cut it off. image_sha256: of the file. unreleased: why
    the model is not. probability: the model's own, of the answer; how_sure: what was measured of such ones.
    """

    answer: str
    finish: Finish
    image_sha256: str | None
    tokens: int
    timings: Timings
    runtime: str
    model: Input
    unreleased: str | None
    probability: float | None
    how_sure: Sure | None
    notice: str = NOTICE


def ask_once(
    folder: Path,
    question: str,
    image: Path | None = None,
    window: Window | None = None,
    frame: int = 0,
    sampling: Sampling | None = None,
    threads: int | None = None,
    report: Path | None = None,
    burned_in: BurnedIn | None = None,
) -> Answer:
    """Ask a model artefact one question, about a picture if there is one.

    burned_in: what becomes of a picture with text in it; None asks, on a terminal, and shows it elsewhere.

    Raises:
        LdrtError: the model does not load, the picture cannot be read or is refused, or the question cannot be asked.
    """
    picture = take_in(image, window, frame, burned_in) if image else None
    with _opened(folder, sampling, threads, report) as session:
        with _busy("answering"):
            if picture:
                session.attach(picture)
            text = "".join(session.ask(question))
        kept = session.exchanges[-1] if session.exchanges else None
        return Answer(
            answer=text,
            finish=kept.finish if kept else "end",
            image_sha256=picture.origin.sha256 if picture else None,
            tokens=kept.tokens if kept else 0,
            timings=kept.timings if kept else session.runtime.timings,
            runtime=session.runtime.name,
            model=artifact.identity(folder),
            unreleased=session.unreleased,
            probability=kept.probability if kept else None,
            how_sure=session.how_sure(kept) if kept else None,
        )


def run_chat(
    folder: Path,
    image: Path | None = None,
    window: Window | None = None,
    frame: int = 0,
    sampling: Sampling | None = None,
    threads: int | None = None,
    report: Path | None = None,
    history: History | None = None,
    burned_in: BurnedIn | None = None,
) -> None:
    """Hold a conversation until /quit or the end of input; one question a line where stdin is no terminal.

    history: keeps the conversation, and has earlier questions for the arrow keys. burned_in: see `ask_once`.

    Raises:
        LdrtError: the model does not load, the first picture cannot be read or is refused, or the history cannot be
            read. Later errors are shown, and the conversation goes on.
    """
    picture = take_in(image, window, frame, burned_in) if image else None
    with _opened(folder, sampling, threads, report) as session:
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal's or a pipe's encoding must not end the conversation
        interactive = sys.stdin.isatty()
        with _Interrupts(interactive) as interrupts:
            conversation = Conversation(session, interrupts, history, burned_in)
            if picture:
                conversation.show(picture)
            if interactive:
                room = session.runtime.context_length
                say(f"{folder.name} on {session.runtime.name}, {room} tokens. {NOTICE} /help shows the commands")
            past = history.read(artifact.identity(folder), _MOST_CONVERSATIONS) if history and interactive else ()
            asked = [exchange.question for _, exchanges in past for exchange in exchanges]
            for line in typed(conversation, asked) if interactive else sys.stdin:
                if not conversation.take(line):
                    break


class Conversation:
    """Takes the lines that a person types; answers on stdout, notes and errors on stderr.

    unanswered: the last question, if it is not in the conversation: refused, or stopped before its first word.
    """

    def __init__(
        self, session: Session, interrupts: _Interrupts, history: History | None = None,
        burned_in: BurnedIn | None = None,
    ) -> None:
        self._session, self._interrupts, self._history, self._burned_in = session, interrupts, history, burned_in
        self._name = secrets.token_urlsafe(12)  # in the history
        self.unanswered = ""

    def take(self, line: str) -> bool:
        """Do what a line says; False when the conversation is over."""
        line = line.strip()
        self.unanswered = ""
        try:
            if dropped := _dropped_file(line):
                self.show(self._take_in(dropped))
            elif line.startswith("/"):
                return self._run(*line.partition(" ")[::2])
            elif line:
                self._answer(line)
        except LdrtError as error:
            say(str(error))
        except Stopped:
            print(flush=True)
            say("stopped")
        return True

    def show(self, picture: Picture) -> None:
        """Show a picture with the next question."""
        with self._interrupts.raised(), _busy("reading the picture"):
            (image,) = self._session.attach(picture, read=True)
        preview.show(image.tiles[0], stderr)
        say(f"picture: {_describe(picture)}, {image.token_count} tokens")
        if any(exchange.shown for exchange in self._session.exchanges):
            say("earlier pictures stay in the conversation; /reset forgets them")

    def _take_in(self, path: Path, window: Window | None = None, frame: int = 0) -> Picture:
        with self._interrupts.raised():
            return take_in(path, window, frame, self._burned_in)

    def _run(self, command: str, rest: str) -> bool:
        if command == "/image":
            self.show(self._take_in(*_image_options(rest)))
        elif command == "/reset":
            self._session.reset()
            if self._history:
                self._history.forget(self._name)
            say("forgotten")
        elif command == "/save":
            path = _path(_words(rest), "/save FILE: name the file")
            self._session.save(path)
            say(f"saved to {path}")
        elif command == "/help":
            say(HELP)
        elif command != "/quit":
            raise DataError(f"{command}: no such command; there are {', '.join(COMMANDS)}")
        return command != "/quit"

    def _answer(self, question: str) -> None:
        self.unanswered = question
        answered = len(self._session.exchanges)
        try:
            with self._interrupts.raised(), closing(self._session.ask(question)) as pieces:
                with _busy("looking"):
                    first = next(pieces, "")
                for piece in itertools.chain((first,), pieces):
                    print(piece.translate(_UNPRINTABLE), end="", flush=True)
            print(flush=True)
        finally:
            if len(self._session.exchanges) > answered:
                self.unanswered = ""
                if self._history:
                    self._history.keep(self._name, self._session)
        if self.unanswered:
            say("the model gave no answer")
        elif self._session.exchanges[-1].finish == "length":
            say("cut off by --max-tokens, or by the end of the context")
        elif sure := self._session.how_sure(self._session.exchanges[-1]):
            say(sure.told)


class Stopped(KeyboardInterrupt):
    """Ctrl-C while a picture is read or an answer is written."""


class _Interrupts:
    """On a terminal, Ctrl-C stops an answer once and does nothing between answers: pressed twice it must not end all.

    Through a pipe it ends the program, as usual.
    """

    def __init__(self, interactive: bool) -> None:
        self._interactive, self._armed = interactive, False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._came) if self._interactive else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Let Ctrl-C raise `Stopped` in this block."""
        self._armed = self._interactive
        try:
            yield
        except KeyboardInterrupt as error:  # a runtime that catches the signal itself raises its own
            if self._interactive:
                raise Stopped from error
            raise
        finally:
            self._armed = False

    def _came(self, _number: int, _frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            raise Stopped


@contextmanager
def _opened(
    folder: Path, sampling: Sampling | None, threads: int | None, report: Path | None
) -> Iterator[Session]:
    verdict, confidence = read_verdict(artifact.read(folder).metrics), read_confidence(folder, report)
    reason = unreleased(folder)  # a bundle may know of a later measurement
    with _busy("loading the model"):
        runtime = load(folder, threads=threads)
    if verdict is not None and verdict.released and reason is None:
        say(f"{folder.name} is {verdict.told}")
    try:
        about = artifact.identity(folder), reason, confidence
        yield Session(runtime, Front.load(folder), sampling, *about)
    finally:
        runtime.close()


def _busy(what: str) -> AbstractContextManager[object]:
    """A turning wheel on stderr, if a person watches."""
    return stderr.status(what) if stderr.is_terminal else nullcontext()


def _image_options(text: str) -> tuple[Path, Window | None, int]:
    """FILE [CENTER,WIDTH] [FRAME]; the file's name may hold spaces."""
    words = _words(text)
    frame = int(words.pop()) if len(words) > 1 and re.fullmatch(r"[0-9]{1,9}", words[-1]) else 0
    match = _WINDOW.fullmatch(words[-1]) if len(words) > 1 else None
    if match:
        words.pop()
    window = (float(match[1]), float(match[2])) if match else None
    return _path(words, "/image FILE [CENTER,WIDTH] [FRAME]: name the file"), window, frame


def _dropped_file(line: str) -> Path | None:
    """The file, if a line is its full path and nothing else: what a terminal types when a file is dropped on it."""
    try:
        path = Path(" ".join(_words(line)))
        return path if path.is_absolute() and path.is_file() else None
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return None


def _words(text: str) -> list[str]:
    """Split as a shell does, quotes and all; at spaces where quotes do not match."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    if os.name == "nt":
        lexer.escape = ""
    try:
        return list(lexer)
    except ValueError:
        return text.split()


def _path(words: list[str], otherwise: str) -> Path:
    if not words:
        raise DataError(otherwise)
    path = Path(" ".join(words))
    try:
        return path.expanduser()
    except RuntimeError:  # no such user: the name is as it stands
        return path


def _describe(picture: Picture) -> str:
    origin = picture.origin
    height, width = picture.rgb.shape[:2]
    parts = [" ".join(filter(None, (origin.format, origin.modality))), f"{width}×{height}"]
    if origin.window:
        parts.append("window {:g},{:g}".format(*origin.window))
    if origin.frames > 1:
        parts.append(f"frame {origin.frame} of {origin.frames}")
    if origin.blacked_out:
        parts.append(f"{origin.blacked_out} lines of text blacked out")
    return ", ".join(parts)
