"""Logged steps of a few states and items, and agents that learn from them."""

from typing import Any

import torch

from agents.base import AgentSpec, Decision, Transition
from agents.bcq import BCQ
from agents.behaviour_cloning import BehaviourCloning
from agents.cql import CQL
from agents.iql import IQL
from encoders.state import EMPTY, Observation

SHRUNK = {BehaviourCloning: {"shrink": 0.0}, CQL: {"shrink": 0.0},
          BCQ: {"shrink": 0.0, "behaviour_shrink": 0.0},
          IQL: {"shrink": 0.0, "policy_shrink": 0.0}}  # fmt: skip
STATES = 4


def toy_spec(items: int = 3, slate_size: int = 1) -> AgentSpec:
    """States are one-hot profiles, items one-hot vectors."""
    return AgentSpec(
        num_items=items, slate_size=slate_size, item_vectors=torch.eye(items),
        category=torch.zeros(items, dtype=torch.int64), popularity=torch.ones(items),
        interactions=None, profile_size=STATES, past_size=1, history_size=1, feedback_size=1,
        context_size=1,
    )  # fmt: skip


def toy_obs(state: torch.Tensor) -> Observation:
    b, none = len(state), torch.full((len(state), 1), EMPTY)
    return Observation(
        profile=torch.nn.functional.one_hot(state, STATES).float(), past=none,
        past_count=torch.zeros(b, 1), past_age=torch.zeros(b, 1), history=none,
        feedback=torch.zeros(b, 1, 1), context=torch.zeros(b, 1),
    )  # fmt: skip


def steps(state: Any, slate: Any, reward: Any, later: Any = None, **changes: Any) -> Transition:
    """Logged steps: states (B,), slates and slot rewards (B, K); the last ones without `later`."""
    state, slate = torch.as_tensor(state), torch.as_tensor(slate)
    reward = torch.as_tensor(reward, dtype=torch.float32)
    given = {
        "obs": toy_obs(state), "mask": None, "decision": Decision(slate, torch.ones(slate.shape)),
        "reward": reward.sum(dim=1), "chosen": reward > 0, "slot_reward": reward,
        "next_obs": toy_obs(state if later is None else torch.as_tensor(later)), "next_mask": None,
        "terminated": torch.full(state.shape, later is None),
        "truncated": torch.zeros(state.shape, dtype=torch.bool),
    }  # fmt: skip
    return Transition(**{**given, **changes})


def taught(kind: Any, spec: AgentSpec, batch: Transition, updates: int, **knobs: Any) -> Any:
    given = {"lr": 2e-2, "tau": 0.1, "width": 16, "memory": False, **SHRUNK[kind]}
    agent = kind(spec, **(given | knobs))
    for _ in range(updates):
        agent.update(batch)
    return agent
