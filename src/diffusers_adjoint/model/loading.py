"""A pipeline from what a user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..replay.view import require_undivided

__all__ = ["load_pipeline"]


def load_pipeline(
    model: str | Path | DiffusionPipeline, init_kwargs: dict[str, Any] | None = None, component: str | None = None
) -> DiffusionPipeline:
    """The pipeline itself, or the one of that name or in that folder; refused if it has no scheduler or no whole denoiser.

    Args:
        component: name of the denoiser; `None` for the usual ones.
    """
    if not isinstance(model, str | Path | DiffusionPipeline):
        raise TypeError(f"model is a {type(model).__name__}; pass a DiffusionPipeline, or the name or folder of one.")
    if not isinstance(model, DiffusionPipeline):
        model = DiffusionPipeline.from_pretrained(model, **(init_kwargs or {}))
    require_undivided(model, component)
    return model
