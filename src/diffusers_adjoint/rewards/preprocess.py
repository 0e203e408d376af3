"""Image processors of transformers, made differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor

__all__ = ["check_images", "check_tensor", "differentiable_preprocess", "preprocessing_of"]

RANGE_SLACK = 1e-3  # allows for rounding in a 16-bit decoder; an image in [-1, 1] exceeds the range by far more
MODES = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


def check_images(images: Tensor) -> None:
    """Raise ValueError or TypeError unless `images` is (B, 3, H, W), floating, finite and in [0, 1]."""
    check_tensor(images)
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        instead = ", or wrap the reward in per_frame for videos" if images.ndim == 5 else ""
        raise ValueError(f"images has shape {tuple(images.shape)}; pass a non-empty batch of shape (B, 3, H, W){instead}.")
    if not images.is_floating_point():
        raise TypeError(f"images has dtype {images.dtype}; pass floating values in [0, 1], because integers have no gradient.")
    low, high = (value.item() for value in torch.aminmax(images.detach()))  # both are NaN if one value is
    if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):
        found = "hold NaN" if low != low else f"reach from {low:.3g} to {high:.3g}"
        raise ValueError(f"images {found}; pass the pipeline's post-processed images, in [0, 1].")


def check_tensor(images: Tensor) -> None:
    """Raise TypeError unless `images` is a tensor."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images is a {type(images).__name__}; pass a tensor of shape (B, 3, H, W).")


def differentiable_preprocess(
    images: Tensor,
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    resize: int | tuple[int, int] | None = None,
    mode: str = "bicubic",
) -> Tensor:
    """Resize with antialiasing, crop the centre and normalise, as an image processor does, but differentiably.

    It differs from transformers' processors for PIL images only by their rounding to 8 bits, about one level of 255.

    Args:
        images: (B, 3, H, W) in [0, 1], any floating dtype.
        size: height and width of the result in pixels; one number for a square.
        mean, std: subtracted from and divided by for each of the three colours, in units of the [0, 1] range.
        resize: length of the shorter side before the crop, or the height and width that the image is stretched to; `None` for
            the shorter side of `size`.
        mode: "bicubic" or "bilinear".

    Returns:
        (B, 3, height, width), float64 for float64 images, float32 for all others.

    Raises:
        ValueError: if the shape is wrong, the batch empty, a value not in [0, 1], or the crop larger than the resized image.
        TypeError: if the images are not floating.
    """
    check_images(images)
    x = images if images.dtype == torch.float64 else images.float()
    size = (size, size) if isinstance(size, int) else size
    height, width = _resized(x.shape[-2:], min(size) if resize is None else resize)
    if height < size[0] or width < size[1]:
        raise ValueError(f"images become {height} × {width} before a crop of {size[0]} × {size[1]}; pass resize >= size.")
    # As PIL does: resize along the rows, then along the columns, and clip the overshoot of bicubic weights after each.
    x = F.interpolate(x, (x.shape[-2], width), mode=mode, antialias=True).clamp(0, 1)
    x = F.interpolate(x, (height, width), mode=mode, antialias=True).clamp(0, 1)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    x = x[..., top : top + size[0], left : left + size[1]]
    return (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)


def _resized(shape: Sequence[int], resize: int | tuple[int, int]) -> tuple[int, int]:
    if not isinstance(resize, int):
        return resize
    short = min(shape)
    return resize * shape[0] // short, resize * shape[1] // short


def preprocessing_of(processor: str | Path) -> Callable[[Tensor], Tensor]:
    """`differentiable_preprocess` with the settings of a transformers image processor, after comparing the two on one image.

    Args:
        processor: Hub id or local folder with a preprocessor_config.json.

    Raises:
        ValueError: if the processor does more than resize, crop and normalise.
    """
    host = AutoImageProcessor.from_pretrained(processor, backend="pil")
    try:
        preprocess = partial(differentiable_preprocess, **_settings(host))
        distance = _distance(host, preprocess)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # it lacks a setting of a plain image processor
        raise ValueError(_unknown(host)) from error
    if distance > 3:  # in levels of 255; rounding to 8 bits after rows and columns makes one or two
        raise ValueError(_unknown(host))
    return preprocess


def _unknown(host: Any) -> str:
    return (
        f"{type(host).__name__} does more than resize, crop and normalise; pass a model with a plain image processor, such as "
        f"CLIP's, SigLIP's or ViT's."
    )


def _settings(host: Any) -> dict[str, Any]:
    """Arguments of `differentiable_preprocess` from the attributes of an image processor."""
    size = host.size
    resize = size.shortest_edge or (size.height, size.width)
    if crop_pct := getattr(host, "crop_pct", None):  # ConvNeXT's rule: crop below 384 pixels, stretch otherwise
        side = size.shortest_edge
        cropped, resize = side, (int(side / crop_pct) if side < 384 else (side, side))
    else:
        crop = host.crop_size if host.do_center_crop else None
        cropped = resize if crop is None else (crop.height, crop.width)
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    normalise = {"mean": host.image_mean, "std": host.image_std} if host.do_normalize else plain
    return {"size": cropped, "resize": resize, "mode": MODES[host.resample], **normalise}


def _distance(host: Any, preprocess: partial[Tensor]) -> float:
    """Largest difference to the processor on a noise image, in levels of 255.

    The image is not square and has an odd side, so that differences in cropping, stretching, padding and rounding show.
    """
    picture = np.random.default_rng(0).integers(0, 256, (3, 61, 90), dtype=np.uint8)
    theirs = host(picture.transpose(1, 2, 0), return_tensors="pt").pixel_values
    ours = preprocess(torch.from_numpy(picture)[None] / 255)
    if theirs.shape != ours.shape:
        return torch.inf
    return ((ours - theirs).abs() * torch.tensor(preprocess.keywords["std"]).view(3, 1, 1) * 255).max().item()
