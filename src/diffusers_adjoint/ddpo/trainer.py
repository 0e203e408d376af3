"""A trainer with the arguments, the prompt function and the hook of TRL's DDPOTrainer and AlignPropTrainer."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..pictures.pixels import as_pictures
from ..pictures.trackers import to_trackers
from ..trainer.adjoint_matching import AdjointMatchingTrainer
from .config import config_from_ddpo, follows_alignprop, old_fields
from .holder import warn_of_own_methods

__all__ = ["AlignPropTrainer", "DDPOTrainer"]

logger = logging.get_logger(__name__)


class DDPOTrainer(AdjointMatchingTrainer):
    """An `AdjointMatchingTrainer` with the arguments of TRL's DDPOTrainer and AlignPropTrainer.

    Args:
        config: `DDPOConfig`, `AlignPropConfig`, or anything else that `config_from_ddpo` takes.
        reward_function: `f(images, prompts, metadata)` of images (B, 3, H, W) in [0, 1] and two tuples of length B. It returns
            the rewards (B,), differentiable in the images, or a tuple of the rewards and metadata for the hook.
        prompt_function: `f()` returns a prompt and its metadata. It is called with `random`, NumPy and torch seeded by
            (seed, number of the prompt), so that the prompts do not depend on processes or interruptions.
        sd_pipeline: a `DefaultDDPOStableDiffusionPipeline`, another object with `.sd_pipeline` and `.use_lora`, or any pipeline.
        image_samples_hook: called on the main process with (samples, global_step, tracker). With a `DDPOConfig`, after each
            update; samples is a list of [images, prompts, metadata, rewards, reward metadata], one for each micro-batch. With an
            `AlignPropConfig`, every `log_image_freq` updates; samples is a dict of images, prompts, prompt_metadata and rewards.
        reward_scale: λ, nats per unit of reward; the default of `AdjointMatchingConfig` when not given.
        peft_config: another LoRA instead of the one of rank 4 on the attention projections.
        **changes: further fields of `AdjointMatchingConfig`.

    Raises:
        TypeError, ValueError: for bad input. The message says what was wrong and what to pass instead.
    """

    def __init__(
        self,
        config: Any,
        reward_function: Callable[..., Any],
        prompt_function: Callable[[], tuple[str, Any]],
        sd_pipeline: Any,
        image_samples_hook: Callable[..., Any] | None = None,
        *,
        reward_scale: float | None = None,
        peft_config: LoraConfig | None = None,
        **changes: Any,
    ) -> None:
        args = config_from_ddpo(config, **changes if reward_scale is None else {"reward_scale": reward_scale, **changes})
        if not callable(reward_function):
            raise TypeError(f"reward_function is {reward_function!r}; pass a callable f(images, prompts, metadata).")
        reward = _OldReward(reward_function, keeps_samples=image_samples_hook is not None)
        bare = isinstance(sd_pipeline, str | DiffusionPipeline)
        if not bare:
            warn_of_own_methods(sd_pipeline)
        if peft_config is None and (bare or sd_pipeline.use_lora):
            peft_config = _lora()
        super().__init__(
            model=sd_pipeline if bare else sd_pipeline.sd_pipeline,
            reward_funcs=reward,
            args=args,
            train_dataset=_Prompts(prompt_function, args.seed),
            peft_config=peft_config,
        )
        self.sd_pipeline = self.pipeline if bare else sd_pipeline
        if image_samples_hook is not None:
            old = old_fields(config)
            every = old.get("log_image_freq", 1) if follows_alignprop(old) else None
            self.add_callback(_SamplesHook(image_samples_hook, reward, _Tracker(self), every))

    def train(  # type: ignore[override]  # `epochs` is the first argument, as in TRL
        self, epochs: int | None = None, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Train for `epochs` updates in all, or the config's `num_epochs`; resumes from `resume_from` if the config has it.

        Raises:
            ValueError: if `epochs` is not a positive whole number.
        """
        if epochs is not None:
            if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
                raise ValueError(
                    f"epochs={epochs!r} is not a number of epochs; pass at least 1, and pass resume_from_checkpoint by its name."
                )
            self.args.max_steps = epochs
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def save_pretrained(self, save_directory: str) -> None:
        """As `save_model`."""
        self.save_model(save_directory)

    def push_to_hub(self, repo_id: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]  # as in train
        """Upload to `repo_id`; other arguments as in `AdjointMatchingTrainer.push_to_hub`."""
        if repo_id is not None and repo_id != self.args.hub_model_id:
            self.args.hub_model_id, self.hub_model_id = repo_id, None
        return super().push_to_hub(**kwargs)


AlignPropTrainer = DDPOTrainer  # the arguments are the same, and the config tells which kind of hook is meant


def _lora() -> LoraConfig:
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    return LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets)


class _Prompts(IterableDataset[dict[str, Any]]):
    """Endless rows of prompt and metadata. Every process generates the same rows, and takes its share of each batch."""

    def __init__(self, prompt_function: Callable[[], tuple[str, Any]], seed: int) -> None:
        if not callable(prompt_function):
            raise TypeError(f"prompt_function is {prompt_function!r}; pass a callable that returns a prompt and its metadata.")
        self.function, self.seed = prompt_function, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in itertools.count():
            with _seeded(f"{self.seed} {row}"):
                drawn = self.function()
            if not isinstance(drawn, tuple | list) or len(drawn) != 2:
                raise TypeError(f"prompt_function returned {drawn!r}; return a prompt and its metadata, such as ('a cat', {{}}).")
            yield {"prompt": drawn[0], "metadata": drawn[1]}


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """Seed the global random numbers of Python, NumPy and torch within this context, and restore their state afterwards."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(random.getrandbits(32))
    torch.default_generator.manual_seed(random.getrandbits(63))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)


class _OldReward(nn.Module):
    """Adapts a reward function with TRL's signature, and keeps the samples for the hook.

    It is a module so that a reward function which is a module is frozen and moved to the device, too.
    """

    def __init__(self, function: Callable[..., Any], keeps_samples: bool) -> None:
        super().__init__()
        self.function = function
        self.keeps_samples = keeps_samples
        self.samples: list[list[Any]] = []
        self.__name__ = getattr(function, "__name__", type(function).__name__)  # for logs and messages

    def forward(self, images: Tensor, prompts: list[str], metadata: list[Any]) -> Any:
        """The function's rewards (B,). An error about missing gradients is raised again with advice that fits this trainer."""
        try:
            result = self.function(images, tuple(prompts), tuple(metadata))
        except RuntimeError as error:
            if "requires grad" not in str(error):
                raise
            # torch advises to detach the images, which would remove the gradient that training needs.
            raise ValueError(
                f"reward {self.__name__!r} fails on images that require a gradient ({error}); compute it with torch, without "
                f"NumPy, PIL or detach."
            ) from error
        rewards, metadata_of_rewards = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        if not isinstance(rewards, Tensor):
            raise TypeError(
                f"reward {self.__name__!r} returned rewards of type {type(rewards).__name__}; return a tensor with one reward "
                f"for each image, computed from the images by torch, alone or with a dict of metadata."
            )
        # A call without gradients is an evaluation; TRL's hook got samples of training only.
        if self.keeps_samples and torch.is_grad_enabled():
            kept = [images.detach().cpu(), tuple(prompts), tuple(metadata), rewards.detach().cpu(), metadata_of_rewards]
            self.samples.append(kept)
        return rewards


class _SamplesHook(TrainerCallback):
    """Calls the user's hook with the samples of an update."""

    def __init__(self, hook: Callable[..., Any], reward: _OldReward, tracker: _Tracker, alignprop_every: int | None) -> None:
        self.hook, self.reward, self.tracker, self.alignprop_every = hook, reward, tracker, alignprop_every

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reward.samples.clear()  # drops those of the last update, or of the check before training

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or state.global_step % (self.alignprop_every or 1):
            return
        samples = list(self.reward.samples)
        self.hook(samples if self.alignprop_every is None else _as_pairs(samples), state.global_step, self.tracker)


def _as_pairs(samples: list[list[Any]]) -> dict[str, Any]:
    """The dict of AlignProp's hook, with the images of all micro-batches."""
    images, prompts, metadata, rewards, _ = zip(*samples, strict=True)
    return {
        "images": torch.cat(images),
        "prompts": tuple(itertools.chain(*prompts)),
        "prompt_metadata": tuple(itertools.chain(*metadata)),
        "rewards": torch.cat(rewards),
    }


class _Tracker:
    """Has the methods of accelerate's tracker that hooks call; logs to the trackers of `report_to`."""

    def __init__(self, trainer: AdjointMatchingTrainer) -> None:
        self.trainer = trainer

    def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
        """Log numbers for the current update; `step` is ignored."""
        control = self.trainer.control
        logs = control.should_log  # restored below: the host would take this call for its own log line, and skip that
        Trainer.log(self.trainer, dict(values))
        control.should_log = logs

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images by name: (N, 3, H, W) in [0, 1], or a list of PIL images."""
        if not {"tensorboard", "trackio", "wandb"} & set(self.trainer.args.report_to):
            logger.warning_once(
                "image_samples_hook logs images, but no tracker accepts images; set log_with to 'tensorboard' or 'wandb'."
            )
        step = self.trainer.state.global_step if step is None else step
        for name, images in values.items():
            pictures = images if isinstance(images, list) else as_pictures(torch.as_tensor(images))
            for i, picture in enumerate(pictures):
                label = name if len(pictures) == 1 else f"{name}/{i}"
                to_trackers(self.trainer.callback_handler.callbacks, picture, label, step)
