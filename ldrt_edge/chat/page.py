"""What the page asks the server for: pictures in and out, conversations, answers as they are written."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, replace

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ldrt_edge import __version__
from ldrt_edge.chat.desk import Conversation, Desk
from ldrt_edge.chat.pictures import Shot, describe, png, refuse_too_many, tiles_png
from ldrt_edge.chat.replies import (
    aside,
    follow,
    json_line,
    json_reply,
    number_of,
    png_reply,
    read_object,
    sampling_of,
    text_of,
    whole_of,
)
from ldrt_edge.chat.session import NOTICE, Exchange, Session, Shown
from ldrt_edge.chat.structured_report import structured_report
from ldrt_edge.errors import DataError, LdrtError, NotNow, NotThere
from ldrt_edge.image import MAX_BYTES
from ldrt_edge.runtimes.base import Timings

Events = Generator[dict[str, object] | None, None, None]
_OTHER_ANSWER_TEMPERATURE = 0.7
_MOST_OVERLAYS = 8
_MOST_NAMES, _LONGEST_NAME = 100_000, 100


def routes(desk: Desk) -> list[Route]:
    """The page's part of the server."""
    page = Page(desk)
    pictures, conversations = "/api/pictures", "/api/conversations"
    one = f"{conversations}/{{name}}"
    return [
        Route("/api/model", page.model),
        Route(pictures, page.add_picture, methods=["POST"], max_body_size=MAX_BYTES),
        Route(f"{pictures}/forget", page.forget_pictures, methods=["POST"]),
        Route(f"{pictures}/{{name}}", page.picture),
        Route(f"{pictures}/{{name}}/seen", page.picture_seen),
        Route(f"{pictures}/{{name}}/text", page.picture_text),
        Route(conversations, page.conversations),
        Route(conversations, page.new_conversation, methods=["POST"]),
        Route(one, page.conversation),
        Route(one, page.delete_conversation, methods=["DELETE"]),
        Route(f"{one}/ask", page.ask, methods=["POST"]),
        Route(f"{one}/read", page.read, methods=["POST"]),
        Route(f"{one}/again", page.again, methods=["POST"]),
        Route(f"{one}/branch", page.branch, methods=["POST"]),
        Route(f"{one}/stop", page.stop, methods=["POST"]),
        Route(f"{one}/report", page.report),
        Route(f"{one}/seen/{{exchange}}/{{image}}", page.seen),
    ]


class Page:
    """What the page asks for."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def model(self, _: Request) -> Response:
        """What answers here."""
        desk = self._desk
        return json_reply({
            **asdict(desk.model), "runtime": desk.runtime.name, "context": desk.runtime.context_length,
            "sampling": asdict(desk.sampling), "version": __version__, "notice": NOTICE,
            "history": desk.history is not None,
        })

    async def add_picture(self, request: Request) -> Response:
        """Take a picture file's bytes."""
        return json_reply(await aside(self._desk.pictures.add, await request.body()))

    async def picture(self, request: Request) -> Response:
        """One frame through a window, whole."""
        shot = _asked_shot(request)

        def draw() -> tuple[bytes, dict[str, object]]:
            picture = self._desk.pictures.view(shot)
            return png(picture.rgb), describe(picture)

        return png_reply(*await aside(draw))

    async def picture_seen(self, request: Request) -> Response:
        """The same as the model would get it."""
        shot = _asked_shot(request)

        def draw() -> tuple[bytes, dict[str, object]]:
            image = self._desk.front.image(self._desk.pictures.view(shot).rgb)
            seen = {"seen_sha256": image.sha256, "tokens": image.token_count, "tiles": len(image.tiles)}
            return tiles_png(image), seen

        return png_reply(*await aside(draw))

    async def picture_text(self, request: Request) -> Response:
        """Whether text is burned into a frame, so that its own window, its full range or the one asked for shows it."""
        shot = _asked_shot(request)
        return json_reply(await aside(self._desk.pictures.text, shot.name, shot.frame, shot.window))

    async def forget_pictures(self, request: Request) -> Response:
        """Forget some, those that are still there; conversations keep what the model saw of them."""
        self._desk.pictures.forget(_names(await read_object(request)))
        return json_reply({})

    async def conversations(self, _: Request) -> Response:
        """Names and first questions, the newest first."""
        listed = [
            {"name": conversation.name, "title": exchanges[0].question[:200]}
            for conversation in reversed(self._desk.opened())
            if (exchanges := list(conversation.session.exchanges))
        ]
        return json_reply(listed)

    async def new_conversation(self, _: Request) -> Response:
        """Open one."""
        return json_reply({"name": self._desk.open()})

    async def conversation(self, request: Request) -> Response:
        """Its transcript, and how many pictures wait for the next question."""
        session = self._conversation(request).session
        return json_reply({**session.transcript(), "waiting": len(session.waiting)})

    async def report(self, request: Request) -> Response:
        """The same as a DICOM Structured Report."""
        session = self._conversation(request).session
        if not session.exchanges:
            raise NotNow("nothing was asked yet: there is nothing to report")
        return Response(await aside(structured_report, session), media_type="application/dicom")

    async def delete_conversation(self, request: Request) -> Response:
        """Forget one."""
        await aside(self._desk.forget, self._conversation(request))
        return json_reply({})

    async def ask(self, request: Request) -> Response:
        """Ask a question about pictures; the answer as it is written, one JSON object a line.

        Those that wait in the conversation are shown first.
        """
        body = await read_object(request)
        question, shots = text_of(body.get("question"), "question"), _shots(body)
        sampling = sampling_of(body, self._desk.sampling)
        conversation = self._free(request)
        session = conversation.session

        def work() -> Events:
            session.sampling = sampling
            shown: tuple[Shown, ...] = ()
            spent: Timings | None = None
            if shots:
                yield {"stage": "encoding"}
                began = time.perf_counter()
                shown = yield from self._look(session, shots)
                spent = replace(session.read(shown=shown), ttft_ms=(time.perf_counter() - began) * 1e3)
            yield {"stage": "reading"}
            yield from self._answer(session, question, shown, spent)

        return self._stream(conversation, work, shots)

    async def read(self, request: Request) -> Response:
        """Let the model read before a question comes: what was said so far, pictures, and what is typed of it."""
        body = await read_object(request)
        shots = _shots(body)
        typed = text_of(body["question"], "question") if body.get("question") is not None else ""
        conversation = self._free(request)
        session = conversation.session

        def read() -> Generator[None, None, None]:
            shown = yield from self._look(session, shots)
            session.read(typed, shown)

        self._desk.read_ahead(conversation, read, shots)
        return json_reply({})

    async def again(self, request: Request) -> Response:
        """Answer the last question anew, in place of its answer: drawn, since the likeliest answer stays the same."""
        body = await read_object(request)
        sampling = sampling_of(body, self._desk.sampling)
        conversation = self._free(request)
        kept = conversation.session
        if not kept.exchanges:
            raise NotNow("nothing was asked")
        last = kept.exchanges[-1]
        temperature = sampling.temperature or _OTHER_ANSWER_TEMPERATURE

        def work() -> Events:
            session = kept.fork(len(kept.exchanges) - 1, instead=True)  # here: what is read until now goes along
            session.sampling = replace(sampling, temperature=temperature, seed=last.sampling.seed + 1)
            yield {"stage": "reading"}
            try:
                yield from self._answer(session, last.question)
            finally:
                if len(session.exchanges) == len(kept.exchanges):
                    conversation.session = session

        return self._stream(conversation, work)

    async def branch(self, request: Request) -> Response:
        """Another conversation up to an exchange, whose pictures wait there; this one stays."""
        body = await read_object(request)
        session = self._conversation(request).session
        exchange = whole_of(body.get("exchange"), "exchange")
        if not 0 <= exchange < len(session.exchanges):
            raise NotNow(f"exchange: there are {len(session.exchanges)}, counted from 0")
        return json_reply({"name": self._desk.open(session.fork(exchange))})

    async def stop(self, request: Request) -> Response:
        """Stop the answer that is being written; what is written stays."""
        turn = self._conversation(request).turn
        if turn:
            turn.stop()
        return json_reply({})

    async def seen(self, request: Request) -> Response:
        """What the model saw with an exchange."""
        session = self._conversation(request).session
        try:
            exchange, place = (int(request.path_params[name]) for name in ("exchange", "image"))
            if min(exchange, place) < 0:
                raise ValueError
            image = session.exchanges[exchange].shown[place].image
        except ValueError:
            raise DataError("exchange and image are numbers that count from 0") from None
        except IndexError:
            raise NotThere("there is no such picture in the conversation") from None
        return png_reply(await aside(lambda: tiles_png(image)), {"seen_sha256": image.sha256})

    def _look(self, session: Session, shots: Sequence[Shot]) -> Generator[None, None, tuple[Shown, ...]]:
        """Pictures as the model gets them; it may be stopped after each."""
        shown: tuple[Shown, ...] = ()
        for shot in shots:
            shown += session.see(self._desk.pictures.view(shot))
            refuse_too_many([one.image for one in shown], session.runtime.context_length)
            yield
        return shown

    def _answer(
        self, session: Session, question: str, shown: Sequence[Shown] = (), spent: Timings | None = None
    ) -> Events:
        before = len(session.exchanges)
        about = [*(one for exchange in session.exchanges for one in exchange.shown), *session.waiting, *shown]
        said = ""
        try:
            with closing(session.ask(question, shown, spent)) as pieces:
                for piece in pieces:
                    said += piece
                    yield {"text": piece}
        finally:
            answer = "".join(exchange.answer for exchange in session.exchanges[before:]) or said
            if answer:  # even one that cannot be kept was seen
                self._desk.record([one.image.sha256 for one in about], question, answer)

    def _stream(self, conversation: Conversation, work: Callable[[], Events], shots: Sequence[Shot] = ()) -> Response:
        def last() -> Exchange | None:
            return next(reversed(conversation.session.exchanges), None)

        before = last()

        def kept_work() -> Events:
            if not self._desk.is_open(conversation):  # it was forgotten before its turn came
                return
            try:
                yield from work()
            finally:
                self._desk.keep(conversation)

        turn = conversation.turn = self._desk.take(conversation.name, kept_work, shots)

        async def lines() -> AsyncIterator[str]:
            try:
                async for event in turn.events():
                    yield json_line(event)
                yield json_line({"done": last() not in (before, None)})
            except LdrtError as error:
                yield json_line({"error": str(error)})

        return follow(turn, lines(), "application/x-ndjson")

    def _conversation(self, request: Request) -> Conversation:
        found = self._desk.conversations.get(request.path_params["name"])
        if found is None:
            raise NotThere("the conversation is not there any more")
        return found

    def _free(self, request: Request) -> Conversation:
        found = self._conversation(request)
        if found.writing:
            raise NotNow("an answer is still being written: stop it first")
        return found


def _names(body: dict[str, object]) -> list[str]:
    listed = body.get("names")
    if not isinstance(listed, list) or len(listed) > _MOST_NAMES:
        raise DataError(f"names: wants a list of at most {_MOST_NAMES} names")
    names = [text_of(name, "names") for name in listed]
    if any(len(name) > _LONGEST_NAME for name in names):
        raise DataError(f"names: a name has at most {_LONGEST_NAME} characters")
    return names


def _shots(body: dict[str, object]) -> list[Shot]:
    listed = body.get("pictures")
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise DataError("pictures: wants a list of {name, frame, window, over, black_out}")
    return [_shot(one) for one in listed]


def _shot(told: dict[str, object]) -> Shot:
    window, over, black_out = told.get("window"), told.get("over", []), told.get("black_out", False)
    if window is not None and not (isinstance(window, list) and len(window) == 2):
        raise DataError("window: wants [center, width]")
    if not isinstance(over, list) or not isinstance(black_out, bool):
        raise DataError("over wants a list of names, black_out true or false")
    if len(over) > _MOST_OVERLAYS:
        raise DataError(f"over: at most {_MOST_OVERLAYS} files lie over a picture")
    laid = tuple(dict.fromkeys(text_of(one, "over") for one in over))
    level = (number_of(window[0], "window"), number_of(window[1], "window")) if window else None
    frame = whole_of(told.get("frame", 0), "frame")
    if frame < 0 or (level and level[1] <= 0):
        raise DataError("frame counts from 0, and a window has a width above 0")
    return Shot(text_of(told.get("name"), "name"), level, frame, laid, black_out)


def _asked_shot(request: Request) -> Shot:
    """Out of the address: /NAME?frame=0&window=40,400&over=NAME&over=NAME&black_out=1."""
    query = request.query_params
    told: dict[str, object] = {"name": request.path_params["name"], "over": query.getlist("over")}
    try:
        told["frame"] = int(query.get("frame", "0"))
        if "window" in query:
            told["window"] = [float(side) for side in query["window"].split(",")]
        told["black_out"] = {"0": False, "1": True}[query.get("black_out", "0")]
    except (ValueError, KeyError):
        raise DataError("frame wants a number, window CENTER,WIDTH, black_out 0 or 1") from None
    return _shot(told)
