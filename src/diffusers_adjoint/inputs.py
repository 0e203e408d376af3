"""What a user hands to the trainer: pipeline, rows, output folder; checked before anything is computed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from torch import nn
from transformers.trainer_utils import has_length
from transformers.utils import logging

from .config import AdjointMatchingConfig
from .denoiser import PipelineDenoiser
from .given_datasets import PROMPTS, first_items, require_columns, require_row
from .guidance import Guidance
from .prompts import require_prompt_strings
from .replay import PipelineReplay
from .replay.arguments import CallArguments
from .replay.view import denoiser_names, require_undivided, text_encoders
from .rewards import WeightedReward

__all__ = ["collate_columns", "columns_to_check", "first_row", "load_pipeline", "one_row", "parsed", "parts_of", "place"]
__all__ += [
    "prompts_of",
    "repeat_rows",
    "require_config",
    "require_prompts",
    "require_unswitched_layers",
    "require_writable",
    "rows_of",
]
__all__ += ["text_encoders_on", "warn_of_flat_rewards", "warn_of_given_start", "warn_of_guidance", "without_prompt"]

logger = logging.get_logger(__name__)


def load_pipeline(model: str | Path | DiffusionPipeline, init_kwargs: dict[str, Any] | None) -> DiffusionPipeline:
    """The pipeline itself, or the one of that name or in that folder; refused if it has no scheduler or no whole denoiser."""
    if not isinstance(model, str | Path | DiffusionPipeline):
        raise TypeError(f"model is a {type(model).__name__}; pass a DiffusionPipeline, or the name or folder of one.")
    if not isinstance(model, DiffusionPipeline):
        model = DiffusionPipeline.from_pretrained(model, **(init_kwargs or {}))
    require_undivided(model)
    return model


def require_config(args: Any) -> None:
    """Raise TypeError unless these are the settings of this method, or none."""
    if not isinstance(args, AdjointMatchingConfig | None):
        raise TypeError(
            f"args is of type {type(args).__name__}; pass an AdjointMatchingConfig, which has all fields of TrainingArguments."
        )


def parts_of(dataset: Any) -> list[Any]:
    """The datasets of a dict of them, or the one, or none."""
    return list(dataset.values()) if isinstance(dataset, dict) else [] if dataset is None else [dataset]


def require_prompts(dataset: Any, name: str) -> None:
    """Raise ValueError unless the rows of the datasets have prompts; a stream is not read before its use."""
    for part in parts_of(dataset):
        if has_length(part):  # a transform may give its rows other columns than `column_names`
            first_row(part, name, needs_prompt=True)


def require_writable(folder: str) -> None:
    """Create `folder` and write into it once; raise ValueError if that cannot be done."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"output_dir={folder!r} cannot be written ({reason}); pass a folder you may write to.") from None


def columns_to_check(
    train_dataset: Any, eval_dataset: Any, args: AdjointMatchingConfig, arguments: CallArguments, reward: WeightedReward
) -> dict[str, list[Any]]:
    """The first row, as often as the check at the start of training needs it, when its columns fit pipeline and rewards.

    Two rows, for what samples may do to each other; one where no more come together: pipelines exist that take one only.

    Raises:
        ValueError: for rows that lack something, have a column too many or misspelt, in either dataset.
    """
    rows = args.per_device_train_batch_size * args.num_generations
    largest = 1 if args.auto_find_batch_size else max(rows, args.per_device_eval_batch_size if parts_of(eval_dataset) else 1)
    columns = collate_columns([first_row(train_dataset, "train_dataset", arguments.takes_prompt)] * min(2, largest))
    _require_fitting(columns, arguments, reward)
    for part in parts_of(eval_dataset):
        evaluated = collate_columns([first_row(part, "eval_dataset", arguments.takes_prompt)])
        if missing := arguments.taken(columns).keys() - arguments.taken(evaluated).keys():
            raise ValueError(f"the eval_dataset has no column {min(missing)!r}, but the train_dataset has; add it.")
        _require_fitting(evaluated, arguments, reward)
        if args.world_size > 1 and not has_length(part):
            raise ValueError("a streamed eval_dataset cannot be divided evenly among processes; pass a Dataset.")
    for part in [train_dataset, *parts_of(eval_dataset)]:
        # What a transform makes of the rows is met in training: to look through it all may take as long.
        if isinstance(part, Dataset) and part.format["type"] != "custom" and "prompt" in part.format["columns"]:
            require_prompt_strings(part["prompt"])
    return columns


def _require_fitting(columns: dict[str, list[Any]], arguments: CallArguments, reward: WeightedReward) -> None:
    arguments.require_known(columns, reward.require_arguments(without_prompt(columns)))
    arguments(columns, rows_of(columns))


def first_row(dataset: Any, name: str, needs_prompt: bool) -> dict[str, Any]:
    """The first row of the dataset called `name`.

    Raises:
        TypeError: if it is no dict.
        ValueError: if there is none, it lacks a prompt, or it has a reserved column.
    """
    if dataset is None:
        raise ValueError(f"{name} is missing; pass a dataset with a row for each prompt.")
    rows = first_items(dataset, 1)
    if not rows:
        raise ValueError(f"the {name} has no row; pass at least one prompt.")
    row = rows[0]
    if not isinstance(row, Mapping):
        raise TypeError(f"the rows of the {name} are of type {type(row).__name__}; pass rows that are dicts, with a 'prompt'.")
    if not row:
        raise ValueError(f"the rows of the {name} have no column; pass rows with at least one, such as a 'prompt'.")
    if needs_prompt and not PROMPTS & row.keys():
        raise ValueError(f"the rows of the {name} have columns {sorted(row, key=str)}; add a 'prompt' column of strings.")
    if not isinstance(row.get("prompt", ""), str):
        raise ValueError(f"the first prompt of the {name} is of type {type(row['prompt']).__name__}; pass a string in each row.")
    taken = {"images", "prompts"} & row.keys()
    if taken:
        raise ValueError(f"column {min(taken)!r} of the {name} is an argument of every reward function; rename the column.")
    return dict(row)


def collate_columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Collate rows to columns of plain lists; nothing is padded or turned into tensors.

    Raises:
        TypeError: if one is no dict.
        ValueError: if one has other columns than the first, or a prompt that is no string.
    """
    for row in rows:  # a stream, or a dataset that makes its rows, is not looked through before training
        require_row(row)
        require_columns(row, rows[0])
    return {name: [_plain(row[name]) for row in rows] for name in rows[0]}


def _plain(value: Any) -> Any:
    """A string of a class of its own, as NumPy's are, becomes a plain one: YAML and `repr` would write a call."""
    return str.__str__(value) if isinstance(value, str) else value


def warn_of_guidance(replay: PipelineReplay, guidance_scale: float, guidance: Guidance) -> None:
    """Say what guidance makes of the target, where that may surprise."""
    if replay.arguments.guides and guidance.unlike:
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


def warn_of_flat_rewards(gradient: torch.Tensor) -> None:
    """Say that there is nothing to learn from, where there may be."""
    if not gradient.any():
        logger.warning(
            "the gradient of the rewards is exactly 0 on the first row: rounding, a comparison or a clamp takes it away; leave "
            "these out, unless the reward is meant to be flat there."
        )


def rows_of(columns: dict[str, list[Any]]) -> int:
    """B, the rows of a batch."""
    return len(next(iter(columns.values())))


def one_row(columns: dict[str, list[Any]]) -> dict[str, Any]:
    """The first row of a batch."""
    return {name: values[0] for name, values in columns.items()}


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
    """Within this context the pipeline's text encoders are on `device` while they encode, and on the CPU while it denoises."""
    encoders = list(text_encoders(pipeline).values())
    networks = [getattr(pipeline, name) for name in denoiser_names(pipeline)]

    def move(to: torch.device | str) -> None:
        for encoder in encoders:
            encoder.to(to)

    hooks = [encoder.register_forward_pre_hook(lambda *_: move(device)) for encoder in encoders]
    hooks += [network.register_forward_pre_hook(lambda *_: move("cpu")) for network in networks]
    move(device)  # some are not called as modules
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        move("cpu")


def parsed(kwargs: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """The same, for mypy: TrainingArguments has parsed the command line's string, and the config checked it."""
    return cast("dict[str, Any] | None", kwargs)


def require_unswitched_layers(args: AdjointMatchingConfig, denoiser: PipelineDenoiser) -> None:
    """Raises ValueError where layers would be evaluated again after the adapter that they had is switched."""
    checkpointed = args.gradient_checkpointing or denoiser.network.is_gradient_checkpointing
    if checkpointed and denoiser.base_adapters is not None:  # both passes are over when a layer is evaluated again
        raise ValueError(
            "what is trained here switches the adapter within a step, and checkpointed layers would be evaluated again without "
            "it; train without gradient checkpointing, and do not enable it on the network."
        )


def place(pipeline: DiffusionPipeline, device: torch.device, offload_text_encoders: bool) -> None:
    """The pipeline's networks on `device`; the text encoders, if asked so, on the CPU."""
    if not offload_text_encoders:
        pipeline.to(device)  # it leaves alone what cannot be moved, such as quantised networks
        return
    away = text_encoders(pipeline).keys()
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            part.to("cpu" if name in away else device)
