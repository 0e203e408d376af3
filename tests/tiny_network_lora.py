"""Tiny pipelines that save no LoRA themselves: their networks do."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanVideo15,
    BriaPipeline,
    BriaTransformer2DModel,
    ClassifierFreeGuidance,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)
from family import PROMPTS, Family
from tiny_images import SHIFTED, TextProcessor
from tiny_parts import byte_tokenizer, flow, qwen3, qwen_tokenizer, qwen_vl, t5
from tiny_pipelines import eval_mode, vae
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

__all__ = ["FAMILIES"]


def ovis(*, seed: int = 0) -> OvisImagePipeline:
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(64)
    transformer = OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = OvisImagePipeline(
        transformer=transformer,
        vae=vae(**SHIFTED),
        scheduler=flow(use_dynamic_shifting=True),
        text_encoder=qwen3(len(tokenizer)).model,
        tokenizer=tokenizer,
    )
    # Its own instruction is 150 letters long.
    pipeline.system_prompt, pipeline.user_prompt_begin_id = "", len("user: ")
    return eval_mode(pipeline)


def bria(*, seed: int = 0) -> BriaPipeline:
    torch.manual_seed(seed)
    encoder, tokenizer = t5()
    transformer = BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return eval_mode(
        BriaPipeline(transformer=transformer, vae=vae(**SHIFTED), scheduler=flow(), text_encoder=encoder, tokenizer=tokenizer)
    )


def longcat(*, seed: int = 0) -> LongCatImagePipeline:
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    transformer = LongCatImageTransformer2DModel(
        in_channels=64,  # the number of latents is one of the pipeline's code
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    pipeline = LongCatImagePipeline(
        transformer=transformer,
        vae=vae(latent_channels=16, **SHIFTED),
        scheduler=flow(use_dynamic_shifting=True),
        text_encoder=qwen_vl(len(tokenizer) + 8, vision_end_token_id=1, vision_start_token_id=1, vision_token_id=1),
        tokenizer=tokenizer,
        text_processor=TextProcessor(tokenizer),
    )
    pipeline.prompt_template_encode_prefix, pipeline.tokenizer_max_length = "user: ", 16
    return eval_mode(pipeline)


def glyph_encoder() -> tuple[T5EncoderModel, ByT5Tokenizer]:
    """Of texts in quotation marks, byte by byte."""
    tokenizer = ByT5Tokenizer()
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    return T5EncoderModel(config), tokenizer


def hunyuan_image(*, seed: int = 0) -> HunyuanImagePipeline:
    """Guidance is the affair of a component; at its scale 1 there is none."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    encoder_2, tokenizer_2 = glyph_encoder()
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=16,
        text_embed_2_dim=32,
        rope_axes_dim=(4, 4),
    )
    autoencoder = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.75289,
    )
    pipeline = HunyuanImagePipeline(
        transformer=transformer,
        vae=autoencoder,
        scheduler=flow(shift=5.0),
        text_encoder=qwen_vl(len(tokenizer) + 8, vision_end_token_id=1, vision_start_token_id=1, vision_token_id=1),
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        guider=ClassifierFreeGuidance(guidance_scale=1.0),
        ocr_guider=ClassifierFreeGuidance(guidance_scale=1.0),
    )
    pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx = "user: {}", len("user: ")
    pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length = 16, 16
    return eval_mode(pipeline)


def hunyuan_video15(*, seed: int = 0) -> HunyuanVideo15Pipeline:
    """The transformer takes latents, an image to start from and its mask, and the tokens of a vision encoder: here empty."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(64)
    encoder_2, tokenizer_2 = glyph_encoder()
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=16,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    autoencoder = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    pipeline = HunyuanVideo15Pipeline(
        transformer=transformer,
        vae=autoencoder,
        scheduler=flow(shift=7.0),
        text_encoder=qwen_vl(
            len(tokenizer) + 8, vision_end_token_id=1, vision_start_token_id=1, vision_token_id=1
        ).model.language_model,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        guider=ClassifierFreeGuidance(guidance_scale=1.0),
    )
    pipeline.system_message, pipeline.prompt_template_encode_start_idx = "", len("system: \nuser: ")
    pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length, pipeline.vision_num_semantic_tokens = 16, 16, 4
    return eval_mode(pipeline)


# ------------------------------------------------------------------------------------------------------------------------ rows

NEGATIVE = {"prompt": PROMPTS, "negative_prompt": ["blurry", "dark"]}
WRITTEN = {"prompt": ['a cat "hi"', 'two dogs "no"']}
SMALL = {"height": 16, "width": 16}
TEXT_16 = {"max_sequence_length": 16}

FAMILIES = [
    Family(
        "Ovis-Image",
        ovis,
        "a language model without its instruction",
        kwargs={**SMALL, **TEXT_16},
        columns=NEGATIVE,
        network_lora=True,
    ),
    Family("Bria 3.2", bria, "T5 alone", kwargs={**SMALL, **TEXT_16}, columns=NEGATIVE, network_lora=True),
    Family(
        "LongCat-Image",
        longcat,
        "guidance rescaled to the norm",
        kwargs={**SMALL, "enable_prompt_rewrite": False},
        columns=NEGATIVE,
        network_lora=True,
    ),
    Family(
        "HunyuanImage 2.1",
        hunyuan_image,
        "a guider, off; texts in quotation marks are read by bytes",
        scale=None,
        guidance_scale=1.0,
        kwargs=SMALL,
        columns=WRITTEN,
        network_lora=True,
    ),
    Family(
        "HunyuanVideo 1.5",
        hunyuan_video15,
        "a guider, off; an empty place for an image; its decoder takes one video",
        scale=None,
        guidance_scale=1.0,
        kwargs={**SMALL, "num_frames": 5},
        columns=WRITTEN,
        network_lora=True,
        one_sample=True,
    ),
]
