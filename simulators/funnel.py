"""The chance of each answer to what is shown: logits end to end, fitted to a log of impressions.

The first behaviour has a small model of user and item features, f(user) . g(item), beside linear
terms. Each later behaviour is a logistic model given the answers before it (the chain rule: exact
for any funnel), so that its rate is the log's. Leaving is a hazard per impression; minutes or
money given the answers are log-linear with the residuals of the log (Duan, 1983).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce

LIMIT = 15.0  # of a logit: probabilities stay inside (0, 1) in float32
REACH = 6.0  # standard deviations a feature may be off before it counts as this far off
RANK = 8  # of f(user) . g(item)
BATCH = 2048
PARTS = 5  # of the expected log value, each with residuals of its own: they are no one shape
QUANTILES = 200  # of residuals
FEW = 50  # rows too few for residuals of their own
PULL = 100.0  # rows' worth of belief that a describing feature, of which there are many, is idle
FREE = 1.0  # the same for answers before and the session so far, which are few and matter


@dataclass(frozen=True)
class Design:
    """What the answers of n impressions were fitted from, all known before them."""

    user: np.ndarray  # (n, Pu) float32: the user, the place and the moment
    item: np.ndarray  # (n, Pi) float32
    cross: np.ndarray  # (n, Pc) float32: this user with this item, and the session so far
    after: np.ndarray  # (n, A) float32: the session with this answer, for leaving

    def __getitem__(self, rows: np.ndarray) -> "Design":
        return Design(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


@dataclass(frozen=True)
class Funnel:
    """All that is fitted, as tensors; F behaviours, features as in `Design`."""

    user_scale: Tensor  # (2, Pu) mean and standard deviation
    item_scale: Tensor  # (2, Pi)
    cross_scale: Tensor  # (2, Pc)
    after_scale: Tensor  # (2, A)
    user_in: Tensor  # (Pu + 1, hidden), the last row a constant's
    user_out: Tensor  # (hidden, RANK + 1)
    user_line: Tensor  # (Pu,)
    item_in: Tensor  # (Pi + 1, hidden)
    item_out: Tensor  # (hidden, RANK + 1)
    item_line: Tensor  # (Pi,)
    cross: Tensor  # (Pc,)
    bias: Tensor  # ()
    later: Tensor  # (F - 1, Pu + Pi + Pc + F + 1): user, item, cross, answers before, constant
    leave: Tensor  # (Pu + A + 1,)
    value: Tensor  # (Pu + Pi + F + 1,)
    edges: Tensor  # (4, PARTS - 1) of the expected log value, by the first two answers
    residual: Tensor  # (4, PARTS, QUANTILES) of log value, by answers and expected log value
    limits: Tensor  # (2,) what is added before the log is taken, and the largest value

    def to(self, device: str) -> "Funnel":
        return Funnel(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def of_users(self, user: Tensor) -> dict[str, Tensor]:
        """Features (B, Pu) to what every answer needs of a user, as (B, ...) tensors."""
        x, p = scaled(user, self.user_scale), user.shape[1]
        return {
            "first": tower(x, self.user_in, self.user_out, self.user_line),  # (B, RANK + 1)
            "later": exact(x, self.later[:, :p].T),  # (B, F - 1)
            "leave": exact(x, self.leave[:p]),  # (B,)
            "value": exact(x, self.value[:p]),  # (B,)
        }

    def of_items(self, item: Tensor) -> dict[str, Tensor]:
        """Features (N, Pi) to what every answer needs of an item, as (N, ...) tensors."""
        x, p = scaled(item, self.item_scale), len(self.user_line)
        inside = slice(p, p + item.shape[1])
        return {
            "first": tower(x, self.item_in, self.item_out, self.item_line),
            "later": exact(x, self.later[:, inside].T),
            "value": exact(x, self.value[inside]),
        }

    def first(self, user: Tensor, item: Tensor, cross: Tensor) -> Tensor:
        """Logits (...) of the first behaviour from "first" of both and cross features (..., Pc)."""
        x = scaled(cross, self.cross_scale)
        both = (user[..., 1:] * item[..., 1:]).sum(dim=-1, dtype=torch.float64).float()
        both = both + user[..., 0] + item[..., 0]
        return (both + exact(x, self.cross) + self.bias).clamp(-LIMIT, LIMIT)

    def rest(self, user: Tensor, item: Tensor, cross: Tensor) -> Tensor:
        """Logits (..., F - 1) of later behaviours, before the answers given so far are known."""
        answers, width = len(self.later) + 1, self.later.shape[1]
        start = len(self.user_line) + len(self.item_line)
        weight = self.later[:, start : width - answers - 1]  # (F - 1, Pc)
        x = scaled(cross, self.cross_scale)
        return user + item + exact(x, weight.T) + self.later[:, -1]

    def given(self, rest: Tensor, answers: Tensor, k: int) -> Tensor:
        """Logits (...) of behaviour k > 0 given answers (..., F), of which those before k count."""
        count = len(self.later) + 1
        weight = self.later[k - 1, -1 - count : -1]  # (F,), 0 from k on
        return (rest[..., k - 1] + exact(answers, weight)).clamp(-LIMIT, LIMIT)

    def chances(self, first: Tensor, rest: Tensor) -> Tensor:
        """Probabilities (..., F) of each behaviour, whatever the others: all chains are summed."""
        count = len(self.later) + 1
        chance = [first.sigmoid()]
        paths = [(torch.zeros(count, device=first.device), torch.ones_like(first))]
        for k in range(count):
            grown, total = [], torch.zeros_like(first)
            for answers, mass in paths:
                p = chance[0] if k == 0 else self.given(rest, answers, k).sigmoid()
                yes = answers.clone()
                yes[k] = 1.0
                grown += [(answers, mass * (1 - p)), (yes, mass * p)]
                total = total + mass * p
            if k:
                chance.append(total)
            paths = grown if k < count - 1 else []
        return torch.stack(chance, dim=-1)

    def hazard(self, user: Tensor, after: Tensor) -> Tensor:
        """Probability (B, K) to leave after each impression, from "leave" (B,), (B, K, A)."""
        x = scaled(after, self.after_scale)
        inside = slice(len(self.user_line), -1)
        return (user[:, None] + exact(x, self.leave[inside]) + self.leave[-1]).sigmoid()

    def worth(self, user: Tensor, item: Tensor, answers: Tensor, uniform: Tensor) -> Tensor:
        """Minutes or money (...) of answers (..., F), drawn by `uniform` (...)."""
        count = answers.shape[-1]
        mean = user + item + exact(answers, self.value[-1 - count : -1]) + self.value[-1]
        which = kind(answers)  # (...)
        level = (mean[..., None] > self.edges[which]).sum(dim=-1)  # (...)
        spread = self.residual[which, level, (uniform * QUANTILES).long().clamp_max(QUANTILES - 1)]
        small, top = self.limits
        return ((mean + spread).exp() - small).clamp(min=0.0).minimum(top)


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    return ((x - scale[0]) / scale[1]).clamp(-REACH, REACH)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight summed in float64: the same bits for a user alone as in a batch."""
    return (x.double() @ weight.double()).float()


def tower(x: Tensor, inner: Tensor, outer: Tensor, line: Tensor) -> Tensor:
    """Features (n, P) to (n, RANK + 1): a linear and a hidden part, and a direction."""
    wide = x.double()  # as in `exact`
    hidden = torch.relu(wide @ inner[:-1].double() + inner[-1]) @ outer.double()  # (n, RANK + 1)
    straight = wide @ line.double()  # (n,)
    return torch.cat([hidden[:, :1] + straight[:, None], hidden[:, 1:]], dim=1).float()


def kind(answers: Tensor) -> Tensor:
    """Which of the first two behaviours were answered (..., F), as a number 0 to 3."""
    first = answers[..., 0].long()
    return first if answers.shape[-1] == 1 else first + 2 * answers[..., 1].long()


def fit_funnel(
    design: Design,
    answers: np.ndarray,
    value: np.ndarray,
    inside: np.ndarray,
    leave: tuple[np.ndarray, np.ndarray],
    weight: np.ndarray,
    *,
    hidden: int,
    epochs: int,
    seed: int,
) -> Funnel:
    """Fit to n impressions weighted (n,): answers (n, F), values (n,) where `inside` (n,).

    `leave` holds who left after it and of whom that is known, (n,) bool each.
    """
    heavy = torch.from_numpy(weight).float()
    scales = {
        f"{f.name}_scale": _scale(torch.from_numpy(getattr(design, f.name)), heavy)
        for f in fields(design)
    }
    user, item, cross, after = (
        scaled(torch.from_numpy(getattr(design, f.name)), scales[f"{f.name}_scale"])
        for f in fields(design)
    )
    left, known = (torch.from_numpy(part) for part in leave)
    session = torch.cat([user, after], dim=1)[known]
    ends = _logistic(session, left[known].float(), heavy[known], free=after.shape[1])
    rows = torch.from_numpy(inside).nonzero().squeeze(1)  # (m,)
    user, item, cross, heavy = user[rows], item[rows], cross[rows], heavy[rows]
    given = torch.from_numpy(answers).float()[rows]  # (m, F)
    first = _fit_first(user, item, cross, given[:, 0], heavy, hidden, epochs, seed)
    wide = torch.cat([user, item, cross], dim=1)  # (m, P)
    count = given.shape[1]
    later = torch.zeros(count - 1, wide.shape[1] + count + 1)
    for k in range(1, count):
        found = _logistic(torch.cat([wide, given[:, :k]], dim=1), given[:, k], heavy, free=k)
        later[k - 1, : len(found) - 1], later[k - 1, -1] = found[:-1], found[-1]
    worth = _fit_value(user, item, given, torch.from_numpy(value)[rows], heavy)
    return Funnel(**scales, **first, later=later, leave=ends, **worth)


def _scale(x: Tensor, weight: Tensor) -> Tensor:
    share = (weight / weight.sum())[:, None]
    mean = (x * share).sum(dim=0)
    spread = ((x - mean).square() * share).sum(dim=0).sqrt()
    return torch.stack([mean, torch.where(spread > 1e-6, spread, 1.0)])  # constants become 0


def _minimise(loss: Callable[[], Tensor], weights: Tensor, steps: int = 100) -> None:
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=steps, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def _logistic(x: Tensor, y: Tensor, weight: Tensor, *, free: int) -> Tensor:
    """Logistic regression (P + 1,) whose last `free` coefficients are pulled little to 0.

    The last is the constant, which nothing pulls: the rate stays.
    """
    pull = torch.cat([torch.full((x.shape[1] - free,), PULL), torch.full((free,), FREE)])
    rate = ((weight * y).sum() + 0.5) / (weight.sum() + 1.0)
    found = torch.cat([torch.zeros(x.shape[1]), rate.logit()[None]]).requires_grad_()

    def loss() -> Tensor:
        logit = x @ found[:-1] + found[-1]
        fit = bce(logit, y, weight, reduction="sum") + (pull * found[:-1].square()).sum() / 2
        return fit / weight.sum()

    _minimise(loss, found)
    return found.detach()


def _fit_first(
    user: Tensor,
    item: Tensor,
    cross: Tensor,
    y: Tensor,
    weight: Tensor,
    hidden: int,
    epochs: int,
    seed: int,
) -> dict[str, Tensor]:
    """The tensors of the first behaviour: a logistic regression first, then all by Adam."""
    generator = torch.Generator().manual_seed(seed)
    linear = _logistic(torch.cat([user, item, cross], dim=1), y, weight, free=cross.shape[1])
    a, b = user.shape[1], user.shape[1] + item.shape[1]

    def layer(inputs: int, outputs: int) -> Tensor:
        return torch.randn(inputs, outputs, generator=generator) / inputs**0.5

    parts = [
        layer(a + 1, hidden), layer(hidden, RANK + 1) * 0.1, linear[:a].clone(),
        layer(b - a + 1, hidden), layer(hidden, RANK + 1) * 0.1, linear[a:b].clone(),
        linear[b:-1].clone(), linear[-1].clone(),
    ]  # fmt: skip
    for part in parts:
        part.requires_grad_()
    optimizer = torch.optim.AdamW(parts, lr=2e-3, weight_decay=0.05)

    def logit(rows: Tensor) -> Tensor:
        u = tower(user[rows], *parts[0:3])
        i = tower(item[rows], *parts[3:6])
        both = (u[:, 1:] * i[:, 1:]).sum(dim=1) + u[:, 0] + i[:, 0]
        return both + cross[rows] @ parts[6] + parts[7]

    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = bce(logit(rows), y[rows], weight[rows], reduction="sum") / len(rows)
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        whole = torch.cat([logit(rows) for rows in torch.arange(len(y)).split(65_536)])
        parts[7] += _shift(whole, y, weight)
    names = (
        "user_in",
        "user_out",
        "user_line",
        "item_in",
        "item_out",
        "item_line",
        "cross",
        "bias",
    )
    return {name: part.detach() for name, part in zip(names, parts, strict=True)}


def _shift(logit: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """What to add to logits (n,) so that they promise as many answers as there were."""
    wanted = (weight * y).sum()
    shift = torch.zeros((), dtype=torch.float64)
    for _ in range(50):  # Newton's steps, which a flat slope must not throw far
        p = (logit.double() + shift).sigmoid()
        slope = (weight * p * (1 - p)).sum().clamp_min(1e-3)
        shift = shift + ((wanted - (weight * p).sum()) / slope).clamp(-1.0, 1.0)
    return shift.float()


def _fit_value(
    user: Tensor, item: Tensor, answers: Tensor, value: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    """Weights of the log value, edges, residuals and limits; nought where none is above 0."""
    rows = (answers.any(dim=1) & (value >= 0)).nonzero().squeeze(1)
    paid = value[rows]
    width = user.shape[1] + item.shape[1] + answers.shape[1] + 1
    edges, residual = torch.zeros(4, PARTS - 1), torch.zeros(4, PARTS, QUANTILES)
    if not (paid > 0).any():
        limits = torch.tensor([1.0, 0.0])
        return {"value": torch.zeros(width), "edges": edges, "residual": residual, "limits": limits}
    small = 0.01 * float(paid[paid > 0].median())
    target = (paid + small).log()  # (m,) float64
    x = torch.cat([user, item, answers], dim=1)[rows].double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    heavy = weight[rows].double()
    prior = torch.full((width,), PULL, dtype=torch.float64)
    prior[-1 - answers.shape[1] :] = FREE
    prior[-1] = 1e-6
    gram = x.T @ (x * heavy[:, None]) + prior.diag()
    found = torch.linalg.solve(gram, x.T @ (heavy * target))  # (width,)
    mean = x @ found
    miss, which = target - mean, kind(answers[rows])
    share = torch.arange(1, PARTS, dtype=torch.float64) / PARTS
    at = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    whole = _quantiles(miss, heavy, at)
    for k in range(4):
        of_kind = which == k
        if of_kind.any():
            edges[k] = _quantiles(mean[of_kind], heavy[of_kind], share)
        level = (mean[:, None] > edges[k].double()).sum(dim=1)  # (m,)
        for part in range(PARTS):
            here = of_kind & (level == part)
            enough = float(heavy[here].sum()) >= FEW
            residual[k, part] = _quantiles(miss[here], heavy[here], at) if enough else whole
    limits = torch.tensor([small, float(paid.max())])
    return {"value": found.float(), "edges": edges, "residual": residual, "limits": limits}


def _quantiles(x: Tensor, weight: Tensor, at: Tensor) -> Tensor:
    """Quantiles of weighted x (n,) at shares `at` (q,)."""
    order = x.argsort()
    share = weight[order].cumsum(0) / weight.sum()
    return x[order][torch.searchsorted(share, at).clamp_max(len(x) - 1)]
