"""What a configuration alone tells is wrong with an environment, refused before any log is read."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from envs.checks import check_pessimism, check_sizes
from envs.excluded import Rule, read_rules
from envs.rewards import Margin, Weighted
from experiments.cli import advise
from experiments.kinds import refuse_targets, refuse_words
from simulators.catalog import check_catalog
from simulators.settings import check_display, check_settings

TRIPS = "simulators.fitted.FittedSimulator.fit"
IMPRESSIONS = "simulators.exposed.ExposureSimulator.fit"
CHECKS = {
    TRIPS: check_settings,
    IMPRESSIONS: check_settings,
    "simulators.boosted.BoostedSimulator.fit": check_settings,
    "simulators.catalog.catalog_from_logs": check_catalog,
}
SESSION = ("slate_size", "max_steps", "reward", "excluded")


def refuse_early(cfg: DictConfig) -> None:
    """Refuse what `cfg.env` cannot be, by the keys that were typed: before minutes of work."""
    env = cfg.env
    refuse_targets(env, "env")
    refuse_words(env, "env")
    for part in ("catalog", "simulator"):
        refuse_settings(env.get(part), f"env.{part}")
    refuse_display(env)
    refuse_session(cfg)
    refuse_pessimism(env)
    with under("env.session."):
        refuse_reward(env)
        rules_of(cfg)  # a table that cannot be read


def refuse_settings(part: DictConfig | None, where: str) -> None:
    """Refuse numbers and words that our own fits and catalogues would refuse later."""
    check = CHECKS.get(str(part.get("_target_"))) if OmegaConf.is_dict(part) and part else None
    if check is None:
        return
    with under(f"{where}."):
        check(settings_of(part))


@contextmanager
def under(where: str) -> Iterator[None]:
    """Put where the key stands before a message that begins with the key's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def settings_of(part: Any) -> dict[str, Any]:
    """What a target is given: the yaml's keys, and its own defaults for those left out."""
    given: Any = OmegaConf.to_container(part, resolve=True)
    target = get_object(given.pop("_target_"))
    every = inspect.signature(target).parameters.values()
    return {p.name: p.default for p in every if p.default is not p.empty} | given


def refuse_display(env: DictConfig) -> None:
    """Refuse exposure=display of one of our logs that has no table of promotions."""
    source = str((env.get("data") or {}).get("_target_"))
    exposure = (env.get("simulator") or {}).get("exposure")
    if isinstance(exposure, str) and source.startswith("sources."):
        check_display(exposure, source.split(".")[1])


def refuse_session(cfg: DictConfig) -> None:
    """Refuse a session that is none, or that the catalogue's size cannot fill."""
    session = cfg.env.get("session")
    if not OmegaConf.is_dict(session) or not session:
        raise ValueError(
            f"env={cfg.env_name} has no session: its yaml needs session: {{slate_size: 1, "
            "max_steps: 20, reward: ...}, as experiments/conf/env/tiny.yaml has it"
        )
    for key in session:
        if key not in SESSION:
            raise ValueError(
                f"env.session.{key}: there is no such key{advise(str(key), [*SESSION])}; "
                f"env.session has {', '.join(SESSION)}"
            )
    for key in ("slate_size", "max_steps"):
        size = session.get(key)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(
                f"env.session.{key} must be a whole number of at least 1, got {size!r}"
            )
    most = (cfg.env.get("catalog") or {}).get("size")
    if isinstance(most, int):
        check_sizes(most, 1, session.slate_size, session.max_steps)


def refuse_reward(env: DictConfig) -> None:
    """Refuse a reward that is no function of one response, or lacks its table or behaviours."""
    if "reward" not in env.session:
        return
    given = env.session.reward
    usual = "{_target_: hydra.utils.get_method, path: envs.rewards.units}"
    if not OmegaConf.is_dict(given) or "_target_" not in given:
        raise ValueError(
            f"reward must be such as {usual}, got {given!r}: "
            "env.session.reward.path=envs.rewards.revenue chooses another function"
        )
    try:
        reward = instantiate(given, _convert_="all")
    except InstantiationException as error:
        raise ValueError(f"reward: {error.__cause__ or error}") from error
    if isinstance(reward, Margin):
        reward.table()  # its columns
        return
    if inspect.isclass(reward) or not takes_one(reward):
        raise ValueError(
            f"reward must be a function of one Response, got {reward!r}: such as "
            f"{usual}; a class is named by _target_ (envs.rewards.Weighted, envs.rewards.Margin)"
        )
    known = behaviours_of(env)
    if isinstance(reward, Weighted) and known is not None:
        reward.check(known)


def takes_one(reward: Any) -> bool:
    """Whether it can be called with one argument, as far as it says."""
    if not callable(reward):
        return False
    try:
        inspect.signature(reward).bind(None)
    except TypeError:
        return False
    except ValueError:  # it does not say
        return True
    return True


def behaviours_of(env: DictConfig) -> list[str] | None:
    """What the users of `env.simulator` do, where that is known before the log is read."""
    simulator: Any = env.get("simulator") or {}
    if simulator.get("behaviours"):
        return list(simulator["behaviours"])
    target = str(simulator.get("_target_"))
    if not target.startswith("simulators."):  # what a class of others says its users may change
        return None
    made = get_object(target)
    known = getattr(getattr(made, "__self__", made), "behaviours", None)  # or of its class method
    return list(known) if isinstance(known, tuple) else None


def refuse_pessimism(env: DictConfig) -> None:
    """Refuse what is no multiple of a doubt, and doubt of users who state none."""
    pessimism = env.get("pessimism")
    if pessimism is None:
        return
    check_pessimism(pessimism)
    simulator = env.get("simulator") or {}
    target = str(simulator.get("_target_"))
    sure = target == IMPRESSIONS or (target == TRIPS and simulator.get("members") == 1)
    if pessimism and sure:
        one = "env.simulator.members=1 has none"
        why = "users fitted to impressions state none" if target == IMPRESSIONS else one
        raise ValueError(
            f"env.pessimism={pessimism} takes the doubt of an ensemble from the reward, {why}: "
            "leave env.pessimism at 0"
            + (", or give env.simulator.members=5" if target == TRIPS else "")
        )


def rules_of(cfg: DictConfig) -> list[Rule]:
    """What `env.session.excluded` says, none if nothing."""
    session = cfg.env.get("session") or {}
    source = session.get("excluded")
    if source is None:
        return []
    return read_rules(list(source) if isinstance(source, ListConfig) else source)
