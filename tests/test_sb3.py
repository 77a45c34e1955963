"""SB3's algorithms as agents: its own learn, our masks and propensities, its files, resuming."""

import copy
import inspect
import io
import json
import random
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_sb3_env import WORLD, sessions, spec_of

from agents.base import AgentSpec
from agents.sb3 import ALGORITHMS, POLICIES, SB3, VALUES, draw_slots, probs_of_slots
from agents.testing import check_agent, synthetic_observation, synthetic_spec
from encoders.state import EMPTY, Observation
from simulators.base import SimSpec
from simulators.worlds import TinyWorld

SMALL = {"width": 16}
QUICK = {  # so that 64 users' steps make several updates
    "dqn": {"batch_size": 16, "learning_starts": 8, "target_every": 16, "capacity": 200},
    "ppo": {"batch_size": 16, "n_steps": 2, "epochs": 2},
    "a2c": {"n_steps": 2},
}
QUICK["qrdqn"] = {**QUICK["dqn"], "quantiles": 5}
QUICK["maskable_ppo"] = QUICK["ppo"]


def agent_of(algo, env=None, seed=0, **settings):
    spec = spec_of(env or sessions(), seed=seed)
    return SB3(spec, algo=algo, **(SMALL | QUICK[algo] | settings))


def always(transition, learnt):
    return True


def weights(agent):
    return torch.cat([p.detach().flatten() for p in agent.model.policy.parameters()])


class Identity:
    """Show the item that the profile names: a reward of 1, of at most 20 a session."""

    num_items, slate_size = 4, 1

    def __init__(self, num_envs, seed=0):
        self.num_envs, self.rng = num_envs, torch.Generator().manual_seed(seed)

    def see(self):
        self.wanted = torch.randint(4, (self.num_envs,), generator=self.rng)
        none = torch.full((self.num_envs, 1), EMPTY)
        zero = torch.zeros(self.num_envs, 1)
        return Observation(
            torch.eye(4)[self.wanted], none, zero, zero, none, zero[:, :, None], zero[:, :0]
        )

    def reset(self):
        self.steps = 0
        return self.see(), {"mask": None}

    def step(self, slate):
        reward = (slate[:, 0] == self.wanted).float()
        self.steps += 1
        obs, ends = self.see(), torch.full((self.num_envs,), self.steps % 20 == 0)
        info = {"mask": None}
        if ends.any():
            info |= {"final_obs": obs, "final_mask": None, "_final_obs": ends}
        return obs, reward, torch.zeros_like(ends), ends, info


def identity_spec():
    one = torch.ones(4)
    return AgentSpec(4, 1, torch.eye(4), one.long(), one, None, 4, 1, 1, 1, 0)


@pytest.mark.parametrize("head", ["dot", "dense"])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_sb3s_own_learn_runs_with_every_algorithm_and_head(algo, head):
    agent = agent_of(algo, head=head)
    before, seen, learnt = weights(agent), [], {}

    def watch(transition, logs):
        seen.append(transition)
        learnt.update(logs)
        return True

    agent.learn(sessions(), 128, watch)
    assert len(seen) == 16
    assert agent.model.num_timesteps == 128
    assert not torch.equal(before, weights(agent))
    name = "train/loss" if algo != "a2c" else "train/value_loss"
    assert torch.isfinite(learnt[name])
    assert agent.model.n_envs == 8


def test_learn_is_what_sb3_does_alone():
    from stable_baselines3 import PPO

    from agents.sb3_env import SessionsVecEnv
    from agents.sb3_policies import DotActorCriticPolicy

    agent = agent_of("ppo", seed=5)
    agent.learn(sessions(seed=3), 64, always)
    alone = PPO(
        DotActorCriticPolicy, SessionsVecEnv(sessions(seed=3), agent.read), learning_rate=1e-3,
        n_steps=2, batch_size=16, n_epochs=2, gamma=0.8, ent_coef=0.01, seed=None, device="cpu",
        policy_kwargs={"net_arch": [16, 16], "item_features": agent.read.items[:-1]},
    )  # fmt: skip
    alone.set_random_seed(5)
    alone.env._reset_seeds()  # the environment keeps its own
    alone._setup_model()
    alone.learn(64)
    assert torch.equal(
        torch.cat([p.detach().flatten() for p in alone.policy.parameters()]), weights(agent)
    )


@pytest.mark.parametrize("algo", ["dqn", "ppo"])
def test_identity_is_learnt(algo):
    settings = {"dqn": {"batch_size": 32, "learning_starts": 100, "target_every": 64,
                        "replay_ratio": 8.0, "exploration_fraction": 0.3},
                "ppo": {"batch_size": 64, "n_steps": 16}}  # fmt: skip
    agent = SB3(identity_spec(), algo=algo, gamma=0.4, width=32, lr=3e-3, **settings[algo])
    agent.learn(Identity(16), 2400, always)
    env = Identity(100, seed=9)
    obs, mask = env.reset()[0], None
    assert env.step(agent.act(obs, mask, explore=False).slate)[1].sum() >= 90


def test_maskable_ppo_never_shows_a_masked_item_while_it_trains():
    env = sessions(TinyWorld(SimSpec(None, None), items=6, households=30, dim=4, patience=0.0,
                             stop=(0.0,)), max_steps=6, num_envs=16)  # fmt: skip
    agent, shown = agent_of("maskable_ppo", env), []

    def watch(transition, logs):
        shown.append(transition.decision.slate)
        allowed = ~(transition.mask[:, :, None] == torch.arange(6)).any(dim=1)
        # at the last step of six one item of six is left
        assert transition.decision.propensity[allowed.sum(dim=1) == 1].allclose(torch.ones(1))
        return True

    agent.learn(env, 16 * 30, watch)
    assert (torch.cat(shown) != EMPTY).all()  # a masked item would be shown as an empty slot
    other, empty = agent_of("ppo", env), []
    other.learn(
        env, 16 * 30, lambda t, _: bool(empty.append((t.decision.slate == EMPTY).any())) | 1
    )
    assert any(empty)


@pytest.mark.parametrize("algo", ["dqn", "ppo"])
def test_propensities_of_training_are_the_policys_or_unknown(algo):
    env = sessions()
    agent, found = agent_of(algo, env), []
    first = agent.scores(env.reset()[0])

    def watch(transition, logs):
        found.append(transition)
        return False

    agent.learn(env, 8, watch)
    step = found[0].decision
    assert len(found) == 1
    if algo == "dqn":
        assert step.propensity.isnan().all()
    else:
        assert first.shape == (8, 12)
        rows = (step.slate != EMPTY)[:, 0]
        again = agent.slate_probs(found[0].obs, None, step.slate)
        assert torch.allclose(again[rows], step.propensity[rows], rtol=1e-5)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_watch_stops_training_at_once(algo):
    steps = []
    agent, env = agent_of(algo), sessions()
    agent.learn(env, 10_000, lambda t, _: bool(steps.append(env.steps.clone())) or len(steps) < 5)
    assert len(steps) == 5
    assert agent.model.num_timesteps == 40


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_same_seed_is_the_same_to_the_last_bit(algo):
    first, again = agent_of(algo, seed=3), agent_of(algo, seed=3)
    for agent in (first, again):
        agent.learn(sessions(seed=3), 96, always)
        torch.randn(3)  # what others draw changes nothing
    other = agent_of(algo, seed=4)
    other.learn(sessions(seed=3), 96, always)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_run_goes_on_bit_for_bit(algo):
    straight, env = agent_of(algo, seed=1), sessions(seed=1)
    straight.learn(env, 192, always)
    first, other = agent_of(algo, seed=1), agent_of(algo, seed=2)
    env, saved = sessions(seed=1), {}

    def watch(transition, logs):
        if first.model.num_timesteps < 96:
            return True
        file = io.BytesIO()
        parts = {"agent": first.state_dict(), "experience": first.experience()}
        torch.save({**parts, "env": env.state_dict()}, file)
        file.seek(0)
        saved.update(torch.load(file, weights_only=True))
        return False

    first.learn(env, 192, watch)
    other.load_state_dict(saved["agent"])
    other.load_experience(saved["experience"])
    env = sessions(seed=9)
    start = env.load_state_dict(saved["env"])
    other.learn(env, 96, always, start=start)
    assert other.model.num_timesteps == 192
    assert torch.equal(weights(straight), weights(other))
    assert other.epsilon == straight.epsilon


@pytest.mark.parametrize("algo", ["dqn", "ppo"])
def test_two_agents_of_one_state_do_not_share_an_optimiser(algo):
    one, other = agent_of(algo), agent_of(algo, seed=1)
    one.learn(sessions(), 96, always)
    other.load_state_dict(one.state_dict())
    before = str(one.state_dict()["optimizer"])
    other.learn(sessions(), 96, always)
    assert str(one.state_dict()["optimizer"]) == before


@pytest.mark.parametrize("slate_size", [1, 2])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_copy_shares_nothing(algo, slate_size):
    if slate_size > 1 and algo in VALUES:
        return
    env, copies = sessions(slate_size=slate_size), []
    agent = agent_of(algo, env)

    def watch(transition, logs):
        copies.append(copy.deepcopy(agent))
        return len(copies) < 5

    agent.learn(env, 96, watch)
    before, replay = weights(agent), agent.experience()
    other, obs = copies[-1], env.reset()[0]
    assert torch.equal(weights(other), before)
    assert torch.equal(other.act(obs, None).slate, agent.act(obs, None).slate)
    assert torch.equal(other.streams["torch"], agent.streams["torch"])
    other.learn(env, 96, always)
    other.load_state_dict(other.state_dict())
    assert not torch.equal(weights(other), before)
    assert torch.equal(weights(agent), before)
    assert str(agent.experience()) == str(replay)


def test_global_generators_are_left_as_they_were():
    def states():
        return (torch.get_rng_state().tolist(), str(np.random.get_state()),  # noqa: NPY002
                random.getstate())  # fmt: skip

    before = states()
    agent = agent_of("dqn")
    agent.learn(sessions(), 64, always)
    agent.load_state_dict(agent.state_dict())
    with pytest.raises(RuntimeError, match="stop here"):
        agent.learn(sessions(), 64, stop_here)
    assert states() == before


def stop_here(transition, learnt):
    raise RuntimeError("stop here")


@pytest.mark.parametrize("head", ["dot", "dense"])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_file_that_sb3_saved_acts_as_sb3_predicts(algo, head, tmp_path):
    agent, env = agent_of(algo, head=head), sessions(num_envs=40)
    agent.learn(sessions(), 32, always)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # so that users differ in what they are shown
        for p in agent.model.policy.parameters():
            p += torch.randn(p.shape, generator=generator)
    agent.model.save(tmp_path / "model")
    loaded = agent_of(algo, seed=6, head=head)
    loaded.load(tmp_path / "model")
    obs = env.reset()[0]
    predicted, _ = agent.model.predict(agent.read.state(obs).numpy(), deterministic=True)
    assert loaded.act(obs, None, explore=False).slate[:, 0].tolist() == predicted.tolist()
    assert len(set(predicted.tolist())) > 1
    assert loaded.epsilon == agent.epsilon
    assert loaded.model.num_timesteps == 32
    assert torch.equal(loaded.scores(obs), agent.scores(obs))
    loaded.learn(sessions(), 32, always)


def test_a_file_of_something_else_is_refused(tmp_path):
    agent = agent_of("ppo", head="dense")
    agent.model.save(tmp_path / "ppo.zip")
    bigger = TinyWorld(SimSpec(None, None), items=13, households=30, dim=4)
    for other, words in (
        (agent_of("dqn", head="dense"), r"is of ppo, this agent of dqn: SB3\(algo='ppo'\)"),
        (agent_of("a2c", head="dense"), "is of ppo, this agent of a2c"),
        (agent_of("ppo", head="dot"), r"has a dense head, this agent a dot one"),
        (agent_of("ppo", head="dense", width=8), "build the agent with the settings"),
        (agent_of("ppo", sessions(bigger), head="dense"), r"for actions \[12\], this agent for"),
        (agent_of("ppo", sessions(slate_size=2), head="dense"), r"this agent for \[2, 12\]"),
        (agent_of("ppo", sessions(trips_world()), head="dense"), "for states"),
    ):
        with pytest.raises(ValueError, match=words):
            other.load(tmp_path / "ppo.zip")
    agent_of("maskable_ppo", head="dense").load(tmp_path / "ppo.zip")  # masks are no weights
    (tmp_path / "text.zip").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("readme", "nothing")
    for name, words in (("text", "no zip file"), ("other", "holds no SB3"), ("none", "no file")):
        with pytest.raises(ValueError, match=words):
            agent.load(tmp_path / f"{name}.zip")


def trips_world():
    return TinyWorld(SimSpec(None, None), items=12, households=30, dim=3)


def test_another_catalogue_or_activation_in_a_file_is_refused(tmp_path):
    from stable_baselines3 import DQN

    from agents.sb3_env import SessionsVecEnv

    agent = agent_of("dqn")
    agent.model.save(tmp_path / "dot.zip")
    world = TinyWorld(SimSpec(None, None), items=12, households=30, dim=4, world_seed=5)
    with pytest.raises(ValueError, match="of another catalogue"):
        agent_of("dqn", sessions(world)).load(tmp_path / "dot.zip")
    kwargs = {"net_arch": [16, 16], "activation_fn": torch.nn.Tanh}
    DQN("MlpPolicy", SessionsVecEnv(sessions(), agent.read), policy_kwargs=kwargs, device="cpu",
        target_update_interval=64, buffer_size=100).save(tmp_path / "tanh.zip")  # fmt: skip
    with pytest.raises(ValueError, match=r"activation .*Tanh"):
        agent_of("dqn", head="dense").load(tmp_path / "tanh.zip")


def test_nothing_in_a_file_is_unpickled(tmp_path):
    agent = agent_of("dqn", head="dense")
    agent.model.save(tmp_path / "good.zip")
    with zipfile.ZipFile(tmp_path / "good.zip") as old, \
            zipfile.ZipFile(tmp_path / "bad.zip", "w") as new:  # fmt: skip
        for name in old.namelist():
            data = old.read(name)
            if name == "data":
                said = json.loads(data)
                said["policy_class"][":serialized:"] = "bm90IGEgcGlja2xl"
                data = json.dumps(said).encode()
            new.writestr(name, data)
    agent.load(tmp_path / "bad.zip")


@pytest.mark.parametrize("slate_size", [1, 3])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_contract_is_kept_by_what_has_learnt(algo, slate_size):
    if slate_size > 1 and algo in VALUES:
        return
    env = sessions(slate_size=slate_size, max_steps=4)
    agent = agent_of(algo, env)
    agent.learn(env, 160, always)
    assert check_agent(agent, agent.spec) == []


@pytest.mark.parametrize("greedy", [True, False])
def test_slots_are_drawn_in_turn_from_what_is_left(greedy):
    logits = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(1))
    allowed = torch.tensor([[True, True, False, True]])
    first = logits[0, 0].masked_fill(~allowed[0], -torch.inf).softmax(dim=0)
    if greedy:
        first = torch.eye(4)[first.argmax()]
    for above in (0, 1, 3):
        rest = allowed[0].clone()
        rest[above] = False
        second = logits[0, 1].masked_fill(~rest, -torch.inf).softmax(dim=0)
        if greedy:
            second = torch.eye(4)[second.argmax()]
        for item in range(4):
            slate = torch.tensor([[above, item]])
            found = probs_of_slots(logits, allowed, slate, greedy=greedy)[0]
            assert torch.allclose(found, torch.stack([first[above], second[item]]), atol=1e-6)
    slate = torch.tensor([[EMPTY, 1]])
    found = probs_of_slots(logits, allowed, slate, greedy=greedy)[0]
    assert found[0] == 0
    drawn = draw_slots(logits.expand(4000, 2, 4), allowed.expand(4000, 4),
                       torch.Generator().manual_seed(2), greedy=greedy)  # fmt: skip
    often = torch.bincount(drawn.slate[:, 0], minlength=4) / 4000
    assert torch.allclose(often, first, atol=0.04)
    assert (drawn.slate[:, 0] != drawn.slate[:, 1]).all()


def test_too_few_items_for_a_slate_are_refused():
    spec = synthetic_spec(num_items=6, slate_size=3)
    agent = SB3(spec, algo="ppo", **SMALL)
    obs = synthetic_observation(spec, 2, torch.Generator().manual_seed(0))
    mask = torch.tensor([[EMPTY, EMPTY, EMPTY, EMPTY], [0, 1, 2, 3]])
    with pytest.raises(ValueError, match="a slate of 3 needs 3 allowed items, row 1 has 2"):
        agent.act(obs, mask)


def test_the_dot_head_is_small_and_grows_with_the_catalogue_hardly():
    sizes = {}
    for items in (500, 1000):
        spec = synthetic_spec(num_items=items)
        spec = replace(spec, slate_size=1, profile_size=256, item_vectors=torch.eye(items, 64))
        for head in ("dot", "dense"):
            net = SB3(spec, head=head, width=256, algo="dqn").model.policy.q_net
            sizes[head, items] = sum(p.numel() for p in net.parameters())
    assert sizes["dot", 1000] == sizes["dot", 500]
    assert sizes["dense", 1000] > 2 * sizes["dot", 1000]


def test_slots_share_the_items_and_differ_in_the_user():
    env = sessions(slate_size=3, max_steps=4)
    agent = agent_of("ppo", env)
    head = agent.model.policy.action_net
    assert head.user.out_features == 3 * head.item.out_features
    learnt = {id(p) for group in agent.model.policy.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in agent.model.policy.parameters()} == learnt
    logits = agent.logits(env.reset()[0])
    assert not torch.allclose(logits[:, 0], logits[:, 1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"algo": "sac"}, "algo must be one of dqn, qrdqn, ppo, a2c, maskable_ppo, got 'sac'"),
        ({"head": "two_tower"}, "head must be dot or dense"),
        ({"algo": "ppo", "replay_ratio": 4.0}, "replay_ratio is no setting of ppo.* dqn, qrdqn"),
        ({"algo": "a2c", "epochs": 2}, "epochs is no setting of a2c"),
        ({"n_steps": 3}, "n_steps is no setting of dqn, it is one of ppo, a2c, maskable_ppo"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\]"),
        ({"batch_size": 1}, "batch_size must be a whole number of at least 2"),
        ({"capacity": 0}, "capacity must be a whole number of at least 1"),
        ({"algo": "ppo", "entropy": -0.1}, "entropy must be at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SB3(synthetic_spec(slate_size=1), **settings)


@pytest.mark.parametrize("algo", VALUES)
def test_slates_of_what_shows_one_item_are_refused(algo):
    with pytest.raises(ValueError, match=r"one of ppo, a2c, maskable_ppo, or agents\.dqn\.DQN"):
        SB3(synthetic_spec(slate_size=2), algo=algo)
    assert POLICIES == ("ppo", "a2c", "maskable_ppo")


def test_an_environment_of_another_spec_is_refused():
    agent = agent_of("ppo")
    with pytest.raises(ValueError, match="has slate_size=2, the agent was built for 1"):
        agent.learn(sessions(slate_size=2), 64, always)
    with pytest.raises(ValueError, match="steps must be a whole number"):
        agent.learn(sessions(), 0, always)
    with pytest.raises(ValueError, match="a rollout needs two steps"):
        agent_of("a2c", n_steps=1).learn(sessions(num_envs=1), 4, always)


@pytest.mark.parametrize(
    ("other", "words"),
    [({"algo": "a2c"}, "the checkpoint is of SB3"), ({"head": "dense"}, "the checkpoint is of SB3"),
     ({"width": 8}, "build the agent with the settings")],
)  # fmt: skip
def test_a_checkpoint_of_another_agent_is_refused(other, words):
    state = agent_of("ppo").state_dict()
    algo = other.pop("algo", "ppo")
    with pytest.raises(ValueError, match=words):
        agent_of(algo, **other).load_state_dict(state)


def test_a_replay_of_another_capacity_is_refused():
    agent = agent_of("dqn")
    agent.learn(sessions(), 256, always)
    other = agent_of("dqn", capacity=80)
    other.load_state_dict(agent.state_dict())
    with pytest.raises(ValueError, match="replay has 25 steps, this one holds 10"):
        other.load_experience(agent.experience())


def test_many_users_get_as_many_updates_as_the_replay_ratio_says():
    for ratio, users, updates in ((2.0, 16, 2), (1.0, 16, 1), (0.25, 16, 0.25), (1.0, 4, 0.25)):
        agent = agent_of("dqn", replay_ratio=ratio)
        agent.learn(sessions(num_envs=users), users * 20, always)
        expected = updates * 20
        assert abs(agent.model._n_updates - expected) <= max(2, updates * 2)
        assert agent.model.target_update_interval >= users


def test_the_library_is_imported_when_an_agent_is_built():
    code = "import sys, agents.sb3; print([m for m in sys.modules if m in ('agents.sb3', NAME)])"
    code = code.replace("NAME", "'stable_baselines3', 'sb3_contrib'")
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "['agents.sb3']", done.stderr


def test_every_knob_is_used_by_some_algorithm():
    from agents.sb3 import EVERY, USED

    knobs = set(inspect.signature(SB3.__init__).parameters) - {"self", "spec"}
    assert knobs == set(EVERY).union(*USED.values())
    assert WORLD.catalog.vectors.shape == (12, 4)
