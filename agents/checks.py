"""What learners refuse: settings out of range, what is not finite, a loss that has blown up."""

from typing import Any

import torch
from torch import Tensor

from agents.base import Transition


class NonFiniteLossError(ValueError):
    """A loss that is no number; `batch` holds what it was computed from."""

    def __init__(self, message: str, batch: dict[str, Any]) -> None:
        super().__init__(message)
        self.batch = batch


def a_number(name: str, value: object) -> None:
    """Refuse words where a number is meant."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {value!r}")


def positive(**numbers: float) -> None:
    """Refuse settings that are not above 0."""
    for name, number in numbers.items():
        a_number(name, number)
        if not number > 0:
            raise ValueError(f"{name} must be above 0, got {number}")


def not_negative(**numbers: float) -> None:
    """Refuse settings below 0."""
    for name, number in numbers.items():
        a_number(name, number)
        if not number >= 0:
            raise ValueError(f"{name} must be at least 0, got {number}")


def share(**numbers: float) -> None:
    """Refuse settings that are not in [0, 1]."""
    for name, number in numbers.items():
        a_number(name, number)
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {number}")


def whole(least: int, **numbers: int) -> None:
    """Refuse settings that are not whole numbers of at least `least`."""
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {number!r}")


def check_finite(transition: Transition) -> None:
    """Refuse a reward or an observation that is not finite before anything learns from it."""
    found = {"reward": transition.reward, "slot_reward": transition.slot_reward}
    for side in ("obs", "next_obs"):
        for name in ("profile", "past_count", "past_age", "feedback", "context"):
            found[f"{side}.{name}"] = getattr(getattr(transition, side), name)
    fine = torch.stack([value.isfinite().all() for value in found.values()])
    if fine.all():  # one wait for the device, however many fields
        return
    name = list(found)[int(fine.int().argmin())]
    bad = ~found[name].isfinite().flatten(1 if found[name].ndim > 1 else 0)  # (B, ...)
    row = int(bad.reshape(len(bad), -1).any(dim=1).nonzero()[0])
    raise ValueError(
        f"{name} must be finite, row {row} is not: look at the features and the reward"
    )


def check_loss(loss: Tensor, updates: int, batch: Any, *, every: int = 100) -> None:
    """Refuse to go on from a loss that is no number; call it before the gradient step.

    A look waits for the device, so off the CPU only every `every`-th update is looked at. `batch`
    is what the loss was computed from: a dataclass or a dict.
    """
    if (loss.device.type != "cpu" and updates % every) or loss.isfinite():
        return
    raise NonFiniteLossError(
        f"the loss is {float(loss.detach())} at update {updates}: lower agent.lr or scale the "
        "reward",
        tensors_of(batch),
    )


def tensors_of(value: Any) -> Any:
    """Dataclasses and dicts as nested dicts of tensors and numbers, as torch.save keeps them."""
    if isinstance(value, dict):
        return {str(name): tensors_of(part) for name, part in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {name: tensors_of(getattr(value, name)) for name in value.__dataclass_fields__}
    return value.detach().cpu() if isinstance(value, Tensor) else value
