"""Samplers under test, as what the method sees of them (noise levels, standard deviations, a transition per step), and the
cases that several oracle files share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from problems import AffineChain, GaussianMixture, QuadraticReward, gaussian, mixture_1d, model_output
from torch import Tensor

from diffusers_adjoint.core.trajectory import Trajectory, rollout
from diffusers_adjoint.core.transition import Transition
from diffusers_adjoint.schedulers import MemorylessDDIMScheduler, MemorylessFlowMatchEulerDiscreteScheduler
from diffusers_adjoint.schedulers.integrators import INTEGRATORS

MemorylessScheduler = MemorylessFlowMatchEulerDiscreteScheduler | MemorylessDDIMScheduler

FAMILIES = ["flow_prediction", "epsilon", "v_prediction", "sample"]
CASES = [(prediction, integrator) for prediction in FAMILIES for integrator in INTEGRATORS]
# Tens of float64 matrix products in another order, on numbers of order one.
EXACT = {"atol": 1e-11, "rtol": 1e-11}


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# A matrix case: correlated, off centre, not unit size; and a bimodal law whose adjoints depend on the path.
NORMAL = gaussian(tensor([0.7, -0.4]), tensor([[0.36, 0.15], [0.15, 0.5]]))
BIMODAL = mixture_1d([0.35, 0.65], [-1.0, 0.9], [0.16, 0.3])
LINEAR = QuadraticReward.linear(tensor([1.3, -0.8]))
QUADRATIC = QuadraticReward(tensor([0.4, 0.2]), tensor([[1.2, -0.3], [-0.3, 0.8]]), tensor([-0.5, 1.0]))


def draw(*shape: int, seed: int) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def memoryless(prediction_type: str, integrator: str, steps: int) -> MemorylessScheduler:
    """The scheduler for a prediction type, with its grid set."""
    if prediction_type == "flow_prediction":
        flow = MemorylessFlowMatchEulerDiscreteScheduler(integrator=integrator)
        flow.set_timesteps(steps)
        return flow
    return ddim(steps, prediction_type=prediction_type, integrator=integrator)


def ddim(steps: int, **config: object) -> MemorylessDDIMScheduler:
    """A β-schedule's scheduler that starts at the noisiest level."""
    # `clip_sample` is said because `from_config` gives the parent's default, True, for whatever was left at a default here.
    scheduler = MemorylessDDIMScheduler(timestep_spacing="trailing", clip_sample=False, **config)
    scheduler.set_timesteps(steps)
    return scheduler


def parent_of(scheduler: MemorylessScheduler) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """diffusers' own deterministic sampler on the same grid."""
    is_ddim = isinstance(scheduler, MemorylessDDIMScheduler)
    parent = (DDIMScheduler if is_ddim else FlowMatchEulerDiscreteScheduler).from_config(scheduler.config)
    parent.set_timesteps(len(scheduler.timesteps))
    return parent


@dataclass(frozen=True)
class Sampler:
    """x_k = α_k X_1 + β_k X_0 in law; step k draws from `transition(model_output, x_k, k)`.

    Args:
        prediction_type: what the network predicts.
        alphas, betas: noise levels, shape (K + 1,), float64.
        timesteps, stds: shape (K,).
        transition: (model_output, x, k) → Transition.
    """

    prediction_type: str
    alphas: Tensor
    betas: Tensor
    timesteps: Tensor
    stds: Tensor
    transition: Callable[[Tensor, Tensor, int], Transition]

    @classmethod
    def over(cls, scheduler: MemorylessScheduler) -> Sampler:
        if isinstance(scheduler, MemorylessDDIMScheduler):
            kept = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod.view(1)])
            prediction, alphas, betas = scheduler.config.prediction_type, kept.double().sqrt(), (1 - kept.double()).sqrt()
        else:
            prediction, betas = "flow_prediction", scheduler.sigmas.double()
            alphas = 1 - betas
        return cls(prediction, alphas, betas, scheduler.timesteps, scheduler.stds, scheduler.transition)

    @classmethod
    def of(cls, prediction_type: str, integrator: str, steps: int) -> Sampler:
        return cls.over(memoryless(prediction_type, integrator, steps))

    def noisy_steps(self) -> list[int]:
        return [k for k, std in enumerate(self.stds) if std > 0]

    def output(self, law: GaussianMixture, k: int, x: Tensor) -> Tensor:
        """The prediction that is exact for `law`."""
        return model_output(law, x, float(self.alphas[k]), float(self.betas[k]), self.prediction_type)

    def mean(self, law: GaussianMixture) -> Callable[[int, Tensor], Tensor]:
        """(k, x) → step mean under that prediction."""
        return lambda k, x: self.transition(self.output(law, k, x), x, k).mean

    def chain(self, law: GaussianMixture) -> AffineChain:
        """The chain for a normal law, whose predictions are affine."""
        return AffineChain.of(self.mean(law), self.stds, law.means.shape[1])

    def path(self, mean: Callable[[int, Tensor], Tensor], start: Tensor, seed: int | None) -> Trajectory:
        """All K steps from `start`, float64; `None` switches the noise off."""
        shape = (len(self.stds), *start.shape)
        noise = torch.zeros(shape, dtype=torch.float64) if seed is None else draw(*shape, seed=seed)
        return rollout(mean, start, self.timesteps, self.stds, lambda k: noise[k], keep_last=True)


def constant_noise(sigma: float, steps: int) -> Sampler:
    """A sampler that is *not* memoryless: Euler steps of dX = (v + σ²/2 · s) dt + σ dB on the flow path, σ constant.

    It has the right marginals, but X_1 remembers X_0; written here, without the package, for the negative control.
    """
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    h = 1 / steps

    def transition(output: Tensor, x: Tensor, k: int) -> Transition:
        t, velocity = float(grid[k]), -output
        score = (t * velocity - x) / (1 - t)
        return Transition(x + h * (velocity + sigma**2 / 2 * score), sigma * h**0.5)

    stds = torch.full((steps,), sigma * h**0.5, dtype=torch.float64)
    return Sampler("flow_prediction", grid, 1 - grid, 1000 * (1 - grid[:-1]), stds, transition)
