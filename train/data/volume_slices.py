"""Slices through labelled volumes: any plane, position, tilt, zoom and window, with the labels that go along.

Everything happens in the scanner's millimetres (RAS+: x to the patient's right, y to the front, z to the head), so that
image and label map may have different grids. A slice is shown as radiologists hang it, the patient's right on the
image's left, unless it is flipped.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ldrt_edge.errors import DataError, require

Plane = Literal["axial", "coronal", "sagittal"]
PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")
Floats = NDArray[np.float32]

_AXES: dict[Plane, tuple[tuple[int, int, int], tuple[int, int, int], int]] = {
    "axial": ((-1, 0, 0), (0, -1, 0), 2), "coronal": ((-1, 0, 0), (0, 0, -1), 1),
    "sagittal": ((0, -1, 0), (0, 0, -1), 0),
}
"""What the image's right and down mean in RAS, and the axis that the slice is cut across."""
_CT_WINDOWS_HU = ((40, 80), (40, 400), (60, 300), (400, 1800))  # brain, soft tissue, abdomen, bone: (centre, width)
_INVERTED = 0.25  # share of MR slices with fluid bright and white matter dark, as T2 weighting shows them
_MIN_BODY = 0.12  # share of a slice's pixels, or there is little to ask about


@dataclass(frozen=True, eq=False)
class LoadedVolume:
    """An image and its labels in memory; affines map voxel indices to millimetres (4 × 4).

    regions: label value to region name, sides stripped. low_mm, high_mm: the corners of the body's box.
    """

    image: Floats
    affine: NDArray[np.float64]
    labels: NDArray[np.int32] | None
    labels_affine: NDArray[np.float64]
    regions: Mapping[int, str]
    low_mm: NDArray[np.float64]
    high_mm: NDArray[np.float64]
    levels: tuple[float, float]
    hounsfield: bool


@dataclass(frozen=True)
class Lesion:
    """A simulated lesion: centre and radius in pixels, brighter or darker than around; the patient's side if clear."""

    row: float
    column: float
    radius: float
    bright: bool
    region: str | None
    side: Literal["left", "right"] | None


@dataclass(frozen=True, eq=False)
class Slice:
    """pixels: (size, size) uint8; regions: region name to its mask; body: tissue mask."""

    pixels: NDArray[np.uint8]
    regions: Mapping[str, NDArray[np.bool_]]
    body: NDArray[np.bool_]
    plane: Plane
    flipped: bool
    position_mm: float
    inverted: bool
    lesions: tuple[Lesion, ...] = ()


def load_volume(image: Path, labels: Path | None, regions: Mapping[int, str], hounsfield: bool) -> LoadedVolume:
    """Read NIfTI files (three dimensions, finite values).

    Raises:
        DataError: a file is missing or not such a volume.
        MissingExtraError: nibabel is not installed.
    """
    values, affine = _read(image)
    grid, labels_affine = _read(labels) if labels else (None, affine)
    low, high = (-300.0, 1000.0) if hounsfield else (0.0, float(np.percentile(values[values > 0], 99.5)))
    body = values > low + 0.12 * (high - low)
    corners = np.array([[np.flatnonzero(body.any(axis=tuple({0, 1, 2} - {axis})))[[0, -1]]] for axis in range(3)])
    ends = np.array([_to_mm(affine, np.array(c)) for c in np.stack(np.meshgrid(*corners[:, 0]), -1).reshape(-1, 3)])
    return LoadedVolume(
        values, affine, None if grid is None else np.rint(grid).astype(np.int32), labels_affine, dict(regions),
        ends.min(axis=0), ends.max(axis=0), (low, high), hounsfield,
    )


def cut(volume: LoadedVolume, plane: Plane, flipped: bool, size: int, rng: random.Random) -> Slice | None:
    """A slice at a random place with random tilt, zoom and window; None where it shows hardly any body."""
    right, down, across = _AXES[plane]
    span = volume.high_mm - volume.low_mm
    centre = (volume.low_mm + volume.high_mm) / 2
    centre[across] = volume.low_mm[across] + span[across] * rng.uniform(0.06, 0.94)
    in_plane = [axis for axis in range(3) if axis != across]
    for axis in in_plane:
        centre[axis] += span[axis] * rng.uniform(-0.05, 0.05)
    tilt, zoom = np.radians(rng.uniform(-12, 12)), rng.uniform(0.86, 1.3)
    step = max(span[axis] for axis in in_plane) * 1.08 / zoom / size
    ticks = (np.arange(size) - (size - 1) / 2) * step
    u, v = np.meshgrid(-ticks if flipped else ticks, ticks)
    turned_u, turned_v = u * np.cos(tilt) - v * np.sin(tilt), u * np.sin(tilt) + v * np.cos(tilt)
    points = centre + turned_u[..., None] * np.array(right) + turned_v[..., None] * np.array(down)
    values = _linear(volume.image, _to_voxels(volume.affine, points), volume.levels[0])
    low, high = volume.levels
    body = values > low + 0.12 * (high - low)
    if body.mean() < _MIN_BODY:
        return None
    regions: dict[str, NDArray[np.bool_]] = {}
    if volume.labels is not None:
        found = _nearest(volume.labels, _to_voxels(volume.labels_affine, points))
        for value in np.unique(found):
            if int(value) in volume.regions:
                name = volume.regions[int(value)]
                regions[name] = regions.get(name, np.zeros_like(body)) | (found == value)
    inverted = not volume.hounsfield and rng.random() < _INVERTED
    pixels = _window(volume, values, inverted, rng)
    return Slice(pixels, regions, body, plane, flipped, float(centre[across]), inverted)


def add_lesions(shown: Slice, count: int, bright: bool, rng: random.Random) -> Slice:
    """`shown` with up to `count` simulated lesions in labelled tissue: as many as find a place where they stand out.

    The side is the patient's, told by the body's middle; None near it, or on a sagittal slice.
    """
    size = shown.pixels.shape[0]
    labelled = np.logical_or.reduce([*shown.regions.values()]) if shown.regions else shown.body
    places = np.argwhere(labelled)
    middle = float(np.flatnonzero(shown.body.any(axis=0))[[0, -1]].mean())
    pixels = shown.pixels.astype(np.float32)
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    lesions: list[Lesion] = []
    for _ in range(40 if len(places) else 0):
        if len(lesions) == count:
            break
        row, column = (float(value) for value in places[rng.randrange(len(places))])
        radius = size * rng.uniform(0.035, 0.085)
        near = np.hypot(rows - row, columns - column)
        disc, around = near < radius, (near >= radius) & (near < 1.8 * radius)
        apart = all(np.hypot(row - old.row, column - old.column) > 2.5 * (radius + old.radius) for old in lesions)
        surround = float(np.median(pixels[around]))
        stands_out = surround < 165 if bright else surround > 75
        if not (apart and stands_out and shown.body[disc].mean() > 0.95):
            continue
        level = rng.uniform(225, 255) if bright else rng.uniform(5, 25)
        lobes, phase, depth = rng.choice((2, 3, 5)), rng.uniform(0, 6.28), rng.uniform(0, 0.2)
        edge = radius * (1 + depth * np.cos(lobes * np.arctan2(rows - row, columns - column) + phase))
        share = 0.92 / (1 + np.exp(np.clip((near - edge) / (0.08 * radius + 0.4), -30, 30)))
        pixels = pixels * (1 - share) + level * share
        lesions.append(Lesion(row, column, radius, bright, _region(shown, disc), _side(shown, column, middle)))
    return Slice(
        np.clip(pixels, 0, 255).astype(np.uint8), shown.regions, shown.body, shown.plane, shown.flipped,
        shown.position_mm, shown.inverted, tuple(lesions),
    )


def _region(shown: Slice, disc: NDArray[np.bool_]) -> str | None:
    """The region that holds most of a disc's labelled pixels, if there is little doubt."""
    shares = {name: int((mask & disc).sum()) for name, mask in shown.regions.items()}
    total = sum(shares.values())
    best = max(shares, key=lambda name: shares[name], default=None)
    return best if best is not None and total > 0.3 * disc.sum() and shares[best] > 0.85 * total else None


def _side(shown: Slice, column: float, middle: float) -> Literal["left", "right"] | None:
    if shown.plane == "sagittal" or abs(column - middle) < 0.09 * shown.pixels.shape[1]:
        return None
    return "right" if (column < middle) != shown.flipped else "left"


def _window(volume: LoadedVolume, values: Floats, inverted: bool, rng: random.Random) -> NDArray[np.uint8]:
    """Grey levels as a viewer's random window and a little noise leave them."""
    low, high = volume.levels
    if volume.hounsfield:
        hu, width_hu = rng.choice(_CT_WINDOWS_HU)
        middle, width = hu + rng.uniform(-15, 15), width_hu * rng.uniform(0.8, 1.25)
        low, high = middle - width / 2, middle + width / 2
    else:
        low, high = high * rng.uniform(0.0, 0.1), high * rng.uniform(0.85, 1.2)
    shown = np.clip((values - low) / (high - low), 0, 1)
    if inverted:  # air and bone stay dark
        shown = np.clip((shown - 0.04) / 0.08, 0, 1) * (1.02 - shown) ** 1.3
    shown = shown ** rng.uniform(0.75, 1.3)
    noise = np.random.default_rng(rng.getrandbits(63)).normal(0, rng.uniform(0, 5), shown.shape)
    grey: NDArray[np.uint8] = np.clip(np.rint(shown * 255 + noise * (shown > 0.02)), 0, 255).astype(np.uint8)
    return grey


def _read(path: Path) -> tuple[Floats, NDArray[np.float64]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    nibabel = require("nibabel", "train")
    try:
        volume = nibabel.load(path)
        values = np.asarray(volume.dataobj, dtype=np.float32)
        affine = np.asarray(volume.affine, dtype=np.float64)
    except Exception as error:  # nibabel raises many kinds for a damaged file
        raise DataError(f"{path}: not a readable NIfTI volume ({type(error).__name__})") from error
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim != 3 or min(values.shape) < 8 or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise DataError(f"{path}: {' × '.join(map(str, values.shape))}, wanted one volume of three dimensions")
    if not np.isfinite(values).all() or values.max() <= 0:
        raise DataError(f"{path}: empty, or values that are no numbers")
    return values, affine


def _to_mm(affine: NDArray[np.float64], voxels: NDArray[np.float64]) -> NDArray[np.float64]:
    moved: NDArray[np.float64] = voxels @ affine[:3, :3].T + affine[:3, 3]
    return moved


def _to_voxels(affine: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    return _to_mm(np.linalg.inv(affine).astype(np.float64), points)


def _nearest(grid: NDArray[np.int32], voxels: NDArray[np.float64]) -> NDArray[np.int32]:
    index = np.rint(voxels).astype(int)
    inside = np.asarray(((index >= 0) & (index < grid.shape)).all(axis=-1))
    found = grid[tuple(np.moveaxis(np.where(inside[..., None], index, 0), -1, 0))]
    return np.where(inside, found, 0).astype(np.int32)


def _linear(grid: Floats, voxels: NDArray[np.float64], outside: float) -> Floats:
    from scipy.ndimage import map_coordinates

    values: Floats = map_coordinates(
        grid, np.moveaxis(voxels, -1, 0), order=1, mode="constant", cval=outside, output=np.float32
    )
    return values
