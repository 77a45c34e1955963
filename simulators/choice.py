"""From relevance and slate to choices: pure functions of theta (B, K) and noise.

theta is a logit, -inf in an empty slot, so an empty slot is never chosen.
"""

import torch
from torch import Tensor


def gumbel(uniform: Tensor) -> Tensor:
    """Uniform in (0, 1) to standard Gumbel noise of the same shape."""
    return -(-uniform.log()).log()


def logit(theta: Tensor, noise: Tensor, outside: Tensor) -> Tensor:
    """Choose at most one of K against an outside option of utility 0 (McFadden, 1974), (B, K) bool.

    With Gumbel `noise` (B, K) and `outside` (B,), P(i) = e^theta_i / (1 + sum_j e^theta_j).
    """
    best, slot = (theta + noise).max(dim=1)  # (B,) each
    slots = torch.arange(theta.shape[1], device=theta.device)  # (K,)
    return (slots == slot[:, None]) & (best > outside)[:, None]


def organic(theta: Tensor, noise: Tensor, outside: Tensor) -> Tensor:
    """Say what would be bought unshown on the draw of `logit`, (B, K) bool: P = sigmoid(theta)."""
    return theta + noise > outside[:, None]


def independent(theta: Tensor, uniform: Tensor) -> Tensor:
    """Choose every item on its own with P = sigmoid(theta), (B, K) bool."""
    return uniform < theta.sigmoid()


def cascade(theta: Tensor, uniform: Tensor) -> Tensor:
    """Look from the top and take the first wanted item (Craswell et al., 2008), (B, K) bool."""
    wanted = independent(theta, uniform)  # (B, K)
    return wanted & (wanted.cumsum(dim=1) == 1)


def position(theta: Tensor, decay: float) -> Tensor:
    """Lower theta (B, K) by `decay` a slot from the top: attention fades; 0 changes nothing."""
    return theta - decay * torch.arange(theta.shape[1], device=theta.device)


def choice_probabilities(theta: Tensor) -> Tensor:
    """Exact probabilities of `logit`, (B, K); what is missing to 1 is the outside option."""
    outside = torch.zeros_like(theta[:, :1])  # (B, 1)
    return torch.cat([outside, theta], dim=1).softmax(dim=1)[:, 1:]
