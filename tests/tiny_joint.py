"""Tiny pipelines of videos with sound, whose state is both."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Guidance,
    LTX2ModularPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from family import PROMPTS, Family
from tiny_images import gemma
from tiny_modular import modular
from tiny_parts import byte_tokenizer
from tiny_pipelines import eval_mode

__all__ = ["FAMILIES", "LTX2", "ltx2"]


def ltx2_parts() -> dict:
    tokenizer = byte_tokenizer(64)
    encoder = gemma(len(tokenizer))
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=16,
        rope_double_precision=False,
        rope_type="split",
    )
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,  # layers of the text encoder, and its input
        **{f"{name}_connector_{key}": value for name in ("video", "audio") for key, value in heads.items()},
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        decoder_causal=False,
    )
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    vocoder = LTX2Vocoder(
        in_channels=16,  # two channels of eight mel bins
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    parts = {"transformer": transformer, "vae": vae, "audio_vae": audio_vae, "vocoder": vocoder, "connectors": connectors}
    return {**parts, "text_encoder": encoder, "tokenizer": tokenizer}


def ltx2(*, seed: int = 0) -> LTX2Pipeline:
    torch.manual_seed(seed)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return eval_mode(LTX2Pipeline(scheduler=scheduler, **ltx2_parts()))


def ltx2_modular(*, seed: int = 0) -> LTX2ModularPipeline:
    """With guiders that compare with the negative prompt alone."""
    pipeline = modular(LTX2ModularPipeline, ltx2)()
    pipeline.update_components(guider=LTX2Guidance(guidance_scale=3.0), audio_guider=LTX2Guidance(guidance_scale=3.0))
    return pipeline


SMALL = {"height": 32, "width": 64, "num_frames": 9, "max_sequence_length": 16}
NEGATIVE = {"prompt": PROMPTS, "negative_prompt": ["blurry", "dark"]}
LTX2 = {
    **SMALL,
    **{"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0},
    "audio_guidance_scale": None,  # that of the images
}

FAMILIES = [
    Family(
        "LTX-2",
        ltx2,
        "video and sound, two latents stepped by two schedulers of one grid",
        kwargs=LTX2,
        columns=NEGATIVE,
        dtype=torch.float32,  # what it hands to the schedulers is rounded to it
        step=3e-2,
    ),
    Family(
        "LTX-2, modular",
        ltx2_modular,
        "a guider for each of two latents; a block hands the second scheduler on",
        scale=None,
        kwargs=SMALL,
        columns=NEGATIVE,
        dtype=torch.float32,
        step=3e-2,
        output=["videos", "audio"],
    ),
]
