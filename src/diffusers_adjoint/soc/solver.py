"""Solving a control problem by gradient descent on one of the objectives: rollout, adjoint, loss, step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..adjoint import full_adjoint, lean_adjoint
from ..matching import LossSteps, choose_loss_steps, noisy_steps
from ..objectives import ADJOINT_OBJECTIVES, LOSS_TYPES, discrete_adjoint
from ..trajectory import MeanFunction, Trajectory
from .problem import ControlProblem
from .sampler import draw_path

__all__ = ["accumulate_gradient", "solve"]


def solve(
    problem: ControlProblem,
    mean: MeanFunction,
    optimizer: torch.optim.Optimizer,
    start: Callable[[torch.Generator], Tensor],
    updates: int,
    *,
    loss_type: str = "adjoint_matching",
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
        loss_type: a row of `objectives.py`.
        num_loss_steps: S, steps of each path that carry the loss; all of them if `None`. The discrete adjoint takes all.
        seed: of paths and loss steps.
        on_update: called after each update with its number, from 0, and its loss.

    Returns:
        Mean loss of each update, shape (updates,).

    Raises:
        ValueError: for an unknown `loss_type`, no updates, S that does not fit, states whose shape the noise does not have, or a
            loss that is not finite.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r} is unknown; pass one of {', '.join(map(repr, LOSS_TYPES))}.")
    if loss_type == "discrete_adjoint" and num_loss_steps is not None:
        raise ValueError("loss_type='discrete_adjoint' goes through every step; leave num_loss_steps out.")
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
        loss = accumulate_gradient(problem, mean, path, steps, loss_type)
        if not loss.isfinite():
            raise ValueError(f"the loss of update {update} is {loss.item()}; lower the learning rate or the costs.")
        optimizer.step()
        losses.append(loss)
        if on_update is not None:
            on_update(update, loss)
    return torch.stack(losses)


def accumulate_gradient(
    problem: ControlProblem, mean: MeanFunction, path: Trajectory, steps: LossSteps, loss_type: str = "adjoint_matching"
) -> Tensor:
    """Add the gradient of one objective along given paths to the parameters; returns the batch's mean loss.

    The terms of the chosen steps are divided by their probability, so that the gradient is that of all steps on the average.
    """
    end, running = problem.terminal_adjoint(path.states[-1]), problem.running_cost_grad
    if loss_type == "discrete_adjoint":
        running_cost = problem.checked_running_cost
        return discrete_adjoint(mean, problem.base_mean, path, end, steps=steps.indices, running_cost=running_cost).loss
    objective, lowest = ADJOINT_OBJECTIVES[loss_type], steps.indices[0] + 1
    if objective.full:
        solved = full_adjoint(mean, problem.base_mean, path, end, lowest, running_cost_grad=running)
    else:
        solved = lean_adjoint(problem.base_mean, path, end, lowest, running_cost_grad=running)
    total = path.states.new_zeros(())
    for k, inclusion in zip(steps.indices, steps.inclusion, strict=True):
        terms = objective.loss(mean(k, path.states[k]), solved.base_means[k], path.stds[k], solved.adjoints[k + 1])
        loss = terms.mean() / inclusion
        loss.backward()
        total += loss.detach()
    return total


def _check_noise_shape(problem: ControlProblem, x: Tensor) -> None:
    shape, state = tuple(problem.stds.shape[1:]), tuple(x.shape[1:])
    if shape and shape != state:
        raise ValueError(f"σ has shape {shape} but a state {state}; pass a number, or one for each component of a state.")
