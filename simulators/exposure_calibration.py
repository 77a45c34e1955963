"""Are the simulated answers as frequent as the logged ones? On other users, after the cut."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from encoders.state import EMPTY
from simulators.exposed import ExposureSimulator
from simulators.exposure_features import design
from simulators.fit import moment
from simulators.impressions import Impressions, impressions_from_logs
from sources.logs import Logs

CHANCES = 20  # draws of what the calibration error of true chances would be
BINS = 10  # of equally many impressions for the calibration error; deciles of users' activity
FEW = 30  # answers too few to say how well a decile is met


@dataclass(frozen=True)
class Promised:
    """m impressions of the catalogue after the cut, and what the simulator expects of them."""

    read: Impressions  # of the whole log
    rows: np.ndarray  # (m,) of `read`
    chance: np.ndarray  # (m, F) of each behaviour, whatever the others
    leave: np.ndarray  # (m,) of leaving after the impression
    of_user: torch.Tensor  # (m, ...) for what an answer is worth
    of_item: torch.Tensor

    @property
    def user(self) -> np.ndarray:
        return np.asarray(self.read.user[self.rows])

    @property
    def answers(self) -> np.ndarray:
        return np.asarray(self.read.answers[self.rows])

    def worth(self, simulator: ExposureSimulator, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Which rows (a,) of the m were answered, and a value drawn for each of them."""
        some = np.flatnonzero(self.answers.any(axis=1))
        uniform = torch.from_numpy(np.random.default_rng(seed).random(len(some))).float()
        at, given = torch.from_numpy(some), torch.from_numpy(self.answers[some]).float()
        funnel = simulator.funnel.to("cpu")
        drawn = funnel.worth(self.of_user[at], self.of_item[at], given, uniform)
        return some, drawn.double().numpy()


@torch.no_grad()
def promised(simulator: ExposureSimulator, logs: Logs) -> Promised:
    """What `simulator` expects of the impressions of `logs` after its cut."""
    catalog = simulator.catalog
    read = impressions_from_logs(logs, catalog.ids, **simulator.reading)
    rows = np.flatnonzero((read.time >= catalog.as_of) & (read.item != EMPTY))
    if len(rows) < BINS:
        raise ValueError(
            f"{logs.name}: {len(rows)} impressions of the catalogue on or after "
            f"{moment(catalog.as_of):%Y-%m-%d} are too few to compare rates on ({BINS}): pass the "
            "whole log of users held out, not only what comes before the cut"
        )
    items = simulator.items.cpu()[read.item[rows]].numpy()
    category = catalog.category.cpu().numpy()
    features = design(simulator.encoding, read, rows, logs.users, category, items)
    funnel = simulator.funnel.to("cpu")
    of_user = funnel.of_users(torch.from_numpy(features.user))
    of_item = funnel.of_items(torch.from_numpy(features.item))
    cross = torch.from_numpy(features.cross)
    first = funnel.first(of_user["first"], of_item["first"], cross)
    rest = funnel.rest(of_user["later"], of_item["later"], cross)
    after = torch.from_numpy(features.after)[:, None]
    leave = funnel.hazard(of_user["leave"], after)[:, 0].double().numpy()
    chance = funnel.chances(first, rest).double().numpy()
    return Promised(read, rows, chance, leave, of_user["value"], of_item["value"])


def calibration(simulator: ExposureSimulator, logs: Logs, *, seed: int = 0) -> dict[str, Any]:
    """Compare promised with logged rates on impressions of `logs` after the fit's cut.

    `logs` should hold none of the users that were fitted to; what they did before the cut is only
    what is known of them. Per behaviour, whatever the others: logged `rate` and `predicted`, `ece`
    and its share of the rate, log loss and that of the fit's constant rate, and `deciles` of users
    by impressions before the cut. So too leaving ("leave"); of minutes or money ("value") means.
    """
    found = promised(simulator, logs)
    read, rows, chance, leave = found.read, found.rows, found.chance, found.leave
    rng = np.random.default_rng(seed)
    user = read.user[rows]
    decile = activity(user, read.user[read.time < simulator.catalog.as_of], rng)
    answers, known = found.answers, simulator.encoding.rate
    figures: dict[str, Any] = {
        name: compared(answers[:, k], chance[:, k], float(known[k]), user, decile, rng)
        for k, name in enumerate(read.behaviours)
    }
    ended = read.ended[rows]
    last = read.last[rows][ended]
    figures["leave"] = compared(
        last, leave[ended], float(last.mean()), user[ended], decile[ended], rng
    )
    some, drawn = found.worth(simulator, seed)
    figures["value"] = _values(read.value[rows][some], drawn)
    return {"impressions": len(rows), "users": len(np.unique(user)), "behaviours": figures}


def activity(user: np.ndarray, known: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The decile (m,) of each row's user by how often the user is in `known`; ties are drawn."""
    users, back = np.unique(user, return_inverse=True)
    count = np.bincount(known, minlength=users[-1] + 1)[users]
    order = np.lexsort((rng.random(len(users)), count))
    rank = np.empty(len(users), np.int64)
    rank[order] = np.arange(len(users))
    return np.asarray((rank * BINS // len(users))[back])


def compared(
    y: np.ndarray,
    p: np.ndarray,
    constant: float,
    user: np.ndarray,
    decile: np.ndarray,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Answers (m,) bool of users (m,) against their chances (m,) and against a constant one."""
    rate = float(y.mean())
    order = np.array_split(np.argsort(p, kind="stable"), BINS)
    ece = calibration_error(y, p, order)
    chance = [calibration_error(rng.random(len(p)) < p, p, order) for _ in range(CHANCES)]
    groups = [(decile == d).nonzero()[0] for d in range(BINS)]
    deciles = [
        means(y, p, part) | {"decile": d, "error": clustered_error(y[part], user[part])}
        for d, part in enumerate(groups)
        if len(part)
    ]
    off = [abs(d["predicted"] / d["rate"] - 1) for d in deciles if d["answers"] >= FEW]
    return {
        "rate": rate,
        "error": clustered_error(y, user),
        "answers": int(y.sum()),
        "predicted": float(p.mean()),
        "ece": ece,
        "ece_share": ece / rate if rate else float("nan"),
        "ece_by_chance": float(np.mean(chance)),
        "log_loss": log_loss(y, p),
        "log_loss_constant": log_loss(y, np.full(len(y), constant)),
        "worst_decile": max(off, default=float("nan")),
        "bins": [means(y, p, part) for part in order],
        "deciles": deciles,
    }


def calibration_error(y: np.ndarray, p: np.ndarray, bins: list[np.ndarray]) -> float:
    """Mean distance of logged and promised rates over bins, by their rows."""
    return float(sum(abs((p[part] - y[part]).sum()) for part in bins) / len(y))


def means(y: np.ndarray, p: np.ndarray, part: np.ndarray) -> dict[str, float]:
    """Size, answers and rates of some rows."""
    return {"rows": len(part), "answers": int(y[part].sum()), "rate": float(y[part].mean()),
            "predicted": float(p[part].mean())}  # fmt: skip


def clustered_error(y: np.ndarray, user: np.ndarray) -> float:
    """Standard error of the mean of y (m,): answers of one user go together."""
    residual = np.bincount(np.unique(user, return_inverse=True)[1], y - y.mean())
    return float(np.sqrt(np.square(residual).sum()) / len(y))


def log_loss(y: np.ndarray, p: np.ndarray) -> float:
    p = p.clip(1e-9, 1 - 1e-9)
    return float(-np.where(y, np.log(p), np.log1p(-p)).mean())


def _values(value: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """Mean and quantiles of the value of answered impressions, and of those drawn for the same."""
    figures = {"mean": float(value.mean()), "predicted": float(drawn.mean())}
    for share in (0.1, 0.5, 0.9):
        figures[f"q{share:g}"] = float(np.quantile(value, share))
        figures[f"predicted_q{share:g}"] = float(np.quantile(drawn, share))
    return figures


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures in words, a behaviour a line."""
    said = [
        f"held out: {figures['impressions']} impressions of {figures['users']} users after the cut"
    ]
    for name, f in figures["behaviours"].items():
        if name == "value":
            said.append(f"  value: mean {f['mean']:.3f} logged, {f['predicted']:.3f} predicted")
            continue
        said.append(
            f"  {name}: {f['rate']:.4f} logged, {f['predicted']:.4f} predicted; calibration error "
            f"{f['ece_share']:.1%} of the rate ({f['ece_by_chance'] / max(f['rate'], 1e-12):.1%} "
            f"by chance); log loss {f['log_loss']:.4f}, of a constant {f['log_loss_constant']:.4f}"
        )
    return said
