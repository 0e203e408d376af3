"""Pixel statistics as rewards: differentiable and without weights, for testing a set-up and for detecting reward hacking."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .preprocess import check_images

__all__ = ["brightness", "colourfulness", "compressibility", "contrast", "saturation", "sharpness"]

LUMA = (0.299, 0.587, 0.114)  # of R, G, B; Rec. ITU-R BT.601
LEVEL = 1 / 255  # one step of an 8-bit image

# Steps of the 8 × 8 DCT coefficients at quality 50, rows by vertical frequency (ITU-T T.81, tables K.1 and K.2).
LUMA_STEPS = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA_STEPS = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# Bits of the codes for "same mean as the block before" and "end of block" (ITU-T T.81, tables K.3 to K.6).
LUMA_BLOCK_BITS, CHROMA_BLOCK_BITS = 2 + 4, 2 + 2
BITS = 1.08  # fitted to the entropy-coded bits of libjpeg, over noise, digits, gradients and 1/f images


def brightness(images: Tensor, prompts: list[str] | None = None) -> Tensor:
    """Mean of all pixel values, in [0, 1], shape (B,), float32 or better.

    Args:
        images: (B, 3, H, W) in [0, 1], any floating dtype.
        prompts: ignored.

    Raises:
        ValueError: if the images have the wrong shape or range; TypeError if they are not floating.
    """
    return _exact(images).mean((1, 2, 3))


def contrast(images: Tensor, prompts: list[str] | None = None) -> Tensor:
    """RMS contrast: standard deviation of the luma 0.299 R + 0.587 G + 0.114 B over the pixels (Peli 1990).

    Args:
        images: (B, 3, H, W) in [0, 1], any floating dtype.
        prompts: ignored.

    Returns:
        Shape (B,), in [0, 0.5], units of the [0, 1] range, float32 or better. Where it is 0, its gradient is 0.

    Raises:
        ValueError: if the images have the wrong shape or range; TypeError if they are not floating.
    """
    return _std(_luma(_exact(images)).flatten(1))


def saturation(images: Tensor, prompts: list[str] | None = None) -> Tensor:
    """Mean over the pixels of the S of HSV, (max − min)/max of the three colours (Smith 1978).

    A pixel whose max is below 1/255 counts as black and is divided by 1/255, so that no gradient exceeds 255 per pixel.

    Args:
        images: (B, 3, H, W) in [0, 1], any floating dtype.
        prompts: ignored.

    Returns:
        Shape (B,), in [0, 1], without unit, float32 or better.

    Raises:
        ValueError: if the images have the wrong shape or range; TypeError if they are not floating.
    """
    x = _exact(images)
    largest = x.amax(1)
    return ((largest - x.amin(1)) / largest.clamp(min=LEVEL)).mean((1, 2))


def colourfulness(images: Tensor, prompts: list[str] | None = None) -> Tensor:
    """√(σ²_rg + σ²_yb) + 0.3 √(μ²_rg + μ²_yb) with rg = R − G, yb = (R + G)/2 − B (Hasler & Süsstrunk 2003, their M̂⁽³⁾).

    Args:
        images: (B, 3, H, W) in [0, 1], any floating dtype.
        prompts: ignored.

    Returns:
        Shape (B,), ≥ 0, units of the [0, 1] range, float32 or better: the paper's number divided by 255. Its "slightly colourful"
        is 0.06, its "quite colourful" 0.23 and its "extremely colourful" 0.43. On grey images the value and its gradient are 0.

    Raises:
        ValueError: if the images have the wrong shape or range; TypeError if they are not floating.
    """
    red, green, blue = _exact(images).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(2)
    spread = torch.linalg.vector_norm(_std(opponents), dim=1)
    return spread + 0.3 * torch.linalg.vector_norm(opponents.mean(2), dim=1)


def sharpness(images: Tensor, prompts: list[str] | None = None) -> Tensor:
    """Variance of the Laplacian of the luma, four neighbours minus four times the pixel (Pech-Pacheco et al. 2000).

    It depends on single pixels, so compare it at one resolution only; noise has the highest values.

    Args:
        images: (B, 3, H, W) in [0, 1], any floating dtype, H and W at least 3; pixels at the border only serve as neighbours.
        prompts: ignored.

    Returns:
        Shape (B,), in [0, 16], squared units of the [0, 1] range, float32 or better.

    Raises:
        ValueError: if the images have the wrong shape or range, or are smaller; TypeError if they are not floating.
    """
    y = _luma(_exact(images))
    if min(y.shape[1:]) < 3:
        raise ValueError(f"images of {y.shape[1]} × {y.shape[2]} pixels have no Laplacian; pass 3 × 3 or more.")
    centre, rows, columns = y[:, 1:-1, 1:-1], y[:, :, 1:-1], y[:, 1:-1]
    laplacian = rows[:, :-2] + rows[:, 2:] + columns[..., :-2] + columns[..., 2:] - 4 * centre
    return laplacian.flatten(1).var(1, correction=0)


def compressibility(images: Tensor, prompts: list[str] | None = None, *, jpeg_quality: int = 95) -> Tensor:
    """Minus the estimated size as a JPEG. The estimate is differentiable, which the size is not; negate it for incompressibility.

    It takes JPEG's steps (ITU-T T.81) without the rounding: YCbCr with half the chroma resolution, 8 × 8 DCT, difference of the
    means of successive blocks, division by the quantisation steps q. A coefficient c then costs 1.08 log₂(1 + (2c/q)²) bits, and
    each block of luma or chroma another 6 or 4 bits. Over noise, edges, gradients and 1/f images at qualities 30 to 95 the
    estimates rank as libjpeg's sizes do (Spearman 0.97 or more). Most are within 20 % of these sizes, the worst within 50 %.

    Args:
        images: (B, 3, H, W) in [0, 1], any floating dtype and size; the edge is repeated to fill whole blocks.
        prompts: ignored.
        jpeg_quality: libjpeg's quality, 1 to 100.

    Returns:
        Shape (B,), minus the bits per pixel without the file's header, at most −0.125 for whole blocks, float32 or better.

    Raises:
        ValueError: if the images have the wrong shape or range, or the quality; TypeError if they are not floating.
    """
    if jpeg_quality not in range(1, 101):
        raise ValueError(f"jpeg_quality={jpeg_quality} is not a JPEG quality; pass an integer from 1 to 100.")
    x = _exact(images)
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % 16, 0, -height % 16), mode="replicate")
    red, _, blue = x.unbind(1)
    y = _luma(x)
    chroma = torch.stack([(blue - y) / (2 - 2 * LUMA[2]), (red - y) / (2 - 2 * LUMA[0])], 1)
    bits = _bits(y[:, None] * 255 - 128, _steps(LUMA_STEPS, jpeg_quality), LUMA_BLOCK_BITS)
    bits = bits + _bits(F.avg_pool2d(chroma * 255, 2), _steps(CHROMA_STEPS, jpeg_quality), CHROMA_BLOCK_BITS)
    return -bits / (height * width)


def _exact(images: Tensor) -> Tensor:
    check_images(images)
    return images if images.dtype == torch.float64 else images.float()


def _luma(x: Tensor) -> Tensor:
    """Luma of images: (B, 3, H, W) → (B, H, W)."""
    return (x * x.new_tensor(LUMA).view(3, 1, 1)).sum(1)


def _std(x: Tensor) -> Tensor:
    """Standard deviation over the last axis, as a norm: its gradient at 0 is 0, where that of a square root is NaN."""
    return torch.linalg.vector_norm(x - x.mean(-1, keepdim=True), dim=-1) / math.sqrt(x.shape[-1])


def _steps(table: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """libjpeg's quantisation steps at a quality, (8, 8)."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(table) * scale + 50) // 100).clamp(1, 255)


def _bits(planes: Tensor, steps: Tensor, block_bits: int) -> Tensor:
    """Estimated bits of planes (B, C, H, W) with values in levels of 255, shape (B,)."""
    blocks = planes.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)  # (B, C, N, 8, 8), in raster order
    dct = _dct(planes)
    coefficients = dct @ blocks @ dct.T / steps.to(planes.device)
    means = coefficients[..., 0, 0]
    change = torch.diff(means, dim=2, prepend=torch.zeros_like(means[..., :1]))
    others = coefficients.flatten(3)[..., 1:]
    soft = torch.log2(1 + (2 * torch.cat([change[..., None], others], -1)).square())
    return BITS * soft.sum((1, 2, 3)) + block_bits * means[0].numel()


def _dct(like: Tensor) -> Tensor:
    """The orthonormal DCT-II of 8 values as a matrix."""
    n = torch.arange(8, dtype=like.dtype, device=like.device)
    matrix = torch.cos(math.pi / 8 * n[:, None] * (n + 0.5)) / 2
    matrix[0] /= math.sqrt(2)
    return matrix
