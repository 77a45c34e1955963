"""TensorBoard curves of training, under Stable-Baselines3's names, over env steps."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from agents.base import Transition
from encoders.state import EMPTY

COUNTED = ("reward", "length", "sums", "shown")


class Curves:
    """Sums stay tensors on the device; numbers are read off at every `every`-th env step only."""

    def __init__(
        self,
        folder: Path,
        *,
        num_envs: int,
        num_items: int,
        every: int,
        device: str = "cpu",
        purge: int | None = None,
    ) -> None:
        """`purge`: the env step from which on points of an earlier, cut-off run do not count."""
        if purge is not None:
            wait_for_a_later_file(folder)
        self.writer = SummaryWriter(str(folder), purge_step=purge)
        self.every, self.step, self.written = every, 0, 0  # counted in env steps
        self.clock = time.perf_counter()
        self.reward = torch.zeros(num_envs, device=device)  # (B,) of the running episodes
        self.length = torch.zeros(num_envs, device=device)  # (B,)
        # episodes, their reward, their length, slots chosen, slots shown: since the last point
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)
        self.shown = torch.zeros(num_items + 1, dtype=torch.bool, device=device)
        self.learnt: dict[str, Tensor] = {}

    @property
    def due(self) -> bool:
        """Whether it is time for a point of the curves."""
        return self.step - self.written >= self.every

    def add(self, transition: Transition, learnt: dict[str, Tensor]) -> None:
        """Count one step of B users."""
        done = transition.terminated | transition.truncated  # (B,)
        slate, chosen = transition.decision.slate, transition.chosen  # (B, K) each
        self.reward += transition.reward
        self.length += 1
        slots = torch.tensor(slate.numel(), device=slate.device)
        counted = (
            done.sum(),
            self.reward[done].sum(),
            self.length[done].sum(),
            chosen.sum(),
            slots,
        )
        self.sums += torch.stack([x.double() for x in counted])
        self.reward, self.length = self.reward * ~done, self.length * ~done
        self.shown[torch.where(slate == EMPTY, len(self.shown) - 1, slate)] = True
        self.learnt = learnt or self.learnt
        self.step += len(done)

    def restart(self) -> None:
        """Forget the running episodes, which were cut off and will not end."""
        self.reward, self.length = torch.zeros_like(self.reward), torch.zeros_like(self.length)

    def write(self, regret: Tensor | None = None) -> float | None:
        """Write a point; the mean reward of the episodes that ended since the last one."""
        episodes, reward, length, chosen, slots = self.sums.tolist()
        points = {
            "rollout/coverage": self.shown[:-1].double().mean().item(),
            "rollout/ctr": chosen / slots,
            "time/fps": (self.step - self.written) / (time.perf_counter() - self.clock),
            **{name: value.item() for name, value in self.learnt.items()},
        }
        if regret is not None:
            points["rollout/regret_mean"] = regret.mean().item()
        if episodes:
            points["rollout/ep_rew_mean"] = reward / episodes
            points["rollout/ep_len_mean"] = length / episodes
        self.points(points)
        self.sums.zero_()
        self.shown.zero_()
        self.written, self.clock = self.step, time.perf_counter()
        return points.get("rollout/ep_rew_mean")

    def points(self, values: dict[str, float]) -> None:
        """Write values at the present step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, self.step)

    def state_dict(self) -> dict[str, Any]:
        """What has been counted since the last point."""
        counted = {name: getattr(self, name).clone() for name in COUNTED}
        return {**counted, "step": self.step, "written": self.written, "learnt": dict(self.learnt)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in COUNTED:
            setattr(self, name, state[name].to(self.sums.device))
        self.step, self.written, self.learnt = state["step"], state["written"], state["learnt"]

    def close(self) -> None:
        """Write what is still held."""
        self.writer.close()


def wait_for_a_later_file(folder: Path) -> None:
    """Event files are read in order of the second in their names: let it be a later one."""
    stamps = [int(p.name.split(".")[3]) for p in folder.glob("events.out.tfevents.*")]
    while stamps and int(time.time()) <= max(stamps):
        time.sleep(0.05)
