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
    "oscillation": {"logit/fake": 5.0, "logit/fake_updated": -30.0},
}
FADING = {"grad_norm/g": 100.0, "diversity/fake": 0.2}
STEPS = {rule.mode: rule.steps for rule in RULES}


def rows(first: int, count: int, **changes: float) -> list[dict[str, Any]]:
    return [HEALTHY | changes | {"step": step} for step in range(first, first + count)]


def test_every_rule_has_a_case() -> None:
    assert {*BROKEN, "fading"} == STEPS.keys()


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


def test_a_resumed_watchdog_remembers_how_it_was_before() -> None:
    whole, first, second = Watchdog(), Watchdog(), Watchdog()
    fading = [*rows(1, 2000), *rows(2001, 1000, **FADING)]
    first.observe(fading[:2300])
    second.load_values(json.loads(json.dumps(first.values())))
    assert second.observe(fading[2300:]) == whole.observe(fading) != []
    assert second.values() == whole.values()


def test_fading_is_a_gradient_that_grows_while_images_get_paler() -> None:
    watchdog = Watchdog()
    assert watchdog.observe(rows(1, 2000)) == []
    (found,) = watchdog.observe(rows(2001, 3000, **FADING))
    assert found.rule.mode == "fading" and 2300 < found.since < found.step < 2700
    watchdog.observe(rows(5001, 3000))
    (again,) = watchdog.observe(rows(8001, 3000, **FADING))
    assert again.rule.mode == "fading" and again.since > 8000


@pytest.mark.parametrize("only", FADING)
def test_a_gradient_that_grows_or_paler_images_alone_are_not_fading(only: str) -> None:
    assert Watchdog().observe([*rows(1, 2000), *rows(2001, 3000, **{only: FADING[only]})]) == []


def test_how_training_starts_is_not_fading() -> None:
    """G's gradient may grow and its images lose contrast then; only what follows is held against it."""
    assert Watchdog().observe([*rows(1, 100), *rows(101, 6000, **FADING)]) == []


def test_skipped_steps_are_not_fading() -> None:
    watchdog = Watchdog()
    watchdog.observe([*rows(1, 2000), *rows(2001, 30, **{"grad_norm/g": math.inf, "diversity/fake": math.nan})])
    assert watchdog.observe(rows(2031, 1000)) == []
    assert watchdog.observe(rows(3031, 1000, **FADING)) != []


def test_one_image_per_rank_says_nothing_about_diversity() -> None:
    assert Watchdog().observe(rows(1, 1000, **{"diversity/real": 0.0, "diversity/fake": 0.0})) == []


def test_a_checkpoint_of_other_rules_is_taken_over_as_far_as_it_goes() -> None:
    old = Watchdog()
    old.observe(rows(1, 2, **BROKEN["mode collapse"]))
    values = json.loads(json.dumps(old.values()))
    for part in ("level", "since", "named"):
        del values[part]["oscillation"]
        values[part]["a rule of another version"] = 1
    watchdog = Watchdog()
    watchdog.load_values(values)
    assert watchdog.values() == old.values()
    del values["trend"]
    watchdog.load_values(values)
    assert watchdog.values() == old.values() | {"trend": Watchdog().values()["trend"]}
