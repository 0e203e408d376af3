"""A number with its standard error, and how the two are printed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Estimate", "between_prompt_std", "by_prompt", "checked_samples", "finite", "prompt_difference", "prompt_differences"]
__all__ += ["prompt_mean", "prompt_means", "sample_mean", "within_prompt_std"]


@dataclass(frozen=True)
class Estimate:
    """A Monte Carlo estimate.

    Args:
        mean: the estimated value.
        standard_error: its standard error, same unit; NaN where the sample is too small to tell.
    """

    mean: float
    standard_error: float

    @property
    def differs_from_zero(self) -> bool:
        """Whether it is more than three standard errors away from 0. For few prompts (P < 10) the error itself is uncertain."""
        return abs(self.mean) > 3 * self.standard_error

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
    return Estimate(x.mean().item(), _standard_error(x))


def prompt_mean(values: Tensor) -> Estimate:
    """Mean over prompts of the prompts' means, with its standard error s/√P over prompts.

    Args:
        values: shape (P, N), N samples of each of P prompts, any unit, NaN where one is missing; computed in float64. A prompt
            without any value is left out.

    Returns:
        Estimate; for one prompt its error is s/√N over samples. The mean is NaN without any value, and the error is NaN for a
        single number.

    Raises:
        ValueError: if the shape is wrong or a value is infinite.
    """
    prompts = [row[~row.isnan()] for row in _checked_table("values", values)]
    prompts = [row for row in prompts if len(row)]
    if not prompts:
        return Estimate(math.nan, math.nan)
    means = torch.stack([row.mean() for row in prompts])
    return Estimate(means.mean().item(), _standard_error(means if len(means) > 1 else prompts[0]))


def prompt_difference(before: Tensor, after: Tensor) -> Estimate:
    """`prompt_mean` of after − before, for samples paired by seed; variation that both share does not count as error.

    Args:
        before, after: shape (P, N), for the same prompts and seeds, NaN where a sample is missing; its partner is left out, too.

    Raises:
        ValueError: if the shapes are wrong or differ, or a value is infinite.
    """
    x, y = _checked_table("before", before), _checked_table("after", after)
    if x.shape != y.shape:
        raise ValueError(f"before has shape {tuple(x.shape)} but after {tuple(y.shape)}; pass both for the same samples.")
    return prompt_mean(y - x)


def prompt_means(values: Mapping[str, Tensor]) -> dict[str, Estimate]:
    """`prompt_mean` of several tables, name → (P, N)."""
    return {name: prompt_mean(table) for name, table in values.items()}


def prompt_differences(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Estimate]:
    """`prompt_difference` of several tables, name → (P, N).

    Raises:
        ValueError: if the names or shapes differ, a shape is wrong, or a value is infinite.
    """
    if before.keys() != after.keys():
        raise ValueError(f"before has values of {sorted(before)} but after {sorted(after)}; pass the same for both.")
    return {name: prompt_difference(before[name], after[name]) for name in before}


def within_prompt_std(values: Tensor) -> Estimate:
    """Standard deviation of the samples of one prompt, pooled over prompts: √(Σ (x − mean of its prompt)² / Σ (n_i − 1)).

    A number added to all samples of one prompt does not change it.

    Args:
        values: shape (P, N), N samples of each of P prompts, any unit, NaN where one is missing; computed in float64.

    Returns:
        Estimate with the standard error std/√(2ν) of normal samples, ν = Σ (n_i − 1). NaN if no prompt has two samples.

    Raises:
        ValueError: if the shape is wrong or a value is infinite.
    """
    x = _checked_table("values", values)
    freedom = (x.isfinite().sum(1) - 1).clamp(min=0).sum().item()
    if freedom == 0:
        return Estimate(math.nan, math.nan)
    std = ((x - x.nanmean(1, keepdim=True)).square().nansum() / freedom).sqrt().item()
    return Estimate(std, std / math.sqrt(2 * freedom))


def between_prompt_std(values: Tensor) -> float:
    """Standard deviation of the prompts' means; NaN if fewer than two prompts have a sample.

    Args:
        values: as for `within_prompt_std`.
    """
    means = _checked_table("values", values).nanmean(1)
    means = means[means.isfinite()]
    return means.std().item() if len(means) > 1 else math.nan


def _standard_error(x: Tensor) -> float:
    """s/√N of (N,); NaN for one number."""
    return (x.std() / len(x) ** 0.5).item() if len(x) > 1 else math.nan


def checked_samples(name: str, values: Tensor) -> Tensor:
    """`values` as float64 of shape (N,) on the CPU, N ≥ 2, all finite; `name` is for the error message."""
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; pass one number a sample, shape (N,) with N ≥ 2.")
    return finite(name, values)


def by_prompt(name: str, values: Tensor) -> Tensor:
    """Samples of one prompt, (N,), or of several, (P, N), N ≥ 2, as finite float64 of shape (P, N) on the CPU."""
    if values.ndim not in (1, 2) or values.shape[-1] < 2 or not len(values):
        shape = tuple(values.shape)
        raise ValueError(f"{name} has shape {shape}; pass one number a sample, shape (N,) or (prompts, N) with N ≥ 2.")
    return torch.atleast_2d(finite(name, values))


def finite(name: str, values: Tensor) -> Tensor:
    """`values` as float64 on the CPU; raises ValueError for NaN and infinite ones."""
    x = _float64(values)
    _refuse(name, x, ~torch.isfinite(x), "pass finite numbers only")
    return x


def _checked_table(name: str, values: Tensor) -> Tensor:
    """`values`, (P, N), as float64 on the CPU; raises ValueError for infinite ones."""
    if values.ndim != 2 or not values.numel():
        raise ValueError(f"{name} has shape {tuple(values.shape)}; pass one number a sample, shape (prompts, samples).")
    x = _float64(values)
    _refuse(name, x, torch.isinf(x), "pass finite numbers, NaN where one is missing")
    return x


def _float64(values: Tensor) -> Tensor:
    # On the CPU, because not every device has float64; these are a few thousand numbers.
    return values.detach().cpu().to(torch.float64)


def _refuse(name: str, x: Tensor, bad: Tensor, instead: str) -> None:
    if bad.any():
        first = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}{first} is {x[tuple(first)].item()}; {instead}.")
