"""The watchdog names each way to go wrong, once, and keeps still where training swings but goes on."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from dist_dcgan.training.watchdog import RULES, Watchdog

HEALTHY = {
    "loss/d": 0.5,
    "loss/g": 3.0,
    "score/fake": 0.2,
    "grad_norm/d": 30.0,
    "grad_norm/g": 20.0,
    "diversity/real": 0.5,
    "diversity/fake": 0.4,
    "logit/fake": -2.0,
    "logit/fake_updated": -4.0,
}
BROKEN: dict[str, dict[str, float]] = {
    "not finite": {"loss/d": math.nan},
    "most steps are skipped": {"grad_norm/d": math.inf},
    "the discriminator has won": {"grad_norm/g": 1e-4, "loss/g": 42.0},
    "the generator has won": {"score/fake": 0.99, "loss/g": 0.01, "grad_norm/g": 1e-4},
    "mode collapse": {"diversity/fake": 0.02},
    "fading": {"diversity/fake": 0.25},
    "oscillation": {"logit/fake": 5.0, "logit/fake_updated": -30.0},
}
STEPS = {rule.mode: rule.steps for rule in RULES}


def rows(first: int, count: int, **changes: float) -> list[dict[str, Any]]:
    return [HEALTHY | changes | {"step": step} for step in range(first, first + count)]


def test_every_rule_has_a_case() -> None:
    assert BROKEN.keys() == STEPS.keys()


@pytest.mark.parametrize("mode", BROKEN)
def test_names_the_mode_and_since_when(mode: str) -> None:
    watchdog = Watchdog()
    assert watchdog.observe(rows(1, 7)) == []
    assert watchdog.observe(rows(8, STEPS[mode] - 1, **BROKEN[mode])) == []
    found = watchdog.observe(rows(7 + STEPS[mode], 1, **BROKEN[mode]))
    assert [(one.rule.mode, one.since, one.step) for one in found] == [(mode, 8, 7 + STEPS[mode])]
    assert len(str(found[0]).splitlines()) == 3


@pytest.mark.parametrize("mode", BROKEN)
def test_is_named_once_until_it_has_passed(mode: str) -> None:
    watchdog, steps = Watchdog(), STEPS[mode]
    assert watchdog.observe(rows(1, steps, **BROKEN[mode])) != []
    assert watchdog.observe(rows(1 + steps, 5 * steps, **BROKEN[mode])) == []
    assert watchdog.observe(rows(1 + 6 * steps, steps)) == []
    assert watchdog.observe(rows(1 + 7 * steps, steps, **BROKEN[mode])) != []


@pytest.mark.parametrize(("every", "named"), [(4, True), (2, False)])
def test_a_mode_that_holds_in_most_steps_is_named_and_in_half_of_them_not(every: int, named: bool) -> None:
    """Every so many steps are healthy."""
    watchdog, broken = Watchdog(), BROKEN["oscillation"]
    found = [watchdog.observe(rows(step, 1, **(broken if step % every else {}))) for step in range(1, 2001)]
    assert any(found) == named


def test_a_resumed_watchdog_goes_on_counting() -> None:
    whole, first, second = Watchdog(), Watchdog(), Watchdog()
    broken = rows(1, STEPS["mode collapse"], **BROKEN["mode collapse"])
    first.observe(broken[:60])
    second.load_values(json.loads(json.dumps(first.values())))
    assert second.observe(broken[60:]) == whole.observe(broken) != []


def test_a_slow_start_is_not_fading() -> None:
    """The 16th of the paper's width on photographs of 64x64 is paler than they are for its first 800 steps."""
    watchdog = Watchdog()
    assert watchdog.observe([*rows(1, 1200, **BROKEN["fading"]), *rows(1201, 3000)]) == []


def test_one_image_per_rank_says_nothing_about_diversity() -> None:
    assert Watchdog().observe(rows(1, 1000, **{"diversity/real": 0.0, "diversity/fake": 0.0})) == []


def test_a_checkpoint_of_other_rules_is_taken_over_as_far_as_it_goes() -> None:
    old = Watchdog()
    old.observe(rows(1, 2, **BROKEN["mode collapse"]))
    values = json.loads(json.dumps(old.values()))
    for part in values.values():
        del part["oscillation"]
        part["a rule of another version"] = 1
    watchdog = Watchdog()
    watchdog.load_values(values)
    assert watchdog.values() == old.values()
