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
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from .arguments import fixed_arguments, unguided, with_columns
from .conditioning import Conditioning, fresh, in_order
from .probe import ReplayStop, make_probe, probe_class, replayable_call
from .view import called_in_place_of, denoiser_name, make_view, processors_restored, view_class

__all__ = ["PipelineReplay"]


class PipelineReplay:
    """A pipeline's own code as prepare, predict and decode.

    Args:
        pipeline: pipeline with a transformer or a UNet whose x_0 comes from `prepare_latents`; never written to.
        scheduler: memoryless scheduler that the pipeline's code sees in place of its own; `prepare` sets its tables.
        num_inference_steps: K.
        guidance_scale: as in the pipeline's `__call__`; 1 for none.
        pipeline_kwargs: further arguments of every call (height, max_sequence_length, …).

    Attributes:
        component: the denoiser's name in the pipeline, "transformer" or "unet".

    Raises:
        TypeError: if `pipeline` is no diffusers pipeline.
        ValueError: if it cannot be replayed, or does not take an argument given here.
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
        self.component = denoiser_name(pipeline)
        self.pipeline = pipeline
        self.scheduler = scheduler
        self._call = replayable_call(type(pipeline))
        self._view_class = view_class(type(pipeline))
        self._probe_class = probe_class(type(scheduler))
        # Pipelines with perturbed attention exchange processors before the loop and put them back after it.
        self._exchanges_processors = "attn_processors" in self._call.__code__.co_names
        self._parameters = inspect.signature(self._call).parameters
        self._fixed = fixed_arguments(self.name, self._parameters, num_inference_steps, guidance_scale, pipeline_kwargs or {})

    @property
    def name(self) -> str:
        """The pipeline's class name, for messages."""
        return type(self.pipeline).__name__

    @property
    def embeds_guidance(self) -> bool:
        """Whether the guidance scale is an input of the (distilled) network, a condition rather than guidance."""
        return bool(getattr(self.pipeline, self.component).config.get("guidance_embeds", False))

    def prepare(self, columns: dict[str, list[Any]], generators: list[torch.Generator]) -> tuple[Tensor, Conditioning]:
        """Run the pipeline's call up to its loop: encode the prompts, draw x_0, set the scheduler's tables.

        Args:
            columns: a list of B values for each per-sample argument of the pipeline's `__call__`, "prompt" among them; other
                columns are left alone.
            generators: B generators, one a sample, so that a sample's x_0 does not depend on the batch it is in.

        Returns:
            x_0 of shape (B, …) in float32 (float64 for a float64 pipeline), and the conditioning for `predict` and `decode`.
        """
        arguments = self.arguments(columns, len(generators))
        probe = make_probe(self._probe_class, self.scheduler, visit=None)
        view = make_view(self.pipeline, self._view_class, probe, self.pipeline._execution_device)
        encoded: list[Any] = []
        latents: list[Any] = []
        view.__dict__["prepare_latents"] = _recording(view.prepare_latents, latents)
        if callable(getattr(view, "encode_prompt", None)):  # class-conditional pipelines have none
            view.__dict__["encode_prompt"] = _recording(view.encode_prompt, encoded)
        with torch.no_grad():
            out = self._run(view, {**arguments, "generator": list(generators)})
        if out is not None or probe.captured is not None or not latents:
            raise ValueError(
                f"{self.name} does not loop over scheduler.timesteps in its own __call__ after prepare_latents, so its loop "
                f"cannot be stopped before the first step; pass a pipeline that does."
            )
        conditioning = Conditioning(arguments, tuple(encoded), tuple(latents), len(generators))
        x = conditioning.start
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
        probe = make_probe(self._probe_class, self.scheduler, visit=(index - steps,))
        arguments = conditioning.call_kwargs if guided else self._unguided(conditioning.call_kwargs)
        self._run(self._replaying(probe, x, conditioning, denoiser), arguments)
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
        probe = make_probe(self._probe_class, self.scheduler, visit=())
        out = self._run(self._replaying(probe, x, conditioning), conditioning.call_kwargs)
        if out is None:
            raise ValueError(f"{self.name} calls scheduler.step outside its loop over timesteps; it cannot be replayed.")
        return out[0]

    def sample(self, columns: dict[str, list[Any]], generators: list[torch.Generator]) -> Tensor:
        """An ordinary call of the pipeline, its own scheduler, the same arguments: what a user of the pipeline sees.

        Args:
            columns, generators: as for `prepare`; the generators also feed a stochastic scheduler.

        Returns:
            Images (B, 3, H, W) in [0, 1], without graph.
        """
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        return self.ordinary_call(self.arguments(columns, len(generators)), generators, scheduler)[0]

    def arguments(self, columns: dict[str, list[Any]], batch_size: int, *, guided: bool = True) -> dict[str, Any]:
        """All arguments of the pipeline's `__call__` but the generators."""
        arguments = with_columns(self.name, self._parameters, self._fixed, columns, batch_size)
        return arguments if guided else self._unguided(arguments)

    def ordinary_call(self, arguments: dict[str, Any], generators: list[torch.Generator], scheduler: Any) -> Any:
        """The pipeline's own, undisturbed `__call__` on `scheduler`: what it returns, or None if the scheduler stopped it."""
        view = make_view(self.pipeline, self._view_class, scheduler, self.pipeline._execution_device)
        call = type(self.pipeline).__call__
        return self._run(view, {**arguments, "generator": list(generators)}, call)

    def _unguided(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return unguided(self._parameters, arguments, guidance_embedded=self.embeds_guidance)

    def _replaying(
        self, probe: Any, x: Tensor, conditioning: Conditioning, denoiser: nn.Module | None = None
    ) -> DiffusionPipeline:
        """A view that replays the recorded encodings and starts from x."""
        view = make_view(self.pipeline, self._view_class, probe, x.device)
        view.__dict__["encode_prompt"] = in_order("encode_prompt", conditioning.encoded)
        view.__dict__["prepare_latents"] = in_order("prepare_latents", conditioning.latents_with(x))
        if denoiser is not None:
            view.__dict__[self.component] = called_in_place_of(getattr(self.pipeline, self.component), denoiser)
        return view

    def _run(self, view: DiffusionPipeline, arguments: dict[str, Any], call: Callable[..., Any] | None = None) -> Any:
        """What the call returns, or None where the probe stopped it."""
        denoiser = getattr(view, self.component)
        with processors_restored(denoiser) if self._exchanges_processors else nullcontext():
            try:
                return (call or self._call)(view, **fresh(arguments))
            except ReplayStop:
                return None


def _recording(method: Callable[..., Any], returns: list[Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def recorder(*args: Any, **kwargs: Any) -> Any:
        returns.append(method(*args, **kwargs))
        return fresh(returns[-1])

    return recorder
