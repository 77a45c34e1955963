"""What learners from logs share: what was shown as a likelihood, and one careful gradient step."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.base import Transition, allowed_items
from agents.nets import QNet
from encoders.state import EMPTY

NEVER = -1e9  # logit of what could not be shown: finite, so that gradients are


def shown_or_allowed(transition: Transition, num_items: int) -> Tensor:
    """Items (B, N) that could be shown: what was shown could, whatever a log says of masks."""
    slate = transition.decision.slate  # (B, K)
    allowed = allowed_items(
        transition.mask, len(slate), num_items, slate.device, may_be_empty=True
    )  # (B, N)
    room = F.pad(allowed, (0, 1))  # (B, N + 1): the last takes EMPTY
    return room.scatter(1, torch.where(slate == EMPTY, num_items, slate), True)[:, :-1]


def allowed_next(transition: Transition, num_items: int) -> Tensor:
    """Items (B, N) that may be shown next; who has left may have seen everything."""
    mask, reward = transition.next_mask, transition.reward
    return allowed_items(mask, len(reward), num_items, reward.device, may_be_empty=True)


def slate_nll(logits: Tensor, allowed: Tensor, slate: Tensor) -> Tensor:
    """Minus log chance (B, K) of each item given those above it, 0 where EMPTY.

    Logits and allowed (B, N): drawn one after another without replacement (Plackett, 1975; Luce,
    1959). Of one slot it is logsumexp(logits) - logit of the item.
    """
    real = slate != EMPTY  # (B, K)
    index = torch.where(real, slate, logits.shape[1])  # (B, K)
    wide = F.pad(logits.masked_fill(~allowed, NEVER), (0, 1), value=NEVER)  # (B, N + 1)
    shown = wide.gather(1, index)  # (B, K)
    rest = wide.scatter(1, index, NEVER).logsumexp(dim=1, keepdim=True)  # (B, 1) never shown
    below = torch.cat([rest, shown.flip(1)], dim=1).logcumsumexp(dim=1)[:, 1:].flip(1)  # (B, K)
    return (below - shown) * real


def mean_of_shown(values: Tensor, real: Tensor) -> Tensor:
    """Mean of (B, K) over the slots that showed something."""
    return (values * real).sum() / real.sum().clamp(min=1)


def optimizer_over(nets: Iterable[nn.Module], lr: float, shrink: float) -> torch.optim.Optimizer:
    """Adam with decoupled decay (Loshchilov and Hutter, 2019) of the personal weights only."""
    nets = list(nets)
    personal = [p for net in nets if isinstance(net, QNet) for p in net.personal()]
    held = {id(p) for p in personal}
    rest = [p for net in nets for p in net.parameters() if id(p) not in held]
    groups: list[dict[str, Any]] = [
        {"params": personal, "weight_decay": shrink},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, clip: float) -> Tensor:
    """One gradient step, its norm clipped; the norm before that."""
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    return norm.detach()


@torch.no_grad()
def follow(mean: nn.Module, net: nn.Module, tau: float) -> None:
    """Move a running mean (Polyak and Juditsky, 1992) `tau` of the way to the net."""
    for slow, fast in zip(mean.parameters(), net.parameters(), strict=True):
        slow.lerp_(fast, tau)
