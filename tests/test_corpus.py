"""The corpus: articles of every door to pairs, what is dropped and why, hostile input, crashes and resumption."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from articles import (
    LICENCE,
    always_dying_reader,
    dying_reader,
    figure,
    folder,
    jats,
    picture,
    refusing_reader,
    tarred,
    zipped,
)
from PIL import Image

from ldrt_edge import artifact
from ldrt_edge.errors import ConfigError, DataError
from ldrt_edge.train.data import reading
from ldrt_edge.train.data.articles import read_articles
from ldrt_edge.train.data.curate import curate
from ldrt_edge.train.data.filters import Settings
from ldrt_edge.train.data.language import language_of
from ldrt_edge.train.data.licences import is_allowed, spdx
from ldrt_edge.train.data.packages import Halted, find_units
from ldrt_edge.train.data.pairs import DROPPED, Dropped, Pair, Pairs, pair_line
from ldrt_edge.train.data.panels import caption_parts, panel_boxes, panels_named
from ldrt_edge.train.data.relevance import load_terms

SHARED = Path(__file__).resolve().parents[2] / "shared/data/articles"
CAPTION = "Dose distribution of the treatment plan over the left heel, in the plane of the isocentre"


def other(number: int) -> str:
    """A caption of its own."""
    return f"{CAPTION}; patient {number}, field {number + 100}, view {number + 200} of the series {number + 300}"


def dropped(path: Path) -> list[Dropped]:
    return [Dropped(**json.loads(line)) for line in (path / DROPPED).read_text().splitlines()]


def steps(path: Path) -> Counter[str]:
    return Counter(one.step for one in dropped(path))


def made(tmp_path: Path, files: dict[str, bytes], settings: Settings | None = None) -> Path:
    return curate([folder(tmp_path / "in", files)], tmp_path / "pairs", settings or Settings(terms=load_terms()))


# JATS


def test_an_article_becomes_pairs_with_origin_licence_and_mentions(tmp_path: Path) -> None:
    body = (
        'Nothing here. Doses of 10<sup>-3</sup> Gy<sup><xref ref-type="bibr" rid="r1">4</xref></sup> are in '
        '<xref ref-type="fig" rid="f1">Fig. 1</xref>. The next sentence is not about it.'
    )
    path = made(
        tmp_path, {"a/a.nxml": jats("10.1/A", figure(1, CAPTION), body=body), "a/x-g001.jpg": picture(1, form="JPEG")}
    )
    (pair,) = Pairs(path)
    assert (pair.article, pair.doi, pair.journal, pair.date) == (
        "doi:10.1/a",
        "10.1/a",
        "Journal of Tests",
        "2021-08-06",
    )
    assert (pair.licence, pair.language, pair.language_source) == ("CC-BY-4.0", "en", "declared")
    assert (pair.caption, pair.label, pair.keywords) == (CAPTION, "Figure 1", ("radiotherapy", "heel"))
    assert pair.mentions == ("Doses of 10^-3 Gy are in Fig. 1.",)
    with Image.open(path / pair.image) as image:
        assert image.size == (pair.width, pair.height) == (320, 240)
    assert artifact.verify(path).kind == "pairs" and (path / "funnel.png").is_file()


def test_pictures_are_found_under_the_names_that_publishers_use(tmp_path: Path) -> None:
    variants = {
        "pone.0000217.g001": "journal.pone.0000217.g001.tif",
        "fig1": "FIG1.JPG",
        "fig2.tif": "fig2.jpg",
        "gr1": "gr1_lrg.jpg",
        "10_Article_Fig1": "10_Article_Fig1_HTML.jpg",
        "img/fig%201.png": "img/fig 1.png",
        "info:doi/10.1371/journal.x.g001": "journal.x.g001.png",
    }
    form = {"jpg": "JPEG", "tif": "TIFF", "png": "PNG"}
    files: dict[str, bytes] = {}
    for number, (named, shipped) in enumerate(variants.items()):
        files[f"{number}/a.xml"] = jats(f"10.1/{number}", figure(1, other(number), named))
        files[f"{number}/{shipped}"] = picture(number, form=form[shipped[-3:].lower()])
    assert [pair.picture for pair in Pairs(made(tmp_path, files))] == [*variants]


def test_a_picture_that_no_name_means_is_counted_and_not_guessed(tmp_path: Path) -> None:
    files = {
        "a.xml": jats("10.1/a", figure(1, CAPTION) + figure(2, other(2), "both") + figure(3, other(3), "")),
        "other.png": picture(1),
        "one/both.png": picture(2),
        "two/both.png": picture(3),
    }
    path = made(tmp_path, files)
    assert [*Pairs(path)] == []
    told = [(one.step, one.reason) for one in dropped(path)]
    assert told[0] == ("picture not found", "x-g001: no file of that name")
    assert told[1][0] == "picture not found" and "2 files" in told[1][1]
    assert told[2][0] == "no picture named"


def packed(path: Path, how: str, files: dict[str, bytes]) -> Path:
    return {"folder": folder, "zip": zipped, "tar.gz": tarred}[how](path.with_suffix(f".{how}"), files)


@pytest.mark.parametrize("how", ["folder", "zip", "tar.gz"])
@pytest.mark.parametrize("place", ["a/a.xml", "a.xml"])
def test_a_picture_beside_another_article_is_not_taken(tmp_path: Path, how: str, place: str) -> None:
    files = {
        place: jats("10.1/a", figure(1, CAPTION, "gr1")),
        "b/b.xml": jats("10.1/b", figure(1, other(2), "gr1")),
        "b/images/gr1.png": picture(1),
        "b/images/c/c.xml": jats("10.1/c", figure(1, other(3), "gr1")),
    }
    path = curate([packed(tmp_path / "in", how, files)], tmp_path / "pairs")
    assert [pair.article for pair in Pairs(path)] == ["doi:10.1/b"]
    assert steps(path) == {"picture not found": 2}


@pytest.mark.parametrize("how", ["zip", "tar.gz"])
def test_an_archive_of_one_article_is_all_its_own(tmp_path: Path, how: str) -> None:
    files = {"xml/a.xml": jats("10.1/a", figure(1, CAPTION, "gr1")), "images/gr1.png": picture(1)}
    path = curate([packed(tmp_path / "in", how, files)], tmp_path / "pairs")
    assert [pair.figure for pair in Pairs(path)] == ["f1"]


@pytest.mark.parametrize("how", ["folder", "zip", "tar.gz"])
def test_the_path_that_the_xml_gives_comes_before_the_name_alone(tmp_path: Path, how: str) -> None:
    figures = figure(1, CAPTION, "two/gr1.png") + figure(2, other(2), "./One/gr1") + figure(3, other(3), "http://x/gr2.tif")
    files = {
        "p/a.xml": jats("10.1/a", figures),
        "p/one/gr1.png": picture(1),
        "p/two/gr1.png": picture(2),
        "p/two/deep/gr2.png": picture(3),
    }
    path = curate([packed(tmp_path / "in", how, files)], tmp_path / "pairs")
    shown = {pair.figure: np.asarray(Image.open(path / pair.image)) for pair in Pairs(path)}
    seeds = {"f1": 2, "f2": 1, "f3": 3}
    drawn = {name: np.asarray(Image.open(io.BytesIO(picture(seed)))) for name, seed in seeds.items()}
    assert shown.keys() == drawn.keys() and all((shown[name] == drawn[name]).all() for name in drawn)


def test_captions_in_several_languages_share_one_picture(tmp_path: Path) -> None:
    spanish = "Distribución de la dosis en el talón izquierdo, en el plano del isocentro"
    german = "Dosisverteilung des Bestrahlungsplans an der linken Ferse in der Ebene des Isozentrums"
    after = (
        '<sub-article article-type="translation" id="s1" xml:lang="es"><front-stub><title-group>'
        "<article-title>Radioterapia"
        '</article-title></title-group></front-stub><body><fig id="f1es"><label>Figura 1</label><caption>'
        f"<p>{spanish}</p></caption></fig></body></sub-article>"
        '<sub-article article-type="reviewer-report" xml:lang="en"><body>'
        + figure(9, "A figure of the reviewer's own, of the heel")
        + "</body></sub-article>"
    )
    group = (
        f'<fig-group><fig id="g1" xml:lang="en"><label>Figure 2</label><caption><p>{other(2)}</p></caption>'
        '<graphic xlink:href="x-g002"/></fig><fig id="g1de" xml:lang="de"><label>Abb. 2</label><caption>'
        f"<p>{german}</p></caption></fig></fig-group>"
    )
    data = jats("10.1/a", figure(1, CAPTION) + group, after=after)
    path = made(tmp_path, {"a.xml": data, "x-g001.png": picture(1), "x-g002.png": picture(2)})
    pairs = [*Pairs(path)]
    assert {(pair.language, pair.caption) for pair in pairs} == {
        ("en", CAPTION),
        ("es", spanish),
        ("en", other(2)),
        ("de", german),
    }
    assert len({pair.image for pair in pairs}) == 2
    assert next(pair.title for pair in pairs if pair.language == "es") == "Radioterapia"


def test_figure_groups_several_pictures_and_reprints(tmp_path: Path) -> None:
    own = "<permissions><copyright-statement>Reprinted, all rights reserved</copyright-statement></permissions>"
    figures = (
        '<fig-group id="g"><label>Figure 7</label><caption><title>Both heels after therapy.</title></caption>'
        + figure(1, "Left heel with the isodose lines")
        + figure(2, "Right heel with the isodose lines")
        + "</fig-group>"
        + figure(3, other(3), "x-g003", '<graphic xlink:href="x-g004"/>')
        + figure(5, CAPTION + " reprinted", None, own)
    )
    files = {f"x-g{number:03d}.png": picture(number) for number in range(1, 6)}
    path = made(tmp_path, {"a.xml": jats("10.1/a", figures), **files})
    pairs = {(pair.figure, pair.part): pair.caption for pair in Pairs(path)}
    assert pairs == {
        ("f1", ""): "Both heels after therapy. Left heel with the isodose lines",
        ("f2", ""): "Both heels after therapy. Right heel with the isodose lines",
        ("f3", "1/2"): other(3),
        ("f3", "2/2"): other(3),
    }
    assert steps(path) == {"licence of the figure": 1}


def test_a_group_with_one_picture_and_captions_of_its_parts_is_one_figure(tmp_path: Path) -> None:
    group = (
        '<fig-group id="g"><label>Figure 7</label><caption><title>Both heels after therapy.</title></caption>'
        '<graphic xlink:href="x-g007"/>'
        + figure(1, "Left heel with the isodose lines", "")
        + figure(2, "Right heel with the isodose lines", "")
        + "</fig-group>"
    )
    body = 'Heels are in <xref ref-type="fig" rid="f2">Fig. 2</xref>.'
    (pair,) = Pairs(made(tmp_path, {"a.xml": jats("10.1/a", group, body=body), "x-g007.png": picture(7)}))
    assert (pair.figure, pair.label, pair.mentions) == ("g", "Figure 7", ("Heels are in Fig. 2.",))
    assert pair.caption == (
        "Both heels after therapy. Figure 1: Left heel with the isodose lines"
        " Figure 2: Right heel with the isodose lines"
    )


@pytest.mark.parametrize("dash", ["–", "-", " — "])
def test_a_range_of_figures_mentions_those_between(dash: str) -> None:
    body = (
        f'Heels are in <xref ref-type="fig" rid="f1">Figs. 1</xref>{dash}<xref ref-type="fig" rid="f3">3</xref>. '
        'See <xref ref-type="fig" rid="f2">Fig. 2</xref> and <xref ref-type="fig" rid="f4">Fig. 4</xref>.'
    )
    (article,) = read_articles(jats("10.1/a", "".join(figure(n, other(n)) for n in (1, 2, 3, 4)), body=body))
    range_, two = f"Heels are in Figs. 1{dash}3.", "See Fig. 2 and Fig. 4."
    assert [one.mentions for one in article.figures] == [(range_,), (range_, two), (range_,), (two,)]


def test_figures_that_are_someone_elses_are_not_under_the_articles_licence(tmp_path: Path) -> None:
    own = "<permissions><copyright-statement>© Elsevier, all rights reserved</copyright-statement></permissions>"
    group = f'<fig-group id="g">{own}{figure(1, other(1))}{figure(2, other(2))}</fig-group>'
    said = [
        "Reprinted from Smith et al. with permission from Elsevier.",
        "© 2010 Springer.",
        "Mit freundlicher Genehmigung des Verlags nachgedruckt.",
        "Reproducido con permiso de Elsevier.",
        "Reproduit avec l'autorisation de Masson.",
        "Adaptado com permissão da Springer.",
        "Riprodotto per gentile concessione dell'editore.",
        "Adapted from Jones (CC BY-NC-ND 4.0).",
    ]
    kept = [
        "Reprinted from Smith under CC BY 3.0.",
        "Photograph reproduced with permission of the patient.",
        "© The Authors 2020.",
    ]
    figures = "".join(figure(number, f"{other(number)}. {words}") for number, words in enumerate(said + kept, start=3))
    credit = figure(20, other(20), None, "<attrib>© Springer. Reproduced with permission</attrib>")
    translated = figure(21, "Distribución de la dosis en el talón izquierdo", "").replace("Figure", "Figura")
    after = f"<sub-article article-type='translation' xml:lang='es'><body>{translated}</body></sub-article>"
    reprint = figure(21, other(21), None, own)
    files = {f"x-g{number:03d}.png": picture(number) for number in range(1, 22)}
    path = made(tmp_path, {"a.xml": jats("10.1/a", group + figures + credit + reprint, after=after), **files})
    found = {pair.figure: pair.licence for pair in Pairs(path)}
    assert found == {"f11": "CC-BY-3.0", "f12": "CC-BY-4.0", "f13": "CC-BY-4.0"}
    assert steps(path) == {"licence of the figure": len(said) + 5}
    assert {one.reason for one in dropped(path)} == {"unknown", "CC-BY-NC-ND-4.0"}


def test_two_figures_of_one_id_are_two_pairs(tmp_path: Path) -> None:
    figures = figure(1, CAPTION, "x1") + figure(1, other(2), "x2") + figure(1, other(3), "x3").replace('"f1"', '"f1-2"')
    path = made(tmp_path, {"a.xml": jats("10.1/a", figures), **{f"x{n}.png": picture(n) for n in (1, 2, 3)}})
    assert [pair.id for pair in Pairs(path)] == [f"doi:10.1/a#{name}/en" for name in ("f1", "f1-2", "f1-2-2")]


def test_an_article_that_says_too_much_stays_readable(tmp_path: Path) -> None:
    much = "word " * 400_000
    data = jats("10.1/" + "a" * 2_000_000, figure(1, CAPTION), title=much, body=much)
    data = data.replace(b"<kwd>heel</kwd>", f"<kwd>{much}</kwd>".encode())
    data = data.replace(b'id="f1"', f'id="{"f" * 2_000_000}"'.encode())
    path = curate([folder(tmp_path / "in", {"a.xml": data, "x-g001.png": picture(1)})], tmp_path / "pairs")
    (pair,) = Pairs(path)
    assert pair.caption == CAPTION and len(pair_line(pair)) < 10_000


def test_real_scielo_packages_in_three_languages() -> None:
    if not SHARED.is_dir():
        pytest.skip("the real packages are not beside this checkout (shared/data/articles)")
    with zipfile.ZipFile(SHARED / "scielo-tinf-33.zip") as archive:
        found = [read_articles(archive.read(name))[0] for name in archive.namelist() if name.endswith(".xml")]
    assert sorted(article.language for article in found) == ["en", "en", "es", "pt"]
    assert {article.licence for article in found} == {"CC-BY-4.0"}
    assert sorted(len(article.figures) for article in found) == [0, 0, 1, 2]
    assert all(figure.mentions for article in found for figure in article.figures)
    assert {tuple(sorted(article.titles)) for article in found} >= {("en", "es"), ("en", "pt")}


@pytest.mark.slow
def test_real_packages_give_pairs_and_count_what_cannot_be_matched(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("the real packages are not beside this checkout (shared/data/articles)")
    path = curate([SHARED], tmp_path / "pairs", Settings(terms=load_terms()))
    assert steps(path) == {"off topic": 5}
    path = curate([SHARED], tmp_path / "any")
    assert sorted((pair.language, pair.figure) for pair in Pairs(path)) == [("en", "f01"), ("es", "f01"), ("es", "f02")]
    assert max(max(pair.width, pair.height) for pair in Pairs(path)) <= 1344
    assert steps(path) == {"no figure": 2, "picture not found": 2}


# filters


@pytest.mark.parametrize(
    ("said", "licence"),
    [
        ("http://creativecommons.org/licenses/by/2.0", "CC-BY-2.0"),
        ("https://creativecommons.org/licenses/by-nc-nd/4.0/deed.de", "CC-BY-NC-ND-4.0"),
        ("http://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"),
        ("distributed under the terms of the Creative Commons Attribution License, which permits", "CC-BY"),
        ("Creative Commons Attribution Non-Commercial License", "CC-BY-NC"),
        ("Este artículo se publica bajo CC BY-NC-SA 4.0", "CC-BY-NC-SA-4.0"),
        ("© 2010 Some Society. All rights reserved", "unknown"),
        ("CC BY NC ND 4.0", "CC-BY-NC-ND-4.0"),
        ("CC BY (NC)", "CC-BY-NC"),
        ("CC BY - NC - ND", "CC-BY-NC-ND"),
        ("CC BY\u2011NC\u2013ND", "CC-BY-NC-ND"),
        ("CC-BY_NC 3.0", "CC-BY-NC-3.0"),
        ("Licencia Creative Commons Atribución-NoComercial-SinDerivadas 4.0 Internacional", "CC-BY-NC-ND"),
        ("Licença Creative Commons Atribuição-NãoComercial-SemDerivações", "CC-BY-NC-ND"),
        ("licença Creative Commons Atribuição, que permite o uso sem fins comerciais", "CC-BY-NC"),
        (
            "Licence Creative Commons Attribution - Pas d’Utilisation Commerciale - Pas de Modification",
            "CC-BY-NC-ND",
        ),
        ("Creative Commons Namensnennung – Nicht kommerziell – Keine Bearbeitungen 4.0", "CC-BY-NC-ND"),
        ("Lizenz: Creative Commons Namensnennung – Weitergabe unter gleichen Bedingungen", "CC-BY-SA"),
        ("licenza Creative Commons Attribuzione - Non commerciale - Non opere derivate", "CC-BY-NC-ND"),
        ("https://creativecommons.org/licenses/by%2Dnc/4.0/", "CC-BY-NC-4.0"),
        ("http://creativecommons.org/licenses/by_nc/4.0", "CC-BY-NC-4.0"),
        ("http://creativecommons.org/licenses/by-unheard/4.0", "unknown"),
        ("This article is not in the public domain", "unknown"),
        ("Ce travail n’est pas dans le domaine public", "unknown"),
        ("This work is in the public domain", "public-domain"),
        ("10 cc by hand", "unknown"),
        ("a Creative Commons Attribution License, for commercial and non-commercial use alike", "CC-BY"),
        (
            "under the CC BY-NC-ND license. The Creative Commons Public Domain Dedication waiver"
            " (http://creativecommons.org/publicdomain/zero/1.0/) applies to the data made available in this article",
            "CC-BY-NC-ND",
        ),
        (
            "All rights reserved. The Creative Commons Public Domain Dedication waiver"
            " (http://creativecommons.org/publicdomain/zero/1.0/) applies to the data",
            "unknown",
        ),
    ],
)
def test_licences_are_told_by_link_and_by_word(said: str, licence: str) -> None:
    assert spdx([said]) == licence


@pytest.mark.parametrize("kinds", [("by", "by-nc-nd"), ("by-nc-nd", "by"), ("by-nc-nd", "by", "by-sa")])
def test_of_several_licences_the_strictest_holds(kinds: tuple[str, ...]) -> None:
    links = "".join(f'<license xlink:href="http://creativecommons.org/licenses/{kind}/4.0/"/>' for kind in kinds)
    (article,) = read_articles(jats("10.1/a", figure(1, CAPTION), permissions=f"<permissions>{links}</permissions>"))
    assert article.licence == "CC-BY-NC-ND-4.0"


def test_an_allowed_licence_covers_its_versions_and_no_other() -> None:
    assert is_allowed("CC-BY-3.0", ["CC-BY"]) and is_allowed("CC-BY", ["CC-BY"])
    assert not is_allowed("CC-BY-NC-3.0", ["CC-BY"]) and not is_allowed("CC-BY-3.0", ["CC-BY-4.0"])


def test_each_filter_drops_with_a_reason(tmp_path: Path) -> None:
    blank, strip = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (300, 300), (250, 250, 250)).save(blank, "PNG")
    Image.open(io.BytesIO(picture(8))).resize((1000, 100)).save(strip, "PNG")
    figures = [
        figure(1, CAPTION),
        figure(2, "Heel."),
        figure(3, CAPTION + " too small"),
        figure(4, CAPTION + " blank"),
        figure(5, CAPTION + " damaged"),
        figure(6, CAPTION + " a logo", "journal-logo.png"),
        figure(7, CAPTION + " strip"),
        figure(8, CAPTION, "x-t008").replace("Figure 8", "Table 1"),
    ]
    files = {
        "x-g001.png": picture(1),
        "x-g003.png": picture(3, (60, 60)),
        "x-g004.png": blank.getvalue(),
        "x-g005.png": picture(5)[:500],
        "journal-logo.png": picture(6),
        "x-g007.png": strip.getvalue(),
    }
    nc = LICENCE.replace("/by/", "/by-nc/")
    path = made(
        tmp_path,
        {
            "a/a.xml": jats("10.1/a", "".join(figures)),
            **{f"a/{name}": data for name, data in files.items()},
            "b/b.xml": jats("10.1/b", figure(1, CAPTION), permissions=nc),
            "c/c.xml": jats("10.1/c", ""),
            "d/d.xml": jats("10.1/d", figure(1, "Mosses of the northern peat bogs in summer"), title="Mosses").replace(
                b"radiotherapy", b"moss"
            ),
        },
    )
    assert [pair.figure for pair in Pairs(path)] == ["f1"]
    assert steps(path) == {
        "licence": 1,
        "no figure": 1,
        "off topic": 1,
        "caption too short": 1,
        "picture too small": 1,
        "picture blank": 1,
        "picture unreadable": 1,
        "equation, table or logo": 3,
    }
    assert all(one.reason for one in dropped(path) if one.step != "no figure")
    funnel = (path / "funnel.csv").read_text().splitlines()
    assert funnel[1] == "articles,found,4,4" and funnel[-1] == "pairs,kept,1,1" and "articles,licence,1,3" in funnel


def test_duplicates_within_and_across_articles_go_and_form_clusters(tmp_path: Path) -> None:
    image = Image.open(io.BytesIO(picture(1)))
    again, scan = io.BytesIO(), io.BytesIO()
    image.resize((160, 120)).save(again, "PNG")
    image.save(scan, "JPEG", quality=40)
    cut = io.BytesIO()
    Image.open(io.BytesIO(picture(3))).crop((9, 7, 310, 232)).save(cut, "PNG")
    other = "A wholly different sentence about how the beams were placed around the calcaneus of patient two"
    long = (
        "Kaplan Meier estimate of freedom from pain after six fractions of half a gray in patients with painful heels"
    )
    files = {
        "a.xml": jats("10.1/a", figure(1, CAPTION, "a1") + figure(2, other, "a2") + figure(3, long, "a3")),
        "b.xml": jats("10.1/b", figure(1, "Another caption for the picture that has been seen before", "b1")),
        "c.xml": jats("10.1/c", figure(1, "Nearly the same picture out of a scanner, in another article", "c1")),
        "d.xml": jats("10.1/d", figure(1, long + ".", "d1")),
        "e.xml": jats("10.1/e", figure(1, "A figure of its own, unlike the others", "e1")),
        "f.xml": jats("10.1/A", figure(1, CAPTION, "e1")),
        "g.xml": jats("10.1/g", figure(1, long + "!", "g1")),
        "a1.png": picture(1),
        "a2.png": again.getvalue(),
        "a3.png": picture(3),
        "b1.png": picture(1),
        "c1.jpg": scan.getvalue(),
        "d1.png": picture(4),
        "e1.png": picture(5),
        "g1.png": cut.getvalue(),
    }
    path = made(tmp_path, files)
    pairs = [*Pairs(path)]
    assert [(pair.article, pair.figure) for pair in pairs] == [
        ("doi:10.1/a", "f1"),
        ("doi:10.1/a", "f3"),
        ("doi:10.1/d", "f1"),
        ("doi:10.1/e", "f1"),
    ], "the same words beside another picture are no copy"
    assert steps(path) == {"repeated picture": 1, "near picture": 2, "near caption": 1, "repeated article": 1}
    assert {pair.cluster for pair in pairs} == {"doi:10.1/a", "doi:10.1/e"}
    assert {path.name for path in (path / "images").iterdir()} == {pair.image.split("/")[1] for pair in pairs}


def _chart(kind: str, seed: int) -> Image.Image:
    """A plot as all of its kind are drawn, of data of its own."""
    from matplotlib.figure import Figure as Page

    rng = np.random.default_rng(seed)
    page = Page(figsize=(5, 4), dpi=100)
    axes = page.subplots()
    if kind == "survival":
        for _ in range(2):
            axes.step(np.sort(rng.uniform(0, 60, 25)), 1 - np.cumsum(rng.uniform(0, 0.03, 25)))
        axes.set(xlim=(0, 60), ylim=(0, 1), xlabel="months", ylabel="freedom from pain")
    else:
        dose = np.linspace(0, 6, 100)
        for _ in range(3):
            axes.plot(dose, 100 / (1 + np.exp((dose - rng.uniform(1, 5)) * rng.uniform(2, 6))))
        axes.set(xlabel="Gy", ylabel="volume %")
    stream = io.BytesIO()
    page.savefig(stream, format="png")
    return Image.open(stream).convert("RGB")


@pytest.mark.parametrize("kind", ["survival", "dose volume"])
def test_charts_of_one_kind_are_different_pictures_and_copies_of_one_are_not(tmp_path: Path, kind: str) -> None:
    def saved(image: Image.Image, **options: Any) -> bytes:
        stream = io.BytesIO()
        image.save(stream, **options)
        return stream.getvalue()

    words = (
        "Outcome of radiotherapy of the painful heel by dose in series {}; each line is a group of patients, six weeks"
        " and six months after the last of six fractions of half a gray, from the first day of treatment on"
    )
    charts = [_chart(kind, seed) for seed in range(14)]
    wide, high = charts[3].size
    copies = [
        saved(charts[0], format="JPEG", quality=30),
        saved(charts[1].resize((wide // 2, high // 2)), format="PNG"),
        saved(charts[2].resize((wide * 4 // 3, high * 4 // 3)), format="PNG"),
        saved(charts[3].crop((wide // 100, high // 100, wide - wide // 100, high - high // 100)), format="PNG"),
    ]
    files: dict[str, bytes] = {}
    for number, data in enumerate([*(saved(chart, format="PNG") for chart in charts), *copies]):
        caption = words.format(number) if number < 14 else other(number)
        files[f"{number:02d}/a.xml"] = jats(f"10.1/{number:02d}", figure(1, caption))
        files[f"{number:02d}/x-g001.{'jpg' if number == 14 else 'png'}"] = data
    path = made(tmp_path, files)
    assert [pair.article for pair in Pairs(path)] == [f"doi:10.1/{number:02d}" for number in range(14)]
    assert [(one.step, one.reason) for one in dropped(path)] == [
        ("near picture", f"like doi:10.1/{number:02d}#f1/en") for number in range(4)
    ]
    assert len({pair.cluster for pair in Pairs(path)}) < 4, "captions of one series keep to one side"


def test_what_is_like_a_struck_pair_goes_with_it(tmp_path: Path) -> None:
    files = {
        "a.xml": jats("10.1/a", figure(1, CAPTION, "one")),
        "b.xml": jats("10.1/b", figure(1, other(2), "one")),
        "c.xml": jats("10.1/c", figure(1, other(3), "one") + figure(2, other(4), "two")),
        "one.png": picture(1),
        "two.png": picture(2),
    }
    source = folder(tmp_path / "in", files)
    path = curate([source], tmp_path / "pairs", strikes={"doi:10.1/a#f1/en": "bad"})
    assert [pair.id for pair in Pairs(path)] == ["doi:10.1/c#f2/en"]
    assert [(one.step, one.reason) for one in dropped(path)] == [
        ("struck", "bad"),
        ("struck", "like doi:10.1/a#f1/en"),
        ("struck", "like doi:10.1/a#f1/en"),
    ]


@pytest.mark.parametrize("bare", [("0",), ("0", "1"), ("2",), ("0", "2")])
def test_of_two_copies_of_an_article_that_with_pictures_is_read(tmp_path: Path, bare: tuple[str, ...]) -> None:
    article = jats("10.1/a", figure(1, CAPTION))
    files = {f"{name}/a.xml": article for name in (*bare, "1b")} | {"1b/x-g001.png": picture(1)}
    path = made(tmp_path, files)
    assert [pair.article for pair in Pairs(path)] == ["doi:10.1/a"]
    assert steps(path)["repeated article"] == len(bare) and artifact.read(path).metrics["articles"] == len(bare) + 1


def test_names_and_labels_are_told_by_whole_words(tmp_path: Path) -> None:
    names = ["radiologo-2020-fig1.png", "iconography-3.png", "inlines.png"]
    names += ["society-logo.png", "icon3.png", "logo_2.png"]
    figures = "".join(figure(number, other(number), name) for number, name in enumerate(names))
    figures += figure(9, other(9), "table").replace("Figure 9", "Tab. 1")
    files = {name: picture(number) for number, name in enumerate(names)}
    path = made(tmp_path, {"a.xml": jats("10.1/a", figures), **files})
    assert [pair.picture for pair in Pairs(path)] == names[:3]
    assert steps(path) == {"equation, table or logo": 4}


def test_one_link_joins_two_articles_that_both_stay(tmp_path: Path) -> None:
    german = "Dosisverteilung des Bestrahlungsplans an der linken Ferse in der Ebene des Isozentrums"
    files = {
        "a.xml": jats("10.1/a", figure(1, CAPTION, "one")),
        "b.xml": jats("10.1/b", figure(1, german, "one"), language="de"),
        "one.png": picture(1),
    }
    pairs = [*Pairs(made(tmp_path, files))]
    assert [pair.language for pair in pairs] == ["en", "de"] and {pair.cluster for pair in pairs} == {"doi:10.1/a"}


@pytest.mark.parametrize(
    ("caption", "letters"),
    [
        ("Heels. (A) Left heel before. (B) Right heel after.", "AB"),
        ("A, Heat map of cells. B, ROC curve, with AUC.", "AB"),
        ("(a) one thing; (b) another thing; (c) the third", "ABC"),
        ("Group (B) and group (A) are shown", ""),
        ("No panels. A heel.", ""),
        ("Vitamin A. The (A) single letter", ""),
        ("（A）左足跟治疗前。（B）左足跟治疗后。", "AB"),
        ("Axial CT (A) and sagittal MRI (B) of the left heel", ""),
        ("Pain before (A), six weeks after (B) and one year after (C) radiotherapy", ""),
        ("(A) CT of the heel. (B) MRI of (C) the knee", ""),
        ("(A) CT; (B,C) MRI; (D) PET.", ""),
        ("Hepatitis A: rates. Hepatitis B: rates of cure", ""),
    ],
)
def test_caption_parts(caption: str, letters: str) -> None:
    assert "".join(part.letter for part in caption_parts(caption)) == letters


@pytest.mark.parametrize(
    ("caption", "count"),
    [
        ("Axial CT (A) and sagittal MRI (B) of the left heel", 2),
        ("(A, B) Left and right heel before therapy. (C) Knee of the same patient.", 3),
        ("(A–C) Three slices of one plan. (D) Dose volume histogram.", 4),
        ("Six plans (a-f)", 6),
        ("a Left heel before therapy. b Right heel after therapy", 2),
        ("a) calcanhar esquerdo; b) calcanhar direito", 2),
        ("Panel A: left heel. Panel B: right heel.", 2),
        ("（A）左足跟治疗前。（B）左足跟治疗后。", 2),
        ("(i) Left heel; (ii) right heel; (iii) knee", 3),
        ("(1) Left heel. (2) Right heel.", 2),
        ("Left: heel. Right: knee.", 2),
        ("Axial (left) and sagittal (right) MRI", 2),
        ("Links: Ferse. Rechts: Knie.", 2),
        ("Group (B) and group (A) are shown", 0),
        ("Hepatitis A: rates. Hepatitis B: rates of cure", 0),
        ("As Smith (1) and Jones (2) did", 0),
        ("A heel of a patient. The left one.", 0),
        ("The dose in grays (a prescription) of the left heel", 0),
    ],
)
def test_panels_that_a_caption_names_are_counted_whether_or_not_it_can_be_cut(caption: str, count: int) -> None:
    assert panels_named(caption) == count


def test_a_compound_figure_is_cut_where_caption_and_picture_agree_and_marked_where_not(tmp_path: Path) -> None:
    whole = Image.new("RGB", (700, 520), (255, 255, 255))
    for number in range(4):
        whole.paste(Image.open(io.BytesIO(picture(number))), (20 + 345 * (number % 2), 10 + 255 * (number // 2)))
    stream = io.BytesIO()
    whole.save(stream, "PNG")
    four = "Plans of four patients. (A) Left heel of one. (B) Right heel of two. (C) Left knee of three. (D) A hip."
    two = "Two plans in one. (A) Left elbow, dose in grays. (B) Right elbow, dose in grays."
    behind = "Axial CT (A) and sagittal MRI (B) of the left heel before the first fraction of half a gray."
    figures = figure(1, four, "four") + figure(2, two, "two") + figure(3, behind, "behind")
    path = made(
        tmp_path,
        {
            "a.xml": jats("10.1/a", figures),
            "four.png": stream.getvalue(),
            "two.png": picture(9),
            "behind.png": picture(10),
        },
    )
    pairs = {pair.id.split("#")[1]: pair for pair in Pairs(path)}
    assert [*pairs] == ["f1/A/en", "f1/B/en", "f1/C/en", "f1/D/en", "f2/en", "f3/en"]
    assert pairs["f1/C/en"].caption == "Plans of four patients. Left knee of three."
    assert pairs["f2/en"].compound and pairs["f3/en"].compound and not pairs["f1/A/en"].compound
    cut = np.asarray(Image.open(path / pairs["f1/D/en"].image).convert("RGB")).astype(int)
    source = np.asarray(whole.crop((365, 265, 685, 505))).astype(int)
    assert cut.shape[0] <= source.shape[0] and cut.shape[1] <= source.shape[1] and min(cut.shape[:2]) > 150


def test_a_plot_without_gutters_is_not_cut() -> None:
    assert panel_boxes(np.zeros((300, 300, 3), np.uint8), 2) == []
    assert panel_boxes(np.asarray(Image.open(io.BytesIO(picture(1)))), 7) == []


# language and relevance


@pytest.mark.parametrize(
    ("said", "language"),
    [
        ("Dose distribution of the treatment plan over the left heel", "en"),
        ("Dosisverteilung des Bestrahlungsplans an der linken Ferse", "de"),
        ("Distribution de la dose du plan de traitement au talon gauche", "fr"),
        ("Distribución de la dosis del plan de tratamiento en el talón", "es"),
        ("Distribuição da dose do plano de tratamento no calcanhar esquerdo", "pt"),
        ("Distribuzione della dose del piano di trattamento sul tallone", "it"),
        ("Rozkład dawki w planie leczenia lewej pięty pacjenta", "pl"),
        ("Распределение дозы в плане лечения левой пятки пациента", "ru"),
        ("患者左足跟治疗计划的剂量分布图，显示等剂量线与靶区", "zh"),
        ("左踵の治療計画における線量分布を示す図である。", "ja"),
        ("왼쪽 발뒤꿈치 치료 계획의 선량 분포를 보여주는 그림", "ko"),
    ],
)
def test_languages_are_told_by_their_letters(said: str, language: str) -> None:
    assert language_of("", said) == (language, "identified")


@pytest.mark.parametrize("most_letters", [None, 60])
def test_languages_of_real_text(most_letters: int | None) -> None:
    """Ten paragraphs of the Universal Declaration of Human Rights (United Nations, in the public domain) in each."""
    lines = Path(__file__).with_name("declaration.tsv").read_text("utf-8").splitlines()[1:]
    right = [tuple(line.split("\t")) for line in lines]
    assert len(right) == 130 and len({language for language, _ in right}) == 13
    wrong = [(told, text) for told, text in right if language_of("", text[:most_letters]) != (told, "identified")]
    assert len(wrong) <= 1, wrong


def test_the_articles_own_word_comes_first_and_short_strings_are_not_guessed() -> None:
    assert language_of("pt-BR", CAPTION) == ("pt", "declared")
    assert language_of("und", "CT 1.0 Gy x 6") is None
    assert language_of("", "CT 1.0 Gy x 6", "Dosisverteilung des Bestrahlungsplans an der linken Ferse") == (
        "de",
        "identified",
    )


def test_a_short_caption_is_told_by_the_abstract(tmp_path: Path) -> None:
    abstract = "<abstract><p>Untersucht wurde die Bestrahlung der Ferse bei Entzündungen.</p></abstract>"
    data = jats("10.1/a", figure(1, "Plan in axialer Ebene, Ferse"), title="Ferse", language="")
    data = data.replace(b"<kwd-group>", f"{abstract}<kwd-group>".encode())
    (pair,) = Pairs(made(tmp_path, {"a.xml": data, "x-g001.png": picture(1)}, Settings()))
    assert (pair.language, pair.language_source) == ("de", "identified")


def test_a_physicists_own_terms_count(tmp_path: Path) -> None:
    terms = tmp_path / "terms.yaml"
    terms.write_text(
        "threshold: 1\nconcepts:\n  moss: {weight: 2, terms: {en: [moss*, peat bog], de: ['*moos'], zh: [苔藓]}}\n"
    )
    mine = load_terms(terms)
    found = [
        mine.score([text], [])
        for text in ("Of mosses", "A peat-bog", "Torfmoos", "关于苔藓的研究", "peat and bog", "emboss")
    ]
    assert found == [2, 2, 2, 2, 0, 0]
    assert mine.score(["x"], ["moss"]) == 1
    for bad in (
        "threshold: x",
        "concepts: 3\nthreshold: 1",
        "threshold: 1\nconcepts: {a: {weight: 1, terms: {en: ['']}}}",
        "{",
    ):
        terms.write_text(bad)
        with pytest.raises(ConfigError, match="not a term list"):
            load_terms(terms)


# hostile input


def test_hostile_xml_is_a_line_each_and_the_good_article_stays(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    laughs = (
        '<!DOCTYPE article [<!ENTITY a "ha">'
        + "".join(f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(8))
        + "]>"
    )
    bad = {
        "xxe.xml": jats(
            "10.1/x", figure(1, CAPTION + " &xxe;"), head=f'<!DOCTYPE article [<!ENTITY xxe SYSTEM "file://{secret}">]>'
        ),
        "laughs.xml": jats("10.1/l", figure(1, CAPTION + " &i;"), head=laughs),
        "parameter.xml": jats(
            "10.1/p", "", head='<!DOCTYPE article [<!ENTITY % x SYSTEM "http://127.0.0.1:9/x.dtd"> %x;]>'
        ),
        "deep.xml": jats("10.1/d", "<sec>" * 5000 + "</sec>" * 5000),
        "encoding.xml": jats("10.1/e", "ok").replace(b"ok", b"\xff\xfe\x80"),
        "claims.xml": jats("10.1/c", "").replace(b"utf-8", b"utf-99"),
        "cut.xml": jats("10.1/t", figure(1, CAPTION))[:300],
        "empty.xml": b"",
        "binary.xml": bytes(range(256)) * 4,
        "html.xml": b"<html><body/></html>",
        "nobody.xml": b"<article/>",
    }
    dtd = '<!DOCTYPE article PUBLIC "-//NLM//DTD JATS 1.0//EN" "http://127.0.0.1:9/JATS-archivearticle1.dtd">'
    good = {"good.xml": jats("10.1/g", figure(1, CAPTION + " &alpha;"), head=dtd), "x-g001.png": picture(1)}
    path = made(tmp_path, bad | good)
    (pair,) = Pairs(path)
    assert pair.caption == CAPTION + " α"
    lines = {Path(one.where).name: one for one in dropped(path)}
    assert {name for name, one in lines.items() if one.step == "unreadable"} == set(bad) - {"nobody.xml"}
    assert lines["nobody.xml"].step == "licence"
    assert "a secret" not in (path / DROPPED).read_text()


def test_a_doctype_is_never_fetched_and_no_reason_to_refuse() -> None:
    """As nearly every real article has one; with an entity in the text, libxml2 takes another way than without."""
    dtd = '<!DOCTYPE article PUBLIC "-//NLM//DTD JATS 1.0//EN" "http://127.0.0.1:9/JATS-archivearticle1.dtd">'
    for caption in (CAPTION, CAPTION + " &alpha;"):
        (article,) = read_articles(jats("10.1/g", figure(1, caption), head=dtd))
        assert article.figures[0].caption.startswith(CAPTION)


def _zip_bomb(path: Path) -> Path:
    """A zip whose directory promises 100 bytes of XML and holds a gigabyte."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.xml", b" " * (40 << 20))
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02")
    struct.pack_into("<I", data, at + 24, 100)
    path.write_bytes(bytes(data))
    return path


def test_hostile_archives_write_nothing_outside_and_are_a_line_each(tmp_path: Path) -> None:
    box = tmp_path / "in"
    box.mkdir()
    good = {"p/a.xml": jats("10.1/a", figure(1, CAPTION)), "p/x-g001.png": picture(1)}
    zipped(box / "slip.zip", {**good, "../escaped.xml": jats("10.1/s", ""), "/absolute.xml": b"x", "c:\\x.xml": b"x"})
    tarred(
        box / "links.tar.gz",
        {
            "q/b.nxml": jats("10.1/b", figure(1, CAPTION.replace("left", "right"), "y")),
            "../../up.nxml": jats("10.1/u", ""),
            "q/real.png": picture(2),
        },
        {"q/y.png": "/etc/hostname", "q/z.png": "real.png"},
    )
    link = zipfile.ZipInfo("link.xml")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(box / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    _zip_bomb(box / "bomb.zip")
    (box / "damaged.zip").write_bytes(zipped(tmp_path / "d.zip", good).read_bytes()[:-30])
    (box / "damaged.tar.gz").write_bytes(tarred(tmp_path / "d.tgz", {"a.xml": jats("10.1/z", "")}).read_bytes()[:200])
    (box / "no.tar").write_bytes(b"not a tar" * 200)
    (box / "out.xml").symlink_to("/etc/passwd")
    header = tarfile.TarInfo("a.xml")
    header.size = 300 << 20
    (box / "promise.tar").write_bytes(header.tobuf())
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    path = curate([box], tmp_path / "pairs")
    assert [pair.article for pair in Pairs(path)] == ["doi:10.1/a"]
    lines = {one.where.split("/", 1)[1] for one in dropped(path)}
    assert lines >= {
        "slip.zip!../escaped.xml",
        "slip.zip!/absolute.xml",
        "links.tar.gz!../../up.nxml",
        "links.tar.gz!q/y.png",
        "bomb.zip!a.xml",
        "damaged.zip",
        "damaged.tar.gz",
        "no.tar",
        "out.xml",
        "link.zip!link.xml",
    }
    assert any(line.startswith("promise.tar") for line in lines)
    assert {path for path in tmp_path.rglob("*") if path.is_file() and tmp_path / "pairs" not in path.parents} == before


def test_a_tar_that_unpacks_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldrt_edge.train.data import packages

    monkeypatch.setattr(packages, "PACKAGE_LIMIT_BYTES", 1 << 20)
    bomb = tarred(tmp_path / "bomb.tar.gz", {f"{n}.bin": bytes(200_000) for n in range(20)})
    (unit,) = packages.find_units([bomb])
    found = [*packages.open_unit(unit)]  # type: ignore[arg-type]
    assert len(found) == 1 and isinstance(found[0].data, packages.Refused) and "unpacked" in found[0].data.reason


def _sparse(name: str, size: int) -> bytes:
    """An old GNU header of a file that is one hole.

    Source: GNU tar manual, "Storing Sparse Files".
    """
    info = tarfile.TarInfo(name)
    info.type = b"S"
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    header[386:410] = b"%011o\0%011o\0" % (size, 0)
    header[482:495] = b"\0%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_a_sparse_tar_writes_nothing_of_its_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldrt_edge.train.data import packages

    bomb = tmp_path / "sparse.tar"
    bomb.write_bytes(b"".join(_sparse(f"{n}.xml", 30 << 20) for n in range(4)) + bytes(1024))
    path = curate([bomb], tmp_path / "pairs")
    assert [(one.step, one.reason[:13]) for one in dropped(path)] == [("refused", "a sparse file")] * 4
    monkeypatch.setattr(packages, "PACKAGE_LIMIT_BYTES", 1 << 20)
    plain = tmp_path / "plain.tar"
    with tarfile.open(plain, "w") as archive:
        for name in "ab":
            info = tarfile.TarInfo(f"{name}.xml")
            info.size = 700_000
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    (unit,) = packages.find_units([plain])
    reasons = [one.data.reason for one in packages.open_unit(unit) if isinstance(one.data, packages.Refused)]  # type: ignore[arg-type]
    assert any("unpacked" in reason for reason in reasons)


def test_a_zip_is_opened_once_for_all_its_articles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: dict[str, bytes] = {}
    for number in range(30):
        files[f"{number:02d}/a.xml"] = jats(f"10.1/{number}", figure(1, other(number)))
        files[f"{number:02d}/x-g001.png"] = picture(number)
    units = tuple(find_units([zipped(tmp_path / "many.zip", files)]))
    opened: list[object] = []
    plain = zipfile.ZipFile.__init__

    def counted(self: zipfile.ZipFile, file: Any, *args: Any, **named: Any) -> None:
        opened.append(file)
        plain(self, file, *args, **named)

    monkeypatch.setattr(zipfile.ZipFile, "__init__", counted)
    (tmp_path / "images").mkdir()
    for number, some in enumerate((units[:16], units[16:])):
        assert reading.read_chunk(reading.Chunk(number, some, Settings(), tmp_path)) == len(some)
    parts = [reading.part_path(tmp_path, number).read_text().splitlines() for number in (0, 1)]
    assert sum(bool(reading.Told.parse(line).pair) for part in parts for line in part) == 30
    assert opened.count(tmp_path / "many.zip") == 1


def test_a_picture_of_20_000_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    raw = zlib.compress(bytes(1 << 10))
    tags = [
        (256, 4, 1, 20_000),
        (257, 4, 1, 20_000),
        (258, 3, 1, 8),
        (259, 3, 1, 8),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, 20_000),
        (279, 4, 1, len(raw)),
    ]
    tiff = b"II*\0" + struct.pack("<I", 8 + len(raw)) + raw + struct.pack("<H", len(tags))
    tiff += b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    path = made(tmp_path, {"a.xml": jats("10.1/a", figure(1, CAPTION)), "x-g001.tif": tiff})
    (one,) = dropped(path)
    assert one.step == "picture unreadable" and "64 megapixels" in one.reason


def test_a_file_name_that_is_no_text_is_reported_and_read(tmp_path: Path) -> None:
    box = folder(tmp_path / "in", {"x-g001.png": picture(1), "b.xml": b"<"})
    (box / os.fsdecode(b"caf\xe9.xml")).write_bytes(jats("10.1/a", figure(1, CAPTION)))
    (box / "b.xml").rename(box / os.fsdecode(b"d\xe9.xml"))
    path = curate([box], tmp_path / "pairs")
    assert len([*Pairs(path)]) == 1 and [one.step for one in dropped(path)] == ["unreadable"]


def test_a_user_is_told_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        curate([tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(DataError, match="no article"):
        curate([folder(tmp_path / "in", {"a.txt": b""})], tmp_path / "out")
    with pytest.raises(ConfigError, match="--languages"):
        curate([tmp_path], tmp_path / "out", Settings(languages=("english",)))


# scale


def _many(root: Path, count: int) -> Path:
    files: dict[str, bytes] = {}
    for number in range(count):
        caption = f"{CAPTION}, patient {number} of the {chr(97 + number % 26) * 5} group with {number * 7} fractions"
        files[f"{number:03d}/a.xml"] = jats(f"10.1/{number}", figure(1, caption))
        files[f"{number:03d}/x-g001.png"] = picture(number % 40)
    return folder(root, files)


def _bytes(path: Path) -> dict[str, bytes]:
    """All files; the manifest without the commit of the code, which may be edited while a test runs."""
    files = {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    manifest = json.loads(files["manifest.json"])
    del manifest["git_commit"]
    return files | {"manifest.json": json.dumps(manifest, sort_keys=True).encode()}


def test_two_workers_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    source = _many(tmp_path / "in", 50)
    one, two = curate([source], tmp_path / "one"), curate([source], tmp_path / "two", workers=2)
    assert _bytes(one) == _bytes(two)
    assert steps(one)["repeated picture"] == 10 and len([*Pairs(one)]) == 40


@pytest.mark.slow
def test_a_local_ray_writes_the_same_bytes_and_outlives_a_poison_article(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'ldrt-edge[ray]')")
    from ldrt_edge.train.data import curate as stage

    source = _many(tmp_path / "in", 40)
    one, ray = curate([source], tmp_path / "one"), curate([source], tmp_path / "ray", workers=2, ray_address="local")
    assert _bytes(one) == _bytes(ray)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)  # for the workers to find the one that dies
    monkeypatch.setattr(stage, "read_chunk", dying_reader)
    (poison,) = [
        line for line in dropped(curate([source], tmp_path / "poison", ray_address="local")) if not line.article
    ]
    assert poison.where == "in/007/a.xml"
    monkeypatch.setattr(stage, "read_chunk", refusing_reader)
    with pytest.raises(DataError, match=r"^the disk is full$"):
        curate([source], tmp_path / "full", ray_address="local")


def test_a_killed_run_goes_on_without_losing_or_repeating_an_article(tmp_path: Path) -> None:
    source = _many(tmp_path / "in", 100)
    arguments = ["data", "curate", str(source), "--out", str(tmp_path / "out"), "--json"]
    code = (
        "from ldrt_edge.train.data import curate; import articles; curate.read_chunk = articles.killing_reader;"
        f"from ldrt_edge.cli import cli; cli.main({arguments!r})"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
        capture_output=True,
        cwd=tmp_path,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    parts = [*(tmp_path / ".out.partial/work").rglob("*.jsonl")]
    assert len(parts) == 3 and not (tmp_path / "out").exists()
    done = subprocess.run(
        [sys.executable, "-m", "ldrt_edge.cli", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    articles = [pair.article for pair in Pairs(tmp_path / "out")]
    assert json.loads(done.stdout)["metrics"]["articles"] == 100 and len(articles) == len(set(articles)) == 40
    whole = curate([source], tmp_path / "whole", Settings(terms=load_terms()))
    assert _bytes(whole) == _bytes(tmp_path / "out")


def test_an_article_that_kills_its_process_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldrt_edge.train.data import curate as stage

    monkeypatch.setattr(stage, "read_chunk", dying_reader)
    path = curate([_many(tmp_path / "in", 20)], tmp_path / "out")
    (one,) = dropped(path)
    assert one.step == "unreadable" and one.where == "in/007/a.xml"
    assert {pair.article for pair in Pairs(path)} == {f"doi:10.1/{n}" for n in range(20) if n != 7}


def test_processes_that_die_on_every_article_are_not_the_articles_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldrt_edge.train.data import curate as stage

    monkeypatch.setattr(stage, "read_chunk", always_dying_reader)
    with pytest.raises(DataError, match="die on every article"):
        curate([_many(tmp_path / "in", 3)], tmp_path / "out")


def test_an_error_in_one_article_of_a_tar_costs_only_that_article(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(data: bytes) -> object:
        if b"10.1/b" in data:
            raise RecursionError("too deep")
        return read_articles(data)

    monkeypatch.setattr(reading, "read_articles", failing)
    files = {f"{name}.xml": jats(f"10.1/{name}", figure(1, f"{CAPTION} {name}", name)) for name in "abc"}
    path = tarred(tmp_path / "t.tar.gz", files | {f"{name}.png": picture(ord(name)) for name in "abc"})
    (tmp_path / "images").mkdir()
    chunk = reading.Chunk(0, tuple(find_units([path])), Settings(), tmp_path)
    assert reading.read_chunk(chunk) == 3
    told = [reading.Told.parse(line) for line in reading.part_path(tmp_path, 0).read_text().splitlines()]
    assert [one.pair.article for one in told if one.pair] == ["doi:10.1/a", "doi:10.1/c"]
    assert [one.dropped.reason for one in told if one.dropped] == ["RecursionError: too deep"]


@pytest.mark.parametrize(
    "error", [MemoryError(), *(OSError(number, os.strerror(number)) for number in (28, 122, 5, 24, 23, 30))]
)
def test_what_the_machine_lacks_is_not_the_articles_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """No room, no memory, no more open files, a broken disk: no part, so that the next run has the article."""

    def failing(*_: object) -> object:
        raise error

    source = folder(tmp_path / "in", {"a.xml": jats("10.1/a", figure(1, CAPTION)), "x-g001.png": picture(1)})
    (tmp_path / "images").mkdir()
    chunk = reading.Chunk(0, tuple(find_units([source])), Settings(), tmp_path)
    for name in ("_store", "read_articles"):
        with monkeypatch.context() as patched:
            patched.setattr(reading, name, failing)
            with pytest.raises(Halted, match=r"in/a.xml: .* while it was read"):
                reading.read_chunk(chunk)
        assert not reading.part_path(tmp_path, 0).exists()
    assert reading.read_chunk(chunk) == 1 and reading.part_path(tmp_path, 0).exists()


def test_pairs_are_read_back_as_written(tmp_path: Path) -> None:
    path = made(tmp_path, {"a.xml": jats("10.1/a", figure(1, CAPTION)), "x-g001.png": picture(1)})
    (pair,) = Pairs(path)
    assert isinstance(pair, Pair) and Pairs(path).image_path(pair).is_file()
    with (path / "pairs.jsonl").open("r+") as stream:
        stream.write("[")
    with pytest.raises(DataError, match="line 1 is not a pair"):
        [*Pairs(path)]


def test_relevance_on_the_hand_checked_sample() -> None:
    """84 MEDLINE records by title and keywords, most of them near misses; the list was tuned on it once."""
    counts = _relevance("relevance_sample.tsv")
    assert counts.total() == 84 and counts[True, True] + counts[False, True] == 16
    assert counts[True, True] >= 12 and counts[True, False] <= 3


def test_relevance_on_what_it_was_not_tuned_on() -> None:
    """All other records on radiotherapy but not on tumours of the same 50,788, hand-checked afterwards."""
    counts = _relevance("relevance_held_out.tsv")
    assert counts.total() == 130 and counts[True, True] + counts[False, True] == 3
    assert counts[True, True] >= 1 and counts[True, False] == 0


def _relevance(sample: str) -> Counter[tuple[bool, bool]]:
    """How many records of a sample are (found, relevant)."""
    with (Path(__file__).with_name(sample)).open(encoding="utf-8", newline="") as stream:
        rows = [*csv.DictReader(stream, delimiter="\t")]
    terms = load_terms()
    scores = [terms.score([row["title"], row["original_title"], row["keywords"]], []) for row in rows]
    return Counter((score >= terms.threshold, row["relevant"] == "1") for score, row in zip(scores, rows, strict=True))


# PDFs


def _pdf(path: Path, figures: bool = True, licence: str = "https://creativecommons.org/licenses/by/4.0/") -> Path:
    """A page as journals lay it out: two columns, text, two pictures with captions, the second over two lines."""
    from matplotlib.figure import Figure as Page

    page = Page(figsize=(8.27, 11.69))
    page.text(0.1, 0.95, "Low-dose radiotherapy of plantar fasciitis. https://doi.org/10.1234/pdf.1")
    page.text(0.1, 0.92, f"Distributed under the Creative Commons licence {licence}", fontsize=7)
    page.text(
        0.55, 0.4, "A column of text that has nothing to do with the figures,\nas articles are made of.", fontsize=8
    )
    for number, (left, bottom) in enumerate(((0.1, 0.6), (0.55, 0.6)) if figures else ()):
        axes = page.add_axes((left, bottom, 0.35, 0.25))
        axes.imshow(np.asarray(Image.open(io.BytesIO(picture(number)))), interpolation="none", aspect="auto")
        axes.set_axis_off()
    if figures:
        page.text(0.1, 0.58, "Figure 1. Dose distribution over the left heel in colour wash", fontsize=7)
        page.text(0.55, 0.58, "Fig. 2: Dose volume histogram of the right heel and of", fontsize=7)
        page.text(0.55, 0.57, "the bone around it, after six fractions", fontsize=7)
    page.savefig(path, metadata={"Title": "Low-dose radiotherapy of heels", "Keywords": "radiotherapy, heel"})
    return path


def test_a_pdf_gives_its_pictures_with_the_captions_of_its_layout(tmp_path: Path) -> None:
    box = folder(tmp_path / "in", {})
    box.mkdir()
    path = curate([_pdf(tmp_path / "article.pdf")], tmp_path / "pairs", Settings(terms=load_terms()))
    first, second = Pairs(path)
    assert first.caption == "Dose distribution over the left heel in colour wash"
    assert second.caption == "Dose volume histogram of the right heel and of the bone around it, after six fractions"
    assert (first.doi, first.licence, first.title) == ("10.1234/pdf.1", "CC-BY-4.0", "Low-dose radiotherapy of heels")
    assert (first.language, first.language_source) == ("en", "identified")
    for number, pair in enumerate((first, second)):
        with Image.open(path / pair.image) as image:
            shown = np.asarray(image.convert("RGB").resize((64, 48))).astype(int)
        drawn = np.asarray(Image.open(io.BytesIO(picture(number))).resize((64, 48))).astype(int)
        assert np.abs(shown - drawn).mean() < 12, "the picture over the caption, and nothing else"


Item = tuple[float, float, str] | tuple[float, float, float, float, int]


def _laid_out(items: Sequence[Item]) -> bytes:
    """A page of texts (left, bottom, text) and pictures (left, bottom, width, height, seed), in parts of the page."""
    from matplotlib.figure import Figure as Page

    page = Page(figsize=(8.27, 11.69))
    for item in items:
        if len(item) == 3:
            page.text(*item, fontsize=8)
        else:
            axes = page.add_axes(item[:4])
            axes.imshow(np.asarray(Image.open(io.BytesIO(picture(item[4])))), interpolation="none", aspect="auto")
            axes.set_axis_off()
    stream = io.BytesIO()
    page.savefig(stream, format="pdf")
    return stream.getvalue()


def _shows(png: bytes) -> int | None:
    """Which of the drawings a picture shows, and nothing else."""
    shown = np.asarray(Image.open(io.BytesIO(png)).convert("RGB").resize((64, 48))).astype(int)
    for seed in range(6):
        drawn = np.asarray(Image.open(io.BytesIO(picture(seed))).resize((64, 48))).astype(int)
        if np.abs(shown - drawn).mean() < 12:
            return seed
    return None


ONE, TWO, THREE = "Figure 1. Dose in the left heel", "Figure 2. Pain of the right shoulder", "Figure 3. A knee"


@pytest.mark.parametrize(
    ("items", "found"),
    [
        pytest.param(
            [(0.1, 0.66, 0.6, 0.25, 0), (0.1, 0.64, ONE), (0.1, 0.36, 0.6, 0.25, 1), (0.1, 0.34, TWO)],
            {"Figure 1": 0, "Figure 2": 1},
            id="captions under stacked pictures",
        ),
        pytest.param(
            [
                (0.1, 0.93, ONE), (0.1, 0.66, 0.6, 0.25, 0),
                (0.1, 0.63, TWO), (0.1, 0.36, 0.6, 0.25, 1),
                (0.1, 0.33, THREE), (0.1, 0.06, 0.6, 0.25, 2),
            ],
            {"Figure 1": 0, "Figure 2": 1, "Figure 3": 2},
            id="captions over stacked pictures",
        ),
        pytest.param(
            [(0.06, 0.6, 0.42, 0.3, 0), (0.52, 0.6, 0.42, 0.3, 1), (0.06, 0.58, ONE), (0.52, 0.58, TWO)],
            {"Figure 1": 0, "Figure 2": 1},
            id="two columns, 24 points apart",
        ),
        pytest.param(
            [(0.1, 0.6, 0.3, 0.3, 0), (0.1, 0.58, ONE), (0.1, 0.56, TWO), (0.1, 0.2, 0.3, 0.3, 1), (0.1, 0.18, THREE)],
            {"Figure 1": 0, "Figure 2": None, "Figure 3": 1},
            id="a caption of what is no picture",
        ),
        pytest.param(
            [
                (0.1, 0.95, "Fig. 1 and Fig. 2 show how the pain of the patients fell, while"),
                (0.1, 0.6, 0.4, 0.3, 0), (0.1, 0.58, ONE),
                (0.1, 0.55, "Figure 2 shows that pain fell in most of the patients; it is told in"),
                (0.1, 0.54, "Fig. 3. The others are not shown."),
                (0.1, 0.52, "Fig. 1) shows more, and Fig. 4–6 and Fig. 1, 2 as well."),
            ],
            {"Figure 1": 0},
            id="sentences about figures",
        ),
        pytest.param(
            [
                (0.1, 0.7, 0.4, 0.2, 0), (0.1, 0.68, "Figura 1 – Dose no calcanhar"),
                (0.1, 0.4, 0.4, 0.2, 1), (0.1, 0.38, "Figure S1. Dose in the left heel"),
                (0.1, 0.1, 0.4, 0.2, 2), (0.1, 0.08, "Fig. 2 a Left heel. b Right heel"),
            ],
            {"Figura 1": 0, "Figure S1": 1, "Fig. 2": 2},
            id="labels of all kinds",
        ),
    ],
)
def test_each_picture_of_a_pdf_goes_to_its_own_caption(items: list[Item], found: dict[str, int | None]) -> None:
    from ldrt_edge.train.data.pdfs import read_pdf

    paper = read_pdf(_laid_out(items))
    for one in paper.article.figures:
        assert (_shows(paper.files[one.pictures[0][0]]) if one.pictures else None) == found[one.label]
    assert [one.label for one in paper.article.figures] == [*found]


@pytest.mark.parametrize(
    ("said", "doi", "licence"),
    [
        (["An article of its own.", "References: 1. Smith, The heel. https://doi.org/10.1000/smith.1"], "", "unknown"),
        (["doi:10.1000/own.1", "This article is under CC BY 4.0", "References", "10.1000/smith.1"], "10.1000/own.1",
         "CC-BY-4.0"),
        (["10.1000/own.1 comments on 10.1000/other.7", "Open access under the CC BY NC ND license"], "", "CC-BY-NC-ND"),
        (["© 2019 Elsevier. All rights reserved.", "Images from TCIA are available under CC BY 3.0."], "", "unknown"),
        (["This article is of 2019.", "The data set of the phantom is distributed under CC BY 3.0."], "", "unknown"),
    ],
)  # fmt: skip
def test_a_pdf_is_asked_for_its_own_doi_and_licence(said: list[str], doi: str, licence: str) -> None:
    from ldrt_edge.train.data.pdfs import read_pdf

    article = read_pdf(_laid_out([(0.1, 0.95 - 0.05 * n, line) for n, line in enumerate(said)])).article
    assert (article.doi, article.licence) == (doi, licence)


def test_scans_locked_and_damaged_pdfs_are_reported_and_left(tmp_path: Path) -> None:
    box = tmp_path / "in"
    box.mkdir()
    scans = [Image.open(io.BytesIO(picture(n, (600, 800)))) for n in range(2)]
    scans[0].save(box / "scan.pdf", save_all=True, append_images=scans[1:])
    data = _pdf(tmp_path / "good.pdf").read_bytes()
    (box / "cut.pdf").write_bytes(data[: len(data) // 3])
    (box / "text.pdf").write_bytes(b"%PDF-1.7\nnothing else")
    _pdf(box / "closed.pdf", licence="All rights reserved")
    folder(box / "beside", {"a.xml": jats("10.1/a", figure(1, CAPTION)), "x-g001.png": picture(1), "a.pdf": data})
    path = curate([box], tmp_path / "pairs", Settings(terms=load_terms()))
    assert [pair.article for pair in Pairs(path)] == ["doi:10.1/a"], "a PDF beside its XML is not read twice"
    told = {one.where: (one.step, one.reason) for one in dropped(path)}
    assert told["in/scan.pdf"] == ("unreadable", "a scan without text: 2 pages")
    assert told["in/cut.pdf"][0] == told["in/text.pdf"][0] == "unreadable"
    assert told["in/closed.pdf"] == ("licence", "unknown")


def test_the_print_of_a_real_article_gives_its_figures(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("the real packages are not beside this checkout (shared/data/articles)")
    from ldrt_edge.train.data.pdfs import read_pdf

    with zipfile.ZipFile(SHARED / "scielo-bjmbr-54-e11439.zip") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".pdf")]
        paper = read_pdf(archive.read(name))
    assert paper.article.doi == "10.1590/1414-431x2021e11439" and paper.scanned == ()
    assert [figure.label for figure in paper.article.figures] == ["Figure 1", "Figure 2"]
    assert paper.article.figures[0].caption.startswith("Bioinformatics data of cathepsin Z (CTSZ) expression.")
    first, second = paper.article.figures
    assert all(len(figure.pictures) == 1 for figure in (first, second))
    for printed, letters in ((first, "ABC"), (second, "AB")):
        parts = caption_parts(printed.caption)
        assert "".join(part.letter for part in parts) == letters
        rgb = np.asarray(Image.open(io.BytesIO(paper.files[printed.pictures[0][0]])).convert("RGB"))
        assert len(panel_boxes(rgb, len(parts))) == len(letters)
