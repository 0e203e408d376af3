"""Measurements on samples of a pipeline, in training and evaluation: rewards, and the KL of the model's paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.columns import prompts_of, without_prompt
from ..guidance import Guidance
from ..replay.plain import Media
from ..rewards import WeightedReward
from ..rewards.calling import sound_column
from .denoiser import PipelineDenoiser
from .paths import sampled_path_kl
from .randomness import Stream, seeded_generators

__all__ = ["path_kl_of_rows", "images_and_rewards"]


def images_and_rewards(reward: WeightedReward, made: Media, columns: dict[str, list[Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The images in float32 or better, as rewards get them in training, and their rewards, name → (B,).

    Args:
        reward: the weighted reward functions.
        made: B images, videos or sounds, or videos with their sounds, from a pipeline.
        columns: columns of their B rows.
    """
    images, *audio = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in made if part is not None)
    return images, reward(images, prompts_of(columns), **without_prompt(columns), **sound_column(audio))


def path_kl_of_rows(
    denoiser: PipelineDenoiser,
    guidance: Guidance,
    columns: dict[str, list[Any]],
    seed: int,
    group: int,
    samples: Sequence[int],
) -> Tensor:
    """KL(paths of the model ‖ paths of the base), nats, measured on one memoryless path for each row, (B,).

    Args:
        denoiser: the model and its base.
        guidance: whether the paths, and the step means that are compared, are guided.
        columns: B rows, as columns.
        seed, group, samples: the random numbers depend on these; `samples` has one number for each row.
    """
    starts, noise = (
        seeded_generators(seed, group, samples, stream) for stream in (Stream.EVALUATION_START, Stream.EVALUATION_NOISE)
    )
    start, conditioning = denoiser.replay.prepare(columns, starts, guided=guidance.rollout, unguided=not guidance.loss)
    return sampled_path_kl(denoiser, start, conditioning, noise, guided_rollout=guidance.rollout, guided_loss=guidance.loss)
