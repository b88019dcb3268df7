"""The breakages that test the tests (`python -m tests.mutations`) keep up with the code."""

from __future__ import annotations

import pytest

from tests.mutations import BREAKAGES, ROOT, Breakage, broken


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.before.strip()[:40])
def test_each_breakage_still_changes_code_that_parses(breakage: Breakage) -> None:
    text = (ROOT / breakage.file).read_text()
    changed = broken(text, breakage)
    compile(changed, breakage.file, "exec")
    assert changed != text and all((ROOT / tests).exists() for tests in breakage.tests.split())


def test_each_promise_is_broken_somewhere() -> None:
    assert {breakage.promise for breakage in BREAKAGES} == set(range(1, 12))
