r"""The paper's four objectives of one control problem: which adjoint they take, and what they ask of each step.

| `loss_type` | adjoint | loss | 2409.08861 |
|---|---|---|---|
| `"adjoint_matching"` | lean, ã | ½‖√Δ u_k + s_k ã_{k+1}‖² | eqs. 37–39 |
| `"basic_adjoint_matching"` | full, a | ½‖√Δ u_k + s_k a_{k+1}‖² | eqs. 22, 34 |
| `"continuous_adjoint"` | full, a | ½‖√Δ u_k‖² + √Δ u_k · s_k a_{k+1} | eqs. 20–21, 32 |
| `"discrete_adjoint"` | autograd's, through the chain | Σ_k ½‖√Δ u_k‖² + f_k + g | §3.2 |

The last three have one gradient: the second and third differ by ½‖s_k a_{k+1}‖², a constant (Prop. 2), and on a chain of Gaussian
steps the full adjoint is what back-propagation computes. The first has another one, with the same zero (Prop. 7).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .matching import control, matching_loss, noisy_steps, step_kl
from .trajectory import MeanFunction, Trajectory

__all__ = ["ADJOINT_OBJECTIVES", "LOSS_TYPES", "ChainLoss", "Objective"]
__all__ += ["continuous_adjoint_loss", "discrete_adjoint"]


def continuous_adjoint_loss(mean: Tensor, base_mean: Tensor, std: float | Tensor, adjoint: Tensor) -> Tensor:
    """Share of one step in the continuous adjoint's gradient, ½‖√Δ u_k‖² + √Δ u_k · s_k a_{k+1} (2409.08861, eq. 32).

    Args:
        mean, base_mean, std: as for `matching_loss`.
        adjoint: the full adjoint a_{k+1}, shape (B, …).

    Returns:
        Shape (B,); no distance, it may be negative. Gradient reaches `mean` only.

    Raises:
        ValueError: if shapes differ or s_k is not positive.
    """
    if mean.shape != adjoint.shape:
        raise ValueError(f"mean has shape {tuple(mean.shape)} but adjoint {tuple(adjoint.shape)}; they must agree.")
    push = control(mean, base_mean.detach(), std)
    return (0.5 * push.square() + push * std * adjoint.detach()).reshape(len(mean), -1).sum(1)


@dataclass(frozen=True)
class Objective:
    """An objective that regresses, or follows, an adjoint step by step."""

    full: bool  # whether its adjoint is the full one
    loss: Callable[[Tensor, Tensor, float | Tensor, Tensor], Tensor]  # (mean, base_mean, std, adjoint) → (B,), one step


ADJOINT_OBJECTIVES = {
    "adjoint_matching": Objective(full=False, loss=matching_loss),
    "basic_adjoint_matching": Objective(full=True, loss=matching_loss),
    "continuous_adjoint": Objective(full=True, loss=continuous_adjoint_loss),
}
LOSS_TYPES = (*ADJOINT_OBJECTIVES, "discrete_adjoint")


@dataclass(frozen=True)
class ChainLoss:
    """What back-propagation through a chain found on its way, detached."""

    loss: Tensor  # the weighed objective with g to first order around the end point, 0-dimensional
    kl: Tensor  # Σ_k ½‖√Δ u_k‖², shape (B,)


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

    This is back-propagation through the chain with every step a checkpoint: the rollout was the forward pass, its states are all
    that is kept of it, and each step is evaluated once more, from the last to the first, with one step's activations alive.

    Args:
        mean: (k, x) → μ_k^θ(x), with gradient to x and the parameters; evaluated once a step, down to the first of `steps`.
        base_mean: (k, x) → μ_k^base(x), differentiable in x; evaluated once for each of `steps`.
        trajectory: paths of the controlled process.
        terminal: the tensor ∇g at the paths' end, or a callable x̂_K → ∇g(x̂_K) that receives step K − 1's mean, detached.
        steps: those with a control, increasing; others carry the state and teach nothing. `None` for all with s_k > 0.
        running_cost: (k, x_k) → f_k(x_k), shape (B,), the step's Δt included; `None` for f = 0.
        weigh: costs (B,) → the number whose gradient is wanted, linear in them; first called after `terminal`.
        backward: called with the loss of each step; it must not scale it.
        around: k → the context in which one of `steps` is evaluated, so that processes need not synchronise each of them.
    """
    states, carried = trajectory.states, None
    steps = noisy_steps(trajectory.stds) if steps is None else steps
    total, kl = states.new_zeros(()), states.new_zeros(states.shape[1])
    for k in reversed(range(steps[0], len(trajectory))):
        x, taught = (
            states[k].detach().requires_grad_(k > steps[0]),
            k in steps,
        )  # before the first control nothing is to be learnt
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
            # What the later steps make of this one's mean has been weighed already.
            loss = own if carried is None else own + (moved * carried).sum()
            if taught:
                backward(loss)
        total += own.detach()
        carried = x.grad if taught else torch.autograd.grad(loss, x)[0]
    return ChainLoss(total, kl)
