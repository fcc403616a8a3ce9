"""`data curate`: articles to pairs of a picture and its caption, each with a licence and an origin.

Units are read in chunks of a fixed size by any number of workers; each chunk leaves one part file, so the same command
goes on where a killed run stopped. The parts are then put together in order: repeated articles and pictures are
dropped, articles that share something become one cluster. The result does not depend on who read what.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ldrt_edge import artifact, console
from ldrt_edge.artifact import Json
from ldrt_edge.errors import ConfigError, DataError
from ldrt_edge.train.data.duplicates import Clusters, Index, Marks, Seen
from ldrt_edge.train.data.filters import ARTICLE_STEPS, Settings, funnel
from ldrt_edge.train.data.funnel import write_funnel
from ldrt_edge.train.data.packages import Refused, Unit, find_units
from ldrt_edge.train.data.pairs import DROPPED, IMAGES, PAIRS, Dropped, Pair, pair_line, parse_pair
from ldrt_edge.train.data.reading import WORK, Chunk, Told, part_path, read_chunk
from ldrt_edge.train.data.workers import run_all

UNITS_A_CHUNK = 16
_ROWS, _INDEX = ".rows.jsonl", ".index.sqlite"


def curate(
    articles: Sequence[Path], out: Path, settings: Settings | None = None, workers: int = 1,
    ray_address: str | None = None, strikes: Mapping[str, str] | None = None,
) -> Path:
    """Make a pairs artefact from articles: folders, zips, tars, JATS files, PDFs.

    Args:
        articles: read in this order; of two copies the first that has pictures stays.
        out: the artefact.
        settings: what is kept.
        workers: processes; with Ray, tasks at once.
        ray_address: of a Ray cluster that sees the same folders; "local" starts one here.
        strikes: pairs that a person struck, by id, with the reason.

    Raises:
        DataError: a path that is no article or package, or nothing to read.
        Halted: the machine failed while a document was read; the same command goes on.
        ConfigError: a setting out of range.
    """
    settings = settings or Settings()
    settings.check()
    if workers < 1:
        raise ConfigError(f"--workers {workers}: at least 1")
    strikes = dict(sorted((strikes or {}).items()))
    digest, count = _sources(articles)
    if not count:
        raise DataError(f"{', '.join(map(str, articles))}: no article, package or PDF in there")
    config: dict[str, Json] = {
        "stage": "curate", "sources_sha256": digest, "units": count, "strikes": strikes, **settings.config(),
    }
    with artifact.create(out, "pairs", config, resumable=True) as draft:
        if draft.complete:
            return out
        (draft.path / IMAGES).mkdir(exist_ok=True)
        _read(articles, count, draft.path, settings, workers, ray_address)
        counts, languages, licences = _assemble(draft.path, -(-count // UNITS_A_CHUNK), strikes)
        write_funnel(funnel(counts), draft.path)
        shutil.rmtree(draft.path / WORK)
        draft.metrics.update(
            articles=counts["articles"], pairs=counts["kept"], funnel=[list(step) for step in funnel(counts)],
            pairs_by_language=dict(sorted(languages.items())), pairs_by_licence=dict(sorted(licences.items())),
            clusters=counts["clusters"],
        )
    return out


def read_strikes(path: Path) -> dict[str, str]:
    """The pairs that a person struck in `data view`: a JSON object a line with `id` and `reason`.

    Raises:
        DataError: no such file, or not a list of strikes.
    """
    strikes: dict[str, str] = {}
    number = 0
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):
            number += 1
            if line.strip():
                data = json.loads(line)
                if data.get("struck", True):
                    strikes[str(data["id"])] = as_text(str(data.get("reason", "")))
                else:
                    strikes.pop(str(data["id"]), None)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: line {number} is not a strike ({error})") from error
    return strikes


def as_text(said: str) -> str:
    """What of a text can be written as UTF-8: half a character, as JSON may hold, becomes a question mark."""
    return said.encode("utf-8", "replace").decode()


def _sources(articles: Sequence[Path]) -> tuple[str, int]:
    """What identifies the input without reading it all: names and sizes; and how many units there are."""
    digest, count = hashlib.sha256(), 0
    for unit in find_units(articles):
        size = Path(unit.path).stat().st_size if isinstance(unit, Unit) else 0
        digest.update(f"{unit.where}\0{size}\n".encode(errors="backslashreplace"))
        count += 1
    return digest.hexdigest(), count


def _read(
    articles: Sequence[Path], count: int, folder: Path, settings: Settings, workers: int, ray_address: str | None
) -> None:
    """Every chunk that has no part yet; one whose process died is read again unit by unit."""
    with console.bar("reading articles", count) as bar:

        def waiting() -> Iterator[Chunk]:
            for number, units in enumerate(_chunks(articles)):
                if part_path(folder, number).exists():
                    bar.advance(len(units))
                else:
                    yield Chunk(number, units, settings, folder)

        for chunk, documents in run_all(waiting(), read_chunk, workers, ray_address):
            if documents is None:
                _read_around(chunk, ray_address)
            bar.advance(len(chunk.units))


def _chunks(articles: Sequence[Path]) -> Iterator[tuple[Unit | Refused, ...]]:
    units = find_units(articles)
    while chunk := tuple(islice(units, UNITS_A_CHUNK)):
        yield chunk


def _read_around(chunk: Chunk, ray_address: str | None) -> None:
    """Find the units that end a process, one by one in scratch parts, then read the chunk without them."""
    scratch = chunk.folder / WORK / "alone"
    tasks = [replace(chunk, number=at, units=(unit,), folder=scratch) for at, unit in enumerate(chunk.units)]
    (scratch / IMAGES).mkdir(parents=True, exist_ok=True)
    fatal = {task.units[0].where for task, result in run_all(tasks, read_chunk, 1, ray_address) if result is None}
    shutil.rmtree(scratch)
    if len(fatal) == len(tasks) > 1:
        raise DataError(f"the processes that read {chunk.units[0].where} die on every article: is there enough memory?")
    for where in sorted(fatal):
        console.say(f"{where}: reading it ended the process, or took too long; left out")
    again = replace(chunk, given_up=frozenset(fatal))
    for _, result in run_all([again], read_chunk, 1, ray_address):
        if result is None:
            raise DataError(f"the process that reads {chunk.units[0].where} keeps dying: is there enough memory?")


def _assemble(
    folder: Path, parts: int, strikes: Mapping[str, str]
) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Parts in order to `pairs.jsonl` and `dropped.jsonl`; counts by step, by language, by licence."""
    counts, languages, licences, clusters = Counter[str](), Counter[str](), Counter[str](), Clusters()
    with Index(folder / _INDEX) as index:
        dropped = (folder / DROPPED).open("w", encoding="utf-8")
        with (folder / _ROWS).open("w", encoding="utf-8") as rows, dropped as drops:
            for kept in _sifted(_told(folder, parts), index, clusters, strikes):
                if isinstance(kept, Pair):
                    counts["kept"] += 1
                    counts["candidates"] += 1
                    languages[kept.language] += 1
                    licences[kept.licence] += 1
                    index.keep_image(kept.image)
                    rows.write(pair_line(kept))
                elif isinstance(kept, Dropped):
                    counts[kept.step] += 1
                    counts["articles" if kept.step in ARTICLE_STEPS else "candidates"] += 1
                    drops.write(pair_line(kept))
                else:
                    counts["articles"] += 1
        with (folder / PAIRS).open("w", encoding="utf-8") as final, (folder / _ROWS).open(encoding="utf-8") as rows:
            for line in rows:
                pair = parse_pair(line, _ROWS)
                pair = replace(pair, cluster=clusters.of(pair.article))
                counts["clusters"] += index.is_new(f"cluster {pair.cluster}")
                final.write(pair_line(pair))
        (folder / _ROWS).unlink()
        for path in (folder / IMAGES).iterdir():
            if not index.is_kept(f"{IMAGES}/{path.name}"):
                path.unlink()
    return counts, languages, licences


def _told(folder: Path, parts: int) -> Iterator[Told]:
    for number in range(parts):
        with part_path(folder, number).open(encoding="utf-8") as stream:
            yield from map(Told.parse, stream)


def _sifted(
    told: Iterator[Told], index: Index, clusters: Clusters, strikes: Mapping[str, str]
) -> Iterator[Pair | Dropped | None]:
    """What stays and what is dropped for something that came before; None stands for an article that stays."""
    for copy in _copies(told):
        first = copy[0]
        if first.article is not None:
            new, shows = index.is_new(first.article), any(one.pair is not None for one in copy)
            if shows and index.is_new(f"with pictures {first.article}"):
                earlier = f"a copy without pictures, before {first.where}"
                yield None if new else Dropped("repeated article", "", first.article, "", earlier)
            elif new:
                yield None
            else:
                yield Dropped("repeated article", first.where or "", first.article, "", "")
                continue
        for one in copy:
            if one.dropped is not None:
                yield one.dropped
            elif one.pair is not None and one.marks is not None:
                yield _judged(one.pair, one.marks, index, clusters, strikes)


def _copies(told: Iterator[Told]) -> Iterator[list[Told]]:
    """Each copy of an article with all that was read from it; what is of no article comes alone."""
    copy: list[Told] = []
    for one in told:
        if copy and (one.article is not None or (one.dropped is not None and not one.dropped.figure)):
            yield copy
            copy = []
        copy.append(one)
    if copy:
        yield copy


def _judged(
    pair: Pair, marks: Marks, index: Index, clusters: Clusters, strikes: Mapping[str, str]
) -> Pair | Dropped:
    """A pair, or why it goes. A struck one stays in the index: what is like it goes with it."""
    where = f"{pair.figure} {pair.part}".strip()
    hits = index.add(Seen(pair.id, pair.article, pair.figure, pair.language, pair.image_sha256, marks))
    for hit in hits:
        clusters.link(pair.article, hit.article)
    if pair.id in strikes:
        return Dropped("struck", "", pair.article, where, strikes[pair.id])
    if hits and hits[0].step is not None:
        step = "struck" if hits[0].id in strikes else hits[0].step
        return Dropped(step, "", pair.article, where, f"like {hits[0].id}")
    return pair
