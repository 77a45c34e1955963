"""The files of KuaiRand-Pure become a log: what is read, merged, refused."""

import inspect
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from sources import kuairand
from sources.kuairand import ANSWERS, USERS, VIDEOS, load

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared/data/kuairand_pure_sample"
DAY = 1_650_844_800_000  # 2022-04-25 00:00 UTC, 08:00 in China


def lines(*rows):
    """Rows (user, video, hour, the answers' columns, seconds watched, tab)."""
    table = []
    for user, video, hour, answers, seconds, tab in rows:
        flags = {column: int(column in answers) for column in ANSWERS}
        known = {"user_id": user, "video_id": video, "time_ms": DAY + hour * 3_600_000}
        table.append(known | flags | {"play_time_ms": seconds * 1000, "tab": tab, "hourmin": 0})
    return pd.DataFrame(table)


LINES = lines(
    (1, 10, 0, ("is_click", "long_view"), 30, 1),
    (1, 11, 1, (), 2, 1),
    (2, 10, 2, ("is_click", "is_hate"), 90, 4),
)


def tables():
    users = pd.DataFrame({"user_id": [1, 2]})
    for i in range(18):
        users[f"onehot_feat{i}"] = [1.0, np.nan] if i == 4 else [0, i]
    users["user_active_degree"] = ["full_active", "low_active"]
    for flag in ("is_lowactive_period", "is_live_streamer", "is_video_author"):
        users[flag] = [0, 1]
    for number in ("follow_user_num", "fans_user_num", "friend_user_num", "register_days"):
        users[number] = [5, 7]
    videos = pd.DataFrame(
        {
            "video_id": [10, 11, 12], "video_type": ["NORMAL", "NORMAL", "AD"],
            "upload_type": ["Web", "Web", "Kmovie"], "video_duration": [60_000.0, np.nan, 6_000.0],
            "server_width": [720.0, 720.0, 1280.0], "server_height": [1280.0, 1280.0, 720.0],
            "music_type": [9.0, np.nan, 4.0], "tag": ["39,68", None, "3"],
        }
    )  # fmt: skip
    return users, videos


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("RECPLAY_CACHE", str(tmp_path_factory.mktemp("cache")))


def folder(path, log=LINES, users=None, videos=None, ending="csv"):
    own = tables()
    path.mkdir(parents=True, exist_ok=True)
    parts = {
        "log_standard_4_22_to_5_08_pure": log,
        USERS: own[0] if users is None else users,
        VIDEOS: own[1] if videos is None else videos,
    }
    for name, frame in parts.items():
        if ending == "csv":
            frame.to_csv(path / f"{name}.csv", index=False)
        else:
            frame.to_parquet(path / f"{name}.parquet", index=False)
    return path


def test_an_impression_and_each_answer_to_it_are_events(tmp_path):
    events = load(folder(tmp_path)).events
    found = {
        (row.user, row.item): sorted(events[(events["user"] == row.user)
                                            & (events["item"] == row.item)]["behaviour"])
        for row in events.itertuples()
    }  # fmt: skip
    assert found == {
        (1, 10): ["click", "long_view", "shown"],
        (1, 11): ["shown"],
        (2, 10): ["click", "hate", "shown"],
    }
    of_two = events[events["user"] == 2]
    assert (of_two["value"] == 1.5).all()  # 90 seconds, in minutes, whatever the row
    assert (of_two["place"] == 4).all()
    assert set(of_two["time"]) == {pd.Timestamp("2022-04-25 10:00")}  # 02:00 UTC in China


def test_clicks_are_the_purchases_and_all_rates_are_told(tmp_path):
    logs = load(folder(tmp_path))
    assert logs.purchases == ("click",)
    assert sorted(logs.top_items(5)) == [10]
    assert logs.notes[0].startswith("3 impressions of the standard policy: click 66.67%")
    assert "hate 33.33%" in logs.notes[0]


def test_what_is_known_of_users_and_videos_has_its_declared_role(tmp_path):
    logs = load(folder(tmp_path))
    items, users = logs.items.set_index("item"), logs.users.set_index("user")
    assert items.loc[10, "first_tag"] == "39"
    assert items.loc[10, "tag"] == "39,68"
    assert items["minutes"].tolist()[0] == 1.0
    assert np.isnan(items.loc[11, "minutes"])
    assert pd.isna(items.loc[11, "tag"])
    assert pd.isna(items.loc[11, "first_tag"])
    assert items.loc[10, "music_type"] == "9"  # a code, not the number a missing one made of it
    assert users.loc[1, "onehot_feat4"] == "1"
    assert pd.isna(users.loc[2, "onehot_feat4"])
    assert set(logs.roles.user_category) <= set(logs.users)
    assert (logs.item_text() == "").all()


def test_lines_of_one_moment_are_one_impression_with_all_its_answers(tmp_path):
    again = lines((1, 10, 0, ("is_click", "is_like"), 45, 1))
    logs = load(folder(tmp_path, pd.concat([LINES, again])))
    one = logs.events[(logs.events["user"] == 1) & (logs.events["item"] == 10)]
    assert sorted(one["behaviour"]) == ["click", "like", "long_view", "shown"]
    assert (one["value"] == 0.75).all()
    assert "1 lines merged with another of the same user, video and moment" in logs.notes


def test_csv_and_parquet_in_the_folder_or_its_data_are_the_same_log(tmp_path):
    one = load(folder(tmp_path / "csv"))
    other = load(folder(tmp_path / "set" / "data", ending="parquet").parent)
    assert one.fingerprint() == other.fingerprint()


def test_all_standard_logs_are_read_and_the_random_one_is_not(tmp_path):
    path = folder(tmp_path, LINES[:2])
    LINES[2:].to_csv(path / "log_standard_4_08_to_4_21_pure.csv", index=False)
    LINES.assign(user_id=99).to_csv(path / "log_random_4_22_to_5_08_pure.csv", index=False)
    parts, whole = load(path), load(folder(tmp_path / "whole"))
    assert parts.fingerprint() == whole.fingerprint()


def test_a_prepared_log_is_found_again_and_a_changed_file_is_another(tmp_path, monkeypatch):
    path = folder(tmp_path)
    first = load(path)

    def broken(files):
        raise AssertionError("prepared again")

    with monkeypatch.context() as patched:
        patched.setattr(kuairand, "_prepare", broken)
        assert load(path).fingerprint() == first.fingerprint()
    folder(tmp_path, LINES[:2])
    assert len(load(path)) < len(first)


def test_no_path_and_no_folder_say_where_to_get_the_set(tmp_path):
    with pytest.raises(ValueError, match=r"KuaiRand has no path: get KuaiRand-Pure from kuairand"):
        load()
    with pytest.raises(ValueError, match=r"no folder .*nowhere: get KuaiRand-Pure"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["log_standard_4_22_to_5_08_pure", USERS, VIDEOS])
def test_a_missing_file_is_named(tmp_path, name):
    path = folder(tmp_path)
    (path / f"{name}.csv").unlink()
    with pytest.raises(ValueError, match=rf"must hold {name[:12]}.* found 0 among"):
        load(path)


@pytest.mark.parametrize(
    ("table", "column"),
    [("log", "is_hate"), ("log", "time_ms"), ("users", "onehot_feat7"), ("videos", "tag")],
)
def test_a_missing_column_is_named(tmp_path, table, column):
    users, videos = tables()
    parts = {"log": LINES, "users": users, "videos": videos}
    parts[table] = parts[table].drop(columns=column)
    with pytest.raises(ValueError, match=f"lacks the column '{column}'"):
        load(folder(tmp_path, **parts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_click": [0, 2, 1]}, r"kuairand.is_click must be 0 or 1, got 1 of 3 rows \(row 1: 2"),
        ({"is_like": [0, np.nan, 1]}, "kuairand.is_like must be 0 or 1"),
        ({"play_time_ms": [5, -1, 1]}, "kuairand.play_time_ms must be 0 or more"),
        ({"tab": ["1", "x", "2"]}, "kuairand.tab must be numbers"),
        ({"time_ms": [DAY, DAY, DAY * 2]}, "time lies after now"),
    ],
)
def test_garbled_lines_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load(folder(tmp_path, LINES.assign(**change)))


def test_a_video_that_is_not_listed_is_refused_and_a_user_is_added(tmp_path):
    users, videos = tables()
    assert len(load(folder(tmp_path / "a", users=users[:1])).users) == 2
    with pytest.raises(ValueError, match="events name items"):
        load(folder(tmp_path / "b", videos=videos[1:]))


def test_a_log_without_lines_or_in_two_formats_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the log has no lines"):
        load(folder(tmp_path / "empty", LINES[:0]))
    path = folder(tmp_path / "both")
    other = folder(tmp_path / "parquet", ending="parquet")
    for file in other.glob("log*"):
        shutil.copy(file, path)
    with pytest.raises(ValueError, match=r"both as .csv and as .parquet"):
        load(path)


def test_a_cut_off_file_is_refused(tmp_path):
    path = folder(tmp_path, ending="parquet")
    (path / f"{USERS}.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"cannot be read .* fetch it again"):
        load(path)


def test_the_yaml_repeats_the_defaults():
    about = yaml.safe_load((ROOT / "experiments/conf/data/kuairand.yaml").read_text())
    for key in ("models", "repeats", "split"):  # what rank_baselines reads
        about.pop(key)
    assert about.pop("_target_") == "sources.kuairand.load"
    known = inspect.signature(load).parameters
    assert about == {key: known[key].default for key in about}


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data/kuairand_pure_sample is not there")
def test_the_sample_has_its_documented_size_and_rates():
    logs = load(REAL)
    events = logs.events
    shown = events["behaviour"] == "shown"
    assert (shown.sum(), events["user"].nunique(), events["item"].nunique()) == (
        222_444, 25_156, 6_361,
    )  # fmt: skip  # 228,329 lines, 5,885 of them twice
    rates = events["behaviour"].value_counts() / shown.sum()
    assert rates["click"] == pytest.approx(0.442, abs=0.01)
    assert rates["long_view"] == pytest.approx(0.311, abs=0.01)
    assert rates["hate"] == pytest.approx(0.0008, abs=0.0001)
    assert events["time"].min() >= pd.Timestamp("2022-04-24 22:00")
