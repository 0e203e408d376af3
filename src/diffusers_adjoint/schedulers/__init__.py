"""Memoryless schedulers: replacements for a pipeline's own scheduler, with each step as an explicit Gaussian transition."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import diffusers
import torch

from .memoryless_ddim import MemorylessDDIMScheduler
from .memoryless_edm_euler import MemorylessEDMEulerScheduler
from .memoryless_flow_match_euler_discrete import MemorylessFlowMatchEulerDiscreteScheduler

__all__ = [
    "MemorylessDDIMScheduler",
    "MemorylessEDMEulerScheduler",
    "MemorylessFlowMatchEulerDiscreteScheduler",
    "MemorylessScheduler",
    "memoryless_scheduler",
]

MemorylessScheduler = MemorylessFlowMatchEulerDiscreteScheduler | MemorylessDDIMScheduler | MemorylessEDMEulerScheduler

_FLOW = (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler)
# Samplers of x = √ᾱ X_1 + √(1 − ᾱ) X_0 with a table of ᾱ. Those whose state is x/√ᾱ (Euler, Heun, LMS, …) scale it back before
# they call the network.
_BETA_SCHEDULE = (
    diffusers.CogVideoXDDIMScheduler,
    diffusers.CogVideoXDPMScheduler,
    diffusers.DDIMParallelScheduler,
    diffusers.DDIMScheduler,
    diffusers.DDPMParallelScheduler,
    diffusers.DDPMScheduler,
    diffusers.DEISMultistepScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.DPMSolverSDEScheduler,
    diffusers.DPMSolverSinglestepScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.HeunDiscreteScheduler,
    diffusers.KDPM2AncestralDiscreteScheduler,
    diffusers.KDPM2DiscreteScheduler,
    diffusers.LMSDiscreteScheduler,
    diffusers.PNDMScheduler,
    diffusers.SASolverScheduler,
    diffusers.UniPCMultistepScheduler,
)
# Samplers whose state is x = X_1 + σ X_0 on a grid of σ.
_EDM = (
    diffusers.CosineDPMSolverMultistepScheduler,
    diffusers.EDMDPMSolverMultistepScheduler,
    diffusers.EDMEulerScheduler,
)
_GRID_OPTIONS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def memoryless_scheduler(scheduler: Any, integrator: str | None = None) -> MemorylessScheduler:
    """The memoryless scheduler that corresponds to a pipeline's scheduler.

    It has the same noise level at each timestep, the same prediction type and the same spacing of timesteps. Only solvers with
    `use_flow_sigmas=True` get the spacing of flow-match schedulers with their shift. Flow-match schedulers and such solvers
    become a `MemorylessFlowMatchEulerDiscreteScheduler`; EDM schedulers of v-prediction models a `MemorylessEDMEulerScheduler`;
    all other samplers of a β-schedule a `MemorylessDDIMScheduler`. Solver options (order, algorithm, …) are ignored.

    Args:
        scheduler: the pipeline's scheduler; it is not changed.
        integrator: a key of `integrators.INTEGRATORS`; `None` for the default, or for that of a scheduler that is memoryless
            already.

    Raises:
        ValueError: for a scheduler without a memoryless counterpart (distilled and consistency samplers, EDM with another
            prediction type), or an unknown integrator.
    """
    chosen = {} if integrator is None else {"integrator": integrator}
    if isinstance(scheduler, _FLOW):
        flow = MemorylessFlowMatchEulerDiscreteScheduler(**_shared(scheduler, MemorylessFlowMatchEulerDiscreteScheduler) | chosen)
        if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            flow.set_shift(scheduler.shift)  # may have been set after construction
        return flow
    if _is_edm(scheduler):
        return _from_edm(scheduler, chosen)
    if not isinstance(scheduler, _BETA_SCHEDULE) or scheduler.config.get("timestep_type") == "continuous":
        raise ValueError(
            f"{type(scheduler).__name__} has no memoryless counterpart; use a model that is sampled with "
            f"FlowMatchEulerDiscreteScheduler, DDIMScheduler or a related solver."
        )
    if scheduler.config.get("use_flow_sigmas"):
        return _from_flow_solver(scheduler, chosen)
    return _from_beta_schedule(scheduler, chosen)


def _shared(scheduler: Any, cls: type) -> dict[str, Any]:
    """The scheduler's values for the arguments of `cls`; `from_config` would replace its defaults by those of `cls`."""
    return {name: scheduler.config[name] for name in inspect.signature(cls).parameters if name in scheduler.config}


def _from_flow_solver(scheduler: Any, chosen: dict[str, Any]) -> MemorylessFlowMatchEulerDiscreteScheduler:
    config = scheduler.config
    if config.prediction_type != "flow_prediction":
        raise ValueError(
            f"{type(scheduler).__name__} with use_flow_sigmas=True has prediction_type={config.prediction_type!r}; only "
            f"'flow_prediction' models have a memoryless flow-match scheduler."
        )
    shared = _shared(scheduler, MemorylessFlowMatchEulerDiscreteScheduler)
    return MemorylessFlowMatchEulerDiscreteScheduler(**shared | {"shift": config.flow_shift} | chosen)


def _is_edm(scheduler: Any) -> bool:
    """Whether a scheduler samples from x = X_1 + σ X_0 to the data on a grid of σ, with the v-prediction of that path."""
    config = scheduler.config
    continuous = config.get("timestep_type") == "continuous" and config.use_karras_sigmas
    unit = config.get("prediction_type") == "v_prediction" and config.get("sigma_data", 1.0) == 1.0
    known = config.get("sigma_min") is not None and config.get("final_sigmas_type") == "zero"
    return (isinstance(scheduler, _EDM) or continuous) and unit and known


def _from_edm(scheduler: Any, chosen: dict[str, Any]) -> MemorylessEDMEulerScheduler:
    cosine = isinstance(scheduler, diffusers.CosineDPMSolverMultistepScheduler)
    conditioning = {"noise_conditioning": "atan"} if cosine else {}
    return MemorylessEDMEulerScheduler(**_shared(scheduler, MemorylessEDMEulerScheduler) | conditioning | chosen)


def _from_beta_schedule(scheduler: Any, chosen: dict[str, Any]) -> MemorylessDDIMScheduler:
    config, shared = scheduler.config, _shared(scheduler, MemorylessDDIMScheduler)
    shared.pop("variance_type", None)  # a memoryless chain does not use a learned variance
    if "snr_shift_scale" in config or config.beta_schedule not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        # DDIM has no name for this noise schedule, so it gets the values of β.
        kept = scheduler.alphas_cumprod.double().cpu()
        previous = torch.cat([kept.new_ones(1), kept[:-1]])
        shared |= {"trained_betas": (1 - kept / previous).tolist(), "rescale_betas_zero_snr": False}
    if config.get("final_sigmas_type") == "sigma_min":
        shared["set_alpha_to_one"] = False
    for option in _GRID_OPTIONS:
        if config.get(option):
            warnings.warn(
                f"{option}=True of {type(scheduler).__name__}, which spaces its steps, is ignored; the memoryless scheduler "
                f"uses trained timesteps (set its timestep_spacing to choose them).",
                stacklevel=3,
            )
    return MemorylessDDIMScheduler(**shared | chosen)
