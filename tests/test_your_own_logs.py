"""What docs/your_own_logs.md says is true, and every command in it runs."""

import contextlib
import importlib
import io
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from synthetic import HashedTexts

import experiments.from_logs
import simulators.catalog
from envs.rewards import Margin
from experiments import cli
from experiments.from_logs import CHECKED, LEARNT
from simulators.base import Response
from simulators.catalog import catalog_from_logs
from simulators.gate import THRESHOLDS
from sources import tables

ROOT = Path(__file__).resolve().parents[1]
SHOP = ROOT / "examples" / "corner_shop"
DOC = (ROOT / "docs" / "your_own_logs.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", DOC, re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, body in BLOCKS if kind == "sh" for line in body.splitlines()]
PYTHON = [body for kind, body in BLOCKS if kind == "python"]
USERS = ["env.catalog.dim=8", "env.simulator.epochs=1", "env.simulator.hidden=8"]
SMALL = {
    "fit_simulator": ["dim=8", "epochs=1", "hidden=8", "progress=false"],
    "generated": ["data.events=20000", "data.users=100", "data.items=50", "out=runs/generated"],
    "check_simulator": [*USERS, "eval_users=40", "policies=[random,popularity]", "progress=false",
                        "out_dir=runs/corner_shop/gate"],
    "train_agent": [*USERS, "steps=192", "num_envs=32", "evaluators=1", "eval_users=40",
                    "log_every=64", "eval_every=0", "frozen_users=150", "progress=false"],
    "compare": [*USERS, "steps=64", "num_envs=32", "evaluators=1", "eval_users=20", "seeds=1",
                "frozen_users=20", "eval_every=64", "log_every=64", "sensitivity_users=10",
                "sensitivity_simulators=1", "workers=1", "examples=0", "progress=false"],
    "evaluate_policies": ["progress=false"],
}  # fmt: skip


def in_this_process(line: str, patch: pytest.MonkeyPatch) -> str:
    """Run a command of the page with small sizes; what it prints."""
    words = shlex.split(line)
    if words[0].startswith("PYTHONPATH="):
        patch.syspath_prepend(str(Path(words.pop(0).partition("=")[2]).resolve()))
    assert words[0] == "python"
    script, words = Path(words[1]), words[2:]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if script.parent.name != "experiments":
            patch.setattr(sys, "argv", [str(script), *words])
            runpy.run_path(str(script), run_name="__main__")
        else:
            small = [*SMALL[script.stem], *(SMALL["generated"] if "generated" in line else [])]
            words = cli.check(script.stem, "", [*words, *small])  # as the script does
            patch.setattr(sys, "argv", [str(ROOT / script), *words])
            importlib.import_module(f"experiments.{script.stem}").main()
    return said.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, alone: None) -> Iterator[Path]:
    """An empty folder with the example and late.py as the page has it."""
    folder = tmp_path_factory.mktemp("place")
    kept = shutil.ignore_patterns("*.csv", "__pycache__")
    shutil.copytree(SHOP, folder / "examples" / "corner_shop", ignore=kept)
    (folder / "late.py").write_text(PYTHON[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delitem(sys.modules, "margin", raising=False)
        # texts as hashes: BERT is tested elsewhere
        patch.setattr(simulators.catalog, "TextEncoder", HashedTexts)
        patch.setattr(experiments.from_logs, "TextEncoder", HashedTexts)
        yield folder
    sys.modules.pop("margin", None)


@pytest.fixture(scope="module")
def files(place: Path) -> dict[str, str]:
    """The files as the page's first command writes them; then those of every fourth card only."""
    with pytest.MonkeyPatch.context() as patch:
        said = in_this_process(COMMANDS[0], patch)
    shop = place / "examples" / "corner_shop"
    names = ("orders.csv", "products.csv", "juniors.csv")
    found = {name: (shop / name).read_text() for name in names}
    for name, column in (("orders.csv", "card"), ("juniors.csv", "user")):
        table = pd.read_csv(shop / name)
        table[table[column].str[1:].astype(int) % 4 == 0].to_csv(shop / name, index=False)
    return {**found, "said": said}


@pytest.fixture(scope="module")
def said(place: Path, files: dict[str, str]) -> dict[str, str]:
    """What each command prints, in the page's order: later ones need the files of earlier ones."""
    with pytest.MonkeyPatch.context() as patch:
        return {line: in_this_process(line, patch) for line in COMMANDS[1:]}


def output(said: dict[str, str], word: str) -> str:
    return next(text for line, text in said.items() if word in line)


def table(place: Path, run: str) -> dict[str, float]:
    rows = json.loads((place / "runs" / "corner_shop" / run / "result.json").read_text())["table"]
    return {row["policy"]: row["mean_reward"] for row in rows}


def test_the_files_are_those_of_the_page(files):
    quoted = next(body for kind, body in BLOCKS if kind == "text").split("\n\n")
    for name, lines in zip(("orders.csv", "products.csv"), quoted, strict=True):
        head, row = lines.split()[0], lines.splitlines()[1]
        assert files[name].splitlines()[0] == head
        assert row in files[name].splitlines()
    lines, products = re.findall(r"([\d,]+) (?:lines|products)", DOC.partition("## 1.")[0])
    assert files["said"] == f"{lines.replace(',', '')} lines of orders, {products} products\n"


def test_the_shop_keeps_its_rules(files):
    orders = pd.read_csv(io.StringIO(files["orders.csv"]))
    shelf = pd.read_csv(io.StringIO(files["products.csv"])).set_index("product")["shelf"]
    sold = orders.assign(shelf=orders["product"].map(shelf))
    junior = sold["card"].str.startswith("j")
    assert not (sold["shelf"][junior] == "wine").any()
    assert (sold["shelf"][~junior] == "wine").mean() > 0.05
    assert (orders["paid_on"] >= orders["ordered"].str[:10]).all()
    rule = pd.read_csv(io.StringIO(files["juniors.csv"]))
    assert "j000,wine" in files["juniors.csv"]
    assert set(orders["card"][junior]) <= set(rule["user"])
    assert set(rule["category"]) == {"wine"}


def test_the_yaml_of_the_page_is_the_example_s(place, files):
    (yaml,) = [body for kind, body in BLOCKS if kind == "yaml"]
    assert yaml == (SHOP / "shop.yaml").read_text()
    logs = tables.load(place / "examples" / "corner_shop" / "shop.yaml")
    assert logs.events["time"].max() < pd.Timestamp("2024-09-27"), "unpaid orders are left out"
    paid = logs.events["price"] * logs.events["quantity"]
    assert logs.events["value"].tolist() == pytest.approx(paid.tolist())
    assert any("keep status" in note for note in logs.notes)


def test_fit_and_gate_say_what_the_page_tells_to_read(place, said):
    fit = output(said, "data.config=examples")
    for words in ("events of 100 users", "keep ordered", "catalogue: 72 products", "held out:"):
        assert words in fit
    gate = output(said, "check_simulator")
    assert (place / "runs" / "corner_shop" / "gate" / "gate.html").exists()
    quoted = re.findall(r"^\| `(\w+)` \|.*\| (\S+) \|$", DOC, re.MULTILINE)
    assert {name for name, _ in quoted} > {"calibration_error", "two_sample_auc"}
    for name, limit in quoted:
        assert THRESHOLDS[name] == float(limit)
        assert f" {name} " in gate
    assert re.search(r"of \d+ checks passed", gate)  # too few users for some of them


def test_training_prints_both_tables_and_the_verdict(place, said):
    train = output(said, "agent=logistic_ts")
    assert "on users of another kind, gradient boosting on the same log:" in train
    assert re.search(r"these users FAILED \d+ of \d+ checks", train), "the gate was asked of them"
    policies = {"random", "popularity", "buy_again", "ease", "logistic_ts", "oracle"}
    assert set(table(place, "logistic_ts")) == policies
    assert (place / "runs" / "corner_shop" / "compare" / "report.html").exists()
    assert "buy_again" in output(said, "compare.py")
    judged = output(said, "evaluate_policies")
    assert "The log identifies the value of logging" in judged
    assert "partially identified" in judged


def test_the_rule_holds_in_the_loop_of_the_page(said):
    free, ruled = output(said, "late.py").splitlines()
    assert re.fullmatch(r"rule False: [\d.]+ bought, [1-9]\d* forbidden products shown", free)
    assert re.fullmatch(r"rule True: [\d.]+ bought, 0 forbidden products shown", ruled)


def test_margins_are_paid_for_what_was_bought(place, said):
    assert PYTHON[0] in (SHOP / "margin.py").read_text()
    flat, margin, units = (table(place, run) for run in ("flat", "margin", "logistic_ts"))
    for policy in ("random", "popularity", "buy_again"):  # the same sessions, other rewards
        assert 0.2 * units[policy] < flat[policy] < 4 * units[policy]
        assert 0.2 * units[policy] < margin[policy] < 4 * units[policy]
        assert flat[policy] != margin[policy]


def test_the_rewards_by_hand(place, files, monkeypatch):
    monkeypatch.syspath_prepend(str(place / "examples" / "corner_shop"))
    margin = importlib.import_module("margin")
    bought, none = torch.tensor([[True, False]]), torch.zeros(1, 2)
    money = torch.tensor([[10.0, 0.0]])
    answer = Response({"buy": bought}, bought, money, bought[:, 0], none[:, 0], none)
    assert margin.flat(answer).tolist() == [pytest.approx([0.38 * 10.0 - 0.30, 0.0])]

    logs = tables.load(place / "examples" / "corner_shop" / "shop.yaml")
    catalog = catalog_from_logs(logs, dim=8)
    products = place / "examples" / "corner_shop" / "products.csv"
    earned = pd.read_csv(products).set_index("product")["margin"]
    paid = Margin(str(products), item="product").of(catalog)
    sold = torch.tensor([[3, 5]])
    answer = replace(answer, chosen={"buy": torch.tensor([[True, True]])}, items=sold)
    assert paid(answer).tolist() == [pytest.approx(earned[catalog.ids[[3, 5]]].tolist())]


def test_the_rule_is_part_of_the_training_of_the_page(place, said):
    ruled = output(said, "excluded=")
    words = r"excluded: 0 of 72 items for everybody, up to 12 more for \d+ of \d+ users"
    assert re.search(words, ruled)
    assert re.search(words, DOC)
    logged = sorted((place / "runs" / "corner_shop" / "ruled" / "decisions").glob("*.parquet"))
    rows = pd.concat(
        [pd.read_parquet(path, columns=["item", "user", "excluded"]) for path in logged]
    )
    forbidden = [len(x) for x in rows["excluded"].dropna()]
    assert max(forbidden) >= 12, "what the rule forbids stands in the decision log"
    assert "steps=20000" in next(line for line in COMMANDS if "excluded=" in line)


def test_what_the_page_says_of_logs_is_what_the_code_does():
    assert f"{LEARNT:,}" in DOC.partition("## 8.")[2]
    assert f"{CHECKED:,}" in DOC.partition("## 8.")[2]


def test_products_left_out_of_one_file_only_are_refused(place, files):
    shop = place / "examples" / "corner_shop"
    (shop / "narrow.csv").write_text("".join(files["products.csv"].splitlines(True)[:-1]))
    text = (shop / "shop.yaml").read_text().replace("file: products.csv", "file: narrow.csv")
    (shop / "narrow.yaml").write_text(text)
    with pytest.raises(ValueError, match="add them to items, drop these events"):
        tables.load(shop / "narrow.yaml")


def test_the_bandits_of_the_page_are_those_that_wait_for_rewards():
    waits = set()
    for path in (ROOT / "experiments" / "conf" / "agent").glob("*.yaml"):
        target = re.search(r"^_target_: (\S+)$", path.read_text(), re.MULTILINE)
        assert target is not None
        module, _, name = target[1].rpartition(".")
        if hasattr(getattr(importlib.import_module(module), name), "expect"):
            waits.add(path.stem)
    (listed,) = re.findall(r"The bandits have both \(([^)]*)\)", DOC.replace("\n", " "))
    assert set(re.findall(r"`(\w+)`", listed)) == waits
