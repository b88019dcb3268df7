"""Describe a room as flat faces of convex bodies, in painting order."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from shards.demo.room import Array, Box, Colour, Room, Span

CORNERS = 12  # most corners of a face; faces with fewer repeat their last corner
WHITE, BRASS, LAMPSHADE, FOLIAGE = (240, 238, 232), (150, 140, 125), (255, 226, 180), (104, 128, 92)
DAY_SKY, NIGHT_SKY = ((140, 185, 240), (246, 249, 252)), ((14, 20, 42), (46, 54, 84))
ROOM_MIDDLE = np.array([0.0, 1.2, 2.5], np.float32)


class Solid(NamedTuple):
    """Faces of one convex body and their material."""

    faces: Array  # (faces, corners, 3)
    inside: Array  # (3,), a point behind every face
    colour: Colour
    glow: float  # light that the surface adds to what falls on it, 0 for none
    folds: float  # relative change of brightness by the creases of cloth


class Model:
    """Solids in painting order: later ones may hide earlier ones, never the reverse."""

    def __init__(self) -> None:
        self.solids: list[Solid] = []

    def loft(self, rings: Array, colour: Colour, glow: float = 0.0, folds: float = 0.0) -> None:
        """Add the convex body through `rings` (rings, corners, 3), closed at both ends."""
        low, high, inside = rings[:-1], rings[1:], rings.mean(axis=(0, 1))
        sides = np.stack([low, np.roll(low, -1, axis=1), np.roll(high, -1, axis=1), high], axis=2)
        for faces in (sides.reshape(-1, 4, 3), rings[[0, -1]]):
            self.solids.append(Solid(faces, inside, colour, glow, folds))

    def block(self, box: Box, colour: Colour) -> None:
        """Add a box."""
        self.loft(np.stack([rectangle(1, y, box.x, box.z) for y in box.y]), colour)

    def sheet(self, axis: int, plane: float, along: Span, across: Span, colour: Colour, glow: float = 0.0) -> None:
        """Add an axis-aligned rectangle that faces the middle of the room."""
        corners = rectangle(axis, plane, along, across)
        self.solids.append(Solid(corners[None], 2 * corners.mean(axis=0) - ROOM_MIDDLE, colour, glow, 0.0))


def paint_room(room: Room, rng: np.random.Generator) -> Model:
    """Return the faces of the room, farther ones first."""
    model = Model()
    _paint_shell(model, room)
    _paint_decoration(model, room, rng)
    _paint_window(model, room, rng)
    _paint_furniture(model, room)
    _paint_bed(model, room, rng)
    return model


def rectangle(axis: int, plane: float, along: Span, across: Span) -> Array:
    """Return the corners (4, 3) of an axis-aligned rectangle; on a wall, `across` is its height."""
    first, second = ((2, 1), (0, 2), (0, 1))[axis]
    corners = np.full((4, 3), plane, np.float32)
    corners[:, first] = along[0], along[1], along[1], along[0]
    corners[:, second] = across[0], across[0], across[1], across[1]
    return corners


def _outline(power: float) -> tuple[Array, Array]:
    """Return CORNERS points around the origin: the unit circle at power 1, closer to a square at smaller powers."""
    angle = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False, dtype=np.float32)
    points = np.stack([np.cos(angle), np.sin(angle)])
    x, y = np.sign(points) * np.abs(points) ** power
    return x, y


def _toned(colour: Colour, factor: float) -> Colour:
    return tuple(min(channel * factor, 255.0) for channel in colour)


def inset(span: Span, margin: float) -> Span:
    """Return the span without a margin at both ends."""
    return span[0] + margin, span[1] - margin


def _paint_shell(model: Model, room: Room) -> None:
    """Paint the floor, which must be face 0, the ceiling and the walls with their mouldings."""
    across, along = (-room.width / 2, room.width / 2), (0.0, float(room.camera.eye[2]) + 0.5)
    model.sheet(1, 0.0, across, along, room.colours["floor"])
    model.sheet(1, room.height, across, along, WHITE)
    walls = [(2, 0.0, across, "accent"), (0, across[0], along, "wall"), (0, across[1], along, "wall")]
    for axis, plane, span, role in walls:
        model.sheet(axis, plane, span, (0, room.height), room.colours[role])
        model.sheet(axis, plane, span, (0, 0.1), WHITE)
        model.sheet(axis, plane, span, (room.height - 0.06, room.height), WHITE)


def _paint_decoration(model: Model, room: Room, rng: np.random.Generator) -> None:
    """Paint pictures over the bed, unless a window is there, and sometimes a rug under it."""
    middle, count = sum(room.bed.x) / 2, int(rng.integers(4))
    width, low = rng.uniform(0.7, 1.2) / max(count, 1) ** 0.7, rng.uniform(1.4, 1.55)
    if room.window.axis == 2 and abs(sum(room.window.along) / 2 - middle) < 1.4:
        count = 0
    for i in range(count):
        start, top = middle + (width + 0.12) * (i - count / 2), low + rng.uniform(0.45, 0.65)
        for margin, colour in [(0, room.colours["frame"]), (0.03, WHITE), (0.09, room.colours["art"])]:
            model.sheet(2, 0.0, inset((start, start + width), margin), inset((low, top), margin), colour)
    if rng.random() < 0.55:
        across = inset(room.bed.x, -rng.uniform(0.2, 0.7))
        along = (0.9, room.bed.z[1] + rng.uniform(0.3, 0.8))
        for margin, tone in [(0, 1.0), (0.08, 1.25), (0.14, 0.95)]:
            colour = _toned(room.colours["rug"], tone)
            model.sheet(1, 0.01, inset(across, margin), inset(along, margin), colour)


def _paint_window(model: Model, room: Room, rng: np.random.Generator) -> None:
    """Paint the frame, the sky in horizontal bands, the bars, and the curtains in vertical bands."""
    axis, plane, along, (sill, top) = room.window
    is_day, shine = room.daylight > 0.1, 0.3 + room.daylight
    model.sheet(axis, plane, inset(along, -0.08), (sill - 0.08, top + 0.08), WHITE)
    sky = np.linspace(*(DAY_SKY if is_day else NIGHT_SKY), 6).tolist()
    sky[-1] = FOLIAGE if is_day else NIGHT_SKY[0]
    for (high, low), colour in zip(pairwise(np.linspace(top, sill, 7)), sky, strict=True):
        model.sheet(axis, plane, along, (low, high), tuple(colour), shine)
    middle, bar = sum(along) / 2, sill + 0.62 * (top - sill)
    model.sheet(axis, plane, (middle - 0.03, middle + 0.03), (sill, top), WHITE, 0.3 * shine)
    model.sheet(axis, plane, along, (bar - 0.02, bar + 0.02), WHITE, 0.3 * shine)
    hem = 0.05 if rng.random() < 0.6 else sill - 0.15
    for left in (along[0] - 0.3, along[1] - 0.12):
        for i, (start, end) in enumerate(pairwise(np.linspace(left, left + 0.42, 8))):
            colour = _toned(room.colours["curtain"], (1.0, 0.8, 1.1)[i % 3])
            model.sheet(axis, plane, (start, end), (hem, top + 0.14), colour, 0.15 * room.daylight)
    model.sheet(axis, plane, inset(along, -0.36), (top + 0.13, top + 0.17), room.colours["frame"])


def _paint_furniture(model: Model, room: Room) -> None:
    """Paint all furniture but the bed, starting at the back wall, which is the farthest."""
    model.block(room.headboard, room.colours["bed"])
    for stand in room.stands:
        _paint_drawers(model, stand, 2, stand.x, stand.z[1], room.colours["chest"])
    for bulb in room.bulbs():
        _paint_lamp(model, bulb, room.lamplight)
    for chest in room.chests:
        _paint_drawers(model, chest, 0, chest.z, min(chest.x, key=abs), room.colours["chest"])


def _paint_drawers(model: Model, box: Box, axis: int, along: Span, front: float, colour: Colour) -> None:
    """Paint a box with drawers, or doors if it is tall, in its face `axis` = `front`."""
    model.block(box, colour)
    rows = 1 if box.y[1] > 1.5 else round(box.y[1] / 0.27)
    columns = max(1, round((along[1] - along[0]) / 0.6))
    for across in pairwise(np.linspace(*along, columns + 1)):
        for height in pairwise(np.linspace(0.06, box.y[1] - 0.03, rows + 1)):
            x, y = sum(across) / 2, sum(height) / 2
            model.sheet(axis, front, inset(across, 0.014), inset(height, 0.014), _toned(colour, 0.5))
            model.sheet(axis, front, inset(across, 0.024), inset(height, 0.024), _toned(colour, 1.05))
            model.sheet(axis, front, (x - 0.05, x + 0.05), (y - 0.012, y + 0.012), _toned(colour, 0.4))


def _paint_lamp(model: Model, bulb: Array, lamplight: float) -> None:
    x, z = _outline(1)
    circle = np.stack([x, np.zeros_like(x), z], axis=1)
    parts: list[tuple[Span, Span, Colour, float]] = [  # heights below and above the bulb, radii, colour, glow
        ((-0.4, -0.37), (0.09, 0.09), BRASS, 0.0),
        ((-0.37, -0.1), (0.04, 0.03), BRASS, 0.0),
        ((-0.12, 0.13), (0.17, 0.11), LAMPSHADE, 1.2 * lamplight),
    ]
    for heights, radii, colour, glow in parts:
        rings = np.multiply.outer(np.array(radii, np.float32), circle) + bulb
        rings[..., 1] += np.array(heights, np.float32)[:, None]
        model.loft(rings, colour, glow)


def _paint_bed(model: Model, room: Room, rng: np.random.Generator) -> None:
    """Paint the frame and the mattress, then pillows and layers of cloth from the head to the foot."""
    bed, colours, (back, end) = room.bed, room.colours, room.bed.z
    model.block(Box(bed.x, (0.06, 0.28), bed.z), colours["bed"])
    model.block(Box(bed.x, (0.28, bed.y[1]), bed.z), colours["sheet"])
    quarter = (bed.x[1] - bed.x[0]) / 4
    places = np.array([bed.x[0] + quarter, bed.x[1] - quarter])
    rows = [("pillow", 0.94 * quarter, 0.23, places), ("sheet", 0.9 * quarter, 0.2, places)]
    rows = rows[: rng.integers(1, 3)]
    if rng.random() < 0.5:
        rows.append(("cushion", 0.22, 0.17, places.mean(keepdims=True)))
    for i, (role, half_width, half_height, row) in enumerate(rows):
        for x in sorted(row, key=lambda x: -abs(x - room.camera.eye[0])):
            foot = np.array([x, bed.y[1] + 0.02, back + 0.2 + 0.16 * i], np.float32)
            _paint_pillow(model, foot, half_width, half_height, colours[role])
    turned, thrown, hem = rng.uniform(0.9, 1.1), end - rng.uniform(0.45, 0.75), rng.uniform(0.1, 0.3)
    layers = [("sheet", 0.7, turned), ("duvet", turned, end)]
    if rng.random() < 0.55:
        layers[1:] = [("duvet", turned, thrown), ("throw", thrown, end - 0.15), ("duvet", end - 0.15, end)]
    for role, start, stop in layers:
        _paint_cloth(model, bed, (start, stop), 0.07 if role == "duvet" else 0.08, hem, colours[role])


def _paint_pillow(model: Model, foot: Array, half_width: float, half_height: float, colour: Colour) -> None:
    """Paint a pillow that leans back from `foot` (3,), the middle of its lower edge."""
    right, up, out = np.array([[1, 0, 0], [0, 0.9, -0.44], [0, 0.44, 0.9]], np.float32)
    x, y = _outline(0.5)
    flat = half_width * x[:, None] * right + half_height * y[:, None] * up
    profile = [(-0.07, 0.8), (0.0, 1.0), (0.06, 0.88), (0.1, 0.6), (0.12, 0.3)]
    rings = [foot + half_height * up + bulge * out + size * flat for bulge, size in profile]
    model.loft(np.stack(rings), colour, folds=0.03)


def _paint_cloth(model: Model, bed: Box, along: Span, thickness: float, hem: float, colour: Colour) -> None:
    """Paint cloth over the bed between two distances from the back wall, hanging down to height `hem`."""
    top, rings = bed.y[1], []
    profile = [(hem, thickness + 0.02), (top - 0.06, thickness + 0.01), (top + thickness / 2, -0.01)]
    for height, out in [*profile, (top + thickness, -0.12)]:
        end = along[1] + out if along[1] == bed.z[1] else along[1]
        rings.append(rectangle(1, height, inset(bed.x, -out), (along[0], end)))
    model.loft(np.stack(rings), colour, folds=0.07)
