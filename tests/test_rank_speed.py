"""The benchmark of ranking times both ways on the same work and says both."""

import pytest

from experiments import rank_speed


def test_the_rows_say_both_times_and_their_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"USERS": 20, "ITEMS": 100, "KNOWN": 5, "RELEVANT": 4}.items():
        monkeypatch.setattr(rank_speed, name, value)
    monkeypatch.setattr(rank_speed, "FITTED", (30, 20))
    ranked, fitted = rank_speed.rows(1)
    assert ranked["ratio_to_peer"] == pytest.approx(ranked["peer"] / ranked["product"])
    assert fitted["peer"] is None
    assert "rank 20 users x 100 items" in rank_speed.text([ranked, fitted])
    assert "fit EASE on 30 users x 20 items" in rank_speed.text([ranked, fitted])
