"""Memoryless sampling for β-schedule pipelines (SD 1.5, SDXL, PixArt, DiT, …): diffusers' DDIM scheduler, made stochastic."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, SchedulerMixin  # noqa: F401  SchedulerMixin: see below
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from .integrators import DEFAULT_INTEGRATOR
from .memoryless import MemorylessStep, check_integrator, require_unused, transition_table

__all__ = ["MemorylessDDIMScheduler"]

# When diffusers loads a saved pipeline that names this module, it first looks up `SchedulerMixin` in it.


class MemorylessDDIMScheduler(DDIMScheduler, MemorylessStep):
    """Sampler of β-schedule models by a memoryless SDE (2409.08861, Prop. 1): images do not depend on the start noise.

    The state is x = √ᾱ X_1 + √(1 − ᾱ) X_0, of data X_1 and noise X_0. It replaces its parent: the same ᾱ table and timesteps, and
    a `step` with the same signature. Step k samples x_{k+1} = μ_k + s_k ξ with fresh noise ξ; the last of the K steps returns its
    mean without noise (paper, app. G.1). With `integrator="ancestral"` it is DDIM with η = 1. The next timestep is taken from the
    grid, for every spacing. `clip_sample` and `thresholding` are switched off, because they would cut the gradient of the step.

    Args:
        variance_type: "fixed_small"; pipelines read it to see that no variance is learned.
        integrator: discretisation of the SDE, a key of `integrators.INTEGRATORS`. All others as in the parent.

    Raises:
        ValueError: for an unknown integrator or prediction type.
    """

    _compatibles = [
        "DDIMScheduler",
        "DDPMScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
    ]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading",
        rescale_betas_zero_snr: bool = False,
        variance_type: Literal["fixed_small"] = "fixed_small",
        integrator: str = DEFAULT_INTEGRATOR,
    ) -> None:
        check_integrator(integrator)
        if prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(
                f"prediction_type={prediction_type!r} is unknown; pass 'epsilon', 'sample' or 'v_prediction', or take "
                f"MemorylessFlowMatchEulerDiscreteScheduler for a flow model."
            )
        if clip_sample or thresholding:
            name = "clip_sample" if clip_sample else "thresholding"
            warnings.warn(
                f"{name}=True is switched off, because clipping the predicted data would cut the gradient of a step; samples may "
                f"leave the range in which the original scheduler kept them.",
                stacklevel=3,
            )
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            clip_sample=False,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=False,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the parent's timesteps, and compute the transition of each step.

        Raises:
            ValueError: for more steps than trained timesteps, a timestep beyond the table, or an epsilon model at zero
                terminal SNR.
        """
        super().set_timesteps(num_inference_steps, device=device)
        # With "trailing" and some K, rounding makes the parent's list one step too long, to timestep −1.
        self.timesteps = self.timesteps[:num_inference_steps]
        if int(self.timesteps[0]) >= len(self.alphas_cumprod):
            raise ValueError(
                f"{num_inference_steps} steps with steps_offset={self.config.steps_offset} reach timestep "
                f"{int(self.timesteps[0])}, but the model has {len(self.alphas_cumprod)}; pass fewer steps or steps_offset=0."
            )
        kept = torch.cat([self.alphas_cumprod[self.timesteps.cpu()].cpu(), self.final_alpha_cumprod.cpu().view(1)]).double()
        self._table = transition_table(kept.sqrt(), (1 - kept).sqrt(), self.config.prediction_type, self.config.integrator)

    @property
    def _prediction_type(self) -> str:
        return self.config.prediction_type

    def _end_at(self, ending: Any, noise: float) -> tuple[float, float, float]:
        alphas, betas = self.alphas_cumprod.double().sqrt(), (1 - self.alphas_cumprod.double()).sqrt()
        timestep = int((betas / (alphas + betas) - noise).abs().argmin())
        return timestep, float(alphas[timestep]), float(betas[timestep])

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Draw the next state; steps may be taken in any order.

        Args:
            model_output: the network's prediction, of the configured type, shape (B, …).
            timestep: one of `timesteps`.
            sample: x_k, same shape; its dtype is kept, the arithmetic is at least float32.
            eta, use_clipped_model_output, variance_noise: the parent's, in its order; only their defaults have a meaning here.
            generator: noise source, one or one a sample; `None` for the one of `set_generator`.
            return_dict: an output object rather than a tuple.

        Returns:
            x_{k+1}, or the mean alone at the last step, and the predicted data x̂_1.

        Raises:
            ValueError: before `set_timesteps`, for a timestep off the grid, or for an argument of the parent's noise.
        """
        # DDIMPipeline always passes the first two, `None` for the second among them.
        require_unused(
            eta=bool(eta), use_clipped_model_output=bool(use_clipped_model_output), variance_noise=variance_noise is not None
        )
        index = self._index_of(timestep)
        prev_sample = self._next_sample(model_output, sample, index, generator)
        clean = self._predicted_data(model_output, sample, index)
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=clean) if return_dict else (prev_sample, clean)
