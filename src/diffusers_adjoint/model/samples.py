"""What is measured on samples of a pipeline, in training and after it: their rewards, and the KL of the model's paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.columns import prompts_of, without_prompt
from ..guidance import Guidance
from ..replay.plain import Media
from ..rewards import WeightedReward
from ..rewards.calling import AUDIO
from .denoiser import PipelineDenoiser
from .paths import sampled_path_kl
from .randomness import Stream, seeded_generators

__all__ = ["path_kl_of_rows", "images_and_rewards"]


def images_and_rewards(reward: WeightedReward, made: Media, columns: dict[str, list[Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The images in float32 or better, as rewards see them in training, and name → rewards (B,).

    Args:
        made: B images, videos or sounds, or videos with their sounds, as a pipeline returns them.
        columns: of their B rows.
    """
    images, *audio = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in made if part is not None)
    heard: dict[str, Any] = dict(zip([AUDIO], audio, strict=False))
    return images, reward(images, prompts_of(columns), **without_prompt(columns), **heard)


def path_kl_of_rows(
    denoiser: PipelineDenoiser,
    guidance: Guidance,
    columns: dict[str, list[Any]],
    seed: int,
    group: int,
    samples: Sequence[int],
) -> Tensor:
    """KL(paths of the model ‖ paths of the base), nats, measured along one memoryless path a row, (B,).

    Args:
        guidance: of the paths, and of the step means that are compared.
        columns: B rows.
        seed, group, samples: numbers that the random numbers depend on; one of `samples` a row.
    """
    starts, noise = (
        seeded_generators(seed, group, samples, stream) for stream in (Stream.EVALUATION_START, Stream.EVALUATION_NOISE)
    )
    start, conditioning = denoiser.replay.prepare(columns, starts, guided=guidance.rollout, unguided=not guidance.loss)
    return sampled_path_kl(denoiser, start, conditioning, noise, guided_rollout=guidance.rollout, guided_loss=guidance.loss)
