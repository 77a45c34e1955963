"""Every world keeps the simulator's contract, and the conformance kit sees who does not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from simulators.base import SimSpec
from simulators.testing import check_simulator
from simulators.worlds import TinyWorld

CONF = "experiments/conf/env/tiny.yaml"
SPEC = SimSpec(None, None)


@pytest.fixture(scope="module")
def tiny_yaml(request):
    return OmegaConf.load(request.config.rootpath / CONF)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"trips": 3, "satiation": 0.7, "drift": 0.1, "patience": 0.4},
        {"choice": "independent", "exposure": 0.5},
        {"choice": "cascade", "trips": 2},
        {"choice": "independent", "exposure": -0.5, "satiation": -0.5},
        {"items": 12, "households": 3, "dim": 2, "patience": 0.0},
        {"items": 5, "households": 1, "dim": 1, "patience": 1.0},
        {"items": 5, "dim": 1, "again": 0.0, "patience": 0.0, "stop": (0.1, 0.9), "trips": 3},
        {"items": 200, "taste": 3.0, "again": 2.0, "world_seed": 4},
    ],
    ids=str,
)
def test_worlds_keep_the_contract_and_raise_no_alarm(settings):
    for seed in (1, 7):
        world = TinyWorld(SimSpec(None, None, seed=seed), **settings)
        assert check_simulator(world, seed=seed) == []


def test_the_world_of_the_yaml_keeps_the_contract_and_repeats_the_defaults(tiny_yaml):
    sim = instantiate(tiny_yaml.simulator, SPEC)
    assert check_simulator(sim) == []
    default = TinyWorld(SPEC)
    assert torch.equal(sim.users.past, default.users.past)
    for knob in ("taste", "again", "patience", "satiation", "drift", "exposure", "trips", "choice"):
        assert getattr(sim, knob) == getattr(default, knob) == tiny_yaml.simulator[knob]
    reward = instantiate(tiny_yaml.session.reward)
    assert reward.__name__ == "units"


class Broken(TinyWorld):
    """A world with one fault, done to each response."""

    def respond(self, state, slate, draws):
        response, after = super().respond(state, slate, draws)
        return self.spoil(state, slate, response, after)


def spoiled(fault):
    return type("Spoiled", (Broken,), {"spoil": staticmethod(fault)})(SPEC)


def random_answer(state, slate, response, after):
    return replace(response, left=torch.rand(len(slate)) < 0.5), after  # the fault: a global draw


def writes_state(state, slate, response, after):
    state["taste"].mul_(0.5)
    return response, after


def looks_around(state, slate, response, after):
    return replace(response, elapsed=len(slate) * (~response.left).float()), after


def buys_nothing_shown(state, slate, response, after):
    return replace(response, chosen={"buy": response.chosen["buy"] | (slate < 0)}), after


def buys_twice_as_often(state, slate, response, after):
    chosen = response.chosen["buy"] | response.organic.flip(0) & (slate >= 0)
    return replace(response, chosen={"buy": chosen}), after


def floats_for_bools(state, slate, response, after):
    return replace(response, left=response.left.float()), after


def money_for_nothing(state, slate, response, after):
    return replace(response, value=response.value + 1), after


def comes_back_though_gone(state, slate, response, after):
    return replace(response, elapsed=response.left.float()), after


def loses_state(state, slate, response, after):
    return response, {k: v for k, v in after.items() if k != "trip"}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (random_answer, "a global random generator was used"),
        (random_answer, "the same state and draws gave two different answers"),
        (writes_state, "wrote into the state handed in (['taste'])"),
        (looks_around, "answers differently alone than in a batch"),
        (buys_nothing_shown, "buy is true in an empty slot"),
        (buys_nothing_shown, "chosen from a slate of empty slots"),
        (buys_twice_as_often, "but respond bought"),
        (floats_for_bools, "left: must be torch.bool, got torch.float32"),
        (money_for_nothing, "value must be finite, and 0 where nothing was chosen"),
        (comes_back_though_gone, "who left does not come back"),
        (loses_state, "the state's keys changed, ['trip'] differ"),
    ],
)
def test_the_kit_names_the_fault(fault, words):
    problems = check_simulator(spoiled(fault))
    assert any(words in p for p in problems), problems


def test_the_kit_names_wrong_tables_and_missing_members():
    sim = TinyWorld(SPEC)
    sim.users = replace(sim.users, past=sim.users.past.int(), start=sim.users.start.float())
    problems = check_simulator(sim)
    assert [p.partition(";")[0] for p in problems] == [
        "users.past: must be torch.int64, got torch.int32",
        "users.start: must be torch.float64, got torch.float32",
    ]
    sim.users = replace(TinyWorld(SPEC).users, past=torch.full_like(TinyWorld(SPEC).users.past, 3))
    assert any("has an item twice" in p for p in check_simulator(sim))
    assert "needs the members catalog, behaviours, users" in check_simulator(object())[0]


def test_the_kit_sees_a_relevance_that_is_no_probability():
    sim = TinyWorld(SPEC)
    sim.relevance = lambda state: torch.full((len(state["user"]), 60), 1.5)
    (problem,) = check_simulator(sim)
    assert "relevance: must be probabilities above 0 and below 1" in problem


def test_the_kit_itself_leaves_the_global_generators_alone():
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    check_simulator(TinyWorld(SPEC))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002
