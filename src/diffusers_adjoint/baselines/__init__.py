"""Other methods to compare Adjoint Matching with, on the same trainer."""

from .backpropagation import RewardBackpropagationTrainer

__all__ = ["RewardBackpropagationTrainer"]
