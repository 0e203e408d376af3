"""Tiny text-to-image, class-conditional and unconditional pipelines."""

from __future__ import annotations

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    IFPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from family import PROMPTS, Family
from tiny_parts import byte_tokenizer, clip, flow, projected_clip, qwen3, qwen_tokenizer, qwen_vl, randomise, t5, vae8
from tiny_pipelines import eval_mode, sd3, sd15, vae
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2VLProcessor,
)

__all__ = ["FAMILIES"]

SHIFTED = {"shift_factor": 0.0609, "scaling_factor": 1.5305, "use_quant_conv": False, "use_post_quant_conv": False}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


# ---------------------------------------------------------------------------------------------------------------- UNets


def sd21(*, seed: int = 0) -> StableDiffusionPipeline:
    pipeline = sd15(DDIMScheduler(**BETAS, clip_sample=False, prediction_type="v_prediction", steps_offset=1), seed=seed)
    return pipeline


def sd15_pag(*, seed: int = 0) -> StableDiffusionPAGPipeline:
    """Guided by a third prediction, of a network whose self-attention looks nowhere."""
    parts = sd15(seed=seed).components
    return eval_mode(StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers=["up"]))


def sdxl_unet(**config) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "transformer_layers_per_block": (1, 1),
        "projection_class_embeddings_input_dim": 80,
        "cross_attention_dim": 64,
        "norm_num_groups": 1,
    }
    return UNet2DConditionModel(**settings | config)


def sdxl(*, seed: int = 0) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    (encoder, tokenizer), (encoder_2, tokenizer_2) = clip(), projected_clip()
    return eval_mode(
        StableDiffusionXLPipeline(
            unet=sdxl_unet(),
            scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
            vae=vae(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            text_encoder_2=encoder_2,
            tokenizer_2=tokenizer_2,
            add_watermarker=False,
        )
    )


def deepfloyd_if(*, seed: int = 0) -> IFPipeline:
    """Pixels; the variance that its network has learnt is split off before `scheduler.step`."""
    torch.manual_seed(seed)
    encoder, tokenizer = t5()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=6,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        encoder_hid_dim=32,
        encoder_hid_dim_type="text_proj",
        attention_head_dim=2,
        norm_num_groups=2,
    )
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=False, thresholding=False
    )
    parts = {"safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False}
    return eval_mode(IFPipeline(unet=unet, scheduler=scheduler, text_encoder=encoder, tokenizer=tokenizer, **parts))


class PositionedTokenizer:
    """Stands in for ChatGLM's tokenizer, which needs a model file."""

    model_max_length, pad_token_id = 32, 0

    def __init__(self):
        self.tokenizer = byte_tokenizer(32, padding_side="left")

    def __call__(self, *args, **kwargs):
        encoded = self.tokenizer(*args, **kwargs)
        rows, length = encoded["input_ids"].shape
        encoded["position_ids"] = torch.arange(length).expand(rows, -1)
        return encoded


def kolors(*, seed: int = 0) -> KolorsPipeline:
    torch.manual_seed(seed)
    tokenizer = PositionedTokenizer()
    encoder = ChatGLMModel(
        ChatGLMConfig(
            num_layers=2,
            padded_vocab_size=len(tokenizer.tokenizer),
            hidden_size=16,
            ffn_hidden_size=16,
            kv_channels=8,
            num_attention_heads=2,
            seq_length=256,
            multi_query_attention=True,
            multi_query_group_num=1,
            add_qkv_bias=True,
            rmsnorm=True,
            apply_query_key_layer_scaling=True,
            attention_softmax_in_fp32=True,
            original_rope=True,
        )
    )
    randomise(encoder, 0.1)
    return eval_mode(
        KolorsPipeline(
            unet=sdxl_unet(projection_class_embeddings_input_dim=64, cross_attention_dim=16),
            vae=vae(),
            scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
            text_encoder=encoder,
            tokenizer=tokenizer,
        )
    )


def unet2d() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def ddpm(*, seed: int = 0) -> DDPMPipeline:
    torch.manual_seed(seed)
    return eval_mode(DDPMPipeline(unet=unet2d(), scheduler=DDPMScheduler(clip_sample=False)))


def ddim(*, seed: int = 0) -> DDIMPipeline:
    torch.manual_seed(seed)
    return eval_mode(DDIMPipeline(unet=unet2d(), scheduler=DDIMScheduler(clip_sample=False)))


# --------------------------------------------------------------------------------------- transformers with an ε- or v-prediction


def dit(*, seed: int = 0) -> DiTPipeline:
    """The learned variance is half of its output."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=4,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    return eval_mode(DiTPipeline(transformer=transformer, vae=vae(), scheduler=DDIMScheduler(clip_sample=False)))


def pixart_sigma(*, seed: int = 0) -> PixArtSigmaPipeline:
    torch.manual_seed(seed)
    encoder, tokenizer = t5()
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=32,
        use_additional_conditions=False,
    )
    scheduler = DPMSolverMultistepScheduler(**BETAS | {"beta_schedule": "linear"})
    return eval_mode(
        PixArtSigmaPipeline(transformer=transformer, vae=vae8(), scheduler=scheduler, text_encoder=encoder, tokenizer=tokenizer)
    )


def pixart_alpha(*, seed: int = 0) -> PixArtAlphaPipeline:
    return eval_mode(PixArtAlphaPipeline(**pixart_sigma(seed=seed).components))


def cogview3(*, seed: int = 0) -> CogView3PlusPipeline:
    torch.manual_seed(seed)
    encoder, tokenizer = t5()
    transformer = CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=8,
    )
    scheduler = CogVideoXDDIMScheduler(
        **BETAS, prediction_type="v_prediction", clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return eval_mode(
        CogView3PlusPipeline(transformer=transformer, vae=vae(), scheduler=scheduler, text_encoder=encoder, tokenizer=tokenizer)
    )


def hunyuan_dit(*, seed: int = 0) -> HunyuanDiTPipeline:
    torch.manual_seed(seed)
    letters = [letter for code in range(97, 123) for letter in (chr(code), f"##{chr(code)}")]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=77)
    encoder = BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=77,
        )
    )
    encoder_2, tokenizer_2 = t5(256)
    transformer = HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        in_channels=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=24,
        activation_fn="gelu-approximate",
    )
    scheduler = DDPMScheduler(**BETAS | {"beta_end": 0.03}, prediction_type="v_prediction", steps_offset=1)
    return eval_mode(
        HunyuanDiTPipeline(
            transformer=transformer,
            vae=vae8(),
            scheduler=scheduler,
            text_encoder=encoder,
            tokenizer=tokenizer,
            text_encoder_2=encoder_2,
            tokenizer_2=tokenizer_2,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


# ----------------------------------------------------------------------------------------------------------- flow transformers


def flux_transformer(*, guidance_embeds: bool = True, in_channels: int = 16) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )


def flux(*, seed: int = 0, guidance_embeds: bool = True) -> FluxPipeline:
    torch.manual_seed(seed)
    (encoder, tokenizer), (encoder_2, tokenizer_2) = clip(), t5()
    return eval_mode(
        FluxPipeline(
            transformer=flux_transformer(guidance_embeds=guidance_embeds),
            scheduler=flow(use_dynamic_shifting=True),
            vae=vae(**SHIFTED),
            text_encoder=encoder,
            tokenizer=tokenizer,
            text_encoder_2=encoder_2,
            tokenizer_2=tokenizer_2,
        )
    )


def flux_schnell(*, seed: int = 0) -> FluxPipeline:
    """No guidance embedding: `guidance_scale` of the trainer is true classifier-free guidance."""
    return flux(seed=seed, guidance_embeds=False)


def flux2_parts(*, guidance_embeds: bool) -> dict:
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    autoencoder = AutoencoderKLFlux2(
        sample_size=32,
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    scheduler = flow(use_dynamic_shifting=True)
    return {"transformer": transformer, "vae": autoencoder, "scheduler": scheduler, "tokenizer": byte_tokenizer(512)}


def flux2(*, seed: int = 0) -> Flux2Pipeline:
    torch.manual_seed(seed)
    parts = flux2_parts(guidance_embeds=True)
    text = {
        "model_type": "mistral",
        "vocab_size": len(parts["tokenizer"]),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "num_channels": 3,
    }
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    return eval_mode(Flux2Pipeline(**parts, text_encoder=encoder))


def flux2_klein(*, seed: int = 0) -> Flux2KleinPipeline:
    torch.manual_seed(seed)
    parts = flux2_parts(guidance_embeds=False)
    return eval_mode(Flux2KleinPipeline(**parts, text_encoder=qwen3(len(parts["tokenizer"]))))


def qwen_networks() -> tuple[QwenImageTransformer2DModel, AutoencoderKLQwenImage]:
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return transformer, autoencoder


def qwen_image(*, seed: int = 0) -> QwenImagePipeline:
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer(2048)
    transformer, autoencoder = qwen_networks()
    encoder = qwen_vl(len(tokenizer) + 8, vision_end_token_id=1, vision_start_token_id=1, vision_token_id=1)
    return eval_mode(
        QwenImagePipeline(
            transformer=transformer,
            vae=autoencoder,
            scheduler=flow(use_dynamic_shifting=True),
            text_encoder=encoder,
            tokenizer=tokenizer,
        )
    )


def z_image(*, seed: int = 0) -> ZImagePipeline:
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(512)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # memory as it was found
        torch.nn.init.normal_(token, std=0.02)
    return eval_mode(
        ZImagePipeline(
            transformer=transformer,
            vae=vae(**SHIFTED),
            scheduler=flow(),
            text_encoder=qwen3(len(tokenizer)),
            tokenizer=tokenizer,
        )
    )


def gemma(vocabulary: int) -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            head_dim=8,
            hidden_size=16,
            intermediate_size=32,
            num_attention_heads=2,
            num_hidden_layers=2,
            num_key_value_heads=2,
            vocab_size=vocabulary,
            attn_implementation="eager",
            pad_token_id=0,
        )
    )


def sana(*, seed: int = 0) -> SanaPipeline:
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(64)
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=32,
    )
    autoencoder = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return eval_mode(
        SanaPipeline(
            transformer=transformer,
            vae=autoencoder,
            scheduler=flow(shift=7.0),
            text_encoder=gemma(len(tokenizer)),
            tokenizer=tokenizer,
        )
    )


def lumina2(*, seed: int = 0) -> Lumina2Pipeline:
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(256)
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(300, 16, 16),
        cap_feat_dim=16,
    )
    return eval_mode(
        Lumina2Pipeline(
            transformer=transformer,
            vae=vae8(shift_factor=0.1, scaling_factor=0.5),
            scheduler=flow(),
            text_encoder=gemma(len(tokenizer)),
            tokenizer=tokenizer,
        )
    )


def aura_flow(*, seed: int = 0) -> AuraFlowPipeline:
    torch.manual_seed(seed)
    encoder, tokenizer = t5()
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    randomise(transformer.proj_out)
    return eval_mode(
        AuraFlowPipeline(
            transformer=transformer, vae=vae(), scheduler=flow(shift=1.73), text_encoder=encoder, tokenizer=tokenizer
        )
    )


def cogview4(*, seed: int = 0) -> CogView4Pipeline:
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(128)
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    )
    encoder = GlmModel(
        GlmConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=len(tokenizer),
            pad_token_id=0,
        )
    )
    scheduler = flow(
        shift=1.0, base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return eval_mode(
        CogView4Pipeline(transformer=transformer, vae=vae(), scheduler=scheduler, text_encoder=encoder, tokenizer=tokenizer)
    )


def hidream(*, seed: int = 0) -> HiDreamImagePipeline:
    """Routed experts, which run without gradient in evaluation mode."""
    torch.manual_seed(seed)
    (encoder, tokenizer), (encoder_2, tokenizer_2), (encoder_3, tokenizer_3) = projected_clip(), projected_clip(), t5()
    tokenizer_4 = byte_tokenizer(16)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
    )
    for module in transformer.modules():
        if type(module).__name__ == "MoEGate":  # memory as it was found
            randomise(module, 1.0)
        if type(module).__name__ == "MOEFeedForwardSwiGLU":  # at random they hardly carry any of the output
            for weight in module.experts.parameters():
                weight.data *= 2
    encoder_4 = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer_4),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    pipeline = HiDreamImagePipeline(
        transformer=transformer,
        vae=vae(**SHIFTED),
        scheduler=flow(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
        text_encoder_4=encoder_4,
        tokenizer_4=tokenizer_4,
    )
    pipeline.default_sample_size = 8  # its call scales every size to this area
    return eval_mode(pipeline)


def chroma(*, seed: int = 0) -> ChromaPipeline:
    torch.manual_seed(seed)
    encoder, tokenizer = t5()
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return eval_mode(
        ChromaPipeline(transformer=transformer, scheduler=flow(), vae=vae(**SHIFTED), text_encoder=encoder, tokenizer=tokenizer)
    )


class TextProcessor(Qwen2VLProcessor):
    """Stands in for a processor that would need an image processor, which text alone does not."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text=None, images=None, videos=None, **kwargs):
        return self.tokenizer(text, **kwargs)


def kandinsky5_transformer(**config) -> Kandinsky5Transformer3DModel:
    settings = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 16,
        "in_text_dim2": 32,
        "time_dim": 32,
        "patch_size": (1, 2, 2),
        "model_dim": 16,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 1,
        "axes_dims": (4, 2, 2),
    }
    transformer = Kandinsky5Transformer3DModel(**settings | config)
    for module in transformer.modules():
        if type(module).__name__ == "Kandinsky5Modulation":  # starts at zero: the prompt would have no effect
            randomise(module.out_layer)
    return transformer


def kandinsky5_text() -> dict:
    tokenizer, (encoder_2, tokenizer_2) = byte_tokenizer(512), clip(77)
    return {
        "text_encoder": qwen_vl(len(tokenizer)),
        "tokenizer": TextProcessor(tokenizer),
        "text_encoder_2": encoder_2,
        "tokenizer_2": tokenizer_2,
    }


def kandinsky5_image(*, seed: int = 0) -> Kandinsky5T2IPipeline:
    torch.manual_seed(seed)
    pipeline = Kandinsky5T2IPipeline(
        transformer=kandinsky5_transformer(), vae=vae8(), scheduler=flow(shift=5.0), **kandinsky5_text()
    )
    pipeline.resolutions = [(32, 32)]  # its call snaps to a list of about a megapixel
    return eval_mode(pipeline)


# ------------------------------------------------------------------------------------------------------------------------ rows

NEGATIVE = {"prompt": PROMPTS, "negative_prompt": ["blurry", "dark"]}
SMALL = {"height": 16, "width": 16}
SKIP = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.6, "max_sequence_length": 8}
TEXT_16 = {"max_sequence_length": 16}
OUTPUTS = {"text_encoder_out_layers": (1, 2, 3)}

FAMILIES = [
    Family("Stable Diffusion 1.5", sd15, "ε-prediction", columns=NEGATIVE, fast=True),
    Family("Stable Diffusion 2.1", sd21, "v-prediction, guidance rescale", kwargs={"guidance_rescale": 0.7}, columns=NEGATIVE),
    Family("Stable Diffusion 1.5, perturbed attention", sd15_pag, "a second scale of guidance", columns=NEGATIVE),
    Family("SDXL", sdxl, "added time and size conditions", columns=NEGATIVE),
    Family("Stable Diffusion 3", sd3, "flow prediction", kwargs={"max_sequence_length": 8}, columns=NEGATIVE),
    Family("Stable Diffusion 3, skip-layer guidance", sd3, "guidance that depends on the step", kwargs=SKIP, fast=True),
    Family("FLUX.1", flux, "distilled guidance, packed latents, dynamic shift", kwargs={**SMALL, **TEXT_16}, fast=True),
    Family(
        "FLUX.1, true CFG",
        flux,
        "two denoiser calls beside the guidance embedding",
        kwargs={**SMALL, **TEXT_16, "true_cfg_scale": 2.0},
        columns=NEGATIVE,
        fast=True,
    ),
    Family("FLUX.2", flux2, "latents packed before the loop", kwargs={**SMALL, **OUTPUTS, "max_sequence_length": 512}),
    Family("FLUX.2-klein", flux2_klein, "CFG with two text encodings", kwargs={**SMALL, **OUTPUTS, "max_sequence_length": 128}),
    Family(
        "Qwen-Image",
        qwen_image,
        "true CFG, rescaled to the norm",
        scale="true_cfg_scale",
        kwargs=SMALL,
        columns=NEGATIVE,
        fast=True,
    ),
    Family(
        "Z-Image",
        z_image,
        "guidance 0 is none; writes into the prompt list",
        kwargs={**SMALL, "max_sequence_length": 128},
        columns=NEGATIVE,
        lora=("to_q", "to_k", "to_v", "to_out.0"),
        fast=True,
    ),
    Family(
        "Sana",
        sana,
        "linear attention, prediction in float32",
        kwargs={
            "height": 32,
            "width": 32,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
            "max_sequence_length": 16,
        },
        columns=NEGATIVE,
        dtype=torch.float32,
        step=3e-2,
    ),
    Family(
        "PixArt-Σ",
        pixart_sigma,
        "learned variance, DPM-Solver",
        kwargs={"height": 64, "width": 64, "use_resolution_binning": False, **TEXT_16},
        columns=NEGATIVE,
        lora=None,
    ),
    Family(
        "PixArt-α",
        pixart_alpha,
        "masked text, learned variance",
        kwargs={"height": 64, "width": 64, "use_resolution_binning": False, "clean_caption": False, **TEXT_16},
        columns=NEGATIVE,
        lora=None,
    ),
    Family("CogView3+", cogview3, "v-prediction down to no signal", kwargs={**SMALL, **TEXT_16}, columns=NEGATIVE, lora=None),
    Family("AuraFlow", aura_flow, "flow on T5 alone", kwargs={**SMALL, **TEXT_16}, columns=NEGATIVE),
    Family("Lumina 2", lumina2, "CFG truncation", kwargs={"height": 32, "width": 32, "cfg_trunc_ratio": 0.5}, columns=NEGATIVE),
    Family(
        "HunyuanDiT",
        hunyuan_dit,
        "v-prediction, learned variance",
        kwargs={"height": 64, "width": 64, "use_resolution_binning": False},
        columns=NEGATIVE,
        lora=None,
    ),
    Family("CogView4", cogview4, "linear time shift", kwargs={**SMALL, **TEXT_16}, columns=NEGATIVE),
    Family("HiDream", hidream, "mixture of experts", kwargs={**SMALL, **TEXT_16}, columns=NEGATIVE, step=1e-5, fast=True),
    Family(
        "DeepFloyd IF",
        deepfloyd_if,
        "pixels drawn under another name, learned variance",
        kwargs={"clean_caption": False},
        columns=NEGATIVE,
    ),
    Family("Kolors", kolors, "SDXL's UNet on a language model", kwargs={**SMALL, "max_sequence_length": 32}, columns=NEGATIVE),
    Family("Chroma", chroma, "attention mask on the text", kwargs={**SMALL, **TEXT_16}, columns=NEGATIVE),
    Family(
        "Kandinsky 5 image",
        kandinsky5_image,
        "rotary embedding rounds to bf16",
        kwargs={"height": 32, "width": 32},
        columns=NEGATIVE,
        lora=("to_query", "to_key", "to_value"),
        dtype=torch.float32,
        step=0.1,
    ),
    Family("DiT", dit, "class labels, a doubled batch in the loop", columns={"class_labels": [3, 7]}, lora=None, fast=True),
    Family("DDPM", ddpm, "unconditional pixels", 1.0, scale=None, columns={}, lora=None, fast=True),
    Family("DDIM", ddim, "unconditional pixels", 1.0, scale=None, columns={}, lora=None),
]
