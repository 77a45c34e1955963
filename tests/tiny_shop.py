"""The tiny environment as compare.py sees it: its configuration and its worlds."""

from pathlib import Path

from omegaconf import OmegaConf

from experiments.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]


def tiny(**changed):
    env = OmegaConf.load(ROOT / "experiments/conf/env/tiny.yaml")
    base = OmegaConf.load(ROOT / "experiments/conf/compare.yaml")
    for key in ("defaults", "hydra"):
        base.pop(key)
    base.env_name = "tiny"
    base.progress = False
    base.evaluators = 2
    cfg = OmegaConf.merge(base, {"env": env}, changed)
    return cfg, prepare(cfg, "cpu")
