"""Scoring of end points: rewards and reward gradients, as objectives and the log need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.matching import bounded, half_square
from ..data.columns import prompts_of, without_prompt
from ..model.chain import PipelineChain
from ..model.samples import images_and_rewards
from ..rewards import WeightedReward, reward_gradient

__all__ = ["ScoredImages", "score_images"]


@dataclass(frozen=True)
class ScoredImages:
    """A scored batch of end points; all tensors are detached.

    Args:
        rewards: r, (B,), NaN for an image without a reward.
        values: value f_i of each reward function, name → (B,).
        end_point: the end points x̂_K, (B, …).
        images: the decoded end points; of videos, the frames that the rewards see.
        exponent: λr, (B,).
        tilt: λ∇r, (B, …); 0 for images that are not usable, and NaN for all if nothing is differentiated.
        usable: images with a finite reward and, if it is differentiated, a finite ½‖λ∇r‖²; (B,) bool.
        norms: ‖λ∇r‖ = ‖ã_K‖ of each image, (B,); NaN if nothing is differentiated.
    """

    rewards: Tensor
    values: dict[str, Tensor]
    end_point: Tensor
    images: Tensor
    exponent: Tensor
    tilt: Tensor
    usable: Tensor
    norms: Tensor


def score_images(
    end_point: Tensor, chain: PipelineChain, reward: WeightedReward, reward_scale: float, *, differentiate: bool
) -> ScoredImages:
    """Decode end points and score the images.

    Args:
        end_point: x̂_K, (B, …).
        chain: it decodes, and has the columns for the rewards.
        reward: the weighted reward functions.
        reward_scale: λ, nats per unit of reward.
        differentiate: whether to compute λ∇r, by one backward pass through rewards and decoder.

    Raises:
        ValueError: if `differentiate` is set and a reward has no gradient.
    """
    columns = chain.reward_columns
    if not differentiate:
        with torch.no_grad():
            images, values = images_and_rewards(reward, chain.decode(end_point), columns)
        rewards = reward.total(values)
        unknown = torch.full_like(end_point, torch.nan)
        exponent, norms = reward_scale * rewards, torch.full_like(rewards, torch.nan)
        return ScoredImages(rewards, values, end_point, images, exponent, unknown, rewards.isfinite(), norms)
    found = reward_gradient(end_point, chain.decode, reward, prompts_of(columns), without_prompt(columns))
    slope = reward_scale * found.gradient
    usable = found.rewards.isfinite() & bounded(half_square(slope))
    tilt = torch.where(usable.view(-1, *[1] * (slope.ndim - 1)), slope, 0.0)
    exponent, norms = reward_scale * found.rewards, slope.flatten(1).norm(dim=1)
    return ScoredImages(found.rewards, found.values, end_point, found.images, exponent, tilt, usable, norms)
