"""Memoryless sampling for EDM pipelines with v-prediction (Stable Audio, Stable Video Diffusion): diffusers' EDM Euler scheduler,
made stochastic."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from diffusers import EDMEulerScheduler, SchedulerMixin  # noqa: F401  SchedulerMixin: see below
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
from torch import Tensor

from .integrators import DEFAULT_INTEGRATOR
from .memoryless import MemorylessStep, check_integrator, require_unused, transition_table

__all__ = ["MemorylessEDMEulerScheduler"]

# When diffusers loads a saved pipeline that names this module, it first looks up `SchedulerMixin` in it.


class MemorylessEDMEulerScheduler(EDMEulerScheduler, MemorylessStep):
    """Sampler of EDM v-prediction models by a memoryless SDE (2409.08861, Prop. 1): images do not depend on the start noise.

    At the noise level σ the state is x = (X_1 + σ X_0)/√(1 + σ²), of data X_1 and noise X_0.

    The parent's state is X_1 + σ X_0, which it divides for the network (2206.00364, table 1). Here the state is the network's
    input: α² + β² = 1 with α = 1/√(1 + σ²), and the network's output is the v-prediction of that path. So the start has unit
        variance, and
    nothing is scaled between steps. At σ = 0 both states are the data. The grid of σ is the parent's.

    Args:
        noise_conditioning: how σ is passed to the network: "log", as ln(σ)/4 like the parent; or "atan", as 2/π · atan(σ) like
            `CosineDPMSolverMultistepScheduler`.
        integrator: discretisation of the SDE, a key of `integrators.INTEGRATORS`. All others as in the parent.

    Raises:
        ValueError: for an unknown integrator or noise conditioning, another prediction type, sigma_data other than 1, or a grid
            that ends before the data.
    """

    _compatibles = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 1.0,
        sigma_schedule: Literal["karras", "exponential"] = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: Literal["v_prediction"] = "v_prediction",
        rho: float = 7.0,
        final_sigmas_type: Literal["zero"] = "zero",
        noise_conditioning: Literal["log", "atan"] = "log",
        integrator: str = DEFAULT_INTEGRATOR,
    ) -> None:
        check_integrator(integrator)
        needed = {"prediction_type": "v_prediction", "sigma_data": 1.0, "final_sigmas_type": "zero"}
        for name, value in needed.items():
            if self.config[name] != value:
                raise ValueError(f"{name}={self.config[name]!r} is not supported; pass {value!r}.")
        if noise_conditioning not in ("log", "atan"):
            raise ValueError(f"noise_conditioning={noise_conditioning!r} is unknown; pass 'log' or 'atan'.")
        super().__init__(
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            sigma_data=sigma_data,
            sigma_schedule=sigma_schedule,
            num_train_timesteps=num_train_timesteps,
            prediction_type=prediction_type,
            rho=rho,
            final_sigmas_type=final_sigmas_type,
        )

    def precondition_noise(self, sigma: float | Tensor) -> Tensor:
        """The network's conditioning for σ."""
        if self.config.noise_conditioning == "log":
            return super().precondition_noise(sigma)
        return torch.as_tensor(sigma).atan() / math.pi * 2

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return the sample: the state is already scaled."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Tensor | list[float] | None = None,
    ) -> None:
        """Set the parent's grid (see there), and compute the transition of each step."""
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas)
        levels = self.sigmas.double()
        alphas = (1 + levels**2).rsqrt()
        self._table = transition_table(alphas, levels * alphas, self.config.prediction_type, self.config.integrator)

    @property
    def _prediction_type(self) -> str:
        return self.config.prediction_type

    def _end_at(self, ending: Any, noise: float) -> tuple[float, float, float]:
        sigma = noise / (1 - noise)
        ending.sigmas = torch.cat([self.sigmas[:-2], self.sigmas.new_tensor([sigma, 0.0])])
        alpha = (1 + sigma**2) ** -0.5
        return float(self.precondition_noise(torch.tensor(sigma))), alpha, sigma * alpha

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
    ) -> EDMEulerSchedulerOutput | tuple[Tensor, Tensor]:
        """Draw the next state; steps may be taken in any order.

        Args:
            model_output: the network's prediction v = α X_0 − β X_1, shape (B, …).
            timestep: one of `timesteps`.
            sample: x_k, same shape; its dtype is kept, the arithmetic is at least float32.
            s_churn, s_tmin, s_tmax, s_noise, pred_original_sample: the parent's, in its order; only their defaults have a
                meaning here.
            generator: noise source, one or one a sample; `None` for the one of `set_generator`.
            return_dict: an output object rather than a tuple.

        Returns:
            x_{k+1}, or the mean alone at the last step, and the predicted data x̂_1.

        Raises:
            ValueError: before `set_timesteps`, for a timestep off the grid, or for an argument of the parent's sampler.
        """
        require_unused(
            s_churn=s_churn != 0,
            s_tmin=s_tmin != 0,
            s_tmax=s_tmax != math.inf,
            s_noise=s_noise != 1,
            pred_original_sample=pred_original_sample is not None,
        )
        index = self._index_of(timestep)
        prev_sample = self._next_sample(model_output, sample, index, generator)
        clean = self._predicted_data(model_output, sample, index)
        if not return_dict:
            return prev_sample, clean
        return EDMEulerSchedulerOutput(prev_sample=prev_sample, pred_original_sample=clean)
