"""The llama.cpp runtime gives the reference's embeddings, logits and tokens, and takes bad files and Ctrl-C well."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny as builders
from numpy.typing import NDArray

from ldrt_edge.convert.gguf import write_mmproj, write_text
from ldrt_edge.convert.observation import compare
from ldrt_edge.convert.probes import probes, text_probes
from ldrt_edge.errors import DataError, RuntimeLoadError
from ldrt_edge.front import Front, Message
from ldrt_edge.runtimes.base import FloatArray, FrontImage, Prompt, Sampling
from ldrt_edge.runtimes.hf import HfRuntime
from ldrt_edge.runtimes.llamacpp import LlamaCppRuntime
from ldrt_edge.runtimes.llamacpp_bindings import library
from ldrt_edge.runtimes.processor import free_cores, physical_cores

Pair = Callable[[str, str], Path]
EXACT = 2e-2  # of logits of about ±10: pixels are read in half precision


@pytest.fixture(scope="session")
def pair(tiny: builders.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Makes a float32 GGUF pair of a tiny model, once for each."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, text: str) -> Path:
        if (family, text) not in made:
            source, out = tiny(family, text), tmp_path_factory.mktemp("gguf")
            write_text(source, out / "model-F32.gguf", "f32")
            write_mmproj(source, out / "mmproj-F32.gguf", "f32")
            Front.load(source).save(out)
            made[family, text] = out
        return made[family, text]

    return make


@pytest.fixture
def runtime(pair: Pair) -> Iterator[LlamaCppRuntime]:
    loaded = LlamaCppRuntime(pair("llava15", "llama"), exact=True)
    yield loaded
    loaded.close()


@pytest.fixture
def front(pair: Pair) -> Front:
    return Front.load(pair("llava15", "llama"))


def picture(seed: int, height: int = 90, width: int = 70) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ask(front: Front, question: str, *images: FrontImage) -> Prompt:
    return front.prompt([Message("user", question, images)])


def fresh(folder: Path, prompt: Prompt, answer: tuple[int, ...]) -> FloatArray:
    runtime = LlamaCppRuntime(folder, exact=True)
    try:
        return runtime.score(prompt, answer)
    finally:
        runtime.close()


@pytest.mark.parametrize("family", ["llava15", "llavanext"])
def test_embeddings_and_logits_are_the_references(tiny: builders.Tiny, pair: Pair, family: str) -> None:
    reference = HfRuntime(tiny(family, "mistral"))
    subject = LlamaCppRuntime(pair(family, "mistral"), exact=True)

    wanted = probes(reference.front, 3)
    fidelity = compare(reference, subject, wanted)

    assert fidelity.embedding_rel_error < 1e-3
    assert fidelity.mean_kld < 1e-6
    assert subject.class_tokens_moved == sum(len(image.tiles) for prompt, _ in wanted for image in prompt.images)
    assert compare(reference, subject, text_probes(reference.front)).mean_kld < 1e-9
    reference.close()
    subject.close()


def test_the_usual_settings_lose_next_to_nothing(tiny: builders.Tiny, pair: Pair) -> None:
    reference, subject = HfRuntime(tiny("llava15", "smollm2")), LlamaCppRuntime(pair("llava15", "smollm2"))

    fidelity = compare(reference, subject, probes(reference.front, 2))

    assert fidelity.mean_kld < 1e-4
    reference.close()
    subject.close()


@pytest.mark.parametrize("text", ["llama", "smollm2"])
def test_greedy_generation_is_the_references(tiny: builders.Tiny, pair: Pair, text: str) -> None:
    reference, subject = HfRuntime(tiny("llava15", text)), LlamaCppRuntime(pair("llava15", text), exact=True)
    prompt = ask(reference.front, "What is in this image?", reference.front.image(picture(1)))

    expected = [token.id for token in reference.generate(prompt, Sampling(max_tokens=24))]
    found = [token.id for token in subject.generate(prompt, Sampling(max_tokens=24))]

    assert found == expected
    assert subject.timings.ttft_ms > 0
    assert subject.timings.prefill_tokens == len(prompt.ids)
    assert subject.timings.decode_tokens >= len(found) - 1
    reference.close()
    subject.close()


def test_pooled_image_tokens(tiny: builders.Tiny, pair: Pair) -> None:
    reference, subject = HfRuntime(tiny("llava15", "llama")), LlamaCppRuntime(pair("llava15", "llama"), exact=True)
    image = reference.front.with_vision_tokens(4).image(picture(2))

    expected, found = reference.encode(image), subject.encode(image)

    assert found.shape == expected.shape == (4, 64)
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
    reference.close()
    subject.close()


def test_a_second_question_reuses_the_picture(runtime: LlamaCppRuntime, front: Front, pair: Pair) -> None:
    image = front.image(picture(3))
    first, second = ask(front, "How many beams are used?", image), ask(front, "Which side is treated?", image)
    answer = front.answer_ids([Message("user", "Which side is treated?", (image,))], "The left side.")

    runtime.score(first, answer)
    assert runtime.timings.reused_tokens == 0
    found = runtime.score(second, answer)

    assert runtime.timings.reused_tokens > image.token_count
    assert runtime.timings.prefill_tokens == len(second.ids) + len(answer) - 1 - runtime.timings.reused_tokens
    assert runtime.timings.image_encode_ms < 1  # kept by its hash
    assert np.abs(found - fresh(pair("llava15", "llama"), second, answer)).max() < 1e-3


def test_another_picture_is_not_mistaken_for_the_first(runtime: LlamaCppRuntime, front: Front, pair: Pair) -> None:
    first, second = (ask(front, "How many beams are used?", front.image(picture(seed))) for seed in (4, 5))
    answer = (5, 6, 7)

    runtime.score(first, answer)
    found = runtime.score(second, answer)

    assert np.abs(found - fresh(pair("llava15", "llama"), second, answer)).max() < 1e-3


def test_an_abandoned_answer_leaves_nothing_behind(runtime: LlamaCppRuntime, front: Front, pair: Pair) -> None:
    prompt = ask(front, "Describe the picture.", front.image(picture(6)))
    answer = front.answer_ids([Message("user", "Describe the picture.", prompt.images)], "A knee.")
    expected = fresh(pair("llava15", "llama"), prompt, answer)

    tokens = runtime.generate(prompt, Sampling(max_tokens=20, temperature=1.0))
    next(tokens)
    next(tokens)
    tokens.close()

    assert np.abs(runtime.score(prompt, answer) - expected).max() < 1e-3


def test_prompts_longer_than_a_batch(tiny: builders.Tiny, pair: Pair) -> None:
    reference, subject = HfRuntime(tiny("llavanext", "llama")), LlamaCppRuntime(pair("llavanext", "llama"), exact=True)
    images = tuple(reference.front.image(picture(seed, 300, 280)) for seed in (7, 8))
    question = " ".join(["How many beams are used, and which side is treated?"] * 60)
    prompt = ask(reference.front, question, *images)
    answer = tuple(int(i) for i in np.random.default_rng(0).integers(3, 430, 600))
    assert len(prompt.ids) > 600

    expected, found = reference.score(prompt, answer), subject.score(prompt, answer)

    assert found.shape == (600, subject.vocab_size)
    assert np.abs(found - expected).max() < EXACT
    reference.close()
    subject.close()


def test_the_context_is_what_was_asked_for(pair: Pair, front: Front) -> None:
    runtime = LlamaCppRuntime(pair("llava15", "llama"), context_length=64)
    short, long = ask(front, "Why?"), ask(front, "Why is it so? " * 40)

    assert runtime.context_length == 64
    with pytest.raises(DataError, match="the model holds 64"):
        runtime.score(long, (5,))
    room = 64 - len(short.ids)
    never_stops = Prompt(short.ids, (), short.image_token_id, ())
    assert len(list(runtime.generate(never_stops, Sampling(max_tokens=500)))) == room
    runtime.close()


def test_loading_and_running_say_nothing(pair: Pair, front: Front, capfd: pytest.CaptureFixture[str]) -> None:
    runtime = LlamaCppRuntime(pair("llava15", "llama"))
    list(runtime.generate(ask(front, "Why?", front.image(picture(9))), Sampling(max_tokens=3)))
    runtime.close()
    runtime.close()  # closing twice does no harm

    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["model", "mmproj"])
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_file_is_one_line(pair: Pair, tmp_path: Path, kind: str, keep: float) -> None:
    folder = tmp_path / "edge"
    shutil.copytree(pair("llava15", "llama"), folder)
    path = folder / f"{kind}-F32.gguf"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    with pytest.raises(RuntimeLoadError) as caught:
        LlamaCppRuntime(folder)

    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_foreign_or_of_two_models(pair: Pair, tiny: builders.Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "edge"
    shutil.copytree(pair("llava15", "llama"), folder)
    mmproj = folder / "mmproj-F32.gguf"

    mmproj.write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(RuntimeLoadError, match="not a GGUF file"):
        LlamaCppRuntime(folder)
    write_mmproj(tiny("llava15", "llama", hidden=256), mmproj, "f32")
    with pytest.raises(RuntimeLoadError, match="mmproj-F32"):
        LlamaCppRuntime(folder)
    mmproj.unlink()
    with pytest.raises(RuntimeLoadError, match="1 model and 0 mmproj"):
        LlamaCppRuntime(folder)
    shutil.copy(folder / "model-F32.gguf", folder / "model-Q4_K_M.gguf")
    with pytest.raises(RuntimeLoadError, match="2 model and 0 mmproj"):
        LlamaCppRuntime(folder)


def test_tiles_of_another_size_are_refused(runtime: LlamaCppRuntime) -> None:
    tiles = np.zeros((1, 28, 28, 3), np.uint8)
    image = FrontImage(tiles, np.arange(4, dtype=np.int32)[:, None], (28, 28), "other")

    with pytest.raises(RuntimeLoadError, match="belong to different models"):
        runtime.encode(image)


def test_ctrl_c_stops_a_prefill_and_leaves_the_runtime_usable(
    runtime: LlamaCppRuntime, front: Front, pair: Pair
) -> None:
    prompt = ask(front, "Why is it so? " * 120)
    answer = (5, 6, 7)
    expected = fresh(pair("llava15", "llama"), prompt, answer)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))

    timer.start()
    with pytest.raises(KeyboardInterrupt):
        while True:  # prefills, one after the other, each from its start
            runtime._prefix.keys = []
            runtime.score(prompt, answer)

    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert np.abs(runtime.score(prompt, answer) - expected).max() < 1e-3


@pytest.mark.parametrize("text", ["llama", "mistral", "smollm2"])
def test_the_vocabulary_in_the_file_is_the_tokenizers(pair: Pair, text: str) -> None:
    """Other programs tokenise by the GGUF: its pieces, and its flags for BOS and the first space, must be right."""
    folder = pair("llava15", text)
    runtime, front, llama = LlamaCppRuntime(folder), Front.load(folder), library().llama
    vocabulary = llama.llama_model_get_vocab(runtime._text.model)
    for sentence in ("How many beams are used?", "Wie viele Felder, täglich?", "低剂量放射治疗 🙂", "a  b\n3.0 Gy"):
        raw = sentence.encode()
        buffer = (llama.llama_token * 256)()
        count = llama.llama_tokenize(vocabulary, raw, len(raw), buffer, 256, True, True)
        assert list(buffer[:count]) == front.tokenizer.encode(sentence).ids

        pieces = b""
        for token in front.tokenizer.encode(sentence, add_special_tokens=False).ids:
            text_buffer = ctypes.create_string_buffer(64)
            size = llama.llama_token_to_piece(vocabulary, token, text_buffer, 64, 0, False)
            pieces += text_buffer.raw[:size]
        assert pieces.decode().removeprefix(" ") == sentence
    runtime.close()


def test_threads_are_at_most_the_cores_we_may_use() -> None:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 512
    assert 1 <= free_cores() <= physical_cores() <= allowed
