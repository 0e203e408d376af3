r"""The λ whose tilt p_base·e^{λr} lies a given number of nats from the base, from rewards of the base's images.

A tilt is one for each prompt, and here a prompt has few images: weights of 32 read the KL too low where the rewards have a long
upper tail. So the rewards of all prompts, each about its prompt's mean, count as one sample; that is exact where prompts differ
by the mean of their rewards alone, and to second order in λ always. KL(λ) of that sample is `tilt_estimate`'s, by importance
weights, and grows with λ. As far as `MIN_EFFECTIVE_IMAGES` are left, λ is where KL(λ) is the one asked for. Beyond that it is
taken to grow like λ², as for normal rewards: KL = ½ λ² Var(r), since e^{λr} moves the mean of a normal density and leaves its
variance. Where not even the base has so many images, λ is √(2 KL)/std(r).
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
"""Of 256 images of the digits' base, the λ of 1 nat is then right to 10 % for ink (KL ∝ λ² alone: 15 % too high) and to 6 % for
three (36 % too low); of 2 nats 6 ± 11 % too high for ink. At 30 images ink spreads by 13 %, at 100 three is 15 % too low."""
LARGEST_SPREAD = 10.0
"""λ·std(r) at which the search for λ ends: a target there is a handful of the base's best images."""


@dataclass(frozen=True)
class TiltScale:
    """A λ, and how it was found.

    Args:
        reward_scale: λ, nats per unit of reward.
        measured: the KL that importance weights have confirmed, nats; where it is smaller than the one asked for, KL ∝ λ² has
            led from there to λ.
        effective: effective images at `measured`.
        saturated: whether importance weights see no λ with the KL asked for, up to λ·std(r) = 10.
    """

    reward_scale: float
    measured: float
    effective: float
    saturated: bool = False


def tilt_scale(rewards: Tensor, kl: float) -> TiltScale:
    """The λ whose tilts, one for each prompt, are about `kl` nats from the base in the mean over prompts.

    Args:
        rewards: r of images of the base, shape (P, n) for n images of each of P prompts, any unit, NaN where one is missing;
            computed in float64.
        kl: above 0, nats.

    Raises:
        ValueError: if the images of a prompt have all the same reward, up to float32's rounding, or no prompt has two.
    """
    std = within_prompt_std(rewards).mean
    if not math.isfinite(std):
        raise ValueError(
            f"target_kl={kl:g} asks for the spread of the rewards, and no prompt has two images with a finite one; mend the "
            f"reward function, or pass reward_scale."
        )
    if std <= 1e-6 * rewards.nan_to_num().abs().max():
        raise ValueError(
            f"target_kl={kl:g} is out of reach, because the images of a prompt all have the same reward, and no λ prefers one; "
            f"pass a reward that tells them apart, or reward_scale."
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
    """(P, n) → the rewards minus their prompt's mean, (N,); stretched so that their variance has no bias."""
    rows = [row[row.isfinite()] for row in rewards]
    return torch.cat([(row - row.mean()) * math.sqrt(len(row) / (len(row) - 1)) for row in rows if len(row) > 1])


def _measured(sample: Tensor, reward_scale: float) -> TiltScale:
    """What importance weights say of one λ."""
    found = tilt_estimate(reward_scale * sample, sample)
    return TiltScale(reward_scale, found.kl_target, found.effective_sample_size * found.num_samples)
