r"""Adjoint Matching (2409.08861): regress the step's shift on minus the adjoint of the reward at the path's end.

    δ_k = −s_k² ã_{k+1},     so that the loss is ½‖√Δ u_k + s_k ã_{k+1}‖²      (eqs. 37–39; on the grid eqs. 42, 223)

The lean adjoint ã is carried by the frozen base, the full one a (basic Adjoint Matching, eqs. 22, 34) by the model itself, which
pays for its control on the way. Both have the tilted law as their only fixed point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.adjoint import AdjointPath, full_adjoint, lean_adjoint
from ..core.matching import LossSteps
from ..core.trajectory import Trajectory
from .papers import ADJOINT_MATCHING, Paper
from .targets import Chain, Scored, Targets

__all__ = ["AdjointMatching", "BasicAdjointMatching"]


@dataclass(frozen=True)
class AdjointMatching:
    """Lean adjoint along the model's own memoryless paths (2409.08861, eqs. 37–39).

    Args:
        pairing: "next" pairs step k with ã_{k+1}, which is exact on the grid; "paper" with ã_k, which differs by O(1/K) and
            tilts too little, for comparison.

    Raises:
        ValueError: for another pairing.
    """

    pairing: Literal["next", "paper"] = "next"

    needs_gradient: ClassVar[bool] = True
    switches_adapter: ClassVar[bool] = False
    scores_end_points: ClassVar[bool] = True
    tilts: ClassVar[bool] = True
    paper: ClassVar[Paper] = ADJOINT_MATCHING

    def __post_init__(self) -> None:
        if self.pairing not in ("next", "paper"):
            raise ValueError(f"pairing={self.pairing!r} is unknown; pass 'next' or 'paper'.")

    def targets(self, chain: Chain, steps: LossSteps, score: Callable[[Tensor], Scored]) -> Targets:
        """As `Objective.targets`."""
        path = chain.rollout()
        with chain.base():
            end = chain.end_point(path, of="base")
            scored = score(end.state)
            lowest, earliest = self._lowest(steps), steps.indices[0]
            solved = lean_adjoint(
                chain.base_mean,
                path,
                -scored.tilt,
                lowest,
                end=end,
                lowest_base_mean=earliest,
                running_cost_grad=chain.running_cost_grad,
            )
        return self._paired(path, solved, steps, scored)

    def _lowest(self, steps: LossSteps) -> int:
        """The lowest step whose adjoint is needed."""
        return steps.indices[0] + (self.pairing == "next")

    def _paired(self, path: Trajectory, solved: AdjointPath, steps: LossSteps, scored: Scored) -> Targets:
        chosen = list(steps.indices)
        adjoints = solved.adjoints[[k + (self.pairing == "next") for k in chosen]]
        shifts = torch.stack([-(std**2) * adjoint for std, adjoint in zip(path.stds[chosen], adjoints, strict=True)])
        return Targets(path.states[chosen], steps, shifts, solved.base_means[chosen], path.stds[chosen], scored)


@dataclass(frozen=True)
class BasicAdjointMatching(AdjointMatching):
    """The full adjoint in place of the lean one (2409.08861, eqs. 22, 34): two networks a step, a noisier target."""

    switches_adapter: ClassVar[bool] = True

    def targets(self, chain: Chain, steps: LossSteps, score: Callable[[Tensor], Scored]) -> Targets:
        """As `Objective.targets`."""
        path = chain.rollout()
        end = chain.end_point(path, of="model")
        scored = score(end.state)
        solved = full_adjoint(
            chain.mean,
            chain.base_mean,
            path,
            -scored.tilt,
            self._lowest(steps),
            end=end,
            lowest_base_mean=steps.indices[0],
            running_cost_grad=chain.running_cost_grad,
        )
        return self._paired(path, solved, steps, scored)
