"""The names that `diffusers_adjoint` exports. Importing this module imports torch, diffusers and transformers."""

from .baselines.backpropagation import RewardBackpropagationTrainer
from .config import AdjointMatchingConfig
from .core.adjoint import AdjointPath, full_adjoint, lean_adjoint
from .core.control_cost import ChainLoss, continuous_adjoint, continuous_adjoint_loss, discrete_adjoint
from .core.matching import LossSteps, choose_loss_steps, clip_loss, control, matching_loss, path_kl, regression_loss, step_kl
from .core.trajectory import Trajectory, rollout
from .core.transition import Transition
from .schedulers import (
    MemorylessDDIMScheduler,
    MemorylessEDMEulerScheduler,
    MemorylessFlowMatchEulerDiscreteScheduler,
    memoryless_scheduler,
)
from .trainer.adjoint_matching import AdjointMatchingTrainer

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
