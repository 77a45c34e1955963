"""The relevance model: theta_ui = M(x_u, x_i), the logit that household u buys item i on this trip.

M sees features and history, never a user id, so that unseen users work: the household's own
purchases of the item (how often, how long ago against the item's usual gap), what else it bought of
the item's groups, how well the item goes with its past (item-to-item weights of EASE, Steck, 2019,
in low rank), how much all households bought it of late, and the moment. It knows nothing of the
encoder that agents see the shop through.

A small net over these is trained on all trips of a window; the features of a trip come from before
it, the item-to-item weights from before the window, so what is learnt of their worth holds for the
future. Sampled non-purchases carry weights that undo the sampling: the probabilities are per trip
and catalogue item.

The last layer and the items' biases come in `members`, each learnt from a bootstrap sample of the
households (bootstrapped heads: Osband et al., 2016): where they disagree the log says little. A
state with a "member" (B,) is priced by it, any other by the mean of the members' logits.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from torch.nn.functional import embedding, embedding_bag, gelu

from encoders.state import EMPTY, calendar
from simulators.trips import Trips

MOMENT = 9  # of the context: weekday and hour; weeks of a year not yet seen cannot be learnt
OWN, PAIR_PER_GROUP, AFFINITY = 6, 2, 3  # widths of the blocks of pair features
LONG_KNOWN = 5.8  # log days: after about 330 a household is known, whatever the date
FAR = 5.0  # deviations: nothing is learnt of those further out
RECENT = 30.0  # days in which the weight of a purchase falls to 1/e in the recent taste


@dataclass(frozen=True)
class ItemFacts:
    """What the model knows of N items at one moment, all from the log before it."""

    log_rate: Tensor  # (N,) log share of trips that buy it
    gap: Tensor  # (N,) log of the usual days between two purchases by one household
    groups: Tensor  # (N, G) int64: the finest categories
    source: Tensor  # (N, R): item-to-item weight of i on j is source_i . target_j
    target: Tensor  # (N, R)
    trend: Tensor  # (W, N) log of what all bought of late over the usual, week by week
    span: Tensor  # (2,) float64 days: the first row's moment, the last one's


def item_to_item(counts: csr_matrix, rank: int = 64, ridge: float = 300.0) -> tuple[Tensor, Tensor]:
    """EASE weights (Steck, 2019) of households x items (U, N) in low rank: (N, R) twice."""
    from sklearn.utils.extmath import randomized_svd

    bought = (counts > 0).astype(np.float64)
    gram = (bought.T @ bought).toarray()
    inverse = np.linalg.inv(gram + ridge * np.eye(len(gram)))
    weight = -inverse / np.diag(inverse)
    np.fill_diagonal(weight, 0.0)
    rank = min(rank, len(gram))
    left, scale, right = randomized_svd(weight, rank, n_iter=4, random_state=0)
    return torch.from_numpy(left * scale).float(), torch.from_numpy(right.T.copy()).float()


def blank(inputs: int, outputs: int, *, bias: bool = True) -> nn.Linear:
    """A layer of zeros: torch's own start would draw from the global generator."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Preference(nn.Module):
    """Logits of buying on this trip: `describe` a household once, then price any items for it."""

    extra = MOMENT + 3  # user features beside the profile
    log_rate: Tensor
    gap: Tensor
    groups: Tensor
    source: Tensor
    target: Tensor
    trend: Tensor
    span: Tensor
    group_offset: Tensor  # (G,) first column of a group in the state's "groups"
    user_mean: Tensor
    user_scale: Tensor

    def __init__(
        self, facts: ItemFacts, profile_size: int, hidden: int = 32, members: int = 1
    ) -> None:
        super().__init__()
        for name, value in vars(facts).items():
            self.register_buffer(name, value.clone())
        n, g = facts.groups.shape
        sizes = facts.groups.amax(dim=0) + 1  # (G,)
        self.register_buffer("group_offset", sizes.cumsum(0) - sizes)  # (G,)
        self.group_total = int(sizes.sum())
        pair = AFFINITY + OWN + PAIR_PER_GROUP * g
        self.bias = nn.Parameter(torch.zeros(n, members))
        self.register_buffer("user_mean", torch.zeros(profile_size + self.extra))
        self.register_buffer("user_scale", torch.ones(profile_size + self.extra))
        self.of_user = blank(profile_size + self.extra, hidden)
        self.of_item = blank(2, hidden, bias=False)
        self.of_pair = blank(pair, hidden, bias=False)
        self.middle = blank(hidden, hidden)
        self.out = blank(hidden, members)

    def describe(
        self, profile: Tensor, past: Tensor, count: Tensor, age: Tensor, time: Tensor
    ) -> dict[str, Tensor]:
        """All the model needs of B households at `time` (B,) days, as (B, ...) tensors."""
        past, order = past.sort(dim=1)  # EMPTY first: slate items are found by bisection
        count, age = count.gather(1, order), age.gather(1, order)  # (B, H)
        g = self.groups.shape[1]
        real = past != EMPTY  # (B, H)
        row = torch.where(real, past, 0)
        often = real.float()
        recent = torch.exp(-age / RECENT) * often  # (B, H)

        def taste(table: Tensor, weight: Tensor) -> Tensor:
            return embedding_bag(row, table, per_sample_weights=weight, mode="sum")  # (B, R)

        groups = torch.zeros(len(past), self.group_total, device=past.device)
        columns = self.groups + self.group_offset  # (N, G) of groups
        kinds = columns.index_select(0, row.flatten()).view(*row.shape, g)  # (B, H, G)
        groups.scatter_add_(1, kinds.flatten(1), (count * often).repeat_interleave(g, dim=1))
        total = (count * often).sum(dim=1)  # (B,)
        newest = torch.where(real, age, 365.0).amin(dim=1)  # (B,)
        scalars = torch.stack([newest.log1p(), total.log1p(), often.sum(dim=1).log1p()], dim=1)
        steady = profile.clone()
        steady[:, 2].clamp_(max=LONG_KNOWN)  # time goes on beyond the window: no trend to follow
        features = torch.cat([steady, scalars, calendar(time)[:, :MOMENT]], dim=1)
        user = self.of_user(self.standard(features))  # (B, hidden)
        return {
            "past": past,
            "count": count,
            "age": age,
            "features": features,
            "user": user,
            "week": self.week(time),  # (B,) row of the trend
            "often": taste(self.source, often),
            "recent": taste(self.source, recent),
            "groups": groups,  # (B, sum of the groups' sizes)
            # log of the trips so far + 1, log of the days, purchases
            "scalars": torch.stack([profile[:, 1] + profile[:, 2], profile[:, 2], total], dim=1),
        }

    def standard(self, features: Tensor) -> Tensor:
        """Features (B, U) in units of their spread among those learnt from, FAR at most.

        What never varied there (a country nobody came from) counts for nothing.
        """
        return ((features - self.user_mean) / self.user_scale).clamp(-FAR, FAR)

    def week(self, time: Tensor) -> Tensor:
        """Row (B,) of the trend at `time` (B,): what was known then."""
        first, last = self.span
        rows = len(self.trend) - 1
        week = ((time - first) / 7).floor().clamp(0, max(rows - 1, 0)).long()
        return torch.where(time >= last, rows, week)

    def renew(self, facts: ItemFacts) -> None:
        """Take over what is known of the items at a later moment; what was learnt stays.

        More data make all weights larger and all gaps longer: the new ones are put on the level and
        scale of those learnt with, or all that is new to a household would seem likelier.
        """
        rate = self.log_rate.exp()  # (N,)

        def strength(x: ItemFacts | Preference) -> Tensor:
            return (rate @ x.source) @ (x.target.T @ rate)

        def usual(x: ItemFacts | Preference) -> Tensor:
            return (rate * x.gap).sum() / rate.sum()

        scale = strength(self) / strength(facts)
        if not 0.1 < scale < 10:  # weights around zero have no scale
            scale = torch.ones(())
        gap = facts.gap - usual(facts) + usual(self)
        self.source.copy_(facts.source * scale)
        self.target.copy_(facts.target)
        self.gap.copy_(gap)

    def own(self, state: dict[str, Tensor], items: Tensor) -> tuple[Tensor, Tensor]:
        """How often and how many days ago (B, K) the household bought each of `items` (B, K)."""
        past = state["past"]
        place = torch.searchsorted(past, items).clamp_max(past.shape[1] - 1)  # (B, K)
        known = (past.gather(1, place) == items) & (items != EMPTY)
        return state["count"].gather(1, place) * known, state["age"].gather(1, place) * known

    def own_board(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`own` of the whole catalogue, (B, N) each."""
        past, n = state["past"], len(self.log_rate)
        place = torch.where(past == EMPTY, n, past)  # (B, H)
        boards = (
            torch.zeros(len(past), n + 1, device=past.device).scatter_(1, place, state[k])[:, :n]
            for k in ("count", "age")
        )
        count, age = boards
        return count, age

    def same_group(self, state: dict[str, Tensor], items: Tensor) -> Tensor:
        """(B, K, G): purchases of the household in each group that the items (B, K) belong to."""
        columns = self.groups + self.group_offset  # (N, G) of state["groups"]
        kinds = columns.index_select(0, items.flatten()).view(*items.shape, -1)  # (B, K, G)
        b, k, g = kinds.shape
        return state["groups"].gather(1, kinds.view(b, k * g)).view(b, k, g)

    def pair_features(
        self,
        items: Tensor,
        count: Tensor,
        age: Tensor,
        affinity: Tensor,
        same: Tensor,
        user: Tensor,
    ) -> Tensor:
        """Features (..., F) of aligned pairs: own count and age (...), `affinity` (..., 3) to what
        was often and what was recently bought and of all to the item, `same` (..., G), and `user`
        (..., 3) scalars.
        """
        known = (count > 0).float()
        old = age.log1p() * known
        log_trips, log_days, total = user.unbind(-1)
        columns = [
            known,
            count.log1p(),
            old,
            (old - self.gap.take(items)) * known,
            (count + 0.02).log() - log_trips,
            ((age + 1) * count / log_days.exp() + 0.01).log() * known,
        ]
        others = (same - count.unsqueeze(-1)).clamp_min(0.0)  # (..., G)
        share = ((others + 0.05) / (total.unsqueeze(-1) + 1)).log()
        parts = [*affinity.unbind(-1), *columns, *others.log1p().unbind(-1), *share.unbind(-1)]
        return torch.stack(parts).movedim(0, -1)  # whole columns side by side: 40 times faster

    def score(self, user: Tensor, pair: Tensor, items: Tensor) -> Tensor:
        """Logits (..., M) by the members, of aligned rows: user part (..., hidden), pair features
        (..., F), items (...).
        """
        # `embedding` reads rows ten times faster than an index does
        hidden = gelu(embedding(items, self.item_part()).add_(self.of_pair(pair)).add_(user))
        hidden = gelu(self.middle(hidden))  # (..., hidden)
        # a product with few columns is slow, one with few rows is not
        change = (self.out.weight @ hidden.flatten(0, -2).T).T  # (m, M)
        level = self.bias + self.log_rate[:, None] + self.out.bias  # (N, M)
        return change.view(*items.shape, -1) + embedding(items, level)

    def item_part(self) -> Tensor:
        """What the first layer makes of the items alone, (N, hidden)."""
        return self.of_item(torch.stack([self.log_rate + 5, self.gap - 3], dim=1))  # near zero

    def logit(self, state: dict[str, Tensor], items: Tensor) -> Tensor:
        """theta (B, K) of items (B, K); EMPTY gives -inf."""
        return self.agreed(state, self.opinions(state, items))

    def opinions(self, state: dict[str, Tensor], items: Tensor) -> Tensor:
        """theta (B, K, M) by each member, of items (B, K); EMPTY gives -inf."""
        empty = items == EMPTY
        items = torch.where(empty, 0, items)
        tastes = torch.stack([state["often"], state["recent"]], dim=1)  # (B, 2, R)
        trend = self.trend.take(state["week"][:, None] * self.trend.shape[1] + items)  # (B, K)
        liking = torch.bmm(tastes, embedding(items, self.target).mT)  # (B, 2, K)
        affinity = torch.stack([*liking.unbind(1), trend], dim=0).movedim(0, 2)  # (B, K, 3)
        count, age = self.own(state, items)
        scalars = state["scalars"][:, None].expand(-1, items.shape[1], -1)
        pair = self.pair_features(
            items, count, age, affinity, self.same_group(state, items), scalars
        )
        theta = self.score(state["user"][:, None], pair, items)  # (B, K, M)
        return theta.masked_fill_(empty[:, :, None], -torch.inf)

    @staticmethod
    def agreed(state: dict[str, Tensor], opinions: Tensor) -> Tensor:
        """Of opinions (B, K, M) that of the user's own member, or their mean, (B, K)."""
        if "member" not in state:
            return opinions.mean(dim=2)
        member = state["member"][:, None, None].expand(-1, opinions.shape[1], 1)
        return opinions.gather(2, member).squeeze(2)

    def affinities(self, state: dict[str, Tensor]) -> Tensor:
        """(B, N, 3): of each item to what the household bought often and of late, and its trend."""
        return torch.stack(
            [
                state["often"] @ self.target.T,
                state["recent"] @ self.target.T,
                self.trend[state["week"]],
            ],
            dim=2,
        )

    def logits(self, state: dict[str, Tensor], rows: int = 16) -> Tensor:
        """theta (B, N) of the whole catalogue, `rows` households at a time."""
        n = len(self.log_rate)
        parts = []
        for start in range(0, len(state["past"]), rows):
            some = {k: v[start : start + rows] for k, v in state.items()}
            b = len(some["past"])
            items = torch.arange(n, device=self.bias.device).expand(b, -1)
            count, age = self.own_board(some)
            same = self.same_group(some, items)
            scalars = some["scalars"][:, None].expand(-1, n, -1)
            pair = self.pair_features(items, count, age, self.affinities(some), same, scalars)
            # `score` without a copy of the item part for every household
            hidden = self.of_pair(pair).add_(self.item_part()).add_(some["user"][:, None])
            hidden = gelu(self.middle(gelu(hidden)))  # (b, N, hidden)
            if "member" in some:
                weight = self.out.weight[some["member"]][:, :, None]  # (b, hidden, 1)
                level = self.out.bias[some["member"]][:, None] + self.bias.T[some["member"]]
            else:  # the mean of logits is the logit of the mean head
                weight = self.out.weight.mean(dim=0)[:, None]  # (hidden, 1)
                level = self.out.bias.mean() + self.bias.mean(dim=1)
            change = (hidden @ weight).squeeze(-1)  # (b, N)
            parts.append(change.add_(self.log_rate + level))
        return torch.cat(parts)


def describe_trips(model: Preference, trips: Trips) -> dict[str, Tensor]:
    """The state of the households of n trips just before them."""
    past = torch.from_numpy(trips.past).long()
    rest = (torch.from_numpy(x) for x in (trips.profile, trips.count, trips.age, trips.time))
    profile, count, age, time = rest
    return model.describe(profile, past, count, age, time)


def bought_board(trips: Trips, n: int) -> Tensor:
    """What n trips bought, as (trips, n) bool."""
    bought = torch.from_numpy(trips.padded())  # (B, M)
    board = torch.zeros(len(trips), n + 1, dtype=torch.bool)
    return board.scatter_(1, torch.where(bought == EMPTY, n, bought), True)[:, :n]
