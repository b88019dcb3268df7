"""The README says what is true. `python -m tests.house.test_readme` writes its configuration table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from dist_dcgan.config import Config, preset_names

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
ROOMS = ("dist_dcgan", "launch", "shards", "tests")
READMES = [README, *(page for room in ROOMS for page in sorted((ROOT / room).rglob("README.md")))]
CONFIGURATION = ROOT / "dist_dcgan" / "presets" / "README.md"
TABLE = re.compile(r"(<!-- configuration:[^\n]*-->\n).*?(<!-- end of configuration -->)", re.DOTALL)


def rows(model: BaseModel, prefix: str = "") -> Iterator[str]:
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from rows(value, f"{prefix}{name}.")
            continue
        extra = field.json_schema_extra
        mark = " ↻" if isinstance(extra, dict) and extra.get("changeable") else ""
        assert field.description, f"{prefix}{name} is not documented"
        description = " ".join(field.description.split())
        yield f"| `{prefix}{name}`{mark} | `{'none' if value is None else value}` | {description} |\n"


def table() -> str:
    return "| key | default | |\n|---|---|---|\n" + "".join(rows(Config()))


def with_table(text: str) -> str:
    return TABLE.sub(lambda match: match[1] + table() + match[2], text)


def test_the_configuration_table_is_that_of_the_code() -> None:
    text = CONFIGURATION.read_text()
    assert len(TABLE.findall(text)) == 1
    assert with_table(text) == text, "run `python -m tests.house.test_readme`"


def test_every_preset_is_described() -> None:
    described = re.findall(r"^\| `(\w+)` \| (?!`)", README.read_text(), re.MULTILINE)
    assert set(preset_names()) <= set(described)


def test_every_link_leads_somewhere() -> None:
    for readme in READMES:
        for path, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", readme.read_text()):
            target = (readme.parent / path) if path else readme
            assert target.exists(), f"{readme.relative_to(ROOT)}: {path}"
            assert not heading or heading in anchors(target.read_text()), (
                f"{readme.relative_to(ROOT)}: {path}#{heading}"
            )


def anchors(text: str) -> set[str]:
    """The names by which links reach the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_every_room_opens_with_a_readme() -> None:
    folders = {path.parent for room in ("dist_dcgan", "shards") for path in (ROOT / room).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "README.md").is_file()] == []


def test_the_front_page_stays_short() -> None:
    assert len(README.read_text().splitlines()) <= 170


if __name__ == "__main__":
    CONFIGURATION.write_text(with_table(CONFIGURATION.read_text()))
