"""Train an agent against users fitted to a log, and compare it with what it has to beat.

python experiments/train_agent.py env=ecommerce agent=dqn
python experiments/train_agent.py env=gym env.id=CartPole-v1 agent=ppo
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # flat packages, installed or not

from experiments import cli

if __name__ == "__main__":
    sys.argv[1:] = cli.check("train_agent", __doc__, sys.argv[1:])  # before torch: at once

from typing import Any

import hydra
import torch
from omegaconf import DictConfig

from agents.base import Agent, Transition
from agents.checks import NonFiniteLossError
from evaluation.online import one_step, play
from experiments.arena import Arena, arena, chosen_device
from experiments.checkpoints import Checkpoint, fit, load_checkpoint
from experiments.kinds import refuse_targets, refuse_words
from experiments.policies import (
    DEFAULT_STEPS,
    SESSIONS_SEED,
    agent_config,
    lines,
    make_env,
    named_agent,
    session_list,
)
from experiments.resume import interrupted_run
from experiments.run_folder import open_folder, refuse_taken, refuse_unwritable, stage, write_json
from experiments.sweep import sweep_folder
from experiments.watch import Watch


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="train_agent")
def main(cfg: DictConfig) -> None:
    """Prepare users, train an agent on some, judge it on others, and say where everything is."""
    with cli.plain_errors():
        device, steps = checked(cfg)
        refuse_agents(cfg)
        cfg.run_dir = sweep_folder(cfg) or cfg.run_dir
        before = interrupted_run(cfg) if cfg.resume else None
        if before is None:
            refuse_taken(cfg.run_dir)
        seconds: dict[str, float] = {}
        with stage("prepare", seconds):
            world = arena(cfg, device, steps)
        print("\n".join(world.notes), flush=True)
        torch.set_num_threads(cfg.threads)
        agent = hydra.utils.instantiate(cfg.agent, world.spec)
        agents = {name: named_agent(name, world.spec) for name in world.baselines}
        saved = before.checkpoint if before else None
        if cfg.checkpoint and saved is None:
            load_checkpoint(Path(cfg.checkpoint), agent, world.catalog, device)
            refuse_ended_schedule(cfg, agent, steps)

        training_env(cfg, world)  # refuses what no session can be
        folder = before.folder if before else open_folder(cfg)  # not before all that was typed fits
        done = f", {saved.step} of them done" if saved else ""
        print(
            f"train {cfg.agent_name} for {steps} steps{done}, curves in {folder / 'tensorboard'}",
            flush=True,
        )
        with stage("train", seconds):
            trained, best = train(cfg, world, agent, folder, steps, saved)
        with stage("evaluate", seconds):
            rows = world.judge({**agents, cfg.agent_name: agent})
            second = world.second({**agents, cfg.agent_name: agent}) if world.second else None
        with stage("log", seconds):
            log_frozen(cfg, world, agent, folder, device)

        result = {
            "env": cfg.env_name, "agent": cfg.agent_name, "seed": cfg.seed, "steps": steps,
            "trained": trained, "table": rows, "second_opinion": second, "best_eval": best,
            "seconds": {**world.seconds, **seconds}, "fidelity": world.fidelity,
        }  # fmt: skip
        write_json(folder / "result.json", result)
        said = ["", *lines(rows, world.baseline), ""]
        if second is not None:
            said += ["on users of another kind, gradient boosting on the same log:",
                     *lines(second, world.baseline), ""]  # fmt: skip
        if world.gate:
            said.append(world.gate)
        print("\n".join([*said, f"tensorboard --logdir {folder / 'tensorboard'}"]))
        if cfg.out:
            write_json(Path(cfg.out), result)


def train(
    cfg: DictConfig,
    world: Arena,
    agent: Agent,
    folder: Path,
    steps: int,
    saved: Checkpoint | None = None,
) -> tuple[int, dict[str, Any]]:
    """Let the agent serve users and learn from them; the steps made, the best evaluation."""
    env = training_env(cfg, world)
    watch = Watch(cfg, world, agent, folder, steps, env.num_envs)
    if saved is not None:
        fit(saved, agent, world.catalog)
        agent.load_state_dict(saved.part("agent", world.spec.device))
        if saved.has("experience"):
            agent.load_experience(saved.part("experience", world.spec.device))  # type: ignore[attr-defined]
    watch.open(saved)
    try:
        with watch.interruptible():
            if hasattr(agent, "learn"):
                learn(agent, env, watch, world, saved)
            else:
                loop(agent, env, watch, world, saved)
    except NonFiniteLossError as error:
        torch.save(error.batch, folder / "bad_batch.pt")
        raise ValueError(f"{error}; what it learnt from is in {folder / 'bad_batch.pt'}") from error
    finally:
        watch.close()
    if watch.asked:
        raise KeyboardInterrupt(
            f"checkpoint, curves and decisions so far: {folder}; resume=auto run_dir={folder} "
            "goes on"
        )
    if cfg.early_stopping and watch.best_step:
        load_checkpoint(watch.keep_best(), agent, world.catalog, world.spec.device)
        ended = f"after {watch.step} of {steps} steps" if watch.step < steps else "at its end"
        print(
            f"training stopped {ended}; the best agent on the held-out simulator, that of step "
            f"{watch.best_step}, is judged"
        )
    if hasattr(agent, "experience") and not watch.learnt:
        print(
            f"warning: {cfg.agent_name} has not learnt once in {watch.step} steps and is judged as "
            f"it began: give it more steps=, or fewer users at once (num_envs={env.num_envs})"
        )
    best = {"value": watch.best, "step": watch.best_step} if watch.best_step else {}
    return watch.step, best


def training_env(cfg: DictConfig, world: Arena) -> Any:
    """Sessions to train on: only here does `env.pessimism` take from the reward."""
    env = world.env()
    if pessimism := cfg.env.get("pessimism"):
        refuse_certainty(world.env())
        env.pessimism = pessimism
    return env


def refuse_certainty(env: Any) -> None:
    """Refuse users who never doubt: pessimism would change nothing."""
    env.reset()
    slate = torch.arange(env.slate_size, device=env.device).expand(env.num_envs, -1)
    info = env.step(slate)[-1]
    if not (info["response"].uncertainty > 0).any():
        raise ValueError(
            "env.pessimism takes what the users' simulator is unsure of from the reward, and this "
            "one states no uncertainty (Response.uncertainty is 0): fit an ensemble, or leave "
            "env.pessimism at 0"
        )


def loop(agent: Agent, env: Any, watch: Watch, world: Arena, saved: Checkpoint | None) -> None:
    """Act, step, learn; a checkpoint now and then, and one at the end."""
    rows = torch.arange(env.num_envs, device=world.spec.device)  # (B,)
    if saved is not None and saved.has("env"):
        obs, info = env.load_state_dict(saved.part("env", world.spec.device))
    else:
        obs, info = env.reset()
    while watch.go_on:
        due = watch.checkpoint_next
        mask, time = info["mask"], env.time.clone()
        # a copy: the step writes new users over those who leave
        truth = {k: v.clone() for k, v in env.state.items()} if world.regret is not None else {}
        decision = agent.act(obs, mask)
        next_obs, reward, terminated, truncated, info = env.step(decision.slate)
        # environments of others cannot be saved: at a checkpoint their episodes begin anew
        anew = due and hasattr(env, "restart")
        transition = Transition(
            obs, mask, decision, reward, next(iter(info["response"].chosen.values())),
            info["slot_reward"], info.get("final_obs", next_obs),
            info.get("final_mask", info["mask"]), terminated, truncated,
        )  # fmt: skip
        learnt = agent.update(
            replace(transition, truncated=truncated | ~terminated) if anew else transition
        )

        if watch.log is not None:
            step = one_step(env, rows, decision, terminated, truncated, info)
            watch.log.write(**step, obs=obs, excluded=mask, time=time, policy_version=watch.step)
        regret = world.regret
        watch.after(
            transition, learnt,
            None if regret is None else lambda: regret(truth, mask, decision.slate),  # noqa: B023
        )  # fmt: skip
        obs = next_obs
        if anew:
            obs, info = env.restart()
            watch.restart()
        if due:
            watch.save(env)
    if watch.written != watch.step:  # it ended early
        watch.save()


def learn(agent: Any, env: Any, watch: Watch, world: Arena, saved: Checkpoint | None) -> None:
    """Let an agent that has a loop of its own run it, step by step under the same watch."""
    keeps = not hasattr(env, "restart")  # sessions of ours can be saved, episodes of others not
    start = None
    if saved is not None and saved.has("env"):
        start = env.load_state_dict(saved.part("env", world.spec.device))

    def after(transition: Transition, learnt: dict[str, Any]) -> bool:
        due = watch.checkpoint_next
        watch.after(transition, learnt)
        if due:
            watch.save(env if keeps else None)
        return watch.go_on

    if watch.go_on:  # not a run that was cut off after its last step
        agent.learn(env, watch.steps - watch.step, after, start=start)
    if watch.written != watch.step:
        watch.save()


def refuse_agents(cfg: DictConfig) -> None:
    """Refuse words and names of nothing, and send who learns from logs where logs are read."""
    refuse_targets(cfg.agent, "agent")
    refuse_words(cfg.agent, "agent")
    for name in cfg.baselines or ():
        agent_config(name)
    if getattr(hydra.utils.get_object(cfg.agent._target_), "offline", False):
        raise ValueError(
            f"{cfg.agent_name} learns from a decision log, not from serving users: "
            f"python experiments/train_offline.py run=RUN_DIR agent={cfg.agent_name}, where "
            "RUN_DIR is the folder of a run of this command"
        )


def refuse_ended_schedule(cfg: DictConfig, agent: Any, steps: int) -> None:
    """Refuse to train weights whose env steps, which count on, are beyond the schedule's end."""
    behind = getattr(agent, "env_steps", 0)
    if getattr(agent, "schedule", "constant") != "constant" and behind >= steps:
        raise ValueError(
            f"checkpoint={cfg.checkpoint} has {behind} env steps behind it, and the learning rate "
            f"of agent.schedule={agent.schedule} ends at steps={steps}: nothing would be learnt. "
            "Give agent.schedule=constant, or more steps"
        )


def log_frozen(cfg: DictConfig, world: Arena, agent: Any, folder: Path, device: str) -> None:
    """Write the decisions of the agent frozen and made stochastic, for off-policy evaluation."""
    if not cfg.frozen_users or world.log is None or world.worlds is None:
        return
    if not hasattr(agent, "scores"):
        print(f"no frozen log: {cfg.agent_name} has no scores(obs) to make a softmax of")
        return
    from agents.frozen import Frozen

    frozen = Frozen(agent, world.spec, temperature=cfg.frozen_temperature)
    simulator = world.worlds.test[0]
    users, episodes = session_list(len(simulator.users), cfg.frozen_users, device)
    env = make_env(cfg, simulator, num_envs=len(users), seed=SESSIONS_SEED)
    from experiments.arena import decision_log

    policy = f"frozen {cfg.agent_name}"
    shutil.rmtree(folder / "decisions", ignore_errors=True)  # of a run that is being extended
    log = decision_log(cfg, simulator, folder / "decisions", policy, adaptive=False)
    play(env, frozen, users, episodes, explore=True, log=log)
    log.close()


def checked(cfg: DictConfig) -> tuple[str, int]:
    """The device and the training steps; numbers that make no sense are refused before any work."""
    steps = cfg.steps if cfg.steps is not None else cfg.env.get("train_steps", DEFAULT_STEPS)
    least = {"steps": 1, "num_envs": 1, "log_every": 1, "threads": 1, "evaluators": 1,
             "replay_items": 1, "eval_users": 2, "frozen_users": 0, "seed": 0, "eval_every": 0,
             "checkpoint_every": 0, "checkpoint_keep": 1, "early_stopping": 0}  # fmt: skip
    for key, bound in least.items():
        value = steps if key == "steps" else cfg[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise ValueError(f"{key} must be a whole number of at least {bound}, got {value!r}")
    if not isinstance(cfg.frozen_temperature, int | float) or not cfg.frozen_temperature > 0:
        raise ValueError(f"frozen_temperature must be above 0, got {cfg.frozen_temperature!r}")
    if cfg.resume not in (None, "auto"):
        raise ValueError(f"resume must be null or auto, got {cfg.resume!r}")
    if cfg.early_stopping and not cfg.eval_every:
        raise ValueError("early_stopping needs evaluations on the way: eval_every above 0")
    if cfg.early_stopping and cfg.evaluators < 2 and "id" not in cfg.env:
        raise ValueError(
            "early_stopping chooses on one held-out simulator and judges on the others, "
            f"got evaluators={cfg.evaluators}: at least 2"
        )
    target = str((cfg.env.get("simulator") or {}).get("_target_"))
    if cfg.second_opinion and not target.endswith(".FittedSimulator.fit"):
        raise ValueError(
            f"second_opinion=true is for users fitted to trips (simulators.fitted), env="
            f"{cfg.env_name} has {target}: leave it out"
        )
    if cfg.seed >= 2**31:
        raise ValueError(f"seed must be below 2**31, got {cfg.seed}")
    if isinstance(cfg.baselines, str):
        raise ValueError(f"baselines must be a list, got {cfg.baselines!r}: baselines=[...]")
    refuse_unwritable(cfg.out, "out", file=True)
    return chosen_device(cfg), steps


if __name__ == "__main__":
    main()
