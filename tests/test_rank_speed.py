"""The benchmark of ranking times both ways on the same work, and both say the same of it."""

import pytest

from experiments import bench_rows, rank_speed


def test_the_rows_say_both_rates_and_their_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"USERS": 400, "ITEMS": 2000, "KNOWN": 5, "RELEVANT": 4}.items():
        monkeypatch.setattr(rank_speed, name, value)
    monkeypatch.setattr(rank_speed, "FITTED", (600, 400))
    ranked, fitted = rank_speed.rows(1, 0.0, 0, quick=True)
    assert ranked["ratio_to_peer"] == pytest.approx(ranked["product"] / ranked["peer"])
    assert fitted["peer"] is None
    text = bench_rows.table([ranked, fitted])
    assert "rank 20 users x 100 items" in text
    assert "fit EASE on 30 users x 20 items" in text


def test_both_ways_find_the_same() -> None:
    given = rank_speed.world(30, 200, 5, 4, seed=1)
    ours, loop = rank_speed.batched(*given, 10), rank_speed.one_by_one(*given, 10)
    for name, values in loop.items():
        assert ours[name].tolist() == pytest.approx(values.tolist())
