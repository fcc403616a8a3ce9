"""From pairs to a dataset: captions alone, a scripted endpoint, our own server; budget, grounding, splits."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from articles import figure, folder, jats, picture

from ldrt_edge.dataset import Dataset, DatasetWriter, Row, Split, Turn, read_rows
from ldrt_edge.errors import ConfigError, DataError, RuntimeLoadError
from ldrt_edge.train.data import grounding
from ldrt_edge.train.data.curate import curate
from ldrt_edge.train.data.generators import Answers, Budget, Endpoint, Request
from ldrt_edge.train.data.grounding import ungrounded
from ldrt_edge.train.data.instruct import TASKS, instruct, load_prompts
from ldrt_edge.train.data.split import Groups, check_leakage
from ldrt_edge.train.data.summary import summary

CAPTIONS = {
    "en": "Dose distribution of plan {n} over the left heel with the isodose line of 0.5 Gy",
    "de": "Dosisverteilung des Plans {n} an der linken Ferse mit der Isodosenlinie von 0,5 Gy",
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten articles, half of them German; the first two share a picture."""
    root = tmp_path_factory.mktemp("corpus")
    files: dict[str, bytes] = {}
    for n in range(10):
        language = "de" if n % 2 else "en"
        files[f"{n}/a.xml"] = jats(f"10.1/{n}", figure(1, CAPTIONS[language].format(n=n + 100)), language=language)
        files[f"{n}/x-g001.png"] = picture(max(n, 1))
    return curate([folder(root / "in", files)], root / "pairs")


class Scripted:
    """An OpenAI-compatible endpoint on loopback whose answers a test writes; `asked` holds the requests."""

    def __init__(self, answer: Callable[[dict[str, Any], int], tuple[int, Any]]) -> None:
        self.asked: list[dict[str, Any]] = []
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                scripted.asked.append(body)
                status, text = answer(body, len(scripted.asked))
                message = {"message": {"role": "assistant", "content": text}, "index": 0, "finish_reason": "stop"}
                usage = {"total_tokens": 10, "prompt_tokens": 5, "completion_tokens": 5}
                reply = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [message]}
                self._send(status, reply | {"usage": usage} if status == 200 else {"error": {"message": text}})

            def do_GET(self) -> None:
                self._send(
                    200, {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "x"}]}
                )

            def _send(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def scripted() -> Iterator[Callable[[Callable[[dict[str, Any], int], tuple[int, Any]]], Scripted]]:
    made: list[Scripted] = []

    def make(answer: Callable[[dict[str, Any], int], tuple[int, Any]]) -> Scripted:
        made.append(Scripted(answer))
        return made[-1]

    yield make
    for one in made:
        one.server.shutdown()
        one.server.server_close()


def good(body: dict[str, Any], number: int = 0) -> tuple[int, Any]:
    """What a model that keeps to its source would write."""
    user = body["messages"][1]["content"]
    one = {"question": "Which dose does the line show?", "answer": "The isodose line of 0.5 Gy over the left heel."}
    if '"questions"' in user:
        asked = [
            {"question": "Is the left heel shown?", "answer": "yes"},
            {"question": "Is a lung shown?", "answer": "no"},
        ]
        return 200, json.dumps({"questions": asked})
    if '"exchanges"' in user:
        return 200, "```json\n" + json.dumps({"exchanges": [one, one | {"question": "Where does it lie?"}]}) + "\n```"
    return 200, json.dumps(one)


def test_captions_alone_make_a_dataset_that_train_can_read(pairs: Path, tmp_path: Path) -> None:
    data = Dataset(instruct(pairs, tmp_path / "data", test_fraction=0.4))
    rows = data.rows()
    assert {row.language for row in rows} == {"en", "de"} and {row.task for row in rows} == {"caption"}
    assert all(row.answer.startswith(("Dose distribution", "Dosisverteilung")) for row in rows)
    assert {row.question[:5] for row in rows if row.language == "de"} <= {"Besch", "Was z", "Erklä"}
    assert {row.licence for row in rows} == {"CC-BY-4.0"}
    assert all("10.1/" in row.source and "Journal of Tests" in row.source for row in rows)
    groups = {row.group for row in rows if row.split == "test"}
    assert groups and not groups & {row.group for row in rows if row.split == "train"}
    assert {row.language for row in rows if row.split == "test"} == {"en", "de"}
    assert {row.group for row in rows if row.id.startswith(("doi:10.1/0#", "doi:10.1/1#"))} == {"doi:10.1/0"}


def test_an_endpoint_writes_four_tasks_that_keep_to_the_source(pairs: Path, tmp_path: Path, scripted: Any) -> None:
    server = scripted(good)
    data = Dataset(instruct(pairs, tmp_path / "data", Endpoint(server.address, None)))
    rows = data.rows()
    by_task = {task: [row for row in rows if row.task == task] for task in TASKS}
    assert [len(by_task[task]) for task in TASKS] == [10, 10, 10, 20]
    assert all(len(row.turns) == 4 for row in by_task["conversation"])
    closed = {(row.language, row.answer) for row in by_task["closed"]}
    assert closed == {("en", "yes"), ("en", "no"), ("de", "ja"), ("de", "nein")}
    assert {row.answer_type for row in by_task["closed"]} == {"closed"}
    said = server.asked[0]["messages"]
    assert "English" in said[0]["content"] and "Dose distribution of plan 100" in said[1]["content"]
    assert data.manifest.config["prompts_version"] == 1 and data.manifest.config["generator"] == "m"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I cannot do that.", "not the wanted JSON"),
        ('{"question": "What?", "answer": 5}', "not the wanted JSON"),
        ('{"question": "Which dose?", "answer": "A dose of 7 Gy."}', "not grounded"),
        ('{"question": "Which side?", "answer": "The right heel."}', "not grounded"),
        ('{"question": "What?", "answer": "The caption says 0.5 Gy."}', "speaks of a caption or an article"),
    ],
)
def test_what_does_not_hold_is_dropped_with_a_count(
    pairs: Path, tmp_path: Path, scripted: Any, text: str, reason: str
) -> None:
    def answer(body: dict[str, Any], number: int) -> tuple[int, Any]:
        german = "German" in body["messages"][0]["content"]
        return good(body) if german else (200, text)

    server = scripted(answer)
    path = instruct(pairs, tmp_path / "data", Endpoint(server.address, "m"), ["detailed description"])
    data = Dataset(path)
    assert {row.language for row in data.rows()} == {"de"}
    assert data.manifest.metrics[f"dropped: {reason}"] == 5
    assert len(server.asked) == (5 + 15 if reason == "not the wanted JSON" else 10)


def test_another_try_mends_a_bad_answer_and_trouble_of_the_endpoint_is_waited_out(
    pairs: Path, tmp_path: Path, scripted: Any
) -> None:
    def answer(body: dict[str, Any], number: int) -> tuple[int, Any]:
        if number == 1:
            return 503, "overloaded"
        if "response_format" in body:
            return 400, "response_format is not known here"
        return good(body) if body["seed"] == 1 else (200, "not JSON")

    server = scripted(answer)
    path = instruct(pairs, tmp_path / "data", Endpoint(server.address, "m"), ["complex reasoning"], parallel=1)
    assert len(Dataset(path)) == 10
    assert sum("response_format" in body for body in server.asked) == 2


def test_a_spent_budget_stops_and_a_larger_one_goes_on_without_asking_again(
    pairs: Path, tmp_path: Path, scripted: Any
) -> None:
    server = scripted(good)
    endpoint = Endpoint(server.address, "m")
    with pytest.raises(DataError, match="budget of 7 requests is spent"):
        instruct(pairs, tmp_path / "data", endpoint, budget=Budget(requests=7), parallel=1)
    assert len(server.asked) == 7 and not (tmp_path / "data").exists()
    with pytest.raises(DataError, match="budget of 30 tokens is spent"):
        instruct(pairs, tmp_path / "data", endpoint, budget=Budget(tokens=30), parallel=1)
    assert len(server.asked) == 10
    instruct(pairs, tmp_path / "data", endpoint)
    assert len(server.asked) == 40
    whole = instruct(pairs, tmp_path / "whole", endpoint)
    assert (whole / "rows.jsonl").read_bytes() == (tmp_path / "data/rows.jsonl").read_bytes()


def test_a_killed_run_goes_on_with_the_answers_that_it_has(pairs: Path, tmp_path: Path, scripted: Any) -> None:
    process: list[subprocess.Popen[str]] = []

    def answer(body: dict[str, Any], number: int) -> tuple[int, Any]:
        if number == 6:
            process[0].kill()
        return good(body)

    server = scripted(answer)
    command = [
        sys.executable, "-m", "ldrt_edge.cli", "data", "instruct", str(pairs), "--out", str(tmp_path / "data"),
        "--generator", server.address, "--parallel", "1", "--json",
    ]  # fmt: skip
    process.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    process[0].communicate()
    assert process[0].returncode == -9 and len(server.asked) == 6 and not (tmp_path / "data").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["rows"] == 50 and len(server.asked) == 5 + 1 + 35


def test_answers_are_kept_in_a_file_for_other_runs(pairs: Path, tmp_path: Path, scripted: Any) -> None:
    server = scripted(good)
    for name, fraction in (("one", 0.1), ("two", 0.5)):
        endpoint = Endpoint(server.address, "m")
        instruct(pairs, tmp_path / name, endpoint, test_fraction=fraction, cache=tmp_path / "kept")
    assert len(server.asked) == 40
    (tmp_path / "bad").write_bytes(b"no database at all, but some text")
    with pytest.raises(DataError, match="not a file of kept answers"):
        instruct(pairs, tmp_path / "three", Endpoint(server.address, "m"), cache=tmp_path / "bad")


def test_an_endpoint_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from ldrt_edge.train.data import generators

    monkeypatch.setattr(generators, "_RETRIES", 0)
    with pytest.raises(RuntimeLoadError, match="did not answer"):
        Endpoint("http://127.0.0.1:9/v1", None)


def _bare(content: Any, **more: Any) -> bytes:
    """A chat completion without `usage`, but for what is given."""
    message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return json.dumps({"choices": [message], **more}).encode()


Replies = Callable[[dict[str, Any]], tuple[int, bytes]]


@pytest.fixture
def replying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Replies], str]]:
    """The address of an endpoint that sends the bytes which a test gives for a request; retries cost no time."""
    from ldrt_edge.train.data import generators

    monkeypatch.setattr(generators, "_RETRIES", 2)
    monkeypatch.setattr(generators, "_wait_s", lambda attempt: 0.0)
    servers: list[ThreadingHTTPServer] = []

    def serve(reply: Replies) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self._send(*reply(json.loads(self.rfile.read(int(self.headers["content-length"])))))

            def do_GET(self) -> None:
                self._send(*reply({}))

            def _send(self, status: int, data: bytes) -> None:
                self.send_response(status)
                self.send_header("content-type", "text/html" if data[:1] == b"<" else "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/v1"

    yield serve
    for one in servers:
        one.shutdown()
        one.server_close()


@pytest.mark.parametrize(
    "body",
    [
        b"<html>a page</html>", b"", b"null", b"[]", b"5", b'{"choices": [{', b'{"error": "no such model"}',
        b'{"choices": []}', b'{"choices": [{"message": null}]}', b'{"choices": [null]}', b'{"choices": "text"}',
        _bare(5), _bare([{"type": "image"}]), _bare({"text": "x"}), b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_reply_that_is_none_is_asked_for_again_and_then_one_line(
    tmp_path: Path, replying: Any, body: bytes
) -> None:
    sent: list[int] = []

    def reply(asked: dict[str, Any]) -> tuple[int, bytes]:
        sent.append(1)
        return 200, body if len(sent) < mended else _bare("at last")

    mended = 3
    with Answers(tmp_path / "kept", Endpoint(replying(reply), "m")) as answers:
        assert answers.get(Request("s", "u")) == "at last" and len(sent) == 3
    mended = 100
    with Answers(tmp_path / "kept", Endpoint(replying(reply), "m")) as answers:
        with pytest.raises(RuntimeLoadError, match="does not answer as an OpenAI endpoint does") as error:
            answers.get(Request("s", "another"))
        assert len(sent) == 6 and "\n" not in str(error.value)
    with pytest.raises(RuntimeLoadError, match=r"as an OpenAI endpoint|0 models"):
        Endpoint(replying(reply), None)


@pytest.mark.parametrize(
    ("body", "text", "tokens"),
    [
        (_bare("four"), "four", 3),
        (_bare("four", usage=None), "four", 3),
        (_bare("four", usage={"total_tokens": None}), "four", 3),
        (_bare("four", usage={"total_tokens": "12"}), "four", 3),
        (_bare("four", usage={"total_tokens": 12}), "four", 12),
        (_bare([{"type": "text", "text": "fo"}, {"type": "text", "text": "ur"}]), "four", 3),
        (_bare("f\ud83d"), "f?", 3),
    ],
)
def test_what_a_reply_costs_is_estimated_where_it_is_not_told(
    tmp_path: Path, replying: Any, body: bytes, text: str, tokens: int
) -> None:
    endpoint = Endpoint(replying(lambda asked: (200, body)), "m")
    with Answers(tmp_path / "kept", endpoint, Budget(tokens=2 * tokens)) as answers:
        for number in range(2):
            assert answers.get(Request("system", f"u{number}")) == text
        assert answers.budget.spent_tokens == 2 * tokens
        with pytest.raises(DataError, match="tokens is spent"):
            answers.get(Request("system", "more"))


@pytest.mark.parametrize("status", [400, 422])
def test_an_option_or_a_text_that_is_refused_costs_only_itself(tmp_path: Path, replying: Any, status: int) -> None:
    asked: list[dict[str, Any]] = []

    def reply(body: dict[str, Any]) -> tuple[int, bytes]:
        asked.append(body)
        if "response_format" in body or "long" in body["messages"][1]["content"]:
            return status, b'{"error": {"message": "extra fields, or too long"}}'
        return 200, _bare("" if "empty" in body["messages"][1]["content"] else "said")

    with Answers(tmp_path / "kept", Endpoint(replying(reply), "m")) as answers:
        wanted = {"long": "", "short": "said", "next": "said", "empty": ""}
        assert {text: answers.get(Request("s", text)) for text in wanted} == wanted
        assert ["response_format" in body for body in asked] == [True, False, True, False, False, False]
        assert [answers.get(Request("s", text)) for text in ("short", "long", "empty")] == ["said", "", ""]
        assert len(asked) == 8, "what was said is kept, and nothing else"
    with pytest.raises(RuntimeLoadError, match="set --model"):
        Endpoint(replying(lambda _: (status, b"{}")), None)


def test_our_own_server_can_be_the_generator(pairs: Path, tmp_path: Path, tiny: Any, monkeypatch: Any) -> None:
    """A tiny random model writes no JSON: every answer is refused, and that is said."""
    from serving import Server, tiny_edge

    from ldrt_edge.train.data import generators

    monkeypatch.setattr(generators, "MAX_TOKENS", 8)
    edge = tiny_edge(tiny("llava15", "llama"), tmp_path)
    server = Server(edge)
    try:
        monkeypatch.setenv("LDRT_EDGE_API_KEY", server.token)
        endpoint = Endpoint(f"http://127.0.0.1:{server.port}/v1", None)
        with pytest.raises(DataError, match="no rows to write; dropped: not the wanted JSON \\(10\\)"):
            instruct(pairs, tmp_path / "data", endpoint, ["closed"], budget=Budget(requests=30))
    finally:
        server.close()
    local = generators.open_generator(str(edge), None)
    with pytest.raises(DataError, match="not the wanted JSON"):
        instruct(pairs, tmp_path / "data", local, ["closed"])
    local.close()


@pytest.mark.parametrize(
    ("answer", "claims"),
    [
        ("The left heel received 0.5 Gy.", []),
        ("50 cGy to the left heel, six times", []),
        ("0,5 Gy", []),
        ("The heel received 3.0 Gy in 6 fractions.", []),
        ("It received 1.5 Gy.", ["1.5 Gy"]),
        ("0.5 cm", ["5 mm"]),
        ("The right heel", ["right"]),
        ("An MRI of the knee", ["knee", "magnetic resonance"]),
        ("seven beams", ["7"]),
        ("1,250 patients were treated.", []),
        ("1,251 patients", ["1251"]),
        ("Die linke Ferse", []),
        ("足跟", []),
    ],
)
def test_grounding(answer: str, claims: list[str]) -> None:
    source = "Six fractions of 0.5 Gy to the left heel, 3 Gy in all, for 1250 patients."
    assert ungrounded(answer, source) == claims


@pytest.mark.parametrize(
    ("answer", "source"),
    [
        ("5 µm", "5 mm"), ("6 milligray", "6 Gy"), ("6 MBq", "6 Gy"), ("50 percent", "50 Gy"), ("12 hours", "12 mm"),
        ("with 150mAs", "15 fractions"), ("a weight of 40kg", "4 patients"), ("1.5T", "3 T"), ("3 cm2", "3 cm"),
        ("twenty fractions", "6 fractions"), ("of fifteen gray", "5 Gy"), ("eleven patients", "6 patients"),
        ("sixty-four patients", "60 patients, 4 of them"), ("two hundred patients", "2 of 100"), (".5 Gy", "5 Gy"),
        ("six weeks", "six months"), ("a 5-year follow-up", "5 weeks"), ("10 to 20 mm", "10 to 20 Gy"),
        ("5 Gy", "0,5 Gy"), ("6 Gy", "6 fractions of 0.5 Gy"), ("12 mm", "twelve patients"),
        ("the ankle joint", "the heel"), ("foot and stomach", "heel"), ("the neck", "heel"), ("the tibia", "femur"),
        ("pancreas", "liver"), ("the jaw", "sacrum"), ("the oesophagus", "lung"), ("left of it", "heel"),
    ],
)  # fmt: skip
def test_what_the_source_does_not_state_is_not_grounded(answer: str, source: str) -> None:
    assert ungrounded(answer, source, "en")


@pytest.mark.parametrize(
    ("answer", "source"),
    [
        ("a tube voltage of 120kVp", "at 120 kVp"), ("10, 20 and 30 Gy", "doses (10,20,30 Gy)"),
        ("100 and 200 mGy", "100 200 mGy"), ("It was left untreated", "heel"), ("1,234.5 patients", "1234.5"),
        ("1.234,5", "1,234.5"), (".5 Gy", "0.5 Gy"), ("p < 0.05", "p<.05"), ("1 fraction", "one fraction"),
        ("50 cGy", "half a gray, 0.5 Gy"), ("500 milligray", "0.5 Gy"), ("5 centimetres", "50 mm"), ("5 cm²", "5 cm2"),
        ("20 percent", "20%"), ("2 × 3 cm", "2×3cm"), ("10 Gy to 20 Gy", "10–20 Gy"), ("25 fractions", "twenty-five"),
        ("at right angles", "heel"), ("1,250 patients", "1 250 patients"), ("6-MV photons", "6 MV"),
        ("5 years", "a 5-year"), ("6 Gy", "in Gy: 6"), ("6 fractions", "6 × 0.5 Gy"),
    ],
)  # fmt: skip
def test_what_the_source_states_in_another_way_is_grounded(answer: str, source: str) -> None:
    assert ungrounded(answer, source, "en") == []


@pytest.mark.parametrize(
    ("language", "source", "same", "others"),
    [
        ("de", "21 Wochen, 0,5 Gy, Ferse", "einundzwanzig Wochen, 0,5 Gray, Ferse", ("21 Tage", "Knie")),
        ("es", "22 semanas, 50%, talón", "veintidós semanas, 50 por ciento, talón", ("22 días", "rodilla")),
        ("fr", "77 semaines, 50%, talon", "soixante-dix-sept semaines, 50 %", ("douze semaines", "77 ans", "genou")),
        ("it", "28 settimane, 5 mm, tallone", "ventotto settimane, 5 millimetri", ("28 giorni", "ginocchio")),
        ("pt", "25 semanas, 5 Gy, calcanhar", "vinte e cinco semanas, 500 cGy", ("cinco semanas", "25 dias", "joelho")),
        ("nl", "22 weken, 5 mm, hiel", "tweeëntwintig weken, 5 millimeter", ("twee weken", "22 dagen", "knie")),
        ("pl", "25 tygodni, 5 mm, pięta", "dwadzieścia pięć tygodni", ("pięć tygodni", "25 dni", "kolano")),
        ("ru", "25 недель, 0,5 Гр, пятка", "двадцать пять недель, 50 сГр", ("пять недель", "25 дней", "колено")),
        ("cs", "25 týdnů, 5 mm, pata", "pětadvacet týdnů, 5 milimetrů", ("pět týdnů", "25 dní", "koleno")),
        ("zh", "三次，共6戈瑞，足跟，25例", "3次，六戈瑞，二十五例", ("五次照射", "3戈瑞", "膝关节", "CT扫描")),
        ("ja", "三回、0.5グレイ、踵", "3回、50センチグレイ", ("六回", "3グレイ", "膝")),
        ("ko", "세 번, 0.5그레이, 6주, 뒤꿈치", "3번, 0.5 Gy, 여섯 주", ("여섯 번, 열두 번", "6일", "무릎")),
    ],
)  # fmt: skip
def test_grounding_in_the_languages_of_the_prompts(
    language: str, source: str, same: str, others: tuple[str, ...]
) -> None:
    assert ungrounded(same, source, language) == []
    assert [other for other in others if not ungrounded(other, source, language)] == []


def test_number_words_mean_themselves_in_the_answers_language_only() -> None:
    source = "La dosis en el talón"
    assert ungrounded("once patients", source, "en") == [] and ungrounded("ten pacjent", source, "pl") == []
    assert ungrounded("ten patients", source, "en") == ["10"] and ungrounded("dos pacientes", source, "es") == ["2"]


def test_anatomy_and_numbers_speak_the_languages_of_the_prompts() -> None:
    folder = Path(grounding.__file__).parent
    anatomy, numbers = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("anatomy", "numbers"))
    languages = set(load_prompts().languages)
    assert {name: languages ^ set(terms) for name, terms in anatomy.items()} == {name: set() for name in anatomy}
    assert languages - set(numbers["words"]) == {"zh", "ja"}, "which have numerals instead"


def _row(number: int, **changes: Any) -> Row:
    turns = (Turn("user", "What?"), Turn("assistant", "That."))
    row = Row(
        f"r{number}",
        "images/x.png",
        f"sha{number}",
        turns,
        "en" if number % 2 else "de",
        "caption",
        "open",
        "s",
        "CC0-1.0",
        f"g{number}",
    )
    return replace(row, **changes)


def test_split_is_stratified_by_language_and_task_and_keeps_groups_whole() -> None:
    rows = [
        _row(n, group=f"g{n // 2}", task="closed" if n % 8 < 4 else "caption", language="en" if n % 16 < 8 else "de")
        for n in range(160)
    ]
    splits, backwards = (_splits(some) for some in (rows, rows[::-1]))
    check_leakage(replace(row, split=splits[row.group]) for row in rows)
    tests = [row for row in rows if splits[row.group] == "test"]
    assert {(row.language, row.task): 10 for row in tests} == {
        (a, b): 10 for a in ("en", "de") for b in ("closed", "caption")
    }
    assert len(tests) == 40 and backwards == splits


def _splits(rows: Sequence[Row]) -> dict[str, Split]:
    groups = Groups()
    for row in rows:
        groups.see(row)
    return groups.splits(0.25, seed=1)


@pytest.mark.parametrize(
    ("count", "fraction", "tests"),
    [(300, 0.05, 15), (117, 0.05, 6), (9, 0.05, 1), (9, 0.97, 8), (2, 0.5, 1), (1, 0.5, 0), (40, 0, 0), (40, 1, 40)],
)
def test_strata_of_few_groups_give_together_what_the_fraction_asks(count: int, fraction: float, tests: int) -> None:
    """Many languages and many mixes of tasks, since answers are dropped: no stratum has enough for a whole group."""
    languages = ("en", "de", "es", "fr", "it", "pt")
    groups = Groups()
    for n in range(count):
        for bit, task in enumerate(TASKS):
            if (n * 7 // 6 + 1) >> bit & 1 or bit == 0:
                groups.see(_row(n, language=languages[n % 6], task=task))
    splits = groups.splits(fraction, seed=0)
    chosen = [int(name[1:]) for name, split in splits.items() if split == "test"]
    assert len(chosen) == tests
    counts = [sum(n % 6 == at for n in chosen) for at in range(6)]
    assert max(counts) - min(counts) <= 1, "each language gives its share"


def test_a_side_without_rows_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"a.xml": jats("10.1/a", figure(1, CAPTIONS["en"].format(n=1))), "x-g001.png": picture(1)}
    alone = curate([folder(tmp_path / "in", files)], tmp_path / "pairs")
    rows = Dataset(instruct(alone, tmp_path / "data")).rows()
    assert [row.split for row in rows] == ["train"]
    assert "nothing is left to test on" in capsys.readouterr().err


def test_half_a_picture_that_a_full_disk_left_is_written_again(tmp_path: Path) -> None:
    data = picture(1)
    with DatasetWriter(tmp_path) as writer:
        name, _ = writer.add_image(data, ".png")
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        assert writer.add_image(data, ".png")[0] == name
    assert (tmp_path / name).read_bytes() == data


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    def held(number: int) -> int:
        rows = (_row(n, group=f"g{n % 50}", image_sha256=f"sha{n % 50}") for n in range(number))
        with DatasetWriter(tmp_path, f"{number}.jsonl") as writer:
            for row in rows:
                writer.add(replace(row, turns=(row.turns[0], Turn("assistant", f"{row.id} " * 200))))
        tracemalloc.start()
        summary(read_rows(tmp_path / f"{number}.jsonl"))
        check_leakage(read_rows(tmp_path / f"{number}.jsonl"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    few, many = held(1000), held(20_000)
    assert (many - few) / 19_000 < 250  # bytes a row, of which the answer alone has over a thousand


def test_a_leak_is_loud_also_in_train(tmp_path: Path, pairs: Path) -> None:
    check_leakage([_row(1), _row(2, split="test")])
    with pytest.raises(DataError, match="share 1 groups or pictures: picture sha1"):
        check_leakage([_row(1), _row(2, split="test", image_sha256="sha1")])
    with pytest.raises(DataError, match="group g1"):
        check_leakage([_row(1), _row(2, split="test", group="g1")])
    one, two = (
        instruct(pairs, tmp_path / "one", test_fraction=0.5, seed=1),
        instruct(pairs, tmp_path / "two", test_fraction=0.5, seed=2),
    )
    from ldrt_edge.train.lora import _split
    from ldrt_edge.train.recipe import load_recipe

    recipe = load_recipe("starter", ())
    assert _split([Dataset(one)], recipe)[0]
    with pytest.raises(DataError, match="training and test share"):
        _split([Dataset(one), Dataset(two)], recipe)


def test_users_mistakes_are_one_line(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tasks poems"):
        instruct(pairs, tmp_path / "data", tasks=["poems"])
    with pytest.raises(ConfigError, match="--test-fraction 2"):
        instruct(pairs, tmp_path / "data", test_fraction=2)
