"""One table over finished runs in Gymnasium environments: each agent over its seeds.

python experiments/gym_results.py RUNS_FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # flat packages, installed or not

USAGE = "usage: python experiments/gym_results.py FOLDER   (one that holds run folders)"


def results(folder: Path) -> list[dict[str, Any]]:
    """A row for each environment and agent: seeds, their mean and its 95 % interval (Student)."""
    import yaml

    runs: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.rglob("result.json")):
        config = yaml.safe_load((path.parent / "config.yaml").read_text())
        if not config["env"].get("id"):
            continue
        done = json.loads(path.read_text())
        key = (config["env"]["id"], done["agent"])
        seeds = runs.setdefault(key, {})
        if done["seed"] in seeds:
            raise ValueError(
                f"two runs of {key[1]} with seed {done['seed']} in {key[0]}, one of them is "
                f"{path.parent}: give a folder with one run a seed"
            )
        seeds[done["seed"]] = done
    if not runs:
        raise ValueError(
            f"{folder} holds no finished run of env=gym: expected folders with config.yaml and "
            "result.json"
        )
    return [row(env, agent, seeds) for (env, agent), seeds in runs.items()]


def row(env: str, agent: str, seeds: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Over seeds: of the last policy, and of the best evaluation on the way."""
    last = [reward_of(done, agent) for done in seeds.values()]
    best = [done["best_eval"]["value"] for done in seeds.values() if done.get("best_eval")]
    any_run = next(iter(seeds.values()))
    others = {r["policy"]: r["mean_reward"] for r in any_run["table"] if r["policy"] != agent}
    return {
        "env": env, "agent": agent, "seeds": len(seeds), "steps": any_run["steps"],
        "last": mean_and_half(last), "best": mean_and_half(best), "runs": last, "others": others,
    }  # fmt: skip


def reward_of(done: dict[str, Any], policy: str) -> float:
    """Mean reward of an episode of one policy in a run's table."""
    return float(next(r["mean_reward"] for r in done["table"] if r["policy"] == policy))


def mean_and_half(values: list[float]) -> tuple[float, float] | None:
    """Mean over seeds and half the width of its 95 % interval; nan from one seed alone."""
    import numpy as np
    from scipy.stats import t

    if not values:
        return None
    half = float("nan")
    if len(values) > 1:
        half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return float(np.mean(values)), half


def told(value: tuple[float, float] | None) -> str:
    """A mean with half its interval, which one seed does not have."""
    if value is None:
        return "-"
    return f"{value[0]:.1f}" + (f" ± {value[1]:.1f}" if value[1] == value[1] else "")


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table as Markdown, best last policy first."""
    said = [
        "| environment | agent | steps | seeds | last policy | best evaluation | each seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (r["env"], -r["last"][0])):
        cells = [told(value) for value in (r["last"], r["best"])]
        each = ", ".join(f"{value:.1f}" for value in r["runs"])
        said.append(
            f"| {r['env']} | {r['agent']} | {r['steps']} | {r['seeds']} | {cells[0]} | {cells[1]} "
            f"| {each} |"
        )
    for env in dict.fromkeys(r["env"] for r in rows):
        others = {k: v for r in rows if r["env"] == env for k, v in r["others"].items()}
        bars = ", ".join(f"{name} {value:.1f}" for name, value in others.items())
        said.append(f"\n{env}: {bars}")
    return said


def main() -> None:
    """Print the table of one folder."""
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(f"{__doc__}\n{USAGE}")
        raise SystemExit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    try:
        print("\n".join(lines(results(Path(sys.argv[1])))))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
