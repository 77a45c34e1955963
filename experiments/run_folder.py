"""What a run leaves behind: configuration, versions, results; no file half written."""

import json
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parents[1]
TAKEN = "holds a run already: choose another folder, or delete it if nothing in it is wanted"
PACKAGES = ("torch", "numpy", "pandas", "gymnasium", "hydra-core", "transformers", "recplay")


def open_folder(cfg: DictConfig) -> Path:
    """Make the run folder, with configuration and versions in it; no two runs share one."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(cfg.run_dir) if cfg.run_dir else home_of(cfg) / f"seed{cfg.seed}-{stamp}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "config.yaml", "x") as file:  # of two runs at once one is first
            file.write(OmegaConf.to_yaml(cfg, resolve=True))
    except FileExistsError as error:
        raise ValueError(
            f"run_dir={folder} {TAKEN if folder.is_dir() else 'is a file: choose another folder'}"
        ) from error
    except OSError as error:
        raise ValueError(
            f"run_dir={folder} cannot be written ({error.strerror}): choose a folder that can"
        ) from error
    write_json(folder / "versions.json", versions())
    return folder


def refuse_taken(folder: Path | str | None, key: str = "run_dir") -> None:
    """Refuse, before any work, a folder that holds a run, is a file or cannot be written."""
    if not folder:
        return
    if (Path(folder) / "config.yaml").exists():
        raise ValueError(f"{key}={folder} {TAKEN}")
    refuse_unwritable(folder, key)


def refuse_unwritable(place: Path | str | None, key: str, *, file: bool = False) -> None:
    """Refuse a folder, or a `file`, that could not be written when the work is done."""
    if not place:
        return
    path = Path(place).absolute()
    if file and path.is_dir():
        raise ValueError(f"{key}={place} is a folder: give the name of a file")
    folder = path.parent if file else path
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(dir=folder):  # it shows, whoever asks and whatever disk
            return
    except OSError as error:
        raise ValueError(
            f"{key}={place} cannot be written ({folder}: {error.strerror}): choose another place"
        ) from error


def home_of(cfg: DictConfig) -> Path:
    """Where runs of this agent in this environment go when nothing else is said."""
    return writable_home() / "runs" / cfg.env_name / cfg.agent_name


def writable_home() -> Path:
    """The repository, or the current folder where that cannot be written."""
    return ROOT if os.access(ROOT, os.W_OK) else Path.cwd()


def versions() -> dict[str, str]:
    """What ran: python, packages and the commit."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "commit": commit()}


def commit() -> str:
    """The git commit of the code, with + where files differ from it; "unknown" outside git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, check=True, text=True
        )
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON: what is no number is null."""
    write_text(path, json.dumps(plain(content), indent=2, allow_nan=False) + "\n")


def plain(x: Any) -> Any:
    """Nested values as JSON knows them."""
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    if hasattr(x, "tolist"):  # NumPy and torch
        return plain(x.tolist())
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Note how long a stage took, even one that was interrupted."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = round(time.perf_counter() - begun, 3)
