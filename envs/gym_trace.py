"""What was shown and taken in the episodes of B rows, written down step by step."""

import numpy as np

from encoders.state import EMPTY


class Trace:
    """History, past and running means of B episodes, NumPy at Gymnasium's boundary.

    `history` (B, L) holds what was shown last, the oldest falling out in slates of K; `past` (B, H)
    the distinct items taken in the episode, `age` in steps, the one taken longest ago falling out.
    With item vectors (N, D) it also keeps means over the whole episode, whatever has fallen out.
    """

    def __init__(
        self, rows: int, *, slate_size: int, history: int, past: int, vectors: np.ndarray | None
    ) -> None:
        length = history * slate_size  # L
        self.slots = np.arange(slate_size)  # (K,)
        self.higher = self.slots[:, None] > self.slots  # (K, K): slot k below slot j
        self.history = np.full((rows, length), EMPTY, dtype=np.int64)  # (B, L)
        self.feedback = np.zeros((rows, length), dtype=np.float32)  # (B, L)
        self.filled = np.zeros(rows, dtype=np.int64)  # (B,) places of history that are written
        self.past = np.full((rows, past), EMPTY, dtype=np.int64)  # (B, H)
        self.count = np.zeros((rows, past), dtype=np.float32)  # (B, H)
        self.age = np.zeros((rows, past), dtype=np.float32)  # (B, H)
        self.vectors = None if vectors is None else vectors.astype(np.float64)  # (N, D)
        width = 0 if vectors is None else vectors.shape[1]  # D
        self.total = np.zeros((rows, 2, width))  # (B, 2, D) sums of vectors taken and skipped
        self.number = np.zeros((rows, 2))  # (B, 2) of how many
        self.latest = np.zeros((rows, 2, width))  # (B, 2, D) means of the last slate
        self.size = 0 if vectors is None else 4 * width + 2  # columns of `summary`

    def clear(self, rows: np.ndarray) -> None:
        """Forget the episodes of rows (R,)."""
        self.history[rows], self.past[rows] = EMPTY, EMPTY
        for kept in (self.feedback, self.filled, self.count, self.age, self.total, self.number):
            kept[rows] = 0
        self.latest[rows] = 0.0

    def add(self, rows: np.ndarray, shown: np.ndarray, feedback: np.ndarray) -> None:
        """Write down what rows (R,) were shown (R, K) and what they answered (R, K)."""
        taken = feedback > 0  # (R, K)
        self._show(rows, shown, feedback)
        self._recall(rows, shown, taken)
        if self.vectors is None:
            return
        split = np.stack([taken, ~taken], axis=1).astype(np.float64)  # (R, 2, K)
        number = split.sum(axis=2)  # (R, 2)
        total = split @ self.vectors[shown]  # (R, 2, D)
        self.total[rows] += total
        self.number[rows] += number
        self.latest[rows] = total / np.maximum(number, 1.0)[:, :, None]

    def summary(self, rows: np.ndarray) -> np.ndarray:
        """(R, 4 D + 2): means taken and skipped so far, those of the last step, log counts."""
        number = self.number[rows]  # (R, 2)
        means = self.total[rows] / np.maximum(number, 1.0)[:, :, None]  # (R, 2, D)
        width = 2 * means.shape[2]
        return np.concatenate(
            [means.reshape(-1, width), self.latest[rows].reshape(-1, width), np.log1p(number)],
            axis=1,
        )

    def _show(self, rows: np.ndarray, shown: np.ndarray, feedback: np.ndarray) -> None:
        k, length = len(self.slots), self.history.shape[1]
        full = rows[self.filled[rows] == length]
        if len(full):
            for kept in (self.history, self.feedback):
                kept[full, :-k] = kept[full, k:]
            self.filled[full] -= k
        place = self.filled[rows][:, None] + self.slots  # (R, K)
        self.history[rows[:, None], place] = shown
        self.feedback[rows[:, None], place] = feedback
        self.filled[rows] += k

    def _recall(self, rows: np.ndarray, shown: np.ndarray, taken: np.ndarray) -> None:
        """One step older; items taken now are one step old at the next decision."""
        past, count, age = self.past[rows], self.count[rows], self.age[rows]  # (R, H) copies
        age += past != EMPTY
        some = np.flatnonzero(taken.any(axis=1))  # (S,) rows that took something
        if len(some):
            self._take(past, count, age, some, shown[some], taken[some])
            self.past[rows], self.count[rows] = past, count
        self.age[rows] = age

    def _take(
        self,
        past: np.ndarray,
        count: np.ndarray,
        age: np.ndarray,
        some: np.ndarray,
        shown: np.ndarray,
        taken: np.ndarray,
    ) -> None:
        """Add what rows `some` (S,) took among `shown` (S, K); twice in one slate counts once."""
        if len(self.slots) > 1:
            equal = (shown[:, :, None] == shown[:, None, :]) & taken[:, None, :]  # (S, K, K)
            taken = taken & ~(equal & self.higher).any(axis=2)  # (S, K)
        match = (past[some][:, :, None] == shown[:, None, :]) & taken[:, None, :]  # (S, H, K)
        at, place = match.any(axis=2).nonzero()
        count[some[at], place] += 1.0
        age[some[at], place] = 1.0
        fresh = taken & ~match.any(axis=1)  # (S, K)
        at, slot = fresh.nonzero()
        if not len(at):
            return
        oldest = np.where(past[some] == EMPTY, np.inf, age[some])  # (S, H) empty places go first
        order = np.argsort(-oldest, axis=1, kind="stable")  # (S, H)
        place = order[at, (fresh.cumsum(axis=1) - 1)[at, slot]]
        past[some[at], place] = shown[at, slot]
        count[some[at], place], age[some[at], place] = 1.0, 1.0


def outcome(
    slate: np.ndarray | None,
    shown: np.ndarray | None,
    feedback: np.ndarray | None,
    reward: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items, rewards and whether they were taken, slot by slot of the slates (R, K).

    Feedback is the reward of its slot where it sums to the reward (R,); else slots share alike.
    """
    items = shown if slate is None else slate  # (R, K)
    assert items is not None
    share = np.repeat(reward[:, None] / items.shape[1], items.shape[1], axis=1)  # (R, K)
    if feedback is None or shown is None:
        return items, share.astype(np.float32), share > 0
    if slate is not None and not np.array_equal(slate, shown):  # shown in another order, or others
        same = slate[:, :, None] == shown[:, None, :]  # (R, K, K)
        feedback = np.where(
            same.any(axis=2), np.take_along_axis(feedback, same.argmax(axis=2), 1), 0
        )
    sums = np.isclose(feedback.sum(axis=1), reward, rtol=1e-5, atol=1e-6)  # (R,)
    slots = np.where(sums[:, None], feedback, share)  # (R, K)
    return items, slots.astype(np.float32), feedback > 0
