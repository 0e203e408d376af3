"""Check rewards with quantised weights: if their activations are quantised too, autograd returns wrong gradients silently."""

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

# Number of directions in image space, and step sizes relative to the image's norm, of which one has to agree. The steps are
# large, because rounding of activations turns the reward into a step function.
_DIRECTIONS, _SIZES = 8, (1e-2, 3e-2, 1e-1)
# Measured on tiny networks: unquantised ones have errors up to 0.07, rounding that keeps its gradient 0.1, lost gradients 0.2 to
# 1.
_TOLERANCE = 0.15


def warn_of_quantised_rewards(reward: WeightedReward, images: Tensor, prompts: list[str], columns: dict[str, list[Any]]) -> None:
    """Warn if the gradient of a reward module with quantised weights differs from finite differences.

    It costs 49 evaluations of such a reward, on one image. One of the sound is left out.

    Args:
        reward: the weighted reward functions.
        images: (B, …), of which the first is used.
        prompts: B prompts.
        columns: further columns, name → B values.
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
                f"unquantised, or with quantised weights only, such as torchao's Int8WeightOnlyConfig, because quantised "
                f"activations have no gradient."
            )


def gradient_error(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Relative difference between the gradient of a scalar function and finite differences along a few smooth directions.

    Args:
        function: x → scalar.
        x: (1, …, H, W), or (1, …, L).

    Returns:
        min_s min_c ‖a(s) − c·b‖ / ‖a(s)‖, where a(s) are the finite differences with step s along the directions, and b the
        products of the gradient with them. The factor c is free, because a clipped gradient has another size on purpose.
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
    """A random direction of norm 1 with low spatial frequencies; to white noise rewards hardly react."""
    generator = torch.Generator().manual_seed(seed)
    rows = x.reshape(1, -1, *x.shape[-1:]) if x.ndim < 4 else x.reshape(1, -1, *x.shape[-2:])
    coarse = torch.randn(*rows.shape[:2], *[min(4, side) for side in rows.shape[2:]], generator=generator)
    mode = "linear" if coarse.ndim == 3 else "bilinear"
    smooth = nn.functional.interpolate(coarse, size=rows.shape[2:], mode=mode).reshape(x.shape).to(x)
    return smooth / smooth.norm()
