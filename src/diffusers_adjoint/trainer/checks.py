"""What a user hands to a trainer: settings, rows, output folder; checked before anything is computed."""

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
    """Raise TypeError unless these are the settings of this method, or none."""
    if not isinstance(args, AdjointMatchingConfig | None):
        raise TypeError(
            f"args is of type {type(args).__name__}; pass an AdjointMatchingConfig, which has all fields of TrainingArguments."
        )


def require_prompts(dataset: Any, name: str) -> None:
    """Raise ValueError unless the rows of the datasets have prompts; a stream is not read before its use."""
    for part in parts_of(dataset):
        if has_length(part):  # a transform may give its rows other columns than `column_names`
            first_row(part, name, needs_prompt=True)


def require_writable(folder: str, *, create: bool = True) -> None:
    """Create `folder` and write into it once; raise ValueError if that cannot be done.

    Args:
        create: otherwise the folder, if there is none, is not made, but must be one that could be.
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
    """The first row, as often as the check at the start of training needs it, when its columns fit pipeline and rewards.

    Two rows, for what samples may do to each other; one where no more come together: pipelines exist that take one only.

    Raises:
        ValueError: for rows that lack something, have a column too many or misspelt, in either dataset.
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
        # What a transform makes of the rows is met in training: to look through it all may take as long.
        if isinstance(part, Dataset) and part.format["type"] != "custom" and "prompt" in part.format["columns"]:
            require_prompt_strings(part["prompt"])
    return columns


def _require_fitting(columns: dict[str, list[Any]], replay: PipelineReplay, reward: WeightedReward) -> None:
    replay.arguments.require_known(columns, reward.require_arguments(without_prompt(columns), with_audio=replay.makes_audio))
    replay.arguments(columns, rows_of(columns))


def require_unswitched_layers(method: str, args: AdjointMatchingConfig, denoiser: PipelineDenoiser) -> None:
    """Raises ValueError where layers would be evaluated again after the adapter that they had is switched."""
    checkpointed = args.gradient_checkpointing or denoiser.network.is_gradient_checkpointing
    if checkpointed and denoiser.base_adapters is not None:  # both passes are over when a layer is evaluated again
        raise ValueError(
            f"{method} switches the adapter within a step, and checkpointed layers would be evaluated again without it; train "
            f"without gradient checkpointing, and do not enable it on the network."
        )


def warn_of_guidance(replay: PipelineReplay, guidance_scale: float, guidance: Guidance) -> None:
    """Say what guidance makes of the target, where that may surprise."""
    if replay.arguments.guides and guidance.biased:
        logger.warning(
            "cfg_mode='rollout' guides the trajectories but not the loss: the result is not the tilted distribution; 'none' and "
            "guidance_scale=1 are exact for the unguided model."
        )
    if replay.embeds_guidance and guidance_scale == 1:
        logger.warning(
            f"{replay.name} takes the guidance scale as an input of its network, which is now trained at 1; pass "
            f"guidance_scale= the scale that it is sampled with."
        )


def warn_of_given_start(replay: PipelineReplay) -> None:
    """Say that the start is not forgotten, where it is not noise."""
    if replay.starts_below_noise:
        logger.warning(
            f"{replay.name} starts from a noisy image, not from noise: its start is not forgotten, so the samples follow "
            f"p_base·exp(λr) only for each given start, up to a factor that depends on it; strength=1 starts from noise."
        )


def warn_of_whole_decodings(replay: PipelineReplay) -> None:
    """Say that a choice of frames spares the decoder nothing, and what does."""
    layout = replay.frame_layout
    if layout is None or layout.sliced or layout.beginnings[0] < len(layout.sizes) or len(layout.sizes) == 1:
        return
    vae = replay.pipeline.vae
    if vae._supports_gradient_checkpointing and not vae.is_gradient_checkpointing:
        memory = "call vae.enable_gradient_checkpointing(), which leaves the frames as they are"
    else:
        memory = "make fewer or smaller frames"
    logger.warning(
        f"the {type(vae).__name__} decodes a video as a whole, each frame from those after it too, so that decode_frames spares "
        f"the memory of the rewards alone; if that is short, {memory}."
    )


def warn_of_flat_rewards(gradient: torch.Tensor) -> None:
    """Say that there is nothing to learn from, where there may be."""
    if not gradient.any():
        logger.warning(
            "the gradient of the rewards is exactly 0 on the first row: rounding, a comparison or a clamp takes it away; leave "
            "these out, unless the reward is meant to be flat there."
        )
