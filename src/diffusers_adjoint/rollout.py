"""Reproducible randomness and rollouts of the pipeline's denoiser.

Every random number of an update belongs to (seed, update, global sample index), never to a rank or a micro-batch: splitting a
batch, accumulating gradients or adding processes changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from .denoiser import PipelineDenoiser
from .matching import step_kl
from .replay import Conditioning
from .trajectory import Trajectory, rollout

__all__ = ["Stream", "random_numbers_kept", "sample_trajectory", "sampled_path_kl", "seeded_generator", "seeded_generators"]
__all__ += ["stacked_noise"]


class Stream(IntEnum):
    """Independent random streams of one sample (or, for the loss steps, of one update)."""

    START = 0
    STEP_NOISE = 1
    LOSS_STEPS = 2
    EVALUATION = 3
    EVALUATION_START = 4
    EVALUATION_NOISE = 5
    PROBE = 6
    PROBE_NOISE = 7


def seeded_generator(seed: int, update: int, sample: int, stream: Stream) -> torch.Generator:
    """CPU generator that depends on its arguments only; on the CPU so that every device draws the same numbers."""
    state = np.random.SeedSequence((seed, update, sample, stream)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))  # manual_seed takes 63 bits


def seeded_generators(seed: int, update: int, samples: Sequence[int], stream: Stream) -> list[torch.Generator]:
    """One `seeded_generator` for each sample."""
    return [seeded_generator(seed, update, sample, stream) for sample in samples]


@contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Whatever draws from the global generators of Python, NumPy and torch within leaves them as they were before."""
    python, numpy, devices = random.getstate(), np.random.get_state(), [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def stacked_noise(like: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise of `like`'s shape, dtype and device; row i from generator i."""
    rows = [torch.randn(like.shape[1:], generator=generator, dtype=like.dtype) for generator in generators]
    return torch.stack(rows).to(like.device)


def sample_trajectory(
    denoiser: PipelineDenoiser,
    start: Tensor,
    conditioning: Conditioning,
    generators: Sequence[torch.Generator],
    *,
    guided: bool = False,
) -> Trajectory:
    """Memoryless trajectory of the current model, K − 1 evaluations: x_K is not needed.

    Args:
        start: x_0, shape (B, …).
        generators: step noise, one for each sample.
        guided: classifier-free guidance in the rollout.
    """
    replay = denoiser.replay
    return rollout(
        lambda k, x: denoiser(x, k, conditioning, guided),
        start,
        replay.timesteps,
        replay.stds,
        lambda k: stacked_noise(start, generators),
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
    """`path_kl` along memoryless paths that are sampled on the way: one evaluation of the model and one of the base a step.

    Args:
        start: x_0, shape (B, …).
        generators: step noise, one for each sample.
        guided_rollout: classifier-free guidance in the paths; a third evaluation a step where it differs from `guided_loss`.
        guided_loss: classifier-free guidance in the two means that are compared.
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
