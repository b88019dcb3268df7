"""Sample a room, its furniture and the camera.

Lengths are in metres: x points right, y up, and z from the back wall (z = 0) towards the camera.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float32]
Colour: TypeAlias = tuple[float, ...]
"""Red, green and blue in sRGB, 0-255."""
Span: TypeAlias = tuple[float, float]
"""Lower and upper bound."""

SIZE = 256  # pixels along each side of a picture
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
    """The random properties of a bedroom, except details that `paint_room` samples."""

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


def sample_room(rng: np.random.Generator) -> Room:
    """Sample all of a room; the order of the draws is part of what a seed means."""
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
