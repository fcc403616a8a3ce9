"""How far stock runtimes are off on the same files: llama-cpp-python's chat, xllamacpp's server, mlx-vlm.

Each prepares pictures, renders and tokenises its own way, as its users get it. Where a runtime shows its logits, those
behind the prompt are taken with the answer forced; where it does not, only greedy answers can be compared.
"""

from __future__ import annotations

import base64
import importlib.util
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldrt_edge.convert.exports import Export
from ldrt_edge.convert.observation import ANSWER_TOKENS
from ldrt_edge.convert.probes import Probe
from ldrt_edge.errors import require
from ldrt_edge.front_config import read_json
from ldrt_edge.runtimes.base import FloatArray
from ldrt_edge.runtimes.llamacpp import gguf_pair
from ldrt_edge.runtimes.llamacpp_bindings import library
from ldrt_edge.runtimes.processor import has_amx

_CONTEXT = 4096

Ids = tuple[int, ...]
Asked = tuple[tuple[str, str], NDArray[np.uint8]]
"""A question with its expected answer, and the picture (height, width, 3)."""
Observed = tuple[list[FloatArray] | None, list[Ids]]
"""Logits of the forced answers, (tokens, vocab) each, where there are any; and greedy answers."""


@dataclass(frozen=True)
class Peer:
    """A stock runtime. answers: makes `Observed` of an export, asked, probes and the reference's greedy answers."""

    name: str
    answers: Callable[[Export, Sequence[Asked], Sequence[Probe], Sequence[Ids]], Observed]

    def observe(
        self, export: Export, asked: Sequence[Asked], wanted: Sequence[Probe], greedy: Sequence[Ids]
    ) -> Observed:
        """What it makes of an export, in a process of its own: one that crashes must not take ours along.

        Raises:
            RuntimeError: it crashed. Whatever else it raises passes as it is.
        """
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
            try:
                return apart.submit(self.answers, export, asked, wanted, greedy).result()
            except BrokenProcessPool:
                known = ", as llama.cpp does of quantised weights on AMX (upstream #20824)"
                why = known if export.runtime == "llamacpp" and has_amx() else ""
                raise RuntimeError(f"it crashed{why}") from None


def peers_of(export: Export) -> list[Peer]:
    """The stock runtimes that are installed and read this kind of export."""
    known = {
        "llamacpp": (("llama_cpp", "llama-cpp-python", _llama_cpp_python), ("xllamacpp", "xllamacpp", _xllamacpp)),
        "mlx": (("mlx_vlm", "mlx-vlm", _mlx_vlm),),
    }
    found = known.get(export.runtime, ())
    return [Peer(name, observe) for module, name, observe in found if importlib.util.find_spec(module)]


def _llama_cpp_python(
    export: Export, asked: Sequence[Asked], wanted: Sequence[Probe], greedy: Sequence[Ids]
) -> Observed:
    """`Llama` with the multimodal chat handler, with its own defaults."""
    llama_cpp, formats = require("llama_cpp", ""), require("llama_cpp.llama_chat_format", "")
    library()  # catches the log
    model, mmproj = gguf_pair(export.folder)
    handler = formats.MTMDChatHandler(str(mmproj), verbose=False, use_gpu=False)
    llama = llama_cpp.Llama(str(model), chat_handler=handler, n_ctx=_CONTEXT, verbose=False)

    def logits() -> FloatArray:
        pointer = llama_cpp.llama_get_logits_ith(llama._ctx.ctx, -1)
        return np.ctypeslib.as_array(pointer, (llama.n_vocab(),)).copy()

    scored, answers = [], []
    try:
        for ((question, _), picture), (prompt, answer) in zip(asked, wanted, strict=True):
            messages = _messages(question, picture)
            llama.create_chat_completion(messages, max_tokens=1, temperature=0.0, repeat_penalty=1.0)
            held = llama.n_tokens
            rows = [logits()]
            for token in answer[:-1]:
                llama.eval([token])
                rows.append(logits())
            scored.append(np.stack(rows))
            answers.append(_greedy(llama, held, int(rows[0].argmax()), prompt.stop_ids, logits))
    finally:
        llama.close()
    return scored, answers


def _greedy(
    llama: Any, held: int, token: int, stop: Sequence[int], logits: Callable[[], FloatArray]
) -> tuple[int, ...]:
    llama._ctx.kv_cache_seq_rm(-1, held, -1)
    llama.n_tokens = held
    given: list[int] = []
    while token not in stop and len(given) < ANSWER_TOKENS:
        given.append(token)
        llama.eval([token])
        token = int(logits().argmax())
    return tuple(given)


def _xllamacpp(export: Export, asked: Sequence[Asked], wanted: Sequence[Probe], greedy: Sequence[Ids]) -> Observed:
    """xllamacpp's server, whose answers come as text."""
    xllamacpp = require("xllamacpp", "peers")
    model, mmproj = gguf_pair(export.folder)
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.mmproj.path = str(model), str(mmproj)
    parameters.n_ctx, parameters.warmup, parameters.mmproj_use_gpu = _CONTEXT, False, False
    parameters.verbosity = -1
    server = xllamacpp.Server(parameters)
    front = export.front
    answers = []
    for ((question, _), picture), _probe in zip(asked, wanted, strict=True):
        request = {"messages": _messages(question, picture), "max_tokens": ANSWER_TOKENS, "temperature": 0.0}
        reply = server.handle_chat_completions(request)
        text = reply["choices"][0]["message"]["content"]
        answers.append(tuple(front.tokenizer.encode(text, add_special_tokens=False).ids))
    return None, answers


def _mlx_vlm(export: Export, asked: Sequence[Asked], wanted: Sequence[Probe], greedy: Sequence[Ids]) -> Observed:
    """mlx-vlm's network with the right prompt and tiles: its processor does not run on this transformers."""
    mx, utils = require("mlx.core", "mlx"), require("mlx_vlm.utils", "peers")
    model, front = utils.load_model(export.folder), export.front
    tiled = read_json(export.folder / "config.json")["model_type"] == "llava_next"
    mean, std = (np.asarray(v, np.float32) for v in (front.config.image_mean, front.config.image_std))

    def run(ids: Sequence[int], tiles: NDArray[np.uint8]) -> FloatArray:
        pixels = mx.array(((tiles.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))
        output = model(mx.array([list(ids)]), pixel_values=pixels[None] if tiled else pixels, mask=None)
        return np.array(getattr(output, "logits", output)[0].astype(mx.float32))

    scored, answers = [], []
    for (prompt, answer), expected in zip(wanted, greedy, strict=True):
        tiles = prompt.images[0].tiles
        rows = run((*prompt.ids, *answer[:-1]), tiles)
        if len(rows) != len(prompt.ids) + len(answer) - 1:
            raise ValueError(f"{len(rows)} positions for {len(prompt.ids) + len(answer) - 1} tokens")
        scored.append(rows[-len(answer) :])
        # one pass tells whether its greedy answer is the reference's; going on token by token would take minutes
        rows = run((*prompt.ids, *expected), prompt.images[0].tiles)[len(prompt.ids) - 1 :]
        answers.append(tuple(int(token) for token in rows.argmax(axis=-1)[: len(expected)]))
    return scored, answers


def _messages(question: str, picture: NDArray[np.uint8]) -> list[dict[str, Any]]:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]
