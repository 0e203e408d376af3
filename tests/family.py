"""A row of the family tests: how to build a pipeline in tiny form, and how to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline

__all__ = ["PROMPTS", "Family"]

PROMPTS = ["a cat", "two dogs"]


@dataclass(frozen=True)
class Family:
    """One pipeline class, called one way; a row of `docs/pipelines.md`.

    Args:
        name: as its users call it.
        build: makes the pipeline, with the same weights at every call.
        mechanism: what makes it different from the others, in a few words.
        guidance_scale: the trainer's option of this name.
        scale: the argument of the pipeline's call that it becomes; `None` where there is none, or where guiders take it.
        kwargs: `pipeline_kwargs`.
        columns: dataset columns, two rows.
        lora: names of the modules that LoRA adapts; `None` where all weights are trained.
        network_lora: whether the LoRA is loaded into the network, because the pipeline has no way to do it.
        component: `trained_component`; `None` for the default.
        one_sample: whether the pipeline takes one sample at a time; of two rows, the second one is used where another is needed.
        dtype: for finite differences; float32 where the network cannot run in double.
        step: of the finite differences, relative to the state.
        output: name of the images among all that a modular pipeline makes, or names of these and their sound; `None` for other
            pipelines.
        fast: whether `make test` runs it; the others run in `make test-slow`.
    """

    name: str
    build: Callable[[], DiffusionPipeline | ModularPipeline]
    mechanism: str
    guidance_scale: float = 3.0
    scale: str | None = "guidance_scale"
    kwargs: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=lambda: {"prompt": list(PROMPTS)})
    lora: tuple[str, ...] | None = ("to_q", "to_k", "to_v", "to_out.0")
    network_lora: bool = False
    component: str | None = None
    one_sample: bool = False
    dtype: torch.dtype = torch.float64
    step: float = 1e-3
    output: str | list[str] | None = None
    fast: bool = False
