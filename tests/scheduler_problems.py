"""The memoryless schedulers on problems with a known answer: shared by their tests."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from problems import mixture_1d, model_output

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
