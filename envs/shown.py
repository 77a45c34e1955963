"""What was shown to each user on this trip, looked up at the same cost whatever the catalogue."""

import torch
from torch import Tensor

BOARD = 20_000  # items up to which a column for each costs less memory traffic than sharing them
SHARED = 8192  # columns of larger catalogues: an item has one, with others
PAIRS = 64  # slots up to which comparing each with all above it is faster than a sort


class Shown:
    """B rows of columns that say whether an item of the column was shown on this trip."""

    def __init__(self, num_envs: int, num_items: int, device: torch.device) -> None:
        self.num_items = num_items
        self.exact = num_items <= BOARD
        self.width = num_items if self.exact else SHARED
        # the last column stands for the empty slot: never allowed
        self.blank = torch.arange(self.width + 1, device=device) == self.width
        self.board = self.blank.repeat(num_envs, 1)  # (B, width + 1)

    def column(self, items: Tensor) -> Tensor:
        """The column of each item (...); what is no item has the last."""
        inside = (items >= 0) & (items < self.num_items)
        return torch.where(inside, items if self.exact else items % self.width, self.width)

    def before(self, slate: Tensor, history: Tensor) -> Tensor:
        """Which slots (B, K) hold what was shown before, as `history` (B, L) has it, or nothing."""
        column = self.column(slate)  # (B, K)
        before = self.board.gather(1, column)  # (B, K)
        if self.exact:
            return before
        nothing = column == self.width  # (B, K)
        if slate.is_cuda:  # to choose rows would wait for the device
            return nothing | listed(slate, history)
        # another item of the same column, perhaps
        rows = (before & ~nothing).any(dim=1).nonzero().squeeze(1)  # (R,)
        really = nothing[rows] | listed(slate[rows], history[rows])
        return before.index_copy(0, rows, really)

    def note(self, shown: Tensor) -> None:
        """Write down items (B, M), EMPTY where nothing."""
        self.board.scatter_(1, self.column(shown), True)

    def forget(self, rows: Tensor) -> None:
        """Rows (R,) begin a trip."""
        self.board[rows] = self.blank


def listed(slate: Tensor, history: Tensor) -> Tensor:
    """Which slots (B, K) are in the history (B, L)."""
    return (history[:, None, :] == slate[:, :, None]).any(dim=2)


def repeated(slate: Tensor) -> Tensor:
    """Which slots (B, K) show what a higher one shows too."""
    if slate.shape[1] > PAIRS:
        ordered, order = slate.sort(dim=1, stable=True)  # (B, K) each: equal items side by side
        again = torch.zeros_like(slate, dtype=torch.bool)
        again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        return torch.empty_like(again).scatter_(1, order, again)
    column = slate.T.contiguous()  # (K, B)
    again = torch.zeros_like(column, dtype=torch.bool)
    for slot in range(1, len(column)):
        torch.any(column[:slot] == column[slot], dim=0, out=again[slot])
    return again.T
