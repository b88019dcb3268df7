"""The report as one HTML file: it holds all that it shows, requests nothing, and runs no script but its own.

Everything that comes from a run goes through `shown` and jinja2's escaping; the file also forbids itself, by a policy
that browsers obey, any script or style but the two that stand in it and any request.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dist_dcgan.pages import charts, told
from dist_dcgan.pages.pictures import Picture
from dist_dcgan.run.history import said_of
from dist_dcgan.run.starts import version
from shards.common.redaction import one_line

_FOLDER = Path(__file__).parent
MARK = b'<meta name="generator" content="dist_dcgan.report">'
"""By which a report is known again, near the beginning of the file."""
_PRINTED = 6
"""Grids that are printed, of all."""


class Grid(NamedTuple):
    """A grid of a run, with what had been seen by then."""

    picture: Picture
    caption: str
    is_key: bool
    """Whether it is printed."""


@dataclass(frozen=True)
class Shown:
    """A run with its pictures, each with a caption."""

    run: told.Run
    grids: list[Grid]
    pictures: list[tuple[str, Picture]] = field(default_factory=list)
    """Best and latest generator, real images and nearest ones."""
    notes: list[str] = field(default_factory=list)
    """Why a picture is missing."""


def render(runs: Sequence[Shown], is_watched: bool) -> bytes:
    """Return the page of one run or several."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_asset(f"report.{suffix}") for suffix in ("css", "js"))
    panels = panels_of(runs)
    last, marks = max(each.run.last.images for each in runs), marks_of(runs)
    content = environment.get_template("report.html").render(
        runs=runs,
        told=told,
        charts=charts,
        mark=Markup(MARK.decode()),
        policy=f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}",
        style=Markup(style),
        script=Markup(script),
        panels=[(panel, charts.draw(panel, last)) for panel in panels],
        data=_in_script(
            {
                "panels": [charts.as_json(panel) for panel in panels],
                "marks": marks,
                "last": last,
                "compared": len(runs) > 1,
                "frame": [charts.WIDTH, charts.HEIGHT, charts.LEFT, charts.RIGHT, charts.TOP, charts.BOTTOM],
            }
        ),
        marks=marks,
        picture=lambda picture: Markup(picture.address),
        is_watched=is_watched,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=version(),
        last=last,
    )
    return content.encode()


def panels_of(runs: Sequence[Shown]) -> list[charts.Panel]:
    """Return the curves of one run, or those of several over each other."""
    if len(runs) == 1:
        return charts.panels_of(runs[0].run.log.rows)
    return charts.panels_over({each.run.name: each.run.log.rows for each in runs})


def marks_of(runs: Sequence[Shown]) -> list[dict[str, Any]]:
    """Return the events of one run as marks on its curves; those of several would hide each other."""
    if len(runs) > 1:
        return []
    return [
        {"images": event.images, "hours": event.seconds / 3600, "kind": event.kind, "text": event.text}
        for event in told.events(runs[0].run)
    ]


def grids_with_captions(run: told.Run, pictures: dict[int, Picture]) -> list[Grid]:
    """Return grids with images seen and the last KID by then; some evenly spread ones are to be printed."""
    steps = list(pictures)
    keys = {steps[index * (len(steps) - 1) // (_PRINTED - 1)] for index in range(_PRINTED)} if steps else set()
    captions = {step: said_of(step, run.log.rows).replace("   ", ", ") for step in steps}
    return [Grid(picture, captions[step], step in keys) for step, picture in pictures.items()]


def shown(value: object) -> object:
    """Return a value as it may stand in the page: text of any origin without secrets and control characters."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "\n".join(without_home(one_line(line)) for line in value.split("\n"))


def without_home(text: str) -> str:
    """Return a text with the user's home as `~`."""
    home = os.path.expanduser("~")  # `~` itself if there is none
    return text if len(home) < 2 else re.sub(rf"(?<![\w./~-]){re.escape(home)}(?![\w.-])", "~", text)


def _in_script(value: Any) -> Markup:
    """Return a value as JSON that cannot end the element it stands in."""
    text = json.dumps(_all_shown(value), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def _all_shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _all_shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_all_shown(item) for item in value]
    return shown(value)


def _asset(name: str) -> str:
    return (_FOLDER / name).read_text()


def _digest(text: str) -> str:
    """Return the source of a policy that allows this text alone."""
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
