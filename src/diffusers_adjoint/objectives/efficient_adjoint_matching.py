r"""Efficient Adjoint Matching (2605.11480): a linear reference in place of the base, so that the adjoint has a closed form.

The reference is the memoryless process whose data are N(0, C); the base's density goes into the cost at the end. With the
model's own end points x_1, noised again to x_k = α_k x_1 + β_k ξ, the clean prediction that is asked for is

    x̂_1 = C/V_k · (α_k x_k + β_k² G),     V_k = α_k² C + β_k²,     G = λ∇r(x_1) + ∇log p_base(x_1) + x_1/C

which is the reference's posterior mean of x_1 plus its posterior variance C β_k²/V_k times G. Put otherwise, x_1 takes a step of
length C up the log density of the tilt, and is mixed with the reference's prediction from x_k. At the tilt the mean of x̂_1 given
x_k is the tilt's own clean prediction, whatever C is. Away from it C is the rate at which one sweep goes there, and as a step
uphill it overshoots once C is beyond twice the variance of the density there: of a mode, not of all data.

The base's score at x_1 is a prediction at the share of noise `noise`: of a base blurred by so much, with the network's own error
divided by its square. The equations are rebuilt from the paper's abstract and third parties' notes, and checked against laws
that are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.matching import LossSteps
from .papers import EFFICIENT_ADJOINT_MATCHING, Paper
from .targets import DiffusionChain, Scored, Targets

__all__ = ["EfficientAdjointMatching", "asked_clean"]


@dataclass(frozen=True)
class EfficientAdjointMatching:
    """Own samples, noised once for each loss step; the reward's gradient at the samples, no derivative of the network.

    An update evaluates the network K times for the samples, once for the base's score, and S times each for base and loss.

    Args:
        variance: C, the variance of the reference's data, in the square of the latents' unit; one number for all, or a list of
            one for each channel (the second axis of the latents).
        noise: share of noise at which the base's score is asked.

    Raises:
        ValueError: for a variance that is not above 0, or a share of noise that is not between 0 and 1.
        TypeError: for options that are no numbers.
    """

    variance: float | list[float] = 0.1
    noise: float = 0.05

    needs_gradient: ClassVar[bool] = True
    switches_adapter: ClassVar[bool] = False
    scores_end_points: ClassVar[bool] = True
    tilts: ClassVar[bool] = False
    paper: ClassVar[Paper] = EFFICIENT_ADJOINT_MATCHING

    def __post_init__(self) -> None:
        numbers = self.variance if isinstance(self.variance, list | tuple) else [self.variance]
        for number in [*numbers, self.noise]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise TypeError(f"{number!r} is no number; pass variance=0.1 or a list of numbers, and noise=0.05, say.")
        if not numbers or not all(0 < number < math.inf for number in numbers):
            raise ValueError(f"variance={self.variance!r} is no variance of data; pass a number above 0, or one a channel.")
        if not 0 < self.noise < 1:
            raise ValueError(f"noise={self.noise!r} is no share of noise; pass a number between 0 and 1, such as 0.05.")

    def integrator(self, predicts_scores: bool) -> str:
        """As `Method.integrator`.

        Raises:
            ValueError: where the base does not predict the scores of its own law.
        """
        if not predicts_scores:
            raise ValueError(
                "loss_type='efficient_adjoint_matching' asks the base for its score, which it has neither under guidance in "
                "training nor from an image; pass cfg_mode='none', or loss_type='adjoint_matching'."
            )
        return "posterior"

    def scales(self, chain: DiffusionChain) -> Tensor:
        """As `Objective.scales`."""
        self.integrator(chain.predicts_scores)
        return chain.posterior_stds

    def targets(self, chain: DiffusionChain, steps: LossSteps, score: Callable[[Tensor], Scored]) -> Targets:
        """As `Objective.targets`."""
        clean = chain.sample()
        variance = self._variance_of(clean)
        scored = score(clean)
        states, shifts, base_means = [], [], []
        with chain.base(), torch.no_grad():
            uphill = scored.tilt + chain.base_score(clean, self.noise)
            for k in steps.indices:
                x = chain.noised(clean, k)
                asked = asked_clean(clean, uphill, x, chain.levels[:, k], variance)
                base_means.append(chain.base_mean(k, x))
                shifts.append(chain.toward(asked, x, k) - base_means[-1])
                states.append(x)
        scales = self.scales(chain)[list(steps.indices)].to(clean)
        return Targets(torch.stack(states), steps, torch.stack(shifts), torch.stack(base_means), scales, scored)

    def _variance_of(self, clean: Tensor) -> Tensor:
        """C, to go with states (B, …)."""
        variance = torch.as_tensor(self.variance, dtype=clean.dtype, device=clean.device)
        if variance.ndim == 0:
            return variance
        if clean.ndim < 2 or len(variance) != clean.shape[1]:
            raise ValueError(
                f"variance has {len(variance)} numbers, but the latents' second axis is none of that length, they are "
                f"{tuple(clean.shape[1:])} each; pass one number for all."
            )
        return variance.view(-1, *[1] * (clean.ndim - 2))


def asked_clean(clean: Tensor, uphill: Tensor, x: Tensor, level: Tensor, variance: Tensor) -> Tensor:
    """x̂_1 of this file's first formula, with x_1/C multiplied out: (C α x + β² (x_1 + C ∇log p*(x_1)))/(α² C + β²).

    Args:
        clean: x_1, shape (B, …).
        uphill: ∇log p*(x_1) = λ∇r(x_1) + ∇log p_base(x_1), same shape.
        x: x_k = α x_1 + β ξ, same shape.
        level: α and β of step k, shape (2,).
        variance: C, broadcast against the others.
    """
    alpha, beta = level.tolist()
    moved = clean + variance * uphill
    return (variance * alpha * x + beta**2 * moved) / (alpha**2 * variance + beta**2)
