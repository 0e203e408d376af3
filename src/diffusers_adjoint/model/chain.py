"""A micro-batch of a pipeline's images as a chain of Gaussian steps, the interface for objectives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.adjoint import EndPoint, end_point
from ..core.trajectory import MeanFunction, Trajectory
from ..guidance import Guidance
from ..replay import Conditioning, PipelineReplay
from ..replay.frames import ChosenFrames
from ..replay.plain import Media
from .denoiser import PipelineDenoiser
from .paths import sample_trajectory
from .randomness import stacked_noise

__all__ = ["PipelineChain", "predicts_scores"]


def predicts_scores(replay: PipelineReplay, guidance: Guidance) -> bool:
    """Whether the base predicts the scores of its own paths' marginals: unguided, and from pure noise.

    That a pipeline starts from an image is known after the first `prepare`; that it guides without a guidance scale, after
    `find_guidance`.
    """
    guides = (replay.arguments.guides or replay.guides_itself) and guidance.rollout
    return not (replay.starts_below_noise or guides or replay.guidance_is_distilled)


@dataclass(frozen=True)
class PipelineChain:
    """The model and its base on one micro-batch; implements `objectives.Chain`.

    Args:
        denoiser: the network, which is the base within `denoiser.base()`.
        guidance: where classifier-free guidance acts.
        start: x_0, shape (B, …).
        conditioning: encoded prompts and other conditioning of the batch.
        noise: generators of the step noise, one for each image.
        columns: dataset columns including "prompt", one entry for each image.
        share: this micro-batch's share of the update's images on this process.
        ends_update: whether this is the last micro-batch of the update.
        images_per_prompt: number of images of each prompt, which are next to each other.
        frames: the frames of a video that the rewards see; `None` for all.
    """

    denoiser: PipelineDenoiser
    guidance: Guidance
    start: Tensor
    conditioning: Conditioning
    noise: list[torch.Generator]
    columns: dict[str, list[Any]]
    share: float = 1.0
    ends_update: bool = True
    images_per_prompt: int = 1
    frames: ChosenFrames | None = None

    @property
    def stds(self) -> Tensor:
        return self.denoiser.replay.stds

    @property
    def gains(self) -> Tensor:
        return self.denoiser.replay.gains

    @property
    def posterior_stds(self) -> Tensor:
        return self.denoiser.replay.posterior_stds

    @property
    def levels(self) -> Tensor:
        return self.denoiser.replay.levels

    @property
    def times(self) -> Tensor:
        return self.denoiser.replay.times

    @property
    def predicts_scores(self) -> bool:
        return predicts_scores(self.denoiser.replay, self.guidance)

    @property
    def running_cost_grad(self) -> Callable[[int, Tensor], Tensor] | None:
        return None

    def mean_of(self, model: nn.Module) -> MeanFunction:
        """(k, x) → μ_k(x) of the denoiser or its wrapper, guided if the loss is."""
        return lambda k, x: model(x, k, self.conditioning, self.guidance.loss)

    def mean(self, k: int, x: Tensor) -> Tensor:
        return self.mean_of(self.denoiser)(k, x)

    def base_mean(self, k: int, x: Tensor) -> Tensor:
        with self.base():
            return self.mean(k, x)

    def base(self) -> AbstractContextManager[None]:
        return self.denoiser.base()

    def reference(self) -> AbstractContextManager[None]:
        return self.denoiser.reference()

    def sample(self) -> Tensor:
        with torch.no_grad():
            return self.mean(len(self.stds) - 1, self.rollout().states[-1])

    def noised(self, clean: Tensor, k: int) -> Tensor:
        return self.denoiser.replay.noised(clean, stacked_noise(clean, self.noise), k)

    def toward(self, clean: Tensor, x: Tensor, k: int) -> Tensor:
        return self.denoiser.replay.toward(clean, x, k)

    def base_score(self, x: Tensor, noise: float) -> Tensor:
        with self.base():
            return self.denoiser.score(x, self.conditioning, self.guidance.loss, noise=noise)

    def clean(self, mean: Tensor, x: Tensor, k: int) -> Tensor:
        return self.denoiser.replay.clean(mean, x, k)

    def rollout(self, keep_means: bool = False) -> Trajectory:
        given = self.start, self.conditioning, self.noise
        return sample_trajectory(self.denoiser, *given, guided=self.guidance.rollout, keep_means=keep_means)

    def end_point(self, path: Trajectory, of: Literal["base", "model"]) -> EndPoint:
        return end_point(path, self.base_mean, self.mean if of == "model" else None)

    def decode(self, x: Tensor) -> Media:
        """Images of final latents as the rewards see them, and the sound of videos, differentiable in the latents."""
        if self.frames is None:
            return self.denoiser.replay.decode_media(x, self.conditioning)
        images, audio = self.denoiser.replay.decode_media(x, self.conditioning, self.frames.numbers)
        return Media(self.frames.shown(images), audio)

    def decode_all(self, x: Tensor) -> Tensor:
        """The images of `decode`, with all frames."""
        return self.denoiser.replay.decode(x, self.conditioning)

    @property
    def reward_columns(self) -> dict[str, list[Any]]:
        """The columns for the rewards; for a shortened video also "frame_numbers", those of its frames in the whole video."""
        if self.frames is None or self.frames.in_place:
            return self.columns
        return {**self.columns, "frame_numbers": [list(self.frames.numbers)] * len(self.start)}
