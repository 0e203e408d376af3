"""What the rewards say of end points, as objectives and the log need it."""

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
    """A batch of end points, scored.

    Args:
        rewards: r, shape (B,), NaN for an image without one; detached, as all of these.
        values: name → f_i, shape (B,).
        end_point: that was scored, (B, …).
        images: the decoded end points, of videos the frames that the rewards see.
        exponent: λr, shape (B,).
        tilt: λ∇r, shape (B, …), 0 for the images that are not usable; NaN where nothing is differentiated.
        usable: which images have a finite reward and, where it is differentiated, a bounded ½‖λ∇r‖², (B,) bool.
        norms: ‖λ∇r‖ = ‖ã_K‖ of each image, (B,); NaN where nothing is differentiated.
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
    """Decode the end points and score the images; with `differentiate` also λ∇r, by one pass back through the decoder.

    Raises:
        ValueError: if a reward has no gradient where one is asked for.
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
