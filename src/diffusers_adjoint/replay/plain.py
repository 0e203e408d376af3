"""The call of a `DiffusionPipeline`: one function, which can be rebuilt out of its `torch.no_grad`."""

from __future__ import annotations

import inspect
import logging
from dataclasses import fields
from typing import Any, NamedTuple

from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from .stand_in import replayable

__all__ = ["AUDIO", "Media", "PlainCall", "outputs_of"]

AUDIO = "audio"  # as hosts call the sound that is made with a video, and rewards that ask for it


class Media(NamedTuple):
    """What a pipeline makes of B samples.

    Args:
        images: (B, 3, H, W), videos (B, F, 3, H, W) or, where nothing is seen, waveforms (B, …).
        audio: the sound of videos, (B, …) as the pipeline returns it; `None` where there is none.
    """

    images: Tensor
    audio: Tensor | None = None


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
        outputs: names of what it returns, in their order; none where its code does not name the class of it.

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
        self.outputs = outputs_of(type(pipeline))
        self.randn_tensor: Any = self._function.__globals__.get("randn_tensor")
        if self.source == "randn_tensor" and self.randn_tensor is None:
            raise ValueError(
                f"{type(pipeline).__name__} has no prepare_latents and calls no randn_tensor, where a state could be put in; "
                f"pass a pipeline that has one of them."
            )

    def view_class(self, pipeline_class: type[Any]) -> type[Any]:
        """The class of a view that this call runs on."""
        return pipeline_class

    def undisturbed(self, view: DiffusionPipeline, **arguments: Any) -> Media:
        """The pipeline's own call."""
        return self._media(type(view).__call__(view, **arguments))

    def __call__(self, view: DiffusionPipeline, randn_tensor: Any, **arguments: Any) -> Media:
        """The same; `randn_tensor`, unless `None`, takes the place of the function of that name."""
        if randn_tensor is not None:
            self._function.__globals__["randn_tensor"] = randn_tensor  # a copy that belongs to this object
        return self._media(self._function(view, **arguments))

    def _media(self, output: Any) -> Media:
        """Of a call with `return_dict=False`: a tuple, but from Stable Video Diffusion, which returns its frames."""
        if isinstance(output, Tensor):
            return Media(output)
        return Media(output[0], dict(zip(self.outputs, output, strict=False)).get(AUDIO))


def outputs_of(pipeline_class: type[DiffusionPipeline]) -> tuple[str, ...]:
    """Names of the fields of what a pipeline returns; none where its call makes no output, or several kinds of it.

    By the classes of outputs that the call's code names.
    """
    call = inspect.unwrap(pipeline_class.__call__)
    if not inspect.isfunction(call):
        return ()
    named = [call.__globals__.get(name) for name in call.__code__.co_names]
    outputs = {item for item in named if isinstance(item, type) and issubclass(item, BaseOutput)}
    return tuple(field.name for field in fields(outputs.pop())) if len(outputs) == 1 else ()


def _source(pipeline_class: type[DiffusionPipeline], names: tuple[str, ...]) -> str:
    """What draws x_0; `names` are those in the pipeline's call."""
    if hasattr(pipeline_class, "prepare_latents"):
        return "prepare_latents"
    for name in names:
        method = getattr(pipeline_class, name, None) if name.startswith("prepare_") else None
        if method is not None and "randn_tensor" in inspect.unwrap(method).__code__.co_names:
            return str(name)
    return "randn_tensor"
