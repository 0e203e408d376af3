"""Trajectories of the current model: the paths along which adjoint and loss are evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .transition import Transition

__all__ = ["Trajectory", "rollout"]

MeanFunction = Callable[[int, Tensor], Tensor]
"""(k, x_k of shape (B, …)) → μ_k(x_k), differentiable in x."""


@dataclass(frozen=True)
class Trajectory:
    """States of one batch of paths on a grid of K steps.

    Args:
        states: x_0 … x_K stacked, shape (K + 1, B, …); or without the last one, (K, B, …), since neither the adjoint nor
            the loss reads x_K. Detached.
        timesteps: the scheduler's timesteps, shape (K,), noise to data.
        stds: s_k, shape (K,), or (K, …) where the noise is diagonal and not one number; 0 where the step adds no noise.
        means: μ_k(x_k), about which x_{k+1} was drawn, one for each state but the first; `None` if they were not kept.

    Raises:
        ValueError: if the lengths disagree or the states carry a graph.
    """

    states: Tensor
    timesteps: Tensor
    stds: Tensor
    means: Tensor | None = None

    def __post_init__(self) -> None:
        steps = len(self.stds)
        if len(self.timesteps) != steps or len(self.states) not in (steps, steps + 1):
            raise ValueError(
                f"a trajectory of {steps} stds needs {steps} timesteps and {steps} or {steps + 1} states, "
                f"but got {len(self.timesteps)} timesteps and {len(self.states)} states."
            )
        if self.states.requires_grad:
            raise ValueError("trajectory states have a graph; pass states.detach(), because the loss must not reach the rollout.")

    def __len__(self) -> int:
        return len(self.stds)


def rollout(
    mean: MeanFunction,
    start: Tensor,
    timesteps: Tensor,
    stds: Tensor,
    noise: Callable[[int], Tensor],
    *,
    keep_last: bool = False,
    keep_means: bool = False,
) -> Trajectory:
    """Run x_{k+1} = μ_k(x_k) + s_k ξ_k from `start`, without gradient (2409.08861, Alg. 1, eq. 40; Alg. 2, eq. 219).

    Args:
        mean: (k, x_k) → μ_k(x_k) of the model whose paths are sampled.
        start: x_0, shape (B, …).
        timesteps: shape (K,), copied into the result.
        stds: s_k, shape (K,), or (K, …) for diagonal noise.
        noise: k → ξ_k of `start`'s shape; called once a step, in order.
        keep_last: also take step K − 1. Training does not need x_K, so K − 1 evaluations are enough.
        keep_means: also keep the step means, which doubles the memory of the path.

    Returns:
        Trajectory with K states, or K + 1 with `keep_last`.
    """
    states, means = [start.detach()], list[Tensor]()
    with torch.no_grad():
        for k in range(len(stds) if keep_last else len(stds) - 1):
            moved = mean(k, states[k])
            states.append(Transition(moved, stds[k]).sample(noise(k)))
            if keep_means:
                means.append(moved)
    return Trajectory(torch.stack(states), timesteps, stds, torch.stack(means) if keep_means else None)
