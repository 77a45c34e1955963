"""Checkpoints: folders of plain tensors and JSON, whole or not at all, the last few kept."""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from agents.base import Agent
from experiments.run_folder import write_json

FORMAT = 2  # 1 was a single state.pt
META = "meta.json"
BLOCK = 1 << 20  # bytes read at once


@dataclass(frozen=True)
class Checkpoint:
    """One folder: `parts` are files of tensors, `meta` says what they are of."""

    folder: Path
    step: int
    meta: dict[str, Any]

    def part(self, name: str, device: str = "cpu") -> Any:
        """What NAME.pt holds."""
        return torch.load(self.folder / f"{name}.pt", weights_only=True, map_location=device)

    @property
    def name(self) -> str:
        """The agent's name in conf/agent."""
        return str(self.meta["config"].get("agent_name"))

    def has(self, name: str) -> bool:
        return f"{name}.pt" in self.meta["files"]


def save_checkpoint(
    home: Path, parts: dict[str, Any], cfg: DictConfig, *, step: int, about: dict[str, Any],
    keep: int = 2,
) -> Path:  # fmt: skip
    """Write parts as home/step-STEP; older ones go when more than `keep` are there.

    Later ones go as well: a run that went on from before them has not come there yet.
    """
    folder, partial = home / f"step-{step:012d}", home / f"partial-{step:012d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = {}
    for name, content in parts.items():
        path = partial / f"{name}.pt"
        with open(path, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "crc32": checksum(path)}
    meta = {"format": FORMAT, "step": step, **about, "files": files}
    write_json(partial / META, {**meta, "config": OmegaConf.to_container(cfg, resolve=True)})
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    there = folders(home)
    now = there.index(folder) + 1
    for old in [*there[now:], *there[: max(0, now - keep)]]:
        shutil.rmtree(old)
    for left in home.glob("partial-*"):
        shutil.rmtree(left)
    return folder


def folders(home: Path) -> list[Path]:
    """Checkpoints in order of their steps."""
    return sorted(path for path in home.glob("step-*") if path.is_dir())


def newest(home: Path, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The newest whole checkpoint; damaged ones are passed over, and that is said."""
    if (home / META).is_file():  # one checkpoint itself, or the single file of format 1
        return opened(home)
    for folder in reversed(folders(home)):
        try:
            return opened(folder)
        except ValueError as error:
            say(f"{error}; going on from the checkpoint before it, if there is one")
    return None


def opened(folder: Path) -> Checkpoint:
    """A checkpoint whose files are all there, as long as they were and with the same bits."""
    try:
        meta = json.loads((folder / META).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"the checkpoint {folder} is damaged: {META}: {error}") from error
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"the checkpoint {folder} is of format {meta.get('format', 1)}, this version reads "
            f"{FORMAT}: train again, or load it with the version that wrote it"
        )
    for name, said in meta["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != said["bytes"] or checksum(path) != said["crc32"]:
            found = "missing" if size < 0 else f"{size} bytes, expected {said['bytes']}"
            same = "its bits have changed" if size == said["bytes"] else found
            raise ValueError(f"the checkpoint {folder} is damaged: {name}: {same}")
    return Checkpoint(folder, int(meta["step"]), meta)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def load_checkpoint(home: Path, agent: Agent, catalog: str, device: str = "cpu") -> Checkpoint:
    """Put the agent of the newest checkpoint in `home`, or of that one, into `agent`."""
    saved = newest(home)
    if saved is None:
        raise ValueError(
            f"no checkpoint in {home}: expected step-N/ folders, as in RUN_DIR/checkpoint"
        )
    fit(saved, agent, catalog)
    agent.load_state_dict(saved.part("agent", device))
    return saved


def of_run(folder: Path) -> Path:
    """Where the agent is that a finished run judged: where it stopped early, not the last one."""
    best = folder / "best"
    return best if folders(best) else folder / "checkpoint"


def fit(saved: Checkpoint, agent: Agent, catalog: str) -> None:
    """Refuse a checkpoint of another catalogue or of another agent."""
    if saved.meta["catalog"] != catalog:
        raise ValueError(
            f"the checkpoint {saved.folder} is of another catalogue ({saved.meta['catalog']}, this "
            f"one is {catalog}): train on this catalogue, or prepare the one it was trained on"
        )
    if saved.meta["agent_kind"] != type(agent).__name__:
        raise ValueError(
            f"the checkpoint {saved.folder} is of {saved.name} ({saved.meta['agent_kind']}), the "
            f"agent asked for is a {type(agent).__name__}: choose agent={saved.name}"
        )
