"""The call of a `DiffusionPipeline`: one function, which can be rebuilt out of its `torch.no_grad`."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from .stand_in import replayable

__all__ = ["PlainCall"]


class PlainCall:
    """The call of a pipeline that has a `__call__` of its own.

    Calling this runs that function out of `torch.no_grad`, and with an `enumerate` that a replayed loop obeys.

    Args:
        pipeline: never written to.

    Attributes:
        source: what draws x_0: "prepare_latents", in pipelines that have none another method that prepares, or "randn_tensor".
        insists_on_safety_checker: whether it runs its safety checker itself, where others hand over to a method that does
            without one. It then keeps the user's.
        exchanges_processors: whether it puts other attention processors in before its loop, and the old ones back after it, as
            pipelines with perturbed attention do.
        loggers: of its code.
        randn_tensor: the function of this name that its code calls; `None` if there is none.

    Raises:
        ValueError: if there is no place where a state could be put in.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._function = replayable(type(pipeline).__call__)
        self.__signature__ = inspect.signature(self._function)
        names = self._function.__code__.co_names
        self.source = _source(type(pipeline), names)
        self.insists_on_safety_checker = "safety_checker" in names
        self.exchanges_processors = "attn_processors" in names
        self.loggers = [logging.getLogger(self._function.__module__)]
        self.randn_tensor: Any = self._function.__globals__.get("randn_tensor")
        if self.source == "randn_tensor" and self.randn_tensor is None:
            raise ValueError(
                f"{type(pipeline).__name__} has no prepare_latents and calls no randn_tensor, where a state could be put in; "
                f"pass a pipeline that has one of them."
            )

    def view_class(self, pipeline_class: type[Any]) -> type[Any]:
        """The class of a view that this call runs on."""
        return pipeline_class

    def undisturbed(self, view: DiffusionPipeline, **arguments: Any) -> Any:
        """The pipeline's own call."""
        return images_of(type(view).__call__(view, **arguments))

    def __call__(self, view: DiffusionPipeline, randn_tensor: Any, **arguments: Any) -> Any:
        """The images; `randn_tensor`, unless `None`, takes the place of the function of that name."""
        if randn_tensor is not None:
            self._function.__globals__["randn_tensor"] = randn_tensor  # a copy that belongs to this object
        return images_of(self._function(view, **arguments))


def images_of(output: Any) -> Any:
    """The first output of a call with `return_dict=False`: a tuple, but from Stable Video Diffusion, which returns its frames."""
    return output if isinstance(output, Tensor) else output[0]


def _source(pipeline_class: type[DiffusionPipeline], names: tuple[str, ...]) -> str:
    """What draws x_0; `names` are those in the pipeline's call."""
    if hasattr(pipeline_class, "prepare_latents"):
        return "prepare_latents"
    for name in names:
        method = getattr(pipeline_class, name, None) if name.startswith("prepare_") else None
        if method is not None and "randn_tensor" in inspect.unwrap(method).__code__.co_names:
            return str(name)
    return "randn_tensor"
