"""Check rewards with quantised weights: if their activations are quantised too, autograd returns wrong gradients silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..replay.plain import Media
from ..replay.quantised import quantisation_of
from .calling import sound_column
from .combine import WeightedReward

__all__ = ["gradient_error", "warn_of_quantised_rewards"]

logger = logging.get_logger(__name__)

# Number of directions in image space, and step sizes relative to the image's norm, of which one has to agree. The steps are
# large, because rounding of activations turns the reward into a step function.
_DIRECTIONS, _SIZES = 8, (1e-2, 3e-2, 1e-1)
# Measured on tiny networks: unquantised ones have errors up to 0.07, rounding that keeps its gradient 0.1, lost gradients 0.2 to
# 1.
_TOLERANCE = 0.15


def warn_of_quantised_rewards(
    reward: WeightedReward, decode: Callable[[], Media], prompts: list[str], columns: dict[str, list[Any]]
) -> None:
    """Warn if the gradient of a reward module with quantised weights differs from finite differences.

    It costs 49 evaluations of such a reward, on one image, and 49 more on the sound of a video that has one.

    Args:
        reward: the weighted reward functions.
        decode: makes B images, of which the first is used, with its sound; called once if there is such a reward.
        prompts: B prompts.
        columns: further columns, name → B values.
    """
    held = {
        name: (function, stored)
        for name, function in zip(reward.names, reward.functions, strict=True)
        if name in reward.aimed_at and isinstance(function, nn.Module) and (stored := quantisation_of(function))
    }
    if not held:
        return
    with torch.no_grad():
        shown = [part[:1].to(torch.promote_types(part.dtype, torch.float32)) for part in decode() if part is not None]
    if shown[0].ndim >= 4:  # pictures: half the contrast, for rewards that refuse what a difference takes out of [0, 1]
        shown[0] = 0.25 + 0.5 * shown[0].clamp(0, 1)
    first = {column: values[:1] for column, values in columns.items()}
    for name, (function, stored) in held.items():
        errors = [_error_in(part, WeightedReward(function), shown, prompts[:1], first) for part in range(len(shown))]
        lost = [error for error in errors if error > _TOLERANCE]
        if lost:
            logger.warning(
                f"reward {name!r} holds {stored}, and its gradient differs from finite differences by {max(lost):.0%}; load it "
                f"unquantised, or with quantised weights only, such as torchao's Int8WeightOnlyConfig, because quantised "
                f"activations have no gradient."
            )


def _error_in(part: int, reward: WeightedReward, shown: list[Tensor], prompts: list[str], columns: dict[str, list[Any]]) -> float:
    """The error of the gradient in the images (0) or in their sound (1) while the other one stays as it is."""
    given = [tensor.clone().requires_grad_() for tensor in shown]  # a reward may have its gradient in the other one alone

    def score(x: Tensor) -> Tensor:
        media = [*given[:part], x, *given[part + 1 :]]
        return reward.total(reward(media[0], prompts, **columns, **sound_column(media[1:]))).sum()

    return gradient_error(score, shown[part])


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
    found = torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None
    gradient = torch.zeros_like(leaf).double() if found is None else found.double()
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
