"""Rewards that need the item, and rewards less what the simulator doubts: known answers."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from encoders.state import EMPTY
from envs import RecommendEnv, RecommendVectorEnv
from envs.rewards import Margin, Weighted, at_stake, doubt, incremental, revenue, units
from experiments import train_agent
from experiments.policies import SESSIONS_SEED, make_env
from simulators.base import Response, SimSpec
from simulators.worlds import TinyWorld

SPEC = SimSpec(None, None)
SPREAD = torch.tensor([0.1, 0.0, 0.3])  # of items 0, 1 and 2 between two members


class Unsure(TinyWorld):
    """Three products for 2, 5 and 10; two members whose probabilities lie 2 * SPREAD apart."""

    def __init__(self, spec=SPEC, **settings):
        super().__init__(spec, items=3, households=20, stop=(0.0,), patience=0.0, **settings)
        self.catalog = replace(self.catalog, price=torch.tensor([2.0, 5.0, 10.0]))

    def respond(self, state, slate, draws):
        response, after = super().respond(state, slate, draws)
        members = torch.stack([0.5 + SPREAD, 0.5 - SPREAD])  # (2, N)
        u = members.std(dim=0, correction=0)[slate.clamp(min=0)] * (slate != EMPTY)
        return replace(response, uncertainty=u), after


def env_of(**settings):
    given = {"num_envs": 20, "slate_size": 3, "max_steps": 1, "observation": "ids"}
    return RecommendVectorEnv(Unsure(), **(given | {"output": "torch"} | settings))


def stepped(slate, **settings):
    env = env_of(**settings)
    env.reset(seed=0)
    return env.step(torch.tensor(slate).expand(20, -1))[-1]


@pytest.mark.parametrize(
    ("reward", "stake"),
    [
        (units, [1.0, 1.0, 1.0]),
        (incremental, [1.0, 1.0, 1.0]),
        (revenue, [2.0, 5.0, 10.0]),
        (Weighted({"buy": -4.0}), [4.0, 4.0, 4.0]),
        (lambda r: 0.5 * r.value - 3.0 * r.chosen["buy"], [2.0, 0.5, 2.0]),
    ],
    ids=["units", "incremental", "revenue", "harm", "own"],
)
def test_pessimism_takes_the_spread_times_what_hangs_on_it(reward, stake):
    plain = stepped([0, 1, 2], reward=reward)
    wary = stepped([0, 1, 2], reward=reward, pessimism=0.5)
    assert torch.equal(plain["slate"], wary["slate"])
    assert (plain["response"].chosen["buy"] == wary["response"].chosen["buy"]).all()
    taken = plain["slot_reward"] - wary["slot_reward"]  # the same for bought and for passed
    wanted = 0.5 * SPREAD * torch.tensor(stake)
    assert torch.allclose(taken, wanted.expand(20, -1), atol=1e-6)
    assert 0 < plain["response"].chosen["buy"].sum() < 60


def test_pessimism_off_is_bit_equal_and_an_empty_slot_costs_nothing():
    assert torch.equal(
        stepped([0, 1, 2], reward=revenue)["slot_reward"],
        stepped([0, 1, 2], reward=revenue, pessimism=0.0)["slot_reward"],
    )
    repeated = stepped([2, 2, EMPTY], reward=units, pessimism=10.0)
    assert (repeated["slot_reward"][:, 1:] == 0).all()
    assert (repeated["slot_reward"][:, 0] < 0).all()


def test_the_mean_reward_is_less_by_pessimism_standard_errors_of_the_mean():
    """Of a slot with true members p - u and p + u, the expected reward's std is u."""
    members = torch.stack([0.5 + SPREAD, 0.5 - SPREAD])  # (2, N)
    price = Unsure().catalog.price
    std_of_money = (members * price).std(dim=0, correction=0)  # (N,)
    wary = stepped([0, 1, 2], reward=revenue, pessimism=1.0)
    plain = stepped([0, 1, 2], reward=revenue)
    assert torch.allclose(plain["slot_reward"] - wary["slot_reward"], std_of_money.expand(20, -1),
                          atol=1e-5)  # fmt: skip


def test_what_was_bought_has_its_own_value_and_an_unknown_price_is_no_stake():
    bought = torch.tensor([[True, False, False]])
    none = torch.zeros(1, 3)
    response = Response(
        {"click": bought, "buy": bought}, bought, 7.0 * bought, bought[:, 0], none[:, 0],
        torch.ones(1, 3), torch.tensor([[0, 1, 2]]),
    )  # fmt: skip
    price = torch.tensor([2.0, 5.0, torch.nan])
    assert at_stake(revenue, response, price).tolist() == [[7.0, 5.0, 0.0]]
    weighted = Weighted({"click": 1.0, "buy": 3.0})
    assert at_stake(weighted, response, price).tolist() == [[4.0, 1.0, 1.0]]
    assert torch.equal(doubt(units, response, price), torch.ones(1, 3))


@pytest.mark.parametrize("wrong", [-0.1, float("inf"), float("nan"), "much", True, None])
def test_a_pessimism_that_is_no_multiple_is_refused(wrong):
    with pytest.raises(ValueError, match="pessimism must be a finite number of at least 0"):
        env_of(pessimism=wrong)


def test_a_reward_knows_what_was_shown():
    def of_item_two(response):
        return (response.items == 2).float()

    assert stepped([1, 2, 2], reward=of_item_two)["slot_reward"].tolist() == [[0.0, 1.0, 0.0]] * 20
    one = RecommendEnv(Unsure(), slate_size=3, max_steps=1, reward=of_item_two)
    one.reset(seed=0)
    assert one.step(torch.tensor([0, 2, 1]))[1] == 1.0


@pytest.fixture
def margins(tmp_path):
    def write(text, name="items.csv"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_margin_pays_the_column_of_what_was_bought(margins, tmp_path):
    path = margins("sku,left,price\n2,0.25,9\n0,-1.5,9\n1,2,9\n7,8,9\n")
    reward = Margin(path, item="sku", column="left")
    info = stepped([0, 1, 2], reward=reward)
    bought = info["response"].chosen["buy"]
    assert torch.equal(info["slot_reward"], bought * torch.tensor([-1.5, 2.0, 0.25]))
    assert 0 < bought.sum() < 60
    wary = stepped([0, 1, 2], reward=reward, pessimism=1.0)["slot_reward"]
    hangs = SPREAD * torch.tensor([1.5, 2.0, 0.25])
    assert torch.allclose(info["slot_reward"] - wary, hangs.expand(20, -1), atol=1e-6)
    import pandas as pd

    pd.read_csv(path).to_parquet(tmp_path / "items.parquet")
    again = Margin(str(tmp_path / "items.parquet"), item="sku", column="left")
    assert torch.equal(stepped([0, 1, 2], reward=again)["slot_reward"], info["slot_reward"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item,margin\n0,1\n", r"of the catalogue, 2 of 3 have none, the first .'1', '2'"),
        ("item,margin\n0,1\n1,low\n2,3\n", r"1 of 3 have none, the first .'1'"),
        ("item,margin\n0,1\n1,1\n2,3\n2,4\n", r"1 items twice, the first .'2'"),
        ("sku,margin\n0,1\n", r"lacks the column 'item', it has .'sku', 'margin'"),
        ("item,left\n0,1\n", r"lacks the column 'margin'.*env.session.reward.column"),
    ],
)  # fmt: skip
def test_a_table_without_the_margins_is_refused(text, message, margins):
    with pytest.raises(ValueError, match=message):
        env_of(reward=Margin(margins(text)))


def test_a_margin_of_nowhere_is_refused():
    with pytest.raises(ValueError, match=r"nowhere.csv does not exist: give the table"):
        env_of(reward=Margin("nowhere.csv"))


def tiny(**changes):
    env = OmegaConf.load("experiments/conf/env/tiny.yaml")
    env.simulator = {"_target_": "test_rewards.Unsure"}
    env.session.slate_size, env.session.max_steps = 1, 3
    return OmegaConf.merge({"env": env, "env_name": "tiny", "seed": 0, "steps": 64,
                            "num_envs": 8}, changes)  # fmt: skip


class World:
    """What `training_env` needs of an arena."""

    def __init__(self, cfg, simulator):
        self.env = lambda: make_env(cfg, simulator, num_envs=8, seed=0)


def test_only_training_is_pessimistic(margins):
    cfg = tiny(env={"pessimism": 2.0})
    env = train_agent.training_env(cfg, World(cfg, Unsure()))
    assert env.pessimism == 2.0
    assert make_env(cfg, Unsure(), num_envs=8, seed=SESSIONS_SEED).pessimism == 0.0
    assert train_agent.training_env(tiny(), World(tiny(), Unsure())).pessimism == 0.0
    with pytest.raises(ValueError, match="states no uncertainty"):
        train_agent.training_env(cfg, World(cfg, TinyWorld(SPEC)))


def test_a_configured_margin_reaches_the_reward(margins):
    reward = {"_target_": "envs.rewards.Margin", "path": margins("item,margin\n0,1\n1,2\n2,3\n")}
    cfg = tiny(env={"session": {"reward": reward}})
    env = make_env(cfg, Unsure(), num_envs=8, seed=0)
    env.reset()
    *_, info = env.step(torch.full((8,), 2))
    assert torch.equal(info["slot_reward"], 3.0 * info["response"].chosen["buy"])
