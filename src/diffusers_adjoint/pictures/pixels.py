"""Tensors as 8-bit images, at their own size or resized for viewing."""

from __future__ import annotations

from PIL import Image
from torch import Tensor

__all__ = ["as_pictures", "drawable", "fitted"]


def drawable(images: Tensor) -> bool:
    """Whether these are images (N, C, H, W) or videos (N, F, C, H, W) in colour or grey, C 3 or 1; sound is not."""
    return images.ndim in (4, 5) and images.shape[-3] in (1, 3)


def as_pictures(images: Tensor) -> list[Image.Image]:
    """Images (N, 3, H, W), or (N, 1, H, W) in grey, as N PIL images in RGB; values are clipped to [0, 1]."""
    values = (images.detach().float().clamp(0, 1) * 255).round().byte().cpu()
    coloured = values.expand(-1, 3, -1, -1) if values.shape[1] == 1 else values
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in coloured]


def fitted(image: Tensor, side: int) -> Image.Image:
    """One sample as a PIL image whose longer side has `side` pixels; small images are enlarged by repeating pixels.

    Args:
        image: (C, H, W), or a video (F, C, H, W), of which the middle frame is shown.
        side: length in pixels.
    """
    (shown,) = as_pictures((image[len(image) // 2] if image.ndim == 4 else image)[None])
    scale = side / max(shown.size)
    size = (max(round(shown.width * scale), 1), max(round(shown.height * scale), 1))
    return shown.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
