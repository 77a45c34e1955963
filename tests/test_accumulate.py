"""Mergeable sums: merging, numerics, clusters, paired differences."""

import numpy as np
import pytest

from evaluation.accumulate import BLOCKS, Accumulator, block_sums
from evaluation.estimators import contributions


def batch(seed=0, n=1000, **more):
    rng = np.random.default_rng(seed)
    return {"reward": rng.normal(size=n), "weight": rng.exponential(size=n),
            "q_logged": rng.normal(size=n), "value": rng.normal(size=n), **more}  # fmt: skip


def filled(*batches, **options):
    acc = Accumulator(**options)
    for each in batches:
        acc.update(each)
    return acc


def assert_same(one, two):
    for key, estimate in one.result().items():
        other = two.result()[key]
        assert other.value == pytest.approx(estimate.value, rel=1e-12)
        assert other.std_error == pytest.approx(estimate.std_error, rel=1e-10)
        assert other.n == estimate.n


SPEC = ["ips", "snips", "dr", "sndr", "dros", "switch_dr(lam=2)"]


def test_merging_is_the_same_whatever_the_brackets_and_the_order():
    parts = [filled(batch(seed), estimators=SPEC) for seed in range(3)]
    left, right = (parts[0] + parts[1]) + parts[2], parts[0] + (parts[1] + parts[2])
    assert_same(left, right)
    assert_same(left, parts[2] + parts[0] + parts[1])
    assert_same(left, filled(*(batch(seed) for seed in range(3)), estimators=SPEC))


def test_blocks_do_not_depend_on_where_batches_end():
    whole = batch(n=5000)
    pieces = [{k: v[s] for k, v in whole.items()}
              for s in (slice(0, 7), slice(7, 3000), slice(3000, 5000))]  # fmt: skip
    one, many = filled(whole, estimators=SPEC), filled(*pieces, estimators=SPEC)
    for key in one.sums:
        assert many.sums[key].blocks == pytest.approx(one.sums[key].blocks, abs=1e-9)
        assert (many.sums[key].counts == one.sums[key].counts).all()


def test_block_sums_start_where_the_last_batch_ended():
    got = block_sums(np.ones((1, 3)), BLOCKS - 1)
    assert np.flatnonzero(got[0]).tolist() == [0, 1, BLOCKS - 1]


def test_the_error_of_a_mean_is_its_standard_error():
    given = batch()
    found = filled(given, estimators=["dr"]).result()["policy", "dr", None]
    values = contributions("dr", **given)
    assert found.std_error == pytest.approx(values.std(ddof=1) / len(values) ** 0.5, rel=1e-12)


def test_a_large_offset_cancels_nothing():
    given = batch()
    moved = {**given, "reward": given["reward"] + 1e9, "weight": np.ones(1000)}
    still = {**given, "weight": np.ones(1000)}
    one = filled(moved, moved, estimators=["ips"]).result()["policy", "ips", None]
    two = filled(still, still, estimators=["ips"]).result()["policy", "ips", None]
    assert one.std_error == pytest.approx(two.std_error, rel=1e-6)


def test_weights_of_a_million_and_float32_columns_keep_their_digits():
    rng = np.random.default_rng(0)
    weight = np.where(rng.random(100_000) < 1e-3, 1e6, 1e-3).astype(np.float32)
    reward = rng.random(100_000).astype(np.float32)
    found = filled({"weight": weight, "reward": reward}, estimators=["ips"]).result()
    want = (weight.astype(float) * reward.astype(float)).mean()
    assert found["policy", "ips", None].value == pytest.approx(want, rel=1e-12)


def test_clusters_of_equal_rows_have_the_error_of_one_row_each():
    given = batch(n=300)
    alone = filled(given, estimators=["dr", "snips"]).result()
    doubled = {k: np.repeat(v, 4) for k, v in given.items()} | {"cluster": np.repeat(range(300), 4)}
    robust = filled(doubled, estimators=["dr", "snips"], clustered=True).result()
    naive = filled(doubled, estimators=["dr", "snips"]).result()
    for name in ("dr", "snips"):
        want = alone["policy", name, None].std_error
        # two clusters may share a block: the same expectation, a little more noise
        assert robust["policy", name, None].std_error == pytest.approx(want, rel=0.08)
        assert naive["policy", name, None].std_error == pytest.approx(want / 2, rel=0.01)


def test_a_paired_difference_is_tighter_than_two_separate_intervals():
    rng = np.random.default_rng(0)
    reward, weight = rng.normal(size=2000) + 5.0, rng.exponential(size=2000)
    weights = {"a": weight, "b": weight * 1.01}
    acc = filled({"reward": reward, "weight": weights}, policies=["a", "b"], estimators=["ips"])
    gap, error = acc.difference("b", "a", "ips", None)
    values = 0.01 * weight * reward
    assert gap == pytest.approx(values.mean(), rel=1e-9)
    assert error == pytest.approx(values.std(ddof=1) / 2000**0.5, rel=1e-9)


def test_a_difference_to_itself_is_nothing():
    acc = filled(batch(), policies=["a", "b"], estimators=["snips", "sndr"])
    for name in ("snips", "sndr"):
        gap, error = acc.difference("a", "b", name, None)
        assert (gap, error) == (0.0, pytest.approx(0.0, abs=1e-9))


def test_memory_does_not_grow_with_rows():
    acc = filled(batch(), estimators=SPEC)
    size = lambda: sum(s.blocks.nbytes + s.moments.cross.nbytes for s in acc.sums.values())  # noqa: E731
    before = size()
    for seed in range(20):
        acc.update(batch(seed))
    assert size() == before
    assert all(len(w.top) <= 2000 for w in acc.weights.values())


def test_what_was_made_otherwise_does_not_add_up():
    with pytest.raises(ValueError, match="differ in estimators"):
        Accumulator(estimators=["ips"]) + Accumulator(estimators=["dr"])


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="dr needs q_logged and value of 'policy'"):
        Accumulator(estimators=["dr"]).update({"reward": [1.0], "weight": [1.0]})
    with pytest.raises(ValueError, match="no weight of 'policy'"):
        Accumulator(estimators=["ips"]).update({"reward": [1.0]})
    with pytest.raises(ValueError, match=r"weight must be \(2,\) like reward, got \(1,\)"):
        Accumulator(estimators=["ips"]).update({"reward": [1.0, 2.0], "weight": [1.0]})
    with pytest.raises(ValueError, match="tis judges episodes"):
        Accumulator(estimators=["tis"]).update({"reward": [1.0], "weight": [1.0]})
    with pytest.raises(ValueError, match="nothing was accumulated"):
        Accumulator().result()
    with pytest.raises(ValueError, match="magic is not made of mergeable sums"):
        Accumulator(estimators=["magic"])


def test_episodes_add_up_over_batches_as_over_one():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, size=400)
    group = np.repeat(np.arange(400), lengths)
    step = np.concatenate([np.arange(k) for k in lengths])
    columns = batch(n=len(group), group=group, step=step)
    names = ["tis", "pdis", "wpdis", "seq_dr", "seq_sndr", "dm"]
    cut = int(np.searchsorted(group, 123))
    halves = [{k: v[s] for k, v in columns.items()} for s in (slice(cut), slice(cut, None))]
    options = {"estimators": names, "gamma": 0.9, "horizon": 5}
    assert_same(filled(columns, **options), filled(*halves, **options))
    assert_same(
        filled(columns, **options), filled(halves[0], **options) + filled(halves[1], **options)
    )
    given = {k: columns[k] for k in ("reward", "weight", "q_logged", "value")}
    for name in names:
        want = contributions(name, **given, group=group, step=step, gamma=0.9).mean()
        got = filled(columns, **options).result()["policy", name, None].value
        assert got == pytest.approx(want, rel=1e-9)


def test_the_error_of_a_few_clusters_is_that_of_their_means():
    given = {"reward": np.repeat([1.0, 4.0, 2.0], 5), "weight": np.ones(15),
             "cluster": np.repeat([3, 1, 8], 5)}  # fmt: skip
    found = filled(given, estimators=["ips"], clustered=True).result()["policy", "ips", None]
    assert found.std_error == pytest.approx(np.std([1.0, 4.0, 2.0], ddof=1) / 3**0.5, rel=1e-12)
