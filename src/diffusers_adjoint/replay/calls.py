"""The three ways to run a pipeline's `__call__`: undisturbed, up to its loop, and again with what it prepared then.

Nothing is written to the user's pipeline: each call runs on a shallow copy that shares the networks.
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


_CASTS = logging.getLogger(ModelMixin.__module__)  # advises against every cast to float16, also of a VAE back to it


class PipelineCalls:
    """Runs of a pipeline's `__call__` with a scheduler of ours.

    Args:
        pipeline: never written to.
        component: name of its trained denoiser.

    Attributes:
        call: the pipeline's call as one function, with what is known of its code.

    Raises:
        ValueError: if there is no place where a state could be put in.
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
        """What the undisturbed call makes; `latents` records what its preparing methods return, or numbers that of its source."""
        view = self._view(scheduler)
        if latents is not None:
            for name in preparing_methods(view) if isinstance(latents, Preparations) else [self.call.source]:
                set_method(view, name, latents.recording(name, attrgetter(name)(view)))
        with self._processors_restored(view):
            return self.call.undisturbed(view, **fresh({**arguments, "generator": _given(generators)}))

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
        """What the recorded call makes, or `ReplayStop` where the probe leaves it; its preparing methods return `returns`.

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
        with ExitStack() as silence:
            for logger in self.call.loggers:  # they would say the same at every evaluation
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
    """As a user of one sample writes it: pipelines exist that take no list."""
    return generators[0] if len(generators) == 1 else list(generators)
