"""The page of a run in a real browser: with and without its script, wide and narrow, light and dark, on paper."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_dcgan import report
from dist_dcgan.config import Config, to_yaml

ROWS, GRIDS = 10_000, 100

pytestmark = pytest.mark.system


def write_run(path: Path, seed: int, rows: int = ROWS, grids: int = GRIDS) -> Path:
    """Write what a long run leaves, of every kind: scores, alerts, NaNs, starts."""
    (path / "samples").mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(Config(seed=seed, width=4)))
    numbers = np.random.default_rng(seed)
    with (path / "metrics.jsonl").open("w") as file:
        for index in range(1, rows + 1):
            row: dict[str, Any] = {"step": 10 * index, "images_seen": 1280 * index, "time/step": 0.01}
            for name in ("loss/d", "loss/g", "grad_norm/d", "grad_norm/g", "score/real", "score/fake"):
                row[name] = float(numbers.lognormal()) if index % 999 else None
            for name in ("diversity/real", "diversity/fake", "throughput/images_per_second", "time/data_wait"):
                row[name] = float(numbers.uniform())
            if index % 100 == 0:
                row |= {"quality/kid_efficientnet_lite0": 0.5 * math.exp(-index / 3000), "quality/fakes": 1000}
            file.write(json.dumps(row) + "\n")
        file.write(
            json.dumps({"step": 5000, "alert": "mode collapse, since step 4750\n  what it is: one layout"}) + "\n"
        )
    starts: list[dict[str, Any]] = [{"time": "2026-01-01", "step": 0}, {"time": "2026-01-02", "step": 40_000}]
    starts[1] |= {"ranks": 8, "last": "died after step 41000"}
    (path / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    for index in range(1, grids + 1):
        noise = numbers.integers(0, 256, (66, 66, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((530, 530)).save(path / "samples" / f"step-{1000 * index:08d}.png")
    return path


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "long", 0)


@pytest.fixture(scope="module")
def page_file(long_run: Path) -> Path:
    report.main([str(long_run)])
    assert (long_run / "report.html").stat().st_size <= 15 << 20
    return long_run / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright", reason="needs the extra `browser`: tests/run.sh --all installs it")
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("not installed: chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


class Opened:
    """A page that is open, with everything that it asked for and complained of."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.page: Any = self.context.new_page()
        self.noticed: list[str] = []
        self.page.on("console", lambda message: self.noticed.append(message.text))
        self.page.on("pageerror", lambda error: self.noticed.append(str(error)))
        self.page.on("request", lambda request: self.noticed.append(request.url))
        self.page.goto(file.as_uri())
        self.requested = [each for each in self.noticed if not each.startswith(("data:", file.as_uri()))]

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def findings(self) -> list[str]:
        """What the checker of accessibility finds, by rule."""
        from axe_playwright_python.sync_playwright import Axe

        return [finding["id"] for finding in Axe().run(self.page).response["violations"]]


def test_curves_are_hidden_zoomed_and_read_off(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as opened:
        page = opened.page
        panel = page.locator(".panel").first
        assert panel.locator(".curves path").count() == 2
        panel.locator(".legend button").first.click()
        assert panel.locator(".curves path").count() == 1
        assert panel.locator(".legend button").first.get_attribute("aria-pressed") == "false"
        panel.locator(".legend button").first.click()
        assert panel.locator(".curves path").count() == 2

        svg = panel.locator("svg")
        box = svg.bounding_box()
        before = svg.locator(".ticks text").all_text_contents()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] * 0.4, middle)
        assert "images: D " in panel.locator("output").text_content()
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.6, middle, steps=5)
        page.mouse.up()
        zoomed = svg.locator(".ticks text").all_text_contents()
        assert zoomed != before and "0" not in zoomed[:1]
        page.get_by_role("button", name="whole range").click()
        assert svg.locator(".ticks text").all_text_contents() == before

        svg.focus()
        page.keyboard.press("ArrowRight")
        first = panel.locator("output").text_content()
        page.keyboard.press("ArrowRight")
        assert panel.locator("output").text_content() not in ("", first)
        page.locator("#over").select_option("hours")
        page.keyboard.press("Tab")
        assert svg.locator(".ticks text").all_text_contents() != before
        assert svg.locator(".marks line").count() == 2
        assert opened.noticed[1:] == opened.requested == []


def test_the_slider_shows_one_grid_after_another(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file) as opened:
        visible = opened.page.locator(".film figure:visible")
        assert visible.count() == 1 and "12,800,000 images" in visible.text_content()
        slider = opened.page.locator(".film input")
        slider.focus()
        opened.page.keyboard.press("Home")
        assert visible.count() == 1 and "128,000 images" in visible.text_content()
        box = slider.bounding_box()
        opened.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        assert 5_000_000 < int(visible.text_content().split()[0].replace(",", "")) < 8_000_000


def test_without_its_script_it_still_reads(browser: Any, page_file: Path) -> None:
    with Opened(browser, page_file, java_script_enabled=False) as opened:
        shown = opened.page.locator
        assert shown(".film figure:visible").count() == GRIDS
        assert shown(".panel").first.locator(".curves path").count() == 2
        assert shown(".panel").first.locator(".marks line").count() == 2
        assert shown(".control:visible").count() == 0
        assert "mode collapse" in shown(".events").text_content()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_it_is_accessible_on_every_screen(browser: Any, page_file: Path, width: int, scheme: str) -> None:
    with Opened(browser, page_file, width, color_scheme=scheme) as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        assert opened.findings() == []
        opened.page.evaluate(
            "document.querySelector('img').alt = ''; document.querySelector('h1').style.color = '#888'"
        )
        opened.page.evaluate(
            "document.querySelector('input').closest('label').replaceWith(document.querySelector('input'))"
        )
        assert "label" in opened.findings()  # so that the checker is seen to look


def test_it_can_be_printed(browser: Any, page_file: Path, tmp_path: Path) -> None:
    with Opened(browser, page_file) as opened:
        opened.page.emulate_media(media="print")
        assert opened.page.locator(".film figure:visible").count() == 6
        assert opened.page.locator(".control:visible").count() == 0
        assert opened.page.locator("details pre").first.is_visible()
        printed = opened.page.pdf(path=tmp_path / "report.pdf", format="A4")
        assert printed.startswith(b"%PDF") and 3 <= printed.count(b"/Type /Page\n") <= 30


def test_runs_that_are_compared_are_hidden_everywhere_at_once(browser: Any, long_run: Path, tmp_path: Path) -> None:
    others = [write_run(tmp_path / "one", 1, grids=2), write_run(tmp_path / "half", 2, ROWS // 2, grids=2)]
    report.main([*map(str, [long_run, *others]), "--out", str(tmp_path / "three.html")])
    with Opened(browser, tmp_path / "three.html") as opened:
        paths = opened.page.locator(".curves path")
        before = paths.count()
        opened.page.get_by_role("button", name="one").first.click()
        assert paths.count() == before * 2 / 3
        panel = opened.page.locator(".panel").first
        box = panel.locator("svg").bounding_box()
        for part, ended in ((0.3, False), (0.7, True)):
            opened.page.mouse.move(box["x"] + box["width"] * part, box["y"] + box["height"] / 2)
            assert ("half has no value here" in panel.locator("output").text_content()) is ended
        assert opened.findings() == [] and opened.noticed[1:] == []
