"""The cost of an update, counted before the first one: a stand-in for the denoiser counts how often it would be evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..model.chain import PipelineChain
from ..model.denoiser import PipelineDenoiser
from ..replay import PipelineReplay
from .scoring import ScoredImages

__all__ = ["CountingDenoiser", "UpdateCost", "rehearsal", "unscored"]


@dataclass(frozen=True)
class UpdateCost:
    """The cost of one update for one image.

    Args:
        loss_steps: S, the steps that carry the loss in each iteration.
        evaluations: denoiser evaluations of model and base together, with and without gradient, as `PipelineDenoiser` counts.
    """

    loss_steps: int
    evaluations: int


class CountingDenoiser:
    """Stands in for a chain's `PipelineDenoiser` and counts evaluations. It runs no network: each step's mean is its state.

    Args:
        replay: of the pipeline, for its grid of steps.

    Attributes:
        evaluations: one for each image and step, as `PipelineDenoiser.evaluations`.
    """

    def __init__(self, replay: PipelineReplay) -> None:
        self.replay = replay
        self.evaluations = 0
        self._weight = torch.ones((), requires_grad=True)  # stands for the trained weights: objectives call backward

    def __call__(self, x: Tensor, index: int, conditioning: Any, guided: bool = False) -> Tensor:
        self.evaluations += len(x)
        return x * self._weight.to(x)

    def score(self, x: Tensor, conditioning: Any, guided: bool = False, *, noise: float) -> Tensor:
        self.evaluations += len(x)
        return torch.zeros_like(x)

    @contextmanager
    def base(self) -> Iterator[None]:
        yield

    reference = base


def rehearsal(chain: PipelineChain) -> PipelineChain:
    """A copy of the chain with a `CountingDenoiser` and one-pixel images, two of them, or one if prompts have one image each.

    Args:
        chain: a pipeline's chain after `prepare`.
    """
    images = min(chain.images_per_prompt, 2)
    corner = chain.start[(slice(1), slice(None), *[slice(1)] * (chain.start.ndim - 2))]  # one pixel, all channels
    start = corner.repeat(images, *[1] * (chain.start.ndim - 1))
    return replace(
        chain,
        denoiser=cast(PipelineDenoiser, CountingDenoiser(chain.denoiser.replay)),
        start=start,
        conditioning=cast(Any, None),  # only a network reads it
        noise=[torch.Generator().manual_seed(i) for i in range(images)],
        columns={},
        images_per_prompt=images,
    )


def unscored(end_point: Tensor) -> ScoredImages:
    """Scores in place of the rewards' for a rehearsal: reward 0 and gradient 0 for every image."""
    zeros = torch.zeros(len(end_point), dtype=end_point.dtype, device=end_point.device)
    tilt, usable = torch.zeros_like(end_point), torch.ones_like(zeros, dtype=torch.bool)
    given = {"end_point": end_point, "images": end_point, "tilt": tilt, "usable": usable}
    return ScoredImages(rewards=zeros, values={}, exponent=zeros, norms=zeros, **given)
