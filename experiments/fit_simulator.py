"""Fit users to a log, say how like the held-out part they are, and keep them.

python experiments/fit_simulator.py data=complete_journey
python experiments/fit_simulator.py data=tables data.config=my.yaml
python experiments/fit_simulator.py data=generated data.events=10000000   # what such a log costs
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # flat packages, installed or not

from experiments import cli

if __name__ == "__main__":
    sys.argv[1:] = cli.check("fit_simulator", __doc__, sys.argv[1:])  # before torch: at once

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.from_logs import (
    SPLIT,
    coverage_line,
    held_out_figures,
    households_to_fit,
    refuse_strangers,
    summary,
    with_levels,
)
from experiments.kinds import fits, refuse_targets, refuse_words
from experiments.run_folder import refuse_unwritable, writable_home
from simulators.base import Catalog, SimSpec
from simulators.catalog import catalog_from_logs, check_catalog, save_catalog
from simulators.exposed import ExposureSimulator
from simulators.exposure_calibration import calibration
from simulators.exposure_calibration import lines as said_of_answers
from simulators.fidelity import lines
from simulators.fitted import FittedSimulator
from simulators.prices import said as of_prices
from simulators.settings import check_settings
from sources.logs import Logs

NOT_THE_LOG = ("models", "repeats", "split")  # what a data yaml says for rank_baselines.py
SHOWN = "shown"  # the event of an impression


@dataclass(frozen=True)
class Cost:
    """What a stage took."""

    seconds: float
    memory: float  # GiB, the peak of the process by its end


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="fit_simulator")
def main(cfg: DictConfig) -> None:
    """Read, encode, fit, check, save."""
    with cli.plain_errors():
        sizes_checked(cfg)
        torch.set_num_threads(cfg.threads)
        costs: dict[str, Cost] = {}
        source = {k: v for k, v in cfg.data.items() if k not in NOT_THE_LOG}
        with measured("read", costs):
            logs: Logs = with_levels(instantiate(source))
        print("\n".join([summary(logs), *(f"  {note}" for note in logs.notes)]), flush=True)
        with measured("encode", costs):
            catalog = catalog_from_logs(
                logs, size=cfg.size, cut=cfg.cut, dim=cfg.dim, model=cfg.text, seed=cfg.seed,
                progress=cfg.progress, device="cpu",
            )  # fmt: skip
        print(coverage_line(logs, catalog), flush=True)
        users, said = fitted(cfg, logs, catalog, costs)
        print("\n".join(said))
        out = cfg.out or writable_home() / "runs" / cfg.data_name / "users"
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        users.save(folder / "users.pt")
        save_catalog(catalog, folder / "catalog.pt")
        kind = type(users).__name__
        print(
            f"{len(users.users)} starting points of users: {folder}\n"
            f"{kind}.load({str(folder / 'users.pt')!r}, "
            f"load_catalog({str(folder / 'catalog.pt')!r})) reads them back"
        )
        print("\n".join(cost_lines(costs)))


def fitted(
    cfg: DictConfig, logs: Logs, catalog: Catalog, costs: dict[str, Cost]
) -> tuple[Any, list[str]]:
    """Users fitted to what came before the cut, and what the rest of the log says of them."""
    spec = SimSpec(logs, catalog, "cpu", cfg.seed)
    if SHOWN in logs.events["behaviour"].cat.categories:  # answers to what was shown
        ours, others = logs.split_users(0.5, SPLIT)  # its figures are of users it has not seen
        of_ours = SimSpec(ours, catalog, "cpu", cfg.seed)
        with measured("fit", costs):
            shown = ExposureSimulator.fit(of_ours, epochs=cfg.epochs)
        with measured("check", costs):
            return shown, said_of_answers(calibration(shown, others, seed=cfg.seed))
    refuse_strangers(logs, catalog)
    with measured("fit", costs):
        spec = replace(spec, logs=households_to_fit(logs, catalog.as_of - cfg.window))
        users = FittedSimulator.fit(spec, window=cfg.window, epochs=cfg.epochs, hidden=cfg.hidden)
    with measured("check", costs):
        said = lines(held_out_figures(users, logs, catalog))
        return users, [*said, of_prices(users.habits.elasticity)]


@contextmanager
def measured(name: str, costs: dict[str, Cost]) -> Iterator[None]:
    """Note a stage's seconds, and the most memory this process has held by its end."""
    begun = time.perf_counter()
    yield
    costs[name] = Cost(time.perf_counter() - begun, peak_memory())


def peak_memory() -> float:
    """GiB that this process has held at most; nan where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def cost_lines(costs: dict[str, Cost]) -> list[str]:
    """What each stage took; what comes from the cache takes next to nothing."""
    parts = [f"{name} {c.seconds:.1f} s ({c.memory:.2f} GiB)" for name, c in costs.items()]
    return [f"took {', '.join(parts)}; in brackets the most memory held until then"]


def sizes_checked(cfg: DictConfig) -> None:
    """Refuse settings that are no numbers before the log is read."""
    source = OmegaConf.create({k: v for k, v in cfg.data.items() if k not in NOT_THE_LOG})
    refuse_targets(source, "data")
    refuse_words(source, "data")
    for keys, kinds, what in (
        (("size", "dim", "epochs", "hidden", "threads", "seed"), (int,), "a whole number"),
        (("cut", "window"), (float,), "a number"),
    ):
        for key in keys:
            if not fits(cfg[key], kinds):
                raise ValueError(f"{key} must be {what}, got {cfg[key]!r}")
    given = {name: cfg[name] for name in ("size", "dim", "cut", "window", "epochs", "hidden")}
    check_catalog(given)
    check_settings(given)
    refuse_unwritable(cfg.out, "out")


if __name__ == "__main__":
    main()
