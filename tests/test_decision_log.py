"""The decision log: batches of whole slates and episodes, the same from arrays and files."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.batch import Batch
from evaluation.log import DecisionLog

FIXTURES = Path(__file__).parent / "data" / "ope"
NAMES = {"action": "item", "reward": "click", "propensity": "p"}


def bandit(n: int = 50, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "action": rng.integers(0, 5, n),
        "reward": rng.random(n),
        "propensity": rng.uniform(0.1, 1.0, n),
    }


def episodes(lengths: list[int], seed: int = 0) -> dict[str, Any]:
    """Episodes of these lengths with ids in no order."""
    ids = np.random.default_rng(seed).permutation(len(lengths)) * 7 - 3
    step = np.concatenate([np.arange(k) for k in lengths])
    return {**bandit(len(step), seed), "episode": np.repeat(ids, lengths), "step": step}


def slates(lengths: list[int], seed: int = 0) -> dict[str, Any]:
    rows = episodes(lengths, seed)
    decision, slot = rows.pop("episode"), rows.pop("step")
    return {**rows, "decision": decision, "slot": slot}


def write(path: Path, columns: dict[str, Any], **given: Any) -> Path:
    pq.write_table(pa.table({k: v for k, v in columns.items()}), path, **given)
    return path


def joined(log: DecisionLog, rows: int, columns: list[str] | None = None) -> dict[str, Any]:
    batches = list(log.batches(rows, columns))
    first = {k: x for k, x in vars(batches[0]).items() if isinstance(x, np.ndarray)}
    return {k: np.concatenate([getattr(b, k) for b in batches]) for k in first}


def spoiled(x: np.ndarray, row: int, value: Any) -> np.ndarray:
    x = x.astype(float) if isinstance(value, float) else x.copy()
    x[row] = value
    return x


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=12),
    st.integers(1, 30),
    st.randoms(use_true_random=False),
)
def test_any_batch_size_gives_the_same_rows_with_episodes_whole(
    lengths: list[int], rows: int, shuffler: Any
) -> None:
    columns = episodes(lengths)
    order = list(range(len(columns["step"])))
    shuffler.shuffle(order)
    columns = {name: x[order] for name, x in columns.items()}
    log = DecisionLog.from_arrays(**columns)
    seen: set[int] = set()
    batch: Any
    for batch in log.batches(rows):
        ids = set(batch.episode.tolist())
        assert not ids & seen, "an episode is in two batches"
        assert len(batch) <= max(rows, max(lengths))
        assert (np.diff(batch.step)[np.diff(batch.episode) == 0] == 1).all()
        seen |= ids
    got, whole = joined(log, rows), joined(log, 10**6)
    for name, x in columns.items():
        np.testing.assert_array_equal(got[name], x[got["rows"]])
        np.testing.assert_array_equal(got[name], whole[name])
    assert sorted(got["rows"]) == list(range(len(order)))
    assert (log.unit, log.horizon, log.num_rows) == ("episode", max(lengths), len(order))


def test_batches_of_rows_are_views() -> None:
    rows = bandit(1000)
    log = DecisionLog.from_arrays(**rows, support=np.ones((1000, 5), dtype=bool))
    for batch in log.batches(rows=64):
        assert np.shares_memory(batch.reward, rows["reward"])
        assert batch.support is not None
        assert len(batch) <= 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"propensity": (2, 0.0)}, r"propensity .* got 0.0 in row 2: .* impossible"),
        ({"propensity": (3, 1.1)}, r"propensity must be in \(0, 1\], got 1.1 in row 3"),
        ({"propensity": (3, np.nan)}, r"propensity must be in \(0, 1\], got nan in row 3"),
        ({"reward": (4, np.nan)}, r"reward must be finite, got nan in row 4"),
        ({"reward": (4, np.inf)}, r"reward must be finite, got inf in row 4"),
        ({"action": (1, 5)}, r"action must be 0 to 4, got 5 in row 1"),
        ({"action": (1, -1)}, r"action must be 0 to 4, got -1 in row 1: .*needs `slot`"),
        ({"action": (1, 0.5)}, r"action must be an integer, got 0.5 in row 1"),
    ],
)
def test_an_impossible_row_is_named(
    tmp_path: Path, change: dict[str, tuple[int, Any]], message: str
) -> None:
    rows = bandit()
    for name, (row, value) in change.items():
        rows[name] = spoiled(rows[name], row, value)
    with pytest.raises(ValueError, match=message):
        DecisionLog.from_arrays(**rows, num_actions=5)
    good = bandit()
    for i, part in enumerate((good, rows)):
        write(tmp_path / f"{i}.parquet", {theirs: part[ours] for ours, theirs in NAMES.items()})
    log = DecisionLog.scan(tmp_path, columns=NAMES, num_actions=5)
    row = next(iter(change.values()))[0]
    with pytest.raises(ValueError, match=rf"row {50 + row} \(row {row} of .*1\.parquet\)"):
        list(log.batches())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 199), st.sampled_from([0.0, -0.3, 1.01, np.nan, np.inf, -np.inf]))
def test_the_row_of_a_bad_propensity_is_found(row: int, value: float) -> None:
    rows = bandit(200)
    rows["propensity"] = spoiled(rows["propensity"], row, value)
    with pytest.raises(ValueError, match=rf"in row {row}: "):
        DecisionLog.from_arrays(**rows)


def test_rounding_over_one_passes() -> None:
    rows = bandit()
    rows["propensity"] = spoiled(rows["propensity"], 0, 1.0 + 5e-7)
    assert DecisionLog.from_arrays(**rows).has("propensity")


def test_other_faults_are_refused_with_a_remedy() -> None:
    rows = bandit()
    context = np.zeros((50, 3))
    context[7, 2] = np.nan
    support = np.ones((50, 5), dtype=bool)
    support[9, rows["action"][9]] = False
    faults: list[tuple[dict[str, Any], str]] = [
        ({"context": context}, "got nan in row 7, column 2"),
        ({"reward": rows["reward"][:-1]}, "action has 50 rows, reward has 49"),
        ({"reward": rows["reward"][:, None]}, r"reward must be \(50,\), .* got \(50, 1\)"),
        ({k: x[:0] for k, x in rows.items()}, "the log is empty"),
        ({"marginal": np.zeros(50)}, "marginal must be in .* row 0: .*leave marginal out"),
        ({"reward_range": (0.0, 0.2)}, r"reward must lie in reward_range \[0.0, 0.2\], got"),
        ({"step": np.zeros(50)}, "step needs episode"),
        ({"joint": np.ones(50)}, "joint needs decision"),
        ({"support": support}, "of row 9 is not in its row"),
        ({"support": np.ones((50, 5))}, "support must be .* got float64"),
        ({"columns": {"slot": np.zeros(50)}}, "columns hold what is no field, got 'slot'"),
        ({"action": ["a"] * 50}, "action must hold numbers, got <U1"),
        ({"cluster": ["a"] * 49 + [None]}, "cluster is missing in row 49"),
        ({"reward": [None] + [1.0] * 49}, "reward is missing in row 0"),
    ]
    for change, message in faults:
        with pytest.raises(ValueError, match=message):
            DecisionLog.from_arrays(**{**rows, **change})


def test_slates_must_be_whole(tmp_path: Path) -> None:
    rows = slates([2, 3, 2])
    twice = {"decision": np.array([8, 8, 9, 8, 9, 7, 7]), "slot": np.array([0, 1, 0, 1, 1, 0, 1])}
    duplicate = r"duplicate \(decision, slot\) \(8, 1\) in row 3, first in row 1"
    with pytest.raises(ValueError, match=duplicate):
        DecisionLog.from_arrays(**{**rows, **twice})
    with pytest.raises(ValueError, match=r"slot of decision .* expected 1, found 2 in row 3"):
        DecisionLog.from_arrays(**{**rows, "slot": [0, 1, 0, 2, 3, 0, 1]})
    apart = {**rows, "decision": np.array([1, 2, 1, 2, 3, 3, 3])}
    path = write(tmp_path / "a.parquet", apart)
    with pytest.raises(
        ValueError, match=r"decision 1 are not adjacent: row 2 .*sort the log by dec"
    ):
        list(DecisionLog.scan(path, columns={k: k for k in apart}).batches())


def test_propensities_of_a_slate_multiply_to_its_joint() -> None:
    rows = slates([2, 3])
    p = rows["propensity"]
    joint = np.repeat([p[:2].prod(), p[2:].prod()], [2, 3])
    log = DecisionLog.from_arrays(**rows, joint=joint * 1.00005)
    with pytest.raises(ValueError, match=r"joint of decision .* in row 3, its propensities"):
        DecisionLog.from_arrays(**rows, joint=spoiled(joint, 3, joint[3] * 1.001))
    assert log.with_propensity(np.full(5, 0.5)).estimated  # a fitted one need not


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ([0, 1, 3, 0, 1], "step of episode 4 .* expected 2, found 3 in row 2"),
        ([0, 1, 1, 0, 1], r"duplicate \(episode, step\) \(4, 1\) in row 2, first in row 1"),
        ([1, 2, 3, 0, 1], "step of episode 4 .* expected 0, found 1 in row 0"),
    ],
)
def test_an_episode_has_all_its_steps(step: list[int], message: str) -> None:
    rows = {**bandit(5), "episode": [4, 4, 4, 2, 2], "step": step}
    with pytest.raises(ValueError, match=message):
        DecisionLog.from_arrays(**rows)


def test_episodes_of_slates_count_steps_by_decision() -> None:
    rows: dict[str, Any] = {
        **bandit(6), "episode": [0, 0, 0, 0, 1, 1], "decision": [5, 5, 6, 6, 7, 7],
        "slot": [0, 1] * 3, "step": [0, 0, 1, 1, 0, 0],
    }  # fmt: skip
    order = [3, 0, 5, 2, 4, 1]
    shuffled: dict[str, Any] = {k: np.asarray(x)[order] for k, x in rows.items()}
    log = DecisionLog.from_arrays(**shuffled)
    assert (log.unit, log.horizon) == ("episode", 2)
    batch: Any = next(log.batches())
    assert batch.slot.tolist() == [0, 1] * 3
    assert sorted(batch.decision[:4].tolist()) == [5, 5, 6, 6]
    with pytest.raises(ValueError, match="step must be the same on all rows of a decision"):
        DecisionLog.from_arrays(**{**rows, "step": [0, 1, 2, 3, 0, 0]})
    with pytest.raises(ValueError, match=r"step of episode 0 .* expected 1, found 2 in row 2"):
        DecisionLog.from_arrays(**{**rows, "step": [0, 0, 2, 2, 0, 0]})


def test_empty_slots_are_certain() -> None:
    rows = {**slates([2, 2]), "action": [3, -1, 2, 1], "propensity": [0.5, 0.0, 0.5, 0.5]}
    batch = next(DecisionLog.from_arrays(**rows).batches())
    assert batch.propensity.tolist() == [0.5, 1.0, 0.5, 0.5]


def test_places_left_out_follow_the_rows() -> None:
    log = DecisionLog.from_arrays(**bandit(5), decision=["b", "a", "b", "b", "a"])
    batch: Any = next(log.batches())
    assert batch.rows.tolist() == [0, 2, 3, 1, 4]
    assert batch.slot.tolist() == [0, 1, 2, 0, 1]
    assert (log.unit, log.horizon) == ("slate", 3)


def test_tensors_and_frames_serve_as_arrays() -> None:
    rows = {**bandit(), "cluster": [f"user {i % 7}" for i in range(50)]}
    plain = joined(DecisionLog.from_arrays(**rows), 16)
    tensors: dict[str, Any] = {
        k: torch.as_tensor(x) if k != "cluster" else x for k, x in rows.items()
    }
    names = {k: f"our {k}" for k in rows}
    frame = {f"our {k}": x for k, x in rows.items()}
    for log in (
        DecisionLog.from_arrays(**tensors),
        DecisionLog.from_frame(pd.DataFrame(frame), names),
        DecisionLog.from_frame(pl.DataFrame(frame), names),
        DecisionLog.from_frame(pa.table(frame), names),
    ):
        for name, x in joined(log, 16).items():
            np.testing.assert_array_equal(x, plain[name])


@pytest.mark.parametrize("kind", ["matrix", "lists", "function", "policy"])
@pytest.mark.parametrize("items", [1, 4])
def test_what_was_possible_is_known_however_it_is_said(kind: str, items: int) -> None:
    rng = np.random.default_rng(0)
    n = 3000
    possible = rng.random((n, 6)) < 0.5
    action = rng.integers(0, 6, n)
    possible[np.arange(n), action] = True
    context = possible.astype(float)
    lists = np.where(possible, np.arange(6), -1)[:, ::-1]
    policy = SimpleNamespace(distribution=lambda b: (np.tile(np.arange(6), (len(b), 1)), b.context))
    support = {"matrix": possible, "lists": lists, "function": lambda x: x / 6, "policy": policy}
    rows = {**bandit(n), "action": action, "context": context}
    log = DecisionLog.from_arrays(**rows, support=support[kind])
    assert log.num_actions == 6
    asked = rng.integers(-1, 6, (n, items * 2))
    for batch in log.batches(rows=1234, columns=["support"]):
        some = asked[batch.rows]
        expected = possible[batch.rows[:, None], np.maximum(some, 0)] & (some >= 0)
        np.testing.assert_array_equal(batch.supported(some), expected)
    silent: Batch = next(DecisionLog.from_arrays(**rows).batches())
    assert silent.supported(asked) is None


def test_several_loggers_are_pooled_by_share(tmp_path: Path) -> None:
    rows = {**bandit(4), "propensity": [[0.2, 0.4], [0.6, 0.0], [0.1, 0.5], [1.0, 0.2]],
            "logger": [0, 0, 1, 0]}  # fmt: skip
    each = np.array(rows["propensity"])
    log = DecisionLog.from_arrays(**rows)
    np.testing.assert_allclose(joined(log, 3)["propensity"], each @ [0.75, 0.25], rtol=1e-15)
    naive = DecisionLog.from_arrays(**rows, pooling="naive")
    assert joined(naive, 3)["propensity"].tolist() == [0.2, 0.6, 0.5, 1.0]
    path = write(tmp_path / "a.parquet",
                 {"item": rows["action"], "click": rows["reward"], "p0": each[:, 0],
                  "p1": each[:, 1], "who": rows["logger"]})  # fmt: skip
    names = {"action": "item", "reward": "click", "propensity": ["p0", "p1"], "logger": "who"}
    scan = DecisionLog.scan(path, columns=names)
    np.testing.assert_array_equal(joined(scan, 3, ["propensity"])["propensity"],
                                  joined(log, 9)["propensity"])  # fmt: skip
    with pytest.raises(ValueError, match=r"logger must be 0 to 1, .* got 2 in row 2"):
        DecisionLog.from_arrays(**{**rows, "logger": [0, 0, 2, 0]})
    with pytest.raises(ValueError, match="give `logger`"):
        DecisionLog.from_arrays(**{**rows, "logger": None})
    with pytest.raises(ValueError, match="pooling must be one of balanced, naive"):
        DecisionLog.from_arrays(**rows, pooling="mean")


def test_a_log_without_propensities_can_be_given_some(tmp_path: Path) -> None:
    rows = slates([2, 3, 1, 4])
    p = rows.pop("propensity")
    order = np.random.default_rng(0).permutation(len(p))
    arrays = DecisionLog.from_arrays(**{k: x[order] for k, x in rows.items()}, propensity=None)
    scan = DecisionLog.scan(write(tmp_path / "a.parquet", rows), columns={k: k for k in rows})
    for log, given_p in ((arrays, p[order]), (scan, p)):
        assert not log.has("propensity")
        assert next(log.batches()).propensity is None
        fitted = log.with_propensity(given_p)
        assert (fitted.has("propensity"), fitted.estimated, log.estimated) == (True, True, False)
        got = joined(fitted, 3)
        np.testing.assert_array_equal(got["propensity"], given_p[got["rows"]])
        np.testing.assert_array_equal(joined(fitted, 3, ["propensity"])["propensity"],
                                      got["propensity"])  # fmt: skip
        with pytest.raises(ValueError, match=r"got 0.0 in row 4"):
            log.with_propensity(spoiled(given_p, 4, 0.0))
        with pytest.raises(ValueError, match=r"propensity must be \(10,\)"):
            log.with_propensity(given_p[:-1])


@pytest.mark.parametrize("name", ["cascade_additive_ranking", "independent_factorizable"])
def test_stored_slates_are_read(name: str) -> None:
    """Their joint probability is the product of the conditional ones, the ratios of prefixes."""
    z = np.load(FIXTURES / f"slate_{name}.npz")
    prefix = z["pscore_cascade"].reshape(-1, 3)
    given_above = prefix / np.column_stack([np.ones(len(prefix)), prefix[:, :-1]])
    log = DecisionLog.from_arrays(
        action=z["action"], reward=z["reward"], propensity=given_above.ravel(),
        decision=z["slate_id"], slot=z["position"], joint=z["pscore"],
        marginal=z["pscore_item_position"],
    )  # fmt: skip
    assert (log.unit, log.horizon, log.num_actions) == ("slate", 3, 6)


def test_positions_without_slates_are_rows() -> None:
    z = np.load(FIXTURES / "bandit_position.npz")
    log = DecisionLog.from_arrays(action=z["action"], reward=z["reward"], propensity=z["pscore"],
                                  slot=z["position"], context=z["context"])  # fmt: skip
    assert (log.unit, log.horizon, log.num_rows) == ("row", 1, 450)
    np.testing.assert_array_equal(joined(log, 100)["slot"], z["position"])
