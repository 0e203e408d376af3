"""Rewards as metrics, without gradient and with a standard error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .estimate import Estimate, prompt_mean

__all__ = ["mean_score"]


def mean_score(reward: Callable[..., Tensor], images: Tensor, prompts: Sequence[str]) -> Estimate:
    """Mean of a reward over P prompts with N images each, one prompt at a time.

    Args:
        reward: `PickScore()`, `ImageReward()` or any other f(images=, prompts=) → (N,).
        images: (P, N, 3, H, W) in [0, 1], on the reward's device.
        prompts: P.

    Returns:
        Estimate in the reward's unit. Its standard error is over prompts, or for a single prompt over images.

    Raises:
        ValueError: if the numbers of prompts differ.
    """
    if len(images) != len(prompts):
        raise ValueError(f"images are of {len(images)} prompts, but there are {len(prompts)}; pass one prompt for each row.")
    with torch.no_grad():  # on copies: a reward may write into its images
        rows = [reward(images=row.clone(), prompts=[prompt] * len(row)) for row, prompt in zip(images, prompts, strict=True)]
    return prompt_mean(torch.stack(rows))
