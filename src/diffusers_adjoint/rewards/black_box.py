"""Rewards without gradients: called with PIL images, in several threads, and returning plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..pictures.pixels import as_pictures, drawable

__all__ = ["IMAGES_AS", "as_pil", "asked_in_threads", "numbers"]

IMAGES_AS = ("tensor", "pil")


def as_pil(images: Tensor) -> list[Image.Image] | list[list[Image.Image]]:
    """A PIL image in RGB for each image (B, C, H, W), or a list of its frames for each video (B, F, C, H, W).

    Raises:
        ValueError: if the samples are neither images nor videos.
    """
    if not drawable(images):
        raise ValueError(f"samples of shape {tuple(images.shape)} are not images; leave images_as out.")
    return as_pictures(images) if images.ndim == 4 else [as_pictures(frames) for frames in images]


def asked_in_threads(
    ask: Callable[..., Tensor], images: Tensor, prompts: list[str], columns: dict[str, list[Any]], workers: int
) -> Tensor:
    """Call `ask(images, prompts, columns)` on consecutive parts of a batch, each in its own thread; all values in order, (B,)."""
    ends = np.linspace(0, len(images), min(workers, len(images)) + 1).round().astype(int).tolist()

    def of_part(first: int, end: int) -> Tensor:
        with torch.no_grad():  # a new thread does not inherit this mode
            part = {name: values[first:end] for name, values in columns.items()}
            return ask(images[first:end], prompts[first:end], part)

    with ThreadPoolExecutor(workers) as pool:
        return torch.cat(list(pool.map(of_part, ends[:-1], ends[1:])))


def numbers(value: Any, device: torch.device) -> Any:
    """Convert a tensor, a NumPy array or a list of numbers to a tensor; return anything else unchanged.

    A list may also contain scalar tensors, and `None` for an image without a value, which becomes NaN.
    """
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf"):
        return torch.as_tensor(value, device=device)
    if not isinstance(value, list | tuple) or not any(isinstance(one, _PLAIN) for one in value):
        return value
    if not all(one is None or isinstance(one, _PLAIN) or (isinstance(one, Tensor) and one.ndim == 0) for one in value):
        return value
    return torch.tensor([torch.nan if one is None else float(one) for one in value], dtype=torch.float32, device=device)


_PLAIN = Real | np.bool_
