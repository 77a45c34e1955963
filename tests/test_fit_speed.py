"""The fit's curve: parts of a log are whole households, and counts are its purchases."""

import numpy as np

from experiments import fit_speed
from experiments.bench_rows import KEYS
from experiments.env_speed import log_of_regulars
from experiments.fit_speed import counts_of, measured, part_of
from sources.cache import cache_folder


def test_a_part_of_a_log_has_all_of_its_households_and_no_other():
    logs = log_of_regulars(30, 0)
    part = part_of(logs, 0.1)
    users = logs.events["user"].unique()
    kept = part.events["user"].unique()
    assert len(kept) == round(0.1 * len(users))
    assert len(part.events) == logs.events["user"].isin(kept).sum()


def test_counts_are_the_purchases():
    part = part_of(log_of_regulars(30, 0), 0.02)
    counts = counts_of(part, 30)
    assert counts.sum() == len(part.events)
    by_item = part.events["item"].astype(int).value_counts().reindex(range(30), fill_value=0)
    assert np.array_equal(np.asarray(counts.sum(axis=0)).ravel(), by_item.to_numpy())


def test_a_fit_that_is_kept_is_made_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("RECPLAY_CACHE", str(tmp_path))  # put back afterwards
    kept = []

    def fit(spec):
        cached_in = cache_folder()
        kept.append((cached_in, list(cached_in.glob("*"))))

    monkeypatch.setattr(fit_speed.FittedSimulator, "fit", fit)
    for _ in range(2):
        size = {"items": 30, "share": 0.02, "seed": 0, "device": "cpu"}
        assert measured("fitted users", size)["events"] > 0
    assert kept[0][0] != kept[1][0]
    assert all(not inside for _, inside in kept)


def test_rows_have_a_curve_and_yardsticks(monkeypatch):
    def alone(module, way, size):
        events = round(1000 * size["share"])
        return {"events": events, "seconds": 0.5 if way == "EASE" else 2.0, "memory": 7.0}

    monkeypatch.setattr(fit_speed, "alone", alone)
    found = fit_speed.rows(3, 1.0, 0, False)
    assert all(set(row) == set(KEYS) for row in found)
    assert [row["at"] for row in found if row["curve"]] == [125.0, 250.0, 500.0, 1000.0]
    assert [row["ratio_to_peer"] for row in found[4:]] == [1.0, 0.25]
    assert all("a yardstick" in row["peer_name"] for row in found[4:])
    assert len({row["case"] for row in found}) == len(found)
