"""A fingerprint that distinguishes base networks by a sample of their weights."""

from __future__ import annotations

import hashlib

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .lora import ADAPTER

__all__ = ["base_fingerprint"]

SAMPLED = 1024  # most elements of a tensor that are hashed


def base_fingerprint(network: nn.Module, base_adapters: list[str] | None) -> str:
    """SHA-256, in hexadecimal, of the network without the trained adapter; the same on every device.

    It covers the name, shape and dtype of each tensor in the state dict, up to 1024 evenly spaced elements of it, and the
    strengths of the base's own adapters. So it detects another base, precision, architecture or fine-tuning. It does not detect a
    change of a few other elements, nor changes outside the state dict: the network's config, the scheduler, the text encoders.

    Args:
        network: the whole network, not divided among processes.
        base_adapters: names of the base's active adapters; `None` or empty if there are none.
    """
    found = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, Tensor) and f".{ADAPTER}." not in f".{name}.":
            found.update(f"{name.replace('.base_layer', '')} {tuple(value.shape)} {value.dtype}\n".encode())
            found.update(_sample(value))
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            for adapter in base_adapters or []:
                found.update(f"{name} {adapter} {module.scaling.get(adapter)}\n".encode())
    return found.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten()
    if len(flat) > SAMPLED:
        flat = flat[torch.arange(SAMPLED, device=flat.device) * (len(flat) - 1) // (SAMPLED - 1)]
    return flat.contiguous().view(torch.uint8).cpu().numpy().tobytes()
