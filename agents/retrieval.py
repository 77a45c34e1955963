"""Candidates among very many items: an index finds those of the highest products with a user.

The vectors of items are sorted into lists around centres (Jegou et al., 2011), and only those lists
are looked at whose centres fit best. Some of the best are missed: measure how many.
"""

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from agents.base import Mask, allowed_items
from agents.checks import whole
from agents.explore import break_ties, tie_noise
from agents.nets import QNet, Seen
from encoders.state import EMPTY

TRAINED = 40  # vectors a centre is found from


class Index:
    """Vectors (N, D) to be searched by inner product, `probes` of about 2 sqrt(N) lists at a time.

    With as many probes as lists the search is exact.
    """

    def __init__(self, vectors: Tensor, *, probes: int = 128, seed: int = 0) -> None:
        check_library()
        import faiss

        n, size = vectors.shape
        lists = max(1, min(n // TRAINED, round(2.0 * math.sqrt(n))))
        if probes < 1:
            raise ValueError(f"probes must be at least 1 list, got {probes}")
        self.lists, self.probes = lists, min(probes, lists)
        self.centres = faiss.IndexFlatIP(size)  # held: the index only refers to it
        self.index = faiss.IndexIVFFlat(self.centres, size, lists, faiss.METRIC_INNER_PRODUCT)
        self.index.cp.seed, self.index.cp.max_points_per_centroid = seed + 1, TRAINED
        self.index.nprobe = self.probes
        rows = vectors.detach().cpu().float().contiguous().numpy()
        self.index.train(rows)
        self.index.add(rows)

    def search(self, wishes: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Products and items (B, k) for (B, D), best first, EMPTY where no more are found."""
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        value, item = self.index.search(wishes.detach().cpu().float().contiguous().numpy(), k)
        return torch.from_numpy(value).to(wishes.device), torch.from_numpy(item).to(wishes.device)


def check_library() -> None:
    """Refuse to go on without faiss, which is an extra."""
    if find_spec("faiss") is None:
        raise ValueError(
            "candidates need the library faiss, which is not installed: pip install "
            "'recplay[retrieval]', or leave candidates at 0 to look at all items"
        )


def greedy_slates(
    net: QNet, index: Index, seen: Seen, mask: Mask, k: int, candidates: int
) -> tuple[Tensor, Tensor]:
    """Slates (B, K) of the best among `candidates` and the user's past; where (B,) K were there."""
    hidden = net.body(seen.state)
    wishes = net.wishes(hidden)  # (B, R + 2)
    value, item = index.search(wishes, candidates)  # (B, C) each
    known = seen.past != EMPTY  # (B, H)
    own = (net.read.described(seen.past) * wishes[:, None, :]).sum(dim=2)  # (B, H)
    own = own + net.extra(hidden, seen)
    again = among(item, seen.past)  # (B, C) stands in the past, with what that adds
    value = value.masked_fill(again | (item == EMPTY), -torch.inf)
    value = torch.cat([value, own.masked_fill(~known, -torch.inf)], dim=1)  # (B, C + H)
    item = torch.cat([item, seen.past], dim=1).clamp(min=0)
    if mask is not None and mask.dtype == torch.bool:
        value = value.masked_fill(~mask.gather(1, item), -torch.inf)
    elif mask is not None:
        value = value.masked_fill(among(item, mask), -torch.inf)
    noise = tie_noise(net.items.shape[0] - 1, value.device)[item]
    best = break_ties(value, noise).topk(min(k, value.shape[1]), dim=1)
    enough = best.values.isfinite().sum(dim=1) == k  # (B,)
    return item.gather(1, best.indices), enough


def among(items: Tensor, others: Tensor) -> Tensor:
    """Which of `items` (B, C) stand in the same row of `others` (B, M)."""
    if not others.shape[1]:
        return torch.zeros_like(items, dtype=torch.bool)
    sorted_ = others.sort(dim=1).values
    place = torch.searchsorted(sorted_, items).clamp(max=others.shape[1] - 1)
    return sorted_.gather(1, place) == items


def greedy_probs(greedy: Tensor, slate: Tensor) -> Tensor:
    """1 for each item of a slate (B, K) that is the first of `greedy` (B, K) not shown above it."""
    probs = torch.zeros(slate.shape, device=slate.device)
    free = torch.ones_like(greedy, dtype=torch.bool)
    for slot in range(slate.shape[1]):
        item = slate[:, slot, None]
        first = greedy.gather(1, free.int().argmax(dim=1, keepdim=True))  # (B, 1)
        probs[:, slot] = (item == first).squeeze(1).float()
        free &= greedy != item
    return probs


def check_candidates(candidates: int, spec: Any, net: QNet) -> None:
    """Refuse a number of candidates that no index can serve."""
    whole(0, candidates=candidates)
    if not candidates:
        return
    if not net.linear:
        raise ValueError(
            f"candidates={candidates} needs values that are products of user and item: "
            "head=dot with quantiles=1, or candidates=0"
        )
    if not spec.slate_size <= candidates <= spec.num_items:
        raise ValueError(
            f"candidates must be 0 (look at all) or {spec.slate_size}..{spec.num_items}, from a "
            f"slate to the catalogue, got {candidates}"
        )
    check_library()


def check_mask(mask: Mask, rows: int, spec: Any) -> None:
    """Refuse masks as all of ours do: by shape, and ids out of range."""
    if mask is None or mask.dtype == torch.bool:
        if mask is not None:
            allowed_items(mask, rows, spec.num_items, mask.device)
        return
    if (
        mask.ndim != 2
        or len(mask) != rows
        or bool(((mask < EMPTY) | (mask >= spec.num_items)).any())
    ):
        raise ValueError(
            f"mask must hold excluded ids ({rows}, M) in 0..{spec.num_items - 1} or {EMPTY}, got "
            f"{tuple(mask.shape)}, {int(mask.min())}..{int(mask.max())}"
        )
