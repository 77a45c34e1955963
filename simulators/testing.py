"""The conformance kit for simulators: `check_simulator` says in plain English what is wrong."""

import random
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoders.state import EMPTY
from simulators.base import Response, UserSimulator, UserState
from simulators.draws import Draws
from simulators.testing_dynamics import check_dynamics
from simulators.testing_types import (
    SLATE,
    WrongTypeError,
    answered,
    entered,
    equal,
    responded,
    rows_of,
    same,
    started,
    tables,
    tensor,
    tensors_of,
    told,
)
from simulators.trips import trips_from_logs
from sources.logs import Logs

BATCH, STEPS = 12, 4  # users and steps of the sessions that are played
CROWD, LONG = 256, 100  # of so many users somebody must leave within so many slates
TRIALS = 2_000  # single items shown to compare purchases with relevance
SURPRISE = 4.5  # standard errors a right simulator exceeds once in 150,000 checks
RARE, SURE = 1e-4, 0.9  # rates beyond which no user is like those of a log
TIMES = 2.0  # rates of simulator and log may differ by this factor
ENOUGH = 100  # events of a behaviour that its rate is judged on

Check = Callable[[UserSimulator, int], Iterator[str]]


def check_simulator(
    simulator: UserSimulator, *, seed: int = 0, logs: Logs | None = None, quick: bool = False
) -> list[str]:
    """List what a simulator does wrong, an empty list if nothing was found.

    With `logs`, rates are compared with theirs. Settings that the simulator declares in `dynamics`
    are checked too: see simulators/testing_dynamics.py. `quick` looks only for what makes training
    on it wrong, on a few users: shapes, types, devices, NaN, purity, batches, empty slots.
    """
    if isinstance(simulator, type):
        name = simulator.__name__
        return [f"{name} is a class: make one first, {name}(SimSpec(None, None))"]
    if not isinstance(simulator, UserSimulator):
        members = ("catalog", "behaviours", "users", "start", "respond", "relevance")
        missing = [m for m in members if not hasattr(simulator, m)]
        return [
            f"a simulator needs the members {', '.join(members)}: add {', '.join(missing)}, as "
            "simulators/base.py describes them"
        ]
    checks: list[Check] = [tables, _answers, _purity, _batches, _empty_slots, _relevance]
    if not quick:
        checks += [_likely, _frequency, _ends]
    if logs is not None:
        checks.append(partial(_like_the_log, logs=logs))
    problems: list[str] = []
    for check in checks:
        found, drew = _run(check, simulator, seed)
        problems += found + drew
        if found and check in (tables, _answers):  # the rest would only repeat it
            break
    if not problems and not quick:
        problems += _declared(simulator, seed)
    return list(dict.fromkeys(problems))  # one fault is met at many steps


def _declared(simulator: UserSimulator, seed: int) -> list[str]:
    """What is wrong with the settings that a simulator declares, if it does."""
    dynamics = getattr(simulator, "dynamics", ())
    if not dynamics:
        return []
    if not hasattr(simulator, "rebuilt"):
        return [
            "dynamics: are declared, but there is no method rebuilt(self, *, ...) that returns "
            "the same simulator with other settings: add it, or take `dynamics` out"
        ]
    return check_dynamics(simulator.rebuilt, dynamics, seed=seed)


def _run(check: Check, simulator: UserSimulator, seed: int) -> tuple[list[str], list[str]]:
    """What one check finds or the plug-in raises in it; whether global numbers were drawn."""
    found: list[str] = []
    before = _global_randomness()
    try:
        found += check(simulator, seed)
    except WrongTypeError as error:
        found.append(str(error))
    except Exception as error:  # a plug-in may raise anything; the author wants the whole list
        said = " ".join(str(error).split())
        found.append(f"raised {type(error).__name__}: {said}{_where(error)}: look there first")
    if _global_randomness() == before:
        return found, []
    return found, [
        "a global random generator was used or seeded; take every number from `draws`, or from a "
        "generator of your own when fitting"
    ]


def _answers(simulator: UserSimulator, seed: int) -> Iterator[str]:
    """Shapes, types and values of what `start` and `respond` give, for many users and for one."""
    users = _some(simulator)
    state = started(simulator, users, _at(Draws.root(seed, users.device), users, 0))
    wrong = list(entered(state, BATCH, users.device))
    for rows in (None, torch.zeros(1, dtype=torch.int64, device=users.device)):
        for width in (SLATE, 1):
            if wrong:
                yield from wrong
                return
            for step, played in enumerate(_play(simulator, users, seed, rows, width)):
                wrong = list(answered(simulator, *played, step))
                if wrong:
                    break
    yield from wrong


def _purity(simulator: UserSimulator, seed: int) -> Iterator[str]:
    """Same state and draws, same answer; what is handed in, and the tables, stay as they were."""
    draws, steps = Draws.root(seed, _device(simulator)), _play(simulator, _some(simulator), seed)
    kept_tables = tensors_of(simulator)
    for step, (state, slate, response, after) in enumerate(steps):
        kept, shown = {k: v.clone() for k, v in state.items()}, slate.clone()
        at = _at(draws, _some(simulator), step)
        second, later = responded(simulator, state, slate, at)
        for where in ("respond", "relevance"):
            if where == "relevance":
                simulator.relevance(state)
            if not same(kept, state):
                changed = [k for k in state if k not in kept or not equal(kept[k], state[k])]
                yield f"{where}: wrote into the state handed in ({changed}); return a new one"
                return
        if not equal(shown, slate):
            yield "respond: wrote into the slate handed in; work on slate.clone() or slate.clamp()"
            return
        if not same(told(response), told(second)) or not same(after, later):
            yield (
                "respond: the same state and draws gave two different answers; keep nothing in the "
                "simulator between calls (it belongs into the state) and draw only from `draws`"
            )
            return
    changed = [k for k, v in tensors_of(simulator).items() if not equal(v, kept_tables[k])]
    if changed:
        yield f"respond: wrote into {', '.join(changed)}; users' changes belong into the state"


def _batches(simulator: UserSimulator, seed: int) -> Iterator[str]:
    """A user's answers do not depend on who else is in the batch."""
    users = _some(simulator)
    turned = torch.arange(BATCH, device=users.device).flip(0)
    together = list(_play(simulator, users, seed))
    for name, rows in (("alone", torch.arange(BATCH)[:, None]), ("in another order", turned[None])):
        for chosen in rows.to(users.device):
            parts = list(_play(simulator, users, seed, chosen))
            for step, ((state, _, one, _), (all_states, _, all_of_them, _)) in enumerate(
                zip(parts, together, strict=True)
            ):
                for key in sorted(set(state) & set(all_states)):
                    here, there = state[key].shape[1:], all_states[key].shape[1:]
                    if here != there:
                        yield (
                            f"start: state[{key!r}] is {tuple(there)} wide in a batch and "
                            f"{tuple(here)} alone; give it one width for all, as users of "
                            "several batches are put together"
                        )
                        return
                if not same(told(one), rows_of(told(all_of_them), chosen), nearly=True):
                    yield (
                        f"respond: user {int(users[chosen[0]])} answers differently {name} than in "
                        f"a batch, at step {step}; look for a mean, a maximum or a draw that is "
                        "taken over the batch (dimension 0)"
                    )
                    return


def _empty_slots(simulator: UserSimulator, seed: int) -> Iterator[str]:
    """What is not shown is not chosen."""
    for _, slate, response, _ in _play(simulator, _some(simulator), seed):
        answers = {**response.chosen, "organic": response.organic}
        wrong = [name for name, chosen in answers.items() if (chosen & (slate == EMPTY)).any()]
        if wrong:
            yield (
                f"respond: {', '.join(wrong)} is true in an empty slot; add & (slate != EMPTY), as "
                f"clamp() alone turns {EMPTY} into item 0"
            )
            break
    users = _some(simulator)
    at = _at(Draws.root(seed, users.device), users, 0)
    nothing = torch.full((BATCH, SLATE), EMPTY, device=users.device)
    response, _ = responded(simulator, started(simulator, users, at), nothing, at)
    if any(chosen.any() for chosen in response.chosen.values()):
        yield "respond: something was chosen from a slate of empty slots; add & (slate != EMPTY)"


def _relevance(simulator: UserSimulator, seed: int) -> Iterator[str]:
    users = _some(simulator)
    state = started(simulator, users, _at(Draws.root(seed, users.device), users, 0))
    relevance = simulator.relevance(state)
    shape = (BATCH, len(simulator.catalog))
    wrong = list(tensor("relevance", relevance, shape, torch.float32, users.device))
    yield from wrong
    if wrong:
        return
    if relevance.isnan().any():
        yield "relevance: is NaN for some items; look for a missing price or a division by 0"
    elif not ((relevance > 0) & (relevance < 1)).all():
        yield (
            "relevance: must be probabilities above 0 and below 1; end it with sigmoid(), or "
            "clamp(1e-6, 1 - 1e-6)"
        )
    alone = simulator.relevance({k: v[:1] for k, v in state.items()})
    if not torch.allclose(alone, relevance[:1], rtol=1e-4, atol=1e-7, equal_nan=True):
        yield (
            "relevance: a user's probabilities depend on who else is in the batch; take no mean, "
            "maximum or softmax over dimension 0"
        )


def _likely(simulator: UserSimulator, seed: int) -> Iterator[str]:
    """Users take something, and not everything."""
    users = _some(simulator)
    state = started(simulator, users, _at(Draws.root(seed, users.device), users, 0))
    relevance = simulator.relevance(state)  # (B, N)
    if not ((relevance > 0) & (relevance < 1)).all():
        return  # `_relevance` has said so
    if float(relevance.mean()) > SURE:
        yield (
            f"relevance: users take {float(relevance.mean()):.0%} of whatever they are shown, so "
            "any slate is as good as another; take a constant from the logits"
        )
    elif float(relevance.max(dim=1).values.mean()) < RARE:
        yield (
            f"relevance: even of its best item a user takes 1 in "
            f"{1 / float(relevance.max(dim=1).values.mean()):,.0f}, so agents see no reward; add a "
            "constant to the logits"
        )


def _frequency(simulator: UserSimulator, seed: int) -> Iterator[str]:
    """The best item shown alone, and any item, is bought as often as its relevance says."""
    state, users, at = _many(simulator, seed)
    relevance = simulator.relevance(state).double()  # (T, N)
    if not ((relevance > 0) & (relevance < 1)).all():
        return  # `_relevance` has said so
    generator = torch.Generator().manual_seed(seed)
    anything = torch.randint(relevance.shape[1], (TRIALS,), generator=generator).to(users.device)
    for name, item in (("best", relevance.argmax(dim=1)), ("random", anything)):
        promised = relevance.gather(1, item[:, None])[:, 0]  # (T,)
        response, _ = responded(simulator, state, item[:, None], at)
        bought = int(response.chosen[simulator.behaviours[0]].sum())
        expected = float(promised.sum())
        error = float((promised * (1 - promised)).sum().clamp_min(0).sqrt())
        if abs(bought - expected) > SURPRISE * error + 1:
            yield (
                f"relevance: promises that {expected:.0f} of {TRIALS} {name} items are bought if "
                f"shown alone, but respond bought {bought} ({SURPRISE * error:.0f} more or less is "
                "chance); compute both from the same probability, and compare it with a uniform"
            )


def _ends(simulator: UserSimulator, seed: int) -> Iterator[str]:
    """Somebody leaves, some day, though the best items left are shown."""
    users, num_items = torch.arange(CROWD, device=_device(simulator)), len(simulator.catalog)
    users, root = users % len(simulator.users), Draws.root(seed, users.device)
    state = started(simulator, users, _at(root, users, 0))
    seen = torch.zeros(CROWD, num_items + 1, dtype=torch.bool, device=users.device)
    for step in range(LONG):
        seen = seen & ~seen[:, :-1].all(dim=1, keepdim=True)  # all were: from the beginning
        wish = simulator.relevance(state).masked_fill(seen[:, :-1], -torch.inf)  # (B, N)
        best, slate = wish.topk(SLATE, dim=1)  # (B, K) each
        slate = torch.where(best == -torch.inf, EMPTY, slate)
        response, state = responded(simulator, state, slate, _at(root, users, step))
        if response.left.any():
            return
        seen = seen.scatter(1, torch.where(slate == EMPTY, num_items, slate), True)
        seen = seen & (response.elapsed == 0)[:, None]
    yield (
        f"respond: nobody of {CROWD} users left within {LONG} slates of the best items; set `left` "
        "where a user has had enough, or every policy keeps everybody until max_steps"
    )


def _like_the_log(simulator: UserSimulator, seed: int, logs: Logs) -> Iterator[str]:
    """Behaviours are as frequent, for each of the first one, and trips as big as in the log."""
    first, *others = simulator.behaviours
    inside = logs.events[logs.events["item"].isin(simulator.catalog.ids)]
    often = inside["behaviour"].value_counts()
    unknown = [b for b in simulator.behaviours if not often.get(b, 0)]
    if unknown:
        yield (
            f"behaviours: {unknown} never occur in the log with items of the catalogue; take names "
            f"from {sorted(often[often > 0].index)}"
        )
        return
    state, _, at = _many(simulator, seed)
    relevance = simulator.relevance(state).double()  # (T, N)
    response, _ = responded(simulator, state, relevance.argmax(dim=1, keepdim=True), at)
    for name in others:
        counts = (float(response.chosen[name].sum()), float(response.chosen[first].sum()))
        told = (float(often[name]), float(often[first]))
        if min(told) >= ENOUGH and not _near(counts[0] * told[1], counts[1] * told[0]):
            yield (
                f"respond: {name} happens {counts[0] / max(counts[1], 1):.3g} times for each "
                f"{first}, in the log {told[0] / told[1]:.3g}; multiply its probability by what "
                "is missing"
            )
    if first in logs.purchases:
        trips = trips_from_logs(logs, simulator.catalog.ids)
        size, wanted = len(trips.bought) / len(trips), float(relevance.sum(dim=1).mean())
        if not _near(wanted, size):
            yield (
                f"relevance: sums to {wanted:.3g} items a user would buy on a trip, in the log it "
                f"is {size:.3g}; add {np.log(size / wanted):.2f} to the logits"
            )


def _near(one: float, other: float) -> bool:
    return other / TIMES <= one <= other * TIMES


def _many(simulator: UserSimulator, seed: int) -> tuple[UserState, Tensor, Draws]:
    """Many users who have just come, in episodes of their own: state, rows (T,) and draws."""
    episode = torch.arange(TRIALS, device=_device(simulator))
    users = episode % len(simulator.users)
    at = Draws.root(seed, users.device).at(users, episode, torch.zeros_like(users))
    return started(simulator, users, at), users, at


def _play(
    simulator: UserSimulator,
    users: Tensor,
    seed: int,
    rows: Tensor | None = None,
    width: int = SLATE,
) -> Iterator[tuple[UserState, Tensor, Response, UserState]]:
    """Show `users` (B,), or only `rows` of them, random slates, with an empty slot if wider."""
    device, num_items = users.device, len(simulator.catalog)
    rows = torch.arange(len(users), device=device) if rows is None else rows
    draws, generator = Draws.root(seed, device), torch.Generator().manual_seed(seed)
    state = started(simulator, users[rows], _at(draws, users, 0, rows))
    for step in range(STEPS):
        order = torch.rand(len(users), num_items, generator=generator).argsort(dim=1)
        slate = order[:, :width].to(device)  # (B, K)
        if width > 1:
            slate[:, 1 + step % (width - 1)] = EMPTY
        kept = {k: v.clone() for k, v in state.items()}  # that `_purity` sees what is written over
        at = _at(draws, users, step, rows)
        response, after = responded(simulator, kept, slate[rows].clone(), at)
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


def _where(error: Exception) -> str:
    """File and line of the author's own code that raised, if any of it did."""
    kit = {Path(__file__).with_name(f"testing{part}.py") for part in ("", "_types", "_dynamics")}
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) not in kit and "site-packages" not in frame.filename
    ]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def _global_randomness() -> tuple[Any, ...]:
    """A fingerprint of the global generators, which a simulator must not touch."""
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002 - read only, to see it untouched
    return random.getstate(), repr(legacy), torch.get_rng_state().numpy().tobytes()
