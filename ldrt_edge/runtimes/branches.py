"""Questions about one picture side by side: parallel sequences of llama.cpp that share the picture's cells.

The prefix that all prompts begin with (template and picture) is in the cache once. Each question is a branch that goes
on from there; one batch carries a token of every branch that runs, and the whole question of one that begins, so that
the weights are read once for all of them. A branch that ends makes room for the next question at once.

Kernels for many rows and for one differ in the last bits, and where two tokens are about equally likely that decides.
So a greedy answer tells whether it came by such a step: the runtime then asks that question again, alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ldrt_edge.runtimes.base import FloatArray, Prompt, Sampling, Token, sample
from ldrt_edge.runtimes.llamacpp_models import BATCH, LanguageModel

GAPS_APART = 1.5
"""Logits by which kernels for many rows and for one may move the two likeliest tokens against each other. Rows are
rounded to 8 bits before each product with quantised weights, and what falls out otherwise in one layer is rounded anew
in the next: 1.45 measured on the starter in Q4_K_M, 0.9 in Q8_0. In F16 it is 0.04: there more is asked again than
needs be.
"""

Ids = Sequence[int]


class Branches:
    """Sequences 1, 2, … of a model, each behind the first `held` positions of sequence 0."""

    def __init__(self, model: LanguageModel, held: int) -> None:
        self._model, self._held = model, held
        self._lengths: dict[int, int] = {}

    def score(self, questions: Sequence[Ids], answers: Sequence[Ids]) -> list[FloatArray]:
        """Logits (len(answer), vocab) that predict each answer behind its question."""
        whole = [(*question, *answer[:-1]) for question, answer in zip(questions, answers, strict=True)]
        found: list[FloatArray] = []
        while len(found) < len(whole):
            first = len(found)
            wave = self._wave([len(ids) for ids in whole[first:]])
            try:
                logits = self._append({n + 1: (whole[first + n], len(answers[first + n])) for n in range(wave)})
            finally:
                self._end(range(1, wave + 1))
            found += [logits[n + 1] for n in range(wave)]
        return found

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Token] | None]:
        """What `generate` gives for each prompt; None for a greedy answer that kernels may have decided."""
        given: list[list[Token]] = [[] for _ in prompts]
        doubted: set[int] = set()
        random = [np.random.default_rng(sampling.seed) for _ in prompts]
        lengths = [len(prompt.ids) - self._held + sampling.max_tokens for prompt in prompts]
        slots = range(1, 1 + self._wave([max(lengths)] * len(lengths)))
        waiting, running = list(range(len(prompts)))[::-1], dict[int, int]()
        steps: dict[int, tuple[Ids, int]] = {}
        try:
            while waiting or running:
                for slot in slots:
                    if slot not in running and waiting:
                        running[slot] = waiting.pop()
                        steps[slot] = (prompts[running[slot]].ids[self._held :], 1)
                logits, steps = self._append(steps), {}
                for slot, row in logits.items():
                    number = running[slot]
                    token = sample(row[-1], sampling, random[number])
                    stopped = token.id in prompts[number].stop_ids
                    if not stopped:
                        given[number].append(token)
                        steps[slot] = ((token.id,), 1)
                    if sampling.temperature == 0 and _is_close(row[-1]):
                        doubted.add(number)
                    if stopped or number in doubted or len(given[number]) == sampling.max_tokens:
                        self._end([slot])
                        del running[slot]
                        steps.pop(slot, None)
        finally:
            self._end(slots)
        return [None if number in doubted else tokens for number, tokens in enumerate(given)]

    def _wave(self, lengths: Sequence[int]) -> int:
        """How many of the next sequences fit beside each other, at least one."""
        room, count = self._model.context_length - self._held, 0
        for length in lengths[: self._model.branches]:
            room -= length
            if room < 0:
                break
            count += 1
        return max(count, 1)

    def _append(self, steps: Mapping[int, tuple[Ids, int]]) -> dict[int, FloatArray]:
        """Put tokens behind each slot's; logits of the last so many of them, by slot."""
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        wanted: list[bool] = []
        for slot, (ids, last) in steps.items():
            if slot not in self._lengths:
                self._model.branch(slot, self._held)
                self._lengths[slot] = self._held
            start = self._lengths[slot]
            self._lengths[slot] += len(ids)
            tokens += ids
            slots += [slot] * len(ids)
            positions += range(start, start + len(ids))
            wanted += [place >= len(ids) - last for place in range(len(ids))]
        columns = [np.array(column, np.int32) for column in (tokens, positions, wanted, slots)]
        starts = range(0, len(tokens), BATCH)
        rows = np.concatenate([self._model.decode(*(column[i : i + BATCH] for column in columns)) for i in starts])
        ends = np.cumsum([last for _, last in steps.values()])
        return {slot: rows[end - last : end] for (slot, (_, last)), end in zip(steps.items(), ends, strict=True)}

    def _end(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._model.branch(slot, 0)
            self._lengths.pop(slot, None)


def _is_close(logits: FloatArray) -> bool:
    """Whether kernels could put another token first."""
    second, first = np.partition(logits, -2)[-2:]
    return bool(first - second < GAPS_APART)
