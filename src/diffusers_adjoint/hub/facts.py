"""What a card says, collected from a trainer's parts and from the base's own card."""

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

# A list of what may be told: the other arguments hold local paths, tokens and names of machines.
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
    """What a trainer's parts say about the model. Asks the Hub for the base's licence, once in a process.

    Args:
        columns: one row of the dataset, the one of the first sample.
        method: the objective, or the other way that it was trained.
        repo_id: Hub id of the repository, or a plain name for the model while it has none.
        base_adapters: names of the adapters that the base carries; `None` for a full fine-tuning.
        dataset_name: of the prompts; told only if it is a Hub id.
        num_prompts: how many different ones it was trained on, where that is known.
        tags: further tags of the card.
    """
    network = getattr(replay.pipeline, replay.component)
    weights = [p for name, p in network.named_parameters() if p.is_floating_point() and "lora_" not in name]
    base_model = base_model_of(replay.pipeline)
    steps = {"num_inference_steps": replay.num_inference_steps}
    call, modular = replay.arguments(columns, 1) | steps, replay.modular_call
    chain = steps | {"integrator": replay.scheduler.config.integrator}  # which the arguments may leave to the objective
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
    """The first paragraph of a reward's own docstring, on one line; of an object, that of its class."""
    if isinstance(function, functools.partial):
        return text_of(function.func)
    documented = function if inspect.isroutine(function) else type(function)
    text = inspect.cleandoc(vars(documented).get("__doc__") or "" if isinstance(documented, type) else documented.__doc__ or "")
    first = " ".join(text.split("\n\n")[0].split())
    generated = f"{getattr(documented, '__name__', '')}("  # that of a dataclass without one
    return first if first and not first.startswith(generated) else None


def output_of(pipeline_class: type[DiffusionPipeline]) -> str | None:
    """Name of the first field of what a pipeline returns, `images` mostly; `None` where that is not known."""
    return next(iter(outputs_of(pipeline_class)), None)


def hub_id(name: object) -> str | None:
    """`name` if it is the Hub's "owner/name" and not a folder here."""
    known = isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not Path(name).exists()
    return str(name) if known else None


def base_model_of(pipeline: DiffusionPipeline | ModularPipeline) -> str | None:
    """Hub id that the pipeline was loaded from, be it by name or from a snapshot in the cache; `None` for other folders."""
    modular = isinstance(pipeline, ModularPipeline)
    name = pipeline._pretrained_model_name_or_path if modular else pipeline.config.get("_name_or_path")
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)", str(name))
    return "/".join(cached.groups()) if cached else hub_id(name)


@functools.cache
def licence_of(base_model: str) -> Licence | None:
    """Licence in the front matter of the base's card; `None`, and a line in the log, if there is none or it is out of reach."""
    try:
        data = ModelCard.load(base_model, ignore_metadata_errors=True).data
    except Exception as error:  # offline, gated, no card, malformed card, …: no reason to lose an upload
        logger.info(f"the card of {base_model} could not be read ({type(error).__name__}); the new card names no licence.")
        return None
    if not data.license:
        logger.info(f"the card of {base_model} names no licence, so the new card names none.")
        return None
    link = data.license_link
    if link and "://" not in link:  # a file of the base's repository
        link = f"https://huggingface.co/{base_model}/blob/main/{link}"
    return Licence(data.license, data.license_name, link)


def pipeline_tag_of(inputs: Collection[str], images: Tensor) -> str | None:
    """The Hub's name of the task; `None` where it has none.

    Args:
        inputs: names of the arguments that the pipeline is called with.
        images: what it makes: images (N, C, H, W), videos (N, F, C, H, W), or anything else, which is audio.
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
