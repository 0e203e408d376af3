r"""Adjoint Matching (2409.08861): regress the step's shift on minus the adjoint of the reward at the path's end.

| pairing | shift δ_k of step k | scale of the loss | paths |
|---|---|---|---|
| score | −g_k ã_k, capped (`score_pairing`) | s_post | "ancestral", memoryless, of an unguided model |
| next | −s_k² ã_{k+1}, so that the loss is ½‖√Δ u_k + s_k ã_{k+1}‖² (eq. 37; on the grid eqs. 42, 223) | s_k | any |
| paper | −s_k² ã_k | s_k | any |

"score" has the tilted law's score as its fixed point, "next" the optimum of the chain of K steps, which tilts less by O(1/K), and
"paper" still less. The lean adjoint ã is carried by the frozen base (eqs. 38–39).
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
        pairing: of a step with the adjoint, as in the table above. `None` is "score" where the base predicts the scores of the
            laws along its paths: of a diffusion or flow model without guidance, from pure noise. Elsewhere it is "next".
        cap: bound of "score" on a sample's shift, in units of what "next" would ask for on data N(m, I); `None` for none.

    Raises:
        ValueError: for another pairing, or a cap that is no number above 0.
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
            raise ValueError(f"cap={self.cap!r} bounds no shift; pass a number above 0, or None for no bound.")

    def pairing_where(self, predicts_scores: bool) -> Pairing:
        """The pairing with a base that predicts the scores of the laws along its paths, or does not.

        Raises:
            ValueError: if "score" is asked for where it is not right.
        """
        if self.pairing == "score" and not predicts_scores:
            raise ValueError(
                "pairing='score' asks for an unguided diffusion or flow model that starts from pure noise, which this is not; "
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
        # "ancestral" ends without noise, and its own s_k would log up to 2.8 times the KL.
        return cast("DiffusionChain", chain).posterior_stds

    def targets(self, chain: Chain, steps: LossSteps, score: Callable[[Tensor], Scored]) -> Targets:
        """As `Objective.targets`."""
        pairing = self.pairing_where(chain.predicts_scores)
        chosen = list(steps.indices)
        # Whether a step is paired with the adjoint of the state after it.
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
