r"""One step of a memoryless sampler: a Gaussian whose mean is affine in the state and in the network's output.

    x_{k+1} = μ_k(x_k) + s_k ξ,      μ_k(x) = A_k x + C_k m(x, t_k),      ξ ~ N(0, I)

The direction of time in the whole package: **k = 0 is noise, k = K is data**. The paper's time is t = k/K on
a uniform grid (0 noise, 1 data); diffusers' timesteps and σ = 1 − t run down from 1 to 0.

| symbol | name here | shape | meaning |
|---|---|---|---|
| x_k | `states[k]` | (B, …) | state before step k, 0 ≤ k ≤ K |
| μ_k(x), s_k | `Transition.mean`, `Transition.std` | (B, …), scalar | law of the next state |
| m(x, t) | `model_output` | (B, …) | what the pipeline hands to `scheduler.step` |
| √Δ u_k | `control` | (B, …) | (μ_k^θ − μ_k^base) / s_k |
| ã_k | `adjoints[k]` | (B, …) | lean adjoint, reward units (nats) per state unit |
| x̂_K | the mean of step K − 1 | (B, …) | noiseless end point, where the reward is taken |
| λ | `reward_scale` | scalar | nats per unit of reward |
| S | `num_loss_steps` | int | steps of the grid that carry the loss in one update |
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Transition"]


@dataclass(frozen=True)
class Transition:
    """The distribution N(mean, std² I) of the next state given the current one.

    Args:
        mean: μ_k(x_k), shape (B, …).
        std: s_k ≥ 0, a number or a tensor that broadcasts against `mean`, state units.
    """

    mean: Tensor
    std: float | Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Next state μ_k + s_k ξ for standard normal `noise` ξ of the mean's shape."""
        return self.mean + self.std * noise
