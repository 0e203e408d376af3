"""Statistics of the images themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..rewards.image_statistics import brightness, colourfulness, contrast, saturation, sharpness

__all__ = ["as_three_channels", "image_statistics", "over_frames", "saturated_share"]

# Each (B, 3, H, W) → (B,).
STATISTICS = {function.__name__: function for function in (brightness, saturation, contrast, colourfulness, sharpness)}


def as_three_channels(images: Tensor) -> Tensor | None:
    """Images or videos, a single channel shown as three; `None` for sound.

    Args:
        images: what a pipeline returns: images (B, C, H, W), videos (B, F, C, H, W), or waveforms of fewer dimensions.
    """
    if images.ndim not in (4, 5):
        return None
    return images.expand(*images.shape[:-3], 3, *images.shape[-2:]) if images.shape[-3] == 1 else images


def saturated_share(images: Tensor) -> Tensor:
    """Share of each image's values that are exactly 0 or 1, where post-processing clipped them and the reward's gradient died.

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
    """The statistics that a hacked reward changes, of each image or video (mean over its frames); no gradient.

    Args:
        images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1], floating.

    Returns:
        name → (B,), float32 or better: "brightness", "saturation", "contrast", "colourfulness" and "sharpness" of
        `diffusers_adjoint.rewards.image_statistics`, and "saturated pixels", the `saturated_share`. All are NaN for an image
        with NaN or infinite values, as an overflowing 16-bit decoder makes them.

    Raises:
        ValueError: if the shape is wrong, or a finite value lies outside [0, 1].
        TypeError: if the images are not floating.
    """
    if images.ndim not in (4, 5):
        raise ValueError(f"images has shape {tuple(images.shape)}; pass a batch of shape (B, 3, H, W) or (B, F, 3, H, W).")
    return over_frames({**STATISTICS, "saturated pixels": saturated_share}, images)


def over_frames(statistics: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor) -> dict[str, Tensor]:
    """name → (B,), each statistic of each image or video, the mean over its frames; no gradient.

    Args:
        statistics: name → function of images (B, C, H, W), which it returns (B,) of; it sees finite ones only.
        images: (B, C, H, W) or (B, F, C, H, W); one with NaN or infinite values, as an overflowing 16-bit decoder makes them, has
            the value NaN.
    """
    with torch.no_grad():
        frames = images.reshape(-1, *images.shape[-3:])
        finite = frames.isfinite().flatten(1).all(1)
        shown = frames.where(finite.view(-1, 1, 1, 1), frames.new_tensor(0.5))
        values = {name: statistic(shown) for name, statistic in statistics.items()}
        return {name: value.where(finite, torch.nan).view(len(images), -1).mean(1) for name, value in values.items()}
