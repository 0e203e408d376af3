"""The trainer: a host's habits kept for a pipeline, and the method in `adjoint_matching`."""

from .adjoint_matching import AdjointMatchingTrainer

__all__ = ["AdjointMatchingTrainer"]
