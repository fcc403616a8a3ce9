"""Under which licence a figure may be used, as an SPDX identifier, from what JATS says in links and in words.

A figure with permissions of its own (reprinted from elsewhere) has its own licence, or none that we know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lxml.etree import _Element

OPEN = ("CC0-1.0", "public-domain", "CC-BY", "CC-BY-SA")
"""What a pair may be under unless the user says otherwise: free to use, change and redistribute, also in a product.
A name without a version stands for all versions."""
UNKNOWN = "unknown"
_URL = re.compile(r"creativecommons\.org/+(?:licen[cs]es|publicdomain)/+([a-z-]+)(?:/(\d\.\d))?", re.I)
_WORDS = (
    (re.compile(r"\bcc[\s-]?0\b|creative commons (?:zero|public domain)", re.I), "CC0-1.0"),
    (re.compile(r"\bCC[ -]BY((?:-(?:NC|ND|SA))*)(?:[ -](\d\.\d))?\b"), "CC-BY"),
    (re.compile(r"creative\s+commons\s+(?:licen[sc]e\s+)?(?:attribution|atribuci[oó]n|atribui[cç][aã]o)", re.I),
     "CC-BY"),
    (re.compile(r"\bpublic domain\b|dom[ií]nio p[uú]blico|domaine public|gemeinfrei", re.I), "public-domain"),
)
_NOT_COMMERCIAL = re.compile(r"non[\s-]?commercial|no[\s-]comercial|n[aã]o[\s-]comercial|nicht[\s-]kommerziell", re.I)
_NO_DERIVATIVES = re.compile(r"no[\s-]?deriv|sin[\s-]deriv|sem[\s-]deriv", re.I)
_SHARE_ALIKE = re.compile(r"share[\s-]?alike|compartirigual|compartilhaigual", re.I)


def licence_of(permissions: _Element | None) -> str:
    """The SPDX identifier of a JATS `permissions` element; "unknown" where it names none that we know."""
    if permissions is None:
        return UNKNOWN
    links = [str(value) for node in permissions.iter() for value in node.attrib.values()]
    words = "".join(map(str, permissions.itertext()))
    return spdx([*links, words])


def spdx(said: Iterable[str]) -> str:
    """The licence that texts and links name, links first."""
    texts = [*said]
    for text in texts:
        if found := _URL.search(text):
            name, version = found[1].lower().strip("-"), found[2]
            if name in ("zero", "mark"):
                return "CC0-1.0" if name == "zero" else "public-domain"
            if name.split("-")[0] == "by":
                return f"CC-{name.upper()}-{version}" if version else f"CC-{name.upper()}"
    for text in texts:
        for pattern, name in _WORDS:
            if found := pattern.search(text):
                if name != "CC-BY":
                    return name
                short = found.lastindex is not None
                parts = (found[1] or "") if short else _parts(text[found.start() :])
                version = found[2] if short else None
                return f"CC-BY{parts}-{version}" if version else f"CC-BY{parts}"
    return UNKNOWN


def is_allowed(licence: str, allowed: Iterable[str]) -> bool:
    """Whether a licence is one of `allowed`, or a version of one."""
    return any(licence == name or re.fullmatch(re.escape(name) + r"-\d\.\d", licence) for name in allowed)


def _parts(text: str) -> str:
    parts = "-NC" if _NOT_COMMERCIAL.search(text) else ""
    if _NO_DERIVATIVES.search(text):
        return parts + "-ND"
    return parts + "-SA" if _SHARE_ALIKE.search(text) else parts
