"""Decision logs in files: scanned, never whole, and refused where they are damaged."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decision_log import NAMES, bandit, episodes, joined, write

from evaluation.log import DecisionLog


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
@pytest.mark.parametrize("rows", [1, 7, 65_536])
def test_a_scan_gives_what_arrays_give(tmp_path: Path, suffix: str, rows: int) -> None:
    columns = episodes([3, 1, 4, 1, 5, 9, 2, 6], seed=1)
    n = len(columns["step"])
    columns["context"] = np.random.default_rng(2).normal(size=(n, 2))
    pi = np.linspace(0, 1, n)
    flat = {k: v for k, v in columns.items() if k != "context"}
    frame = pl.DataFrame({**flat, "x0": columns["context"][:, 0], "x1": columns["context"][:, 1],
                          "pi": pi, "unused": ["text"] * n})  # fmt: skip
    for i, part in enumerate((frame[:10], frame[10:12], frame[12:])):  # episodes cross the files
        path = tmp_path / f"part-{i}.{suffix}"
        part.write_csv(path) if suffix == "csv" else part.write_parquet(path)
    names = {**{k: k for k in flat}, "context": ["x0", "x1"]}
    scan = DecisionLog.scan(tmp_path / f"*.{suffix}", columns=names, extra=["pi"])
    arrays = DecisionLog.from_arrays(**columns, columns={"pi": pi})
    for log in (scan, arrays, scan):  # the scan twice: it starts anew
        got = joined(log, rows)
        for name, x in columns.items():
            np.testing.assert_array_equal(got[name], x, err_msg=name)
            assert got[name].dtype == (np.float64 if x.dtype.kind == "f" else np.int64)
        np.testing.assert_array_equal(np.concatenate([b.columns["pi"] for b in log.batches(rows)]),
                                      pi)  # fmt: skip
    for what in ("num_rows", "num_actions", "horizon", "reward_range", "unit"):
        assert getattr(scan, what) == getattr(arrays, what), what


def test_only_the_fields_asked_for_are_read(tmp_path: Path) -> None:
    rows = bandit()
    path = write(
        tmp_path / "a.parquet",
        {"item": rows["action"], "click": rows["reward"], "p": rows["propensity"] - 5},
    )
    log = DecisionLog.scan(path, columns=NAMES)
    batch = next(log.batches(columns=["action", "slot"]))
    assert batch.reward is None
    assert batch.propensity is None
    assert batch.slot is None
    with pytest.raises(ValueError, match="propensity must be in"):
        next(log.batches())
    with pytest.raises(ValueError, match="no column 'pi', it has: action, propensity, reward"):
        next(log.batches(columns=["pi"]))


def test_a_scan_holds_no_more_for_more_rows(tmp_path: Path) -> None:
    peaks = []
    for n in (200_000, 1_000_000):
        rows = bandit(n)
        path = write(tmp_path / f"{n}.parquet", {"item": rows["action"], "click": rows["reward"],
                                                 "p": rows["propensity"],
                                                 "e": np.arange(n) // 4})  # fmt: skip
        log = DecisionLog.scan(path, columns={**NAMES, "episode": "e"})
        tracemalloc.start()
        assert sum(len(b) for b in log.batches()) == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_a_file_longer_than_is_read_ahead_comes_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.log_files.AHEAD", 300)
    rows = bandit(1000)
    path = write(tmp_path / "a.parquet", {NAMES[k]: x for k, x in rows.items()}, row_group_size=70)
    got = joined(DecisionLog.scan(path, columns=NAMES), 65_536)
    for name, x in rows.items():
        np.testing.assert_array_equal(got[name], x)
    assert got["rows"].tolist() == list(range(1000))


def test_text_ids_of_files_are_told_apart(tmp_path: Path) -> None:
    rows = bandit(6)
    path = write(tmp_path / "a.parquet",
                 {"item": rows["action"], "click": rows["reward"], "p": rows["propensity"],
                  "user": ["ann", "bob", "ann", "cid", "bob", "ann"]})  # fmt: skip
    log = DecisionLog.scan(path, columns={**NAMES, "cluster": "user"})
    ids = joined(log, 2)["cluster"]
    assert np.unique(ids, return_inverse=True)[1].tolist() != [0] * 6
    assert [(ids == i).tolist() for i in ids[:2]] == [
        [True, False, True, False, False, True], [False, True, False, False, True, False]
    ]  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(cut=st.floats(0.0, 0.99))
def test_a_truncated_file_is_named(tmp_path_factory: Any, cut: float) -> None:
    folder = tmp_path_factory.mktemp("truncated")
    rows = bandit(200)
    for i in range(2):
        write(folder / f"{i}.parquet", {NAMES[k]: x for k, x in rows.items()})
    data = (folder / "1.parquet").read_bytes()
    (folder / "1.parquet").write_bytes(data[: int(cut * len(data))])
    with pytest.raises(ValueError, match=r"1\.parquet cannot be read as Parquet .*truncated"):
        list(DecisionLog.scan(folder, columns=NAMES).batches())


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    rows = bandit(20_000)
    path = write(tmp_path / "a.parquet", {NAMES[k]: x for k, x in rows.items()},
                 compression="zstd", use_dictionary=False)  # fmt: skip
    data = bytearray(path.read_bytes())
    data[10:300] = bytes(290)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as Parquet"):
        list(DecisionLog.scan(path, columns=NAMES).batches())


def test_what_a_file_lacks_is_said_before_rows_are_read(tmp_path: Path) -> None:
    rows = bandit()
    columns = {NAMES[k]: x for k, x in rows.items()}
    path = write(tmp_path / "a.parquet", {**columns, "name": ["x"] * 50})
    hint = r"'clicks' \(declared as reward\), did you mean 'click'\? It has: item, click, p, name"
    with pytest.raises(ValueError, match=hint):
        DecisionLog.scan(path, columns={**NAMES, "reward": "clicks"})
    with pytest.raises(ValueError, match=r"'name' of .* must hold numbers to serve as reward"):
        DecisionLog.scan(path, columns={**NAMES, "reward": "name"})
    with pytest.raises(ValueError, match=r"no file matches .*nothing\*"):
        DecisionLog.scan(tmp_path / "nothing*", columns=NAMES)
    with pytest.raises(ValueError, match=r"name our fields .* got 'rewards'"):
        DecisionLog.scan(path, columns={**NAMES, "rewards": "click"})
    with pytest.raises(ValueError, match="must name action and reward, got action"):
        DecisionLog.scan(path, columns={"action": "item"})
    empty = write(tmp_path / "b.parquet", {k: x[:0] for k, x in columns.items()})
    with pytest.raises(ValueError, match="the log is empty"):
        DecisionLog.scan(empty, columns=NAMES)
    holes = write(tmp_path / "c.parquet", {**columns, "click": [0.5] * 30 + [None] * 20})
    with pytest.raises(ValueError, match=r"'click' \(reward\) is null in row 80 \(row 30 of"):
        list(DecisionLog.scan([path, holes], columns=NAMES).batches())


def test_a_log_says_of_itself_that_it_is_adaptive(tmp_path: Path) -> None:
    table = pa.table({NAMES[k]: x for k, x in bandit().items()})
    meta = {"policy": "dqn", "adaptive": True}
    pq.write_table(table.replace_schema_metadata({"recplay": json.dumps(meta)}),
                   tmp_path / "part-00000.parquet")  # fmt: skip
    log = DecisionLog.scan(tmp_path, columns=NAMES)
    assert log.adaptive
    assert log.meta == meta
    assert not DecisionLog.scan(tmp_path, columns=NAMES, adaptive=False).adaptive


def test_lists_serve_as_context(tmp_path: Path) -> None:
    columns = {NAMES[k]: x for k, x in bandit(6).items()}
    x = np.arange(12.0).reshape(6, 2)
    for name, kind in (("list", pl.List(pl.Float32)), ("array", pl.Array(pl.Float32, 2))):
        path = tmp_path / f"{name}.parquet"
        pl.DataFrame({**columns, "x": pl.Series(x.tolist(), dtype=kind)}).write_parquet(path)
        log = DecisionLog.scan(path, columns={**NAMES, "context": "x"})
        np.testing.assert_array_equal(joined(log, 4)["context"], x)
    ragged = pl.DataFrame({**columns, "x": [[1.0]] * 5 + [[1.0, 2.0]]})
    ragged.write_parquet(tmp_path / "ragged.parquet")
    log = DecisionLog.scan(tmp_path / "ragged.parquet", columns={**NAMES, "context": "x"})
    with pytest.raises(ValueError, match="must have one length, got 1 to 2"):
        list(log.batches())
