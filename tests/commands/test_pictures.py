"""Images by seed, walks and arithmetic, from a run in any state."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from dist_dcgan import arithmetic, drawing, evaluate, export, sample, timelapse, walk
from dist_dcgan import trained as trained_module
from dist_dcgan.distributed.world import World
from dist_dcgan.run.checkpoint import Checkpoint, load_newest
from dist_dcgan.run.directory import RunDirectory
from dist_dcgan.run.history import read_log
from dist_dcgan.trained import Trained, load_trained
from shards.common.errors import OneRankError, UserError
from shards.common.files import final_name
from tests.support.commands import module, start, succeed
from tests.support.exports import as_older_version, describe
from tests.support.mistakes import flip_bit, refusal
from tests.support.pictures import CPU, by_seed, pixels
from tests.support.shards_fixtures import contents
from tests.support.waiting import wait_until


def test_an_image_depends_on_its_seed_alone(trained: Trained) -> None:
    seeds = [*range(70), 2**63 - 1]
    together = by_seed(trained, seeds)
    for index in (0, 1, 31, 32, 69, 70):
        assert torch.equal(by_seed(trained, [seeds[index]])[0], together[index])
    assert torch.equal(by_seed(trained, seeds[::-1]).flip(0), together)
    assert len(torch.unique(together, dim=0)) == 71


def test_a_grid_has_its_images_in_order_with_seeds_below(finished: Path, trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    sample.main([str(finished), "--out", str(out), "--seeds", "5-7,100", "--labels", "--scale", "2"])
    grid, images = pixels(out), by_seed(trained, [5, 6, 7, 100]).permute(0, 2, 3, 1).numpy()
    step = 128 + 2
    assert grid.shape == (2 * (step + 12) + 2, 2 * step + 2, 3)
    for index, image in enumerate(images):
        top, left = 2 + (step + 12) * (index // 2), 2 + step * (index % 2)
        assert np.array_equal(grid[top : top + 128 : 2, left : left + 128 : 2], image)
        assert np.array_equal(grid[top + 1 : top + 128 : 2, left + 1 : left + 128 : 2], image)
        label = grid[top + 128 : top + 140, left : left + 128]
        assert 10 < (label > 128).all(2).sum() < 200  # a few white pixels on black
    assert (pixels(out)[2 + 128 : 2 + 140, 2:130] != pixels(out)[2 + 128 : 2 + 140, 132:260]).any()


def test_separate_images_are_continued_on_any_number_of_ranks(finished: Path, trained: Trained, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    sample.main([str(finished), "--separate", str(first), "--seeds", "0-9"])
    left, being_written = (first / f"seed-0000000{seed}.png.{'0' * 16}.tmp" for seed in (7, 8))
    left.touch()
    being_written.touch()
    os.utime(left, (0, time.time() - 3700))
    sample.main([str(finished), "--separate", str(first), "--seeds", "5-49"])
    assert not left.exists()
    being_written.unlink()  # which raises if it had gone, too
    torchrun = ["--standalone", "--nproc_per_node=2", "-m", "dist_dcgan.sample"]
    succeed(module("torch.distributed.run", *torchrun, finished, "--separate", second, "--seeds", "0-49"))
    assert contents(first) == contents(second) and len(contents(first)) == 51
    found = torch.from_numpy(np.stack([pixels(first / f"seed-{seed:08d}.png") for seed in range(50)]))
    assert torch.equal(found.permute(0, 3, 1, 2), by_seed(trained, range(50)))


def test_a_disk_that_fails_on_one_rank_is_told_by_that_rank(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "save_png", mock.Mock(side_effect=OSError(28, "No space left on device")))
    reason = f"cannot write --separate {tmp_path}/images: No space left on device"
    with pytest.raises(OneRankError, match=f"^rank 1 of 2 on .*: {reason}$"):
        sample.save_separately(trained, range(4), tmp_path / "images", 1, World(1, 1, 2, CPU))
    with pytest.raises(UserError, match=f"^{reason}$") as caught:
        sample.save_separately(trained, range(4), tmp_path / "images", 1, World(0, 0, 1, CPU))
    assert not isinstance(caught.value, OneRankError)


@pytest.mark.slow
def test_thousands_that_are_killed_are_continued_to_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = [finished, "--seeds", "0-4999", "--separate"]
    succeed(module("dist_dcgan.sample", *words, whole))
    process = start(module("dist_dcgan.sample", *words, killed))
    wait_until(lambda: killed.is_dir() and len(os.listdir(killed)) > 1000, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 1000 < len(os.listdir(killed)) < 5000
    torchrun = ["--standalone", "--nproc_per_node=2", "-m", "dist_dcgan.sample"]
    succeed(module("torch.distributed.run", *torchrun, *words, killed))
    expected, found = contents(whole), contents(killed)
    unfinished = found.keys() - expected.keys()
    assert len(expected) == 5001 and {final_name(name) for name in unfinished} <= expected.keys()
    assert len(unfinished) <= 1  # of the killed process: for an hour it may be another's, at work
    differing = [name for name, content in expected.items() if found[name] != content]
    assert not differing  # names alone: thousands of images are no message


def test_a_folder_of_other_images_is_left_alone(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.png").touch()
    words = [finished, "--seeds", "0-3", "--separate"]
    assert "holds other files" in refusal(sample.main, *words, tmp_path / "other")
    sample.main([str(word) for word in (*words, tmp_path / "images")])
    before = contents(tmp_path / "images")
    assert "of another generator or scale" in refusal(sample.main, *words, tmp_path / "images", "--scale", 2)
    assert contents(tmp_path / "images") == before


MISTAKES: list[tuple[Callable[[Sequence[str]], None], list[object], str]] = [
    (sample.main, ["--seeds", "3-"], "--seeds 3-: '3-' is no seed and no range of seeds"),
    (sample.main, ["--seeds", "9-3"], "'9-3' is no seed"),
    (sample.main, ["--seeds", "0-99999999999"], "more than 10,000,000 seeds"),
    (sample.main, ["--seeds", "9223372036854775808"], "is no seed"),
    (sample.main, ["--separate", "images"], "give --out X.png for a grid, or --separate DIR"),
    (sample.main, ["--out", "x.jpg"], "give it a name that ends in .png"),
    (sample.main, ["--seeds", "0-511", "--scale", 32], "a picture of 2,147 million pixels is too large"),
    (walk.main, ["--seeds", "1"], "a walk needs two seeds"),
    (walk.main, ["--seeds", "1", "--loop"], "a walk needs two seeds"),
    (walk.main, ["--seeds", "1,2", "--rows", 2], "--seeds and --rows exclude each other"),
    (walk.main, ["--out", "x.avi"], "ends in .png or .mp4 or .gif or .webp"),
    (timelapse.main, ["--out", "x.png"], "ends in .mp4 or .gif or .webp"),
    (arithmetic.main, [], "nothing to calculate: give --add with seeds"),
    (arithmetic.main, ["--add"], "--add needs seeds"),
    (arithmetic.main, ["--subtract", "a"], "--subtract a: 'a' is no seed"),
    (export.main, ["--out", "no/where"], "no folder no for --out where"),
    (export.main, ["--licence", "a b"], "licence"),
]


@pytest.mark.parametrize(("main", "flags", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    main: Callable[[Sequence[str]], None],
    flags: list[object],
    message: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    out = [] if main is export.main and "--out" in flags else ["--out", "x.gif" if main is timelapse.main else "x.png"]
    assert message in refusal(main, finished, *(out if flags[:1] != ["--out"] else []), *flags)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("main", [sample.main, walk.main, arithmetic.main, timelapse.main, export.main])
def test_what_exists_is_not_overwritten(main: Callable[[Sequence[str]], None], finished: Path, tmp_path: Path) -> None:
    out = tmp_path / ("x.gif" if main is timelapse.main else "x.png")
    out.write_bytes(b"mine")
    flags = ["--add", "1"] if main is arithmetic.main else []
    assert "exists" in refusal(main, finished, "--out", out, *flags)
    assert out.read_bytes() == b"mine"


def test_without_the_package_for_films_one_line_says_what_to_install(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    assert "pip install av" in refusal(walk.main, finished, "--out", tmp_path / "x.mp4")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert "pip install onnx" in refusal(export.main, finished, "--out", tmp_path / "x")


def test_a_walk_passes_its_stops_and_a_loop_closes_without_a_jump() -> None:
    stops = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    straight = walk.path(stops, 21, loop=False, spherical=False)
    assert torch.allclose(straight[[0, 10, 20]], stops) and torch.allclose(straight[5], stops[:2].mean(0), atol=1e-5)
    loop = walk.path(stops, 30, loop=True, spherical=False)
    assert torch.allclose(loop[[0, 10, 20]], stops)
    steps = (loop.roll(-1, 0) - loop).norm(dim=1)  # the last leads back to the first
    assert torch.allclose(steps[20:], (stops[0] - stops[2]).norm() / 10, rtol=1e-4)
    for way in (False, True):
        arc = walk.path(stops, 30, loop=way, spherical=True)
        assert torch.allclose(arc[0], stops[0], atol=1e-5) and arc.isfinite().all()
        lengths = stops.norm(dim=1)
        assert (arc.norm(dim=1) >= lengths.min() - 1e-3).all()  # straight ways come nearer to the origin
    assert (straight.norm(dim=1).min() < stops.norm(dim=1).min() * 0.8).item()


def test_a_walk_is_a_picture_of_rows(finished: Path, trained: Trained, tmp_path: Path) -> None:
    walk.main([str(finished), "--out", str(tmp_path / "rows.png"), "--rows", "3", "--frames", "7"])
    walk.main([str(finished), "--out", str(tmp_path / "seeds.png"), "--seeds", "3,17", "--frames", "5"])
    assert pixels(tmp_path / "rows.png").shape == (3 * 66 + 2, 7 * 66 + 2, 3)
    row = pixels(tmp_path / "seeds.png")
    ends = by_seed(trained, [3, 17]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(row[2:66, 2:66], ends[0]) and np.array_equal(row[2:66, -66:-2], ends[1])


def test_arithmetic_is_that_of_the_means(finished: Path, trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "sum.png"
    arithmetic.main([str(finished), "--add", "3,17", "--subtract=5-7", "--add", "8", "--out", str(out)])
    means = [trained.latents(seeds).mean(0) for seeds in ([3, 17], [5, 6, 7], [8])]
    (expected,) = trained.images((means[0] - means[1] + means[2])[None])
    grid = pixels(out)[:, -(3 * 66 + 2) :]
    top = (grid.shape[0] - (3 * 66 + 2)) // 2
    cells = grid[top + 2 : top + 2 + 3 * 66].reshape(3, 66, -1, 3)[:, :64, 2:]
    middle = cells[1, :, 66 : 66 + 64]
    assert np.array_equal(middle, expected.permute(1, 2, 0).numpy())
    others = trained.images(torch.stack([means[0], means[1], means[2]]))
    first = pixels(out)[:, : 64 + 4]
    assert any(
        np.array_equal(first[row : row + 64, 2:66], others[0].permute(1, 2, 0).numpy()) for row in range(len(first))
    )
    assert arithmetic.split_groups(["run", "--add", "1", "--subtract=2", "--add", "3", "--best"]) == (
        [("--add", "1"), ("--subtract", "2"), ("--add", "3")],
        ["run", "--best"],
    )


def test_a_run_that_died_is_drawn_from_its_newest_checkpoint(
    finished: Path, trained: Trained, tmp_path: Path, demo_shards: Path
) -> None:
    run_dir = tmp_path / "died"
    shutil.copytree(finished, run_dir)
    for name in ("generator_ema.safetensors", "generator_ema.json"):
        (run_dir / name).unlink()

    def with_old_statistics(directory: Path) -> Checkpoint | None:
        found = load_newest(directory)
        assert found is not None
        found.tensors["generator_ema.layers.1.running_var"].fill_(100.0)
        return found

    with mock.patch.object(trained_module, "load_newest", with_old_statistics):
        died = load_trained(run_dir, False, CPU)
    assert died.description["step"] == 6 and torch.equal(by_seed(died, range(4)), by_seed(trained, range(4)))
    scored = evaluate.main  # takes it, too
    message = refusal(
        scored, run_dir, "--data", demo_shards, "--fakes", 4, "--weights", "lacking", "--extractor", "inception"
    )
    assert "lacking" in message
    (run_dir / "checkpoints").rename(run_dir / "gone")
    assert "no exported generator at" in refusal(sample.main, run_dir, "--out", tmp_path / "x.png")


def test_a_run_that_goes_on_is_drawn_as_it_is_now(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "goes_on"
    shutil.copytree(finished, run_dir)
    describe(run_dir / "generator_ema.safetensors", step=3)  # of an earlier stop
    assert load_trained(run_dir, False, CPU).description["step"] == 6


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ([lambda path: os.truncate(path, path.stat().st_size // 2)], "bytes, .* by the header"),
        ([lambda path: flip_bit(path, -1)], "do not match their checksum"),
        ([as_older_version, lambda path: flip_bit(path, -1)], "do not match their checksum"),
        ([as_older_version, lambda path: path.with_suffix(".json").unlink()], "No such file"),
    ],
)
def test_an_export_that_is_not_sound_makes_way_for_the_newest_checkpoint(
    damage: list[Callable[[Path], None]],
    message: str,
    finished: Path,
    trained: Trained,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "damaged"
    shutil.copytree(finished, run_dir)
    for harm in damage:
        harm(run_dir / "generator_ema.safetensors")
    found = load_trained(run_dir, False, CPU)
    assert found.description["step"] == 6 and torch.equal(by_seed(found, range(4)), by_seed(trained, range(4)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: exported generator ") and line.endswith(": the newest checkpoint is taken")
    assert re.search(message, line)
    shutil.rmtree(run_dir / "checkpoints")
    assert re.search(message, refusal(sample.main, run_dir, "--out", tmp_path / "x.png"))


def test_a_checkpoint_of_another_configuration_is_refused_before_memory_is_taken(
    finished: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "foreign"
    shutil.copytree(finished, run_dir)
    (run_dir / "generator_ema.safetensors").unlink()
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("width: 4", "width: 10000000"))
    message = refusal(sample.main, run_dir, "--out", tmp_path / "x.png")
    assert "checkpoints is not of" in message and "config.yaml" in message


def test_logs_and_folders_that_others_wrote_are_passed_over_or_refused(finished: Path, tmp_path: Path) -> None:
    rows = [b"[" * 100_000, b'{"step": 0, "images_seen": 5}', b'{"step": 1e999, "images_seen": 5}', b'{"step": 1}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*rows, b'{"step": %d, "images_seen": 1}' % 10**400]))
    assert read_log(RunDirectory(tmp_path)).rows == []
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "source.json").write_bytes(b"[" * 100_000)
    assert "of another generator" in refusal(sample.main, finished, "--separate", tmp_path / "images")
