r"""A sampler of a Gaussian path with any noise, by steps that are exact for data N(m, I).

For such data the marginals are N(αm, S) with S = α² + β², and Y = X − αm is an Ornstein–Uhlenbeck process: since Ṡ = 2κS − 2η,
the drift of `paths.py` is (Ṡ/2S − σ²/2S) Y. With G = ∫ σ²/2S dt over a step from t to t'

    Y' = √(S'/S) e^{−G} Y + √(S' (1 − e^{−2G})) ξ.

Y = S x̂_0/β and m = x̂_1 − (α/β) x̂_0 turn this into a step for any network's predictions x̂_1, x̂_0 of data and noise,

    x' = α' x̂_1 + (√(SS') e^{−G} − αα')/β · x̂_0 + √(S' (1 − e^{−2G})) ξ,

of first order for other data. σ² = 2η gives e^{−G} = (α/√S)/(α'/√S'), the schedulers' `posterior` step, and G = ∞ in a first
step from t = 0; σ = 0 is a sampler of the ODE.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..core.trajectory import MeanFunction, Trajectory, rollout
from .paths import GaussianPath, Noise, check_noise, noise_at
from .problem import Control, ControlProblem, check_times

__all__ = ["PathSampler", "draw_path"]


def draw_path(mean: MeanFunction, start: Tensor, times: Tensor, stds: Tensor, generator: torch.Generator | None) -> Trajectory:
    """All K steps from `start`; the noise is drawn on the CPU, so that every device gets the same."""

    def noise(_: int) -> Tensor:
        return torch.randn(start.shape, generator=generator, dtype=start.dtype).to(start.device)

    return rollout(mean, start, times[:-1], stds.to(start), noise, keep_last=True)


_NODES = (torch.arange(256, dtype=torch.float64) + 0.5) / 256  # midpoints of a step


class PathSampler:
    """x_{k+1} ~ N(μ_k(x_k), s_k² I) with the marginals of a path, for a network that predicts the velocity.

    Args:
        path: the path from noise to data.
        noise: σ(t); `lambda t: 0.0` for the ODE, `memoryless_noise(path)` for fine-tuning.
        times: t_0 < … < t_K in [0, 1], shape (K + 1,).

    Raises:
        ValueError: if the times do not increase or leave [0, 1], or σ is not a number ≥ 0.
    """

    def __init__(self, path: GaussianPath, noise: Noise, times: Tensor) -> None:
        check_times(times)
        if times[0] < 0 or times[-1] > 1:
            raise ValueError(f"times run from {times[0].item():g} to {times[-1].item():g}; a path is defined on [0, 1].")
        self.path, self.noise, self.times = path, noise, times.double().cpu()  # tables: states may lie anywhere
        self._alphas, self._betas = path.alpha(self.times), path.beta(self.times)
        spread = self._alphas**2 + self._betas**2  # S of each time, (K + 1,)
        kept = torch.exp(-self._forgetting())  # e^{−G}, (K,)
        self._noise_kept = ((spread[:-1] * spread[1:]).sqrt() * kept - self._alphas[:-1] * self._alphas[1:]) / self._betas[:-1]
        self.stds = (spread[1:] * (1 - kept**2)).sqrt()  # s_k, (K,), float64

    def _forgetting(self) -> Tensor:
        """G of every step, (K,), by the midpoint rule; ∞ in a first step from t = 0 with memoryless noise."""
        t = self.times[:-1, None] + self.times.diff()[:, None] * _NODES
        spread = self.path.alpha(t) ** 2 + self.path.beta(t) ** 2
        density = noise_at(self.noise, t.flatten()).view_as(t) ** 2 / (2 * spread)
        found = density.mean(1) * self.times.diff()
        if self.times[0] == 0 and check_noise(self.path, self.noise).memoryless:
            found[0] = torch.inf
        return found

    def mean(self, velocity: Control) -> MeanFunction:
        """(k, x) → μ_k(x) of a network v(x, t) = E[Ẋ_t | X_t = x], differentiable in x and the network's weights."""
        alphas, betas = self._alphas, self._betas
        alpha_rates, beta_rates = self.path.rates(self.times)
        determinant = alphas * beta_rates - alpha_rates * betas

        def step(k: int, x: Tensor) -> Tensor:
            v = velocity(x, self.times[k].to(x))
            data = (beta_rates[k] * x - betas[k] * v) / determinant[k]
            noise = (alphas[k] * v - alpha_rates[k] * x) / determinant[k]
            return alphas[k + 1] * data + self._noise_kept[k] * noise

        return step

    def sample(self, velocity: Control, start: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """States x_0 … x_K from `start` = x_0, shape (K + 1, B, …); `generator` on the CPU."""
        return draw_path(self.mean(velocity), start, self.times, self.stds, generator).states

    def tilt(
        self, base_velocity: Control, reward: Callable[[Tensor], Tensor], *, allow_biased_schedule: bool = False
    ) -> ControlProblem:
        """Reward fine-tuning as a control problem: g = −r, and the optimum samples p_base·e^r.

        Args:
            base_velocity: the base network v(x, t).
            reward: r in nats, (B, …) → (B,), differentiable.
            allow_biased_schedule: allow noise that is not memoryless; the optimum is then p_base·e^{r + V(x_0)}, not the tilt.

        Raises:
            ValueError: if the noise is not memoryless or the times do not run from 0 to 1, unless that is allowed.
        """
        if (self.times[0] > 0 or self.times[-1] < 1) and not allow_biased_schedule:
            raise ValueError(
                f"times run from {self.times[0].item():g} to {self.times[-1].item():g}, not from noise to data, which "
                f"biases the tuned distribution; pass times from 0 to 1, or allow_biased_schedule=True."
            )
        report = check_noise(self.path, self.noise)
        if not report.memoryless and not allow_biased_schedule:
            raise ValueError(
                f"the noise is {report} The tuned distribution would be biased, because x_1 depends on x_0; "
                f"pass memoryless_noise(path), or allow_biased_schedule=True."
            )
        if not (report.memoryless and report.transferable):
            warnings.warn(f"the noise is {report}", stacklevel=2)
        return ControlProblem(self.mean(base_velocity), self.times, self.stds, lambda x: -reward(x))
