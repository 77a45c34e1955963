"""Words where numbers are meant, and names of nothing, refused before the work, by their key."""

import inspect
import pkgutil
import types
from importlib import import_module
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from experiments.cli import advise

OURS = ("agents", "encoders", "envs", "evaluation", "experiments", "simulators", "sources")
BY_PATH = ("hydra.utils.get_method", "hydra.utils.get_class", "hydra.utils.get_object")
PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def refuse_words(config: DictConfig, where: str) -> None:
    """Hold each value beside a `_target_` against the type that the target declares for it.

    Targets that cannot be imported, and values of no plain type, are left for `instantiate`.
    """
    _walk(OmegaConf.to_container(config, resolve=True), where)


def refuse_targets(config: DictConfig, where: str) -> None:
    """Refuse a `_target_` or path that names nothing, and keys that its target does not take."""
    _look(OmegaConf.to_container(config, resolve=True), where)


def _look(part: Any, where: str) -> None:
    if not isinstance(part, dict):
        return
    if "_target_" in part:
        target = str(part["_target_"])
        made = named(target, f"{where}._target_")
        if not callable(made):
            raise ValueError(f"{where}._target_={target} is no class or function: name one in it")
        if target in BY_PATH and "path" in part:
            named(str(part["path"]), f"{where}.path")
        taken = parameters(made)
        for key in part:
            if taken is not None and key not in taken and not str(key).startswith("_"):
                raise ValueError(
                    f"{where}.{key}: {target} takes no {key!r}{advise(str(key), taken)}; it takes: "
                    f"{', '.join(taken) or 'nothing'} (~{where}.{key} leaves a key of a yaml out)"
                )
    for key, value in part.items():
        _look(value, f"{where}.{key}")


def named(path: str, where: str) -> Any:
    """What a dotted path such as envs.rewards.units names; the piece that is not there is said."""
    parts = path.split(".")
    if len(parts) < 2 or not all(parts):
        raise ValueError(
            f"{where} must be a dotted path such as envs.rewards.units: folder, file and name, got "
            f"{path!r}"
        )
    found: Any = None
    for i, part in enumerate(parts):
        so_far = ".".join(parts[: i + 1])
        here = isinstance(found, types.ModuleType) and hasattr(found, part)
        searched = found is None or isinstance(found, types.ModuleType)
        if searched and not here and (module := _imported(so_far, f"{where}={path}")) is not None:
            found = module
            continue
        if found is None:
            raise ValueError(
                f"{where}={path}: there is no {part!r} to import{advise(part, [*OURS])}: is the "
                "name right, and its folder on PYTHONPATH?"
            )
        if not hasattr(found, part):
            there = _names(found)
            above = ".".join(parts[:i])
            raise ValueError(
                f"{where}={path}: {above} has no {part!r}{advise(part, there)}; it has: "
                f"{', '.join(there[:30]) or 'nothing public'}"
            )
        found = getattr(found, part)
    return found


def _imported(name: str, where: str) -> types.ModuleType | None:
    """A module, None where there is no such one; what goes wrong inside it is said."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise ValueError(f"{where}: {name} cannot be imported: {error}: install it") from error
    except Exception as error:  # whatever the code of a plug-in raises
        raise ValueError(
            f"{where}: {name} fails as it is imported ({type(error).__name__}: {error})"
        ) from error


def _names(found: Any) -> list[str]:
    """Public names of a module or class that are its own, the modules of a package included."""
    if not isinstance(found, types.ModuleType):
        return [name for name in dir(found) if not name.startswith("_")]
    own = [
        name for name, value in vars(found).items()
        if getattr(value, "__module__", None) == found.__name__ and callable(value)
    ]  # fmt: skip
    inside = [module.name for module in pkgutil.iter_modules(getattr(found, "__path__", []))]
    return sorted(name for name in {*own, *inside} if not name.startswith("_"))


def parameters(made: Any) -> list[str] | None:
    """Names of a target's arguments; None where it takes any, or does not say."""
    try:
        every = inspect.signature(made).parameters.values()
    except (TypeError, ValueError):
        return None
    names = [p.name for p in every if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if any(p.kind == p.VAR_KEYWORD for p in every):
        assumed = _assumed(made)
        return None if assumed is None else [*names, *get_type_hints(assumed)]
    return names


def _assumed(made: Any) -> Any:
    """What `**assumed` of a simulator stands for: FittedSimulator.fit; None of others."""
    return getattr(inspect.getmodule(made), "Assumptions", None)


def _walk(part: Any, where: str) -> None:
    if not isinstance(part, dict):
        return
    kinds = declared(str(part["_target_"])) if "_target_" in part else {}
    for key, value in part.items():
        _walk(value, f"{where}.{key}")
        if key in kinds and not fits(value, kinds[key]):
            names = " or ".join(dict.fromkeys(PLAIN[k] for k in kinds[key] if k in PLAIN))
            null = " or null" if type(None) in kinds[key] else ""
            raise ValueError(f"{where}.{key} must be {names}{null}, got {value!r}")


def fits(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a value of a yaml is of one of these types; a whole number is a number too."""
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, kinds)


def declared(target: str) -> dict[str, tuple[type, ...]]:
    """Plain types of a target's parameters by name; those of any other type are left out."""
    try:
        made = get_object(target)
        every = inspect.signature(made).parameters.values()
        hints = get_type_hints(made.__init__ if inspect.isclass(made) else made)
    except Exception:  # whatever importing a plug-in raises: instantiate says it better
        return {}
    hints = {p.name: hints[p.name] for p in every if p.name in hints and p.kind != p.VAR_KEYWORD}
    if any(p.kind == p.VAR_KEYWORD for p in every):  # FittedSimulator.fit(**assumed)
        assumed = _assumed(made)
        hints |= get_type_hints(assumed) if assumed is not None else {}
    kinds = {name: _plain(hint) for name, hint in hints.items()}
    return {name: kind for name, kind in kinds.items() if kind}


def _plain(hint: Any) -> tuple[type, ...]:
    """The plain types of a hint such as `float | None`; () where it has another part."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return parts if all(p in PLAIN or p is type(None) for p in parts) else ()
