"""Walks and time-lapses as films."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence

from dist_dcgan import drawing, timelapse, walk
from dist_dcgan.drawing import tile
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.run.history import Row, read_log, said_of
from dist_dcgan.trained import Trained
from shards.common.errors import UserError
from tests.support.commands import metrics
from tests.support.mistakes import refusal
from tests.support.pictures import by_seed, pixels

Image.init()


@pytest.mark.parametrize("suffix", ["gif", "webp", "mp4"])
def test_a_walk_is_a_film(suffix: str, finished: Path, trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / f"walk.{suffix}"
    words = ["--rows", "2", "--frames", "9", "--fps", "20", "--loop", "--scale", "2"]
    walk.main([str(finished), "--out", str(out), *words])
    frames, seconds, repeats = shown(out)
    assert frames.shape == (9, 2 * 130 + 2, 2 * 130 + 2, 3) and seconds == pytest.approx(9 / 20)
    assert repeats == (suffix != "mp4")
    first = np.asarray(tile(by_seed(trained, [0, 4, 8, 12]), scale=2)).astype(int)
    assert np.abs(frames[0] - first).mean() < 12  # palettes and compression lose a little
    assert np.abs(frames[4] - first).mean() > np.abs(frames[0] - first).mean()


def shown(path: Path) -> tuple[np.ndarray[Any, Any], float, bool]:
    """The frames of a film, its seconds, and whether it repeats."""
    if path.suffix == ".mp4":
        import av

        with av.open(str(path)) as container:
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            return (
                np.stack(pictures).astype(int),
                len(pictures) / float(container.streams.video[0].average_rate or 0),
                False,
            )
    with Image.open(path) as film:
        assert film.is_animated  # type: ignore[attr-defined]
        frames, milliseconds = [], 0.0
        for frame in ImageSequence.Iterator(film):
            frames.append(np.asarray(frame.convert("RGB")).astype(int))
            milliseconds += frame.info["duration"]
        return np.stack(frames), milliseconds / 1000, film.info["loop"] == 0


def test_a_time_lapse_shows_every_grid_and_stands_still_at_the_last(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "lapse.webp"
    timelapse.main([str(finished), "--out", str(out), "--fps", "4"])
    frames, seconds, repeats = shown(out)
    grids = sorted((finished / "samples").iterdir())
    assert [path.name for path in grids] == ["step-00000002.png", "step-00000004.png", "step-00000006.png"]
    assert seconds == pytest.approx((3 + 2 * 4) / 4) and repeats
    middle = slice(70, 130)  # above the caption
    assert np.abs(frames[0][middle] - pixels(grids[0])[middle].astype(int)).mean() < 8
    assert np.abs(frames[-1][middle] - pixels(grids[-1])[middle].astype(int)).mean() < 8


def test_captions_say_what_had_been_seen(finished: Path, tmp_path: Path) -> None:
    seen = [Row(10, 320), Row(20, 640, kid=0.5), Row(30, 960, kid=0.25)]
    assert said_of(4, seen) == "step 4"
    assert said_of(10, seen) == "320 images"
    assert said_of(25, seen) == "800 images   1000 KID 500"
    assert said_of(30, seen) == "960 images   1000 KID 250"
    run_dir = tmp_path / "died"
    shutil.copytree(finished, run_dir)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 7, "images_seen": 112, "quality/kid_x_std": 0.1, "quality/kid_x": 0.5}\n[]\n{"step": 8, "im'
        )
    rows = read_log(RunDirectory(run_dir)).rows
    assert rows[-1][:2] == (7, 112) and rows[-1].kid == 0.5 and len(rows) == len(metrics(finished)) + 1


def test_grids_of_different_sizes_fit_into_one_film(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    Image.new("RGB", (68, 68), (9, 9, 9)).save(run_dir / "samples" / "step-00000001.png")
    timelapse.main([str(run_dir), "--out", str(tmp_path / "lapse.gif"), "--fps", "1"])
    assert shown(tmp_path / "lapse.gif")[0].shape[1:3] == pixels(finished / "samples" / "step-00000006.png").shape[:2]
    shutil.rmtree(run_dir / "samples")
    assert "no grids in" in refusal(timelapse.main, run_dir, "--out", tmp_path / "other.gif")
    (run_dir / "samples").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    broken = (tmp_path / "x.png").read_bytes().replace(b"IDAT", b"\xe7\xb5\x89n")
    (tmp_path / "x.png").unlink()
    for content in (b"no picture", broken):
        (run_dir / "samples" / "step-00000001.png").write_bytes(content)
        assert "cannot be read" in refusal(timelapse.main, run_dir, "--out", tmp_path / "other.gif")
    assert sorted(os.listdir(tmp_path)) == ["lapse.gif", "run"]


def test_a_film_that_is_too_large_for_its_format_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="frames may be too large"):
        drawing.save_film([Image.new("RGB", (16_400, 8))] * 2, tmp_path / "x.webp", 10)
    assert not os.listdir(tmp_path)
