"""The arguments of the pipeline's `__call__`: which are ours to set, which a user may set, and which mean guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["fixed_arguments", "unguided", "with_columns"]

# Scales that mean "no guidance" at 1. A network with distilled guidance takes the first one as an input.
_GUIDANCE_SCALES = ("guidance_scale", "true_cfg_scale", "guidance_scale_2")

# The replay sets these itself; what to do instead of setting them by hand.
_RESERVED = {
    "guidance_scale": "use the option guidance_scale",
    "num_inference_steps": "use the option num_inference_steps",
    "num_images_per_prompt": "use the option num_generations",
    "generator": "use the option seed",
    "latents": "use the option seed",
    "output_type": "remove it, images are always tensors",
    "return_dict": "remove it, images are always tensors",
}


def fixed_arguments(
    pipeline: str,
    parameters: Mapping[str, Any],
    num_inference_steps: int,
    guidance_scale: float,
    pipeline_kwargs: dict[str, Any],
) -> dict[str, Any]:
    """The arguments that every call shares.

    Args:
        pipeline: the pipeline's name, for messages.
        parameters: of the pipeline's `__call__`, by name.

    Raises:
        ValueError: if the pipeline does not take an argument, or the replay sets it itself.
    """
    for name in pipeline_kwargs:
        if name in _RESERVED:
            raise ValueError(f"pipeline_kwargs contains {name!r}, which is not set there; {_RESERVED[name]}.")
        if name == "prompt":
            raise ValueError("pipeline_kwargs contains 'prompt'; pass prompts as the dataset's 'prompt' column.")
        if name not in parameters:
            raise ValueError(f"pipeline_kwargs contains {name!r}, which {pipeline} does not take; remove it.")
    ours = {"num_inference_steps": num_inference_steps, "output_type": "pt", "return_dict": False}
    if "guidance_scale" in parameters:
        ours["guidance_scale"] = guidance_scale
    elif guidance_scale != 1:
        raise ValueError(f"{pipeline} takes no guidance_scale, but {guidance_scale} was asked for; leave it at 1.")
    return {**pipeline_kwargs, **ours}


def with_columns(
    pipeline: str, parameters: Mapping[str, Any], arguments: dict[str, Any], columns: dict[str, list[Any]], batch_size: int
) -> dict[str, Any]:
    """`arguments` and those columns that the pipeline takes; the others belong to the reward.

    Raises:
        ValueError: if prompts are missing, a column has another length than the batch, or its name is one the replay sets.
    """
    if "prompt" in parameters and "prompt" not in columns:
        raise ValueError(f"{pipeline} needs prompts, but the columns are {sorted(columns)}; add a 'prompt' column.")
    taken = {name: values for name, values in columns.items() if name in parameters}
    for name, values in taken.items():
        if name in _RESERVED:
            raise ValueError(f"column {name!r} would set an argument that the replay sets itself; rename the column.")
        if len(values) != batch_size:
            raise ValueError(f"column {name!r} has {len(values)} values for {batch_size} generators; pass one for each sample.")
    return {**arguments, **taken}


def unguided(parameters: Mapping[str, Any], arguments: dict[str, Any], *, guidance_embedded: bool) -> dict[str, Any]:
    """`arguments` with every guidance scale at 1; one that is embedded as an input of the network stays."""
    scales = _GUIDANCE_SCALES[1:] if guidance_embedded else _GUIDANCE_SCALES
    return {**arguments, **{name: 1.0 for name in scales if name in parameters}}
