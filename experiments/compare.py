"""Train what learns, judge it beside static recommenders, and write one report of it all.

python experiments/compare.py env=ecommerce agents=[dqn,ease,als,sasrec,item_knn,popularity] seeds=5
python experiments/compare.py env=ecommerce runs=FOLDER    # of runs that are over
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # flat packages, installed or not

from experiments import cli

if __name__ == "__main__":
    sys.argv[1:] = cli.check("compare", __doc__, sys.argv[1:])  # before torch: at once

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hydra
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from agents.base import Agent
from evaluation.compared import band
from evaluation.comparison_page import comparison_page
from experiments.arena import CURVE_SESSIONS
from experiments.compared_checks import checked, comparison_folder, options_known, plausible
from experiments.compared_parts import (
    ab_test,
    assumed,
    best_static,
    differences,
    exposure,
    new_items,
    newcomers,
    policy_rows,
    ranking_of,
    replays,
    sensitivity,
)
from experiments.compared_play import ORACLE, Played, households, play_all
from experiments.compared_runs import (
    Run,
    alone,
    optioned,
    over,
    runs_in,
    train_all,
    training_configs,
)
from experiments.compared_words import told_sessions
from experiments.policies import agent_config, agent_spec
from experiments.prepare import Worlds, prepare
from experiments.run_folder import commit, stage, versions, write_json, write_text
from simulators.fidelity import lines as fidelity_lines

RANKED = "of what held-out trips bought, all items ranked at the trip's beginning"


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="compare")
def main(cfg: DictConfig) -> None:
    """Train, play, judge, and say where the report is."""
    with cli.plain_errors():
        device = checked(cfg)
        names = list(dict.fromkeys(agent_config(name)[0] for name in cfg.agents))
        options_known(cfg, names)
        folder = comparison_folder(cfg)
        given = runs_in(Path(cfg.runs), cfg.env) if cfg.runs else []
        learners = to_train(cfg, names, given)
        for config in training_configs(cfg, learners, folder):
            over(config)  # a folder that holds another run is refused now
        seconds: dict[str, float] = {}
        with stage("prepare", seconds):
            worlds = prepare(cfg, device)
        torch.set_num_threads(cfg.threads)
        plausible(cfg, worlds)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"runs and report in {folder}", flush=True)
        with alone(folder):
            with stage("train", seconds):
                agents, runs = policies(cfg, worlds, names, learners, given, folder, device)
            report = compared(cfg, worlds, agents, runs, seconds)
            write_json(folder / "comparison.json", report)
            write_text(folder / "report.html", comparison_page(report))
        print("\n".join(["", *table(report), "", f"report: {folder / 'report.html'}"]))


def to_train(cfg: DictConfig, names: list[str], given: list[Run]) -> list[str]:
    """Those of the policies that learn; where runs are given, they must be of all of them."""
    trained = {run.policy for run in given}
    learners = [
        name for name in names
        if name not in trained
        and getattr(hydra.utils.get_class(optioned(cfg, name)._target_), "learns", True)
    ]  # fmt: skip
    if learners and cfg.runs:
        raise ValueError(
            f"runs={cfg.runs} holds no run of {', '.join(learners)}: train them, or leave them out "
            f"with agents=[{','.join(n for n in names if n not in learners)}]"
        )
    return learners


def policies(
    cfg: DictConfig, worlds: Worlds, names: list[str], learners: list[str], given: list[Run],
    folder: Path, device: str,
) -> tuple[dict[str, list[Agent]], list[Run]]:  # fmt: skip
    """Every policy, those that learn once for each seed; static ones are fitted once."""
    spec = agent_spec(cfg, worlds, device)
    trained = {run.policy for run in given}
    configs = {name: optioned(cfg, name) for name in names if name not in trained}
    static = {}
    with ThreadPoolExecutor(1) as side:  # it waits for processes: static policies are fitted here
        training = side.submit(train_all, cfg, learners, folder) if not given else None
        for name in (n for n in configs if n not in learners):
            print(f"fit {name}", flush=True)
            static[name] = hydra.utils.instantiate(configs[name], spec)
        runs = training.result() if training else given
    catalog = worlds.train.catalog
    found: dict[str, list[Agent]] = {}
    for run in runs:
        found.setdefault(run.policy, []).append(run.agent(spec, catalog))
    return {**found, **{name: [agent] for name, agent in static.items()}}, runs


def compared(
    cfg: DictConfig,
    worlds: Worlds,
    agents: dict[str, list[Agent]],
    runs: list[Run],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """All parts of the report."""
    learners = [name for name, seeds in agents.items() if getattr(seeds[0], "learns", True)]
    statics = [name for name in agents if name not in learners]
    vectors = worlds.events.vectors
    assert vectors is not None  # prepare gives them
    with stage("play", seconds):
        played = play_all(cfg, worlds.test, agents, vectors, cfg.eval_users, "play")
        who = households(cfg, worlds.test, cfg.eval_users)
    baseline = best_static(played, statics or [n for n in played if n != ORACLE])
    with stage("rank", seconds):
        ranked = ranking_of(cfg, worlds, agents)
    with stage("replay", seconds):
        replayed = replays(cfg, worlds, agents)
    rows = policy_rows(worlds, learners, played, who, ranked, replayed)
    with stage("newcomers", seconds):
        strangers = newcomers(cfg, worlds, agents, played, baseline)
    with stage("sensitivity", seconds):
        signs = sensitivity(cfg, worlds, agents, baseline) if cfg.sensitivity else None
    with stage("off-policy", seconds):
        judged = valued(cfg, worlds, agents, runs, learners)
    for row in rows:
        row["ope"] = judged["values"].get(row["policy"])
    told = {name: agents[name][0] for name in dict.fromkeys([*learners[:1], baseline])}
    return {
        **heading(cfg, worlds, agents, learners, runs),
        "baseline": baseline,
        "households": len(np.unique(who)),
        "curves": curves(runs),
        "levels": levels(played, statics),
        "policies": rows,
        "differences": differences(played, who, baseline),
        "sensitivity": signs,
        "new_users": strangers,
        "new_items": new_items(worlds, played, ranked),
        "exposure": exposure(worlds, played),
        "ab": ab_test(played, baseline),
        "sessions_told": told_sessions(cfg, worlds.test[0], told, vectors),
        "ranking": {"what": RANKED, "k": cfg.replay_items} if ranked else None,
        "off_policy": {k: judged[k] for k in ("notes", "baseline")} if judged["notes"] else None,
        "seconds": {**worlds.seconds, **seconds},
    }


def valued(
    cfg: DictConfig,
    worlds: Worlds,
    agents: dict[str, list[Agent]],
    runs: list[Run],
    learners: list[str],
) -> dict[str, Any]:
    """Off-policy values on the log of the first learner that left one; or why there are none."""
    if not cfg.off_policy:
        return {"values": {}, "notes": [], "baseline": None}
    logged = [r for r in runs if r.policy in learners and (r.folder / "decisions").is_dir()]
    why = ""
    if worlds.train.users.past.device.type != "cpu":
        why = "No off-policy values: logs are judged on the CPU, give device=cpu for them."
    elif not logged:
        why = "No off-policy values: no learner left a decision log (frozen_users)."
    if why:
        return {"values": {}, "notes": [why], "baseline": None}
    from experiments.compared_logs import off_policy

    found = off_policy(cfg, logged[0], {name: seeds[0] for name, seeds in agents.items()})
    if worlds.replay is not None:
        found["notes"].append(
            "The shop's own log holds what was bought, not what was shown: no policy can be valued "
            "from it."
        )
    return found


def heading(
    cfg: DictConfig,
    worlds: Worlds,
    agents: dict[str, list[Agent]],
    learners: list[str],
    runs: list[Run],
) -> dict[str, Any]:
    """What was compared, with what, on what."""
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    left = ("progress", "out_dir", "env_name")
    return {
        "title": f"{', '.join(agents)} in env={cfg.env_name}",
        "env": cfg.env_name,
        "command": " ".join(["python", "experiments/compare.py", *sys.argv[1:]]),
        "made": time.strftime("%Y-%m-%d"),
        "commit": commit()[:10],
        "slate_size": cfg.env.session.slate_size,
        "seeds": max((len(agents[name]) for name in learners), default=0),
        "sessions": cfg.eval_users,
        "simulators": len(worlds.test),
        "learners": learners,
        "statics": [name for name in agents if name not in learners],
        "notes": notes(cfg, worlds, learners, runs),
        "assumptions": assumed(cfg, worlds),
        "fidelity": fidelity_lines(worlds.fidelity) if worlds.fidelity else [],
        "data": worlds.notes,
        "settings": {k: v for k, v in settings.items() if k not in left},
        "versions": versions(),
    }


def curves(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Interquartile mean over the seeds of each learner, with its band, where all were judged."""
    found = {}
    for name in dict.fromkeys(run.policy for run in runs):
        parts = [run.curve() for run in runs if run.policy == name]
        steps = [tuple(step.tolist()) for step, _ in parts]
        common = sorted(set(steps[0]).intersection(*steps[1:]))
        if not common:
            continue
        pick = [[value[step.tolist().index(s)] for s in common] for step, value in parts]
        middle, low, high = band(np.array(pick)[None])
        found[name] = {"step": common, "iqm": middle, "low": low, "high": high,
                       "seeds": len(parts)}  # fmt: skip
    return found


def levels(played: dict[str, Played], statics: list[str]) -> dict[str, float]:
    """Where static policies lie among the curves: in the same sessions of the same simulator."""
    return {name: float(played[name].reward[:, 0, :CURVE_SESSIONS].mean()) for name in statics}


def notes(cfg: DictConfig, worlds: Worlds, learners: list[str], runs: list[Run]) -> list[str]:
    """What a reader must know before the first number."""
    said = [
        "All users but those of replayed trips are simulated. The judging simulators were fitted "
        "to other households than learners trained on, but are of the same kind; static policies "
        "were fitted to the purchases of all households before the cut."
    ]
    if worlds.replay is None:
        said = [
            "All users are invented: no log stands behind this environment, and nothing here is "
            "checked against one."
        ]
    if not len(worlds.events.user):
        said.append("Nothing was bought before: static policies had nothing to be fitted on.")
    if len(worlds.test) == 1:
        said.append("One judging simulator: how unsure it is itself is in no interval.")
    few = [name for name in learners if sum(run.policy == name for run in runs) < 3]
    if few:
        said.append(f"Fewer than three training seeds of {', '.join(few)}: another could differ.")
    return said


def table(report: dict[str, Any]) -> list[str]:
    """The main numbers as aligned text."""
    base, gaps = report["baseline"], {g["policy"]: g for g in report["differences"]}
    cells = [["policy", "reward", "95 % interval", f"to {base}", "95 % interval", "said"]]
    for row in report["policies"]:
        gap = gaps.get(row["policy"])
        cells.append([
            row["policy"], f"{row['reward']:.4f}",
            f"{row['reward_low']:.4f} to {row['reward_high']:.4f}",
            f"{gap['difference']:+.4f}" if gap else "",
            f"{gap['low']:+.4f} to {gap['high']:+.4f}" if gap else "",
            gap["claim"] if gap and row["policy"] != ORACLE else "",
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join(c.ljust(w) if i in (0, 5) else c.rjust(w)
                      for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in cells]  # fmt: skip


if __name__ == "__main__":
    main()
