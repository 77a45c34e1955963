"""Items like those a user had, by what their texts say: the only scores that new items get."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from agents.interactions import (
    FALLBACK,
    Interactions,
    or_popular,
    owned,
    popular_ranks,
    restore,
    weighed,
)
from encoders.state import EMPTY, Observation

WORDS = 8192  # columns of TF-IDF at most, the most frequent words
BELOW = -2.0  # the score of items without a text: cosines reach down to -1


class ContentKNN:
    """The cosine of an item's text with the mean of the texts of a history, centred by default.

    Text vectors of one model share a large common part, which says nothing of taste: `centred`
    takes it out. Items without text come last, the popular ones first among them.
    """

    def __init__(
        self,
        past: Any,
        *,
        centred: bool = True,
        weight: str = "log",
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        past = Interactions.of(past)
        if past.vectors is None:
            raise ValueError(
                "ContentKNN needs the vectors of the items' texts, got interactions without: "
                "Interactions.of(past, vectors=...) of encoders.text or agents.content.tfidf"
            )
        weighed(torch.ones(1), weight)  # refuses an unknown one now, not at the first score
        self.num_items, self.weight = past.num_items, weight
        self.ranks = popular_ranks(past, seed).to(device)  # (N,)
        vectors, present = directions(past.vectors, centred)
        self.vectors, self.present = vectors.to(device), present.to(device)  # (N, D), (N,)

    def scores(self, obs: Observation) -> Tensor:
        """(B, N); popularity where a user has no history, or none with a text."""
        items, count, _ = owned(obs, self.num_items)
        read = torch.where(self.present[items.clamp(min=0)], items, EMPTY)  # (B, M)
        share = weighed(count, self.weight) * (read != EMPTY)
        mean = embedding_bag(
            read.clamp(min=0), self.vectors, mode="sum", per_sample_weights=share
        )  # (B, D)
        cosine = normalize(mean, dim=1) @ self.vectors.T  # (B, N)
        return or_popular(
            torch.where(self.present, cosine, BELOW) + FALLBACK * self.ranks, read, self.ranks
        )

    def state_dict(self) -> dict[str, Any]:
        names = ("vectors", "present", "ranks")
        return {"num_items": self.num_items, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore(self, state, self.num_items, "vectors", "present", "ranks")


def directions(vectors: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Vectors (N, D) to unit ones, without their mean if centred, and which are there (N,)."""
    if vectors.ndim != 2 or not vectors.isfinite().all():
        raise ValueError(
            f"vectors must be finite and (N, D), got {tuple(vectors.shape)}"
            f"{' with NaN or infinity' if vectors.ndim == 2 else ''}: encode the texts again"
        )
    largest = vectors.abs().amax(dim=1, keepdim=True) if vectors.numel() else vectors.sum(1, True)
    present = largest.squeeze(1) > 0  # (N,): zero stands for no text
    # Divided by their largest entry first: squares of tiny or huge ones would be 0 or infinite.
    unit = normalize(vectors.double() / torch.where(largest > 0, largest, 1.0), dim=1)
    if centred and present.any():
        unit = normalize(unit - unit[present].mean(dim=0), dim=1)
    return (unit * present[:, None]).float(), present


def tfidf(texts: Sequence[str]) -> Tensor:
    """Texts (N,) to TF-IDF vectors (N, V) of their most frequent words (Salton, 1988)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"texts must be strings, got {type(text).__name__} in row {row}: use '' for an "
                "item without text"
            )
    words = TfidfVectorizer(sublinear_tf=True, max_features=WORDS)
    if not any(words.build_analyzer()(text) for text in texts):
        raise ValueError(
            f"texts must have words of two letters or more, none of {len(texts)} has: name the "
            "columns that hold the text"
        )
    return torch.from_numpy(words.fit_transform(texts).toarray()).float()
