"""Item sources and their fusion."""

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from encoders.items import ItemEncoder, Source, interactions, item_sources, similarity_loss
from sources.logs import Logs, Roles

ITEMS, TOPICS, HOUSEHOLDS, DAYS = 120, 6, 60, 100
START = pd.Timestamp("2020-01-01")
AS_OF = START + pd.Timedelta(days=80)


def shop(seed: int = 0) -> tuple[Logs, np.ndarray, np.ndarray]:
    """A log in which a household buys from its topic, with ids (N,) and the topic of each item."""
    g = np.random.default_rng(seed)
    topic = np.arange(ITEMS) % TOPICS
    rows = []
    for user in range(HOUSEHOLDS):
        item = np.flatnonzero(topic == user % TOPICS)
        stray = g.integers(0, ITEMS, 4)
        for i in [*g.choice(item, 14), *stray]:
            moment = START + pd.Timedelta(days=float(g.integers(0, DAYS)))
            rows.append((user, f"p{i:03d}", moment, "buy", 1.0 + i % 5, 0.1 * (i % 3), len(rows)))
    names = ["user", "item", "time", "behaviour", "price", "discount", "basket"]
    events = pd.DataFrame(rows, columns=names)
    events["value"] = events["price"]
    ids = np.array([f"p{i:03d}" for i in range(ITEMS)])
    shelf = np.where(np.arange(ITEMS) % 7 == 0, None, [f"shelf {t}" for t in topic // 2])
    items = pd.DataFrame({"item": ids, "shelf": shelf, "size": np.arange(ITEMS) % 11.0})
    items.loc[3, "shelf"], items.loc[5, "size"] = "seen once", np.nan
    roles = Roles(item_category=("shelf",), item_number=("size",))
    return Logs.create(events, items, roles=roles), ids, topic


def topical_text(topic: np.ndarray, width: int = 48) -> tuple[Tensor, Tensor]:
    """Unit vectors (N, width) that tell the topic, among noise and a common direction."""
    g = torch.Generator().manual_seed(3)
    directions = torch.randn(topic.max() + 1, width, generator=g)
    noise = torch.randn(len(topic), width, generator=g)
    vectors = directions[torch.from_numpy(topic)] + 1.5 * noise + 4.0
    return torch.nn.functional.normalize(vectors, dim=1), torch.ones(len(topic), dtype=torch.bool)


@pytest.fixture(scope="module")
def world() -> tuple[dict[str, Source], np.ndarray]:
    logs, ids, topic = shop()
    return item_sources(logs, ids, AS_OF, topical_text(topic), behaviour_dim=16), topic


@pytest.fixture(scope="module")
def fitted(world) -> ItemEncoder:
    return ItemEncoder.fit(world[0], dim=16, steps=120)


def without(sources: dict[str, Source], name: str, rows: Tensor | None = None) -> dict[str, Source]:
    """The same sources with one hidden, for all items or for some rows."""
    present = sources[name].present.clone()
    present[slice(None) if rows is None else rows] = False
    return {**sources, name: replace(sources[name], present=present)}


def equal(one: Source, other: Source) -> bool:
    return torch.equal(one.values, other.values) and torch.equal(one.present, other.present)


def test_interactions_count_the_purchases_of_catalogue_items():
    times = pd.date_range("2020-01-01", periods=6, freq="D")
    events = pd.DataFrame(
        {
            "user": ["b", "a", "a", "a", "c", "b"],
            "item": [2, 1, 1, 3, 9, 1],
            "time": times,
            "behaviour": ["buy", "buy", "buy", "click", "buy", "buy"],
            "value": 1.0,
        }
    )
    counts, users = interactions(Logs.create(events), np.array([3, 1, 2]))
    assert users.tolist() == ["a", "b"]  # c bought nothing of the catalogue
    assert counts.dtype == np.float32
    assert counts.toarray().tolist() == [[0.0, 2.0, 0.0], [0.0, 1.0, 1.0]]


def test_nothing_after_the_cut_reaches_the_sources():
    logs, ids, topic = shop()
    late = (logs.events["time"] >= AS_OF).to_numpy()
    assert late.sum() > 100
    events = logs.events.copy()
    g = np.random.default_rng(9)
    for column in ("user", "item", "value", "price", "discount"):
        events.loc[late, column] = g.choice(logs.events[column].to_numpy(), late.sum())
    other = replace(logs, events=events)
    text = topical_text(topic)
    before, after = (item_sources(x, ids, AS_OF, text, behaviour_dim=16) for x in (logs, other))
    assert all(equal(before[name], after[name]) for name in before)
    early = item_sources(other, ids, AS_OF + pd.Timedelta(days=10), text, behaviour_dim=16)
    assert not equal(early["numbers"], before["numbers"])  # the shuffle would have been seen


def test_the_sources_are_those_declared(world):
    sources, _ = world
    assert list(sources) == ["text", "shelf", "size", "numbers", "behaviour"]
    assert all(len(s.values) == len(s.present) == ITEMS for s in sources.values())


def test_rare_categories_are_pooled_and_missing_ones_absent(world):
    shelf = world[0]["shelf"]
    assert shelf.cardinality == 4  # three shelves and "other"
    assert shelf.values[3] == 3  # "seen once"
    assert shelf.present[3]
    assert torch.equal(~shelf.present, torch.arange(ITEMS) % 7 == 0)


def test_a_number_that_is_not_known_is_absent_not_average(world):
    size = world[0]["size"]
    assert (~size.present).nonzero().flatten().tolist() == [5]
    known = size.values[size.present]
    assert known.mean().abs() < 1e-6
    assert known.std(correction=0) == pytest.approx(1.0, abs=1e-5)


def test_price_discount_and_popularity_by_period_by_hand():
    def event(item: str, day: float, price: float, discount: float) -> tuple:
        return ("u", item, START + pd.Timedelta(days=day), "buy", price, price, discount)

    rows = [
        event("a", 0, 1.0, 0.0), event("a", 1, 4.0, 0.5), event("a", 2, 2.0, 0.1),
        event("b", 5, 8.0, 0.0), event("b", 9, 8.0, 0.0), event("a", 30, 99.0, 0.9),
    ]  # fmt: skip
    names = ["user", "item", "time", "behaviour", "value", "price", "discount"]
    logs = Logs.create(pd.DataFrame(rows, columns=names), pd.DataFrame({"item": ["a", "b", "c"]}))
    cut = START + pd.Timedelta(days=10)
    numbers = item_sources(logs, np.array(["b", "a", "c"]), cut, None, periods=2)["numbers"]
    assert numbers.present.tolist() == [True, True, False]  # c was never sold: it has no price
    # Standardising two rows leaves signs: b is dearer, less discounted, sold later.
    assert numbers.values.sign().tolist() == [[1, -1, -1, 1], [-1, 1, 1, -1], [0, 0, 0, 0]]


def test_behaviour_is_absent_below_five_buyers_and_near_within_a_topic(world):
    sources, topic = world
    logs, ids, _ = shop()
    counts, _ = interactions(logs.before(AS_OF), ids)
    buyers = torch.from_numpy(np.bincount(counts.indices, minlength=ITEMS))
    behaviour = sources["behaviour"]
    assert torch.equal(behaviour.present, buyers >= 5)
    assert 0 < (~behaviour.present).sum() < ITEMS
    kept = behaviour.values[behaviour.present]
    same = torch.from_numpy(topic)[behaviour.present]
    cosine = kept @ kept.T
    pair = same[:, None] == same[None]
    assert cosine[pair].mean() > cosine[~pair].mean() + 0.3


def test_singular_vectors_are_the_exact_ones():
    from encoders.items import _truncated_svd

    g = np.random.default_rng(0)
    matrix = g.standard_normal((60, 8)) @ np.diag(2.0 ** -np.arange(8)) @ g.standard_normal((8, 40))
    right, values = _truncated_svd(matrix, 5)
    exact = np.linalg.svd(matrix)
    np.testing.assert_allclose(values, exact[1][:5], rtol=1e-6)
    np.testing.assert_allclose(np.abs(np.diag(right.T @ exact[2][:5].T)), 1.0, rtol=1e-6)


def test_similarity_loss_by_hand():
    fused = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # cosine 0
    assert similarity_loss(fused, torch.tensor([[1.0], [5.0]])) == 1.0  # wanted 1
    assert similarity_loss(fused, torch.tensor([[1.0, 0.0], [0.0, 5.0]])) == 0.0


def neighbours_of_the_same_topic(vectors: Tensor, topic: np.ndarray, rows: Tensor) -> float:
    cosine = (vectors @ vectors.T).fill_diagonal_(-torch.inf)
    nearest = cosine[rows].topk(5, dim=1).indices
    label = torch.from_numpy(topic)
    return (label[nearest] == label[rows][:, None]).float().mean().item()


def test_items_nobody_bought_find_their_topic_through_text(world):
    sources, topic = world
    held_out = torch.arange(0, ITEMS, 5)
    cold = without(sources, "behaviour", held_out)
    encoder = ItemEncoder.fit(cold, dim=16, steps=200)
    learned = neighbours_of_the_same_topic(encoder.vectors(cold), topic, held_out)
    unfitted = ItemEncoder.fit(cold, dim=16, steps=0)
    random = neighbours_of_the_same_topic(unfitted.vectors(cold), topic, held_out)
    assert learned > 0.6  # chance: 1 / 6
    assert learned > random + 0.1  # it is the fit that does it


def test_fitted_vectors_are_as_alike_as_what_is_bought_together(world, fitted):
    sources, _ = world
    rows = sources["behaviour"].present
    target = sources["behaviour"].values[rows]
    vectors = fitted.vectors(sources)[rows]
    wanted, got = (target @ target.T).flatten(), (vectors @ vectors.T).flatten()
    assert torch.corrcoef(torch.stack([wanted, got]))[0, 1] > 0.8


def test_vectors_are_centred_and_of_unit_length(world, fitted):
    vectors = fitted.vectors(world[0])
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(ITEMS))
    assert vectors.mean(dim=0).norm() < 0.15


@pytest.mark.parametrize("name", ["text", "shelf", "size", "numbers", "behaviour"])
def test_without_any_one_source_vectors_are_whole_and_differ_from_average(world, fitted, name):
    sources, _ = world
    vectors = fitted.vectors(without(sources, name))
    assert vectors.isfinite().all()
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(ITEMS))
    mean_item = dict(sources)
    if sources[name].kind == "vector":
        everyone = torch.ones(ITEMS, dtype=torch.bool)
        zero = replace(sources[name], values=sources[name].values * 0.0, present=everyone)
        mean_item[name] = zero
        assert not torch.allclose(fitted.vectors(mean_item), vectors, atol=1e-3)


def test_items_of_which_nothing_is_known_still_have_a_vector(world, fitted):
    sources, _ = world
    blank = sources
    for name in sources:
        blank = without(blank, name, torch.tensor([4]))
    one = fitted.vectors(blank)
    assert one[4].norm() == pytest.approx(1.0)
    for name in sources:
        blank = without(blank, name)
    torch.testing.assert_close(fitted.vectors(blank).norm(dim=1), torch.ones(ITEMS))
    unfitted = ItemEncoder.fit(blank, dim=8)
    torch.testing.assert_close(unfitted.vectors(blank).norm(dim=1), torch.ones(ITEMS))


def test_what_lies_in_absent_rows_does_not_matter(world, fitted):
    sources, _ = world
    dirty = {
        name: replace(
            s,
            values=s.values.where(s.present[:, None], torch.nan)
            if s.kind == "vector"
            else s.values.where(s.present, -7),
        )
        for name, s in sources.items()
    }
    assert torch.equal(fitted.vectors(dirty), fitted.vectors(sources))
    assert torch.equal(ItemEncoder.fit(dirty, steps=3).mean, ItemEncoder.fit(sources, steps=3).mean)


def test_an_item_keeps_its_vector_whatever_else_is_encoded(world, fitted):
    sources, _ = world
    some = {
        n: replace(s, values=s.values[10:20], present=s.present[10:20]) for n, s in sources.items()
    }
    torch.testing.assert_close(
        fitted.vectors(some), fitted.vectors(sources)[10:20], rtol=0, atol=1e-5
    )


def test_the_seed_decides_every_bit_and_the_global_generator_is_left_alone(world):
    sources, _ = world
    state = torch.random.get_rng_state()
    one, two, other = (ItemEncoder.fit(sources, steps=20, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.vectors(sources), two.vectors(sources))
    assert not torch.equal(one.vectors(sources), other.vectors(sources))


def test_gates_say_what_each_source_contributes(world, fitted):
    gates = fitted.gates(world[0])
    assert list(gates) == list(world[0])
    assert sum(gates.values()) == pytest.approx(1.0, abs=1e-5)
    assert (
        gates["behaviour"] > gates["size"]
    )  # one tells what is bought together, the other does not


def test_nan_is_refused_with_source_and_rows(world):
    sources, _ = world
    values = sources["numbers"].values.clone()
    row = int(sources["numbers"].present.nonzero()[4])
    values[row, 1] = torch.nan
    bad = {**sources, "numbers": replace(sources["numbers"], values=values)}
    with pytest.raises(ValueError, match=rf"'numbers' is NaN or infinite in 1 rows.*\[{row}\]"):
        ItemEncoder.fit(bad)
    logs, ids, topic = shop()
    vectors, present = topical_text(topic)
    vectors[[2, 8]] = torch.nan
    with pytest.raises(ValueError, match=r"'text' is NaN or infinite in 2 rows.*\[2, 8\]"):
        item_sources(logs, ids, AS_OF, (vectors, present))


def test_what_cannot_be_encoded_is_refused_in_plain_words(world, fitted):
    sources, _ = world
    logs, ids, topic = shop()
    with pytest.raises(ValueError, match="no events before as_of"):
        item_sources(logs, ids, START, None)
    with pytest.raises(ValueError, match="ids must be in the items table, got \\['nothing'\\]"):
        item_sources(logs, np.array(["p001", "nothing"]), AS_OF, None)
    with pytest.raises(ValueError, match="ids must be distinct, got 1 twice"):
        item_sources(logs, np.array(["p001", "p001"]), AS_OF, None)
    with pytest.raises(ValueError, match="a row for each of 120 ids, got 7"):
        item_sources(logs, ids, AS_OF, topical_text(topic[:7]))
    renamed = replace(logs, roles=Roles(item_number=("text",)))
    with pytest.raises(ValueError, match=r"\['text'\] are named like sources of ours"):
        item_sources(renamed, ids, AS_OF, None)
    with pytest.raises(ValueError, match="periods must be at least 1"):
        item_sources(logs, ids, AS_OF, None, periods=0)
    with pytest.raises(ValueError, match="at least one source"):
        ItemEncoder.fit({})
    with pytest.raises(ValueError, match="sources must be"):
        fitted.vectors({"text": sources["text"]})
    narrow = replace(sources["text"], values=sources["text"].values[:, :4])
    with pytest.raises(ValueError, match="'text' must have width 48, got 4"):
        fitted.vectors({**sources, "text": narrow})
    high = replace(sources["shelf"], values=sources["shelf"].values + 4)
    with pytest.raises(ValueError, match=r"'shelf' is outside \[0, 4\)"):
        fitted.vectors({**sources, "shelf": high})


def test_a_log_without_prices_or_categories_is_enough():
    logs, ids, _ = shop()
    bare = replace(logs, events=logs.events.drop(columns=["price", "discount"]), roles=Roles())
    sources = item_sources(bare, ids, AS_OF, None, behaviour_dim=8)
    assert list(sources) == ["numbers", "behaviour"]
    assert sources["numbers"].values.shape == (ITEMS, 4)
    assert sources["numbers"].present.all()  # popularity is known of all: never sold is zero
    vectors = ItemEncoder.fit(sources, dim=8, steps=5).vectors(sources)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(ITEMS))


def test_two_thousand_items_are_fitted_in_seconds():
    g = torch.Generator().manual_seed(0)
    n = 2000
    present = torch.ones(n, dtype=torch.bool)
    unit = torch.nn.functional.normalize
    sources = {
        "text": Source("vector", unit(torch.randn(n, 384, generator=g), dim=1), present),
        "kind": Source("category", torch.randint(0, 50, (n,), generator=g), present, 50),
        "numbers": Source("vector", torch.randn(n, 6, generator=g), present),
        "behaviour": Source("vector", unit(torch.randn(n, 64, generator=g), dim=1), present),
    }
    began = time.process_time()
    ItemEncoder.fit(sources, steps=30)
    assert time.process_time() - began < 2.0  # a tenth of the default: far below what it costs
