"""A row of the family tests: how to build a pipeline in tiny form, and how to call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline

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
        kwargs: `pipeline_kwargs`.
        columns: dataset columns, two rows.
        lora: names of the modules that LoRA adapts; `None` where all weights are trained.
        component: `trained_component`; `None` for the default.
        fast: whether `make test` runs it; the others run in `make test-slow`.
    """

    name: str
    build: Callable[[], DiffusionPipeline]
    mechanism: str
    guidance_scale: float = 3.0
    kwargs: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=lambda: {"prompt": list(PROMPTS)})
    lora: tuple[str, ...] | None = ("to_q", "to_k", "to_v", "to_out.0")
    component: str | None = None
    fast: bool = False
