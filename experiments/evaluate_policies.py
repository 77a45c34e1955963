"""Say from a log what other policies would have earned, how sure that is, and whether it can tell.

python experiments/evaluate_policies.py log=open_bandit campaign=all behaviour=random
python experiments/evaluate_policies.py log=coat log.path=FOLDER
python experiments/evaluate_policies.py log=run log.path=RUN_FOLDER
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # flat packages, installed or not

from experiments import cli

if __name__ == "__main__":
    sys.argv[1:] = cli.check("evaluate_policies", __doc__, sys.argv[1:])  # before torch: at once

import hydra
from omegaconf import DictConfig, OmegaConf

from evaluation import evaluate
from evaluation.estimators import parse
from evaluation.judge import INTERVALS, known
from evaluation.report import Table, margin_chart_layout, margin_chart_scalars
from evaluation.reward_model import RewardModel
from evaluation.shape import SHAPES
from experiments.logged_policies import Question, Settings
from experiments.run_folder import open_folder, refuse_taken, refuse_unwritable, stage, write_json


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="evaluate_policies")
def main(cfg: DictConfig) -> None:
    """Read a log, judge policies on it, and say where the table is."""
    with cli.plain_errors():
        settings = checked(cfg)
        seconds: dict[str, float] = {}
        with stage("read", seconds):
            said(cfg, f"read log={cfg.log_name}")
            question: Question = hydra.utils.instantiate(cfg.log, settings)
        with stage("evaluate", seconds):
            said(cfg, f"judge {', '.join(question.targets)} on {question.log.num_rows:,} rows")
            table = judged(cfg, question)
        folder = open_folder(named(cfg))
        with stage("write", seconds):
            write(table, folder)
        write_json(folder / "result.json", {"log": cfg.log_name, "seconds": seconds})
        if cfg.out:
            Path(cfg.out).absolute().parent.mkdir(parents=True, exist_ok=True)
            table.to_json(Path(cfg.out))
        print(
            "\n".join(
                [
                    str(table),
                    "",
                    f"page, figure and numbers: {folder}/table.html, forest.png, table.json",
                    f"tensorboard --logdir {folder / 'tensorboard'}",
                ]
            )
        )


def said(cfg: DictConfig, line: str) -> None:
    """Tell what is going on."""
    if cfg.progress:
        print(line, flush=True)


def judged(cfg: DictConfig, question: Question) -> Table:
    """The table, with what a reader must know of the log and the policies on top."""
    names = list(cfg.estimators) if cfg.estimators is not None else question.estimators
    intervals = list(cfg.intervals)
    if question.log.adaptive:
        intervals = ["confidence_sequence"]  # no other is valid where the policy learned
    table = evaluate(
        question.log, question.targets, estimators=names, intervals=intervals,
        reward_model=question.reward_model, baseline=cfg.baseline or question.baseline,
        alpha=cfg.alpha, seed=cfg.seed, batch_rows=question.batch_rows,
    )  # fmt: skip
    table.about["notes"][:0] = question.notes
    return table


def write(table: Table, folder: Path) -> None:
    """Page, numbers, forest plot and TensorBoard's margin charts."""
    from torch.utils.tensorboard import SummaryWriter

    table.to_html(folder / "table.html")
    table.to_json(folder / "table.json")
    table.plot(folder / "forest.png")
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        writer.add_custom_scalars(margin_chart_layout(table))
        for tag, value in margin_chart_scalars(table).items():
            for rows in (0, table.about["rows"]):  # a band needs two points to be seen
                writer.add_scalar(tag, value, rows)


def named(cfg: DictConfig) -> DictConfig:
    """The configuration with the names after which run folders are called: runs/ope/LOG."""
    whole = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(whole, dict)
    return OmegaConf.create({**whole, "env_name": "ope", "agent_name": cfg.log_name})


def checked(cfg: DictConfig) -> Settings:
    """Settings of all logs; names and numbers that make no sense are refused before any work."""
    for key in ("estimators", "intervals"):
        if isinstance(cfg[key], str):
            raise ValueError(f"{key} must be a list, got {cfg[key]!r}: {key}=[{cfg[key]}]")
    if not cfg.intervals:
        raise ValueError("intervals must name at least one: intervals=[clt]")
    known(list(cfg.intervals), INTERVALS, "interval")
    for name in cfg.estimators or ():
        if name not in SHAPES:
            parse(name)
    if cfg.reward_model is not None:
        RewardModel(cfg.reward_model)
    if not isinstance(cfg.seed, int) or isinstance(cfg.seed, bool) or not 0 <= cfg.seed < 2**31:
        raise ValueError(f"seed must be a whole number from 0, below 2**31, got {cfg.seed!r}")
    if not isinstance(cfg.alpha, int | float) or not 0 < cfg.alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {cfg.alpha!r}: .05 gives 95 % intervals")
    if not isinstance(cfg.soften_ess, int | float) or not cfg.soften_ess > 0:
        raise ValueError(f"soften_ess must be above 0, got {cfg.soften_ess!r}")
    if not isinstance(cfg.adaptive, bool):
        raise ValueError(f"adaptive must be true or false, got {cfg.adaptive!r}")
    if cfg.adaptive and list(cfg.intervals) not in (["clt"], ["confidence_sequence"]):
        raise ValueError("of an adaptive log only intervals=[confidence_sequence] are valid")
    refuse_unwritable(cfg.out, "out", file=True)
    refuse_taken(cfg.run_dir)
    return Settings(cfg.reward_model, float(cfg.soften_ess), cfg.seed, cfg.adaptive)


if __name__ == "__main__":
    main()
