"""A comparison's page says what was measured, for any report, and stands alone."""

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.comparison_figures import differences, levels, near, placed, spread
from evaluation.comparison_page import comparison_page
from evaluation.comparison_wording import READING, flips, verdict

NAN = math.nan
HOSTILE = '<img src=x onerror="alert(1)">&$x_1$\x01'
REWARDS = {"oracle": 0.99, "dqn": 0.962, "buy_again": 0.931, "sasrec": 0.902, "ease": 0.871,
           "als": 0.743, "item_knn": 0.695, "popularity": 0.462, "random": 0.051}  # fmt: skip
STATICS = [name for name in REWARDS if name not in ("oracle", "dqn")]


def policy_row(name: str, reward: float, i: int) -> dict[str, Any]:
    """Measures of one policy."""
    good = {
        "value": 0.94,
        "low": 0.86,
        "high": 1.02,
        "estimator": "seq_sndr",
        "verdict": "identified",
        "why": f"The log identifies the value of {name}: .94 (.86 to 1.02) by seq_sndr.",
    }
    bad = {"value": 7.6543, "low": 0.8, "high": 0.9, "estimator": "fqe",
           "verdict": "not identified",
           "why": "The log cannot tell the value: about 1.2 % of what it would show was ever "
           "shown; fqe, a model alone, says .7"}  # fmt: skip
    truth = name == "oracle"
    return {
        "policy": name, "learns": name == "dqn", "seeds": 5 if name == "dqn" else 1,
        "reward": reward, "reward_low": reward - 0.021, "reward_high": reward + 0.022,
        "length": 8.7 - i / 3, "revenue": 3.3 * reward, "revenue_low": 3.2 * reward,
        "revenue_high": 3.4 * reward, "coverage": 0.4 / (1 + i), "gini": 0.8 + i / 50,
        "novelty": 11.2 - i / 2, "diversity": 0.61, "recall": None if truth else 0.16 - i / 100,
        "ndcg": None if truth else 0.2 - i / 100, "hit": None if truth else 0.5,
        "replay": None if truth else 1.31 - i / 10,
        "ope": None if truth else good if name in ("dqn", "buy_again") else bad,
    }  # fmt: skip


def gap_row(name: str, gap: float, wide: float = 0.012) -> dict[str, Any]:
    """One difference to buy_again."""
    said = "better than buy_again" if gap > wide else "worse than buy_again"
    return {"policy": name, "difference": gap, "low": gap - wide, "high": gap + wide,
            "relative": gap / 0.931,
            "claim": said if abs(gap) > wide else "not told apart from buy_again"}  # fmt: skip


def sensitivity() -> dict[str, Any]:
    """Signs of all policies under changed assumptions; two turn dqn's, one of them surely."""
    names = [name for name in REWARDS if name not in ("oracle", "buy_again")]
    changed = [("as it is", ""), ("patience", "half (0.05)"), ("patience", "double (0.2)"),
               ("satiation", "off"), ("satiation", "on (0.5)"), ("drift", "half (0.1)"),
               ("drift", "double (0.4)"), ("exposure", "on (0.5)"), ("position", "on (0.1)"),
               ("choice", "independent"), ("choice", "cascade")]  # fmt: skip
    rows = []
    for i, (assumption, label) in enumerate(changed):
        found = {name: REWARDS[name] - 0.931 + 0.01 * math.sin(i) for name in names}
        found["dqn"] = {3: -0.03, 7: -0.004}.get(i, found["dqn"])
        rows.append({"assumption": assumption, "label": label, "value": None, "differences": {
            name: {"difference": x, "low": x - 0.012, "high": x + 0.012}
            for name, x in found.items()}})  # fmt: skip
    return {"baseline": "buy_again", "policies": names, "rows": rows}


def told() -> list[dict[str, Any]]:
    """Two sessions."""
    why = ("bought before: 4 times, the last time 12 days ago; scored +3.1 standard deviations "
           "from the user's mean item, of which the past +2.4, this session -.3")  # fmt: skip
    steps = [
        {"shown": ["FROZEN PIZZA, FROZEN PIZZA/SNACKS"], "why": [why],
         "happened": "purchase: FROZEN PIZZA, FROZEN PIZZA/SNACKS"},
        {"shown": ["FLUID MILK PRODUCTS, 2% WHITE"], "happened": "passed",
         "why": ["new to the user, most like YOGURT, bought 3 times (cosine .71)"]},
    ]  # fmt: skip
    user = ("user household 123, who bought 214 different items before; the latest: BANANAS (3 "
            "days ago, 12 times); SOFT DRINKS, 12 PACK (5 days ago, once)")  # fmt: skip
    end = "left after 5 slates, reward 1"
    return [{"policy": name, "user": user, "steps": steps, "end": end}
            for name in ("dqn", "buy_again")]  # fmt: skip


def made() -> dict[str, Any]:
    """A whole report of one learner and seven static policies."""
    step = np.arange(20_000, 420_000, 20_000)
    iqm = 0.962 - 0.6 * np.exp(-step / 70_000.0)
    shown = {name: 0.2 + i / 20 for i, name in enumerate(REWARDS)}
    groups = ["head: a third of sales", "middle: a third of sales", "tail: a third of sales"]
    departments = ["GROCERY", "DRUG GM", "PRODUCE", "MEAT-PCKGD", "all others"]
    return {
        "env": "ecommerce", "title": "dqn, buy_again and six more in env=ecommerce",
        "command": "python experiments/compare.py env=ecommerce agents=[dqn,ease,als] seeds=5",
        "made": "2026-11-24", "commit": "4f2a91c", "slate_size": 1, "seeds": 5, "sessions": 600,
        "simulators": 5, "households": 480, "baseline": "buy_again", "learners": ["dqn"],
        "statics": STATICS,
        "notes": ["All users but those of replayed trips are simulated: the judging simulators "
                  "were fitted to other households than the learners trained on."],
        "curves": {"dqn": {"step": step, "iqm": iqm, "low": iqm - 0.02, "high": iqm + 0.015,
                           "seeds": 5}},
        "levels": {name: REWARDS[name] for name in STATICS},
        "policies": [policy_row(name, x, i) for i, (name, x) in enumerate(REWARDS.items())],
        "differences": [gap_row(name, x - 0.931) for name, x in REWARDS.items()
                        if name != "buy_again"],
        "sensitivity": sensitivity(),
        "new_users": [{"policy": name, "reward": x / 2, "low": x / 2 - 0.02, "high": x / 2 + 0.02,
                       "difference": x / 2 - 0.4655, "diff_low": x / 2 - 0.48,
                       "diff_high": x / 2 - 0.45, "all_reward": x} for name, x in REWARDS.items()],
        "new_items": {
            "what": "the tenth of the catalogue first sold last, within 60 days of the cut",
            "items": 200, "catalogue_share": 0.1, "sales_share": 0.021,
            "rows": [{"policy": name, "shown_share": 0.03, "chosen_share": 0.02, "recall": 0.011}
                     for name in REWARDS]},
        "exposure": [
            {"kind": "popularity", "groups": [
                {"group": g, "catalogue_share": (0.02, 0.1, 0.88)[i], "sales_share": 1 / 3,
                 "shown": {n: (x, 0.3, 0.7 - x)[i] for n, x in shown.items()}}
                for i, g in enumerate(groups)]},
            {"kind": "category", "groups": [
                {"group": g, "catalogue_share": 0.2, "sales_share": (0.5, 0.1, 0.2, 0.1, 0.1)[i],
                 "shown": {n: abs(math.sin(i + j)) / 3 for j, n in enumerate(shown)}}
                for i, g in enumerate(departments)]}],
        "ab": {"alpha": 0.05, "power": 0.8, "rows": [
            {"policy": name, "difference": x - 0.931, "sd": 1.02,
             "per_arm": None if name == "sasrec" else 17_345, "per_arm_one_percent": 188_221}
            for name, x in REWARDS.items() if name not in ("oracle", "buy_again")]},
        "sessions_told": told(),
        "ranking": {"what": "of what 2,000 held-out trips bought, all items ranked", "k": 10},
        "off_policy": {"notes": ["the log's policy is a softmax of dqn's values"],
                       "baseline": "dqn"},
        "assumptions": [
            {"name": "patience", "value": "0.1", "kind": "assumed",
             "what": "probability to leave after a slate with nothing bought"},
            {"name": "drift", "value": "0.2", "kind": "fitted",
             "what": "how much a purchase moves the user's taste"}],
        "fidelity": ["next-item recall at 10: .31 simulated, .29 in the held-out log"],
        "data": ["2,000 products with most lines: 59 % of all lines are left out"],
        "settings": {"agents": ["dqn", "ease"], "env": {"simulator": {"patience": 0.1}},
                     "seeds": 5, "sensitivity": True},
        "versions": {"python": "3.11.9", "torch": "2.9.0"},
        "seconds": {"prepare": 12.3, "train": 640.1},
    }  # fmt: skip


def many() -> dict[str, Any]:
    """Twenty policies with names of forty letters, four of them learners of one seed."""
    report = made()
    names = [f"policy_{i:02d}_" + "abcdefghij"[i % 10] * 30 for i in range(20)]
    step = list(range(0, 100_000, 10_000))
    report |= {
        "learners": names[:4], "statics": names[4:], "baseline": names[4],
        "curves": {n: {"step": step, "iqm": [0.3 + i / 50 + s / 2e5 for s in step],
                       "low": [NAN] * 10, "high": None, "seeds": 1}
                   for i, n in enumerate(names[:4])},
        "levels": {n: 0.9 - i / 200 for i, n in enumerate(names[4:])},
        "policies": [policy_row(n, 0.95 - i / 100, i) | {"learns": i < 4}
                     for i, n in enumerate(names)],
        "differences": [gap_row(n, 0.04 - i / 100) for i, n in enumerate(names) if i != 4],
        "sensitivity": {"baseline": names[4], "policies": names[:4] + names[5:], "rows": [
            {"assumption": a, "label": "", "differences": {
                n: {"difference": (i - 9) / 100, "low": NAN, "high": None}
                for i, n in enumerate(names)}} for a in ("as it is", "patience")]},
        "exposure": [{"kind": "category", "groups": [
            {"group": "a category with quite a long name indeed " * 2, "catalogue_share": None,
             "sales_share": 0.1, "shown": dict.fromkeys(names, 0.2)}] * 9}],
        "sessions_told": [], "settings": {}, "seeds": 1,
    }  # fmt: skip
    return report


def hollowed(x: Any, nothing: Any) -> Any:
    """The same report with `nothing` for every number."""
    if isinstance(x, dict):
        return {key: hollowed(value, nothing) for key, value in x.items()}
    if isinstance(x, list | np.ndarray):
        return [hollowed(value, nothing) for value in x]
    return nothing if isinstance(x, int | float) and not isinstance(x, bool) else x


class Reader(HTMLParser):
    """Tags, their attributes, and text outside the style."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def read(page: str) -> Reader:
    """The page, every tag of which is closed."""
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def page() -> str:
    return comparison_page(made())


@pytest.fixture(scope="module")
def crowd() -> str:
    return comparison_page(many())


def only(**parts: Any) -> str:
    """Text of a page of a few parts of the report."""
    return read(comparison_page({"learners": ["dqn"], "statics": STATICS, "baseline": "buy_again",
                                 **parts})).text  # fmt: skip


def test_the_page_stands_alone(page, crowd):
    for html in (page, crowd):
        seen = read(html)
        assert not {"script", "img", "link", "iframe", "object", "base"} & set(seen.tags)
        assert not re.search(r"https?:|@import|@font-face|data:|\bxmlns", html)
        assert set(re.findall(r"url\((.)", html)) <= {"#"}
        assert not [key for key, _ in seen.attributes if key.startswith("on")]
        assert len(html) < 600_000


def test_every_reference_of_a_figure_is_its_own(page):
    seen = read(page)
    ids = [value for key, value in seen.attributes if key == "id"]
    assert len(ids) == len(set(ids)) > 0
    wanted = {value[1:] for key, value in seen.attributes if key == "href"}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert wanted <= set(ids)


def test_the_same_report_is_the_same_bytes(page):
    assert comparison_page(made()) == page


def test_a_report_read_from_its_file_is_the_same_page(page):
    assert comparison_page(json.loads(json.dumps(made(), default=np.ndarray.tolist))) == page


def test_sections_come_in_order(page):
    wanted = ["Learning", "Policies", "Differences from buy_again", "If assumptions are wrong",
              "Off-policy evaluation", "New users", "New items", "Who is shown",
              "Reward and coverage", "Size of an A/B test", "Sessions", "Assumed and fitted",
              "Fidelity", "Data", "Settings", "How to read this"]  # fmt: skip
    assert re.findall(r"<h2>(.*?)</h2>", page) == wanted
    assert page.count("<svg") == 6


def test_the_verdict_says_difference_flips_and_log(page):
    said = read(page).text
    assert (
        "dqn is better than buy_again. The difference is +.031 a session (95 % interval .019 to "
        ".043), +3.3 %, over 5 training seeds. 2 of 10 changed assumptions turn its sign, 1 of "
        "them with an interval that excludes 0: satiation off, exposure on (0.5). The decision log "
        "is its own: off-policy, it says nothing new of it. buy_again, the best static policy, "
        "earns .931 a session; greedy on the simulator's own truth earns .99."
    ) in said


@pytest.mark.parametrize(
    ("gap", "low", "high", "said"),
    [
        (0.031, 0.019, 0.043, "is better than buy_again."),
        (0.009, 0.005, 0.013, "is above buy_again by less than 1%: no win."),
        (0.031, -0.001, 0.063, "is not told apart from buy_again."),
        (-0.031, -0.04, -0.02, "is worse than buy_again."),
        (0.031, NAN, None, "is not told apart from buy_again."),
    ],
)
def test_a_claim_left_out_follows_from_the_interval(gap, low, high, said):
    report = made() | {"differences": [{"policy": "dqn", "difference": gap, "low": low,
                                        "high": high}]}  # fmt: skip
    assert verdict(report, "dqn").startswith(said)


def test_the_value_from_anothers_log_is_of_the_softened_policy_and_has_its_unit():
    report = made() | {"off_policy": {"notes": [], "baseline": "ease"}}
    of_dqn = next(row for row in report["policies"] if row["policy"] == "dqn")
    of_dqn["ope"]["unit"] = "a session"
    said = "Off-policy, its softened kin earns .94 (.86 to 1.02) a session."
    assert said in verdict(report, "dqn")


def test_flips_are_counted_from_the_first_row():
    assert flips(made(), "dqn") == (["satiation off", "exposure on (0.5)"], ["satiation off"], 10)
    assert flips(made(), "ease") == ([], [], 10)
    assert flips(made(), "nobody") == ([], [], 0)
    mirrored = made()
    for row in mirrored["sensitivity"]["rows"]:
        for gap in row["differences"].values():
            gap |= {"difference": -gap["difference"], "low": -gap["high"], "high": -gap["low"]}
    assert flips(mirrored, "dqn") == flips(made(), "dqn")
    said = "On the fewer sessions with changed assumptions its sign is − as it is."
    assert said in verdict(mirrored, "dqn")


def test_signs_are_framed_where_they_flip_and_faint_where_unsure():
    html = comparison_page({"baseline": "b", "sensitivity": made()["sensitivity"]})
    assert html.count('<span class="minus flip">−</span>') == 1
    assert html.count('<span class="faint flip">~ −</span>') == 1
    assert html.count('<span class="plus">+</span>') == 9
    assert "<td>2/10</td>" in html


def test_a_value_that_the_log_does_not_identify_is_nowhere(page):
    assert not re.search(r"7\.65", read(page).text)
    assert "withheld" in page


def test_what_is_missing_is_said():
    said = read(comparison_page({})).text
    for line in ("Nothing learned here", "No policy to compare with is named",
                 "No policy was played", "nothing to compare", "No assumption was changed",
                 "No decision log was evaluated", "No session was played with the past hidden",
                 "No item could be called new"):  # fmt: skip
        assert line in said
    for heading in ("Who is shown", "Sessions", "Fidelity", "Size of an A/B test"):
        assert heading not in said


@pytest.mark.parametrize("nothing", [None, NAN, math.inf])
def test_a_report_without_numbers_has_dashes(nothing):
    report = hollowed(made(), nothing)
    said = read(comparison_page(report)).text
    assert "dqn was not compared with buy_again" in said
    assert not re.search(r"\bnan\b|\bNone\b", said)


def test_parts_may_be_empty():
    for blank in (None, [], {}):
        for key in (key for key, part in made().items() if isinstance(part, list | dict)):
            report = dict.fromkeys(made(), None) | {key: blank}
            assert "How to read this" in comparison_page(report)


def test_no_learner_and_one_policy():
    report = made() | {"learners": [], "curves": {}, "levels": {}, "differences": []}
    report["policies"] = [policy_row("buy_again", 0.931, 2)]
    said = read(comparison_page(report)).text
    assert "Nothing learned here. buy_again, the best static policy, earns .931 a session." in said
    assert "nothing to compare" in said


def test_one_seed_has_no_band_and_says_so():
    curve = {"step": [1, 2, 3], "iqm": [0.1, 0.2, 0.3], "low": [NAN] * 3, "high": [NAN] * 3}
    assert "Fewer than 3 seeds of dqn: no band" in only(curves={"dqn": {**curve, "seeds": 1}})
    assert "no band" not in only(curves={"dqn": {**curve, "seeds": 3}})


def test_hostile_text_is_text():
    report = made()
    for key in ("title", "command", "commit"):
        report[key] = HOSTILE
    report |= {"learners": [HOSTILE], "notes": [HOSTILE], "fidelity": [HOSTILE],
               "versions": {HOSTILE: HOSTILE}, "settings": {HOSTILE: {HOSTILE: HOSTILE}},
               "baseline": HOSTILE, "levels": {HOSTILE: 0.9},
               "curves": {HOSTILE: report["curves"]["dqn"]},
               "policies": [{**row, "policy": HOSTILE, "ope": {"verdict": HOSTILE, "why": HOSTILE}}
                            for row in report["policies"][:1]],
               "differences": [{**report["differences"][0], "policy": HOSTILE, "claim": HOSTILE}],
               "sensitivity": {"policies": [HOSTILE], "baseline": HOSTILE, "rows": [
                   {"assumption": HOSTILE, "label": HOSTILE, "differences": {
                       HOSTILE: {"difference": 1.0, "low": 0.5, "high": 2.0}}}]},
               "exposure": [{"kind": HOSTILE, "groups": [
                   {"group": HOSTILE, "sales_share": 0.1, "shown": {HOSTILE: 0.2}}]}],
               "sessions_told": [{"policy": HOSTILE, "user": HOSTILE, "end": HOSTILE, "steps": [
                   {"shown": HOSTILE, "happened": HOSTILE, "why": [HOSTILE]}]}],
               "off_policy": {"notes": [HOSTILE], "baseline": HOSTILE}}  # fmt: skip
    html = comparison_page(report)
    seen = read(html)
    assert "img" not in seen.tags
    assert "\x01" not in html
    assert seen.text.count(HOSTILE[:-1]) > 20


def test_long_names_are_whole_in_tables_and_short_in_figures(crowd):
    name = many()["learners"][0]
    figures, rest = re.findall(r"<svg.*?</svg>", crowd, re.S), re.sub(r"<svg.*?</svg>", "", crowd)
    assert name in rest
    inner = "".join(re.sub(r"<svg[^>]*>", "", figure) for figure in figures)
    assert name not in inner
    assert "policy_00_..aaaaaaaaaa" in inner


def test_sessions_tell_each_step(page):
    said = read(page).text
    assert "FLUID MILK PRODUCTS, 2% WHITE → passed new to the user, most like YOGURT" in said
    assert said.count("left after 5 slates, reward 1.") == 2


def test_settings_are_named_in_full_and_columns_explained(page):
    assert "env.simulator.patience" in page
    for name in READING:
        assert f"<dt>{name}</dt>" in page


def test_a_level_beyond_the_curves_is_named_in_words():
    report = made()
    drawn, left = levels(report)
    assert list(drawn) == ["buy_again", "sasrec", "ease", "als", "item_knn"]
    assert left == {"popularity": 0.462, "random": 0.051}
    assert "Not drawn: popularity .462, random .051." in only(
        curves=report["curves"], levels=report["levels"]
    )


def test_a_poor_static_policy_does_not_flatten_the_learner():
    axes = differences(made()).axes[0]
    low, high = axes.get_xlim()
    assert low == -high
    assert 0.043 < high < 0.15  # dqn ends at .043, random lies at -.88
    report = made() | {"differences": [gap_row("dqn", -0.7)]}
    assert differences(report).axes[0].get_xlim()[0] < -0.712
    assert near([], NAN) == 1.0


@given(
    st.lists(st.floats(0, 1), max_size=8).map(lambda xs: sorted(xs, reverse=True)),
    st.floats(0.01, 0.1),
)
def test_labels_of_levels_keep_order_and_distance(places, gap):
    moved = spread(places, gap, 0.0, 1.0)
    assert all(a - b >= gap - 1e-9 for a, b in pairwise(moved))
    assert all(-1e-9 <= x <= 1 + 1e-9 for x in moved)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=12, unique=True))
def test_labels_of_points_do_not_overlap(cells):
    points = np.array([(30.0 + 70 * x, 30.0 + 45 * y) for x, y in cells]).reshape(-1, 2)
    sizes = [(50.0, 11.0)] * len(points)
    middle = points + np.array(placed(points, sizes, (0.0, 0.0, 300.0, 290.0))).reshape(-1, 2)
    for i, (x, y) in enumerate(middle):
        assert 24.9 <= x <= 275.1
        assert 5.4 <= y <= 284.6
        for a, b in middle[:i]:
            assert abs(x - a) >= 49.9 or abs(y - b) >= 10.9
