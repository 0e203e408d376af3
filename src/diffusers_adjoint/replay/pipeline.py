"""Replay of a diffusers pipeline: its own `__call__` as prepare → x_0, predict → m(x, t_k), decode → images.

Every pipeline hands its guided prediction to `scheduler.step`. With a scheduler that catches it (`probe.py`), the pipeline's
call, taken out of `torch.no_grad`, is the differentiable function that Adjoint Matching needs, whatever the network, its
guidance and its latents look like. Text encodings and starting latents are recorded once and replayed.

Nothing is written to the user's pipeline: each call runs on a shallow copy that shares the networks.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .conditioning import Conditioning, fresh, in_order
from .probe import ReplayStop, make_probe, replayable_call

__all__ = ["PipelineReplay"]

# Scales that mean "no guidance" at 1. A pipeline that distilled its guidance into the network takes the first one as an input.
_GUIDANCE_SCALES = ("guidance_scale", "true_cfg_scale", "guidance_scale_2")
_RECORDED = ("encode_prompt", "prepare_latents")


class PipelineReplay:
    """A pipeline's own code as prepare, predict and decode.

    Args:
        pipeline: any pipeline with a transformer or a UNet whose x_0 comes from `prepare_latents`; never written to.
        scheduler: memoryless scheduler that the pipeline's code sees in place of its own.
        num_inference_steps: K.
        guidance_scale: as in the pipeline's `__call__`; 1 for none.
        pipeline_kwargs: further arguments of every call (height, max_sequence_length, …).
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        scheduler: Any,
        num_inference_steps: int,
        *,
        guidance_scale: float = 1.0,
        pipeline_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.scheduler = scheduler
        self.component = next(name for name in ("transformer", "unet") if isinstance(getattr(pipeline, name, None), nn.Module))
        self._call = replayable_call(type(pipeline))
        # Perturbed-attention pipelines exchange processors before the loop and put them back after it; we leave in between.
        self._exchanges_processors = "attn_processors" in self._call.__code__.co_names
        self._parameters = inspect.signature(self._call).parameters
        self._call_kwargs = {
            **(pipeline_kwargs or {}),
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "output_type": "pt",
            "return_dict": False,
        }

    def prepare(self, columns: dict[str, list], generators: list[torch.Generator]) -> tuple[Tensor, Conditioning]:
        """Run the pipeline's call up to its loop: encode the prompts, draw x_0, set the scheduler's tables.

        Args:
            columns: a list of B values for each per-sample argument of the pipeline's `__call__`, "prompt" among them; other
                columns are left alone.
            generators: B generators, one a sample, so that a sample's x_0 does not depend on the batch it is in.

        Returns:
            x_0 of shape (B, …) in float32 (float64 for a float64 pipeline), and the conditioning for `predict` and `decode`.
        """
        kwargs = self._arguments(columns)
        probe = make_probe(self.scheduler, visit=None)
        view = self._view(probe, self.pipeline._execution_device)
        recorded: dict[str, list[Any]] = {name: [] for name in _RECORDED}
        for name, returns in recorded.items():
            view.__dict__[name] = _recording(getattr(view, name), returns)
        with torch.no_grad():
            self._run(view, {**kwargs, "generator": list(generators)})
        conditioning = Conditioning(kwargs, tuple(recorded["encode_prompt"]), tuple(recorded["prepare_latents"]), len(generators))
        x = _state_slot(conditioning.latents)
        return x.to(torch.promote_types(x.dtype, torch.float32)), conditioning

    def predict(
        self,
        x: Tensor,
        index: int,
        conditioning: Conditioning,
        *,
        guided: bool = True,
        denoiser: nn.Module | None = None,
    ) -> Tensor:
        """m(x, t_index): what the pipeline hands to `scheduler.step` when its loop is at `index` with the latents x.

        Differentiable in x and in the denoiser's parameters; evaluates the denoiser as often as the pipeline does in one step.

        Args:
            x: shape (B, …) as `prepare` gives it; rounded to the pipeline's own dtype on the way in.
            index: step of the grid, 0 ≤ index < K.
            conditioning: of the last `prepare` (the scheduler's tables are those of the last one).
            guided: False sets the guidance scales to 1; the embedding of a distilled guidance stays.
            denoiser: module to run in place of the pipeline's: a frozen copy, a wrapper around the pipeline's own, …

        Returns:
            The model output, shape (B, …), in the dtype that the pipeline computes it in.

        Raises:
            ValueError: if the index is not on the grid or x has another shape than x_0.
        """
        steps = len(self.scheduler.timesteps)
        if not 0 <= index < steps:
            raise ValueError(f"index={index} is not on the grid; pass 0 to {steps - 1}.")
        probe = make_probe(self.scheduler, visit=(index - steps,))
        kwargs = conditioning.call_kwargs if guided else self._unguided(conditioning.call_kwargs)
        self._run(self._replaying(probe, x, conditioning, denoiser), kwargs)
        if probe.captured is None:
            raise ValueError(f"{self.name} does not call scheduler.step at step {index}; it cannot be replayed.")
        return probe.captured

    def decode(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """Images of final latents x by the pipeline's own unpacking, VAE and post-processing; no denoiser evaluation.

        Args:
            x: shape (B, …), data.
            conditioning: as for `predict`.

        Returns:
            Images (B, 3, H, W) in [0, 1] in the pipeline's dtype, differentiable in x (the pipeline clamps them: a saturated
            pixel has no gradient).
        """
        probe = make_probe(self.scheduler, visit=())
        out = self._run(self._replaying(probe, x, conditioning), conditioning.call_kwargs)
        if out is None:
            raise ValueError(f"{self.name} calls scheduler.step outside its loop over timesteps; it cannot be replayed.")
        return out[0]

    def sample(self, columns: dict[str, list], generators: list[torch.Generator], *, scheduler: Any = None) -> Tensor:
        """An ordinary call of the pipeline with the same arguments: what a user of the pipeline sees.

        Args:
            columns, generators: as for `prepare`; the generators also feed a stochastic scheduler.
            scheduler: instead of the pipeline's own; a copy of it is used.

        Returns:
            Images (B, 3, H, W) in [0, 1], without graph.
        """
        scheduler = copy.deepcopy(self.pipeline.scheduler if scheduler is None else scheduler)
        view = self._view(scheduler, self.pipeline._execution_device)
        with torch.no_grad():
            return self._run(view, {**self._arguments(columns), "generator": list(generators)})[0]

    @property
    def name(self) -> str:
        """The pipeline's class name, for messages."""
        return type(self.pipeline).__name__

    def _arguments(self, columns: dict[str, list]) -> dict[str, Any]:
        return {**self._call_kwargs, **{name: values for name, values in columns.items() if name in self._parameters}}

    def _unguided(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        embedded = getattr(self.pipeline, self.component).config.get("guidance_embeds", False)
        scales = _GUIDANCE_SCALES[1:] if embedded else _GUIDANCE_SCALES
        return {**kwargs, **{name: 1.0 for name in scales if name in self._parameters}}

    def _view(self, probe: Any, device: torch.device) -> DiffusionPipeline:
        """The pipeline with another scheduler; shares all networks, owns its attributes."""
        view = copy.copy(self.pipeline)
        view.__class__ = _view_class(type(self.pipeline))
        # Through __dict__: setting a component the ordinary way rewrites the pipeline's config. The safety checker is left
        # out because it has no gradient and blackens what it dislikes.
        view.__dict__.update(scheduler=probe, safety_checker=None, _progress_bar_config={"disable": True}, _replay_device=device)
        return view

    def _replaying(
        self, probe: Any, x: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> DiffusionPipeline:
        """A view that replays the recorded encodings and starts from x."""
        view = self._view(probe, x.device)
        view.__dict__["encode_prompt"] = in_order("encode_prompt", conditioning.encoded)
        view.__dict__["prepare_latents"] = in_order("prepare_latents", _with_state(conditioning.latents, x))
        if denoiser is not None:
            view.__dict__[self.component] = _in_place_of(getattr(self.pipeline, self.component), denoiser)
        return view

    def _run(self, view: DiffusionPipeline, kwargs: dict[str, Any]) -> Any:
        """What the call returns, or None where the probe stopped it."""
        with _processors_restored(getattr(view, self.component)) if self._exchanges_processors else nullcontext():
            try:
                return self._call(view, **fresh(kwargs))
            except ReplayStop:
                return None


def _recording(method: Callable[..., Any], returns: list[Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def recorder(*args: Any, **kwargs: Any) -> Any:
        returns.append(method(*args, **kwargs))
        return fresh(returns[-1])

    return recorder


def _state_slot(latents: tuple[Any, ...]) -> Tensor:
    """x_0 among what `prepare_latents` returned: the first tensor; others (image latents, masks) are conditions."""
    first = latents[0]
    return first[0] if isinstance(first, tuple) else first


def _with_state(latents: tuple[Any, ...], x: Tensor) -> tuple[Any, ...]:
    slot = _state_slot(latents)
    if x.shape != slot.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be that of x_0, {tuple(slot.shape)}.")
    x = x.to(slot.dtype)  # states are kept in float32, the pipeline rounds its latents to this
    first = (x, *latents[0][1:]) if isinstance(latents[0], tuple) else x
    return (first, *latents[1:])


@functools.cache
def _stand_in_class(component_class: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_called"](*args, **kwargs)

    return type(component_class.__name__, (component_class,), {"__call__": call})


def _in_place_of(component: nn.Module, denoiser: nn.Module) -> nn.Module:
    """What the pipeline shall see as its denoiser when `denoiser` is to be called.

    A module of the component's class is taken as it is. A wrapper (DDP, compiled) lacks the attributes that pipelines read
    (config, dtype, …): then they see the component, and calling it calls the wrapper.
    """
    if isinstance(denoiser, type(component)):
        return denoiser
    stand_in = copy.copy(component)
    stand_in.__dict__["_called"] = denoiser
    stand_in.__class__ = _stand_in_class(type(component))
    return stand_in


@functools.cache
def _view_class(pipeline_class: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    # The pipeline's own property walks through all modules of all networks: milliseconds in every call.
    device = property(lambda view: view.__dict__["_replay_device"])
    return type(pipeline_class.__name__, (pipeline_class,), {"_execution_device": device})


@contextmanager
def _processors_restored(denoiser: Any) -> Iterator[None]:
    before = denoiser.attn_processors
    try:
        yield
    finally:
        denoiser.set_attn_processor(before)
