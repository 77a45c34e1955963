"""Stable-Baselines3 policies with an item-embedding head: Q(s, a) or logit(s, a) = f(s) . g(a).

Classes of SB3 with their last layer exchanged, and nothing else. Arguments are SB3's own and go on
to it as they come (an unknown one is its TypeError); `item_features` is ours.
"""

import math
from typing import Any

import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.qrdqn.policies import QRDQNPolicy, QuantileNetwork
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import Tensor, nn

RANK = 64  # length of f(s) and g(a): about the rank that item vectors of BERT have


class DotHead(nn.Module):
    """Hidden (B, W) to f(s) . g(a) and a bias of each item, (B, G * N) for G rows of f(s).

    Rows are the slots of a slate or the quantiles of a value; all share g.
    """

    table: Tensor  # (N, R + 1): saved, since axes may differ in sign on another machine

    def __init__(self, hidden: int, item_features: Tensor, rows: int = 1) -> None:
        super().__init__()
        size = item_features.shape[1]  # R + 1
        self.register_buffer("table", item_features.detach().clone())
        self.rows, self.scale = rows, 1.0 / math.sqrt(RANK)
        self.user = nn.Linear(hidden, rows * RANK)
        self.item = nn.Linear(size, RANK)
        self.bias = nn.Linear(size, 1)
        # one of the two factors starts small, not both: near zero, and it still learns
        nn.init.orthogonal_(self.user.weight, gain=0.1)
        nn.init.zeros_(self.user.bias)
        nn.init.orthogonal_(self.bias.weight, gain=0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        user = self.user(hidden).view(len(hidden) * self.rows, RANK)  # (B * G, k)
        fit = torch.addmm(
            self.bias(self.table).T, user, self.item(self.table).T, alpha=self.scale
        )  # (B * G, N)
        return fit.view(len(hidden), -1)


def exchange(last: nn.Module, item_features: Tensor) -> DotHead:
    """The head that takes the place of SB3's last layer."""
    assert isinstance(last, nn.Linear)
    return DotHead(last.in_features, item_features, last.out_features // len(item_features))


class DotQNetwork(QNetwork):
    """SB3's Q-network, values by f(s) . g(a)."""

    def __init__(self, *args: Any, item_features: Tensor, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.q_net[-1] = exchange(self.q_net[-1], item_features)


class DotQuantileNetwork(QuantileNetwork):
    """SB3's quantile network, quantiles by f(s) . g(a)."""

    def __init__(self, *args: Any, item_features: Tensor, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.quantile_net[-1] = exchange(self.quantile_net[-1], item_features)


class DotDQNPolicy(DQNPolicy):
    """DQN over item embeddings."""

    def __init__(self, *args: Any, item_features: Tensor, **settings: Any) -> None:
        self.item_features = item_features  # before SB3 builds, which its constructor does
        super().__init__(*args, **settings)

    def make_q_net(self) -> DotQNetwork:
        given = self._update_features_extractor(self.net_args, features_extractor=None)
        return DotQNetwork(**given, item_features=self.item_features).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"item_features": self.item_features}


class DotQRDQNPolicy(QRDQNPolicy):
    """QR-DQN over item embeddings."""

    def __init__(self, *args: Any, item_features: Tensor, **settings: Any) -> None:
        self.item_features = item_features
        super().__init__(*args, **settings)

    def make_quantile_net(self) -> DotQuantileNetwork:
        given = self._update_features_extractor(self.net_args, features_extractor=None)
        return DotQuantileNetwork(**given, item_features=self.item_features).to(self.device)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"item_features": self.item_features}


class DotActorCriticPolicy(ActorCriticPolicy):
    """PPO and A2C over item embeddings; one f(s) for each slot of a slate."""

    def __init__(self, *args: Any, item_features: Tensor, **settings: Any) -> None:
        self.item_features = item_features
        super().__init__(*args, **settings)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        exchange_action_net(self, lr_schedule)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"item_features": self.item_features}


class DotMaskableActorCriticPolicy(MaskableActorCriticPolicy):
    """MaskablePPO over item embeddings."""

    def __init__(self, *args: Any, item_features: Tensor, **settings: Any) -> None:
        self.item_features = item_features
        super().__init__(*args, **settings)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        exchange_action_net(self, lr_schedule)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"item_features": self.item_features}


def exchange_action_net(
    policy: DotActorCriticPolicy | DotMaskableActorCriticPolicy, lr_schedule: Schedule
) -> None:
    """Exchange the action layer and give the optimiser the new parameters."""
    policy.action_net = exchange(policy.action_net, policy.item_features)
    optimizer: Any = policy.optimizer_class
    policy.optimizer = optimizer(policy.parameters(), lr=lr_schedule(1), **policy.optimizer_kwargs)
