"""SASRec learns order, looks at nothing later, and does not mind padding, batches or other RNGs."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agents.interactions import Interactions, history
from agents.neighbours import ItemKNN
from agents.sasrec import Net, SASRec, next_item_loss, oldest_first, rows_of, windows
from encoders.state import EMPTY, Observation

N = 12
TINY: dict[str, Any] = {"dim": 8, "epochs": 2, "max_length": 6}


def circle(users: int = 40, length: int = 9, seed: int = 0) -> Interactions:
    """Item t + 1 follows item t, each user from another start."""
    start = np.random.default_rng(seed).integers(0, N, users)
    item = (start[:, None] + np.arange(length)) % N
    user = np.repeat(np.arange(users), length)
    time = np.tile(np.arange(length, dtype=float), users)
    return Interactions(user, item.ravel(), time, np.ones(users * length), users, N)


def asked(*rows: list[int]) -> Observation:
    """Histories given oldest first."""
    return history([list(reversed(row)) for row in rows])


def small_net(seed: int = 0) -> Net:
    """Two layers, 8 wide, of up to 6 items, with opinions of size."""
    net = Net(
        torch.zeros(N), max_length=6, dim=8, layers=2, heads=2, dropout=0.0,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    with torch.no_grad():
        for x in (*net.mix, *net.narrow):
            x.mul_(10.0)  # they start near zero, where layers do nothing
    return net


@pytest.fixture(scope="module")
def fitted() -> SASRec:
    return SASRec(circle(), dim=16, max_length=8, epochs=40, lr=0.01, dropout=0.0, batch_size=8)


def test_it_knows_what_follows_where_neighbours_cannot(fitted: SASRec) -> None:
    steps = [[(s + k) % N for k in range(3)] for s in range(N)]
    assert fitted.scores(asked(*steps)).argmax(dim=1).tolist() == [(s + 3) % N for s in range(N)]
    assert fitted.scores(asked([7], [11])).argmax(dim=1).tolist() == [8, 0]
    near = ItemKNN(circle()).scores(asked([3, 4, 5], [5, 4, 3]))
    assert torch.allclose(near[0], near[1])  # the same items: order is nothing to it


def test_order_matters(fitted: SASRec) -> None:
    one, other = fitted.scores(asked([3, 4, 5], [5, 4, 3]))
    assert one.argmax() == 6
    assert other.argmax() == 4


def test_what_was_chosen_in_the_session_comes_last(fitted: SASRec) -> None:
    obs = asked([3, 4])
    shown = replace(
        obs, history=torch.tensor([[9, 5, 6]]), feedback=torch.tensor([[[0.0], [1.0], [1.0]]])
    )  # 9 was shown and not chosen
    assert torch.allclose(fitted.scores(shown), fitted.scores(asked([3, 4, 5, 6])), atol=1e-5)


def test_a_longer_history_is_cut_to_its_end(fitted: SASRec) -> None:
    assert torch.allclose(
        fitted.scores(asked(list(range(N)))), fitted.scores(asked(list(range(4, N)))), atol=1e-5
    )


def test_who_else_is_asked_changes_nothing(fitted: SASRec, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[list[int]] = [[3], [1, 2, 3, 4, 5, 6, 7], [8, 2], []]
    together = fitted.scores(asked(*rows))
    for row, scores in zip(rows, together, strict=True):
        assert torch.allclose(fitted.scores(asked(row))[0], scores, atol=1e-5)
    monkeypatch.setattr("agents.sasrec.CHUNK", 3)
    assert torch.allclose(fitted.scores(asked(*rows)), together, atol=1e-5)


def test_empty_places_of_a_history_change_nothing(fitted: SASRec) -> None:
    obs = asked([2, 3, 4])
    gap = torch.full((1, 5), EMPTY)
    wide = replace(
        obs,
        past=torch.cat([gap, obs.past, gap], dim=1),
        past_count=torch.nn.functional.pad(obs.past_count, (5, 5)),
        past_age=torch.nn.functional.pad(obs.past_age, (5, 5)),
    )
    assert torch.allclose(fitted.scores(wide), fitted.scores(obs), atol=1e-5)


@torch.no_grad()
def test_no_state_depends_on_what_comes_later() -> None:
    net = small_net()
    a, b = net(torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 9, EMPTY]]))
    assert torch.allclose(a[:4], b[:4], atol=1e-6)
    assert not torch.allclose(a[4:], b[4:], atol=1e-3)
    c = net(torch.tensor([[7, 1, 2, 3, 4, 5]]))[0]
    assert ((a - c).abs().amax(dim=1) > 1e-3).all()  # but every one on what came before


@torch.no_grad()
def test_attention_is_what_loops_over_earlier_places_give() -> None:
    """One layer with a feed-forward of zero, place by place and head by head."""
    net = small_net()
    for x in (net.narrow[0], net.narrow[1], net.mix[1]):
        x.zero_()
    x = net.item[[4, 2, 9]] * 8**0.5 + net.place[:3]  # (3, D)
    q, k, v = (net.norm[0](x) @ net.attend[0]).split(8, dim=1)
    out = torch.zeros(3, 8)
    for t in range(3):
        for head in (slice(0, 4), slice(4, 8)):
            weight = torch.stack([q[t, head] @ k[s, head] / 2.0 for s in range(t + 1)]).softmax(0)
            out[t, head] = sum(weight[s] * v[s, head] for s in range(t + 1))
    expected = net.norm[-1](x + out @ net.mix[0])
    assert torch.allclose(net(torch.tensor([[4, 2, 9]]))[0], expected, atol=1e-5)


def test_dropout_is_drawn_from_the_generator_given_and_keeps_the_mean() -> None:
    net = small_net()
    net.dropout = 0.25
    x = torch.ones(200, 200)
    one, two = (net._drop(x, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.unique().tolist() == pytest.approx([0.0, 1.0 / 0.75])
    assert one.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(net._drop(x, None), x)


def test_histories_are_read_oldest_first() -> None:
    items = torch.tensor([[4, 7, 2, EMPTY], [1, 3, EMPTY, EMPTY]])
    age = torch.tensor([[5.0, 1.0, 9.0, 0.0], [2.0, 2.0, 0.0, 0.0]])  # 1 came after 3
    assert oldest_first(items, age, 3).tolist() == [[2, 4, 7], [3, 1, EMPTY]]
    assert oldest_first(items, age, 2).tolist() == [[4, 7], [3, 1]]


@given(st.lists(st.integers(0, 23), min_size=1, max_size=6), st.integers(1, 7))
def test_windows_ask_for_every_event_but_a_users_first_once(sizes: list[int], length: int) -> None:
    total = sum(sizes)
    user = np.repeat(np.arange(len(sizes)), sizes)
    past = Interactions(
        user, np.arange(total), np.arange(total) * 1.0, np.ones(total), len(sizes), max(1, total)
    )
    cuts = windows(past, length)
    asked_for = [row for a, b in cuts.tolist() for row in range(a + 1, b)]
    first = {int(np.searchsorted(user, u)) for u in range(len(sizes))}
    assert sorted(asked_for) == [row for row in range(total) if row not in first]
    for a, b in cuts.tolist():
        assert 2 <= b - a <= length + 1
        assert len(set(user[a:b])) == 1
    for u, size in enumerate(sizes):  # the latest run of a user is as long as it can be
        mine = [(a, b) for a, b in cuts.tolist() if user[a] == u]
        assert not mine or max(b for _, b in mine) - max(a for a, _ in mine) == min(
            size, length + 1
        )


def test_rows_of_runs_are_padded_to_the_right() -> None:
    assert rows_of(torch.tensor([[3, 6], [8, 10]])).tolist() == [[3, 4, 5], [8, 9, EMPTY]]


def test_a_sampled_loss_is_the_whole_one_up_to_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    net, generator = small_net(), torch.Generator().manual_seed(1)
    hidden = torch.randn(5, 8, generator=generator)
    target = torch.tensor([0, 3, 3, 7, 11])
    whole = next_item_loss(hidden, target, net, generator)
    monkeypatch.setattr("agents.sasrec.FULL", N - 1)
    monkeypatch.setattr("agents.sasrec.NEGATIVES", 200_000)
    sampled = next_item_loss(hidden, target, net, generator)
    assert not torch.equal(sampled, whole)
    assert sampled.item() == pytest.approx(whole.item(), rel=0.01)


def test_a_sampled_loss_learns_the_circle_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.sasrec.FULL", N - 1)
    monkeypatch.setattr("agents.sasrec.NEGATIVES", 6)
    model = SASRec(circle(), dim=16, max_length=8, epochs=60, lr=0.01, dropout=0.0, batch_size=8)
    assert model.scores(asked([3, 4, 5], [9, 10, 11])).argmax(dim=1).tolist() == [6, 0]


def test_a_seed_says_it_all_and_global_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = (SASRec(circle(), seed=s, **TINY) for s in (0, 0, 1))
    obs = asked([1, 2], [])
    assert torch.equal(one.scores(obs), two.scores(obs))
    assert not torch.equal(one.scores(obs)[0], other.scores(obs)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_saved_model_comes_back_and_nothing_known_is_popularity(fitted: SASRec) -> None:
    file = io.BytesIO()
    torch.save(fitted.state_dict(), file)
    file.seek(0)
    fresh = SASRec(circle(seed=5), dim=16, max_length=8, epochs=0)
    obs = asked([], [2, 3])
    assert not torch.equal(fresh.scores(obs), fitted.scores(obs))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh.scores(obs), fitted.scores(obs))
    assert torch.equal(fitted.scores(obs)[0], fitted.ranks)


def test_users_with_one_event_teach_nothing_and_do_no_harm() -> None:
    model = SASRec(circle(users=5, length=1), **TINY)
    assert model.scores(asked([3], [])).isfinite().all()


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"dim": 10, "heads": 3}, "dim a multiple of heads"),
        ({"max_length": 0}, "at least 1.*max_length=0"),
        ({"epochs": -1}, "epochs at least 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SASRec(circle(), **knobs)


def test_counts_without_times_and_unknown_items_are_refused(fitted: SASRec) -> None:
    with pytest.raises(ValueError, match="these have no times: give Logs or Interactions"):
        SASRec(circle().counts())
    with pytest.raises(ValueError, match=r"0\.\.11 or -1 \(none\), got 12"):
        fitted.scores(asked([12]))
