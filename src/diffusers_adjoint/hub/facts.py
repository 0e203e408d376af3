"""Collect the facts for a model card from a trainer and from the base's own card."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import TrainerState
from transformers.utils import logging

from ..config import AdjointMatchingConfig
from ..model.lora import ADAPTER
from ..objectives import Method
from ..replay import PipelineReplay
from ..replay.plain import outputs_of
from ..rewards import WeightedReward
from .card import CardFacts, Licence, Medium

__all__ = ["base_model_of", "card_facts", "hub_id", "licence_of", "medium_of", "pipeline_tag_of"]

logger = logging.get_logger(__name__)

# Settings that may be published. Only these: other arguments may contain local paths, tokens and host names.
SETTINGS = ["reward_scale", "target_kl", "guidance_scale", "cfg_mode", "num_inference_steps", "num_loss_steps"]
SETTINGS += ["loss_type", "loss_kwargs", "loss_step_selection", "loss_clip", "num_iterations"]
SETTINGS += ["learning_rate", "lr_scheduler_type", "optim"]
SETTINGS += ["weight_decay", "max_grad_norm", "num_generations", "decode_frames", "seed", "bf16", "fp16"]
TAGS: dict[tuple[Medium, str], str] = {
    ("image", "text"): "text-to-image",
    ("image", "image"): "image-to-image",
    ("image", "nothing"): "unconditional-image-generation",
    ("video", "text"): "text-to-video",
    ("video", "image"): "image-to-video",
    ("video", "video"): "video-to-video",
    ("audio", "text"): "text-to-audio",
}


def card_facts(
    replay: PipelineReplay,
    reward: WeightedReward,
    args: AdjointMatchingConfig,
    state: TrainerState,
    columns: dict[str, list[Any]],
    method: Method,
    *,
    repo_id: str,
    base_adapters: list[str] | None,
    dataset_name: str | None = None,
    num_prompts: int | None = None,
    tags: Sequence[str] = (),
) -> CardFacts:
    """Collect the facts for the card. Asks the Hub for the base's licence, once in a process.

    Args:
        replay: of the trained pipeline.
        reward: the weighted reward functions.
        args: the settings.
        state: the trainer's state, with its log.
        columns: one row of the dataset, that of the first sample.
        method: the objective or another training method.
        repo_id: Hub id of the repository, or a plain name for the model.
        base_adapters: names of the base's own adapters; `None` for full fine-tuning.
        dataset_name: name of the dataset; published only if it is a Hub id.
        num_prompts: number of different prompts, if it is known.
        tags: further tags of the card.
    """
    network = getattr(replay.pipeline, replay.component)
    weights = [p for name, p in network.named_parameters() if p.is_floating_point() and "lora_" not in name]
    base_model = base_model_of(replay.pipeline)
    steps = {"num_inference_steps": replay.num_inference_steps}
    call, modular = replay.arguments(columns, 1) | steps, replay.modular_call
    chain = steps | {"integrator": replay.scheduler.config.integrator}  # `args.integrator` may be None
    return CardFacts(
        repo_id=repo_id,
        pipeline_class=type(replay.pipeline),
        component=replay.component,
        network_class=type(network).__name__,
        dtype=str(weights[0].dtype),
        call=call if modular is None else modular.inputs(call),
        guiders={} if modular is None else modular.scales(call),
        settings=_settings(args, state) | chain | ({} if base_adapters is None else _lora_settings(network.peft_config[ADAPTER])),
        rewards=dict(zip(reward.names, reward.weights, strict=True)),
        reward_texts={name: text for name, f in zip(reward.names, reward.functions, strict=True) if (text := text_of(f))},
        num_prompts=num_prompts,
        output=output_of(type(replay.pipeline)) if modular is None else modular.output(call),
        paper=method.paper,
        needs_gradient=method.needs_gradient,
        tilts=method.tilts,
        log_history=state.log_history,
        base_adapters=base_adapters,
        guided=replay.arguments.guides,
        given_start=replay.starts_below_noise,
        base_model=base_model,
        licence=licence_of(base_model) if base_model else None,
        dataset=hub_id(dataset_name),
        tags=tags,
    )


def _settings(args: AdjointMatchingConfig, state: TrainerState) -> dict[str, Any]:
    images = args.per_device_train_batch_size * args.num_generations * args.gradient_accumulation_steps * args.world_size
    chosen = {name: getattr(args, name) for name in SETTINGS}
    known = {name: getattr(value, "value", value) for name, value in chosen.items() if value is not None}
    return known | {"updates": state.global_step, "images per update, at most": images}  # fewer where the dataset ends


def _lora_settings(config: Any) -> dict[str, Any]:
    modules = config.target_modules if isinstance(config.target_modules, str) else ", ".join(sorted(config.target_modules))
    return {"LoRA rank": config.r, "LoRA alpha": config.lora_alpha, "LoRA modules": modules}


def text_of(function: Any) -> str | None:
    """The first paragraph of the docstring of a function, or of an object's class, on one line; `None` without docstring."""
    if isinstance(function, functools.partial):
        return text_of(function.func)
    documented = function if inspect.isroutine(function) else type(function)
    text = inspect.cleandoc(vars(documented).get("__doc__") or "" if isinstance(documented, type) else documented.__doc__ or "")
    first = " ".join(text.split("\n\n")[0].split())
    generated = f"{getattr(documented, '__name__', '')}("  # how the generated docstring of a dataclass begins
    return first if first and not first.startswith(generated) else None


def output_of(pipeline_class: type[DiffusionPipeline]) -> str | None:
    """Name of the first field of a pipeline's output, such as `images`, `frames` or `audios`; `None` if it is not known."""
    return next(iter(outputs_of(pipeline_class)), None)


def hub_id(name: object) -> str | None:
    """`name` if it has the form "owner/name" and is not a local folder, else `None`."""
    known = isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not Path(name).exists()
    return str(name) if known else None


def base_model_of(pipeline: DiffusionPipeline | ModularPipeline) -> str | None:
    """Hub id that the pipeline was loaded from, by name or from the cache; `None` if it was loaded from another folder."""
    modular = isinstance(pipeline, ModularPipeline)
    name = pipeline._pretrained_model_name_or_path if modular else pipeline.config.get("_name_or_path")
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)", str(name))
    return "/".join(cached.groups()) if cached else hub_id(name)


@functools.cache
def licence_of(base_model: str) -> Licence | None:
    """Licence in the metadata of the base's card; `None`, and a log line, if there is none or the card cannot be read."""
    try:
        data = ModelCard.load(base_model, ignore_metadata_errors=True).data
    except Exception as error:  # offline, gated, no card, malformed card, …: the upload must not fail for that
        logger.info(f"the card of {base_model} could not be read ({type(error).__name__}); the new card names no licence.")
        return None
    if not data.license:
        logger.info(f"the card of {base_model} names no licence, so the new card names none.")
        return None
    link = data.license_link
    if link and "://" not in link:  # a file in the base's repository
        link = f"https://huggingface.co/{base_model}/blob/main/{link}"
    return Licence(data.license, data.license_name, link)


def pipeline_tag_of(inputs: Collection[str], images: Tensor) -> str | None:
    """The Hub's name of the pipeline's task, such as "text-to-image"; `None` if it has none.

    Args:
        inputs: names of the arguments that the pipeline is called with.
        images: its samples: images (N, C, H, W), videos (N, F, C, H, W), or audio of any other shape.
    """
    medium = medium_of(images)
    if medium == "video" and "video" in inputs:
        source = "video"
    elif {"image", "control_image"} & set(inputs):
        source = "image"
    else:
        source = "text" if {"prompt", "prompt_embeds"} & set(inputs) else "nothing"
    return TAGS.get((medium, source))


def medium_of(images: Tensor) -> Medium:
    return "image" if images.ndim == 4 else "video" if images.ndim == 5 else "audio"
