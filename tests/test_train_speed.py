"""The race of learners: what is timed is what is said, and the limit is the same arithmetic."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from agents.dqn import DQN
from agents.nets import Reader
from experiments import train_speed
from experiments.bench_rows import KEYS, reached
from experiments.train_racers import ITEMS, SIZE, USERS, Numbers, playing, spec_of
from experiments.train_speed import CALL, RACERS, Clock, bare, products, shares


def test_the_state_has_the_size_that_is_said():
    spec = spec_of(0)
    read = Reader(spec, memory=False)
    assert read.size == SIZE == 256
    assert read.state(Numbers(USERS, 0).reset()[0]).shape == (USERS, SIZE)
    assert spec.num_items == ITEMS == 1000


def test_sessions_last_twenty_steps_and_users_go_at_every_step():
    env = Numbers(USERS, 0)
    env.reset()
    slate = torch.zeros(USERS, 1, dtype=torch.int64)
    ends = torch.stack([env.step(slate)[3] for _ in range(40)])  # (T, B)
    assert (ends.sum(dim=0) == 2).all()
    assert (ends.sum(dim=1) >= USERS // 20).all()


def test_each_learner_plays_the_steps_that_are_counted_and_learns():
    for name, make in RACERS.items():
        assert make(CALL[name], 0, "cpu")() == CALL[name]


@pytest.mark.parametrize("batch", [256, 2048])
def test_the_limit_has_the_products_of_the_product(batch):
    agent = DQN(spec_of(0), replay_ratio=8.0, batch_size=batch)
    play = playing(agent, Numbers(USERS, 0), USERS)
    with FlopCounterMode(display=False) as ours:
        play()
    flops = {}
    for own in (True, False):
        work = bare(0, batch, "cpu", own=own)
        with FlopCounterMode(display=False) as limit:
            assert work() == USERS
        flops[own] = limit.get_total_flops() / ours.get_total_flops()
    # the mean over items and columns of one number are left out of the limit: it is no easier
    assert 0.85 < flops[True] <= 1.0
    assert 1.2 < flops[False] < 1.8  # what is written takes more


def test_products_are_of_matching_sizes():
    for own in (True, False):
        acting, learning = products(spec_of(0), 64, own=own)
        assert all(left[-1] == right[-2] for left, right in [*acting, *learning])


def test_a_clock_counts_the_calls_and_nothing_else():
    clock = Clock("cpu")
    assert clock.around(lambda x, y: x - y)(5, y=3) == 2
    spent = clock.spent
    sum(range(200_000))
    assert clock.spent == spent > 0.0
    with pytest.raises(ZeroDivisionError):
        clock.around(lambda: 1 / 0)()


def test_shares_are_of_the_three_parts_and_below_one():
    found = shares(1, 0.2, 0, True, "cpu")
    assert [row["limit_goal"] for row in found] == pytest.approx([0.85, 0.98, 0.9])
    assert all(set(row) == set(KEYS) and 0.3 < row["ratio_to_limit"] < 1.0 for row in found)


def test_the_table_says_what_was_compared(monkeypatch):
    monkeypatch.setattr(train_speed, "HEADS", ("dot",))
    threads = torch.get_num_threads()
    found = train_speed.rows(1, 0.05, 0, True)
    assert torch.get_num_threads() == threads
    assert {row["bench"] for row in found} == {"train"}
    assert len({row["case"] for row in found}) == len(found)
    races = [row for row in found if row["peer_name"]]
    assert "without double, dueling and memory" in races[0]["case"]
    assert [row["peer_goal"] for row in races] == [1.4, 1.4, 15.0]
    assert all(reached(row) is not None for row in races)
    points = [row["at"] for row in found if row["curve"]]
    assert points == sorted(points)
    assert len(points) == 2
