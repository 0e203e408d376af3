"""Tiny, randomly initialised pipelines of real diffusers classes, built offline in well under a second."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["generators", "sample", "sd3", "sd15"]

TEXT_WIDTH = 32
CLIP_LENGTH = 16  # one token a byte, so longer prompts are cut


def clip_tokenizer() -> CLIPTokenizer:
    """One token per byte: no vocabulary file needed."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_LENGTH)


def clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_tokenizer() -> T5TokenizerFast:
    """Printable ASCII, one token a character."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5TokenizerFast(vocab=pieces + [(chr(code), -3.0) for code in range(33, 127)], extra_ids=0)


def t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    return T5EncoderModel(config)


def vae(**config) -> AutoencoderKL:
    """Latents (4, h, w) ↔ images (3, 2h, 2w)."""
    settings = {
        "sample_size": 16,
        "latent_channels": 4,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    }
    return AutoencoderKL(**settings | config)


def eval_mode(pipeline):
    """Directly built text encoders start in train mode; from_pretrained would give them in eval mode."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sd3(scheduler=None, *, seed: int = 0) -> StableDiffusion3Pipeline:
    """Flow matching, two CLIPs and a T5, latents (4, 8, 8), images (3, 16, 16), about 40 k weights in the transformer."""
    torch.manual_seed(seed)
    first, second, third = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    return eval_mode(
        StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                caption_projection_dim=16,
                joint_attention_dim=TEXT_WIDTH,
                pooled_projection_dim=2 * TEXT_WIDTH,
                pos_embed_max_size=16,
            ),
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModelWithProjection(clip_config(first)),
            tokenizer=first,
            text_encoder_2=CLIPTextModelWithProjection(clip_config(second)),
            tokenizer_2=second,
            text_encoder_3=t5_encoder(third),
            tokenizer_3=third,
        )
    )


def sd15(scheduler=None, *, seed: int = 0) -> StableDiffusionPipeline:
    """ε-prediction with the host scheduler of the published weights (PNDM), latents (4, 8, 8), images (3, 16, 16)."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    return eval_mode(
        StableDiffusionPipeline(
            unet=UNet2DConditionModel(
                sample_size=8,
                in_channels=4,
                out_channels=4,
                block_out_channels=(4, 8),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=TEXT_WIDTH,
                attention_head_dim=2,
                norm_num_groups=2,
            ),
            scheduler=scheduler
            or PNDMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                skip_prk_steps=True,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            vae=vae(),
            text_encoder=CLIPTextModel(clip_config(tokenizer)),
            tokenizer=tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def generators(seeds=(1, 2)) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(pipeline, prompt="a cat", **kwargs) -> torch.Tensor:
    """What the pipeline draws from one seed, (1, 3, H, W)."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt, num_inference_steps=3, generator=generators((0,))[0], output_type="pt", **kwargs).images
