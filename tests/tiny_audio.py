"""Tiny audio pipelines."""

from __future__ import annotations

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    AutoencoderOobleck,
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
)
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from family import PROMPTS, Family
from tiny_parts import t5
from tiny_pipelines import eval_mode
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["FAMILIES"]


def stable_audio(*, seed: int = 0) -> StableAudioPipeline:
    torch.manual_seed(seed)
    encoder, tokenizer = t5()
    transformer = StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=16,
        cross_attention_input_dim=16,
        time_proj_dim=8,
        global_states_input_dim=32,
    )
    vae = AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=4,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    return eval_mode(
        StableAudioPipeline(
            transformer=transformer,
            vae=vae,
            scheduler=CosineDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500),
            text_encoder=encoder,
            tokenizer=tokenizer,
            projection_model=StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=16, min_value=0, max_value=32),
        )
    )


def clap(vocabulary: int) -> ClapModel:
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": 1,
        "projection_dim": 16,
    }
    audio = {
        "spec_size": 64,
        "window_size": 4,
        "num_mel_bins": 64,
        "intermediate_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 2,
        "hidden_size": 192,
        "projection_dim": 16,
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
    }
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16))


def audio_ldm2(*, seed: int = 0) -> AudioLDM2Pipeline:
    torch.manual_seed(seed)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *bytes_to_unicode().values()]
    tokenizer = RobertaTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=[], model_max_length=16)
    encoder_2, tokenizer_2 = t5()
    language_model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=64))
    language_model.config.max_new_tokens = 4
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, 16, 32), (None, 16, 32)),
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=16,
            sampling_rate=16000,
            upsample_initial_channel=8,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3, 7],
            resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
            initializer_range=0.3,
            normalize_before=False,
        )
    )
    return eval_mode(
        AudioLDM2Pipeline(
            vae=vae,
            text_encoder=clap(len(tokens)),
            text_encoder_2=encoder_2,
            projection_model=AudioLDM2ProjectionModel(16, 32, 16),
            language_model=language_model,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            feature_extractor=ClapFeatureExtractor(feature_size=64),
            unet=unet,
            scheduler=DDIMScheduler(
                beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
            ),
            vocoder=vocoder,
        )
    )


# ------------------------------------------------------------------------------------------------------------------------ rows

NEGATIVE = {"prompt": PROMPTS, "negative_prompt": ["blurry", "dark"]}

FAMILIES = [
    Family(
        "Stable Audio",
        stable_audio,
        "waveforms, an EDM schedule",
        kwargs={"audio_end_in_s": 1.5},
        columns=NEGATIVE,
        lora=None,
        dtype=torch.float32,
        step=3e-2,
    ),
    Family(
        "AudioLDM 2",
        audio_ldm2,
        "waveforms through a vocoder, text by a language model",
        kwargs={"audio_length_in_s": 0.004, "max_new_tokens": 4},
        columns=NEGATIVE,
        lora=None,
    ),
]
