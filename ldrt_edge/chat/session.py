"""A conversation about pictures: what was asked, shown and answered, and the next answer as it is written.

Terminal and server both talk through `Session`; it holds everything in memory and writes nothing unless told to.
The runtimes keep what they have read so far, so a second question about a picture starts at once.

    session = Session(runtime, front)
    session.attach(read_image(path))
    for piece in session.ask("How many beams are used?"):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ldrt_edge import __version__
from ldrt_edge.artifact import Input
from ldrt_edge.chat.spelling import Speller, joined
from ldrt_edge.confidence import Confidence, Sure
from ldrt_edge.dataset import CANNOT_BE_TOLD
from ldrt_edge.errors import DataError
from ldrt_edge.front import Front, Message
from ldrt_edge.image import Origin, Picture
from ldrt_edge.runtimes.base import FrontImage, Prompt, Runtime, Sampling, Timings, Token, check_room

SCHEMA = "ldrt-edge/transcript/2"
NOTICE = "For research use only, not for diagnosis."

Finish = Literal["end", "length", "stopped"]


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture in the conversation: what the model sees, and where it came from (no file name)."""

    image: FrontImage
    origin: Origin


@dataclass(frozen=True, eq=False)
class Exchange:
    """A question, the pictures shown with it, and its answer, whole, cut off by length, or stopped by the user.

    probability: that the model gives to the answer, word for word; None where it is not known any more.
    timings: from the question on; pictures that were read before it cost nothing then.
    """

    question: str
    shown: tuple[Shown, ...]
    answer: str
    finish: Finish
    tokens: int
    sampling: Sampling
    timings: Timings
    probability: float | None = None

    @property
    def messages(self) -> tuple[Message, Message]:
        """As the front end takes them."""
        return _user_message(self.question, self.shown), Message("assistant", self.answer)


class Session:
    """One conversation with one loaded model.

    Args:
        runtime: the loaded model.
        front: its front end.
        sampling: how answers are drawn.
        model, unreleased: the artefact's identity, and why it is not released, for the transcript.
        confidence: what was measured of the model's probabilities.

    `exchanges` is what was said; `waiting`, the pictures that go with the next question.
    """

    def __init__(
        self, runtime: Runtime, front: Front, sampling: Sampling | None = None, model: Input | None = None,
        unreleased: str | None = None, confidence: Confidence | None = None,
    ) -> None:
        self.runtime, self.front, self.model, self.unreleased = runtime, front, model, unreleased
        self.confidence = confidence
        self.sampling = sampling or Sampling()
        self.exchanges: list[Exchange] = []
        self.waiting: tuple[Shown, ...] = ()
        self._last: Prompt | None = None  # that the model read for this conversation, and what it wrote behind it

    def ask(
        self, text: str, shown: Sequence[Shown] = (), spent: Timings | None = None
    ) -> Generator[str, None, None]:
        """Answer a question about the pictures that wait for it and those `shown` now.

        It comes piece by piece; the pieces joined are the answer. What was written when the iterator is closed, or
        interrupted, stays in the conversation. When it raises, the conversation is as before, and the pictures that
        waited still do.

        spent: on reading of this after the question came; it counts as the answer's.

        Raises:
            DataError: nothing was asked, the text holds a control token, or the conversation outgrew the context.
        """
        if not text.strip():
            raise DataError("nothing was asked")
        about = (*self.waiting, *shown)
        prompt = self._prompt(text, about)
        written = Speller(self.front.tokenizer)
        try:
            for token in self._generate(prompt, self.sampling):
                if piece := joined(written.add(token)):
                    yield piece
            if rest := joined(written.finish()):
                yield rest
        except (GeneratorExit, KeyboardInterrupt):
            self._keep(prompt, text, about, written, "stopped", spent)
            raise
        limit = min(self.sampling.max_tokens, self.runtime.context_length - len(prompt.ids))
        self._keep(prompt, text, about, written, "end" if len(written.ids) < limit else "length", spent)

    def attach(self, *pictures: Picture, read: bool = False) -> tuple[FrontImage, ...]:
        """Show pictures with the next question, in place of those that wait for it.

        The model can `read` them now, while the question is thought of, so that the answer starts at once; else then.

        Raises:
            DataError: they are to be read, and the conversation outgrew the context.
        """
        shown = self.see(*pictures)
        if read and shown:
            self._read(shown)
        self.waiting = shown
        return tuple(one.image for one in shown)

    def see(self, *pictures: Picture) -> tuple[Shown, ...]:
        """Pictures as the model gets them, for `ask` and `read`."""
        return tuple(Shown(self.front.image(picture.rgb), picture.origin) for picture in pictures)

    def read(self, typed: str = "", shown: Sequence[Shown] = ()) -> Timings:
        """Let the model read what `ask` would give it: all of the conversation, the pictures, what is typed so far.

        Then its answer starts at once. The conversation stays as it is; what was read so before and is not part of
        this is forgotten. Gives what it took.

        Raises:
            DataError: what is typed holds a control token, or the conversation outgrew the context.
        """
        self._read((*self.waiting, *shown), typed.strip())
        return replace(self.runtime.timings)

    def fork(self, count: int, instead: bool = False) -> Session:
        """Another conversation with the first `count` exchanges; the pictures of the one behind them wait in it.

        instead: this one ends with that, and what the model read for it is forgotten as far as it is of no use there.
        """
        other = Session(self.runtime, self.front, self.sampling, self.model, self.unreleased, self.confidence)
        other.exchanges = self.exchanges[:count]
        other.waiting = self.exchanges[count].shown if count < len(self.exchanges) else ()
        other._last = self._last if instead else None
        return other

    def reset(self) -> None:
        """Forget the conversation and its pictures, and let the model forget them."""
        if self._last:
            self.runtime.forget(self._last)
        self.exchanges.clear()
        self.waiting, self._last = (), None

    def transcript(self) -> dict[str, object]:
        """The conversation as JSON; pictures by their file's sha256, size and window, never by name."""
        return {
            "schema": SCHEMA,
            "notice": NOTICE,
            "version": __version__,
            "runtime": self.runtime.name,
            "model": asdict(self.model) if self.model else None,
            "unreleased": self.unreleased,
            "turns": [
                {
                    "question": exchange.question,
                    "images": [_describe(shown) for shown in exchange.shown],
                    "answer": exchange.answer,
                    "cannot_be_told": cannot_be_told(exchange.answer),
                    "probability": exchange.probability,
                    "how_sure": asdict(sure) if (sure := self.how_sure(exchange)) else None,
                    "finish": exchange.finish,
                    "tokens": exchange.tokens,
                    "sampling": asdict(exchange.sampling),
                    "timings": asdict(exchange.timings),
                }
                for exchange in self.exchanges
            ],
        }

    def how_sure(self, exchange: Exchange) -> Sure | None:
        """How often such answers were right; None where nobody measured it: not greedy, not whole, no picture."""
        measured = exchange.finish == "end" and exchange.sampling.temperature == 0 and exchange.shown
        if self.confidence is None or exchange.probability is None or not measured:
            return None
        return self.confidence.of(exchange.probability)

    def save(self, path: Path) -> None:
        """Write the conversation to a new file that only its owner can read: a DICOM SR for `.dcm`, else JSON.

        Raises:
            DataError: the file exists, or cannot be written; or nothing was asked that a DICOM SR could report.
        """
        if path.suffix.lower() == ".dcm":
            from ldrt_edge.chat.structured_report import structured_report

            content = structured_report(self)
        else:
            content = (json.dumps(self.transcript(), ensure_ascii=False, indent=1) + "\n").encode()
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode=0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
        except FileExistsError as error:
            raise DataError(f"{path} exists: choose another name") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error

    def _read(self, shown: Sequence[Shown], typed: str = "") -> None:
        next(self._generate(self._prompt(typed or "?", shown), replace(self.sampling, max_tokens=1)), None)

    def _generate(self, prompt: Prompt, sampling: Sampling) -> Iterator[Token]:
        """Tokens behind a prompt, which takes the place of the last one: so there is but one to forget."""
        check_room(prompt, 1, self.runtime.context_length)
        if self._last:
            self.runtime.forget(self._last, then=prompt)
        self._last = prompt
        yield from self.runtime.generate(prompt, sampling)

    def _prompt(self, question: str, shown: Sequence[Shown]) -> Prompt:
        history = [message for exchange in self.exchanges for message in exchange.messages]
        return self.front.prompt([*history, _user_message(question, shown)])

    def _keep(
        self, prompt: Prompt, question: str, shown: tuple[Shown, ...], written: Speller, finish: Finish,
        spent: Timings | None,
    ) -> None:
        text = itertools.takewhile(lambda token: token != prompt.image_token_id, written.ids)
        self._last = replace(prompt, ids=(*prompt.ids, *text))
        if written.text and self._can_go_on_after(written.text):
            timings = _together(spent, self.runtime.timings) if spent else replace(self.runtime.timings)
            tokens = len(written.ids)
            self.exchanges.append(Exchange(
                question, shown, written.text, finish, tokens, self.sampling, timings, math.exp(written.logprob)
            ))  # fmt: skip
            self.waiting = ()

    def _can_go_on_after(self, answer: str) -> bool:
        """False for an answer that spells a control token: it would be refused in every later prompt."""
        try:
            self.front.render([Message("user", "?"), Message("assistant", answer), Message("user", "?")])
        except DataError:
            return False
        return True


def cannot_be_told(answer: str) -> bool:
    """Whether an answer says, in the words that models were taught, that the picture does not show what was asked."""
    said = " ".join(answer.replace("’", "'").casefold().split())
    return any(words.casefold() in said for words in CANNOT_BE_TOLD.values())


def _together(read: Timings, answered: Timings) -> Timings:
    """Of a reading and of the answer that goes on from it, as of one."""
    return replace(
        answered, image_encode_ms=read.image_encode_ms + answered.image_encode_ms,
        prefill_ms=read.prefill_ms + answered.prefill_ms, prefill_tokens=read.prefill_tokens + answered.prefill_tokens,
        reused_tokens=read.reused_tokens, ttft_ms=read.ttft_ms + answered.ttft_ms,
    )  # fmt: skip


def _user_message(text: str, shown: Sequence[Shown]) -> Message:
    return Message("user", text, tuple(one.image for one in shown))


def _describe(shown: Shown) -> dict[str, object]:
    height, width = shown.image.size
    return {"width": width, "height": height, "seen_sha256": shown.image.sha256, **asdict(shown.origin)}
