"""Project the faces of a room through the camera: which face each pixel shows, and in which colour."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from shards.demo.faces import CORNERS, Model
from shards.demo.room import NEAR, SIZE, Array, Camera


class Surfaces(NamedTuple):
    """Visible surfaces per pixel, before lighting."""

    colours: Image.Image  # SIZE x SIZE
    numbers: npt.NDArray[np.int32]  # (SIZE, SIZE), face index per pixel; the floor is face 0
    normals: Array  # (faces, 3), unit length, outwards
    offsets: Array  # (faces,), normal . (point - eye) for the points of the face
    traits: Array  # (2, faces), glow and folds


def project(model: Model, camera: Camera) -> Surfaces:
    """Project the faces that face the camera, in painting order."""
    counts = [len(solid.faces) for solid in model.solids]
    pad = [np.minimum(np.arange(CORNERS), corners - 1) for corners in range(CORNERS + 1)]
    faces = np.concatenate([solid.faces[:, pad[solid.faces.shape[1]]] for solid in model.solids])
    inside = np.repeat([solid.inside for solid in model.solids], counts, axis=0)
    normals = np.cross(faces[:, 1] - faces[:, 0], faces[:, -1] - faces[:, 0])
    outwards = dot(normals.T, (faces[:, 0] - inside).T)
    normals /= np.copysign(np.linalg.norm(normals, axis=1), outwards)[:, None]
    offsets = dot(normals.T, (faces[:, 0] - camera.eye).T)
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


def dot(a: Array, b: Array) -> Array:
    """Return the dot products over the first axis, of length 3."""
    return np.asarray(a[0] * b[0] + a[1] * b[1] + a[2] * b[2])
