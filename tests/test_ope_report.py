"""A table says what the log can say, in every rendering, and never what the verdict withholds."""

import json
import math
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import figures
from evaluation.report import Table, margin_chart_layout, margin_chart_scalars
from evaluation.wording import number, percent, sentence

NAN = math.nan
HOSTILE = '<img src=x onerror="alert(1)">&$x_1$'
SECRET = 0.87654  # of the policy that the log does not identify
SECRETS = ("87654", "8765", "877", "54321", "5432", "543")  # as they would be printed


def kind(verdict: str, **facts: Any) -> dict[str, Any]:
    """Diagnostics of one kind of weights."""
    facts = {"covered_high": facts.get("covered_mass", 1.0), **facts}
    return {
        "n": 20_000, "ess": 2346.0, "mean_weight": 1.003, "mean_weight_low": 0.98,
        "mean_weight_high": 1.02, "z": 0.4, "max_share": 0.004, "max_weight": 12.0,
        "pareto_k": 0.41, "covered_mass": 0.999, "covered_low": 0.99, "covered_high": 1.0,
        "covered_exact": True, "verdict": verdict, "reasons": [], **facts,
    }  # fmt: skip


def row(policy: str, estimator: str, value: float, verdict: str, **facts: Any) -> dict[str, Any]:
    """One estimate."""
    low, high = (value - 0.002, value + 0.0021)
    return {
        "policy": policy, "estimator": estimator, "value": value, "std_error": 0.00101,
        "low": low, "high": high, "interval": "clt", "ess": 2346.0, "covered_mass": 0.999,
        "mean_weight": 1.003, "max_share": 0.004, "pareto_k": 0.41, "verdict": verdict,
        "lam": None, "n": 20_000, "note": "", **facts,
    }  # fmt: skip


def made(name: str = "itemknn") -> Table:
    """Policies `name` identified, bts in part, ease not at all; secrets where judge puts nan."""
    good, part, bad = "identified", "partially identified", "not identified"
    model = {"note": "model only, assumes the reward model is right"}
    worst = {"interval": "worst case", "std_error": NAN}
    secret = {"low": 0.54321, "high": 0.87654, "std_error": 0.54321}
    rows = [
        row(name, "ips", 0.0119, good),
        row(name, "dr", 0.0123, good),
        row(name, "dr", 0.0123, good, interval="student_t"),
        row(name, "dros", 0.0122, good, lam=10.0),
        row(name, "dm", 0.0131, good, **model),
        row("bts", "dr", SECRET, part, **secret),
        row("bts", "dm", 0.0125, part, **model),
        row("bts", "bounds", NAN, part, low=0.149, high=0.832, **worst),
        row("ease", "ips", SECRET, bad, **secret),
        row("ease", "dr", SECRET, bad, **secret),
        row("ease", "dm", 0.0141, bad, **model),
        row("ease", "bounds", NAN, bad, low=0.008, high=0.996, **worst),
    ]
    gap = {"baseline": name, "estimator": "dr", "p_value": 0.012, "p_holm": 0.024}
    differences = [
        {"policy": "bts", "difference": 0.0011, "std_error": 0.0004, "low": 0.0002, "high": 0.0019,
         "verdict": good, **gap},
        {"policy": "ease", "difference": SECRET, **secret, "verdict": bad, **gap},
    ]  # fmt: skip
    tail = {"weight": [0.0, 0.5, 1.0, 8.0], "share": [1.0, 0.6, 0.3, 0.0001]}
    curve = [{"temperature": t, "ess": 900.0 * t, "value": SECRET, "mean_weight": 1 - 0.1 / t}
             for t in (0.1, 1.0, 10.0)]  # fmt: skip
    uncovered = {"covered_mass": 0.012, "reasons": ["covered mass .012 is below .99"]}
    heavy = {"ess": 40.0, "reasons": ["effective sample size 40 is below 100"]}
    about = {
        "rows": 20_000, "units": 20_000, "unit": "row", "logging_value": 0.0112,
        "propensities": "logged", "adaptive": False, "reward_range": [0.0, 1.0], "alpha": 0.05,
        "baseline": name, "gamma": 1.0, "seed": 0, "estimators": ["ips", "dr", "dros", "dm"],
        "intervals": ["clt", "student_t"], "notes": [], "calibration": None, "reward_model": None,
    }  # fmt: skip
    diagnosed = {
        name: facts(good, kind(good), tail, 0.0008, None),
        "bts": facts(part, kind(part, **heavy), tail, SECRET - 0.0125, None),
        "ease": facts(bad, kind(bad, **uncovered), tail, SECRET - 0.0141, curve),
    }
    return Table(rows, differences, diagnosed, about)


def facts(verdict: str, weights: dict[str, Any], tail: Any, gap: float, curve: Any) -> Any:
    """Diagnostics of one policy."""
    return {"verdict": verdict, "kinds": {"action": weights}, "ccdf": tail, "curve": curve,
            "dm_dr_gap": gap, "estimand": "mean reward of a row"}  # fmt: skip


def estimated(table: Table) -> Table:
    """The same from a log without propensities."""
    calibration = {"ece": 0.0123, "brier": 0.2, "points": [[0.01, 0.012, 50], [0.4, 0.38, 9]]}
    return replace(
        table, about={**table.about, "propensities": "estimated", "calibration": calibration}
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the table above, with all its figures."""
    return page_of(estimated(made()), tmp_path_factory.mktemp("page"))


def page_of(table: Table, folder: Path) -> str:
    table.to_html(folder / "table.html")
    return (folder / "table.html").read_text()


class Reader(HTMLParser):
    """Text, tags and ids of a page, and whether what was opened was closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def test_a_sentence_says_what_the_log_can_say_of_each_policy() -> None:
    table = made()
    assert sentence(table, "itemknn") == (
        "The log identifies the value of itemknn: .0123 (.0103 to .0144) by dr."
    )
    assert sentence(table, "ease") == (
        "The log cannot tell the value of ease: 1.2 % of what it would show was ever shown; "
        "worst case .008 to .996; dm, a model alone, says .0141."
    )
    assert sentence(table, "bts") == (
        "The log tells the value of bts only in part: effective sample size 40 is below 100; "
        "worst case .149 to .832; dm, a model alone, says .0125."
    )


def test_an_estimator_that_assumes_more_is_named_where_the_plain_weights_fail() -> None:
    table = made()
    extra = row("ease", "offcem", 0.0137, "identified")
    said = sentence(replace(table, rows=[*table.rows, extra]), "ease")
    assert said.startswith("The log cannot tell")
    assert said.endswith("offcem, which assumes more, gives .0137 (.0117 to .0158).")


def test_withheld_numbers_are_nowhere(page: str, tmp_path: Path) -> None:
    table = made()
    table.to_json(tmp_path / "table.json")
    frames = table.frame().to_csv() + table.compare().to_csv()
    kept = [table.frame(), table.compare()]
    assert all(not np.isclose(f.select_dtypes("number"), SECRET).any() for f in kept)
    read = " ".join(Reader(page).text)
    for shown in (read, str(table), (tmp_path / "table.json").read_text(), frames):
        assert [s for s in SECRETS if f".{s}" in shown] == []
    gaps = [made().diagnostics(policy)["dm_dr_gap"] for policy in ("bts", "ease")]
    assert gaps == [None, None]  # the model's value is shown: with the gap it would be the other
    assert table.diagnostics("itemknn")["dm_dr_gap"] == 0.0008
    assert [math.isnan(p["value"]) for p in table.diagnostics("ease")["curve"]] == [True] * 3


def test_numbers_of_models_and_bounds_are_shown_and_labelled() -> None:
    text = str(made())
    ease = text[text.index("value of ease") :]
    assert re.search(r"dm, model only +\.01410", ease)
    assert re.search(r"bounds +\.00800 +\.99600 +worst case", ease)
    assert re.search(r"\n  dr +withheld +2,?346 +not identified\n", ease)


def test_text_fits_a_terminal_and_ends_with_the_verdict() -> None:
    lines = str(made("a policy of a very long name that nobody would want to read")).splitlines()
    assert max(map(len, lines)) <= 110
    heads = [line for line in lines if line.startswith(("  estimator ", "  policy "))]
    assert len(heads) == 4  # a block for each policy, and the differences
    assert all(head.endswith(" verdict") or head.rstrip().endswith("verdict") for head in heads)
    assert any("dros (lam 10)" in line for line in lines)


def test_caveats_are_on_top_of_every_rendering(page: str) -> None:
    table = estimated(made())
    assert "! propensities are estimated" in "\n".join(str(table).splitlines()[:3])
    text = " ".join(Reader(page).text)
    assert 0 < text.index("propensities are estimated") < text.index("The log identifies")
    told = replace(table, about={**table.about, "notes": ["propensities are estimated by counts"]})
    assert str(told).count("propensities are estimated") == 1
    assert "estimated" not in str(made())


def test_json_round_trip_is_strict(tmp_path: Path) -> None:
    table = made()
    about = {**table.about, "seed": np.int64(3), "largest": np.float64(np.inf), "a": np.arange(2)}
    replace(table, about=about).to_json(tmp_path / "new" / "table.json")
    content = (tmp_path / "new" / "table.json").read_text()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    back = json.loads(content, parse_constant=refuse)
    assert list(back) == ["rows", "differences", "diagnosed", "about"]
    assert back["rows"][1] == table.rows[1]
    assert back["rows"][8]["value"] is None
    assert back["diagnosed"]["itemknn"] == table.diagnosed["itemknn"]
    assert (back["about"]["seed"], back["about"]["largest"], back["about"]["a"]) == (
        3,
        None,
        [0, 1],
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        replace(made(), about={"notes": [object()]}).to_json(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_page_is_well_formed_whole_and_free_of_nan(page: str) -> None:
    table, reader = made(), Reader(page)
    text = " ".join(reader.text)
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids)) > 50
    assert reader.tags.count("svg") == 5  # values, differences, weights, softening, propensities
    assert set(reader.tags).isdisjoint({"script", "link", "img", "iframe"})
    assert "http" not in re.sub(r'xmlns[^ >]*="[^"]*"', "", page)
    assert not re.search(r"\b(nan|inf|None|True|False)\b", text, re.IGNORECASE)
    for policy in table.policies:
        assert f"{policy}: {table.verdict(policy)}" in text
    assert "effective sample size 40 is below 100" in text
    assert "assumes the reward model is right" in text


def test_references_of_figures_lead_to_something(page: str) -> None:
    ids = set(Reader(page).ids)
    used = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert used
    assert [name for name in used if name not in ids] == []


@pytest.mark.parametrize("name", [HOSTILE, "a\x00b\n$"])
def test_names_are_escaped_and_dollars_are_no_mathematics(name: str, tmp_path: Path) -> None:
    table = replace(made(name), differences=[])
    content = page_of(table, tmp_path)
    assert "<img" not in content
    assert "img" not in Reader(content).tags
    legible = name.replace("\x00", " ").replace("\n", " ")
    figure = figures.inline(figures.forest, table, "forest", "")
    assert f">{escape(legible, quote=False)}<" in figure
    assert "".join(Reader(content).text).count(legible) > 5


def test_figures_are_png_and_svg_and_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a.png", "b.PNG", "a.svg", "b.svg"):
        made(HOSTILE).plot(tmp_path / name)
    png, svg = (tmp_path / "a.png").read_bytes(), (tmp_path / "a.svg").read_text()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert "<svg" in svg[:600]
    assert (tmp_path / "b.PNG").read_bytes() == png
    assert (tmp_path / "b.svg").read_text() == svg
    assert "<img" not in svg


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.png or \.svg, got '.*forest\.pdf'"):
        made().plot(tmp_path / "forest.pdf")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_policy_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown policy 'itemnn', did you mean 'itemknn'"):
        made().diagnostics("itemnn")


def test_wide_bounds_do_not_hide_the_estimates() -> None:
    figure = figures.forest(made())
    low, high = figure.axes[0].get_xlim()
    assert low < 0.0098
    assert 0.0164 < high < 0.03
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert labels[0] == "itemknn"
    assert "dr, student_t" in labels
    assert "ips, dr" in labels  # what is withheld of ease, in one line
    assert [t.get_text() for t in figure.axes[1].get_yticklabels()].count("withheld") == 2


def test_a_forest_of_many_policies_keeps_one_estimate_of_each() -> None:
    table = made()
    rows = [row(f"p{i}", name, 0.01, "identified") for i in range(40) for name in ("ips", "dr")]
    figure = figures.forest(replace(table, rows=rows, differences=[], diagnosed={}))
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert labels == [text for i in range(40) for text in (f"p{i}", "dr")]


def test_verdicts_differ_in_colour_and_in_shape() -> None:
    assert len(set(figures.COLOUR.values())) == len(set(figures.SHAPE.values())) == 3


def test_frames_have_the_promised_columns() -> None:
    frame, gaps = made().frame(), made().compare()
    assert list(frame.columns[:13]) == [
        "policy", "estimator", "value", "std_error", "low", "high", "interval", "ess",
        "covered_mass", "mean_weight", "max_share", "pareto_k", "verdict",
    ]  # fmt: skip
    assert len(frame) == 12
    held = frame[(frame.policy == "ease") & frame.estimator.isin(["ips", "dr"])]
    assert held[["value", "std_error", "low", "high"]].isna().all(axis=None)
    assert gaps.p_holm.isna().tolist() == [False, True]


def test_margin_charts_skip_what_is_withheld() -> None:
    scalars, layout = margin_chart_scalars(made()), margin_chart_layout(made())["off-policy"]
    assert scalars["ope/itemknn/dr/value"] == 0.0123
    assert scalars["ope/ease/bounds/low"] == 0.008
    assert not any(tag.startswith(("ope/ease/ips", "ope/ease/bounds/value")) for tag in scalars)
    tags = ["ope/itemknn/dr/value", "ope/itemknn/dr/low", "ope/itemknn/dr/high"]
    assert layout["itemknn/dr"] == ["Margin", tags]
    assert "ease/dr" not in layout
    assert all(tag in scalars for _, three in layout.values() for tag in three)


@pytest.mark.parametrize(
    ("x", "digits", "text"),
    [(0.0123, 3, ".0123"), (-0.5, 3, "-.5"), (0, 4, "0"), (2346.0, 3, "2,346"), (1.0, 4, "1"),
     (20_000, 4, "20,000"), (7, 4, "7"), (5000, 4, "5,000"), (NAN, 4, ""), (None, 4, ""),
     (1e-7, 3, "1e-07"), (10.5, 3, "10.5"), (999.96, 4, "1000"), (math.inf, 4, "inf")],
)  # fmt: skip
def test_numbers_have_few_digits(x: Any, digits: int, text: str) -> None:
    assert number(x, digits) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (0.012, "1.2 %"), (0.317, "32 %"), (0.9996, "99.96 %"), (1.0, "100 %"),
     (0.95, "95 %"), (0.0000123, "0.0012 %")],
)  # fmt: skip
def test_percents_round_neither_to_nothing_nor_to_all(share: float, text: str) -> None:
    assert percent(share) == text


def test_an_empty_table_and_one_without_diagnostics_are_rendered(tmp_path: Path) -> None:
    for table in (Table([], [], {}, {}), replace(made(), diagnosed={}, about={})):
        assert str(table).startswith("Off-policy evaluation of")
        assert "<svg" in page_of(table, tmp_path)


def test_drawing_leaves_no_state_behind(tmp_path: Path) -> None:
    import matplotlib

    before = matplotlib.rcParams.copy()  # as a dict it would load the library's state machine
    made().plot(tmp_path / "forest.png")
    assert matplotlib.rcParams.copy() == before
    assert "pyplot" not in Path(figures.__file__).read_text()
