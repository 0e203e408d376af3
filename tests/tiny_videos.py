"""Tiny text-to-video pipelines."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from family import PROMPTS, Family
from tiny_images import kandinsky5_text, kandinsky5_transformer
from tiny_parts import byte_tokenizer, clip, flow, t5
from tiny_pipelines import eval_mode
from transformers import LlamaConfig, LlamaModel

__all__ = ["FAMILIES"]


def wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )


def wan(*, seed: int = 0, experts: bool = False) -> WanPipeline:
    torch.manual_seed(seed)
    encoder, tokenizer = t5()
    autoencoder = AutoencoderKLWan(
        base_dim=8,  # narrower, its decoder hardly passes on what changes
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.1, 0.0, 0.2],
        latents_std=[2.0, 1.5, 1.0, 2.5],
    )
    return eval_mode(
        WanPipeline(
            transformer=wan_transformer(),
            transformer_2=wan_transformer() if experts else None,
            vae=autoencoder,
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
            text_encoder=encoder,
            tokenizer=tokenizer,
            boundary_ratio=0.875 if experts else None,
        )
    )


def wan22(*, seed: int = 0) -> WanPipeline:
    """One transformer for the noisy steps, a second one for the others."""
    return wan(seed=seed, experts=True)


def ltx(*, seed: int = 0, noisy_decoder: bool = False) -> LTXPipeline:
    torch.manual_seed(seed)
    encoder, tokenizer = t5()
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=32,
    )
    autoencoder = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        timestep_conditioning=noisy_decoder,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return eval_mode(
        LTXPipeline(transformer=transformer, vae=autoencoder, scheduler=scheduler, text_encoder=encoder, tokenizer=tokenizer)
    )


def ltx_noisy_decoder(*, seed: int = 0) -> LTXPipeline:
    """As published since 0.9.5: the last step of denoising is the decoder's."""
    return ltx(seed=seed, noisy_decoder=True)


def cogvideox(*, seed: int = 0) -> CogVideoXPipeline:
    torch.manual_seed(seed)
    encoder, tokenizer = t5()
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    autoencoder = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2, scaling_factor=0.7
    )
    scheduler = CogVideoXDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=3.0,
    )
    return eval_mode(
        CogVideoXPipeline(
            transformer=transformer, vae=autoencoder, scheduler=scheduler, text_encoder=encoder, tokenizer=tokenizer
        )
    )


def mochi(*, seed: int = 0) -> MochiPipeline:
    torch.manual_seed(seed)
    encoder, tokenizer = t5()
    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    autoencoder = AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return eval_mode(
        MochiPipeline(
            transformer=transformer,
            vae=autoencoder,
            scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            text_encoder=encoder,
            tokenizer=tokenizer,
        )
    )


def hunyuan_vae(latent_channels: int) -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=latent_channels, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )


def hunyuan_video(*, seed: int = 0) -> HunyuanVideoPipeline:
    torch.manual_seed(seed)
    tokenizer, (encoder_2, tokenizer_2) = byte_tokenizer(256), clip(77)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=32,
        rope_axes_dim=(2, 4, 4),
    )
    encoder = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=0,
        )
    )
    return eval_mode(
        HunyuanVideoPipeline(
            transformer=transformer,
            vae=hunyuan_vae(4),
            scheduler=flow(shift=7.0),
            text_encoder=encoder,
            tokenizer=tokenizer,
            text_encoder_2=encoder_2,
            tokenizer_2=tokenizer_2,
        )
    )


def kandinsky5_video(*, seed: int = 0) -> Kandinsky5T2VPipeline:
    """Half of the latents' channels, and one more, are for an image to start from: zero, and outside the state."""
    torch.manual_seed(seed)
    return eval_mode(
        Kandinsky5T2VPipeline(
            transformer=kandinsky5_transformer(visual_cond=True),
            vae=hunyuan_vae(4),
            scheduler=flow(shift=5.0),
            **kandinsky5_text(),
        )
    )


# ------------------------------------------------------------------------------------------------------------------------ rows

NEGATIVE = {"prompt": PROMPTS, "negative_prompt": ["blurry", "dark"]}
SMALL = {"height": 16, "width": 32, "num_frames": 5}
TEXT_16 = {"max_sequence_length": 16}
LTX = {"height": 32, "width": 64, "num_frames": 9, **TEXT_16}
EXPERTS = {**SMALL, **TEXT_16, "guidance_scale_2": 2.0}

FAMILIES: list[Family] = [
    Family("Wan 2.1", wan, "a solver with flow σ", kwargs={**SMALL, **TEXT_16}, columns=NEGATIVE),
    Family("Wan 2.2", wan22, "two transformers, one for the noisy steps", kwargs=EXPERTS, columns=NEGATIVE, fast=True),
    Family(
        "Wan 2.2, second transformer",
        wan22,
        "the other one trained",
        kwargs=EXPERTS,
        columns=NEGATIVE,
        component="transformer_2",
    ),
    Family("LTX-Video", ltx, "packed latents, shift up to a terminal σ", kwargs=LTX, columns=NEGATIVE),
    Family(
        "LTX-Video, decoder with noise",
        ltx_noisy_decoder,
        "the decoder takes noise and a time",
        kwargs={**LTX, "decode_timestep": 0.05, "decode_noise_scale": 0.025},
        columns=NEGATIVE,
    ),
    Family(
        "CogVideoX",
        cogvideox,
        "v-prediction, shifted SNR, guidance that depends on the step",
        kwargs={**SMALL, **TEXT_16, "num_frames": 9, "use_dynamic_cfg": True},
        columns=NEGATIVE,
    ),
    Family("Mochi", mochi, "time runs upwards", kwargs={**SMALL, **TEXT_16, "num_frames": 7}, columns=NEGATIVE),
    Family(
        "HunyuanVideo",
        hunyuan_video,
        "distilled guidance",
        kwargs={**SMALL, **TEXT_16, "prompt_template": {"template": "{}", "crop_start": 0}},
    ),
    Family(
        "Kandinsky 5 video",
        kandinsky5_video,
        "the state is a slice of the latents' channels",
        kwargs={"height": 32, "width": 32, "num_frames": 5},
        columns=NEGATIVE,
        lora=("to_query", "to_key", "to_value"),
        dtype=torch.float32,
        step=0.1,
    ),
]
