"""What was cached is made once, whole or not at all, and made again where it broke."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sources.cache import cached


def write(value: str, path: Path) -> None:
    path.write_text(value)


def read(path: Path) -> str:
    text = path.read_text()
    if text == "broken":
        raise ValueError("not what was written")
    return text


def test_a_cached_value_is_made_once(tmp_path):
    made = []
    for _ in range(2):
        value = cached("k", lambda: made.append(1) or "v", write, read, folder=tmp_path)
        assert value == "v"
    assert made == [1]
    assert cached("k2", lambda: "w", write, read, folder=tmp_path) == "w"
    assert len(list(tmp_path.iterdir())) == 2  # two entries, nothing half-written


def test_the_cache_folder_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RECPLAY_CACHE", str(tmp_path / "there"))
    cached("k", lambda: "v", write, read)
    assert len(list((tmp_path / "there").iterdir())) == 1


def test_a_broken_entry_is_rebuilt_with_a_line_saying_so(tmp_path, capsys):
    cached("k", lambda: "v", write, read, folder=tmp_path)
    (entry,) = tmp_path.iterdir()
    entry.write_text("broken")
    assert cached("k", lambda: "v", write, read, folder=tmp_path, what="a thing") == "v"
    assert "cache of a thing is not readable" in capsys.readouterr().err
    assert entry.read_text() == "v"


def test_a_failure_while_making_or_saving_leaves_nothing(tmp_path):
    def fail(value: str, path: Path) -> None:
        path.write_text(value[:1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached("k", lambda: "v", fail, read, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_the_value_is_still_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cached("k", lambda: "v", write, read, folder=tmp_path / "file" / "x") == "v"
    assert "cannot cache" in capsys.readouterr().err


def make_folder(value: str, path: Path) -> None:
    path.mkdir()
    (path / "a").write_text(value)
    time.sleep(0.05)
    (path / "b").write_text(value)


def read_folder(path: Path) -> str:
    return (path / "a").read_text() + (path / "b").read_text()


def build(folder: Path) -> str:
    return cached("k", lambda: "v", make_folder, read_folder, folder=folder)


def test_an_entry_that_another_builder_put_first_stays(tmp_path):
    def slow() -> str:
        build(tmp_path)  # the other one, ready before this one is
        return "mine"

    assert cached("k", slow, make_folder, read_folder, folder=tmp_path) == "minemine"
    assert build(tmp_path) == "vv"
    assert len(list(tmp_path.iterdir())) == 1


def test_builders_of_the_same_entry_at_once_all_get_it_whole(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(build, [tmp_path] * 8)) == ["vv"] * 8
    assert len(list(tmp_path.iterdir())) == 1
