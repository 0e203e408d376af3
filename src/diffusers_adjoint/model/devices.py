"""Where the networks of a pipeline are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from torch import nn

from ..replay.view import text_encoders

__all__ = ["place", "text_encoders_on"]


def place(pipeline: DiffusionPipeline | ModularPipeline, device: torch.device, offload_text_encoders: bool) -> None:
    """The pipeline's networks on `device`; the text encoders, if asked so, on the CPU."""
    if not offload_text_encoders:
        pipeline.to(device)  # it leaves alone what cannot be moved, such as quantised networks
        return
    away = text_encoders(pipeline).keys()
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            part.to("cpu" if name in away else device)


@contextmanager
def text_encoders_on(pipeline: DiffusionPipeline | ModularPipeline, device: torch.device, denoisers: list[str]) -> Iterator[None]:
    """Within this context the pipeline's text encoders are on `device` while they encode, and on the CPU while it denoises.

    Args:
        denoisers: names of its networks whose calls say that it denoises.
    """
    encoders = list(text_encoders(pipeline).values())
    networks = [getattr(pipeline, name) for name in denoisers]

    def move(to: torch.device | str) -> None:
        for encoder in encoders:
            encoder.to(to)

    hooks = [encoder.register_forward_pre_hook(lambda *_: move(device)) for encoder in encoders]
    hooks += [network.register_forward_pre_hook(lambda *_: move("cpu")) for network in networks]
    move(device)  # some are not called as modules
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        move("cpu")
