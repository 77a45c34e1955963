"""Gymnasium environments that recommend: history, past, feedback, items; SARDINE among them."""

import importlib.util

import numpy as np
import pytest
import torch
from gym_worlds import EVENS, make, shop
from torch import Tensor

from encoders.state import EMPTY
from envs.gym_trace import Trace, outcome
from envs.gym_vector import SEEDS, GymVectorEnv
from simulators.draws import Draws


def test_items_shown_and_their_feedback_are_read_from_the_first_observation_on():
    env = shop(num_envs=2, history=3, past=4)
    obs, _ = env.reset()
    assert (env.profile_size, env.history_size, env.past_size) == (2 + 4 * 3 + 2, 6, 4)
    assert obs.profile[:, :2].tolist() == [[-0.5, 1.0]] * 2  # mood alone, no one-hots of ids
    assert obs.history.tolist() == [[4, 1, EMPTY, EMPTY, EMPTY, EMPTY]] * 2
    assert obs.feedback[0, :, 0].tolist() == [1, 0, 0, 0, 0, 0]
    assert obs.past.tolist() == [[4, EMPTY, EMPTY, EMPTY]] * 2
    obs, reward, *_, info = env.step(torch.tensor([[2, 4], [3, 5]]))
    assert obs.history.tolist() == [[4, 1, 2, 4, EMPTY, EMPTY], [4, 1, 3, 5, EMPTY, EMPTY]]
    assert obs.feedback[:, :, 0].tolist() == [[1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert reward.tolist() == [2.0, 0.0]
    assert info["response"].chosen["taken"].tolist() == [[True, True], [False, False]]
    assert info["chosen"]["taken"].tolist() == info["response"].chosen["taken"].tolist()
    assert info["slot_reward"].tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert obs.past.tolist() == [[4, 2, EMPTY, EMPTY], [4, EMPTY, EMPTY, EMPTY]]
    assert obs.past_count.tolist() == [[2, 1, 0, 0], [1, 0, 0, 0]]
    assert obs.past_age.tolist() == [[1, 1, 0, 0], [2, 0, 0, 0]]  # steps since the last time
    obs, *_ = env.step(torch.tensor([[1, 0], [1, 3]]))
    obs, *_ = env.step(torch.tensor([[3, 5], [0, 1]]))
    assert obs.history[0].tolist() == [2, 4, 1, 0, 3, 5]  # the first slate has fallen out
    assert obs.feedback[0, :, 0].tolist() == [1, 1, 0, 1, 0, 0]
    assert obs.past_age[0].tolist() == [3, 3, 2, 0]


def test_means_of_what_was_taken_and_skipped_span_the_whole_episode():
    env = shop(num_envs=1, history=1)
    env.reset()
    shown, slates = [4, 1], [[2, 3], [0, 5], [1, 3]]
    for slate in slates:
        obs, *_ = env.step(torch.tensor([slate]))
        shown += slate
    taken = np.array([EVENS[i] for i in shown if i % 2 == 0])
    skipped = np.array([EVENS[i] for i in shown if i % 2])
    last = [np.zeros(3), EVENS[[1, 3]].mean(axis=0)]  # nothing was taken in the last step
    counts = np.log1p([len(taken), len(skipped)])
    expected = np.concatenate([taken.mean(axis=0), skipped.mean(axis=0), *last, counts])
    assert obs.profile[0, 2:].tolist() == pytest.approx(expected.tolist())


def test_the_past_is_what_a_plain_count_says():
    rng = np.random.default_rng(0)
    trace = Trace(5, slate_size=3, history=4, past=6, vectors=None)
    times: list[dict[int, int]] = [{} for _ in range(5)]
    age: list[dict[int, int]] = [{} for _ in range(5)]
    for _ in range(40):
        rows = np.flatnonzero(rng.random(5) < 0.8)
        shown = rng.integers(0, 12, (len(rows), 3))
        feedback = (rng.random((len(rows), 3)) < 0.4).astype(float)
        trace.add(rows, shown, feedback)
        for row, slate, answer in zip(rows, shown, feedback, strict=True):
            age[row] = {item: a + 1 for item, a in age[row].items()}
            for item in {int(i) for i, took in zip(slate, answer, strict=True) if took}:
                times[row][item] = times[row].get(item, 0) + 1
                age[row][item] = 1
            while len(age[row]) > 6:
                oldest = max(age[row].values())
                gone = [i for i, a in age[row].items() if a == oldest]
                kept = set(trace.past[row].tolist())  # ties fall as they may
                item = next(i for i in gone if i not in kept)
                del age[row][item], times[row][item]
        for row in range(5):
            real = trace.past[row] != EMPTY
            got = dict(zip(trace.past[row][real].tolist(), trace.age[row][real], strict=True))
            counts = dict(zip(trace.past[row][real].tolist(), trace.count[row][real], strict=True))
            assert got == age[row]
            assert counts == times[row]
    assert max(len(a) for a in age) == 6


def test_slots_share_a_reward_that_their_feedback_does_not_sum_to():
    env = shop(num_envs=2, kwargs={"weights": (1.0, 0.5)})
    env.reset()
    obs, reward, *_, info = env.step(torch.tensor([[2, 3], [1, 4]]))
    assert reward.tolist() == [1.0, 0.5]
    assert info["slot_reward"].tolist() == [[1.0, 0.0], [0.25, 0.25]]
    assert info["chosen"]["taken"].tolist() == [[True, False], [False, True]]
    assert obs.feedback[:, 2:4, 0].tolist() == [[1.0, 0.0], [0.0, 1.0]]  # what the user did


def test_feedback_follows_its_item_where_the_environment_shows_another_order():
    env = shop(num_envs=1, kwargs={"reverse": True})
    env.reset()
    obs, *_, info = env.step(torch.tensor([[2, 3]]))
    assert info["slate"].tolist() == [[2, 3]]
    assert info["chosen"]["taken"].tolist() == [[True, False]]
    assert info["slot_reward"].tolist() == [[1.0, 0.0]]
    assert obs.history[0, 2:4].tolist() == [3, 2]  # as the user saw it
    other = outcome(np.array([[2, 3]]), np.array([[5, 3]]), np.array([[1.0, 0.0]]), np.array([1.0]))
    assert other[1].tolist() == [[0.5, 0.5]]  # the one taken was not of the slate
    assert other[2].tolist() == [[False, False]]


def test_without_items_shown_the_history_is_of_own_actions_and_their_rewards():
    env = make("Combo", num_envs=2, kwargs={"nvec": [2, 3]}, history=2)
    env.reset()
    env.step(torch.tensor([[0], [4]]))
    obs, *_, info = env.step(torch.tensor([[5], [0]]))
    assert obs.history.tolist() == [[0, 5], [4, 0]]
    assert obs.feedback[:, :, 0].tolist() == [[0.0, 102.0], [101.0, 0.0]]
    assert info["chosen"]["taken"].tolist() == [[True], [False]]  # reward above 0
    assert obs.past[:, :2].tolist() == [[5, EMPTY], [4, EMPTY]]
    assert obs.context.shape == (2, 0)
    assert obs.profile.shape == (2, 7)


def test_half_a_slate_shown_elsewhere_takes_its_own_feedback_along():
    items, slots, took = outcome(
        np.array([[2, 3]]), np.array([[3, 5]]), np.array([[1.0, 0.0]]), np.array([1.0])
    )
    assert items.tolist() == [[2, 3]]
    assert slots.tolist() == [[0.0, 1.0]]
    assert took.tolist() == [[False, True]]


def test_items_known_but_never_shown_by_the_observation_leave_means_too():
    env = make("Walk", num_envs=8, item_features="board.tiles")
    tiles = env.item_vectors
    obs, _ = env.reset()
    assert not obs.profile[:, 2:].any()
    for _ in range(6):
        slate = torch.full((8, 1), 2)
        obs, *_, info = env.step(slate)
        begun = info.get("_final_obs", torch.zeros(8, dtype=torch.bool))
        assert not obs.profile[begun, 2:].any()  # nothing of the episode before is left
        assert torch.equal(obs.profile[~begun, 2:4], tiles[2].expand(int((~begun).sum()), 2))
        if begun.any():
            return
    raise AssertionError("nobody was done")


def test_a_slate_shows_its_items_whether_or_not_their_vectors_are_known():
    env = make("Shop", slate=True)
    obs, _ = env.reset()
    assert (env.slate_size, env.profile_size) == (2, 2)
    assert obs.history[0, :2].tolist() == [4, 1]


def test_the_environment_plays_its_own_best_action():
    env = shop(num_envs=3, oracle=-1)
    env.reset()
    playing = torch.tensor([True, False, True])
    obs, reward, *_, info = env.step_oracle(playing)
    assert reward.tolist() == [2.0, 0.0, 2.0]
    assert info["slate"].tolist() == [[0, 2], [EMPTY, EMPTY], [0, 2]]
    assert obs.history[0, :4].tolist() == [4, 1, 0, 2]
    assert env.step_oracle()[1].tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="playing must be 3 bools"):
        env.step_oracle(torch.tensor([0, 1]))
    plain = shop()
    plain.reset()
    with pytest.raises(ValueError, match="was given no oracle"):
        plain.step_oracle()
    with pytest.raises(ValueError, match="does not say what its best action showed"):
        make("Walk", oracle=-1)


def test_item_vectors_are_the_environments_own_or_made_up():
    assert torch.equal(shop().item_vectors, torch.tensor(EVENS, dtype=torch.float32))
    dotted = make("Shop", item_features="catalog.embeddings")
    assert torch.equal(dotted.item_vectors, shop().item_vectors)
    assert make("Walk", item_features="board.tiles").item_vectors.tolist() == [
        [0, 1],
        [2, 3],
        [4, 5],
    ]
    many = make("Combo", kwargs={"nvec": [30, 40]}, seed=1).item_vectors
    assert many.shape == (1200, 64)
    assert torch.allclose(many.norm(dim=1), torch.ones(1200))
    again = make("Combo", kwargs={"nvec": [30, 40]}, seed=2).item_vectors
    assert torch.equal(many, again)  # whatever the seed of the episodes: checkpoints still fit
    with pytest.raises(ValueError, match=r"did you mean features or catalog.embeddings\?"):
        make("Shop", item_features="vectors")
    with pytest.raises(ValueError, match=r"'weights' must be \(6, D\).*got \(2,\): did you mean"):
        make("Shop", item_features="weights")
    with pytest.raises(ValueError, match="'names' is no array of numbers"):
        make("Shop", item_features="names")
    with pytest.raises(ValueError, match="has no array of 6 rows, leave item_features=null"):
        make("Combo", kwargs={"nvec": [2, 3]}, item_features="items")
    with pytest.raises(ValueError, match=r"differs between copies .* \(rows 0 and 1\)"):
        make("Drawn", item_features="features", num_envs=2)


sardine = pytest.mark.skipif(
    importlib.util.find_spec("sardine") is None, reason="the package sardine-rec is not installed"
)


def sardines(name: str, **settings) -> GymVectorEnv:
    return GymVectorEnv(
        f"sardine/{name}-v0", module="sardine", item_features="item_embedd", oracle=-1, **settings
    )


def returns(env: GymVectorEnv, slates: torch.Generator | None) -> Tensor:
    """Rewards (B,) of one episode each, of random slates or of the oracle."""
    users = torch.arange(env.num_envs)
    env.reset(options={"user": users, "episode": torch.zeros_like(users)})
    total, playing = torch.zeros(env.num_envs), torch.ones(env.num_envs, dtype=torch.bool)
    while playing.any():
        if slates is None:
            _, reward, terminated, truncated, _ = env.step_oracle(playing)
        else:
            slate = torch.randint(
                env.num_items, (env.num_envs, env.slate_size), generator=slates
            ).masked_fill(~playing[:, None], EMPTY)
            _, reward, terminated, truncated, _ = env.step(slate)
        total += reward
        playing = playing & ~(terminated | truncated)
    return total


@sardine
@pytest.mark.parametrize(
    ("name", "size", "random", "best"),
    [("SingleItem-BoredInf", 1, 9.2, 50.9), ("SlateTopK-Bored", 10, 43.8, 150.2)],
)
def test_sardine_pays_random_slates_and_its_oracle_what_is_known(name, size, random, best):
    env = sardines(name, num_envs=48)
    assert (env.num_items, env.slate_size) == (1000, size)
    assert env.item_vectors.shape == (1000, 10)
    assert env.profile_size == 10 + 4 * 10 + 2
    got = returns(env, torch.Generator().manual_seed(0))
    assert abs(got.mean() - random) < 4.0 * got.std() / 48**0.5
    got = returns(env, None)
    assert abs(got.mean() - best) < max(0.02 * best, 4.0 * got.std() / 48**0.5)


@sardine
def test_sardine_is_read_as_it_says_itself():
    env = sardines("SlateTopK-Bored", num_envs=3, history=4)
    generator = torch.Generator().manual_seed(1)
    obs, _ = env.reset()
    raw = [e.unwrapped for e in env.envs]
    taken: list[list[int]] = [list(dict.fromkeys(map(int, e.clicked_items))) for e in raw]
    assert [sorted(row[row != EMPTY].tolist()) for row in obs.past] == [sorted(t) for t in taken]
    for _ in range(6):
        slate = torch.stack([torch.randperm(1000, generator=generator)[:10] for _ in range(3)])
        obs, reward, *_, info = env.step(slate)
        clicks = info["chosen"]["taken"]
        assert torch.equal(info["slot_reward"].sum(dim=1), reward)
        assert torch.equal(clicks.sum(dim=1).float(), reward)
        for b in range(3):
            taken[b] += slate[b][clicks[b]].tolist()
            assert set(obs.past[b].tolist()) - {EMPTY} == set(taken[b])
            histogram = raw[b].norm_recent_topics_hist
            assert obs.profile[b, :10].tolist() == pytest.approx(histogram.tolist())
    assert torch.equal(obs.history[:, -10:], slate)
    assert torch.equal(obs.feedback[:, -10:, 0] > 0, clicks)
    assert obs.history.shape == (3, 40)
    assert (obs.history != EMPTY).all()


@sardine
def test_sardine_pays_through_rows_what_it_pays_by_itself():
    import gymnasium

    env = sardines("SlateTopK-Bored", num_envs=3, seed=7)
    users = torch.tensor([4, 0, 2])
    key = Draws.root(7).at(users, torch.zeros_like(users), torch.zeros_like(users)).key
    alone = []
    for seed in (key & SEEDS).tolist():
        one = gymnasium.make("sardine/SlateTopK-Bored-v0", disable_env_checker=True)
        one.reset(seed=seed)
        alone.append(sum(one.step(np.full(10, -1))[1] for _ in range(100)))
    env.reset(options={"user": users, "episode": torch.zeros_like(users)})
    total = sum(env.step_oracle()[1] for _ in range(100))
    assert torch.equal(total, torch.tensor(alone, dtype=torch.float32))
