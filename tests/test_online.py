"""Sessions are played exactly once, replay counts what was bought, intervals cover the truth."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.base import Decision
from encoders.state import EMPTY, Observation
from evaluation.decisions import DecisionWriter, read
from evaluation.online import by_household, interval, play, replay, table

ITEMS = 12


def observation(b: int, places: int = 8) -> Observation:
    return Observation(
        profile=torch.arange(b).float()[:, None],
        past=torch.full((b, 2), EMPTY),
        past_count=torch.zeros(b, 2),
        past_age=torch.zeros(b, 2),
        history=torch.full((b, places), EMPTY),
        feedback=torch.zeros(b, places, 1),
        context=torch.zeros(b, 1),
    )


class Countdown:
    """User u stays u + 1 steps in episode 0, leaves at once in others, and earns 10 u + item."""

    slate_size = 1
    single_action_space = SimpleNamespace(n=ITEMS)

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.time = torch.zeros(num_envs, dtype=torch.float64)
        self.started: list[tuple[int, int]] = []

    def reset(self, *, options: dict[str, Tensor]) -> tuple[Observation, dict[str, Any]]:
        self.user, self.episode = options["user"].clone(), options["episode"].clone()
        self.step_of = torch.zeros(self.num_envs, dtype=torch.int64)
        return self.observe(), {"mask": torch.full((self.num_envs, 8), EMPTY)}

    def observe(self) -> Observation:
        obs = observation(self.num_envs)
        obs.profile[:, 0] = self.user.float()
        return obs

    def step(self, slate: Tensor) -> tuple[Observation, Tensor, Tensor, Tensor, dict[str, Any]]:
        user, reward = self.user, 10.0 * self.user + slate[:, 0]
        done = self.step_of >= torch.where(self.episode == 0, self.user, 0)
        empty = torch.zeros_like(done)
        info = {
            "mask": torch.full((self.num_envs, 8), EMPTY),
            "user": self.user,
            "episode": self.episode,
            "step": self.step_of,
            "slot_reward": reward[:, None],
            "slate": slate,
            "response": SimpleNamespace(chosen={"buy": empty[:, None]}),
        }
        self.step_of = torch.where(done, 0, self.step_of + 1)
        self.user = torch.where(done, 9, self.user)  # the next user takes the row
        patient = user == 3  # still there when the steps run out
        return self.observe(), reward, done & ~patient, done & patient, info


class Fixed:
    """Shows the items 0, 1, 2, ... that are not forbidden."""

    def __init__(self, size: int = 1) -> None:
        self.size, self.asked = size, 0

    def act(self, obs: Observation, mask: Tensor, *, explore: bool = True) -> Decision:
        self.asked += len(obs)
        free = torch.ones(len(obs), ITEMS + 1)
        free.scatter_(1, torch.where(mask == EMPTY, ITEMS, mask), 0.0)
        slate = free[:, :ITEMS].sort(dim=1, descending=True, stable=True).indices[:, : self.size]
        return Decision(slate, torch.ones(len(obs), self.size))


def test_each_pair_is_played_exactly_once_to_its_end() -> None:
    agent = Fixed()
    users, episodes = torch.tensor([3, 0, 2, 2]), torch.tensor([0, 0, 0, 1])
    played = play(Countdown(4), agent, users, episodes)
    assert played.length.tolist() == [4, 1, 3, 1]
    assert played.reward.tolist() == [120.0, 0.0, 60.0, 20.0]
    assert agent.asked == 4 + 1 + 3 + 1  # nobody is asked after the end
    assert played.shown.tolist() == [9] + [0] * 11
    assert played.coverage == pytest.approx(1 / 12)


def test_the_log_of_a_play_has_one_row_per_step_of_these_pairs(tmp_path: Any) -> None:
    meta = {"catalog": "", "policy": "fixed", "env": {}, "adaptive": False}
    log = DecisionWriter(tmp_path / "log", behaviours=["buy"], meta=meta)
    play(Countdown(2), Fixed(), torch.tensor([1, 2]), torch.tensor([0, 0]), log=log)
    log.close()
    frame = read(tmp_path / "log")
    assert sorted(zip(frame.user, frame.step, strict=True)) == [
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
        (2, 2),
    ]
    assert frame[frame.terminated].step.tolist() == [1, 2]


def test_an_env_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="2 users need an env of num_envs=2"):
        play(Countdown(3), Fixed(), torch.tensor([1, 2]), torch.tensor([0, 0]))


def test_replay_counts_what_was_really_bought_among_the_shown() -> None:
    bought = torch.tensor([[0, 3, 5], [9, 9, EMPTY], [EMPTY] * 3])
    found = [
        replay(Fixed(k), observation(3), bought, steps=n, slate_size=k).tolist()
        for n, k in ((1, 1), (4, 1), (2, 2), (2, 3))
    ]
    assert found == [[1, 0, 0], [2, 0, 0], [2, 0, 0], [3, 0, 0]]


def test_replay_of_many_trips_equals_each_alone() -> None:
    g = torch.Generator().manual_seed(0)
    bought = torch.randint(0, ITEMS, (1100, 2), generator=g)
    whole = replay(Fixed(), observation(1100), bought, steps=3, slate_size=1)
    some = [
        replay(Fixed(), observation(1100)[[i]], bought[[i]], steps=3, slate_size=1)
        for i in (0, 700)
    ]
    assert whole[[0, 700]].tolist() == torch.cat(some).tolist()
    assert (
        whole.tolist()
        == (
            (bought < 3).sum(1) - ((bought[:, 0] == bought[:, 1]) & (bought[:, 0] < 3)).long()
        ).tolist()
    )


def test_replay_tells_the_agent_of_hits() -> None:
    heard = []

    class Listening(Fixed):
        def act(self, obs: Observation, mask: Tensor, *, explore: bool = True) -> Decision:
            heard.append((obs.history[0, :2].tolist(), obs.feedback[0, :2, 0].tolist()))
            return super().act(obs, mask, explore=explore)

    replay(Listening(), observation(1), torch.tensor([[1]]), steps=3, slate_size=1)
    assert heard == [([-1, -1], [0, 0]), ([0, -1], [0, 0]), ([0, 1], [0, 1])]


def test_replay_beyond_the_history_is_refused() -> None:
    with pytest.raises(ValueError, match="3 slates of 3 need 9 places of history"):
        replay(Fixed(3), observation(1), torch.tensor([[1]]), steps=3, slate_size=3)


@pytest.mark.parametrize("simulators", [1, 5])
def test_the_interval_covers_the_truth_19_times_in_20(simulators: int) -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for i in range(400):
        world = rng.normal(0, 0.2 if simulators > 1 else 0, (simulators, 1))
        matrix = 1.0 + world + rng.normal(0, 1, (1, 60)) + rng.normal(0, 0.5, (simulators, 60))
        _, low, high = interval(matrix, replicates=200, seed=i)
        inside += low < 1.0 < high
    assert 0.92 <= inside / 400 <= 0.985


def test_the_interval_does_not_need_every_household_in_every_simulator() -> None:
    rng = np.random.default_rng(1)
    own = np.full((3, 90), np.nan)  # each simulator has thirty households of its own
    for s in range(3):
        own[s, 30 * s : 30 * s + 30] = rng.normal(2, 1, 30)
    mean, low, high = interval(own)
    assert mean == pytest.approx(np.nanmean(own))
    assert low < mean < high
    assert high - low < 2.0


def test_an_interval_of_one_household_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 households"):
        interval(np.ones((5, 1)))


def test_means_are_taken_household_by_household() -> None:
    reward = np.array([[1.0, 3.0, 5.0], [0.0, 0.0, 7.0]])
    assert by_household(reward, np.array(["b", "b", "a"])).tolist() == [[5.0, 2.0], [7.0, 0.0]]
    own = by_household(reward, np.array([[0, 0, 1], [2, 2, 3]]))
    np.testing.assert_array_equal(own, [[2, 5, np.nan, np.nan], [np.nan, np.nan, 0, 7]])


def rows(rewards: dict[str, np.ndarray], household: np.ndarray) -> dict[str, dict[str, Any]]:
    ones = dict.fromkeys(rewards, 1.0)
    made = table(rewards, household, length=ones, coverage=ones, replay_value={**ones})
    return {row["policy"]: row for row in made}


def test_a_paired_difference_is_narrower_than_the_two_means() -> None:
    rng = np.random.default_rng(2)
    base = rng.normal(1, 1, (5, 200))
    made = rows(
        {"popularity": base, "better": base + rng.normal(0.1, 0.05, (5, 200))}, np.arange(200)
    )
    better = made["better"]
    assert better["diff_ci_low"] > 0
    assert better["diff_to_popularity"] == pytest.approx(0.1, abs=0.02)
    assert (better["diff_ci_high"] - better["diff_ci_low"]) < 0.3 * (
        better["ci_high"] - better["ci_low"]
    )
    assert made["popularity"]["diff_to_popularity"] == 0.0
    assert made["popularity"]["diff_ci_low"] == made["popularity"]["diff_ci_high"] == 0.0


def test_sessions_of_one_household_do_not_count_as_many() -> None:
    rng = np.random.default_rng(3)
    taste = np.repeat(rng.normal(1, 1, 40), 25)[None] + rng.normal(0, 0.1, (2, 1000))
    width = [
        (row := rows({"popularity": taste}, household)["popularity"])["ci_high"] - row["ci_low"]
        for household in (np.repeat(np.arange(40), 25), np.arange(1000))
    ]
    assert width[0] > 3 * width[1]


def test_the_table_needs_its_baseline() -> None:
    with pytest.raises(ValueError, match="'popularity' was not played: there are dqn"):
        rows({"dqn": np.ones((1, 4))}, np.arange(4))
