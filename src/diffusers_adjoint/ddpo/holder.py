"""The wrapper of a Stable Diffusion 1.x pipeline that TRL's DDPOTrainer and AlignPropTrainer took."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import logging

from ..hub import save_pipeline
from ..model.lora import ADAPTER, WEIGHTS_NAME, save_lora

__all__ = ["DefaultDDPOStableDiffusionPipeline", "warn_of_own_methods"]

logger = logging.get_logger(__name__)

# Methods of TRL's wrapper that do not exist here, and what to use instead.
NOT_HERE = {
    "autocast": "the trainer chooses the precision; pass mixed_precision to the config",
    "load_checkpoint": "the trainer reads its checkpoints itself; pass resume_from to the config",
    "rgb_with_grad": "nothing is back-propagated through the sampler; call the holder for images",
    "save_checkpoint": "the trainer writes its checkpoints itself; pass save_freq to the config",
    "scheduler_step": "the trainer steps a memoryless scheduler of its own; call scheduler.step for the pipeline's",
}


class DefaultDDPOStableDiffusionPipeline:
    """TRL's wrapper of a Stable Diffusion 1.x pipeline, without safety checker; the trainer adds the LoRA.

    If there is a LoRA beside the pipeline, where `save_pretrained` writes it, it is loaded as a part of the base.

    Args:
        pretrained_model_name: Hub id or local folder.
        pretrained_model_revision: branch, tag or commit on the Hub.
        use_lora: train a LoRA of rank 4 on the attention projections; `False` trains all weights of the UNet.
    """

    def __init__(self, pretrained_model_name: str, pretrained_model_revision: str = "main", use_lora: bool = True) -> None:
        self.sd_pipeline = StableDiffusionPipeline.from_pretrained(
            pretrained_model_name, revision=pretrained_model_revision, safety_checker=None, requires_safety_checker=False
        )
        self.pretrained_model, self.pretrained_revision = pretrained_model_name, pretrained_model_revision
        self.use_lora = use_lora
        if (lora := _lora_beside(pretrained_model_name, pretrained_model_revision)) is not None:
            logger.warning(f"{lora} is loaded as a part of the base; a new LoRA is trained on top of it.")
            self.sd_pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
            self.use_lora = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline. The result has `images`, but not the `latents` and `log_probs` of TRL's wrapper."""
        return self.sd_pipeline(*args, **kwargs)

    @property
    def unet(self) -> Any:
        """The network that is trained."""
        return self.sd_pipeline.unet

    @property
    def vae(self) -> Any:
        """The image decoder."""
        return self.sd_pipeline.vae

    @property
    def text_encoder(self) -> Any:
        """The text encoder."""
        return self.sd_pipeline.text_encoder

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.sd_pipeline.tokenizer

    @property
    def scheduler(self) -> Any:
        """The pipeline's own scheduler, which calling this object uses."""
        return self.sd_pipeline.scheduler

    @property
    def safety_checker(self) -> Any:
        """`None`: a safety checker would replace images by black ones before the rewards see them."""
        return self.sd_pipeline.safety_checker

    def get_trainable_layers(self) -> Any:
        """The UNet. Its parameters that require a gradient are trained; the trainer adds its LoRA."""
        return self.sd_pipeline.unet

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """As `DiffusionPipeline.set_progress_bar_config`."""
        self.sd_pipeline.set_progress_bar_config(**kwargs)

    def save_pretrained(self, output_dir: str) -> None:
        """Write the pipeline, and beside it the trained LoRA if there is one. The constructor reads both.

        Adapters that the pipeline was loaded with are fused into the UNet's weights.
        """
        unet = self.unet
        adapters = list(unet.peft_config) if unet._hf_peft_config_loaded else []
        pipeline = copy.copy(self.sd_pipeline)
        if adapters:
            pipeline.__dict__["unet"] = _without_adapters(unet, [name for name in adapters if name != ADAPTER])
        save_pipeline(output_dir, pipeline)
        if ADAPTER in adapters:
            save_lora(self.sd_pipeline, "unet", output_dir)

    def __getattr__(self, name: str) -> Any:
        """Called for attributes that do not exist.

        Raises:
            AttributeError: always. For a method of TRL's wrapper, the message says what to use instead.
        """
        if name in NOT_HERE:
            raise AttributeError(f"{type(self).__name__} has no {name}: {NOT_HERE[name]}.")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def warn_of_own_methods(holder: Any) -> None:
    """Warn of methods in a user's own wrapper class that the old trainers called and this one does not."""
    ours = DefaultDDPOStableDiffusionPipeline.__mro__
    defined = {name for kind in type(holder).__mro__ if kind not in ours for name in vars(kind)}
    if found := sorted({"__call__", "get_trainable_layers", *NOT_HERE} & defined):
        names = f"{', '.join(found[:-1])} and {found[-1]} are" if len(found) > 1 else f"{found[0]} is"
        logger.warning(
            f"{type(holder).__name__}: {names} not called, as the trainer samples with the __call__ of sd_pipeline and trains "
            f"the LoRA of peft_config; pass peft_config=LoraConfig(…) for another LoRA, or another pipeline for other samples."
        )


def _lora_beside(model: str, revision: str) -> Path | None:
    """The LoRA file in a pipeline's folder or repository; `None` if there is none."""
    if Path(model).is_dir():
        file = Path(model) / WEIGHTS_NAME
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(model, WEIGHTS_NAME, revision=revision))
    except EntryNotFoundError:  # also raised if the Hub cannot be reached and the file is not in the cache
        return None


def _without_adapters(unet: Any, added: list[str]) -> Any:
    """A copy of the network without adapters; those in `added` are fused into its weights first."""
    plain = copy.deepcopy(unet)
    if added:
        plain.fuse_lora(adapter_names=added)
    plain.unload_lora()
    return plain
