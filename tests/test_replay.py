"""The replay gives back what was put in, stores each past once, never looks past its head."""

from dataclasses import fields, replace

import pytest
import torch

from agents.base import Decision, Transition
from agents.replay import MAX_BOOL_MASK, Replay
from agents.testing import synthetic_observation, synthetic_spec
from encoders.state import Observation

SPEC = synthetic_spec(slate_size=2)


def play(steps, batch, seed=0, spec=SPEC, done_rate=0.3, mask="history"):
    """Transitions of B users whose pasts change when a trip ends; rewards number the steps."""
    generator = torch.Generator().manual_seed(seed)
    obs = synthetic_observation(spec, batch, generator)
    for t in range(steps):
        seen = synthetic_observation(spec, batch, generator)
        later = replace(obs, history=seen.history, feedback=seen.feedback, context=seen.context)
        ends = torch.rand(batch, generator=generator)
        reward = t * 100.0 + torch.arange(batch)
        transition = Transition(
            obs=obs,
            mask=None,
            decision=Decision(
                torch.rand(batch, spec.num_items, generator=generator).topk(2, dim=1).indices,
                torch.rand(batch, 2, generator=generator),
            ),
            reward=reward,
            chosen=torch.rand(batch, 2, generator=generator) < 0.5,
            slot_reward=torch.stack([reward * 0.25, reward * 0.75], dim=1),
            next_obs=later,
            next_mask=None,
            terminated=ends < done_rate / 2,
            truncated=(ends >= done_rate / 2) & (ends < done_rate),
        )
        yield with_mask(transition, mask, spec, generator)
        new = synthetic_observation(
            spec, batch, generator
        )  # another user takes the row of who is gone
        done = ends < done_rate
        mixed = {}
        for f in fields(Observation):
            old, fresh = getattr(later, f.name), getattr(new, f.name)
            mixed[f.name] = torch.where(done.view(-1, *[1] * (old.ndim - 1)), fresh, old)
        obs = Observation(**mixed)


def with_mask(transition, mask, spec, generator):
    batch = len(transition.reward)
    if mask == "history":
        masks = transition.obs.history, transition.next_obs.history
    elif mask == "ids":
        masks = (torch.randint(-1, spec.num_items, (batch, 4), generator=generator),) * 2
    elif mask == "bool":
        masks = (torch.rand(batch, spec.num_items, generator=generator) < 0.5,) * 2
    else:
        masks = None, None
    return replace(transition, mask=masks[0], next_mask=masks[1])


def everything(replay, draws=4000):
    return replay.sample(draws, torch.Generator().manual_seed(1))


def assert_same_rows(got: Transition, row: int, want: Transition, column: int):
    for side in ("obs", "next_obs"):
        for f in fields(Observation):
            one = getattr(getattr(got, side), f.name)[row]
            two = getattr(getattr(want, side), f.name)[column]
            assert torch.equal(one, two), (side, f.name)
    for name in ("mask", "reward", "chosen", "slot_reward", "next_mask", "terminated", "truncated"):
        one, two = getattr(got, name), getattr(want, name)
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one[row], two[column]), name
    assert torch.equal(got.decision.slate[row], want.decision.slate[column])
    assert torch.equal(got.decision.propensity[row], want.decision.propensity[column])


@pytest.mark.parametrize("mask", ["none", "history", "ids", "bool"])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_every_transition_comes_back_exactly_however_often_the_ring_went_round(mask, length):
    batch = 3
    replay = Replay(length * batch, spec=SPEC)
    log = []
    for transition in play(40, batch, mask=mask):
        replay.add(transition)
        log.append(transition)
        got = everything(replay, 24).transition
        for row, number in enumerate(got.reward.tolist()):
            t, column = int(number) // 100, int(number) % 100
            assert t > len(log) - 1 - length
            assert_same_rows(got, row, log[t], column)
    assert len(replay) == length * batch


def test_every_stored_transition_can_be_drawn():
    replay = Replay(12, spec=SPEC)
    for transition in play(9, 3):
        replay.add(transition)
    drawn = set(everything(replay).transition.reward.tolist())
    assert drawn == {t * 100.0 + b for t in range(5, 9) for b in range(3)}


def test_a_past_is_stored_once_for_a_trip():
    replay = Replay(4000, spec=SPEC)
    trips = 4
    for transition in play(200, 4, done_rate=0.1):
        replay.add(transition)
        trips += int((transition.terminated | transition.truncated).sum())
    last = int((transition.terminated | transition.truncated).sum())
    assert replay.touched == trips - last  # who starts after the last step has not been seen


def test_places_of_forgotten_pasts_are_used_again():
    replay = Replay(40, spec=SPEC)
    for transition in play(400, 4, done_rate=0.1):
        replay.add(transition)
    assert replay.touched <= 30  # ten steps of four users live; well over a hundred trips went by


def by_hand(log, t, column, n, gamma, newest):
    """Reward after the first, steps taken, and the last step of a window, one at a time."""
    later, at = 0.0, t
    for i in range(1, n):
        over = bool(log[at].terminated[column] | log[at].truncated[column])
        if over or at == newest:
            break
        at += 1
        later += gamma**i * float(log[at].reward[column])
    return later, at - t + 1, at


@pytest.mark.parametrize("n_step", [1, 2, 5])
def test_n_step_windows_stop_at_the_end_of_a_trip_and_at_the_write_head(n_step):
    batch, gamma = 3, 0.5
    replay = Replay(7 * batch, spec=SPEC, n_step=n_step, gamma=gamma)
    log = []
    for transition in play(17, batch, done_rate=0.15):
        replay.add(transition)
        log.append(transition)
    sample = everything(replay, 300)
    got = sample.transition
    lengths = set()
    for row, number in enumerate(got.reward.tolist()):
        t, column = int(number) // 100, int(number) % 100
        later, steps, at = by_hand(log, t, column, n_step, gamma, newest=16)
        lengths.add(steps)
        want = log[t].slot_reward[column] + later / 2
        assert sample.slot_return[row].tolist() == pytest.approx(want.tolist())
        gone = bool(log[at].terminated[column])
        assert float(sample.discount[row]) == pytest.approx(0.0 if gone else gamma**steps)
        assert torch.equal(got.next_obs.history[row], log[at].next_obs.history[column])
        assert torch.equal(got.next_mask[row], log[at].next_mask[column])
        assert bool(got.terminated[row]) == gone
        assert torch.equal(got.obs.history[row], log[t].obs.history[column])
    assert n_step == 1 or {1, n_step} <= lengths


def test_sampling_is_a_function_of_the_generator():
    replay = Replay(100, spec=SPEC)
    for transition in play(10, 3):
        replay.add(transition)
    one, two = everything(replay), everything(replay)
    assert torch.equal(one.transition.reward, two.transition.reward)


def test_a_saved_replay_goes_on_bit_for_bit():
    first, second = Replay(21, spec=SPEC, n_step=3), Replay(21, spec=SPEC, n_step=3)
    steps = list(play(30, 3, mask="ids"))
    for transition in steps[:17]:
        first.add(transition)
    second.load_state_dict(first.state_dict())
    for replay in (first, second):
        for transition in steps[17:]:
            replay.add(transition)
    a, b = everything(first), everything(second)
    assert torch.equal(a.slot_return, b.slot_return)
    assert torch.equal(a.transition.obs.past_age, b.transition.obs.past_age)
    assert torch.equal(a.transition.next_mask, b.transition.next_mask)


def test_feedback_beyond_half_precision_stays_finite():
    replay = Replay(6, spec=SPEC)
    for transition in play(1, 3):
        big = replace(transition.obs, feedback=transition.obs.feedback + 1e9)
        replay.add(replace(transition, obs=big, mask=big.history))
    assert everything(replay).transition.obs.feedback.isfinite().all()


def test_a_next_mask_that_is_more_than_the_history_is_no_history():
    first, step = play(2, 3)
    replay = Replay(30, spec=SPEC)
    replay.add(first)
    more = step.next_mask.clone()
    more[:, -1] = 5  # one more item than was shown
    with pytest.raises(ValueError, match=r"form of the first add \(history\), got ids"):
        replay.add(replace(step, mask=step.mask.clone(), next_mask=more))
    replay.add(replace(step, mask=step.mask.clone(), next_mask=step.next_mask.clone()))
    assert len(replay) == 6


def test_what_does_not_fit_is_refused_in_words():
    steps = list(play(2, 3))
    replay = Replay(30, spec=SPEC)
    replay.add(steps[0])
    with pytest.raises(ValueError, match="expected 3 rows, got 4"):
        replay.add(next(play(1, 4)))
    with pytest.raises(ValueError, match="mask must keep the form"):
        replay.add(next(play(1, 3, mask="bool")))
    with pytest.raises(ValueError, match=r"obs\.past must be"):
        replay.add(replace(steps[1], obs=replace(steps[1].obs, past=steps[1].obs.past[:, :5])))
    with pytest.raises(ValueError, match="slot_reward must be"):
        replay.add(replace(steps[1], slot_reward=steps[1].slot_reward[:, :1]))
    with pytest.raises(ValueError, match="same form"):
        replay.add(replace(steps[1], next_mask=None))
    with pytest.raises(ValueError, match="capacity 30, this one has 60"):
        Replay(60, spec=SPEC).load_state_dict(replay.state_dict())
    with pytest.raises(ValueError, match="raise capacity to at least 12"):
        Replay(8, spec=SPEC, n_step=4).add(steps[0])
    with pytest.raises(ValueError, match="empty replay"):
        Replay(8, spec=SPEC).sample(1, torch.Generator())
    wide = torch.ones(3, MAX_BOOL_MASK + 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="excluded ids"):
        Replay(30, spec=SPEC).add(replace(steps[0], mask=wide, next_mask=wide))


def test_a_copy_of_the_history_is_known_to_be_the_history():
    replay = Replay(30, spec=SPEC)
    for i, transition in enumerate(play(3, 3)):
        if i:
            transition = replace(
                transition, mask=transition.mask.clone(), next_mask=transition.next_mask.clone()
            )
        replay.add(transition)
    assert replay.mask_kind == "history"
    assert "mask" not in replay.data
