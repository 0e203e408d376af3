"""Tiny pipelines with an image beside the prompt: edited, started from, followed as a control, or continued as a video."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    ChromaImg2ImgPipeline,
    ControlNetModel,
    EulerDiscreteScheduler,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    LTXImageToVideoPipeline,
    QwenImageEditPipeline,
    QwenImageImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from family import PROMPTS, Family
from PIL import Image
from tiny_images import chroma, flux, flux_transformer, qwen_image, qwen_networks, sdxl
from tiny_parts import flow, qwen_vl, randomise, t5
from tiny_pipelines import eval_mode, sd3, sd15
from tiny_videos import ltx
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["FAMILIES"]


def picture(seed: int, size: int = 16) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray((torch.rand(size, size, 3, generator=generator) * 255).byte().numpy())


def components_of(pipeline, *but: str) -> dict:
    return {name: part for name, part in pipeline.components.items() if name not in but}


# -------------------------------------------------------------------------------------------------------------- edited images


def flux_kontext(*, seed: int = 0) -> FluxKontextPipeline:
    return eval_mode(FluxKontextPipeline(**components_of(flux(seed=seed))))


VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PATCH = 28  # pixels across one image token


def vision_tokenizer() -> Qwen2Tokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION]
    tokens = [*bytes_to_unicode().values(), *special]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=1024, additional_special_tokens=special[1:])


class OneTokenProcessor:
    """Stands in for Qwen2VLProcessor, which needs torchvision; every image becomes one token."""

    def __init__(self, tokenizer: Qwen2Tokenizer):
        self.tokenizer = tokenizer
        self.image_processor = Qwen2VLImageProcessor(min_pixels=PATCH**2, max_pixels=PATCH**2)

    def __call__(self, text, images, **kwargs):
        encoded = self.tokenizer(text, **kwargs)
        encoded.update(self.image_processor(images=images, return_tensors="pt"))
        return encoded


def qwen_image_edit(*, seed: int = 0) -> QwenImageEditPipeline:
    torch.manual_seed(seed)
    tokenizer = vision_tokenizer()
    transformer, autoencoder = qwen_networks()
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(VISION), strict=True))
    pipeline = QwenImageEditPipeline(
        transformer=transformer,
        vae=autoencoder,
        scheduler=flow(use_dynamic_shifting=True),
        text_encoder=qwen_vl(len(tokenizer), **ids),
        tokenizer=tokenizer,
        processor=OneTokenProcessor(tokenizer),
    )
    # Its own instruction is 300 letters long.
    pipeline.prompt_template_encode = "edit <|vision_start|><|image_pad|><|vision_end|>{}"
    pipeline.prompt_template_encode_start_idx = len("edit ")
    # Its call scales every image to the area of 1024².
    pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: (32, 32, None)
    return eval_mode(pipeline)


def instruct_pix2pix(*, seed: int = 0) -> StableDiffusionInstructPix2PixPipeline:
    """The image's latents are channels of the UNet's input."""
    base = sd15(seed=seed)
    unet = UNet2DConditionModel.from_config(base.unet.config, in_channels=8)
    return eval_mode(
        StableDiffusionInstructPix2PixPipeline(**components_of(base, "unet"), unet=unet, requires_safety_checker=False)
    )


def sd15_inpaint(*, seed: int = 0) -> StableDiffusionInpaintPipeline:
    """The mask and the latents of what it leaves are channels of the UNet's input; nothing is blended in."""
    base = sd15(seed=seed)
    unet = UNet2DConditionModel.from_config(base.unet.config, in_channels=9)
    return eval_mode(StableDiffusionInpaintPipeline(**components_of(base, "unet"), unet=unet, requires_safety_checker=False))


def flux_fill(*, seed: int = 0) -> FluxFillPipeline:
    """The mask of 2 × 2 pixels a latent, and the latents of what it leaves, are channels of the transformer's input."""
    torch.manual_seed(seed)
    parts = components_of(flux(seed=seed), "transformer", "image_encoder", "feature_extractor")
    return eval_mode(FluxFillPipeline(**parts, transformer=flux_transformer(in_channels=48)))


# --------------------------------------------------------------------------------------------------------- images as a start


def sd15_from_image(*, seed: int = 0) -> StableDiffusionImg2ImgPipeline:
    return eval_mode(StableDiffusionImg2ImgPipeline(**components_of(sd15(seed=seed)), requires_safety_checker=False))


def sdxl_from_image(*, seed: int = 0) -> StableDiffusionXLImg2ImgPipeline:
    """What the refiner is."""
    return eval_mode(StableDiffusionXLImg2ImgPipeline(**components_of(sdxl(seed=seed)), add_watermarker=False))


def sd3_from_image(*, seed: int = 0) -> StableDiffusion3Img2ImgPipeline:
    return eval_mode(StableDiffusion3Img2ImgPipeline(**components_of(sd3(seed=seed))))


def flux_from_image(*, seed: int = 0) -> FluxImg2ImgPipeline:
    return eval_mode(FluxImg2ImgPipeline(**components_of(flux(seed=seed))))


def chroma_from_image(*, seed: int = 0) -> ChromaImg2ImgPipeline:
    return eval_mode(ChromaImg2ImgPipeline(**components_of(chroma(seed=seed))))


def qwen_from_image(*, seed: int = 0) -> QwenImageImg2ImgPipeline:
    return eval_mode(QwenImageImg2ImgPipeline(**components_of(qwen_image(seed=seed))))


# --------------------------------------------------------------------------------------------------------- images as a control


def controlnet_of(unet: UNet2DConditionModel) -> ControlNetModel:
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4))
    for zero in (*network.controlnet_down_blocks, network.controlnet_mid_block, network.controlnet_cond_embedding.conv_out):
        randomise(zero)
    return network


def sd15_controlnet(*, seed: int = 0) -> StableDiffusionControlNetPipeline:
    base = sd15(seed=seed)
    return eval_mode(
        StableDiffusionControlNetPipeline(
            **components_of(base), controlnet=controlnet_of(base.unet), requires_safety_checker=False
        )
    )


def flux_control(*, seed: int = 0) -> FluxControlPipeline:
    """The control's latents are channels of the transformer's input; they are drawn in the call itself."""
    torch.manual_seed(seed)
    parts = components_of(flux(seed=seed), "transformer", "image_encoder", "feature_extractor")
    return eval_mode(FluxControlPipeline(**parts, transformer=flux_transformer(in_channels=32)))


def sdxl_controlnet(*, seed: int = 0) -> StableDiffusionXLControlNetPipeline:
    base = sdxl(seed=seed)
    return eval_mode(
        StableDiffusionXLControlNetPipeline(**components_of(base), controlnet=controlnet_of(base.unet), add_watermarker=False)
    )


# ---------------------------------------------------------------------------------------------------------- images as a frame


def wan22_from_image(*, seed: int = 0) -> WanImageToVideoPipeline:
    """Two transformers; the image and its mask are channels of their input."""
    torch.manual_seed(seed)
    encoder, tokenizer = t5()
    first, second = (
        WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=12,  # latents, mask, image
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=1,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
        for _ in range(2)
    )
    autoencoder = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_spatial=4,
    )
    return eval_mode(
        WanImageToVideoPipeline(
            transformer=first,
            transformer_2=second,
            vae=autoencoder,
            scheduler=flow(),
            text_encoder=encoder,
            tokenizer=tokenizer,
            boundary_ratio=0.875,
        )
    )


def ltx_from_image(*, seed: int = 0) -> LTXImageToVideoPipeline:
    """The first frame is the image's; the others, taken out of the packed latents at each step, are the state."""
    return eval_mode(LTXImageToVideoPipeline(**components_of(ltx(seed=seed))))


def stable_video_scheduler() -> EulerDiscreteScheduler:
    """As published."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type="linear",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
        timestep_type="continuous",
        steps_offset=1,
    )


def stable_video(*, seed: int = 0) -> StableVideoDiffusionPipeline:
    torch.manual_seed(seed)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    )
    autoencoder = AutoencoderKLTemporalDecoder(
        block_out_channels=(32,), down_block_types=["DownEncoderBlock2D"], latent_channels=4
    )
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            image_size=224,  # a number in the pipeline's code
            patch_size=56,
            hidden_size=32,
            projection_dim=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    return eval_mode(
        StableVideoDiffusionPipeline(
            unet=unet,
            vae=autoencoder,
            scheduler=stable_video_scheduler(),
            image_encoder=encoder,
            feature_extractor=CLIPImageProcessor(crop_size=32, size=32),
        )
    )


# ------------------------------------------------------------------------------------------------------------------------ rows

IMAGES = {"prompt": PROMPTS, "image": [picture(1), picture(2)]}
NEGATIVE = {**IMAGES, "negative_prompt": ["blurry", "dark"]}
SMALL = {"height": 16, "width": 16}
TEXT_16 = {"max_sequence_length": 16}
WINDOW = {"control_guidance_start": 0.2, "control_guidance_end": 0.8}  # steps 1 and 2 of 4

FAMILIES = [
    Family(
        "FLUX.1 Kontext",
        flux_kontext,
        "edited image as further tokens",
        kwargs={**SMALL, **TEXT_16, "max_area": 256, "_auto_resize": False},
        columns=IMAGES,
    ),
    Family(
        "Qwen-Image-Edit",
        qwen_image_edit,
        "edited image as further tokens, and seen by the text encoder",
        scale="true_cfg_scale",
        kwargs=SMALL,
        columns=NEGATIVE,
    ),
    Family(
        "InstructPix2Pix",
        instruct_pix2pix,
        "guidance of three predictions",
        kwargs={"image_guidance_scale": 1.5},
        columns=NEGATIVE,
    ),
    Family(
        "Stable Diffusion 1.5, inpainting",
        sd15_inpaint,
        "mask and masked image as channels",
        columns={**NEGATIVE, "mask_image": [picture(3), picture(4)]},
    ),
    Family(
        "FLUX.1 Fill",
        flux_fill,
        "mask and masked image as channels, packed",
        kwargs={**SMALL, **TEXT_16},
        columns={**IMAGES, "mask_image": [picture(3), picture(4)]},
    ),
    Family(
        "Stable Diffusion 1.5, image to image",
        sd15_from_image,
        "starts below noise",
        kwargs={"strength": 0.8},
        columns=NEGATIVE,
        fast=True,
    ),
    Family(
        "SDXL, image to image",
        sdxl_from_image,
        "the pipeline of the refiner",
        kwargs={"strength": 0.5},
        columns=NEGATIVE,
    ),
    Family(
        "Stable Diffusion 3, image to image",
        sd3_from_image,
        "flow that starts below noise",
        kwargs={**SMALL, "max_sequence_length": 8, "strength": 0.7},
        columns=NEGATIVE,
    ),
    Family(
        "FLUX.1, image to image",
        flux_from_image,
        "dynamic shift of a grid cut at its start",
        kwargs={**SMALL, **TEXT_16, "strength": 0.7},
        columns=IMAGES,
    ),
    Family(
        "Chroma, image to image",
        chroma_from_image,
        "attention mask on the text, a start below noise",
        kwargs={**SMALL, **TEXT_16, "strength": 0.7},
        columns=NEGATIVE,
    ),
    Family(
        "Qwen-Image, image to image",
        qwen_from_image,
        "true CFG, a start below noise",
        scale="true_cfg_scale",
        kwargs={**SMALL, "strength": 0.7},
        columns=NEGATIVE,
    ),
    Family(
        "Stable Diffusion 1.5 ControlNet",
        sd15_controlnet,
        "second network, at some of the steps",
        kwargs=WINDOW,
        columns=NEGATIVE,
        fast=True,
    ),
    Family(
        "FLUX.1 Control",
        flux_control,
        "control as channels, drawn from its distribution",
        kwargs={**SMALL, **TEXT_16},
        columns={"prompt": PROMPTS, "control_image": IMAGES["image"]},
        fast=True,
    ),
    Family(
        "SDXL ControlNet",
        sdxl_controlnet,
        "second network with added conditions",
        kwargs=WINDOW,
        columns=NEGATIVE,
    ),
    Family(
        "LTX-Video, image to video",
        ltx_from_image,
        "the state is unpacked and cut out of the latents at each step",
        kwargs={"height": 32, "width": 64, "num_frames": 17, **TEXT_16},
        columns=NEGATIVE,
    ),
    Family(
        "Wan 2.2, image to video",
        wan22_from_image,
        "two transformers; one image for all samples",
        kwargs={**SMALL, **TEXT_16, "num_frames": 5, "guidance_scale_2": 2.0, "image": picture(1)},
        columns={"prompt": PROMPTS, "negative_prompt": ["blurry", "dark"]},
    ),
    Family(
        "Stable Video Diffusion",
        stable_video,
        "no prompt, an EDM schedule, guidance by frame",
        scale="max_guidance_scale",
        kwargs={**SMALL, "num_frames": 3, "decode_chunk_size": 3},
        columns={"image": IMAGES["image"]},
        lora=None,
    ),
]
