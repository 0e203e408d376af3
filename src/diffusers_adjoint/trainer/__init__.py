"""The trainers. They extend `transformers.Trainer`, which comments here call "the host"; the method is in `adjoint_matching`."""

from .adjoint_matching import AdjointMatchingTrainer

__all__ = ["AdjointMatchingTrainer"]
