"""Render bedrooms as training images, each a pure function of (seed, index).

A room is sampled at random, described as flat faces in painting order, projected through a pinhole camera, and
lit per pixel from the positions of its faces.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from shards.demo.faces import paint_room
from shards.demo.light import develop, shade
from shards.demo.projection import project
from shards.demo.room import sample_room


def render_bedroom(seed: int, index: int) -> Image.Image:
    """Return bedroom `index` of data set `seed`, RGB and 256x256; deterministic in (seed, index)."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))
    room = sample_room(rng)
    return develop(shade(room, project(paint_room(room, rng), room.camera), rng), rng)
