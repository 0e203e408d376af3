r"""Adjoint Matching (2409.08861): the target shift of a step is minus the adjoint of the reward at the path's end, scaled.

| pairing | shift δ_k of step k | scale of the loss | paths |
|---|---|---|---|
| score | −g_k ã_k, capped (`score_pairing`) | s_post | "ancestral", memoryless, of an unguided model |
| next | −s_k² ã_{k+1}, so that the loss is ½‖√Δ u_k + s_k ã_{k+1}‖² (eq. 37; on the grid eqs. 42, 223) | s_k | any |
| paper | −s_k² ã_k | s_k | any |

The fixed point of "score" is the score of the tilted distribution; that of "next" is the optimum of the chain of K steps, whose
tilt is weaker by O(1/K); that of "paper" is weaker still. The lean adjoint ã is computed with the frozen base (eqs. 38–39).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from ..core.adjoint import AdjointPath, lean_adjoint
from ..core.matching import LossSteps
from ..core.trajectory import Trajectory
from .papers import ADJOINT_MATCHING, Paper
from .score_pairing import PURE_NOISE, score_shifts
from .targets import Chain, DiffusionChain, Scored, Targets

__all__ = ["AdjointMatching", "paired_by_noise"]

Pairing = Literal["score", "next", "paper"]


@dataclass(frozen=True)
class AdjointMatching:
    """Lean adjoint along the model's own memoryless paths (2409.08861, eqs. 37–39).

    Args:
        pairing: which adjoint a step is paired with, see the table above. `None` chooses "score" if the base predicts the scores
            of its paths' marginals, which holds for a diffusion or flow model without guidance from pure noise, else "next".
        cap: bound on a sample's shift with "score", relative to the shift of "next" for data N(m, I); `None` for no bound.

    Raises:
        ValueError: for an unknown pairing, or a cap that is not a number above 0.
    """

    pairing: Pairing | None = None
    cap: float | None = 1.2

    needs_gradient: ClassVar[bool] = True
    switches_adapter: ClassVar[bool] = False
    scores_end_points: ClassVar[bool] = True
    compares_images: ClassVar[bool] = False
    tilts: ClassVar[bool] = True
    paper: ClassVar[Paper] = ADJOINT_MATCHING

    def __post_init__(self) -> None:
        if self.pairing not in (None, "score", "next", "paper"):
            raise ValueError(f"pairing={self.pairing!r} is unknown; pass 'score', 'next' or 'paper'.")
        number = isinstance(self.cap, int | float) and not isinstance(self.cap, bool)
        if self.cap is not None and not (number and 0 < self.cap < math.inf):
            raise ValueError(f"cap={self.cap!r} is not a bound; pass a number above 0, or None for no bound.")

    def pairing_where(self, predicts_scores: bool) -> Pairing:
        """The pairing for a base that predicts the scores of its paths' marginals, or for one that does not.

        Raises:
            ValueError: if "score" is set and the base does not predict them.
        """
        if self.pairing == "score" and not predicts_scores:
            raise ValueError(
                "pairing='score' needs an unguided diffusion or flow model that starts from pure noise, which this is not; "
                "leave pairing out, or pass 'next'."
            )
        return self.pairing or ("score" if predicts_scores else "next")

    def integrator(self, predicts_scores: bool) -> str:
        """As `Method.integrator`."""
        return "ancestral" if self.pairing_where(predicts_scores) == "score" else "posterior"

    def scales(self, chain: Chain) -> Tensor:
        """As `Objective.scales`."""
        if self.pairing_where(chain.predicts_scores) != "score":
            return chain.stds
        # "ancestral" ends without noise, and with its own s_k the logged KL would be up to 2.8 times too large.
        return cast("DiffusionChain", chain).posterior_stds

    def targets(self, chain: Chain, steps: LossSteps, score: Callable[[Tensor], Scored]) -> Targets:
        """As `Objective.targets`."""
        pairing = self.pairing_where(chain.predicts_scores)
        chosen = list(steps.indices)
        # For each step, whether it is paired with the adjoint ã_{k+1} of the state after it.
        late = [pairing == "next"] * len(chosen)
        if pairing == "score":
            late = (cast("DiffusionChain", chain).times[chosen] < PURE_NOISE).tolist()
        path = chain.rollout()
        with chain.base():
            end = chain.end_point(path, of="base")
            scored = score(end.state)
            solved = lean_adjoint(
                chain.base_mean,
                path,
                -scored.tilt,
                min(k + one for k, one in zip(chosen, late, strict=True)),
                end=end,
                lowest_base_mean=chosen[0],
                running_cost_grad=chain.running_cost_grad,
            )
        if pairing == "score":
            return self._paired_by_score(cast("DiffusionChain", chain), path, solved, steps, scored)
        return paired_by_noise(path, solved, steps, scored, following=pairing == "next")

    def _paired_by_score(
        self, chain: DiffusionChain, path: Trajectory, solved: AdjointPath, steps: LossSteps, scored: Scored
    ) -> Targets:
        chosen = list(steps.indices)
        following = solved.adjoints[[k + 1 for k in chosen]]
        at_noise = chain.times[chosen] < PURE_NOISE
        gains = torch.where(at_noise, 0.0, chain.gains[chosen])
        found = score_shifts(solved.adjoints[chosen], gains, following, chain.posterior_stds[chosen], self.cap)
        shifts = found.shifts
        for i in at_noise.nonzero().flatten().tolist():
            shifts[i] = -(path.stds[chosen[i]] ** 2) * following[i]
        scales = chain.posterior_stds[chosen].to(path.stds)
        capped = found.capped[~at_noise].float().mean(0)
        logged = {"capped": capped} if not at_noise.all() else {}
        return Targets(path.states[chosen], steps, shifts, solved.base_means[chosen], scales, scored, logged)


def paired_by_noise(path: Trajectory, solved: AdjointPath, steps: LossSteps, scored: Scored, *, following: bool) -> Targets:
    """δ_k = −s_k² ã_{k+1}, or with ã_k (2409.08861, eqs. 37, 42)."""
    chosen = list(steps.indices)
    adjoints = solved.adjoints[[k + following for k in chosen]]
    shifts = torch.stack([-(std**2) * adjoint for std, adjoint in zip(path.stds[chosen], adjoints, strict=True)])
    return Targets(path.states[chosen], steps, shifts, solved.base_means[chosen], path.stds[chosen], scored)
