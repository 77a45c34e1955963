"""Any Gymnasium environment as rows of users: ends, seeds, actions, masks, bad input."""

from dataclasses import fields

import pytest
import torch
from gym_worlds import make, same, shop
from torch import Tensor

from agents.base import Decision
from encoders.state import EMPTY, Observation
from envs.gym_vector import GymVectorEnv
from evaluation.online import sessions


def undo_log(x: Tensor) -> Tensor:
    return x.abs().expm1() * x.sign()


def roll(env: GymVectorEnv, users: Tensor, episodes: Tensor, steps: int) -> list[Observation]:
    """What rows see while they play item (user + step) % N."""
    obs, _ = env.reset(options={"user": users, "episode": episodes})
    seen = [obs]
    for t in range(steps):
        slate = (users[:, None] + t + torch.arange(env.slate_size)) % env.num_items
        obs, *_, info = env.step(slate)
        seen.append(info.get("final_obs", obs))
    return seen


def test_who_is_done_shows_the_next_episode_and_keeps_the_last_view_of_the_old_one():
    env = make("Walk", num_envs=16, seed=3)
    obs, info = env.reset()
    length, t = obs.profile[:, 0].expm1().round(), torch.zeros(16)
    assert len(length.unique()) > 2  # else rows would not end at different steps
    turn = torch.zeros(16, dtype=torch.int64)
    ends = 0
    for _ in range(12):
        obs, reward, terminated, truncated, info = env.step(torch.full((16, 1), 2))
        t += 1
        assert torch.equal(terminated, t == length)
        assert not truncated.any()
        assert torch.equal(reward, torch.full((16,), 3.0))  # action 1 + 2
        assert torch.equal(info["step"], (t - 1).long())  # that was acted on
        if terminated.any():
            assert torch.equal(info["_final_obs"], terminated)
            last = undo_log(info["final_obs"].profile)
            assert torch.allclose(last[:, 0], length)
            assert torch.allclose(last[:, 1], t)
            assert (info["final_obs"].history != EMPTY).sum(dim=1).tolist() == t.tolist()
            ends += 1
            turn += terminated
            length = torch.where(terminated, obs.profile[:, 0].expm1().round(), length)
            t = torch.where(terminated, 0.0, t)
        else:
            assert "final_obs" not in info
        assert torch.allclose(undo_log(obs.profile)[:, 1], t)
        assert ((obs.history != EMPTY).sum(dim=1) == t).all()
        assert torch.equal(env.time, t.double())
    assert ends > 3
    assert turn.min() >= 2
    assert env.turn.tolist() == turn.tolist()


def test_a_step_limit_is_truncated_and_an_end_at_the_limit_is_not():
    env = make("Short", num_envs=64)  # lengths 2 to 5, cut at 3
    obs, _ = env.reset()
    length = obs.profile[:, 0].expm1().round()
    env.step(torch.zeros(64, 1, dtype=torch.int64))
    _, _, terminated, truncated, _ = env.step(torch.zeros(64, 1, dtype=torch.int64))
    assert torch.equal(terminated, length == 2)
    alive = ~terminated
    _, _, terminated, truncated, _ = env.step(torch.zeros(64, 1, dtype=torch.int64))
    assert torch.equal(terminated[alive], (length == 3)[alive])  # both said so: it left
    assert torch.equal(truncated[alive], (length > 3)[alive])
    assert (length == 3).any()
    assert (length > 3).any()


def test_an_episode_that_nothing_ends_is_cut(monkeypatch):
    monkeypatch.setattr("envs.gym_make.ENDLESS", 4)
    nvec = {"nvec": [2, 2]}
    for steps, told in ((None, True), (3, False)):
        env = make("Combo", num_envs=2, kwargs=nvec, max_steps=steps)
        env.reset()
        for t in range(1, 5 if told else 4):
            *_, terminated, truncated, _ = env.step(torch.zeros(2, env.slate_size).long())
            assert not terminated.any()
            assert truncated.tolist() == [t == (steps or 4)] * 2
        assert any("cut after 4 steps" in line for line in env.notes()) == told
    assert not any("cut after" in line for line in make("Short").notes())
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        make("Combo", kwargs=nvec, max_steps=0)


def test_an_episode_is_a_function_of_seed_user_and_episode_whatever_the_batch():
    users, episodes = torch.tensor([5, 0, 9, 5, 2]), torch.tensor([0, 1, 0, 7, 0])
    for build in (lambda n: make("Walk", num_envs=n, seed=4), lambda n: shop(num_envs=n, seed=4)):
        together = roll(build(5), users, episodes, 2)
        order = torch.tensor([3, 1, 4, 0, 2])
        moved = roll(build(5), users[order], episodes[order], 2)
        for b in range(5):
            alone = roll(build(1), users[b : b + 1], episodes[b : b + 1], 2)
            for x, y, z in zip(together, alone, moved, strict=True):
                assert same(x[b : b + 1], y)
                assert same(x[order], z)
    first = roll(make("Walk", num_envs=64), torch.arange(64), torch.zeros(64).long(), 0)[0]
    for other in (
        roll(make("Walk", num_envs=64), torch.arange(64), torch.ones(64).long(), 0)[0],
        roll(make("Walk", num_envs=64, seed=1), torch.arange(64), torch.zeros(64).long(), 0)[0],
    ):
        agree = (first.profile == other.profile).all(dim=1).float().mean()
        assert agree < 0.5  # a quarter by chance


def test_a_row_that_goes_on_by_itself_plays_its_own_episodes_whoever_is_beside_it():
    def lengths(env: GymVectorEnv) -> list[float]:
        obs, _ = env.reset()
        seen = [float(obs.profile[0, 0])]
        while len(seen) < 8:
            obs, *_, info = env.step(torch.zeros(env.num_envs, 1, dtype=torch.int64))
            if "_final_obs" in info and info["_final_obs"][0]:
                seen.append(float(obs.profile[0, 0]))
        return seen

    assert lengths(make("Walk", num_envs=1, seed=2)) == lengths(make("Walk", num_envs=7, seed=2))
    assert lengths(make("Walk", num_envs=1, seed=2)) != lengths(make("Walk", num_envs=1, seed=3))


def test_the_episode_a_row_came_to_can_be_asked_for_by_its_number():
    env = make("Walk", num_envs=6, seed=8)
    _, info = env.reset()
    for _ in range(7):
        *_, info = env.step(torch.zeros(6, 1, dtype=torch.int64))
    now = env.restart()[1]
    assert len(torch.cat([now["episode"], info["episode"]]).unique()) == 12
    asked = {"user": info["user"].flip(0), "episode": info["episode"].flip(0)}
    other, _ = make("Walk", num_envs=6, seed=8).reset(options=asked)
    length = {int(e): float(x) for e, x in zip(asked["episode"], other.profile[:, 0], strict=True)}
    straight = make("Walk", num_envs=6, seed=8)
    obs, told = straight.reset()
    for _ in range(7):  # the same again: what each row showed when its last episode began
        first = {int(e): float(x) for e, x in zip(told["episode"], obs.profile[:, 0], strict=True)}
        obs, *_ = straight.step(torch.zeros(6, 1, dtype=torch.int64))
        told = straight.arrival()
    assert first == length


def test_reset_with_a_seed_begins_all_over_and_without_one_goes_on():
    env = make("Walk", num_envs=32, seed=5)
    first, told = env.reset()
    second, later = env.reset()
    assert not same(first, second)
    again, repeated = env.reset(seed=5)
    assert same(first, again)
    assert torch.equal(told["episode"], repeated["episode"])
    assert not torch.isin(told["episode"], later["episode"]).any()


def test_what_was_saved_after_a_restart_goes_on_bit_for_bit():
    def go(env: GymVectorEnv, steps: int) -> list[Tensor]:
        seen = []
        for t in range(steps):
            obs, reward, terminated, _, info = env.step((torch.arange(9) + t)[:, None] % 3)
            seen += [getattr(obs, f.name) for f in fields(obs)]
            seen += [reward, terminated, info["episode"], info["step"]]
        return seen

    straight = make("Walk", num_envs=9, seed=6)
    straight.reset()
    go(straight, 7)
    obs, info = straight.restart()
    state = straight.state_dict()
    resumed = make("Walk", num_envs=9, seed=0)
    back, again = resumed.load_state_dict(state)
    assert same(obs, back)
    assert torch.equal(info["episode"], again["episode"])
    assert all(torch.equal(x, y) for x, y in zip(go(straight, 9), go(resumed, 9), strict=True))
    one, _ = straight.restart()
    other, _ = resumed.restart()
    assert same(one, other)
    one, _ = straight.restart(100)
    fresh = make("Walk", num_envs=9, seed=6)
    assert same(one, fresh.restart(100)[0])  # a function of (seed, row, turn)
    assert straight.turn.tolist() == [100] * 9


def test_a_checkpoint_amid_episodes_or_of_other_rows_is_refused():
    env = make("Walk", num_envs=3)
    env.reset()
    env.step(torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"under way .* call restart\(\) first"):
        env.state_dict()
    with pytest.raises(ValueError, match="turn must be above 0"):
        env.restart(0)
    env.restart()
    with pytest.raises(ValueError, match="3 rows, this one 2"):
        make("Walk", num_envs=2).load_state_dict(env.state_dict())


def test_rows_of_empty_slots_rest():
    env = make("Walk", num_envs=4, seed=1)
    obs, _ = env.reset()
    slate = torch.tensor([[0], [EMPTY], [2], [EMPTY]])
    now, reward, terminated, truncated, info = env.step(slate)
    assert reward.tolist() == [1.0, 0.0, 3.0, 0.0]
    assert not (terminated | truncated)[[1, 3]].any()
    assert same(now[[1, 3]], obs[[1, 3]])
    assert info["slate"].tolist() == slate.tolist()
    assert env.time.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_sessions_are_played_once_each():
    env = make("Walk", num_envs=12)
    users = torch.arange(12)
    episodes = torch.zeros(12, dtype=torch.int64)
    obs, _ = env.reset(options={"user": users, "episode": episodes})
    length = obs.profile[:, 0].expm1().round()

    def choose(rows: Tensor, seen: Observation, mask: Tensor | None) -> Decision:
        return Decision(torch.full((len(rows), 1), 1), torch.ones(len(rows), 1))

    played = sessions(env, choose, users, episodes)
    assert played.length.tolist() == length.tolist()
    assert played.reward.tolist() == (2.0 * length).tolist()
    assert played.shown.tolist() == [0, int(length.sum()), 0]
