"""The race of learners: what is timed is what is said, and a goal that is missed is called so."""

import torch
from omegaconf import OmegaConf

from agents.nets import Reader
from experiments import agent_speed
from experiments.agent_speed import ITEMS, QUICK, SIZE, USERS, Numbers, spec_of


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
    for name, make in agent_speed.LEARNERS.items():
        assert make(QUICK[name], 0)() == QUICK[name]


def test_the_table_compares_ours_with_both_and_says_what_was_not_reached(capsys):
    threads = torch.get_num_threads()
    agent_speed.agents(OmegaConf.create({"repeats": 1, "seed": 0, "quick": True}))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "without double, dueling and memory" in lines[0]
    assert "as it comes" in lines[1]
    assert all("through our adapter" in line for line in lines[:2])
    assert "its defaults" in lines[2]
    assert torch.get_num_threads() == threads
    row = {"case": "a", "unit": "b", "against": "c", "ours": 13.0, "theirs": 10.0, "min": 9.0,
           "max": 11.0, "ratio": 1.3, "goal": 1.4, "reached": False}  # fmt: skip
    assert "1.30 x (goal 1.4 x: not reached)" in agent_speed.text([row])
