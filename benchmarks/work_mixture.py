"""Three Gaussians in the plane, tilted by a linear reward: a small network on the product's scheduler and objectives."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from solvers import Network
from torch import Tensor, nn
from work_count import WorkCount
from work_kept import Kept

from diffusers_adjoint.core.adjoint import EndPoint, end_point
from diffusers_adjoint.core.matching import choose_loss_steps, regression_loss
from diffusers_adjoint.core.trajectory import Trajectory, rollout
from diffusers_adjoint.objectives import AdjointMatching
from diffusers_adjoint.schedulers import MemorylessFlowMatchEulerDiscreteScheduler
from diffusers_adjoint.soc import FLOW, PathSampler

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import problems as known  # noqa: E402

Velocity = Callable[[Tensor, Tensor], Tensor]
ODE_STEPS, MEMORYLESS_STEPS = 50, 20


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


LAW = known.GaussianMixture(
    double(0.5, 0.3, 0.2),
    torch.stack([double(-1.0, -0.6), double(1.0, -0.6), double(0.0, 1.2)]),
    0.12 * torch.eye(2, dtype=torch.float64).expand(3, 2, 2),
)
REWARD = known.QuadraticReward.linear(double(1.0, 0.6))


class Base(nn.Module):
    """E[X_1 − X_0 | X_t = x] of the mixture, exactly; (B, 2) → (B, 2)."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        data, noise = LAW.denoise(x, float(t), 1 - float(t))
        return data - noise


def make_scheduler(integrator: str, steps: int) -> MemorylessFlowMatchEulerDiscreteScheduler:
    """On the grid 1, 1 − 1/K, …, 1/K, as FLUX-like pipelines pass it."""
    scheduler = MemorylessFlowMatchEulerDiscreteScheduler(integrator=integrator)
    scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    return scheduler


@dataclass(frozen=True)
class NetworkChain:
    """Two velocity networks on a memoryless scheduler, as a `DiffusionChain` of the objectives that keep to their paths."""

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
    def times(self) -> Tensor:
        return self.scheduler.times

    def mean(self, k: int, x: Tensor) -> Tensor:
        return self._mean(self.model, k, x)

    def base_mean(self, k: int, x: Tensor) -> Tensor:
        return self._mean(self.reference, k, x)

    def _mean(self, velocity: Velocity, k: int, x: Tensor) -> Tensor:
        t = 1 - self.scheduler.sigmas[k].double()
        return self.scheduler.transition(-velocity(x, t), x, k).mean

    def base(self) -> AbstractContextManager[None]:
        return nullcontext()

    def rollout(self) -> Trajectory:
        scheduler = self.scheduler
        return rollout(self.mean, self.start, scheduler.timesteps, self.stds, lambda _: gaussian(len(self.start), self.noise))

    def end_point(self, path: Trajectory, of: Literal["base", "model"]) -> EndPoint:
        return end_point(path, self.base_mean, self.mean if of == "model" else None)


@dataclass(frozen=True)
class Scored:
    """A linear reward at end points, λ = 1; as `objectives.Scored`."""

    state: Tensor

    @property
    def exponent(self) -> Tensor:
        return REWARD(self.state)

    @property
    def tilt(self) -> Tensor:
        return REWARD.grad(self.state)

    @property
    def usable(self) -> Tensor:
        return torch.ones(len(self.state), dtype=torch.bool)


def gaussian(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 2, generator=generator, dtype=torch.float64)


def run(setting: Any) -> dict[str, Any]:
    """Train, sample, compare with the tilt."""
    torch.manual_seed(setting.seed)
    base = Base()
    network = Network(2, base.forward)
    work = WorkCount(network, base)
    with work.counting():
        train(network, base, setting)
    return {"work": work.total, "w2": distances(network, setting.samples), "w2_base": distances(base, setting.samples)}


def train(network: Network, base: Base, setting: Any) -> None:
    """As the trainer does it: Adam, a short warm-up, a linear fall; the loss of chosen steps is their sum."""
    objective = AdjointMatching(setting.pairing, setting.cap)
    scheduler = make_scheduler(objective.integrator(predicts_scores=True), setting.steps)
    if setting.per_rollout > 1:
        objective = Kept(objective, setting.per_rollout)
    generator = torch.Generator().manual_seed(setting.seed)
    optimizer = torch.optim.Adam(network.parameters(), setting.learning_rate, betas=(0.9, 0.99))
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 5, 1 - i / setting.updates))
    for _ in range(setting.updates):
        chain = NetworkChain(network, base, scheduler, gaussian(setting.batch, generator), generator)
        steps = choose_loss_steps(objective.scales(chain), setting.loss_steps, "uniform", generator)
        targets = objective.targets(chain, steps, Scored)
        optimizer.zero_grad()
        for x, base_mean, shift, scale, k in zip(
            targets.states, targets.base_means, targets.shifts, targets.scales, steps.indices, strict=True
        ):
            regression_loss(chain.mean(k, x), base_mean, shift, scale).mean().backward()
        optimizer.step()
        rates.step()


def distances(velocity: Velocity, count: int) -> dict[str, float]:
    """W2 to the tilt of ODE samples and of memoryless ones, root mean square over projections to lines."""
    target, generator = LAW.tilt(REWARD)[0], torch.Generator().manual_seed(12345)
    levels = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(count, dtype=torch.float64)
    start = torch.special.ndtri(levels.clamp(1e-6, 1 - 1e-6))  # evenly spread: hardly any chance in the ODE's samples
    with torch.no_grad():
        ode = PathSampler(FLOW, lambda t: 0.0, torch.linspace(0, 1, ODE_STEPS + 1)).sample(velocity, start)[-1]
        chain = NetworkChain(velocity, velocity, make_scheduler("posterior", MEMORYLESS_STEPS), start, generator)
        end = chain.end_point(chain.rollout(), of="base").state
    return {"ODE": known.sliced_w2(ode, target), "memoryless": known.sliced_w2(end, target)}
