"""What no decision log can hold: refused with its row, what was expected and the remedy."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from evaluation.batch import Batch

Array = np.ndarray
Where = Callable[[int], str]  # row of a batch, in words: of the log, and of its file
ROUNDING = 1e-6  # a float32 softmax may sum to a little over one
IDS = ("decision", "episode", "cluster", "logger")  # of any type
PRODUCT = 1e-4  # relative; propensities of slates are often stored as float32


def as_array(x: Any) -> Array:
    """Lists, NumPy, columns of frames and tensors to an array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
    return np.asarray(x)


def numbers(name: str, x: Any, where: Where) -> Array:
    """`x` as float64."""
    x = as_array(x)
    if x.dtype.kind not in "iufbO":
        raise ValueError(f"{name} must hold numbers, got {x.dtype}: convert it")
    if x.dtype == object:
        missing = np.array([v is None for v in x.flat], dtype=bool).reshape(x.shape)
        if missing.any():
            raise ValueError(f"{name} is missing in {where(first_row(missing))}: drop the row")
    try:
        return x.astype(np.float64, copy=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold numbers, got {x.dtype}: {error}") from error


def whole(name: str, x: Any, where: Where) -> Array:
    """`x` as int64; a number that is not whole is an error."""
    x = as_array(x)
    if x.dtype.kind not in "iub":
        x = numbers(name, x, where)
        bad = ~(np.abs(x) < 2.0**53) | (x != np.floor(x))  # NaN is bad as well
        if bad.any():
            row = first_row(bad)
            raise ValueError(
                f"{name} must be an integer, got {x[row]} in {where(row)}: number what it names"
            )
    return x.astype(np.int64, copy=False)


def codes(name: str, x: Any, where: Where) -> Array:
    """Ids of any kind as int64: integers stay, others are numbered."""
    x = as_array(x)
    if x.dtype.kind in "iubf":
        return whole(name, x, where)
    missing = np.array([v is None or v != v for v in x.flat], dtype=bool)  # NaN is not itself
    if missing.any():
        raise ValueError(f"{name} is missing in {where(first_row(missing))}: drop the row")
    return np.unique(x.astype(str), return_inverse=True)[1].astype(np.int64)


def typed(name: str, x: Any, where: Where) -> Array:
    """A field as int64 or float64; context as (n, d)."""
    if name in IDS:
        return codes(name, x, where)
    if name in ("action", "slot", "step"):
        return whole(name, x, where)
    x = numbers(name, x, where)
    return x[:, None] if name == "context" and x.ndim == 1 else x


def named(row: int) -> str:
    """A row of arrays in words."""
    return f"row {row}"


def first_row(bad: Array) -> int:
    """The first row of bad (n,) or (n, d) that holds one."""
    return int(np.argmax(bad if bad.ndim == 1 else bad.any(axis=1)))


def check_shapes(arrays: dict[str, Array], free: tuple[str, ...]) -> int:
    """Rows of all arrays; each is (n,), those in `free` may have more dimensions."""
    first = next(iter(arrays))
    for name, x in arrays.items():
        if x.ndim == 0 or (x.ndim != 1 and name not in free) or x.ndim > 2:
            raise ValueError(f"{name} must be ({len(arrays[first])},), one a row, got {x.shape}")
        if len(x) != len(arrays[first]):
            raise ValueError(
                f"{first} has {len(arrays[first])} rows, {name} has {len(x)}: one of each a row"
            )
    if not len(arrays[first]):
        raise ValueError("the log is empty: expected at least one row")
    return len(arrays[first])


def check_logger(logger: Array, loggers: int, where: Where) -> None:
    """Each of (n,) names a column of the propensities."""
    bad = (logger < 0) | (logger >= loggers)
    if bad.any():
        row = first_row(bad)
        raise ValueError(
            f"logger must be 0 to {loggers - 1}, a column of propensity, got {logger[row]} in "
            f"{where(row)}"
        )


def check_action(action: Array, num_actions: int | None, empty: bool, where: Where) -> int:
    """The largest of (n,); -1 is an empty slot where the log has slots."""
    lowest, highest = int(action.min()), int(action.max())
    if lowest < -int(empty) or (num_actions is not None and highest >= num_actions):
        bad = action < -int(empty)
        if num_actions is not None:
            bad |= action >= num_actions
        row = first_row(bad)
        upto = "or more" if num_actions is None else f"to {num_actions - 1}"
        hint = "-1 is an empty slot" if empty else "an empty slot, -1, needs `slot` or `decision`"
        raise ValueError(
            f"action must be 0 {upto}, got {action[row]} in {where(row)}: number the items "
            f"from 0 or raise num_actions; {hint}"
        )
    return highest


def check_reward(
    reward: Array, limits: tuple[float, float] | None, where: Where
) -> tuple[float, float]:
    """The least and largest of (n,)."""
    low, high = float(reward.min()), float(reward.max())
    if not (np.isfinite(low) and np.isfinite(high)):  # NaN is passed on by min
        row = first_row(~np.isfinite(reward))
        raise ValueError(
            f"reward must be finite, got {reward[row]} in {where(row)}: drop the row or fill it"
        )
    if limits is not None and (low < limits[0] or high > limits[1]):
        row = first_row((reward < limits[0]) | (reward > limits[1]))
        raise ValueError(
            f"reward must lie in reward_range [{limits[0]}, {limits[1]}], got {reward[row]} in "
            f"{where(row)}: widen reward_range"
        )
    return low, high


def check_probability(name: str, p: Array, where: Where) -> None:
    """Refuse what is not in (0, 1], of (n,) or (n, J)."""
    if not (p.min() > 0 and p.max() <= 1 + ROUNDING):
        bad = ~((p > 0) & (p <= 1 + ROUNDING))
        row = first_row(bad)
        got = p[row] if p.ndim == 1 else p[row][bad[row]][0]
        why = "a logged action cannot have been impossible" if got <= 0 else "it is a probability"
        if name != "propensity":
            why += f"; leave {name} out where it is unknown"
        raise ValueError(f"{name} must be in (0, 1], got {got} in {where(row)}: {why}")


def check_context(context: Array, where: Where) -> None:
    """Refuse NaN and infinity in (n, d)."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = context.sum()  # one pass; finite unless an entry is not, or the sum overflows
    if not np.isfinite(total):
        bad = ~np.isfinite(context)  # (n, d)
        if bad.any():
            row = first_row(bad)
            column = int(np.argmax(bad[row]))
            raise ValueError(
                f"context must be finite, got {context[row, column]} in {where(row)}, column "
                f"{column}: fill what is missing"
            )


def starts_of(group: Array) -> Array:
    """Rows at which a run of equal ids (n,) begins, (G,)."""
    return np.concatenate([[0], np.flatnonzero(group[1:] != group[:-1]) + 1])


def place_of(starts: Array, n: int) -> Array:
    """0, 1, 2, ... within each run, (n,)."""
    return np.arange(n) - np.repeat(starts, np.diff(np.append(starts, n)))


def check_runs(name: str, order: str, group: Array, step: Array, where: Where) -> None:
    """Each id of (n,) in one run, whose `order` (n,) counts 0, 1, 2, ..."""
    starts = starts_of(group)
    ids = group[starts]  # (G,)
    if not (np.diff(ids) > 0).all():
        by_id = np.argsort(ids, kind="stable")
        again = by_id[1:][ids[by_id][1:] == ids[by_id][:-1]]  # runs whose id was there before
        if len(again):
            row = int(starts[again.min()])
            raise ValueError(
                f"the rows of {name} {group[row]} are not adjacent: {where(row)} resumes it after "
                f"another: sort the log by {name}, {order}, and give each {name} an id of its own"
            )
    expected = place_of(starts, len(group))  # (n,)
    if np.array_equal(step, expected):
        return
    row = int(np.argmax(step != expected))
    start = row - int(expected[row])
    earlier = np.flatnonzero(step[start:row] == step[row])
    if len(earlier):
        raise ValueError(
            f"duplicate ({name}, {order}) ({group[row]}, {step[row]}) in {where(row)}, first in "
            f"{where(start + int(earlier[0]))}: keep one of them"
        )
    raise ValueError(
        f"{order} of {name} {group[row]} must count 0, 1, 2, ... without gap, expected "
        f"{expected[row]}, found {step[row]} in {where(row)}: add the missing rows, renumber "
        f"{order}, or sort the log by {name}, {order}"
    )


def check_same(name: str, x: Array, group: Array, starts: Array, where: Where) -> None:
    """`x` (n,) is one number for all rows of a decision."""
    lengths = np.diff(np.append(starts, len(x)))
    bad = x != np.repeat(x[starts], lengths)
    if bad.any():
        row = first_row(bad)
        raise ValueError(
            f"{name} must be the same on all rows of a decision, got {x[row]} in {where(row)} "
            f"of decision {group[row]}"
        )


def check_joint(
    joint: Array, propensity: Array, decision: Array, starts: Array, where: Where
) -> None:
    """The propensities of a slate, each given the items above it, multiply to its `joint`."""
    product = np.add.reduceat(np.log(propensity), starts)  # (G,)
    product = np.repeat(product, np.diff(np.append(starts, len(joint))))  # (n,)
    bad = np.abs(np.expm1(np.log(joint) - product)) > PRODUCT
    if bad.any():
        row = first_row(bad)
        raise ValueError(
            f"joint of decision {decision[row]} is {joint[row]:.6g} in {where(row)}, its "
            f"propensities multiply to {np.exp(product[row]):.6g}: propensity must be given the "
            "items above it; leave joint out or correct one of the two"
        )


def check_support(batch: "Batch", where: Where) -> None:
    """The logged action is one that could be shown."""
    if batch.support is None and batch.listed is None:
        return
    possible = batch.supported(batch.action[:, None])
    bad = (batch.action != -1) & ~possible[:, 0] if possible is not None else batch.action < -1
    if bad.any():
        row = first_row(bad)
        raise ValueError(
            f"support must hold the logged action, {batch.action[row]} of {where(row)} is not in "
            "its row: correct the support"
        )


def check_groups(batch: "Batch", exact: bool, where: Where) -> int:
    """Slates and episodes are whole and in order; rows or steps of the longest."""
    decision, episode, slot, step = batch.decision, batch.episode, batch.slot, batch.step
    longest, starts = 1, np.arange(len(batch))
    if decision is not None and slot is not None:
        check_runs("decision", "slot", decision, slot, where)
        starts, longest = starts_of(decision), int(slot.max()) + 1
        if batch.joint is not None and batch.propensity is not None and exact:
            check_joint(batch.joint, batch.propensity, decision, starts, where)
    if episode is not None and step is not None:
        if decision is not None:
            check_same("episode", episode, decision, starts, where)
            check_same("step", step, decision, starts, where)
        check_runs(
            "episode", "step", episode[starts], step[starts], lambda row: where(int(starts[row]))
        )
        longest = int(step.max()) + 1
    return longest
