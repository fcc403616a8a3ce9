"""An answer's text as it is written, and its tokens as the bytes that they stand for: joined, they are that text.

A token alone does not decode to its part of a text: a decoder drops the space before the first word, and a character
of several tokens is in none of them; and what a decoder made of some tokens may change with the next ones. So bytes
come from the token's piece in the vocabulary, by either of the two ways in which vocabularies write what is no plain
character: SentencePiece's ▁ and <0xE2>, or GPT-2's letters for bytes.

Source: https://github.com/google/sentencepiece (whitespace, byte fallback), https://github.com/openai/gpt-2,
`encoder.py` (bytes_to_unicode).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from ldrt_edge.runtimes.base import Token

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_PLAIN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = sorted(set(range(0x100)) - set(_PLAIN))
_BYTES = {chr(byte): byte for byte in _PLAIN} | {chr(0x100 + place): byte for place, byte in enumerate(_OTHERS)}


@dataclass(frozen=True)
class Spelled:
    """A token's part of the text; `spelled` may be a part of a character, or nothing."""

    spelled: bytes
    logprob: float


def joined(tokens: Iterable[Spelled]) -> str:
    """What they spell; bytes that are no character as U+FFFD."""
    return b"".join(one.spelled for one in tokens).decode("utf-8", "replace")


class Speller:
    """Spells an answer token by token; spaces around the answer belong to no text, and are left out.

    `ids` and `logprob` are of all tokens that were added; `text`, what was certain of them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ids: list[int] = []
        self.logprob, self.text = 0.0, ""
        self._tokenizer = tokenizer
        self._of_bytes = "ByteLevel" in repr(tokenizer.decoder)
        self._special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._waiting: list[Spelled] = []
        self._begun = False

    def add(self, token: Token) -> tuple[Spelled, ...]:
        """What is certain with the next token: closing spaces wait, as they may be the last, and half characters."""
        self.ids.append(token.id)
        self.logprob += token.logprob
        self._waiting.append(Spelled(self._bytes(token.id), token.logprob))
        text = self._text()
        unfinished = text[-1:].isspace() or "\udc80" <= text[-1:] <= "\udcff"
        return () if unfinished or not text else self._give(len(_encoded(text)))

    def finish(self) -> tuple[Spelled, ...]:
        """What still waited when the last token came."""
        return self._give(len(_encoded(self._text().rstrip())))

    def _text(self) -> str:
        """Of what waits; bytes of half a character are surrogates."""
        return b"".join(one.spelled for one in self._waiting).decode("utf-8", "surrogateescape")

    def _give(self, end: int) -> tuple[Spelled, ...]:
        """What waits, without the bytes behind `end`, and without those before the answer's first word."""
        text, given, at = self._text(), list[Spelled](), 0
        start = 0 if self._begun else len(_encoded(text)) - len(_encoded(text.lstrip()))
        for one in self._waiting:
            given.append(replace(one, spelled=one.spelled[max(start - at, 0) : max(end - at, 0)]))
            at += len(one.spelled)
        self._waiting, self._begun = [], True
        self.text += joined(given)
        return tuple(given)

    def _bytes(self, number: int) -> bytes:
        piece = self._tokenizer.id_to_token(number)
        if piece is None or number in self._special:  # a vocabulary may be padded
            return b""
        if self._of_bytes:
            own = [_BYTES.get(letter) for letter in piece]
            return piece.encode() if None in own else bytes(byte for byte in own if byte is not None)
        fallback = _FALLBACK.fullmatch(piece)
        return bytes([int(fallback[1], 16)]) if fallback else piece.replace("▁", " ").encode()


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
