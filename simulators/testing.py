"""The conformance kit for simulators: `check_simulator` says in plain English what is wrong."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoders.state import EMPTY
from simulators.base import Response, UserSimulator, UserState
from simulators.draws import Draws

BATCH, SLATE, STEPS = 12, 5, 4  # users, slots and steps of the sessions that are played
TRIALS = 2_000  # single items shown to compare purchases with relevance
SURPRISE = 4.5  # standard errors a right simulator exceeds once in 150,000 checks


def check_simulator(simulator: UserSimulator, *, seed: int = 0) -> list[str]:
    """List what a simulator does wrong, an empty list if nothing was found."""
    if not isinstance(simulator, UserSimulator):
        members = ("catalog", "behaviours", "users", "start", "respond", "relevance")
        missing = [m for m in members if not hasattr(simulator, m)]
        return [f"a simulator needs the members {', '.join(missing)}: see simulators/base.py"]
    problems = list(_tables(simulator))
    if problems:  # the rest would only repeat them
        return problems
    checks: list[Callable[[UserSimulator, int], Iterator[str]]] = [
        _answers, _purity, _batches, _empty_slots, _relevance, _frequency,
    ]  # fmt: skip
    for check in checks:
        before = _global_randomness()
        try:
            problems += check(simulator, seed)
        except Exception as error:  # a plug-in may raise anything; the author wants the whole list
            problems.append(f"{check.__name__[1:]}: raised {type(error).__name__}: {error}")
        if _global_randomness() != before:
            problems.append(
                f"{check.__name__[1:]}: a global random generator was used or seeded; take every "
                f"number from `draws`, or from a generator of your own when fitting"
            )
    return problems


def _tables(simulator: UserSimulator) -> Iterator[str]:
    catalog, users = simulator.catalog, simulator.users
    num_items, num_users = len(catalog), len(users)
    if not simulator.behaviours or not all(isinstance(b, str) for b in simulator.behaviours):
        yield f"behaviours: must be a tuple of names, got {simulator.behaviours!r}"
    if num_items < SLATE or num_users < 1:
        yield f"catalog, users: need {SLATE} items and 1 user, got {num_items} and {num_users}"
        return
    held = users.past.shape[1:]  # (H,)
    expected = {
        "catalog.vectors": (
            catalog.vectors,
            (num_items, *catalog.vectors.shape[1:]),
            torch.float32,
        ),
        "catalog.category": (catalog.category, (num_items,), torch.int64),
        "catalog.price": (catalog.price, (num_items,), torch.float32),
        "catalog.popularity": (catalog.popularity, (num_items,), torch.float32),
        "users.profile": (users.profile, (num_users, *users.profile.shape[1:]), torch.float32),
        "users.past": (users.past, (num_users, *held), torch.int64),
        "users.past_count": (users.past_count, (num_users, *held), torch.float32),
        "users.past_age": (users.past_age, (num_users, *held), torch.float32),
        "users.start": (users.start, (num_users,), torch.float64),
    }
    for name, (tensor, shape, dtype) in expected.items():
        yield from _tensor(name, tensor, shape, dtype, catalog.vectors.device)
    if ((users.past < EMPTY) | (users.past >= num_items)).any():
        yield f"users.past: items are numbered 0 to {num_items - 1}, {EMPTY} where there is none"
    ordered = users.past.sort(dim=1).values  # (U, H)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY)).any():
        yield "users.past: a user has an item twice; count it in past_count instead"
    if not (catalog.vectors.isfinite().all() and users.profile.isfinite().all()):
        yield "catalog.vectors, users.profile: must be finite"


def _answers(simulator: UserSimulator, seed: int) -> Iterator[str]:
    """Shapes, types and values of what `start` and `respond` give."""
    device = simulator.catalog.vectors.device
    for step, (state, slate, response, after) in enumerate(
        _play(simulator, _some(simulator), seed)
    ):
        if step == 0:
            for key, value in state.items():
                yield from _tensor(f"start: state[{key!r}]", value, (BATCH, ...), None, device)
        if set(after) != set(state):
            yield f"respond: the state's keys changed, {sorted(set(after) ^ set(state))} differ"
        for key in set(after) & set(state):
            was = state[key]
            yield from _tensor(f"respond: state[{key!r}]", after[key], was.shape, was.dtype, device)
        if tuple(response.chosen) != tuple(simulator.behaviours):
            yield f"respond: chosen has {list(response.chosen)}, behaviours {simulator.behaviours}"
        slots, rows = (BATCH, slate.shape[1]), (BATCH,)
        parts: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]]
        parts = [(f"chosen[{b!r}]", c, slots, torch.bool) for b, c in response.chosen.items()]
        parts += [("organic", response.organic, slots, torch.bool)]
        parts += [("left", response.left, rows, torch.bool)]
        parts += [(n, getattr(response, n), slots, torch.float32) for n in ("value", "uncertainty")]
        parts += [("elapsed", response.elapsed, rows, torch.float32)]
        wrong = [p for n, x, s, d in parts for p in _tensor(f"respond: {n}", x, s, d, device)]
        yield from wrong
        if wrong:
            return
        if not (response.elapsed >= 0).all() or not response.elapsed.isfinite().all():
            yield "respond: elapsed must be finite days, 0 or more"
        if ((response.elapsed > 0) & response.left).any():
            yield "respond: who left does not come back, so elapsed must be 0 where left"
        if not (response.uncertainty >= 0).all():
            yield "respond: uncertainty must be 0 or more"
        chosen = torch.stack(list(response.chosen.values())).any(dim=0)  # (B, K)
        if not response.value.isfinite().all() or (response.value[~chosen] != 0).any():
            yield "respond: value must be finite, and 0 where nothing was chosen"


def _purity(simulator: UserSimulator, seed: int) -> Iterator[str]:
    """Same state and draws, same answer; the state handed in stays as it was."""
    draws, steps = Draws.root(seed, _device(simulator)), _play(simulator, _some(simulator), seed)
    for step, (state, slate, response, after) in enumerate(steps):
        kept = {k: v.clone() for k, v in state.items()}
        at = _at(draws, _some(simulator), step)
        second, later = simulator.respond(state, slate, at)
        if not _same(kept, state):
            changed = [k for k in kept if not torch.equal(kept[k], state[k])]
            yield f"respond: wrote into the state handed in ({changed}); return a new one"
            return
        if not _same(vars(response), vars(second)) or not _same(after, later):
            yield "respond: the same state and draws gave two different answers"
            return


def _batches(simulator: UserSimulator, seed: int) -> Iterator[str]:
    """A user's answers do not depend on who else is in the batch."""
    users = _some(simulator)
    turned = torch.arange(BATCH, device=users.device).flip(0)
    together = list(_play(simulator, users, seed))
    for name, rows in (("alone", torch.arange(BATCH)[:, None]), ("in another order", turned[None])):
        for chosen in rows.to(users.device):
            parts = list(_play(simulator, users, seed, chosen))
            for step, ((*_, one, _), (*_, all_of_them, _)) in enumerate(
                zip(parts, together, strict=True)
            ):
                if not _same(vars(one), _rows(vars(all_of_them), chosen)):
                    yield (
                        f"respond: user {int(users[chosen[0]])} answers differently {name} than in "
                        f"a batch, at step {step}"
                    )
                    return


def _empty_slots(simulator: UserSimulator, seed: int) -> Iterator[str]:
    """What is not shown is not chosen."""
    for _, slate, response, _ in _play(simulator, _some(simulator), seed):
        answers = {**response.chosen, "organic": response.organic}
        wrong = [name for name, chosen in answers.items() if (chosen & (slate == EMPTY)).any()]
        if wrong:
            yield f"respond: {', '.join(wrong)} is true in an empty slot"
            break
    users = _some(simulator)
    at = _at(Draws.root(seed, users.device), users, 0)
    nothing = torch.full((BATCH, SLATE), EMPTY, device=users.device)
    response, _ = simulator.respond(simulator.start(users, at), nothing, at)
    if any(chosen.any() for chosen in response.chosen.values()):
        yield "respond: something was chosen from a slate of empty slots"


def _relevance(simulator: UserSimulator, seed: int) -> Iterator[str]:
    users = _some(simulator)
    state = simulator.start(users, _at(Draws.root(seed, users.device), users, 0))
    relevance = simulator.relevance(state)
    shape = (BATCH, len(simulator.catalog))
    yield from _tensor("relevance", relevance, shape, torch.float32, users.device)
    if not ((relevance > 0) & (relevance < 1)).all():
        yield "relevance: must be probabilities above 0 and below 1"
    alone = simulator.relevance({k: v[:1] for k, v in state.items()})
    if not torch.allclose(alone, relevance[:1], rtol=1e-4, atol=1e-7):
        yield "relevance: a user's probabilities depend on who else is in the batch"


def _frequency(simulator: UserSimulator, seed: int) -> Iterator[str]:
    """The best item shown alone is bought as often as its relevance says."""
    device = _device(simulator)
    episode = torch.arange(TRIALS, device=device)
    users = episode % min(8, len(simulator.users))
    at = Draws.root(seed, device).at(users, episode, torch.zeros_like(users))
    state = simulator.start(users, at)
    promised, item = simulator.relevance(state).double().max(dim=1)  # (T,) each
    response, _ = simulator.respond(state, item[:, None], at)
    bought = int(response.chosen[simulator.behaviours[0]].sum())
    expected = float(promised.sum())
    error = float((promised * (1 - promised)).sum().sqrt())
    if abs(bought - expected) > SURPRISE * error + 1:
        yield (
            f"relevance: promises that {expected:.0f} of {TRIALS} best items are bought if shown "
            f"alone, but respond bought {bought} ({SURPRISE * error:.0f} more or less is chance)"
        )


def _play(
    simulator: UserSimulator, users: Tensor, seed: int, rows: Tensor | None = None
) -> Iterator[tuple[UserState, Tensor, Response, UserState]]:
    """Show `users` (B,), or only `rows` of them, random slates with an empty slot each."""
    device, num_items = users.device, len(simulator.catalog)
    rows = torch.arange(len(users), device=device) if rows is None else rows
    draws, generator = Draws.root(seed, device), torch.Generator().manual_seed(seed)
    state = simulator.start(users[rows], _at(draws, users, 0, rows))
    for step in range(STEPS):
        order = torch.rand(len(users), num_items, generator=generator).argsort(dim=1)
        slate = order[:, :SLATE].to(device)  # (B, K)
        slate[:, 1 + step % (SLATE - 1)] = EMPTY
        response, after = simulator.respond(state, slate[rows], _at(draws, users, step, rows))
        yield state, slate[rows], response, after
        state = after


def _at(draws: Draws, users: Tensor, step: int, rows: Tensor | None = None) -> Draws:
    """Draws of users (B,) or `rows` of them, each in an episode of its own, at one step."""
    episode = torch.arange(len(users), device=users.device)
    if rows is not None:
        users, episode = users[rows], episode[rows]
    return draws.at(users, episode, torch.full_like(users, step))


def _some(simulator: UserSimulator) -> Tensor:
    """Users to play with, (B,); a small table is used more than once."""
    return torch.arange(BATCH, device=_device(simulator)) % len(simulator.users)


def _device(simulator: UserSimulator) -> torch.device:
    return simulator.catalog.vectors.device


def _tensor(
    name: str,
    value: Any,
    shape: tuple[Any, ...],
    dtype: torch.dtype | None,
    device: torch.device,
) -> Iterator[str]:
    """Say how `value` is not the tensor that is expected; ... in `shape` stands for the rest."""
    if not isinstance(value, Tensor):
        yield f"{name}: must be a tensor, got {type(value).__name__}"
        return
    shape = (*shape[:-1], *value.shape[len(shape) - 1 :]) if shape[-1:] == (...,) else tuple(shape)
    if tuple(value.shape) != shape:
        yield f"{name}: must have shape {shape}, got {tuple(value.shape)}"
    if dtype is not None and value.dtype != dtype:
        yield f"{name}: must be {dtype}, got {value.dtype}"
    if value.device != device:
        yield f"{name}: must be on {device} like the catalogue, got {value.device}"


def _rows(values: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    return {k: _rows(v, rows) if isinstance(v, dict) else v[rows] for k, v in values.items()}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two dicts of tensors, of one depth, are equal bit by bit."""
    if one.keys() != other.keys():
        return False
    return all(
        _same(v, other[k]) if isinstance(v, dict) else torch.equal(v, other[k])
        for k, v in one.items()
    )


def _global_randomness() -> tuple[Any, ...]:
    """A fingerprint of the global generators, which a simulator must not touch."""
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002 - read only, to see it untouched
    return random.getstate(), repr(legacy), torch.get_rng_state().numpy().tobytes()
