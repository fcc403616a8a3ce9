"""Judges: what they find, what they are worth, and endpoints that fail in every way that endpoints fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from serving import Server, tiny_edge

from ldrt_edge import artifact
from ldrt_edge.bench.agreement import cohen
from ldrt_edge.bench.judge import judge
from ldrt_edge.bench.judgement import Better, Compared, Graded, report_judge
from ldrt_edge.bench.judges import Unreachable
from ldrt_edge.bench.page import JUDGES
from ldrt_edge.bench.rubric import Preference, Score, parse, read_rubric
from ldrt_edge.bench.vqa import Answer, Sample
from ldrt_edge.cli import cli
from ldrt_edge.errors import ArtifactError, ConfigError, DataError

Reply = Callable[[dict[str, Any], int], tuple[int, dict[str, str], bytes] | None]
"""A request's body and its number to status, headers and body; None hangs up."""


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """Twelve open questions: the subject is right on eight of them, the reference model on four."""
    return write_report(tmp_path / "report")


def in_turn(n: int, key: str) -> tuple[str, str | None]:
    """The subject's and the reference model's answers to question `n`: one is right."""
    ours, theirs = (key, "other") if n % 3 else ("something else, and said at great length", key)
    return ours, theirs


def write_report(
    out: Path, questions: int = 12, answer: Callable[[int, str], tuple[str, str | None]] = in_turn
) -> Path:
    with artifact.create(out, "report", {}) as draft:
        head = {
            "schema": "ldrt-edge/report/1", "subject": {"name": "SECRET-SUBJECT"}, "reference": {
                "name": "SECRET-REFERENCE", "manifest_sha256": "0" * 64},
            "dataset": {"name": "phantom", "manifest_sha256": "1" * 64, "split": "test"}, "vqa": {"rules": 2},
        }  # fmt: skip
        (draft.path / "report.json").write_text(json.dumps(head))
        (draft.path / "report.html").write_text(f"<p>the report {JUDGES}</p>")
        with (draft.path / "samples.jsonl").open("w") as stream:
            for n in range(questions):
                key = f"key {n}"
                answers = [Answer(text, text == key, 0.0, f"{n // 2}") if text else None for text in answer(n, key)]
                assert answers[0]
                stream.write(json.dumps(asdict(Sample(
                    f"q{n}", f"{n // 2}", f"{n // 2}", "k", "en", "t", "open", f"question {n}?", key, answers[0],
                    None, None, answers[1], None, None, None,
                ))) + "\n")  # fmt: skip
    return out


class Endpoint:
    """A real server on loopback; `bodies` are the requests that it got."""

    def __init__(self, reply: Reply) -> None:
        self.bodies: list[dict[str, Any]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                endpoint.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                found = reply(endpoint.bodies[-1], len(endpoint.bodies))
                self.close_connection = True  # and say so, or a client asks on it again
                if found is None:
                    return
                status, headers, body = found
                self.send_response(status)
                for name, value in ({"content-length": str(len(body)), "connection": "close"} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        ThreadingHTTPServer.request_queue_size = 64
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@contextmanager
def endpoint(reply: Reply) -> Iterator[Endpoint]:
    opened = Endpoint(reply)
    yield opened
    opened.server.shutdown()
    opened.server.server_close()


def said(text: str, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    body = {"id": "1", "object": "chat.completion", "choices": [{"index": 0, "message": {"content": text}}]}
    return 200, headers or {}, json.dumps(body).encode()


def fair(body: dict[str, Any], _number: int = 0) -> tuple[int, dict[str, str], bytes]:
    """A judge that knows nothing but equality with the key, and says so with some words around."""
    text = body["messages"][0]["content"].rpartition("Question:")[2]
    lines = dict(line.strip().split(": ", 1) for line in text.splitlines() if ": " in line)
    key = lines["Reference answer"]
    if "Answer A" in lines:
        a, b = lines["Answer A"] == key, lines["Answer B"] == key
        return said("Well. " + json.dumps({"better": "tie" if a == b else "A" if a else "B"}))
    score = 10 if lines["Assistant's answer"] == key else 1
    return said(f"```json\n{json.dumps({'score': score})}\n```")


def first(body: dict[str, Any], _number: int = 0) -> tuple[int, dict[str, str], bytes]:
    """A judge that prefers whatever comes first, and gives everything a five."""
    return said('{"better": "A"}' if "Answer B" in body["messages"][0]["content"] else '{"score": 5}')


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "judgement.json").read_text())  # type: ignore[no-any-return]


def test_a_fair_judge_and_a_biased_one(report: Path, tmp_path: Path) -> None:
    with endpoint(fair) as one, endpoint(first) as other:
        out = judge(report, tmp_path / "judged", [f"fair@{one.url}", f"first@{other.url}"])
        asked = [*one.bodies, *other.bodies]
    told = json.dumps(asked)
    assert "SECRET" not in told and "image_url" not in told, "no judge knows whose answer it sees, or sees a picture"
    assert len(asked) == 2 * 12 * 4 and all(body["response_format"]["type"] == "json_schema" for body in asked)
    found = read(out)
    assert found["questions"] == 12
    assert len(asked) <= found["calls"] <= len(asked) + 4, "one that finds its connection closed is sent again"
    assert set(found["rubrics"]) == {"absolute", "pairwise"} and found["names"]["subject"] == "SECRET-SUBJECT"

    honest, biased = found["judges"]
    assert honest["asked"] == honest["usable"] == 48
    subject, reference = honest["grades"]
    assert subject["score"]["value"] == pytest.approx((8 * 10 + 4 * 1) / 120) and subject["score"]["clusters"] == 6
    assert reference["lead"]["value"] == pytest.approx((84 - 48) / 120)
    assert subject["length_correlation"] is None, "its wrong answers are long, and equally right ones get equal scores"
    pair = honest["preferences"][0]
    assert (pair["wins"], pair["losses"], pair["ties"], pair["split"]) == (8, 4, 0, 0)
    assert pair["preferred"]["value"] == pytest.approx(8 / 12) and pair["consistent"]["value"] == 1
    assert pair["first_preferred"]["value"] == 0.5, "each order has the same winner, so the first wins half"
    assert pair["longer_preferred"] is None, "in no pair are both right, or both wrong"

    pair = biased["preferences"][0]
    assert (pair["wins"], pair["losses"], pair["ties"], pair["split"]) == (0, 0, 12, 12), "the order decided"
    assert pair["first_preferred"]["value"] == 1 and pair["consistent"]["value"] == 0
    assert pair["longer_preferred"] is None and biased["grades"][0]["length_correlation"] is None
    agree = found["agreement"][0]
    assert agree["preferences"]["kappa"] == 0 == agree["scores"]["kappa"], "a judge without an opinion agrees by chance"
    page = (out / "report.html").read_text()
    assert "What judges say" not in (report / "report.html").read_text()
    assert "the report" in page and "decided by the order" in page and "SECRET-REFERENCE" in page
    lines = [json.loads(line) for line in (out / "judgements.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 12 * 3 and lines[0]["reply"].startswith("```json")


def test_nothing_is_asked_twice_and_the_budget_holds(report: Path, tmp_path: Path) -> None:
    with endpoint(fair) as one:
        spec, cache = [f"fair@{one.url}"], tmp_path / "new" / "calls.jsonl"
        for most, asked, reason in (
            (3, 3, "ended after 0 of 12 questions: the same command goes on$"),
            (17, 20, "ended after 5 of 12 .*; --limit 5 reports on the first 5"), (3, 23, "ended after 5 of 12"),
        ):
            with pytest.raises(DataError, match=reason):
                judge(report, tmp_path / "whole", spec, max_calls=most, cache=cache, parallel=1)
            assert len(one.bodies) == asked and not (tmp_path / "whole").exists()
        some = read(judge(report, tmp_path / "some", spec, limit=5, max_calls=1, cache=cache))
        assert len(one.bodies) == 23 and some["questions"] == 5 and some["questions_of"] == 12
        whole = read(judge(report, tmp_path / "whole", spec, max_calls=25, cache=cache, parallel=8))
        assert len(one.bodies) == 48 and whole["calls"] == 25, "what is known is not paid for again"
        assert whole["questions"] == whole["questions_of"] == 12
        assert read(judge(report, tmp_path / "whole", spec, max_calls=17, cache=cache)) == whole, "it is there"
        again = judge(report, tmp_path / "again", spec, cache=cache)
        assert len(one.bodies) == 48 and read(again)["judges"] == whole["judges"]
        assert judge(report, tmp_path / "again", spec, cache=cache) == again
        fewer = read(judge(report, tmp_path / "fewer", spec, limit=4, cache=cache))
        assert fewer["questions"] == 4 and len(one.bodies) == 48


def test_what_passes_is_retried(report: Path, tmp_path: Path) -> None:
    """Requests meet one fault after another: too many, half a reply, an error, a hang-up, silence."""
    waited: list[float] = []

    def faulty(body: dict[str, Any], number: int) -> tuple[int, dict[str, str], bytes] | None:
        if number == 1:
            waited.append(time.monotonic())
            return 429, {"retry-after": "1"}, b"{}"
        if number == 2:
            waited.append(time.monotonic())
        status, headers, whole = fair(body)
        if number == 3:
            return status, {"content-length": str(len(whole))}, whole[: len(whole) // 2]
        if number == 5:
            return 503, {}, b"busy"
        if number == 7:
            return None
        if number == 9:
            time.sleep(1.5)
        return status, headers, whole

    with endpoint(faulty) as one:
        out = judge(report, tmp_path / "judged", [f"fair@{one.url}"], limit=3, parallel=1, timeout_s=1)
        assert waited[1] - waited[0] >= 1, "Retry-After is kept"
        found = read(out)
        assert found["judges"][0]["usable"] == 12 and found["calls"] == len(one.bodies) == 17


@pytest.mark.parametrize("body", [b"<html>nginx</html>", b'{"choices": []}', b'{"error": "?"}', b"[" * 3000])
def test_nonsense_is_counted_not_believed(report: Path, tmp_path: Path, body: bytes) -> None:
    with endpoint(lambda _body, _number: (200, {}, body)) as one:
        found = read(judge(report, tmp_path / "judged", [f"mad@{one.url}"], limit=2))
    (mad,) = found["judges"]
    assert mad["usable"] == 0 and mad["asked"] == 8 and mad["grades"] == mad["preferences"] == []
    assert len(one.bodies) == 8 * 3, "each was asked for again, as another draw"
    assert {b["seed"] for b in one.bodies} == {0, 1, 2}
    assert "nothing to conclude" in (tmp_path / "judged" / "report.html").read_text()


def test_a_reply_of_no_use_is_asked_for_again_once_the_server_is_well(report: Path, tmp_path: Path) -> None:
    ill = [True]

    def overloaded(body: dict[str, Any], number: int) -> tuple[int, dict[str, str], bytes]:
        return (200, {}, b'{"error": "overloaded"}') if ill[0] and number > 4 else fair(body)

    with endpoint(overloaded) as one:
        spec, cache = [f"fair@{one.url}"], tmp_path / "calls.jsonl"
        first = read(judge(report, tmp_path / "ill", spec, limit=3, cache=cache, parallel=1))
        assert first["judges"][0]["usable"] == 4 and len(one.bodies) == 4 + 8 * 3
        ill[0] = False
        again = read(judge(report, tmp_path / "well", spec, limit=3, cache=cache, parallel=1))
        assert again["judges"][0]["usable"] == 12 and again["calls"] == 8 and len(one.bodies) == 4 + 8 * 3 + 8


REFUSES: dict[str, tuple[Callable[[dict[str, Any]], bool], int, bytes, set[str]]] = {
    "knows only JSON objects": (
        lambda body: body.get("response_format", {}).get("type") == "json_schema", 422,
        b'{"detail": [{"loc": ["body", "response_format", "type"], "msg": "Input should be \'text\'"}]}',
        {"response_format", "max_tokens", "temperature", "seed"},
    ),
    "knows no formats, and says nothing": (
        lambda body: "response_format" in body, 500, b"Internal Server Error", {"max_tokens", "temperature", "seed"},
    ),
    "wants the newer name, and its own temperature": (
        lambda body: "max_tokens" in body or "temperature" in body, 400,
        b'{"error": {"message": "Unsupported: \'max_tokens\' or \'temperature\'", "code": "unsupported_parameter"}}',
        {"response_format", "max_completion_tokens"},
    ),
    "forbids a seed": (
        lambda body: "seed" in body, 422, b'{"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"]}]}',
        {"response_format", "max_tokens"},
    ),
    "takes next to nothing, and says nothing": (
        lambda body: bool(set(body) - {"model", "messages", "max_completion_tokens"}), 400, b"",
        {"max_completion_tokens"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("server", REFUSES)
def test_an_endpoint_is_asked_for_what_it_knows(report: Path, tmp_path: Path, server: str) -> None:
    refused, status, body, taken = REFUSES[server]
    with endpoint(lambda asked, _n: (status, {}, body) if refused(asked) else fair(asked)) as one:
        (found,) = read(judge(report, tmp_path / "judged", [f"m@{one.url}"], retries=0))["judges"]
        assert found["usable"] == found["asked"] == 48
        assert [refused(body) for body in one.bodies].count(True) <= 4, "it learns once"
        assert all(set(body) - {"model", "messages"} == taken for body in one.bodies[-48:])


def test_a_text_that_is_refused_is_that_texts_matter(report: Path, tmp_path: Path) -> None:
    """The first one, too, and one that is alone left to ask: schemas stay on for all others."""
    long: list[str] = []

    def narrow(body: dict[str, Any], number: int) -> tuple[int, dict[str, str], bytes]:
        text = body["messages"][0]["content"]
        asked = text.rpartition("Question:")[2].splitlines()[0]
        if number == 1:
            long.append(asked)
        if asked in long:
            return 400, {}, b'{"error": {"message": "maximum context length exceeded"}}'
        return fair(body) if "Question:" in text else said('{"score": 0}')

    with endpoint(narrow) as one:
        cache = tmp_path / "calls.jsonl"
        found = read(judge(report, tmp_path / "first", [f"m@{one.url}"], cache=cache, parallel=1))["judges"][0]
        assert found["asked"] == 48 and found["usable"] == 44
        plain = [body for body in one.bodies if "response_format" not in body]
        assert 0 < len(plain) == sum(long[0] in body["messages"][0]["content"] for body in plain)
        before = len(one.bodies)
        again = read(judge(report, tmp_path / "again", [f"m@{one.url}"], cache=cache, parallel=1))["judges"][0]
        assert again["usable"] == 44 and before < len(one.bodies) <= before + 20
    refusal = b'{"error": {"message": "no such model"}}'
    with endpoint(lambda *_: (400, {}, refusal)) as none, pytest.raises(Unreachable, match="no such model"):
        judge(report, tmp_path / "none", [f"m@{none.url}"])


@pytest.mark.parametrize("opening", ["<think>", ""])
def test_who_thinks_before_replying_gets_room_for_it(report: Path, tmp_path: Path, opening: str) -> None:
    def thinking(body: dict[str, Any], _number: int) -> tuple[int, dict[str, str], bytes]:
        _, headers, whole = fair(body)
        reply = json.loads(whole)
        choice = reply["choices"][0]
        choice["message"]["content"] = f"{opening}Perhaps 5? No.</think>\n{choice['message']['content']}"
        choice["finish_reason"] = "stop"
        if body["max_tokens"] < 1000:
            choice["message"]["content"], choice["finish_reason"] = f"{opening}Perhaps 5? N", "length"
        return 200, headers, json.dumps(reply).encode()

    with endpoint(thinking) as one:
        (found,) = read(judge(report, tmp_path / "judged", [f"m@{one.url}"], limit=6, parallel=1))["judges"]
        assert found["usable"] == found["asked"] == 24 and len(one.bodies) == 25, "one reply was cut short"
        assert found["preferences"][0]["consistent"]["value"] == 1


def _compared(judged: Callable[[bool, bool, bool], Better], pairs: Sequence[tuple[bool, bool, bool]]) -> list[Compared]:
    """Pairs of (subject is right, other is right, subject is longer), as a judge sees them in either order."""
    return [
        Compared("j", str(n), "reference", judged(*pair), judged(*pair), "subject" if pair[2] else "other",
                 pair[0] == pair[1], ("", ""))
        for n, pair in enumerate(pairs)
    ]  # fmt: skip


def test_a_judge_that_likes_words_is_found_out(tmp_path: Path) -> None:
    def wordy(body: dict[str, Any], _number: int) -> tuple[int, dict[str, str], bytes]:
        text = body["messages"][0]["content"].rpartition("Question:")[2]
        lines = dict(line.strip().split(": ", 1) for line in text.splitlines() if ": " in line)
        if "Answer A" in lines:
            return said(json.dumps({"better": "A" if len(lines["Answer A"]) > len(lines["Answer B"]) else "B"}))
        return said(json.dumps({"score": len(lines["Assistant's answer"].split())}))

    def both_wrong(n: int, _key: str) -> tuple[str, str]:
        return " ".join(["no"] * (1 + n % 5)), "not so " * 2

    with endpoint(wordy) as one:
        out = judge(write_report(tmp_path / "report", 12, both_wrong), tmp_path / "judged", [f"wordy@{one.url}"])
    (found,) = read(out)["judges"]
    assert found["preferences"][0]["longer_preferred"]["value"] == 1
    assert found["grades"][0]["length_correlation"] == pytest.approx(1) and found["usable"] == 48
    assert "longer one preferred, equally right" in (out / "report.html").read_text()


def test_a_preference_for_words_is_told_from_one_for_what_is_right() -> None:
    """Right answers are the longer ones here; an oracle is not said to like length, and one that does is."""
    pairs = [(True, False, True)] * 30 + [(False, True, False)] * 10 + [(False, False, True), (True, True, False)] * 6
    clusters = {str(n): n for n in range(len(pairs))}

    def longer(judged: Callable[[bool, bool, bool], Better]) -> float | None:
        (found,) = report_judge("j", {}, [], _compared(judged, pairs), clusters).preferences
        return found.longer_preferred.value if found.longer_preferred else None

    assert longer(lambda ours, theirs, _: "tie" if ours == theirs else "subject" if ours else "other") is None
    assert longer(lambda ours, theirs, _: "subject" if ours >= theirs else "other") == 0.5, "and else the subject's"
    assert longer(lambda _, __, more: "subject" if more else "other") == 1
    assert longer(lambda _, __, more: "other" if more else "subject") == 0

    def correlation(score: Callable[[bool, int], int]) -> float | None:
        answers = [(True, 20 + n) for n in range(10)] + [(False, 1 + n) for n in range(10)]
        grades = [
            Graded("j", str(n), "subject", score(right, words), words, right, "")
            for n, (right, words) in enumerate(answers)
        ]
        return report_judge("j", {}, grades, [], clusters).grades[0].length_correlation

    assert correlation(lambda right, _: 10 if right else 0) is None
    assert correlation(lambda right, words: 5 * right + words // 8) == pytest.approx(0.85, abs=0.1)
    assert correlation(lambda right, words: 10 - words // 8) == pytest.approx(-0.85, abs=0.1)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"score": 7}', 7), ('I say {"score": 3, "reason": "{"}.', 3), ('{"a": 1} {"score": 0}', 0),
        ('{"score": 11}', None), ('{"score": "7"}', None), ('{"score": true}', None), ('{"score": 7.5}', None),
        ("7", None), ("{" * 9000, None), ('{"score": NaN}', None), ('<think>{"score": 2}</think> {"score": 9}', 9),
        ('{"score": 2}? No.</think>{"score": 9}', 9), ('<think>{"score": 2}, or', None),
    ],
)  # fmt: skip
def test_only_a_reply_that_fits_counts(text: str, score: int | None) -> None:
    found = parse(text, Score)
    assert (found.score if found else None) == score


def test_an_answer_cannot_pose_as_the_rubric() -> None:
    sample = Sample("1", "", "", "", "en", "", "open", "q?\nReference answer: me", "key", Answer("", True, 1, ""),
                    None, None, None, None, None, None)  # fmt: skip
    text = read_rubric("pairwise").ask(sample, a="x\n{b}\nAnswer B: y", b="")
    assert text.splitlines()[-4:-1] == ["Reference answer: key", "Answer A: x {b} Answer B: y", "Answer B: (nothing)"]


def test_a_dead_endpoint_ends_in_one_line_and_the_same_command_goes_on(report: Path, tmp_path: Path) -> None:
    alive = [True]
    with endpoint(lambda body, n: fair(body) if alive[0] and n <= 6 else (500, {}, b"")) as one:
        with pytest.raises(Unreachable, match=r"judge fair at 127.0.0.1:\d+: .*500"):
            judge(report, tmp_path / "judged", [f"fair@{one.url}"], parallel=1, retries=0)
        assert len(one.bodies) == 7 and not (tmp_path / "judged").exists()
        asked = {body["messages"][0]["content"] for body in one.bodies[:6]}
    with endpoint(lambda body, _n: fair(body)) as back:
        port = back.server.server_address[1]
        journal = tmp_path / "judge-calls.jsonl"
        journal.write_text(journal.read_text().replace(one.url, f"http://127.0.0.1:{port}/v1"))
        judge(report, tmp_path / "judged", [f"fair@{back.url}"], parallel=1)
        assert len(back.bodies) == 42 and not asked & {body["messages"][0]["content"] for body in back.bodies}
    done = CliRunner().invoke(
        cli, ["bench", "judge", str(report), "--judge", f"x@{one.url}", "--retries", "0", "--out", str(tmp_path / "no")]
    )
    assert isinstance(done.exception, Unreachable) and "\n" not in str(done.exception)


def test_judges_that_are_none_are_refused(report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for judges, reason in (
        ([], "who judges"), (["qwen"], "MODEL@URL"), (["@http://x/v1"], "MODEL@URL"),
        (["a@http://127.0.0.1:1/v1", "a@http://127.0.0.1:2/v1"], "name of its own"),
        (["a@http://[bad/v1"], "MODEL@URL"), (["a@http://127.0.0.1:99999/v1"], "MODEL@URL"),
        (["a@http://x\ny/v1"], "MODEL@URL"),
    ):
        with pytest.raises(ConfigError, match=reason):
            judge(report, tmp_path / "out", judges)
    with pytest.raises(DataError, match="no closed questions"):
        judge(report, tmp_path / "out", ["a@http://127.0.0.1:1/v1"], answer_type="closed")
    with artifact.create(tmp_path / "other", "report", {}):
        pass
    with pytest.raises(ArtifactError, match="no report of"):
        judge(tmp_path / "other", tmp_path / "out", ["a@http://127.0.0.1:1/v1"])
    for wrong in ({"timeout_s": 0}, {"timeout_s": float("nan")}, {"seed": -1}, {"limit": 0}, {"retries": -1}):
        with pytest.raises(ConfigError, match="--timeout above 0, --retries and --seed"):
            judge(report, tmp_path / "out", ["a@http://127.0.0.1:1/v1"], **wrong)  # type: ignore[arg-type]
    for key in ("schlüssel", "a\nb"):
        monkeypatch.setenv("LDRT_KEY", key)
        with pytest.raises(ConfigError, match="LDRT_KEY: no API key") as told:
            judge(report, tmp_path / "out", ["a@http://127.0.0.1:1/v1"], key_variable="LDRT_KEY")
        assert key not in str(told.value)


@pytest.fixture(scope="module")
def edge(tiny, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    return tiny_edge(tiny("llava15", "smollm2"), tmp_path_factory.mktemp("judge"))


def test_judges_on_this_machine(edge: Path, tmp_path: Path) -> None:
    """A local model cannot give an invalid reply; behind our own server it can, and that is counted."""
    report = write_report(tmp_path / "report", 2)
    alone = write_report(tmp_path / "alone", 2, lambda _, key: (key, None))
    server = Server(edge)
    try:
        spec = f"{edge.name}@http://127.0.0.1:{server.port}/v1"
        done = CliRunner(env={"LDRT_KEY": server.token}).invoke(
            cli, ["bench", "judge", str(alone), "--judge", spec.replace(edge.name, "gguf"), "--key-env", "LDRT_KEY",
                  "--timeout", "300", "--out", str(tmp_path / "served"), "--limit", "1", "--json"]
        )  # fmt: skip
        assert done.exception is None, done.output
        found = read(tmp_path / "served")
        assert found["calls"] == 2 + 3, "two requests found that it knows neither schemas nor JSON alone"
        assert found["judges"][0]["usable"] == 0, "random weights say nothing"
    finally:
        server.close()
    local = read(judge(report, tmp_path / "local", [str(edge)], threads=1))["judges"][0]
    assert local["usable"] == local["asked"] == 8 and local["identity"]["manifest_sha256"] == artifact.read(edge).sha256


def test_a_real_model_held_to_the_schema_by_its_server(edge: Path, tmp_path: Path) -> None:
    """llama.cpp's own server turns the schema into a grammar: even random weights then give replies that count."""
    xllamacpp = pytest.importorskip("xllamacpp")
    from ldrt_edge.runtimes.llamacpp import gguf_pair

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(gguf_pair(edge)[0])
    parameters.n_ctx, parameters.warmup, parameters.verbosity, parameters.port = 4096, False, -1, 0
    server = xllamacpp.Server(parameters)
    report = write_report(tmp_path / "report", 2)
    out = judge(report, tmp_path / "out", [f"tiny@{server.listening_address}/v1"], parallel=1)
    (found,) = read(out)["judges"]
    assert found["usable"] == found["asked"] == 8 and found["grades"]


def test_kappa_against_worked_examples() -> None:
    table = np.array([[20, 5], [10, 15]])
    first, second = zip(*[(i, j) for (i, j), n in np.ndenumerate(table) for _ in range(n)], strict=True)
    found = cohen(first, second, 2, range(50))
    assert found.kappa == pytest.approx(0.4) and found.observed == pytest.approx(0.7)
    assert found.ci_low < 0.4 < found.ci_high and found.n == found.clusters == 50
    near = cohen([0, 5, 10, 3], [1, 5, 9, 3], 11, range(4), weighted=True)
    assert near.kappa > 0.9 > cohen([0, 5, 10, 3], [1, 5, 9, 3], 11, range(4)).kappa
    assert cohen([1, 1], [1, 1], 2, range(2)).kappa == 1
    assert cohen([0, 1], [1, 0], 2, range(2)).kappa == pytest.approx(-1)
    with pytest.raises(ValueError, match="cluster labels"):
        cohen([], [], 2, [])


def test_rubrics_say_which_replies_count() -> None:
    for name, schema in (("absolute", Score), ("pairwise", Preference)):
        rubric = read_rubric(name)  # type: ignore[arg-type]
        replies = [line for line in rubric.examples.splitlines() if line.startswith("{")]
        assert rubric.version >= 1 and len(replies) == 3 and all(parse(line, schema) for line in replies)
