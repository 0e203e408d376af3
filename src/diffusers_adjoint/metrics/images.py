"""Statistics of the images themselves."""

from __future__ import annotations

from torch import Tensor

__all__ = ["saturated_share"]


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
