"""The probe: images of the base before the first update, from the memoryless chain and from the pipeline's own sampler.

The standard deviation of the memoryless images' rewards within a prompt tells how far λ will move the model. The difference
between the two kinds of images tells whether training starts from the images that users of the pipeline see. A model distilled to
few steps gives different images on the memoryless chain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline
from torch import Tensor
from transformers.utils import logging

from ..data.columns import collate_columns, repeat_rows, rows_of
from ..data.given_datasets import first_items
from ..metrics import Estimate, image_statistics, prompt_mean
from ..metrics.estimate import within_prompt_std
from ..metrics.images import as_three_channels
from ..model.randomness import Stream, seeded_generators
from ..model.samples import images_and_rewards
from ..replay import PipelineReplay
from ..replay.plain import Media
from ..rewards import WeightedReward

__all__ = ["Probe", "SamplerDifference", "base_rewards", "first_rows", "probe_base", "sampler_difference", "sampler_differences"]
__all__ += ["warn_of_differences", "warn_of_distillation"]

logger = logging.get_logger(__name__)

PROMPTS = 8  # most prompts that are probed
IMAGES = 16  # fewest images of each kind, over all prompts
IMAGES_FOR_SCALE = 256  # then std(r) has a relative error of 1/√(2·256) = 4.4 %, and the KL of the tilt 9 %
TRAIN_THE_BASE = (
    "train the model that it was distilled from, and put the distillation (a LoRA, as published for many) on top afterwards"
)


@dataclass(frozen=True)
class Probe:
    """Measurements of the base's images, name → (P, n) for n images of each of P prompts; float64, CPU, NaN where missing.

    The names are "reward", the weighted sum; "rewards/<name>" for each function, if there are several; and those of
    `image_statistics`, if the samples are images or videos.

    Args:
        memoryless: of the noiseless end points of the memoryless chain.
        own: of images from the pipeline's own sampler.
    """

    memoryless: dict[str, Tensor]
    own: dict[str, Tensor]

    @property
    def rewards(self) -> Tensor:
        """r of the memoryless images, (P, n)."""
        return self.memoryless["reward"]

    def summary(self) -> dict[str, float]:
        """Means over prompts for the log, as "probe/<name>/memoryless" and "probe/<name>/own", without those that are NaN."""
        kinds = {"memoryless": self.memoryless, "own": self.own}
        means = {f"probe/{name}/{kind}": prompt_mean(table[name]).mean for kind, table in kinds.items() for name in table}
        return {name.replace(" ", "_"): mean for name, mean in sorted(means.items()) if math.isfinite(mean)}


@dataclass(frozen=True)
class SamplerDifference:
    """One measurement compared between the pipeline's own images and memoryless ones.

    Args:
        own, memoryless: means over prompts.
        difference: own − memoryless, with its standard error for these prompts: it counts the variation of images, not of
            prompts.
        std: standard deviation of one prompt's images, pooled over prompts and both kinds.
        freedom: degrees of freedom of `std` and of the standard error.
    """

    own: float
    memoryless: float
    difference: Estimate
    std: float
    freedom: int

    @property
    def matters(self) -> bool:
        """Whether the difference is more than three standard errors and more than half a standard deviation away from 0.

        The first rule excludes chance, the second one differences too small to see. With the 16 images of a probe the first rule
        is the stricter: they can detect differences of 1.3 standard deviations or more.
        """
        return abs(self.difference.mean) > max(self._three * self.difference.standard_error, self.std / 2)

    @property
    def _three(self) -> float:
        """Quantile of Student's t distribution that is exceeded as rarely as 3 by a normal variable, in 0.27 % of cases.

        Two terms of its expansion at z = 3 (Abramowitz and Stegun, 26.7.5): 3.54 with 16 degrees of freedom, 3.27 with 30. A
        probe compares seven or more measurements, which are correlated. If the images do not differ, three estimated errors warn
        in 2 to 7 % of all trainings, and this quantile in 0 to 2.5 %. Measured on the digits pipeline, by comparing images of
        each kind with others of the same kind, 200 times.
        """
        freedom = max(self.freedom, 1)
        return 3 + (3**3 + 3) / (4 * freedom) + (5 * 3**5 + 16 * 3**3 + 3 * 3) / (96 * freedom**2)


def first_rows(dataset: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """The first rows of a dataset as columns, at most `PROMPTS`; a streamed dataset starts at its first row again afterwards."""
    return collate_columns(first_items(dataset, PROMPTS))


def probe_base(
    replay: PipelineReplay,
    reward: WeightedReward,
    columns: dict[str, list[Any]],
    *,
    batch_size: int,
    guided: bool,
    seed: int,
    watched: Any = iter,
) -> Probe:
    """Sample n = max(2, ⌈16/P⌉) images of each of P rows on the memoryless chain, and as many with the pipeline's own sampler.

    Both start from the same noise, with the same arguments and the same guidance. This costs as much as sampling 2·P·n images
    with the pipeline, without gradients. No global random number is drawn.

    Args:
        replay: of the base, with a memoryless scheduler.
        reward: the weighted reward functions.
        columns: P rows of the dataset, as columns.
        batch_size: images in one call of the pipeline.
        guided: whether classifier-free guidance acts, in both kinds.
        seed: random numbers belong to (seed, number of the image).
        watched: wraps the iteration over batches, as a progress bar does.
    """
    prompts = rows_of(columns)
    count = max(2, math.ceil(IMAGES / prompts))
    found: dict[str, list[dict[str, Tensor]]] = {"memoryless": [], "own": []}
    with torch.no_grad():
        for numbers, part in _batches(columns, count, batch_size, watched):
            for kind, measured in found.items():
                noise = seeded_generators(seed, 0, numbers, Stream.PROBE_NOISE) if kind == "memoryless" else None
                made = replay.sample_media(part, seeded_generators(seed, 0, numbers, Stream.PROBE), noise, guided=guided)
                measured.append(_measure(reward, made, part))
    tables = {kind: _by_prompt(measured, prompts) for kind, measured in found.items()}
    return Probe(**tables)


def base_rewards(
    replay: PipelineReplay,
    reward: WeightedReward,
    columns: dict[str, list[Any]],
    *,
    batch_size: int,
    guided: bool,
    seed: int,
    watched: Any = iter,
) -> Tensor:
    """Rewards r of n = ⌈256/P⌉ memoryless images of each of P rows, (P, n), float64, CPU, NaN where missing.

    The arguments are those of `probe_base`.
    """
    prompts, found = rows_of(columns), []
    with torch.no_grad():
        for numbers, part in _batches(columns, math.ceil(IMAGES_FOR_SCALE / prompts), batch_size, watched):
            streams = Stream.PROBE, Stream.PROBE_NOISE
            generators, noise = (seeded_generators(seed, 0, numbers, stream) for stream in streams)
            made = replay.sample_media(part, generators, noise, guided=guided)
            found.append({"reward": reward.total(images_and_rewards(reward, made, part)[1])})
    return _by_prompt(found, prompts)["reward"]


def _batches(
    columns: dict[str, list[Any]], count: int, batch_size: int, watched: Any
) -> Iterator[tuple[range, dict[str, list[Any]]]]:
    """Batches of `count` images of each row, next to each other: the numbers of the images, and their rows as columns."""
    repeated, images = repeat_rows(columns, count), rows_of(columns) * count
    for first in watched(range(0, images, batch_size)):
        numbers = range(first, min(first + batch_size, images))
        yield numbers, {name: values[numbers.start : numbers.stop] for name, values in repeated.items()}


def _measure(reward: WeightedReward, made: Media, columns: dict[str, list[Any]]) -> dict[str, Tensor]:
    """Rewards and image statistics of a batch, name → (B,)."""
    images, values = images_and_rewards(reward, made, columns)
    measured = {"reward": reward.total(values)}
    measured |= {f"rewards/{name}": value for name, value in values.items()} if len(values) > 1 else {}
    visible = as_three_channels(images)
    if visible is not None and _has_statistics(visible):
        measured |= image_statistics(visible)
    return measured


def _has_statistics(images: Tensor) -> bool:
    """Whether these are RGB images in [0, 1] of at least 3 × 3 pixels; values that are not finite are ignored."""
    shown = images.nan_to_num(0.5, 0.5, 0.5)
    return images.shape[-3] == 3 and min(images.shape[-2:]) >= 3 and bool(((shown >= 0) & (shown <= 1)).all())


def _by_prompt(measured: Sequence[dict[str, Tensor]], prompts: int) -> dict[str, Tensor]:
    """Measurements of all batches, name → (P, n), NaN where not finite; names that a batch lacks are left out."""
    names = [name for name in measured[0] if all(name in batch for batch in measured)]
    values = {name: torch.cat([batch[name] for batch in measured]).double().cpu() for name in names}
    return {name: value.where(value.isfinite(), torch.nan).view(prompts, -1) for name, value in values.items()}


def sampler_differences(probe: Probe) -> dict[str, SamplerDifference]:
    """The `sampler_difference` of each measurement that both kinds of images have, by name."""
    names = [name for name in probe.own if name in probe.memoryless]
    return {name: sampler_difference(probe.own[name], probe.memoryless[name]) for name in names}


def sampler_difference(own: Tensor, memoryless: Tensor) -> SamplerDifference:
    """Mean over prompts of the difference between the two kinds of images of one prompt.

    The variance of single images is pooled over prompts, which gives 2 P (n − 1) ≥ 16 degrees of freedom. The variance of the
    prompts' differences would give P − 1: too few for a few prompts, and none for one.

    Args:
        own, memoryless: a measurement, shape (P, n), NaN where missing. Prompts that lack either kind are left out.

    Returns:
        The difference. It is NaN, so that it does not `matter`, if no prompt has two images of each kind.
    """
    kinds = torch.stack([own, memoryless])  # (2, P, n)
    counts = kinds.isfinite().sum(2)
    known = (counts > 0).all(0)
    means = kinds.nanmean(2)[:, known]
    variances = torch.tensor([within_prompt_std(kind).mean for kind in kinds], dtype=torch.float64).square()
    error = (variances[:, None] / counts[:, known]).sum().sqrt().item() / max(int(known.sum()), 1)
    own_mean, memoryless_mean = means.mean(1).tolist()
    std, freedom = variances.mean().sqrt().item(), int((counts - 1).clamp(min=0).sum())
    return SamplerDifference(own_mean, memoryless_mean, Estimate(own_mean - memoryless_mean, error), std, freedom)


def warn_of_differences(differences: dict[str, SamplerDifference], steps: int) -> None:
    """Warn if the memoryless chain, from which training starts, gives other images than the pipeline's own sampler.

    Args:
        differences: name → difference.
        steps: K of both kinds of images.
    """
    told = [
        f"{name} {found.own:.3g} and {found.memoryless:.3g} (difference {found.difference})"
        for name, found in differences.items()
        if found.matters
    ]
    if told:
        logger.warning(
            f"with {steps} steps the pipeline's own sampler and the memoryless chain, which training uses, give different "
            f"images of the base: {', '.join(told)}; raise num_inference_steps, or, if the model is distilled to few steps, "
            f"{TRAIN_THE_BASE}."
        )


def warn_of_distillation(pipeline: DiffusionPipeline | ModularPipeline) -> None:
    """Warn if the pipeline's config says that the model is distilled."""
    if pipeline.config.get("is_distilled"):
        logger.warning(
            f"the config of this {type(pipeline).__name__} says is_distilled=True, and a model distilled to few steps gives "
            f"different images on the memoryless chain, which training uses; {TRAIN_THE_BASE}."
        )
