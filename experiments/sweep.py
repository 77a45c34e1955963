"""Several runs of train_agent.py by Hydra's --multirun: one folder, one report at the end."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from experiments import gym_results
from experiments.cli import CONF, load
from experiments.run_folder import ROOT, writable_home

SWEEP = "RECPLAY_SWEEP"  # where the runs of this sweep go: set once, known to all its jobs


class Sweep(Callback):
    """Hydra's callback: name the folder before the first job, write the report after the last."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        given = config.get("run_dir")  # of all runs together: each gets a folder in it
        os.environ.setdefault(SWEEP, str(given or writable_home() / "runs" / f"sweep-{stamp}"))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        place = Path(os.environ.pop(SWEEP))
        for folder in sorted(p for p in place.glob("*") if p.is_dir()):  # one for each env
            if config.env.get("id"):
                print("\n".join(["", *gym_results.lines(gym_results.results(folder))]))
                continue
            swept = [w for w in config.hydra.overrides.task if "env." in w and "," in bare(w)]
            if swept:
                print(f"no report: {' '.join(swept)} makes other environments, which have one each")
                continue
            words = report_command(folder, config)
            print(f"\n+ {' '.join(words)}", flush=True)
            subprocess.run([sys.executable, *words[1:]], check=False)


def report_command(folder: Path, config: DictConfig) -> list[str]:
    """The command that reports on all runs of one environment."""
    sources = [s for s in config.hydra.runtime.config_sources if s.schema == "file"]
    plug = [s.path for s in sources if Path(s.path).resolve() != CONF]
    known = {*load([CONF], "compare")} - {"env", "seed", "agents", "runs", "out_dir"}
    typed = [
        word for word in config.hydra.overrides.task
        if (word.lstrip("+").startswith("env.") or word.partition("=")[0] in known)
        and "," not in bare(word)  # what was swept stands in each run's own configuration
    ]  # fmt: skip
    return [
        "python", str(ROOT / "experiments" / "compare.py"),
        *(w for path in plug for w in ("--config-dir", path)),
        f"env={folder.name}", f"runs={folder}", f"out_dir={folder}",
        "agents=[popularity,buy_again,item_knn,ease,random]", *typed,
    ]  # fmt: skip


def bare(word: str) -> str:
    """A typed word without its lists: a comma left over is a sweep."""
    return re.sub(r"\[.*\]|\(.*\)|\{.*\}", "", word)


def sweep_folder(cfg: DictConfig) -> str | None:
    """Where this job of a sweep goes; None outside a sweep."""
    if not HydraConfig.initialized() or SWEEP not in os.environ:
        return None
    return f"{os.environ[SWEEP]}/{cfg.env_name}/{cfg.agent_name}-{HydraConfig.get().job.num}"
