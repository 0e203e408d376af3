"""The memoryless schedulers on problems with a known answer: shared by their tests."""

import contextlib

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from problems import mixture_1d, model_output
from torch import Tensor

from diffusers_adjoint.core.adjoint import EndPoint, end_point
from diffusers_adjoint.core.trajectory import Trajectory, rollout
from diffusers_adjoint.schedulers import MemorylessDDIMScheduler, MemorylessFlowMatchEulerDiscreteScheduler

BOTH = [MemorylessFlowMatchEulerDiscreteScheduler, MemorylessDDIMScheduler]
BETA_PREDICTIONS = ["epsilon", "sample", "v_prediction"]


def ready(cls, steps=8, device=None, **config):
    scheduler = cls(**config)
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def noise_levels(scheduler):
    """α_0 … α_K and β_0 … β_K, from the public tables."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigmas = scheduler.sigmas.double()
        return 1 - sigmas, sigmas
    kept = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod.view(1)]).double()
    return kept.sqrt(), (1 - kept).sqrt()


def network(scheduler, law):
    """(k, x) → what a perfectly trained network says at step k; x (B, d)."""
    alphas, betas = noise_levels(scheduler)
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    return lambda k, x: model_output(law, x, float(alphas[k]), float(betas[k]), kind)


def mean_function(scheduler, law):
    output = network(scheduler, law)
    return lambda k, x: scheduler.transition(output(k, x), x, k).mean


def normal(mean=0.7, variance=0.36):
    return mixture_1d([1.0], [mean], [variance])


def batch(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class KnownChain:
    """A scheduler's chain on a law with a known denoiser, as objectives see it; its paths are those of another law, the model's.

    Args:
        scheduler: with a grid.
        law: of the base.
        start: x_0, (B, d), float64.
        model: law whose denoiser draws the paths; the base's own if there is none.
        rounded: what becomes of the base's predictions, such as a cast to 16 bits and back.
        images_per_prompt: of the paths; all, if it is not said.
    """

    running_cost_grad, predicts_scores = None, True

    def __init__(self, scheduler, law, start, model=None, rounded=lambda output: output, images_per_prompt=None):
        self.scheduler, self.start, self.evaluated = scheduler, start, []
        self.gains, self.stds, self.clean = scheduler.gains, scheduler.stds, scheduler.clean
        self.posterior_stds, self.times, self.toward = scheduler.posterior_stds, scheduler.times, scheduler.toward
        self.images_per_prompt = images_per_prompt or len(start)
        self._noise = torch.Generator().manual_seed(1)  # of what is noised again
        self._output, self._rounded = network(scheduler, law), rounded
        self.mean = mean_function(scheduler, model or law)

    def base(self):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def reference(self):
        """Within it the model is `frozen`, a mean function."""
        own, self.mean = self.mean, self.frozen
        yield
        self.mean = own

    def noised(self, clean: Tensor, k: int) -> Tensor:
        return self.scheduler.noised(clean, torch.randn(clean.shape, generator=self._noise, dtype=clean.dtype), k)

    def rollout(self, keep_means: bool = False) -> Trajectory:
        stds, generator = self.stds.to(self.start), torch.Generator().manual_seed(0)
        noise = torch.randn(len(stds), *self.start.shape, generator=generator, dtype=self.start.dtype)
        return rollout(self.mean, self.start, self.scheduler.timesteps, stds, lambda k: noise[k], keep_means=keep_means)

    def base_mean(self, k: int, x: Tensor) -> Tensor:
        self.evaluated.append(k)
        return self.scheduler.transition(self._rounded(self._output(k, x)), x, k).mean

    def end_point(self, path: Trajectory, of: str) -> EndPoint:
        return end_point(path, self.base_mean, self.mean if of == "model" else None)
