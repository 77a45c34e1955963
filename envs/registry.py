"""What the Gymnasium ids stand for; `gymnasium.make` imports this when an id is first used."""

from typing import Literal

from envs.recommend import RecommendVectorEnv
from envs.single import RecommendEnv
from simulators.base import SimSpec, UserSimulator


def simulator_of(name: str) -> UserSimulator:
    """The users behind an id: "tiny" needs no data, "ecommerce" is fitted to the retail log."""
    if name == "tiny":
        from simulators.worlds import TinyWorld

        return TinyWorld(SimSpec(logs=None, catalog=None))
    if name == "ecommerce":
        from simulators.fitted import FittedSimulator

        fitted: UserSimulator = FittedSimulator.default()
        return fitted
    raise ValueError(f"name must be 'tiny' or 'ecommerce', got {name!r}")


def make_single(
    name: str,
    *,
    slate_size: int = 1,
    max_steps: int = 20,
    observation: Literal["vector", "ids"] = "vector",
    output: Literal["numpy", "torch"] = "numpy",
    seed: int = 0,
) -> RecommendEnv:
    """One user at a time, for `gymnasium.make`."""
    return RecommendEnv(
        simulator_of(name),
        slate_size=slate_size,
        max_steps=max_steps,
        observation=observation,
        output=output,
        seed=seed,
    )


def make_vector(
    name: str,
    *,
    num_envs: int = 1,
    slate_size: int = 1,
    max_steps: int = 20,
    observation: Literal["vector", "ids"] = "vector",
    output: Literal["numpy", "torch"] = "numpy",
    seed: int = 0,
) -> RecommendVectorEnv:
    """Many users at once, for `gymnasium.make_vec`."""
    return RecommendVectorEnv(
        simulator_of(name),
        num_envs=num_envs,
        slate_size=slate_size,
        max_steps=max_steps,
        observation=observation,
        output=output,
        seed=seed,
    )
