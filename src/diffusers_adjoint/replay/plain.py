"""Call a `DiffusionPipeline`: its `__call__` is one function, which is rebuilt here without its `torch.no_grad` decorator."""

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

AUDIO = "audio"  # diffusers' name for the sound of a video, and the argument by which rewards ask for it


class Media(NamedTuple):
    """The output of a pipeline for B samples.

    Args:
        images: images (B, 3, H, W), videos (B, F, 3, H, W), or waveforms (B, …) if the pipeline makes sound only.
        audio: the sound of the videos, (B, …) as the pipeline returns it; `None` if there is none.
    """

    images: Tensor
    audio: Tensor | None = None


class PlainCall:
    """The call of a pipeline whose class defines `__call__`.

    Calling this object runs that function without `torch.no_grad`, and with an `enumerate` that visits only the chosen steps of
    the loop (see `replayable`).

    Args:
        pipeline: the pipeline; it is not modified.

    Attributes:
        source: name of the function that draws x_0. It is "prepare_latents" if the pipeline has this method; otherwise another
            prepare_… method that draws noise; otherwise "randn_tensor".
        insists_on_safety_checker: whether the call uses the safety checker directly, and so may fail without one: views then keep
            the user's. Other pipelines call it in a method that accepts `None`.
        exchanges_processors: whether the call replaces the attention processors before its loop and restores them after it, as
            pipelines with perturbed attention do.
        loggers: the logger of the module that defines the call.
        randn_tensor: the function `randn_tensor` in that module; `None` if there is none.
        outputs: names of the outputs, in order; empty if the code does not name exactly one output class.

    Raises:
        ValueError: if the call has no function that draws x_0 and can be replaced.
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
        """The class of the views that this call runs on: the pipeline's own."""
        return pipeline_class

    def undisturbed(self, view: DiffusionPipeline, **arguments: Any) -> Media:
        """Run the pipeline's own call, unchanged."""
        return self._media(type(view).__call__(view, **arguments))

    def __call__(self, view: DiffusionPipeline, randn_tensor: Any, **arguments: Any) -> Media:
        """Run the rebuilt call. `randn_tensor` replaces the function of that name, unless it is `None`."""
        if randn_tensor is not None:
            self._function.__globals__["randn_tensor"] = randn_tensor  # the globals are this object's own copy
        return self._media(self._function(view, **arguments))

    def _media(self, output: Any) -> Media:
        """Media from what a call with `return_dict=False` returns: a tuple, or only the frames (Stable Video Diffusion)."""
        if isinstance(output, Tensor):
            return Media(output)
        return Media(output[0], dict(zip(self.outputs, output, strict=False)).get(AUDIO))


def outputs_of(pipeline_class: type[DiffusionPipeline]) -> tuple[str, ...]:
    """Field names of the output class that a pipeline returns, in order.

    The class is found among the names in the code of `__call__`. The result is empty if the code names no output class, or
    several.
    """
    call = inspect.unwrap(pipeline_class.__call__)
    if not inspect.isfunction(call):
        return ()
    named = [call.__globals__.get(name) for name in call.__code__.co_names]
    outputs = {item for item in named if isinstance(item, type) and issubclass(item, BaseOutput)}
    return tuple(field.name for field in fields(outputs.pop())) if len(outputs) == 1 else ()


def _source(pipeline_class: type[DiffusionPipeline], names: tuple[str, ...]) -> str:
    """Name of the function that draws x_0 (see `PlainCall.source`); `names` are the names in the code of the call."""
    if hasattr(pipeline_class, "prepare_latents"):
        return "prepare_latents"
    for name in names:
        method = getattr(pipeline_class, name, None) if name.startswith("prepare_") else None
        if method is not None and "randn_tensor" in inspect.unwrap(method).__code__.co_names:
            return str(name)
    return "randn_tensor"
