"""The three ways to run a pipeline's `__call__`: undisturbed, up to its loop, and again with what it prepared then.

Nothing is written to the user's pipeline: each call runs on a shallow copy that shares the networks.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from operator import attrgetter
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from .casting import vae_dtype
from .conditioning import Numbering, Preparations, Recording, Returned, copied, fresh, in_order, remembering
from .slices import Decode
from .stand_in import ReplayStop, replayable_call
from .view import (
    called_in_place_of,
    make_view,
    preparing_methods,
    processors_restored,
    quiet,
    set_method,
    text_encoders,
    view_class,
)

__all__ = ["PipelineCalls"]


_CASTS = logging.getLogger(ModelMixin.__module__)  # advises against every cast to float16, also of a VAE back to it


class PipelineCalls:
    """Runs of a pipeline's `__call__` with a scheduler of ours.

    Args:
        pipeline: never written to.
        component: name of its trained denoiser.

    Attributes:
        function: the `__call__`, out of its `torch.no_grad`.
        source: what draws x_0: "prepare_latents", in pipelines that have none another method that prepares, or "randn_tensor".
        insists_on_safety_checker: whether it runs its safety checker itself, where others hand over to a method that does
            without one. It then keeps the user's.
        exchanges_processors: whether it puts other attention processors in before its loop, and the old ones back after it, as
            pipelines with perturbed attention do.

    Raises:
        ValueError: if there is no place where a state could be put in.
    """

    def __init__(self, pipeline: DiffusionPipeline, component: str) -> None:
        self.function = replayable_call(type(pipeline))
        self.source = _source(type(pipeline), self.function)
        self.insists_on_safety_checker = "safety_checker" in self.function.__code__.co_names
        self.exchanges_processors = "attn_processors" in self.function.__code__.co_names
        self._pipeline, self._component = pipeline, component
        self._view_class = view_class(type(pipeline))
        self._logger = logging.getLogger(self.function.__module__)
        self._randn_tensor = self.function.__globals__.get("randn_tensor")
        if self.source == "randn_tensor" and self._randn_tensor is None:
            raise ValueError(
                f"{type(pipeline).__name__} has no prepare_latents and calls no randn_tensor, where a state could be put in; "
                f"pass a pipeline that has one of them."
            )

    def ordinary(
        self,
        scheduler: Any,
        arguments: dict[str, Any],
        generators: list[torch.Generator],
        latents: Preparations | Numbering | None = None,
    ) -> Any:
        """The images of the undisturbed call; `latents` records, or numbers, what its source returns."""
        view = self._view(scheduler)
        if latents is not None:
            set_method(view, self.source, latents.recording(self.source, getattr(view, self.source)))
        with self._processors_restored(view):
            return _images(type(self._pipeline).__call__(view, **fresh({**arguments, "generator": _given(generators)})))

    def up_to_loop(
        self, probe: Any, arguments: dict[str, Any], generators: list[torch.Generator], texts: dict[str, list[Any]]
    ) -> tuple[Tensor | None, Recording]:
        """The call until the probe stops it before its loop.

        Args:
            texts: memory of the text encoders, by name: what one call has encoded, the next one need not encode again.

        Returns:
            The timesteps that it was about to loop over, `None` if it was not; and what it prepared.
        """
        view, preparations = self._view(probe), Preparations(generators)
        for name, encoder in text_encoders(self._pipeline).items():
            remembered = remembering(encoder, texts.setdefault(name, []))
            view.__dict__[name] = called_in_place_of(encoder, remembered)
        for name in preparing_methods(view):
            set_method(view, name, preparations.recording(name, attrgetter(name)(view)))
        draw = preparations.recording("randn_tensor", self._randn_tensor) if self.source == "randn_tensor" else None
        timesteps = None
        try:
            with torch.no_grad():
                self._run(view, {**arguments, "generator": _given(generators)}, draw)
        except ReplayStop as stop:
            timesteps = stop.timesteps
        returns = {name: tuple(values) for name, values in preparations.returns.items()}
        return timesteps, Recording(arguments, returns, vae_dtype(view))

    def replayed(
        self,
        probe: Any,
        recording: Recording,
        generators: Iterable[torch.Generator],
        returns: dict[str, tuple[Returned, ...]],
        device: torch.device,
        denoiser: nn.Module | None = None,
        decoding: Callable[[Any], Decode] | None = None,
    ) -> Any:
        """The images of the recorded call, or `ReplayStop` where the probe leaves it; its preparing methods return `returns`.

        With `decoding` its VAE has another `decode`, made from the VAE.
        """
        view, generators = self._view(probe, device), copied(generators)
        if decoding is not None:
            set_method(view, "vae.decode", decoding(view.vae))
        if recording.vae_dtype != vae_dtype(view):  # the methods that cast it are not run again
            view.vae.to(dtype=recording.vae_dtype)
        replayed = {name: in_order(name, values, generators) for name, values in returns.items()}
        draw = replayed.pop("randn_tensor", None)
        for name, function in replayed.items():
            set_method(view, name, function)
        if denoiser is not None:
            view.__dict__[self._component] = called_in_place_of(getattr(self._pipeline, self._component), denoiser)
        with quiet(self._logger):  # it would say the same at every evaluation
            return self._run(view, {**recording.call_kwargs, "generator": _given(generators)}, draw)

    def _run(self, view: DiffusionPipeline, arguments: dict[str, Any], randn_tensor: Any) -> Any:
        if randn_tensor is not None:
            self.function.__globals__["randn_tensor"] = randn_tensor  # a copy that belongs to this object
        with self._processors_restored(view), quiet(_CASTS):
            return _images(self.function(view, **fresh(arguments)))

    def _processors_restored(self, view: DiffusionPipeline) -> Any:
        return processors_restored(getattr(view, self._component)) if self.exchanges_processors else nullcontext()

    def _view(self, scheduler: Any, device: torch.device | None = None) -> DiffusionPipeline:
        view = make_view(self._pipeline, self._view_class, scheduler, device or self._pipeline._execution_device)
        if self.insists_on_safety_checker:
            view.__dict__["safety_checker"] = self._pipeline.safety_checker
        return view


def _source(pipeline_class: type[DiffusionPipeline], call: Any) -> str:
    """What draws x_0."""
    if hasattr(pipeline_class, "prepare_latents"):
        return "prepare_latents"
    for name in call.__code__.co_names:
        method = getattr(pipeline_class, name, None) if name.startswith("prepare_") else None
        if method is not None and "randn_tensor" in inspect.unwrap(method).__code__.co_names:
            return str(name)
    return "randn_tensor"


def _given(generators: list[torch.Generator]) -> list[torch.Generator] | torch.Generator:
    """As a user of one sample writes it: pipelines exist that take no list."""
    return generators[0] if len(generators) == 1 else list(generators)


def _images(output: Any) -> Any:
    """The first output of a call with `return_dict=False`: a tuple, but from Stable Video Diffusion, which returns its frames."""
    return output if isinstance(output, Tensor) else output[0]
