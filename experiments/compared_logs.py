"""Off-policy values of a comparison: what the decision log of one run says of all its policies."""

from typing import Any

from omegaconf import DictConfig

from agents.base import Agent
from evaluation import evaluate
from evaluation.report import Table
from evaluation.wording import caveats, quoted, sentence
from experiments.compared_runs import Run
from experiments.logged_policies import Settings
from experiments.logged_runs import run_policies


def off_policy(cfg: DictConfig, run: Run, agents: dict[str, Agent]) -> dict[str, Any]:
    """Values with verdicts of softened policies, on the log of this run's frozen policy.

    The policy that wrote the log is judged by what it earned; others by estimators that weight or
    model what it did. All are softmaxes with a uniform share: a ranker that shows one item only is
    not to be judged on another's log.
    """
    settings = Settings(seed=cfg.seed)
    others = {name: agent for name, agent in agents.items() if name != run.policy}
    scored = {name: agent for name, agent in others.items() if hasattr(agent, "scores")}
    question = run_policies(
        settings, path=str(run.folder), temperatures=(), baselines=(), others=scored
    )
    targets = {run.policy if name == "logging" else name: target
               for name, target in question.targets.items()}  # fmt: skip
    table = evaluate(
        question.log, targets, estimators=question.estimators,
        reward_model=question.reward_model, baseline=run.policy,
        batch_rows=question.batch_rows, seed=cfg.seed,
    )  # fmt: skip
    unit = {"episode": "a session", "slate": "a slate"}.get(question.log.unit, "a decision")
    values = {name: {**value(table, name), "unit": unit} for name in targets}
    left = [name for name in others if name not in scored]
    notes = [
        f"{question.log.num_rows:,} decisions of the frozen {run.policy}, seed {run.seed}",
        *question.notes[1:],
        *(f"{name} has no scores to make a softmax of: not judged" for name in left),
        *caveats(table),
    ]
    return {"values": values, "notes": [f"Values are reward {unit}.", *notes],
            "baseline": run.policy}  # fmt: skip


def value(table: Table, policy: str) -> dict[str, Any]:
    """The row to quote of a policy."""
    row = quoted(table, policy)
    keys = ("value", "low", "high", "estimator", "verdict")
    found = {key: row.get(key) for key in keys} if row else dict.fromkeys(keys)
    return {**found, "verdict": table.verdict(policy), "why": sentence(table, policy)}
