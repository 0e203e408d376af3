r"""Control problems on a grid, and how a stochastic differential equation becomes one.

    min_u E[ ∫ ½‖u‖² + f(X, t) dt + g(X_1) ],     dX = (b(X, t) + σ(t) u(X, t)) dt + σ(t) dB          (2409.08861, eqs. 12–13)

With steps h_k = t_{k+1} − t_k, s_k = √h_k σ(t_k) and √Δ u_k = √h_k u(x_k, t_k) this is the chain of `transition.py`,

    x_{k+1} = μ_k(x_k) + s_k (√Δ u_k + ξ_k),     cost Σ_k ½‖√Δ u_k‖² + f_k(x_k) + g(x_K),

with μ_k(x) = x + h_k b(x, t_k) and f_k = h_k f(·, t_k). σ may be a number or diagonal, but must not depend on the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.matching import noisy_steps
from ..core.trajectory import MeanFunction
from .paths import Noise, require_time_alone

__all__ = ["Control", "ControlProblem"]

Control = Callable[[Tensor, Tensor], Tensor]
"""(x of shape (B, …), t a 0-dimensional tensor) → (B, …): a drift, or a control, which is any `nn.Module` of this signature."""


@dataclass(frozen=True)
class ControlProblem:
    """A control problem: a base chain, and the terminal and running costs.

    Args:
        base_mean: (k, x) → μ_k(x), differentiable in x.
        times: t_0 < … < t_K, shape (K + 1,).
        stds: s_k, shape (K,), or (K, …) for diagonal noise.
        terminal_cost: g, (B, …) → (B,), differentiable.
        running_cost: (k, x) → f_k(x), shape (B,), the step's h_k included; `None` for f = 0.

    Raises:
        ValueError: if the times do not increase, the lengths disagree, a std is not usable, or no step has noise.
    """

    base_mean: MeanFunction
    times: Tensor
    stds: Tensor
    terminal_cost: Callable[[Tensor], Tensor]
    running_cost: Callable[[int, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_times(self.times)
        if len(self.stds) != len(self.times) - 1:
            raise ValueError(f"{len(self.times)} times need {len(self.times) - 1} stds, but got {len(self.stds)}.")
        for k, std in enumerate(self.stds):
            _require_usable(std, f"the std of step {k}")
        if not noisy_steps(self.stds):
            raise ValueError("σ is 0 at every step, so no step can be controlled; pass noise that is positive somewhere.")

    @classmethod
    def euler(
        cls,
        drift: Control,
        noise: Noise,
        times: Tensor,
        terminal_cost: Callable[[Tensor], Tensor],
        running_cost: Control | None = None,
    ) -> ControlProblem:
        """The Euler–Maruyama chain of a stochastic differential equation.

        Args:
            drift: b(x, t), (B, …) → (B, …).
            noise: σ(t), a number or a tensor that multiplies one state element by element.
            times: t_0 < … < t_K, shape (K + 1,).
            terminal_cost: g(x), (B, …) → (B,).
            running_cost: f(x, t), (B, …) → (B,).

        Raises:
            TypeError: if `noise` does not take the time alone.
            ValueError: as for the class.
        """
        check_times(times)
        steps = times.diff()
        stds = torch.stack([steps[k].sqrt() * sigma for k, sigma in enumerate(_noises(noise, times[:-1]))])
        return cls(
            base_mean=lambda k, x: x + steps[k].to(x) * _checked(drift(x, times[k].to(x)), x, "drift"),
            times=times,
            stds=stds,
            terminal_cost=terminal_cost,
            running_cost=None if running_cost is None else lambda k, x: steps[k].to(x) * running_cost(x, times[k].to(x)),
        )

    def mean(self, control: Control) -> MeanFunction:
        """The step mean under a control u(x, t): μ_k(x) + s_k √h_k u(x, t_k)."""
        steps = self.times.diff()

        def controlled(k: int, x: Tensor) -> Tensor:
            push = _checked(control(x, self.times[k].to(x)), x, "the control")
            return self.base_mean(k, x) + (self.stds[k] * steps[k].sqrt()).to(x) * push

        return controlled

    def terminal_adjoint(self, x: Tensor) -> Tensor:
        """∇g(x), (B, …) → (B, …).

        Raises:
            ValueError: if the cost is not one number a sample or has no gradient.
        """
        return _gradient(self.terminal_cost, x, "terminal_cost")

    @property
    def running_cost_grad(self) -> Callable[[int, Tensor], Tensor] | None:
        """(k, x) → ∇f_k(x), (B, …); `None` without a running cost. Raises as `terminal_adjoint` does."""
        running = self.running_cost
        return None if running is None else lambda k, x: _gradient(lambda at: running(k, at), x, "running_cost")

    @property
    def checked_running_cost(self) -> Callable[[int, Tensor], Tensor] | None:
        """`running_cost`, with the error of `terminal_adjoint` if the state requires a gradient and the cost does not."""
        running = self.running_cost
        return None if running is None else lambda k, x: _checked_cost(running(k, x), x, "running_cost")


def check_times(times: Tensor) -> None:
    """Raises ValueError unless there are two or more increasing times."""
    increasing = isinstance(times, Tensor) and times.is_floating_point() and times.ndim == 1 and len(times) > 1
    if not (increasing and (times.diff() > 0).all()):
        raise ValueError(f"times must increase, from t_0 to t_K; pass a tensor like torch.linspace(0, 1, K + 1), not {times}.")


def _noises(noise: Noise, times: Tensor) -> list[Tensor]:
    """σ of each time."""
    require_time_alone(noise)
    sigmas = [torch.as_tensor(noise(t), dtype=times.dtype, device=times.device) for t in times]
    for t, sigma in zip(times, sigmas, strict=True):
        _require_usable(sigma, f"σ({t.item():g})")
    return sigmas


def _require_usable(sigma: Tensor, name: str) -> None:
    if not (sigma.isfinite().all() and ((sigma > 0).all() or not sigma.any())):
        raise ValueError(f"{name} = {sigma.tolist()}; pass a finite σ that is positive in every component, or 0 in all of them.")


def _checked(values: Tensor, x: Tensor, name: str) -> Tensor:
    if values.shape != x.shape:
        raise ValueError(f"{name} returned shape {tuple(values.shape)} for states of shape {tuple(x.shape)}; they must agree.")
    return values


def _gradient(cost: Callable[[Tensor], Tensor], x: Tensor, name: str) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        values = _checked_cost(cost(leaf), leaf, name)
        gradient = torch.autograd.grad(values.sum(), leaf, allow_unused=True)[0]
    if gradient is None:  # its graph leads to other tensors only
        raise ValueError(_NO_GRADIENT.format(name))
    return gradient


_NO_GRADIENT = "{} has no gradient in the state; compute it with torch, without detach() or no_grad()."


def _checked_cost(values: Tensor, x: Tensor, name: str) -> Tensor:
    if values.shape != x.shape[:1]:
        raise ValueError(
            f"{name} returned shape {tuple(values.shape)} for {len(x)} states; return one number a state, ({len(x)},)."
        )
    if x.requires_grad and not values.requires_grad:
        raise ValueError(_NO_GRADIENT.format(name))
    return values
