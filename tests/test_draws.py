"""Randomness is a function of who, when and what for."""

import pytest
import torch

from simulators.draws import Draws, splitmix64

USER, EPISODE, STEP = torch.arange(200), torch.arange(200) % 7, torch.arange(200) % 5


def unsigned(x):
    return x % (1 << 64)


def test_splitmix64_gives_the_published_sequence():
    # The generator adds the golden ratio to its state and mixes: its n-th state from seed 1234567.
    golden = 0x9E3779B97F4A7C15
    state = [(1234567 + n * golden) % (1 << 64) for n in range(3)]
    state = torch.tensor([s - (1 << 64) if s >= 1 << 63 else s for s in state])
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [unsigned(x) for x in splitmix64(state).tolist()] == published


def test_draws_do_not_depend_on_the_batch_or_its_order():
    whole = Draws.root(3).at(USER, EPISODE, STEP)
    for rows in (torch.tensor([17]), torch.arange(200).flip(0)):
        part = Draws.root(3).at(USER[rows], EPISODE[rows], STEP[rows])
        assert torch.equal(part.uniform("buy", 4), whole.uniform("buy", 4)[rows])
        items = USER[rows, None] + torch.arange(6)
        assert torch.equal(
            part.per_item("buy", items),
            whole.per_item("buy", USER[:, None] + torch.arange(6))[rows],
        )


def test_draws_are_uniform_and_never_0_or_1():
    many = torch.arange(20_000)
    draws = Draws.root(0).at(many, many * 0, many * 0).uniform("buy", 20)
    assert draws.min() > 0
    assert draws.max() < 1
    counts = torch.histc(draws, bins=100, min=0, max=1)  # 4,000 expected in each
    assert ((counts - 4000) ** 2 / 4000).sum() < 160  # chi-square, 99 degrees: p < 1e-4 above


@pytest.mark.parametrize(
    "change", ["seed", "user", "episode", "step", "purpose", "slot"], ids=lambda c: f"another {c}"
)
def test_every_part_of_the_key_makes_new_numbers(change):
    many, zero = torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)
    plain = Draws.root(0).at(many, zero, zero).uniform("buy")[:, 0]
    other = {
        "seed": lambda: Draws.root(1).at(many, zero, zero).uniform("buy")[:, 0],
        "user": lambda: Draws.root(0).at(many + 1, zero, zero).uniform("buy")[:, 0],
        "episode": lambda: Draws.root(0).at(many, zero + 1, zero).uniform("buy")[:, 0],
        "step": lambda: Draws.root(0).at(many, zero, zero + 1).uniform("buy")[:, 0],
        "purpose": lambda: Draws.root(0).at(many, zero, zero).uniform("leave")[:, 0],
        "slot": lambda: Draws.root(0).at(many, zero, zero).uniform("buy", 2)[:, 1],
    }[change]()
    assert abs(torch.corrcoef(torch.stack([plain, other]))[0, 1]) < 0.03  # four standard errors
    assert (plain == other).float().mean() < 1e-3


def test_the_draw_of_an_item_is_the_same_at_every_step_and_slot_of_an_episode():
    items = torch.arange(10).expand(200, 10)
    early = Draws.root(0).at(USER, EPISODE, STEP).per_item("buy", items)
    late = Draws.root(0).at(USER, EPISODE, STEP + 3).per_item("buy", items.flip(1)).flip(1)
    assert torch.equal(early, late)
    again = Draws.root(0).at(USER, EPISODE + 1, STEP).per_item("buy", items)
    assert (early == again).float().mean() < 0.01
