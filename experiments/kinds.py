"""Words where numbers are meant, and the like, refused before the work, with the key's name."""

import inspect
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def refuse_words(config: DictConfig, where: str) -> None:
    """Hold each value beside a `_target_` against the type that the target declares for it.

    Targets that cannot be imported, and values of no plain type, are left for `instantiate`.
    """
    _walk(OmegaConf.to_container(config, resolve=True), where)


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
        parameters = inspect.signature(made).parameters.values()
        hints = get_type_hints(made.__init__ if inspect.isclass(made) else made)
    except Exception:  # whatever importing a plug-in raises: instantiate says it better
        return {}
    hints = {
        p.name: hints[p.name] for p in parameters if p.name in hints and p.kind != p.VAR_KEYWORD
    }
    if any(p.kind == p.VAR_KEYWORD for p in parameters):  # FittedSimulator.fit(**assumed)
        assumed = getattr(inspect.getmodule(made), "Assumptions", None)
        hints |= get_type_hints(assumed) if assumed is not None else {}
    kinds = {name: _plain(hint) for name, hint in hints.items()}
    return {name: kind for name, kind in kinds.items() if kind}


def _plain(hint: Any) -> tuple[type, ...]:
    """The plain types of a hint such as `float | None`; () where it has another part."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return parts if all(p in PLAIN or p is type(None) for p in parts) else ()
