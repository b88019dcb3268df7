"""Light the pixels and develop the picture.

Points, normals and linear colours are (3, SIZE, SIZE), single values (SIZE, SIZE).
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from shards.demo.faces import ROOM_MIDDLE, inset, rectangle
from shards.demo.projection import Surfaces, dot
from shards.demo.room import NEAR, SIZE, Array, Box, Room, Span

DAYLIGHT = np.array([0.95, 1.0, 1.06], np.float32)[:, None, None]
LAMPLIGHT = np.array([1.0, 0.72, 0.42], np.float32)[:, None, None]
REACH = 0.45  # distance from walls and furniture within which it is darker


def shade(room: Room, surfaces: Surfaces, rng: np.random.Generator) -> Array:
    """Return the light that reaches the camera."""
    numbers = surfaces.numbers
    normal = np.take(np.ascontiguousarray(surfaces.normals.T), numbers, axis=1)
    rays = room.camera.rays()
    # The ray of a pixel at a face's edge may miss the face, and meet a plane seen edge-on at any depth.
    depth = np.clip(surfaces.offsets[numbers] / dot(normal, rays), NEAR, 20)
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
    pane = rectangle(*room.window).mean(axis=0)
    light: Array = (0.05 + 0.3 * day + 0.1 * lamp) * (0.85 + 0.15 * np.abs(normal[1]))
    light += 1.1 * day * _point_light(pane + 0.08 * (ROOM_MIDDLE - pane), 1.6, point, normal)
    for bulb in room.bulbs():
        light += 1.6 * lamp * _point_light(bulb, 0.5, point, normal)
    light *= _openness(room, point, normal)
    return light


def _point_light(source: Array, reach: float, point: Array, normal: Array) -> Array:
    """Return the brightness of a soft light at `source` (3,), which halves within `reach`."""
    ray = source[:, None, None] - point
    square = dot(ray, ray)
    brightness = np.maximum(0.75 * dot(ray, normal) / np.sqrt(square) + 0.25, 0)
    return np.asarray(brightness / (1 + square / reach**2))


def _openness(room: Room, point: Array, normal: Array) -> Array:
    """Return the fraction of light not blocked by walls and furniture (ambient occlusion).

    Surfaces block light if they are nearer than REACH to a probe at distance REACH in front of the point.
    """
    probe = point + REACH * normal
    openness: Array = np.ones_like(probe[0])
    for gap in (probe[1], room.height - probe[1], room.width / 2 - np.abs(probe[0]), probe[2]):
        openness *= 1 - 0.45 * np.square(np.clip(1 - gap / REACH, 0, 1))
    draped_bed = Box(inset(room.bed.x, -0.09), room.bed.y, (room.bed.z[0], room.bed.z[1] + 0.09))
    for box in [draped_bed, room.headboard, *room.stands, *room.chests]:
        square = np.zeros_like(openness)
        for place, (low, high) in zip(probe, box, strict=True):
            square += np.square(np.maximum(np.abs(place - (low + high) / 2) - (high - low) / 2, 0))
        openness *= 1 - 0.7 * np.square(np.clip(1 - np.sqrt(square) / REACH, 0, 1))
    return openness


def develop(light: Array, rng: np.random.Generator) -> Image.Image:
    """Return the final image: automatic exposure, a film curve, grain, and haze around bright parts."""
    exposure = rng.uniform(0.85, 1.15) / (2.0 * float(light.mean()) + 0.1)
    tones = np.sqrt(1 - np.exp(-exposure * light))
    tones += 0.008 * rng.standard_normal((SIZE, SIZE), dtype=np.float32)
    sharp = Image.fromarray(np.clip(255 * tones, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    haze = sharp.reduce(4).filter(ImageFilter.GaussianBlur(4)).resize(sharp.size, Image.Resampling.BILINEAR)
    return Image.blend(sharp, haze, 0.12)
