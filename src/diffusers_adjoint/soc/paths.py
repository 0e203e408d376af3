r"""Paths from noise to data, noise schedules that keep their marginals, and checks of two properties of a schedule.

X_t = α(t) X_1 + β(t) X_0 with X_0 ~ N(0, I), t from 0 (noise) to 1 (data). With κ = α̇/α and η = β (κβ − β̇), the process

    dX = (κX + (σ²/2 + η) ∇log p_t) dt + σ dB

has these marginals for *every* σ(t) ≥ 0 (2409.08861, eqs. 10–11). A schedule may have two properties:

- **memoryless**: X_1 is independent of X_0. Prop. 1 requires lim_{t'→0} α_{t'} exp(−∫_{t'}^t χ/2β² ds) = 0 with χ = σ² − 2η.
  Since η/β² = κ − β̇/β, the expression is a constant times β_{t'} exp(−∫_{t'}^t σ²/2β² ds). α cancels, and the condition is

      ∫_0^t σ²/2β² ds = ∞.

  Only then does a reward tilt p_base, and not p_base·e^{V(x_0)}.
- **transferable**: σ² = 2η. Only then may a network fine-tuned with this σ be sampled with another one, including σ = 0 (Thm. 1).
  σ² = ρ·2η is memoryless for every ρ > 0, and transferable for ρ = 1 only.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["COSINE", "FLOW", "GaussianPath", "Noise", "NoiseReport"]
__all__ += ["check_noise", "correlation", "leftover_memory", "memoryless_noise", "noise_at"]
__all__ += ["require_time_alone"]

Noise = Callable[[Tensor], Tensor | float]
"""σ(t) ≥ 0 of times t in [0, 1], elementwise; may be infinite at t = 0."""


@dataclass(frozen=True)
class GaussianPath:
    """X_t = α(t) X_1 + β(t) X_0.

    Args:
        alpha, beta: elementwise, differentiable functions of t; α(0) = β(1) = 0, α(1) = β(0) = 1.
    """

    alpha: Callable[[Tensor], Tensor]
    beta: Callable[[Tensor], Tensor]

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """α̇ and β̇, shape of `t`."""
        one = torch.ones_like(t)
        return torch.func.jvp(self.alpha, (t,), (one,))[1], torch.func.jvp(self.beta, (t,), (one,))[1]

    def eta(self, t: Tensor) -> Tensor:
        """η = β (κβ − β̇) (2409.08861, eq. 11), shape of `t`; infinite at t = 0."""
        alpha_rate, beta_rate = self.rates(t)
        return (self.beta(t) * (alpha_rate / self.alpha(t) * self.beta(t) - beta_rate)).clamp(min=0)  # rounding, at t = 1


FLOW = GaussianPath(lambda t: t, lambda t: 1 - t)
"""Flow matching: X_t = t X_1 + (1 − t) X_0."""
COSINE = GaussianPath(lambda t: (math.pi / 2 * t).sin(), lambda t: (math.pi / 2 * t).cos())
"""Variance preserving, α² + β² = 1, with ᾱ = sin²(πt/2)."""


def memoryless_noise(path: GaussianPath) -> Noise:
    """σ = √(2η), the memoryless noise that is transferable too (2409.08861, Prop. 1)."""
    return lambda t: (2 * path.eta(t)).sqrt()


def require_time_alone(noise: Noise) -> None:
    """Raise TypeError if σ takes more than one argument. A function of the state alone cannot be detected."""
    try:
        signature = inspect.signature(noise)
    except ValueError:  # a builtin without a signature; calling it shows whether it fits
        return
    try:
        signature.bind(torch.tensor(0.5))
    except TypeError as error:
        raise TypeError(
            "noise must be a function of the time alone, σ(t); a σ that depends on the state is not covered."
        ) from error


def noise_at(noise: Noise, t: Tensor) -> Tensor:
    """σ(t), shape and dtype of `t`.

    Raises:
        TypeError: if σ takes more than the time.
        ValueError: if σ is negative or NaN, or does not have the shape of `t`.
    """
    require_time_alone(noise)
    sigma = torch.as_tensor(noise(t), dtype=t.dtype)
    if sigma.shape not in (t.shape, ()):
        raise ValueError(
            f"noise returned shape {tuple(sigma.shape)} for times of shape {tuple(t.shape)}; σ must be one number a time."
        )
    if not (sigma >= 0).all():
        raise ValueError(f"noise returned {sigma.min().item():g}; σ must be a number ≥ 0 at every time.")
    return sigma.expand_as(t)


def leftover_memory(path: GaussianPath, noise: Noise, variance: float = 1.0) -> float:
    """Correlation of X_0 and X_1 when the data are N(m, variance·I): exp(−½ ∫_0^1 σ²/S dt) with S = α²·variance + β².

    0 for memoryless noise, 1 without noise. Tilting by a linear reward then reaches the share 1 − correlation² of the shift; for
    flow matching and constant σ that is 1 − exp(−πσ²/(2√variance)).
    """
    y = torch.linspace(math.log(_EARLIEST), 0.0, 20_001, dtype=torch.float64)  # of log t: σ² may be as steep as 1/t
    t = y.exp()
    spread = path.alpha(t) ** 2 * variance + path.beta(t) ** 2
    return math.exp(-0.5 * torch.trapezoid(t * noise_at(noise, t) ** 2 / spread, y).item())


_EARLIEST = 1e-12
"""Where an integral from 0 begins: with σ² = 2η the correlation that is left from there is as small."""


def correlation(start: Tensor, end: Tensor) -> float:
    """Estimate the memory from samples: the correlation of x_0 and x_K over all their values; tensors of one shape.

    Its standard error is 1/√n for n independent values. It detects linear memory only, which for Gaussians is all memory.

    Raises:
        ValueError: if the shapes differ.
    """
    if start.shape != end.shape:
        raise ValueError(f"start has shape {tuple(start.shape)} but end {tuple(end.shape)}; pass x_0 and x_K of the same paths.")
    first, last = (x.detach().double() - x.detach().double().mean() for x in (start, end))
    return ((first * last).sum() / (first.norm() * last.norm())).item()


@dataclass(frozen=True)
class NoiseReport:
    """The properties of a noise schedule.

    Args:
        memoryless: whether X_1 is independent of X_0, so that a reward tilts the base distribution itself.
        transferable: whether σ² = 2η, so that the tuned network may be sampled with any noise.
        leftover_memory: correlation of X_0 and X_1 for data of variance 1.
    """

    memoryless: bool
    transferable: bool
    leftover_memory: float

    def __str__(self) -> str:
        law = "memoryless" if self.memoryless else "not memoryless"
        use = (
            "the tuned network may be sampled with any noise"
            if self.transferable
            else "sample the tuned network with this noise only"
        )
        return f"{law}: correlation of X_0 and X_1 {self.leftover_memory:.2g} for data of variance 1; {use}."


def check_noise(path: GaussianPath, noise: Noise) -> NoiseReport:
    """Check numerically which of the two properties a noise schedule has (2409.08861, Prop. 1 and Thm. 1).

    Memoryless: the integral of t·σ²/2β² over log t must diverge at 0, so the integrand must not decrease from t ~ 10⁻⁴ to
    t ~ 10⁻¹⁰. (Borderline schedules like σ² = 1/(t log²t) cannot be distinguished in this way.) Transferable: σ² = 2η to 10⁻⁶.
    """

    def density(low: float, high: float) -> float:
        t = torch.logspace(low, high, 200, dtype=torch.float64)
        return (t * noise_at(noise, t) ** 2 / (2 * path.beta(t) ** 2)).mean().item()

    early, late = density(-11, -9), density(-5, -3)
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    ratio = noise_at(noise, t) ** 2 / (2 * path.eta(t))
    return NoiseReport(
        memoryless=early > 0.5 * late and early > 0,
        transferable=bool((ratio - 1).abs().max() < 1e-6),
        leftover_memory=leftover_memory(path, noise),
    )
