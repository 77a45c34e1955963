"""What an environment refuses at its door, and what it says."""

from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from encoders.state import EMPTY


def check_sizes(
    num_items: int, num_envs: int, slate_size: int, max_steps: int, forbidden: int = 0
) -> None:
    """Refuse a session whose slates the catalogue cannot fill."""
    sizes = {"num_envs": num_envs, "slate_size": slate_size, "max_steps": max_steps}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if slate_size > num_items:
        raise ValueError(
            f"slate_size={slate_size} needs as many items, the catalogue has {num_items}: "
            f"show fewer or widen the catalogue"
        )
    if slate_size * max_steps > num_items:
        raise ValueError(
            f"max_steps={max_steps} slates of {slate_size} show {slate_size * max_steps} different "
            f"items, the catalogue has {num_items}, so the mask would forbid all: lower max_steps "
            f"to {num_items // slate_size}, or slate_size, or widen the catalogue"
        )
    if slate_size * max_steps > num_items - forbidden:
        raise ValueError(
            f"excluded leaves a user {num_items - forbidden} of {num_items} items, a session of "
            f"max_steps={max_steps} slates of slate_size={slate_size} needs "
            f"{slate_size * max_steps}: exclude fewer, or lower max_steps or slate_size"
        )


def check_pessimism(pessimism: float) -> None:
    """Refuse what is no multiple of an uncertainty."""
    number = isinstance(pessimism, int | float) and not isinstance(pessimism, bool)
    if not number or not 0.0 <= pessimism < float("inf"):
        raise ValueError(
            f"env.pessimism must be a finite number of at least 0 (0: off), got {pessimism!r}"
        )


def check_word(name: str, value: str, words: tuple[str, ...]) -> None:
    """Refuse a word that is not on the list."""
    if value not in words:
        raise ValueError(f"{name} must be one of {words}, got {value!r}")


def as_slate(actions: Any, num_envs: int, slate_size: int) -> Tensor:
    """Actions, NumPy or torch, as integers (B, K)."""
    slate = actions if torch.is_tensor(actions) else torch.tensor(np.asarray(actions))
    if slate.dtype == torch.bool or slate.is_floating_point():
        raise ValueError(f"a slate must be integer item ids, got {slate.dtype}")
    if slate_size == 1 and slate.ndim == 1:
        slate = slate[:, None]  # Discrete actions arrive as (B,)
    if slate.shape != (num_envs, slate_size):
        raise ValueError(
            f"slate must be ({num_envs}, {slate_size}), a row for each user and a column for each "
            f"slot, got {tuple(slate.shape)}"
        )
    return slate


def as_options(options: dict[str, Any], num_envs: int, num_users: int) -> dict[str, Tensor]:
    """Whom to serve: "user" and "episode" as integers (B,)."""
    unknown = sorted(set(options) - {"user", "episode"})
    if unknown:
        why = ": rows restart by themselves (SAME_STEP)" if "reset_mask" in unknown else ""
        raise ValueError(f"reset options may be 'user' and 'episode', got {unknown}{why}")
    wanted = {}
    for name, given in options.items():
        value = given if torch.is_tensor(given) else torch.tensor(np.asarray(given))
        if value.shape != (num_envs,) or value.is_floating_point() or value.dtype == torch.bool:
            raise ValueError(
                f"reset option {name!r} must be {num_envs} integers, one for each row, got "
                f"{tuple(value.shape)} of {value.dtype}"
            )
        wanted[name] = value.long()
    user = wanted.get("user", torch.zeros(1, dtype=torch.int64))
    outside = user[(user < 0) | (user >= num_users)]
    if len(outside):
        raise ValueError(f"users are numbered 0 to {num_users - 1}, got {int(outside[0])}")
    return wanted


def refuse_slate(slate: Tensor, num_items: int) -> NoReturn:
    """Name the first id of a slate (B, K) that the catalogue does not have."""
    row, slot = ((slate < EMPTY) | (slate >= num_items)).nonzero()[0].tolist()
    raise ValueError(
        f"items are numbered 0 to {num_items - 1} ({EMPTY} is an empty slot), got "
        f"{int(slate[row, slot])} in row {row}, slot {slot}"
    )


def refuse_reward(name: str, slot_reward: Tensor) -> NoReturn:
    """Name the first reward of (B, K) that is not a number."""
    row, slot = (~slot_reward.isfinite()).nonzero()[0].tolist()
    raise ValueError(
        f"reward {name} gave {float(slot_reward[row, slot])} in row {row}, slot {slot}, not a "
        f"finite number: an item without a price, or a simulator whose values are not numbers"
    )
