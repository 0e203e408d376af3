r"""Adjoints: how the cost still to come depends on an earlier state of a path.

**Lean** (2409.08861, eqs. 38–39), when the *frozen base* carries that state to the end:
dã/dt = −(∇ₓb)ᵀ ã − ∇ₓf,  ã(1) = ∇g(X_1) = −λ∇r(X_1), with b the base drift. On the grid, exactly (and for any sampler whose
step mean is μ_k):

    ã_k = (∂μ_k^base/∂x)ᵀ ã_{k+1} + ∇f_k(x_k),       k = K − 1, …, lowest

**Full** (eqs. 30–31), when the *controlled* process does and pays for its control on the way; with w_k = (μ_k^θ − μ_k^base)/s_k²,

    a_k = (∂μ_k^θ/∂x)ᵀ a_{k+1} + ∇f_k(x_k) + ∇ₓ ½‖s_k w_k‖²  =  (∂μ_k^θ/∂x)ᵀ (a_{k+1} + w_k) − (∂μ_k^base/∂x)ᵀ w_k + ∇f_k(x_k)

The lean one is what is left of it where E[a] is optimal: it needs one network instead of two, and no derivative of the control.

The terminal cost is differentiated at the noiseless end point x̂_K, the mean of step K − 1 (paper, app. G.1). `end_point`
keeps the graph of that mean for the first vector–Jacobian product, so no step is evaluated twice. One step's activations are
alive at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .trajectory import MeanFunction, Trajectory

__all__ = ["AdjointPath", "EndPoint", "StepGraph", "end_point", "full_adjoint", "lean_adjoint", "pulled_back"]
__all__ += ["vector_jacobian"]


@dataclass(frozen=True)
class AdjointPath:
    """Lean or full adjoints, and the base means met on the way.

    Args:
        adjoints: ã_0 … ã_K, shape (K + 1, B, …); NaN below the lowest step that was asked for, so that using one by mistake
            shows.
        base_means: μ_k^base(x_k), shape (K, B, …), for the loss; NaN where the base was not evaluated.
    """

    adjoints: Tensor
    base_means: Tensor


@dataclass(frozen=True)
class StepGraph:
    """One evaluation of a step, with graph.

    Args:
        x: x_k, shape (B, …), a leaf.
        mean: μ_k of the process along which the adjoint is computed.
        base_mean: μ_k^base; the same tensor for the lean adjoint.
    """

    x: Tensor
    mean: Tensor
    base_mean: Tensor


@dataclass(frozen=True)
class EndPoint:
    """The end point of a path, at which the reward is evaluated.

    Args:
        state: x̂_K or x_K, shape (B, …), detached.
        last: the evaluation of step K − 1 that gave x̂_K, from which the adjoint continues; `None` for x_K.
    """

    state: Tensor
    last: StepGraph | None = None


def end_point(trajectory: Trajectory, base_mean: MeanFunction, mean: MeanFunction | None = None) -> EndPoint:
    """The noiseless end point x̂_K, which is the mean of step K − 1 (2409.08861, app. G.1); evaluates that step.

    Args:
        trajectory: paths x_0 … x_{K−1}; x_K is not read.
        base_mean: (k, x) → μ_k^base(x), differentiable in x.
        mean: (k, x) → μ_k^θ(x), for the end point of the controlled process and the full adjoint; `None` for the base's.

    Raises:
        ValueError: if a mean has another shape than the states.
    """
    k, states = len(trajectory) - 1, trajectory.states
    x = states[k].detach().requires_grad_()
    with torch.enable_grad():
        base = _checked(base_mean(k, x), x, "base_mean")
        carrier = base if mean is None else _checked(mean(k, x), x, "mean")
    return EndPoint(carrier.detach().to(states.dtype), StepGraph(x, carrier, base))


def lean_adjoint(
    base_mean: MeanFunction,
    trajectory: Trajectory,
    terminal: Tensor,
    lowest: int = 0,
    *,
    end: EndPoint | None = None,
    lowest_base_mean: int | None = None,
    running_cost_grad: Callable[[int, Tensor], Tensor] | None = None,
) -> AdjointPath:
    """Solve the lean adjoint backwards along a trajectory, down to `lowest` (2409.08861, eqs. 38–39, 221; app. G.1).

    Args:
        base_mean: (k, x) → μ_k^base(x), differentiable in x; evaluated once for each step from K − 1 (K − 2 with `end`) down to
            the lower of `lowest` and `lowest_base_mean`.
        trajectory: paths x_0 … x_{K−1}; x_K is not read.
        terminal: ã_K = −λ∇r at the end point, shape (B, …).
        lowest: adjoints are filled for k ≥ lowest; with the loss on step k paired with ã_{k+1}, pass (earliest chosen
            step) + 1.
        end: of `end_point`, whose evaluation of step K − 1 is used here, once; `None` evaluates that step.
        lowest_base_mean: base means are filled for k ≥ this; `None` means lowest − 1 (that one costs a forward only).
            Pass `lowest` when the loss pairs step k with ã_k, as the paper does: no evaluation is spent on step
            lowest − 1.
        running_cost_grad: (k, x_k) → ∇f_k(x_k), the gradient of step k's running cost (its Δt included); `None` for
            f = 0.

    Returns:
        AdjointPath, detached, in the states' dtype and on their device.

    Raises:
        ValueError: if `lowest` or `lowest_base_mean` is outside 0 … K, shapes disagree, or `base_mean` does not depend
            on x through autograd.
    """

    def base(k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        found = _checked(base_mean(k, x), x, "base_mean")
        return found, found

    return _solve(base, trajectory, terminal, lowest, end, lowest_base_mean, running_cost_grad)


def full_adjoint(
    mean: MeanFunction,
    base_mean: MeanFunction,
    trajectory: Trajectory,
    terminal: Tensor,
    lowest: int = 0,
    *,
    end: EndPoint | None = None,
    lowest_base_mean: int | None = None,
    running_cost_grad: Callable[[int, Tensor], Tensor] | None = None,
) -> AdjointPath:
    """Solve the full adjoint backwards along a trajectory of the controlled process (2409.08861, eqs. 30–31).

    Args:
        mean: (k, x) → μ_k^θ(x) of the model whose paths these are, differentiable in x; evaluated once for each step from K − 1
            down to `lowest`.
        base_mean: (k, x) → μ_k^base(x); evaluated once a step, too.
        terminal: a_K = ∇g at the end point, shape (B, …).
        end: of `end_point` with the controlled mean.
        trajectory, lowest, lowest_base_mean, running_cost_grad: as for `lean_adjoint`.

    Raises:
        ValueError: as for `lean_adjoint`.
    """

    def both(k: int, x: Tensor) -> tuple[Tensor, Tensor]:
        base = _checked(base_mean(k, x), x, "base_mean")
        carries = k >= lowest or k == len(trajectory) - 1  # below `lowest` only the base's mean is needed
        return _checked(mean(k, x), x, "mean") if carries else base, base

    return _solve(both, trajectory, terminal, lowest, end, lowest_base_mean, running_cost_grad)


def _solve(
    means: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    trajectory: Trajectory,
    terminal: Tensor,
    lowest: int,
    end: EndPoint | None,
    lowest_base_mean: int | None,
    running_cost_grad: Callable[[int, Tensor], Tensor] | None,
) -> AdjointPath:
    """Solve either adjoint; `means` returns the mean along which it is computed and the base's, the same for the lean one."""
    states, steps = trajectory.states, len(trajectory)
    last_mean = max(lowest - 1, 0) if lowest_base_mean is None else lowest_base_mean
    for name, step in (("lowest", lowest), ("lowest_base_mean", last_mean)):
        if not 0 <= step <= steps:
            raise ValueError(f"{name}={step} is outside the grid; pass a step from 0 to {steps}.")
    adjoints = states.new_full((steps + 1, *states.shape[1:]), torch.nan)
    base_means = states.new_full((steps, *states.shape[1:]), torch.nan)
    adjoints[steps] = _checked_terminal(terminal, states[0])
    last = None if end is None else end.last
    if last is not None:
        last_mean = min(last_mean, steps - 1)  # `end` has already evaluated step K − 1
    for k in range(steps - 1, min(lowest, last_mean) - 1, -1):
        with_graph = k >= lowest
        if k == steps - 1 and last is not None:
            found = last
        else:
            # A fresh leaf: the vector–Jacobian product of this step must not reach any other step.
            x = states[k].detach().requires_grad_(with_graph)
            with torch.set_grad_enabled(with_graph):
                found = StepGraph(x, *means(k, x))
        base_means[k] = found.base_mean.detach()
        if with_graph:
            adjoints[k] = _carry(found, trajectory.stds[k], adjoints[k + 1])
            if running_cost_grad is not None:
                adjoints[k] += running_cost_grad(k, found.x.detach()).detach()
        del found  # frees this step's activations before the next step is evaluated
    return AdjointPath(adjoints, base_means)


def _carry(step: StepGraph, std: Tensor, adjoint: Tensor) -> Tensor:
    """(∂μ/∂x)ᵀ adjoint, plus the gradient of the control's cost if there is a control."""
    mean, base, x = step.mean, step.base_mean, step.x
    if mean is base or not std.any():
        return pulled_back(mean, x, adjoint)
    push = ((mean - base) / std**2).detach()
    return pulled_back(mean, x, adjoint + push) - pulled_back(base, x, push)


def _checked(mean: Tensor, state: Tensor, name: str) -> Tensor:
    if mean.shape != state.shape:
        raise ValueError(
            f"{name} returned shape {tuple(mean.shape)} for states of shape {tuple(state.shape)}; return one mean per state."
        )
    return mean


def _checked_terminal(adjoint: Tensor, state: Tensor) -> Tensor:
    if adjoint.shape != state.shape:
        raise ValueError(
            f"the terminal adjoint has shape {tuple(adjoint.shape)}; it must be the states' shape {tuple(state.shape)}."
        )
    return adjoint.detach()


def pulled_back(mean: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
    """(∂mean/∂x)ᵀ cotangent, shape of x; frees the graph of `mean`.

    Raises:
        ValueError: if `mean` does not depend on x.
    """
    product = vector_jacobian(mean, x, cotangent) if mean.requires_grad else None
    if product is None:
        raise ValueError(
            "the mean (base_mean for the lean adjoint) does not depend on x through autograd; "
            "remove torch.no_grad() or .detach() from the path x → mean."
        )
    return product


def vector_jacobian(output: Tensor, x: Tensor, cotangent: Tensor) -> Tensor | None:
    """(∂output/∂x)ᵀ cotangent, `None` if `output` does not depend on `x`; frees the graph of `output`.

    Samples must be independent. Each sample's cotangent is scaled to size 1 by a power of two, and the product is scaled back.
    This is exact in float32. In a 16-bit network it keeps cotangents, often 1e-6, from being rounded to 0.

    Args:
        output: (B, …).
        x: (B, …), a leaf from which `output` was computed.
        cotangent: shape of `output`.
    """
    size = cotangent.reshape(len(cotangent), -1).abs().amax(1)
    exponent = torch.frexp(size).exponent.clamp(-100, 100)  # float32 ends at 2^±127
    scaled = torch.ldexp(cotangent, -exponent.view(-1, *[1] * (cotangent.ndim - 1)))
    # `allow_unused`: trained weights may give the output a graph that never meets x.
    product = torch.autograd.grad(output, x, scaled, allow_unused=True)[0]
    return None if product is None else torch.ldexp(product, exponent.view(-1, *[1] * (x.ndim - 1)))
