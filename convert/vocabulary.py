"""A tokenizer as GGUF tells it: pieces, scores, types, merges and the special tokens.

Two kinds: SentencePiece BPE with byte fallback (Llama, Vicuna, Mistral) and byte-level BPE (SmolLM2, Llama 3). Pieces
come from `tokenizer.json`, which the front end uses; the scores of a SentencePiece vocabulary from `tokenizer.model`,
or without one from the order of the pieces, which in a BPE vocabulary says the same. This product feeds token ids to
llama.cpp; the vocabulary is written so that other programs, which tokenise themselves, read the GGUF rightly too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gguf import GGUFWriter, TokenType

from ldrt_edge.console import say
from ldrt_edge.errors import ArtifactError, require
from ldrt_edge.front import Front
from ldrt_edge.front_config import TOKENIZER, read_json

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNUSED_SCORE = -1000.0
_PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    ("Split", "ByteLevel"): "llama-bpe",
}


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary of as many tokens as the embedding matrix has rows.

    model: GGUF's name of the algorithm; pre: GGUF's name of the pre-tokeniser.
    special: token ids by GGUF's name ("bos", "eos", "eot", "unk", "pad").
    """

    model: Literal["llama", "gpt2"]
    pre: str
    tokens: tuple[bytes, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool

    def write(self, writer: GGUFWriter) -> None:
        """Add the vocabulary to a GGUF's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.scores is not None:
            writer.add_token_scores(list(self.scores))
        if self.merges is not None:
            writer.add_token_merges(list(self.merges))
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.model == "llama":
            writer.add_add_space_prefix(self.add_space_prefix)


def read_vocabulary(folder: Path, front: Front, size: int) -> Vocabulary:
    """The vocabulary of a Hugging Face folder, filled up to `size` tokens.

    Raises:
        ArtifactError: the tokenizer is of another kind, or has more tokens than the model.
    """
    described = read_json(folder / TOKENIZER)
    algorithm = described.get("model") or {}
    if algorithm.get("type") != "BPE":
        raise ArtifactError(f"{folder / TOKENIZER}: a {algorithm.get('type')} tokenizer; supported is BPE")
    by_piece: dict[str, int] = algorithm["vocab"]
    added: dict[int, Any] = {token["id"]: token for token in described.get("added_tokens", [])}
    pieces = {number: piece for piece, number in by_piece.items()} | {i: t["content"] for i, t in added.items()}
    if max(pieces) >= size:
        raise ArtifactError(
            f"{folder}: the tokenizer has token {max(pieces)}, the model embeds only {size}: not of one model"
        )
    byte_level = any(step == "ByteLevel" for step in _steps(described.get("pre_tokenizer")))
    special = _special_ids(front)
    types = [_type(i, pieces, added, special.get("unk"), byte_level) for i in range(size)]
    probe = front.tokenizer.encode("a").ids
    bare = front.tokenizer.encode("a", add_special_tokens=False).tokens
    return Vocabulary(
        model="gpt2" if byte_level else "llama",
        pre=_pre_tokenizer(described.get("pre_tokenizer")) if byte_level else "default",
        tokens=tuple(pieces.get(i, f"[PAD{i}]").encode() for i in range(size)),
        types=tuple(int(kind) for kind in types),
        scores=None if byte_level else _scores(folder, types),
        merges=tuple(m if isinstance(m, str) else " ".join(m) for m in algorithm["merges"]) if byte_level else None,
        special=special,
        add_bos=probe[0] == special.get("bos", -1),
        add_eos=probe[-1] == special.get("eos", -1),
        add_space_prefix=bare[0].startswith("▁"),
    )


def _special_ids(front: Front) -> dict[str, int]:
    """Special tokens by GGUF's names; a stop token besides the end of text is GGUF's end of turn."""
    named = {name: front.config.special_tokens.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    ids = {name: front.tokenizer.token_to_id(token) for name, token in named.items() if token is not None}
    special = {name: token for name, token in ids.items() if token is not None}
    stops = front.config.stop_ids
    special.setdefault("eos", stops[0])
    turns = [token for token in stops if token != special["eos"]]
    return special | ({"eot": turns[0]} if turns else {})


def _type(
    number: int, pieces: dict[int, str], added: dict[int, Any], unknown: int | None, byte_level: bool
) -> TokenType:
    if number not in pieces:
        return TokenType.UNUSED
    if number == unknown and not byte_level:
        return TokenType.UNKNOWN
    if number in added:
        return TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
    if not byte_level and _BYTE.fullmatch(pieces[number]):
        return TokenType.BYTE
    return TokenType.NORMAL


def _scores(folder: Path, types: list[TokenType]) -> tuple[float, ...]:
    """Merge priorities: the earlier a piece was learned, the higher. Special and byte tokens are never merged."""
    model = folder / "tokenizer.model"
    if model.is_file():
        processor = require("sentencepiece", "train").SentencePieceProcessor(model_file=str(model))
        known = min(processor.vocab_size(), len(types))
        scores = [processor.get_score(i) for i in range(known)]
    else:
        first = types.index(TokenType.NORMAL)
        scores = [float(first - i) if kind == TokenType.NORMAL else 0.0 for i, kind in enumerate(types)]
    return (*scores, *[_UNUSED_SCORE] * (len(types) - len(scores)))


def _pre_tokenizer(described: dict[str, Any] | None) -> str:
    steps = _steps(described)
    if steps not in _PRE_TOKENIZERS:
        say(f"note: GGUF has no name for the pre-tokeniser {' + '.join(steps)}; other programs may tokenise otherwise")
    return _PRE_TOKENIZERS.get(steps, "default")


def _steps(described: dict[str, Any] | None) -> tuple[str, ...]:
    if described is None:
        return ()
    if described["type"] == "Sequence":
        return tuple(step["type"] for step in described["pretokenizers"])
    return (described["type"],)
