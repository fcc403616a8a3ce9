"""What is kept of conversations that wait: they go on as if not left, within a bound of bytes, on every runtime."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import Server, tiny_edge

from ldrt_edge.bench import followups
from ldrt_edge.chat.session import Session
from ldrt_edge.front import Front
from ldrt_edge.image import read_image
from ldrt_edge.kept import Kept
from ldrt_edge.runtimes.base import Sampling, load
from ldrt_edge.runtimes.cached import CachedRuntime

IMAGE_TOKENS = 16


@pytest.fixture(scope="module")
def merged(tiny, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("kept")
    tiny_edge(tiny("llava15", "llama"), folder)
    return Path(folder / "merged")


@pytest.fixture(params=["hf", "llamacpp", "mlx"])
def runtime(request: pytest.FixtureRequest, merged: Path, tmp_path: Path) -> Iterator[CachedRuntime]:
    if request.param == "mlx":
        from test_mlx import write_folder

        from ldrt_edge.runtimes.mlx import MlxRuntime

        (tmp_path / "mlx").mkdir()
        loaded: CachedRuntime = MlxRuntime(write_folder(merged, tmp_path / "mlx"))
    else:
        loaded = load(merged if request.param == "hf" else merged.with_name("gguf"), threads=1)  # type: ignore[assignment]
    yield loaded
    loaded.close()


@pytest.fixture
def films(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)).save(path)
    return paths


def ask_in_turn(runtime: CachedRuntime, front: Front, films: list[Path], rounds: int) -> list[Session]:
    """A conversation about each picture, their questions one by one."""
    sessions = [Session(runtime, front, Sampling(max_tokens=6)) for _ in films]
    for question in ("How many beams?", "Which side?", "How much dose?")[:rounds]:
        for session, film in zip(sessions, films, strict=True):
            if not session.exchanges:
                session.attach(read_image(film))
            list(session.ask(question))
    return sessions


def test_conversations_side_by_side_go_on_as_if_not_left(
    runtime: CachedRuntime, merged: Path, films: list[Path]
) -> None:
    front = Front.load(merged)
    expected = [[e.answer for e in session.exchanges] for session in ask_in_turn(runtime, front, films, 3)]
    runtime.forget()
    runtime.remember(64 << 20)
    sessions = ask_in_turn(runtime, front, films, 3)
    assert [[e.answer for e in session.exchanges] for session in sessions] == expected
    for session in sessions:
        for before, exchange in zip(session.exchanges, session.exchanges[1:], strict=False):
            read = before.timings.reused_tokens + before.timings.prefill_tokens
            assert exchange.timings.reused_tokens >= read > IMAGE_TOKENS
    assert len(list(runtime._left)) == 2, "of each conversation that waits one, however often it was left"
    assert 0 < runtime._left.bytes <= 64 << 20


def test_the_least_recently_asked_go_when_the_bound_is_reached(
    runtime: CachedRuntime, merged: Path, films: list[Path]
) -> None:
    front = Front.load(merged)
    runtime.remember(64 << 20)
    ask_in_turn(runtime, front, films[:2], 1)
    one = runtime._left.bytes
    runtime.forget()
    assert (runtime._left.bytes, runtime._embeddings.bytes) == (0, 0)
    bound = int(1.9 * one)
    runtime.remember(bound)
    sessions = ask_in_turn(runtime, front, films, 1)
    for number, is_there in ((1, True), (0, False), (2, False)):
        assert len(list(runtime._left)) == 1 and runtime._left.bytes <= bound
        list(sessions[number].ask("And now?"))
        assert (sessions[number].exchanges[-1].timings.reused_tokens > IMAGE_TOKENS) is is_there
    runtime.forget()
    runtime.remember(one // 2)
    ask_in_turn(runtime, front, films[:2], 1)
    assert list(runtime._left) == [], "one that is larger than all may be"


def test_a_forgotten_conversation_leaves_nothing_and_the_others_stay(
    runtime: CachedRuntime, merged: Path, films: list[Path]
) -> None:
    runtime.remember(64 << 20)
    sessions = ask_in_turn(runtime, Front.load(merged), films, 2)
    assert len(runtime._prefix.keys) > IMAGE_TOKENS
    for session, left in ((sessions[1], 1), (sessions[2], 1)):
        hashes = {shown.image.sha256 for exchange in session.exchanges for shown in exchange.shown}
        session.reset()
        held = {key[0] for keys in (*runtime._left, runtime._prefix.keys) for key in keys if isinstance(key, tuple)}
        assert len(list(runtime._left)) == left and not hashes & (held | set(runtime._embeddings))
    list(sessions[0].ask("And now?"))
    assert sessions[0].exchanges[-1].timings.reused_tokens > IMAGE_TOKENS


def held_text(runtime: CachedRuntime, front: Front) -> str:
    """All text that some context still holds."""
    return "\n".join(
        front.decode([key for key in keys if isinstance(key, int)]) for keys in (*runtime._left, runtime._prefix.keys)
    )


def held_images(runtime: CachedRuntime) -> set[str]:
    """Hashes of the pictures that some context, or the store of embeddings, still holds."""
    contexts = (*runtime._left, runtime._prefix.keys)
    return {key[0] for keys in contexts for key in keys if isinstance(key, tuple)} | set(runtime._embeddings)


def test_windows_that_were_only_read_ahead_take_no_others_place_and_are_forgotten(
    runtime: CachedRuntime, merged: Path, films: list[Path]
) -> None:
    front = Front.load(merged)
    runtime.remember(64 << 20)
    other, session = Session(runtime, front), Session(runtime, front)
    (kept,) = other.attach(read_image(films[0]), read=True)
    session.read(shown=session.see(read_image(films[1])))
    runtime.remember(int(2.5 * runtime._left.bytes))
    for seed in range(10, 16):
        window = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)
        shown = session.see(replace(read_image(films[1]), rgb=window))
        session.read(shown=shown)
        assert held_images(runtime) == {kept.sha256, shown[0].image.sha256}, "the last one only"
    assert session.waiting == () and len(list(runtime._left)) == 1
    session.reset()
    assert held_images(runtime) == {kept.sha256}
    other.read()
    assert runtime.timings.reused_tokens > IMAGE_TOKENS


def test_what_was_typed_and_not_sent_is_forgotten_with_the_rest(runtime: CachedRuntime, merged: Path) -> None:
    front = Front.load(merged)
    runtime.remember(64 << 20)
    session, other = (Session(runtime, front, Sampling(max_tokens=2)) for _ in range(2))
    typed = "Mister Miller of Hamburg has a very bad knee since the year of the great flood" * 2
    list(session.ask("Hi"))
    for leave in (False, True):
        session.read(typed)
        assert "Miller" in held_text(runtime, front)
        if leave:
            list(other.ask("Elsewhere"))
        list(session.ask("What?"))
        assert "Miller" not in held_text(runtime, front), "it was rewritten before it was sent"
    session.read(typed)
    list(other.ask("And there?"))
    session.reset()
    assert "Miller" not in held_text(runtime, front) and "What?" not in held_text(runtime, front)
    assert "there?" in held_text(runtime, front)


def test_an_answer_that_another_takes_the_place_of_is_forgotten(runtime: CachedRuntime, merged: Path) -> None:
    front = Front.load(merged)
    runtime.remember(64 << 20)
    session = Session(runtime, front, Sampling(max_tokens=80))
    list(session.ask("Who is it?"))
    other = session.fork(0, instead=True)
    other.sampling = Sampling(max_tokens=80, temperature=3.0, seed=1)
    list(other.ask("Who is it?"))
    assert other.exchanges[0].answer != session.exchanges[0].answer
    other.reset()
    assert list(runtime._left) == [] and runtime._prefix.keys == []


def test_values_go_in_the_order_of_their_last_use() -> None:
    kept = Kept[str, bytes](10, len)
    for name, size in (("a", 4), ("b", 4), ("c", 2)):
        kept.put(name, bytes(size))
    assert kept.get("a") == bytes(4) and kept.get("z") is None
    kept.put("d", bytes(3))
    assert list(kept) == ["c", "a", "d"] and kept.bytes == 9
    kept.put("e", bytes(11))
    assert list(kept) == ["c", "a", "d"] and kept.take("e") is None
    kept.put("f", bytes(10))
    assert list(kept) == ["f"] and kept.bytes == 10
    kept.put("f", bytes(1))
    assert kept.bytes == 1


def test_pictures_embeddings_are_kept_within_their_bound(merged: Path, films: list[Path]) -> None:
    runtime, front = load(merged, threads=1), Front.load(merged)
    assert isinstance(runtime, CachedRuntime)
    images = [front.image(read_image(film).rgb) for film in films]
    one = runtime.encode(images[0]).nbytes
    runtime._embeddings.most_bytes = 2 * one
    for image in images:
        runtime.encode(image)
    assert list(runtime._embeddings) == [images[1].sha256, images[2].sha256]
    assert runtime._embeddings.bytes == 2 * one
    runtime.close()


def test_conversations_on_the_server_go_on_at_once_after_a_restart_too(
    merged: Path, tmp_path: Path, films: list[Path]
) -> None:
    edge, folder = merged.with_name("gguf"), tmp_path / "history"

    def opened(*options: str) -> Server:
        prefix = ("env", "LDRT_EDGE_PASSPHRASE=correct horse")
        return Server(edge, "--history", str(folder), "--max-tokens", "6", *options, prefix=prefix)

    def ask(server: Server, talk: str, **more: object) -> int:
        assert server.events(f"{talk}/ask", {"question": "How many?", **more})[-1] == {"done": True}
        return int(server.json("GET", talk)["turns"][-1]["timings"]["reused_tokens"])

    server = opened()
    talks = [f"/api/conversations/{server.json('POST', '/api/conversations', {})['name']}" for _ in films]
    for talk, film in zip(talks, films, strict=True):
        picture = server.json("POST", "/api/pictures", film.read_bytes())["name"]
        ask(server, talk, pictures=[{"name": picture}])
    assert min(ask(server, talk) for talk in talks) > IMAGE_TOKENS
    server.close()

    server = opened("--cache", "0")
    assert ask(server, talks[0]) < IMAGE_TOKENS
    server.json("POST", f"{talks[1]}/read", {})  # as the page does when it opens one
    assert ask(server, talks[1]) > IMAGE_TOKENS
    assert ask(server, talks[0]) < IMAGE_TOKENS, "nothing is kept of what waits"
    server.close()


def test_how_soon_the_next_question_is_answered_is_measured(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert followups.main([str(merged.with_name("gguf")), "--threads", "1", "--repeats", "2"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(told["ttft_ms"]) == ["first", "next", "typed", "after other", "restarted", "reopened"]
    assert all(one["median"] > 0 and one["runs"] == 2 for one in (*told["ttft_ms"].values(), told["reading_ms"]))
