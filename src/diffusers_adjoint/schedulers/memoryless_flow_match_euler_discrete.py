"""Memoryless sampling for flow-matching pipelines (SD3, FLUX, Wan, …): diffusers' flow-match Euler scheduler, made stochastic."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin  # noqa: F401  SchedulerMixin: see below
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from .integrators import DEFAULT_INTEGRATOR
from .memoryless import MemorylessStep, check_integrator, require_unused, transition_table

__all__ = ["MemorylessFlowMatchEulerDiscreteScheduler"]

# When diffusers loads a saved pipeline that names this module, it first looks up `SchedulerMixin` in it.


class MemorylessFlowMatchEulerDiscreteScheduler(FlowMatchEulerDiscreteScheduler, MemorylessStep):
    """Sampler of flow-matching models by a memoryless SDE (2409.08861, Prop. 1): images do not depend on the start noise.

    At the noise level σ the state is x = (1 − σ) X_1 + σ X_0, of data X_1 and noise X_0. It replaces its parent: the same grid of
    σ with every shift, and a `step` with the same signature. Step k samples x_{k+1} = μ_k + s_k ξ with fresh noise ξ; the last of
    the K steps returns its mean without noise (paper, app. G.1).

    Args:
        integrator: discretisation of the SDE, a key of `integrators.INTEGRATORS`. All others as in the parent.

    Raises:
        ValueError: for an unknown integrator, or `stochastic_sampling=True`, which is another sampler: it adds noise to the
            estimate of the data, and does not keep the model's distribution.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        integrator: str = DEFAULT_INTEGRATOR,
    ) -> None:
        check_integrator(integrator)
        if stochastic_sampling:
            raise ValueError(
                "stochastic_sampling=True re-noises the data estimate, which is another sampler; pass stochastic_sampling=False."
            )
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | np.ndarray | None = None,
        mu: float | None = None,
        timesteps: list[float] | np.ndarray | None = None,
    ) -> None:
        """Set the parent's grid (see there), and compute the transition of each step.

        Raises:
            ValueError: if the noise grows along the grid, or a σ is not between 0 and 1.
        """
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu, timesteps=timesteps)
        if self.sigmas.max() > 1.001:
            raise ValueError(
                f"the grid starts at σ = {float(self.sigmas.max()):g}, but flow matching mixes (1 − σ) data and σ noise; pass "
                f"sigmas from 1 to 0, or use a model that is trained on that path."
            )
        share = self.sigmas.double().cpu().clamp(0, 1)  # rounding makes some spacings start slightly above 1
        # Inverted σ counts the data instead of the noise, and the network then predicts X_1 − X_0.
        alphas, betas = (share, 1 - share) if self.config.invert_sigmas else (1 - share, share)
        self._table = transition_table(alphas, betas, self._prediction_type, self.config.integrator)

    @property
    def _prediction_type(self) -> str:
        return "velocity" if self.config.invert_sigmas else "flow_prediction"

    def _end_at(self, ending: Any, noise: float) -> tuple[float, float, float]:
        sigma, end = (1 - noise, 1.0) if self.config.invert_sigmas else (noise, 0.0)
        ending.sigmas = torch.cat([self.sigmas[:-2], self.sigmas.new_tensor([sigma, end])])
        return sigma * self.config.num_train_timesteps, 1 - noise, noise

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return the sample. Some pipelines call this method of every scheduler except diffusers' flow-match one."""
        return sample

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
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """Draw the next state.

        Args:
            model_output: m = X_0 − X_1 as the network predicts it, shape (B, …).
            timestep: one of `timesteps`; used at the first call only, as in the parent, which then counts its steps.
            sample: x_k, same shape; its dtype is kept, the arithmetic is at least float32.
            s_churn, s_tmin, s_tmax, s_noise, per_token_timesteps: the parent's, in its order; only their defaults have a
                meaning here.
            generator: noise source, one or one a sample; `None` for the one of `set_generator`.
            return_dict: an output object rather than a tuple.

        Returns:
            x_{k+1}, or the mean alone at the last step.

        Raises:
            ValueError: for an integer timestep, past the end of the grid, or for an argument of the parent's sampler.
        """
        require_unused(
            s_churn=s_churn != 0,
            s_tmin=s_tmin != 0,
            s_tmax=s_tmax != math.inf,
            s_noise=s_noise != 1,
            per_token_timesteps=per_token_timesteps is not None,
        )
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"timestep={timestep} is an integer; pass an entry of scheduler.timesteps, not its position.")
        if self.step_index is None:
            self._init_step_index(timestep)
        prev_sample = self._next_sample(model_output, sample, self.step_index, generator)
        self._step_index += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
