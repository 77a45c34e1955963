"""The state of a running `RecommendVectorEnv` as plain tensors: sessions go on where they were."""

from dataclasses import fields
from typing import Any

from torch import Tensor

from encoders.state import Observation
from simulators.draws import Draws

ROWS = ("turn", "user", "episode", "steps", "trip_steps", "time")  # one value a user, (B,) each


def env_state(env: Any) -> dict[str, Any]:
    """Sessions of B users: whom each row serves, what was shown, the simulator's own state."""
    view: Observation = env._now()
    return {
        "seed": env.seed,
        "num_envs": env.num_envs,
        "rows": {name: getattr(env, name).clone() for name in ROWS},
        "users": {name: value.clone() for name, value in env.state.items()},
        "view": {f.name: getattr(view, f.name).clone() for f in fields(view)},
    }


def restore_env(env: Any, state: dict[str, Any]) -> None:
    """Put sessions back; draws follow from (seed, user, episode, step), so nothing else is kept."""
    if state["num_envs"] != env.num_envs:
        raise ValueError(
            f"the saved sessions are of {state['num_envs']} users side by side, this environment "
            f"has {env.num_envs}: use the same num_envs"
        )
    if set(state["users"]) == set() or "view" not in state:
        raise ValueError("the saved sessions hold no users: they are of another environment")

    def here(value: Tensor) -> Tensor:
        return value.to(env.device)

    env.seed = state["seed"]
    env.draws = Draws.root(env.seed, env.device)
    for name, value in state["rows"].items():
        setattr(env, name, here(value))
    env.state = {name: here(value) for name, value in state["users"].items()}
    env.mine = {}
    env.view = Observation(**{name: here(value) for name, value in state["view"].items()})
    env.forbid()
    env.fresh_board()
    env.shown.note(env.view.history)  # of this trip
    env.seen = env._encoded(env.view)
