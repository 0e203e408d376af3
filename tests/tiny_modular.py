"""Tiny modular pipelines."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import torch
from diffusers import (
    AnimaModularPipeline,
    AnimaTextConditioner,
    CosmosTransformer3DModel,
    DiffusionPipeline,
    Flux2KleinBaseModularPipeline,
    Flux2ModularPipeline,
    FluxModularPipeline,
    ModularPipeline,
    QwenImageModularPipeline,
    StableDiffusion3ModularPipeline,
    StableDiffusionXLModularPipeline,
    Wan22ModularPipeline,
    WanModularPipeline,
    ZImageModularPipeline,
)
from family import PROMPTS, Family
from tiny_images import flux, flux2, flux2_klein, flux2_parts, qwen_image, qwen_networks, sdxl, z_image
from tiny_parts import byte_tokenizer, flow, qwen3, t5
from tiny_pipelines import eval_mode, sd3
from tiny_videos import wan, wan22

__all__ = ["FAMILIES", "modular"]


def modular(cls: type[ModularPipeline], build: Callable[[], DiffusionPipeline]) -> Callable[[], ModularPipeline]:
    """A builder of the modular form of a pipeline, from the parts of the ordinary one."""

    def build_modular() -> ModularPipeline:
        return assembled(cls(), build().components)

    return build_modular


def assembled(pipeline: ModularPipeline, parts: dict) -> ModularPipeline:
    pipeline.update_components(
        **{name: part for name, part in parts.items() if name in pipeline.component_names and part is not None}
    )
    return pipeline


class ChatProcessor:
    """Stands in for a processor that would need an image processor, which text alone does not."""

    def __init__(self):
        self.tokenizer = byte_tokenizer(512)

    def apply_chat_template(self, *args, **kwargs):
        return self.tokenizer.apply_chat_template(*args, **kwargs)


def flux3(*, seed: int = 0, distilled: bool = False) -> ModularPipeline:
    """One prompt a call. Without the block that would have a language model rewrite the prompt."""
    torch.manual_seed(seed)
    processor = ChatProcessor()
    transformer = diffusers.Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        flow_map=distilled,
    )
    blocks = (diffusers.Flux3DistilledAutoBlocks if distilled else diffusers.Flux3AutoBlocks)()
    blocks.sub_blocks.pop("prompt_upsampler")
    parts = {
        "transformer": transformer,
        "vae": flux2_parts(guidance_embeds=False)["vae"],
        "text_encoder": qwen3(len(processor.tokenizer)),
        "tokenizer": processor,
    }
    return eval_mode(assembled(blocks.init_pipeline(), parts))


def flux3_distilled(*, seed: int = 0) -> ModularPipeline:
    return flux3(seed=seed, distilled=True)


def anima(*, seed: int = 0) -> AnimaModularPipeline:
    torch.manual_seed(seed)
    tokenizer, t5_tokenizer = byte_tokenizer(64), t5()[1]
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        rope_scale=(2.0, 1.0, 1.0),
        extra_pos_embed_type=None,
        concat_padding_mask=False,  # would need torchvision
    )
    conditioner = AnimaTextConditioner(
        source_dim=16,
        target_dim=16,
        model_dim=16,
        num_layers=1,
        num_attention_heads=2,
        target_vocab_size=len(t5_tokenizer),
        min_sequence_length=16,
    )
    parts = {
        "transformer": transformer,
        "text_conditioner": conditioner,
        "text_encoder": qwen3(len(tokenizer)).model,
        "tokenizer": tokenizer,
        "t5_tokenizer": t5_tokenizer,
        "vae": qwen_networks()[1],
        "scheduler": flow(),
    }
    return eval_mode(assembled(AnimaModularPipeline(), parts))


NEGATIVE = {"prompt": PROMPTS, "negative_prompt": ["blurry", "dark"]}
SMALL = {"height": 16, "width": 16}
TEXT_16 = {"max_sequence_length": 16}
OUTPUTS = {"text_encoder_out_layers": (1, 2, 3)}
FRAMES = {**SMALL, **TEXT_16, "num_frames": 5}

FAMILIES = [
    Family(
        "Stable Diffusion 3, modular",
        modular(StableDiffusion3ModularPipeline, sd3),
        "blocks in place of a call; guidance by a guider",
        scale=None,
        kwargs={"max_sequence_length": 8},
        columns=NEGATIVE,
        output="images",
        fast=True,
    ),
    Family(
        "SDXL, modular",
        modular(StableDiffusionXLModularPipeline, sdxl),
        "blocks that switch the guider on",
        scale=None,
        columns=NEGATIVE,
        output="images",
    ),
    Family(
        "FLUX.1, modular",
        modular(FluxModularPipeline, flux),
        "no guider, distilled guidance",
        kwargs={**SMALL, **TEXT_16},
        output="images",
    ),
    Family(
        "FLUX.2, modular",
        modular(Flux2ModularPipeline, flux2),
        "latents packed by a block before the loop",
        kwargs={**SMALL, **OUTPUTS, "max_sequence_length": 512},
        output="images",
    ),
    Family(
        "FLUX.2-klein, modular",
        modular(Flux2KleinBaseModularPipeline, flux2_klein),
        "a guider for two text encodings",
        scale=None,
        kwargs={**SMALL, **OUTPUTS, "max_sequence_length": 128},
        output="images",
    ),
    Family(
        "Qwen-Image, modular",
        modular(QwenImageModularPipeline, qwen_image),
        "groups of inputs for the denoiser",
        scale=None,
        kwargs=SMALL,
        columns=NEGATIVE,
        output="images",
    ),
    Family(
        "Z-Image, modular",
        modular(ZImageModularPipeline, z_image),
        "a guider that is off by default",
        scale=None,
        kwargs={**SMALL, "max_sequence_length": 128},
        columns=NEGATIVE,
        output="images",
    ),
    Family(
        "Wan 2.1, modular",
        modular(WanModularPipeline, wan),
        "a solver with flow σ",
        scale=None,
        kwargs=FRAMES,
        columns=NEGATIVE,
        output="videos",
    ),
    Family(
        "Wan 2.2, modular",
        modular(Wan22ModularPipeline, wan22),
        "two transformers with a guider each",
        scale=None,
        kwargs=FRAMES,
        columns=NEGATIVE,
        output="videos",
    ),
    Family(
        "Anima",
        anima,
        "text through a conditioner of its own",
        scale=None,
        kwargs={**SMALL, "max_sequence_length": 64},
        columns=NEGATIVE,
        network_lora=True,
        output="images",
    ),
]

# Of the sequence that is made; those for reference images are left as they are by text alone.
SINGLE = tuple(f"single_transformer_blocks.0.attn.to_{name}" for name in ("q", "k", "v"))
FLUX3 = {
    "kwargs": {**SMALL, **OUTPUTS, "max_sequence_length": 128},
    "lora": SINGLE,
    "one_sample": True,
    "output": "images",
    "scale": None,
}
if hasattr(diffusers, "Flux3ModularPipeline"):  # since diffusers 0.42
    FAMILIES += [
        Family("FLUX.3", flux3, "one prompt a call, guided by a guider", columns=NEGATIVE, **FLUX3),
        Family("FLUX.3, distilled", flux3_distilled, "a flow map: trains with a warning", 1.0, **FLUX3),
    ]
