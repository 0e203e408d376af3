"""Reproducible randomness.

Every random number of an update belongs to (seed, update, global sample index), not to a process or a micro-batch. So splitting a
batch, accumulating gradients or adding processes does not change the numbers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

__all__ = ["Stream", "seeded_generator", "seeded_generators", "random_numbers_kept", "stacked_noise"]


class Stream(IntEnum):
    """Independent random streams of one sample (or, for the loss steps and the frames, of one update)."""

    START = 0
    STEP_NOISE = 1
    LOSS_STEPS = 2
    EVALUATION = 3
    EVALUATION_START = 4
    EVALUATION_NOISE = 5
    PROBE = 6
    PROBE_NOISE = 7
    FRAMES = 8


def seeded_generator(seed: int, update: int, sample: int, stream: Stream) -> torch.Generator:
    """A CPU generator that depends on its arguments only; on the CPU, so that the numbers are the same for every device."""
    state = np.random.SeedSequence((seed, update, sample, stream)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))  # manual_seed takes 63 bits


def seeded_generators(seed: int, update: int, samples: Sequence[int], stream: Stream) -> list[torch.Generator]:
    """One `seeded_generator` for each sample."""
    return [seeded_generator(seed, update, sample, stream) for sample in samples]


@contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Restore the global random state of Python, NumPy and torch after this context."""
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
