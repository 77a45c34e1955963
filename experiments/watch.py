"""What happens beside learning: curves, evaluations, checkpoints, stopping early or when asked."""

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from agents.base import Agent, Transition
from evaluation.decisions import DecisionWriter
from experiments.arena import Arena
from experiments.checkpoints import Checkpoint, folders, save_checkpoint
from experiments.curves import Curves


class Watch:
    """Counts env steps and does what is due after each; `go_on` says whether to train further."""

    def __init__(
        self, cfg: DictConfig, arena: Arena, agent: Agent, folder: Path, steps: int, num_envs: int
    ) -> None:
        self.cfg, self.arena, self.agent = cfg, arena, agent
        self.folder, self.steps, self.num_envs = folder, steps, num_envs
        self.curves: Curves | None = None
        self.log: DecisionWriter | None = None
        self.best, self.best_step, self.worse = float("-inf"), 0, 0  # of eval/mean_reward
        self.asked, self.stopped = False, False  # by Ctrl-C; and the checkpoint is written
        self.written = -1  # env steps of the newest checkpoint
        self.learnt = False  # whether there has been an update

    def open(self, saved: Checkpoint | None) -> None:
        """Open curves and log, where a saved run left them."""
        cfg, spec = self.cfg, self.arena.spec
        self.curves = Curves(
            self.folder / "tensorboard", num_envs=self.num_envs, num_items=spec.num_items,
            every=cfg.log_every, device=spec.device, purge=saved.step + 1 if saved else None,
        )  # fmt: skip
        before = saved.part("watch", spec.device) if saved else None
        self.learnt = saved is not None  # a run that goes on said what there was to say
        if before:
            self.curves.load_state_dict(before["curves"])
            self.best, self.best_step, self.worse = before["best"]
        if cfg.log_training and self.arena.log is not None and not hasattr(self.agent, "learn"):
            resume = tuple(before["log"]) if before else None
            self.log = self.arena.log(
                self.folder / "training", cfg.agent_name, adaptive=True, resume=resume
            )
        self.bar = tqdm(
            total=self.steps, initial=min(self.step, self.steps), desc="train", unit="step",
            disable=not cfg.progress,
        )  # fmt: skip

    @property
    def step(self) -> int:
        """Env steps so far."""
        return self.curves.step if self.curves else 0

    @property
    def go_on(self) -> bool:
        """Whether there is more to train; asked to stop, one more step ends in a checkpoint."""
        early = self.cfg.early_stopping
        return self.step < self.steps and not self.stopped and not (early and self.worse >= early)

    @property
    def checkpoint_next(self) -> bool:
        """Whether a checkpoint is due after the step that is about to be made."""
        then = self.step + self.num_envs
        every = self.cfg.checkpoint_every
        return crossed(then, self.num_envs, every) or then >= self.steps or self.asked

    def after(self, transition: Transition, learnt: dict[str, Tensor], regret: Any = None) -> None:
        """Count a step of B users; write points and evaluate where it is time."""
        assert self.curves is not None
        self.curves.add(transition, learnt)
        self.learnt |= bool(learnt)
        self.bar.update(min(self.num_envs, self.steps - self.bar.n))
        over = self.step >= self.steps and not self.curves.written  # a short run has one point
        if self.curves.due or over:
            recent = self.curves.write(regret() if regret else None)
            self.bar.set_postfix(reward=recent)
        if crossed(self.step, self.num_envs, self.cfg.eval_every):
            points = self.arena.evaluate(self.agent)
            self.curves.points(points)
            self.judge_best(points["eval/mean_reward"])

    def restart(self) -> None:
        """All running episodes were cut off: they are no episodes of the curves."""
        assert self.curves is not None
        self.curves.restart()

    def judge_best(self, value: float) -> None:
        """Keep the best agent so far, where training may stop early."""
        self.worse += 1
        if value <= self.best:
            return
        self.best, self.best_step, self.worse = value, self.step, 0
        if self.cfg.early_stopping:
            parts = {"agent": self.agent.state_dict()}
            save_checkpoint(
                self.folder / "best", parts, self.cfg, step=self.step, about=self.about(), keep=2
            )

    def keep_best(self) -> Path:
        """Keep the best agent alone: a run that was killed may have left one that it lost again."""
        best = self.folder / "best" / f"step-{self.best_step:012d}"
        for other in folders(best.parent):
            if best.is_dir() and other != best:
                shutil.rmtree(other)
        return best

    def save(self, env: Any = None) -> None:
        """Write a checkpoint; with an env it holds all that training needs to go on."""
        assert self.curves is not None
        self.written, self.stopped = self.step, self.asked
        if self.log is not None:
            self.log.flush()
        parts: dict[str, Any] = {"agent": self.agent.state_dict()}
        parts["watch"] = {
            "curves": self.curves.state_dict(),
            "best": [self.best, self.best_step, self.worse],
            "log": [self.log.part, self.log.decisions] if self.log else [0, 0],
        }
        if hasattr(self.agent, "experience"):
            parts["experience"] = self.agent.experience()
        if env is not None:
            parts["env"] = env.state_dict()
        save_checkpoint(
            self.folder / "checkpoint", parts, self.cfg, step=self.step, about=self.about(),
            keep=self.cfg.checkpoint_keep,
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        """What a checkpoint is of."""
        return {"catalog": self.arena.catalog, "agent_kind": type(self.agent).__name__}

    def close(self) -> None:
        """Write what is still held."""
        self.bar.close()
        if self.log is not None:
            self.log.close()
        if self.curves is not None:
            self.curves.close()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C end training after the step that is being made, not within it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def crossed(step: int, batch: int, every: int) -> bool:
    """Whether the last `batch` env steps passed a multiple of `every`; never where it is 0."""
    return every > 0 and step // every > (step - batch) // every
