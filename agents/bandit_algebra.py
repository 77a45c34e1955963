"""Pure functions of ridge regression that is kept up to date, (G, ...) models at once."""

import torch
from torch import Tensor

SMALL = 1e-6  # sigma where every reward was the same: draws still have to differ


def factor(gram: Tensor, ridge: float) -> Tensor:
    """Lower L (..., d, d) of ridge I + gram = L L'."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky(gram + ridge * eye)


def level_of(count: Tensor, total: Tensor) -> Tensor:
    """How often (N,) and how much (N,) items paid, to the mean () over items, n / (n + 1) each."""
    weight = 1.0 / (count + 1.0)
    return (total * weight).sum() / (count * weight).sum().clamp(min=1e-12)


def sigma_of(
    sums: dict[str, Tensor], level: Tensor, explained: Tensor, noise: float | None
) -> Tensor:
    """Sigma () of the posterior: what theta leaves of the rewards' squares, or the given noise.

    A normal-inverse-gamma posterior whose prior is one reward of the spread of all.
    """
    count = sums["count"].sum()
    squares = sums["square"] - 2.0 * level * sums["total"].sum() + count * level.square()
    left = (squares - explained).clamp(min=0.0)
    sigma = ((squares / count.clamp(min=1e-12) + left) / (1.0 + count)).clamp(min=0.0).sqrt()
    sigma = torch.where(count > 0, sigma.clamp(min=SMALL), 1.0)
    return sigma if noise is None else torch.full_like(sigma, noise)


def grouped(item: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (m, d) of items (m,) to the items there are (G,) and their rows (G, W, d), 0-padded."""
    arms, group, count = item.unique(return_inverse=True, return_counts=True)
    order = group.argsort(stable=True)  # (m,)
    start = count.cumsum(0) - count  # (G,)
    place = torch.arange(len(item), device=item.device) - start[group[order]]  # (m,)
    rows = x.new_zeros(len(arms), int(count.max()) if len(item) else 0, x.shape[1])
    rows[group[order], place] = x[order]
    return arms, rows


def downdated(inverse: Tensor, rows: Tensor) -> Tensor:
    """(A + rows' rows)^-1 from A^-1 (G, d, d) and rows (G, W, d) (Woodbury, 1950)."""
    v = rows @ inverse  # (G, W, d)
    eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    half = torch.linalg.solve_triangular(
        torch.linalg.cholesky(eye + v @ rows.transpose(1, 2)), v, upper=False
    )  # (G, W, d)
    return torch.baddbmm(inverse, half.transpose(1, 2), half, alpha=-1.0)
