"""Memoryless paths of a pipeline's denoiser."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.matching import step_kl
from ..core.trajectory import Trajectory, rollout
from ..replay import Conditioning
from .denoiser import PipelineDenoiser
from .randomness import stacked_noise

__all__ = ["sample_trajectory", "sampled_path_kl"]


def sample_trajectory(
    denoiser: PipelineDenoiser,
    start: Tensor,
    conditioning: Conditioning,
    generators: Sequence[torch.Generator],
    *,
    guided: bool = False,
    keep_means: bool = False,
) -> Trajectory:
    """Sample a memoryless trajectory x_0 … x_{K−1} of the current model, with K − 1 evaluations; x_K is not needed.

    Args:
        denoiser: the model, or the base within `denoiser.base()`.
        start: x_0, shape (B, …).
        conditioning: of the batch.
        generators: of the step noise, one for each sample.
        guided: whether classifier-free guidance acts.
        keep_means: whether to keep the step means, too.
    """
    replay = denoiser.replay
    return rollout(
        lambda k, x: denoiser(x, k, conditioning, guided),
        start,
        replay.timesteps,
        replay.stds,
        lambda k: stacked_noise(start, generators),
        keep_means=keep_means,
    )


def sampled_path_kl(
    denoiser: PipelineDenoiser,
    start: Tensor,
    conditioning: Conditioning,
    generators: Sequence[torch.Generator],
    *,
    guided_rollout: bool = False,
    guided_loss: bool = False,
) -> Tensor:
    """Sample memoryless paths and return their `path_kl`, (B,), nats; one evaluation of model and base each per step.

    Args:
        denoiser: the model and its base.
        start: x_0, shape (B, …).
        conditioning: of the batch.
        generators: of the step noise, one for each sample.
        guided_rollout: whether the paths are guided; if this differs from `guided_loss`, a step takes a third evaluation.
        guided_loss: whether the two step means that are compared are guided.
    """
    alike = guided_rollout == guided_loss or not denoiser.replay.arguments.guides
    x, kl = start, start.new_zeros(len(start))
    for k, std in enumerate(denoiser.replay.stds):
        mean = denoiser(x, k, conditioning, guided_loss)
        if std > 0:
            with denoiser.base():
                kl += step_kl(mean, denoiser(x, k, conditioning, guided_loss), std)
        if k + 1 < len(denoiser.replay.stds):  # x_K itself is not needed
            x = (mean if alike else denoiser(x, k, conditioning, guided_rollout)) + std * stacked_noise(start, generators)
    return kl
