"""What belongs to several processes: weights that FSDP has spread over them, and decisions that one takes for all."""

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
    """The whole tensors, on the CPU; every process must call this, and those that do not `keep` them get nothing."""
    whole = {}
    for name, value in weights.items():  # one at a time: the GPU need not hold them all
        tensor = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            whole[name] = tensor.cpu()
    return whole


def spread_like(weights: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` divided among the processes as those of the same name in `like` are."""
    return {
        name: distribute_tensor(value, to.device_mesh, to.placements) if isinstance(to := like[name], DTensor) else value
        for name, value in weights.items()
    }


def whole_network(network: ModelMixin, keep: bool) -> ModelMixin | None:
    """The network, or a copy that knows nothing of FSDP, to be saved; `None` where it is not kept."""
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
    """What `action` returns or raises on the first process, where alone it is called, on all of them.

    Args:
        action: its result, or its TypeError or ValueError, is sent by pickling.
    """
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = action()
        except (TypeError, ValueError) as error:  # the others would wait for a process that has ended
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
