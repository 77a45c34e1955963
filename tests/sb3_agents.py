"""Small agents of SB3's algorithms, for tests that train them."""

from test_sb3_env import sessions, spec_of

from agents.sb3 import SB3

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
