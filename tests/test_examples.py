"""What docs/custom_simulator.md and examples/ say is true, and every command in them runs."""

import importlib
import inspect
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from omegaconf import OmegaConf

from experiments import cli
from simulators.base import SimSpec
from simulators.draws import Draws
from simulators.testing import check_simulator
from simulators.testing_dynamics import EFFECTS

ROOT = Path(__file__).resolve().parents[1]
DOC = (ROOT / "docs" / "custom_simulator.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", DOC, re.DOTALL | re.MULTILINE)
PYTHON = [body for kind, body in BLOCKS if kind == "python"]
SAID = [body for kind, body in BLOCKS if kind == "text"]
COMMANDS = [line for kind, body in BLOCKS if kind == "sh" for line in body.splitlines()]
SPEC = SimSpec(None, None)
SMALL = {
    "train_agent": ["steps=192", "num_envs=16", "evaluators=2", "eval_users=20", "frozen_users=10",
                    "log_every=64", "eval_every=0", "progress=false", "run_dir=runs/example"],
    "compare": ["steps=192", "num_envs=16", "evaluators=2", "eval_users=20", "frozen_users=40",
                "eval_every=96", "log_every=96", "sensitivity_users=10", "workers=1", "examples=0",
                "sensitivity_simulators=1", "progress=false", "out_dir=runs/comparison"],
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with plug/ as the page tells to write it, and the repository's examples."""
    plug = tmp_path / "plug"
    (plug / "conf" / "env").mkdir(parents=True)
    (plug / "library.py").write_text(PYTHON[0])
    (plug / "check.py").write_text(PYTHON[1])
    (yaml,) = [body for kind, body in BLOCKS if kind == "yaml"]
    (plug / "conf" / "env" / "library.yaml").write_text(yaml)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for name in ("library", "persona", "shoppers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    for name in ("library", "persona", "shoppers"):
        sys.modules.pop(name, None)


def typed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of the page in this process, with small sizes."""
    words = shlex.split(line)
    given, words = words[0], words[1:]
    name, _, folders = given.partition("=")
    assert name == "PYTHONPATH"
    monkeypatch.setenv(name, folders)
    for folder in folders.split(":"):
        monkeypatch.syspath_prepend(str(Path(folder).resolve()))
    assert words[0] == "python"
    script, words = Path(words[1]), words[2:]
    if script.parent.name != "experiments":
        runpy.run_path(str(script), run_name="__main__")
        return
    words = cli.check(script.stem, "", [*words, *SMALL[script.stem]])  # as the script does
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *words])
    importlib.import_module(f"experiments.{script.stem}").main()


def example(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / name))
    return importlib.import_module(module)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_page_runs(line, place, monkeypatch, capsys):
    typed(line, monkeypatch)
    out = capsys.readouterr().out
    if "check.py" in line:
        assert out == SAID[0]
    elif "compare.py" in line:
        assert (place / "runs" / "comparison" / "report.html").exists()
    else:
        result = json.loads((place / "runs" / "example" / "result.json").read_text())
        agent = next(word for word in line.split() if word.startswith("agent="))[6:]
        rows = {row["policy"]: row["mean_reward"] for row in result["table"]}
        assert {agent, "oracle", "popularity"} <= set(rows)
        assert rows["oracle"] > rows["random"]


def test_the_fault_of_the_page_is_said_as_the_page_says(place, monkeypatch, capsys):
    file = place / "plug" / "library.py"
    assert " & (slate != EMPTY)" in file.read_text()
    file.write_text(file.read_text().replace(" & (slate != EMPTY)", ""))
    typed(next(line for line in COMMANDS if "check.py" in line), monkeypatch)
    assert capsys.readouterr().out == SAID[1]


def test_the_settings_of_the_page_are_declared_as_it_says(place, monkeypatch):
    wanted, members = PYTHON[3].split("\n", 1)
    text = PYTHON[0].replace("import torch\n", f"import torch\n{wanted}\n", 1)
    text = text.replace(
        "        self.patience = ", "        self.spec = spec\n        self.patience = "
    )
    behaviours = '    behaviours = ("borrow",)\n'
    (place / "plug" / "library.py").write_text(text.replace(behaviours, behaviours + members))
    monkeypatch.syspath_prepend(str(place / "plug"))
    library = importlib.import_module("library").Library(SPEC)
    assert library.dynamics[0].setting == "patience"
    assert check_simulator(library) == []
    library.patience = 0.0
    library.rebuilt = lambda *, patience: library  # a fault: always the same
    assert "patience: useless slates must end sessions sooner" in check_simulator(library)[0]


def test_the_environment_of_the_page_answers(place, monkeypatch):
    monkeypatch.syspath_prepend(str(place / "plug"))
    names: dict[str, object] = {}
    exec(PYTHON[2], names)
    assert names["reward"].shape == (64,)


def test_the_page_lists_every_effect():
    listed = re.findall(r"^\| `([a-z ]+)` \| (.+) \|$", DOC.partition("## 5.")[2], re.MULTILINE)
    assert dict(listed) == {name: effect.claim for name, effect in EFFECTS.items()}


@pytest.mark.parametrize(
    ("folder", "module", "name"),
    [("persona", "persona", "Personas"), ("per_user_object", "shoppers", "Shoppers")],
)
def test_the_examples_keep_the_contract_for_any_people(folder, module, name, place, monkeypatch):
    make = getattr(example(folder, module, monkeypatch), name)
    for seed in (0, 1):
        assert check_simulator(make(SimSpec(None, None, seed=seed)), seed=seed) == []
    assert check_simulator(make(SPEC, people=1)) == []
    one, other = make(SPEC), make(SimSpec(None, None, seed=1))
    assert not torch.equal(one.users.profile, other.users.profile), "judges must be other people"
    assert one.catalog.fingerprint() == other.catalog.fingerprint(), "of the same shop"
    with pytest.raises(ValueError, match="must be"):
        make(SPEC, people=0)


def test_personas_differ_as_they_are_written(place, monkeypatch):
    persona = example("persona", "persona", monkeypatch)
    users = persona.Personas(SPEC, people=600)
    nobody = torch.zeros(600, dtype=torch.long)
    state = users.start(torch.arange(600), Draws.root(0).at(torch.arange(600), nobody, nobody))
    relevance, texts = users.relevance(state), users.catalog.texts
    student, idealist = (users.money == money for money in (12.0, 30.0))
    for label, fan, other in (
        ("value noodles", student, idealist),
        ("organic tea", idealist, student),
    ):
        liked = relevance[:, texts.index(label)]
        assert liked[fan].mean() > 3 * liked[other].mean()
    poor = users.relevance(state | {"money": torch.full((600,), 2.0)})
    assert (poor < relevance).all(), "who has little money left buys less"


def test_a_shopper_buys_the_first_it_wants_and_loses_its_nerves(place, monkeypatch):
    shoppers = example("per_user_object", "shoppers", monkeypatch)
    shopper = shoppers.Shopper([1, 2, 2], shoppers.Shopper.fresh())
    blue_lamp = 2 * len(shoppers.COLOURS) + 1
    assert shopper.answer([-1, 0, blue_lamp, blue_lamp], [0.0, 0.9, 0.5, 0.0]) == (
        [False, False, True, True], 2, False,
    )  # fmt: skip
    assert shopper.answer([0], [0.9]) == ([False], -1, False)
    shopper = shoppers.Shopper([1, 2, 2], shopper.memory())  # another object, the same memory
    assert shopper.answer([0], [0.9]) == ([False], -1, True)


@pytest.mark.parametrize(
    ("yaml", "module", "name"),
    [
        ("persona/conf/env/persona.yaml", "persona", "Personas"),
        ("per_user_object/conf/env/shoppers.yaml", "shoppers", "Shoppers"),
    ],
)
def test_the_yamls_of_the_examples_repeat_the_defaults(yaml, module, name, place, monkeypatch):
    config = OmegaConf.load(ROOT / "examples" / yaml)
    make = getattr(example(yaml.partition("/")[0], module, monkeypatch), name)
    given = dict(config.simulator)
    assert given.pop("_target_") == f"{module}.{name}"
    parameters = inspect.signature(make).parameters
    assert given == {k: p.default for k, p in parameters.items() if k != "spec"}
