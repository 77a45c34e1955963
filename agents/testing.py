"""A conformance kit for authors of agents: `check_agent` says in plain English what is wrong."""

import io
import random
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.base import Agent, AgentSpec, Mask, Transition, allowed_items
from agents.interactions import Interactions
from encoders.state import CONTEXT, EMPTY, Observation

ROWS = 16  # users of most checks
DRAWS = 4096  # users of the check of frequencies
SIGMAS = 6.0  # a true propensity is missed by this much once in a billion


def synthetic_spec(
    *, num_items: int = 24, slate_size: int = 2, device: str = "cpu", seed: int = 0
) -> AgentSpec:
    """A small catalogue with random vectors, popularity and interactions, one by one as well."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.rand(num_items, generator=generator) ** 3  # (N,)
    bought = torch.rand(60, num_items, generator=generator) < 0.05 + popularity / 2
    vectors = torch.randn(num_items, 8, generator=generator)
    events = synthetic_events(bought.numpy(), vectors, seed)
    return AgentSpec(
        num_items=num_items,
        slate_size=slate_size,
        item_vectors=vectors.to(device),
        category=torch.randint(0, 4, (num_items,), generator=generator).to(device),
        popularity=popularity.to(device),
        interactions=events.counts(),
        profile_size=5,
        past_size=12,
        history_size=6,
        feedback_size=1,
        context_size=CONTEXT,
        device=device,
        seed=seed,
        events=events,
    )


def synthetic_events(bought: np.ndarray, vectors: Tensor | None, seed: int) -> Interactions:
    """Purchases of what each user bought (U, N) bool, one to three times in 200 days, timed."""
    rng = np.random.default_rng(seed)
    user, item = bought.nonzero()
    often = rng.integers(1, 4, len(user))
    user, item = np.repeat(user, often), np.repeat(item, often)  # (n,)
    time = 19_000.0 + 200.0 * rng.random(len(user))  # days since 1970-01-01
    order = np.lexsort((time, user))
    users, items = bought.shape
    ones = np.ones(len(user))
    return Interactions(user, item[order], time[order], ones, users, items, vectors)


def synthetic_observation(spec: AgentSpec, batch: int, generator: torch.Generator) -> Observation:
    """B users with pasts and histories of different lengths, some of them empty."""
    n, h, width = spec.num_items, spec.past_size, spec.history_size

    def items(places: int, most: int) -> Tensor:
        order = torch.rand(batch, n, generator=generator).argsort(dim=1)  # (B, N)
        order = torch.nn.functional.pad(order, (0, max(0, places - n)), value=EMPTY)[:, :places]
        length = torch.randint(0, most + 1, (batch, 1), generator=generator)
        return torch.where(torch.arange(places) < length, order, EMPTY)  # (B, places)

    past = items(h, min(h, n))
    history = items(width, max(0, min(width, n - 2 * spec.slate_size)))
    count = torch.randint(1, 9, (batch, h), generator=generator).float()
    age = torch.rand(batch, h, generator=generator) * 200.0
    liked = torch.rand(batch, width, spec.feedback_size, generator=generator) < 0.3
    return Observation(
        profile=torch.randn(batch, spec.profile_size, generator=generator),
        past=past,
        past_count=count * (past != EMPTY),
        past_age=age * (past != EMPTY),
        history=history,
        feedback=(liked & (history != EMPTY)[:, :, None]).float(),
        context=torch.randn(batch, spec.context_size, generator=generator),
    ).to(spec.device)


def synthetic_steps(
    agent: Agent, spec: AgentSpec, batch: int, steps: int, generator: torch.Generator
) -> Iterator[Transition]:
    """Steps of B users whose answers are random, a tenth of the trips ending each time."""
    obs = synthetic_observation(spec, batch, generator)
    for _ in range(steps):
        decision = agent.act(obs, obs.history)
        shape = decision.slate.shape
        chosen = (torch.rand(shape, generator=generator) < 0.3).to(spec.device)
        ends = torch.rand(batch, generator=generator).to(spec.device)
        later = synthetic_observation(spec, batch, generator)
        later = replace(obs, history=later.history, feedback=later.feedback, context=later.context)
        yield Transition(
            obs=obs,
            mask=obs.history,
            decision=decision,
            reward=chosen.float().sum(dim=1),
            chosen=chosen,
            slot_reward=chosen.float(),
            next_obs=later,
            next_mask=later.history,
            terminated=ends < 0.05,
            truncated=(ends >= 0.05) & (ends < 0.1),
        )
        obs = later


def check_agent(agent: Agent, spec: AgentSpec, *, seed: int = 0) -> list[str]:
    """Play and train an agent on synthetic users, put its state back; what is wrong, or []."""
    generator = torch.Generator().manual_seed(seed)
    failures: list[str] = []
    before = _global_generators()
    try:
        start = _saved(agent)
    except Exception as error:
        return [f"state_dict must survive torch.save and torch.load(weights_only=True): {error!r}"]
    for check in (
        _check_act,
        _check_masks,
        _check_distribution,
        _check_frequencies,
        _check_batch,
        _check_update,
        _check_act,  # once more, of what has learnt
        _check_restore,
    ):
        try:
            failures += check(agent, spec, generator)
        except Exception as error:
            failures.append(
                f"{check.__name__.removeprefix('_')} raised {type(error).__name__}: {error}"
            )
    agent.load_state_dict(start)
    if _global_generators() != before:
        failures.append(
            "a global random generator was used (torch, numpy or random): draw from one "
            "torch.Generator of the agent's own, seeded with spec.seed"
        )
    return list(dict.fromkeys(failures))


def _check_act(agent: Agent, spec: AgentSpec, generator: torch.Generator) -> list[str]:
    """Shapes, types, devices, and that act says what slate_probs says."""
    failures: list[str] = []
    obs = synthetic_observation(spec, ROWS, generator)
    copy = {f.name: getattr(obs, f.name).clone() for f in fields(obs)}
    shape = (ROWS, spec.slate_size)
    for explore in (True, False):
        said = f"explore={explore}"
        decision = agent.act(obs, None, explore=explore)
        probs = agent.slate_probs(obs, None, decision.slate, explore=explore)
        first = agent.action_probs(obs, None, explore=explore)
        for name, value, wanted, dtype in (
            ("act's slate", decision.slate, shape, torch.int64),
            ("act's propensity", decision.propensity, shape, torch.float32),
            ("slate_probs", probs, shape, torch.float32),
            ("action_probs", first, (ROWS, spec.num_items), torch.float32),
        ):
            if tuple(value.shape) != wanted or value.dtype != dtype:
                failures.append(
                    f"{name} must be {wanted} {dtype}, got {tuple(value.shape)} {value.dtype} "
                    f"({said})"
                )
            if value.device.type != torch.device(spec.device).type:
                failures.append(f"{name} must be on {spec.device}, got {value.device} ({said})")
        if failures:
            return failures
        if not ((decision.propensity > 0) & (decision.propensity <= 1.0 + 1e-6)).all():
            failures.append(f"propensity of an action that was taken must be in (0, 1] ({said})")
        if not torch.allclose(decision.propensity, probs, rtol=1e-4, atol=1e-7):
            gap = float((decision.propensity - probs).abs().max())
            failures.append(
                f"act's propensity and slate_probs of the same slate differ by {gap:.3g} ({said}): "
                "both must be the probability of each item given those above it"
            )
        ordered = decision.slate.sort(dim=1).values
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            failures.append(f"a slate shows an item twice ({said})")
    changed = [name for name, value in copy.items() if not torch.equal(value, getattr(obs, name))]
    if changed:
        failures.append(f"the agent wrote into the observation it was shown: {', '.join(changed)}")
    return failures


def _check_masks(agent: Agent, spec: AgentSpec, generator: torch.Generator) -> list[str]:
    """That no form of mask lets a forbidden item through."""
    failures: list[str] = []
    obs = synthetic_observation(spec, ROWS, generator)
    allowed = allowed_items(obs.history, ROWS, spec.num_items, spec.device)
    masks: dict[str, Mask] = {"excluded ids": obs.history, "bool": allowed}
    for name, mask in masks.items():
        for explore in (True, False):
            slate = agent.act(obs, mask, explore=explore).slate
            if not allowed.gather(1, slate).all():
                failures.append(f"act showed a masked item (mask as {name}, explore={explore})")
            if (agent.action_probs(obs, mask, explore=explore)[~allowed] > 0).any():
                failures.append(
                    f"action_probs gives a masked item a chance (mask as {name}, explore={explore})"
                )
    one, other = (agent.action_probs(obs, mask) for mask in masks.values())
    if not torch.allclose(one, other, atol=1e-6):
        failures.append("the same mask as excluded ids and as bool gives different action_probs")
    if not allowed.all():
        row, item = (int(x) for x in (~allowed).nonzero()[0])
        slate = agent.act(obs, None).slate[row : row + 1].clone()
        slate[0, 0] = item
        if (
            float(agent.slate_probs(obs[row : row + 1], obs.history[row : row + 1], slate)[0, 0])
            > 0
        ):
            failures.append("slate_probs gives a masked item a chance: it must be 0")
    return failures


def _check_distribution(agent: Agent, spec: AgentSpec, generator: torch.Generator) -> list[str]:
    """That probabilities sum to one and that slate_probs starts as action_probs does."""
    failures: list[str] = []
    n, k = spec.num_items, spec.slate_size
    obs = synthetic_observation(spec, 1, generator)
    every = obs[torch.zeros(n, dtype=torch.int64, device=spec.device)]  # (N) times the same user
    mask = every.history
    for explore in (True, False):
        first = agent.action_probs(obs, obs.history, explore=explore)[0]  # (N,)
        if abs(float(first.sum()) - 1.0) > 1e-3:
            failures.append(
                f"action_probs sums to {float(first.sum()):.4f}, not 1 (explore={explore})"
            )
        column = torch.arange(n, device=spec.device)[:, None]  # (N, 1)
        slate = (column + torch.arange(k, device=spec.device)) % n  # (N, K): each item first once
        asked = agent.slate_probs(every, mask, slate, explore=explore)[:, 0]  # (N,)
        if not torch.allclose(asked, first, rtol=1e-3, atol=1e-6):
            failures.append(
                f"slate_probs of the first slot is not action_probs (explore={explore})"
            )
        if k < 2:
            continue
        top = int(agent.act(obs, obs.history, explore=explore).slate[0, 0])
        rest = (top + 1 + torch.arange(n - 1, device=spec.device)) % n  # (N - 1,) all but the first
        turn = (torch.arange(n - 1)[:, None] + torch.arange(k - 1)).to(spec.device) % (n - 1)
        slate = torch.cat([torch.full((n - 1, 1), top, device=spec.device), rest[turn]], dim=1)
        second = agent.slate_probs(every[: n - 1], mask[: n - 1], slate, explore=explore)[:, 1]
        if abs(float(second.sum()) - 1.0) > 1e-3:
            failures.append(
                "given the first item, the second slot's slate_probs over the other items sum to "
                f"{float(second.sum()):.4f}, not 1 (explore={explore})"
            )
    return failures


def _check_frequencies(agent: Agent, spec: AgentSpec, generator: torch.Generator) -> list[str]:
    """That items are shown as often as their probability says, each user on their own coin."""
    obs = synthetic_observation(spec, 1, generator)
    many = obs[torch.zeros(DRAWS, dtype=torch.int64, device=spec.device)]
    first = agent.action_probs(obs, obs.history)[0].double()  # (N,)
    shown = agent.act(many, many.history).slate[:, 0]
    often = torch.bincount(shown, minlength=spec.num_items).double() / DRAWS  # (N,)
    slack = SIGMAS * (first * (1.0 - first) / DRAWS).clamp(min=0.0).sqrt() + SIGMAS / DRAWS
    off = (often - first).abs() - slack  # (N,)
    if (off > 0).any():
        item = int(off.argmax())
        return [
            f"item {item} was shown first to {float(often[item]):.3f} of {DRAWS} equal users, "
            f"action_probs says {float(first[item]):.3f}: act must sample from action_probs, "
            "and flip a coin for each user"
        ]
    return []


def _check_batch(agent: Agent, spec: AgentSpec, generator: torch.Generator) -> list[str]:
    """That a user's answer does not depend on who else is in the batch."""
    obs = synthetic_observation(spec, ROWS, generator)
    together = agent.act(obs, obs.history, explore=False)
    probs = agent.slate_probs(obs, obs.history, together.slate, explore=False)
    for row in range(ROWS):  # one at a time is what is being tested
        one = obs[row : row + 1]
        alone = agent.slate_probs(one, one.history, together.slate[row : row + 1], explore=False)
        if not torch.allclose(alone[0], probs[row], rtol=1e-3, atol=1e-5):
            return [f"row {row} has other slate_probs alone than in a batch of {ROWS}"]
        same = torch.equal(agent.act(one, one.history, explore=False).slate[0], together.slate[row])
        if (probs[row] == 1.0).all() and not same:
            return [f"row {row} is shown another slate alone than in a batch of {ROWS}"]
    return []


def _check_update(agent: Agent, spec: AgentSpec, generator: torch.Generator) -> list[str]:
    """That learning logs finite scalars and refuses a reward that is not finite."""
    learnt = False
    for transition in synthetic_steps(agent, spec, 64, 24, generator):
        logs: dict[str, Any] = agent.update(transition)
        learnt = learnt or bool(logs)
        for name, value in logs.items():
            if not isinstance(value, Tensor) or value.numel() != 1:
                return [
                    "update must return scalar tensors (no .item()), "
                    f"{name} is {type(value).__name__}"
                ]
            if not bool(value.isfinite()):
                return [f"update logged {name} = {float(value)}"]
    if not learnt:
        return []
    broken = replace(transition, reward=transition.reward * torch.nan)
    try:
        agent.update(broken)
    except ValueError:
        return []
    return ["update learnt from a reward that is NaN: it must raise a ValueError that says so"]


def _check_restore(agent: Agent, spec: AgentSpec, generator: torch.Generator) -> list[str]:
    """That a saved state brings back what the agent did, after it has gone on learning."""
    obs = synthetic_observation(spec, ROWS, generator)
    state = _saved(agent)
    then = [agent.act(obs, obs.history, explore=e).slate for e in (False, True)]
    probs = agent.action_probs(obs, obs.history)
    for transition in synthetic_steps(agent, spec, 64, 8, generator):
        agent.update(transition)
    agent.load_state_dict(state)
    now = [agent.act(obs, obs.history, explore=e).slate for e in (False, True)]
    if not torch.equal(agent.action_probs(obs, obs.history), probs):
        return ["after load_state_dict action_probs is not what it was when state_dict was taken"]
    if not all(torch.equal(a, b) for a, b in zip(then, now, strict=True)):
        return ["after load_state_dict the next slates differ: save the generator's state too"]
    return []


def _saved(agent: Agent) -> dict[str, Any]:
    """The state as a checkpoint would bring it back."""
    file = io.BytesIO()
    torch.save(agent.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def _global_generators() -> tuple[bytes, str, str]:
    """A fingerprint of the generators that nobody may touch."""
    legacy = str(np.random.get_state())  # noqa: NPY002 (looked at, not drawn from)
    return torch.get_rng_state().numpy().tobytes(), legacy, str(random.getstate())
