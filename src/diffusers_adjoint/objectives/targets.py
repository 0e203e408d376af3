r"""The seam: an objective makes targets, and one regression fits them.

    L = ½ ‖ ((μ_k^θ(x) − μ_k^base(x)) − δ) / scale ‖²    at points (x, k) that the objective chose, with a wished shift δ for each

An objective is a frozen dataclass of its own options. It sees the model and its base through a `Chain`, and the reward through a
function that it calls at the end points, or at other clean data. A pipeline and a control problem are both chains.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from ..core.adjoint import EndPoint
from ..core.matching import LossSteps
from ..core.trajectory import Trajectory
from .papers import Paper

__all__ = ["Chain", "DiffusionChain", "Method", "Objective", "Scored", "Targets"]


class Scored(Protocol):
    """What a reward said of end points; whoever scores may keep more in it."""

    @property
    def exponent(self) -> Tensor:
        """λr at the end points, (B,), nats; not finite for a sample that has no reward to learn from."""

    @property
    def tilt(self) -> Tensor:
        """λ∇r at the end points, shape (B, …), nats per state unit; 0 for a sample that has no reward to learn from, and NaN for
        all of them if the objective does not need it."""

    @property
    def usable(self) -> Tensor:
        """Which samples have a reward to learn from, (B,) bool."""


@dataclass(frozen=True)
class Targets:
    """What one update regresses on: S points of each of B samples, detached.

    Args:
        states: x, shape (S, B, …).
        steps: step k of each, and the probability with which it was chosen.
        shifts: δ, the wished μ_k − μ_k^base, shape (S, B, …). Not the wished mean: in float32 it would swallow a small δ.
        base_means: μ_k^base(x), shape (S, B, …); where `kl` is given, any mean that the shifts start from.
        scales: shape (S,), or (S, …) for diagonal noise; s_k makes the loss one of nats.
        scored: what the objective's score said of the end points.
        logged: name → a number of each sample that the log shows the mean of, (B,).
        kl: of each sample's path, (B,), nats, from an objective that knows it; else it is estimated at the points.
    """

    states: Tensor
    steps: LossSteps
    shifts: Tensor
    base_means: Tensor
    scales: Tensor
    scored: Any
    logged: dict[str, Tensor] = field(default_factory=dict)
    kl: Tensor | None = None


class Chain(Protocol):
    """The model as a chain of Gaussian steps x_{k+1} ~ N(μ_k(x_k), s_k² I), and its base."""

    @property
    def stds(self) -> Tensor:
        """s_k, shape (K,), or (K, …) for diagonal noise."""

    @property
    def predicts_scores(self) -> bool:
        """Whether the base predicts the scores of the laws along its paths: a `DiffusionChain`, unguided, from pure noise."""

    @property
    def running_cost_grad(self) -> Callable[[int, Tensor], Tensor] | None:
        """(k, x) → ∇f_k(x); `None` where only the end has a cost, as in a pipeline."""

    def mean(self, k: int, x: Tensor) -> Tensor:
        """μ_k^θ(x), differentiable in x."""

    def base_mean(self, k: int, x: Tensor) -> Tensor:
        """μ_k^base(x), differentiable in x."""

    def base(self) -> AbstractContextManager[None]:
        """Around derivatives of `base_mean`: a checkpointed layer is evaluated again in them, and must still be the base's."""

    def rollout(self, keep_means: bool = False) -> Trajectory:
        """Paths of the model, without graph; with the means of their steps, if these are to be kept."""

    def end_point(self, path: Trajectory, of: Literal["base", "model"]) -> EndPoint:
        """Where the reward of a path is taken, with step K − 1 of the base, or of both, evaluated for the adjoint."""


class DiffusionChain(Chain, Protocol):
    """A chain that samples a diffusion or flow model, whose steps predict clean data; more than the objectives here use."""

    @property
    def gains(self) -> Tensor:
        """g_k = ∂μ_k/∂score, shape (K,); infinite at pure noise."""

    @property
    def posterior_stds(self) -> Tensor:
        """s_k of the integrator "posterior" on the same grid, shape (K,): the metric in which a path's KL is logged."""

    @property
    def levels(self) -> Tensor:
        """α_k and β_k of x_k = α_k x_1 + β_k ξ, which step k starts from, shape (2, K)."""

    @property
    def images_per_prompt(self) -> int:
        """How many samples in a row share their condition; they are never divided among batches."""

    @property
    def times(self) -> Tensor:
        """t_k, the share of data that step k starts from, shape (K,)."""

    def clean(self, mean: Tensor, x: Tensor, k: int) -> Tensor:
        """The clean prediction x̂_1 that gives step k this mean from x; affine in both."""

    def toward(self, clean: Tensor, x: Tensor, k: int) -> Tensor:
        """The mean that step k has from x when the clean prediction is x_1: the inverse of `clean`."""

    def reference(self) -> AbstractContextManager[None]:
        """Within it the model is the copy that was frozen at the beginning of a stage."""

    def sample(self) -> Tensor:
        """x_1, the noiseless end points of new paths of the model, shape (B, …); K evaluations, without graph."""

    def noised(self, clean: Tensor, k: int) -> Tensor:
        """Clean data x_1 at the noise level of step k, by fresh noise."""

    def base_score(self, x: Tensor, noise: float) -> Tensor:
        """∇ log p_base at clean x, of the base blurred by the noise of a level beside the grid with this share of it; one
        evaluation of the base."""


class Method(Protocol):
    """What a trainer asks of whatever it trains by: an objective, or a way that is no regression."""

    needs_gradient: ClassVar[bool]
    """Whether it differentiates the reward; otherwise any number will do."""
    switches_adapter: ClassVar[bool]
    """Whether it differentiates model and base side by side, which checkpointed layers with an adapter do not stand."""
    scores_end_points: ClassVar[bool]
    """Whether what it scores are ends of paths x̂_K, which may remember the noise that the paths came from."""
    compares_images: ClassVar[bool]
    """Whether an image learns from its reward beside those of the same prompt's others, along paths of the model itself."""

    @property
    def paper(self) -> Paper:
        """What a model card cites."""

    @property
    def tilts(self) -> bool:
        """Whether p_base·e^{λr} is its fixed point; a model card says so where it is not."""

    def integrator(self, predicts_scores: bool) -> str:
        """The discretisation of the memoryless SDE for the paths that it trains on, a key of `INTEGRATORS`.

        Args:
            predicts_scores: as of the `Chain`.

        Raises:
            ValueError: if its options are not right there.
        """


class Objective(Method, Protocol):
    """A frozen dataclass of options that makes targets; it raises ValueError for an option that makes none."""

    def scales(self, chain: Any) -> Tensor:
        """The scale of each step's loss, shape (K,), or (K, …) for diagonal noise; 0 where a step can carry none."""

    def targets(self, chain: Any, steps: LossSteps, score: Callable[[Tensor], Scored]) -> Targets:
        """One update's points and shifts.

        Args:
            chain: the model and its base, a `Chain`, or a `DiffusionChain` where clean predictions are needed.
            steps: those that carry the loss.
            score: end points, or other clean data, (B, …) → what the reward says of them.
        """
