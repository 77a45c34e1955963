"""Encoding: texts are as long as is said, the limit has the model's products, rows are whole."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from experiments import encode_speed
from experiments.bench_rows import KEYS
from experiments.encode_speed import Ready, bare, imports, known


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    return Ready(tmp_path_factory.mktemp("cache"), "cpu", "fp32")


def test_texts_have_thirty_word_pieces_on_average(ready):
    texts = ready.texts(300, 0)
    assert len(set(texts)) == 300
    assert 28.5 < ready.tokens(texts) / 300 < 31.5


def test_the_limit_has_the_products_of_the_model(ready):
    texts = ready.texts(200, 0)
    with FlopCounterMode(display=False) as ours:
        assert ready.work(texts)() == 200
    work = bare(ready, texts, "fp32", 0)
    with FlopCounterMode(display=False) as limit:
        counted = work()
    # attention and padding are left out of the limit: it is no easier
    assert 0.85 < limit.get_total_flops() / counted / (ours.get_total_flops() / 200) < 1.0


def test_what_is_known_is_read_and_transformers_stays_out(tmp_path):
    found = known(tmp_path, 1, 0.05, True)
    assert found["absolute"]
    assert found["limit"] == 1e5
    second = imports(tmp_path)
    assert second["product"] == 1.0


def test_a_missing_peer_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(encode_speed, "installed", lambda module: False)
    found = encode_speed.fresh(tmp_path, 1, 0.01, 0, True, "cpu")
    assert set(found) == set(KEYS)
    assert found["peer"] is None
    assert found["peer_name"].startswith("sentence-transformers")
    assert (found["limit_goal"], found["peer_goal"]) == (0.6, 1.8)
