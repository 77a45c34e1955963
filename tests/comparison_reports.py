"""Reports of comparisons made by hand, and a reader of the pages they become."""

import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np

NAN = math.nan
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
