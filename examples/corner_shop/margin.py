"""A reward of one's own: what the corner shop earns, were the share the same for all products."""

from torch import Tensor

from simulators.base import Response

SHARE = 0.38  # of the price that is left, over all products
HANDLING = 0.30  # cost of taking one product from the shelf


def flat(response: Response) -> Tensor:
    """What is left of what was bought, were the share the same for all products."""
    bought = response.chosen["buy"].float()  # (B, K)
    return SHARE * response.value - HANDLING * bought
