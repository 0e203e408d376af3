"""A number with its standard error, and how the two are printed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Estimate", "checked_samples", "sample_mean"]


@dataclass(frozen=True)
class Estimate:
    """A Monte Carlo estimate.

    Args:
        mean: the estimated value.
        standard_error: its standard error, same unit; NaN where the sample is too small to tell.
    """

    mean: float
    standard_error: float

    def __str__(self) -> str:
        """The value to the second significant digit of its standard error: "0.3476 ± 0.0012"."""
        if not (math.isfinite(self.standard_error) and self.standard_error > 0):
            return f"{self.mean:.4g}"
        decimals = max(0, 1 - math.floor(math.log10(self.standard_error)))
        return f"{self.mean:.{decimals}f} ± {self.standard_error:.{decimals}f}"


def sample_mean(values: Tensor) -> Estimate:
    """Mean of independent samples, with the standard error s/√N.

    Args:
        values: shape (N,), N ≥ 2, any unit; computed in float64.

    Raises:
        ValueError: if the shape is wrong or a value is not finite.
    """
    x = checked_samples("values", values)
    return Estimate(x.mean().item(), (x.std() / len(x) ** 0.5).item())


def checked_samples(name: str, values: Tensor) -> Tensor:
    """`values` as float64 of shape (N,) on the CPU, N ≥ 2, all finite; `name` is for the error message."""
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; pass one number a sample, shape (N,) with N ≥ 2.")
    # The CPU, because not every device has float64; these are a few thousand numbers.
    x = values.detach().cpu().to(torch.float64)
    if not torch.isfinite(x).all():
        first = int((~torch.isfinite(x)).nonzero()[0])
        raise ValueError(f"{name}[{first}] is {x[first].item()}; pass finite numbers only.")
    return x
