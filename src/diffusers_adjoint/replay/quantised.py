"""Detect quantised weights. Such a network may also round its activations, through which no gradient flows."""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn

__all__ = ["quantisation_of"]


def quantisation_of(network: nn.Module) -> str | None:
    """Describe the quantised weights of a network, for messages.

    Weights are quantised if they have a tensor class that is not torch's, an integer dtype, or a float dtype of 8 bits, or if a
    module's config has a `quantization_config`.

    Args:
        network: any module; its parameters are inspected, of its buffers only the class.

    Returns:
        For example "weights of torch.int8"; `None` if all weights are ordinary floats.
    """
    for weight in chain(network.parameters(), network.buffers()):
        if type(weight).__module__.partition(".")[0] != "torch":
            return f"weights of class {type(weight).__name__}"
    for weight in network.parameters():
        if _is_coarse(weight):
            return f"weights of {weight.dtype}"
    configs = [getattr(module, "config", None) for module in network.modules()]
    if any(getattr(config, "quantization_config", None) is not None for config in configs):
        return "weights quantised as its quantization_config says"
    return None


def _is_coarse(weight: Tensor) -> bool:
    """Whether the dtype is an integer (or bool), or has one byte, as the 8-bit floats."""
    return not (weight.is_floating_point() or weight.is_complex()) or weight.dtype.itemsize == 1
