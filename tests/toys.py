"""States, items and steps so small that what is to be learnt of them is known."""

import torch

from agents.base import AgentSpec, Transition
from encoders.state import EMPTY, Observation


def toy_spec(items=4, states=4, slate_size=1, seed=0, total_steps=None):
    """States are profiles, items one-hot vectors; nothing else is seen."""
    return AgentSpec(
        num_items=items,
        slate_size=slate_size,
        item_vectors=torch.eye(items),
        category=torch.zeros(items, dtype=torch.int64),
        popularity=torch.ones(items),
        interactions=None,
        profile_size=states,
        past_size=1,
        history_size=1,
        feedback_size=1,
        context_size=0,
        seed=seed,
        total_steps=total_steps,
    )


def toy_obs(profile):
    b = len(profile)
    none, zero = torch.full((b, 1), EMPTY), torch.zeros(b, 1)
    return Observation(profile, none, zero, zero, none, zero[:, :, None], profile[:, :0])


def toy_step(
    profile, decision, slot_reward, later=None, *, left=None, cut=None, mask=None, after=None
):
    """A step of B users; the next mask is `after`, or else the same `mask`."""
    never = torch.zeros(len(profile), dtype=torch.bool)
    return Transition(
        obs=toy_obs(profile),
        mask=mask,
        decision=decision,
        reward=slot_reward.sum(dim=1),
        chosen=slot_reward > 0,
        slot_reward=slot_reward,
        next_obs=toy_obs(profile if later is None else later),
        next_mask=mask if after is None else after,
        terminated=never if left is None else left,
        truncated=never if cut is None else cut,
    )
