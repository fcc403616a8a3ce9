"""Phantom dose maps: a joint, its beams, and the dose that they would leave, computed and then drawn.

Each beam loses strength exponentially with its depth in tissue and has a soft edge (penumbra); the sum is normalised
to the target. Lines of equal dose, colour wash and scale are drawn from that dose, so the answers hold exactly.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ldrt_edge.train.data.balance import deal
from ldrt_edge.train.data.phantom_plate import CANVAS, Colour, Fact, Field, Plate, font, yes
from ldrt_edge.train.data.phantom_sites import SITES, Anatomy, Point, Site, draw_site

Side = Literal["left", "right", "centre"]
_SIDES: dict[Side, tuple[float, float]] = {"left": (86, 116), "centre": (212, 236), "right": (286, 308)}
_FIELD = 384  # the anatomy's square; the strips right of it and below it hold the scale and the prescription
_GRID = CANVAS // 2
_ATTENUATION = 0.005  # per grid pixel: 0.05 / cm (6 MV photons in water) at 10 pixels a centimetre
_PENUMBRA = 2.2  # grid pixels, the slope of the logistic edge
_ORGAN_RADIUS, _TARGET_RADIUS = 19.0, 20.0  # canvas pixels
_COVERED, _SPARED = 0.56, 0.44  # an organ lies clearly on one side of the 50% line, or the question would be a trap
LEVELS: tuple[tuple[float, Colour], ...] = ((0.2, (90, 200, 255)), (0.5, (255, 255, 0)), (0.9, (255, 60, 60)))
_MAGENTA, _GREEN = (255, 0, 255), (0, 255, 0)


@dataclass(frozen=True)
class DoseMapSpec:
    """What one dose map shows. Doses in Gy; `scale_gy` is the top of the colour scale."""

    site: Site
    side: Side
    beams: int
    covered: bool
    wash: bool
    bar: bool
    prescription_gy: int
    printed: bool
    scale_gy: int
    ask_scale: bool
    ask_kind: bool


def dose_map_specs(count: int, kinds_asked: int, rng: random.Random) -> list[DoseMapSpec]:
    """Deal `count` specs with balanced answers; `kinds_asked` of them ask what kind of picture this is."""
    sides, beams = deal(tuple(_SIDES), count, rng), deal((1, 2, 3, 4), count, rng)
    sites, doses = deal(SITES, count, rng), deal((3, 4, 5, 6), count, rng)
    covered, wash, bar = (deal((True, False), count, rng) for _ in range(3))
    printed = deal((True, True, True, True, False), count, rng)
    headroom = deal((0, 1, 2), count, rng)
    # Without a bar its maximum cannot be told; asked there a quarter of the time, that answer has a fifth of the share.
    unanswerable = iter(deal((True, False, False, False), bar.count(False), rng))
    ask_scale = [shown or next(unanswerable) for shown in bar]
    by_room = sorted(range(count), key=lambda i: (ask_scale[i], rng.random()))
    ask_kind = set(by_room[:kinds_asked])
    return [
        DoseMapSpec(
            sites[i], sides[i], beams[i], covered[i], wash[i], bar[i], doses[i], printed[i], doses[i] + headroom[i],
            ask_scale[i], i in ask_kind,
        )
        for i in range(count)
    ]


def draw_dose_map(spec: DoseMapSpec, rng: random.Random) -> Plate:
    """Draw `spec`; what it leaves open (angles, widths, where the organ lies) comes from `rng`."""
    target = (rng.uniform(*_SIDES[spec.side]), rng.uniform(172, 212))
    anatomy = draw_site(spec.site, target, rng)
    anatomy.body[_FIELD:], anatomy.body[:, _FIELD:] = 0, 0
    angles, dose, organ = _geometry(spec, anatomy, target, rng)
    pixels = _coloured(spec, anatomy, dose)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for angle in angles:
        _arrow(draw, target, angle)
    _ring(draw, organ, _ORGAN_RADIUS, _GREEN, rng)
    _ring(draw, target, _TARGET_RADIUS, _MAGENTA, rng)
    x, y = target
    draw.line((x - 9, y, x + 9, y), fill=_MAGENTA, width=5)
    draw.line((x, y - 9, x, y + 9), fill=_MAGENTA, width=5)
    if spec.bar:
        _scale(image, draw, spec.scale_gy)
    if spec.printed:
        draw.text((14, _FIELD + 2), f"Rx {spec.prescription_gy} Gy", fill="white", font=font(58))
    present = (spec.site, *("colour wash",) * spec.wash, *("colour bar",) * spec.bar)
    return Plate(image, _facts(spec), present)


def _facts(spec: DoseMapSpec) -> tuple[Fact, ...]:
    facts = [
        Fact("beam count", str(spec.beams)),
        Fact("target side", spec.side),
        Fact("site", spec.site),
        Fact("prescribed dose", str(spec.prescription_gy) if spec.printed else "unknown"),
        Fact("colour wash", yes(spec.wash)),
        Fact("colour bar", yes(spec.bar)),
        Fact("organ in 50% isodose", yes(spec.covered)),
    ]
    if spec.ask_scale:
        facts.append(Fact("scale maximum", str(spec.scale_gy) if spec.bar else "unknown"))
    if spec.ask_kind:
        facts.append(Fact("picture kind", "dose map"))
    return tuple(facts)


def _geometry(
    spec: DoseMapSpec, anatomy: Anatomy, target: Point, rng: random.Random
) -> tuple[list[float], Field, Point]:
    """Beam angles (radians), dose on the canvas (1 at the target) and a place for the organ that answers as asked."""
    body = anatomy.body[::2, ::2]
    for _ in range(200):
        angles = _angles(spec.beams, rng)
        dose = _dose(body, target, angles, rng.uniform(23, 31))
        organ = _place_organ(dose, body, target, spec.covered, rng)
        if organ is not None:
            smooth = Image.fromarray(dose).resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)
            return angles, np.asarray(smooth) * anatomy.body, organ
    raise RuntimeError(f"no place for the organ in {spec}")


def _angles(beams: int, rng: random.Random) -> list[float]:
    """Directions of travel; two beams are never opposed, or their dose would look like one beam's."""
    start, gap = rng.uniform(0, 360), {1: 0.0, 2: rng.uniform(70, 120), 3: 120.0, 4: 90.0}[beams]
    return [math.radians(start + gap * k + rng.uniform(-8, 8)) for k in range(beams)]


def _dose(body: Field, target: Point, angles: Sequence[float], half_width: float) -> Field:
    """Relative dose on the (224, 224) grid: depth in tissue along each beam, exponential loss, logistic penumbra."""
    mask = Image.fromarray(body)
    tx, ty = target[0] / 2, target[1] / 2
    rows, columns = np.mgrid[0:_GRID, 0:_GRID].astype(np.float32)
    total = np.zeros_like(body)
    for angle in angles:
        # Turned about the target so that the beam travels down the columns, depth is a running sum.
        turned = np.asarray(mask.rotate(math.degrees(angle) - 90, center=(tx, ty)))
        depth = Image.fromarray(np.cumsum(turned, axis=0, dtype=np.float32))
        depth = depth.rotate(90 - math.degrees(angle), center=(tx, ty), resample=Image.Resampling.BILINEAR)
        across = np.abs((rows - ty) * math.cos(angle) - (columns - tx) * math.sin(angle))
        edge = 1 / (1 + np.exp(np.clip((across - half_width) / _PENUMBRA, -30, 30)))
        total += edge * np.exp(-_ATTENUATION * np.asarray(depth))
    relative: Field = (total * body / total[int(ty), int(tx)]).astype(np.float32)
    return relative


def _place_organ(dose: Field, body: Field, target: Point, covered: bool, rng: random.Random) -> Point | None:
    """A disc clear of the target that lies wholly inside the 50% line, or wholly outside it; None if none was hit."""
    tries = 240
    draw = np.random.default_rng(rng.getrandbits(63))
    radius = _ORGAN_RADIUS / 2 + 1.5
    reach = draw.uniform((_ORGAN_RADIUS + _TARGET_RADIUS) / 2 + 3, 85, tries)
    around = draw.uniform(0, 2 * np.pi, tries)
    x, y = target[0] / 2 + reach * np.cos(around), target[1] / 2 + reach * np.sin(around)
    ring = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    shares = np.concatenate([np.zeros(1), *[np.full(16, share) for share in (0.5, 1.0)]])
    turns = np.concatenate([np.zeros(1), ring, ring])
    xs = np.rint(x[:, None] + radius * shares * np.cos(turns)).astype(int)
    ys = np.rint(y[:, None] + radius * shares * np.sin(turns)).astype(int)
    within = ((xs >= 2) & (ys >= 2) & (xs < _FIELD // 2 - 2) & (ys < _FIELD // 2 - 2)).all(axis=1)
    xs, ys = np.clip(xs, 0, _GRID - 1), np.clip(ys, 0, _GRID - 1)
    values = dose[ys, xs]
    fits = within & (body[ys, xs].mean(axis=1) > 0.9)
    fits &= (values.min(axis=1) >= _COVERED) if covered else (values.max(axis=1) <= _SPARED)
    hits = np.flatnonzero(fits)
    return (float(x[hits[0]] * 2), float(y[hits[0]] * 2)) if hits.size else None


def _coloured(spec: DoseMapSpec, anatomy: Anatomy, dose: Field) -> NDArray[np.uint8]:
    """Anatomy with wash and isodose lines, uint8 (CANVAS, CANVAS, 3)."""
    grey = anatomy.grey * anatomy.body
    rgb = np.repeat(grey[..., None], 3, axis=2)
    if spec.wash:
        shown = dose > 0.12
        colours = rainbow(dose[shown] * (spec.prescription_gy / spec.scale_gy))
        rgb[shown] = rgb[shown] * 0.5 + colours * 0.5
    for level, colour in LEVELS:
        rgb[_outline(dose >= level) & (anatomy.body > 0)] = colour
    return np.clip(rgb, 0, 255).astype(np.uint8)


def rainbow(share: Field) -> Field:
    """Colours of the dose scale for shares of its maximum: (n,) in 0..1 to (n, 3) in 0..255, blue over green to red."""
    centres = np.array([3, 2, 1], np.float32)
    colours: Field = np.clip(1.5 - np.abs(4 * np.clip(share, 0, 1)[:, None] - centres), 0, 1) * np.float32(255)
    return colours


def _outline(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The inner rim of a mask, 3 pixels wide."""
    core = inside.copy()
    core[3:] &= inside[:-3]
    core[:-3] &= inside[3:]
    core[:, 3:] &= inside[:, :-3]
    core[:, :-3] &= inside[:, 3:]
    return inside & ~core


def _arrow(draw: ImageDraw.ImageDraw, target: Point, angle: float) -> None:
    """The beam's axis, from the edge of the field to the target's rim."""
    ux, uy = math.cos(angle), math.sin(angle)
    ways = [(p - (6 if u > 0 else _FIELD - 6)) / u for p, u in zip(target, (ux, uy), strict=True) if abs(u) > 1e-6]
    far, near, barb = min(min(ways), 230.0), _TARGET_RADIUS + 9, 24.0
    tip = (target[0] - near * ux, target[1] - near * uy)
    back = (tip[0] - barb * ux, tip[1] - barb * uy)
    draw.line((target[0] - far * ux, target[1] - far * uy, *back), fill="white", width=6)
    wx, wy = -uy * barb * 0.55, ux * barb * 0.55
    draw.polygon([tip, (back[0] + wx, back[1] + wy), (back[0] - wx, back[1] - wy)], fill="white")


def _ring(draw: ImageDraw.ImageDraw, centre: Point, radius: float, colour: Colour, rng: random.Random) -> None:
    """A contour as a person would draw it: a circle with a slight wobble."""
    lobes, phase, depth = rng.choice((2, 3)), rng.uniform(0, 6.3), rng.uniform(0.02, 0.09)
    turns = [2 * math.pi * k / 40 for k in range(42)]
    radii = [radius * (1 + depth * math.cos(lobes * t + phase)) for t in turns]
    points = [(centre[0] + r * math.cos(t), centre[1] + r * math.sin(t)) for t, r in zip(turns, radii, strict=True)]
    draw.line(points, fill=colour, width=6, joint="curve")


def _scale(image: Image.Image, draw: ImageDraw.ImageDraw, top_gy: int) -> None:
    """The colour bar with its ends labelled, in the strip on the right."""
    steps = rainbow(np.linspace(1, 0, 230, dtype=np.float32)).astype(np.uint8)
    image.paste(Image.fromarray(np.repeat(steps[:, None], 30, axis=1)), (400, 84))
    draw.text((415, 46), str(top_gy), fill="white", font=font(62), anchor="mm")
    draw.text((415, 338), "0", fill="white", font=font(44), anchor="mm")
    draw.text((415, 376), "Gy", fill="white", font=font(36), anchor="mm")
