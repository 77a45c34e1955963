"""Find the run that was cut off, and refuse to go on with one of other settings."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.checkpoints import Checkpoint, folders, newest
from experiments.run_folder import home_of, write_text

FREE = ("resume", "run_dir", "progress", "out", "steps", "checkpoint_keep")  # may differ


@dataclass(frozen=True)
class Before:
    """A run that was cut off, in its folder."""

    folder: Path
    checkpoint: Checkpoint | None  # None: it ended before the first one was written


def interrupted_run(cfg: DictConfig) -> Before | None:
    """The run to go on with: in run_dir, or the newest unfinished one of these settings."""
    if cfg.run_dir:
        folder = Path(cfg.run_dir)
        if not (folder / "config.yaml").is_file():
            print(f"resume=auto: no run in {folder} yet, a new one starts", flush=True)
            return None
        if differs := difference(folder, cfg):
            raise ValueError(
                f"run_dir={folder} holds a run with other settings ({differs}): give the same "
                "ones, or another run_dir"
            )
        return gone_on(folder, cfg)
    runs = home_of(cfg).glob(f"seed{cfg.seed}-*/config.yaml")
    for path in sorted(runs, reverse=True):
        if not (path.parent / "result.json").exists() and not difference(path.parent, cfg):
            return gone_on(path.parent, cfg)
    print("resume=auto: no run of these settings was cut off, a new one starts", flush=True)
    return None


def gone_on(folder: Path, cfg: DictConfig) -> Before:
    """A run's newest whole checkpoint; its finished result, if any, no longer holds."""
    saved = newest(folder / "checkpoint", say=lambda words: print(words, flush=True))
    if saved is None and folders(folder / "checkpoint"):
        raise ValueError(
            f"every checkpoint of {folder} is damaged; its curves and decisions are kept: start "
            "anew in another run_dir"
        )
    if saved is None:
        print(f"{folder} was cut off before its first checkpoint: it starts anew", flush=True)
        for part in (folder / "training").glob("part-*"):
            part.unlink()
        for events in (folder / "tensorboard").glob("events.*"):
            events.unlink()
    else:
        print(f"resume {folder} from step {saved.step}", flush=True)
    (folder / "result.json").unlink(missing_ok=True)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    return Before(folder, saved)


def difference(folder: Path, cfg: DictConfig) -> str:
    """The first setting in which a run's configuration is not this one; "" where none is."""
    then = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
    now = OmegaConf.to_container(cfg, resolve=True)
    mine, theirs = flat(now), flat(then)
    for key in dict.fromkeys([*mine, *theirs]):
        if key.split(".")[0] not in FREE and mine.get(key) != theirs.get(key):
            return f"{key} was {json.dumps(theirs.get(key))}, now {json.dumps(mine.get(key))}"
    return ""


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, part in value.items():
        found |= flat(part, f"{prefix}.{key}" if prefix else str(key))
    return found
