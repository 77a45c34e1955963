"""Imports run one way, nothing draws from a global generator, files and functions stay readable."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("sources", "encoders", "simulators", "envs", "agents", "evaluation", "experiments")
MAY_IMPORT = {
    "sources": (),
    "encoders": ("sources",),
    "simulators": ("encoders", "sources"),
    "envs": ("simulators", "encoders"),
    "agents": ("encoders.state", "sources.logs"),
    "evaluation": ("agents.base", "encoders.state", "sources.logs"),
    "experiments": OURS,
}
HEAVY = ("transformers", "stable_baselines3", "sklearn", "matplotlib", "tokenizers", "implicit")
HARMLESS = ("default_rng", "Generator", "SeedSequence", "get_state", "getstate",
            "set_state", "setstate")  # fmt: skip
TORCH_DRAWS = ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial")
TENSOR_DRAWS = ("exponential_", "uniform_", "normal_", "random_", "bernoulli_", "cauchy_",
                "geometric_", "log_normal_")  # fmt: skip
FILES = [path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that is imported anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the package's name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def crossings(package: str, tree: ast.AST) -> list[str]:
    """Imports of ours that the arrows do not allow."""
    allowed = (package, *MAY_IMPORT[package])
    ours = [name for name in imports(tree) if name.split(".")[0] in OURS]
    return [n for n in ours if not any(n == a or n.startswith(f"{a}.") for a in allowed)]


def dotted(node: ast.expr) -> str:
    """`np.random.rand` of the expression; "" for anything but names and attributes."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def global_draws(tree: ast.AST) -> list[str]:
    """Calls that draw from, or seed, a generator that nobody passed in."""
    stdlib = any(isinstance(n, ast.Import) and any(a.name == "random" for a in n.names)
                 for n in ast.walk(tree))  # fmt: skip
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted(node.func), {k.arg for k in node.keywords}
        first, _, last = name.rpartition(".")
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if (
            (first in ("np.random", "numpy.random") and last not in HARMLESS)
            or (stdlib and first == "random" and last not in HARMLESS)
            or name in ("torch.manual_seed", "torch.seed", "torch.cuda.manual_seed")
            or (first == "torch" and last in TORCH_DRAWS and "generator" not in given)
            or (first == "torch" and last in ("rand_like", "randn_like", "randint_like"))
            or (method in TENSOR_DRAWS and "generator" not in given)
            or (last == "default_rng" and not node.args and not node.keywords)
        ):
            found.append(f"line {node.lineno}: {name or method}")
    return found


def heavy_at_the_top(tree: ast.Module) -> list[str]:
    """Heavy libraries imported when the module is, not when they are needed."""
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return [n for node in top for n in imports(node) if n.split(".")[0] in HEAVY]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert crossings(package, ast.parse(path.read_text())) == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_number_is_drawn_from_a_global_generator(path: Path) -> None:
    assert global_draws(ast.parse(path.read_text())) == []


# subclasses of a library's own classes have to import it: agents/sb3.py imports these when asked
LAZY = ("agents/sb3_env.py", "agents/sb3_model.py", "agents/sb3_policies.py")


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p) not in LAZY], ids=name_of)
def test_heavy_libraries_are_imported_where_they_are_needed(path: Path) -> None:
    assert heavy_at_the_top(ast.parse(path.read_text())) == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 400
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    lengths = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    assert {name: n for name, n in lengths.items() if n >= 60} == {}


@pytest.mark.parametrize("package", OURS)
def test_every_package_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
    assert (ROOT / package / "__init__.py").exists()


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("agents", "from envs.recommend import RecommendEnv"),
        ("agents", "def f():\n    import simulators.base"),
        ("agents", "from encoders import text"),
        ("evaluation", "from agents.dqn import DQN"),
        ("evaluation", "from simulators.base import Catalog"),
        ("encoders", "from simulators import base"),
        ("sources", "import encoders.state"),
        ("envs", "from agents.base import Agent"),
    ],
)
def test_a_wrong_arrow_is_seen(package: str, line: str) -> None:
    assert len(crossings(package, ast.parse(line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "np.random.rand(3)",
        "numpy.random.seed(0)",
        "import random\nrandom.shuffle(x)",
        "torch.manual_seed(0)",
        "torch.randn(3)",
        "torch.rand_like(x)",
        "x.exponential_()",
        "np.random.default_rng()",
    ],
)
def test_a_global_draw_is_seen(line: str) -> None:
    assert len(global_draws(ast.parse(line))) == 1


@pytest.mark.parametrize(
    "line",
    ["np.random.default_rng(3)", "torch.randn(3, generator=g)", "rng.normal()", "agents.random.x()",
     "torch.Generator().manual_seed(0)", "x.exponential_(generator=g)"],
)  # fmt: skip
def test_a_passed_in_generator_is_fine(line: str) -> None:
    assert global_draws(ast.parse(line)) == []
