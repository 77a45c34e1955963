"""A check compares ratios by benchmark and case, and knows a loss from what is only absent."""

from typing import Any

import pytest

from experiments.bench_check import compared
from experiments.bench_rows import Row, fixed, row


def made(case: str, ours: float = 1.0, peer: float | None = None, **more: Any) -> Row:
    return row("env", case, "u", fixed(ours), peer=fixed(peer) if peer else None, peer_name="P",
               limit_name="L", **more)  # fmt: skip


@pytest.mark.parametrize(("now", "lost"), [(71, False), (69, True), (300, False)])
def test_a_loss_of_more_than_thirty_percent_is_told(now: float, lost: bool) -> None:
    [verdict] = compared([made("a", 100, 10.0)], [made("a", now, 10.0)])
    assert verdict.lost is lost
    assert str(verdict).startswith("LOST env: a: ") is lost
    assert f"{now / 10:.3g} x P, 10 in the committed table" in str(verdict)


def test_ratios_count_and_times_do_not() -> None:
    [verdict] = compared([made("a", 100, 10.0)], [made("a", 10, 1.0)])  # a machine ten times slower
    assert not verdict.lost


def test_both_ratios_of_a_row_are_compared() -> None:
    before, now = made("a", 10, 1.0, limit=20.0), made("a", 10, 1.0, limit=100.0)
    peer, limit = compared([before], [now])
    assert (peer.side, peer.lost) == ("peer", False)
    assert (limit.side, limit.lost) == ("limit", True)


def test_what_is_absent_on_either_side_is_said_and_no_loss() -> None:
    peer_gone, new, old = compared(
        [made("a", 1, 2.0), made("old", 1, 1.0)], [made("a"), made("new", 1, 1.0)]
    )[:3]
    found = {v.case: v for v in (peer_gone, new, old)}
    assert "absent in the this run" not in str(found["a"])
    assert "absent in this run: not compared" in str(found["a"])
    assert "absent in this run" in str(found["old"])
    assert "absent in the committed table" in str(found["new"])
    assert all(v.absent and not v.lost for v in found.values())


def test_curves_and_limits_in_seconds_are_left_out() -> None:
    curve = made("c", 100, 1.0, curve="users", at=1)
    absolute = made("s", 100, limit=1.0, absolute=True)
    assert compared([curve, absolute], [made("c", 1, 1.0, curve="users", at=1),
                                        made("s", 1, limit=1.0, absolute=True)]) == []  # fmt: skip
