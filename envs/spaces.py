"""The Gymnasium boundary: spaces with finite bounds, and tensors to NumPy copies within them."""

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from torch import Tensor

from encoders.state import CONTEXT, EMPTY, Observation, StateEncoder
from simulators.base import UserSimulator

BOUND = 1e6  # of profile, counts and days: spaces must be finite, and no shop has seen more


def observation_space(
    simulator: UserSimulator, encode: StateEncoder | None, length: int
) -> spaces.Space[Any]:
    """One user's space: the encoder's vector (U,), or the `Observation` with a history (L,)."""
    if encode is not None:
        return spaces.Box(_copy(encode.low), _copy(encode.high), dtype=np.float32)
    users, last = simulator.users, len(simulator.catalog) - 1
    held = tuple(users.past.shape[1:])  # (H,)
    return spaces.Dict(
        profile=spaces.Box(-BOUND, BOUND, tuple(users.profile.shape[1:])),
        past=spaces.Box(EMPTY, last, held, np.int64),
        past_count=spaces.Box(0.0, BOUND, held),
        past_age=spaces.Box(0.0, BOUND, held),
        history=spaces.Box(EMPTY, last, (length,), np.int64),
        feedback=spaces.Box(0.0, 1.0, (length, len(simulator.behaviours))),
        context=spaces.Box(-1.0, 1.0, (CONTEXT,)),
    )


def within(seen: Observation | Tensor, space: spaces.Space[Any]) -> Any:
    """What is seen of B users as NumPy, clipped to one user's space: a Box's array or a dict."""
    if isinstance(seen, Tensor):
        assert isinstance(space, spaces.Box)
        return np.clip(_copy(seen), space.low, space.high)
    assert isinstance(space, spaces.Dict)
    return {f.name: within(getattr(seen, f.name), space[f.name]) for f in fields(seen)}


def to_numpy(value: Any) -> Any:
    """Tensors in dicts and dataclasses to NumPy copies in dicts; all else as it is."""
    if isinstance(value, Tensor):
        return _copy(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_numpy(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {k: to_numpy(v) for k, v in value.items()}
    return value


def first_row(value: Any) -> Any:
    """Arrays or an `Observation` of one user, in dicts, without the leading B."""
    if isinstance(value, dict):
        return {k: first_row(v) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, (type, Observation)):
        return type(value)(**{f.name: first_row(getattr(value, f.name)) for f in fields(value)})
    return value[0]


def _copy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().copy()  # the caller may write into it
