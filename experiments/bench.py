"""Measure how fast things are, in CPU time, and how right the evaluator is where truth is known.

python experiments/bench.py bench=env
python experiments/bench.py bench=rank
python experiments/bench.py bench=agents
python experiments/bench.py bench=bandits
python experiments/bench.py bench=ope_accuracy
python experiments/bench.py bench=ope_speed obp=WHEEL
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # flat packages, installed or not

from experiments import cli

if __name__ == "__main__":
    sys.argv[1:] = cli.check("bench", __doc__, sys.argv[1:])  # before torch: at once

import statistics
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import hydra
import torch
from omegaconf import DictConfig

from envs.recommend import RecommendVectorEnv
from experiments.run_folder import refuse_unwritable, write_json
from simulators.base import UserSimulator

POOL = 32  # random slates drawn before the clock starts, shown in turn
WARM_UP = 20  # steps nobody times: rows desynchronise, so that users leave at every step


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="bench")
def main(cfg: DictConfig) -> None:
    """Run one benchmark and print its table."""
    with cli.plain_errors():
        checked(cfg)
        refuse_unwritable(cfg.out, "out", file=True)
        torch.set_num_threads(cfg.threads)
        rows = BENCHES[cfg.bench](cfg)
        print(TEXTS[cfg.bench](rows))
        if cfg.out:
            write_json(Path(cfg.out), rows)


def bench_env(cfg: DictConfig) -> list[dict[str, Any]]:
    """User-slates per CPU-second of an environment that is shown random slates, by its users.

    Included: observations as ids, draws, answers, rewards, and new users where old ones leave.
    """
    from experiments import env_speed

    return [env_row(cfg, name, world) for name, world in env_speed.worlds(cfg).items()]


def env_row(cfg: DictConfig, name: str, world: UserSimulator) -> dict[str, Any]:
    """The row of one kind of users."""
    env = RecommendVectorEnv(
        world, num_envs=cfg.users, slate_size=cfg.slate_size, max_steps=cfg.max_steps,
        observation="ids", output="torch", seed=cfg.seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(cfg.seed)
    keys = (torch.rand(cfg.users, cfg["items"], generator=generator) for _ in range(POOL))
    slates = cycle([key.topk(cfg.slate_size, dim=1).indices for key in keys])  # (B, K) each
    env.reset()
    for _ in range(WARM_UP):
        env.step(next(slates))
    rates = [
        cfg.users * calls_per_second(lambda: env.step(next(slates)), cfg.seconds)
        for _ in range(repeats_of(cfg))
    ]
    case = (
        f"RecommendVectorEnv, {name}, {cfg.users} users, {cfg['items']} items, "
        f"slate {cfg.slate_size}, random slates, {cfg.threads} thread{'s' * (cfg.threads > 1)}"
    )
    return summary("env", case, rates, "user-slates per CPU-second")


def bench_ope_accuracy(cfg: DictConfig) -> list[dict[str, Any]]:
    """Bias, RMSE, coverage and choices of every off-policy estimator in worlds of known truth."""
    from experiments import ope_accuracy

    return ope_accuracy.accuracy(repeats_of(cfg), cfg.seed, cfg.quick)


def accuracy_text(rows: list[dict[str, Any]]) -> str:
    """Its tables."""
    from experiments import ope_accuracy

    return ope_accuracy.text(rows)


def bench_ope_speed(cfg: DictConfig) -> list[dict[str, Any]]:
    """The evaluator's time against that of obp's estimators, and its memory on many files."""
    from experiments import ope_speed

    return ope_speed.speed(cfg.obp, repeats_of(cfg), cfg.seed, cfg.quick)


def speed_text(rows: list[dict[str, Any]]) -> str:
    """Its table."""
    from experiments import ope_speed

    return ope_speed.text(rows)


def bench_rank(cfg: DictConfig) -> list[dict[str, Any]]:
    """Ranking and judging lists of all items against a loop over users, and the fit of EASE."""
    from experiments import rank_speed

    return rank_speed.rows(repeats_of(cfg))


def rank_text(rows: list[dict[str, Any]]) -> str:
    """Its lines."""
    from experiments import rank_speed

    return rank_speed.text(rows)


def bench_agents(cfg: DictConfig) -> list[dict[str, Any]]:
    """Env steps per CPU-second of our DQN and of Stable-Baselines3's in its two set-ups."""
    from experiments import agent_speed

    return agent_speed.speeds(repeats_of(cfg), cfg.seed, cfg.quick)


def agents_text(rows: list[dict[str, Any]]) -> str:
    """Its lines."""
    from experiments import agent_speed

    return agent_speed.text(rows)


def bench_bandits(cfg: DictConfig) -> list[dict[str, Any]]:
    """Decisions per CPU-second and regret of linear bandits beside contextualbandits."""
    from experiments import bandit_speed

    return bandit_speed.rows(repeats_of(cfg), cfg.seed, cfg.quick)


def bandits_text(rows: list[dict[str, Any]]) -> str:
    """Its lines."""
    from experiments import bandit_speed

    return bandit_speed.text(rows)


def repeats_of(cfg: DictConfig) -> Any:
    """As given, or as many as the benchmark needs."""
    return REPEATS[cfg.bench] if cfg.repeats is None else cfg.repeats


BENCHES: dict[str, Callable[[DictConfig], list[dict[str, Any]]]] = {
    "env": bench_env, "ope_accuracy": bench_ope_accuracy, "ope_speed": bench_ope_speed,
    "rank": bench_rank, "agents": bench_agents, "bandits": bench_bandits,
}  # fmt: skip
TEXTS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "env": lambda rows: "\n".join(map(line, rows)), "ope_accuracy": accuracy_text,
    "ope_speed": speed_text, "rank": rank_text, "agents": agents_text, "bandits": bandits_text,
}  # fmt: skip
REPEATS = {"env": 5, "ope_accuracy": 100, "ope_speed": 5, "rank": 5, "agents": 3, "bandits": 3}


def calls_per_second(call: Callable[[], Any], seconds: float) -> float:
    """Calls per second of CPU time of this process, over a window of `seconds`."""
    calls, begun = 0, time.process_time()
    while (passed := time.process_time() - begun) < seconds or not calls:
        call()
        calls += 1
    return calls / passed


def summary(bench: str, case: str, rates: list[float], unit: str) -> dict[str, Any]:
    """One row of the table: the median of the windows, and how far they lie apart."""
    return {"bench": bench, "case": case, "product": statistics.median(rates), "unit": unit,
            "min": min(rates), "max": max(rates), "repeats": len(rates)}  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row of the table as text."""
    return (
        f"{row['case']}: {row['product']:,.0f} {row['unit']} "
        f"(median of {row['repeats']}, {row['min']:,.0f} to {row['max']:,.0f})"
    )


def checked(cfg: DictConfig) -> None:
    """Refuse numbers that make no sense before any work."""
    if cfg.bench not in BENCHES:
        raise ValueError(f"bench must be one of {', '.join(BENCHES)}, got {cfg.bench!r}")
    least = {"users": 1, "items": 2, "slate_size": 1, "dim": 1, "max_steps": 1, "repeats": 1,
             "threads": 1, "seed": 0}  # fmt: skip
    for key, bound in least.items():
        value = repeats_of(cfg) if key == "repeats" else cfg[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise ValueError(f"{key} must be a whole number of at least {bound}, got {value!r}")
    if not isinstance(cfg.quick, bool):
        raise ValueError(f"quick must be true or false, got {cfg.quick!r}")
    if not isinstance(cfg.seconds, int | float) or not cfg.seconds > 0:
        raise ValueError(f"seconds must be above 0, got {cfg.seconds!r}")


if __name__ == "__main__":
    main()
