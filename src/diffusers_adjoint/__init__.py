"""Reward fine-tuning of diffusers pipelines with Adjoint Matching (arXiv 2409.08861), in the shape of a TRL trainer."""

from .adjoint import AdjointPath, full_adjoint, lean_adjoint
from .config import AdjointMatchingConfig
from .matching import LossSteps, choose_loss_steps, clip_loss, control, matching_loss, path_kl, step_kl
from .objectives import ChainLoss, continuous_adjoint_loss, discrete_adjoint
from .schedulers import (
    MemorylessDDIMScheduler,
    MemorylessEDMEulerScheduler,
    MemorylessFlowMatchEulerDiscreteScheduler,
    memoryless_scheduler,
)
from .trainer import AdjointMatchingTrainer
from .trajectory import Trajectory, rollout
from .transition import Transition

__version__ = "0.1.0.dev0"

__all__ = [
    "AdjointMatchingConfig",
    "AdjointMatchingTrainer",
    "AdjointPath",
    "ChainLoss",
    "LossSteps",
    "MemorylessDDIMScheduler",
    "MemorylessEDMEulerScheduler",
    "MemorylessFlowMatchEulerDiscreteScheduler",
    "Trajectory",
    "Transition",
    "choose_loss_steps",
    "clip_loss",
    "continuous_adjoint_loss",
    "control",
    "discrete_adjoint",
    "full_adjoint",
    "lean_adjoint",
    "matching_loss",
    "memoryless_scheduler",
    "path_kl",
    "rollout",
    "step_kl",
]
