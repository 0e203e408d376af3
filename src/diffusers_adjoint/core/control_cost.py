r"""The gradient of the control cost itself, E[Σ_k ½‖√Δ u_k‖² + f_k + g], two ways: for comparison, and as a reference in tests.

| function | adjoint | gradient | 2409.08861 |
|---|---|---|---|
| `continuous_adjoint` | full, a | of Σ_k ½‖√Δ u_k‖² + √Δ u_k · s_k a_{k+1} | eqs. 20–21, 32 |
| `discrete_adjoint` | autograd's, through the chain | of Σ_k ½‖√Δ u_k‖² + f_k + g | §3.2 |

Both have one gradient, which is basic Adjoint Matching's, too: its loss differs from the first by ½‖s_k a_{k+1}‖², a constant
(Prop. 2), and on a chain of Gaussian steps the full adjoint is what back-propagation computes. Adjoint Matching has another one,
with the same zero (Prop. 7).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .adjoint import full_adjoint
from .matching import control, noisy_steps, step_kl
from .trajectory import MeanFunction, Trajectory

__all__ = ["ChainLoss", "continuous_adjoint", "continuous_adjoint_loss", "discrete_adjoint"]


def continuous_adjoint_loss(mean: Tensor, base_mean: Tensor, std: float | Tensor, adjoint: Tensor) -> Tensor:
    """Share of one step in the continuous adjoint's gradient, ½‖√Δ u_k‖² + √Δ u_k · s_k a_{k+1} (2409.08861, eq. 32).

    Args:
        mean, base_mean, std: as for `matching_loss`.
        adjoint: the full adjoint a_{k+1}, shape (B, …).

    Returns:
        Shape (B,); it may be negative. Gradient reaches `mean` only.

    Raises:
        ValueError: if shapes differ or s_k is not positive.
    """
    if mean.shape != adjoint.shape:
        raise ValueError(f"mean has shape {tuple(mean.shape)} but adjoint {tuple(adjoint.shape)}; they must agree.")
    push = control(mean, base_mean.detach(), std)
    return (0.5 * push.square() + push * std * adjoint.detach()).reshape(len(mean), -1).sum(1)


@dataclass(frozen=True)
class ChainLoss:
    """Result of a pass down a chain; all tensors are detached."""

    loss: Tensor  # the weighed objective, 0-dimensional; of `discrete_adjoint` with g to first order around the end point
    kl: Tensor  # Σ_k ½‖√Δ u_k‖², shape (B,)


def continuous_adjoint(
    mean: MeanFunction,
    base_mean: MeanFunction,
    trajectory: Trajectory,
    terminal: Tensor,
    *,
    steps: Sequence[int] | None = None,
    running_cost: Callable[[int, Tensor], Tensor] | None = None,
) -> ChainLoss:
    """Add the batch mean of the control cost's gradient to the parameters, by the full adjoint (2409.08861, eqs. 20–21, 32).

    Args:
        mean, base_mean, trajectory, steps, running_cost: as for `discrete_adjoint`.
        terminal: ∇g at the paths' end, shape (B, …).
    """
    steps = noisy_steps(trajectory.stds) if steps is None else steps
    slope = None if running_cost is None else lambda k, x: _slope(running_cost, k, x)
    path = full_adjoint(mean, base_mean, trajectory, terminal, steps[0] + 1, running_cost_grad=slope)
    states, total = trajectory.states, trajectory.states.new_zeros(())
    kl = states.new_zeros(states.shape[1])
    for k in steps:
        moved = mean(k, states[k])
        loss = continuous_adjoint_loss(moved, path.base_means[k], trajectory.stds[k], path.adjoints[k + 1]).mean()
        loss.backward()
        total += loss.detach()
        kl += step_kl(moved.detach(), path.base_means[k], trajectory.stds[k])
    return ChainLoss(total, kl)


def _slope(cost: Callable[[int, Tensor], Tensor], k: int, x: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(cost(k, leaf).sum(), leaf)[0]


def discrete_adjoint(
    mean: MeanFunction,
    base_mean: MeanFunction,
    trajectory: Trajectory,
    terminal: Tensor | Callable[[Tensor], Tensor],
    *,
    steps: Sequence[int] | None = None,
    running_cost: Callable[[int, Tensor], Tensor] | None = None,
    weigh: Callable[[Tensor], Tensor] = torch.mean,
    backward: Callable[[Tensor], None] = Tensor.backward,
    around: Callable[[int], AbstractContextManager[None]] = lambda k: nullcontext(),
) -> ChainLoss:
    """Add the gradient of Σ_k ½‖√Δ u_k‖² + f_k(x_k) + g(x_K), with the paths' noise held fixed, to the parameters.

    This is back-propagation through the chain with a checkpoint at every step. The rollout was the forward pass, of which only
    the states are kept. Each step is evaluated again, from the last to the first, so that one step's activations are in memory.

    Args:
        mean: (k, x) → μ_k^θ(x), with gradient to x and the parameters; evaluated once a step, down to the first of `steps`.
        base_mean: (k, x) → μ_k^base(x), differentiable in x; evaluated once for each of `steps`.
        trajectory: paths of the controlled process.
        terminal: the tensor ∇g at the paths' end, or a callable x̂_K → ∇g(x̂_K) that receives step K − 1's mean, detached.
        steps: the controlled steps, increasing; the gradient passes through the others, but they have no loss. `None` for all
            with s_k > 0.
        running_cost: (k, x_k) → f_k(x_k), shape (B,), the step's Δt included; `None` for f = 0.
        weigh: costs (B,) → the scalar whose gradient is computed, linear in them; first called after `terminal`.
        backward: called with the loss of each step, which it must not scale.
        around: k → the context in which one of `steps` is evaluated, so that processes can synchronise once only.
    """
    states, carried = trajectory.states, None
    steps = noisy_steps(trajectory.stds) if steps is None else steps
    total, kl = states.new_zeros(()), states.new_zeros(states.shape[1])
    for k in reversed(range(steps[0], len(trajectory))):
        taught = k in steps
        x = states[k].detach().requires_grad_(k > steps[0])  # steps before the first controlled one need no gradient
        with around(k) if taught else nullcontext():
            moved = mean(k, x)
            cost = step_kl(moved, base_mean(k, x), trajectory.stds[k]) if taught else moved.new_zeros(len(x))
            kl += cost.detach()
            if running_cost is not None:
                cost = cost + running_cost(k, x)
            if carried is None:
                adjoint = terminal if isinstance(terminal, Tensor) else terminal(moved.detach().to(states.dtype))
                cost = cost + (moved * adjoint.detach()).reshape(len(x), -1).sum(1)
            own = weigh(cost)
            # The adjoint from the later steps is weighted already.
            loss = own if carried is None else own + (moved * carried).sum()
            if taught:
                backward(loss)
        total += own.detach()
        carried = x.grad if taught else torch.autograd.grad(loss, x)[0]
    return ChainLoss(total, kl)
