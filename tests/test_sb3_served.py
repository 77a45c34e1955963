"""What SB3's agents load and serve: its files, slates slot by slot, and what is refused."""

import inspect
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sb3_agents import SMALL, agent_of, always
from test_sb3_env import WORLD, sessions

from agents.sb3 import ALGORITHMS, POLICIES, SB3, VALUES, draw_slots, probs_of_slots
from agents.testing import check_agent, synthetic_observation, synthetic_spec
from encoders.state import EMPTY
from simulators.base import SimSpec
from simulators.worlds import TinyWorld


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
