"""Stable-Baselines3's own algorithms as agents: SB3 trains them, we mask, sample and judge them.

`learn` runs `model.learn` of SB3 as it is, over batched sessions. Serving reads the policy's logits
or values and renormalises them over what may be shown, so that propensities are exact. The library
is imported when an agent is built.
"""

import copy
import inspect
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.checks import positive, share, whole
from agents.explore import (
    break_ties,
    epsilon_greedy_probs,
    epsilon_greedy_slate,
    epsilon_greedy_slate_probs,
    sample_slate,
)
from agents.nets import Reader
from agents.saving import (
    catalog_signature,
    check_catalog,
    generator_state,
    load_net,
    load_optimizer,
    restore_generator,
)
from encoders.state import EMPTY, Observation

if TYPE_CHECKING:
    from agents.sb3_env import Sessions, Watch

VALUES, POLICIES = ("dqn", "qrdqn"), ("ppo", "a2c", "maskable_ppo")
ALGORITHMS = (*VALUES, *POLICIES)
EVERY = ("algo", "head", "width", "lr", "gamma")  # settings of all algorithms; others are of some:
ROLLOUTS = ("n_steps", "gae_lambda", "entropy")
REPLAYS = ("batch_size", "replay_ratio", "capacity", "learning_starts", "target_every",
           "exploration_fraction", "epsilon_end")  # fmt: skip
USED = {
    "dqn": REPLAYS, "qrdqn": (*REPLAYS, "quantiles"), "a2c": ROLLOUTS,
    "ppo": (*ROLLOUTS, "batch_size", "epochs"), "maskable_ppo": (*ROLLOUTS, "batch_size", "epochs"),
}  # fmt: skip
BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


def check_settings(settings: dict[str, Any], slate_size: int) -> None:
    """Refuse what SB3 would only stumble over later, or would not look at."""
    algo, head = settings["algo"], settings["head"]
    if algo not in ALGORITHMS:
        raise ValueError(f"algo must be one of {', '.join(ALGORITHMS)}, got {algo!r}")
    if head not in ("dot", "dense"):
        raise ValueError(f"head must be dot or dense, got {head!r}")
    if algo in VALUES and slate_size > 1:
        raise ValueError(
            f"SB3's {algo} shows one item, got slate_size={slate_size}: for slates use "
            f"SB3(algo=...) with one of {', '.join(POLICIES)}, or agents.dqn.DQN"
        )
    defaults = inspect.signature(SB3.__init__).parameters
    for name, value in settings.items():
        if name not in (*EVERY, *USED[algo]) and value != defaults[name].default:
            users = ", ".join(a for a in ALGORITHMS if name in USED[a])
            raise ValueError(f"{name} is no setting of {algo}, it is one of {users}")
    shares = ("gamma", "gae_lambda", "exploration_fraction", "epsilon_end")
    counts = ("width", "capacity", "target_every", "quantiles", "n_steps", "epochs")
    positive(**{name: settings[name] for name in ("lr", "replay_ratio")})
    share(**{name: settings[name] for name in shares})
    whole(1, **{name: settings[name] for name in counts})
    whole(2, batch_size=settings["batch_size"])
    whole(0, learning_starts=settings["learning_starts"])
    if settings["entropy"] < 0:
        raise ValueError(f"entropy must be at least 0, got {settings['entropy']}")


def slot_probs(logits: Tensor, free: Tensor, *, greedy: bool) -> Tensor:
    """Logits and what may be shown, (B, N) each, to probabilities (B, N) float64; rows sum to 1."""
    if greedy:
        best = break_ties(logits).masked_fill(~free, -torch.inf).argmax(dim=1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float64).scatter_(1, best, 1.0)
    return logits.double().masked_fill(~free, -torch.inf).softmax(dim=1)


def draw_slots(
    logits: Tensor, allowed: Tensor, generator: torch.Generator, *, greedy: bool
) -> Decision:
    """Draw slot after slot from its logits (B, K, N), items above removed and renormalised."""
    refuse_short(allowed, logits.shape[1])
    free, drawn = allowed.clone(), []
    for slot in range(logits.shape[1]):
        probs = slot_probs(logits[:, slot], free, greedy=greedy)  # (B, N)
        item = probs.argmax(dim=1, keepdim=True)
        if not greedy:
            item = sample_slate(probs, 1, generator).slate  # (B, 1)
        drawn.append((item, probs.gather(1, item)))
        free = free.scatter(1, item, False)
    items, chances = zip(*drawn, strict=True)
    return Decision(torch.cat(items, dim=1), torch.cat(chances, dim=1).float())


def probs_of_slots(logits: Tensor, allowed: Tensor, slate: Tensor, *, greedy: bool) -> Tensor:
    """Probability (B, K) of each item given those above; 0 for EMPTY, repeats and forbidden."""
    free, found = allowed.clone(), []
    for slot in range(slate.shape[1]):
        real, item = slate[:, slot, None] != EMPTY, slate[:, slot, None].clamp(min=0)  # (B, 1) each
        probs = slot_probs(logits[:, slot], free, greedy=greedy)  # (B, N)
        # a softmax over nothing is no number: where all are gone nothing can be shown
        found.append(torch.where(real & free.gather(1, item), probs.gather(1, item), 0.0))
        free = free.scatter(1, item, free.gather(1, item) & ~real)
    return torch.cat(found, dim=1).float()


def refuse_short(allowed: Tensor, k: int) -> None:
    """Refuse rows (B, N) that allow fewer than K items."""
    left = allowed.sum(dim=1)  # (B,)
    if (left < k).any():
        row = int(left.argmin())
        raise ValueError(
            f"a slate of {k} needs {k} allowed items, row {row} has {int(left[row])}: "
            "shrink the slate, end the episode earlier or mask fewer items"
        )


def global_generators() -> dict[str, Any]:
    """The states of all generators that SB3 seeds and draws from, as plain values."""
    numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))  # noqa: NPY002
    inner = numpy["state"]
    key = torch.from_numpy(inner["key"].astype(np.int64))
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(), "cuda": gpu, "python": random.getstate(),
        "numpy": {**numpy, "state": {"key": key, "pos": int(inner["pos"])}},
    }  # fmt: skip


def set_global_generators(states: dict[str, Any]) -> None:
    """Put the states back."""
    numpy = states["numpy"]
    inner = {**numpy["state"], "key": numpy["state"]["key"].cpu().numpy().astype(np.uint32)}
    np.random.set_state({**numpy, "state": inner})  # noqa: NPY002
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_initialized() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


@contextmanager
def global_generators_kept() -> Iterator[None]:
    """Give SB3 the global generators, which it seeds and uses, and put them back as they were."""
    before = global_generators()
    try:
        yield
    finally:
        set_global_generators(before)


class SB3:
    """An SB3 model behind our `Agent`: `learn(env, steps, watch)` trains it, `update` does not.

    SB3 draws from global generators. While it builds or learns they hold the agent's own states;
    afterwards they are what they were before. The agent's states are saved with it, so a run
    of dqn or qrdqn that is saved at a step of `watch` that ends a rollout, with `experience()`, and
    goes on in the same env state is bit for bit the run that was never stopped. Policy-gradient
    runs are that only at the end of `n_steps` steps: SB3 throws an unfinished rollout away.
    """

    def __init__(
        self,
        spec: AgentSpec,
        *,
        algo: str = "dqn",
        head: str = "dot",
        width: int = 128,
        lr: float = 1e-3,
        gamma: float = 0.8,
        batch_size: int = 256,
        replay_ratio: float = 2.0,
        capacity: int = 50_000,
        learning_starts: int = 1000,
        target_every: int = 1024,
        exploration_fraction: float = 0.1,
        epsilon_end: float = 0.05,
        quantiles: int = 25,
        n_steps: int = 16,
        epochs: int = 4,
        gae_lambda: float = 0.95,
        entropy: float = 0.01,
    ) -> None:
        self.spec, self.algo, self.head = spec, algo, head
        settings: dict[str, Any]
        settings = {"algo": algo, "head": head, "width": width, "lr": lr, "gamma": gamma,
                    "batch_size": batch_size, "replay_ratio": replay_ratio, "capacity": capacity,
                    "learning_starts": learning_starts, "target_every": target_every,
                    "exploration_fraction": exploration_fraction, "epsilon_end": epsilon_end,
                    "quantiles": quantiles, "n_steps": n_steps, "epochs": epochs,
                    "gae_lambda": gae_lambda, "entropy": entropy}  # fmt: skip
        check_settings(settings, spec.slate_size)
        self.settings = settings
        self.read = Reader(spec, memory=False)
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)
        self.signature = catalog_signature(spec.item_vectors)
        self.learning = False
        from agents.sb3_model import build

        with global_generators_kept():
            self.model = build(spec, settings, self.read, num_envs=1, capacity=1)
            self.streams = global_generators()
        self.users = 0  # learn() knows how many: the model so far has no room for any

    def _for_users(self, num_envs: int) -> None:
        """Have a model for this many users: SB3 fixes their number when it builds its buffers."""
        from agents.sb3_model import adopt, build

        if self.users == num_envs:
            return
        with global_generators_kept():
            old, capacity = self.model, int(self.settings["capacity"])
            self.model = build(self.spec, self.settings, self.read, num_envs, capacity)
        adopt(self.model, old)
        self.users = num_envs

    @torch.no_grad()
    def logits(self, obs: Observation) -> Tensor:
        """Logits (B, K, N) of each slot, or values (B, 1, N)."""
        from agents.sb3_model import logits

        out = logits(self.algo, self.model.policy, self.read.state(obs))
        return out.view(len(obs), self.spec.slate_size, self.spec.num_items)

    def scores(self, obs: Observation) -> Tensor:
        """Values, or logits of the first slot, (B, N)."""
        return self.logits(obs)[:, 0]

    @property
    def epsilon(self) -> float:
        """The chance that a user is shown any item, as SB3 has it now; 0 for policies."""
        return float(self.model.exploration_rate) if self.algo in VALUES else 0.0

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        allowed, logits = self._allowed(obs, mask), self.logits(obs)
        if self.algo in VALUES:
            epsilon = self.epsilon if explore else 0.0
            return epsilon_greedy_slate(logits[:, 0], allowed, 1, epsilon, self.generator)
        return draw_slots(logits, allowed, self.generator, greedy=not explore)

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        allowed, logits = self._allowed(obs, mask), self.logits(obs)
        if self.algo in VALUES:
            epsilon = self.epsilon if explore else 0.0
            return epsilon_greedy_slate_probs(logits[:, 0], allowed, slate, epsilon)
        return probs_of_slots(logits, allowed, slate, greedy=not explore)

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        allowed, scores = self._allowed(obs, mask), self.scores(obs)
        if self.algo in VALUES:
            return epsilon_greedy_probs(scores, allowed, self.epsilon if explore else 0.0)
        return slot_probs(scores, allowed, greedy=not explore).float()

    def update(self, transition: Transition) -> dict[str, Tensor]:
        """Nothing is learnt here: SB3 learns in `learn`, from what its own loop lives through."""
        return {}

    def learn(
        self,
        env: "Sessions",
        steps: int,
        watch: "Watch",
        *,
        start: tuple[Observation, dict[str, Any]] | None = None,
    ) -> None:
        """Let SB3 play and learn for `steps` env steps, or until `watch` returns False.

        `watch(transition, learnt)` is called after each step with what SB3 logged last.
        `start` is what a restored env returned; without it the env is reset.
        """
        from agents.sb3_env import SessionsVecEnv
        from agents.sb3_model import run

        whole(1, steps=steps)
        for name in ("num_items", "slate_size"):
            if getattr(env, name) != getattr(self.spec, name):
                raise ValueError(
                    f"the environment has {name}={getattr(env, name)}, the agent was built for "
                    f"{getattr(self.spec, name)}: build it with the spec of this environment"
                )
        self._for_users(env.num_envs)
        with global_generators_kept():
            set_global_generators(self.streams)
            self.learning = True
            try:
                run(self.model, SessionsVecEnv(env, self.read, start=start), steps, watch)
            finally:
                self.streams, self.learning = global_generators(), False

    def __deepcopy__(self, memo: dict[int, Any]) -> "SB3":
        """An agent of its own, without the replay, which is large and serves nobody."""
        from agents.sb3_model import serving_copy

        other = copy.copy(self)
        other.model, other.users, other.learning = serving_copy(self.model), 0, False
        other.streams = global_generators() if self.learning else copy.deepcopy(self.streams)
        other.read = copy.deepcopy(self.read)
        other.generator = torch.Generator(self.generator.device)
        other.generator.set_state(self.generator.get_state())
        return other

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, numbers and strings."""
        from agents.sb3_model import counters

        model = self.model
        return {
            "algo": self.algo,
            "head": self.head,
            "policy": model.policy.state_dict(),
            "optimizer": model.policy.optimizer.state_dict(),
            "read": self.read.state_dict(),
            "generator": generator_state(self.generator),
            "streams": global_generators() if self.learning else self.streams,
            "actions": json.dumps(model.action_space.np_random.bit_generator.state),
            "signature": self.signature,
            "counters": counters(model),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from agents.sb3_model import set_counters

        check_catalog(self.signature, state["signature"])
        mine = (self.algo, self.head)
        if (state["algo"], state["head"]) != mine:
            raise ValueError(
                f"the checkpoint is of SB3(algo={state['algo']!r}, head={state['head']!r}), this "
                f"agent is SB3(algo={mine[0]!r}, head={mine[1]!r}): build it with those"
            )
        load_net(self.model.policy, state["policy"])
        load_optimizer(self.model.policy.optimizer, state["optimizer"])
        load_net(self.read, state["read"])
        restore_generator(self.generator, state["generator"])
        self.streams = state["streams"]
        self.model.action_space.np_random.bit_generator.state = json.loads(state["actions"])
        set_counters(self.model, state["counters"])
        if self.users and self.algo in VALUES:
            self.model.replay_buffer.reset()  # what another net lived through is no part of this

    def experience(self) -> dict[str, Any]:
        """SB3's replay, as far as it is filled; {} without one."""
        if not self.users or self.algo not in VALUES:
            return {}
        buffer = self.model.replay_buffer
        filled = {k: torch.from_numpy(getattr(buffer, k)[: buffer.size()].copy()) for k in BUFFER}
        return {"buffer": filled, "pos": buffer.pos, "full": buffer.full, "users": buffer.n_envs}

    def load_experience(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self._for_users(state["users"])
        buffer = self.model.replay_buffer
        for name, values in state["buffer"].items():
            if len(values) > buffer.buffer_size or (state["full"] and
                                                    len(values) != buffer.buffer_size):  # fmt: skip
                raise ValueError(
                    f"the checkpoint's replay has {len(values)} steps, this one holds "
                    f"{buffer.buffer_size}: build the agent with the capacity it was trained with"
                )
            getattr(buffer, name)[: len(values)] = values.cpu().numpy()
        buffer.pos, buffer.full = state["pos"], state["full"]

    def load(self, path: str | Path) -> None:
        """Take over a model that SB3's own `model.save(path)` wrote, weights and counters.

        Nothing in the file is unpickled: numbers come from its JSON, tensors from weights_only.
        """
        from agents.sb3_model import load_zip

        load_zip(Path(path), self.model, self.spec, self.settings, self.read)

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        return allowed_items(mask, len(obs), self.spec.num_items, obs.profile.device)
