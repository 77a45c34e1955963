"""Coat as a log: its shipped propensities give the value of choosing nothing, nearly."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from sources.coat import coat

COAT = Path(__file__).resolve().parents[2] / "shared" / "data" / "coat"


def write(folder, *, train=((5, 0, 3), (0, 1, 0)), rated=((0.5, 0.2, 0.25), (0.1, 0.75, 0.4))):
    """Two users, three coats, in the files of the data set."""
    np.savetxt(folder / "train.ascii", train, fmt="%d")
    np.savetxt(folder / "test.ascii", [[0, 2, 0], [4, 0, 0]], fmt="%d")
    with gzip.open(folder / "propensities.ascii.gz", "wt") as file:
        np.savetxt(file, rated)
    np.savetxt(folder / "user_features.ascii", [[1, 0], [0, 1]], fmt="%d")
    (folder / "user_features_map.txt").write_text("gender:men\ngender:women")
    np.savetxt(folder / "item_features.ascii", np.eye(3), fmt="%d")
    (folder / "item_features_map.txt").write_text("color:red\ncolor:blue\ncolor:pink\n")
    return folder


def test_a_row_is_a_rating(tmp_path):
    log = coat(write(tmp_path))
    assert log.cluster.tolist() == [0, 0, 1]
    assert log.action.tolist() == [0, 2, 1]
    assert log.reward.tolist() == [5, 3, 1]
    assert log.propensity.tolist() == [0.5, 0.25, 0.75]
    assert log.uniform.tolist() == [0.5] * 3  # three of six pairs
    assert log.context.tolist() == [[1, 0], [1, 0], [0, 1]]
    assert log.context_names == ("gender:men", "gender:women")
    assert log.item_feature_names[2] == "color:pink"
    assert log.num_actions == 3


def test_weights_estimate_the_mean_over_all_pairs(tmp_path):
    log = coat(write(tmp_path))
    ips = (log.uniform / log.propensity * log.reward).mean()
    assert ips == pytest.approx((5 / 0.5 + 3 / 0.25 + 1 / 0.75) / 6)


def test_random_ratings_weigh_the_same(tmp_path):
    log = coat(write(tmp_path), test=True)
    assert log.reward.tolist() == [2, 4]
    assert (log.uniform / log.propensity).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"train": ((5, 0, 7), (0, 1, 0))}, r"got 7.0 at \[0, 2\]"),
        ({"train": ((0, 0, 0), (0, 0, 0))}, "only 0"),
        ({"train": ((5, 0), (0, 1))}, r"item_features.ascii must be \(2, 3\).*got \(3, 3\)"),
        ({"rated": ((0.5, 0.2, 0.0), (0.1, 0.75, 0.4))}, "got 0.0 for user 0, item 2"),
        ({"rated": ((0.5, 0.2), (0.1, 0.75))}, r"\(2, 2\), train.ascii \(2, 3\)"),
    ],
)
def test_what_coat_cannot_hold_is_refused(tmp_path, wrong, words):
    write(tmp_path, **wrong)
    with pytest.raises(ValueError, match=words):
        coat(tmp_path)


def test_files_that_are_missing_or_cut_off_are_named(tmp_path):
    (write(tmp_path) / "test.ascii").unlink()
    with pytest.raises(ValueError, match=r"no test\.ascii in"):
        coat(tmp_path)
    whole = (write(tmp_path) / "propensities.ascii.gz").read_bytes()
    (tmp_path / "propensities.ascii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"propensities\.ascii\.gz is not a table.*fetch it again"):
        coat(tmp_path)


@pytest.mark.skipif(not COAT.exists(), reason="the Coat files are not beside the checkout")
def test_shipped_propensities_take_away_half_of_the_bias():
    log, truth = coat(COAT), coat(COAT, test=True).reward.mean()
    weight = log.uniform / log.propensity
    assert truth == pytest.approx(2.229, abs=5e-4)
    assert log.reward.mean() == pytest.approx(2.611, abs=5e-4)
    assert (weight * log.reward).mean() == pytest.approx(2.424, abs=5e-4)
    assert (weight * log.reward).sum() / weight.sum() == pytest.approx(2.331, abs=5e-4)
    assert (log.context.shape, log.item_features.shape) == ((6960, 14), (300, 33))
    assert np.unique(log.cluster, return_counts=True)[1].tolist() == [24] * 290
