"""Look at the command line before anything heavy is imported: help and typos answer at once."""

import difflib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml

HYDRA_HINT = ", set env var HYDRA_FULL_ERROR=1 to see chained exception"
CONF = Path(__file__).resolve().parent / "conf"
WRONG_KIND = ": is a setting a word or a fraction where a whole number is meant?"
WITH_VALUE = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package",
              "-p", "--cfg", "-c", "--experimental-rerun")  # fmt: skip


def check(script: str, doc: str, argv: list[str], conf: Path = CONF) -> list[str]:
    """Answer --help, and refuse options and keys that no yaml has, naming the nearest that is.

    Returns the words for Hydra, which wants --multirun before all keys, and a plus before those
    inside what a yaml leaves open.
    """
    sys.excepthook = quiet_interrupt
    flags, overrides = split(argv)
    folders = [conf, *(Path(f) for f in flags.get("--config-dir", []) + flags.get("-cd", []))]
    for folder in folders:
        if not folder.is_dir():
            fail(f"--config-dir {folder} is no folder: expected one with env/ or agent/ inside")
    root = load(folders, script)
    groups = {k: v for entry in root.pop("defaults", []) if isinstance(entry, dict)
              for k, v in entry.items() if not k.startswith("override ")}  # fmt: skip
    root.pop("hydra", None)
    if "--help" in flags or "-h" in flags:
        print(usage(script, doc, folders, groups))
        raise SystemExit(0)
    chosen = dict(groups)
    for override in overrides:
        key, found, value = override.partition("=")
        if not found and not override.startswith("~"):
            said = [f"{g}={name}" for g in groups for name in options(folders, g)]
            said += [f"{name}=..." for name in root]
            fail(f"expected key=value, got {override!r}{advise(override, said)}")
        if key.lstrip("+~") in groups and found:
            for name in value.split(",") if "(" not in value else []:
                check_option(folders, key.lstrip("+~"), name)
                chosen[key.lstrip("+~")] = name
    configs = {group: load(folders, f"{group}/{name}") for group, name in chosen.items() if name}
    opened = {
        word for word in overrides if check_key(word.partition("=")[0], root, configs, folders)
    }
    words = [f"++{word.lstrip('+')}" if word in opened else word for word in argv]
    return sorted(words, key=lambda word: word not in ("-m", "--multirun"))  # stable


def split(argv: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Flags with their values, and Hydra's overrides."""
    flags: dict[str, list[str]] = {}
    overrides = []
    rest = iter(argv)
    for word in rest:
        name, _, value = word.partition("=")
        if not word.startswith("-"):
            overrides.append(word)
        elif name in WITH_VALUE:
            flags.setdefault(name, []).append(value or next(rest, ""))
        else:
            flags.setdefault(name, [])
    return flags, overrides


def load(folders: list[Path], name: str) -> dict[str, Any]:
    """The first yaml of that name; {} where there is none."""
    for folder in folders:
        if (path := folder / f"{name}.yaml").is_file():
            try:
                return yaml.safe_load(path.read_text()) or {}
            except yaml.YAMLError as error:
                fail(f"{path} is no valid yaml: {error}")
    return {}


def from_a_log(folders: list[Path], name: str) -> bool:
    """Whether a yaml says in its first line that its agent learns from logs only."""
    paths = [path for folder in folders if (path := folder / f"{name}.yaml").is_file()]
    return paths[0].read_text().startswith("# Learns from a log")


def options(folders: list[Path], group: str) -> list[str]:
    """Names a group can take, plug-in folders included."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def check_option(folders: list[Path], group: str, name: str) -> None:
    """Refuse a name that no folder has."""
    known = options(folders, group)
    if name not in known and name != "null":
        fail(f"{group}={name}: there is no such {group}{advise(name, known)}; "
             f"there are: {', '.join(known) or 'none'}")  # fmt: skip


def check_key(key: str, root: dict[str, Any], configs: dict[str, Any], folders: list[Path]) -> bool:
    """Refuse a key that neither the root yaml nor the chosen group's yaml has.

    Returns whether it stands inside what the yaml leaves open, as env.kwargs is.
    """
    added, name = key.startswith("+"), key.lstrip("+~")
    top, _, below = name.partition(".")
    if top == "hydra" or name.startswith("hydra/") or "@" in name or options(folders, name):
        return False
    if top not in root and top not in configs:
        tops = [*configs, *root]
        fail(f"{key}: there is no such key{advise(top, tops)}; there are: {', '.join(tops)}")
    if below and root.get(top) == {}:
        return not added
    # a constructor may know keys its yaml leaves out: +agent.key=1 is for them, and it checks them
    if not below or added or not configs.get(top) or "defaults" in configs[top]:
        return False
    every = keys(configs[top])
    known = {k: v for k, v in every.items() if not k.endswith("_target_")}
    inside = any(below.startswith(f"{k}.") for k, value in known.items() if value in ({}, None))
    if below not in every and not inside:  # inside what the yaml leaves open, anything may stand
        there = ", ".join(known) or "none"
        fail(f"{key}: there is no such key{advise(below, [*known])}; {top} has: {there}")
    return inside


def keys(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a yaml, with their values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat[f"{prefix}{key}"] = value
        if isinstance(value, dict):
            flat |= keys(value, f"{prefix}{key}.")
    return flat


def advise(word: str, known: list[str]) -> str:
    """The nearest known word, as a question."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def usage(script: str, doc: str, folders: list[Path], groups: dict[str, str]) -> str:
    """What can be typed: options of every group, and the root yaml with its comments."""
    body, inside = [], True
    for line in (folders[0] / f"{script}.yaml").read_text().splitlines():
        if line[:1].strip():  # a new key: what is Hydra's own business is left out
            inside = not line.startswith(("defaults:", "hydra:")) and "${hydra:" not in line
        body += [f"  {line}"] if inside and line.strip() else []
    lines = [doc.strip(), "", f"usage: python experiments/{script}.py [key=value ...]"]
    lines += [""] * bool(groups)
    for group, default in groups.items():
        names = options(folders, group)
        marked = [f"{name}*" if from_a_log(folders, f"{group}/{name}") else name for name in names]
        lines.append(f"  {group}={' | '.join(marked)}   (default {default})")
        if marked != names:
            lines.append("  * learns from a log, with experiments/train_offline.py")
    lines += ["", "keys and their defaults:", *body]
    if groups:
        lines += [
            "",
            f"keys of an option: {', '.join(f'{g}.KEY=value' for g in groups)}",
            "options of your own: --config-dir FOLDER with env/ or agent/ inside",
        ]
    return "\n".join(lines)


def fail(message: str) -> NoReturn:
    """One line for the user, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def quiet_interrupt(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ctrl-C before the work began needs no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted before anything was written", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn bad input into its message and exit code 2; RECPLAY_DEBUG=1 shows its traceback."""
    try:
        yield
    except Exception as error:
        if os.environ.get("RECPLAY_DEBUG"):
            raise
        made = type(error).__name__ == "InstantiationException"
        cause = (error.__cause__ or error) if made else error
        if made and (cause is error or isinstance(cause, ImportError | AttributeError)):
            said = " ".join(str(error).split()).replace(HYDRA_HINT, "")
            why = error.__cause__
            because = f" ({why})" if why is not None and str(why) not in said else ""
            fail(f"{said}{because}: is the name right, and its folder on PYTHONPATH?")
        if made and not isinstance(cause, ValueError | TypeError | OSError):
            step = traceback.extract_tb(cause.__traceback__)[-1]
            target = str(error).partition("'")[2].partition("'")[0]
            fail(
                f"{target} failed with {type(cause).__name__}: {cause}, in {step.filename} line "
                f"{step.lineno} ({step.line}): look at the values it is given in its yaml"
            )
        if not isinstance(cause, ValueError | TypeError | OSError):
            raise
        if isinstance(cause, TypeError) and cause is error:
            raise  # a fault of ours, not of what was typed
        place = str(error).partition("full_key: ")[2]
        raw = isinstance(cause, TypeError) and "unexpected keyword" not in str(cause)
        kind = WRONG_KIND if raw else ""
        fail(f"{cause}{kind}{f' ({place})' if place else ''}")
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted. {interrupt}", file=sys.stderr)
        raise SystemExit(130) from None
