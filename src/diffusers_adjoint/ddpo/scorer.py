"""TRL's `trl.models.auxiliary_modules.aesthetic_scorer`, the reward of its script alignprop.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..rewards import AestheticScore
from ..rewards.weights import published_file

__all__ = ["aesthetic_scorer"]


class AestheticScorer(nn.Module):
    """`AestheticScore` with TRL's old signature, on images that are resized bilinearly, as in TRL."""

    def __init__(self, hub_model_id: str, model_filename: str) -> None:
        super().__init__()
        self.score = AestheticScore(published_file(hub_model_id, model_filename))
        preprocess: Callable[..., Tensor] = self.score.preprocess
        self.score.preprocess = partial(preprocess, mode="bilinear")

    def forward(self, images: Tensor, prompts: Any, metadata: Any) -> tuple[Tensor, dict[str, Any]]:
        """Scores (B,) of images (B, 3, H, W), clipped to [0, 1], and an empty dict of metadata."""
        return self.score(images.clamp(0, 1)), {}


def aesthetic_scorer(hub_model_id: str, model_filename: str) -> AestheticScorer:
    """TRL's aesthetic reward `f(images, prompts, metadata)`: the same score, differentiable in the images.

    It is on the CPU until the trainer moves it to its device.

    Args:
        hub_model_id: Hub id or local folder of the head's weights, such as "trl-lib/ddpo-aesthetic-predictor".
        model_filename: the head's file there, such as "aesthetic-model.pth".

    Raises:
        ValueError: if a local folder lacks the file, or the file contains another head.
    """
    return AestheticScorer(hub_model_id, model_filename)
