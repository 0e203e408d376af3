r"""Basic Adjoint Matching (2409.08861, eqs. 22, 34): with the full adjoint instead of the lean one.

The full adjoint is computed with the model itself and includes the cost of its control: two networks a step, and a noisier
target. Its fixed point is that of Adjoint Matching with the same pairing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..core.adjoint import full_adjoint
from ..core.matching import LossSteps
from .adjoint_matching import paired_by_noise
from .papers import ADJOINT_MATCHING, Paper
from .targets import Chain, Scored, Targets

__all__ = ["BasicAdjointMatching"]


@dataclass(frozen=True)
class BasicAdjointMatching:
    """Full adjoint along the model's own memoryless paths; for comparison.

    Args:
        pairing: "next" pairs step k with a_{k+1}, which is exact on the grid; "paper" with a_k, which tilts too little.

    Raises:
        ValueError: for another pairing.
    """

    pairing: Literal["next", "paper"] = "next"

    needs_gradient: ClassVar[bool] = True
    switches_adapter: ClassVar[bool] = True
    scores_end_points: ClassVar[bool] = True
    compares_images: ClassVar[bool] = False
    tilts: ClassVar[bool] = True
    paper: ClassVar[Paper] = ADJOINT_MATCHING

    def __post_init__(self) -> None:
        if self.pairing not in ("next", "paper"):
            raise ValueError(f"pairing={self.pairing!r} is unknown; pass 'next' or 'paper'.")

    def integrator(self, predicts_scores: bool) -> str:
        """As `Method.integrator`."""
        return "posterior"

    def scales(self, chain: Chain) -> Tensor:
        """As `Objective.scales`."""
        return chain.stds

    def targets(self, chain: Chain, steps: LossSteps, score: Callable[[Tensor], Scored]) -> Targets:
        """As `Objective.targets`."""
        path = chain.rollout()
        end = chain.end_point(path, of="model")
        scored = score(end.state)
        following = self.pairing == "next"
        solved = full_adjoint(
            chain.mean,
            chain.base_mean,
            path,
            -scored.tilt,
            steps.indices[0] + following,
            end=end,
            lowest_base_mean=steps.indices[0],
            running_cost_grad=chain.running_cost_grad,
        )
        return paired_by_noise(path, solved, steps, scored, following=following)
