"""Observation, memory of purchases and StateEncoder."""

from dataclasses import fields, replace
from datetime import UTC, datetime

import pytest
import torch
from torch import Tensor

from encoders.state import CONTEXT, EMPTY, Observation, StateEncoder, calendar, remember

N, D, P, F = 30, 5, 2, 2
H, L = 12, 6


def observation(batch: int, seed: int = 0) -> Observation:
    """Users with pasts and histories of any length, EMPTY to the right."""
    g = torch.Generator().manual_seed(seed)

    def items(width: int) -> Tensor:
        kept = torch.arange(width) < torch.randint(0, width + 1, (batch, 1), generator=g)
        return torch.randint(0, N, (batch, width), generator=g).where(kept, EMPTY)

    past, history = items(H), items(L)
    return Observation(
        profile=torch.randn(batch, P, generator=g),
        past=past,
        past_count=torch.randint(1, 9, (batch, H), generator=g) * (past != EMPTY).float(),
        past_age=torch.rand(batch, H, generator=g) * 90 * (past != EMPTY),
        history=history,
        feedback=torch.rand(batch, L, F, generator=g).round() * (history != EMPTY)[:, :, None],
        context=calendar(torch.rand(batch, generator=g).double() * 20_000),
    )


@pytest.fixture
def encoder() -> StateEncoder:
    vectors = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    return StateEncoder(vectors / vectors.norm(dim=1, keepdim=True), profile_size=P, behaviours=F)


def test_each_block_by_hand():
    encoder = StateEncoder(torch.eye(3), profile_size=1, behaviours=2, decay_days=10.0)
    obs = Observation(
        profile=torch.tensor([[0.5]]),
        past=torch.tensor([[0, 2, EMPTY]]),
        past_count=torch.tensor([[3.0, 1.0, 0.0]]),
        past_age=torch.tensor([[14.0, 4.0, 0.0]]),
        history=torch.tensor([[1, 0, EMPTY, EMPTY]]),
        feedback=torch.tensor([[[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]]),
        context=torch.arange(CONTEXT).float()[None] / CONTEXT,
    )
    state = encoder(obs)[0]
    older = torch.tensor(-1.0).exp()  # item 0 was bought ten days before item 2
    assert state[0] == 0.5
    expected = [
        [0.75, 0.0, 0.25],
        [older / (1 + older), 0.0, 1 / (1 + older)],
        [0.5, 0.5, 0.0],
        [1.0, 0.0, 0.0],
        [0.5, 0.5, 0.0],
    ]
    torch.testing.assert_close(state[1:16].reshape(5, 3), torch.tensor(expected))
    assert torch.equal(state[16:27], obs.context[0])
    torch.testing.assert_close(state[27:], torch.tensor([2.0, 4.0, 2.0, 1.0, 2.0]).log1p())
    assert encoder.size == len(state) == 32


def test_a_batch_equals_its_users_alone(encoder):
    obs = observation(64)
    alone = torch.cat([encoder(obs[i : i + 1]) for i in range(64)])
    torch.testing.assert_close(encoder(obs), alone, rtol=0, atol=1e-6)


def test_where_the_padding_is_and_what_lies_in_it_do_not_matter(encoder):
    obs = observation(64)
    past = torch.randperm(H, generator=torch.Generator().manual_seed(2))
    moved = replace(
        obs,
        past=obs.past[:, past],
        past_count=obs.past_count[:, past].where(obs.past[:, past] != EMPTY, 7.0),
        past_age=obs.past_age[:, past].where(obs.past[:, past] != EMPTY, 7.0),
        feedback=obs.feedback.where((obs.history != EMPTY)[:, :, None], 7.0),
    )
    torch.testing.assert_close(encoder(moved), encoder(obs), rtol=0, atol=1e-6)
    wider = replace(
        obs,
        past=torch.nn.functional.pad(obs.past, (0, 9), value=EMPTY),
        past_count=torch.nn.functional.pad(obs.past_count, (0, 9)),
        past_age=torch.nn.functional.pad(obs.past_age, (0, 9)),
        history=torch.nn.functional.pad(obs.history, (0, 9), value=EMPTY),
        feedback=torch.nn.functional.pad(obs.feedback, (0, 0, 0, 9)),
    )
    torch.testing.assert_close(encoder(wider), encoder(obs), rtol=0, atol=1e-6)


def test_a_newcomer_has_zero_means_and_a_last_purchase_long_ago(encoder):
    obs = observation(1)
    nothing = replace(
        obs,
        past=torch.full((1, H), EMPTY),
        past_count=torch.zeros(1, H),
        past_age=torch.zeros(1, H),
        history=torch.full((1, L), EMPTY),
        feedback=torch.zeros(1, L, F),
    )
    state = encoder(nothing)[0]
    assert state[P : P + 5 * D].eq(0).all()
    assert state[-5:].tolist() == [0.0, 10.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("extreme", [1e30, -1e30, torch.inf, -torch.inf])
def test_states_stay_finite_and_within_bounds_for_extreme_input(encoder, extreme):
    obs = observation(64)
    wild = replace(
        obs,
        profile=torch.full_like(obs.profile, extreme),
        past_count=torch.full_like(obs.past_count, extreme),
        past_age=torch.full_like(obs.past_age, extreme),
        feedback=torch.full_like(obs.feedback, extreme),
        context=torch.full_like(obs.context, extreme),
    )
    state = encoder(wild)
    assert encoder.low.isfinite().all()
    assert encoder.high.isfinite().all()
    assert ((state >= encoder.low) & (state <= encoder.high)).all()  # false for NaN too
    assert encoder.low.shape == encoder.high.shape == state.shape[1:]


def test_usual_states_are_not_clipped(encoder):
    state = encoder(observation(256))
    inside = (state > encoder.low) & (state < encoder.high)
    means = slice(P, P + 5 * D)
    assert (inside[:, means] | (state[:, means].abs() > 0.9)).all()  # one item alone may touch


def test_a_long_gone_past_still_tells_what_was_bought_last(encoder):
    obs = replace(
        observation(1),
        past=torch.tensor([[3, 4]]),
        past_count=torch.ones(1, 2),
        past_age=torch.tensor([[5000.0, 90_000.0]]),  # exp(-5000 / 30) is 0 in float32
    )
    recent = encoder(obs)[0, P + D : P + 2 * D]
    torch.testing.assert_close(recent, encoder.table[3])


def test_every_part_of_the_observation_but_no_more_is_in_the_state(encoder):
    obs = observation(8)
    expected = {"profile", "past", "past_count", "past_age", "history", "feedback", "context"}
    assert {f.name for f in fields(Observation)} == expected  # all loggable: no hidden state
    before = encoder(obs)
    for name in expected:
        other = getattr(obs, name).roll(1, dims=0)  # another user's
        assert not torch.equal(encoder(replace(obs, **{name: other})), before), name


def test_a_state_encoder_says_which_sizes_it_was_built_for(encoder):
    obs = observation(2)
    with pytest.raises(ValueError, match=r"widths \(2, 11, 2\), got \(3, 11, 2\)"):
        encoder(replace(obs, profile=torch.zeros(2, 3)))
    with pytest.raises(ValueError, match="at least one column"):
        encoder(replace(obs, history=obs.history[:, :0], feedback=obs.feedback[:, :0]))
    with pytest.raises(ValueError, match="item_vectors must be finite"):
        StateEncoder(torch.full((3, 2), torch.nan), profile_size=0, behaviours=1)
    with pytest.raises(ValueError, match="decay_days must be above 0"):
        StateEncoder(torch.ones(3, 2), profile_size=0, behaviours=1, decay_days=0.0)


def remembered(past, count, age, bought, elapsed=2.0):
    row = [torch.tensor([past]), torch.tensor([count]), torch.tensor([age]), torch.tensor([bought])]
    return [x[0].tolist() for x in remember(*row, torch.tensor([elapsed]))]


def test_a_first_purchase_takes_an_empty_place():
    assert remembered([5, EMPTY], [2.0, 0.0], [3.0, 0.0], [7]) == [[5, 7], [2.0, 1.0], [5.0, 2.0]]


def test_a_repeated_purchase_counts_one_more_and_is_young_again():
    after = remembered([5, 7], [2.0, 1.0], [3.0, 9.0], [5])  # 7 is older, yet stays
    assert after == [[5, 7], [3.0, 1.0], [2.0, 11.0]]


def test_a_full_memory_forgets_what_was_bought_longest_ago():
    past, count, age = remembered([5, 7, 9], [2.0, 6.0, 1.0], [3.0, 9.0, 4.0], [1])
    assert (past, count, age) == ([5, 1, 9], [2.0, 1.0, 1.0], [5.0, 2.0, 6.0])


def test_the_purchases_of_one_trip_do_not_evict_each_other():
    assert remembered([5, 7, 9], [1.0] * 3, [3.0, 9.0, 4.0], [1, 2])[0] == [5, 1, 2]


def test_bought_twice_on_one_trip_counts_once():
    past, count, _ = remembered([EMPTY] * 3, [0.0] * 3, [0.0] * 3, [4, EMPTY, 4])
    assert (past, count) == ([4, EMPTY, EMPTY], [1.0, 0.0, 0.0])


def test_no_purchase_only_lets_time_go_by():
    after = remembered([5, EMPTY], [2.0, 0.0], [3.0, 0.0], [EMPTY])
    assert after == [[5, EMPTY], [2.0, 0.0], [5.0, 0.0]]


def test_remember_changes_nothing_it_was_given_and_treats_users_apart():
    past = torch.tensor([[5, EMPTY], [EMPTY, EMPTY]])
    count, age = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    given = (past.clone(), count.clone(), age.clone())
    new, _, aged = remember(past, count, age, torch.tensor([[5], [8]]), torch.tensor([1.0, 4.0]))
    assert new.tolist() == [[5, EMPTY], [8, EMPTY]]
    assert aged.tolist() == [[1.0, 0.0], [4.0, 0.0]]
    assert all(torch.equal(a, b) for a, b in zip((past, count, age), given, strict=True))


@pytest.mark.parametrize(
    "date", ["1969-12-31T06:00", "1970-01-01T00:00", "2017-02-14T18:00", "2024-02-29T12:00"]
)
def test_the_calendar_knows_weekday_and_hour(date):
    moment = datetime.fromisoformat(date).replace(tzinfo=UTC)
    days = torch.tensor([moment.timestamp() / 86_400], dtype=torch.float64)
    context = calendar(days)
    assert context.shape == (1, CONTEXT)
    assert context[0, :7].nonzero().item() == moment.weekday()
    angle = torch.tensor(moment.hour / 24 * 2 * torch.pi)
    torch.testing.assert_close(context[0, 7:9], torch.stack([angle.sin(), angle.cos()]))


def test_the_calendar_says_the_season():
    january, july, next_january = calendar(torch.tensor([0.0, 182.0, 365.0]).double())[:, 9:11]
    assert january.dot(july) < -0.99
    assert january.dot(next_january) > 0.99
