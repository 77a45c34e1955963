"""Prepared data on disk: made once, replaced whole, rebuilt when broken."""

import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def cache_folder(folder: Path | str | None = None) -> Path:
    """Where prepared data goes: `folder`, else $RECPLAY_CACHE, else ~/.cache/recplay."""
    return Path(folder or os.environ.get("RECPLAY_CACHE") or Path.home() / ".cache" / "recplay")


def cached(
    key: str,
    make: Callable[[], T],
    save: Callable[[T, Path], None],
    load: Callable[[Path], T],
    *,
    folder: Path | str | None = None,
    what: str = "prepared data",
) -> T:
    """What `load` reads of the entry `key`; where it lacks or is broken it is made and saved first.

    `save` gets a path to write as one file or one folder; `key` names all the content depends on.
    The value is read back even when just made: the first run works on the bytes of the second.
    """
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", key)[:60]
    entry = cache_folder(folder) / f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if entry.exists():
        try:
            return load(entry)
        except Exception as error:  # whatever a broken file makes a reader raise
            print(f"cache of {what} is not readable ({error}): rebuilding {entry}", file=sys.stderr)
            _remove(entry)
    value = make()
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".new-", dir=entry.parent))
    except OSError as error:
        print(f"cannot cache {what} ({error}): set RECPLAY_CACHE to a folder", file=sys.stderr)
        return value
    try:
        save(value, aside / "entry")
        written = load(aside / "entry")
        _put(aside / "entry", entry)
        return written
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove(entry: Path) -> None:
    """Take a broken entry away; another process may have done so already."""
    if entry.is_dir():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _put(new: Path, entry: Path) -> None:
    """Move `new` to `entry` in one step; where another process was first, its folder stays."""
    try:
        os.replace(new, entry)
    except OSError:
        if not entry.exists():
            raise
