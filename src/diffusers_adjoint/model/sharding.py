"""Several processes: weights that FSDP has divided among them, and decisions that one makes for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import PartialState, init_empty_weights
from accelerate.utils import broadcast_object_list
from diffusers import ModelMixin
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["from_first_process", "gathered", "spread_like", "whole_network"]


def gathered(weights: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The whole tensors, on the CPU. Every process must call this; it returns an empty dict without `keep`."""
    whole = {}
    for name, value in weights.items():  # one at a time, so that the GPU holds one whole tensor only
        tensor = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            whole[name] = tensor.cpu()
    return whole


def spread_like(weights: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` divided among processes like the tensors of the same names in `like`."""
    return {
        name: distribute_tensor(value, to.device_mesh, to.placements) if isinstance(to := like[name], DTensor) else value
        for name, value in weights.items()
    }


def whole_network(network: ModelMixin, keep: bool) -> ModelMixin | None:
    """The network for saving: itself, or a whole copy if FSDP has divided it; `None` without `keep`."""
    state = network.state_dict()
    if not any(isinstance(value, DTensor) for value in state.values()):
        return network if keep else None
    weights = gathered(state, keep)
    if not keep:
        return None
    with init_empty_weights():
        copy = type(network).from_config(network.config)
    copy.load_state_dict(weights, assign=True)
    return copy


def from_first_process(action: Callable[[], Any]) -> Any:
    """Call `action` on the first process only, and return its result, or raise its error, on all processes.

    Args:
        action: its result, or its TypeError or ValueError, is sent to the other processes by pickling.
    """
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = action()
        except (TypeError, ValueError) as error:  # sent to the others, which would wait forever otherwise
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
