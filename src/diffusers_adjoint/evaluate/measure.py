"""Sample one prompt with one model and setting, and measure the samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.columns import repeat_rows
from ..guidance import Guidance
from ..metrics import image_statistics, pairwise_diversity, vendi_score
from ..metrics.diversity import prompt_diversity
from ..metrics.images import as_three_channels
from ..model.denoiser import PipelineDenoiser
from ..model.randomness import Stream, seeded_generators
from ..model.samples import images_and_rewards, path_kl_of_rows
from ..replay import PipelineReplay
from ..replay.plain import Media
from ..rewards import WeightedReward
from .models import Model

__all__ = ["Features", "Measured", "Plan", "Prompt", "Setting", "Subject", "mapped", "measure"]

Features = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) → features (B, D), in whose squared distances diversity is measured."""


@dataclass(frozen=True)
class Setting:
    """How a model is sampled.

    Args:
        steps: K.
        sampler: "ode", the pipeline's own scheduler, or "sde", the memoryless one.
        guidance: classifier-free guidance scale, 1 for none.
    """

    steps: int
    sampler: str
    guidance: float

    def __str__(self) -> str:
        return f"{self.sampler}-steps{self.steps}-guidance{self.guidance:g}"


@dataclass(frozen=True)
class Plan:
    """What is sampled and measured for each prompt, the same for all models.

    Args:
        samples: N, images of a prompt.
        batch_size: images in one call of the pipeline.
        kl_paths: memoryless paths of a prompt on which the KL to the base is measured; 0 for none.
        seed: seed of all random numbers.
        reward: the weighted reward functions.
        features: name → features for diversity.
    """

    samples: int
    batch_size: int
    kl_paths: int
    seed: int
    reward: WeightedReward
    features: dict[str, Features]


@dataclass(frozen=True)
class Subject:
    """A model with a setting.

    Args:
        model: the model that is measured.
        base: the model to which the KL is measured; the same object for the base itself.
        setting: how the model is sampled.
        replay: of the model's pipeline, for this setting.
    """

    model: Model
    base: Model
    setting: Setting
    replay: PipelineReplay


@dataclass(frozen=True)
class Prompt:
    """A row of the dataset.

    Args:
        number: number of the row.
        columns: columns of the dataset with one value each.
        shown: number of its images on the contact sheets.
    """

    number: int
    columns: dict[str, list[Any]]
    shown: int


@dataclass(frozen=True)
class Measured:
    """Measurements of one prompt, model and setting; NaN where a value is missing.

    Args:
        rewards: name → N values.
        statistics: image statistics, name → N values.
        spread: diversity measures, name → (value, standard error) of the N samples together.
        kl: path KL in nats, one value a path; empty for the base, and for the ODE, whose path KL is infinite.
    """

    rewards: dict[str, list[float]]
    statistics: dict[str, list[float]]
    spread: dict[str, tuple[float, float]]
    kl: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The measurements as JSON values: NaN becomes `None`, and infinity the string "inf"."""
        return mapped(asdict(self), lambda value: value if math.isfinite(value) else None if math.isnan(value) else str(value))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Measured:
        return cls(**mapped(values, lambda value: math.nan if value is None else float(value)))


def mapped(values: Any, function: Callable[[Any], Any]) -> Any:
    """Apply `function` to each value in nested dicts and lists."""
    if isinstance(values, dict):
        return {name: mapped(value, function) for name, value in values.items()}
    return [mapped(value, function) for value in values] if isinstance(values, list | tuple) else function(values)


def measure(subject: Subject, prompt: Prompt, plan: Plan) -> tuple[Measured, Tensor]:
    """Sample one prompt with one model and measure the samples. Seeds depend on the numbers of prompt and sample only.

    Returns:
        The measurements, and the first `prompt.shown` images on the CPU.
    """
    rewards: dict[str, list[float]] = {name: [] for name in plan.reward.names}
    statistics: dict[str, list[float]] = {}
    features: dict[str, list[Tensor]] = {name: [] for name in plan.features}
    kept = []
    with torch.no_grad(), subject.model.active():
        for numbers in _batches(plan.samples, plan.batch_size):
            columns = repeat_rows(prompt.columns, len(numbers))
            images, scores = images_and_rewards(
                plan.reward, _sample(subject, columns, plan.seed, prompt.number, numbers), columns
            )
            for name, values in scores.items():
                rewards[name] += values.tolist()
            visible = as_three_channels(images)
            if visible is not None:
                for name, values in image_statistics(visible).items():
                    statistics.setdefault(name, []).extend(values.tolist())
                finite = visible[visible.flatten(1).isfinite().all(1)]  # a 16-bit decoder may overflow
                for name, function in plan.features.items() if len(finite) else ():
                    features[name].append(_features(name, function, finite).cpu())
            kept.append(images[: max(prompt.shown - numbers.start, 0)].cpu())
        kl = _path_kl(subject, prompt, plan)
    return Measured(rewards, statistics, _spread(features), kl), torch.cat(kept)


def _batches(count: int, size: int) -> list[range]:
    """The numbers 0 … count − 1, at most `size` at a time."""
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _sample(subject: Subject, columns: dict[str, list[Any]], seed: int, prompt: int, numbers: range) -> Media:
    """Images of one prompt, one for each of the samples with these numbers."""
    generators = seeded_generators(seed, prompt, numbers, Stream.EVALUATION)
    # The step noise has a stream of its own: from the same seed, the start and the first noise would be equal.
    noise = seeded_generators(seed, prompt, numbers, Stream.EVALUATION_NOISE) if subject.setting.sampler == "sde" else None
    return subject.replay.sample_media(columns, generators, noise)


def _features(name: str, function: Features, images: Tensor) -> Tensor:
    """Features of images or videos, (B, D); of a video, the mean over its frames."""
    frames = images if images.ndim == 4 else images.flatten(0, 1)
    features = function(frames.clone())  # a copy, because the function may write into it
    if features.ndim != 2 or len(features) != len(frames):
        raise ValueError(
            f"features {name!r} returned shape {tuple(features.shape)} for {len(frames)} images; return one row for each, (B, D)."
        )
    return features.unflatten(0, (len(images), -1)).mean(1)


def _spread(features: dict[str, list[Tensor]]) -> dict[str, tuple[float, float]]:
    spread = {}
    for name, parts in features.items():
        f = torch.cat(parts) if parts else torch.empty(0, 1)
        spread[f"diversity ({name})"] = astuple(prompt_diversity(pairwise_diversity, f))
        # The Vendi score compares directions, and the pixels of a black image have none.
        spread[f"Vendi ({name})"] = astuple(prompt_diversity(vendi_score, f[f.any(1)]))
    return spread


def _path_kl(subject: Subject, prompt: Prompt, plan: Plan) -> list[float]:
    """KL(paths of the model ‖ paths of the base), nats, one value a path; both are guided if the setting is."""
    model, base, replay = subject.model, subject.base, subject.replay
    if model is base or subject.setting.sampler == "ode" or not plan.kl_paths:
        return []
    frozen = None if model.adapter else getattr(base.pipeline, replay.component)
    denoiser = PipelineDenoiser(replay, [] if model.adapter else None, frozen)
    kl: list[float] = []
    for numbers in _batches(plan.kl_paths, plan.batch_size):
        columns = repeat_rows(prompt.columns, len(numbers))
        kl += path_kl_of_rows(denoiser, Guidance(rollout=True, loss=True), columns, plan.seed, prompt.number, numbers).tolist()
    return kl
