"""Rules of what must not be shown: read, refused, sparse, and kept by env, agents and tables."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from agents.base import Transition
from agents.dqn import DQN
from agents.interactions import Interactions
from encoders.state import EMPTY
from envs import RecommendEnv, RecommendVectorEnv
from envs.excluded import Excluded, Rule, among, as_text, read_rules, refuse_unknown
from evaluation.online import play
from experiments.oracle import play_oracle
from experiments.policies import agent_spec, make_env, opening, replay_value
from experiments.prepare import ReplayTrips, Worlds, events_of, prepare
from simulators.base import SimSpec
from simulators.worlds import TinyWorld

WORLD = TinyWorld(SimSpec(None, None), items=40, households=30)
NAMES = WORLD.catalog.category_names


def rule(what, names, users=None):
    users = None if users is None else np.array(list(map(str, users)), dtype=object)
    return Rule("here", users, what, np.array(list(map(str, names)), dtype=object))


def of(*rules, world=WORLD):
    return Excluded.of(rules, world.catalog, world.users)


def sets(excluded, users):
    return [set(row[row != EMPTY].tolist()) for row in excluded.rows(torch.tensor(users))]


def members(name):
    return set((WORLD.catalog.category == NAMES.index(name)).nonzero()[:, 0].tolist())


def forbidden(users=30, seed=0, each=6):
    """A rule with some items for each user, and for all items 0 and 1."""
    rng = np.random.default_rng(seed)
    lines = [(u, i) for u in range(users) for i in rng.choice(40, each, replace=False)]
    return of(rule("item", [i for _, i in lines], [u for u, _ in lines]), rule("item", [0, 1]))


def session(world=WORLD, excluded=None, **changes):
    given = {"num_envs": 30, "slate_size": 3, "max_steps": 5, "observation": "ids"}
    return RecommendVectorEnv(
        world, **(given | {"output": "torch", "excluded": excluded} | changes)
    )


def spec_of(world=WORLD, k=3, steps=5):
    cfg = OmegaConf.create(
        {"seed": 0, "env": {"session": {"slate_size": k, "max_steps": steps}}, "steps": 10}
    )
    worlds = Worlds(world, [world], events_of(world.users, world.catalog), None, {}, [])
    return agent_spec(cfg, worlds, "cpu")


@pytest.fixture
def table(tmp_path):
    def write(text, name="rule.csv"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_items_and_categories_for_some_and_for_all_by_hand():
    excluded = of(
        rule("item", [7, 9, 7], [3, 3, 3]),
        rule("category", [NAMES[1]], [4]),
        rule("item", [20]),
        rule("item", [20, 21], [5, 5]),
    )
    assert sets(excluded, [3, 4, 5, 6]) == [{7, 9, 20}, members(NAMES[1]) | {20}, {20, 21}, {20}]
    assert excluded.width == len(members(NAMES[1]) | {20})
    assert sets(of(rule("category", NAMES[:2])), [0]) == [members(NAMES[0]) | members(NAMES[1])]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(-1, 7), st.booleans(), st.integers(0, 39)), max_size=30),
    st.permutations(range(8)),
)
def test_any_rules_forbid_what_a_search_finds(lines, order):
    rules, wanted = [], [set() for _ in range(8)]
    for user, by_item, n in lines:
        name = n if by_item else NAMES[n % len(NAMES)]
        items = {n} if by_item else members(NAMES[n % len(NAMES)])
        rules.append(rule("item" if by_item else "category", [name], None if user < 0 else [user]))
        for u in range(8) if user < 0 else [user]:
            wanted[u] |= items
    excluded = of(*rules)
    assert sets(excluded, list(order)) == [wanted[u] for u in order]
    rows = excluded.rows(torch.arange(8))
    assert (rows.diff(dim=1) >= 0).all()
    assert ((rows.diff(dim=1) > 0) | (rows[:, 1:] == EMPTY)).all(), "an item stands once"
    if excluded.width:
        slate = torch.arange(-1, 40).repeat(8, 1)
        hits = among(slate, rows)
        found = [set(s[h].tolist()) for s, h in zip(slate, hits, strict=True)]
        assert found == wanted


def test_a_user_of_several_rows_has_one_rule():
    users = WORLD.users
    twice = replace(users, ids=np.array([f"u{i // 2}" for i in range(len(users))]))
    excluded = Excluded.of([rule("item", [3], ["u1"])], WORLD.catalog, twice)
    assert sets(excluded, [1, 2, 3, 4]) == [set(), {3}, {3}, set()]


def test_memory_is_that_of_the_rules_not_of_users_times_items():
    n, u = 1_000_000, 200_000
    big = replace(
        WORLD.catalog, ids=np.arange(n), category=torch.arange(n) % 10_000,
        category_names=[f"c{i}" for i in range(10_000)], vectors=torch.zeros(1, 1),
    )  # fmt: skip
    many = replace(WORLD.users, ids=np.arange(u))
    juniors = rule("category", ["c5"] * (u // 2), range(u // 2))  # 100 items each
    own = rule("item", range(1000), range(u // 2, u // 2 + 1000))
    excluded = Excluded.of([juniors, own], big, many)
    held = sum(x.numel() for x in vars(excluded).values())
    assert held < u + 5_000  # 1,001 lists and not 101,000; a table would hold 2e11
    assert excluded.rows(torch.tensor([7, u - 1])).shape == (2, excluded.width)
    assert excluded.width == 100


@pytest.mark.parametrize("steps", [1, 12])
@pytest.mark.parametrize("board", [20_000, 10])
def test_the_env_shows_nothing_that_is_forbidden(steps, board, monkeypatch):
    monkeypatch.setattr("envs.shown.BOARD", board)  # both ways of looking up what was shown
    excluded = forbidden()
    env, free = session(excluded=excluded), session()
    env.reset(seed=1), free.reset(seed=1)
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(steps):
        slate = torch.rand(30, 40, generator=generator).topk(3, dim=1).indices
        never = [set(r.tolist()) - {EMPTY} for r in excluded.rows(env.user)]
        mask = env.mask
        asked = torch.tensor(
            [[i in n for i in row] for row, n in zip(slate.tolist(), never, strict=True)]
        )
        before = torch.tensor(
            [
                [i in h for i in row]
                for row, h in zip(slate.tolist(), env.view.history.tolist(), strict=True)
            ]
        )
        assert [set(m.tolist()) - {EMPTY} for m in mask] == [
            n | (set(h.tolist()) - {EMPTY}) for n, h in zip(never, env.view.history, strict=True)
        ]
        allowed = torch.from_numpy(env.action_masks())
        *_, info = env.step(slate)
        assert torch.equal(info["slate"] == EMPTY, asked | before)
        assert torch.equal(info["illegal"], (asked | before).sum(dim=1))
        assert torch.equal(info["slate"] != EMPTY, allowed.gather(1, slate))
        hits += int(asked.sum())
        if "final_mask" in info:
            assert info["final_mask"].shape == info["mask"].shape
    assert hits > 0
    free.reset(seed=1)
    assert free.mask is free.view.history, "without a rule the mask stays the history itself"


def test_one_user_keeps_the_rule_and_saved_sessions_go_on_with_it():
    excluded = forbidden()
    one = RecommendEnv(WORLD, slate_size=3, max_steps=5, excluded=excluded, output="torch")
    _, info = one.reset(options={"user": 4, "episode": 0})
    assert set(info["mask"].tolist()) - {EMPTY} == sets(excluded, [4])[0]
    env, again = session(excluded=excluded), session(excluded=excluded)
    env.reset(seed=3)
    env.step(torch.zeros(30, 3, dtype=torch.int64) + torch.arange(3) + 10)
    again.load_state_dict(env.state_dict())
    assert torch.equal(env.mask, again.mask)
    slate = torch.arange(3).expand(30, -1) + 15
    assert torch.equal(env.step(slate)[-1]["slate"], again.step(slate)[-1]["slate"])


def agents():
    spec = spec_of()
    return {
        name: instantiate(OmegaConf.load(f"experiments/conf/agent/{name}.yaml"), spec)
        for name in ("popularity", "buy_again", "ease")
    }


def shown_to(env, serve):
    """(user, item) pairs that were shown when `serve` plays."""
    pairs = []

    def watch(rows, obs, info):
        for user, slate in zip(
            info["user"][rows].tolist(), info["slate"][rows].tolist(), strict=True
        ):
            pairs.extend((user, i) for i in slate if i != EMPTY)

    serve(env, torch.arange(30), torch.zeros(30, dtype=torch.int64), watch)
    return pairs


def test_static_policies_and_the_oracle_show_other_items_instead():
    # all are forbidden what they would most like to be shown
    best = WORLD.users.past[:, :].clone()
    lines = [(u, int(i)) for u in range(30) for i in best[u][best[u] != EMPTY][:5]]
    excluded = of(rule("item", [i for _, i in lines], [u for u, _ in lines]))
    ways = {
        name: lambda env, u, e, watch, agent=agent: play(env, agent, u, e, watch=watch)
        for name, agent in agents().items()
    }
    ways["oracle"] = lambda env, u, e, watch: play_oracle(env, u, e, watch=watch)
    for name, serve in ways.items():
        free = set(shown_to(session(), serve))
        ruled = shown_to(session(excluded=excluded), serve)
        assert free & set(lines), name
        assert not set(ruled) & set(lines), name
        assert len(ruled) > 0.9 * 3 * 30, "slates are full: others are shown instead"


def test_a_learner_trains_under_a_rule_and_never_breaks_it():
    excluded = forbidden()
    env = session(excluded=excluded, num_envs=16)
    conf = OmegaConf.load("experiments/conf/agent/dqn.yaml")
    agent = instantiate(conf, spec_of(), batch_size=32, learning_starts=64)
    assert isinstance(agent, DQN)
    obs, info = env.reset(seed=0)
    for _ in range(12):
        mask, user = info["mask"], env.user
        decision = agent.act(obs, mask)
        assert not among(decision.slate, excluded.rows(user)).any()
        later, reward, terminated, truncated, info = env.step(decision.slate)
        learnt = agent.update(
            Transition(obs, mask, decision, reward, info["response"].chosen["buy"],
                       info["slot_reward"], info.get("final_obs", later),
                       info.get("final_mask", info["mask"]), terminated, truncated)
        )  # fmt: skip
        obs = later
    assert learnt, "it has learnt from masked steps"


def test_the_replayed_trips_are_under_the_rule_too(table):
    trips = ReplayTrips(WORLD.users, WORLD.users.past[:, -8:].clone())
    cfg = OmegaConf.create({
        "replay_items": 9,
        "env": {"session": {"slate_size": 3, "max_steps": 5, "excluded": None}},
    })  # fmt: skip
    worlds = Worlds(WORLD, [WORLD], None, trips, {}, [])
    agent = agents()["buy_again"]
    free = replay_value(cfg, agent, worlds)
    text = "user,item\n" + "".join(
        f"{u},{i}\n" for u in range(30) for i in set(trips.bought[u].tolist()) - {EMPTY}
    )
    cfg.env.session.excluded = table(text)
    assert free > 0.5
    assert replay_value(cfg, agent, worlds) == 0.0, "what was bought is all that is forbidden"
    assert len(opening(trips.users, 15, 1)) == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,product\n1,2\n", r"a column item or a column category.*\['user', 'product'\]"),
        ("user,item,category\n1,2,a\n", "a column item or a column category"),
        ("user,item\n", "has no lines, expected one for .*leave it out .*excluded=null"),
        ("", "is empty, expected a first line that names its columns .*leave it out .*=null"),
        ("user;item\n1;2\n", r"got \['user;item'\]: rename the columns, and separate them by com"),
        ("a,b\n1,2,3\n1,2,3,4\n", "cannot be read .*give a .csv with commas"),
        ("user,item\n1,2\n,3\n", "has no user in 1 of 2 lines .first in line 1."),
        ("user,item\n1,\n", "has no item in 1 of 1 lines"),
    ],
)  # fmt: skip
def test_a_table_that_is_no_rule_is_refused(text, message, table):
    with pytest.raises(ValueError, match=message):
        read_rules(table(text))


def test_users_by_another_name_are_no_rule_for_everybody(table):
    with pytest.raises(ValueError, match=r"column item and \['person'\], none of them user"):
        read_rules(table("person,item\n1,2\n"))


def test_a_missing_file_no_list_and_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.csv does not exist"):
        read_rules("nowhere.csv")
    (tmp_path / "rule.txt").write_text("item\n1\n")
    with pytest.raises(ValueError, match=r"rule.txt is a file and its name does not end in .csv"):
        read_rules(str(tmp_path / "rule.txt"))
    with pytest.raises(ValueError, match="must be a table"):
        read_rules(3)
    with pytest.raises(ValueError, match="got none"):
        read_rules([])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("user,item\n1,2\n77,2\n78,2\n", r"2 of 3 users are not known, the first \['77', '78'\]"),
        ("item\n99\n98\n97\n96\n", r"4 of 4 items are not known, the first \['99', '98', '97'\]"),
        ("user,category\n1,wine\n", r"1 of 1 categories are not known, the first \['wine'\]"),
    ],
)  # fmt: skip
def test_unknown_names_are_counted_and_the_first_named(source, message, table):
    with pytest.raises(ValueError, match=message):
        Excluded.read(table(source), WORLD)
    near = NAMES[0][:-1] + "x"
    with pytest.raises(ValueError, match=f"did you mean '{NAMES[0][:-1]}"):
        Excluded.read([near], WORLD)


def test_ids_are_compared_as_they_are_written(table, tmp_path):
    assert as_text([7, 8]).tolist() == as_text([7.0, 8.0]).tolist() == ["7", "8"]
    (read,) = read_rules(table("user,item\n007,1\n"))
    with pytest.raises(ValueError, match=r"the first \['007'\]; known are 30 users such as \['0'"):
        refuse_unknown([read], np.arange(30), np.arange(40), NAMES)
    frame = pd.DataFrame({"user": [3, 3], "item": [7, 9]})
    frame.to_parquet(tmp_path / "rule.parquet")
    excluded = Excluded.read([tmp_path / "rule.parquet", NAMES[0]], WORLD)
    assert sets(excluded, [3, 4]) == [{7, 9} | members(NAMES[0]), members(NAMES[0])]
    assert "for everybody, up to" in excluded.words(WORLD.catalog)


def test_a_rule_that_leaves_too_few_items_is_refused():
    everything = of(rule("item", range(30), [2] * 30))
    with pytest.raises(ValueError, match=r"leaves a user 10 of 40 items.*needs 15: exclude fewer"):
        session(excluded=everything)


def config(**session_settings):
    env = OmegaConf.load("experiments/conf/env/tiny.yaml")
    env.session = OmegaConf.merge(env.session, session_settings)
    return OmegaConf.create(
        {"env": env, "env_name": "tiny", "seed": 0, "evaluators": 1, "progress": False}
    )


def test_the_configuration_takes_a_rule_and_says_how_much_it_is(table):
    cfg = config(excluded=[table("user,item\n3,7\n3,8\n"), "category 2"])
    worlds = prepare(cfg, "cpu")
    share = int((worlds.train.catalog.category == 2).sum())
    assert any(
        note.startswith(f"excluded: {share} of 60 items for everybody, up to 2 more for 1 of 400")
        for note in worlds.notes
    )
    env = make_env(cfg, worlds.test[0], num_envs=4, seed=0)
    assert env.excluded.width == share + 2
    with pytest.raises(ValueError, match=r"1 of 1 users are not known, the first \['4000'\]"):
        prepare(config(excluded=table("user,item\n4000,7\n")), "cpu")
    assert make_env(config(), worlds.train, num_envs=4, seed=0).excluded is None
    assert isinstance(worlds.events, Interactions)


def test_where_nobody_has_a_rule_nothing_is_forbidden():
    """As in the half of the users that a table does not name."""
    slate = torch.tensor([[0, 1, EMPTY], [2, 2, 2]])
    assert not among(slate, torch.empty(2, 0, dtype=torch.int64)).any()
