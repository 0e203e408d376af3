r"""Score pairing: the shift of a step's mean by which its score becomes that of the tilted distribution, with a cap.

With memoryless paths the tilted density of x_k is p_k(x) e^{−V_k(x)}, V_k(x) = −log E[e^{λr} | x_k = x], and ∇V_k(x) = E*[ã_k |
x] (the fixed point of Adjoint Matching, 2409.08861, Prop. 7). So its score is s − E*[ã_k | x], for any length of the step, and

    δ_k = −g_k ã_k,     g_k = ∂μ_k/∂score

The paper pairs ã_k with s_k², the limit of g_k for short steps. For "posterior" with K = 10, g_k/s_k² falls from 2.4 to .9 along
the grid, and this explains why the paper's pairing tilts too little.

**The cap.** ã_k = (∂μ_k/∂x)ᵀ ã_{k+1} contains the Jacobian of one long step at one point. On the ridge between narrow modes it is
large and wrong, and the error feeds back through the next paths. For data N(m, I) the Jacobian would be s_post²/g_k, where s_post
is the noise of the integrator "posterior", and δ_k = −s_post² ã_{k+1}. So each sample's shift is bounded by

    g_k ‖ã_k‖ ≤ cap · s_post² ‖ã_{k+1}‖

`benchmarks/discretisation.py` measures both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PURE_NOISE", "ScoreShifts", "score_shifts"]

PURE_NOISE = 0.02
"""Share of data below which a step pairs s_k² with ã_{k+1} instead. There g_k grows like 1/α_k and ã_k falls like α_k, so that in
16 bits their product is mostly rounding error. The shift −s_k² ã_{k+1} is the chain's own optimum at every noise level."""


@dataclass(frozen=True)
class ScoreShifts:
    """Shifts of S points of each of B samples.

    Args:
        shifts: δ, shape (S, B, …).
        capped: which of them the cap has reduced, (S, B) bool.
    """

    shifts: Tensor
    capped: Tensor


def score_shifts(adjoints: Tensor, gains: Tensor, following: Tensor, posterior_stds: Tensor, cap: float | None) -> ScoreShifts:
    """δ_k = −g_k ã_k, reduced to the norm cap · s_post² ‖ã_{k+1}‖ if it is larger.

    Args:
        adjoints: ã_k of each point, shape (S, B, …).
        gains: g_k, shape (S,), finite.
        following: ã_{k+1}, same shape as the adjoints.
        posterior_stds: s_post, the noise of "posterior", shape (S,).
        cap: above 0, or `None` for none.
    """
    shifts = -_beside(gains, adjoints) * adjoints
    sizes = _sizes(shifts)
    if cap is None:
        return ScoreShifts(shifts, torch.zeros_like(sizes, dtype=torch.bool))
    limits = cap * _beside(posterior_stds, sizes) ** 2 * _sizes(following)
    capped = sizes > limits
    factors = torch.where(capped, limits / sizes, 1.0)
    factors = torch.where(sizes.isfinite(), factors, torch.nan)  # NaN leaves the sample out; 0 would train it towards the base
    return ScoreShifts(factors.view(*factors.shape, *[1] * (shifts.ndim - 2)) * shifts, capped)


def _beside(values: Tensor, states: Tensor) -> Tensor:
    """(S,) → (S, 1, …), broadcastable against (S, B, …)."""
    return values.to(states).view(-1, *[1] * (states.ndim - 1))


def _sizes(values: Tensor) -> Tensor:
    """Norm of each sample, (S, B, …) → (S, B)."""
    return torch.linalg.vector_norm(values.flatten(2), dim=2)
