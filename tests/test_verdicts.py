"""A line fails where users are wrong, and says too few where the log could not tell."""

from simulators.realism import Distance
from simulators.verdicts import FEWEST, above, at_least, at_most, count_line, lines, within

LIMIT = {"a": 0.1}
RATIO = {"a": 1.25}
NAN = float("nan")


def test_a_distance_within_what_samples_differ_by_is_too_few_to_tell():
    near, far = Distance(0.15, 0.08, 0.22), Distance(0.5, 0.4, 0.6)
    assert at_most("a", near, LIMIT, "", chance=0.2).passed is None
    assert at_most("a", near, LIMIT, "", chance=0.05).passed is False  # this log could tell
    assert at_most("a", far, LIMIT, "", chance=0.2).passed is False  # further than any chance
    assert at_most("a", Distance(0.05, 0.0, 0.2), LIMIT, "", chance=0.2).passed is True


def test_a_distance_without_an_interval_is_held_against_chance_itself():
    assert at_most("a", 0.15, LIMIT, "", chance=0.2).passed is None
    assert at_most("a", 0.25, LIMIT, "", chance=0.2).passed is False
    assert at_most("a", 0.15, LIMIT, "").passed is False


def test_few_users_and_wide_intervals_excuse_only_what_reaches_the_limit():
    reaching, beyond = Distance(0.15, 0.08, 0.22), Distance(0.3, 0.25, 0.35)
    assert at_most("a", reaching, LIMIT, "", users=FEWEST - 1).passed is None
    assert at_most("a", reaching, LIMIT, "", users=FEWEST).passed is False
    assert at_most("a", beyond, LIMIT, "", users=FEWEST - 1).passed is False
    assert at_most("a", Distance(-0.15, -0.4, 0.1), LIMIT, "").passed is None  # .25 either side
    assert at_most("a", Distance(-0.6, -0.8, -0.4), LIMIT, "").passed is False


def test_a_ratio_whose_interval_is_wider_than_its_limit_is_too_few_to_tell():
    assert within("a", Distance(1.4, 1.0, 2.0), RATIO, "").passed is None
    assert within("a", Distance(0.7, 0.5, 1.0), RATIO, "").passed is None
    assert within("a", Distance(1.4, 1.2, 1.6), RATIO, "").passed is False  # narrow enough
    assert within("a", Distance(2.0, 1.3, 3.0), RATIO, "").passed is False  # above in any case
    assert within("a", Distance(1.2, 0.8, 1.8), RATIO, "").passed is True
    assert within("a", 1.4, RATIO, "").passed is False


def test_a_gain_of_few_users_is_too_few_unless_it_is_a_loss():
    zero = {"a": 0.0}
    assert above("a", Distance(0.02, -0.05, 0.09), zero, "", users=60).passed is None
    assert above("a", Distance(0.02, -0.05, 0.09), zero, "", users=600).passed is False
    assert above("a", Distance(-0.2, -0.3, -0.1), zero, "", users=60).passed is False
    assert above("a", Distance(0.0, 0.0, 0.0), zero, "", users=60).passed is None  # the same lists
    assert above("a", Distance(0.0, 0.0, 0.0), zero, "", users=600).passed is False
    assert above("a", Distance(0.1, NAN, NAN), zero, "", users=1).passed is None
    assert above("a", Distance(0.2, 0.1, 0.3), zero, "", users=60).passed is True


def test_a_share_of_a_few_or_of_nothing_is_too_few_to_tell():
    most = {"a": 0.9}
    assert at_least("a", Distance(0.8, 0.5, 0.95), most, "").passed is None
    assert at_least("a", Distance(0.85, 0.83, 0.91), most, "").passed is False
    assert at_least("a", Distance(0.2, 0.05, 0.6), most, "").passed is False
    assert at_least("a", Distance(NAN, NAN, NAN), most, "", nobody=True).passed is None


def test_what_is_no_number_fails():
    nothing = Distance(NAN, NAN, NAN)
    assert at_most("a", nothing, LIMIT, "", chance=0.2, users=5).passed is False
    assert within("a", nothing, RATIO, "", users=5).passed is False
    assert at_least("a", nothing, LIMIT, "").passed is False


def test_lines_say_which_could_not_be_told():
    checks = [
        at_most("a", 0.2, LIMIT, "far"),
        at_most("a", 0.15, LIMIT, "perhaps", chance=0.2),
        at_most("a", 0.05, LIMIT, "near"),
    ]
    said = lines(checks)
    assert [line[:4] for line in said] == ["FAIL", "FEW ", "PASS", "1 of"]
    assert said[1].endswith("perhaps; too few to tell")
    assert count_line(checks) == "1 of 3 checks passed, of 1 the log has too few users to tell"
    assert count_line(checks[2:]) == "1 of 1 checks passed"
