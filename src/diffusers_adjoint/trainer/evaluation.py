"""Evaluation: samples of the pipeline with its own scheduler, their rewards, and measurements that show reward hacking."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor

from ..config import AdjointMatchingConfig
from ..data.columns import rows_of
from ..guidance import Guidance
from ..metrics import pairwise_diversity, saturated_share
from ..metrics.diversity import prompt_diversity
from ..metrics.images import over_frames
from ..model.denoiser import PipelineDenoiser
from ..model.randomness import Stream, seeded_generators
from ..model.samples import images_and_rewards, path_kl_of_rows
from ..replay import PipelineReplay
from ..rewards import WeightedReward
from ..schedulers import memoryless_scheduler
from .sample_log import summarise

__all__ = ["evaluate_rows", "kl_name", "require_known_metric"]


def evaluate_rows(
    denoiser: PipelineDenoiser,
    guidance: Guidance,
    reward: WeightedReward,
    args: AdjointMatchingConfig,
    columns: dict[str, list[Any]],
    first_row: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Sample `num_generations_eval` images of each row and measure them, without gradients.

    Seeds depend on the row's number only, so results can be compared across steps, runs and numbers of processes.

    Args:
        denoiser: the network with its pipeline.
        guidance: where classifier-free guidance acts; it decides which KL is measured.
        reward: the weighted reward functions.
        args: the settings.
        columns: B rows of the dataset, as columns.
        first_row: number of the first of these rows in the dataset.

    Returns:
        Measurements, name → (B, n) or (B, 1), and the images, (B·n, …), those of a row next to each other; n is
        `num_generations_eval`. The measurements are "reward" and "rewards/<name>"; "saturated", the share of pixel values that
        are 0 or 1; "diversity", the mean squared difference of pixel values in [0, 1] between images of one prompt; and "kl",
        the path KL in nats of one memoryless path of `sampling_integrator` a row, called "kl_unguided" by `kl_name` where the
        rollouts are guided and the loss is not.
    """
    times, rows = args.num_generations_eval, rows_of(columns)
    generators = seeded_generators(args.seed, 0, range(first_row * times, (first_row + rows) * times), Stream.EVALUATION)
    with torch.no_grad():
        # The paths first: FSDP requires that the wrapped module is called before the network in it.
        replay = denoiser.replay
        with replay.on(memoryless_scheduler(replay.pipeline.scheduler, args.sampling_integrator)):
            kl = path_kl_of_rows(denoiser, guidance, columns, args.seed, 0, range(first_row, first_row + rows))
        # One call for each image of a row, so that at most B samples are in memory.
        calls = [_sample(denoiser, reward, columns, generators[i::times]) for i in range(times)]
    result = {name: torch.stack([measured[name] for _, measured in calls], 1) for name in calls[0][1]}
    result[kl_name(denoiser.replay, guidance)] = kl.view(rows, 1)
    images = torch.stack([shown for shown, _ in calls], 1)
    if times > 1:
        result["diversity"] = _diversity(images.flatten(2)).to(images.device)
    return result, images.flatten(0, 1)


def _sample(
    denoiser: PipelineDenoiser, reward: WeightedReward, columns: dict[str, list[Any]], generators: list[torch.Generator]
) -> tuple[Tensor, dict[str, Tensor]]:
    """One image of each row, and the measurements of single images, name → (B,)."""
    images, values = images_and_rewards(reward, denoiser.replay.sample_media(columns, generators), columns)
    measured = {"reward": reward.total(values)} | {f"rewards/{name}": value for name, value in values.items()}
    if images.ndim in (4, 5):  # images and videos; sound has no range of values
        measured |= over_frames({"saturated": saturated_share}, images)
    return images, measured


def kl_name(replay: PipelineReplay, guidance: Guidance) -> str:
    """Name of the path KL in the log: "kl_unguided" if the rollouts are guided and the loss is not, else "kl"."""
    return "kl_unguided" if replay.arguments.guides and guidance.biased else "kl"


def require_known_metric(
    replay: PipelineReplay, guidance: Guidance, reward: WeightedReward, args: AdjointMatchingConfig, dataset: Any
) -> None:
    """Raise ValueError if `metric_for_best_model` is not a metric of an evaluation; the host would notice only after one."""
    wanted = args.metric_for_best_model
    if wanted is None or dataset is None:
        return
    measured = ["reward", *(f"rewards/{name}" for name in reward.names), "saturated", "diversity", kl_name(replay, guidance)]
    prefixes = [f"eval_{name}_" for name in dataset] if isinstance(dataset, dict) else ["eval_"]
    names = [prefix + name for prefix in prefixes for name in summarise({name: torch.zeros(2) for name in measured})]
    if wanted not in names and f"eval_{wanted}" not in names:
        close = difflib.get_close_matches(wanted, names, 1, cutoff=0.0)[0]
        raise ValueError(
            f"metric_for_best_model={wanted!r} is no metric of an evaluation; pass {close!r} if that is meant, or another of "
            f"{', '.join(names)}."
        )


def _diversity(images: Tensor) -> Tensor:
    """Mean squared difference between the images of each row: (B, n, values) → (B, 1)."""
    per_row = [prompt_diversity(pairwise_diversity, row).mean / images.shape[2] for row in images]
    return torch.tensor(per_row).view(-1, 1)
