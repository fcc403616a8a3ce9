"""Schematic anatomy of the joints that low-dose radiotherapy treats: enough bone to recognise, no patient.

Every part is a tapered tube along a path. Coordinates are relative to the joint, x towards the body's midline (heel,
elbow: towards the toes, the hand), y down; one unit is about 100 canvas pixels.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ldrt_edge.train.data.phantom_plate import CANVAS, Field

Site = Literal["knee", "shoulder", "heel", "elbow", "hand", "hip"]
SITES: tuple[Site, ...] = ("knee", "shoulder", "heel", "elbow", "hand", "hip")

Point = tuple[float, float]
Tube = tuple[Point, Point, float, float]
"""From, to, radius at the start, radius at the end."""
_SPONGY = 0.62  # the marrow's share of a bone's radius
_UNIT = 100.0


@dataclass(frozen=True)
class Sketch:
    """A site in joint coordinates: soft tissue, bones (each a union of tubes), and where a target may lie."""

    tissue: tuple[Tube, ...]
    bones: tuple[tuple[Tube, ...], ...]
    targets: tuple[Point, ...]


@dataclass(frozen=True)
class Anatomy:
    """A site drawn on the canvas: `grey` (0 to 255) and `body`, the tissue mask (0 or 1), both (CANVAS, CANVAS)."""

    grey: Field
    body: Field


def draw_site(site: Site, target: Point, rng: random.Random) -> Anatomy:
    """Draw `site` so that one of its usual targets (a joint, a tendon's insertion) lies at `target`, in canvas pixels.

    A limb that leaves the joint sideways is turned towards the picture's middle, where it can be seen.
    """
    sketch = _SKETCHES[site]
    scale, tilt = _UNIT * rng.uniform(0.95, 1.12), math.radians(rng.uniform(-6, 6))
    mirror = 1 if target[0] + rng.uniform(-30, 30) < CANVAS / 2 else -1
    anchor = rng.choice(sketch.targets)

    def place(point: Point) -> Point:
        x, y = (point[0] - anchor[0]) * mirror * scale, (point[1] - anchor[1]) * scale
        return (
            target[0] + x * math.cos(tilt) - y * math.sin(tilt),
            target[1] + x * math.sin(tilt) + y * math.cos(tilt),
        )

    def stroke(draw: ImageDraw.ImageDraw, tubes: tuple[Tube, ...], fill: int, share: float = 1.0) -> None:
        for start, end, r0, r1 in tubes:
            _tube(draw, place(start), place(end), r0 * scale * share, r1 * scale * share, fill)

    body = Image.new("L", (CANVAS, CANVAS))
    stroke(ImageDraw.Draw(body), sketch.tissue, 255)
    tissue_grey = rng.randint(66, 92)
    grey = Image.eval(body, lambda level: level * tissue_grey // 255)
    draw = ImageDraw.Draw(grey)
    for bone in sketch.bones:
        stroke(draw, bone, 208)
        stroke(draw, bone, 156, _SPONGY)
    smooth = np.asarray(grey.filter(ImageFilter.GaussianBlur(1.6)), np.float32)
    noise = np.random.default_rng(rng.getrandbits(63)).normal(0, 5, smooth.shape).astype(np.float32)
    mask = (np.asarray(body) > 0).astype(np.float32)
    return Anatomy(smooth + noise * mask, mask)


def _tube(draw: ImageDraw.ImageDraw, start: Point, end: Point, r0: float, r1: float, fill: int) -> None:
    length = math.hypot(end[0] - start[0], end[1] - start[1])
    if length:
        nx, ny = (start[1] - end[1]) / length, (end[0] - start[0]) / length
        draw.polygon(
            [
                (start[0] + nx * r0, start[1] + ny * r0), (end[0] + nx * r1, end[1] + ny * r1),
                (end[0] - nx * r1, end[1] - ny * r1), (start[0] - nx * r0, start[1] - ny * r0),
            ],
            fill=fill,
        )
    for (x, y), r in ((start, r0), (end, r1)):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def _finger(knuckle: Point, tip: Point, radius: float) -> tuple[tuple[Tube, ...], ...]:
    """Three phalanges from knuckle to tip, with joint gaps between them."""
    def along(t: float) -> Point:
        return knuckle[0] + (tip[0] - knuckle[0]) * t, knuckle[1] + (tip[1] - knuckle[1]) * t

    return tuple(((along(a), along(b), radius, radius * 0.85),) for a, b in ((0.08, 0.40), (0.54, 0.72), (0.86, 0.98)))


def _hand() -> Sketch:
    knuckles = [(-0.60, -0.35), (-0.20, -0.48), (0.20, -0.42), (0.56, -0.25)]
    tips = [(-0.85, -1.75), (-0.25, -2.0), (0.32, -1.9), (0.92, -1.45)]
    thumb: tuple[Point, Point, Point] = ((-0.48, 0.62), (-1.05, 0.08), (-1.45, -0.62))
    fingers = tuple(zip(knuckles, tips, strict=True))
    palm: tuple[Tube, ...] = tuple(((0.0, 0.75), knuckle, 0.5, 0.3) for knuckle in knuckles)
    wrist: tuple[Tube, ...] = (((0.0, 0.7), (0.0, 1.2), 0.55, 0.46), ((0.0, 1.2), (0.0, 4.0), 0.46, 0.62))
    digits: tuple[Tube, ...] = (
        *((knuckle, tip, 0.25, 0.19) for knuckle, tip in fingers),
        (thumb[0], thumb[1], 0.35, 0.28), (thumb[1], thumb[2], 0.28, 0.21),
    )
    metacarpals: tuple[tuple[Tube, ...], ...] = tuple(
        (((x * 0.55, 0.52), (x, y + 0.1), 0.11, 0.13),) for x, y in knuckles
    )
    carpals: tuple[tuple[Tube, ...], ...] = tuple(
        (((x, y), (x, y), 0.14, 0.14),) for y in (0.72, 0.98) for x in (-0.27, 0.02, 0.3)
    )
    thumb_bones: tuple[tuple[Tube, ...], ...] = (
        ((thumb[0], (-0.98, 0.16), 0.12, 0.13),), (((-1.12, -0.02), (-1.25, -0.28), 0.11, 0.1),),
        (((-1.32, -0.42), (-1.42, -0.6), 0.09, 0.08),),
    )
    forearm: tuple[tuple[Tube, ...], ...] = (
        (((-0.2, 1.32), (-0.26, 4.0), 0.22, 0.16),), (((0.28, 1.34), (0.28, 4.0), 0.14, 0.15),),
    )
    phalanges = tuple(bone for knuckle, tip in fingers for bone in _finger(knuckle, tip, 0.12))
    return Sketch(
        (*palm, *wrist, *digits), (*metacarpals, *carpals, *thumb_bones, *forearm, *phalanges),
        ((-0.45, 0.6), (-0.2, -0.48), (0.0, 0.85)),
    )


_SKETCHES: dict[Site, Sketch] = {
    "knee": Sketch(  # from the front
        (((0.0, -4.0), (0.0, -0.3), 1.5, 1.25), ((0.0, -0.3), (0.0, 0.6), 1.25, 1.2),
         ((0.0, 0.6), (0.0, 4.0), 1.2, 1.0)),
        (
            (((0.0, -4.0), (0.0, -1.1), 0.32, 0.34), ((0.0, -1.1), (-0.4, -0.42), 0.34, 0.42),
             ((0.0, -1.1), (0.4, -0.42), 0.34, 0.42)),
            (((-0.8, 0.72), (-0.78, 4.0), 0.2, 0.12),),
            (((-0.52, 0.36), (0.52, 0.36), 0.25, 0.25), ((-0.34, 0.42), (0.0, 1.3), 0.34, 0.29),
             ((0.34, 0.42), (0.0, 1.3), 0.34, 0.29), ((0.0, 1.3), (0.0, 4.0), 0.29, 0.27)),
            (((0.0, -0.78), (0.0, -0.62), 0.29, 0.25),),
        ),
        ((0.0, 0.0), (0.35, 0.02), (0.0, -0.3)),
    ),
    "shoulder": Sketch(  # from the front
        (((1.7, -0.5), (1.9, 4.0), 1.5, 1.7), ((0.0, 0.05), (1.6, -0.45), 0.85, 0.95),
         ((-0.1, 0.0), (-0.35, 4.0), 0.8, 0.72), ((2.3, -3.0), (2.2, -0.8), 0.7, 0.9)),
        (
            *((((1.25, 0.1 + 0.5 * k), (2.7, -0.25 + 0.55 * k), 0.07, 0.07),) for k in range(5)),
            (((0.62, -0.1), (1.15, 1.55), 0.17, 0.12), ((0.6, -0.2), (1.6, -0.2), 0.14, 0.1),
             ((1.6, -0.2), (1.15, 1.55), 0.1, 0.12)),
            (((0.56, -0.22), (0.58, 0.3), 0.15, 0.15),),
            (((-0.12, -0.66), (0.3, -0.68), 0.15, 0.15), ((0.2, -0.72), (2.1, -0.95), 0.13, 0.15)),
            (((0.0, 0.0), (0.0, 0.0), 0.44, 0.44), ((-0.1, 0.2), (-0.2, 0.9), 0.36, 0.26),
             ((-0.2, 0.9), (-0.35, 4.0), 0.26, 0.24)),
        ),
        ((0.0, -0.35), (0.35, 0.0), (-0.3, -0.1)),
    ),
    "heel": Sketch(  # from the side
        (((0.5, -4.0), (0.42, -1.2), 0.85, 0.68), ((0.42, -1.2), (0.1, -0.45), 0.68, 0.74),
         ((0.1, -0.45), (1.5, -0.3), 0.72, 0.62), ((1.5, -0.3), (3.2, 0.02), 0.55, 0.24)),
        (
            (((0.58, -4.0), (0.52, -1.62), 0.3, 0.36),), (((0.18, -4.0), (0.2, -1.5), 0.1, 0.14),),
            (((-0.2, -0.42), (0.75, -0.55), 0.4, 0.27),), (((0.42, -1.06), (0.98, -0.9), 0.27, 0.22),),
            (((1.22, -0.82), (1.24, -0.72), 0.17, 0.17),), (((1.12, -0.42), (1.28, -0.32), 0.19, 0.17),),
            *((((1.52, -0.68 + 0.2 * k), (2.5, -0.2 + 0.12 * k), 0.11, 0.1),) for k in range(3)),
            (((2.68, -0.1), (2.92, -0.02), 0.09, 0.08),), (((3.04, 0.04), (3.2, 0.06), 0.07, 0.06),),
        ),
        ((0.05, -0.1), (-0.5, -0.6), (0.3, -0.15)),
    ),
    "elbow": Sketch(  # from the side, bent by a right angle
        (((-0.1, -4.0), (0.0, -0.2), 1.0, 0.85), ((0.0, 0.0), (4.0, 0.1), 0.85, 0.65)),
        (
            (((0.55, -0.12), (0.7, -0.12), 0.22, 0.17), ((0.7, -0.12), (4.0, -0.15), 0.14, 0.2)),
            (((-0.42, -0.15), (-0.3, 0.25), 0.2, 0.22), ((-0.3, 0.25), (0.5, 0.35), 0.25, 0.2),
             ((0.5, 0.35), (4.0, 0.35), 0.2, 0.13)),
            (((-0.05, -4.0), (0.0, -0.8), 0.26, 0.28), ((0.0, -0.8), (0.08, -0.12), 0.28, 0.37)),
        ),
        ((0.1, -0.1), (-0.4, -0.1), (0.5, 0.05)),
    ),
    "hand": _hand(),
    "hip": Sketch(  # from the front
        (((1.5, -4.0), (1.4, -0.3), 2.2, 2.0), ((0.0, 0.0), (-0.35, 4.0), 1.35, 1.2)),
        (
            (((2.1, -4.0), (2.1, -2.0), 0.34, 0.4), ((2.1, -2.0), (2.1, -0.7), 0.5, 0.25)),
            (((0.42, -0.6), (0.8, -1.55), 0.34, 0.72), ((0.8, -1.55), (1.5, -1.6), 0.7, 0.4),
             ((0.42, -0.6), (0.4, 0.2), 0.36, 0.3), ((0.4, -0.05), (1.7, 0.2), 0.24, 0.17),
             ((0.45, 0.2), (0.75, 0.95), 0.26, 0.25), ((0.75, 0.95), (1.7, 0.4), 0.2, 0.17)),
            (((0.0, 0.0), (0.0, 0.0), 0.4, 0.4), ((0.0, 0.0), (-0.62, 0.5), 0.27, 0.3),
             ((-0.8, 0.22), (-0.7, 0.85), 0.24, 0.3), ((-0.7, 0.85), (-0.55, 4.0), 0.3, 0.26)),
        ),
        ((0.0, 0.05), (-0.85, 0.3), (-0.3, 0.2)),
    ),
}
