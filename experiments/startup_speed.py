"""How soon a command answers: its help, its imports, and the first env step of a warm default run.

Each is a process of its own, timed from outside; what is warm has run once before, untimed.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from experiments.bench_rows import ROOT, THREADS, Row, Speed, fixed, row

UNIT = "starts per CPU-second"
HELP_GOAL, STEP_GOAL = 1.0, 10.0  # seconds
IMPORTS = "import experiments.train_agent"
BARE = "pass"  # an interpreter that does nothing
DEFAULT, QUICK = "ecommerce", "tiny"  # the env of a first step


def rows(repeats: int, seconds: float, seed: int, quick: bool, device: str = "cpu") -> list[Row]:
    """Help, imports, first step; the first two beside an interpreter that does nothing."""
    python = [sys.executable, "-c"]
    commands = {
        "help": [sys.executable, "experiments/train_agent.py", "--help"],
        "imports": [*python, IMPORTS],
        "bare": [*python, BARE],
        "torch": [*python, "import torch"],
    }
    spent = in_turn(commands, repeats)
    speeds = {name: starts(times) for name, times in spent.items()}
    found = [
        row("startup", "train_agent.py --help", UNIT, speeds["help"], peer=speeds["bare"],
            peer_name="python -c pass"),
        goal("train_agent.py --help, by the clock", [wall for _, wall in spent["help"]], HELP_GOAL),
        row("startup", "imports of train_agent.py", UNIT, speeds["imports"], peer=speeds["torch"],
            peer_name="python -c 'import torch'"),
    ]  # fmt: skip
    env = QUICK if quick else DEFAULT
    try:
        first_step(env, seed, device)  # fills the caches
    except ValueError as error:
        print(f"first env step of env={env}: skipped, {error}")
        return found
    times = [first_step(env, seed, device) for _ in range(max(1, repeats // 2))]
    return found + [
        goal(f"first env step of a warm run, env={env}, {said}", [x[key] for x in times],
             STEP_GOAL, memory_mib=max(x["peak"] for x in times))
        for key, said in (("seconds", "by the clock"), ("cpu", "CPU time"))
    ]  # fmt: skip


def goal(case: str, seconds: Sequence[float], most: float, **more: Any) -> Row:
    """A row of what must not take longer than so many seconds."""
    return row("startup", case, "starts per second", fixed(*(1 / s for s in seconds)),
               limit=1 / most, limit_name=f"{most:g} s", limit_goal=1.0, absolute=True,
               **more)  # fmt: skip


def starts(times: Sequence[tuple[float, float]]) -> Speed:
    """CPU and wall seconds of starts as starts per second."""
    return Speed(tuple(1 / cpu for cpu, _ in times), tuple(1 / wall for _, wall in times))


def in_turn(commands: dict[str, list[str]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """CPU and wall seconds of each command, taken in turn; each has run once before."""
    for command in commands.values():
        timed(command)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            spent[name].append(timed(command))
    return spent


def timed(command: Sequence[str]) -> tuple[float, float]:
    """CPU and wall seconds of a process."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=surroundings())
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def surroundings() -> dict[str, str]:
    """Of a process on one thread that finds our packages."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **dict.fromkeys(THREADS, "1"), "PYTHONPATH": os.pathsep.join(paths)}


def first_step(env: str, seed: int, device: str) -> dict[str, float]:
    """Seconds from the start of a process to the end of its first env step, and its memory."""
    begun = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "experiments.startup_speed", env, str(seed), device],
        capture_output=True, text=True, cwd=ROOT, env=surroundings(),
    )  # fmt: skip
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1][-500:])
    told = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": told["ended"] - begun, "cpu": told["cpu"], "peak": told["peak"]}


def step_once(env: str, seed: int, device: str) -> None:
    """Do what train_agent.py does up to its first env step."""
    from hydra import compose, initialize_config_dir

    from experiments import cli, train_agent
    from experiments.bench_rows import peak_mib

    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        cfg = compose("train_agent", return_hydra_config=True, overrides=[
            f"env={env}", f"seed={seed}", f"device={device}", "progress=false"])  # fmt: skip
    cfg.env_name, cfg.agent_name = env, "dqn"
    with contextlib.redirect_stdout(sys.stderr), cli.plain_errors():
        where, steps = train_agent.checked(cfg)
        world = train_agent.arena(cfg, where, steps)
        agent = train_agent.hydra.utils.instantiate(cfg.agent, world.spec)
        sessions = train_agent.training_env(cfg, world)
        obs, info = sessions.reset()
        sessions.step(agent.act(obs, info["mask"]).slate)
    print(json.dumps({"ended": time.time(), "cpu": time.process_time(), "peak": peak_mib()}))


if __name__ == "__main__":
    step_once(sys.argv[1], int(sys.argv[2]), sys.argv[3])
