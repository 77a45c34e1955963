"""Every way MovieLens is handed around becomes the same log; what is cut or garbled is refused."""

import inspect
import io
import subprocess
import urllib.request
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sources import movielens as module
from sources.cache import cache_folder
from sources.movielens import load, title_and_year

ROOT = Path(__file__).resolve().parents[1]
LATEST = ROOT.parent / "shared" / "data" / "ml_latest_small" / "ml-latest-small.zip"
HOME = cache_folder()  # the user's own, before the tests get one of theirs

RATINGS = ((2, 1, 5, 900), (1, 1, 4, 800), (1, 2, 2, 800), (2, 3, 3, 850))
FLAGS = {1: (1, 15), 2: (8,), 3: (0,)}  # Action and Sci-Fi; Drama; unknown
NAMES = {1: "Matrix, The (1999)", 2: "Double vie de Véronique, La (1991)", 3: "unknown"}


def grouplens(ratings=RATINGS):
    films = [
        "|".join([str(i), NAMES[i], "", "", "", *("01"[g in FLAGS[i]] for g in range(19))])
        for i in NAMES
    ]
    return {
        "u.data": "\n".join("\t".join(map(str, row)) for row in ratings).encode(),
        "u.item": "\n".join(films).encode("latin-1"),
        "u.user": b"1|24|M|technician|05201\n2|53|F|other|V0R2M",
    }


def atomic(ratings=RATINGS):
    rows = ["\t".join(map(str, row)) for row in ratings]
    return {
        "ml-100k.inter": "\n".join(
            ["user_id:token\titem_id:token\trating:float\ttimestamp:float", *rows]
        ).encode(),
        "ml-100k.item": (
            "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
            "1\tMatrix, The\t1999\tAction Sci-Fi\n"
            "2\tDouble vie de Véronique, La\t1991\tDrama\n3\tunkonwn\tunkonwn\tunknown\n"
        ).encode(),
        "ml-100k.user": (
            b"user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
            b"1\t24\tM\ttechnician\t05201\n2\t53\tF\tother\tV0R2M\n"
        ),
    }


def latest(ratings=RATINGS, tags=("1,1,fun,5",)):
    return {
        "ratings.csv": "\n".join(
            ["userId,movieId,rating,timestamp", *(",".join(map(str, row)) for row in ratings)]
        ).encode(),
        "movies.csv": (
            'movieId,title,genres\n1,"Matrix, The (1999)",Action|Sci-Fi\n'
            '2,"Say ""Yes"" (2006–2007)",Drama\n3,Paterson,(no genres listed)\n'
        ).encode(),
        "tags.csv": "\n".join(["userId,movieId,tag,timestamp", *tags]).encode(),
    }


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def zipped(files, inside="ml-100k/"):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("README", "other things")
        for name, content in files.items():
            archive.writestr(inside + name, content)
    return out.getvalue()


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Sets of four ratings, a cache of each test's own, and no network."""

    def offline(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(module, "SIZES", {"ml-100k": (4, 2, 3), "ml-latest-small": (4, 2, 3)})
    monkeypatch.setenv("RECPLAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(subprocess, "run", offline)


def test_a_row_is_a_rating(tmp_path):
    logs = load(path=write(tmp_path / "d", grouplens()))
    assert logs.events["user"].tolist() == [1, 1, 2, 2]  # in order of time
    assert logs.events["item"].tolist() == [1, 2, 3, 1]
    assert logs.events["value"].tolist() == [4, 2, 3, 5]
    assert logs.events["time"].iloc[-1] == pd.Timestamp("1970-01-01 00:15:00")
    assert set(logs.events["behaviour"]) == {"rate"} == set(logs.purchases)
    assert logs.users["age"].tolist() == [24, 53]
    assert logs.users["zip"].tolist() == ["05201", "V0R2M"]  # a leading zero, a letter
    assert logs.roles.user_category == ("gender", "occupation")


def test_films_read_well_and_one_is_unknown(tmp_path):
    logs = load(path=write(tmp_path / "d", grouplens()))
    texts = ["The Matrix (1999). Action, Sci-Fi", "La Double vie de Véronique (1991). Drama", ""]
    assert logs.item_text().tolist() == texts
    assert logs.items["genre"].tolist()[:2] == ["Action", "Drama"]
    assert logs.items["genre"].isna().tolist() == [False, False, True]
    assert logs.items["year"].tolist()[:2] == [1999, 1991]
    assert "1 items without text" in logs.notes


@pytest.mark.parametrize("way", ["folder", "folder above", "zip", "flat zip", "atomic", "wheel"])
def test_all_ways_give_the_same_log(tmp_path, way):
    expected = load(path=write(tmp_path / "d", grouplens()))
    path = tmp_path / "given"
    if way == "folder":
        write(path, grouplens())
    elif way == "folder above":
        write(path / "ml-100k", grouplens())
    elif way == "atomic":
        write(path, atomic())
    elif way == "wheel":
        path.write_bytes(zipped(atomic(), "recbole/dataset_example/ml-100k/"))
    else:
        path.write_bytes(zipped(grouplens(), "" if way == "flat zip" else "ml-100k/"))
    assert load(path=path).fingerprint() == expected.fingerprint()


def test_only_ratings_that_reach_positive_stay(tmp_path):
    folder = write(tmp_path / "d", grouplens())
    logs = load(path=folder, positive=4)
    assert logs.events["value"].tolist() == [4, 5]
    assert "2 of 4 ratings below 4 dropped" in logs.notes
    assert "2 items without events" in logs.notes
    assert len(logs.items) == 3
    assert len(load(path=folder)) == 4  # the cache holds them all
    with pytest.raises(ValueError, match=r"positive must be a rating from 1 to 5 .* got 6"):
        load(path=folder, positive=6)
    with pytest.raises(ValueError, match="positive must be a rating"):
        load(path=folder, positive=float("nan"))


def test_the_small_set_has_tags_and_half_stars(tmp_path):
    tags = ["1,1,Dark,5", "2,1,dark ,5", "1,1,noir,5", "1,1,In Netflix queue,5", "2,2,null,5"]
    tags += [f"1,1,t{k},5" for k in range(5)]
    rows = (*RATINGS[:3], (2, 3, 0.5, 850))
    logs = load("ml-latest-small", path=write(tmp_path / "d", latest(rows, tags)))
    assert logs.events["value"].min() == 0.5
    assert logs.items["tags"].tolist() == ["dark, noir, t0, t1, t2", "null", ""]
    assert logs.item_text().tolist() == [
        "The Matrix (1999). Action, Sci-Fi. dark, noir, t0, t1, t2",
        'Say "Yes" (2006). Drama. null',
        "Paterson",
    ]
    assert list(logs.users) == ["user"]
    kept = load("ml-latest-small", path=tmp_path / "d", positive=5).notes
    assert any("tags of a film" in note for note in kept)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (grouplens(RATINGS[:3]), "must have 4 ratings, got 3: the file is cut off"),
        (grouplens((*RATINGS[:3], (2, 3, "", 850))), r"rating must be numbers, got 1 of 4.*row 3"),
        (grouplens((*RATINGS[:3], (2, 3, "nan", 850))), r"rating must be numbers.*row 3: 'nan'"),
        (grouplens((*RATINGS[:3], (2, 3, 6, 850))), r"rating must be 1 to 5 .*row 3: 6\.0"),
        (grouplens((*RATINGS[:3], (2, 3, 3.5, 850))), r"in steps of 1, got .*row 3: 3\.5"),
        (grouplens((*RATINGS[:3], (2, 3, 3, "soon"))), r"timestamp must be .*row 3: 'soon'"),
        (grouplens((*RATINGS[:3], (1, 2, 3, 860))), r"once per user, .*row 3: \(1, 2\)"),
        (grouplens((*RATINGS[:3], (2, 99, 3, 860))), r"events name items .*row 2: 99"),
        (grouplens((*RATINGS[:3], ("x", 3, 3, 860))), r"ml-100k\.user must be numbers.*'x'"),
        (grouplens((*RATINGS[:3], (9, 3, 3, 860))), r"users that it does not list.*row 2: 9\)"),
        (grouplens((*RATINGS[:3], (2, 3))), r"timestamp must be .*\(row 3: ''\)"),
        (grouplens((*RATINGS[:3], (2, 3, 3, 860, 7))), r"u\.data cannot be read .*line 4, saw 5"),
        (grouplens([row[:3] for row in RATINGS]), r"u\.data must have the columns .*got 3"),
        (grouplens() | {"u.data": b""}, r"u\.data cannot be read"),
        (grouplens() | {"u.user": b"1|24|M|technician|05201"}, "must have 2 users, got 1"),
        (grouplens() | {"u.user": b"1|old|M|x|0\n2|5|F|y|0"}, r"users\.age must be numbers.*'old'"),
        (
            atomic() | {"ml-100k.inter": atomic()["ml-100k.inter"].replace(b"rating", b"stars")},
            r"ml-100k\.inter must have the columns .*'stars:float'",
        ),
    ],
)  # fmt: skip
def test_garbled_files_are_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load(path=write(tmp_path / "d", files))
    assert not list((tmp_path / "cache").glob("movielens*"))  # nothing of it is kept


def test_rows_wider_than_their_header_are_refused(tmp_path):
    bare = latest()["movies.csv"].replace(b'"Matrix, The (1999)"', b"Matrix, The (1999)")
    wide = "\n".join(
        ["userId,movieId,rating,timestamp", *(",".join(map(str, (*r, 7))) for r in RATINGS)]
    ).encode()
    for name, content in (("movies.csv", bare), ("ratings.csv", wide)):
        folder = write(tmp_path / name, latest() | {name: content})
        with pytest.raises(ValueError, match=rf"{name} cannot be read .*Expected"):
            load("ml-latest-small", path=folder)


def test_paths_that_hold_no_set_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give the folder or zip of ml-100k"):
        load(path=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must hold u\.data, u\.item, u\.user or ml-100k\.inter"):
        load(path=write(tmp_path / "d", latest()))
    cut = tmp_path / "cut.zip"
    cut.write_bytes(zipped(grouplens())[:-40])
    with pytest.raises(ValueError, match=r"cut\.zip must be a whole zip .* cut off or garbled"):
        load(path=cut)
    cut.write_bytes(zipped(grouplens()).replace(b"technician", b"magician!!"))
    with pytest.raises(ValueError, match="must be a whole zip"):  # the archive's own checksums
        load(path=cut)
    with pytest.raises(ValueError, match=r"name must be one of .* Did you mean 'ml-100k'"):
        load("ml-100")


def answer(monkeypatch, content):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(content))


def pip(monkeypatch, content):
    """Let pip put a wheel where it is told to."""

    def run(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        (folder / "recbole.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def test_a_download_with_another_checksum_is_not_used(monkeypatch, capsys, tmp_path):
    answer(monkeypatch, zipped(grouplens()))
    with pytest.raises(ValueError, match=r"cannot fetch ml-100k; tried .* \(md5 must be 0e33842e"):
        load()
    assert not list((tmp_path / "cache").glob("movielens*"))
    pip(monkeypatch, zipped(atomic(), "recbole/dataset_example/ml-100k/"))
    assert load().notes[0] == "read from the copy in recbole"
    assert "md5 must be 0e33842e24a9c977be4e0107933c0723, got" in capsys.readouterr().err


def test_the_download_is_used_first_and_once(monkeypatch):
    content = zipped(grouplens())
    answer(monkeypatch, content)
    monkeypatch.setitem(module.MD5, "ml-100k", module.hashlib.md5(content).hexdigest())
    first = load()
    assert first.notes[0] == "read from the files of GroupLens"
    answer(monkeypatch, b"")
    assert load().fingerprint() == first.fingerprint()


def test_a_short_download_of_the_small_set_is_refused(monkeypatch):
    answer(monkeypatch, zipped(latest(RATINGS[:3]), "ml-latest-small/"))
    with pytest.raises(ValueError, match=r"tried .*must have 4 ratings, got 3.*as path="):
        load("ml-latest-small")
    answer(monkeypatch, zipped(latest(), "ml-latest-small/"))
    assert len(load("ml-latest-small")) == 4


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Good, The Bad and The Ugly, The (1966)", ("The Good, The Bad and The Ugly", 1966)),
        ("Land Before Time III (1995) (V)", ("Land Before Time III", 1995)),
        ("(500) Days of Summer (2009)", ("(500) Days of Summer", 2009)),
        ("Avventura, L' (Adventure, The) (1960)", ("L'Avventura (The Adventure)", 1960)),
        ("Protector, The (a.k.a. Boxer, The) (2005)", ("The Protector (a.k.a. The Boxer)", 2005)),
        ("2001: A Space Odyssey (1968)", ("2001: A Space Odyssey", 1968)),
        ("Corrina, Corrina (1994)", ("Corrina, Corrina", 1994)),
        ("Babylon 5", ("Babylon 5", 0)),
        ("Unknown (2011)", ("Unknown", 2011)),
    ],
)
def test_titles_as_a_person_says_them(raw, expected):
    assert title_and_year(raw) == expected


@given(
    st.text("abcXYZ '-:&", min_size=1).map(str.strip).filter(bool),
    st.sampled_from(["The", "A", "Les", "L'", "Das"]),
    st.integers(1900, 2030),
)
def test_any_title_gets_its_article_back(title, article, year):
    gap = "" if article == "L'" else " "
    assert title_and_year(f"{title}, {article} ({year})") == (f"{article}{gap}{title}", year)


def test_the_yaml_repeats_the_defaults():
    about = yaml.safe_load((ROOT / "experiments/conf/data/movielens.yaml").read_text())
    for key in (
        "models",
        "repeats",
        "split",
    ):  # what is fitted to the log, which rank_baselines reads
        about.pop(key, None)
    known = inspect.signature(load).parameters
    assert about.pop("_target_") == "sources.movielens.load"
    assert about == {name: known[name].default for name in about}


@pytest.mark.skipif(not LATEST.is_file(), reason="../shared/data/ml_latest_small is not there")
def test_the_real_small_set(monkeypatch):
    monkeypatch.setattr(module, "SIZES", {"ml-latest-small": (100_836, 610, 9_742)})
    logs = load("ml-latest-small", path=LATEST)
    assert logs.events["item"].nunique() == 9_724
    assert "18 items without events" in logs.notes
    assert not logs.events.duplicated(["user", "item"]).any()
    assert (logs.items["text"] != "").all()
    assert logs.items["title"].str.contains(r", (?:The|A|An)$").sum() == 0


def test_the_real_ml_100k(monkeypatch):
    entries = sorted(HOME.glob(f"movielens-ml-100k-{module.PREPARED}-*"))
    if not entries:
        pytest.skip("ml-100k is not in the cache: sources.movielens.load() puts it there")
    monkeypatch.setenv("RECPLAY_CACHE", str(HOME))
    logs = module.load()
    tied = logs.events.duplicated(["user", "time"], keep=False).mean()
    assert (len(logs), len(logs.users), len(logs.items)) == (100_000, 943, 1_682)
    assert not logs.events.duplicated(["user", "item"]).any()
    assert tied == pytest.approx(0.758, abs=5e-4)
    assert logs.item_text()[50] == "Star Wars (1977). Action, Adventure, Romance, Sci-Fi, War"
