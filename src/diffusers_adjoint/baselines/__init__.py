"""What Adjoint Matching is compared with, in the same harness."""

from .backpropagation import RewardBackpropagationTrainer

__all__ = ["RewardBackpropagationTrainer"]
