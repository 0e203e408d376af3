"""Stochastic optimal control on torch alone: reward fine-tuning is one of its problems, solved by the same functions."""

from .paths import COSINE, FLOW, GaussianPath, NoiseReport, check_noise, correlation, leftover_memory, memoryless_noise
from .problem import ControlProblem
from .sampler import PathSampler
from .solver import solve

__all__ = [
    "COSINE",
    "FLOW",
    "ControlProblem",
    "GaussianPath",
    "NoiseReport",
    "PathSampler",
    "check_noise",
    "correlation",
    "leftover_memory",
    "memoryless_noise",
    "solve",
]
