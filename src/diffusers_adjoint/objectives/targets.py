r"""The interface between objectives and trainers: an objective makes targets, and one regression fits them.

    L = ½ ‖ ((μ_k^θ(x) − μ_k^base(x)) − δ) / scale ‖²    at points (x, k) that the objective chooses, with a target shift δ for
    each

An objective is a frozen dataclass of its options. It accesses the model and its base through a `Chain`, and the reward through a
function of end points or other clean data. A pipeline and a control problem are both chains.
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
    """Scores of end points, as objectives need them; implementations may contain more."""

    @property
    def exponent(self) -> Tensor:
        """λr at the end points, (B,), nats; not finite for a sample without a usable reward."""

    @property
    def tilt(self) -> Tensor:
        """λ∇r at the end points, shape (B, …), nats per state unit; 0 for a sample without a usable reward, and NaN for all
        samples if the objective does not need it."""

    @property
    def usable(self) -> Tensor:
        """Which samples have a usable reward, (B,) bool."""


@dataclass(frozen=True)
class Targets:
    """The targets of one update: S points of each of B samples; all tensors are detached.

    Args:
        states: x, shape (S, B, …).
        steps: step k of each point, and the probability with which it was drawn.
        shifts: δ, the target for μ_k − μ_k^base, shape (S, B, …). A target mean would lose a small δ to rounding in float32.
        base_means: μ_k^base(x), shape (S, B, …); if `kl` is given, it may be another mean that the shifts start from.
        scales: shape (S,), or (S, …) for diagonal noise; with s_k the loss is in nats.
        scored: the result of the objective's `score`.
        logged: further measurements for the log, name → (B,).
        kl: KL of each sample's path, (B,), nats, if the objective measures it; otherwise it is estimated at the points.
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
        """Whether the base predicts the scores of its paths' marginals: a `DiffusionChain` without guidance, from pure noise."""

    @property
    def running_cost_grad(self) -> Callable[[int, Tensor], Tensor] | None:
        """(k, x) → ∇f_k(x); `None` if only the end has a cost, as in a pipeline."""

    def mean(self, k: int, x: Tensor) -> Tensor:
        """μ_k^θ(x), differentiable in x."""

    def base_mean(self, k: int, x: Tensor) -> Tensor:
        """μ_k^base(x), differentiable in x."""

    def base(self) -> AbstractContextManager[None]:
        """A context for derivatives of `base_mean`. With gradient checkpointing, layers are evaluated again in the backward pass,
        and must still be the base's."""

    def rollout(self, keep_means: bool = False) -> Trajectory:
        """Sample paths of the model, without graph, and keep the step means if `keep_means` is set."""

    def end_point(self, path: Trajectory, of: Literal["base", "model"]) -> EndPoint:
        """The end point at which a path's reward is evaluated, with the graph of step K − 1 of the base, or of base and model."""


class DiffusionChain(Chain, Protocol):
    """A chain that samples a diffusion or flow model, whose steps predict clean data."""

    @property
    def gains(self) -> Tensor:
        """g_k = ∂μ_k/∂score, shape (K,); infinite at pure noise."""

    @property
    def posterior_stds(self) -> Tensor:
        """s_k of the integrator "posterior" on the same grid, shape (K,), with which the path KL is logged."""

    @property
    def levels(self) -> Tensor:
        """α_k and β_k of x_k = α_k x_1 + β_k ξ, which step k starts from, shape (2, K)."""

    @property
    def images_per_prompt(self) -> int:
        """Number of samples with the same condition; they are next to each other in one batch."""

    @property
    def times(self) -> Tensor:
        """t_k, the share of data that step k starts from, shape (K,)."""

    def clean(self, mean: Tensor, x: Tensor, k: int) -> Tensor:
        """The clean prediction x̂_1 with which step k from x has this mean; affine in both."""

    def toward(self, clean: Tensor, x: Tensor, k: int) -> Tensor:
        """The mean of step k from x if the clean prediction is x_1: the inverse of `clean`."""

    def reference(self) -> AbstractContextManager[None]:
        """Within this context the model is the copy that was frozen at the beginning of the stage."""

    def sample(self) -> Tensor:
        """x_1, the noiseless end points of new paths of the model, shape (B, …); K evaluations, without graph."""

    def noised(self, clean: Tensor, k: int) -> Tensor:
        """Clean data x_1 at the noise level of step k, by fresh noise."""

    def base_score(self, x: Tensor, noise: float) -> Tensor:
        """∇ log p_base at clean x, of the base blurred by noise of this share, at one level beside the grid; one evaluation of
        the base."""


class Method(Protocol):
    """A training method, as the trainers need it: an objective, or another method such as back-propagation."""

    needs_gradient: ClassVar[bool]
    """Whether it differentiates the reward; otherwise a reward may return plain numbers."""
    switches_adapter: ClassVar[bool]
    """Whether it differentiates model and base together, which gives wrong gradients for checkpointed layers with an adapter."""
    scores_end_points: ClassVar[bool]
    """Whether it scores the end points x̂_K of paths, whose memory of the noise is then measured."""
    compares_images: ClassVar[bool]
    """Whether it compares the rewards of a prompt's images, on paths of the model itself."""

    @property
    def paper(self) -> Paper:
        """The paper that a model card cites."""

    @property
    def tilts(self) -> bool:
        """Whether p_base·e^{λr} is its fixed point; if not, the model card says so."""

    def integrator(self, predicts_scores: bool) -> str:
        """The discretisation of the memoryless SDE for training, a key of `INTEGRATORS`.

        Args:
            predicts_scores: as in `Chain`.

        Raises:
            ValueError: if the method's options do not fit.
        """


class Objective(Method, Protocol):
    """A frozen dataclass of options that makes targets; its constructor raises ValueError for invalid options."""

    def scales(self, chain: Any) -> Tensor:
        """The scale of each step's loss, shape (K,), or (K, …) for diagonal noise; 0 for steps that cannot carry the loss."""

    def targets(self, chain: Any, steps: LossSteps, score: Callable[[Tensor], Scored]) -> Targets:
        """Compute one update's points and shifts.

        Args:
            chain: the model and its base: a `Chain`, or a `DiffusionChain` if clean predictions are needed.
            steps: the loss steps.
            score: end points or other clean data, (B, …) → their scores.
        """
