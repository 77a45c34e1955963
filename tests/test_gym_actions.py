"""Any Gymnasium environment as rows of users: actions, masks, bad input, what is told of it."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from gym_worlds import make, same, shop
from gymnasium import spaces
from omegaconf import OmegaConf

from encoders.state import EMPTY, Observation
from envs.gym_actions import read_actions
from envs.gym_vector import GymVectorEnv


def test_numbered_actions_start_where_the_environment_starts():
    env = make("Walk", num_envs=3)
    env.reset()
    assert (env.num_items, env.slate_size) == (3, 1)
    assert env.step(torch.tensor([[0], [1], [2]]))[1].tolist() == [1.0, 2.0, 3.0]
    assert env.step(torch.tensor([0, 1, 2]))[1].tolist() == [1.0, 2.0, 3.0]  # (B,) as Discrete
    assert torch.equal(env.item_vectors, torch.eye(3))


@pytest.mark.parametrize("start", [None, [5, 7]])
def test_a_joint_action_is_every_combination_once(start):
    env = make("Combo", num_envs=6, kwargs={"nvec": [2, 3], "start": start})
    env.reset()
    assert env.num_items == env.single_action_space.n == 6
    reward = env.step(torch.arange(6)[:, None])[1]
    a, b = start or [0, 0]
    expected = [100.0 * (a + i) + b + j for i in range(2) for j in range(3)]
    assert reward.tolist() == expected


@pytest.mark.parametrize(
    "space", [spaces.Box(-1.0, 1.0, (2,)), spaces.MultiBinary(3), spaces.Tuple([])]
)
def test_other_actions_are_refused_with_what_fits(space):
    with pytest.raises(ValueError, match="actions must be Discrete, or MultiDiscrete"):
        read_actions(space, "x", slate="auto", features=False, max_actions=9)


def test_repeats_in_a_slate_are_counted_and_left_to_the_environment():
    env = shop(num_envs=3)
    env.reset()
    _, reward, *_, info = env.step(torch.tensor([[0, 2], [2, 2], [1, 1]]))
    assert info["illegal"].tolist() == [0, 1, 1]
    assert reward.tolist() == [2.0, 2.0, 0.0]
    assert info["slate"].tolist() == [[0, 2], [2, 2], [1, 1]]


def test_slates_that_cannot_be_shown_are_refused():
    env = shop(num_envs=2)
    with pytest.raises(ValueError, match=r"call reset\(\) first"):
        env.step(torch.zeros(2, 2, dtype=torch.int64))
    env.reset()
    for slate, message in (
        ([[0, 1], [2, 6]], "numbered 0 to 5 .* got 6 in row 1, slot 1"),
        ([[0, 1], [-2, 3]], "got -2 in row 1, slot 0"),
        ([[0, EMPTY], [2, 3]], "row 0 has an empty slot 1"),
        ([[0, 1]], r"slate must be \(2, 2\)"),
        ([[0.5, 1.0], [2.0, 3.0]], "integer item ids"),
    ):
        with pytest.raises(ValueError, match=message):
            env.step(torch.tensor(slate))
    assert env.time.tolist() == [0.0, 0.0]  # refused before anything has changed


@pytest.mark.parametrize("way", ["info", "method"])
def test_the_mask_is_that_of_the_state_that_is_shown(way):
    env = make("Masked", num_envs=5, kwargs={"way": way, "length": 3})
    _, info = env.reset()
    assert info["mask"].dtype == torch.bool
    assert info["mask"].sum(dim=1).tolist() == [3] * 5
    first = (~info["mask"]).int().argmax(dim=1)
    action = (first + 1) % 4
    *_, info = env.step(action[:, None])
    assert info["illegal"].tolist() == [0] * 5
    assert torch.equal((~info["mask"]).int().argmax(dim=1), action)
    *_, info = env.step(action[:, None])
    assert info["illegal"].tolist() == [1] * 5
    *_, terminated, _, info = env.step(((action + 1) % 4)[:, None])
    assert terminated.all()
    assert torch.equal((~info["final_mask"]).int().argmax(dim=1), (action + 1) % 4)
    assert torch.equal(info["mask"], env.arrival()["mask"])


def test_masks_of_joint_actions_and_slates():
    def allowed(sizes: list[int], slate: bool, mask: list[int]) -> list[bool]:
        space = spaces.MultiDiscrete(sizes)
        actions = read_actions(space, "x", slate=slate, features=False, max_actions=99)
        return actions.allowed(np.array(mask), "x, row 0, step 0").tolist()

    joint = allowed([2, 3], False, [1, 0, 1, 0, 1])
    assert joint == [True, False, True, False, False, False]
    assert allowed([2, 3], False, [0, 0, 0, 0, 1, 1])[4:] == [True, True]  # as one already
    assert allowed([3, 3], True, [1, 0, 1, 1, 0, 1]) == [True, False, True]
    with pytest.raises(ValueError, match="differs between the slots"):
        allowed([3, 3], True, [1, 0, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="x, row 0, step 0: the action mask must have 6 entries"):
        allowed([2, 3], False, [1, 1])


def test_a_mask_that_allows_nothing_is_an_error_unless_the_episode_is_over():
    env = make("Masked", num_envs=2, kwargs={"length": 1, "nothing": True})
    env.reset()
    *_, info = env.step(torch.zeros(2, 1, dtype=torch.int64))
    assert info["final_mask"].all()
    env = make("Masked", num_envs=2, kwargs={"length": 2, "nothing": True})
    env.reset()
    with pytest.raises(ValueError, match="row 0, step 1: the action mask allows 0 of 4"):
        env.step(torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("four", r"row 0, step 2: step\(\) must return observation, reward \(a number\)"),
        ("nothing", r"step\(\) must return .* got None"),
        ("reward", r"step\(\) must return"),
        ("info", r"step\(\) must return"),
        ("nan reward", "row 0, step 2: reward must be finite, got nan"),
        ("nan", r"Garbage-v0, row 0, step 3: x\[1\] must be a finite number, got nan"),
        ("shape", r"step 3: x must hold 2 numbers .* got shape \(3,\)"),
        ("key", "step 3: the observation has no y"),
        ("outside", r"step 3: y\[0\] must be an integer in 0..2, got 3"),
    ],
)
def test_garbage_is_named_with_environment_row_and_step(what, message):
    env = make("Garbage", num_envs=2, kwargs={"what": what})
    env.reset()
    slate = torch.zeros(2, 1, dtype=torch.int64)
    env.step(slate)
    env.step(slate)
    with pytest.raises(ValueError, match=message):
        env.step(slate)


def test_a_reset_without_info_is_refused():
    with pytest.raises(ValueError, match=r"reset\(\) must return observation and info"):
        make("Garbage", kwargs={"what": "reset"}).reset()


def test_what_cannot_be_made_says_what_to_do():
    with pytest.raises(ValueError, match=r"env.module=PACKAGE"):
        GymVectorEnv("nobody/Knows-v0")
    with pytest.raises(ValueError, match=r"v3.* use `Taxi-v4` instead$"):  # no package to name
        GymVectorEnv("Taxi-v3")
    with pytest.raises(ValueError, match="Did you mean: `CartPole`"):
        GymVectorEnv("CartPol-v1")
    with pytest.raises(ValueError, match=r"env.module=no_such_package cannot be imported"):
        GymVectorEnv("CartPole-v1", module="no_such_package")
    with pytest.raises(ValueError, match=r"env.kwargs do not fit"):
        make("Walk", kwargs={"speed": 3})
    for wrong in ({"num_envs": 0}, {"history": 0}, {"past": 0}):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            make("Walk", **wrong)
    with pytest.raises(ValueError, match="past must have room for a slate of 2"):
        shop(past=1)
    with pytest.raises(ValueError, match="seed must be one integer"):
        make("Walk").reset(seed=[1, 2])  # type: ignore[arg-type]


def test_an_environment_that_ignores_its_seed_is_told_of():
    assert not any("does not repeat" in line for line in make("Walk").notes())
    assert any("does not repeat an episode" in line for line in make("Careless").notes())
    assert any("shown is read from items, feedback from bought" in x for x in shop().notes())


def test_what_was_handed_out_does_not_change_later():
    env = shop(num_envs=2, history=1)
    obs, _ = env.reset()
    kept = Observation(**{f.name: getattr(obs, f.name).clone() for f in fields(obs)})
    env.step(torch.tensor([[0, 2], [2, 4]]))
    env.step(torch.tensor([[0, 2], [2, 4]]))
    assert same(obs, kept)


def test_the_yaml_says_what_the_code_does(request):
    given = OmegaConf.load(request.config.rootpath / "experiments/conf/env/gym.yaml")
    defaults = GymVectorEnv.__init__.__kwdefaults__
    assert given.id is None
    for name in (
        "module", "item_features", "history", "past", "slate", "shown", "feedback", "oracle"
    ):  # fmt: skip
        assert given[name] == defaults[name], name
    assert given.kwargs == {}
