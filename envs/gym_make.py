"""Make copies of a registered Gymnasium environment, and find what its items are."""

import importlib
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

IDENTITY = 512  # items up to which unknown ones get one-hot vectors
RANDOM_DIM = 64  # of the random vectors they get beyond
ENDLESS = 10_000  # steps of an episode that nothing else ends
TRIAL = 3  # steps of the trial whether an environment can be repeated


def check_at_least_one(sizes: dict[str, int]) -> None:
    """Refuse sizes that are no positive numbers."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_oracle(oracle: int | None, env_id: str, *, told: bool) -> None:
    """Refuse an oracle of which the observation does not tell what it showed."""
    if oracle is not None and not told:
        raise ValueError(
            f"oracle={oracle}: {env_id} does not say what its best action showed: name the part of "
            "its observation that does with shown=KEY, or set item_features"
        )


def make_envs(
    id: str, num_envs: int, module: str | None, kwargs: dict[str, Any], max_steps: int | None = None
) -> tuple[list[gym.Env[Any, Any]], int]:
    """B copies of a registered environment; `module` registers it when imported.

    Episodes are cut after `max_steps`, or where the environment says. One that says nothing may go
    on for ever: the number returned is where to cut it, else 0.
    """
    if max_steps is not None:
        check_at_least_one({"max_steps": max_steps})
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(
                f"env.module={module} cannot be imported: {error}: install its package, or put its "
                "folder on PYTHONPATH"
            ) from error
    try:
        limit = max_steps or gym.spec(id).max_episode_steps
        settings = {"disable_env_checker": True, "max_episode_steps": max_steps, **kwargs}
        return [gym.make(id, **settings) for _ in range(num_envs)], 0 if limit else ENDLESS
    except (gym.error.Error, ImportError, TypeError) as error:
        unknown = isinstance(error, gym.error.NameNotFound | gym.error.NamespaceNotFound)
        hint = ": if a package registers it, name it with env.module=PACKAGE"
        what = "env.kwargs do not fit" if isinstance(error, TypeError) else "cannot be made"
        said = str(error).rstrip(".")
        raise ValueError(f"{id} {what}: {said}{hint if unknown and not module else ''}") from error


def same_vectors(envs: Sequence[gym.Env[Any, Any]], name: str, num_items: int) -> np.ndarray:
    """The item vectors (N, D) of the first environment, which must be those of all."""
    first = item_vectors(envs[0], name, num_items)  # (N, D)
    for row, env in enumerate(envs[1:], start=1):
        if not np.array_equal(first, item_vectors(env, name, num_items)):
            raise ValueError(
                f"item_features={name!r} differs between copies of the environment (rows 0 and "
                f"{row}): items must be the same for all users, so draw them from a fixed seed"
            )
    return first


def mask_of(env: gym.Env[Any, Any]) -> Any:
    """The `action_masks` method of an environment or of a wrapper around it, or None."""
    return env.get_wrapper_attr("action_masks") if env.has_wrapper_attr("action_masks") else None


def item_vectors(env: gym.Env[Any, Any], name: str, num_items: int) -> np.ndarray:
    """The environment's own array (N, D) of what items are, float32, as it is.

    Not centred: the columns may be shares of topics, where zero means something.
    """
    value: Any = env.unwrapped
    for key in name.split("."):
        if not hasattr(value, key):
            raise ValueError(f"item_features={name!r}: {_hint(env, num_items)}")
        value = getattr(value, key)
    try:
        array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"item_features={name!r} is no array of numbers: {_hint(env, num_items)}"
        ) from error
    if array.ndim != 2 or len(array) != num_items or not array.shape[1]:
        raise ValueError(
            f"item_features={name!r} must be ({num_items}, D), a row for each item, got "
            f"{array.shape}: {_hint(env, num_items)}"
        )
    if not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0, 0])
        raise ValueError(f"item_features={name!r} must be finite, item {row} is not")
    return array.copy()


def _hint(env: gym.Env[Any, Any], num_items: int) -> str:
    """What the environment has instead."""
    root = type(env.unwrapped).__name__
    fitting = []
    for key, value in vars(env.unwrapped).items():
        inner = vars(value).items() if hasattr(value, "__dict__") else ()
        for path, x in ((key, value), *((f"{key}.{k}", v) for k, v in inner)):
            shape = tuple(getattr(x, "shape", None) or ())
            if len(shape) == 2 and shape[0] == num_items:
                fitting.append(path)
    if not fitting:
        return f"{root} has no array of {num_items} rows, leave item_features=null"
    return f"did you mean {' or '.join(fitting)}? ({root} has these with {num_items} rows)"


def unknown_items(num_items: int) -> np.ndarray:
    """Vectors (N, D) of items of which nothing is known: one-hot, or random directions if many.

    The directions are the same in every run: checkpoints fit where the number of items does.
    """
    if num_items <= IDENTITY:
        return np.eye(num_items, dtype=np.float32)
    drawn = np.random.default_rng(0).standard_normal((num_items, RANDOM_DIM))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def repeats(env: gym.Env[Any, Any], action: Any) -> bool:
    """Whether two episodes from one seed begin with the same few steps."""
    told = []
    for _ in range(2):
        steps = [repr(env.reset(seed=0)[0])]
        for _ in range(TRIAL):
            answer = env.step(action)
            steps.append(repr(answer[:2]))
            if any(answer[2:4]):
                break
        told.append(steps)
    return told[0] == told[1]
