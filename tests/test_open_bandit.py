"""Open Bandit's files become a log, are fetched once, and are refused where they are broken."""

import io
import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sources import open_bandit as module
from sources.open_bandit import open_bandit

FOLDER = os.environ.get("OPEN_BANDIT")  # a folder random/, bts/ of the real data

HEAD = (",timestamp,item_id,position,click,propensity_score,user_feature_0,user_feature_1,"
        "user_feature_2,user_feature_3,user-item_affinity_0,user-item_affinity_1")  # fmt: skip
ROWS = (
    "0,2019-11-24 00:00:34.5+00:00,1,3,0,0.5,b,x,x,x,0.0,2.0",
    "1,2019-11-24 00:00:35+00:00,0,1,1,0.25,a,x,y,x,1.0,0.0",
)
ITEMS = (",item_id,item_feature_0,item_feature_1,item_feature_2,item_feature_3", "0,1,-.5,p,q,r",
         "1,0,.25,s,q,r")  # fmt: skip


def files(rows=ROWS, items=ITEMS, head=HEAD):
    """All twelve files, by name; the other policy met a user of another category."""
    out = {}
    for behaviour, campaign in [(b, c) for b in module.BEHAVIOURS for c in module.CAMPAIGNS]:
        of_this = rows if behaviour == "random" else [ROWS[0].replace(",b,", ",c,")]
        out[f"{behaviour}/{campaign}/{campaign}.csv"] = "\n".join([head, *of_this]).encode()
        out[f"{behaviour}/{campaign}/item_context.csv"] = "\n".join(items).encode()
    return out


def write(folder, **wrong):
    module._save(files(**wrong), folder)
    return folder


def test_a_row_is_an_impression(tmp_path):
    log = open_bandit("men", "random", write(tmp_path))
    assert log.name == "open_bandit/men/random"
    assert log.action.tolist() == [1, 0]
    assert log.position.tolist() == [2, 0]
    assert log.reward.tolist() == [0, 1]
    assert log.propensity.tolist() == [0.5, 0.25]
    assert log.uniform.tolist() == [0.5, 0.5]
    assert log.num_actions == 2
    assert log.time[0] == np.datetime64("2019-11-24T00:00:34.5")
    assert "1 clicks on 2 impressions" in log.notes[0]


def test_context_has_the_same_columns_whoever_filled_the_slots(tmp_path):
    logs = [open_bandit("all", b, write(tmp_path)) for b in module.BEHAVIOURS]
    assert logs[0].context_names == logs[1].context_names
    names = list(logs[0].context_names)
    assert names[:4] == [f"user_feature_0={c}" for c in "abc"] + ["user_feature_1=x"]
    assert logs[0].context[:, :3].tolist() == [[0, 1, 0], [1, 0, 0]]
    assert logs[1].context[:, :3].tolist() == [[0, 0, 1]]
    assert logs[0].context[:, -2:].tolist() == [[0, 2], [1, 0]]  # affinity, as given


def test_items_are_put_in_the_order_of_their_ids(tmp_path):
    log = open_bandit(path=write(tmp_path))
    assert log.item_features[:, 0].tolist() == [0.25, -0.5]
    assert log.item_feature_names[1:3] == ("item_feature_1=p", "item_feature_1=s")
    assert log.item_features[:, 1:3].tolist() == [[0, 1], [1, 0]]


def test_one_behaviour_alone_is_enough(tmp_path):
    folder = write(tmp_path)
    for file in (folder / "bts").rglob("*.csv"):
        file.unlink()
    assert open_bandit("all", "random", folder).context_names[1] == "user_feature_0=b"
    with pytest.raises(ValueError, match=r"no bts/all/all\.csv"):
        open_bandit("all", "bts", folder)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rows": [ROWS[0].replace(",1,3,", ",2,3,")]}, r"item_id must be an item.*row 0: 2"),
        ({"rows": [ROWS[1], ROWS[0].replace(",1,3,", ",1,4,")]}, r"slot in 1\.\.3.*row 1: 4"),
        ({"rows": [ROWS[0].replace("0.5", "0.0")]}, r"\(0, 1\].*row 0: 0.0"),
        ({"rows": [ROWS[0].replace("3,0,", "3,2,")]}, "0 or 1.*row 0: 2"),
        ({"rows": []}, "no rows"),
        ({"head": HEAD.replace("click", "clicks")}, "lacks the column 'click'.*Did you mean"),
        ({"items": ITEMS[:2]}, r"items must be 0\.\.0, each once, got \[1\]"),
    ],
)
def test_broken_files_are_refused_with_their_row(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        open_bandit(path=write(tmp_path, **wrong))


def test_unknown_names_and_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"all, men, women, got 'man'.*Did you mean 'men'"):
        open_bandit("man")
    with pytest.raises(ValueError, match="random, bts, got 'greedy'"):
        open_bandit(behaviour="greedy")
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
        open_bandit(path=tmp_path / "nowhere")


def wheel_of(content):
    """A pip that leaves a wheel, and counts how often it was asked."""
    calls = []

    def run(command, **_):
        calls.append(command)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as wheel:
            for name, data in content.items():
                wheel.writestr(f"obp/dataset/obd/{name}", data)
            wheel.writestr("obp/__init__.py", "raise RuntimeError('imported')")
        folder = Path(command[command.index("--dest") + 1])
        (folder / "obp-0.4.1-py3-none-any.whl").write_bytes(packed.getvalue())
        return subprocess.CompletedProcess(command, 0, "", "")

    return run, calls


def test_the_wheel_is_fetched_once_and_only_its_tables_are_kept(tmp_path, monkeypatch):
    run, calls = wheel_of(files())
    monkeypatch.setattr(subprocess, "run", run)
    first, again = (open_bandit(cache_dir=tmp_path) for _ in range(2))
    assert first.action.tolist() == again.action.tolist() == [1, 0]
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert calls[0][-1] == "obp==0.4.1"
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 12
    assert {path.suffix for path in kept} == {".csv"}
    kept[0].unlink()  # a broken cache is made anew
    assert open_bandit(cache_dir=tmp_path).action.tolist() == [1, 0]
    assert len(calls) == 2


def test_without_an_index_the_message_says_what_to_do(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: x\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"No matching distribution.*give that folder as path="):
        open_bandit(cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(FOLDER is None, reason="OPEN_BANDIT names no folder with the real data")
def test_the_real_logs_have_the_clicks_and_weights_that_are_known_of_them():
    known = {("all", "random"): (38, 10_000), ("all", "bts"): (42, 340.4),
             ("men", "random"): (46, 10_000), ("men", "bts"): (69, 655.7),
             ("women", "bts"): (46, 2.078)}  # fmt: skip
    for (campaign, behaviour), (clicks, ess) in known.items():
        log = open_bandit(campaign, behaviour, FOLDER)
        weight = log.uniform / log.propensity
        assert log.reward.sum() == clicks
        assert weight.sum() ** 2 / np.square(weight).sum() == pytest.approx(ess, rel=1e-3)
