"""Pictures that a browser brought: their bytes in memory, and views of them as PNG.

A view is drawn by the same code that prepares the picture for the model, so that the window on the page is the window
of the model, and dose and contours that lie over a picture there lie over it for the model. File names never come
here, and identifiers do not go out; the oldest pictures go when memory runs short.
"""

from __future__ import annotations

import hmac
import io
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldrt_edge.burned_in import black_out, text_in
from ldrt_edge.dicom import declares_text, series_of, slice_position
from ldrt_edge.errors import DataError, NotThere
from ldrt_edge.image import Look, Picture, Window, read_frame
from ldrt_edge.kept import Kept
from ldrt_edge.overlay import Dose, Structures, lay_over, plane, read_overlay, read_structures
from ldrt_edge.runtimes.base import FrontImage

MOST_BYTES = 1 << 30
_GAP = 4  # pixels between tiles
_VIEWS_BYTES = 256 << 20
_OVERLAYS_KEPT = 4  # read; their files are kept longer


@dataclass(frozen=True)
class Shot:
    """One frame of a picture file through a window, and the files that lie over it, by their names here.

    black_out: text that is burned into it goes under black boxes.
    """

    name: str
    window: Window | None
    frame: int
    over: tuple[str, ...] = ()
    black_out: bool = False


class Pictures:
    """Files by a random name, at most `most_bytes` of them together."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._files = Kept[str, bytes](most_bytes, len)
        self._views = Kept[Shot, Picture](_VIEWS_BYTES, lambda picture: picture.rgb.nbytes)
        self._overlays: OrderedDict[str, Dose | Structures] = OrderedDict()
        self._lock = threading.Lock()
        self._salt = secrets.token_bytes(32)

    def add(self, data: bytes) -> dict[str, object]:
        """Keep a picture file that can be read; its name, and what there is to know of its first frame.

        Files with the same word in `frames_of_reference` may lie over each other; `overlay`: it does so only.
        Slices with the same word in `series` make a stack. `burned_in` and `text_lines`: see `text`.

        Raises:
            DataError: it cannot be read, or is larger than what is kept of all.
        """
        if len(data) > self._files.most_bytes:
            raise DataError(f"the picture: {len(data) >> 20} MiB, and {self._files.most_bytes >> 20} are kept")
        told: dict[str, object]
        lies_in: frozenset[str]
        if regions := read_structures(data):
            told = {
                "format": "DICOM", "modality": "RTSTRUCT", "overlay": True, "series": None, "burned_in": False,
                "text_lines": 0,
            }  # fmt: skip
            lies_in = regions.frames_of_reference
        else:
            look = read_frame(data)
            picture = look(None)
            of_dicom = picture.origin.format == "DICOM"
            series = series_of(data) if of_dicom else None
            told = {
                "position": slice_position(data) if of_dicom else None, "overlay": False,
                "series": self._word(repr(series)) if series else None, **_text(look, data), **describe(picture),
            }
            lies_in = frozenset()
            with suppress(DataError):  # with a damaged geometry it is still a picture, for nothing to lie over
                if of_dicom and (lies := plane(data)):
                    lies_in = frozenset({lies.frame_of_reference})
        name = secrets.token_urlsafe(12)
        with self._lock:
            self._files.put(name, data)
        return {"name": name, "frames_of_reference": sorted(map(self._word, lies_in)), **told}

    def text(self, name: str, frame: int, window: Window | None = None) -> dict[str, object]:
        """`text_lines`: of burned-in text that was found in a frame. `burned_in`: any, or the file says that it has.

        It is looked for through the file's own window, over the full range, and through the `window` asked for.

        Raises:
            DataError: there is no such picture any more, no such frame, or the window does not fit it.
        """
        data = self._file(name)
        return _text(read_frame(data, frame), data, window)

    def forget(self, names: Iterable[str]) -> None:
        """Keep pictures no longer, nor what was drawn of or with them; names that are not known are passed over."""
        gone = frozenset(names)
        with self._lock:
            for name in gone:
                self._files.take(name)
                self._overlays.pop(name, None)
            for shot in self._views:
                if not gone.isdisjoint((shot.name, *shot.over)):
                    self._views.take(shot)

    def view(self, shot: Shot) -> Picture:
        """A picture as it is looked at.

        Raises:
            DataError: there is no such picture any more, or it cannot be shown so.
        """
        data = self._file(shot.name)
        with self._lock:
            known = self._views.get(shot)
        if known is None:
            look = read_frame(data, shot.frame)
            known = look(shot.window)
            if shot.black_out:
                lines = text_in(look, shot.window)
                origin = replace(known.origin, blacked_out=len(lines))
                known = replace(known, rgb=black_out(known.rgb, lines), origin=origin)
            known = lay_over(known, data, [self._overlay(name) for name in shot.over])
            with self._lock:
                if all(self._files.get(one) for one in (shot.name, *shot.over)):  # none was forgotten meanwhile
                    self._views.put(shot, known)
        return known

    def _overlay(self, name: str) -> Dose | Structures:
        data = self._file(name)
        with self._lock:
            known = self._overlays.get(name)
        if known is None:
            known = read_overlay(data)
            with self._lock:
                if self._files.get(name):
                    self._overlays[name] = known
                if len(self._overlays) > _OVERLAYS_KEPT:
                    self._overlays.popitem(last=False)
        return known

    def _file(self, name: str) -> bytes:
        with self._lock:
            data = self._files.get(name)
        if data is None:
            raise NotThere("the picture is not there any more: add it again")
        return data

    def _word(self, identifier: str) -> str:
        """For an identifier, which can lead to a patient: means nothing elsewhere, or after this start."""
        return hmac.digest(self._salt, identifier.encode(), "sha256").hex()[:16]


def _text(look: Look, data: bytes, window: Window | None = None) -> dict[str, object]:
    lines = len(text_in(look, window))
    says_so = look(None).origin.format == "DICOM" and declares_text(data)
    return {"burned_in": bool(lines) or says_so, "text_lines": lines}


def describe(picture: Picture) -> dict[str, object]:
    """A picture for the page: size, levels of grey and where it came from; no patient data."""
    height, width = picture.rgb.shape[:2]
    return {"width": width, "height": height, "levels": picture.levels, **asdict(picture.origin)}


def refuse_too_many(images: Sequence[FrontImage], context_length: int) -> None:
    """Refuse more pictures than the model holds, before the next one is decoded.

    Raises:
        DataError: they are.
    """
    tokens = sum(image.token_count for image in images)
    if tokens > context_length:
        raise DataError(f"the pictures take {tokens} tokens and more, the model holds {context_length}: show fewer")


def png(rgb: NDArray[np.uint8]) -> bytes:
    """(height, width, 3) as PNG; packed lightly, since it goes no farther than this machine."""
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def tiles_png(image: FrontImage) -> bytes:
    """Exactly the pixels that the model gets: its tiles one to one, in a grid if there are several."""
    count, size = image.tiles.shape[:2]
    columns = 1 if count == 1 else 2 if count <= 4 else 3
    rows = -(-count // columns)
    side = size + _GAP
    sheet = np.zeros((rows * side - _GAP, columns * side - _GAP, 3), np.uint8)
    for place, tile in enumerate(image.tiles):
        top, left = place // columns * side, place % columns * side
        sheet[top : top + size, left : left + size] = tile
    return png(sheet)
