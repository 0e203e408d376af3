"""What a user hands to the trainer: pipeline, rows, output folder; checked before anything is computed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers.utils import logging

from .config import AdjointMatchingConfig
from .replay import PipelineReplay
from .replay.arguments import CallArguments
from .replay.view import denoiser_names, text_encoders
from .rewards import WeightedReward

__all__ = ["collate_columns", "columns_to_check", "first_row", "load_pipeline", "prompts_of", "repeat_rows", "require_prompts"]
__all__ += ["require_writable", "rows_of", "text_encoders_on", "warn_of_given_start", "warn_of_guidance"]
__all__ += ["without_prompt"]

logger = logging.get_logger(__name__)

PROMPTS = {"prompt", "prompt_embeds"}  # one of them is needed


def load_pipeline(model: str | Path | DiffusionPipeline, init_kwargs: dict[str, Any] | None) -> DiffusionPipeline:
    """The pipeline itself, or the one of that name or in that folder; refused if it has no scheduler or no denoiser."""
    if not isinstance(model, str | Path | DiffusionPipeline):
        raise TypeError(f"model is a {type(model).__name__}; pass a DiffusionPipeline, or the name or folder of one.")
    if not isinstance(model, DiffusionPipeline):
        model = DiffusionPipeline.from_pretrained(model, **(init_kwargs or {}))
    denoiser_names(model)
    return model


def require_prompts(dataset: Any) -> None:
    """Raise ValueError unless the dataset has prompts, or does not know its columns yet."""
    names = getattr(dataset, "column_names", None)  # streamed datasets may not know theirs before the first row
    if names is not None and not PROMPTS & set(names):
        raise ValueError(f"the dataset has columns {sorted(names)}; add a 'prompt' column of strings.")


def require_writable(folder: str) -> None:
    """Create `folder` and write into it once; raise ValueError if that cannot be done."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output_dir={folder!r} cannot be written ({error.strerror}); pass a folder you may write to.") from None


def columns_to_check(
    train_dataset: Any, eval_dataset: Any, args: AdjointMatchingConfig, arguments: CallArguments, reward: WeightedReward
) -> dict[str, list[Any]]:
    """The first row, as often as the check at the start of training needs it, when its columns fit pipeline and rewards.

    Two rows, for what samples may do to each other; one where no more come together: pipelines exist that take one only.

    Raises:
        ValueError: for rows that lack something, have a column too many or misspelt, in either dataset.
    """
    evaluates = eval_dataset is not None and not isinstance(eval_dataset, dict)
    largest = max(args.per_device_train_batch_size * args.num_generations, args.per_device_eval_batch_size if evaluates else 1)
    columns = collate_columns([first_row(train_dataset, "train_dataset", arguments.takes_prompt)] * min(2, largest))
    _require_fitting(columns, arguments, reward)
    if evaluates:
        evaluated = collate_columns([first_row(eval_dataset, "eval_dataset", arguments.takes_prompt)])
        if missing := arguments.taken(columns).keys() - arguments.taken(evaluated).keys():
            raise ValueError(f"the eval_dataset has no column {min(missing)!r}, but the train_dataset has; add it.")
        _require_fitting(evaluated, arguments, reward)
    return columns


def _require_fitting(columns: dict[str, list[Any]], arguments: CallArguments, reward: WeightedReward) -> None:
    arguments.require_known(columns, reward.require_arguments(without_prompt(columns)))
    arguments(columns, rows_of(columns))


def first_row(dataset: Any, name: str, needs_prompt: bool) -> dict[str, Any]:
    if dataset is None:
        raise ValueError(f"{name} is missing; pass a dataset with a row for each prompt.")
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"the {name} has no row; pass at least one prompt.")
    if needs_prompt and not PROMPTS & row.keys():
        raise ValueError(f"the rows of the {name} have columns {sorted(row)}; add a 'prompt' column of strings.")
    if not isinstance(row.get("prompt", ""), str):
        raise ValueError(f"the first prompt of the {name} is of type {type(row['prompt']).__name__}; pass a string in each row.")
    taken = {"images", "prompts"} & row.keys()
    if taken:
        raise ValueError(f"column {min(taken)!r} of the {name} is an argument of every reward function; rename the column.")
    return row


def collate_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Collate rows to columns of plain lists; nothing is padded or turned into tensors."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def warn_of_guidance(replay: PipelineReplay, guidance_scale: float, cfg_mode: str) -> None:
    """Say what guidance makes of the target, where that may surprise."""
    if replay.arguments.guides and cfg_mode == "rollout":
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


def rows_of(columns: dict[str, list[Any]]) -> int:
    """B, the rows of a batch."""
    return len(next(iter(columns.values())))


def prompts_of(columns: dict[str, list[Any]]) -> list[str]:
    """The prompts as the rewards see them; empty where the pipeline is not conditioned on text."""
    return columns.get("prompt") or [""] * rows_of(columns)


def repeat_rows(columns: dict[str, list[Any]], times: int) -> dict[str, list[Any]]:
    """Each row `times` in a row: several images of one prompt."""
    return {name: [value for value in values for _ in range(times)] for name, values in columns.items()}


def without_prompt(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The columns that only the rewards see."""
    return {name: values for name, values in columns.items() if name != "prompt"}


@contextmanager
def text_encoders_on(pipeline: DiffusionPipeline, device: torch.device) -> Iterator[None]:
    """The pipeline's text encoders on `device` within this context, on the CPU after it."""
    encoders = text_encoders(pipeline).values()
    for encoder in encoders:
        encoder.to(device)
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.to("cpu")
