"""Small velocity networks in the plane on the product's scheduler and objectives, trained as the trainer trains pipelines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusers_adjoint.core.adjoint import EndPoint, end_point
from diffusers_adjoint.core.matching import choose_loss_steps, regression_loss
from diffusers_adjoint.core.trajectory import Trajectory, rollout
from diffusers_adjoint.objectives import Objective, Scored
from diffusers_adjoint.schedulers import MemorylessFlowMatchEulerDiscreteScheduler

Velocity = Callable[[Tensor, Tensor], Tensor]
"""x (B, 2) and t () → E[X_1 − X_0 | X_t = x], (B, 2), float64."""


def make_scheduler(integrator: str, steps: int) -> MemorylessFlowMatchEulerDiscreteScheduler:
    """On the grid 1, 1 − 1/K, …, 1/K, as FLUX-like pipelines pass it."""
    scheduler = MemorylessFlowMatchEulerDiscreteScheduler(integrator=integrator)
    scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    return scheduler


@dataclass(frozen=True)
class NetworkChain:
    """Two velocity networks on a memoryless scheduler, as a `DiffusionChain`; all samples share one condition."""

    model: Velocity
    reference: Velocity
    scheduler: MemorylessFlowMatchEulerDiscreteScheduler
    start: Tensor
    noise: torch.Generator

    running_cost_grad = None
    predicts_scores = True

    @property
    def stds(self) -> Tensor:
        return self.scheduler.stds

    @property
    def gains(self) -> Tensor:
        return self.scheduler.gains

    @property
    def posterior_stds(self) -> Tensor:
        return self.scheduler.posterior_stds

    @property
    def levels(self) -> Tensor:
        return self.scheduler.levels

    @property
    def times(self) -> Tensor:
        return self.scheduler.times

    @property
    def images_per_prompt(self) -> int:
        return len(self.start)

    def mean(self, k: int, x: Tensor) -> Tensor:
        return self._mean(self.model, k, x)

    def base_mean(self, k: int, x: Tensor) -> Tensor:
        return self._mean(self.reference, k, x)

    def _mean(self, velocity: Velocity, k: int, x: Tensor) -> Tensor:
        t = 1 - self.scheduler.sigmas[k].double()
        return self.scheduler.transition(-velocity(x, t), x, k).mean

    def base(self) -> AbstractContextManager[None]:
        return nullcontext()

    def rollout(self, keep_means: bool = False) -> Trajectory:
        given = self.mean, self.start, self.scheduler.timesteps, self.stds
        return rollout(*given, lambda _: gaussian(len(self.start), self.noise), keep_means=keep_means)

    def end_point(self, path: Trajectory, of: Literal["base", "model"]) -> EndPoint:
        return end_point(path, self.base_mean, self.mean if of == "model" else None)

    def sample(self) -> Tensor:
        with torch.no_grad():
            return self.mean(len(self.stds) - 1, self.rollout().states[-1])

    def noised(self, clean: Tensor, k: int) -> Tensor:
        return self.scheduler.noised(clean, gaussian(len(clean), self.noise), k)

    def clean(self, mean: Tensor, x: Tensor, k: int) -> Tensor:
        return self.scheduler.clean(mean, x, k)

    def toward(self, clean: Tensor, x: Tensor, k: int) -> Tensor:
        return self.scheduler.toward(clean, x, k)

    def base_score(self, x: Tensor, noise: float) -> Tensor:
        """(1 − noise) x is the state x_t at t = 1 − noise, whose score is (t v − x_t)/(1 − t)."""
        t, state = torch.tensor(1 - noise, dtype=x.dtype), (1 - noise) * x
        return (1 - noise) * (t * self.reference(state, t) - state) / noise


def gaussian(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 2, generator=generator, dtype=torch.float64)


def train(network: nn.Module, base: Velocity, objective: Objective, score: Callable[[Tensor], Scored], setting: Any) -> None:
    """As the trainer does it: Adam, a short warm-up, a linear fall; the loss of chosen steps is their sum.

    Args:
        setting: steps, loss_steps, updates, batch, learning_rate and seed.
    """
    scheduler = make_scheduler(objective.integrator(predicts_scores=True), setting.steps)
    generator = torch.Generator().manual_seed(setting.seed)
    optimizer = torch.optim.Adam(network.parameters(), setting.learning_rate, betas=(0.9, 0.99))
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 5, 1 - i / setting.updates))
    for _ in range(setting.updates):
        chain = NetworkChain(network, base, scheduler, gaussian(setting.batch, generator), generator)
        steps = choose_loss_steps(objective.scales(chain), setting.loss_steps, "uniform", generator)
        targets = objective.targets(chain, steps, score)
        optimizer.zero_grad()
        # An objective may have several points at one step.
        for x, base_mean, shift, scale, k in zip(
            targets.states, targets.base_means, targets.shifts, targets.scales, targets.steps.indices, strict=True
        ):
            regression_loss(chain.mean(k, x), base_mean, shift, scale).mean().backward()
        optimizer.step()
        rates.step()
