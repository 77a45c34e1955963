"""The bare kernel does what the environment does; rows of environments say what they measured."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from encoders.state import EMPTY
from envs.recommend import RecommendVectorEnv
from experiments import bench_rows, env_speed
from experiments.bench_rows import KEYS, fixed, row
from experiments.env_limit import BareStep
from experiments.env_speed import Size
from simulators.base import SimSpec
from simulators.settings import Assumptions
from simulators.worlds import TinyWorld

SMALL = Size(users=48, items=120, slate_size=5, dim=8, max_steps=7, households=30)


def world(**settings: Any) -> TinyWorld:
    return TinyWorld(SimSpec(None, None, seed=1), **{"items": 120, "dim": 8, **settings})


@pytest.mark.parametrize("exposure", [0.0, 1.5])
@pytest.mark.parametrize("patience", [0.2, 0.0])
def test_the_bare_kernel_gives_the_same_numbers_as_the_environment(
    exposure: float, patience: float
) -> None:
    users = world(exposure=exposure, patience=patience)
    settings: dict[str, Any] = {"num_envs": 48, "slate_size": 5, "max_steps": 7, "seed": 3}
    env = RecommendVectorEnv(users, observation="ids", output="torch", **settings)
    bare = BareStep(users, **settings)
    env.reset()
    generator = torch.Generator().manual_seed(0)
    bought = hidden = ends = 0
    for _ in range(30):
        slate = torch.randint(120, (48, 5), generator=generator)  # with repeats
        obs, reward, terminated, truncated, info = env.step(slate)
        mine, response = bare.step(slate), info["response"]
        pairs = {
            "shown": (info["slate"], mine.shown), "chosen": (response.chosen["buy"], mine.chosen),
            "organic": (response.organic, mine.organic), "value": (response.value, mine.value),
            "reward": (reward, mine.reward), "terminated": (terminated, mine.terminated),
            "truncated": (truncated, mine.truncated), "history": (obs.history, bare.history),
            "feedback": (obs.feedback[:, :, 0], bare.feedback),
            "profile": (obs.profile, bare.held[0]), "past": (obs.past, bare.held[1]),
            "count": (obs.past_count, bare.held[2]), "age": (obs.past_age, bare.held[3]),
            "context": (obs.context, bare.context),
        }  # fmt: skip
        for name, (theirs, ours) in pairs.items():
            assert torch.equal(theirs, ours), name
        bought += int(mine.chosen.sum())
        hidden += int((mine.shown == EMPTY).sum())
        ends += int((terminated | truncated).sum())
    assert min(bought, hidden, ends) > 50  # all of it happened


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trips": 2}, "one trip, the logit choice.*got trips=2"),
        ({"choice": "cascade"}, "choice='cascade'"),
        ({"drift": 0.1}, "drift=0.1"),
        ({"satiation": 0.5}, "satiation=0.5"),
        ({"stop": (0.1, 0.2)}, "one stop hazard .* got 2"),
    ],
)
def test_the_bare_kernel_refuses_what_it_does_not_compute(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BareStep(world(**settings), num_envs=4, slate_size=2, max_steps=3, seed=0)


@pytest.mark.parametrize(("items", "slate"), [(7, 3), (1000, 10), (5, 5), (9, 1)])
def test_random_slates_are_of_different_items_all_alike(items: int, slate: int) -> None:
    size = replace(SMALL, users=4000, items=items, slate_size=slate)
    drawn = torch.cat(env_speed.random_slates(size))  # (m, K)
    ordered = drawn.sort(dim=1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    assert drawn.min() >= 0
    assert drawn.max() < items
    for column in drawn.T:  # each slot shows the whole catalogue: parts differ by one item at most
        share = torch.bincount(column, minlength=items) * items / len(drawn)
        assert share.min() > 0.6
        assert share.max() < 1.6


def test_the_headline_has_many_few_and_fitted_users_beside_peer_and_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(env_speed, "installed", lambda name: False)
    monkeypatch.setattr(env_speed, "fitted", lambda size: world())  # its own test is below
    found = env_speed.rows(1, 0.0, 0, False, curves=False, size=SMALL)
    many, everything, sixteen, one = found
    assert all(tuple(entry) == KEYS for entry in found)
    assert many["case"] == "RecommendVectorEnv, TinyWorld, 48 users, 120 items, slate 5"
    assert many["ratio_to_limit"] == pytest.approx(many["product"] / many["limit"])
    assert (many["peer_goal"], sixteen["peer_goal"], one["peer_goal"]) == (40.0, 1.0, 0.25)
    assert "everything on" in everything["case"]
    assert ", 16 users" in sixteen["case"]
    assert ", 1 user," in one["case"]
    assert all(entry["peer"] is None for entry in found)
    assert "SARDINE SlateTopK-Bored: not here" in bench_rows.table(found)


def test_the_peer_plays_whole_sessions() -> None:
    pytest.importorskip("sardine", reason="a peer: pip install sardine-rec")
    work = env_speed.sardine(0)
    assert sum(work() for _ in range(250)) == 250  # sessions have 100


def test_a_work_counts_its_users_and_comes_warm() -> None:
    steps: list[torch.Tensor] = []
    slates = env_speed.random_slates(SMALL)
    work = env_speed.stepped(steps.append, slates, SMALL)
    assert len(steps) == env_speed.WARM_UP
    assert work() == SMALL.users
    assert torch.equal(steps[-1], slates[env_speed.WARM_UP % len(slates)])


def test_points_of_curves_are_processes_of_their_own_held_to_be_flat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def alone(module: str, case: str, size: dict[str, Any]) -> dict[str, Any]:
        assert (module, case) == ("env_speed", "point")
        cost = size["items"] / 1000 + size["users"] / 4096
        kib = size["items"] / 1024
        rates = {"cpu": [1.0 / cost] * 3, "wall": [0.5 / cost] * 3}
        return {**rates, "peak": 100 + 2 * kib, "catalog": kib}

    monkeypatch.setattr(env_speed, "alone", alone)
    axes = {"users": (16, 256, 4096), "items": (1000, 3000, 7000), "slate_size": (1, 5)}
    *points, users, items, memory = env_speed.curve_rows(Size(), axes)
    assert [p["at"] for p in points if p["curve"] == "users"] == [16, 256, 4096]
    assert len({p["case"] for p in points}) == 8
    assert users["ratio_to_limit"] == pytest.approx((1 + 256 / 4096) / 2)  # 16 is not held to it
    assert items["ratio_to_limit"] == pytest.approx(2 / 8)
    assert bench_rows.reached(items) is False
    assert memory["product"] == pytest.approx(0.5)  # 2 KiB an item are held
    assert memory["ratio_to_limit"] == pytest.approx(0.5)


def test_a_point_measures_rate_memory_and_the_columns_of_its_catalogue() -> None:
    found = bench_rows.alone("env_speed", "point", {**vars(SMALL), "items": 500})
    assert len(found["cpu"]) == env_speed.POINT[0]
    assert min(found["cpu"]) > 0
    assert 100 < found["peak"] < 1000
    # vectors of 8 float32, category int64; price, popularity, bias and gap float32
    assert found["catalog"] * bench_rows.MIB == pytest.approx(500 * (4 * 8 + 8 + 4 * 4))


def test_sessions_end_where_a_small_catalogue_has_nothing_more_to_show() -> None:
    assert replace(SMALL, items=100, slate_size=10, max_steps=20).steps == 10
    assert replace(SMALL, items=1000, slate_size=10, max_steps=20).steps == 20


def test_fitted_users_do_all_they_can() -> None:
    users = env_speed.fitted(Size(items=60))
    off = Assumptions()
    for name in ("trips", "drift", "exposure", "position"):
        assert getattr(users.assumed, name) > getattr(off, name)
    assert users.assumed.patience > 0
    assert users.company is not None  # both from the log: it has baskets and trips enough
    assert users.habits.returns is not None
    assert users.preference.bias.shape[1] > 1  # members
    assert (users.users.past[:, 0] != EMPTY).float().mean() > 0.9


def test_few_points_are_not_held_to_anything() -> None:
    lone = [row("env", "a", "u", fixed(1.0), memory_mib=1.0, curve="items", at=100)]
    assert env_speed.held_to(lone, {("items", 100): 1.0}) == []
