"""Settings of simulators are seen to do what they say, and to do nothing when off."""

from dataclasses import replace

import pytest

from simulators.base import SimSpec
from simulators.fitted import FittedSimulator
from simulators.testing import check_simulator
from simulators.testing_dynamics import DYNAMICS, EFFECTS, Dynamic, check_dynamics
from simulators.worlds import TinyWorld

SPEC = SimSpec(None, None)


def small(**settings):
    """A small world."""
    return TinyWorld(SPEC, items=20, households=30, dim=4, **settings)


DRIFTS = Dynamic("drift", "drifts", off=0.0, on=1.0)
OF_WORLDS = [*(d for d in DYNAMICS if d.setting != "position"), DRIFTS]


@pytest.mark.parametrize(
    "others",
    [{}, {"items": 12, "households": 3, "dim": 2}, {"taste": 0.5, "again": 0.0}, {"stop": (0.6,)}],
    ids=str,
)
def test_the_settings_of_worlds_do_what_they_say(others):
    assert check_dynamics(lambda **s: TinyWorld(SPEC, **others, **s), OF_WORLDS, seed=1) == []


def test_the_settings_of_fitted_users_do_what_they_say_and_are_all_checked(fitted, shelf):
    def make(**settings):
        return FittedSimulator(shelf, fitted.preference, fitted.habits, fitted.users, **settings)

    assert check_dynamics(make, seed=1) == []
    assert {d.setting for d in DYNAMICS} == set(vars(fitted.assumed))


def deserted():
    """A world in which nobody buys anything."""
    world = small()
    world.truth = replace(world.truth, bias=world.truth.bias - 12.0)
    return world


def small_with(setting, change):
    """A way to build shops in which one setting is passed on changed."""
    return lambda **settings: small(**settings | {setting: change(settings[setting])})


@pytest.mark.parametrize(
    ("setting", "change", "words"),
    [
        ("patience", lambda x: x or 0.4, "0.0 must be no special case, so write `default if x is"),
        ("satiation", lambda x: x or 0.8, "0.0 must be no special case"),
        ("satiation", lambda x: -x, "satiation: a purchase must lower the wish for the category's"),
        ("satiation", lambda x: x + 0.3, "satiation=0.0 should switch its effect off, but the"),
        ("drift", lambda x: 0.0, "drift: a purchase must raise the wish for the items most like"),
        ("drift", lambda x: 0.0, "drift: a purchase must change what else is wished for, but no"),
        ("drift", lambda x: -x, "for the items most like it, but it does the opposite"),
        ("drift", lambda x: x + 0.2, "a purchase must leave the items most like it as they were"),
        ("exposure", lambda x: -x, "but it does the opposite: the share bought when shown alone"),
        ("exposure", lambda x: x + 0.7, "`chosen` of an item shown alone must equal `organic`"),
        ("trips", lambda x: 4, "with it off, elapsed must be 0 throughout"),
        ("trips", lambda x: 1, "trips: users must come back for more trips, but no such effect"),
        ("choice", lambda x: "independent", "at most one item of a slate may be chosen"),
        ("choice", lambda x: "logit", "a wanted item in the first slot must never be passed over"),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_do_what_it_says_is_found(setting, change, words):
    mine = [d for d in OF_WORLDS if d.setting == setting]
    problems = check_dynamics(small_with(setting, change), mine)
    assert any(words in problem for problem in problems), problems


def test_a_position_that_is_turned_round_or_always_there_is_found(fitted, shelf):
    parts = (shelf, fitted.preference, fitted.habits, fitted.users)
    only = [d for d in DYNAMICS if d.setting == "position"]
    (problem,) = check_dynamics(lambda position: FittedSimulator(*parts, position=-position), only)
    assert "an item must be bought less in a lower slot, but it does the opposite" in problem
    first, *_ = check_dynamics(lambda position: FittedSimulator(*parts, position=0.3), only)
    assert "an item alone in a slate must be bought as often in any slot" in first


PATIENT = (Dynamic("patience", "leaves sooner", off=0.0, on=0.5),)


def test_declared_settings_are_checked_with_the_rest():
    shop = small()
    shop.dynamics = PATIENT
    (problem,) = check_simulator(shop)
    assert "there is no method rebuilt(self, *, ...)" in problem
    shop.rebuilt = lambda *, patience: small(patience=patience)
    assert check_simulator(shop) == []
    shop.rebuilt = lambda *, patience: small()
    (problem,) = check_simulator(shop)
    assert "is the setting used, passed on by what rebuilds the simulator," in problem


def test_a_simulator_that_cannot_be_rebuilt_or_looked_at_is_said():
    (problem,) = check_dynamics(lambda: small(), PATIENT)
    assert "with all settings off (patience=0.0) it cannot be built: TypeError" in problem
    nobody = [d for d in OF_WORLDS if d.effect == "sates"]
    (problem,) = check_dynamics(lambda satiation: deserted(), nobody)
    assert "as only 0 of 1000 users bought something and stayed" in problem

    def fragile(*, patience):
        if patience == 0.5:
            raise RuntimeError("too impatient")
        return small(patience=patience)

    (problem,) = check_dynamics(fragile, PATIENT)
    assert problem == "patience=0.5: RuntimeError: too impatient"


def test_a_dynamic_that_cannot_be_checked_is_refused():
    with pytest.raises(ValueError, match="there is no effect 'bores' to check; there are: leaves"):
        Dynamic("boredom", "bores")
    with pytest.raises(ValueError, match=r"off and on are both 1\.0: give a value of `on`"):
        Dynamic("boredom", "sates", off=1.0, on=1.0)


def test_every_effect_is_one_of_a_world_or_of_an_example():
    assert {d.effect for d in OF_WORLDS} | {"uses up", "sells less below"} == set(EFFECTS)


def test_fitted_users_are_as_frequent_buyers_as_their_log(fitted, shop):
    assert check_simulator(fitted, logs=shop) == []


def test_trips_larger_than_those_of_the_log_are_said(fitted, shop):
    one = ~shop.events.duplicated(["user", "time"])
    (problem,) = check_simulator(fitted, logs=replace(shop, events=shop.events[one]))
    assert "items a user would buy on a trip, in the log it is" in problem
    assert "to the logits" in problem
