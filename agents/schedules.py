"""Schedules: functions of the env steps seen, so that a resumed run never starts them anew."""

import math

import torch

SCHEDULES = ("constant", "linear", "cosine")


def linear(steps: int, start: float, end: float, over: int) -> float:
    """From start to end over the first `over` env steps."""
    return start + (end - start) * min(1.0, steps / over)


def lr_at(lr: float, schedule: str, steps: int, total: int | None) -> float:
    """Learning rate after `steps` of `total` env steps: constant, or down to zero at the end."""
    check_schedule(schedule, total)
    if schedule == "constant" or total is None:
        return lr
    done = min(1.0, steps / total)
    return lr * ((1.0 - done) if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done)))


def check_schedule(schedule: str, total: int | None) -> None:
    """Refuse a schedule that is not known, or that would need to know how long training is."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if schedule != "constant" and (total is None or total < 1):
        raise ValueError(
            f"schedule={schedule} needs the env steps of the whole training, got {total}: build "
            "the agent with AgentSpec(total_steps=...), or use schedule=constant"
        )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all parameters this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
