"""Features of the frozen vision tower, computed once per picture and kept on disk.

The tower does not change in training, so its output is a function of picture, tower and picture preparation: the key
of the cache. One memory-mapped file a picture, shared between runs, under `~/.cache/ldrt-edge/features`, bounded: what
was not used for longest goes first, and nothing that a run under way reads. What it reads is listed in a file that it
holds locked, so that the list ends with the run, however that ends; so does what it has not finished writing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ldrt_edge import console
from ldrt_edge.errors import DataError
from ldrt_edge.front import Front
from ldrt_edge.image import read_image
from ldrt_edge.runtimes.hf import normalise, tower_features
from ldrt_edge.tiles import packing_layout
from ldrt_edge.train import devices
from ldrt_edge.train.collate import Collator, Example, PackedRow, sequences

_READS = ".read-by-"
"""How the files begin that say what a run reads: a path a line, from the cache's folder on, and its bytes at most."""
_DRAFTS, _HELD = ".draft-", ".held"
"""How the folders begin that a process writes in, and the file there that it holds locked."""


class PackedDataset(torch.utils.data.Dataset[Example]):
    """Packed rows as examples; pictures are read, or their features mapped, when an example is asked for."""

    def __init__(self, rows: Sequence[PackedRow], front: Front, store: FeatureStore | None) -> None:
        self._rows, self._front, self._store = rows, front, store

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        image_token = self._front.config.image_token_id
        if self._store is not None:
            features, size = self._store.get(row.image_sha256)
            layout = packing_layout(self._front.config, size)
            laid = sequences(row, image_token, len(layout))
            return Example(laid, layout, len(features), features, None, row.row_ids)
        image = self._front.image(read_image(row.image).rgb)
        patches = len(image.tiles) * (self._front.config.image_size // self._front.config.patch_size) ** 2
        laid = sequences(row, image_token, image.token_count)
        return Example(laid, image.layout, patches, None, image.tiles, row.row_ids)

    def lengths(self) -> list[int]:
        """Tokens of each row, its picture's counted where pictures differ and their features are at hand."""
        config = self._front.config
        differ = self._store is not None and config.fit == "tiles"
        tokens = [self._tokens(row) if differ else 1 for row in self._rows]
        laid = (sequences(row, config.image_token_id, n) for row, n in zip(self._rows, tokens, strict=True))
        return [len(row.ids) for row in laid]

    def _tokens(self, row: PackedRow) -> int:
        assert self._store is not None
        return len(packing_layout(self._front.config, self._store.get(row.image_sha256)[1]))


class FeatureStore:
    """The tower's features of pictures, on disk.

    exact: keep float32, for training in it; else float16, which holds more digits than bf16 reads.
    limit_bytes: of all towers' features together; the least recently used go first.
    """

    def __init__(
        self, model: Any, front: Front, exact: bool, limit_bytes: int, folder: Path | None = None
    ) -> None:
        self._front, self._width = front, int(model.config.vision_config.hidden_size)
        self._dtype = torch.float32 if exact else torch.float16
        self._root, self._limit_bytes = folder or cache_folder(), limit_bytes
        self._folder = self._root / f"{_key(model, front)}-{str(self._dtype).rpartition('.')[2]}"
        self._list: Path | None = None

    def fill(
        self, model: Any, rows: Sequence[PackedRow], batch: int = 8, share: tuple[int, int] = (0, 1)
    ) -> None:
        """Compute what is missing for these rows' pictures, and wait until all devices have.

        No run drops them while this store is there, or until it is filled again.

        model: not kept, since the store goes to the processes that read batches ahead.
        share: (this device, of how many). Which pictures are whose does not depend on what is there already, since the
            others are writing.

        Raises:
            DataError: they do not fit into the cache's limit, or not on the disk; on the first device.
        """
        wanted = {row.image_sha256: row.image for row in rows}
        self._folder.mkdir(parents=True, exist_ok=True)
        if share[0] == 0:
            self._make_room(wanted.keys())
        devices.state().wait_for_everyone()
        mine = sorted(wanted.items())[share[0] :: share[1]]
        items = [(digest, path) for digest, path in mine if not self.has(digest)]
        if items:
            self._compute(model, items, batch)
        devices.state().wait_for_everyone()

    def _compute(self, model: Any, items: Sequence[tuple[str, Path]], batch: int) -> None:
        with console.bar("vision tower", len(items)) as shown, draft_folder(self._root) as drafts:
            for start in range(0, len(items), batch):
                chunk = items[start : start + batch]
                images = [self._front.image(read_image(path).rgb) for _, path in chunk]
                tiles = torch.from_numpy(np.concatenate([image.tiles for image in images]))
                parts = compute_features(model, self._front, tiles).cpu().split([len(image.tiles) for image in images])
                for (digest, _), image, part in zip(chunk, images, parts, strict=True):
                    features = part.flatten(0, 1).to(self._dtype).contiguous()
                    size = f"{image.size[0]} {image.size[1]}"
                    save_file({"features": features}, drafts / digest, metadata={"size": size})
                    (drafts / digest).rename(self._path(digest))
                shown.advance(len(chunk))

    def has(self, digest: str) -> bool:
        """Whether a picture's features are kept."""
        return self._path(digest).exists()

    def get(self, digest: str) -> tuple[torch.Tensor, tuple[int, int]]:
        """Features (tiles * patches, width) of a picture, mapped from the disk, and its (height, width) in pixels.

        Raises:
            DataError: they are gone.
        """
        try:
            with safe_open(self._path(digest), framework="pt") as file:
                height, width = (int(side) for side in file.metadata()["size"].split())
                return file.get_tensor("features"), (height, width)
        except FileNotFoundError as error:
            raise DataError(
                f"{self._path(digest)}: a picture's features, which this run needs, were removed: give the same "
                "command again, which computes them and goes on from the last checkpoint"
            ) from error

    def statistics(self, rows: Sequence[PackedRow], most: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of every feature channel, (width,) each, over up to `most` pictures."""
        digests = sorted({row.image_sha256 for row in rows})[:most]
        stacked = torch.cat([self.get(digest)[0] for digest in digests]).float()
        return stacked.mean(0), stacked.std(0)

    def _path(self, digest: str) -> Path:
        return self._folder / f"{digest}.safetensors"

    def _make_room(self, wanted: Collection[str]) -> None:
        """Drop what must go for what is missing to fit, and keep others from dropping what this run wants."""
        with _one_at_a_time(self._root):
            _drop_drafts(self._root)
            for path in self.to_drop(wanted):
                path.unlink(missing_ok=True)
            kept = [self._path(digest) for digest in wanted]
            for path in kept:
                with suppress(FileNotFoundError):
                    os.utime(path)
            for listed, reads in self._other_lists():
                if reads is None:
                    with suppress(OSError):
                        listed.unlink()
            if self._list is None:
                self._list = self._root / f"{_READS}{uuid4().hex}"
                file = os.open(self._list, os.O_RDWR | os.O_CREAT, 0o666)
                weakref.finalize(self, os.close, file)
                _lock(file, wait=True)  # a plan may be looking whether it is locked
            most = self._most_bytes()
            self._list.write_text("".join(f"{path.relative_to(self._root)} {most}\n" for path in kept))

    def to_drop(self, wanted: Collection[str]) -> list[Path]:
        """The least recently used features that no run wants, as far as they must go for what is missing to fit.

        wanted: SHA-256 of pictures. Nothing is touched.

        Raises:
            DataError: what is missing, here and to other runs, does not fit all the same, into the cache's limit or on
                the disk.
        """
        kept, of_one = {self._path(digest) for digest in wanted}, self._most_bytes()
        elsewhere = {path: most for _, reads in self._other_lists() for path, most in (reads or {}).items()}
        held = sorted(_sizes(self._root))
        there = {path for _, _, path in held}
        coming = sum(elsewhere[path] for path in elsewhere.keys() - there - kept)  # which others compute
        missing = len(kept - there) * of_one + coming
        used = sum(size for _, size, _ in held) + missing
        dropped, freed = [], 0
        for _, size, path in held:
            if used - freed <= self._limit_bytes:
                break
            if path not in kept and path not in elsewhere:
                dropped.append(path)
                freed += size
        free = freed + shutil.disk_usage(self._root).free
        if used - freed > self._limit_bytes or missing > free:
            others = coming + sum(size for _, size, path in held if path in elsewhere and path not in kept)
            raise DataError(
                f"the tower's features of {len(wanted)} pictures take up to {len(wanted) * of_one / 1e9:.1f} GB; "
                f"cache_gb allows {self._limit_bytes / 1e9:g}"
                + (f", of which runs under way read {others / 1e9:.1f} others" if others else "")
                + f", the disk has {max(0, free - coming) / 1e9:.1f} left for {self._root}: raise cache_gb, set "
                "XDG_CACHE_HOME to a larger disk, or cache_features=false standardise_features=false"
            )
        return dropped

    def _most_bytes(self) -> int:
        """Of one picture's features, in as many tiles as there may be."""
        config = self._front.config
        tiles = 1 + max((h * w // config.image_size**2 for h, w in config.grid_pinpoints or ()), default=0)
        return tiles * (config.image_size // config.patch_size) ** 2 * self._width * self._dtype.itemsize

    def _other_lists(self) -> Iterator[tuple[Path, dict[Path, int] | None]]:
        """The lists of other runs, and what those read, with the most bytes that each may take.

        None of a run that has ended, which holds no lock any more.
        """
        for listed in self._root.glob(f"{_READS}*"):
            if listed != self._list:
                with suppress(OSError):  # removed meanwhile, or not this user's to read
                    file = os.open(listed, os.O_RDONLY)
                    try:
                        ended = _lock(file, shared=True) is not False
                    finally:
                        os.close(file)
                    lines = (line.partition(" ") for line in listed.read_text().splitlines())
                    yield listed, None if ended else {self._root / path: int(most or 0) for path, _, most in lines}


def compute_features(model: Any, front: Front, tiles: torch.Tensor) -> torch.Tensor:
    """Tiles (n, size, size, 3) uint8 → features (n, patches, width), without gradients."""
    with torch.no_grad():
        tower = next(model.model.vision_tower.parameters())
        return tower_features(model, normalise(tiles, front, tower.device).to(tower.dtype))


def cache_folder() -> Path:
    """Where features are kept between runs."""
    root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return root / "ldrt-edge" / "features"


def collator(front: Front, bucket: int) -> Collator:
    """The collator for this front end; padding is never seen, so any token id serves."""
    return Collator(front.config.stop_ids[0], bucket)


def _key(model: Any, front: Front) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    settings = asdict(front.config)
    pictures = ("image_size", "patch_size", "fit", "resample", "image_mean", "image_std", "grid_pinpoints")
    digest.update(repr([settings[name] for name in pictures]).encode())
    digest.update(str(model.config.vision_feature_layer).encode())
    return digest.hexdigest()[:24]


def _sizes(root: Path) -> Iterator[tuple[float, int, Path]]:
    """(when used, bytes, path) of all that is kept; others may remove some of it meanwhile."""
    for path in root.glob("*/*.safetensors"):
        with suppress(FileNotFoundError):
            found = path.stat()
            yield found.st_mtime, found.st_size, path


@contextmanager
def draft_folder(root: Path) -> Iterator[Path]:
    """A folder for a while beside what a cache keeps; of a process that is killed, the next one removes it."""
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{_DRAFTS}{uuid4().hex}"
    with _one_at_a_time(root):  # so that nobody finds it before it is locked
        _drop_drafts(root)
        folder.mkdir()
        file = os.open(folder / _HELD, os.O_RDWR | os.O_CREAT, 0o666)
        _lock(file, wait=True)
    try:
        yield folder
    finally:
        os.close(file)
        shutil.rmtree(folder, ignore_errors=True)


def _drop_drafts(root: Path) -> None:
    """Remove the folders of processes that were killed; whoever calls it is alone with the cache."""
    for folder in root.glob(f"{_DRAFTS}*"):
        with suppress(OSError):  # removed meanwhile, or not this user's
            file = os.open(folder / _HELD, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                ended = _lock(file, shared=True)
            finally:
                os.close(file)
            if ended:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Nobody else is within, of all processes that use this cache."""
    file = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(file, wait=True)
        yield
    finally:
        os.close(file)


def _lock(file: int, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file until it is closed or its process ends; False where another has it.

    None where there are no locks (Windows, some network disks), so that nobody knows whether another lives.
    """
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True
