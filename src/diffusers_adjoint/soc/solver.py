"""Solving a control problem by gradient descent on one of the objectives: rollout, adjoint, loss, step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.adjoint import EndPoint
from ..core.control_cost import ChainLoss
from ..core.matching import LossSteps, choose_loss_steps, noisy_steps, regression_loss
from ..core.trajectory import MeanFunction, Trajectory
from ..objectives import AdjointMatching, Objective
from .problem import ControlProblem
from .sampler import draw_path

__all__ = ["CostGradient", "ProblemChain", "accumulate_gradient", "solve"]

CostGradient = Callable[..., ChainLoss]
"""`discrete_adjoint` or `continuous_adjoint`: adds the gradient of the control cost itself to the parameters."""

DEFAULT = AdjointMatching()


def solve(
    problem: ControlProblem,
    mean: MeanFunction,
    optimizer: torch.optim.Optimizer,
    start: Callable[[torch.Generator], Tensor],
    updates: int,
    *,
    objective: Objective | CostGradient = DEFAULT,
    num_loss_steps: int | None = None,
    seed: int = 0,
    on_update: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Fit the parameters behind `mean` to the optimal control of a problem.

    Args:
        problem: the base chain and its costs.
        mean: (k, x) → μ_k^θ(x), differentiable in x and in the optimizer's parameters: `problem.mean(control)` for a control
            u(x, t), `sampler.mean(network)` for a velocity network.
        optimizer: over the parameters; its learning rate may be changed by a scheduler in `on_update`.
        start: generator → x_0, shape (B, …): the batch of one update.
        updates: number of updates.
        objective: an object of `objectives` that needs no clean data, such as `BasicAdjointMatching()`; or the function
            `discrete_adjoint` or `continuous_adjoint`.
        num_loss_steps: S, steps of each path that carry the loss; all of them if `None`, as the two functions take.
        seed: of paths and loss steps.
        on_update: called after each update with its number, from 0, and its loss.

    Returns:
        Mean loss of each update, shape (updates,).

    Raises:
        TypeError: if `objective` is anything else, such as a class.
        ValueError: for an objective that needs clean data, no updates, an S that does not fit, states of another shape than the
            noise, or a loss that is not finite.
    """
    if isinstance(objective, type) or not (callable(objective) or hasattr(objective, "targets")):
        raise TypeError(f"objective={objective!r} is no objective; pass an object, such as AdjointMatching().")
    if callable(objective) and num_loss_steps is not None:
        raise ValueError(f"{objective.__name__} goes through every step; leave num_loss_steps out.")
    if updates < 1:
        raise ValueError(f"updates={updates} solves nothing; pass at least 1.")
    generator, losses = torch.Generator().manual_seed(seed), []
    count = len(noisy_steps(problem.stds)) if num_loss_steps is None else num_loss_steps
    for update in range(updates):
        x = start(generator)
        _check_noise_shape(problem, x)
        path = draw_path(mean, x, problem.times, problem.stds, generator)
        steps = choose_loss_steps(problem.stds, count, "uniform", generator)
        optimizer.zero_grad()
        loss = accumulate_gradient(problem, mean, path, steps, objective)
        if not loss.isfinite():
            raise ValueError(f"the loss of update {update} is {loss.item()}; lower the learning rate or the costs.")
        optimizer.step()
        losses.append(loss)
        if on_update is not None:
            on_update(update, loss)
    return torch.stack(losses)


@dataclass(frozen=True)
class _Cost:
    """The terminal cost at end points, as `objectives.Scored` has a reward: −g and −∇g."""

    problem: ControlProblem
    end_point: Tensor
    tilt: Tensor

    @property
    def exponent(self) -> Tensor:
        with torch.no_grad():
            return -self.problem.terminal_cost(self.end_point)

    @property
    def usable(self) -> Tensor:
        return torch.ones(len(self.tilt), dtype=torch.bool, device=self.tilt.device)


@dataclass(frozen=True)
class ProblemChain:
    """A control problem, and a model of its solution on given paths, as a `Chain` of the objectives."""

    problem: ControlProblem
    model: MeanFunction
    path: Trajectory

    @property
    def stds(self) -> Tensor:
        return self.path.stds

    @property
    def predicts_scores(self) -> bool:
        return False

    @property
    def running_cost_grad(self) -> Callable[[int, Tensor], Tensor] | None:
        return self.problem.running_cost_grad

    def mean(self, k: int, x: Tensor) -> Tensor:
        return self.model(k, x)

    def base_mean(self, k: int, x: Tensor) -> Tensor:
        return self.problem.base_mean(k, x)

    def base(self) -> AbstractContextManager[None]:
        return nullcontext()

    def rollout(self, keep_means: bool = False) -> Trajectory:
        return self.path

    def end_point(self, path: Trajectory, of: Literal["base", "model"]) -> EndPoint:
        """x_K itself: a control problem has its cost at the noisy end of the chain."""
        return EndPoint(path.states[-1])

    def _predicts_no_clean_data(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            "the objective asks for clean data, which a control problem does not predict; pass AdjointMatching() or "
            "BasicAdjointMatching()."
        )

    gains = posterior_stds = levels = times = images_per_prompt = property(_predicts_no_clean_data)
    clean = toward = sample = noised = base_score = reference = _predicts_no_clean_data


def accumulate_gradient(
    problem: ControlProblem,
    mean: MeanFunction,
    path: Trajectory,
    steps: LossSteps,
    objective: Objective | CostGradient = DEFAULT,
) -> Tensor:
    """Add the gradient of one objective along given paths to the parameters; returns the batch's mean loss.

    The terms of the chosen steps are divided by their probability, so that the gradient is that of all steps on the average.
    """
    if callable(objective):
        end, running_cost = problem.terminal_adjoint(path.states[-1]), problem.checked_running_cost
        return objective(mean, problem.base_mean, path, end, steps=steps.indices, running_cost=running_cost).loss

    def score(x: Tensor) -> _Cost:
        return _Cost(problem, x, -problem.terminal_adjoint(x) if objective.needs_gradient else torch.full_like(x, torch.nan))

    targets = objective.targets(ProblemChain(problem, mean, path), steps, score)
    total = path.states.new_zeros(())
    points = zip(targets.states, targets.base_means, targets.shifts, targets.scales, strict=True)
    for (x, base_mean, shift, scale), k, inclusion in zip(points, steps.indices, steps.inclusion, strict=True):
        loss = regression_loss(mean(k, x), base_mean, shift, scale).mean() / inclusion
        loss.backward()
        total += loss.detach()
    return total


def _check_noise_shape(problem: ControlProblem, x: Tensor) -> None:
    shape, state = tuple(problem.stds.shape[1:]), tuple(x.shape[1:])
    if shape and shape != state:
        raise ValueError(f"σ has shape {shape} but a state {state}; pass a number, or one for each component of a state.")
