"""Checks of a trainer's arguments: settings, dataset rows, output folder. They run before anything is computed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..config import AdjointMatchingConfig
from ..data.columns import collate_columns, first_row, parts_of, rows_of, without_prompt
from ..data.prompts import require_prompt_strings
from ..guidance import Guidance
from ..model.denoiser import PipelineDenoiser
from ..replay import PipelineReplay
from ..rewards import WeightedReward

__all__ = ["columns_to_check", "require_config", "require_prompts", "require_unswitched_layers", "require_writable"]
__all__ += ["warn_of_flat_rewards", "warn_of_given_start", "warn_of_guidance", "warn_of_whole_decodings"]

logger = logging.get_logger(__name__)


def require_config(args: Any) -> None:
    """Raise TypeError unless `args` is an `AdjointMatchingConfig` or `None`."""
    if not isinstance(args, AdjointMatchingConfig | None):
        raise TypeError(
            f"args is of type {type(args).__name__}; pass an AdjointMatchingConfig, which has all fields of TrainingArguments."
        )


def require_prompts(dataset: Any, name: str) -> None:
    """Raise ValueError unless the datasets' rows have prompts. A streamed dataset is not read here."""
    for part in parts_of(dataset):
        if has_length(part):  # a transform may give its rows other columns than `column_names`
            first_row(part, name, needs_prompt=True)


def require_writable(folder: str, *, create: bool = True) -> None:
    """Create `folder` and write into it once; raise ValueError if that cannot be done.

    Args:
        create: `False` creates nothing, and checks the nearest parent folder that exists instead.
    """
    try:
        where = Path(folder)
        if create:
            where.mkdir(parents=True, exist_ok=True)
        else:
            where = next(path for path in (where, *where.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=where):
            pass
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"output_dir={folder!r} cannot be written ({reason}); pass a folder you may write to.") from None


def columns_to_check(
    train_dataset: Any, eval_dataset: Any, args: AdjointMatchingConfig, replay: PipelineReplay, reward: WeightedReward
) -> dict[str, list[Any]]:
    """Check the columns of both datasets against the pipeline and the rewards; return the first row as a batch.

    The check at the start of training samples this batch. It has the row twice, to see whether samples influence each other. It
    has the row once if training and evaluation never batch more: some pipelines take one row only.

    Raises:
        ValueError: if a row of either dataset lacks a column, or has one that neither the pipeline nor a reward takes.
    """
    arguments, rows = replay.arguments, args.per_device_train_batch_size * args.num_generations
    largest = 1 if args.auto_find_batch_size else max(rows, args.per_device_eval_batch_size if parts_of(eval_dataset) else 1)
    columns = collate_columns([first_row(train_dataset, "train_dataset", arguments.takes_prompt)] * min(2, largest))
    _require_fitting(columns, replay, reward)
    for part in parts_of(eval_dataset):
        evaluated = collate_columns([first_row(part, "eval_dataset", arguments.takes_prompt)])
        if missing := arguments.taken(columns).keys() - arguments.taken(evaluated).keys():
            raise ValueError(f"the eval_dataset has no column {min(missing)!r}, but the train_dataset has; add it.")
        _require_fitting(evaluated, replay, reward)
        if args.world_size > 1 and not has_length(part):
            raise ValueError("a streamed eval_dataset cannot be divided evenly among processes; pass a Dataset.")
    for part in [train_dataset, *parts_of(eval_dataset)]:
        # Rows that a transform makes are checked in training: to run it on the whole dataset here may take very long.
        if isinstance(part, Dataset) and part.format["type"] != "custom" and "prompt" in part.format["columns"]:
            require_prompt_strings(part["prompt"])
    return columns


def _require_fitting(columns: dict[str, list[Any]], replay: PipelineReplay, reward: WeightedReward) -> None:
    replay.arguments.require_known(columns, reward.require_arguments(without_prompt(columns), with_audio=replay.makes_audio))
    replay.arguments(columns, rows_of(columns))


def require_unswitched_layers(method: str, args: AdjointMatchingConfig, denoiser: PipelineDenoiser) -> None:
    """Raise ValueError if gradient checkpointing would evaluate layers again with another adapter than in the forward pass."""
    checkpointed = args.gradient_checkpointing or denoiser.network.is_gradient_checkpointing
    # The model and the base share their layers. A checkpointed layer runs again in the backward pass, with whichever adapter is
    # active then, and autograd does not notice.
    if checkpointed and denoiser.base_adapters is not None:
        raise ValueError(
            f"{method} switches the adapter within a step, so that checkpointed layers would be evaluated again without it; pass "
            f"gradient_checkpointing=False, and do not enable it on the network."
        )


def warn_of_guidance(replay: PipelineReplay, guidance_scale: float, guidance: Guidance) -> None:
    """Warn where guidance changes the distribution that is trained towards."""
    if replay.arguments.guides and guidance.biased:
        logger.warning(
            "cfg_mode='rollout' guides the trajectories but not the loss, so the result is not the tilted distribution; pass "
            "cfg_mode='none' or guidance_scale=1, which are exact for the unguided model."
        )
    if replay.embeds_guidance and guidance_scale == 1:
        logger.warning(
            f"{replay.name} takes the guidance scale as an input of its network, which is now trained at 1; pass the "
            f"guidance_scale that you sample with."
        )


def warn_of_given_start(replay: PipelineReplay) -> None:
    """Warn when sampling starts from a noisy image: the samples then depend on that start."""
    if replay.starts_below_noise:
        logger.warning(
            f"{replay.name} starts from a noisy image, not from pure noise, and the samples depend on that start: they follow "
            f"p_base·exp(λr) for each given start, up to a factor that depends on it; pass strength=1 to start from noise."
        )


def warn_of_whole_decodings(replay: PipelineReplay) -> None:
    """Warn when `decode_frames` saves no decoder memory, and say what does."""
    layout = replay.frame_layout
    if layout is None or layout.sliced or layout.beginnings[0] < len(layout.sizes) or len(layout.sizes) == 1:
        return
    vae = replay.pipeline.vae
    if vae._supports_gradient_checkpointing and not vae.is_gradient_checkpointing:
        memory = "call vae.enable_gradient_checkpointing(), which does not change the frames"
    else:
        memory = "generate fewer or smaller frames"
    logger.warning(
        f"the {type(vae).__name__} decodes a video as a whole, because each frame also depends on later ones, so decode_frames "
        f"saves memory in the rewards only; if memory is short, {memory}."
    )


def warn_of_flat_rewards(gradient: torch.Tensor) -> None:
    """Warn when the reward's gradient is exactly 0: training would then learn nothing."""
    if not gradient.any():
        logger.warning(
            "the gradient of the rewards is exactly 0 on the first row, as after rounding, a comparison or a clamp; remove these "
            "from the reward, unless it is meant to be flat there."
        )
