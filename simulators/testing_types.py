"""What a simulator's tables and answers must be, column by column, in plain English."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoders.state import EMPTY
from simulators.base import Catalog, Response, UserSimulator, UserState, UserTable
from simulators.draws import Draws

SLATE = 5  # items that any catalogue must have: the widest slate that is shown
FAR = 100_000.0  # days since 1970-01-01: beyond it a moment was counted in seconds


class WrongTypeError(TypeError):
    """A member returned what no later check can look at; its message is for the author."""


def tables(simulator: UserSimulator, seed: int) -> Iterator[str]:
    catalog, users, behaviours = simulator.catalog, simulator.users, simulator.behaviours
    if not (isinstance(catalog, Catalog) and isinstance(users, UserTable)):
        yield (
            "catalog, users: must be a Catalog and a UserTable of simulators.base, got "
            f"{type(catalog).__name__} and {type(users).__name__}: build them of those"
        )
        return
    named = isinstance(behaviours, tuple) and all(isinstance(b, str) for b in behaviours)
    if not named or not behaviours or len(set(behaviours)) < len(behaviours):
        yield f'behaviours: must be a tuple of names like ("buy",), each once, got {behaviours!r}'
    num_items, num_users = len(catalog), len(users)
    if num_items < SLATE or num_users < 1:
        yield f"catalog, users: need {SLATE} items and 1 user, got {num_items} and {num_users}"
        return
    yield from _columns(catalog, users)


def _columns(catalog: Catalog, users: UserTable) -> Iterator[str]:
    num_items, num_users = len(catalog), len(users)
    shapes: dict[str, tuple[Tensor, tuple[Any, ...], torch.dtype]] = {
        "catalog.vectors": (catalog.vectors, (num_items, ...), torch.float32),
        "catalog.category": (catalog.category, (num_items,), torch.int64),
        "catalog.price": (catalog.price, (num_items,), torch.float32),
        "catalog.popularity": (catalog.popularity, (num_items,), torch.float32),
        "users.profile": (users.profile, (num_users, ...), torch.float32),
        "users.past": (users.past, (num_users, ...), torch.int64),
        "users.past_count": (users.past_count, tuple(users.past.shape), torch.float32),
        "users.past_age": (users.past_age, tuple(users.past.shape), torch.float32),
        "users.start": (users.start, (num_users,), torch.float64),
    }
    wrong = [p for name, (column, shape, dtype) in shapes.items()
             for p in tensor(name, column, shape, dtype, catalog.vectors.device)]  # fmt: skip
    yield from wrong
    if any("must have shape" in problem or "must be a tensor" in problem for problem in wrong):
        return
    if len(catalog.texts) != num_items:
        yield (
            f'catalog.texts: need one for each of the {num_items} items ("" where an item has '
            f"none), got {len(catalog.texts)}"
        )
    if len(np.unique(catalog.ids)) < num_items:
        yield "catalog.ids: an id stands for two items; give each its own"
    groups = len(catalog.category_names)
    if ((catalog.category < 0) | (catalog.category >= groups)).any():
        yield (
            f"catalog.category: must be 0 to {groups - 1}, places in the {groups} category_names, "
            f"got {int(catalog.category.min())} to {int(catalog.category.max())}"
        )
    if (catalog.price < 0).any() or not (
        (catalog.popularity >= 0) & (catalog.popularity <= 1)
    ).all():
        yield (
            "catalog.price, catalog.popularity: a price must not be negative (NaN if unknown), and "
            "popularity is a share in [0, 1]"
        )
    if ((users.past < EMPTY) | (users.past >= num_items)).any():
        yield f"users.past: items are numbered 0 to {num_items - 1}, {EMPTY} where there is none"
    ordered = users.past.sort(dim=1).values  # (U, H)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY)).any():
        yield "users.past: a user has an item twice; count it in past_count instead"
    if not (catalog.vectors.isfinite().all() and users.profile.isfinite().all()):
        yield "catalog.vectors, users.profile: must be finite; put 0 where nothing is known"
    known = users.past != EMPTY  # (U, H)
    for name in ("past_count", "past_age"):
        if not ((getattr(users, name)[known] >= 0) & getattr(users, name)[known].isfinite()).all():
            yield f"users.{name}: must be finite and 0 or more wherever users.past has an item"
    if not (users.start.isfinite() & (users.start.abs() < FAR)).all():
        yield (
            f"users.start: must be finite days since 1970-01-01, got up to "
            f"{float(users.start.abs().max()):.3g}: divide seconds by 86,400"
        )


def entered(state: UserState, size: int, device: torch.device) -> Iterator[str]:
    for key, value in state.items():
        yield from tensor(f"start: state[{key!r}]", value, (size, ...), None, device)


def answered(
    simulator: UserSimulator,
    state: UserState,
    slate: Tensor,
    response: Response,
    after: UserState,
    step: int,
) -> Iterator[str]:
    device = slate.device
    if set(after) != set(state):
        yield (
            f"respond: the state's keys changed, {sorted(set(after) ^ set(state))} differ; return "
            "{**state, ...} with the keys that `start` gave"
        )
    for key in sorted(set(after) & set(state)):
        was = state[key]
        wrong = list(tensor(f"respond: state[{key!r}]", after[key], was.shape, was.dtype, device))
        yield from wrong
        if not wrong and was.is_floating_point() and after[key].isnan().any():
            yield (
                f"respond: state[{key!r}] is NaN at step {step} and will stay so: look for 0 / 0, "
                "log(0) or inf - inf, often in an empty slot"
            )
    names, wanted = list(response.chosen), list(simulator.behaviours)
    if sorted(names) == sorted(wanted) and names != wanted:
        yield (
            f"respond: chosen has {names} in another order than behaviours {wanted}; write them in "
            "the same order, as the first is what relevance and rewards speak of"
        )
    elif names != wanted:
        yield f"respond: chosen has {names}, behaviours are {wanted}; give one (B, K) for each"
    slots, rows = tuple(slate.shape), (len(slate),)
    parts: list[tuple[str, Any, tuple[int, ...], torch.dtype]]
    parts = [(f"chosen[{b!r}]", c, slots, torch.bool) for b, c in response.chosen.items()]
    parts += [("organic", response.organic, slots, torch.bool)]
    parts += [("left", response.left, rows, torch.bool)]
    parts += [(n, getattr(response, n), slots, torch.float32) for n in ("value", "uncertainty")]
    parts += [("elapsed", response.elapsed, rows, torch.float32)]
    wrong = [p for n, x, s, d in parts for p in tensor(f"respond: {n}", x, s, d, device)]
    yield from wrong
    if not wrong:
        yield from _sensible(response)


def _sensible(response: Response) -> Iterator[str]:
    if not (response.elapsed >= 0).all() or not response.elapsed.isfinite().all():
        yield "respond: elapsed must be finite days, 0 or more; 0 within a trip"
    if ((response.elapsed > 0) & response.left).any():
        yield "respond: who left does not come back, so elapsed must be 0 where left"
    if not ((response.uncertainty >= 0) & response.uncertainty.isfinite()).all():
        yield "respond: uncertainty must be finite and 0 or more; zeros if you do not know"
    chosen = torch.stack(list(response.chosen.values())).any(dim=0)  # (B, K)
    if not response.value.isfinite().all() or (response.value[~chosen] != 0).any():
        yield (
            "respond: value must be finite, and 0 where nothing was chosen; write "
            "torch.where(chosen, value, 0), as NaN times False is NaN"
        )


def started(simulator: UserSimulator, users: Tensor, draws: Draws) -> UserState:
    """`start`, whose answer must be a dict of tensors."""
    state = simulator.start(users, draws)
    if not isinstance(state, dict):
        raise WrongTypeError(
            f"start: must return a dict of tensors with one row per user, got "
            f"{type(state).__name__}: name each tensor"
        )
    return state


def responded(
    simulator: UserSimulator, state: UserState, slate: Tensor, draws: Draws
) -> tuple[Response, UserState]:
    """`respond`, whose answer must be a pair."""
    answer = simulator.respond(state, slate, draws)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise WrongTypeError(
            f"respond: must return a pair, got {type(answer).__name__}: end it with "
            "`return response, state`"
        )
    response, after = answer
    if not isinstance(response, Response) or not isinstance(after, dict):
        raise WrongTypeError(
            "respond: must return a Response of simulators.base and a dict of tensors, got "
            f"{type(response).__name__} and {type(after).__name__}: mind the order"
        )
    if not isinstance(response.chosen, dict):
        raise WrongTypeError(
            f"respond: chosen must be a dict, behaviour to (B, K) bool, got "
            f"{type(response.chosen).__name__}: write {{{simulator.behaviours[0]!r}: chosen}}"
        )
    return response, after


def tensor(
    name: str,
    value: Any,
    shape: tuple[Any, ...],
    dtype: torch.dtype | None,
    device: torch.device,
) -> Iterator[str]:
    """Say how `value` is not the tensor that is expected; ... in `shape` stands for the rest."""
    if not isinstance(value, Tensor):
        yield f"{name}: must be a tensor, got {type(value).__name__}; use torch.as_tensor"
        return
    shape = (*shape[:-1], *value.shape[len(shape) - 1 :]) if shape[-1:] == (...,) else tuple(shape)
    if tuple(value.shape) != shape:
        hint = "; a squeeze() without a dimension, or a missing keepdim=True?" if 1 in shape else ""
        yield f"{name}: must have shape {shape}, got {tuple(value.shape)}{hint}"
    if dtype is not None and value.dtype != dtype:
        yield f"{name}: must be {dtype}, got {value.dtype}; convert it with .to({dtype})"
    if value.device != device:
        yield (
            f"{name}: must be on {device} like the catalogue, got {value.device}; make it with "
            "device=spec.device, or like a tensor that is handed in"
        )
    if value.requires_grad:
        yield f"{name}: carries a gradient; decorate the method with @torch.no_grad()"


def told(response: Response) -> dict[str, Any]:
    """What a simulator answers, by name: what was shown is the environment's to say."""
    return {name: value for name, value in vars(response).items() if name != "items"}


def rows_of(values: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    return {k: rows_of(v, rows) if isinstance(v, dict) else v[rows] for k, v in values.items()}


def same(one: dict[str, Any], other: dict[str, Any], *, nearly: bool = False) -> bool:
    """Whether two dicts of tensors, of one depth, are equal bit by bit; or real numbers `nearly`,
    as products of matrices of another height may differ in the last bits.
    """
    if one.keys() != other.keys():
        return False
    alike = close if nearly else equal
    return all(
        same(v, other[k], nearly=nearly) if isinstance(v, dict) else alike(v, other[k])
        for k, v in one.items()
    )


def close(one: Tensor, other: Tensor) -> bool:
    """Equal bit by bit, real numbers to four digits."""
    if one.shape != other.shape or one.dtype != other.dtype or not one.is_floating_point():
        return equal(one, other)
    return torch.allclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)


def equal(one: Tensor, other: Tensor) -> bool:
    """Equal bit by bit; NaN equals NaN, which another check complains of."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    both = (one == other) | (one.isnan() & other.isnan())
    return bool(both.all())


def tensors_of(simulator: UserSimulator) -> dict[str, Tensor]:
    """Copies of all tensors of catalogue and users."""
    named = {f"catalog.{k}": v for k, v in vars(simulator.catalog).items()}
    named |= {f"users.{k}": v for k, v in vars(simulator.users).items()}
    return {name: value.clone() for name, value in named.items() if isinstance(value, Tensor)}
