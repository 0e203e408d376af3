r"""Find the λ at which the tilted distribution p_base·e^{λr} has a given KL to the base, from rewards of the base's images.

Each prompt has its own tilted distribution, but here each has few images, and importance weights of 32 images underestimate the
KL if the rewards have a long upper tail. So the rewards of all prompts are pooled after subtracting each prompt's mean. This is
exact if prompts differ in the mean reward only, and to second order in λ always. KL(λ) of the pooled sample comes from importance
weights (`tilt_estimate`) and grows with λ.

While `MIN_EFFECTIVE_IMAGES` effective images are left, λ is where KL(λ) has the given value. Beyond that, KL(λ) is extrapolated
as λ², which holds for normal rewards: KL = ½ λ² Var(r), because e^{λr} shifts a normal density without changing its variance. If
the base has fewer images than that, λ is √(2 KL)/std(r).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .estimate import within_prompt_std
from .tilt import tilt_estimate

__all__ = ["TiltScale", "tilt_scale"]

MIN_EFFECTIVE_IMAGES = 50
"""Measured with 256 images of the digits' base: the λ for 1 nat is then right to 10 % for the reward ink (with KL ∝ λ² alone,
15 % too high) and to 6 % for the reward three (36 % too low). The λ for 2 nats is 6 ± 11 % too high for ink. With a minimum of
30 the λ for ink scatters by 13 %, and with 100 that for three is 15 % too low."""
LARGEST_SPREAD = 10.0
"""Largest λ·std(r) in the search for λ; beyond it the target consists of a handful of the base's best images."""


@dataclass(frozen=True)
class TiltScale:
    """A λ, and how it was found.

    Args:
        reward_scale: λ, nats per unit of reward.
        measured: the KL that importance weights have measured, nats. If it is smaller than the given KL, λ was extrapolated from
            there with KL ∝ λ².
        effective: number of effective images at `measured`.
        saturated: whether the measured KL stays below the given one up to λ·std(r) = 10.
    """

    reward_scale: float
    measured: float
    effective: float
    saturated: bool = False


def tilt_scale(rewards: Tensor, kl: float) -> TiltScale:
    """The λ at which the prompts' tilted distributions have about the KL `kl` to the base, in the mean over prompts.

    Args:
        rewards: r of images of the base, shape (P, n) for n images of each of P prompts, any unit, NaN where one is missing;
            computed in float64.
        kl: above 0, nats.

    Raises:
        ValueError: if all images of each prompt have the same reward, up to rounding in float32, or no prompt has two images.
    """
    std = within_prompt_std(rewards).mean
    if not math.isfinite(std):
        raise ValueError(
            f"target_kl={kl:g} needs the standard deviation of the rewards, and no prompt has two with a finite reward; fix "
            f"the reward function, or pass reward_scale."
        )
    if std <= 1e-6 * rewards.nan_to_num().abs().max():
        raise ValueError(
            f"target_kl={kl:g} is out of reach, because all images of a prompt have the same reward; pass a reward that "
            f"distinguishes them, or reward_scale."
        )
    normal = math.sqrt(2 * kl) / std
    sample = _about_the_means(rewards.double().cpu())
    below, found = 0.0, TiltScale(normal, 0.0, float(len(sample)))
    above = max(normal, LARGEST_SPREAD / std)
    largest = _measured(sample, above)
    if largest.effective >= MIN_EFFECTIVE_IMAGES and largest.measured < kl:
        return TiltScale(normal, largest.measured, largest.effective, saturated=True)
    while above - below > 1e-4 * above and above > 1e-3 * normal:
        middle = _measured(sample, (below + above) / 2)
        if middle.measured < kl and middle.effective >= MIN_EFFECTIVE_IMAGES:
            below, found = middle.reward_scale, middle
        else:
            above = middle.reward_scale
    return found if below == 0 else TiltScale(below * math.sqrt(kl / found.measured), found.measured, found.effective)


def _about_the_means(rewards: Tensor) -> Tensor:
    """Rewards (P, n) minus their prompt's mean, pooled to (N,), and scaled so that their variance is unbiased."""
    rows = [row[row.isfinite()] for row in rewards]
    return torch.cat([(row - row.mean()) * math.sqrt(len(row) / (len(row) - 1)) for row in rows if len(row) > 1])


def _measured(sample: Tensor, reward_scale: float) -> TiltScale:
    """KL and effective images of one λ, by importance weights."""
    found = tilt_estimate(reward_scale * sample, sample)
    return TiltScale(reward_scale, found.kl_target, found.effective_sample_size * found.num_samples)
