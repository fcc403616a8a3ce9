"""What OpenAI's API promises about one answer: bytes that join to it, its end, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import Server, tiny_edge

from ldrt_edge.chat.spelling import Spelled, Speller, joined
from ldrt_edge.front import Front
from ldrt_edge.runtimes.base import Token

TEXTS = (
    "How many beams are used? Three beams treat the left knee.",
    "Täglich 0,5 Gy über der Ferse.\n\n  Zwei Felder.",
    "低剂量放射治疗：三个射野。",
    "naïve façade 🙂👍🏽 emoji, ¿verdad?",
    "  spaces around it \n\n",
    "\u3000wide ones\u3000",
)


@pytest.fixture(scope="module")
def edge(tiny, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    return tiny_edge(tiny("llava15", "smollm2"), tmp_path_factory.mktemp("completions"))


@pytest.fixture(scope="module")
def server(edge: Path) -> Iterator[Server]:
    opened = Server(edge)
    yield opened
    assert "Traceback" not in opened.close()


def ask(server: Server, *messages: tuple[str, str], **options: Any) -> tuple[int, Any]:
    body = {"messages": [{"role": role, "content": text} for role, text in messages]} | options
    body["model"] = "gguf"
    status, _, data = server.send("POST", "/v1/chat/completions", body)
    if not options.get("stream"):
        return status, json.loads(data)
    return status, [json.loads(line) for line in data.decode().split("data: ") if line.startswith("{")]


@pytest.mark.parametrize("text", ["llama", "mistral", "smollm2"])
@pytest.mark.parametrize("answer", TEXTS)
def test_tokens_spell_the_text_as_it_comes(tiny, text: str, answer: str) -> None:  # type: ignore[no-untyped-def]
    front = Front.from_hf(tiny("llava15", text))
    ids = front.tokenizer.encode(answer, add_special_tokens=False).ids
    ids[1:1] = [front.config.image_token_id]  # a control token is in no text
    speller, told = Speller(front.tokenizer), list[Spelled]()
    for place, number in enumerate(ids):
        told += speller.add(Token(number, -float(place)))
        assert joined(told) == speller.text
        assert front.decode(ids).strip().startswith(speller.text)
    told += speller.finish()
    assert b"".join(one.spelled for one in told) == speller.text.encode() == answer.strip().encode()
    assert [one.logprob for one in told] == [-float(place) for place in range(len(ids))], "each of them once"


@pytest.mark.parametrize("text", ["llama", "smollm2"])
def test_logprobs_join_to_the_answer(tiny, tmp_path: Path, text: str) -> None:  # type: ignore[no-untyped-def]
    """With each of the ways in which vocabularies write bytes; a random model also writes some that are no text."""
    server, joined = Server(tiny_edge(tiny("llava15", text), tmp_path)), 0
    asked: dict[str, Any] = {"max_tokens": 4, "logprobs": True, "temperature": 1.0}
    for seed in range(16):
        _, reply = ask(server, ("user", "How many?"), seed=seed, **asked)
        (choice,) = reply["choices"]
        content, told = choice["message"]["content"], choice["logprobs"]["content"]
        assert len(told) == reply["usage"]["completion_tokens"]
        spelled = bytes(byte for token in told for byte in token["bytes"])
        if "\ufffd" not in spelled.decode(errors="replace"):
            joined += 1
            assert spelled == content.encode()
        for token in told:
            assert bytes(token["bytes"]).decode(errors="backslashreplace") == token["token"]
        _, chunks = ask(server, ("user", "How many?"), seed=seed, stream=True, **asked)
        streamed = [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["content"]]
        assert [token["bytes"] for token in streamed] == [token["bytes"] for token in told]
        assert [token["logprob"] for token in streamed] == pytest.approx([token["logprob"] for token in told], abs=1e-3)
    assert "Traceback" not in server.close() and joined


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_without_a_question_behind_it_is_refused(server: Server, role: str) -> None:
    before, behind = (role, "Answer in German."), ("user", "How many?")
    status, reply = ask(server, behind, before, max_tokens=2)
    assert status == 400 and "no question behind it" in reply["error"]["message"]
    assert reply["error"]["type"] == "invalid_request_error"
    plain = ask(server, behind, max_tokens=2)[1]["usage"]["prompt_tokens"]
    assert ask(server, before, behind, max_tokens=2)[1]["usage"]["prompt_tokens"] > plain


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_messages_picture_is_refused_not_passed_over(server: Server, role: str) -> None:
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    shown: Any = [{"type": "text", "text": "As here."}, {"type": "image_url", "image_url": {"url": url}}]
    status, reply = ask(server, (role, shown), ("user", "How many?"), max_tokens=2)
    assert status == 400 and "a system message has no pictures" in reply["error"]["message"]


@pytest.mark.parametrize("temperature", [4.6e-164, 5e-324])
def test_the_least_temperature_is_as_none(server: Server, temperature: float) -> None:
    """In float32 it is 0, by which nothing can be divided."""
    replies = [ask(server, ("user", "How many?"), max_tokens=8, temperature=t) for t in (0, temperature)]
    assert [status for status, _ in replies] == [200, 200]
    assert replies[0][1]["choices"] == replies[1][1]["choices"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_the_servers_end_cuts_off_is_an_error(edge: Path, stream: bool) -> None:
    """One is being written by then, and others wait for it."""
    opened, replies, asking = Server(edge), list[tuple[int, Any]](), list[threading.Thread]()

    def ask_for_much() -> None:
        replies.append(ask(opened, ("user", "Go on"), max_tokens=3000, stream=stream))

    while not any(status == 429 for status, _ in replies):  # so many wait that the next is told to come again
        asking.append(threading.Thread(target=ask_for_much))
        asking[-1].start()
        asking[-1].join(0.05)
    opened.process.send_signal(signal.SIGINT)
    ended = len(replies)
    for one in asking:
        one.join(30)
    assert "Traceback" not in opened.close() and len(replies) == len(asking)
    cut_off = [(status, reply) for status, reply in replies[ended:] if status != 429 and "error" in str(reply)]
    assert len(cut_off) >= len(asking) - ended - 1 >= 6, "but one, perhaps, which was whole when the server's end came"
    for status, reply in cut_off:
        error = reply[-1]["error"] if stream else reply["error"]
        assert "before it was whole" in error["message"] and error["type"] == "server_error"
        assert status == (200 if stream else 500)
        if stream:
            assert not any(chunk["choices"][0]["finish_reason"] for chunk in reply[:-1])


def test_no_tokens_at_all_is_refused_and_null_says_nothing(server: Server) -> None:
    for options in ({"max_completion_tokens": 0}, {"max_completion_tokens": 0, "max_tokens": 2}, {"max_tokens": 0}):
        status, reply = ask(server, ("user", "How many?"), **options)
        assert status == 400 and "max_tokens" in reply["error"]["message"]
    for options in ({"max_completion_tokens": None, "max_tokens": 2}, {"max_completion_tokens": 2, "max_tokens": 9}):
        status, reply = ask(server, ("user", "How many?"), **options)
        assert status == 200 and reply["usage"]["completion_tokens"] == 2


def test_more_pictures_than_the_model_holds_are_refused_before_all_are_decoded(server: Server) -> None:
    """Over all messages; the last, which is damaged, is not looked at."""
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    good, damaged = (f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in (stream.getvalue(), b"x"))
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in (*[good] * 200, damaged)]
    said = {"role": "assistant", "content": "Yes."}
    messages = [{"role": "user", "content": parts[:200]}, said, {"role": "user", "content": parts}]
    status, _, data = server.send("POST", "/v1/chat/completions", {"model": "gguf", "messages": messages})
    assert status == 400 and "show fewer" in json.loads(data)["error"]["message"]


def test_a_whole_answer_still_says_how_it_ended(server: Server) -> None:
    status, reply = ask(server, ("user", "How many?"), max_tokens=3)
    assert status == 200 and reply["choices"][0]["finish_reason"] == "length"
    _, chunks = ask(server, ("user", "How many?"), max_tokens=3, stream=True)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
