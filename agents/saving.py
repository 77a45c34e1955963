"""What the states of agents have in common: catalogues, nets and generators that must fit."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def catalog_signature(vectors: Tensor) -> Tensor:
    """Item vectors (N, D) to one number each (N,), alike on machines that round differently."""
    exact = vectors.detach().cpu().double()
    direction = torch.randn(exact.shape[1], generator=torch.Generator().manual_seed(7)).double()
    return (exact @ direction).float()


def check_catalog(mine: Tensor, theirs: Tensor) -> None:
    """Refuse a checkpoint whose items are not these."""
    if len(mine) != len(theirs):
        raise ValueError(
            f"the checkpoint is of a catalogue of {len(theirs)} items, this one has {len(mine)}: "
            "load it with the catalogue it was trained on"
        )
    spread = mine.std(correction=0).clamp(min=1e-12)
    if (mine - theirs.to(mine)).abs().mean() > 0.1 * spread:
        raise ValueError(
            "the checkpoint is of another catalogue of the same size (its item vectors differ): "
            "load it with the catalogue and the text encoder it was trained on"
        )


def load_net(net: nn.Module, state: dict[str, Any]) -> None:
    """Load the weights of a net of the same form."""
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            "the checkpoint has a net of another form (head, width, dueling, memory, sizes of "
            f"the observation): build the agent with the settings it was trained with. {error}"
        ) from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's state; torch keeps the tensors it is given, so it gets its own."""
    optimizer.load_state_dict(copy.deepcopy(state))


def generator_state(generator: torch.Generator) -> dict[str, Any]:
    """A generator's state and the kind of device it is for."""
    return {"state": generator.get_state(), "device": generator.device.type}


def restore_generator(generator: torch.Generator, saved: dict[str, Any]) -> None:
    """Put a saved state back; states of another kind of device do not translate and are left."""
    if saved["device"] == generator.device.type:
        generator.set_state(saved["state"].cpu())
