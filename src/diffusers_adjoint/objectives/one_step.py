r"""The one-step adjoint: the reward's gradient at the base's clean prediction, differentiated through that one prediction.

    δ_k = g_k (∂x̂_1/∂x)ᵀ λ∇r(x̂_1(x_k)),     g_k = ∂μ_k/∂score

It replaces log E[e^{λr} | x_k] by λ r(E[x_1 | x_k]), so its fixed point is *not* the tilted distribution. It is good near the
data, where one prediction is accurate, and worst near the noise. At pure noise, whose score does not depend on the data, the
shift is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.adjoint import pulled_back
from ..core.matching import LossSteps
from .papers import ADJOINT_MATCHING, Paper
from .targets import DiffusionChain, Scored, Targets

__all__ = ["OneStep"]


@dataclass(frozen=True)
class OneStep:
    """The one-step adjoint: one evaluation of the base and one reward for each loss step; biased, for comparison."""

    needs_gradient: ClassVar[bool] = True
    switches_adapter: ClassVar[bool] = False
    scores_end_points: ClassVar[bool] = False
    compares_images: ClassVar[bool] = False
    tilts: ClassVar[bool] = False
    paper: ClassVar[Paper] = ADJOINT_MATCHING

    def integrator(self, predicts_scores: bool) -> str:
        """As `Method.integrator`."""
        return "posterior"

    def scales(self, chain: DiffusionChain) -> Tensor:
        """As `Objective.scales`."""
        return chain.posterior_stds

    def targets(self, chain: DiffusionChain, steps: LossSteps, score: Callable[[Tensor], Scored]) -> Targets:
        """As `Objective.targets`; scores the clean predictions of every loss step, and reports those of the last one."""
        path = chain.rollout()
        gains = chain.gains
        gains = torch.where(gains.isfinite(), gains, 0.0)  # none at pure noise
        shifts, base_means = [], []
        with chain.base():
            for k in steps.indices:
                x = path.states[k].detach().requires_grad_()
                with torch.enable_grad():
                    mean = chain.base_mean(k, x)
                    clean = chain.clean(mean, x, k)
                scored = score(clean.detach())
                pull = pulled_back(clean, x, scored.tilt)
                # NaN leaves out a sample without a reward at this step; a shift of 0 would train it towards the base.
                usable = scored.usable.view(-1, *[1] * (x.ndim - 1))
                shifts.append(torch.where(usable, float(gains[k]) * pull, torch.nan))
                base_means.append(mean.detach())
        chosen = list(steps.indices)
        scales = self.scales(chain)[chosen].to(path.stds)
        return Targets(path.states[chosen], steps, torch.stack(shifts), torch.stack(base_means), scales, scored)
