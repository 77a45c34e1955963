"""Fit users to a log, say how like the held-out part they are, and keep them.

python experiments/fit_simulator.py data=complete_journey
python experiments/fit_simulator.py data=tables data.config=my.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # flat packages, installed or not

from experiments import cli

if __name__ == "__main__":
    sys.argv[1:] = cli.check("fit_simulator", __doc__, sys.argv[1:])  # before torch: at once

from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.from_logs import SPLIT, coverage_line, held_out_figures, summary, with_levels
from experiments.run_folder import writable_home
from simulators.base import Catalog, SimSpec
from simulators.catalog import catalog_from_logs, save_catalog
from simulators.exposed import ExposureSimulator
from simulators.exposure_calibration import calibration
from simulators.exposure_calibration import lines as said_of_answers
from simulators.fidelity import lines
from simulators.fitted import FittedSimulator
from sources.logs import Logs

NOT_THE_LOG = ("models", "repeats", "split")  # what a data yaml says for rank_baselines.py
SHOWN = "shown"  # the event of an impression


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="fit_simulator")
def main(cfg: DictConfig) -> None:
    """Read, encode, fit, check, save."""
    with cli.plain_errors():
        torch.set_num_threads(cfg.threads)
        source = {k: v for k, v in cfg.data.items() if k not in NOT_THE_LOG}
        logs: Logs = with_levels(instantiate(source))
        print("\n".join([summary(logs), *(f"  {note}" for note in logs.notes)]), flush=True)
        catalog = catalog_from_logs(
            logs, size=cfg.size, cut=cfg.cut, dim=cfg.dim, model=cfg.text, seed=cfg.seed,
            progress=cfg.progress, device="cpu",
        )  # fmt: skip
        print(coverage_line(logs, catalog), flush=True)
        users, said = fitted(cfg, logs, catalog)
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


def fitted(cfg: DictConfig, logs: Logs, catalog: Catalog) -> tuple[Any, list[str]]:
    """Users fitted to what came before the cut, and what the rest of the log says of them."""
    spec = SimSpec(logs, catalog, "cpu", cfg.seed)
    if SHOWN in logs.events["behaviour"].cat.categories:  # answers to what was shown
        ours, others = logs.split_users(0.5, SPLIT)  # its figures are of users it has not seen
        shown = ExposureSimulator.fit(SimSpec(ours, catalog, "cpu", cfg.seed), epochs=cfg.epochs)
        return shown, said_of_answers(calibration(shown, others, seed=cfg.seed))
    users = FittedSimulator.fit(spec, window=cfg.window, epochs=cfg.epochs, hidden=cfg.hidden)
    return users, lines(held_out_figures(users, logs, catalog))


if __name__ == "__main__":
    main()
