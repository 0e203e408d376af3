"""Samples kept for viewing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..data.columns import prompts_of

__all__ = ["SampleImages"]


@dataclass(frozen=True)
class SampleImages:
    """Samples with their prompts and rewards, for grids and the model card.

    Args:
        images: (N, 3, H, W) in [0, 1], or videos (N, F, 3, H, W), of which the middle frame is shown; float32 on the CPU.
        prompts: N prompts, empty strings if there are none.
        rewards: (N,).
        row: dataset columns of the first sample, with one entry each.
    """

    images: Tensor
    prompts: list[str]
    rewards: Tensor
    row: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def first(cls, count: int, images: Tensor, columns: dict[str, list[Any]], rewards: Tensor) -> SampleImages:
        """The first `count` samples of a batch."""
        row = {name: values[:1] for name, values in columns.items()}
        shown, scores = (values[:count].detach().cpu().float() for values in (images, rewards))
        return cls(shown, prompts_of(columns)[:count], scores, row)
