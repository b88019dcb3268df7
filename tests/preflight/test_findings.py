"""What all ranks make of what each has found."""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

from dist_dcgan.preflight.results import Check, Finding, agree, examine_all
from dist_dcgan.preflight.run_checks import checks
from tests.support.subjects import subject


def test_the_worst_counts_and_its_ranks_are_named() -> None:
    ok, bad = Finding("ok", "fine"), Finding("FAILED", "broken: mend it")
    assert agree([ok, ok]) == ok
    assert agree([None, ok]) == ok
    assert agree([None, None]) is None
    assert agree([ok, Finding("warning", "slow"), ok]) == Finding("warning", "rank 1: slow")
    assert agree([ok, bad, Finding("warning", "slow"), bad]) == Finding("FAILED", "ranks 1, 3: broken: mend it")
    assert agree([bad, bad]) == bad
    assert agree([bad, Finding("FAILED", "lost")]) == Finding("FAILED", "rank 0: broken: mend it; rank 1: lost")
    many = [ok, *(Finding("FAILED", f"number {number}") for number in range(5))]
    assert agree(many) == Finding("FAILED", "rank 1: number 0; rank 2: number 1; rank 3: number 2; and 2 more")


def test_the_rank_that_differs_from_most_is_named() -> None:
    def having(torch_version: str) -> Finding:
        return Finding("ok", "fine", {"python": "3", "torch": torch_version}, "install one")

    assert agree([having("2.10"), having("2.10")]) == Finding("ok", "fine")
    found = agree([having("2.9"), having("2.10"), having("2.10")])
    assert found == Finding("FAILED", "torch differs: rank 0 has 2.9, rank 1 has 2.10: install one")
    found = agree([having("2.9"), having("2.10")])
    assert found == Finding("FAILED", "torch differs: rank 1 has 2.10, rank 0 has 2.9: install one")
    found = agree([Finding("ok", "fine", {"torch": "2.9"}, "r"), Finding("ok", "fine", {"weight": "1"}, "r")])
    assert found is not None and found.level == "FAILED"


def test_what_needs_a_failed_check_is_skipped_and_the_rest_is_made() -> None:
    broken = mock.Mock(side_effect=ZeroDivisionError("by\n nought"))
    fine = mock.Mock(return_value=Finding("ok", "fine"))
    made = [Check("a", broken), Check("b", fine, ("a",)), Check("c", fine, ("b",)), Check("d", fine)]
    told: list[str] = []
    found = examine_all([*made, Check("e", lambda _: None)], subject(), lambda thing, _: told.append(thing))
    assert {thing: (finding.level, finding.text) for thing, finding in found.items()} == {
        "a": ("FAILED", "ZeroDivisionError: by nought"),
        "b": ("skipped", "it needs this first: a"),
        "c": ("skipped", "it needs this first: b"),
        "d": ("ok", "fine"),
    }
    assert told == ["a", "b", "c", "d"]


def test_every_need_is_a_check_before() -> None:
    before: set[str] = set()
    for check in checks(ExitStack()):
        assert set(check.needs) <= before
        before.add(check.thing)
