"""Policies that can be judged on the decisions of a training run: its agent and its baselines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from agents.base import Agent, AgentSpec
from agents.frozen import Frozen
from encoders.state import CONTEXT, EMPTY, Observation
from evaluation import DecisionLog, Target, decisions
from evaluation.fqe import FittedQ
from experiments.checkpoints import load_checkpoint, of_run
from experiments.from_logs import events_before, with_levels
from experiments.logged_policies import Question, Settings, own
from experiments.policies import DEFAULT_STEPS, named_agent
from experiments.prepare import events_of
from simulators.base import Catalog, SimSpec

Array = np.ndarray
DENSE = 20_000_000  # numbers of an array (rows, items): 160 MB
ASKED = 2_000_000  # numbers (decisions, items) that policies answer for one batch of the log
ROUNDED = 1e-5  # relative difference in which a probability is the logged one
CHUNK = 1024  # decisions that an agent is asked about at once
DOUBLINGS = 4  # of a baseline's temperature, at most
RIDGE = 10.0  # decisions' worth of pull of an action's own Q to that of all: few are shown often
TASTES = 8  # axes of the item vectors that a fitted Q sees
CLOSE = 0.02  # relative difference that float32 may make between a probability then and now
# no drl: its occupancies are of states that come back, and each of these is seen once
EPISODES = ("wpdis", "pdis", "snips")  # the last is of single decisions, in the log's own states
MODELLED = ("seq_sndr", "wpdis", "fqe", "snips")


def run_policies(
    settings: Settings, *, path: str | None = None, temperatures: Sequence[float] = (0.5,),
    baselines: Sequence[str] = ("random", "popularity", "buy_again", "item_knn"),
    others: Mapping[str, Agent] | None = None,
) -> Question:  # fmt: skip
    """The agent of a run at other temperatures, and baselines, on what its users were shown.

    `others` are further policies by name, made stochastic as the baselines are.
    """
    if isinstance(temperatures, str) or isinstance(baselines, str):
        raise ValueError("log.temperatures and log.baselines are lists: log.baselines=[popularity]")
    folder, where = folders(path)
    about = decisions.meta(where)
    adaptive = bool(about["adaptive"])
    if adaptive and not settings.adaptive:
        raise ValueError(
            f"{where} is adaptive: its policy learned while it was written, so that only "
            f"confidence sequences hold. Use the frozen policy's log {folder / 'decisions'}, or "
            "take them with adaptive=true"
        )
    cfg = configuration(folder)
    spec, catalog = spec_of(cfg, about)
    if catalog.fingerprint() != about["catalog"]:
        raise ValueError(
            f"{where} is a log of another catalogue ({about['catalog']}, that of {folder} is now "
            f"{catalog.fingerprint()}): its data or what prepares it has changed, train again"
        )
    seen = Seen(columns(where), *decisions.seen_by(where))
    small = len(seen.rows["item"]) * spec.num_items <= DENSE
    log = decision_log(seen, spec, small, adaptive)
    notes = [f"{where}: {len(seen.obs):,} decisions of {about['policy']}"]
    targets = {"logging": own(log)} if adaptive else {}
    agents = {} if adaptive else of_the_run(folder, cfg, spec, catalog, temperatures)
    if adaptive:
        notes.append("the trained agent is not judged: it learned from these very decisions")
    else:
        check_same(agents["logging"], seen, folder)
    rivals = {name: named_agent(name, spec) for name in baselines} | dict(others or {})
    softened = {name: soft(agent, spec, cfg, seen, settings) for name, agent in rivals.items()}
    agents |= softened
    notes.append(
        "baselines are stochastic as the agent is, a softmax of standardised scores with a uniform "
        f"share: {', '.join(f'{n} at temperature {x.temperature:g}' for n, x in softened.items())}"
    )
    targets |= {name: target(agent, seen, spec, small) for name, agent in agents.items()}
    if not small or spec.slate_size > 1:  # asked anew, it would miss its float32 by the last bits
        targets["logging"] = Target.from_probabilities(seen.rows["propensity"])
    model, estimators = answers(settings, log, small, notes)
    return Question(log, targets, notes, model, estimators, max(256, ASKED // spec.num_items),
                    baseline="logging")  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """A decision log: what was decided, and what the policy saw of it."""

    rows: dict[str, Array]  # columns (n,), one row a shown item
    obs: Observation  # of D decisions
    excluded: Tensor  # (D, M) ids

    def chance(self, agent: Agent, most: int) -> Array:
        """What an agent says of the rows of the first `most` decisions, (m,)."""
        decision, slot, item = (self.rows[name] for name in ("decision", "slot", "item"))
        most = min(most, len(self.obs))
        slate = torch.full((len(self.obs), int(slot.max()) + 1), EMPTY)  # (D, K)
        slate[decision, slot] = torch.from_numpy(item)
        found = []
        for start in range(0, most, CHUNK):
            part = slice(start, min(start + CHUNK, most))
            with torch.no_grad():
                found.append(agent.slate_probs(self.obs[part], self.excluded[part], slate[part]))
        first = decision < most
        chance = torch.cat(found).double().numpy()[decision[first], slot[first]]
        return np.where(item[first] == EMPTY, 1.0, chance)


def folders(path: str | None) -> tuple[Path, Path]:
    """The run folder and the folder of the log in it, of the path of either."""
    if path is None:
        raise ValueError("log=run needs the folder of a training run: log.path=RUN_FOLDER")
    given = Path(path)
    if decisions.parts(given):
        return given.absolute().parent, given
    if not (given / "config.yaml").is_file():
        raise ValueError(
            f"{given} is no run folder: expected config.yaml and decisions/ in it, as "
            "experiments/train_agent.py leaves them"
        )
    if not decisions.parts(given / "decisions"):
        raise ValueError(
            f"{given} has no log of a frozen policy: train with frozen_users=1000, or choose the "
            f"adaptive log with log.path={given / 'training'} adaptive=true"
        )
    return given, given / "decisions"


def configuration(folder: Path) -> DictConfig:
    """What the run was started with."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"no {path}: a log is judged with the configuration of its run beside it")
    cfg = OmegaConf.load(path)
    if not isinstance(cfg, DictConfig) or not {"env", "agent", "seed", "frozen_temperature"} <= {
        *cfg
    }:
        raise ValueError(f"{path} is not a configuration of experiments/train_agent.py")
    return cfg


def spec_of(cfg: DictConfig, about: dict[str, Any]) -> tuple[AgentSpec, Catalog]:
    """What the run's agents knew of the shop; nothing is fitted, the widths are the log's."""
    sizes, behaviours = about["sizes"], len(about["behaviours"])
    if cfg.env.get("data") is None:
        world = instantiate(cfg.env.simulator, SimSpec(None, None, device="cpu", seed=cfg.seed))
        catalog: Catalog = world.catalog
        events = events_of(world.users, catalog)
    else:
        logs = with_levels(instantiate(cfg.env.data))
        catalog = instantiate(cfg.env.catalog, logs, device="cpu", progress=False)
        events = events_before(cfg, logs, catalog)
    spec = AgentSpec(
        num_items=len(catalog),
        slate_size=cfg.env.session.slate_size,
        item_vectors=catalog.vectors,
        category=catalog.category,
        popularity=catalog.popularity,
        interactions=events.counts(),
        profile_size=sizes["profile"],
        past_size=sizes["past"],
        history_size=sizes["history"],
        feedback_size=behaviours,
        context_size=CONTEXT,
        seed=cfg.seed,
        events=events,
        total_steps=cfg.get("steps") or cfg.env.get("train_steps") or DEFAULT_STEPS,
    )
    return spec, catalog


def of_the_run(
    folder: Path, cfg: DictConfig, spec: AgentSpec, catalog: Catalog, temperatures: Sequence[float]
) -> dict[str, Agent]:
    """The frozen agent that wrote the log, and the same at other temperatures."""
    agent: Any = instantiate(cfg.agent, spec)
    load_checkpoint(of_run(folder), agent, catalog.fingerprint())
    frozen = Frozen(agent, spec, temperature=cfg.frozen_temperature)
    found: dict[str, Agent] = {"logging": frozen}
    for share in temperatures:
        temperature = share * cfg.frozen_temperature
        name = f"{cfg.agent_name} at {temperature:g}"
        found[name] = Frozen(agent, spec, temperature=temperature)
    return found


def soft(agent: Any, spec: AgentSpec, cfg: DictConfig, seen: Seen, settings: Settings) -> Frozen:
    """An agent made stochastic as the one that wrote the log, or softer.

    The temperature is doubled until the log's single decisions have the effective sample size
    asked for, or a tenth of themselves where they are few; in an adaptive log it stays.
    """
    temperature, propensity = float(cfg.frozen_temperature), seen.rows["propensity"]
    wanted = min(settings.soften_ess, len(propensity) / 10)
    for _ in range(0 if settings.adaptive else DOUBLINGS):
        weight = seen.chance(Frozen(agent, spec, temperature=temperature), len(seen.obs))
        weight /= propensity
        if weight.sum() ** 2 >= wanted * (weight @ weight):
            break
        temperature *= 2.0
    return Frozen(agent, spec, temperature=temperature)


def target(agent: Agent, seen: Seen, spec: AgentSpec, small: bool) -> Target:
    """An agent as a target; where there is room for it, it is asked once and for all."""
    if spec.slate_size > 1 or not small:
        return Target.from_policy(agent, seen.obs, seen.excluded)
    pi = np.empty((len(seen.obs), spec.num_items), dtype=np.float32)  # (n, N)
    for start in range(0, len(pi), CHUNK):
        part = slice(start, start + CHUNK)
        with torch.no_grad():
            pi[part] = agent.action_probs(seen.obs[part], seen.excluded[part]).numpy()
    at = (np.arange(len(pi)), seen.rows["item"])  # (n,) the logged ones
    then = seen.rows["propensity"]
    pi[at] = np.where(np.isclose(pi[at], then, rtol=ROUNDED, atol=0.0), then, pi[at])
    return Target.from_matrix(pi)


def check_same(agent: Agent, seen: Seen, folder: Path) -> None:
    """Refuse a checkpoint that does not give the first decisions their logged probabilities."""
    now = seen.chance(agent, CHUNK)
    then = seen.rows["propensity"][seen.rows["decision"] < CHUNK]
    off = np.abs(now / then - 1.0)
    if (off > CLOSE).any():
        raise ValueError(
            f"{folder / 'checkpoint'} is not the policy that wrote the log: what it says of row "
            f"{off.argmax()} is {off.max():.0%} off. Give the folder as the training left it"
        )


def columns(where: Path) -> dict[str, Array]:
    """The log's columns (n,), one row a shown item."""
    table = decisions.table(where)
    names = ("decision", "slot", "item", "propensity", "reward", "user", "episode", "step")
    found = {name: table[name].to_numpy() for name in names}
    kinds = {"propensity": np.float64, "reward": np.float64}
    return {name: x.astype(kinds.get(name, np.int64)) for name, x in found.items()}


def decision_log(seen: Seen, spec: AgentSpec, small: bool, adaptive: bool) -> DecisionLog:
    """Sessions where a slate is one item, else slates; of an adaptive log single decisions."""
    rows = seen.rows
    given: dict[str, Any] = {
        "action": rows["item"], "reward": rows["reward"], "propensity": rows["propensity"],
        "num_actions": spec.num_items, "adaptive": adaptive,
    }  # fmt: skip
    if small and not adaptive:  # a frozen policy could show all that was not excluded
        excluded = seen.excluded.numpy()
        possible = np.ones((len(excluded), spec.num_items + 1), dtype=bool)
        np.put_along_axis(possible, np.where(excluded == EMPTY, spec.num_items, excluded), False, 1)
        given["support"] = possible[rows["decision"], :-1]
    if spec.slate_size > 1:
        given |= {"decision": rows["decision"], "slot": rows["slot"]}
    elif not adaptive:
        pairs = np.stack([rows["user"], rows["episode"]], axis=1)
        given |= {
            "episode": np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1),
            "step": rows["step"], "context": state(seen.obs, spec.item_vectors),
        }  # fmt: skip
    if not adaptive:  # decisions of a user hang together; a confidence sequence knows that
        given["cluster"] = rows["user"]
    return DecisionLog.from_arrays(**given)


def state(obs: Observation, vectors: Tensor) -> Array:
    """What a fitted Q knows of a decision, (n, 2 * TASTES + 2 + C).

    Means of what was bought before and of what was chosen in this session on the main axes of the
    item vectors, how much was shown and chosen, and the calendar.
    """
    covariance = torch.cov(vectors.double().T).reshape(2 * [vectors.shape[1]])  # (D, D)
    axes = torch.linalg.eigh(covariance).eigenvectors[:, -TASTES:]  # (D, T), the largest last
    tastes = torch.cat([vectors.double() @ axes, torch.zeros(1, axes.shape[1])])  # (N + 1, T)
    parts = []
    for start in range(0, len(obs), CHUNK):
        some = obs[start : start + CHUNK]
        chosen = some.feedback[:, :, 0].double() * (some.history != EMPTY)  # (b, L)
        bought = some.past_count.log1p().double() * (some.past != EMPTY)  # (b, H)
        means = [
            (weight[:, :, None] * tastes[items]).sum(dim=1)
            / weight.sum(dim=1, keepdim=True).clamp(min=1.0)
            for items, weight in ((some.past, bought), (some.history, chosen))
        ]  # EMPTY is the last row of tastes: zeros
        counts = torch.stack([(some.history != EMPTY).sum(dim=1).double(), chosen.sum(dim=1)], 1)
        parts.append(torch.cat([*means, counts, some.context.double()], dim=1))
    return torch.cat(parts).numpy()


def answers(
    settings: Settings, log: DecisionLog, small: bool, notes: list[str]
) -> tuple[FittedQ | None, tuple[str, ...] | None]:
    """The model of sessions, and the estimators where none are typed."""
    if log.adaptive:
        return None, ("sips",) if log.unit == "slate" else ("ips",)
    if log.unit == "slate":
        return None, None
    notes.append("snips is the reward of one decision, all others that of a session")
    if settings.reward_model is None:
        return None, EPISODES
    if not small:
        notes.append(
            f"no fitted Q: {log.num_rows:,} rows x {log.num_actions:,} items are more than "
            f"{DENSE:,} numbers; a log of fewer users has one"
        )
        return None, EPISODES
    return FittedQ(model=settings.reward_model, ridge=RIDGE, seed=settings.seed), MODELLED
