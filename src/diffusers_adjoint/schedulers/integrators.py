r"""Discretisations of the memoryless SDE in flow coordinates, which all schedulers share.

Dividing a Gaussian path X = α X_1 + β X_0 by α + β gives the flow path t X_1 + (1 − t) X_0 with t = α/(α + β), and turns its
memoryless SDE (σ² = 2η, 2409.08861, Prop. 1) into that of the flow path. So flow matching and every β-schedule share the same
functions. With the velocity v = E[X_1 − X_0 | X_t], κ = 1/t and η = (1 − t)/t, a step from t to t + h is

    x' = state · x + velocity · v(x, t) + std · ξ

The SDE dX = (2v − κX)dt + √(2η) dB is singular at t = 0, and its last steps have hardly any noise. The integrators below differ
in how they treat the two ends. `benchmarks/discretisation.py` measures their effect on the tilted distribution.

Only `ancestral` and `posterior` end a grid that goes to t = 1 in x̂_1 itself: the mean of the last step of the others is
x̂_1 − h x̂_0 (`euler`, `local_linear`) or x̂_1 − 2h x̂_0 (`compensated`), which leaves visible noise in an image when that last
step is long, as on the grids 1, 1 − 1/K, …, 1/K that FLUX-like pipelines pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["DEFAULT_INTEGRATOR", "INTEGRATORS", "StepCoefficients"]


@dataclass(frozen=True)
class StepCoefficients:
    """x' = state·x + velocity·v + std·ξ for every step of a grid; three tensors of shape (K,), float64."""

    state: Tensor
    velocity: Tensor
    std: Tensor


def euler(t: Tensor, h: Tensor) -> StepCoefficients:
    """Euler–Maruyama with the paper's offset: κ = 1/(t + h), σ² = 2(1 − t + h)/(t + h) (2409.08861, eqs. 40, 236)."""
    return StepCoefficients(1 - h / (t + h), 2 * h, (2 * h * (1 - t + h) / (t + h)).sqrt())


def compensated(t: Tensor, h: Tensor) -> StepCoefficients:
    """σ of `euler`, with the drift v + σ²/(2η) (v − κx) that keeps the marginals for it (2409.08861, eq. 4); finite at t = 0."""
    pull = (1 - t + h) / ((t + h) * (1 - t))  # σ²/(2η) · κ
    return StepCoefficients(1 - h * pull, h * (1 + pull * t), (2 * h * (1 - t + h) / (t + h)).sqrt())


def local_linear(t: Tensor, h: Tensor) -> StepCoefficients:
    """The linear part is solved exactly with v constant over the step; both offsets are h (2606.19162, app. G)."""
    u, u_next = t + h, t + 2 * h
    phi = u / u_next
    variance = (1 + 2 * h) * (1 - phi**2) - 2 / 3 * (u_next - phi**2 * u)
    return StepCoefficients(phi, u_next * (1 - phi**2), variance.clamp(min=0).sqrt())


def ancestral(t: Tensor, h: Tensor) -> StepCoefficients:
    """The exact mean E[X_{t+h} | X_t], with the noise for data that equal x̂_1: DDIM with η = 1 (2409.08861, eq. 219).

    The last step of a grid that ends at t = 1 has no noise, and ends at x̂_1.
    """
    return _bridge(t, h, data_variance=0.0)


def posterior(t: Tensor, h: Tensor) -> StepCoefficients:
    """The exact mean with the noise for data N(m, I), for any m: every step is the exact posterior of such data.

    In VP coordinates this is DDPM's large variance 1 − ᾱ/ᾱ' (2006.11239, §3.2). The last step has mean x̂_1 and the remaining
    posterior noise of such data, so it can carry a control.
    """
    return _bridge(t, h, data_variance=1.0)


def _bridge(t: Tensor, h: Tensor, data_variance: float) -> StepCoefficients:
    t_next = t + h
    carried = t / t_next  # X_t = carried · X_{t_next} + fresh noise: backwards in time, the memoryless SDE only adds noise
    fresh = (1 - t) ** 2 - (carried * (1 - t_next)) ** 2
    old_noise = carried * (1 - t_next) ** 2 / (1 - t)  # coefficient of x̂_0 = x − t v beside t_next · x̂_1, x̂_1 = x + (1 − t) v
    marginal, marginal_next = ((1 - u) ** 2 + u**2 * data_variance for u in (t, t_next))
    std = (marginal_next / marginal * fresh.clamp(min=0)).sqrt()
    return StepCoefficients(t_next + old_noise, t_next * (1 - t) - old_noise * t, std)


INTEGRATORS: dict[str, Callable[[Tensor, Tensor], StepCoefficients]] = {
    "euler": euler,
    "compensated": compensated,
    "local_linear": local_linear,
    "ancestral": ancestral,
    "posterior": posterior,
}
# Used for memoryless images, and for the paths of every objective but score pairing. If a clean end point matters more (few steps
# and a large shift), Table 5 of benchmarks/discretisation.py prefers "ancestral".
DEFAULT_INTEGRATOR = "posterior"
