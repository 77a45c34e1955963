"""Content: vectors by hand, what must not matter, and items that nobody had."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from torch.nn.functional import normalize

from agents.content import BELOW, ContentKNN, directions, tfidf
from agents.interactions import Interactions, history, popular_ranks
from experiments import cold_items
from experiments.cold_items import cold_table, mean_row, only, ranked
from sources.logs import Logs, Roles

COUNTS = csr_matrix(np.array([[1.0, 2.0, 0.0, 1.0], [0.0, 1.0, 3.0, 0.0]]))
VECTORS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]])


def content(vectors=VECTORS, **knobs):
    return ContentKNN(Interactions.of(COUNTS, vectors=vectors), **knobs)


def test_plain_scores_are_cosines_by_hand():
    scores = content(centred=False).scores(history([[0]]))
    assert scores[0].tolist() == pytest.approx([1.0, 0.0, -1.0, 0.6], abs=1e-5)
    both = content(centred=False).scores(history([[0, 1]]))
    half = 0.5**0.5
    assert both[0].tolist() == pytest.approx([half, half, -half, 1.4 * half], abs=1e-5)


def test_counts_weigh_in_the_mean():
    obs = history([[0, 1]], count=[[3.0, 1.0]])
    plain = content(centred=False, weight="count").scores(obs)[0]
    assert float(plain[3]) == pytest.approx((3 * 0.6 + 0.8) / 10**0.5, abs=1e-5)
    log = content(centred=False, weight="log").scores(obs)[0]
    assert float(log[3]) == pytest.approx((2 * 0.6 + 0.8) / 5**0.5, abs=1e-5)
    binary = content(centred=False, weight="binary").scores(obs)
    assert torch.equal(binary, content(centred=False, weight="binary").scores(history([[0, 1]])))


def test_centring_takes_out_what_all_texts_share():
    generator = torch.Generator().manual_seed(0)
    own = normalize(torch.randn(50, 8, generator=generator), dim=1)
    unit, present = directions(torch.cat([own, torch.full((50, 1), 5.0)], dim=1), centred=True)
    assert present.all()
    assert unit.mean(dim=0).norm() < 0.1
    plain, _ = directions(torch.cat([own, torch.full((50, 1), 5.0)], dim=1), centred=False)
    assert plain.mean(dim=0).norm() > 0.9


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(1e-30, 1e30), min_size=4, max_size=4), st.booleans())
def test_the_length_of_vectors_changes_nothing(lengths, centred):
    scaled = VECTORS * torch.tensor(lengths)[:, None]
    obs = history([[0], [1, 2], []])
    torch.testing.assert_close(
        content(scaled, centred=centred).scores(obs), content(centred=centred).scores(obs),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@settings(deadline=None, max_examples=20)
@given(st.floats(0.0, 6.3), st.booleans())
def test_turning_all_vectors_changes_nothing(angle, centred):
    turn = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).float()
    obs = history([[0], [1, 2]])
    torch.testing.assert_close(
        content(VECTORS @ turn, centred=centred).scores(obs),
        content(centred=centred).scores(obs), rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_items_without_text_come_last_the_popular_first():
    vectors = torch.cat([VECTORS[:2], torch.zeros(2, 2)])
    model = content(vectors, centred=False)
    scores = model.scores(history([[0, 2]]))[0]
    assert scores.argsort(descending=True).tolist() == [0, 1, 2, 3]  # 2 was had 3 times, 3 once
    assert scores[2:].max() < BELOW + 1e-3 < -1.0
    torch.testing.assert_close(scores, model.scores(history([[0]]))[0])  # 2 says nothing


def test_histories_without_items_or_without_texts_get_popularity():
    model = content(torch.cat([VECTORS[:3], torch.zeros(1, 2)]), seed=4)
    ranks = popular_ranks(Interactions.of(COUNTS), 4)
    assert torch.equal(model.scores(history([[], [3]])), ranks.expand(2, -1))


def test_no_text_at_all_is_popularity_and_finite():
    model = content(torch.zeros(4, 2))
    ranks = popular_ranks(Interactions.of(COUNTS), 0)
    assert torch.equal(model.scores(history([[0, 1]]))[0], ranks)


def test_a_row_is_the_same_alone_and_in_a_batch():
    rows = [[0], [1, 2, 3], [], [3, 0]]
    together = content().scores(history(rows))
    alone = torch.cat([content().scores(history([row])) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_saved_model_scores_the_same_after_loading(tmp_path):
    torch.save(content().state_dict(), tmp_path / "model")
    loaded = content(VECTORS.flip(0), seed=3)
    loaded.load_state_dict(torch.load(tmp_path / "model", weights_only=True))
    obs = history([[0], [], [1, 2]])
    assert torch.equal(loaded.scores(obs), content().scores(obs))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ContentKNN(COUNTS), "ContentKNN needs the vectors of the items' texts"),
        (lambda: content(VECTORS * torch.nan), "NaN or infinity: encode"),
        (lambda: content(torch.ones(4)), r"\(N, D\), got \(4,\)"),
        (lambda: content(torch.ones(3, 2)), "a row for each of 4 items"),
        (lambda: content(weight="sum"), "weight must be one of"),
        (lambda: tfidf(["a", "", "!?"]), "none of 3 has"),
        (lambda: tfidf(["fine", None]), "got NoneType in row 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_tfidf_finds_texts_with_rare_words_in_common():
    vectors = tfidf(["red apple juice", "green apple juice", "red wine", "", "toilet paper"])
    alike = vectors @ vectors.T
    assert alike[0].argsort(descending=True)[:3].tolist() == [0, 1, 2]
    assert alike[0, 4] == 0
    assert vectors[3].norm() == 0
    assert vectors.norm(dim=1)[[0, 1, 2, 4]].tolist() == pytest.approx([1.0] * 4)


def shop(users=60, seed=0, texts=True):
    """A log in which users buy either fruit or tools, and a text says which an item is."""
    rng = np.random.default_rng(seed)
    kind = np.arange(100) % 2
    items = pd.DataFrame({
        "item": np.arange(100),
        "text": [f"{('fruit', 'tool')[k]} number{i}" if texts else "" for i, k in enumerate(kind)],
    })  # fmt: skip
    rows = [
        (u, i) for u in range(users) for i in rng.choice(np.flatnonzero(kind == u % 2), 12, False)
    ]
    events = pd.DataFrame(rows, columns=["user", "item"])
    events["time"] = pd.Timestamp("2020-01-01", tz="UTC") + pd.to_timedelta(
        np.arange(len(events)), "h"
    )
    events["behaviour"], events["value"] = "buy", 1.0
    return Logs.create(events, items, roles=Roles(item_text=("text",)))


def by_kind(texts):
    """Vectors with a large common part, as language models have."""
    return torch.tensor([[9.0, 1.0] if text.startswith("fruit") else [9.0, -1.0] for text in texts])


def test_texts_find_items_that_nobody_had():
    rows = {row["model"]: row for row in cold_table(shop(), by_kind, seeds=3)}
    oracle = "oracle: popularity among hidden"
    assert list(rows) == ["random", "tfidf", "bert plain", "bert centred", oracle]
    assert rows["bert centred"]["items"] == 20
    for name in ("tfidf", "bert plain", "bert centred"):
        assert rows[name]["recall@10"] > rows["random"]["recall@10"] + 0.3
    assert rows["random"]["recall@10"] == pytest.approx(0.5, abs=0.1)  # 10 of 20 are shown


def test_cold_metrics_by_hand():
    user, item = np.array([0, 0, 1, 1, 2]), np.array([0, 20, 1, 2, 21])
    past = Interactions(user, item, np.zeros(5), np.ones(5), 3, 22)
    hidden = np.arange(22) >= 5
    rest, kept_out = only(past, ~hidden), only(past, hidden)
    first = torch.zeros(22)
    first[[0, 1, 20]] = torch.tensor([9.0, 8.0, 7.0])  # 0 and 1 are not hidden: not ranked
    result = ranked(lambda rows: first.expand(len(rows), -1), rest, kept_out, hidden)
    # User 1 had no hidden item and user 2 nothing else: user 0 is left, whose 20 comes first.
    assert result == {"recall": 1.0, "ndcg": 1.0, "users": 1.0, "items": 17.0}
    first[5:8] = torch.tensor([12.0, 11.0, 10.0])
    result = ranked(lambda rows: first.expand(len(rows), -1), rest, kept_out, hidden)
    assert result["ndcg"] == pytest.approx(1.0 / np.log2(5.0))


def test_a_mean_row_has_the_spread_between_seeds():
    row = {"recall": 0.1, "ndcg": 0.2, "users": 7.0, "items": 3.0}
    both = mean_row("m", [row, {**row, "recall": 0.3}])
    assert both["recall@10"] == pytest.approx(0.2)
    assert both["recall_sd"] == pytest.approx(0.02**0.5)


def test_a_log_without_texts_or_without_seeds_is_refused():
    with pytest.raises(ValueError, match="none has one"):
        cold_table(shop(texts=False), by_kind)
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        cold_table(shop(), by_kind, seeds=0)


def test_nobody_is_fitted_on_a_hidden_item(monkeypatch):
    rng = np.random.default_rng(0)
    rows = [(u, i, pd.Timestamp("2024-01-01") + pd.Timedelta(hours=h), "buy", 1.0)
            for u in range(20) for h, i in enumerate(rng.permutation(15)[:8])]  # fmt: skip
    events = pd.DataFrame(rows, columns=["user", "item", "time", "behaviour", "value"])
    items = pd.DataFrame({"item": range(15), "text": [f"word{i} thing" for i in range(15)]})
    logs = Logs.create(events, items, roles=Roles(item_text=("text",)))
    seen = []

    def looked_at(rest, kept_out, *given):
        seen.append((set(rest.item.tolist()), set(kept_out.item.tolist())))
        return real(rest, kept_out, *given)

    real = cold_items.cold_models
    monkeypatch.setattr(cold_items, "cold_models", looked_at)
    cold_items.cold_table(logs, lambda texts: torch.eye(len(texts)), seeds=2)
    assert len(seen) == 2
    assert all(fitted.isdisjoint(hidden) and hidden for fitted, hidden in seen)
