"""Three Gaussians in the plane, tilted by a linear reward: a small network on the product's scheduler and objectives."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from network_chain import NetworkChain, Velocity, make_scheduler, train
from solvers import Network
from torch import Tensor, nn
from work_count import WorkCount
from work_kept import Kept

from diffusers_adjoint.objectives import objective_of
from diffusers_adjoint.soc import FLOW, PathSampler

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import problems as known  # noqa: E402

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


def run(setting: Any) -> dict[str, Any]:
    """Train, sample, compare with the tilt."""
    torch.manual_seed(setting.seed)
    base = Base()
    network = Network(2, base.forward)
    objective = objective_of(setting.loss_type, setting.loss_kwargs)
    if setting.per_rollout > 1:
        objective = Kept(objective, setting.per_rollout)
    work = WorkCount(network, base)
    with work.counting():
        train(network, base, objective, Scored, setting)
    return {"work": work.total, "w2": distances(network, setting.samples), "w2_base": distances(base, setting.samples)}


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
