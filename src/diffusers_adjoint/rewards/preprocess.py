"""What an image processor does to a picture, with the gradient kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["differentiable_preprocess"]


def differentiable_preprocess(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Resize the shorter side to `size` (bicubic, antialiased), crop the centre, normalise: CLIP's processor on tensors.

    Differs from transformers' processor on PIL images by its rounding to 8 bits only: about one level of 255.

    Args:
        images: (B, 3, H, W) in [0, 1], any floating dtype.
        size: side of the square in pixels.
        mean, std: of the three colours, in units of the [0, 1] range.

    Returns:
        (B, 3, size, size), float64 for float64 images, float32 for all others.

    Raises:
        ValueError: if the shape is wrong or the batch empty.
        TypeError: if the images are not floating.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(f"images has shape {tuple(images.shape)}; pass a non-empty batch of shape (B, 3, H, W).")
    if not images.is_floating_point():
        raise TypeError(f"images has dtype {images.dtype}; pass floating values in [0, 1], integers carry no gradient.")
    x = images if images.dtype == torch.float64 else images.float()
    short = min(x.shape[-2:])
    height, width = (size * side // short for side in x.shape[-2:])
    # PIL resizes the rows, then the columns, and cuts off what bicubic weights overshoot after each.
    x = F.interpolate(x, (x.shape[-2], width), mode="bicubic", antialias=True).clamp(0, 1)
    x = F.interpolate(x, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (height - size) // 2, (width - size) // 2
    x = x[..., top : top + size, left : left + size]
    return (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)
