"""What an update costs, known before the first one: a rehearsal in which a stand-in counts how often the denoiser is asked."""

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
    """Of one update, for one image.

    Args:
        loss_steps: S, steps that carry the loss, of each iteration.
        evaluations: of the denoiser, the model's and the base's, with and without gradient, as `PipelineDenoiser` counts them.
    """

    loss_steps: int
    evaluations: int


class CountingDenoiser:
    """Has the part of a `PipelineDenoiser` that a chain asks, and evaluates no network: each step's mean is its state.

    Args:
        replay: whose grid it has.

    Attributes:
        evaluations: one an image and step, as the denoiser's own.
    """

    def __init__(self, replay: PipelineReplay) -> None:
        self.replay = replay
        self.evaluations = 0
        self._weight = torch.ones((), requires_grad=True)  # what is trained: a gradient must reach something

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
    """A chain on the same grid whose denoiser only counts: two corners of an image, or one if each prompt has one image.

    Args:
        chain: of a pipeline, after its `prepare`.
    """
    images = min(chain.images_per_prompt, 2)
    corner = chain.start[(slice(1), slice(None), *[slice(1)] * (chain.start.ndim - 2))]  # of all channels
    start = corner.repeat(images, *[1] * (chain.start.ndim - 1))
    return replace(
        chain,
        denoiser=cast(PipelineDenoiser, CountingDenoiser(chain.denoiser.replay)),
        start=start,
        conditioning=cast(Any, None),  # which only a network reads
        noise=[torch.Generator().manual_seed(i) for i in range(images)],
        columns={},
        images_per_prompt=images,
    )


def unscored(end_point: Tensor) -> ScoredImages:
    """Rewards of 0 for all, in place of rewards."""
    zeros = torch.zeros(len(end_point), dtype=end_point.dtype, device=end_point.device)
    tilt, usable = torch.zeros_like(end_point), torch.ones_like(zeros, dtype=torch.bool)
    given = {"end_point": end_point, "images": end_point, "tilt": tilt, "usable": usable}
    return ScoredImages(rewards=zeros, values={}, exponent=zeros, norms=zeros, **given)
