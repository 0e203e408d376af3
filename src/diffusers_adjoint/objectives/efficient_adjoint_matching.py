r"""Efficient Adjoint Matching (2605.11480): a linear reference process instead of the base, so that the adjoint has a closed
form.

The reference is the memoryless process for data N(0, C), and the base's density becomes a part of the terminal cost. Only the
score of that density is needed, which a network predicts near the data but not on them. So the model's own samples x_1 are
blurred to y = x_1 + bξ, and then noised further to x_k, which given x_1 is distributed as N(α_k x_1, β_k² I). The target for the
clean prediction is

    x̂_1 = (C α_k x_k + β_k² x_+)/(α_k² C + β_k²),     x_+ = y + (C + b²) (∇log p_b(y) + λ∇r(x_1))

where p_b is the base's distribution blurred by b. So y takes a gradient step of size C + b² on the log density of its tilt, and
is mixed with the clean prediction of the reference. For samples of the base and λ = 0, the mean of x̂_1 given x_k is the base's
own prediction, for any C and b. With a reward it is that of the tilt up to the blur b, because the reward is evaluated at x_1 and
not averaged over it: data of variance v move as if they had variance v + b².

C is also the step size of one update of the targets. As a gradient step it overshoots if it exceeds twice the variance of the
density there, which is that of a mode, not of all data. The equations are reconstructed from the paper's abstract and from
others' notes, which do not blur, and were checked against known distributions.
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
    """Efficient Adjoint Matching on the model's own samples, noised once for each loss step; needs no derivative of the network.

    An update evaluates the network K times for the samples, once for the base's score, and S times each for base and loss.

    Args:
        variance: C, the variance of the reference's data, in squared units of the latents; one number, or a list of one for each
            channel (the second axis of the latents).
        noise: ε, the share of noise at which the base's score is evaluated; b = ε/(1 − ε). Steps that start with less noise are
            not trained.

    Raises:
        ValueError: for a variance that is not above 0, or a share of noise that is not between 0 and 1.
        TypeError: for options that are not numbers.
    """

    variance: float | list[float] = 0.1
    noise: float = 0.1

    needs_gradient: ClassVar[bool] = True
    switches_adapter: ClassVar[bool] = False
    scores_end_points: ClassVar[bool] = True
    compares_images: ClassVar[bool] = False
    tilts: ClassVar[bool] = False
    paper: ClassVar[Paper] = EFFICIENT_ADJOINT_MATCHING

    def __post_init__(self) -> None:
        numbers = self.variance if isinstance(self.variance, list | tuple) else [self.variance]
        for number in [*numbers, self.noise]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise TypeError(f"{number!r} is not a number; pass variance=0.1 or a list of numbers, and noise=0.1.")
        if not numbers or not all(0 < number < math.inf for number in numbers):
            raise ValueError(
                f"variance={self.variance!r} is not a variance; pass a number above 0, or a list of one per channel."
            )
        if not 0 < self.noise < 1:
            raise ValueError(f"noise={self.noise!r} is not a share of noise; pass a number between 0 and 1, such as 0.1.")

    def integrator(self, predicts_scores: bool) -> str:
        """As `Method.integrator`.

        Raises:
            ValueError: if the base does not predict the scores of its own distribution.
        """
        if not predicts_scores:
            raise ValueError(
                "loss_type='efficient_adjoint_matching' needs the base's score, which a guided model or one that starts from an "
                "image does not predict; pass cfg_mode='none', or loss_type='adjoint_matching'."
            )
        return "posterior"

    def scales(self, chain: DiffusionChain) -> Tensor:
        """As `Objective.scales`."""
        self.integrator(chain.predicts_scores)
        return torch.where(chain.times < 1 - self.noise, chain.posterior_stds, 0.0)

    def targets(self, chain: DiffusionChain, steps: LossSteps, score: Callable[[Tensor], Scored]) -> Targets:
        """As `Objective.targets`."""
        clean = chain.sample()
        variance, blur = self._variance_of(clean), self.noise / (1 - self.noise)
        scored = score(clean)
        states, shifts, base_means = [], [], []
        with chain.base(), torch.no_grad():
            blurred = clean + _fresh(chain, clean, 0, blur)
            moved = blurred + (variance + blur**2) * (chain.base_score(blurred, self.noise) + scored.tilt)
            for k in steps.indices:
                alpha, beta = chain.levels[:, k].tolist()
                x = alpha * blurred + _fresh(chain, clean, k, (beta**2 - (alpha * blur) ** 2) ** 0.5)
                base_means.append(chain.base_mean(k, x))
                shifts.append(chain.toward(asked_clean(moved, x, alpha, beta, variance), x, k) - base_means[-1])
                states.append(x)
        scales = self.scales(chain)[list(steps.indices)].to(clean)
        return Targets(torch.stack(states), steps, torch.stack(shifts), torch.stack(base_means), scales, scored)

    def _variance_of(self, clean: Tensor) -> Tensor:
        """C, broadcastable against states (B, …)."""
        variance = torch.as_tensor(self.variance, dtype=clean.dtype, device=clean.device)
        if variance.ndim == 0:
            return variance
        if clean.ndim < 2 or len(variance) != clean.shape[1]:
            raise ValueError(
                f"variance has {len(variance)} numbers, but the latents have shape {tuple(clean.shape[1:])} each, with another "
                f"number of channels; pass one number for all."
            )
        return variance.view(-1, *[1] * (clean.ndim - 2))


def _fresh(chain: DiffusionChain, like: Tensor, k: int, std: float) -> Tensor:
    """Fresh noise of standard deviation `std`, from the chain's own generators."""
    return std / float(chain.levels[1, k]) * chain.noised(torch.zeros_like(like), k)


def asked_clean(moved: Tensor, x: Tensor, alpha: float, beta: float, variance: Tensor) -> Tensor:
    """The target clean prediction x̂_1, the first formula of this file.

    Args:
        moved: x_+, shape (B, …).
        x: x_k, same shape.
        alpha, beta: α_k and β_k.
        variance: C, broadcast against the others.
    """
    return (variance * alpha * x + beta**2 * moved) / (alpha**2 * variance + beta**2)
