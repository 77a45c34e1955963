"""Policies that never learn from answers: any model that scores histories, as an agent.

The bars that a learner has to clear. A model is fitted once, on the log before the cut; what it is
asked about is all that was seen of a user until now, so that unseen users are served as well.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from agents.base import AgentSpec, Decision, Mask, Transition, allowed_items
from agents.explore import (
    epsilon_greedy_probs,
    epsilon_greedy_slate,
    epsilon_greedy_slate_probs,
    joined,
    plackett_luce_probs,
    row_blocks,
    sample_slate,
    softmax_uniform,
    standardised,
)
from agents.interactions import Interactions, owned, spread
from encoders.state import Observation

COLDEST = 0.02  # temperature, in standard deviations of a user's scores


class Model(Protocol):
    """What is fitted on `Interactions`, `Logs` or a CSR of counts, and scores any history."""

    def scores(self, obs: Observation) -> Tensor:
        """(B, N), higher is better; popularity where a user has no history."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Static:
    """Show what a model scores best; with a temperature, draw by its standardised scores.

    `model(past, device=, seed=)` makes the model from the interactions of the spec. With
    `repeats=False` what a user had before is not shown again, unless nothing else is left.
    """

    learns = False  # nothing that happens changes it: training it would be a waste

    def __init__(
        self,
        spec: AgentSpec,
        *,
        model: Callable[..., Model],
        temperature: float = 0.0,
        repeats: bool = True,
    ) -> None:
        if not (temperature == 0.0 or temperature >= COLDEST):
            raise ValueError(
                f"temperature must be 0 (the best are shown) or at least {COLDEST}, below which "
                f"chances are too small to be numbers, got {temperature}"
            )
        if not isinstance(repeats, bool):
            raise ValueError(f"repeats must be true or false, got {repeats!r}")
        past = spec.events if spec.events is not None else spec.interactions
        if past is None:
            raise ValueError(
                "a static policy learns from interactions (users, N), this environment has none: "
                "choose an agent that needs none, such as random"
            )
        past = Interactions.of(past)
        if past.num_items != spec.num_items:
            raise ValueError(
                f"interactions are of {past.num_items} items, the spec of {spec.num_items}"
            )
        self.spec, self.temperature, self.repeats = spec, temperature, repeats
        self.model = model(past, device=spec.device, seed=spec.seed)
        self.generator = torch.Generator(spec.device).manual_seed(spec.seed)

    def scores(self, obs: Observation) -> Tensor:
        """The model's (B, N)."""
        return self.model.scores(obs)

    def act(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Decision:
        k = self.spec.slate_size
        soft, made = explore and self.temperature, []
        for some, allowed in self._blocks(obs, mask):
            if soft:
                made.append(sample_slate(self._soft(some, allowed), k, self.generator))
            else:
                q = self.scores(some)  # (b, N)
                made.append(epsilon_greedy_slate(q, allowed, k, 0.0, self.generator))
        return joined(made)

    def slate_probs(
        self, obs: Observation, mask: Mask, slate: Tensor, *, explore: bool = True
    ) -> Tensor:
        soft, probs, start = explore and self.temperature, [], 0
        for some, allowed in self._blocks(obs, mask):
            part = slate[start : start + len(some)]
            if soft:
                probs.append(plackett_luce_probs(self._soft(some, allowed), part))
            else:
                probs.append(epsilon_greedy_slate_probs(self.scores(some), allowed, part, 0.0))
            start += len(some)
        return torch.cat(probs)

    def action_probs(self, obs: Observation, mask: Mask, *, explore: bool = True) -> Tensor:
        allowed = self._allowed(obs, mask)
        if explore and self.temperature:
            return self._soft(obs, allowed).float()
        return epsilon_greedy_probs(self.scores(obs), allowed, 0.0)

    def _blocks(self, obs: Observation, mask: Mask) -> Iterator[tuple[Observation, Tensor]]:
        """What some users see and may be shown (b, N) at a time: never all users' scores."""
        for rows in row_blocks(len(obs), self.spec.num_items):
            yield obs[rows], self._allowed(obs[rows], None if mask is None else mask[rows])

    def update(self, transition: Transition) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": type(self.model).__name__,
            "settings": settings_of(self.model),
            "model": self.model.state_dict(),
            "generator": self.generator.get_state(),
            "device": self.generator.device.type,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mine = type(self.model).__name__
        if state["kind"] != mine:
            raise ValueError(
                f"the checkpoint is of a {state['kind']}, the agent asked for is a {mine}: choose "
                "the agent that was saved"
            )
        ours, theirs = settings_of(self.model), state["settings"]
        if differs := [k for k in ours if k != "num_items" and theirs.get(k) != ours[k]]:
            k = differs[0]  # histories would be read in another way than the model was fitted for
            raise ValueError(
                f"the checkpoint is of a {mine} with {k}={theirs.get(k)}, the agent asked for has "
                f"{k}={ours[k]}: choose the settings it was saved with"
            )
        self.model.load_state_dict(state["model"])
        if state["device"] == self.generator.device.type:  # generators of devices do not translate
            self.generator.set_state(state["generator"].cpu())

    def _allowed(self, obs: Observation, mask: Mask) -> Tensor:
        """(B, N) bool; without repeats new items only, where a slate of them is left."""
        n = self.spec.num_items
        allowed = allowed_items(mask, len(obs), n, obs.profile.device)
        if self.repeats:
            return allowed
        items, _, _ = owned(obs, n)
        fresh = allowed & (spread(items, torch.ones_like(items), n) == 0)  # (B, N)
        enough = fresh.sum(dim=1, keepdim=True) >= self.spec.slate_size  # (B, 1)
        return torch.where(enough, fresh, allowed)

    def _soft(self, obs: Observation, allowed: Tensor) -> Tensor:
        """First-slot probabilities (B, N) float64."""
        level = standardised(self.scores(obs), allowed)
        return softmax_uniform(level, allowed, self.temperature, 0.0)


def settings_of(model: Any) -> dict[str, Any]:
    """What a model keeps of how it was told to read histories: its plain attributes."""
    kept = vars(model).items()
    return {k: v for k, v in kept if v is None or isinstance(v, bool | int | float | str)}
