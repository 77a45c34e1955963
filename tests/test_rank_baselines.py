"""The ranking command: splits without leaks, rows that a hand can check, words for bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from scipy.sparse import csr_matrix

from experiments import cli, rank_baselines
from experiments.held_out import cut, parts_of
from experiments.ranked import mean_rows, rank_models, scorer, tuned, validation
from sources.logs import Logs

ROOT = Path(__file__).resolve().parents[1]
POPULAR = {"_target_": "agents.popular.Popularity", "_partial_": True}
EASE = {"_target_": "agents.linear.EASE", "_partial_": True, "lam": 5.0}


def shop(users: int = 30, items: int = 12, seed: int = 0) -> Logs:
    """Two kinds of users who buy the even or the odd items, some of them again."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        kind = np.arange(user % 2, items, 2)
        for step in range(10):
            when = pd.Timestamp("2024-01-01", tz="UTC") + pd.Timedelta(days=step, hours=user)
            rows.append((f"u{user}", int(rng.choice(kind)), when, "buy", 2.0, f"{user}-{step}"))
    events = pd.DataFrame(rows, columns=["user", "item", "time", "behaviour", "value", "basket"])
    return Logs.create(events)


def parts(split: str = "user_time", seed: int = 0):
    return parts_of(*cut(split, shop(), 0.8, seed), None, seed, split)


def config(**given):
    base = {"data": {"repeats": [False, True]}, "k": [2, 3], "cold": 2, "repeats": None,
            "progress": False, "text": "all-minilm-l6-v2"}  # fmt: skip
    return OmegaConf.create({**base, **given})


@pytest.mark.parametrize("split", ["user_time", "leave_last_out", "global_time"])
def test_nothing_of_a_users_later_part_lies_before_what_is_fitted_on(split) -> None:
    found = parts(split)
    for user in range(found.past.num_users):
        before = found.past.time[found.past.user == user]
        after = found.later.time[found.later.user == user]
        if len(after):
            assert before.max() < after.min()
            assert found.now[user] == after.min()


def test_the_random_split_keeps_the_share_of_each_user_and_leaks() -> None:
    found = parts("random")
    assert (np.bincount(found.past.user) == 8).all()
    past, later = found.past, found.later
    late = [
        past.time[past.user == u].max() > later.time[later.user == u].min()
        for u in range(past.num_users)
    ]
    assert np.mean(late) > 0.8


def test_what_is_to_be_found_is_new_to_the_user_unless_repeats_count() -> None:
    found = parts()
    own = found.past.counts() > 0
    assert found.relevant(repeats=False).multiply(own).nnz == 0
    every = found.relevant(repeats=True)
    assert (every != (found.later.counts() > 0).astype(np.float32)).nnz == 0
    assert found.relevant(repeats=False).nnz == every.nnz - every.multiply(own).nnz


def test_the_validation_part_is_the_end_of_what_is_fitted_on() -> None:
    found = parts()
    inner = validation(found)
    assert len(inner.past.user) + len(inner.later.user) == len(found.past.user)
    for user in range(found.past.num_users):
        mine = inner.later.user == user
        if mine.any():
            assert inner.past.time[inner.past.user == user].max() <= inner.later.time[mine].min()
    ends = [
        {*zip(x.user.tolist(), x.time.tolist(), strict=True)} for x in (found.later, inner.later)
    ]
    assert ends[0].isdisjoint(ends[1])


def test_rows_tell_the_kinds_of_users_apart() -> None:
    models = {"popularity": OmegaConf.create(POPULAR), "ease": OmegaConf.create(EASE)}
    rows = rank_models(config(), parts(), models, 0)
    assert len(rows) == 2 * 2 * 2
    by = {(r["model"], r["repeats"], r["k"]): r for r in rows}
    for repeats in (False, True):
        ease, popular = (by[name, repeats, 3] for name in ("ease", "popularity"))
        assert ease["recall"] > popular["recall"] + 0.1
        assert popular["ndcg_difference"] == pytest.approx(popular["ndcg"] - ease["ndcg"])
        assert popular["difference_high"] < 0
        assert ease["ndcg_difference"] == 0
    said = "recall precision ndcg coverage fit_seconds predict_ms_per_user split k model gini mrr"
    assert {*said.split()} <= {*rows[0]}


def test_tuning_takes_the_setting_that_is_best_on_validation() -> None:
    model = OmegaConf.create({**EASE, "lam": 1e9, "grid": {"lam": [1e9, 5.0]}})
    model.pop("lam")
    OmegaConf.set_struct(model, True)  # as Hydra has it
    found = parts()
    chosen = tuned(config(), found, "ease", model, 0)
    values = {}
    for lam in (1e9, 5.0):
        one = OmegaConf.create({**EASE, "lam": lam})
        row = rank_models(config(k=[2]), validation(found), {"ease": one}, 0)[0]
        values[lam] = row["ndcg"]
    assert chosen.lam == max(values, key=lambda lam: values[lam])


def test_scores_are_those_of_the_moment_the_later_part_begins() -> None:
    found, asked = parts(), []

    class Model:
        def scores(self, obs):
            asked.append(obs)
            return torch.zeros(len(obs), found.past.num_items)

    scorer(found.past, found.now, Model())(torch.tensor([4, 1]))
    first = found.past.time[found.past.user == 4].max()
    assert float(asked[0].past_age[0].min()) == pytest.approx(found.now[4] - first, rel=1e-5)


def test_means_over_seeds_are_of_numbers_only() -> None:
    row = {"model": "a", "repeats": False, "k": 2, "ndcg": 0.1, "users": 4, "cold_recall": None}
    other = {**row, "ndcg": 0.3, "users": 6, "cold_recall": 0.5}
    assert mean_rows([row, other]) == [
        {"model": "a", "repeats": False, "k": 2, "ndcg": pytest.approx(0.2), "users": 5,
         "cold_recall": 0.5}
    ]  # fmt: skip


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "experiments" / "rank_baselines.py")
    return subprocess.run(
        [sys.executable, script, *words], capture_output=True, text=True, timeout=120, cwd=cwd
    )


def test_the_command_prints_a_table_and_writes_its_rows(tmp_path) -> None:
    ratings = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    rng = np.random.default_rng(0)
    for user in range(40):
        for place, item in enumerate(rng.permutation(30)[:12]):
            ratings.append(f"{user}\t{item}\t{rng.integers(1, 6)}\t{1_000_000 + place}")
    frame = pd.DataFrame([line.split("\t") for line in ratings[1:]],
                         columns=["user", "item", "rating", "time"])  # fmt: skip
    frame.to_csv(tmp_path / "ratings.csv", index=False)
    (tmp_path / "films.yaml").write_text(
        "name: films\nevents:\n  file: ratings.csv\n"
        "  columns: {user: user, item: item, time: time, value: rating}\n  behaviour: rate\n"
        "  time_unit: s\npurchases: [rate]\n"
    )
    conf = tmp_path / "conf" / "data"
    conf.mkdir(parents=True)
    (conf / "films.yaml").write_text(
        f"_target_: sources.tables.load\nconfig: {tmp_path}/films.yaml\nrepeats: [false]\n"
        "models:\n  popularity: {_target_: agents.popular.Popularity, _partial_: true}\n"
        "  ease: {_target_: agents.linear.EASE, _partial_: true, lam: 10.0}\n"
    )
    out = tmp_path / "rows.json"
    done = run("--config-dir", str(tmp_path / "conf"), "data=films", "k=[5]", f"out={out}",
               "progress=false")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "items new to the user, k=5, 40 users, the last 20% of each user" in done.stdout
    rows = json.loads(out.read_text())
    assert [r["model"] for r in rows] == ["popularity", "ease"]
    for name in ("recall", "ndcg", "coverage"):
        assert f"{rows[0][name]:.4f}" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["split=sideways"], "split must be one of user_time"),
        (["models=[eese]"], "has no 'eese', did you mean 'ease'?"),
        (["k=[0]"], "k must be a list of whole numbers of at least 1"),
        (["data=movielen"], "did you mean 'movielens'?"),
    ],
)
def test_the_command_names_what_is_wrong(words, said, monkeypatch, capsys) -> None:
    def typed() -> None:
        checked = cli.check("rank_baselines", "", [*words])  # as the script does, first of all
        monkeypatch.setattr(sys, "argv", ["rank_baselines.py", *checked])
        rank_baselines.main()

    with pytest.raises(SystemExit) as stop:
        typed()
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_k_beyond_the_catalogue_and_a_split_without_tests_are_errors() -> None:
    models = {"popularity": OmegaConf.create(POPULAR)}
    with pytest.raises(ValueError, match="larger than the catalogue of 12"):
        rank_models(config(k=[13]), parts(), models, 0)
    found = parts()
    nobody = found.later.counts() * 0
    nobody.eliminate_zeros()
    empty = csr_matrix(nobody)
    assert empty.nnz == 0
    object.__setattr__(found, "relevant", lambda *, repeats: empty)
    with pytest.raises(ValueError, match="has a relevant item"):
        rank_models(config(), found, models, 0)
