"""Move a pipeline's networks between devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from torch import nn

from ..replay.view import text_encoders

__all__ = ["place", "text_encoders_on"]


def place(pipeline: DiffusionPipeline | ModularPipeline, device: torch.device, offload_text_encoders: bool) -> None:
    """Move the pipeline's networks to `device`, and the text encoders to the CPU if they are offloaded."""
    if not offload_text_encoders:
        pipeline.to(device)  # skips networks that cannot be moved, such as quantised ones
        return
    away = text_encoders(pipeline).keys()
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            part.to("cpu" if name in away else device)


@contextmanager
def text_encoders_on(pipeline: DiffusionPipeline | ModularPipeline, device: torch.device, denoisers: list[str]) -> Iterator[None]:
    """Within this context the pipeline's text encoders are on `device` while they encode, and on the CPU while it denoises.

    Args:
        pipeline: the pipeline.
        device: device for encoding.
        denoisers: names of its denoisers; when one is called, the text encoders move to the CPU.
    """
    encoders = list(text_encoders(pipeline).values())
    networks = [getattr(pipeline, name) for name in denoisers]

    def move(to: torch.device | str) -> None:
        for encoder in encoders:
            encoder.to(to)

    hooks = [encoder.register_forward_pre_hook(lambda *_: move(device)) for encoder in encoders]
    hooks += [network.register_forward_pre_hook(lambda *_: move("cpu")) for network in networks]
    move(device)  # the hooks miss encoders that are not called as modules
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        move("cpu")
