"""A reward whose activations are quantised has lost a part of its gradient, and nothing but finite differences shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..replay.quantised import quantisation_of
from .combine import WeightedReward, needs_audio

__all__ = ["gradient_error", "warn_of_quantised_rewards"]

logger = logging.get_logger(__name__)

# Directions in the images, and their sizes relative to the images, of which one has to agree. Large, because rounded activations
# make stairs of the reward.
_DIRECTIONS, _SIZES = 8, (1e-2, 3e-2, 1e-1)
_TOLERANCE = 0.15  # tiny networks: sound ones reach 0.07, rounding that keeps its gradient 0.1, lost gradients 0.2 to 1


def warn_of_quantised_rewards(reward: WeightedReward, images: Tensor, prompts: list[str], columns: dict[str, list[Any]]) -> None:
    """Compare the gradient of each reward module that holds quantised weights with finite differences, and say so if they differ.

    It costs 49 evaluations of such a reward, on one image. One of the sound is left out.

    Args:
        images: (B, …), of which the first is used, with its prompt and its entries of the columns.
    """
    for name, function in zip(reward.names, reward.functions, strict=True):
        stored = quantisation_of(function) if isinstance(function, nn.Module) else None
        if stored is None or name not in reward.aimed_at or needs_audio(function):
            continue
        first = {column: values[:1] for column, values in columns.items()}
        alone = WeightedReward(function)

        def score(image: Tensor, alone: WeightedReward = alone, first: dict[str, list[Any]] = first) -> Tensor:
            return alone.total(alone(image, prompts[:1], **first)).sum()

        error = gradient_error(score, images[:1])
        if error > _TOLERANCE:
            logger.warning(
                f"reward {name!r} holds {stored}, and its gradient differs from finite differences by {error:.0%}; load it "
                f"unquantised, or in a scheme with a gradient, such as torchao's Int8WeightOnlyConfig (quantised activations "
                f"have none)."
            )


def gradient_error(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """How far the gradient of a scalar function differs from finite differences along a few smooth directions, up to a factor.

    Args:
        x: (1, …, H, W), or (1, …, L).

    Returns:
        min_s min_c ‖a(s) − c·b‖ / ‖a(s)‖ with a(s) the differences of size s and b the products with the gradient. The factor c
        is free because rewards with a clipped gradient are meant to have another size.
    """
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = function(leaf)
    gradient = torch.autograd.grad(value, leaf)[0].double() if value.requires_grad else torch.zeros_like(leaf).double()
    directions = [_smooth_direction(x, seed) for seed in range(_DIRECTIONS)]
    slopes = torch.stack([(gradient * u.double()).sum() for u in directions])
    errors = []
    for size in _SIZES:
        step = size * x.norm().item()
        with torch.no_grad():
            pairs = [(function(x + step * u).double(), function(x - step * u).double()) for u in directions]
        expected = torch.stack([(ahead - back) / (2 * step) for ahead, back in pairs])
        factor = (expected @ slopes) / (slopes @ slopes).clamp_min(torch.finfo(torch.float64).tiny)
        errors.append(((expected - factor * slopes).norm() / expected.norm().clamp_min(1e-300)).item())
    return min(errors)


def _smooth_direction(x: Tensor, seed: int) -> Tensor:
    """Of norm 1 and a few waves across: rewards hardly notice white noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = x.reshape(1, -1, *x.shape[-1:]) if x.ndim < 4 else x.reshape(1, -1, *x.shape[-2:])
    coarse = torch.randn(*rows.shape[:2], *[min(4, side) for side in rows.shape[2:]], generator=generator)
    mode = "linear" if coarse.ndim == 3 else "bilinear"
    smooth = nn.functional.interpolate(coarse, size=rows.shape[2:], mode=mode).reshape(x.shape).to(x)
    return smooth / smooth.norm()
