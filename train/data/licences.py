"""Under which licence a figure may be used, as an SPDX identifier, from what JATS says in links and in words.

Where several are named, the strictest holds; what is said not to be so is not taken for it. A figure with permissions
of its own (reprinted from elsewhere) has its own licence, or none that we know.

Source: the licences' names in six languages as creativecommons.org/licenses/by-nc-nd/4.0/deed.* has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from lxml.etree import _Element

OPEN = ("CC0-1.0", "public-domain", "CC-BY", "CC-BY-SA")
"""What a pair may be under unless the user says otherwise: free to use, change and redistribute, also in a product.
A name without a version stands for all versions."""
UNKNOWN = "unknown"
_WORDS_LIMIT = 20_000  # a licence in full has no more
_PARTS = ("NC", "ND", "SA")
_URL = re.compile(
    r"creativecommons\.org/+(?:licen[cs]es|publicdomain)/+((?:by|zero|mark)(?:[ -]+(?:nc|nd|sa))*)-*(?![\w-])"
    r"(?:/+(\d\.\d))?", re.I,
)
_TAIL = r"(?i:[\s(/,.+&-]*(?:NC|ND|SA|\d\.\d)\b)*"
_SHORT = re.compile(
    rf"(?:\bCC[ -]*|(?i:\bcreative[ -]commons )(?:[\w.]+ ){{0,2}}?(?:CC[ -]*)?)BY\b{_TAIL}"
    rf"|(?i:\bcc(?:-by\b| by(?=[ -]n[cd]\b))){_TAIL}"
)
"""In small letters only where it cannot be "10 cc by hand"."""
_LONG = re.compile(
    r"creative[ -]commons (?:[\w.]+[ -]+){0,2}?(?:attribution|atribuci[oó]n|reconocimiento|atribui[cç][aã]o"
    r"|namensnennung|attribuzione)", re.I,
)
_ZERO = re.compile(r"\bcc[ -]?0\b|creative[ -]commons (?:zero|public domain)", re.I)
_ZERO_OF_DATA = re.compile(r"public domain.{0,120}?appl(?:y|ies) to the data", re.I)
"""BMC says so in each article, whatever its licence."""
_PUBLIC = re.compile(r"\bpublic domain\b|dom[ií]nio p[uú]blico|domaine public|pubblico dominio|gemeinfrei", re.I)
_MEANING = {
    "NC": re.compile(
        r"\bnon?[ -]?comm?er[cz]ial|n[aã]o[ -]?comercial|nicht[ -]?kommerziell|not for commercial"
        r"|(?:sem|sin|senza) fin\w* com+erci"
        r"|(?:pas d|sans ).{0,2}(?:utilisation|usage) commercial", re.I,
    ),
    "ND": re.compile(
        r"\bnon?[ -]?deriv|(?:sin|sem|sans)[ -]?(?:obras? )?d[eé]riv|keine[ -]?bearbeitung|pas de modification"
        r"|non? opere derivate", re.I,
    ),
    "SA": re.compile(
        r"share[ -]?alike|compartir ?igual|compartilha ?igual|unter gleichen bedingungen|m[eê]mes conditions"
        r"|allo stesso modo", re.I,
    ),
}
_EITHER = re.compile(
    r"commercial(?:ly)?,?(?: or| and|/) non-?commercial|non-?commercial(?:ly)?,?(?: or| and|/) commercial", re.I
)
_NOT = re.compile(
    r"(?:\b(?:not(?! otherwise)|never|nicht|kein\w*|não|no es|n.est pas|non è)\b|n['’]t\b)[^.;:]{0,40}$", re.I
)
_SPACES = re.compile(r"\s+")
_DASHES = re.compile(r" *[_\xad\u2010-\u2015\u2212\ufe58\ufe63\uff0d-] *")
_TAKEN = (
    r"re-?print|reprodu|adapt|modifi|redrawn|nachdruck|(?:nach|ab)gedruckt|wiedergegeben|entnommen|tomad|r[eé]imprim|tir[eé]"
    r"|extra[ií]d|riprod|ristampa|tratt[ao]"
)
_LEAVE = r"(?:permission|genehmigung|erlaubnis|permiso|permiss[aã]o|permesso|autori[sz]a|concessione)"
_GAP = r"(?:(?!pa[ctz]ient)[^;]){0,120}?"  # a patient's leave is of another kind
_OTHERS = re.compile(
    rf"\b(?:{_TAKEN}){_GAP}\b{_LEAVE}(?!\W+(?:\w+\W+){{0,3}}pa[ctz]ient)|\b{_LEAVE}{_GAP}\b(?:{_TAKEN})"
    r"|\breprinted from|©(?! *(?:\d{4},? *)?(?:by )?(?:\w{2,3} )?aut(?:h?or|eur))|\bcopyright (?:\d|by|of)"
    r"|creative[ -]?commons|\bCC[ -]BY", re.I,
)


def licence_of(permissions: _Element | None) -> str:
    """The SPDX identifier of a JATS `permissions` element; "unknown" where it names none that we know."""
    if permissions is None:
        return UNKNOWN
    links = [str(value) for node in permissions.iter() for value in node.attrib.values()]
    words = "".join(map(str, permissions.itertext()))[:_WORDS_LIMIT]
    return spdx([*links, words])


def licence_said(caption: str) -> str | None:
    """The licence of a figure whose caption or attribution says that it is somebody else's, or names a licence.

    None where it says nothing of the kind: the article's holds.
    """
    return spdx([caption]) if _OTHERS.search(_plain(caption)) else None


def spdx(said: Iterable[str]) -> str:
    """The licence that texts and links name, of several the strictest."""
    texts = [_plain(text) for text in said]
    found = [one for text in texts for one in _named(text)]
    if any(_ZERO_OF_DATA.search(text) for text in texts):
        found = [one for one in found if one[0] == "CC-BY"]
    if not found:
        return UNKNOWN
    name, parts, version = max(found, key=_strictness)
    if name != "CC-BY" and any(_MEANING[part].search(text) for part in ("NC", "ND") for text in texts):
        return UNKNOWN
    return "-".join(filter(None, (name, *parts, version)))


_Named = tuple[str, tuple[str, ...], str]
"""name, parts in order, version ("" where none is given)"""


def _strictness(licence: _Named) -> tuple[int, int, bool]:
    """Of equals one with a version goes first."""
    name, parts, version = licence
    weights = {"NC": 4, "ND": 4, "SA": 1}
    return ("CC0", "public-domain", "CC-BY").index(name), sum(weights[part] for part in parts), bool(version)


def _named(text: str) -> Iterator[_Named]:
    """Each licence that a text names and does not deny."""
    for found in _URL.finditer(text):
        kind, version = found[1].lower(), found[2] or ""
        if kind == "zero":
            yield "CC0", (), "1.0"
        else:
            yield ("public-domain", (), "") if kind == "mark" else ("CC-BY", _in_order(kind), version)
    for pattern in (_SHORT, _LONG, _ZERO, _PUBLIC):
        for found in pattern.finditer(text):
            parts: tuple[str, ...] = ()
            version = ""
            if pattern is _SHORT:
                tail = found[0].upper().rpartition("BY")[2]
                parts, version = _in_order(tail), next(iter(re.findall(r"\d\.\d", tail)), "")
            elif pattern is _LONG:
                parts = tuple(part for part in _PARTS if _MEANING[part].search(text, found.end()))
            if not parts and _NOT.search(text[max(0, found.start() - 60) : found.start()]):
                continue
            if pattern in (_SHORT, _LONG):
                yield "CC-BY", parts, version
            else:
                yield ("CC0", (), "1.0") if pattern is _ZERO else ("public-domain", (), "")
            if pattern is _LONG:
                break  # what follows a later one follows this one too


def _in_order(said: str) -> tuple[str, ...]:
    named = re.findall("|".join(_PARTS), said.upper())
    return tuple(part for part in _PARTS if part in named)


def _plain(text: str) -> str:
    """One kind of dash and of space, no escapes of links, and nothing of what holds for any use."""
    return _EITHER.sub("", _DASHES.sub("-", _SPACES.sub(" ", unquote(text))))


def is_allowed(licence: str, allowed: Iterable[str]) -> bool:
    """Whether a licence is one of `allowed`, or a version of one."""
    return any(licence == name or re.fullmatch(re.escape(name) + r"-\d\.\d", licence) for name in allowed)
