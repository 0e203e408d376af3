"""The configs of TRL's DDPOTrainer and AlignPropTrainer, and their conversion to `AdjointMatchingConfig`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_torch_bf16_gpu_available, logging

from ..config import AdjointMatchingConfig

__all__ = ["AlignPropConfig", "DDPOConfig", "config_from_ddpo", "follows_alignprop", "old_fields"]

logger = logging.get_logger(__name__)


@dataclass
class _SharedConfig:
    exp_name: str = field(default_factory=lambda: Path(sys.argv[0]).stem)
    run_name: str = ""
    seed: int = 0
    log_with: str | None = None
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    tracker_project_name: str = "trl"
    logdir: str = "logs"
    num_epochs: int = 100
    save_freq: int = 1
    num_checkpoint_limit: int = 5
    mixed_precision: str | None = "fp16"
    allow_tf32: bool = True
    resume_from: str = ""
    sample_num_steps: int = 50
    sample_eta: float = 1.0
    sample_guidance_scale: float = 5.0
    train_batch_size: int = 1
    train_use_8bit_adam: bool = False
    train_learning_rate: float = 3e-4
    train_adam_beta1: float = 0.9
    train_adam_beta2: float = 0.999
    train_adam_weight_decay: float = 1e-4
    train_adam_epsilon: float = 1e-8
    train_gradient_accumulation_steps: int = 1
    train_max_grad_norm: float = 1.0
    negative_prompts: str | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None

    @property
    def output_dir(self) -> str:
        """The folder that the trainer writes to: `project_kwargs["project_dir"]`, which setting this changes, or `logdir`."""
        return str(_output_dir(vars(self)))

    @output_dir.setter
    def output_dir(self, folder: str) -> None:
        self.project_kwargs = {**self.project_kwargs, "project_dir": folder}


@dataclass
class DDPOConfig(_SharedConfig):
    """The fields and defaults of TRL's `DDPOConfig`, and `hub_model_id`; `config_from_ddpo` converts them."""

    negative_prompts: str | None = ""
    sample_batch_size: int = 1
    sample_num_batches_per_epoch: int = 2
    train_num_inner_epochs: int = 1
    train_cfg: bool = True
    train_adv_clip_max: float = 5.0
    train_clip_range: float = 1e-4
    train_timestep_fraction: float = 1.0
    per_prompt_stat_tracking: bool = False
    per_prompt_stat_tracking_buffer_size: int = 16
    per_prompt_stat_tracking_min_count: int = 16
    async_reward_computation: bool = False
    max_workers: int = 2


@dataclass
class AlignPropConfig(_SharedConfig):
    """The fields and defaults of TRL's `AlignPropConfig`, and `hub_model_id`; `config_from_ddpo` converts them."""

    train_learning_rate: float = 1e-3
    log_image_freq: int = 1
    truncated_backprop_rand: bool = True
    truncated_backprop_timestep: int = 49
    truncated_rand_backprop_minmax: tuple[int, int] = (0, 50)


DEFAULTS = vars(AlignPropConfig()) | vars(DDPOConfig())  # read for fields without a counterpart, on which the two agree
MODERN = {f.name for f in dataclasses.fields(AdjointMatchingConfig) if f.init}

# An epoch of the old configs is one round of sampling; here it is one update.
RENAMED = {
    "seed": "seed",
    "tracker_project_name": "project",
    "num_epochs": "max_steps",
    "save_freq": "save_steps",
    "num_checkpoint_limit": "save_total_limit",
    "sample_num_steps": "num_inference_steps",
    "sample_guidance_scale": "guidance_scale",
    "train_learning_rate": "learning_rate",
    "train_adam_beta1": "adam_beta1",
    "train_adam_beta2": "adam_beta2",
    "train_adam_weight_decay": "weight_decay",
    "train_adam_epsilon": "adam_epsilon",
    "train_max_grad_norm": "max_grad_norm",
    "push_to_hub": "push_to_hub",
}
DDPO_BATCH = {
    "sample_batch_size": "per_device_train_batch_size",
    "sample_num_batches_per_epoch": "gradient_accumulation_steps",
}
ALIGNPROP_BATCH = {
    "train_batch_size": "per_device_train_batch_size",
    "train_gradient_accumulation_steps": "gradient_accumulation_steps",
}
NO_ADVANTAGES = "Adjoint Matching uses the reward's gradient, and no advantages or likelihood ratios"
NO_WORKERS = "training needs the reward's gradient before it can continue"
NO_BACKPROP = "nothing is back-propagated through the sampler"
WITHOUT_COUNTERPART = {
    "tracker_kwargs": "the trackers are started by transformers; set their environment variables",
    "accelerator_kwargs": "the accelerator is made by transformers; pass accelerator_config=",
    "sample_eta": "the memoryless sampler fixes the noise, which corresponds to 1",
    "train_batch_size": "sample_batch_size images are sampled and differentiated at a time",
    "train_gradient_accumulation_steps": "an epoch is one update from all its images",
    "train_num_inner_epochs": "a rollout is used for one update; pass num_iterations= for several",
    "train_adv_clip_max": NO_ADVANTAGES,
    "train_clip_range": NO_ADVANTAGES,
    "per_prompt_stat_tracking": NO_ADVANTAGES,
    "per_prompt_stat_tracking_buffer_size": NO_ADVANTAGES,
    "per_prompt_stat_tracking_min_count": NO_ADVANTAGES,
    "async_reward_computation": NO_WORKERS,
    "max_workers": NO_WORKERS,
    "truncated_backprop_rand": NO_BACKPROP,
    "truncated_backprop_timestep": NO_BACKPROP,
    "truncated_rand_backprop_minmax": NO_BACKPROP,
}


def config_from_ddpo(config: Any, **changes: Any) -> AdjointMatchingConfig:
    """Convert an old config to an `AdjointMatchingConfig`: one update per epoch, from the same number of images.

    Args:
        config: a `DDPOConfig` or `AlignPropConfig`, or an object or dict with some of their fields. Missing fields get the
            defaults of `AdjointMatchingConfig`, and fields of that class are passed on. A field without a counterpart causes a
            warning with the reason, if it differs from the old default.
        **changes: fields of `AdjointMatchingConfig` that take precedence, such as `reward_scale`.

    Raises:
        TypeError: if the config has no fields, or a change is not a field of `AdjointMatchingConfig`.
        ValueError: for a tracker or precision that does not exist, and for values that `AdjointMatchingConfig` refuses.
    """
    old = old_fields(config)
    renamed = RENAMED | (ALIGNPROP_BATCH if follows_alignprop(old) else DDPO_BATCH)
    _warn_of_losses(old, renamed)
    passed_on = {name: value for name, value in old.items() if name in MODERN}
    converted = {renamed[name]: value for name, value in old.items() if name in renamed}
    fields = passed_on | converted | _converted(old | changes) | changes
    if old.get("negative_prompts"):
        fields["pipeline_kwargs"] = {"negative_prompt": old["negative_prompts"]} | (fields.get("pipeline_kwargs") or {})
    return AdjointMatchingConfig(**fields)


def old_fields(config: Any) -> dict[str, Any]:
    """The fields of a config that is an object or a dict.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(config, Mapping):
        return dict(config)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if isinstance(config, type) or not hasattr(config, "__dict__"):
        raise TypeError(f"config is {config!r}; pass a DDPOConfig, an AlignPropConfig, or a dict of their fields.")
    return dict(vars(config))


def follows_alignprop(old: Mapping[str, Any]) -> bool:
    """Whether these are fields of an AlignPropConfig, which has other names for the batch, and another hook."""
    return bool({"log_image_freq", "truncated_backprop_rand", "truncated_backprop_timestep"} & old.keys())


def _warn_of_losses(old: dict[str, Any], renamed: dict[str, str]) -> None:
    for name, reason in WITHOUT_COUNTERPART.items():
        if name not in renamed and old.get(name, DEFAULTS[name]) != DEFAULTS[name]:
            value = "" if isinstance(old[name], dict) else f"={old[name]!r}"  # a tracker's dict may hold secret keys
            logger.warning(f"{name}{value} is ignored: {reason}.")
    for name in sorted(old.keys() - DEFAULTS.keys() - MODERN):
        logger.warning(f"{name!r} is ignored: neither the old configs nor AdjointMatchingConfig have this field.")
    for name in sorted(old.get("project_kwargs", {}).keys() - {"project_dir", "total_limit", "automatic_checkpoint_naming"}):
        logger.warning(f"project_kwargs[{name!r}] is ignored: logs and numbered checkpoints go to output_dir.")


def _converted(old: dict[str, Any]) -> dict[str, Any]:
    """The fields whose values change, not only their names."""
    project = old.get("project_kwargs", {})
    fields = {"logging_steps": 1, "report_to": _report_to(old), "run_name": old.get("run_name") or None}
    fields |= _precision(old.get("mixed_precision"), on_cpu=old.get("use_cpu", False))
    if (folder := _output_dir(old)) is not None:
        fields["output_dir"] = folder
    if "total_limit" in project:
        fields["save_total_limit"] = project["total_limit"]
    if not old.get("allow_tf32", True):
        fields["tf32"] = False  # the default; True would be an error on hardware without TF32
    if old.get("resume_from"):
        fields["resume_from_checkpoint"] = _checkpoint(old["resume_from"])
    if old.get("train_use_8bit_adam"):
        fields["optim"] = "adamw_bnb_8bit"
    if "train_cfg" in old:
        fields["cfg_mode"] = "rollout" if old["train_cfg"] else "none"
    if "train_timestep_fraction" in old:
        steps = old.get("num_inference_steps", old.get("sample_num_steps", AdjointMatchingConfig.num_inference_steps))
        fields["num_loss_steps"] = max(int(steps * old["train_timestep_fraction"]), 1)
    return fields


def _output_dir(old: Mapping[str, Any]) -> Any:
    """`output_dir` if the config has it, else the project folder of accelerate, else `logdir`."""
    return old.get("output_dir") or old.get("project_kwargs", {}).get("project_dir") or old.get("logdir")


def _report_to(old: dict[str, Any]) -> str:
    tracker = old.get("log_with") or "none"
    if tracker not in ("all", "none", *INTEGRATION_TO_CALLBACK):
        raise ValueError(f"log_with={tracker!r} is unknown; pass one of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, or None.")
    project = old.get("tracker_project_name")
    if tracker == "wandb" and project and "WANDB_PROJECT" not in os.environ:
        logger.warning(f"tracker_project_name={project!r} has no effect on wandb; set the environment variable WANDB_PROJECT.")
    return tracker


def _precision(mixed_precision: str | None, *, on_cpu: bool) -> dict[str, bool]:
    if mixed_precision not in (None, "no", "fp16", "bf16"):
        raise ValueError(f"mixed_precision={mixed_precision!r} is unknown; pass 'bf16', 'no' or None.")
    if mixed_precision in (None, "no") or on_cpu or not is_torch_bf16_gpu_available():
        return {}
    if mixed_precision == "fp16":
        logger.warning("mixed_precision='fp16' becomes bf16, because the adjoint exceeds the range of fp16.")
    return {"bf16": True}


def _checkpoint(path: str) -> str:
    """The newest checkpoint in the folder `path`, or `path` itself."""
    return (get_last_checkpoint(path) if Path(path).is_dir() else None) or path
