"""Decision logs as transitions: what offline learners learn from, in a replay of ids.

The step after a decision is the next one of the same user and episode, wherever in the log it
stands. A session's last step needs none if it terminated. If it was truncated, the view behind it
is rebuilt from what was shown and chosen (the clock stands still). If the log just breaks off, as
where training ended, the step is dropped and counted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from agents.base import AgentSpec, Decision, Transition
from agents.replay import Replay
from encoders.state import EMPTY, Observation
from evaluation.decisions import SEEN, meta, padded, parts

Piece = dict[str, Tensor]  # name to (D, ...), one row a decision
Array = np.ndarray
ROWS = 8192  # rows of a file in memory at once
CHUNK = 1024  # transitions that a replay takes at once
KEYS = ("decision", "slot", "item", "propensity", "reward", "user", "episode", "step",
        "terminated", "truncated")  # fmt: skip
IDS = {"past": EMPTY, "history": EMPTY, "excluded": EMPTY}


@dataclass(frozen=True)
class Logged:
    """How much logs have to teach."""

    policies: tuple[str, ...]  # who wrote them
    steps: int  # decisions
    used: int  # of them in the replay
    cut: int  # of them dropped: the log breaks off there, what came next is not known
    left_over: int  # of them dropped because the replay takes equal chunks; under one in a thousand
    episodes: int
    users: int
    explored: float  # chance that the policy, asked again, would have shown another item
    coverage: float  # share of the catalogue that was shown to anybody
    session_reward: float  # mean of sessions that are whole in the log; nan where none is


def replay_of(
    logs: Sequence[str | Path], spec: AgentSpec, *, catalog: str, gamma: float = 0.9
) -> tuple[Replay, Logged]:
    """All steps of these logs in a replay whose samples are single steps, and what they are."""
    if not logs:
        raise ValueError("no log to learn from: expected at least one folder of a decision log")
    folders = [Path(folder) for folder in logs]
    abouts = [about_of(folder, spec, catalog) for folder in folders]
    surveys = [survey(folder, spec) for folder in folders]
    usable = sum(found.usable for found in surveys)
    if not usable:
        raise ValueError(
            f"{', '.join(map(str, folders))}: no step has a known next one or an end, there is "
            "nothing to learn from: expected whole sessions"
        )
    chunks = -(-usable // CHUNK)
    batch = usable // chunks
    replay = Replay(chunks * batch, spec=spec, gamma=gamma)
    own = all(found.own_mask for found in surveys)
    for one in batches(folders, abouts, spec, batch, own):
        replay.add(one)
    policies = tuple(dict.fromkeys(str(about["policy"]) for about in abouts))
    return replay, summed(surveys, policies, len(replay), spec.num_items)


@dataclass(frozen=True)
class Survey:
    """What a log's columns of numbers say, all of them read."""

    usable: int  # steps with a next one or an end
    steps: int
    episodes: int
    users: int
    again: float  # sum over shown items of the chance of another one
    shown: Array  # (N,) bool
    items: int  # that were shown, repeats counted
    returns: Array  # (sessions that are whole,) their rewards
    own_mask: bool  # excluded was the history, throughout


def survey(folder: Path, spec: AgentSpec) -> Survey:
    """Read the numbers of a log, without what was seen, and check them."""
    found: list[Piece] = []
    again, items, own, shown = 0.0, 0, True, np.zeros(spec.num_items, dtype=bool)
    for table in tables(folder, (*KEYS, "history", "excluded")):
        piece = numbers(table, spec, [], folder)
        real = piece["slate"] != EMPTY  # (D, K)
        again += float((1.0 - piece["propensity"][real].double()).sum())
        items += int(real.sum())
        shown[piece["slate"][real].numpy()] = True
        own = own and table["history"].equals(table["excluded"])
        kept = ("user", "episode", "step", "terminated", "truncated", "reward")
        found.append({name: piece[name] for name in kept})
    if not found:
        raise ValueError(f"the log {folder} is empty: expected at least one decision")
    whole = {name: torch.cat([piece[name] for piece in found]) for name in found[0]}
    order, follows, last = successors(whole, folder)
    done = (whole["terminated"] | whole["truncated"]).numpy()[order]  # (D,)
    first = np.append(True, last[:-1])  # (D,) begins its session
    whole_ones = (whole["step"].numpy()[order][first] == 0) & done[last]  # (sessions,)
    session = np.cumsum(first) - 1  # (D,)
    total = np.bincount(session, whole["reward"].sum(dim=1).double().numpy()[order])
    return Survey(
        usable=int((follows | done).sum()), steps=len(order), episodes=len(whole_ones),
        users=len(np.unique(whole["user"].numpy())), again=again, shown=shown, items=items,
        returns=total[whole_ones], own_mask=own,
    )  # fmt: skip


def summed(surveys: list[Survey], policies: tuple[str, ...], used: int, num_items: int) -> Logged:
    """What several logs have to teach together; users of different logs are different ones."""
    steps = sum(s.steps for s in surveys)
    usable = sum(s.usable for s in surveys)
    returns = np.concatenate([s.returns for s in surveys])
    return Logged(
        policies=policies, steps=steps, used=used, cut=steps - usable, left_over=usable - used,
        episodes=sum(s.episodes for s in surveys), users=sum(s.users for s in surveys),
        explored=sum(s.again for s in surveys) / max(1, sum(s.items for s in surveys)),
        coverage=float(np.any([s.shown for s in surveys], axis=0).sum() / num_items),
        session_reward=float(returns.mean()) if len(returns) else float("nan"),
    )  # fmt: skip


def about_of(folder: Path, spec: AgentSpec, catalog: str) -> dict[str, Any]:
    """What a log says of itself; one of another shop or without observations is refused."""
    about = meta(folder)
    if about["catalog"] != catalog:
        raise ValueError(
            f"{folder} is a log of another catalogue ({about['catalog']}, this one is {catalog}): "
            "its data or what prepares it has changed, train the run that writes the log again"
        )
    if "sizes" not in about:
        raise ValueError(f"{folder} does not say how wide observations were: it has none")
    wanted = {
        "profile": spec.profile_size, "past": spec.past_size, "history": spec.history_size,
        "feedback": spec.history_size * spec.feedback_size, "context": spec.context_size,
    }  # fmt: skip
    for name, size in wanted.items():
        if about["sizes"].get(name) != size:
            raise ValueError(
                f"{name} has {about['sizes'].get(name)} places in {folder}, the environment's has "
                f"{size}: give the environment that the log is of (slate_size, max_steps, profile)"
            )
    return about


def tables(folder: Path, names: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of a log's parts, some thousand rows at a time, decisions whole."""
    for path in parts(folder):
        file = pq.ParquetFile(path)
        missing = [name for name in names if name not in file.schema_arrow.names]
        if missing:
            seen = [name for name in missing if name in SEEN]
            said = ": what the policy saw was not logged" if seen else ""
            raise ValueError(
                f"{path} has no column {', '.join(missing)}{said}; an offline learner needs a log "
                "as experiments/train_agent.py writes it"
            )
        rest: pa.Table | None = None
        unread = file.metadata.num_rows
        for batch in file.iter_batches(ROWS, columns=list(names)):
            unread -= len(batch)
            table = pa.Table.from_batches([batch])
            table = table if rest is None else pa.concat_tables([rest, table])
            decision = table["decision"].to_numpy()
            # the last decision may go on in the next batch
            whole = int((decision != decision[-1]).sum()) if unread else len(table)
            if whole:
                yield table.slice(0, whole)
            rest = table.slice(whole)


def numbers(table: pa.Table, spec: AgentSpec, behaviours: Sequence[str], where: Path) -> Piece:
    """Rows of shown items to D decisions: slates (D, K) and what came of them."""
    slot = table["slot"].to_numpy().astype(np.int64)  # (R,)
    first = slot == 0
    row = np.cumsum(first) - 1  # (R,) of the decision
    k = spec.slate_size
    if slot.max(initial=0) >= k:
        raise ValueError(
            f"{where} shows {slot.max() + 1} items or more at once, the environment {k}: it is a "
            "log of another slate_size"
        )
    item = table["item"].to_numpy().astype(np.int64)
    if item.max(initial=0) >= spec.num_items or item.min(initial=0) < EMPTY:
        raise ValueError(
            f"{where} shows item {item.max()}, the catalogue has {spec.num_items}: it is a log of "
            "another catalogue"
        )
    chance = table["propensity"].to_numpy().astype(np.float64)  # null is nan
    reward = table["reward"].to_numpy().astype(np.float64)
    for name, bad in (
        ("propensity must be in (0, 1]", ~((chance > 0) & (chance <= 1)) & (item != EMPTY)),
        ("reward must be finite", ~np.isfinite(reward)),
    ):
        if bad.any():
            at = int(bad.argmax())
            value = chance[at] if "propensity" in name else reward[at]
            decision = table["decision"][at].as_py()
            raise ValueError(f"{name}, got {value} in decision {decision} of {where}")
    piece: Piece = {}
    for name, values, empty in (
        ("slate", item, EMPTY), ("propensity", chance, 1.0), ("reward", reward, 0.0),
    ):  # fmt: skip
        kind = torch.int64 if name == "slate" else torch.float32
        cells = torch.full((int(first.sum()), k), empty, dtype=kind)  # (D, K)
        cells[row, slot] = torch.from_numpy(values).to(kind)
        piece[name] = cells
    did = torch.zeros(int(first.sum()), k, len(behaviours), dtype=torch.bool)  # (D, K, F)
    for place, name in enumerate(behaviours):
        did[row, slot, place] = torch.from_numpy(table[name].to_numpy())
    piece["did"] = did
    for name in ("user", "episode", "step", "terminated", "truncated"):
        piece[name] = torch.from_numpy(table[name].to_numpy()[first])
    return piece


def views(table: pa.Table, about: dict[str, Any], where: Path) -> Piece:
    """What was seen at D decisions, padded again, and what was excluded."""
    log = table.filter(pa.array(table["slot"].to_numpy() == 0))
    seen: Piece = {}
    for name in SEEN:
        if log[name].null_count:
            raise ValueError(
                f"{where} does not say what the policy saw ({name} is null): an offline learner "
                "needs a log with observations"
            )
        wide = padded(log[name], about["sizes"][name], IDS.get(name, 0))
        seen[name] = wide.long() if name in IDS else wide
    seen["feedback"] = seen["feedback"].reshape(len(log), -1, len(about["behaviours"]))
    return seen


def successors(piece: Piece, where: Path) -> tuple[Array, Array, Array]:
    """Order (D,) by session and step; whether the next in it follows; which end their session."""
    user, episode, step = (piece[name].numpy() for name in ("user", "episode", "step"))
    order = np.lexsort((step, episode, user))
    user, episode, step = user[order], episode[order], step[order]
    same = (user[1:] == user[:-1]) & (episode[1:] == episode[:-1])  # (D - 1,)
    apart = step[1:].astype(np.int64) - step[:-1]
    if (same & (apart == 0)).any():
        at = int((same & (apart == 0)).argmax())
        raise ValueError(
            f"{where} has two decisions of user {user[at]}, episode {episode[at]}, step "
            f"{step[at]}: a log is of sessions that were played once"
        )
    return order, np.append(same & (apart == 1), False), np.append(~same, True)


def batches(
    folders: Sequence[Path],
    abouts: Sequence[dict[str, Any]],
    spec: AgentSpec,
    batch: int,
    own_mask: bool,
) -> Iterator[Transition]:
    """Transitions of all logs in equal batches; what does not fill the last one is left out."""
    rest: Transition | None = None
    for folder, about in zip(folders, abouts, strict=True):
        for more in transitions(folder, about, spec, own_mask):
            whole = more if rest is None else joined(rest, more)
            turns = len(whole.reward) // batch
            # column b holds neighbours of the log: a replay keeps the past of a trip only once
            rows = torch.arange(turns * batch).reshape(batch, turns)
            for turn in range(turns):
                yield taken(whole, rows[:, turn], own_mask, spec.device)
            rest = taken(whole, torch.arange(turns * batch, len(whole.reward)), own_mask)


def transitions(
    folder: Path, about: dict[str, Any], spec: AgentSpec, own_mask: bool
) -> Iterator[Transition]:
    """A log's steps in order of users and sessions, as many at a time as the file is read in."""
    behaviours = about["behaviours"]
    waiting: Piece | None = None  # last steps of sessions whose next one may stand further on
    for table in tables(folder, (*KEYS, *behaviours, *SEEN)):
        piece = numbers(table, spec, behaviours, folder) | views(table, about, folder)
        if waiting is not None:
            piece = {name: torch.cat([waiting[name], x]) for name, x in piece.items()}
        order, follows, last = successors(piece, folder)
        piece = {name: x[order] for name, x in piece.items()}
        done = (piece["terminated"] | piece["truncated"]).numpy()  # (D,)
        rows = torch.from_numpy(np.flatnonzero(follows | done))  # (R,)
        after = rows + torch.from_numpy((follows & ~done)[rows.numpy()].astype(np.int64))
        if len(rows):
            yield steps(piece, rows, after, own_mask)
        waiting = {name: x[torch.from_numpy(last & ~done)] for name, x in piece.items()}


def steps(piece: Piece, rows: Tensor, after: Tensor, own_mask: bool) -> Transition:
    """Rows (R,) of a piece and those after them, themselves where nothing is known to follow."""
    obs, later = view(piece, rows), view(piece, after)
    excluded, next_excluded = piece["excluded"][rows], piece["excluded"][after]  # (R, M)
    cut = ((rows == after) & piece["truncated"][rows]).nonzero().squeeze(1)  # still there
    if len(cut):
        slate, did = piece["slate"][rows[cut]], piece["did"][rows[cut]]
        history, feedback = appended(later.history[cut], later.feedback[cut], slate, did)
        later.history[cut], later.feedback[cut] = history, feedback
        blank = torch.zeros(*next_excluded[cut].shape, 0)
        next_excluded[cut] = appended(next_excluded[cut], blank, slate, did[:, :, :0])[0]
    slot_reward = piece["reward"][rows]  # (R, K)
    return Transition(
        obs=obs,
        mask=obs.history if own_mask else excluded,
        decision=Decision(piece["slate"][rows], piece["propensity"][rows]),
        reward=slot_reward.sum(dim=1),
        chosen=piece["did"][rows][:, :, 0],
        slot_reward=slot_reward,
        next_obs=later,
        next_mask=later.history if own_mask else next_excluded,
        terminated=piece["terminated"][rows],
        truncated=piece["truncated"][rows] & ~piece["terminated"][rows],
    )


def view(piece: Piece, rows: Tensor) -> Observation:
    """What was seen at rows (R,), in tensors of its own."""
    return Observation(**{name: piece[name][rows] for name in SEEN if name != "excluded"})


def appended(ids: Tensor, told: Tensor, slate: Tensor, did: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (B, L) and what is told of them (B, L, F) with a slate (B, K) behind; none beyond L."""
    places, real = ids.shape[1], slate != EMPTY  # L, (B, K)
    place = (ids != EMPTY).sum(dim=1, keepdim=True) + real.cumsum(dim=1) - 1  # (B, K)
    place = torch.where(real & (place < places), place, places)
    wide = F.pad(ids, (0, 1)).scatter(1, place, slate)[:, :places]
    cells = place[:, :, None].expand(did.shape)  # (B, K, F)
    return wide, F.pad(told, (0, 0, 0, 1)).scatter(1, cells, did.to(told.dtype))[:, :places]


def joined(one: Transition, other: Transition) -> Transition:
    """Rows of one transition, then those of another."""
    return each([one, other], lambda parts_: torch.cat(parts_))


def taken(whole: Transition, rows: Tensor, own_mask: bool, device: str = "cpu") -> Transition:
    """Some rows of a transition; a mask that is the history stays the very same tensor."""
    some = each([whole], lambda parts_: parts_[0][rows].to(device))
    if not own_mask:
        return some
    return replace(some, mask=some.obs.history, next_mask=some.next_obs.history)


def each(some: list[Any], change: Callable[[list[Tensor]], Tensor]) -> Any:
    """Dataclasses of tensors, field by field through `change`."""
    if isinstance(some[0], Tensor):
        return change(some)
    names = [field.name for field in fields(some[0])]
    changed = {name: each([getattr(x, name) for x in some], change) for name in names}
    return type(some[0])(**changed)
