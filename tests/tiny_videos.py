"""Tiny text-to-video pipelines."""

from __future__ import annotations

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    LattePipeline,
    LatteTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    MotionAdapter,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from family import PROMPTS, Family
from PIL import Image
from tiny_images import BETAS, gemma, kandinsky5_text, kandinsky5_transformer
from tiny_parts import byte_tokenizer, clip, flow, randomise, t5, vae8
from tiny_pipelines import eval_mode, sd15
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


def wan_vace(*, seed: int = 0) -> WanVACEPipeline:
    """A second branch sees what is to be kept; its latents, and a mask of 8 × 8 pixels a latent, are channels of its input."""
    base = wan(seed=seed)
    transformer = WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
        vace_layers=[0],
        vace_in_channels=72,
    )
    randomise(transformer.vace_blocks[0].proj_out, 0.1)
    return eval_mode(
        WanVACEPipeline(
            transformer=transformer, vae=base.vae, scheduler=flow(), text_encoder=base.text_encoder, tokenizer=base.tokenizer
        )
    )


def wan_from_video(*, seed: int = 0) -> WanVideoToVideoPipeline:
    base = wan(seed=seed)
    return eval_mode(
        WanVideoToVideoPipeline(
            transformer=base.transformer,
            vae=base.vae,
            scheduler=flow(),
            text_encoder=base.text_encoder,
            tokenizer=base.tokenizer,
        )
    )


def skyreels(*, seed: int = 0) -> SkyReelsV2Pipeline:
    base = wan(seed=seed)
    transformer = SkyReelsV2Transformer3DModel(
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
    return eval_mode(
        SkyReelsV2Pipeline(
            transformer=transformer,
            vae=base.vae,
            scheduler=base.scheduler,
            text_encoder=base.text_encoder,
            tokenizer=base.tokenizer,
        )
    )


def sana_video(*, seed: int = 0) -> SanaVideoPipeline:
    base = wan(seed=seed)
    tokenizer = byte_tokenizer(64)
    transformer = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        sample_size=4,
        rope_max_seq_len=32,
    )
    return eval_mode(
        SanaVideoPipeline(
            transformer=transformer,
            vae=base.vae,
            scheduler=flow(shift=8.0),
            text_encoder=gemma(len(tokenizer)),
            tokenizer=tokenizer,
        )
    )


def latte(*, seed: int = 0) -> LattePipeline:
    torch.manual_seed(seed)
    encoder, tokenizer = t5()
    transformer = LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=32,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=3,
    )
    scheduler = DDIMScheduler(**BETAS | {"beta_schedule": "linear"}, clip_sample=False)
    return eval_mode(
        LattePipeline(transformer=transformer, vae=vae8(), scheduler=scheduler, text_encoder=encoder, tokenizer=tokenizer)
    )


def animatediff(*, seed: int = 0) -> AnimateDiffPipeline:
    """Layers between the frames, added to an image UNet."""
    base = sd15(seed=seed)
    motion = MotionAdapter(
        block_out_channels=(4, 8), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
    )
    return eval_mode(
        AnimateDiffPipeline(
            unet=base.unet,
            motion_adapter=motion,
            vae=base.vae,
            scheduler=DDIMScheduler(**BETAS | {"beta_schedule": "linear"}, clip_sample=False),
            text_encoder=base.text_encoder,
            tokenizer=base.tokenizer,
        )
    )


# ------------------------------------------------------------------------------------------------------------------------ rows

NEGATIVE = {"prompt": PROMPTS, "negative_prompt": ["blurry", "dark"]}
SMALL = {"height": 16, "width": 32, "num_frames": 5}
TEXT_16 = {"max_sequence_length": 16}
LTX = {"height": 32, "width": 64, "num_frames": 9, **TEXT_16}
EXPERTS = {**SMALL, **TEXT_16, "guidance_scale_2": 2.0}


def film(seed: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(seed)
    return [Image.fromarray((torch.rand(16, 32, 3, generator=generator) * 255).byte().numpy()) for _ in range(5)]


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
    Family("SkyReels-V2", skyreels, "Wan's text and decoder", kwargs={**SMALL, **TEXT_16}, columns=NEGATIVE),
    Family(
        "Sana-Video",
        sana_video,
        "linear attention over the frames",
        kwargs={
            "height": 32,
            "width": 32,
            "frames": 5,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
            **TEXT_16,
        },
        columns=NEGATIVE,
        dtype=torch.float32,
        step=3e-2,
    ),
    Family(
        "Latte",
        latte,
        "learned variance, frames and pixels by turns",
        kwargs={"height": 64, "width": 64, "video_length": 3, "clean_caption": False},
        columns=NEGATIVE,
        lora=None,
    ),
    Family(
        "AnimateDiff",
        animatediff,
        "layers between the frames of an image UNet",
        kwargs={"height": 16, "width": 16, "num_frames": 3},
        columns=NEGATIVE,
    ),
    Family(
        "Wan-VACE",
        wan_vace,
        "a second branch with a video to keep parts of; one bare prompt and generator",
        kwargs={**SMALL, **TEXT_16},
        columns={**NEGATIVE, "video": [film(1), film(2)], "mask": [film(3), film(4)]},
        one_sample=True,
    ),
    Family(
        "Wan 2.1, video to video",
        wan_from_video,
        "a video as a start below noise",
        kwargs={"height": 16, "width": 32, **TEXT_16, "strength": 0.7},
        columns={**NEGATIVE, "video": [film(1), film(2)]},
        one_sample=True,
    ),
]
