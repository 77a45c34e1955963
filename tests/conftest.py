"""One thread, a cache of their own and nothing left in the checkout, for all tests."""

import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

STORE = (
    tempfile.TemporaryDirectory()
)  # gone when the tests end; hypothesis writes while it collects
set_hypothesis_home_dir(STORE.name)
settings.register_profile("recplay", database=None, deadline=None, derandomize=True)
settings.load_profile("recplay")


@pytest.fixture(autouse=True, scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests off the user's cache and off each other's cores."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECPLAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def shop():
    """The log of tests/synthetic.py."""
    from synthetic import load

    return load()


@pytest.fixture(scope="session")
def shelf(shop, alone):
    """Its catalogue at a cut of 80 %, with hashed texts instead of BERT."""
    from synthetic import HashedTexts

    import simulators.catalog

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulators.catalog, "TextEncoder", HashedTexts)
        return simulators.catalog.catalog_from_logs(shop, size=60, cut=0.8, dim=8)


@pytest.fixture(scope="session")
def fitted(shop, shelf):
    """Users fitted to it."""
    from simulators.base import SimSpec
    from simulators.fitted import FittedSimulator

    return FittedSimulator.fit(SimSpec(shop, shelf, seed=3), window=120.0, epochs=10, hidden=16)
