"""Whether what a simulator assumes of its users does what its name says, and nothing when off.

`check_dynamics(make, DYNAMICS)` builds the simulator with everything off and then with one setting
on at a time. A plug-in has the same done by `check_simulator` if it declares its settings:

    dynamics = (Dynamic("patience", "leaves sooner", off=0.0, on=0.5),)

    def rebuilt(self, *, patience: float) -> "MySimulator": ...
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from encoders.state import EMPTY
from simulators.base import UserSimulator, UserState
from simulators.draws import Draws

ROWS = 2_000  # sessions that an effect is measured on
SLATE, STEPS = 5, 12  # slots of a slate and steps of a session, where several are played
NEAR = 1e-6  # of the way from off to on: an effect so weak that nothing must be seen of it
CLEAR = 3.0  # standard errors at which a difference is believed
FEWEST = 20  # sessions in which an effect can be judged
ALIKE = 3  # items that count as like the one bought

Measure = Callable[[UserSimulator, int], Tensor]  # a simulator and a seed to (T,), NaN: not seen


@dataclass(frozen=True)
class Effect:
    """What a setting does, as a number per session: 0 when it is off if `silent` says so."""

    measure: Measure
    sign: int  # of what switching it on does to the measure
    claim: str  # of the setting when on
    what: str  # that is measured
    silent: str = ""  # what must hold when it is off; "" where other causes remain
    by_chance: bool = False  # the measure is 0 on average only


@dataclass(frozen=True)
class Dynamic:
    """A setting that can be switched off, its effect (a key of EFFECTS), and a value to see it."""

    setting: str
    effect: str
    off: Any = 0.0
    on: Any = 1.0

    def __post_init__(self) -> None:
        if self.effect not in EFFECTS:
            raise ValueError(
                f"{self.setting}: there is no effect {self.effect!r} to check; there are: "
                f"{', '.join(EFFECTS)}"
            )
        if self.off == self.on:
            raise ValueError(
                f"{self.setting}: off and on are both {self.on!r}: give a value of `on` at which "
                "the effect is to be seen"
            )


def check_dynamics(
    make: Callable[..., UserSimulator],
    dynamics: Iterable[Dynamic] | None = None,
    *,
    seed: int = 0,
) -> list[str]:
    """List which settings do not do what they say; `make(**settings)` builds the simulator.

    Every check switches all other settings off. Without `dynamics`, those of FittedSimulator.
    """
    dynamics = DYNAMICS if dynamics is None else tuple(dynamics)
    off = {d.setting: d.off for d in reversed(dynamics)}
    try:
        base = make(**off)
    except Exception as error:
        return [f"with all settings off ({_said(off)}) it cannot be built: {_told(error)}"]
    problems: list[str] = []
    for dynamic in dynamics:
        try:
            problems += _check(make, base, off, dynamic, seed)
        except Exception as error:  # the author wants the whole list
            problems.append(f"{dynamic.setting}={dynamic.on!r}: {_told(error)}")
    return problems


def _check(
    make: Callable[..., UserSimulator],
    base: UserSimulator,
    off: dict[str, Any],
    dynamic: Dynamic,
    seed: int,
) -> Iterator[str]:
    """Off: nothing. Nearly off: nearly nothing. On: the effect, in its direction."""
    effect, name = EFFECTS[dynamic.effect], dynamic.setting
    none = effect.measure(base, seed)  # (T,)
    seen = ~none.isnan()  # (T,)
    if int(seen.sum()) < FEWEST:
        yield (
            f"{name}: its effect could not be looked at, as only {int(seen.sum())} of {len(none)} "
            "users bought something and stayed: make the best items likelier to be bought"
        )
        return
    mean, error = _mean(none[seen])
    loud = abs(mean) > CLEAR * error + 1e-4 if effect.by_chance else (none[seen].abs() > 1e-4).any()
    if effect.silent and loud:
        yield (
            f"{name}={dynamic.off!r} should switch its effect off, but {effect.what} is "
            f"{mean:.3g} on average: with it off, {effect.silent}"
        )
    if isinstance(dynamic.off, float | int) and isinstance(dynamic.on, float):
        near = dynamic.off + NEAR * (dynamic.on - dynamic.off)
        faint = effect.measure(make(**{**off, name: near}), seed)  # (T,)
        jumped = ((faint - none).abs() > 1e-3) | (faint.isnan() != none.isnan())
        if jumped.double().mean() > 0.01:
            yield (
                f"{name}: {near:.0e} and {dynamic.off!r} give different answers to "
                f"{jumped.double().mean():.0%} of users: {dynamic.off!r} must be no special case, "
                "so write `default if x is None else x`, not `x or default`"
            )
    some = effect.measure(make(**{**off, name: dynamic.on}), seed)  # (T,)
    both = seen & ~some.isnan()
    change, error = _mean(some[both] - none[both])
    where = (
        f"{effect.what} is {float(some[both].mean()):.3g} with {name}={dynamic.on!r} and "
        f"{float(none[both].mean()):.3g} with {dynamic.off!r}"
    )
    if effect.sign * change < -CLEAR * error - 1e-6:
        yield f"{name}: {effect.claim}, but it does the opposite: {where}; is a sign wrong?"
    elif effect.sign * change <= CLEAR * error + 1e-6:
        yield (
            f"{name}: {effect.claim}, but no such effect was seen: {where}; is the setting used, "
            "passed on by what rebuilds the simulator, and strong enough to be seen?"
        )


def _sooner(simulator: UserSimulator, seed: int) -> Tensor:
    """Slates of little interest seen before leaving, (T,)."""
    users, episode = _people(simulator, ROWS // 4)
    state = simulator.start(users, _at(simulator, users, episode, 0, seed))
    least = simulator.relevance(state).argsort(dim=1)  # (T, N)
    here, seen = torch.ones_like(users, dtype=torch.bool), torch.zeros_like(users)
    for step in range(STEPS):
        seen = seen + here
        slate = least[:, step % least.shape[1]][:, None]  # (T, 1)
        at = _at(simulator, users, episode, step, seed)
        response, state = simulator.respond(state, slate, at)
        here = here & ~response.left
    return seen.double()


def _after_purchase(
    simulator: UserSimulator,
    seed: int,
    others: Callable[[Tensor], Tensor],
    size: Callable[[Tensor], Tensor] = Tensor.double,
) -> Tensor:
    """How far a purchase moves the log-odds of `others` (T,) -> (T, N) of the item bought, (T,)."""
    users, episode = _people(simulator, ROWS // 2)
    at = _at(simulator, users, episode, 0, seed)
    state = simulator.start(users, at)
    before = simulator.relevance(state).double()  # (T, N)
    item = _liked(before, episode)  # (T,)
    response, after = simulator.respond(state, item[:, None], at)
    moved = simulator.relevance(after).double().logit() - before.logit()  # (T, N)
    theirs = others(item)  # (T, N) bool
    theirs = theirs & (torch.arange(theirs.shape[1], device=item.device) != item[:, None])
    count = theirs.sum(dim=1)  # (T,)
    change = (size(moved) * theirs).sum(dim=1) / count  # (T,) NaN where the item has no others
    took = response.chosen[simulator.behaviours[0]][:, 0]
    stayed = took & ~response.left & (response.elapsed == 0)
    return torch.where(stayed, change, torch.nan)


def _sated(simulator: UserSimulator, seed: int) -> Tensor:
    category = simulator.catalog.category  # (N,)
    return _after_purchase(simulator, seed, lambda item: category == category[item][:, None])


def _used_up(simulator: UserSimulator, seed: int) -> Tensor:
    return _after_purchase(simulator, seed, lambda item: _all(simulator, item))


def _moved(simulator: UserSimulator, seed: int) -> Tensor:
    return _after_purchase(simulator, seed, lambda item: _all(simulator, item), Tensor.abs)


def _all(simulator: UserSimulator, item: Tensor) -> Tensor:
    return item.new_ones(len(item), len(simulator.catalog), dtype=torch.bool)  # (T, N)


def _drifted(simulator: UserSimulator, seed: int) -> Tensor:
    vectors = simulator.catalog.vectors  # (N, D)

    def alike(item: Tensor) -> Tensor:
        near = (vectors[item] @ vectors.T).scatter(1, item[:, None], -torch.inf)  # (T, N)
        few = near.topk(min(ALIKE, near.shape[1] - 1), dim=1).indices
        return torch.zeros_like(near, dtype=torch.bool).scatter(1, few, True)

    return _after_purchase(simulator, seed, alike)


def _by_showing(simulator: UserSimulator, seed: int) -> Tensor:
    """Bought, less would have been bought unshown, of an item shown alone, (T,)."""
    state, users, episode = _entered(simulator, seed)
    item = _liked(simulator.relevance(state), episode)[:, None]  # (T, 1)
    response, _ = simulator.respond(state, item, _at(simulator, users, episode, 0, seed))
    return (response.chosen[simulator.behaviours[0]].double() - response.organic.double())[:, 0]


def _lower(simulator: UserSimulator, seed: int) -> Tensor:
    """Bought in the last slot, less bought in the first, of an item shown alone, (T,)."""
    state, users, episode = _entered(simulator, seed)
    item = _liked(simulator.relevance(state), episode)  # (T,)
    bought = []
    for slot in (SLATE - 1, 0):
        slate = torch.full((len(users), SLATE), EMPTY, device=users.device)
        slate[:, slot] = item
        response, _ = simulator.respond(state, slate, _at(simulator, users, episode, 0, seed))
        bought.append(response.chosen[simulator.behaviours[0]][:, slot].double())
    return bought[0] - bought[1]


def _returns(simulator: UserSimulator, seed: int) -> Tensor:
    """Times that a user comes back for another trip, (T,)."""
    users, episode = _people(simulator, ROWS // 4)
    state = simulator.start(users, _at(simulator, users, episode, 0, seed))
    best = simulator.relevance(state).topk(SLATE, dim=1).indices
    here, back = torch.ones_like(users, dtype=torch.bool), torch.zeros_like(users)
    for step in range(STEPS):
        at = _at(simulator, users, episode, step, seed)
        response, state = simulator.respond(state, best.roll(step, dims=1), at)
        back = back + ((response.elapsed > 0) & here)
        here = here & ~response.left
    return back.double()


def _several(simulator: UserSimulator, seed: int) -> Tensor:
    """Items bought of one slate beyond the first, (T,)."""
    state, users, episode = _entered(simulator, seed)
    best = simulator.relevance(state).topk(SLATE, dim=1).indices
    response, _ = simulator.respond(state, best, _at(simulator, users, episode, 0, seed))
    bought = response.chosen[simulator.behaviours[0]].sum(dim=1)
    return (bought - 1).clamp_min(0).double()


def _passed_over(simulator: UserSimulator, seed: int) -> Tensor:
    """Wanted, in the first slot, and yet not taken, (T,)."""
    state, users, episode = _entered(simulator, seed)
    best = simulator.relevance(state).topk(SLATE, dim=1).indices
    response, _ = simulator.respond(state, best, _at(simulator, users, episode, 0, seed))
    return (response.organic & ~response.chosen[simulator.behaviours[0]])[:, 0].double()


def _liked(relevance: Tensor, episode: Tensor) -> Tensor:
    """One of the best items each, (T,): the very best may be liked as far as it goes."""
    best = relevance.topk(SLATE, dim=1).indices  # (T, 5)
    return best.gather(1, (episode % SLATE)[:, None])[:, 0]


def _people(simulator: UserSimulator, count: int) -> tuple[Tensor, Tensor]:
    """Rows and episodes, (T,) each; a small table is used more than once."""
    episode = torch.arange(count, device=simulator.catalog.vectors.device)
    return episode % len(simulator.users), episode


def _at(simulator: UserSimulator, users: Tensor, episode: Tensor, step: int, seed: int) -> Draws:
    return Draws.root(seed, users.device).at(users, episode, torch.full_like(users, step))


def _entered(simulator: UserSimulator, seed: int) -> tuple[UserState, Tensor, Tensor]:
    users, episode = _people(simulator, ROWS)
    return simulator.start(users, _at(simulator, users, episode, 0, seed)), users, episode


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error; infinite of nothing."""
    if len(values) < 2:
        return 0.0, float("inf")
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def _said(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


EFFECTS: dict[str, Effect] = {
    "leaves sooner": Effect(
        _sooner, -1, "useless slates must end sessions sooner",
        "the number of slates of little interest that are seen",
    ),
    "sates": Effect(
        _sated, -1, "a purchase must lower the wish for the category's other items",
        "the change of their log-odds after a purchase",
        "a purchase must leave the other items of its category as they were",
    ),
    "uses up": Effect(
        _used_up, -1, "a purchase must lower the wish for everything else",
        "the change of their log-odds after a purchase",
        "a purchase must leave the other items as they were",
    ),
    "moves": Effect(
        _moved, +1, "a purchase must change what else is wished for",
        "the change of their log-odds, up or down, after a purchase",
        "a purchase must leave the other items as they were",
    ),
    "drifts": Effect(
        _drifted, +1, "a purchase must raise the wish for the items most like it",
        "the change of their log-odds after a purchase",
        "a purchase must leave the items most like it as they were",
    ),
    "sells by being shown": Effect(
        _by_showing, +1, "being shown must make an item likelier to be bought",
        "the share bought when shown alone, less the share bought anyway (organic),",
        "`chosen` of an item shown alone must equal `organic`",
    ),
    "sells less below": Effect(
        _lower, -1, "an item must be bought less in a lower slot",
        "the share bought in the last slot, less the share bought in the first,",
        "an item alone in a slate must be bought as often in any slot",
        by_chance=True,
    ),
    "comes back": Effect(
        _returns, +1, "users must come back for more trips",
        "the number of returns in a session", "elapsed must be 0 throughout",
    ),
    "buys several": Effect(
        _several, +1, "users must sometimes buy several items of one slate",
        "the number of items bought beyond the first",
        "at most one item of a slate may be chosen",
    ),
    "takes the first wanted": Effect(
        _passed_over, -1, "a wanted item in the first slot must never be passed over",
        "the share of wanted first items not taken",
    ),
}  # fmt: skip

DYNAMICS = (  # of FittedSimulator; TinyWorld has all but position
    Dynamic("patience", "leaves sooner", off=0.0, on=0.5),
    Dynamic("satiation", "sates", off=0.0, on=1.0),
    Dynamic("drift", "moves", off=0.0, on=1.0),  # as the log says, so not always to items alike
    Dynamic("exposure", "sells by being shown", off=0.0, on=1.0),
    Dynamic("position", "sells less below", off=0.0, on=0.5),
    Dynamic("trips", "comes back", off=1, on=3),
    Dynamic("choice", "buys several", off="logit", on="independent"),
    Dynamic("choice", "takes the first wanted", off="logit", on="cascade"),
)
