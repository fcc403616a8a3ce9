"""How fast articles are read, beside pubmed_parser's captions of the same files.

    python -m ldrt_edge.bench.curation JATS... --out OUT --articles 5000 --workers 1,2

Real articles are re-identified (a DOI of its own for each copy) to make up the number. There are no pictures beside
them, so both programs read XML and nothing else; ours also licence, languages, mentions, relevance and a report of
what was dropped, and writes its artefact. Each run is a process of its own, the programs take turns, and the medians of
wall and processor time stand beside the load. pubmed_parser is measured where it can be imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from ldrt_edge.errors import DataError
from ldrt_edge.options import PATH

PAPER_ARTICLES, PMC_ARTICLES = 42_673, 6_000_000
_OURS = (
    "import sys; from pathlib import Path; from ldrt_edge.train.data.curate import curate;"
    "from ldrt_edge.train.data.filters import Settings; from ldrt_edge.train.data.relevance import load_terms;"
    "import dataclasses;"
    "terms = dataclasses.replace(load_terms(), threshold=-99.0);"
    "kinds = ('CC0-1.0', 'public-domain', 'CC-BY', 'CC-BY-NC', 'unknown');"
    "curate([Path(sys.argv[1])], Path(sys.argv[2]), Settings(licences=kinds, terms=terms), int(sys.argv[3]),"
    " sys.argv[4] or None)"
)
_THEIRS = (
    "import sys, pathlib, pubmed_parser;"
    "[pubmed_parser.parse_pubmed_caption(str(path)) for path in sorted(pathlib.Path(sys.argv[1]).rglob('*.nxml'))]"
)


@dataclass(frozen=True)
class Speed:
    """One program on all articles: medians over the repeats; load is the one-minute average before each run."""

    program: str
    articles: int
    wall_s: float
    processor_s: float
    articles_per_s: float
    articles_per_processor_s: float
    hours_for_paper: float
    hours_for_pmc: float
    load: tuple[float, ...]


def measure(
    jats: Sequence[Path], out: Path, articles: int, workers: Sequence[int], repeats: int, ray: bool
) -> list[Speed]:
    """Run all programs in turn, `repeats` times.

    Raises:
        DataError: no JATS files.
    """
    folder = out / f"articles-{articles}"
    if not folder.is_dir():
        reidentify(jats, folder, articles)
    commands = {f"ours, {count} worker{'s' * (count > 1)}": [_OURS, str(count), ""] for count in workers}
    if ray:
        commands[f"ours, Ray, {max(workers)} at once"] = [_OURS, str(max(workers)), "local"]
    if importlib.util.find_spec("pubmed_parser"):
        commands["pubmed_parser, captions"] = [_THEIRS]
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    for repeat in range(repeats):
        for name, (code, *options) in commands.items():
            runs[name].append(_run(code, [str(folder), str(out / "pairs"), *options]))
            print(f"{repeat + 1}: {name}: {runs[name][-1][0]:.1f} s", file=sys.stderr)
    return [_speed(name, articles, measured) for name, measured in runs.items()]


def reidentify(jats: Sequence[Path], folder: Path, articles: int) -> None:
    """Copies of real articles in turn, each with a DOI of its own, a hundred to a folder."""
    texts = [path.read_bytes() for path in jats]
    if not texts:
        raise DataError("which articles? name some JATS files")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for number in range(articles):
        path = partial / f"{number // 100:04d}" / f"{number:06d}.nxml"
        path.parent.mkdir(parents=True, exist_ok=True)
        own = b'\\g<1>10.0000/copy.%d\\g<2>' % number
        path.write_bytes(re.sub(rb'(pub-id-type="doi">)[^<]*(</article-id>)', own, texts[number % len(texts)], count=1))
    partial.rename(folder)


def _run(code: str, arguments: Sequence[str]) -> tuple[float, float, float]:
    """Wall seconds, processor seconds of the process and its children, and the load before."""
    shutil.rmtree(arguments[1], ignore_errors=True)
    load = os.getloadavg()[0]
    started, before = time.monotonic(), os.times()
    subprocess.run([sys.executable, "-P", "-c", code, *arguments], check=True, stderr=subprocess.DEVNULL)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - started, used, load


def _speed(name: str, articles: int, runs: Sequence[tuple[float, float, float]]) -> Speed:
    wall, used = (statistics.median(run[part] for run in runs) for part in (0, 1))
    return Speed(
        name, articles, round(wall, 1), round(used, 1), round(articles / wall, 1), round(articles / used, 1),
        round(PAPER_ARTICLES / articles * wall / 3600, 2), round(PMC_ARTICLES / articles * wall / 3600, 1),
        tuple(round(run[2], 1) for run in runs),
    )


@click.command()
@click.argument("jats", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, required=True)
@click.option("--articles", default=5000, show_default=True)
@click.option("--workers", default="1,2", show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--ray", is_flag=True, help="Also a local Ray.")
def main(jats: tuple[Path, ...], out: Path, articles: int, workers: str, repeats: int, ray: bool) -> None:
    """Articles a second, ours and pubmed_parser's; a table, and one line of JSON."""
    counts = [int(count) for count in workers.split(",")]
    speeds = measure(jats, out, articles, counts, repeats, ray)
    for speed in speeds:
        rates = f"{speed.articles_per_s:7.1f}/s {speed.articles_per_processor_s:7.1f}/processor s"
        hours = f"{speed.hours_for_paper:5.2f} h {speed.hours_for_pmc:5.0f} h"
        click.echo(f"{speed.program:<26} {speed.wall_s:8.1f} s {rates} {hours}")
    click.echo(json.dumps([asdict(speed) for speed in speeds]))


if __name__ == "__main__":
    main()
