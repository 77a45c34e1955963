"""Bayesian linear regression of rewards, kept up to date: the linear algebra of linear bandits.

    A = ridge I + sum of f x x'        theta = A^-1 sum of f x (r - level)       f: forgetting
    mean(s, a) = level + x theta       sd(s, a) = sigma sqrt(x A^-1 x')

`level` is the mean of what items pay, each item weighing n / (n + 1): with a prior mean of 0 and
rewards around .5 optimism is pessimism, and untried items stay untried. `sigma` is the spread that
the posterior leaves unexplained (normal-inverse-gamma, one pseudo-reward), or the given `noise`.
All sums are kept apart from the prior, so that forgetting never forgets the prior, and feedback
may come in any order.
"""

from typing import Any

import torch
from torch import Tensor

from agents.bandit_algebra import downdated, factor, grouped, level_of, sigma_of
from agents.bandit_features import (
    Pairs,
    PairVectors,
    UserVectors,
    pair_products,
    pair_scores,
    pair_squares,
)
from agents.base import AgentSpec
from agents.checks import positive, whole
from agents.nets import Reader
from encoders.state import EMPTY, Observation

KINDS = ("shared", "hybrid", "disjoint")
LIMIT = 2**22  # numbers in the matrices of all items, 20 bytes each: 2000 items of dim=45
SPECK = 1e-6  # share of sigma that tells equal items apart


class SharedRidge:
    """One theta over phi(s, a); `hybrid` gives every item an intercept of its own besides.

    The intercepts are integrated out: what is left is a regression on phi less what the item's own
    intercept explains of it (Li et al., 2010, algorithm 2, with z = 1).
    """

    def __init__(
        self,
        spec: AgentSpec,
        *,
        dim: int,
        ridge: float,
        forget: float,
        refresh: int,
        noise: float | None,
        hybrid: bool = False,
    ) -> None:
        self.features = PairVectors(spec, dim=dim)
        self.ridge, self.forget, self.refresh = ridge, forget, refresh
        self.noise, self.hybrid = noise, hybrid
        self.kind = "hybrid" if hybrid else "shared"
        d, n = self.features.size, spec.num_items
        self.sums = {
            name: torch.zeros(shape, dtype=torch.float64, device=spec.device)
            for name, shape in {
                "gram": (d, d), "paid": (d,), "seen": (d,), "count": (n,), "total": (n,),
                "square": (), "item": (n if hybrid else 0, d),
            }.items()
        }  # fmt: skip
        self.updates = 0
        self.post: dict[str, Tensor] = {}
        self.solve()

    def view(self, obs: Observation) -> Any:
        """What `mean` and `width` need to know of B users: Pairs."""
        return self.features.factors(obs)

    def vectors(self, obs: Observation, slate: Tensor) -> Tensor:
        """What is learnt from (B, K, d)."""
        return self.features.of(obs, slate)

    def learn(self, x: Tensor, slate: Tensor, reward: Tensor) -> None:
        """Add rewards (n, K) of items (n, K) with their vectors (n, K, d); EMPTY adds none."""
        real = (slate != EMPTY).flatten().double()  # (m,)
        x = x.flatten(0, 1).double() * real[:, None]  # (m, d)
        r, item = reward.flatten().double() * real, slate.flatten().clamp(min=0)  # (m,) each
        sums = self.sums
        if self.forget < 1.0:
            for value in sums.values():
                value.mul_(self.forget)
        sums["gram"].addmm_(x.T, x)
        sums["paid"] += r @ x
        sums["seen"] += x.sum(dim=0)
        sums["count"].index_add_(0, item, real)
        sums["total"].index_add_(0, item, r)
        sums["square"] += r @ r
        if self.hybrid:
            sums["item"].index_add_(0, item, x)
        self.updates += 1
        if self.updates % self.refresh == 0:
            self.solve()

    def solve(self) -> None:
        """The posterior of all that was added so far."""
        s, own = self.sums, torch.zeros_like(self.sums["count"])
        level = level_of(s["count"], s["total"])
        gram, paid = s["gram"], s["paid"] - level * s["seen"]
        gain = s["total"] - level * s["count"]  # (N,) centred sums
        if self.hybrid:
            own = 1.0 / (s["count"] + self.ridge)  # (N,) variance of an item's intercept
            gram = gram - (s["item"] * own[:, None]).T @ s["item"]
            paid = paid - (own * gain) @ s["item"]
        root = factor(gram, self.ridge)
        theta = torch.cholesky_solve(paid[:, None], root).squeeze(1)  # (d,)
        explained, base = theta @ paid + (own * gain) @ gain, level + own * gain  # (), (N,)
        shift = s["item"] * own[: len(s["item"]), None]  # (N, d) what the intercepts explain of phi
        if self.hybrid:
            base = base - shift @ theta
        sigma = sigma_of(s, level, explained, self.noise)
        self.post = {
            "theta": theta, "root": root, "base": base, "own": own, "shift": shift, "sigma": sigma,
        }  # fmt: skip
        self.wide: dict[str, Tensor] = {}

    def mean(self, view: Pairs) -> Tensor:
        """Expected reward (B, N)."""
        theta, base = self.post["theta"][None], self.post["base"][None]
        return pair_scores(view, theta, self.features.apart, base).squeeze(1)

    def guess(self, x: Tensor, slate: Tensor) -> Tensor:
        """Expected reward (n, K) of items (n, K) with their vectors (n, K, d)."""
        return (x.double() @ self.post["theta"] + self.post["base"][slate.clamp(min=0)]).float()

    def width(self, view: Pairs) -> Tensor:
        """Standard deviation (B, N) of what is expected."""
        if not self.wide:  # asked for the first time since the last solve
            cov = torch.cholesky_inverse(self.post["root"])
            pull = self.post["shift"] @ cov  # (N, d)
            self.wide = {"cov": cov, "pull": pull, "fixed": (pull * self.post["shift"]).sum(dim=1)}
        square = pair_squares(view, self.wide["cov"], self.features.apart)
        if self.hybrid:
            alone = self.features.alone[:-1]  # (N, Q)
            cross = pair_products(view, self.wide["pull"], alone, self.features.apart)
            square = (square - 2.0 * cross + self.wide["fixed"].float()).clamp_(min=0.0)
            square = square + self.post["own"].float()
        return square.sqrt_() * self.post["sigma"].float()

    def draw(self, samples: int, scale: float, generator: torch.Generator) -> "SharedDraws":
        """Posterior draws of the weights, `scale` standard deviations wide."""
        p, spread = self.post, scale * self.post["sigma"]
        noise = torch.randn(len(p["theta"]), samples, generator=generator, dtype=torch.float64,
                            device=generator.device)  # fmt: skip
        step = torch.linalg.solve_triangular(p["root"].T, noise, upper=True).T  # (M, d)
        theta = p["theta"] + spread * step
        item = torch.randn(samples, len(p["own"]), generator=generator, dtype=torch.float64,
                           device=generator.device)  # fmt: skip
        # equal items are not told apart by their vectors: a speck of noise does it, never the id
        base = p["base"] + spread * (p["own"].sqrt() + SPECK) * item  # (M, N)
        if self.hybrid:
            base = base - spread * step @ p["shift"].T
        return SharedDraws(theta, base.float(), self.features.apart)

    def state_dict(self) -> dict[str, Any]:
        return {**saved(self), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.post = loaded(self, state)
        self.updates, self.wide = state["updates"], {}


class SharedDraws:
    """M posterior draws of a shared model."""

    def __init__(self, theta: Tensor, base: Tensor, q: int) -> None:
        self.theta, self.base, self.q = theta, base, q  # (M, d), (M, N)

    def scores(self, view: Pairs, first: int, last: int) -> Tensor:
        """What draws first..last promise of all items (B, m, N)."""
        return pair_scores(view, self.theta[first:last], self.q, self.base[first:last])


class DisjointRidge:
    """A theta of its own for every item over contexts x(s); memory N x dim^2."""

    kind = "disjoint"

    def __init__(
        self,
        spec: AgentSpec,
        *,
        dim: int,
        ridge: float,
        forget: float,
        refresh: int,
        noise: float | None,
    ) -> None:
        self.features = UserVectors(spec, Reader(spec, memory=False), dim=dim)
        self.ridge, self.forget, self.refresh, self.noise = ridge, forget, refresh, noise
        d, n = self.features.size, spec.num_items
        if n * d * d > LIMIT:
            most = int((LIMIT / n) ** 0.5)
            raise ValueError(
                f"features=disjoint keeps {n} matrices of {d} x {d} numbers, {n * d * d:,}, more "
                f"than {LIMIT:,}: dim={most} would fit, or use features=shared or hybrid"
            )
        self.sums = {
            name: torch.zeros(shape, dtype=torch.float64, device=spec.device)
            for name, shape in {
                "gram": (n, d, d), "paid": (n, d), "seen": (n, d), "count": (n,), "total": (n,),
                "square": (),
            }.items()
        }  # fmt: skip
        self.updates = 0
        inverse = torch.eye(d, dtype=torch.float64, device=spec.device).expand(n, d, d) / ridge
        still = torch.zeros(n, d, dtype=torch.float64, device=spec.device)
        # A^-1 and what it makes of the paid and the seen sums, as of the last solve
        self.post = {"inverse": inverse.clone(), "paid": still, "seen": still.clone()}
        self.narrow = inverse.float().flatten(1)  # (N, d * d) what scores are made from
        self.stale = torch.zeros(n, dtype=torch.bool, device=spec.device)
        self.finish()

    def view(self, obs: Observation) -> Any:
        """What `mean` and `width` need to know of B users: contexts (B, d)."""
        return self.features(obs)

    def vectors(self, obs: Observation, slate: Tensor) -> Tensor:
        """What is learnt from (B, K, d): the same context for each slot."""
        return self.features(obs)[:, None, :].expand(-1, slate.shape[1], -1)

    def learn(self, x: Tensor, slate: Tensor, reward: Tensor) -> None:
        """Add rewards (n, K) of items (n, K) with their vectors (n, K, d); EMPTY adds none."""
        real = slate.flatten() != EMPTY
        item = slate.flatten()[real]  # (m,)
        x = x.flatten(0, 1)[real].double()  # (m, d)
        r, sums = reward.flatten()[real].double(), self.sums
        if self.forget < 1.0:
            for value in sums.values():
                value.mul_(self.forget)
            self.stale.fill_(True)
        arms, rows = grouped(item, x)  # (G,), (G, W, d)
        sums["gram"][arms] += rows.transpose(1, 2) @ rows
        sums["paid"].index_add_(0, item, x * r[:, None])
        sums["seen"].index_add_(0, item, x)
        sums["count"].index_add_(0, item, torch.ones_like(r))
        sums["total"].index_add_(0, item, r)
        sums["square"] += r @ r
        clean = not self.stale.any()
        self.stale[arms] = True
        self.updates += 1
        if self.updates % self.refresh:
            return
        if clean and 2 * rows.shape[1] <= x.shape[1]:
            self.settle(arms, downdated(self.post["inverse"][arms], rows))
        else:
            self.solve()

    def solve(self) -> None:
        """The posterior of all that was added so far: a Cholesky for each item that changed."""
        arms = self.stale.nonzero().squeeze(1)
        self.settle(arms, torch.cholesky_inverse(factor(self.sums["gram"][arms], self.ridge)))

    def settle(self, arms: Tensor, inverse: Tensor) -> None:
        """Take over new A^-1 (G, d, d) of some items (G,)."""
        self.post["inverse"][arms] = inverse
        for name in ("paid", "seen"):
            self.post[name][arms] = (inverse @ self.sums[name][arms][:, :, None]).squeeze(2)
        self.narrow[arms] = inverse.flatten(1).float()
        self.stale[arms] = False
        self.finish()

    def finish(self) -> None:
        """What all items share: level, spread and, with them, the thetas."""
        s, post = self.sums, self.post
        level = level_of(s["count"], s["total"])
        theta = post["paid"] - level * post["seen"]  # (N, d)
        explained = (theta * (s["paid"] - level * s["seen"])).sum()
        post["level"], post["theta"] = level, theta
        post["sigma"] = sigma_of(s, level, explained, self.noise)

    def mean(self, view: Tensor) -> Tensor:
        """Expected reward (B, N)."""
        return view @ self.post["theta"].T.float() + self.post["level"].float()

    def guess(self, x: Tensor, slate: Tensor) -> Tensor:
        """Expected reward (n, K) of items (n, K) with their vectors (n, K, d)."""
        theta = self.post["theta"].float()[slate.clamp(min=0)]  # (n, K, d)
        return (x * theta).sum(dim=2) + self.post["level"].float()

    def width(self, view: Tensor) -> Tensor:
        """Standard deviation (B, N) of what is expected."""
        outer = (view[:, :, None] * view[:, None, :]).flatten(1)  # (B, d * d)
        square = (outer @ self.narrow.T).clamp_(min=0.0)  # one GEMM, no (B, N, d)
        return square.sqrt_() * self.post["sigma"].float()

    def draw(self, samples: int, scale: float, generator: torch.Generator) -> "DisjointDraws":
        """Posterior draws of what items are worth: for one user exactly those of their thetas.

        Items share nothing, so x theta of two items are independent for any x; how one item's
        draws for two users are tied does not matter, as users draw alone.
        """
        noise = torch.randn(samples, len(self.stale), generator=generator, device=generator.device)
        return DisjointDraws(self, scale * noise)

    def state_dict(self) -> dict[str, Any]:
        return {**saved(self), "stale": self.stale.clone(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.post = loaded(self, state)
        self.narrow = self.post["inverse"].float().flatten(1)
        self.stale = state["stale"].to(self.stale.device).clone()
        self.updates = state["updates"]


class DisjointDraws:
    """M posterior draws of a disjoint model, as standard deviations (M, N) from the mean."""

    def __init__(self, model: DisjointRidge, noise: Tensor) -> None:
        self.model, self.noise = model, noise

    def scores(self, view: Tensor, first: int, last: int) -> Tensor:
        """What draws first..last promise of all items (B, m, N)."""
        mean, width = self.model.mean(view), self.model.width(view)  # (B, N) each
        return torch.addcmul(mean[:, None, :], width[:, None, :], self.noise[first:last])


def saved(model: SharedRidge | DisjointRidge) -> dict[str, Any]:
    """Copies of what a model knows, that learning on does not change."""
    parts = {"sums": model.sums, "post": model.post}
    copies = {name: {n: v.clone() for n, v in part.items()} for name, part in parts.items()}
    return {"kind": model.kind, **copies}


def loaded(
    model: SharedRidge | DisjointRidge, state: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of saved sums and posterior, if they are of a model of this form."""
    if state["kind"] != model.kind or any(
        model.sums[name].shape != value.shape for name, value in state["sums"].items()
    ):
        raise ValueError(
            f"the checkpoint has a model of another form (features={state['kind']}, theta of "
            f"{tuple(state['sums']['paid'].shape)}; here features={model.kind}, "
            f"{tuple(model.sums['paid'].shape)}): build the agent with the features and dim it "
            "was trained with"
        )
    parts = (state["sums"], state["post"])
    device = model.sums["count"].device
    sums, post = ({n: v.to(device, copy=True) for n, v in part.items()} for part in parts)
    return sums, post


Ridge = SharedRidge | DisjointRidge
Draws = SharedDraws | DisjointDraws


def ridge_of(
    spec: AgentSpec,
    *,
    features: str,
    dim: int,
    ridge: float,
    forget: float,
    refresh: int,
    noise: float | None,
) -> Ridge:
    """The model that the settings name."""
    if features not in KINDS:
        raise ValueError(f"features must be one of {', '.join(KINDS)}, got {features!r}")
    positive(ridge=ridge, forget=forget)
    whole(1, dim=dim, refresh=refresh)
    if noise is not None:
        positive(noise=noise)
    if forget > 1.0:
        raise ValueError(f"forget must be in (0, 1], got {forget}: the share that an update keeps")
    if features == "disjoint":
        return DisjointRidge(
            spec, dim=dim, ridge=ridge, forget=forget, refresh=refresh, noise=noise
        )
    return SharedRidge(
        spec, dim=dim, ridge=ridge, forget=forget, refresh=refresh, noise=noise,
        hybrid=features == "hybrid",
    )  # fmt: skip


def learn_logged(model: Ridge, x: Tensor, slate: Tensor, reward: Tensor) -> dict[str, Tensor]:
    """Learn rewards (n, K) of items (n, K) with vectors (n, K, d); how well they were foreseen."""
    if not len(slate):
        return {}
    real = slate != EMPTY  # (n, K)
    miss = (model.guess(x, slate) - reward).square() * real
    model.learn(x, slate, reward)
    return {
        "train/loss": miss.sum() / real.sum().clamp(min=1),
        "bandit/sigma": model.post["sigma"].float(),
        "bandit/arms_touched": (model.sums["count"] > 0.0).sum().float(),
    }
