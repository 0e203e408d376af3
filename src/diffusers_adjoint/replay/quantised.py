"""Whether a network's weights are quantised: its activations may be, too, and those have no gradient."""

from __future__ import annotations

from itertools import chain

from torch import Tensor, nn

__all__ = ["quantisation_of"]


def quantisation_of(network: nn.Module) -> str | None:
    """What the quantised weights of `network` are, in words; `None` if all are ordinary floats.

    Recognised by how they are stored: in a tensor class that is not of torch, in integers, in floats of 8 bits, or as the
    network's config says.
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
    return not (weight.is_floating_point() or weight.is_complex()) or weight.dtype.itemsize == 1
