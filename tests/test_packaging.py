"""The wheel holds the packages and their configuration and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"sources", "encoders", "simulators", "envs", "agents", "evaluation", "experiments"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in the wheel, built from a copy: building writes beside the sources."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "README.md").write_text("# Recplay\n")
    ignore = shutil.ignore_patterns("__pycache__")
    for package in (*OURS, "tests"):
        shutil.copytree(ROOT / package, copy / package, ignore=ignore)
    build = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("recplay-*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_holds_every_configuration(wheel: list[str]) -> None:
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "experiments" / "conf").rglob("*.yaml")}
    assert there
    assert there <= set(wheel)


def test_the_wheel_holds_every_module_and_its_type_marker(wheel: list[str]) -> None:
    modules = {str(p.relative_to(ROOT)) for o in OURS for p in (ROOT / o).rglob("*.py")}
    assert modules | {f"{o}/py.typed" for o in OURS} <= set(wheel)


def test_the_wheel_holds_nothing_but_ours(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {t for t in tops if not t.endswith(".dist-info")} == OURS
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_no_other_distribution_brings_an_agents_package() -> None:
    try:
        distribution("recplay")
    except PackageNotFoundError:
        pytest.skip("recplay is not installed here")
    assert set(packages_distributions()["agents"]) == {"recplay"}
