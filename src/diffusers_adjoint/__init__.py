"""Reward fine-tuning of diffusers pipelines with Adjoint Matching (arXiv 2409.08861), in the shape of a TRL trainer."""

from .adjoint import AdjointPath, full_adjoint, lean_adjoint
from .backpropagation import RewardBackpropagationTrainer
from .config import AdjointMatchingConfig
from .control_cost import ChainLoss, continuous_adjoint, continuous_adjoint_loss, discrete_adjoint
from .matching import LossSteps, choose_loss_steps, clip_loss, control, matching_loss, path_kl, regression_loss, step_kl
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
    "RewardBackpropagationTrainer",
    "Trajectory",
    "Transition",
    "choose_loss_steps",
    "clip_loss",
    "continuous_adjoint",
    "continuous_adjoint_loss",
    "control",
    "discrete_adjoint",
    "full_adjoint",
    "lean_adjoint",
    "matching_loss",
    "memoryless_scheduler",
    "path_kl",
    "regression_loss",
    "rollout",
    "step_kl",
]
