"""JATS articles to figures with their captions, mentions and origin.

JATS is what PubMed Central, Europe PMC and SciELO keep articles in. Captions in several languages come as translated
sub-articles, as figures of one group, or as several captions of one figure; each becomes a figure of its own that
shares the picture. Nothing is fetched, no entity is expanded, and a document that declares entities is refused.

Source: JATS 1.3 tag library (https://jats.nlm.nih.gov/archiving/tag-library/1.3/); SciELO PS 1.9 for translations.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from lxml import etree

from ldrt_edge.errors import DataError
from ldrt_edge.train.data.licences import UNKNOWN, licence_of, licence_said

_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
_HREF = "{http://www.w3.org/1999/xlink}href"
_TITLE_LIMIT, _CAPTION_LIMIT, _MENTIONS_LIMIT, _ABSTRACT_LIMIT = 1_000, 8_000, 4_000, 8_000
_FIGURES_LIMIT = 500
_NAME_LIMIT = 300
"""Of ids, DOIs and keywords, in characters: a row of all that an article says stays far below what is read of one."""
_MARK = "\x01"
_SENTENCE_END = re.compile(
    r"(?<=[.!?。！？])(?<!\bFigs\.)(?<!\b[Ff]ig\.)(?<!\bal\.)(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\b[A-Z]\.)\s+"
    r"(?=[\[(¿¡]*[^\Wa-z_]|\x01)"
)
_MARKED = rf"{_MARK}([^{_MARK}\s]*){_MARK}"
_RANGE = re.compile(rf"{_MARKED}[^{_MARK}]*\d[a-z]?\s*[-\u2010-\u2015]\s*(?={_MARKED})")
_APART = {"p", "title", "label", "list-item", "break", "sec", "td", "th", "tr", "disp-formula", "caption"}
_LEFT_OUT = {"graphic", "inline-graphic", "media", "table", "object-id", "fn", "tex-math", "permissions", "alt-text"}
_HOLDERS = ("fig", "fig-group", "table-wrap", "disp-formula", "inline-formula")
_DATE_ORDER = ("epub", "pub", "ppub", "epub-ppub", "collection")


@dataclass(frozen=True)
class Figure:
    """A caption in one language and the pictures it belongs to.

    pictures: for each picture the names that the XML gives, best first. mentions: sentences of the text that refer to
    the figure. language: BCP 47 as declared ("" where it is not). licence: its own, None where it has the article's.
    """

    id: str
    label: str
    caption: str
    language: str
    pictures: tuple[tuple[str, ...], ...]
    mentions: tuple[str, ...]
    licence: str | None


@dataclass(frozen=True)
class Article:
    """An article's origin and figures. `aside` counts pictures that are no figures: equations, tables."""

    id: str
    doi: str
    title: str
    titles: Mapping[str, str]
    abstract: str
    journal: str
    date: str
    licence: str
    keywords: tuple[str, ...]
    language: str
    figures: tuple[Figure, ...]
    aside: Mapping[str, int]


def read_articles(data: bytes) -> list[Article]:
    """The articles of one XML document: one, or all of a set.

    Raises:
        DataError: not well-formed, too deep, declares entities, or holds no article.
    """
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, dtd_validation=False, huge_tree=False,
        remove_comments=True, remove_pis=True,
    )  # not collect_ids=False: lxml 6.1 then asks for the DTD that a DOCTYPE names, and refuses the article
    try:
        root = etree.fromstring(data, parser)
    except (etree.XMLSyntaxError, ValueError, LookupError) as error:
        raise DataError(f"not well-formed XML ({_one_line(str(error))})") from None
    subset: Any = root.getroottree().docinfo.internalDTD
    if subset is not None and next(iter(subset.iterentities()), None) is not None:
        raise DataError("declares entities of its own, refused")
    if "}" in str(root.tag) or root.tag not in ("article", "articles", "pmc-articleset"):
        _drop_namespaces(root)
    articles = [root] if root.tag == "article" else [*root.iterchildren("article")] or [*root.iter("article")]
    if not articles:
        raise DataError(f"not a JATS article (its root is {_one_line(str(root.tag))[:60]})")
    return [_article(article, data) for article in articles]


def _article(root: etree._Element, data: bytes) -> Article:
    meta = root.find("front/article-meta")
    journal = root.find("front/journal-meta")
    if meta is None:
        meta = etree.Element("article-meta")
    ids = {str(node.get("pub-id-type")): text(node)[:_NAME_LIMIT] for node in meta.iterchildren("article-id")}
    doi = re.sub(r"^(?:https?://(?:dx\.)?doi\.org/|doi:)", "", ids.get("doi", ""), flags=re.I).lower()
    pmc = ids.get("pmc") or ids.get("pmcid") or ids.get("pmcaid") or ""
    language = root.get(_LANG) or ""
    titles = _titles(root, meta, language)
    if doi:
        identity = f"doi:{doi}"
    elif pmc or ids.get("pmid"):
        identity = f"pmc:{pmc.upper().removeprefix('PMC')}" if pmc else f"pmid:{ids['pmid']}"
    else:
        identity = f"sha256:{sha256(data if root.getparent() is None else etree.tostring(root)).hexdigest()[:24]}"
    return Article(
        id=identity, doi=doi, title=titles.get(language, next(iter(titles.values()), "")), titles=titles,
        abstract=" ".join(
            text(node) for tag in ("abstract", "trans-abstract") for node in meta.iterchildren(tag)
        )[:_ABSTRACT_LIMIT],
        journal=_first(journal, "journal-title-group/journal-title", "journal-title", "journal-id"),
        date=_date(meta), licence=_licence(meta),
        keywords=tuple(dict.fromkeys(
            word for group in meta.iterchildren("kwd-group") for node in group.iter("kwd")
            if (word := text(node)[:_NAME_LIMIT])
        ))[:50],
        language=language, figures=tuple(_figures(root)), aside=_aside(root),
    )


def _titles(root: etree._Element, meta: etree._Element, language: str) -> dict[str, str]:
    """The title by language, "" where the language is not declared."""
    titles: dict[str, str] = {}
    group = meta.find("title-group")
    if group is not None:
        titles[language] = _first(group, "article-title")
        for translated in group.iterchildren("trans-title-group"):
            titles.setdefault(translated.get(_LANG) or "", _first(translated, "trans-title"))
        for node in group.iterchildren("trans-title"):
            titles.setdefault(node.get(_LANG) or "", text(node))
    for part in root.iterchildren("sub-article"):
        title = part.find("front-stub/title-group/article-title")
        if part.get("article-type") == "translation" and title is not None:
            titles.setdefault(part.get(_LANG) or "", text(title))
    return {key: title[:_TITLE_LIMIT] for key, title in titles.items() if title}


def _licence(meta: etree._Element) -> str:
    """Of `permissions`, or of what stood in its place before JATS 1.0."""
    nodes = (meta.find(name) for name in ("permissions", "license", "copyright-statement"))
    found = (licence_of(node) for node in nodes if node is not None)
    return next((licence for licence in found if licence != UNKNOWN), UNKNOWN)


def _date(meta: etree._Element) -> str:
    dates: dict[str, str] = {}
    for node in meta.iterchildren("pub-date"):
        parts = [_first(node, name) for name in ("year", "month", "day")]
        numbers = [parts[0].zfill(4), *(part.zfill(2) for part in parts[1:])]
        kept = []
        for number in numbers:
            if not number.isdigit() or len(number) > 4 or number in ("0000", "00"):
                break
            kept.append(number)
        if kept:
            dates.setdefault(node.get("pub-type") or node.get("date-type") or "", "-".join(kept))
    return next((dates[kind] for kind in _DATE_ORDER if kind in dates), next(iter(dates.values()), ""))


def _aside(root: etree._Element) -> dict[str, int]:
    counts = Counter[str]()
    for tag in ("graphic", "inline-graphic"):
        for node in root.iter(tag):
            parent = node.getparent()
            while parent is not None and parent.tag not in _HOLDERS:
                parent = parent.getparent()
            if parent is None:
                counts["outside any figure"] += 1
            elif parent.tag == "table-wrap":
                counts["table"] += 1
            elif parent.tag in ("disp-formula", "inline-formula") or tag == "inline-graphic":
                counts["equation"] += 1
    return dict(counts)


def _figures(root: etree._Element) -> Iterator[Figure]:
    found = [*root.iter("fig", "fig-group")][:_FIGURES_LIMIT]
    if not found:
        return
    mentions = _mentions(root, found)
    originals: dict[str, list[etree._Element]] = {}
    for node in found:
        if node.tag == "fig" and _translation(node) is None and _pictures(node):
            originals.setdefault(_number(_label(node)), []).append(node)
    whole = {node for node in found if node.tag == "fig-group" and (_is_one(node) or node.find(".//fig") is None)}
    for node in found:
        group = node.getparent()
        if (node.tag == "fig-group" and node not in whole) or group in whole:
            continue  # its figures come by themselves, with its caption; or it comes with their captions
        part = _translation(node)
        if part is not None and part.get("article-type") != "translation":
            continue  # a reviewer's or an author's letter
        inner = [*node.iter("fig")] if node.tag == "fig-group" else []
        before = _said(group.find("caption")) if group is not None and group.tag == "fig-group" else ""
        after = [f"{_first(one, 'label').rstrip(' .:')}: {_said(one.find('caption'))}".lstrip(": ") for one in inner]
        said = [line for one in (node, *inner) for line in mentions.get((_key(part), one.get("id") or ""), ())]
        source = _source(node, originals)
        captions: list[etree._Element | None] = [*node.iterchildren("caption")] or [None]
        for caption in captions:
            words = " ".join(filter(None, (before, _said(caption), *after)))[:_CAPTION_LIMIT]
            licence = _own_licence(node, words)
            yield Figure(
                id=(node.get("id") or "")[:_NAME_LIMIT], label=_label(node)[:100], caption=words,
                language=_language(caption if caption is not None else node),
                pictures=() if source is None else _pictures(source),
                mentions=tuple(_up_to(said, _MENTIONS_LIMIT)),
                licence=_own_licence(source, "") if licence is None and source is not None else licence,
            )


def _is_one(group: etree._Element) -> bool:
    """Whether a group is one figure: a picture of its own, and figures that are captions of its parts."""
    return bool(_pictures(group)) and not any(fig.get(_LANG) or _pictures(fig) for fig in group.iter("fig"))


def _source(node: etree._Element, originals: Mapping[str, list[etree._Element]]) -> etree._Element | None:
    """The element whose pictures a figure shows: itself, or its twin in another language."""
    if _pictures(node):
        return node
    if _translation(node) is not None:  # SciELO: the translation repeats the caption, not the picture
        number = _number(_label(node))
        same = originals.get(number, []) if number else []
        return same[0] if len(same) == 1 else None
    group = node.getparent()
    if group is None or group.tag != "fig-group" or not node.get(_LANG):
        return None
    others = [fig for fig in group.iterchildren("fig") if fig.get(_LANG) != node.get(_LANG) and _pictures(fig)]
    return others[0] if len(others) == 1 else None if others else group


def _own_licence(node: etree._Element, caption: str) -> str | None:
    """What a figure's own permissions, its group's, or else its attribution and caption say; None where none does."""
    holders = [node, *node.iterancestors("fig-group")]
    for holder in holders:
        if (permissions := holder.find("permissions")) is not None:
            return licence_of(permissions)
    attributions = [text(credit) for holder in holders for credit in holder.iterchildren("attrib")]
    return licence_said(". ".join((*attributions, caption)))


def _said(caption: etree._Element | None) -> str:
    return "" if caption is None else text(caption)


def _up_to(said: Iterable[str], limit: int) -> Iterator[str]:
    """Different texts, as many as fit into `limit` characters."""
    for one in dict.fromkeys(said):
        limit -= len(one)
        if limit < 0:
            return
        yield one


def _label(node: etree._Element) -> str:
    label = _first(node, "label")
    parent = node.getparent()
    return label or (_first(parent, "label") if parent is not None and parent.tag == "fig-group" else "")


def _number(label: str) -> str:
    """What a label counts: "Figura 2" and "Figure 2" are one."""
    return "".join(re.findall(r"\d+|\b[A-Z]\b", label))


def _pictures(node: etree._Element) -> tuple[tuple[str, ...], ...]:
    """The names of each picture of a figure; alternatives of one picture stay together, thumbnails left out."""
    pictures: list[tuple[str, ...]] = []
    seen: set[etree._Element] = set()
    for graphic in node.iter("graphic"):
        parent = graphic.getparent()
        if parent is not None and parent.tag == "alternatives":
            if parent in seen:
                continue
            seen.add(parent)
            names = [
                name for other in parent.iterchildren("graphic")
                if (name := other.get(_HREF) or "") and "thumb" not in f"{name} {other.get('specific-use')}".lower()
            ]
        else:
            names = [graphic.get(_HREF) or ""]
        if any(names):
            pictures.append(tuple(name[:500] for name in names if name))
    return tuple(pictures)


def _translation(node: etree._Element) -> etree._Element | None:
    """The sub-article (or response) that a node stands in."""
    for parent in node.iterancestors("sub-article", "response"):
        return parent
    return None


def _key(part: etree._Element | None) -> str:
    return "" if part is None else part.get("id") or part.get(_LANG) or "sub-article"


def _language(node: etree._Element) -> str:
    current: etree._Element | None = node
    while current is not None:
        if declared := current.get(_LANG):
            return declared
        current = current.getparent()
    return ""


def _mentions(root: etree._Element, figures: list[etree._Element]) -> dict[tuple[str, str], list[str]]:
    """Sentences that refer to a figure, by sub-article and figure id, in the order of the text.

    "Figs. 1–3" refers to the second figure too.
    """
    order = [(_key(_translation(node)), node.get("id") or "") for node in figures]
    places = {name: place for place, name in enumerate(order)}
    paragraphs: dict[etree._Element, None] = {}
    for reference in root.iter("xref"):
        if reference.get("ref-type") != "fig":
            continue
        for parent in reference.iterancestors("p", "fig", "table-wrap"):
            if parent.tag == "p" and not any(True for _ in parent.iterancestors("caption")):
                paragraphs[parent] = None
            break
    mentions: dict[tuple[str, str], list[str]] = {}
    for paragraph in paragraphs:
        key = _key(_translation(paragraph))
        for sentence in _SENTENCE_END.split(text(paragraph, mark=True)):
            names = {name for run in re.findall(f"{_MARK}([^{_MARK}]*){_MARK}", sentence) for name in run.split()}
            for first, last in _RANGE.findall(sentence):
                start, end = places.get((key, first), len(order)), places.get((key, last), -1)
                names.update(name for where, name in order[start : end + 1] if where == key)
            plain = re.sub(f"{_MARK}[^{_MARK}]*{_MARK}", "", sentence).strip()
            for name in names:
                said = mentions.setdefault((key, name), [])
                if plain and plain not in said and sum(map(len, said)) + len(plain) <= _MENTIONS_LIMIT:
                    said.append(plain)
    return mentions


def text(node: etree._Element, mark: bool = False) -> str:
    """An element's text in one line; powers keep their meaning (10^-3), superscript citations are left out.

    With `mark`, each reference to a figure is preceded by its ids between marks, for `_mentions`.
    """
    parts: list[str] = []
    _collect(node, parts, mark)
    return " ".join("".join(parts).split())


def _collect(node: etree._Element, parts: list[str], mark: bool) -> None:
    if node.text:
        parts.append(node.text)
    for child in node:
        tag = child.tag
        if tag is etree.Entity:
            parts.append(html.unescape(child.text or ""))
        elif tag == "sup":
            raised: list[str] = []
            _collect_raised(child, raised, mark)
            power = "".join(raised).strip()
            exponent = re.fullmatch(r"[-+−–]?\d+", power) and parts and parts[-1][-1:].isalnum()
            parts.append(f"^{power}" if exponent else power)
        elif tag not in _LEFT_OUT or (tag == "tex-math" and node.find("{*}math") is None):
            if tag in _APART:
                parts.append(" ")
            if mark and tag == "xref" and child.get("ref-type") == "fig":
                parts.append(f"{_MARK}{child.get('rid') or ''}{_MARK}")
            _collect(child, parts, mark)
            if tag in _APART:
                parts.append(" ")
        if child.tail:
            parts.append(child.tail)


def _collect_raised(node: etree._Element, parts: list[str], mark: bool) -> None:
    """A superscript without its citations: "shown^3" would read as a power."""
    cites = node.find(".//xref[@ref-type='bibr']") is not None
    parent = node.getparent()
    if not cites and not (parent is not None and parent.tag == "xref" and parent.get("ref-type") == "bibr"):
        _collect(node, parts, mark)


def _first(node: etree._Element | None, *paths: str) -> str:
    for path in paths:
        found = node.find(path) if node is not None else None
        if found is not None and (said := text(found)):
            return said[:_TITLE_LIMIT]
    return ""


def _drop_namespaces(root: etree._Element) -> None:
    """JATS in a namespace (OAI answers) reads as JATS without one."""
    for node in root.iter(etree.Element):
        name = etree.QName(node)
        if any(word in (name.namespace or "") for word in ("jats", "nlm.nih.gov", "journalpublishing")):
            node.tag = name.localname


def _one_line(message: str) -> str:
    return " ".join(message.split())[:200]
