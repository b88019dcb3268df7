"""Render bedrooms as training images, each a pure function of (seed, index).

A room is sampled at random, described as flat faces in painting order, projected through a pinhole camera, and
lit per pixel from the positions of its faces. Lengths are in metres: x points right, y up, and z from the back
wall (z = 0) towards the camera.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Array: TypeAlias = npt.NDArray[np.float32]
Colour: TypeAlias = tuple[float, ...]
"""Red, green and blue in sRGB, 0-255."""
Span: TypeAlias = tuple[float, float]
"""Lower and upper bound."""

SIZE = 256  # pixels along each side of a picture
CORNERS = 12  # most corners of a face; faces with fewer repeat their last corner
NEAR = 0.05  # nothing closer to the camera is drawn

PALETTES = {
    "wall": "efe6d8 e4dccf d7dfe0 c9d3cb e8d9c4 b9c4cc d9c7b8 f2efe9 a9b5a6 d8c9a8 e6d0c4 93a3ae c2a98c",
    "floor": "8a5a34 a9764a 6b4428 c49a6c b8a894 d2c4ae 55402f 9c8b7a",
    "wood": "5b3a22 7d5231 a67c52 e9e4dc 3a2c24 c6a477 f3f0ea",
    "linen": "f6f3ee efe8dc dde4ea f3ece6 e6e2da d3d9dc",
    "cloth": "8c2f39 2f4f6f 3f6b57 c08a3e 6d5a7e b4573b 7c8f9d d9b9a0 444c55 a8b79b e3d9c6 9fb4c4 7a5a40",
}
ROLES = {"wall": "wall", "accent": "wall", "floor": "floor", "bed": "wood", "chest": "wood", "frame": "wood"}
ROLES |= dict.fromkeys(("sheet", "pillow", "duvet"), "linen")
ROLES |= dict.fromkeys(("throw", "cushion", "curtain", "rug", "art"), "cloth")
PLANKS = ((0.11, 1.3), (0.16, 1.6), (1.4, 0.13), (0.5, 0.5), (0.03, 0.03))  # boards, tiles, carpet
WHITE, BRASS, LAMPSHADE, FOLIAGE = (240, 238, 232), (150, 140, 125), (255, 226, 180), (104, 128, 92)
DAY_SKY, NIGHT_SKY = ((140, 185, 240), (246, 249, 252)), ((14, 20, 42), (46, 54, 84))
DAYLIGHT = np.array([0.95, 1.0, 1.06], np.float32)[:, None, None]
LAMPLIGHT = np.array([1.0, 0.72, 0.42], np.float32)[:, None, None]
REACH = 0.45  # distance from walls and furniture within which it is darker
ROOM_MIDDLE = np.array([0.0, 1.2, 2.5], np.float32)


class Box(NamedTuple):
    """An axis-aligned box: its extent along x, y and z."""

    x: Span
    y: Span
    z: Span


class Window(NamedTuple):
    """A window in the wall `axis` = `plane`: the back wall (axis 2) or a side wall (axis 0)."""

    axis: int
    plane: float
    along: Span
    height: Span


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that turns but does not tilt, so that vertical lines stay vertical."""

    eye: Array  # (3,)
    yaw: float  # radians, 0 looks straight at the back wall
    focal: float  # in half picture widths
    horizon: float  # height of the horizon, 0 at the top of the picture and 1 at the bottom

    def view(self, points: Array) -> Array:
        """Return world points (..., 3) as (right, up, depth) from the eye."""
        sin, cos = math.sin(self.yaw), math.cos(self.yaw)
        turn = np.array([[cos, 0, sin], [0, 1, 0], [sin, 0, -cos]], np.float32)
        return np.asarray(np.matmul(points - self.eye, turn))

    def pixels(self, view: Array) -> Array:
        """Return points (..., 3) from `view` as pixel positions (..., 2)."""
        scale = SIZE * self.focal / 2 / np.maximum(view[..., 2], NEAR)
        return np.stack([SIZE / 2 + scale * view[..., 0], SIZE * self.horizon - scale * view[..., 1]], -1)

    def rays(self) -> Array:
        """Return directions (3, SIZE, SIZE) through the centre of each pixel, scaled to depth 1."""
        grid = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
        right, up = (2 * grid - 1) / self.focal, 2 * (self.horizon - grid[:, None]) / self.focal
        sin, cos = math.sin(self.yaw), math.cos(self.yaw)
        return np.stack(np.broadcast_arrays(right * cos + sin, up, right * sin - cos))


@dataclass(frozen=True)
class Room:
    """The random properties of a bedroom, except details that the `_paint` functions sample."""

    camera: Camera
    width: float
    height: float
    bed: Box  # from the floor to the top of the mattress
    headboard: Box
    stands: list[Box]  # nightstands, each with a lamp
    chests: list[Box]  # chests of drawers and wardrobes along the side walls
    window: Window
    daylight: float  # brightness of the window: about 0 at night and 1 by day
    lamplight: float  # brightness of the lamps: 0 if they are off, about 1 at night
    plank: Span  # size of a board, tile or carpet tuft along x and z
    colours: dict[str, Colour]  # by role

    def bulbs(self) -> list[Array]:
        """Return the positions (3,) of the lamps' bulbs."""
        return [np.array([sum(s.x) / 2, s.y[1] + 0.4, sum(s.z) / 2], np.float32) for s in self.stands]


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
        self.loft(np.stack([_rectangle(1, y, box.x, box.z) for y in box.y]), colour)

    def sheet(self, axis: int, plane: float, along: Span, across: Span, colour: Colour, glow: float = 0.0) -> None:
        """Add an axis-aligned rectangle that faces the middle of the room."""
        corners = _rectangle(axis, plane, along, across)
        self.solids.append(Solid(corners[None], 2 * corners.mean(axis=0) - ROOM_MIDDLE, colour, glow, 0.0))


class Surfaces(NamedTuple):
    """Visible surfaces per pixel, before lighting."""

    colours: Image.Image  # SIZE x SIZE
    numbers: npt.NDArray[np.int32]  # (SIZE, SIZE), face index per pixel; the floor is face 0
    normals: Array  # (faces, 3), unit length, outwards
    offsets: Array  # (faces,), normal . (point - eye) for the points of the face
    traits: Array  # (2, faces), glow and folds


def render_bedroom(seed: int, index: int) -> Image.Image:
    """Return bedroom `index` of data set `seed`, RGB and 256x256; deterministic in (seed, index)."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))
    room = _sample_room(rng)
    model = Model()
    _paint_shell(model, room)
    _paint_decoration(model, room, rng)
    _paint_window(model, room, rng)
    _paint_furniture(model, room)
    _paint_bed(model, room, rng)
    return _develop(_shade(room, _project(model, room.camera), rng), rng)


# Sampling a room.


def _sample_room(rng: np.random.Generator) -> Room:
    half, middle = rng.uniform(0.72, 1.0), rng.uniform(-0.5, 0.5)
    width, height = 2 * (abs(middle) + half) + rng.uniform(1.6, 2.8), rng.uniform(2.4, 2.9)
    bed = Box((middle - half, middle + half), (0, rng.uniform(0.48, 0.62)), (0.1, rng.uniform(2.05, 2.25)))
    camera = _sample_camera(rng, width, middle)
    seen_wall = width / 2 if camera.eye[0] < middle else -width / 2
    window = _sample_window(rng, seen_wall, height)
    night, lamps_on = rng.random() < 0.25, rng.random() < 0.5
    return Room(
        camera=camera,
        width=width,
        height=height,
        bed=bed,
        headboard=Box((bed.x[0] - 0.05, bed.x[1] + 0.05), (0, rng.uniform(0.9, 1.35)), (0, bed.z[0])),
        stands=_sample_stands(rng, bed),
        chests=_sample_chests(rng, -seen_wall if window.axis == 0 else seen_wall),
        window=window,
        daylight=0.03 if night else rng.uniform(0.7, 1.1),
        lamplight=rng.uniform(0.7, 1.3) if night else rng.uniform(0.3, 0.8) * lamps_on,
        plank=PLANKS[rng.integers(len(PLANKS))],
        colours=_sample_colours(rng),
    )


def _sample_camera(rng: np.random.Generator, width: float, target: float) -> Camera:
    """Sample a camera in the near half of the room that looks at about x = `target`, the middle of the bed."""
    reach = width / 2 - 0.6
    eye = (rng.triangular(-reach, 0, reach), rng.uniform(1.25, 1.65), rng.uniform(3.5, 4.5))
    yaw = math.atan2(target + rng.normal(0, 0.2) - eye[0], eye[2] - 1.0)
    return Camera(np.array(eye, np.float32), yaw, rng.uniform(1.05, 1.45), rng.uniform(0.34, 0.46))


def _sample_window(rng: np.random.Generator, wall: float, height: float) -> Window:
    """Sample a window in the side wall x = `wall`, or in the back wall next to it."""
    size, tall = rng.uniform(0.9, 1.7), (rng.uniform(0.5, 1.0), rng.uniform(2.0, height - 0.25))
    if rng.random() < 0.4:
        middle = wall - math.copysign(0.4 + size / 2, wall)
        return Window(2, 0.0, (middle - size / 2, middle + size / 2), tall)
    start = rng.uniform(0.4, 1.2)
    return Window(0, wall, (start, start + size), tall)


def _sample_stands(rng: np.random.Generator, bed: Box) -> list[Box]:
    """Sample nightstands left, right or on both sides of the head of the bed."""
    size, top, gap = rng.uniform(0.38, 0.52), rng.uniform(0.45, 0.62), rng.uniform(0.12, 0.22)
    left, right = bed.x[0] - gap - size, bed.x[1] + gap
    starts = ([left], [right], [left, right], [left, right])[rng.integers(4)]
    return [Box((start, start + size), (0, top), (0.03, 0.03 + 0.85 * size)) for start in starts]


def _sample_chests(rng: np.random.Generator, wall: float) -> list[Box]:
    """Sample a chest of drawers, a wardrobe or nothing along the side wall x = `wall`."""
    front, start = wall - math.copysign(rng.uniform(0.4, 0.5), wall), rng.uniform(0.8, 1.3)
    height = (0.8, 1.0, 1.9)[rng.integers(3)]
    chest = Box((min(wall, front), max(wall, front)), (0, height), (start, start + rng.uniform(0.9, 1.4)))
    return [chest] if rng.random() < 0.5 else []


def _sample_colours(rng: np.random.Generator) -> dict[str, Colour]:
    """Sample a colour of each role from its palette, with a small change of brightness and tint."""
    colours: dict[str, Colour] = {}
    for role, palette in ROLES.items():
        base = np.array(list(bytes.fromhex(rng.choice(PALETTES[palette].split()))))
        tinted = np.clip(base * rng.normal(1, 0.06) * rng.normal(1, 0.02, 3), 12, 250)
        colours[role] = tuple(tinted.tolist())
    for role, other, chance in [("accent", "wall", 0.6), ("duvet", "throw", 0.4), ("curtain", "sheet", 0.4)]:
        if rng.random() < chance:
            colours[role] = colours[other]
    return colours


# Describing the room as faces.


def _rectangle(axis: int, plane: float, along: Span, across: Span) -> Array:
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


def _inset(span: Span, margin: float) -> Span:
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
            model.sheet(2, 0.0, _inset((start, start + width), margin), _inset((low, top), margin), colour)
    if rng.random() < 0.55:
        across = _inset(room.bed.x, -rng.uniform(0.2, 0.7))
        along = (0.9, room.bed.z[1] + rng.uniform(0.3, 0.8))
        for margin, tone in [(0, 1.0), (0.08, 1.25), (0.14, 0.95)]:
            colour = _toned(room.colours["rug"], tone)
            model.sheet(1, 0.01, _inset(across, margin), _inset(along, margin), colour)


def _paint_window(model: Model, room: Room, rng: np.random.Generator) -> None:
    """Paint the frame, the sky in horizontal bands, the bars, and the curtains in vertical bands."""
    axis, plane, along, (sill, top) = room.window
    is_day, shine = room.daylight > 0.1, 0.3 + room.daylight
    model.sheet(axis, plane, _inset(along, -0.08), (sill - 0.08, top + 0.08), WHITE)
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
    model.sheet(axis, plane, _inset(along, -0.36), (top + 0.13, top + 0.17), room.colours["frame"])


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
            model.sheet(axis, front, _inset(across, 0.014), _inset(height, 0.014), _toned(colour, 0.5))
            model.sheet(axis, front, _inset(across, 0.024), _inset(height, 0.024), _toned(colour, 1.05))
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
        rings.append(_rectangle(1, height, _inset(bed.x, -out), (along[0], end)))
    model.loft(np.stack(rings), colour, folds=0.07)


# Projecting the faces.


def _project(model: Model, camera: Camera) -> Surfaces:
    """Project the faces that face the camera, in painting order."""
    counts = [len(solid.faces) for solid in model.solids]
    pad = [np.minimum(np.arange(CORNERS), corners - 1) for corners in range(CORNERS + 1)]
    faces = np.concatenate([solid.faces[:, pad[solid.faces.shape[1]]] for solid in model.solids])
    inside = np.repeat([solid.inside for solid in model.solids], counts, axis=0)
    normals = np.cross(faces[:, 1] - faces[:, 0], faces[:, -1] - faces[:, 0])
    outwards = _dot(normals.T, (faces[:, 0] - inside).T)
    normals /= np.copysign(np.linalg.norm(normals, axis=1), outwards)[:, None]
    offsets = _dot(normals.T, (faces[:, 0] - camera.eye).T)
    colours = np.repeat([solid.colour for solid in model.solids], counts, axis=0)
    traits = np.repeat(np.array([(s.glow, s.folds) for s in model.solids], np.float32).T, counts, axis=1)
    picture, numbers = _draw(camera, camera.view(faces), offsets < 0, colours.astype(int).tolist())
    return Surfaces(picture, numbers, normals, offsets, traits)


def _draw(
    camera: Camera, view: Array, visible: npt.NDArray[np.bool_], colours: list[list[int]]
) -> tuple[Image.Image, npt.NDArray[np.int32]]:
    """Return an image of the visible faces, given as `view` (faces, CORNERS, 3), and the face index per pixel."""
    canvas, numbers = Image.new("RGB", (2 * SIZE, 2 * SIZE)), Image.new("I", (SIZE, SIZE))
    paint, mark = ImageDraw.Draw(canvas), ImageDraw.Draw(numbers)
    pixels, nearest, farthest = camera.pixels(view), view[..., 2].min(axis=1), view[..., 2].max(axis=1)
    for i in np.flatnonzero(visible & (farthest > NEAR)).tolist():
        shape = pixels[i] if nearest[i] >= NEAR else camera.pixels(_clip(view[i]))
        mark.polygon(shape.ravel().tolist(), fill=i)
        paint.polygon((2 * shape).ravel().tolist(), fill=tuple(colours[i]))
    return canvas.reduce(2), np.asarray(numbers)  # averaging 2x2 pixels smooths the edges


def _clip(view: Array) -> Array:
    """Return the part of a polygon (corners, 3) from `Camera.view` beyond the near plane."""
    kept = []
    for a, b in zip(view, np.roll(view, -1, axis=0), strict=True):
        if a[2] >= NEAR:
            kept.append(a)
        if (a[2] >= NEAR) != (b[2] >= NEAR):
            kept.append(a + (b - a) * (NEAR - a[2]) / (b[2] - a[2]))
    return np.stack(kept)


# Lighting the pixels. Points, normals, linear colours are (3, SIZE, SIZE) here, single values (SIZE, SIZE).


def _dot(a: Array, b: Array) -> Array:
    return np.asarray(a[0] * b[0] + a[1] * b[1] + a[2] * b[2])


def _shade(room: Room, surfaces: Surfaces, rng: np.random.Generator) -> Array:
    """Return the light that reaches the camera."""
    numbers = surfaces.numbers
    normal = np.take(np.ascontiguousarray(surfaces.normals.T), numbers, axis=1)
    rays = room.camera.rays()
    # The ray of a pixel at a face's edge may miss the face, and meet a plane seen edge-on at any depth.
    depth = np.clip(surfaces.offsets[numbers] / _dot(normal, rays), NEAR, 20)
    point = room.camera.eye[:, None, None] + depth * rays
    glow, folds = np.take(surfaces.traits, numbers, axis=1)
    texture, cloth, floor = np.ones_like(depth), folds > 0, numbers == 0
    texture[cloth] += folds[cloth] * _creases(point[:, cloth], rng)
    texture[floor] = _planks(point[:, floor], room.plank, rng)
    albedo = np.square(np.asarray(surfaces.colours).transpose(2, 0, 1) / np.float32(255))  # about linear
    return np.asarray(albedo * texture * (_light(room, point, normal) + glow))


def _creases(point: Array, rng: np.random.Generator) -> Array:
    """Return the folds (n,) of cloth at the points (3, n), about -2 to 2: sines with a phase of sines."""
    waves = rng.normal(0, 8, (4, 3)).astype(np.float32) @ point
    return np.asarray(np.sin(waves[1:] + 2 * np.sin(waves[0])).sum(axis=0))


def _planks(point: Array, plank: Span, rng: np.random.Generator) -> Array:
    """Return the brightness (n,) of a floor of planks, tiles or carpet at the points (3, n), about 1."""
    tone, shift = rng.normal(1, 0.09, (64, 64)).astype(np.float32), rng.random(64).astype(np.float32)
    narrow = int(plank[0] > plank[1])  # 0 if the planks run towards the camera
    across = point[2 * narrow] / plank[narrow] + 1024  # positive, so that astype rounds down
    row = across.astype(np.int32)
    column = point[2 - 2 * narrow] / plank[1 - narrow] + 1024 + shift[row % 64]
    joint = np.where(across - row < 0.08, np.float32(0.7), np.float32(1))
    return np.asarray(tone[row % 64, column.astype(np.int32) % 64] * joint)


def _light(room: Room, point: Array, normal: Array) -> Array:
    """Return the light on the points: ambient light, and light from the window and the lamps."""
    day, lamp = room.daylight * DAYLIGHT, room.lamplight * LAMPLIGHT
    pane = _rectangle(*room.window).mean(axis=0)
    light: Array = (0.05 + 0.3 * day + 0.1 * lamp) * (0.85 + 0.15 * np.abs(normal[1]))
    light += 1.1 * day * _point_light(pane + 0.08 * (ROOM_MIDDLE - pane), 1.6, point, normal)
    for bulb in room.bulbs():
        light += 1.6 * lamp * _point_light(bulb, 0.5, point, normal)
    light *= _openness(room, point, normal)
    return light


def _point_light(source: Array, reach: float, point: Array, normal: Array) -> Array:
    """Return the brightness of a soft light at `source` (3,), which halves within `reach`."""
    ray = source[:, None, None] - point
    square = _dot(ray, ray)
    brightness = np.maximum(0.75 * _dot(ray, normal) / np.sqrt(square) + 0.25, 0)
    return np.asarray(brightness / (1 + square / reach**2))


def _openness(room: Room, point: Array, normal: Array) -> Array:
    """Return the fraction of light not blocked by walls and furniture (ambient occlusion).

    Surfaces block light if they are nearer than REACH to a probe at distance REACH in front of the point.
    """
    probe = point + REACH * normal
    openness: Array = np.ones_like(probe[0])
    for gap in (probe[1], room.height - probe[1], room.width / 2 - np.abs(probe[0]), probe[2]):
        openness *= 1 - 0.45 * np.square(np.clip(1 - gap / REACH, 0, 1))
    draped_bed = Box(_inset(room.bed.x, -0.09), room.bed.y, (room.bed.z[0], room.bed.z[1] + 0.09))
    for box in [draped_bed, room.headboard, *room.stands, *room.chests]:
        square = np.zeros_like(openness)
        for place, (low, high) in zip(probe, box, strict=True):
            square += np.square(np.maximum(np.abs(place - (low + high) / 2) - (high - low) / 2, 0))
        openness *= 1 - 0.7 * np.square(np.clip(1 - np.sqrt(square) / REACH, 0, 1))
    return openness


def _develop(light: Array, rng: np.random.Generator) -> Image.Image:
    """Return the final image: automatic exposure, a film curve, grain, and haze around bright parts."""
    exposure = rng.uniform(0.85, 1.15) / (2.0 * float(light.mean()) + 0.1)
    tones = np.sqrt(1 - np.exp(-exposure * light))
    tones += 0.008 * rng.standard_normal((SIZE, SIZE), dtype=np.float32)
    sharp = Image.fromarray(np.clip(255 * tones, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    haze = sharp.reduce(4).filter(ImageFilter.GaussianBlur(4)).resize(sharp.size, Image.Resampling.BILINEAR)
    return Image.blend(sharp, haze, 0.12)
