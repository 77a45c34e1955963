"""How spaces of any Gymnasium environment are read: numbers, choices, items shown, slates."""

import numpy as np
import pytest
from gym_worlds import Shop
from gymnasium import spaces

from envs.gym_actions import read_actions
from envs.gym_features import read_space


def numbers(space: spaces.Space, *values: object) -> list[list[float]]:
    reading = read_space(
        space, "x", num_items=2, slate_size=1, detect=False, shown=None, feedback=None
    )
    read = reading.profile(values, lambda row: f"x, row {row}, step 0")
    assert read.shape == (len(values), reading.size)
    assert read.dtype == np.float32
    return read.tolist()


def test_numbers_are_scaled_by_their_bounds_alone():
    low = np.array([-1.0, 0.0, -np.inf, -50.0, -3.4e38], dtype=np.float32)
    high = np.array([1.0, 255.0, np.inf, 150.0, 3.4e38], dtype=np.float32)
    read = numbers(
        spaces.Box(low, high), [0.3, 0.0, -20.0, 50.0, 5.0], [-1.0, 255.0, 0.0, 150.0, 0.0]
    )
    assert read[0] == pytest.approx([0.3, -1.0, -np.log(21.0), 0.0, np.log(6.0)], rel=1e-6)
    assert read[1] == pytest.approx([-1.0, 1.0, 0.0, 1.0, 0.0])
    assert numbers(spaces.Box(0, 255, (1, 2), np.uint8), np.array([[0, 255]], np.uint8)) == [
        [-1.0, 1.0]
    ]
    assert numbers(spaces.Box(-np.inf, np.inf, ()), 0.0) == [[0.0]]


def test_choices_are_one_hot_while_they_are_few():
    assert numbers(spaces.Discrete(3, start=2), 2, np.int64(4)) == [[1, 0, 0], [0, 0, 1]]
    space = spaces.MultiDiscrete([2, 3], start=[0, 1])
    assert numbers(space, [1, 1], np.array([0, 3])) == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]
    assert numbers(spaces.MultiBinary([2, 2]), np.eye(2, dtype=np.int8)) == [[1, 0, 0, 1]]
    assert numbers(spaces.Discrete(5001), 0, 2500, 5000) == [[-1.0], [0.0], [1.0]]


def test_parts_of_dicts_and_tuples_follow_each_other():
    space = spaces.Dict(
        b=spaces.Tuple([spaces.Discrete(2), spaces.Dict(z=spaces.Box(-1.0, 1.0, (1,)))]),
        a=spaces.MultiBinary(1),
    )
    one = {"a": [1], "b": (1, {"z": np.array([0.5])})}
    names = list(space.spaces)
    expected = {"a": [1.0], "b": [0.0, 1.0, 0.5]}
    assert numbers(space, one) == [[x for name in names for x in expected[name]]]
    assert numbers(spaces.Tuple([spaces.Discrete(2)] * 2), (0, 1)) == [[1, 0, 0, 1]]


@pytest.mark.parametrize("space", [spaces.Text(4), spaces.Sequence(spaces.Discrete(2))])
def test_observations_that_are_no_numbers_are_refused(space):
    with pytest.raises(ValueError, match="observations may be Box, Discrete"):
        numbers(space, "a")


def shop_space(**more: spaces.Space) -> spaces.Dict:
    return spaces.Dict({**Shop.observation_space.spaces, **more})


def parts_of(space: spaces.Space, detect=True, **named: str) -> tuple[str | None, str | None, int]:
    names = {"shown": None, "feedback": None, **named}
    r = read_space(space, "x", num_items=6, slate_size=2, detect=detect, **names)
    return r.shown and r.shown.name, r.feedback and r.feedback.name, r.size


def test_shown_and_feedback_are_found_by_form_or_by_name():
    two = spaces.MultiDiscrete([6, 6])
    assert parts_of(shop_space()) == ("items", "bought", 2)
    assert parts_of(shop_space(), detect=False) == (None, None, 12 + 2 + 2)
    assert parts_of(shop_space(), detect=False, shown="items") == ("items", "bought", 2)
    assert parts_of(shop_space(old=two), shown="old") == ("old", "bought", 12 + 2)
    assert parts_of(shop_space(), feedback="mood") == ("items", "mood", 2)
    with pytest.raises(ValueError, match=r"several parts .* items, old: say which with shown=KEY"):
        parts_of(shop_space(old=two))
    with pytest.raises(ValueError, match=r"several parts .*: say which with feedback=KEY"):
        parts_of(shop_space(seen=spaces.MultiBinary(2)))
    with pytest.raises(ValueError, match=r"shown='mood' must be a part .* fitting: items"):
        parts_of(shop_space(), shown="mood")
    with pytest.raises(ValueError, match="feedback='clicks' must be a part"):
        parts_of(shop_space(), feedback="clicks")
    with pytest.raises(ValueError, match="none: it is no Dict"):
        parts_of(spaces.Discrete(6), shown="items")
    with pytest.raises(ValueError, match="needs the items it is about: set shown=KEY"):
        parts_of(shop_space(), detect=False, feedback="bought")


def test_items_shown_that_do_not_exist_are_refused():
    reading = read_space(
        Shop.observation_space, "x", num_items=6, slate_size=2, detect=True, shown=None,
        feedback=None,
    )  # fmt: skip
    for shown, bought, message in (
        ([0, 6], [0, 0], r"x, row 0: items\[1\] must be an item in 0..5, got 6"),
        ([0.5, 1], [0, 0], r"items\[0\] must be an item"),
        ([0, 1], [0, np.nan], r"bought\[1\] must be finite, got nan"),
    ):
        told = {"items": shown, "bought": bought, "mood": [0, 0]}
        with pytest.raises(ValueError, match=message):
            reading.slates([told], lambda row: f"x, row {row}")


def test_items_shown_are_numbered_from_zero_wherever_the_space_starts():
    space = spaces.Dict(items=spaces.MultiDiscrete([6, 6], start=[1, 1]))
    reading = read_space(
        space, "x", num_items=6, slate_size=2, detect=True, shown=None, feedback=None
    )
    shown, feedback = reading.slates([{"items": np.array([1, 6])}], str)
    assert shown is not None
    assert shown.tolist() == [[0, 5]]
    assert feedback is None


def test_a_joint_action_has_the_shape_of_its_space():
    actions = read_actions(
        spaces.MultiDiscrete([[2, 3], [4, 5]]), "x", slate="auto", features=False, max_actions=200
    )
    native = actions.native(np.array([[0], [119], [5]]))
    assert [a.tolist() for a in native] == [[[0, 0], [0, 0]], [[1, 2], [3, 4]], [[0, 0], [1, 0]]]


def test_equal_sizes_are_a_slate_where_items_are_known_or_combinations_too_many():
    def read(sizes: list[int], features: bool, slate: bool | str = "auto") -> tuple[int, int]:
        space = spaces.MultiDiscrete(sizes)
        a = read_actions(space, "x", slate=slate, features=features, max_actions=50)
        return a.num_items, a.slate_size

    assert read([6, 6], features=True) == (6, 2)
    assert read([6, 6], features=False) == (36, 1)
    assert read([10, 10], features=False) == (10, 2)
    assert read([6, 6], features=False, slate=True) == (6, 2)
    assert read([6, 6], features=True, slate=False) == (36, 1)
    assert read([6], features=True) == (6, 1)
    assert read([2, 2, 2], features=True) == (8, 1)  # no three distinct items of two
    with pytest.raises(ValueError, match="1000 combinations, more than max_actions=50"):
        read([10, 100], features=False)
    with pytest.raises(ValueError, match="no smaller than the slate"):
        read([2, 2, 2], features=False, slate=True)
    with pytest.raises(ValueError, match="slate must be auto, true or false"):
        read([6, 6], features=False, slate="yes")
