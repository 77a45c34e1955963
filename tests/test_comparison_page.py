"""A comparison's page says what was measured, for any report, and stands alone."""

import json
import math
import re
from typing import Any

import numpy as np
import pytest
from comparison_reports import NAN, made, many, policy_row, read

from evaluation.comparison_page import comparison_page
from evaluation.comparison_wording import READING

HOSTILE = '<img src=x onerror="alert(1)">&$x_1$\x01'


def hollowed(x: Any, nothing: Any) -> Any:
    """The same report with `nothing` for every number."""
    if isinstance(x, dict):
        return {key: hollowed(value, nothing) for key, value in x.items()}
    if isinstance(x, list | np.ndarray):
        return [hollowed(value, nothing) for value in x]
    return nothing if isinstance(x, int | float) and not isinstance(x, bool) else x


@pytest.fixture(scope="module")
def page() -> str:
    return comparison_page(made())


@pytest.fixture(scope="module")
def crowd() -> str:
    return comparison_page(many())


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
