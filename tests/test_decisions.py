"""The decision log keeps what happened, says what it is, and survives an interruption."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from agents.base import Decision
from encoders.state import EMPTY, Observation
from evaluation.decisions import DecisionWriter, meta, read, seen_by

META: dict[str, Any] = {
    "catalog": "abc",
    "policy": "random",
    "env": {"name": "toy"},
    "adaptive": True,
}


def observation(b: int, seed: int = 0) -> Observation:
    g = torch.Generator().manual_seed(seed)
    past = torch.randint(0, 9, (b, 6), generator=g)
    past[0, 2:] = EMPTY
    history = torch.full((b, 4), EMPTY)
    history[1:, 0] = 7
    feedback = torch.zeros(b, 4, 2)
    feedback[1:, 0] = torch.tensor([1.0, 0.5])
    return Observation(
        profile=torch.rand(b, 3, generator=g),
        past=past,
        past_count=torch.where(past == EMPTY, 0.0, 2.0),
        past_age=torch.where(past == EMPTY, 0.0, 3.5),
        history=history,
        feedback=feedback,
        context=torch.rand(b, 5, generator=g),
    )


def step(b: int = 3, k: int = 2, seed: int = 0, **changes: Any) -> dict[str, Any]:
    obs = observation(b, seed)
    given = {
        "user": torch.arange(b),
        "episode": torch.full((b,), 5),
        "step": torch.full((b,), 1),
        "time": torch.full((b,), 1.5, dtype=torch.float64),
        "decision": Decision(torch.arange(b * k).reshape(b, k), torch.full((b, k), 0.25)),
        "slot_reward": torch.arange(b * k).reshape(b, k).float(),
        "chosen": {"buy": torch.eye(b, k, dtype=torch.bool)},
        "terminated": torch.zeros(b, dtype=torch.bool),
        "truncated": torch.ones(b, dtype=torch.bool),
        "obs": obs,
        "excluded": obs.history,
    }
    return {**given, **changes}


def log(folder: Path, *steps: dict[str, Any], **options: Any) -> Path:
    behaviours = options.pop("behaviours", ["buy"])
    writer = DecisionWriter(folder, behaviours=behaviours, meta=META, **options)
    for one in steps:
        writer.write(**one)
    writer.close()
    return folder


def test_a_row_of_the_log_says_what_happened(tmp_path: Path) -> None:
    frame = read(log(tmp_path / "log", step()))
    row = frame[(frame.user == 1) & (frame.slot == 1)].iloc[0]
    assert len(frame) == 6
    assert (row["decision"], row["item"], row["reward"], row["propensity"]) == (1, 3, 3.0, 0.25)
    assert row["buy"]
    assert row["truncated"]
    assert not row["terminated"]
    assert (row["episode"], row["step"]) == (5, 1)
    assert row["time"] == pd.Timestamp("1970-01-02 12:00")
    assert pd.isna(row["marginal"])  # unknown below the top


def test_context_stands_on_the_first_slot_only(tmp_path: Path) -> None:
    frame = read(log(tmp_path / "log", step()))
    top, below = frame[frame.slot == 0], frame[frame.slot == 1]
    assert below[["past", "history", "profile", "excluded", "feedback"]].isna().all(axis=None)
    assert list(top.iloc[0]["history"]) == []
    assert list(top.iloc[1]["history"]) == [7]
    assert len(top.iloc[0]["past"]) == 2  # the padding is gone
    assert (top.marginal == top.propensity).all()


def test_what_was_seen_comes_back_exactly(tmp_path: Path) -> None:
    both = {"chosen": {n: torch.zeros(3, 2, dtype=torch.bool) for n in ("buy", "click")}}
    folder = log(
        tmp_path / "log",
        step(seed=1, **both, user=torch.tensor([2, 0, 1])),
        step(seed=2, **both),
        behaviours=["buy", "click"],
        flush_rows=6,
    )
    obs, excluded = seen_by(folder)
    first, second = observation(3, seed=1), observation(3, seed=2)
    for name in ("profile", "past", "past_count", "past_age", "history", "feedback", "context"):
        assert torch.equal(
            getattr(obs, name), torch.cat([getattr(first, name), getattr(second, name)])
        )
    assert torch.equal(excluded, torch.cat([first.history, second.history]))


def test_parts_follow_each_other_and_decisions_count_on(tmp_path: Path) -> None:
    folder = log(tmp_path / "log", *[step() for _ in range(5)], flush_rows=12)
    assert [p.name for p in sorted(folder.iterdir())] == [f"part-{i:05d}.parquet" for i in range(3)]
    assert read(folder)["decision"].tolist() == np.repeat(np.arange(15), 2).tolist()


def test_an_interrupted_log_stays_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = DecisionWriter(tmp_path / "log", behaviours=["buy"], meta=META, flush_rows=6)
    writer.write(**step())

    def cut_off(table: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"PAR1 half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", cut_off)
    with pytest.raises(KeyboardInterrupt):
        writer.write(**step())
    assert len(read(tmp_path / "log")) == 6


def test_an_empty_slot_is_no_row_unless_it_carries_the_context(tmp_path: Path) -> None:
    slate = torch.tensor([[4, EMPTY], [EMPTY, EMPTY]])
    decision = Decision(slate, torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
    frame = read(log(tmp_path / "log", step(b=2, decision=decision)))
    assert frame["item"].tolist() == [4, EMPTY]


def test_the_log_says_what_it_is(tmp_path: Path) -> None:
    about = meta(log(tmp_path / "log", step()))
    assert {k: about[k] for k in META} == META
    assert about["behaviours"] == ["buy"]


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, float("nan")])
def test_an_impossible_propensity_is_refused_when_written(tmp_path: Path, value: float) -> None:
    propensity = torch.full((3, 2), 0.5)
    propensity[2, 1] = value
    with pytest.raises(ValueError, match=r"propensity must be in \(0, 1\], got .* row 2, slot 1"):
        log(tmp_path / "log", step(decision=Decision(torch.arange(6).reshape(3, 2), propensity)))


def test_an_impossible_propensity_is_refused_when_read(tmp_path: Path) -> None:
    part = log(tmp_path / "log", step()) / "part-00000.parquet"
    table = pq.read_table(part)
    zero = table.column("propensity").to_numpy() * 0
    at = table.column_names.index("propensity")
    pq.write_table(table.set_column(at, table.schema.field(at), [zero]), part)
    with pytest.raises(ValueError, match=r"propensity must be in \(0, 1\], got 0.0 in row 0"):
        read(tmp_path / "log")


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    part = log(tmp_path / "log", step()) / "part-00000.parquet"
    pq.write_table(pq.read_table(part).drop_columns(["episode"]), part)
    with pytest.raises(ValueError, match="has no column episode"):
        read(tmp_path / "log")


def test_an_empty_folder_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no decision log"):
        read(tmp_path)


def test_two_logs_are_not_mixed_in_one_folder(tmp_path: Path) -> None:
    log(tmp_path / "log", step())
    with pytest.raises(ValueError, match="already holds a decision log"):
        DecisionWriter(tmp_path / "log", behaviours=["buy"], meta=META)


def test_metadata_is_not_optional(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing: adaptive"):
        DecisionWriter(
            tmp_path, behaviours=["buy"], meta={k: v for k, v in META.items() if k != "adaptive"}
        )


def test_a_behaviour_cannot_hide_a_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'reward' is a column of every log"):
        DecisionWriter(tmp_path, behaviours=["reward"], meta=META)
