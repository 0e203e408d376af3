"""Image statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..rewards.image_statistics import brightness, colourfulness, contrast, saturation, sharpness

__all__ = ["as_three_channels", "image_statistics", "over_frames", "saturated_share"]

# Each (B, 3, H, W) → (B,).
STATISTICS = {function.__name__: function for function in (brightness, saturation, contrast, colourfulness, sharpness)}


def as_three_channels(images: Tensor) -> Tensor | None:
    """Images or videos with three channels, a single channel repeated; `None` for sound.

    Args:
        images: samples of a pipeline: images (B, C, H, W), videos (B, F, C, H, W), or waveforms of fewer dimensions.
    """
    if images.ndim not in (4, 5):
        return None
    return images.expand(*images.shape[:-3], 3, *images.shape[-2:]) if images.shape[-3] == 1 else images


def saturated_share(images: Tensor) -> Tensor:
    """Share of each image's values that are exactly 0 or 1: there post-processing clips, and the reward's gradient is 0.

    Args:
        images: (B, C, H, W) in [0, 1], floating.

    Returns:
        Shares in [0, 1], shape (B,), float32.

    Raises:
        ValueError: if the shape is wrong or a value lies outside [0, 1] (NaN included).
    """
    if images.ndim != 4:
        raise ValueError(f"images has shape {tuple(images.shape)}; pass a batch of shape (B, C, H, W).")
    if not ((images >= 0) & (images <= 1)).all():
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"images reach from {low:.3g} to {high:.3g}; pass the pipeline's post-processed images, in [0, 1].")
    return ((images == 0) | (images == 1)).flatten(1).float().mean(1)


def image_statistics(images: Tensor) -> dict[str, Tensor]:
    """Statistics of each image or video (mean over its frames) that reward hacking changes; without gradient.

    Args:
        images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1], floating.

    Returns:
        name → (B,), float32 or better: "brightness", "saturation", "contrast", "colourfulness" and "sharpness" of
        `diffusers_adjoint.rewards.image_statistics`, and "saturated pixels", the `saturated_share`. All are NaN for an image
        with NaN or infinite values, as from an overflowing 16-bit decoder.

    Raises:
        ValueError: if the shape is wrong, or a finite value lies outside [0, 1].
        TypeError: if the images are not floating.
    """
    if images.ndim not in (4, 5):
        raise ValueError(f"images has shape {tuple(images.shape)}; pass a batch of shape (B, 3, H, W) or (B, F, 3, H, W).")
    return over_frames({**STATISTICS, "saturated pixels": saturated_share}, images)


def over_frames(statistics: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor) -> dict[str, Tensor]:
    """Statistics of each image or video (mean over its frames), name → (B,), without gradient.

    Args:
        statistics: name → function of finite images (B, C, H, W) that returns (B,).
        images: (B, C, H, W) or (B, F, C, H, W). The result is NaN for those with NaN or infinite values, as from an overflowing
            16-bit decoder.
    """
    with torch.no_grad():
        frames = images.reshape(-1, *images.shape[-3:])
        finite = frames.isfinite().flatten(1).all(1)
        shown = frames.where(finite.view(-1, 1, 1, 1), frames.new_tensor(0.5))
        values = {name: statistic(shown) for name, statistic in statistics.items()}
        return {name: value.where(finite, torch.nan).view(len(images), -1).mean(1) for name, value in values.items()}
