"""No damaged byte of a shard reaches training, on any rank, wherever the damage is.

Promise 10 (integrity) of dist_dcgan/README.md.
"""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch.distributed as dist

from dist_dcgan.config import Config, make_plan
from dist_dcgan.data.loader import BatchLoader
from dist_dcgan.data.reader import ShardReader
from dist_dcgan.data.storage.location import Folder
from dist_dcgan.distributed.node import node_store
from dist_dcgan.distributed.world import World, process_group
from shards.common.errors import UserError
from shards.manifest import TAR_BLOCK, TAR_END
from tests.support.commands import run, train_command
from tests.support.mistakes import flip_bit
from tests.support.ranks import run_ranks

CHANGED, RESIZED = r" is damaged: sha256 ", r" has \d+ bytes, the manifest says "
KINDS = dict.fromkeys(("header", "payload", "padding", "end"), CHANGED) | {
    "cut": RESIZED,
    "missing": r" is missing",
    "swapped": f"{CHANGED}|{RESIZED}",
}
"""What may become of a shard, and what is said of it."""


class Meeting(NamedTuple):
    """What one rank met in one damaged data set."""

    shard: str
    kind: str
    error: str
    used: int
    """Samples of the damaged shard that came before the error."""
    wrong: int
    """Samples whose pixels were not those of the sound data set."""


def damage(data: Path, choice: random.Random) -> tuple[int, str]:
    """Damage one shard somehow; return its number and the kind of damage."""
    manifest = Folder(data).manifest
    shard, kind = choice.randrange(len(manifest.shards)), choice.choice(list(KINDS))
    path, layout = data / manifest.shards[shard].name, manifest.layout
    content = bytearray(path.read_bytes())
    sample = choice.randrange(manifest.shards[shard].samples) * layout.stride
    pixels_end = sample + layout.pixel_offset + layout.pixel_bytes
    places = {
        "header": range(sample, sample + TAR_BLOCK),
        "payload": range(sample + TAR_BLOCK, pixels_end),
        "padding": range(pixels_end, sample + layout.stride),
        "end": range(len(content) - TAR_END, len(content)),
    }
    if kind in places:
        content[choice.choice(places[kind])] ^= 1 << choice.randrange(8)
        path.write_bytes(content)
    elif kind == "cut":
        path.write_bytes(content[: choice.randrange(len(content))])
    elif kind == "missing":
        path.unlink()
    else:
        shutil.copy(data / manifest.shards[(shard + 1) % (len(manifest.shards) - 1)].name, path)
    return shard, kind


def meet(source: Path, folder: Path, trials: int) -> list[Meeting]:
    """Read damaged copies of `source`, all ranks the same one at a time."""
    sound = Folder(source)
    size = sound.manifest.image_size
    pixels = np.empty((sound.manifest.samples, size, size, 3), dtype=np.uint8)
    ShardReader(sound).gather(np.arange(len(pixels)), pixels)
    with process_group(60, "cpu") as world:
        return [meet_one(world, source, folder / str(trial), trial, pixels) for trial in range(trials)]


def meet_one(world: World, source: Path, copy: Path, trial: int, pixels: np.ndarray) -> Meeting:
    choice = random.Random(trial)
    damaged = [(0, "")]
    if world.is_main:
        shutil.copytree(source, copy)
        damaged = [damage(copy, choice)]
    dist.broadcast_object_list(damaged)
    ((shard, kind),) = damaged
    entry = Folder(source).manifest.shards[shard]
    of_shard = range(10 * shard, 10 * shard + entry.samples)
    node = node_store(world)
    error, used, wrong = "", 0, 0
    try:
        place = Folder(copy)
        config = Config(data={"window_shards": 2}, seed=trial, global_batch=8, max_steps=24)
        with BatchLoader(place, config, make_plan(config, 2, 96), world, 0, node) as batches:
            for batch in batches:
                used += sum(int(sample) in of_shard for sample in batch.samples)
                wrong += int((batch.pixels.numpy() != pixels[batch.samples]).any(axis=(1, 2, 3)).sum())
    except UserError as caught:
        error = str(caught)
    dist.barrier()
    return Meeting(entry.name, kind, error, used, wrong)


@pytest.mark.parametrize("trials", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_damage_at_random_places_is_named_on_all_ranks_before_it_is_used(
    demo_shards: Path, tmp_path: Path, trials: int
) -> None:
    for meetings in run_ranks(2, meet, demo_shards, tmp_path, trials):
        assert len(meetings) == trials
        for meeting in meetings:
            assert re.search(re.escape(meeting.shard) + f"({KINDS[meeting.kind]})", meeting.error), meeting
            assert (meeting.used, meeting.wrong) == (0, 0), meeting


def test_a_run_that_meets_damage_ends_with_its_name(demo_shards: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo_shards, tmp_path / "data"))
    flip_bit(data / "shard-000007.tar", 5000)
    flags = ["--data", data, "--run-dir", tmp_path / "run", "--preset", "debug", "--width", 4, "--global-batch", 8]
    done = run(train_command(2, *flags, "--data.window-shards", 1, "--wandb", "disabled"))
    assert done.returncode != 0
    # the one that is later may be ended by torchrun before it can say so
    assert re.search(r"error: rank [01] of 2 on .*shard-000007\.tar is damaged: sha256", done.stderr)
