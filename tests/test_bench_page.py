"""The page names machines, goals reached and not, and draws every curve."""

from pathlib import Path
from typing import Any

from experiments.bench_page import hardware, write_page
from experiments.bench_rows import fixed, row

ABOUT: dict[str, Any] = {"cpu": "Abacus 3", "cores": 2, "memory_gib": 8, "threads": 1,
                         "torch": "2.9", "python": "3.12", "gpu": None}  # fmt: skip


def point(curve: str, at: float, rate: float, memory: float | None = None) -> dict[str, Any]:
    return row("train", f"{curve} {at}", "steps", fixed(0.9 * rate, rate, rate * 1.2), curve=curve,
               at=at, memory_mib=memory)  # fmt: skip


ROWS = [
    row("env", "fast", "steps", fixed(50.0), peer=fixed(1.0), peer_name="SARDINE", peer_goal=40.0,
        limit=100.0, limit_name="bare", limit_goal=0.7),
    row("env", "alone", "steps", fixed(50_000.0), peer_name="SARDINE"),
    row("env", "slow", "steps", fixed(50.0), peer=fixed(1.0), peer_name="SARDINE", peer_goal=4.0),
    point("users", 1, 10.0, 100.0), point("users", 100, 900.0, 120.0),
    *(point(f"replay ratio, {head} head", at, 10.0 / at)
      for head in ("dot", "dense") for at in (0.25, 8.0)),
]  # fmt: skip


def test_the_page_says_what_was_reached_and_where(tmp_path: Path) -> None:
    table = {"hardware": {"env": ABOUT, "train": ABOUT}, "rows": ROWS}
    page = write_page(tmp_path / "performance.json", table)
    assert page == tmp_path / "performance.md"
    text = page.read_text()
    assert "Measured on: Abacus 3, 2 cores, 8 GiB; 1 thread, torch 2.9, Python 3.12." in text
    fast = next(line for line in text.splitlines() if line.startswith("| fast "))
    assert "| 50 | 50 x SARDINE (1)<br>0.5 x bare (100) | 40 x<br>0.7 x | **not reached** |" in fast
    assert "| SARDINE: not here |  |  |" in next(x for x in text.splitlines() if "alone" in x)
    assert next(x for x in text.splitlines() if "| slow" in x).endswith("| reached |")
    assert text.index("## Environment steps") < text.index("## Training")
    assert "| 0.25 | dense head | 40 |" in text
    assert "| 8 | dot head | 1.25 |" in text  # 8, not 8.0
    assert "| 100 | 900 | 810 to 1,080 | 120 |" in text


def test_every_curve_is_a_figure_that_the_page_shows(tmp_path: Path) -> None:
    write_page(tmp_path / "p.json", {"hardware": {"train": ABOUT}, "rows": ROWS})
    text = (tmp_path / "p.md").read_text()
    for name in ("p-train-users.png", "p-train-replay-ratio.png"):
        assert f"({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.glob("*.png"))) == 2  # several heads share one figure


def test_machines_that_differ_are_told_apart(tmp_path: Path) -> None:
    other = {**ABOUT, "gpu": "Big Card", "threads": 4}
    page = write_page(tmp_path / "p.json", {"hardware": {"env": ABOUT, "train": other}, "rows": []})
    text = page.read_text()
    assert "- env: Abacus 3, 2 cores, 8 GiB; 1 thread," in text
    assert "- train: Abacus 3, 2 cores, 8 GiB, Big Card; 4 threads," in text


def test_this_machine_has_a_name() -> None:
    about = hardware(1, "cpu")
    assert set(about) == set(ABOUT)
    assert about["cpu"]
    assert about["gpu"] is None
