"""The three ways to run a pipeline's `__call__`: unchanged, up to its loop, and replayed with the recorded preparations.

The user's pipeline is not modified: each call runs on a view, which is a shallow copy that shares the networks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from operator import attrgetter
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline
from torch import Tensor, nn

from .casting import vae_dtype
from .conditioning import Numbering, Preparations, Recording, Returned, copied, fresh, in_order, remembering
from .modular import ModularCall
from .plain import Media, PlainCall
from .slices import Decode
from .stand_in import ReplayStop
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


_CASTS = logging.getLogger(ModelMixin.__module__)  # warns at every cast to float16, even when a VAE is cast back to it


class PipelineCalls:
    """Runs a pipeline's `__call__` with a given scheduler in place of the pipeline's own.

    Args:
        pipeline: the pipeline; it is not modified.
        component: name of the denoiser to train.

    Attributes:
        call: the pipeline's call as one function, and the properties of its code.

    Raises:
        ValueError: if the call has no function that draws x_0 and can be replaced.
    """

    def __init__(self, pipeline: DiffusionPipeline | ModularPipeline, component: str) -> None:
        self.call = ModularCall(pipeline) if isinstance(pipeline, ModularPipeline) else PlainCall(pipeline)
        self._pipeline, self._component = pipeline, component
        self._view_class = view_class(self.call.view_class(type(pipeline)))

    def ordinary(
        self,
        scheduler: Any,
        arguments: dict[str, Any],
        generators: list[torch.Generator],
        latents: Preparations | Numbering | None = None,
    ) -> Media:
        """Run the unchanged call on `scheduler`, without stopping or replaying it.

        Args:
            scheduler: takes the place of the pipeline's own.
            arguments: of the pipeline's `__call__`, without the generators.
            generators: one for each sample; the call advances them.
            latents: `Preparations` records the return values of all preparing methods; `Numbering` replaces the latents that
                `call.source` returns by numbers.
        """
        view = self._view(scheduler)
        if latents is not None:
            for name in preparing_methods(view) if isinstance(latents, Preparations) else [self.call.source]:
                set_method(view, name, latents.recording(name, attrgetter(name)(view)))
        with self._processors_restored(view):
            return self.call.undisturbed(view, **fresh({**arguments, "generator": _given(generators)}))

    def up_to_loop(
        self, probe: Any, arguments: dict[str, Any], generators: list[torch.Generator], texts: dict[str, list[Any]]
    ) -> tuple[Tensor | None, Recording]:
        """Run the call until the probe stops it before its loop.

        Args:
            probe: a stand-in for the scheduler, from `make_probe` with `visit=None`.
            arguments: of the pipeline's `__call__`, without the generators.
            generators: one for each sample; the call advances them.
            texts: the encodings so far, for each text encoder by name. They are reused and extended, so that no text is encoded
                twice.

        Returns:
            The timesteps of the loop, shape (K',), or `None` if the call ended without a loop over them; and the recording of
            the preparing methods.
        """
        view, preparations = self._view(probe), Preparations(generators)
        for name, encoder in text_encoders(self._pipeline).items():
            remembered = remembering(encoder, texts.setdefault(name, []))
            view.__dict__[name] = called_in_place_of(encoder, remembered)
        for name in preparing_methods(view):
            set_method(view, name, preparations.recording(name, attrgetter(name)(view)))
        draws = self.call.source == "randn_tensor"
        draw = preparations.recording("randn_tensor", self.call.randn_tensor) if draws else None
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
    ) -> Media:
        """Run the recorded call again; its preparing methods return the values in `returns`.

        Args:
            probe: a stand-in for the scheduler, from `make_probe`; it chooses the steps of the loop.
            recording: of `up_to_loop`, for the arguments.
            generators: the samples' generators as they were before the recorded call; copies of them are used.
            returns: name of a preparing method → what it returns, call by call.
            device: where the pipeline is to run.
            denoiser: runs in place of the pipeline's own denoiser; `None` for the latter.
            decoding: makes a `decode` from the VAE, which replaces the VAE's own; `None` for the latter.

        Raises:
            ReplayStop: if the probe stops the call in its loop.
        """
        view, generators = self._view(probe, device), copied(generators)
        if decoding is not None:
            set_method(view, "vae.decode", decoding(view.vae))
        if recording.vae_dtype != vae_dtype(view):  # the methods that cast the VAE are not run again
            view.vae.to(dtype=recording.vae_dtype)
        replayed = {name: in_order(name, values, generators) for name, values in returns.items()}
        draw = replayed.pop("randn_tensor", None)
        for name, function in replayed.items():
            set_method(view, name, function)
        if denoiser is not None:
            view.__dict__[self._component] = called_in_place_of(getattr(self._pipeline, self._component), denoiser)
        with ExitStack() as silence:
            for logger in self.call.loggers:  # they would repeat their messages at every evaluation
                silence.enter_context(quiet(logger))
            return self._run(view, {**recording.call_kwargs, "generator": _given(generators)}, draw)

    def _run(self, view: DiffusionPipeline, arguments: dict[str, Any], randn_tensor: Any) -> Media:
        with self._processors_restored(view), quiet(_CASTS):
            return self.call(view, randn_tensor, **fresh(arguments))

    def _processors_restored(self, view: DiffusionPipeline) -> Any:
        return processors_restored(getattr(view, self._component)) if self.call.exchanges_processors else nullcontext()

    def _view(self, scheduler: Any, device: torch.device | None = None) -> DiffusionPipeline:
        view = make_view(self._pipeline, self._view_class, scheduler, device or self._pipeline._execution_device)
        if self.call.insists_on_safety_checker:
            view.__dict__["safety_checker"] = self._pipeline.safety_checker
        return view


def _given(generators: list[torch.Generator]) -> list[torch.Generator] | torch.Generator:
    """The generators as an argument of the call; one alone is passed as it is, because some pipelines accept no list."""
    return generators[0] if len(generators) == 1 else list(generators)
